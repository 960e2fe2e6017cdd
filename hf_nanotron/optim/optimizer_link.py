"""Between the gradients and an ordinary torch optimizer: hand them over, clip, skip, bring the weights back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..parallel.zero.segment import Segment, ShardedWeights, nothing
from .ema import WeightAverage
from .matrix_optimizer import MatrixOptimizer
from .offload import StateOnHost


class OptimizerLink:
    """Makes `optimizer.step()`, over the masters of `weights.segments`, read their gradients and publish the new
    weights.

    With `host`, the optimizer steps once for each part of the state, and then finds nothing left to do. Its own hooks,
    such as those of a user, run for each.

    torch runs the hooks of a step once for each class whose `step` it has wrapped, which are those of which an object
    was ever made: a `step` that calls `super().step()` may run them twice. What is done here is done once, around the
    outermost.

    Attributes:
        overlap: `step` returns before new weights have arrived; the forward waits for them.
        skips_next: the next `step` changes nothing.
        compares: read all weights before a step, to detect writes that move no version counter.
        number: of the optimizer step that is next, from 1.
        average: takes in the weights after each step, if there is one.
        before_write: called before a step writes weights or state.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, weights: ShardedWeights, host: StateOnHost | None = None
    ) -> None:
        self.optimizer, self.weights, self.host = optimizer, weights, host
        self.overlap = self.skips_next = self.compares = self._holds_gradients = False
        self._running = 0  # wrapped steps that have begun and not ended
        self.number = 1
        self.average: WeightAverage | None = None
        self.before_write: Callable[[], None] = nothing
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def clip(self, norm: torch.Tensor, max_norm: float) -> None:
        """Scale the gradients so that their norm is at most `max_norm`, as `torch.nn.utils.clip_grad_norm_`.

        A fused optimizer divides by the inverse while it reads them, without a pass of its own.
        """
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if self._is_fused:
            self.optimizer.grad_scale = scale.reciprocal()  # type: ignore[attr-defined]
        elif gradients := [segment.gradient for segment in self.weights.segments]:
            torch._foreach_mul_(gradients, scale)

    def apply_clipping(self) -> None:
        """Scale the gradients themselves, if the optimizer would do it while it reads them."""
        scale = getattr(self.optimizer, "grad_scale", None)
        if scale is not None:
            if gradients := [segment.gradient for segment in self.weights.segments]:
                torch._foreach_div_(gradients, scale)
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]

    @property
    def holds_gradients(self) -> bool:
        """Whether the gradients of a step that has not been made yet are there."""
        return self._holds_gradients

    def hold_gradients(self) -> None:
        """The gradients of the next step are complete."""
        self._holds_gradients = True
        self._running = 0  # a step before may have ended with an error

    @property
    def skips_on_device(self) -> bool:
        """Whether the optimizer can skip a step by a flag on the device.

        Not its first: torch's fused SGD would read momentum that it has not written yet. An optimizer of matrices
        communicates, so the answer must not depend on what a rank holds.
        """
        return self._is_fused and (isinstance(self.optimizer, MatrixOptimizer) or bool(self.optimizer.state))

    def skip_unless_finite(self, norm: torch.Tensor) -> None:
        """Have the next `step` change nothing if `norm` is not finite. Needs `skips_on_device`."""
        self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]

    @property
    def _is_fused(self) -> bool:
        # torch decides for the whole optimizer, but a group may say otherwise.
        fused = all(group.get("fused", True) for group in self.optimizer.param_groups)
        return fused and getattr(self.optimizer, "_step_supports_amp_scaling", False)

    @property
    def _writes_weights(self) -> bool:
        # One that the user has made may write something else.
        written = getattr(self.optimizer, "rounded", None)
        return isinstance(written, dict) and all(written.get(s.master) is s.weight for s in self.weights.segments)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, *_: Any) -> None:
        self._running += 1
        if self._running > 1:
            return
        self.before_write()
        self.weights.take_written(self.compares)
        if isinstance(self.optimizer, MatrixOptimizer):
            self.optimizer.skips_next = self.skips_next
        if self.skips_next:
            return
        if self.host is None:
            give_gradients(self.weights.segments)
            return
        is_written = self._writes_weights
        try:
            for segments in self.host.on_device(self.optimizer):
                give_gradients(segments)
                self.optimizer.step()
                take_gradients(segments)
                for segment in () if is_written else segments:
                    if segment.weight is not None:
                        segment.weight.copy_(segment.master.data)  # while it is on the device
        except BaseException:
            self._running = 0
            raise

    def _after(self, *_: Any) -> None:
        self._running -= 1
        if self._running > 0:
            return
        self._holds_gradients, self._running = False, 0
        if self.average is not None and not self.skips_next:
            self.average.update(self.number, getattr(self.optimizer, "found_inf", None))
        self.optimizer.grad_scale = self.optimizer.found_inf = None  # type: ignore[attr-defined]
        take_gradients(self.weights.segments)
        if not self.skips_next:
            self.weights.publish(rounded=self._writes_weights or self.host is not None)
            if not self.overlap:
                self.weights.wait()
        self.skips_next = False


def give_gradients(segments: Iterable[Segment]) -> None:
    for segment in segments:
        segment.master.grad = segment.gradient


def take_gradients(segments: Iterable[Segment]) -> None:
    for segment in segments:
        segment.master.grad = None

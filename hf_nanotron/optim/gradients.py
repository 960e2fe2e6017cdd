"""The gradients of a step in the user's hands: hooks before the norm, and access before the update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from ..parallel.shard_spec import ShardSpec
from ..parallel.zero.segment import Segment


@dataclass(frozen=True)
class GradientPart:
    """Which elements of a weight's gradient a rank holds: `[start, stop)` of its flattened part of the weight.

    Args:
        spec: this rank's part of the weight (by tensor or expert parallelism; all of it without).
        start, stop: half-open range, in elements of that part. ZeRO shards a part over data-parallel ranks.
    """

    spec: ShardSpec
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Name of the weight in the stock model. A tied weight has the name of its source."""
        return self.spec.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole weight in the stock model."""
        return self.spec.global_shape

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The elements of `whole` (of `shape`, a mask for example) at the positions of the gradient's: `[elements]`.

        Raises:
            ValueError: if `whole` has another shape.
        """
        if tuple(whole.shape) != self.shape:
            raise ValueError(f"expected a tensor of shape {self.shape} for {self.name}, got {tuple(whole.shape)}.")
        return self.spec.slice(whole).reshape(-1)[self.start : self.stop]


GradientHook = Callable[[torch.Tensor, GradientPart], torch.Tensor | None]


class GradientHooks:
    """Functions that read, and may change, the reduced gradients of a step before its norm is computed."""

    def __init__(self) -> None:
        self._hooks: dict[int, tuple[frozenset[str], GradientHook]] = {}
        self._added = 0

    def add(self, names: frozenset[str], hook: GradientHook) -> HookHandle:
        """Call `hook` for the weights of these names."""
        self._added += 1
        self._hooks[self._added] = names, hook
        return HookHandle(self._hooks, self._added)

    def weights(self) -> list[list[str]]:
        """Names of the weights of each hook, in the order in which they were added."""
        return [sorted(names) for names, _ in self._hooks.values()]

    def run(self, segments: Sequence[Segment]) -> None:
        """Call the hooks, in the order in which they were added, on every segment of theirs."""
        for names, hook in tuple(self._hooks.values()):
            for gradient, part in parts_of(segments):
                if part.name not in names:
                    continue
                new = hook(gradient, part)
                if new is None or new is gradient:
                    continue
                if new.shape != gradient.shape:
                    raise ValueError(
                        f"a gradient hook returned shape {tuple(new.shape)} for {part.name}, but this rank's part "
                        f"is {tuple(gradient.shape)}. `part.of(whole)` takes it from a tensor of shape {part.shape}."
                    )
                gradient.copy_(new)


@dataclass(frozen=True)
class HookHandle:
    """Removes a gradient hook."""

    hooks: dict[int, tuple[frozenset[str], GradientHook]]
    number: int

    def remove(self) -> None:
        self.hooks.pop(self.number, None)


def parts_of(segments: Iterable[Segment]) -> Iterator[tuple[torch.Tensor, GradientPart]]:
    """This rank's gradients, each `[elements]` in fp32, and which elements they are."""
    for segment in segments:
        yield segment.gradient, GradientPart(segment.spec, segment.start, segment.stop)


def chosen_weights(pattern: str, trainable: Mapping[str, bool], tied: Mapping[str, str]) -> frozenset[str]:
    """The trainable weights that a name or a pattern (`*`, `?`, `[...]`) matches.

    `trainable` says of every weight of the whole model whether it is trained; `tied` maps a name to that of the weight
    it is tied to, which stands for both.
    """
    known = [*trainable, *tied]
    found = {tied.get(name, name) for name in known if name == pattern or fnmatchcase(name, pattern)}
    if not found:
        raise ValueError(
            f"{pattern!r} matches no weight of the model, which has {', '.join(list(trainable)[:3])}, ... "
            f"({len(trainable)} weights)."
        )
    trained = frozenset(name for name in found if trainable[name])
    if not trained:
        raise ValueError(f"{pattern!r}: {sorted(found)[0]} is frozen (requires_grad=False), so it has no gradient.")
    return trained

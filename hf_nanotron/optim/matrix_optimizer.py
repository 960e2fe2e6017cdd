"""Optimizers whose update of a weight needs the whole matrix, while their state stays in flat segments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..parallel.mesh import Group
from ..parallel.shard_spec import ShardSpec
from ..parallel.zero.matrix_plan import Held, MatrixLayout
from ..parallel.zero.whole_matrices import BATCH_ELEMENTS, WholeMatrices
from .adamw import AdamW

MATRIX, ELEMENTWISE = "matrix", "adamw"  # values of "kind" in a parameter group
MATRIX_DTYPES = (torch.float32, torch.bfloat16)


class MatrixOptimizer(AdamW, ABC):
    """The base of optimizers of matrices: W <- (1 - lr * decay) W - lr * scale * direction(momentum).

    A class that derives from it says what the direction of a matrix is; `NanotronTrainer` sees to it that `direction`
    gets whole matrices on every layout (`optimizer_cls_and_kwargs=(YourOptimizer, {...})`). Which weights are matrices
    is said by the trainer: those of linear layers and of experts. All other weights are updated by `AdamW`.

    The state of a matrix is `momentum_buffer` (fp32, element by element): the mean of gradients
    `momentum_buffer.lerp_(gradient, 1 - momentum)`; with `nesterov`, the direction is taken of
    `gradient.lerp(momentum_buffer, momentum)`. `grad_scale`, `found_inf` and `rounded` are those of `AdamW`.

    Without a trainer it updates whole parameters of two dimensions, or three (a stack of matrices).

    Args:
        parameters: as for `AdamW`. In a group, `kind` is `"matrix"` (the default) or `"adamw"`.
        lr, weight_decay: of a group without its own.
        matrix_lr: of a group of matrices without its own; `lr` if it is None.
        momentum, nesterov: of matrices.
        betas, eps, adamw: of weights that are none; `adamw` are further arguments of `AdamW`.
        matrix_dtype: in which matrices travel between ranks and in which `direction` gets them: bfloat16 or float32.
        batch_elements: about how many elements of matrices a rank holds whole at a time.

    Raises:
        TypeError: for a class without a `direction`.
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        matrix_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        matrix_dtype: torch.dtype = torch.bfloat16,
        batch_elements: int = BATCH_ELEMENTS,
        matrix_defaults: Mapping[str, Any] | None = None,
        **adamw: Any,
    ) -> None:
        if matrix_dtype not in MATRIX_DTYPES:
            raise ValueError(f"matrix_dtype={matrix_dtype} is not torch.bfloat16 or torch.float32.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} is not in [0, 1).")
        self.matrix_dtype, self.batch_elements = matrix_dtype, batch_elements
        if matrix_lr is not None and not matrix_lr >= 0:
            raise ValueError(f"matrix_lr={matrix_lr} is negative.")
        own = {"momentum": momentum, "nesterov": nesterov, "lr": lr if matrix_lr is None else matrix_lr}
        self.matrix_defaults = {**own, **(matrix_defaults or {})}
        self.skips_next = False  # the next step leaves the matrices as they are, on every rank
        self._whole: WholeMatrices | None = None
        self.device = torch.device("cpu")
        super().__init__(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **adamw)

    @abstractmethod
    def direction(self, matrices: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """The update of whole matrices, before it is scaled.

        Must be the same on every rank for the same matrices, and depend on nothing else: which rank computes it, and
        with which others, differs between layouts.

        Args:
            matrices: `[count, rows, columns]` as the weights are stored, in `matrix_dtype`; may be overwritten.
            group: their parameter group.

        Returns:
            `[count, rows, columns]`, in `matrix_dtype`.
        """

    def scale(self, fan_out: int, fan_in: int, group: dict[str, Any]) -> float:
        """What multiplies the learning rate of a matrix of so many output and input features."""
        return 1.0

    def cost(self, fan_out: int, fan_in: int) -> int:
        """Of the direction of a matrix, in any unit: ranks share the work by it."""
        return fan_out * fan_in * min(fan_out, fan_in)

    def attach(
        self,
        pieces: Mapping[nn.Parameter, tuple[ShardSpec, int, int]],
        layouts: Mapping[str, MatrixLayout],
        group: Group,
        device: torch.device,
    ) -> int:
        """Let the parameters of matrix groups be elements `[start, stop)` of their parts of weights. All ranks of
        `group` together.

        Args:
            pieces: of every parameter of a matrix group.
            layouts: by the name of the weight.
            group: ranks that hold parts of the same weights.
            device: of the parameters.

        Returns:
            The number of matrices of all ranks.
        """
        held: dict[nn.Parameter, Held] = {}
        for number, of_group in enumerate(self.param_groups):
            if not self._is_elementwise(of_group):
                for parameter in of_group["params"]:
                    held[parameter] = Held(group.rank, *pieces[parameter], number)
        arguments = (device, self.matrix_dtype, self.cost, self.batch_elements)
        self._whole, self.device = WholeMatrices(held, layouts, group, *arguments), device
        return len(self._whole)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        kind = param_group.setdefault("kind", MATRIX)
        if kind not in (MATRIX, ELEMENTWISE):
            raise ValueError(f"kind={kind!r} of a parameter group is not {MATRIX!r} or {ELEMENTWISE!r}.")
        if kind == MATRIX:
            for name, value in self.matrix_defaults.items():
                param_group.setdefault(name, value)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. All ranks of the group of `attach` together."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update_elements()
        if self.skips_next:
            return loss
        if self._whole is None:
            self._attach_whole_parameters()
        assert self._whole is not None
        for group in self.param_groups:
            if not self._is_elementwise(group):
                for parameter in group["params"]:
                    if not self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        update = _Update(self)
        if not update.is_skipped:
            self._whole.run(update)
        return loss

    def _is_elementwise(self, group: dict[str, Any]) -> bool:
        return bool(group["kind"] == ELEMENTWISE)

    def _attach_whole_parameters(self) -> None:
        pieces: dict[nn.Parameter, tuple[ShardSpec, int, int]] = {}
        for group in self.param_groups:
            for parameter in group["params"] if not self._is_elementwise(group) else ():
                if parameter.dim() not in (2, 3):
                    raise ValueError(
                        f"a parameter of shape {tuple(parameter.shape)} is no matrix; put it into a group with "
                        f"kind={ELEMENTWISE!r}."
                    )
                spec = ShardSpec(str(len(pieces)), tuple(parameter.shape))
                pieces[parameter] = spec, 0, parameter.numel()
        layouts = {spec.name: MatrixLayout() for spec, _, _ in pieces.values()}
        device = next(iter(pieces)).device if pieces else torch.device("cpu")
        self.attach(pieces, layouts, Group((0,), 0, None), device)

    def __getstate__(self) -> dict[str, Any]:
        own = {"matrix_dtype": self.matrix_dtype, "batch_elements": self.batch_elements, "_whole": None}
        return {**super().__getstate__(), **own, "matrix_defaults": self.matrix_defaults, "device": self.device}


class _Update:
    """One step of a `MatrixOptimizer`, as `WholeMatrices` runs it."""

    def __init__(self, optimizer: MatrixOptimizer) -> None:
        self._optimizer = optimizer
        self._groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        self._scale, self._found = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        # Of all ranks alike: one that holds no parameter takes part in the exchange too.
        on_gpu = optimizer.device.type == "cuda"
        # On the CPU the flag can be read, and says the same on all ranks.
        self.is_skipped = not on_gpu and self._found is not None and bool(self._found != 0)
        if on_gpu:
            self._scale, self._found = (
                None if scalar is None else scalar.to(optimizer.device, torch.float32, non_blocking=True)
                for scalar in (self._scale, self._found)
            )

    def prepare(self, parameter: nn.Parameter, start: int, stop: int, out: torch.Tensor | None) -> None:
        if parameter.grad is None:  # of a weight that no loss has reached, whole and on this rank alone
            if out is not None:
                out.zero_()
            return
        group = self._groups[parameter]
        gradient = parameter.grad.reshape(-1)[start:stop]
        momentum = self._optimizer.state[parameter]["momentum_buffer"].view(-1)[start:stop]
        beta, nesterov = group["momentum"], group["nesterov"]
        if momentum.is_cuda:
            from ..ops.kernels.momentum import update_momentum

            scalars = {"grad_scale": self._scale, "found_inf": self._found}
            update_momentum(gradient, momentum, out, beta=beta, nesterov=nesterov, **scalars)
            return
        if self._scale is not None:
            gradient = gradient / self._scale
        momentum.lerp_(gradient, 1 - beta)
        if out is not None:
            out.copy_(gradient.lerp(momentum, beta) if nesterov else momentum)

    def compute(self, group: int, matrices: torch.Tensor) -> torch.Tensor:
        return self._optimizer.direction(matrices, self._optimizer.param_groups[group])

    def apply(self, parameter: nn.Parameter, start: int, stop: int, update: torch.Tensor, factor: float) -> None:
        if parameter.grad is None:
            return
        group = self._groups[parameter]
        lr = float(group["lr"])
        decay, rate = 1 - lr * group["weight_decay"], lr * factor
        weights = parameter.view(-1)[start:stop]
        rounded = self._optimizer.rounded.get(parameter)
        if rounded is not None:
            rounded = rounded.view(-1)[start:stop]
        if weights.is_cuda:
            from ..ops.kernels.momentum import apply_update

            apply_update(weights, update, rounded, decay=decay, rate=rate, found_inf=self._found)
            return
        weights.mul_(decay).add_(update, alpha=-rate)
        if rounded is not None:
            rounded.copy_(weights)

    def factor(self, group: int, fan_out: int, fan_in: int) -> float:
        return self._optimizer.scale(fan_out, fan_in, self._optimizer.param_groups[group])

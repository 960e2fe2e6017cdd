"""AdamW in one pass over memory, whose moments may be bfloat16, half the memory and traffic of fp32 ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..parallel.dropout_streams import seed_from

MOMENTS = ("exp_avg", "exp_avg_sq")


def mix(x: torch.Tensor) -> torch.Tensor:
    """Hash each int32 (read as 32 bits) to another: "lowbias32" of Wellons' hash-prospector, a bijection."""
    x = x ^ (x >> 16 & 0xFFFF)
    x *= 0x7FEB352D
    x ^= x >> 15 & 0x1FFFF
    x *= 0x846CA68B - (1 << 32)
    x ^= x >> 16 & 0xFFFF
    return x


def stream_keys(seed: int, number: int) -> tuple[int, int]:
    """Two signed 32-bit keys for stream `number` of `seed`."""
    bits = seed_from("moments", seed, number)  # 62 bits
    return (bits & 0xFFFFFFFF) - (1 << 31), bits >> 32


def random_bits(keys: tuple[int, int], step: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """32 random bits for elements `[first, first + count)` of a stream at a step: int32, `[count]`."""
    elements = torch.arange(first, first + count)
    key = mix(step.to(torch.int32) ^ keys[0])
    other = mix(key ^ keys[1])
    return mix(mix(elements.to(torch.int32) ^ key) + other + (elements >> 32).to(torch.int32))


def round_stochastically(value: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """`value`, fp32, with the mantissa of a bfloat16: up with the probability of the fraction cut off, by `bits`.

    `bits` are int32 of the shape of `value`, uniform in [0, 2^16).
    """
    rounded = ((value.view(torch.int32) + bits) & -(1 << 16)).view(torch.float32)
    return torch.where(value.isnan(), value, rounded)  # the payload of a NaN would overflow into the sign


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), element by element as `torch.optim.AdamW`.

    The state is named as torch's: `step` (0-dim, fp32), `exp_avg` and `exp_avg_sq`. On a GPU one kernel reads and
    writes everything once; on the CPU there are temporaries of one parameter.

    bfloat16 moments are updated in fp32 and written with stochastic rounding. Rounding to nearest would stall the
    second moment: with beta2 = 0.999 a step changes it by at most 0.1 % downwards, and half a unit in the last place is
    0.2 % to 0.4 %. The random bits are a hash of (seed, step, parameter, element), so that a resumed run is equal to
    the last bit and no generator moves.

    As in torch's fused optimizers, a scalar tensor `grad_scale` set on the optimizer divides the gradients (clipping
    thus needs no pass of its own), and a nonzero `found_inf` skips the step without a host synchronisation on a GPU.
    The gradients themselves are left as they are.

    Args:
        parameters: contiguous fp32 parameters, or groups of them.
        lr, betas, eps, weight_decay: as in torch, and may differ between groups.
        state_dtype: of both moments, `torch.float32` or `torch.bfloat16`.
        seed: of the rounding. All ranks take the same.
        streams: parameter -> (number, first element): its element `i` draws the bits of element `first + i` of stream
            `number`. The default is (index in the optimizer, 0). Copies of one weight on several ranks part unless
            they draw the same bits: give them the same.
        rounded: parameter -> a tensor of its shape that gets its new values too, rounded to nearest: what a model
            computes with. It costs no reading of the parameter.

    Raises:
        ValueError: for a parameter or value that is none of these.
    """

    _step_supports_amp_scaling = True
    # Absent when unused, as in torch: `GradScaler` multiplies one that is present, and deletes both after the step.
    grad_scale: torch.Tensor | None
    found_inf: torch.Tensor | None

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        streams: Mapping[nn.Parameter, tuple[int, int]] | None = None,
        rounded: Mapping[nn.Parameter, torch.Tensor] | None = None,
    ) -> None:
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype={state_dtype} is not torch.float32 or torch.bfloat16.")
        self.state_dtype, self.seed, self.streams = state_dtype, seed, dict(streams or {})
        self.rounded = dict(rounded or {})
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"{name}={group[name]} is negative.")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas={group['betas']} are not in [0, 1).")
        for parameter in group["params"]:
            if parameter.dtype != torch.float32 or not parameter.is_contiguous():
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype} with strides "
                    f"{parameter.stride()}; this AdamW updates contiguous fp32 parameters, such as fp32 masters."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update_elements()
        return loss

    def update_elements(self) -> None:
        """What `step` does after its closure, for the `step` of a subclass.

        torch wraps the `step` of each class whose objects are made in the hooks on steps: one that called this class's
        would run them twice.
        """
        index = 0
        for group in self.param_groups:
            numbers: dict[nn.Parameter, int] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    numbers[parameter] = index
                index += 1
            if not numbers or not self._is_elementwise(group):
                continue
            for parameter in numbers:
                if not self.state[parameter]:
                    self._initialize(parameter)
            on_gpu = next(iter(numbers)).device.type == "cuda"
            (self._update_on_gpu if on_gpu else self._update_on_cpu)(group, numbers)

    def _is_elementwise(self, group: dict[str, Any]) -> bool:
        """Whether this class updates the group, as opposed to one that derives from it."""
        return True

    def _initialize(self, parameter: nn.Parameter) -> None:
        state = self.state[parameter]
        state["step"] = torch.zeros((), device=parameter.device)
        for name in MOMENTS:
            state[name] = torch.zeros_like(parameter, dtype=self.state_dtype)

    def _update_on_cpu(self, group: dict[str, Any], numbers: dict[nn.Parameter, int]) -> None:
        grad_scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        if found_inf is not None and found_inf != 0:
            return
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        for parameter, number in numbers.items():
            assert parameter.grad is not None
            gradient = parameter.grad if grad_scale is None else parameter.grad / grad_scale
            state = self.state[parameter]
            state["step"] += 1
            step = state["step"].item()
            m, v = (state[name].float() for name in MOMENTS)  # fp32 ones themselves
            parameter.mul_(1 - lr * group["weight_decay"])
            m.lerp_(gradient, 1 - beta1)
            v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            denominator = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
            parameter.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
            if parameter in self.rounded:
                self.rounded[parameter].copy_(parameter)
            if self.state_dtype == torch.bfloat16:
                keys, first = self._stream(parameter, number)
                bits = random_bits(keys, state["step"], first, parameter.numel()).view_as(parameter)
                state["exp_avg"].copy_(round_stochastically(m, bits & 0xFFFF))
                state["exp_avg_sq"].copy_(round_stochastically(v, bits >> 16 & 0xFFFF))

    def _update_on_gpu(self, group: dict[str, Any], numbers: dict[nn.Parameter, int]) -> None:
        from ..ops.kernels.adamw import adamw  # needs Triton, which CPU builds of torch lack

        device = next(iter(numbers)).device
        grad_scale, found_inf = (
            None if scalar is None else scalar.to(device, torch.float32, non_blocking=True)
            for scalar in (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        )
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        steps = [self.state[parameter]["step"] for parameter in numbers]
        # One tensor for all steps would be read by the host.
        torch._foreach_add_(steps, 1.0 if found_inf is None else [(found_inf == 0).float()] * len(steps))
        # Steps stay on the GPU, since only it knows which were skipped; 1 - 0.999 in fp32 would lose four digits.
        t = torch.stack(steps).double()
        factors = torch.stack((lr / (1 - beta1**t), (1 - beta2**t).sqrt(), t), dim=1).float()
        for row, (parameter, number) in enumerate(numbers.items()):
            assert parameter.grad is not None
            state = self.state[parameter]
            keys, first = self._stream(parameter, number) if self.state_dtype == torch.bfloat16 else ((0, 0), 0)
            adamw(
                parameter,
                parameter.grad.contiguous(),
                state["exp_avg"],
                state["exp_avg_sq"],
                factors,
                row,
                rounded=self.rounded.get(parameter),
                grad_scale=grad_scale,
                found_inf=found_inf,
                keys=keys,
                first=first,
                decay=float(1 - lr * group["weight_decay"]),
                betas=(float(beta1), float(beta2)),
                eps=float(group["eps"]),
            )

    def _stream(self, parameter: nn.Parameter, number: int) -> tuple[tuple[int, int], int]:
        number, first = self.streams.get(parameter, (number, 0))
        return stream_keys(self.seed, number), first

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which converts everything to fp32; the moments get their dtype back, exactly."""
        for option in ("amsgrad", "maximize"):
            if any(group.get(option) for group in state_dict["param_groups"]):
                raise ValueError(
                    f"the state is that of an AdamW with {option}=True, which this one does not support; use "
                    f"torch.optim.AdamW, such as optimizer_cls_and_kwargs=(torch.optim.AdamW, {{'{option}': True}})."
                )
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if "step" in state:
                state["step"] = state["step"].to(parameter.device, torch.float32)
            for name in MOMENTS:
                if name in state:
                    state[name] = state[name].to(self.state_dtype)

    def __getstate__(self) -> dict[str, Any]:
        own = {"state_dtype": self.state_dtype, "seed": self.seed, "streams": self.streams, "rounded": {}}
        return {**super().__getstate__(), **own}

"""The routers of a stock mixture of experts: where they are, what their losses are, and their logits.

transformers names the module that returns router logits in `_can_record_outputs["router_logits"]`. A causal LM with a
load-balancing loss has `router_aux_loss_coef`, `num_experts` and `num_experts_per_tok`; one without the first has no
such loss, even where its config has a coefficient (Llama 4).
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from ...parallel.ep.router_loss import RouterSums, add, auxiliary_loss, scale_gradient, sum_over_tokens, z_loss

# Modules whose recorded "logits" are something else, and what.
NOT_LOGITS = {
    "DogeCDMoE": "scores of product keys, not of experts",
    "Gemma4TextRouter": "probabilities",
}


@dataclass(frozen=True)
class Router:
    """One router: its name in the model, the module, and which of its outputs the logits are (if it is a tuple)."""

    name: str
    module: nn.Module
    index: int


def find_routers(model: PreTrainedModel) -> list[Router]:
    """The routers that `model` holds, in the order of its layers; none for a dense model."""
    found: dict[nn.Module, Router] = {}
    for prefix, owner in model.named_modules():
        if not isinstance(owner, PreTrainedModel):
            continue
        declared = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits", [])
        recorders = [_recorder(spec) for spec in (declared if isinstance(declared, list) else [declared])]
        for name, module in owner.named_modules(prefix=prefix):
            for recorder in recorders:
                if module not in found and _matches(recorder, name, module):
                    found[module] = Router(name, module, recorder.index)
    return list(found.values())


def _recorder(spec: Any) -> OutputRecorder:
    """A declaration as transformers reads it: a class, the end of a name, or an `OutputRecorder`."""
    if isinstance(spec, OutputRecorder):
        return spec
    if isinstance(spec, str):
        return OutputRecorder(None, index=1, class_name=spec)  # type: ignore[arg-type]
    return OutputRecorder(spec, index=1)


def _matches(recorder: OutputRecorder, name: str, module: nn.Module) -> bool:
    by_class = recorder.target_class is not None and isinstance(module, recorder.target_class)
    by_name = recorder.class_name is not None and name.endswith(recorder.class_name)
    part = recorder.layer_name.strip(".") if recorder.layer_name is not None else ""
    return (by_class or by_name) and f".{part}." in (f".{name}." if part else "..")


@dataclass(frozen=True)
class RouterLosses:
    """Which losses are added over the routers. A coefficient of 0 turns one off.

    `num_experts` is per layer, as the load-balancing loss (`coefficient`) takes it; 0 if that is off.
    """

    num_experts: int
    top_k: int
    coefficient: float
    z_coefficient: float

    def total(self, sums: RouterSums, gradient_factor: float = 1.0) -> torch.Tensor:
        """What is added to the loss of a micro-batch, from sums over all layers and all ranks that split its tokens.

        `gradient_factor`: `1 / tp` where all tensor-parallel ranks compute this (`scale_gradient`).
        """
        loss = self.z_coefficient * z_loss(sums)
        if self.num_experts:
            loss = loss + self.coefficient * auxiliary_loss(sums)
        return scale_gradient(loss, gradient_factor)


def router_losses(model: PreTrainedModel, output_router_logits: bool | None = None) -> RouterLosses | None:
    """The losses over routers of `model`, or None if there are none.

    The load-balancing loss is on if and only if the stock forward would add it; `output_router_logits` overrides the
    config's. The z-loss, which no causal LM of transformers has, is on for a `router_z_loss_coef` other than 0.
    """
    config = model.config.get_text_config()
    if output_router_logits is None:
        output_router_logits = bool(getattr(model.config, "output_router_logits", False))
    balances = output_router_logits and hasattr(model, "router_aux_loss_coef")
    coefficient = cast(Any, model).router_aux_loss_coef if balances else 0.0
    z_coefficient = getattr(config, "router_z_loss_coef", None) or 0.0
    for name, value in (("router_aux_loss_coef", coefficient), ("router_z_loss_coef", z_coefficient)):
        if not isinstance(value, int | float):
            raise ValueError(f"{name}={value!r} is not a number; set it, or use output_router_logits=False.")
    if not balances and not z_coefficient:
        return None
    for router in find_routers(model):
        kind = next((c.__name__ for c in type(router.module).__mro__ if c.__name__ in NOT_LOGITS), None)
        if kind is not None:
            raise ValueError(
                f"{type(model).__name__} records {NOT_LOGITS[kind]} instead of router logits; losses over them "
                "are not supported: use output_router_logits=False and no router_z_loss_coef."
            )
    if not balances:
        return RouterLosses(0, 0, 0.0, float(z_coefficient))
    stock = cast(Any, model)  # attributes of the stock class
    return RouterLosses(stock.num_experts, stock.num_experts_per_tok, float(coefficient), float(z_coefficient))


class Record(NamedTuple):
    """What one router returned in one forward."""

    router: Router
    output: Any

    @property
    def logits(self) -> torch.Tensor:
        return self.output[self.router.index] if isinstance(self.output, tuple) else self.output


class RouterRecorder:
    """Keeps what routers return during a forward of a stage.

    A hook only takes a reference, and only inside `recording`; the sums are taken after the forward, outside of what
    activation checkpointing recomputes: a recomputation, in the backward, records nothing.
    """

    def __init__(self, routers: Sequence[Router]) -> None:
        self._records: list[Record] | None = None
        self._handles = [r.module.register_forward_hook(functools.partial(self._record, r)) for r in routers]

    def _record(self, router: Router, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._records is not None:
            self._records.append(Record(router, output))

    @contextmanager
    def recording(self) -> Iterator[list[Record]]:
        """A list that fills with what the routers return until the end of the block."""
        records: list[Record] = []
        self._records = records
        try:
            yield records
        finally:
            self._records = None

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def sum_records(
    sums: RouterSums, records: Sequence[Record], losses: RouterLosses, mask: torch.Tensor | None = None
) -> RouterSums:
    """`sums` plus those of the routers that ran. `mask`: `[batch, sequence]`, 0 where a token does not count."""
    for record in records:
        logits = record.logits
        trained = any(p.requires_grad for p in record.router.module.parameters())
        if trained and torch.is_grad_enabled() and not logits.requires_grad:
            raise ValueError(
                f"the logits of {record.router.name} have no gradient: reentrant activation checkpointing "
                "drops it; set use_reentrant=False."
            )
        sums = add(sums, sum_over_tokens(logits, losses.num_experts, losses.top_k, mask))
    return sums


# ---- Routers in fp32 -------------------------------------------------------------------------------------------


def fp32_router(router: Router) -> None:
    """Make a router compute its logits in fp32 in a model of lower precision, in place.

    The module, or the one linear layer in it that makes the logits, gets a subclass of its own class. Parameters, their
    names, hooks and the dtypes of the other outputs stay (but HunYuan's routing weights follow its logits). Call it
    after weights are initialised: in a bfloat16 model `module.weight` is then a copy.
    """
    module = router.module
    if module.__class__.__dict__.get("computes_in_fp32"):
        return
    if getattr(module, "input_jitter_noise", 0.0):
        raise ValueError(
            f"{router.name} scales its input in place by input_jitter_noise={module.input_jitter_noise}, and the "
            "experts read it afterwards, but a router in fp32 works on a copy: set input_jitter_noise=0."
        )
    if isinstance(module._parameters.get("weight"), nn.Parameter):
        exact, dtypes = _in_low_precision(module, router.index)
        if not exact:
            _swap_class(module, router.index, dtypes)
        return
    linears = [child for child in module.modules() if isinstance(child, nn.Linear)]
    if len(linears) != 1:
        raise ValueError(
            f"{router.name} is a {type(module).__name__} of {len(linears)} linear layers; routers with one linear "
            "layer only can compute in fp32."
        )
    if not linears[0].__class__.__dict__.get("computes_in_fp32"):
        _swap_class(linears[0], 0, None)


def _in_low_precision(module: nn.Module, index: int) -> tuple[bool, tuple[torch.dtype | None, ...] | None]:
    """Whether a stock bfloat16 router computes its logits in fp32, and the dtypes that it gives its outputs.

    Copies in both precisions run on one token, whose logits take more bits than a bfloat16 has. The dtypes are None for
    a router that cannot be in bfloat16 (Inkling 2).
    """
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        twin = copy.copy(module)
        twin.__dict__ = {**module.__dict__, "training": False}
        twin._parameters = {
            name: None if p is None else nn.Parameter(torch.zeros(p.shape, dtype=dtype), requires_grad=False)
            for name, p in module._parameters.items()
        }
        twin._buffers = {
            n: None if b is None else torch.zeros_like(b, device="cpu") for n, b in module._buffers.items()
        }
        twin._modules = {n: None if m is None else copy.deepcopy(m).to("cpu") for n, m in module._modules.items()}
        weight = twin._parameters["weight"]
        assert weight is not None
        weight[:, 0], weight[:, 1] = 1.0, 2.0**-10
        biases = [torch.zeros(len(weight)) for _ in list(inspect.signature(twin.forward).parameters)[1:]]
        try:
            outputs.append(twin.forward(torch.ones(1, weight.shape[1], dtype=dtype), *biases))
        except RuntimeError:
            if dtype == torch.float32:
                raise
            return False, None
    whole, low = outputs
    dtypes = tuple(t.dtype if isinstance(t, torch.Tensor) and t.is_floating_point() else None for t in low)
    return dtypes[index] == torch.float32 and torch.equal(whole[index], low[index]), dtypes


def _swap_class(module: nn.Module, index: int, dtypes: tuple[torch.dtype | None, ...] | None) -> None:
    module.__class__ = _fp32_class(module.__class__, index, dtypes)  # type: ignore[arg-type]


@functools.cache
def _fp32_class(stock: type[nn.Module], index: int, dtypes: tuple[torch.dtype | None, ...] | None) -> type[nn.Module]:
    """`stock`, reading its weights and its input in fp32; outputs but the one at `index` get `dtypes`."""

    def forward(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = stock.forward(self, hidden_states.float(), *args, **kwargs)
        if dtypes is None or hidden_states.dtype == torch.float32:
            return output
        cast = (t if i == index or d is None else t.to(d) for i, (t, d) in enumerate(zip(output, dtypes, strict=True)))
        return tuple(cast)

    def in_fp32(name: str) -> property:
        def read(self: nn.Module) -> torch.Tensor | None:
            parameter = self._parameters.get(name)
            return None if parameter is None else parameter.float()

        return property(read)

    members = {"forward": forward, "weight": in_fp32("weight"), "computes_in_fp32": True}
    return type(stock.__name__, (stock,), {**members, "bias": in_fp32("bias"), "__module__": stock.__module__})

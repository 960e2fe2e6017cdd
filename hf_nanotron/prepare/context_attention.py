"""The attention of a model whose rows are shared by context-parallel ranks: for which models, and under which name.

It is an attention function of transformers that gets a `ContextPlan` in a keyword argument. A model's own attention
would take a jump of `position_ids` for a new document, so it never runs over a part of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.utils import logging

from ..models.base import ParallelModel
from ..models.calling import CONTEXT
from ..models.stock.anatomy import Anatomy
from ..models.stock.families import CONTEXT_PARALLEL, FAST_ATTENTION, NO_CONTEXT_PARALLEL, NO_DOCUMENTS, row_of
from ..models.stock.mixers import DIVIDED_BY_HEADS
from ..models.stock.plan import mixes_tokens
from ..monitor.flops import active_weights, attention_heads, head_dims, layer_configs
from ..ops.attention import HALF, Case, pick
from ..ops.kernels.attention import flash_attention_4
from ..parallel.collectives import all_reduce
from ..parallel.cp.choice import HeadShape
from ..parallel.cp.mixer_heads import HeadCut, divide_by_heads, restore
from ..parallel.cp.plan import ContextPlan
from ..parallel.cp.whole_region import WholeRowRegion
from ..parallel.mesh import Group, ParallelMesh
from .attention import KERNELS, Attention, peculiarity, why_stock

logger = logging.get_logger(__name__)

GROWING = ("dynamic", "longrope")  # in names of rotary embeddings that go by the largest position they see
SEE_ROWS = "parts that see whole rows"  # among the decorations of a model
NAMED = "_context"  # how the names of our attention functions end


def choose_context_attention(model: ParallelModel, dtype: torch.dtype, device: torch.device) -> tuple[Attention, str]:
    """What a model with `cp_size` above 1 trains with, and a sentence for the log. All ranks together.

    Raises:
        ValueError: for a model whose attention cannot be ours.
    """
    windows = windows_of(model)  # of all stages, before the blocks of one may be refused
    if (reason := why_not(model)) is not None:
        raise ValueError(refusal(model.mesh.cp_size, model.stock_class, reason))
    kind = "torch"
    if device.type == "cuda" and dtype in HALF and torch.cuda.get_device_capability(device)[0] in (9, 10):
        kind = "fa4" if flash_attention_4()[0] is not None else "torch"
    heads = sorted({head_dims(layer)[0] for layer in layer_configs(model.config.get_text_config())})
    cases = [Case(device.type == "cuda", dtype, width, True, None) for width in heads]
    slow = [case.head_dim for case in cases if pick(KERNELS[kind], case) == "by_document"]
    if device.type == "cuda" and slow:
        logger.warning(
            f"cp_size={model.mesh.cp_size}: no kernel takes attention heads of {slow[0]} features in {dtype}, so their "
            "scores are made in fp32, document by document: slow, and memory grows with the square of a document. "
            "Kernels take 16 bits and up to 256 features, in multiples of 8."
        )
    chosen = f"attention: {kind}, of rows shared by {model.mesh.cp_size} ranks (cp_mode={model.parallel.cp_mode!r})"
    chosen += _said_of_blocks(model)
    return Attention(f"{kind}{NAMED}", True, windows, other_work(model), shape_of(model)), chosen


def _said_of_blocks(model: ParallelModel) -> str:
    """How blocks that mix tokens otherwise than by attention are shared."""
    names: dict[str, list[str]] = {"by heads": [], "whole on every rank": []}
    for block in _blocks_that_see_rows(model):
        divided = _by_heads(block, model.mesh.cp_size) is not None
        names["by heads" if divided else "whole on every rank"].append(type(block).__name__)
    said = [f"{', '.join(dict.fromkeys(kinds))} {how}" for how, kinds in names.items() if kinds]
    return "".join(f"; {each}" for each in said)


def windows_of(model: ParallelModel) -> tuple[int | None, ...]:
    """Tokens that each layer of the whole model sees, None for all; ascending. All ranks together."""
    config = model.config.get_text_config()
    attend = [module for module in model.modules() if hasattr(module, "is_causal")]
    own = [
        x.sliding_window if hasattr(x, "sliding_window") else getattr(config, "sliding_window", None) for x in attend
    ]
    of_all: list[Any] = [own]
    if (group := model.mesh.pp).size > 1:
        of_all = [None] * group.size
        dist.all_gather_object(of_all, own, group=group.handle)
    found = [window for windows in of_all for window in windows]
    return tuple(sorted(found or [None], key=lambda window: (window is None, window or 0)))


def other_work(model: ParallelModel) -> int:
    """What the matrix products of all layers cost for a token, in keys that a token sees in one layer."""
    config = model.config.get_text_config()
    weights = sum(active_weights(name, shape, config) for name, shape in model.hub_shapes.items())
    widths = [attention_heads(layer) * sum(head_dims(layer)) for layer in layer_configs(config)]
    return round(weights / max(1, sum(widths) / len(widths)))


def shape_of(model: ParallelModel) -> HeadShape | None:
    """The attention of the first layer that has some, on a rank."""
    for layer in layer_configs(model.config.get_text_config()):
        if heads := attention_heads(layer):
            tp = model.mesh.tp_size
            return HeadShape(heads // tp, max(1, _key_value_heads(layer) // tp), *head_dims(layer))
    return None


def _key_value_heads(config: PreTrainedConfig) -> int:
    # Latent attention makes keys and values for every head.
    heads = attention_heads(config)
    return heads if hasattr(config, "kv_lora_rank") else getattr(config, "num_key_value_heads", None) or heads


def refusal(cp_size: int, stock_class: type, reason: str) -> str:
    """Of a model whose rows cannot be shared, in a sentence."""
    return f"cp_size={cp_size} is not supported for {stock_class.__name__}: {reason}; use cp_size=1."


def why_not_of_family(anatomy: Anatomy) -> str | None:
    """Why rows of a family of models cannot be shared by ranks, whatever the sizes; None if they can."""
    kind = anatomy.model.config.get_text_config().model_type
    if kind in NO_CONTEXT_PARALLEL:
        return NO_CONTEXT_PARALLEL[kind]
    if (reason := why_stock(anatomy, (*FAST_ATTENTION, *CONTEXT_PARALLEL))) is not None:
        return reason
    return f"{kind!r} does not hand keyword arguments on to its attention" if kind in NO_DOCUMENTS else None


def why_not(model: ParallelModel) -> str | None:
    """Why the rows of `model` cannot be shared by ranks; None if they can."""
    if (reason := why_not_of_family(model.anatomy)) is not None:
        return reason
    if model.parallel.overlaps_tp(model.mesh.device) and (blocks := _blocks_that_see_rows(model)):
        return f"{type(blocks[0]).__name__} sees whole rows, which are not sent in parts; use tp_overlap=False"
    return _why_not_by_heads(model) if model.parallel.cp_mode == "heads" else None


def _why_not_by_heads(model: ParallelModel) -> str | None:
    reasons = (_why_not_heads_of(layer, model.mesh) for layer in layer_configs(model.config.get_text_config()))
    return next((reason for reason in reasons if reason is not None), None)


def _why_not_heads_of(config: PreTrainedConfig, mesh: ParallelMesh) -> str | None:
    """`config`: of a layer."""
    heads, tp, cp = attention_heads(config), mesh.tp_size, mesh.cp_size
    grouped = _key_value_heads(config)
    of_rank = max(1, grouped // tp)
    if heads // tp % cp:
        return (
            f"cp_mode='heads' needs attention heads ({heads} / tp_size={tp}) that cp_size divides, or cp_mode='gather'"
        )
    if of_rank % cp and cp % of_rank:
        return (
            f"cp_mode='heads' needs key-value heads ({grouped} / tp_size={tp}) that cp_size divides or is a multiple "
            "of, or cp_mode='gather'"
        )
    return None


def let_parts_see_rows(model: ParallelModel) -> None:
    """Have what cannot work on a part of a row see more of it: blocks that mix tokens otherwise than by attention, and
    rotary embeddings that grow with the largest position.
    """
    model.decorations.remove(SEE_ROWS, model)
    group = model.mesh.cp
    if group.size == 1:
        return
    hooks = []
    is_dealt = functools.partial(_is_dealt, model.config.get_text_config())
    region = WholeRowRegion(CONTEXT, is_dealt)
    for block in _blocks_that_see_rows(model):
        if (cut := _by_heads(block, group.size)) is not None:
            divide_by_heads(block, cut, group.size, CONTEXT, region.check)
        else:
            hooks += WholeRowRegion(CONTEXT, is_dealt).attach(block)
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
        if any(isinstance(kind, str) and any(part in kind for part in GROWING) for kind in kinds):
            hooks += _LargestPosition(group, is_dealt).attach(module)
    model.decorations.add(SEE_ROWS, functools.partial(_remove, hooks))


def _by_heads(block: nn.Module, size: int) -> HeadCut | None:
    """How `block` is divided over `size` ranks by its heads; None if each computes all of it."""
    cut = row_of(DIVIDED_BY_HEADS, block)
    return cut if cut is not None and cut.fits(block, size) else None


def _blocks_that_see_rows(model: ParallelModel) -> list[nn.Module]:
    """Those that mix tokens otherwise than by attention."""
    mixing = [block for _, block in model.anatomy.blocks() if mixes_tokens(block)]
    return [block for block in mixing if not any(hasattr(part, "is_causal") for part in block.modules())]


def _is_dealt(config: PreTrainedConfig) -> bool:
    """Whether a model runs over parts of rows now."""
    return str(config._attn_implementation).endswith(NAMED)


class _LargestPosition:
    """Shows a rotary embedding one position more, the largest of all ranks, and takes it off again."""

    def __init__(self, group: Group, is_dealt: Callable[[], bool]) -> None:
        self.group, self.is_dealt = group, is_dealt
        self._added = False

    def attach(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(self.enter, with_kwargs=True),
            module.register_forward_hook(self.leave),
        ]

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._added = self.is_dealt()
        if not self._added:
            return args, kwargs
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        largest = all_reduce(positions.max(), self.group, dist.ReduceOp.MAX)
        longer = torch.cat([positions, largest.expand(*positions.shape[:-1], 1)], -1)
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": longer}
        return (args[0], longer, *args[2:]), kwargs

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._added:
            return output
        return tuple(part[..., :-1, :] for part in output) if isinstance(output, tuple) else output[..., :-1, :]


def _remove(hooks: list[Any], model: ParallelModel) -> None:
    for hook in hooks:
        hook.remove()
    for block in model.modules():
        restore(block)


def _attend(
    kernels: tuple[str, ...],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: `[B, heads, S / cp, D]` -> `[B, S / cp, heads, D]`."""
    plan: ContextPlan | None = kwargs.get(CONTEXT)
    what = peculiarity(module, query, key, attention_mask, dropout, is_causal, kwargs)
    if what is not None:
        raise ValueError(f"{type(module).__name__} attends with {what}, which cp_size above 1 does not support.")
    if plan is None:
        raise ValueError(
            f"{type(module).__name__} does not learn how rows are shared by ranks: its model does not pass keyword "
            "arguments on. Use cp_size=1."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    kernel = pick(kernels, Case(query.device.type == "cuda", query.dtype, query.shape[-1], True, sliding_window))
    assert kernel is not None
    return plan.attend(q, k, v, kernel, scale, sliding_window), None


for _kind, _kernels in KERNELS.items():
    AttentionInterface.register(f"hf_nanotron_{_kind}{NAMED}", functools.partial(_attend, _kernels))

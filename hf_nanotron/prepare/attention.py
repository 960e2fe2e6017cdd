"""Which attention a model trains with, and the documents that its rows are packed with.

Ours are attention functions of transformers, with the contract of its flash attention: everything is in keyword
arguments, and there is no mask. What a mask would say is read of a batch on the host (`documents_of`). Where it cannot
be, and in evaluation and generation, the model's own attention runs. See `docs/design/training_state.md`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..models.calling import BOUNDS, LONGEST
from ..models.stock.anatomy import Anatomy
from ..models.stock.families import FAST_ATTENTION, NO_DOCUMENTS
from ..models.stock.foreign import is_foreign
from ..ops.attention import HALF, Case, attention, pick
from ..ops.cross_entropy import IGNORE_INDEX
from ..ops.kernels.attention import flash_attention_4
from ..parallel.batch import DOMAIN, batch_shape
from ..parallel.cp.choice import HeadShape
from ..parallel.dropout_streams import fields_of_chance
from ..parallel.rehearsal import is_rehearsal

# By what may run: names of `ops.attention.KERNELS`.
KERNELS: dict[str, tuple[str, ...]] = {"fa4": ("fa4", "flash"), "torch": ("flash",)}

# Keyword arguments of attention functions of transformers that change the result.
PECULIAR = ("softcap", "s_aux", "position_bias", "cache")

# What a batch may hold: nothing in it makes a mask that `documents_of` does not know.
KNOWN_INPUTS = frozenset(
    (
        "input_ids",
        "inputs_embeds",
        "labels",
        "shift_labels",
        "attention_mask",
        "position_ids",
        "num_items_in_batch",
        "use_cache",
        DOMAIN,
    )
)
# What says again what `position_ids` say, for blocks that read nothing else.
BOUNDS_OF_STOCK = frozenset(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"))


@dataclass(frozen=True)
class Documents:
    """The documents of a batch, on the host: `bounds` `[documents + 1]`, int32, counted over the tokens of all rows.

    `packed`: a row has several.
    """

    bounds: torch.Tensor
    longest: int
    packed: bool


@dataclass(frozen=True)
class Attention:
    """What a model trains with.

    Args:
        takes_documents: whether the model hands keyword arguments on to its attention.
        windows: for `cp_size` above 1, tokens that each layer of the whole model sees, None for all.
        other_work: for `cp_size` above 1, see `parallel.cp.layout.plan`.
        shape: for `cp_size` above 1, of one layer.
    """

    kind: str
    takes_documents: bool
    windows: tuple[int | None, ...] = ()
    other_work: int = 0
    shape: HeadShape | None = None

    @contextlib.contextmanager
    def training(self, config: PreTrainedConfig, packed: bool) -> Iterator[None]:
        """Name it in the model's config, for a window of micro-batches and their backwards."""
        config, before = config.get_text_config(), config.get_text_config()._attn_implementation_internal
        config._attn_implementation_internal = _name(self.kind, packed)
        try:
            yield
        finally:
            config._attn_implementation_internal = before


def choose_attention(
    anatomy: Anatomy, dtype: torch.dtype, device: torch.device, asked: str = "auto"
) -> tuple[Attention | None, str]:
    """What a model that computes in `dtype` trains with, None for its own attention, and a sentence for the log.

    `asked`: `"auto"`, by measurement, or `"stock"`.
    """
    model = anatomy.model
    own = f"attention: the model's own ({model.config.get_text_config()._attn_implementation})"
    if asked == "stock":
        return None, own
    reason = why_stock(anatomy)
    if reason is None and is_rehearsal() and dtype in HALF and next(model.parameters()).is_meta:
        return Attention("fa4", takes_documents(model)), "attention: FlashAttention-4"
    if reason is None and (device.type != "cuda" or dtype not in HALF):
        reason = f"it computes in {dtype} on {device.type}; faster kernels need 16 bits on CUDA"
    if reason is not None:
        return None, f"{own}: {reason}"
    takes = takes_documents(model)
    packing = "" if takes else "; the model's own for packed documents"
    if torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return Attention("torch", takes), f"attention: torch's kernels{packing}"
    module, missing = flash_attention_4()
    if module is not None:
        return Attention("fa4", takes), f"attention: FlashAttention-4{packing}"
    return Attention("torch", takes), (
        f"attention: torch's kernels{packing}. FlashAttention-4 is faster on this GPU: "
        f"pip install hf-nanotron[flash] ({missing})"
    )


def why_stock(anatomy: Anatomy, tested: Collection[str] = FAST_ATTENTION) -> str | None:
    """Why a model must keep its own attention; None if it need not. `tested`: model types that may have another."""
    model = anatomy.model
    config = model.config.get_text_config()
    chance = [name for name in fields_of_chance(config) if "att" in name]
    parts = [module for _, block in anatomy.blocks() for module in block.modules()]
    configs = [part.config for part in parts if isinstance(getattr(part, "config", None), PreTrainedConfig)]
    reasons = (
        (getattr(model, "names_attention", False), "attn_implementation was given"),
        (config._attn_implementation != "sdpa", "faster kernels only replace 'sdpa'"),
        (config.model_type not in tested, f"{config.model_type!r} is not tested with faster kernels"),
        (bool(chance), f"{', '.join(chance)} above 0, and faster kernels have no dropout"),
        (any(own is not config for own in configs), "its blocks have their own configs"),
        (anatomy.is_foreign or any(map(is_foreign, parts)), "custom code may make its own masks"),
        (getattr(config, "is_causal", True) is False, "its config has is_causal=False"),
        (any(getattr(part, "is_causal", True) is False for part in parts), "one of its blocks is not causal"),
    )
    return next((reason for applies, reason in reasons if applies), None)


def takes_documents(model: PreTrainedModel) -> bool:
    """Whether the model's attention learns where documents begin."""
    return model.config.get_text_config().model_type not in NO_DOCUMENTS


def documents_of(batch: dict[str, Any], multiple: int = 1) -> Documents | None:
    """The documents of `batch`, its rows padded to a multiple of `multiple` tokens; None if it needs a mask.

    As in transformers, a document begins where `position_ids` do not go on by one, and with an `attention_mask` there
    are none. Right padding needs no mask: no token before it sees it, and nothing is predicted from it. Tensors should
    be on the host, as they come from the collator, or a GPU is waited for.
    """
    shape, mask, positions = batch_shape(batch), batch.get("attention_mask"), batch.get("position_ids")
    known = KNOWN_INPUTS | (BOUNDS_OF_STOCK if positions is not None and mask is None else frozenset())
    if len(shape) != 2 or not known >= {name for name, value in batch.items() if value is not None}:
        return None
    rows, length = shape
    missing = -length % multiple
    starts = torch.zeros(rows, length + missing, dtype=torch.bool)
    if mask is not None and not _is_harmless(mask, batch):
        return None
    if mask is None and positions is not None:
        if positions.dim() != 2 or positions.shape[1] != length:
            return None
        starts[:, 1:length] = (positions.diff(dim=-1) != 1).cpu()
        if not _numbers(batch.get("seq_idx"), starts[:, 1:length]):
            return None
    packed = bool(starts.any())
    starts[:, 0] = True
    if packed and missing:
        starts[:, length] = True
    ends = torch.tensor([starts.numel()])
    bounds = torch.cat([starts.flatten().nonzero().flatten(), ends]).to(torch.int32)
    return Documents(bounds, int(bounds.diff().max()), packed)


def _numbers(indices: Any, starts: torch.Tensor) -> bool:
    """Whether `indices` `[B, S]`, the number of each token's document, change where `starts` `[B, S - 1]` say; or are
    not given.
    """
    if indices is None:
        return True
    if not isinstance(indices, torch.Tensor) or indices.dim() != 2 or indices.shape[1] != starts.shape[1] + 1:
        return False
    return torch.equal((indices.diff(dim=-1) != 0).cpu().expand_as(starts), starts)


def _is_harmless(mask: torch.Tensor, batch: dict[str, Any]) -> bool:
    """Whether `mask` hides only padding on the right that nothing is predicted from."""
    if mask.dim() != 2 or mask.shape != batch_shape(batch):
        return False
    hidden = mask == 0
    if not hidden.any():
        return True
    if hidden[:, 0].any() or (hidden[:, :-1] & ~hidden[:, 1:]).any():
        return False
    labels, shifted = batch.get("labels"), batch.get("shift_labels")
    predicted = [x for x in (shifted, labels if shifted is None else None) if x is not None]
    return bool(predicted) and all(not (x.to(hidden.device)[hidden] != IGNORE_INDEX).any() for x in predicted)


def document_inputs(documents: Documents, device: torch.device) -> dict[str, torch.Tensor]:
    """`documents` as keyword arguments of a model."""
    bounds = documents.bounds
    if device.type == "cuda":
        bounds = bounds.pin_memory().to(device, non_blocking=True)
    else:
        bounds = bounds.clone()
    torch._dynamo.maybe_mark_dynamic(bounds, 0)  # or the second number of documents would be compiled anew
    return {BOUNDS: bounds, LONGEST: torch.tensor(documents.longest)}


def _name(kind: str, packed: bool) -> str:
    return f"hf_nanotron_{kind}_packed" if packed else f"hf_nanotron_{kind}"


def peculiarity(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool | None,
    options: Mapping[str, Any],
) -> str | None:
    """What a call of an attention function asks for that our kernels have not."""
    causal = is_causal is not False and getattr(module, "is_causal", True)
    peculiar = [name for name in PECULIAR if options.get(name) is not None]
    if peculiar or dropout or not causal or query.shape[2] != key.shape[2] or attention_mask is not None:
        return ", ".join(peculiar) or ("dropout" if dropout else "a mask, or keys of another length")
    return None


def _attend(
    kernels: tuple[str, ...],
    packed: bool,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    document_bounds: torch.Tensor | None = None,
    longest_document: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: `[B, heads, S, D]` -> `[B, S, heads, D]`."""
    what = peculiarity(module, query, key, attention_mask, dropout, is_causal, kwargs)
    if what is not None:
        raise ValueError(
            f"{type(module).__name__} attends with {what}, which faster kernels do not support; use attention='stock'."
        )
    if packed and document_bounds is None:
        raise ValueError(
            f"{type(module).__name__} does not get document boundaries: its model does not pass keyword arguments on. "
            "Use attention='stock'."
        )
    window = sliding_window if sliding_window is not None and sliding_window < query.shape[2] else None
    kernel = pick(kernels, Case(query.device.type in ("cuda", "meta"), query.dtype, query.shape[-1], packed, window))
    if kernel is None:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return attention(q, k, v, kernel, scale, window, document_bounds, longest_document), None


for _kind, _kernels in KERNELS.items():
    for _packed in (False, True):
        AttentionInterface.register(_name(_kind, _packed), functools.partial(_attend, _kernels, _packed))

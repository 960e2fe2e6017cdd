"""A model that is not trained, beside the one that is: a teacher, or the reference of a loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..models.base import ParallelModel
from .attention import Attention, choose_attention
from .context_attention import choose_context_attention, let_parts_see_rows


@dataclass(frozen=True)
class FrozenModel:
    """A model whose weights no optimizer has, on the mesh of one that is trained; each data-parallel rank has a copy.

    Attributes:
        attention: what stands for its own, or None.
    """

    model: ParallelModel
    attention: Attention | None


def freeze(model: ParallelModel, trained: ParallelModel, bf16: bool, attention: str, what: str) -> FrozenModel:
    """Have `model` compute as the one that is trained: its weights in 16 bits with `bf16`, and its kind of attention.

    Args:
        attention: `"auto"` or `"stock"`.
        what: it is, for messages.

    Raises:
        ValueError: for a model whose outputs cannot be compared with those of `trained` token by token.
    """
    if model is trained:
        raise ValueError(f"the {what} is the model that is trained itself; load it once more.")
    if model.vocabulary != trained.vocabulary:
        raise ValueError(
            f"the {what} has a vocabulary of {model.vocabulary.outputs} ids, and the model that is trained one of "
            f"{trained.vocabulary.outputs}: they are compared token by token; use models of one tokenizer, with "
            "embeddings of one size."
        )
    model.requires_grad_(False).eval()
    dtype = torch.bfloat16 if bf16 else model.dtype
    if dtype != model.dtype:
        for parameter in model.parameters():  # not its buffers, as rotary frequencies
            parameter.data = parameter.data.to(dtype)
        model.executor.forget_layouts()
    if model.mixture is not None:
        model.mixture.configure(model, dtype, None, 0.0)
    mesh = model.mesh
    if mesh.cp_size == 1:
        return FrozenModel(model, choose_attention(model.anatomy, dtype, mesh.device, attention)[0])
    let_parts_see_rows(model)
    own, _ = choose_context_attention(model, dtype, mesh.device)
    shared, _ = choose_context_attention(trained, dtype, mesh.device)
    if new := [window for window in own.windows if window is not None and window not in shared.windows]:
        raise ValueError(
            f"cp_size={mesh.cp_size}: a layer of the {what} sees {new[0]} tokens, as none of the model that is trained "
            "does, by whose windows rows are shared; use cp_size=1."
        )
    return FrozenModel(model, own)


def check_tokenizer(model: ParallelModel, tokenizer: Any, what: str) -> None:
    """Compare the tokenizer that lies beside the weights of `model` with the one that is trained with.

    Raises:
        ValueError: if a token has another id, naming it.
    """
    folder = Path(model.config.name_or_path or "")
    if not hasattr(tokenizer, "get_vocab") or not (folder / "tokenizer.json").is_file():
        return
    own, given = AutoTokenizer.from_pretrained(folder).get_vocab(), tokenizer.get_vocab()
    if different := sorted(token for token in own.keys() | given.keys() if own.get(token) != given.get(token)):
        raise ValueError(
            f"the {what} in {folder} has another tokenizer than processing_class: {different[0]!r} is the id "
            f"{own.get(different[0])} there, and {given.get(different[0])} here; use models of one tokenizer."
        )

"""Forward and generation of a model whose stages live on several ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..parallel.collectives import all_gather
from ..parallel.mesh import Group, ParallelMesh
from ..parallel.pipeline.schedule import build_table, forward_order
from ..parallel.random import GeneratorState, seed_generators

if TYPE_CHECKING:
    from .base import ParallelModel


def pipelined_forward(model: ParallelModel, inputs: dict[str, Any], gather_logits: bool) -> CausalLMOutputWithPast:
    """One batch through all stages, without gradients; loss and logits on every rank.

    Args:
        inputs: keyword arguments of the stock forward, the same on every rank of the model. A key-value cache stays on
            the rank whose layers fill it.
        gather_logits: join the slices of the vocabulary and hand logits to every stage, else `logits` is None.

    Raises:
        ValueError: for inputs that a later stage could not know.
    """
    mesh, parallel = model.mesh, model.parallel
    if inputs.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds cannot enter a pipeline, whose stages all read token ids; pass input_ids.")
    for name in ("output_hidden_states", "output_attentions"):
        if inputs.get(name):
            raise ValueError(f"{name}=True is not available with pp_size={mesh.pp_size}; use pp_size=1.")
    table = build_table(forward_order(mesh.pp_size, parallel.pp_virtual_stages, 1), parallel.num_stages)
    with torch.no_grad():
        outputs = model.executor.run(table[mesh.pp_rank], model.stages, [inputs])
    output = outputs.get(0)
    loss, logits = (output.loss, output.logits) if output is not None else (None, None)
    last = mesh.pp.ranks[-1]
    if inputs.get("labels") is not None:
        loss = loss if loss is not None else torch.zeros((), device=mesh.device)
        dist.broadcast(loss, last, group=mesh.pp.handle)
    if not gather_logits:
        logits = None
    else:
        if logits is not None and model.head_is_cut:
            logits = all_gather(logits, mesh.tp, logits.dim() - 1)
        logits = _broadcast(logits, mesh.pp, last, mesh.device, model.dtype)
    cache = inputs.get("past_key_values") if output is None else output.past_key_values
    return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)


def _broadcast(
    tensor: torch.Tensor | None, group: Group, source: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Send a 3-D tensor whose shape only `source` knows to all of `group`."""
    shape = torch.tensor(tensor.shape if tensor is not None else (0, 0, 0), device=device)
    dist.broadcast(shape, source, group=group.handle)
    if tensor is None:
        tensor = torch.empty(tuple(shape.tolist()), dtype=dtype, device=device)
    tensor = tensor.contiguous()
    dist.broadcast(tensor, source, group=group.handle)
    return tensor


@contextlib.contextmanager
def same_draws(mesh: ParallelMesh) -> Iterator[None]:
    """Random draws inside are the same on all ranks of one model (sampling must choose the same token everywhere)."""
    if mesh.model.size == 1:
        yield
        return
    seed = torch.randint(2**62, (1,)).to(mesh.device)
    dist.broadcast(seed, mesh.model.ranks[0], group=mesh.model.handle)
    state = GeneratorState()
    seed_generators(int(seed.item()))
    try:
        yield
    finally:
        state.restore()

"""A trial of code that is not transformers' own: the sharded model must compute the loss of the whole one.

One small batch goes through the whole model, and, once it is sharded, through all ranks together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from ...parallel.dropout_streams import has_dropout
from ...parallel.mesh import ParallelMesh
from ...parallel.together import together
from ..base import ParallelModel
from ..calling import accepted, as_output
from ..generation import pipelined_forward
from ..stock.anatomy import Anatomy, dissect
from ..stock.foreign import is_foreign, why_not_causal
from ..stock.hooks import inner_hooks

ROWS, TOKENS = 2, 8  # tokens a row, for each tensor-parallel rank
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5}  # of the loss; what 16 bits round is much
COARSE = 3e-3

ADVICE = (
    "Under tensor parallelism, attention and MLP blocks return partial sums, which are reduced over the ranks "
    "afterwards, so nothing may be added to or computed from them inside the block; with sequence_parallel a decoder "
    "layer sees a slice of the tokens; a later pipeline stage has neither the embedding nor earlier layers. Move the "
    "code to the decoder layer, or replicate the block with register_plan(<class of the block>, {'': None}), or use "
    "sequence_parallel=False, tp_size=1, pp_size=1. A hook gets the tensors of this rank."
)


@dataclass(frozen=True)
class Trial:
    """What a whole model computes from `ids`, `[ROWS, S]`: its loss, the same on every rank.

    `classes`: names of its classes that have code of their own, and of hooks inside its backbone.
    """

    classes: tuple[str, ...]
    ids: torch.Tensor
    loss: float


def try_whole(model: PreTrainedModel, mesh: ParallelMesh) -> Trial | None:
    """Run a whole model with weights, on all ranks; None if it is not sharded, or if all of its code is transformers'
    own.

    The loss is that of rank 0, whose weights all ranks will take.
    """
    if mesh.tp_size * mesh.pp_size == 1 or why_not_causal(model) is not None:
        return None
    code = {type(module).__name__ for module in model.modules() if is_foreign(module)}
    anatomy = dissect(model)
    backbone = anatomy.backbone
    hooked = [(name, hook) for name, hook in inner_hooks(model, backbone) if mesh.pp_size == 1 or name != backbone]
    code |= {f"{hook} (a hook on {name})" for name, hook in hooked}  # a pipeline refuses those on the backbone itself
    if not code:
        return None
    vocabulary = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (ROWS, TOKENS * mesh.tp_size), generator=generator)
    device = next(model.parameters()).device

    def run() -> float:
        inputs = {"input_ids": ids.to(device), "labels": ids.to(device), "use_cache": False, "return_dict": True}
        with torch.no_grad(), _Mode(model), _telling_forms(anatomy):
            # Not by a call of the model, whose hooks are for `custom_loss` to judge.
            output = as_output(model.forward(**accepted(model.forward, inputs)), has_labels=True)
        return float(output.loss)

    loss = torch.tensor(together(mesh, "a forward of the whole model", run), dtype=torch.float64, device=mesh.device)
    if mesh.world.size > 1:
        dist.broadcast(loss, 0, group=mesh.world.handle)
    return Trial(tuple(sorted(code)), ids.to(mesh.device), float(loss))


def compare(model: ParallelModel, trial: Trial | None) -> None:
    """Run the cut model on the batch of a `Trial`. All ranks together."""
    if trial is None:
        return
    mesh, inputs = model.mesh, {"input_ids": trial.ids, "labels": trial.ids, "use_cache": False}
    parallel = mesh.parallel
    sizes = f"tp_size={mesh.tp_size}, pp_size={mesh.pp_size}, sequence_parallel={parallel.sequence_parallel}"
    code = f"{sizes}: the code of {', '.join(trial.classes)}"
    try:
        with torch.no_grad(), _Mode(model):
            if mesh.pp_size > 1:
                loss = pipelined_forward(model, model.stages, inputs, gather_logits=False).loss
            else:
                loss = model.parallel_forward(gather_logits=False, **inputs).loss
    except Exception as error:  # whatever that code raises
        raise ValueError(
            f"{code} fails when the model is sharded ({type(error).__name__}: {error}). {ADVICE}"
        ) from error
    if not has_dropout(model.config):  # or nothing was tried as it trains
        model.cut.tried_hooks = frozenset(inner_hooks(model, model.anatomy.backbone))
    model.__dict__.pop("linear_head", None)  # found anew, for what the trainer makes of the model
    assert loss is not None
    got, tolerance = float(loss), TOLERANCE.get(model.dtype, COARSE)
    if not abs(got - trial.loss) <= tolerance * abs(trial.loss):
        raise ValueError(
            f"{code} computes a loss of {got:.6g} when the model is sharded, and {trial.loss:.6g} when it is not. "
            + ADVICE
        )


@contextlib.contextmanager
def _telling_forms(anatomy: Anatomy) -> Iterator[None]:
    """Have every decoder layer note what it returns: a stand-in for it has to return the same (`AbsentLayer`)."""

    def note(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        layer.returns_tuple = isinstance(output, tuple)  # type: ignore[assignment]

    layers = [layer for _, stack in anatomy.layer_stacks() for layer in stack if is_foreign(layer)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Mode:
    """As while training, but for dropout, which no two forwards share. Buffers, such as running means, stay."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.modes = model, [(module, module.training) for module in model.modules()]
        held = [(m, name, buffer) for m in model.modules() for name, buffer in m._buffers.items() if buffer is not None]
        self.buffers = [(module, name, buffer, buffer.clone()) for module, name, buffer in held]

    def __enter__(self) -> None:
        self.model.train(not has_dropout(self.model.config))

    def __exit__(self, *error: object) -> None:
        for module, training in self.modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, values in self.buffers:
                module._buffers[name] = buffer.copy_(values)

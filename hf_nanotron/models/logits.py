"""Whole logits while a model trains: for a loss that is not the model's own.

The slices of the vocabulary are joined inside the call of the head, so that hooks on it, the model's own `forward` and
its loss function find what they would find in one process. Under sequence parallelism, sequences are padded where they
enter the backbone, and joined and trimmed where they leave it. See `docs/design/models.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..parallel.collectives import join_sequence
from .calling import as_output
from .parts import ModelParts
from .training_loss import MicroBatch


def forward_with_logits(model: ModelParts, view: Any, inputs: dict[str, Any]) -> Any:
    """The stock forward of `view`, whose head returns whole logits, and which calls its own loss function.

    Logits and loss of a training model that computes in 16 bits are returned in fp32, as accelerate returns them.
    """
    with whole_outputs(model, view) as made:
        output = model.stock_class.forward(view, **inputs)
    output = as_output(output, inputs.get("labels") is not None)
    refuse_own_heads(model, output)
    if output.get("logits") is None and made:
        output["logits"] = made[-1]
    for name in ("logits", "loss") if model.training else ():
        value = output.get(name)
        if isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16):
            output[name] = value.float()
    return output


@contextmanager
def whole_outputs(model: ModelParts, view: Any) -> Iterator[list[torch.Tensor]]:
    """Let the backbone and the head of `view` return what they would in one process, whoever calls them. May be nested.

    Yields a list that holds the logits that the head made last.
    """
    if (outer := view.__dict__.get("made_logits")) is not None:
        yield outer
        return
    micro_batch = model.training_loss.micro_batch if model.training else None
    with _whole_sequences(model, view, micro_batch), _whole_vocabulary(model, view, micro_batch) as made:
        view.__dict__["made_logits"] = made
        try:
            yield made
        finally:
            del view.__dict__["made_logits"]


def refuse_own_heads(model: ModelParts, output: Any) -> None:
    weights = output.get("attentions") if isinstance(output, dict) else None
    heads = getattr(model.config.get_text_config(), "num_attention_heads", None)
    if model.mesh.tp_size > 1 and any(w is not None and w.dim() == 4 and w.shape[1] != heads for w in weights or ()):
        raise ValueError(
            f"output_attentions=True at tp_size={model.mesh.tp_size}: each rank only has the attention weights of "
            "its own heads; use tp_size=1."
        )


@contextmanager
def _whole_vocabulary(model: ModelParts, view: Any, micro_batch: MicroBatch | None) -> Iterator[list[torch.Tensor]]:
    """Let the head of `view` join the slices of its output, and `view` call its own loss function."""
    head = view.get_output_embeddings()
    made: list[torch.Tensor] = []

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        if micro_batch is not None and micro_batch.logits is not None and model.streams is not None:
            raise ValueError(
                "the model was called twice for one micro-batch: dropout masks depend on the position of a "
                "micro-batch in the run, so both calls would use the same masks; set dropout to 0 in its config."
            )
        logits = model.whole_logits(type(head).forward(head, *args, **kwargs))
        made[:] = [logits]
        if micro_batch is not None:
            micro_batch.logits = logits
        return logits

    head.__dict__["forward"] = forward  # of this one object, for the time of one call
    view.__dict__["called_loss"] = model.own_loss
    try:
        yield made
    finally:
        del head.__dict__["forward"], view.__dict__["called_loss"]


@contextmanager
def _whole_sequences(model: ModelParts, view: Any, micro_batch: MicroBatch | None) -> Iterator[None]:
    """Let the backbone of `view` take and return sequences as they are in the batch, under sequence parallelism."""
    group, head = model.mesh.tp, view.get_output_embeddings()
    if not model.training or group.size == 1 or not model.parallel.sequence_parallel:
        yield
        return
    backbone = view.get_submodule(model.anatomy.backbone)
    micro_batch = micro_batch or MicroBatch()
    lengths: list[int] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.dim() > 1]
        length = given[0].shape[1]  # of ids, or of what stands for their embeddings
        lengths[:] = [length]
        if length % group.size:
            if any(id(x) not in micro_batch.filled for x in given if x.shape[1] == length):
                raise ValueError(
                    f"sequence_parallel needs sequence lengths that are multiples of {group.size}; this batch has "
                    f"{length} tokens, and it cannot be padded automatically, because the model's forward, or "
                    "compute_loss, calls the backbone with its own tensors. Pad in the collator "
                    f" (pad_to_multiple_of={group.size}) or use sequence_parallel=False."
                )
            args = tuple(micro_batch.filled.get(id(x), x) for x in args)
            kwargs = micro_batch.fill(kwargs)
        return args, kwargs

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        def whole(hidden: torch.Tensor) -> torch.Tensor:
            is_part = hidden.shape[1] == part
            return (join_sequence(hidden, group) if is_part else hidden)[:, : lengths[0]]

        length = lengths[0] + -lengths[0] % group.size
        part = length // group.size
        joined = output[0][:, : lengths[0]] if model.anatomy.is_foreign else whole(output[0])  # behind the last layer
        if isinstance(output, tuple):
            return (joined, *output[1:])
        if output.get("hidden_states") is not None:  # between the layers
            states = output.hidden_states
            output.hidden_states = tuple(joined if state is output[0] else whole(state) for state in states)
        output.last_hidden_state = joined
        return output

    hooks = (
        backbone.register_forward_pre_hook(enter, with_kwargs=True),
        backbone.register_forward_hook(leave),
    )
    head.__dict__["has_whole_input"] = True  # for the hook that would gather it
    try:
        yield
    finally:
        del head.__dict__["has_whole_input"]
        for hook in hooks:
            hook.remove()

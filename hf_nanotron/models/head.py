"""The head of a training model computes the loss itself, and hands no logits on.

Stock models compute `loss_function(lm_head(hidden), labels)`. The logits in between are the largest tensor of all. Here
the head returns a `Prediction`, which already holds the loss, and which the stock code passes to `loss_function` for
logits. That is right for code that only multiplies its logits by a number, which a trial with stand-ins finds out
(`linear_head`). Other models keep their logits. See `docs/design/models.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..ops.linear import Linear
from .calling import ADDED, accepted, as_output
from .stock.own_forward import is_of_transformers, own_columns

PROBED_TOKENS = 4


class Prediction(NamedTuple):
    """What a head returns in the place of logits: the loss, and what the stock code has multiplied the logits by.

    A tuple, so that whoever searches outputs for tensors (`fully_shard` does) finds the loss.
    """

    loss: torch.Tensor
    scale: float = 1.0

    def __mul__(self, factor: Any) -> Prediction:
        return self._replace(scale=self.scale * _number(factor))

    def __rmul__(self, factor: Any) -> Prediction:
        return self * factor

    def __truediv__(self, divisor: Any) -> Prediction:
        return self._replace(scale=self.scale / _number(divisor))

    def float(self) -> Prediction:
        """The loss computes in fp32 anyway."""
        return self


def _number(factor: Any) -> float:
    if not isinstance(factor, int | float):
        raise TypeError(f"a prediction can be multiplied by a number alone, not by {type(factor).__name__}.")
    return float(factor)


@dataclass(frozen=True)
class LinearHead:
    """The head of a model whose loss can be fused with it: its name, and what the stock code multiplies logits by."""

    name: str
    scale: float

    @contextmanager
    def predicting(self, view: nn.Module, loss: Callable[[torch.Tensor, Linear], torch.Tensor]) -> Iterator[None]:
        """Let the head of `view` return `Prediction(loss(hidden, head))`. Hooks on it run as ever."""
        head = view.get_submodule(self.name)
        assert isinstance(head, Linear)

        def forward(hidden: torch.Tensor) -> Prediction:
            return Prediction(loss(hidden, head))

        head.__dict__["forward"] = forward  # of this one object, for the time of one call
        try:
            yield
        finally:
            del head.__dict__["forward"]


def linear_head(model: PreTrainedModel, stock_class: type[PreTrainedModel]) -> LinearHead | None:
    """The head of `model`, if it is a `Linear` whose output the stock forward hands to `loss_function` and to nobody
    else.

    Any error over the stand-ins means that the forward does more than a `Prediction` can stand for.
    """
    head = model.get_output_embeddings()
    name = next((name for name, child in model.named_children() if child is head), None)
    if name is None or not isinstance(head, Linear) or type(head).forward is not Linear.forward:
        return None
    scale = _scale(model, stock_class, name)
    return None if scale is None else LinearHead(name, scale)


def is_plain(model: Any, stock_class: type[PreTrainedModel]) -> bool:
    """Whether the forward's loss is that of the head's output. A forward of transformers' own is known to be.

    Every rank of a pipeline finds the same, whichever modules it holds.
    """
    if is_of_transformers(stock_class.forward):
        return True
    return not own_columns(model, stock_class) and _scale(model, stock_class, model.anatomy.head) is not None


def _scale(model: PreTrainedModel, stock_class: type[PreTrainedModel], name: str) -> float | None:
    """What the stock forward multiplies logits by, if that is all that it does between the head and its loss."""
    try:
        scales = {_trial(model, stock_class, name, masked) for masked in (False, True)}
    except Exception:  # whatever stock code raises over stand-ins
        return None
    return scales.pop() if len(scales) == 1 else None


def _trial(model: PreTrainedModel, stock_class: type[PreTrainedModel], name: str, masked: bool) -> float:
    """What the stock forward, over stand-ins, multiplies its logits by. An exception if it does anything else with
    them.
    """
    hidden_size = model.config.get_text_config().hidden_size
    hidden = torch.empty((1, PROBED_TOKENS, hidden_size), device="meta")
    ids, labels, shifted = (torch.zeros((1, PROBED_TOKENS), dtype=torch.int64) for _ in range(3))
    items, loss = torch.tensor(PROBED_TOKENS), torch.zeros(())
    scales: list[float] = []

    def loss_function(
        logits: Any, labels: Any, *sizes: Any, num_items_in_batch: Any = None, shift_labels: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        got = (logits.loss, labels, num_items_in_batch, shift_labels)
        if any(one is not other for one, other in zip(got, expected, strict=True)):
            raise ValueError("the loss is not that of the head's output and of the labels as they came.")
        scales.append(logits.scale)
        return made

    made = torch.zeros(())
    stand_in = _StandInHead(Prediction(loss), hidden.shape, model.config.get_text_config().vocab_size)
    output = _StandInOutput(hidden, getattr(model, "num_experts", None))
    modules = {child: stand_in if child == name else _StandIn(output) for child in model._modules}
    trial_class = type("Trial", (stock_class,), {"loss_function": property(lambda self: loss_function)})
    view: Any = object.__new__(trial_class)
    view.__dict__ = {**model.__dict__, "_modules": modules, "training": True}
    inputs: dict[str, Any] = {"input_ids": ids, "labels": labels, "num_items_in_batch": items, "shift_labels": shifted}
    if masked:
        inputs["attention_mask"] = torch.ones_like(ids)
    if hasattr(model, "router_aux_loss_coef"):
        inputs["output_router_logits"] = False  # the loss over routers is added to what the forward returns
    # An older `forward` takes neither of the two last, and is then not called with `shift_labels`.
    inputs = accepted(stock_class.forward, {**inputs, "return_dict": True}, (*ADDED, "shift_labels"))
    expected = (loss, labels, inputs.get("num_items_in_batch"), inputs.get("shift_labels"))
    result = as_output(stock_class.forward(view, **inputs), has_labels=True)
    if result.loss is not made or made._version:
        raise ValueError("the loss function's result is changed before it is returned.")
    if len(scales) != 1 or stand_in.calls != 1 or not isinstance(result.logits, Prediction):
        raise ValueError("the head's output does not reach the loss, and the caller, once.")
    return scales[0]


class _StandInOutput:
    """The output of any backbone: hidden states, and None for whatever else is asked for."""

    def __init__(self, hidden: torch.Tensor, num_experts: int | None) -> None:
        self.last_hidden_state = hidden
        self.router_logits = None if num_experts is None else (torch.zeros(PROBED_TOKENS, num_experts),)

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


class _StandIn(nn.Module):
    """A module of which only the output is looked at."""

    def __init__(self, output: _StandInOutput) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> _StandInOutput:
        return self.output


class _StandInHead(nn.Module):
    """A head that checks that it gets the hidden states of all tokens."""

    def __init__(self, prediction: Prediction, shape: torch.Size, vocabulary: int) -> None:
        super().__init__()
        self.prediction, self.shape, self.calls = prediction, shape, 0
        # Some models tell it the loss, as the size of the vocabulary. A stage without the head finds the same.
        self.out_features = vocabulary

    def forward(self, hidden: torch.Tensor) -> Prediction:
        if hidden.shape != self.shape:
            raise ValueError(f"the head gets {tuple(hidden.shape)} instead of {tuple(self.shape)}.")
        self.calls += 1
        return self.prediction

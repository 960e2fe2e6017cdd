"""The forward that transformers (or the user) wrote, run over this rank's part, with the loss made as training asks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..ops.linear import Linear
from ..parallel.tp.loss import chunk_size, linear_causal_lm_loss, predicted_tokens
from .calling import accepted, as_output
from .logits import forward_with_logits, refuse_own_heads
from .parts import ModelParts


def stock_forward(
    model: ModelParts, view: PreTrainedModel, loss_weight: torch.Tensor | None = None, **inputs: Any
) -> CausalLMOutputWithPast:
    """The forward that transformers (or the user) wrote, over `view`.

    `logits` are whole where `makes_logits`, None where the loss is fused with the head, else this rank's slice.
    `loss_weight` multiplies the plain loss.
    """
    has_labels, makes_logits = inputs.get("labels") is not None, model.makes_logits
    inputs = accepted(model.stock_class.forward, {**inputs, "return_dict": True})
    loss_alone = model.training or model.training_loss.measured is not None
    wanted = loss_alone and model.fuses_loss and has_labels and not makes_logits
    fuses = wanted and inputs.get("logits_to_keep", 0) == 0 and model.linear_head is not None
    if model.training and model.weights is not None:  # a fused head has its gradients by then
        model.weights.gather_in_backward(view.get_output_embeddings(), not fuses)
    if makes_logits:
        return forward_with_logits(model, view, inputs)
    if not fuses or model.linear_head is None:
        output = as_output(model.stock_class.forward(view, **inputs), has_labels)
        refuse_own_heads(model, output)
        if has_labels and loss_weight is not None:
            output.loss = output.loss * loss_weight
        return output
    scale = model.linear_head.scale
    # The largest slice counts: ranks have sums over each chunk, so all of them need the same chunks.
    chunk = chunk_size(inputs["labels"].numel(), max(model.vocab_sizes) * model.dtype.itemsize)
    items = inputs.get("num_items_in_batch")
    if loss_weight is not None:
        items = predicted_tokens(inputs["labels"], inputs.get("shift_labels")) if items is None else items
        items = items / loss_weight  # of a fused head, the weight's gradient cannot be multiplied later

    def loss(hidden: torch.Tensor, head: Linear) -> torch.Tensor:
        return linear_causal_lm_loss(
            hidden,
            head.weight,
            head.bias,
            inputs["labels"],
            model.vocab_start,
            model.head_group,
            items,
            inputs.get("shift_labels"),
            model.training_loss.z_loss if model.training else 0.0,
            chunk,
            scale,
            weight_gradient=head.weight_gradient,
            note=model.training_loss.note,
            shares=model.training_loss.shares,
            note_choices=model.training_loss.note_choices,
            reweigh=model.training_loss.reweigh,
        )

    with model.linear_head.predicting(view, loss):
        output = as_output(model.stock_class.forward(view, **inputs), has_labels)
    if output.logits.scale != scale:
        raise ValueError(
            f"logits were multiplied by {output.logits.scale}, but by {scale} when the model was checked: its config "
            "has changed since. Create the model again."
        )
    if output.loss is not output.logits.loss or output.loss._version:
        raise ValueError(
            f"the forward of {model.stock_class.__name__} changed its loss, which it did not when the model was "
            "checked; set model.plain_forward = False, so that it gets full logits."
        )
    return type(output)(**{name: value for name, value in output.items() if name != "logits"})

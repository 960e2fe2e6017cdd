"""Evaluation of a model whose rows are shared by context-parallel ranks: whole logits and the whole loss on all."""

from __future__ import annotations

import contextlib
from typing import Any

from ..models.calling import CONTEXT
from ..parallel.batch import batch_shape
from ..parallel.collectives import all_reduce
from ..prepare.training_state import TrainingState
from .agreement.windows import evaluated_tokens
from .step.context import COUNTED, deal, needs_mask

OF_EVERY_LAYER = ("output_hidden_states", "output_attentions")


class DealtModel:
    """A model that is called with whole rows and returns whole outputs, of which each rank computes a part.

    Rows that need an attention mask, and outputs of every layer, are computed whole on every rank by the model's own
    attention.
    """

    def __init__(self, state: TrainingState) -> None:
        self.model, self.attention = state.model, state.attention

    def __call__(self, **inputs: Any) -> Any:
        model = self.model
        gather_logits = inputs.pop("gather_logits", True)
        asked = any(getattr(model.config.get_text_config(), name, False) for name in OF_EVERY_LAYER)
        if asked or needs_mask(inputs) is not None:
            if model.mesh.cp_rank:  # all have the same losses, of which those of one rank are summed up
                model.training_loss.domains = model.training_loss.figures = None
            return model(**inputs, gather_logits=gather_logits)
        dealt = deal(inputs, model.mesh, self.attention)
        counted, plan, mixture = dealt.pop(COUNTED, None), dealt[CONTEXT], model.mixture
        if inputs.get("num_items_in_batch") is None and inputs.get("labels") is not None:
            dealt["num_items_in_batch"] = evaluated_tokens(inputs)
        assert self.attention is not None
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.attention.training(model.config, False))
            if mixture is not None:
                stack.enter_context(mixture.dealing())
                mixture.before_forward(counted, None)
                stack.callback(mixture.before_forward, None, None)
            output = model(**{**dealt, "use_cache": False}, gather_logits=gather_logits)
        if output.loss is not None:
            output.loss = all_reduce(output.loss, model.mesh.cp)
        if gather_logits:
            output.logits = plan.parts.whole(output.logits)[:, : batch_shape(inputs)[1]]
        return output

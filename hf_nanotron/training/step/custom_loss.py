"""Training and evaluation with a loss that is not the model's own.

| who says so                                            | where it is computed                                      |
|--------------------------------------------------------|-----------------------------------------------------------|
| `compute_loss_func`, `label_smoothing_factor`          | on the last stage, from whole logits                      |
| the model: its loss function, its forward, its head    | in the forward of the last stage (`models/logits.py`)     |
| an overridden `compute_loss`, hooks on the whole model | by `compute_loss`, which calls the model: without stages  |
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from ...data.dealing import FillerBatch
from ...models.base import ParallelModel
from ...models.stock.hooks import inner_hooks, users_hooks
from ...models.stock.own_forward import OF_EVERY_LAYER, check_own_forward
from ...parallel.collectives import all_reduce
from ...parallel.tp.loss import shifted
from ...training_args import NanotronTrainingArguments
from .forward_pass import ForwardPass
from .loss import StepLoss

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class LossChoice:
    """Whose loss is trained and evaluated, by what a trainer has at the moment: callbacks may change it in a run.

    Args:
        compute_loss: of the trainer.
        is_overridden: whether that is the user's.
        trainer: name of its class, for messages.
        function: `compute_loss_func`.
        smoother: of `label_smoothing_factor`.
        takes_items: whether the model is called with `num_items_in_batch`.
        says_scaled: `loss_is_scaled_for_ga`.
        teacher: whose logits `function` gets, in `outputs.teacher_logits`.
    """

    model: ParallelModel
    args: NanotronTrainingArguments
    compute_loss: Callable[..., Any]
    is_overridden: bool
    trainer: str
    function: Callable[..., Any] | None
    smoother: Callable[..., Any] | None
    takes_items: bool
    says_scaled: bool | None
    teacher: ForwardPass | None = None

    # ---- what is asked for ----

    @property
    def whose(self) -> dict[str, bool]:
        """Who says what the loss is, as far as it is not in the model's class, its loss function or its head."""
        return {
            "compute_loss_func": self.function is not None,
            "label_smoothing_factor": self.smoother is not None,
            "compute_loss": self.is_overridden,
            "a forward assigned to the model": "forward" in vars(self.model),
            "a hook on the model": bool(users_hooks(self.model)),
        }

    @property
    def calls_whole_model(self) -> bool:
        """Whether a training step has to go through `compute_loss` and the model's own call."""
        return self.is_overridden or "forward" in vars(self.model) or bool(users_hooks(self.model))

    @property
    def of_outputs(self) -> Callable[..., torch.Tensor] | None:
        """What computes the loss from the outputs of a model that is called without labels."""
        function, smoother, teacher = self.function, self.smoother, self.teacher
        if function is not None:

            def of_function(outputs: Any, labels: Any, items: Any, **shifted: Any) -> torch.Tensor:
                if teacher is not None:
                    outputs.teacher_logits = teacher.take_logits()
                loss: torch.Tensor = function(outputs, labels, num_items_in_batch=items, **shifted)
                return loss

            return of_function
        if smoother is None:
            return None
        # Stock Trainer shifts labels for the classes that it knows by name. Every model here is a causal LM.
        if (name := self.model.stock_class.__name__) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            logger.warning_once(f"label_smoothing_factor: labels are shifted for {name}, as for any causal LM.")
        return lambda outputs, labels, items: smoother(outputs, labels, shift_labels=True, num_items_in_batch=items)

    @property
    def takes_shifted(self) -> bool:
        """Whether `function` takes `shift_labels`, so that it is a sum over the tokens that it is called with."""
        return self.function is not None and "shift_labels" in inspect.signature(self.function).parameters

    @property
    def is_own(self) -> bool:
        """Whether the loss is not the plain one of a model that makes no logits."""
        return self.of_outputs is not None or self.calls_whole_model or self.model.makes_logits

    @property
    def needs_labels(self) -> bool:
        """Whether no loss can be computed from a batch without `labels`."""
        return not self.is_overridden and self.function is None

    @property
    def is_scaled(self) -> bool:
        """Whether a loss is divided by the tokens of the step already, not by those of its micro-batch."""
        if self.says_scaled is not None:
            return self.says_scaled
        return self.takes_items or self.function is not None

    @property
    def is_mean_of_means(self) -> bool:
        """Whether the plain loss is a mean over each micro-batch, which weigh equally (`micro_batches.weigh`)."""
        return not (self.model.makes_logits or self.is_scaled or self.takes_items)

    # ---- what is possible ----

    def check(self) -> None:
        """Have the model make logits where the loss needs them. Called on every rank, when the trainer is made, when
        it starts, and with each epoch.
        """
        model, mesh = self.model, self.model.mesh
        if self.teacher is not None and self.function is None:
            raise ValueError(
                "teacher without compute_loss_func: nothing reads the teacher's logits; pass a function "
                "f(outputs, labels, num_items_in_batch=...), which finds them in outputs.teacher_logits."
            )
        if mesh.pp_size > 1:
            self._refuse_without_whole_model()
            check_own_forward(model, model.stock_class)
        self._warn_of_parts()
        # Of a model that takes no number of tokens, `micro_batches.weigh` divides the plain loss.
        unscaled = self.takes_items and model.plain_forward and not self.is_scaled
        model.training_loss.needs_logits = self.of_outputs is not None or self.calls_whole_model or unscaled
        if mesh.cp_size > 1:
            self._refuse_with_context()
        if not model.makes_logits:
            return
        self._refuse_with_own_loss()
        if self.of_outputs is not None and model.mixture is not None and model.mixture.losses is not None:
            logger.warning(
                "The losses over routers are not added to a loss that is computed from the outputs of the model "
                "(compute_loss_func, label_smoothing_factor), as in transformers.Trainer; outputs.aux_loss is the one "
                "that balances loads."
            )
        logger.info("The loss is not the model's plain one: the last stage makes full logits.")

    def _refuse_with_context(self) -> None:
        """What needs whole rows on one rank, or a mean over them."""
        model, mean = self.model, self.is_mean_of_means
        of_tokens = self.takes_shifted and not (self.calls_whole_model or model.has_own_loss)
        if of_tokens or not (model.makes_logits or mean):
            return
        told = [name for name, is_so in self.whose.items() if is_so]
        what = told[0] if told else f"the loss of {model.stock_class.__name__}"
        why = "it is a mean over a micro-batch, not over tokens" if mean else "a rank has its tokens' logits alone"
        raise ValueError(
            f"cp_size={model.mesh.cp_size} with {what}: {why}; train the plain loss of a model of transformers, or a "
            "compute_loss_func with a parameter `shift_labels`, which sums over tokens, or use cp_size=1."
        )

    def _refuse_with_own_loss(self) -> None:
        """What is possible with the plain loss alone."""
        model, args, mesh = self.model, self.args, self.model.mesh
        if args.z_loss_coefficient:
            raise ValueError(
                f"z_loss_coefficient={args.z_loss_coefficient} with a loss that is not the model's own: it is a part "
                "of the plain loss; add `coefficient * logits.logsumexp(-1).square()` to yours."
            )
        if model.mixture is not None and model.mixture.losses is not None and not model.plain_forward:
            raise ValueError(
                f"the forward of {model.stock_class.__name__} computes its own loss, so router losses "
                "could only be added after it; turn them off (config.output_router_logits=False, "
                "config.router_z_loss_coef=0), or use compute_loss_func with the stock forward."
            )
        between = [
            name
            for name in model.anatomy.last
            if name != model.anatomy.head and not name.startswith(f"{model.anatomy.backbone}.")
        ]
        if mesh.tp_size > 1 and args.parallel.sequence_parallel and between:
            raise ValueError(
                f"sequence_parallel=True with a loss that is not the model's own: {between[0]!r} stands between the "
                "backbone and the head, and works on the tokens of one rank; use sequence_parallel=False."
            )
        asked = [name for name in OF_EVERY_LAYER if getattr(model.config.get_text_config(), name, False)]
        if mesh.pp_size > 1 and asked:
            raise ValueError(
                f"pp_size={mesh.pp_size} with config.{asked[0]}=True and a loss that is not the model's own: the "
                "last stage has no outputs of other stages' layers; set it to False, or use pp_size=1."
            )

    def _warn_of_parts(self) -> None:
        """Of hooks that nobody has tried: those of a stock model are, before it is sharded (`selfcheck`)."""
        size, cp_size = self.model.mesh.tp_size, self.model.mesh.cp_size
        if cp_size > 1 and (inside := inner_hooks(self.model, self.model.anatomy.backbone)):
            name, hook = inside[0]
            logger.warning(
                f"{hook} is hooked to {name} of a model whose rows {cp_size} ranks share (cp_size): it sees this "
                "rank's tokens of every row, in the order of the deal, filled up. Only what it does to each token "
                "alone is right there."
            )
        hooked = inner_hooks(self.model, self.model.anatomy.backbone) if size > 1 else []
        if new := [(name, hook) for name, hook in hooked if (name, hook) not in self.model.cut.tried_hooks]:
            name, hook = new[0]
            logger.warning(
                f"{hook} is hooked to {name} of a sharded model (tp_size={size}): it sees this rank's shard, that is "
                "its heads and columns inside attention and MLP, and with sequence_parallel its tokens, padded. Only "
                "elementwise changes are right there. Hook the stock model before it is handed over, and the sharded "
                "one is compared with it."
            )

    def _refuse_without_whole_model(self) -> None:
        """What needs all layers of the model on one rank, which no rank of a pipeline has."""
        sizes = f"pp_size={self.model.mesh.pp_size}"
        if self.is_overridden:
            raise ValueError(
                f"{sizes} with {self.trainer}.compute_loss overridden: it calls the whole model, and a rank of "
                "a pipeline has only its stage. Pass compute_loss_func=f, with f(outputs, labels, "
                "num_items_in_batch=...), which is called with whole logits, or use pp_size=1."
            )
        if "forward" in vars(self.model):
            raise ValueError(
                f"{sizes} with a forward assigned to the model: no rank of a pipeline calls it as a whole. Pass "
                "compute_loss_func to change the loss, or use pp_size=1."
            )
        parts = self.model.anatomy.backbone.split(".") if self.model.anatomy.backbone else []
        for name in ["", *(".".join(parts[: depth + 1]) for depth in range(len(parts)))]:
            module = self.model.get_submodule(name)
            if hooked := users_hooks(module):
                raise ValueError(
                    f"{sizes} with a hook on {name or 'the model'} ({hooked[0]}): no rank of a pipeline calls it as a "
                    "whole. Hook a decoder layer or lm_head, pass compute_loss_func to change the loss, or use "
                    "pp_size=1."
                )

    # ---- where it is computed ----

    def of_step(self, window: Sequence[dict[str, Any]], has_items: bool) -> StepLoss | None:
        """How the losses of a window are made, with its predicted tokens counted or not; None for the plain loss."""
        if not self.model.makes_logits:
            return None
        mesh = self.model.mesh
        copies = 1 if self.args.average_tokens_across_devices else mesh.dp_size
        share: float | torch.Tensor = 1 / copies
        is_scaled = self.is_scaled if has_items else self.function is not None
        if not is_scaled:  # a mean over each micro-batch: as one process, which has all of them
            count = torch.tensor(float(sum(not isinstance(batch, FillerBatch) for batch in window)))
            share = 1 / all_reduce(count.to(mesh.device), mesh.dp)
        if not self.calls_whole_model:
            return StepLoss(share, self.takes_items, copies, self.of_outputs, self.takes_shifted)

        def of_batch(inputs: dict[str, Any], items: Any) -> torch.Tensor:
            loss: torch.Tensor = self.compute_loss(self.model, inputs, num_items_in_batch=items)
            return loss

        return StepLoss(share, self.takes_items, copies, of_batch=of_batch)

    def of_batch(self, model: nn.Module, inputs: dict[str, Any], items: torch.Tensor | int | None) -> tuple[Any, Any]:
        """Loss and outputs of one batch, as `Trainer.compute_loss` in one process."""
        of_outputs, mixture, figures = self.of_outputs, self.model.mixture, self.model.training_loss.figures
        told = inputs.get("labels"), inputs.get("shift_labels")
        if self.teacher is not None and self.function is not None:
            self.teacher.take(inputs)
        labels = inputs.pop("labels") if of_outputs is not None and "labels" in inputs else None
        if self.takes_items and items is not None:
            inputs = {**inputs, "num_items_in_batch": items}
        with mixture.reporting() if mixture is not None and of_outputs is not None else contextlib.nullcontext():
            outputs = model(**inputs)
        counts = self.model.makes_logits and self.model.mesh.cp_rank == 0  # context-parallel ranks have the same ones
        if figures is not None and counts and outputs.get("logits") is not None:
            figures.note_logits(outputs.logits, *told, self.model.mesh.alone)
        if of_outputs is None or (labels is None and self.function is None):
            return outputs["loss"], outputs
        if outputs.logits.dtype != torch.float32:
            outputs.logits = outputs.logits.float()
        if self.takes_shifted and labels is not None:
            return of_outputs(outputs, labels, items, shift_labels=shifted(labels, inputs.get("shift_labels"))), outputs
        return of_outputs(outputs, labels, items), outputs

"""The part of the trainer that trains, and evaluates with, a loss that is not the model's own.

| who says so                                            | where it is computed                                      |
|--------------------------------------------------------|-----------------------------------------------------------|
| `compute_loss_func`, `label_smoothing_factor`          | on the last stage, from whole logits                      |
| the model: its loss function, its forward, its head    | in the forward of the last stage (`models/logits.py`)     |
| an overridden `compute_loss`, hooks on the whole model | by `compute_loss`, which calls the model: without stages  |
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from ..data.loader import FillerBatch
from ..models.base import ParallelModel
from ..models.stock.hooks import inner_hooks, users_hooks
from ..models.stock.own_forward import OF_EVERY_LAYER, check_own_forward
from ..parallel.collectives import all_reduce
from ..parallel.mesh import ParallelMesh
from ..parallel.together import together
from ..parallel.tp.loss import IGNORE_INDEX
from ..training_args import NanotronTrainingArguments
from .same_on_all_ranks import compare_ranks
from .step_loss import StepLoss

logger = logging.get_logger(__name__)


class LossTrainer(Trainer):
    """A Trainer whose loss may be the user's, with the figures of one process."""

    args: NanotronTrainingArguments
    model: ParallelModel
    mesh: ParallelMesh
    _evaluates = False  # inside `prediction_step`
    _followed: dict[str, bool]  # `_whose_loss` that was checked last

    # ---- what is asked for ----

    def _check_loss(self) -> None:
        """Find out whose loss is trained. Called on every rank, when the trainer is made, when it starts, and
        with each epoch.

        Raises:
            ValueError: for a loss that this topology, or another argument, makes impossible.
        """
        model, args = self.model, self.args
        if self.mesh.pp_size > 1:
            self._refuse_without_whole_model()
            check_own_forward(model, model.stock_class)
        self._warn_of_parts()
        # Of a model that takes no number of tokens, `train_step.weigh` divides the plain loss.
        unscaled = self.model_accepts_loss_kwargs and model.plain_forward and not self._is_scaled
        model.training_loss.needs_logits = self._loss_of_outputs is not None or self._calls_whole_model or unscaled
        self._followed = self._whose_loss
        if not model.makes_logits:
            return
        if args.z_loss_coefficient:
            raise ValueError(
                f"z_loss_coefficient={args.z_loss_coefficient} with a loss that is not the model's own: it is a part "
                "of the plain loss; add `coefficient * logits.logsumexp(-1).square()` to yours."
            )
        if model.mixture is not None and model.mixture.losses is not None and not model.plain_forward:
            raise ValueError(
                f"the forward of {model.stock_class.__name__} computes a loss of its own, to which the losses over "
                "routers would be added, not inside it but after it; turn them off (config.output_router_logits=False, "
                "config.router_z_loss_coef=0), or use compute_loss_func with the stock forward."
            )
        between = [
            name
            for name in model.anatomy.last
            if name != model.anatomy.head and not name.startswith(f"{model.anatomy.backbone}.")
        ]
        if self.mesh.tp_size > 1 and args.parallel.sequence_parallel and between:
            raise ValueError(
                f"sequence_parallel=True with a loss that is not the model's own: {between[0]!r} stands between the "
                "backbone and the head, and works on the tokens of one rank; use sequence_parallel=False."
            )
        if self._loss_of_outputs is not None and model.mixture is not None and model.mixture.losses is not None:
            logger.warning(
                "The losses over routers are not added to a loss that is computed from the outputs of the model "
                "(compute_loss_func, label_smoothing_factor), as in transformers.Trainer; outputs.aux_loss is the one "
                "that balances loads."
            )
        asked = [name for name in OF_EVERY_LAYER if getattr(model.config.get_text_config(), name, False)]
        if self.mesh.pp_size > 1 and asked:
            raise ValueError(
                f"pp_size={self.mesh.pp_size} with config.{asked[0]}=True and a loss that is not the model's own: the "
                f"last stage has no outputs of other stages' layers; set it to False, or use pp_size=1."
            )
        logger.info("The loss is not the plain one: the last stage makes whole logits.")

    def _warn_of_parts(self) -> None:
        """Of hooks that nobody has tried: those of a stock model are, before it is cut (`models/selfcheck.py`)."""
        hooked = inner_hooks(self.model, self.model.anatomy.backbone) if self.mesh.tp_size > 1 else []
        if new := [(name, hook) for name, hook in hooked if (name, hook) not in self.model.cut.tried_hooks]:
            name, hook = new[0]
            logger.warning(
                f"{hook} is hooked to {name} of a model that is cut (tp_size={self.mesh.tp_size}): it is given this "
                "rank's part, inside attention and MLP of heads and widths, and with sequence_parallel of the "
                "tokens, filled up. What it changes is right element by element alone. Hook the stock model before it "
                "is handed over, and the cut one is compared with it."
            )

    def _refuse_without_whole_model(self) -> None:
        """
        Raises:
            ValueError: for what needs all layers of the model on one rank, which no rank of a pipeline has.
        """
        sizes = f"pp_size={self.mesh.pp_size}"
        if self._overrides_compute_loss:
            raise ValueError(
                f"{sizes} with {type(self).__name__}.compute_loss overridden: it calls the whole model, of which a "
                "rank of a pipeline has a part. Pass compute_loss_func=f, with f(outputs, labels, "
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

    @property
    def _whose_loss(self) -> dict[str, bool]:
        """Who says what the loss is, as far as it is not in the model's class, its loss function or its head."""
        return {
            "compute_loss_func": self.compute_loss_func is not None,
            "label_smoothing_factor": self.label_smoother is not None,
            "compute_loss": self._overrides_compute_loss,
            "a forward assigned to the model": "forward" in vars(self.model),
            "a hook on the model": bool(users_hooks(self.model)),
        }

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # Callbacks at the begin of the run or the epoch may have changed it.
        together(self.mesh, "checking the loss", self._check_loss)
        compare_ranks(self.mesh, self._whose_loss)
        return super()._run_epoch(*args, **kwargs)

    def _follow_loss(self) -> None:
        """Before a step, on the host alone: a callback may have changed the loss in the middle of an epoch.

        Raises:
            ValueError: see `_check_loss`.
        """
        if self._whose_loss != self._followed:
            self._check_loss()

    @property
    def _overrides_compute_loss(self) -> bool:
        return "compute_loss" in vars(self) or type(self).compute_loss is not LossTrainer.compute_loss

    @property
    def _calls_whole_model(self) -> bool:
        """Whether a training step has to go through `compute_loss` and the model's own call."""
        return self._overrides_compute_loss or "forward" in vars(self.model) or bool(users_hooks(self.model))

    @property
    def _loss_of_outputs(self) -> Callable[[Any, Any, Any], torch.Tensor] | None:
        """What computes the loss from the outputs of a model that is called without labels."""
        function, smoother = self.compute_loss_func, self.label_smoother
        if function is not None:
            return lambda outputs, labels, items: function(outputs, labels, num_items_in_batch=items)
        if smoother is None:
            return None
        # Stock Trainer shifts labels for the classes that it knows by name. Every model here is a causal LM.
        if (name := self.model.stock_class.__name__) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            logger.warning_once(f"label_smoothing_factor: labels are shifted for {name}, as for any causal LM.")
        return lambda outputs, labels, items: smoother(outputs, labels, shift_labels=True, num_items_in_batch=items)

    @property
    def _has_own_loss(self) -> bool:
        return self._loss_of_outputs is not None or self._calls_whole_model or self.model.makes_logits

    @property
    def _needs_labels(self) -> bool:
        """Whether no loss can be computed from a batch without `labels`."""
        return not self._overrides_compute_loss and self.compute_loss_func is None

    @property
    def _is_scaled(self) -> bool:
        """Whether a loss is divided by the tokens of the step already, not by those of its micro-batch."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return self.model_accepts_loss_kwargs or self.compute_loss_func is not None

    # ---- one step ----

    def _step_loss(self, window: Sequence[dict[str, Any]], has_items: bool) -> StepLoss | None:
        """How the losses of a window are made; None for the plain loss.

        Args:
            has_items: whether its predicted tokens are counted, which takes `labels`.
        """
        if not self.model.makes_logits:
            return None
        copies = 1 if self.args.average_tokens_across_devices else self.mesh.dp_size
        share: float | torch.Tensor = 1 / copies
        if not (
            self._is_scaled if has_items else self.compute_loss_func is not None
        ):  # a mean over each micro-batch: as one process, which has all of them
            count = torch.tensor(float(sum(not isinstance(batch, FillerBatch) for batch in window)))
            share = 1 / all_reduce(count.to(self.mesh.device), self.mesh.dp)
        takes_items = self.model_accepts_loss_kwargs
        if not self._calls_whole_model:
            return StepLoss(share, takes_items, copies, self._loss_of_outputs)

        def of_batch(inputs: dict[str, Any], items: Any) -> torch.Tensor:
            loss: torch.Tensor = self.compute_loss(self.model, inputs, num_items_in_batch=items)
            return loss

        return StepLoss(share, takes_items, copies, of_batch=of_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Loss of one batch, as `Trainer.compute_loss` in one process; a step sums those of all ranks.

        While a model trains, it is called for a subclass that overrides it, and for a model with hooks.
        """
        of_outputs = self._loss_of_outputs
        labels = inputs.pop("labels") if of_outputs is not None and "labels" in inputs else None
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
        mixture = self.model.mixture
        with mixture.reporting() if mixture is not None and of_outputs is not None else contextlib.nullcontext():
            outputs = model(**inputs)
        if of_outputs is None or (labels is None and self.compute_loss_func is None):
            loss = outputs["loss"]
        else:
            if outputs.logits.dtype != torch.float32:
                outputs.logits = outputs.logits.float()
            loss = of_outputs(outputs, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _items_of_batch(self, batch: dict[str, Any]) -> torch.Tensor | None:
        """The predicted tokens of one evaluation batch: a number of fp32, as Trainer counts; None without `labels`."""
        if "labels" not in batch:
            return None
        labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][..., 1:]
        return labels.ne(IGNORE_INDEX).sum() / 1

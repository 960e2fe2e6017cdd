"""What a trainer's constructor is given: what cannot be honoured is refused before anything is made."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from ..optim.build import check_elementwise, check_scheduler
from ..training_args import NanotronTrainingArguments
from .reporting import check_reports
from .trainer_methods import check_methods, is_overridden


def check_given(
    trainer: Trainer, args: Any, positional: tuple[Any, ...], kwargs: dict[str, Any]
) -> NanotronTrainingArguments:
    """The training arguments, if they, the others of the constructor and the trainer's class can be honoured."""
    if not isinstance(args, NanotronTrainingArguments):
        raise ValueError(
            f"NanotronTrainer needs `args` of type NanotronTrainingArguments, which hold the parallel sizes, not "
            f"{type(args).__name__}."
        )
    args.check()
    check_reports(args)
    refuse_arguments(positional, kwargs)
    check_methods(trainer)
    if not is_overridden(trainer, "create_scheduler") and not any(kwargs.get("optimizers") or ()):
        check_scheduler(args)
    return args


def refuse_arguments(positional: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse the Trainer arguments that cannot be honoured."""
    if positional:
        raise ValueError("NanotronTrainer takes `model` and `args` by position and the rest by name.")
    if kwargs.get("optimizer_cls_and_kwargs") is not None:
        check_elementwise(kwargs["optimizer_cls_and_kwargs"][0], "optimizer_cls_and_kwargs")
    optimizer, scheduler = kwargs.get("optimizers") or (None, None)
    if optimizer is not None:
        check_elementwise(type(optimizer), "optimizers")
    elif scheduler is not None:
        raise ValueError(
            "optimizers=(None, scheduler): a scheduler sets the learning rate of the optimizer it was made for. Pass "
            "both, or `lr_scheduler_type` with `lr_scheduler_kwargs`."
        )

"""Whether `training_step` is called as Trainer's loop calls it: once for each batch, up to the last of a step."""

from __future__ import annotations


def refuse_stray(is_in_train: bool, is_stepped: bool) -> None:
    """Before a call.

    Args:
        is_stepped: whether the step at hand was run.
    """
    if not is_in_train:
        raise ValueError(
            "training_step was called outside of train(): it collects the micro-batches of a step, and runs the "
            "pipeline over all of them. Call train(max_steps=...), or model.eval() and the model for a loss alone."
        )
    if is_stepped:
        raise ValueError(
            "training_step was called again after the last micro-batch of a step, whose gradients are reduced by "
            "then. Call super().training_step once for each batch; use gradient_accumulation_steps for more."
        )


def refuse_missing(is_stepped: bool) -> None:
    """When the gradients of a step are read."""
    if not is_stepped:
        raise ValueError(
            "training_step did not call super() for the last micro-batch of this step, with which the step runs. "
            "To leave a batch out, give it labels of -100."
        )

"""What each method of `transformers.Trainer` means here: called, replaced by ours, or irrelevant.

Three tables hold every method exactly once. An override that cannot be honoured is refused when the trainer is made,
and, if it was put on the trainer itself, when it trains. A method that a newer transformers adds is in no table: the
tests fail on it, and overriding it raises. `python -m hf_nanotron.training.trainer_methods` prints the tables.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from transformers import Trainer

# ---- Rules -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """A method that does something else here. An override is honoured if it calls `super()`.

    Args:
        does: what ours does.
        instead: what to use where an override does not call it, as the object of "Use ...".
    """

    does: str
    instead: str


@dataclass(frozen=True)
class Irrelevant:
    """A method that no run calls.

    Args:
        reason: why not.
        instead: what to use, as the object of "Use ...": overrides are refused.
    """

    reason: str
    instead: str


_LOADER = "when a loader is made"
_RUN = "once a run, by `train`"
_USER = "by your script"
_HUB = "when something is pushed"

CALLED: dict[str, str] = {
    # made once
    "_validate_args": "when the trainer is made",
    "init_hf_repo": "when the trainer is made, or by `push_to_hub`; creates the repository on rank 0",
    "_move_model_to_device": "when the trainer is made; the model is on its device already",
    "is_local_process_zero": "as in Trainer",
    "is_world_process_zero": "as in Trainer",
    "add_callback": _USER,
    "pop_callback": _USER,
    "remove_callback": _USER,
    # data
    "get_train_dataloader": f"{_RUN}; a loader of yours must give all ranks of one replica the same batches",
    "get_eval_dataloader": "by each evaluation",
    "get_test_dataloader": "by `predict`",
    "_get_dataloader": _LOADER,
    "_get_train_sampler": f"{_LOADER}; without a sampler samples come in order",
    "_get_eval_sampler": f"{_LOADER}; without a sampler samples come in order",
    "_set_signature_columns_if_needed": _LOADER,
    "_remove_unused_columns": _LOADER,
    "_get_collator_with_removed_columns": _LOADER,
    "num_examples": "by `train` and each evaluation",
    "get_batch_samples": "once a step, to collect its window of micro-batches",
    "_prepare_input": "for each batch that goes to the device",
    "_prepare_inputs": "for each batch that goes to the device",
    # optimizer
    "create_optimizer": f"{_RUN}; an optimizer of yours over `self.model.named_parameters()` is given our shards",
    "create_scheduler": _RUN,
    "get_optimizer_cls_and_kwargs": "by `create_optimizer`; it must be element-wise, or a `MatrixOptimizer`",
    "get_decay_parameter_names": "by `create_optimizer`, with the names of the whole layers of this rank",
    "_get_learning_rate": "once a step",
    # the loop
    "train": _USER,
    "get_total_train_batch_size": _RUN,
    "_hp_search_setup": f"{_RUN}, without a trial",
    "_load_callback_state": "by a resumed run",
    "compute_loss": "as in Trainer at pp_size=1; refused at more, where `compute_loss_func` is called instead",
    # figures
    "log": "for each log line",
    "floating_point_ops": "once a micro-batch; ranks that see the same batch count once",
    # evaluation
    "evaluate": "by `train` and your script",
    "predict": _USER,
    "prediction_step": "once a batch of an evaluation, on every rank",
    "_evaluate": "by `train`, at each evaluation",
    "_report_to_hp_search": "by `_evaluate`, without a trial",
    "_determine_best_metric": "by `train`, after each evaluation",
    # saving
    "_get_output_dir": "by each checkpoint",
    "_save_checkpoint": "by `train`, on every rank, at each save",
    "save_model": "by your script, `push_to_hub` and, if overridden, each checkpoint; on every rank",
    "_save": "by `save_model`, on every rank; it communicates",
    "_save_rng_state": "by each checkpoint, on every rank",
    "_load_rng_state": "by a resumed run, on every rank",
    "end": _USER,
    # the Hub
    "create_model_card": _HUB,
    "push_to_hub": f"{_USER}; on every rank",
    "_push_from_checkpoint": "after each checkpoint, with `push_to_hub`",
    "_finish_current_push": "at the end of `train`, and by `push_to_hub`",
    # helpers
    "get_learning_rates": _USER,
    "get_num_trainable_parameters": f"{_USER}; ours counts the whole model",
    "get_optimizer_group": f"{_USER}; ours takes a parameter of the model or its name",
    "log_metrics": _USER,
    "metrics_format": _USER,
    "save_metrics": _USER,
    "save_state": _USER,
}

_SIZES = "the sizes in NanotronTrainingArguments"
_GRADIENTS = "max_grad_norm to clip, and the grad_norm in the log"
_RESUME = "super() first, or `extra_state` to add to a checkpoint"

OURS: dict[str, Ours] = {
    "_build_accelerator_args": Ours("keeps accelerate from compiling and casting", "super(), and change its result"),
    "create_accelerator_and_postprocess": Ours("makes accelerate's part of the trainer", "super(), then your changes"),
    "call_model_init": Ours("cuts the model that `model_init` returns", "`model_init`"),
    "_inner_training_loop": Ours("goes on with the next sample of a resumed run", "callbacks, or `training_step`"),
    "set_initial_training_values": Ours("counts the samples that a resumed run has left", "max_steps"),
    "_init_training_state": Ours("goes on with the next sample of a resumed run", "an `on_train_begin` callback"),
    "_prepare_for_training": Ours(
        "divides weights and optimizer among the ranks", "`create_optimizer`, `create_scheduler` or a callback"
    ),
    "_run_epoch": Ours("keeps ranks together, and the cursor of the data", "callbacks, or `training_step`"),
    "_maybe_log_save_evaluate": Ours("lets flags of one rank act on all", "callbacks"),
    "_finalize_training": Ours("waits for saves in the background", "an `on_train_end` callback"),
    "training_step": Ours(
        "collects micro-batches, and runs the pipeline over all of a step with the last",
        "super() for each batch, changing the batch before it; for another loss, `compute_loss_func`",
    ),
    "_get_num_items_in_batch": Ours("counts predicted tokens over data-parallel ranks", "`compute_loss_func`"),
    "get_tp_size": Ours("counts the ranks that see the same batch", _SIZES),
    "_track_num_input_tokens": Ours("counts what ranks with the same batch see once", "an `on_step_end` callback"),
    "_clip_grad_norm": Ours("clips by the norm over the whole model", _GRADIENTS),
    "_get_grad_norm": Ours("returns the norm over the whole model", _GRADIENTS),
    "store_flos": Ours("counts what ranks with the same batch compute once", "`floating_point_ops`"),
    "evaluation_loop": Ours(
        "joins results over data-parallel ranks alone", "`prediction_step`, `compute_metrics` or super()"
    ),
    "_load_from_checkpoint": Ours("reads the weights, by all ranks together", _RESUME),
    "_load_best_model": Ours("reads the weights, by all ranks together", _RESUME),
    "_load_optimizer_and_scheduler": Ours("reads this rank's part of the training state", _RESUME),
    "hyperparameter_search": Ours("refuses: trials run in one process", "one job for each trial"),
}

_NO_WRAPPER = "nothing wraps the model here"
_NO_FSDP = "parameters are sharded by this package"

IRRELEVANT: dict[str, Irrelevant] = {
    "create_optimizer_and_scheduler": Irrelevant(
        "Trainer calls the two one by one, here as in transformers", "`create_optimizer` and `create_scheduler`"
    ),
    **dict.fromkeys(
        ("compute_loss_context_manager", "autocast_smart_context_manager"),
        Irrelevant(
            "forward and backward of a whole step run together",
            "bf16=True, or `training_step` and `prediction_step` with super() inside of your context",
        ),
    ),
    "_prepare_context_parallel_inputs": Irrelevant(
        "rows are shared among ranks by cp_size, without accelerate", "cp_size"
    ),
    "get_sp_size": Irrelevant("DeepSpeed's sequence parallelism is not used", _SIZES),
    "get_cp_size": Irrelevant("rows are shared among ranks by cp_size, without accelerate", _SIZES),
    "_defer_fsdp_gradient_reduction": Irrelevant(_NO_FSDP, "zero_stage"),
    "_sync_replicated_trainable_parameters": Irrelevant(_NO_FSDP, "zero_stage"),
    "_wrap_model": Irrelevant(_NO_WRAPPER, "the model itself, before the trainer is made"),
    "_update_auto_batch_size": Irrelevant("the batch size is not searched for", "per_device_train_batch_size"),
    "_mixed_mesh_grad_norm": Irrelevant("gradients are no DTensors", _GRADIENTS),
    "_has_mixed_mesh_grads": Irrelevant("gradients are no DTensors", _GRADIENTS),
    "_save_optimizer_and_scheduler": Irrelevant(
        "every rank writes its part of `training_state/`", "`extra_state`, `_save_checkpoint` with super(), or on_save"
    ),
    "_save_scaler": Irrelevant("there is no loss scaling", "`extra_state`, or on_save"),
    "_load_scaler": Irrelevant("there is no loss scaling", "an `on_train_begin` callback"),
    "_issue_warnings_after_load": Irrelevant("a checkpoint that lacks tensors is refused", "a complete checkpoint"),
    "_tune_save_checkpoint": Irrelevant("hyperparameter_search is refused", "one job for each trial"),
}


# Packages whose methods are known to work together: those of a trainer that names no others (`libraries`).
LIBRARIES = ("transformers", "hf_nanotron")


# ---- Overrides -------------------------------------------------------------------------------------------------


def check_methods(trainer: Trainer) -> None:
    """Refuse overrides of Trainer's methods, on the trainer, its classes and mixins, that would not take effect.

    Raises:
        ValueError: with one line for each: the method, where it is overridden, the reason, and what to use instead.
    """
    problems = []
    for name in sorted({*methods(), *CALLED, *OURS, *IRRELEVANT}):
        for function, place, is_hidden in _overrides(trainer, name):
            if why := _why_refused(name, function, is_hidden):
                problems.append(f"{name}, overridden in {place}, is refused: {why}.")
    if problems:
        raise ValueError("\n".join(problems))


def _why_refused(name: str, function: Any, is_hidden: bool) -> str | None:
    if (irrelevant := IRRELEVANT.get(name)) is not None:
        return f"it would never be called, since {irrelevant.reason}. Use {irrelevant.instead}"
    if is_hidden:
        return "NanotronTrainer's own comes before it, and does not call it. Name the class before NanotronTrainer"
    if (ours := OURS.get(name)) is not None:
        if calls_next(function, name):
            return None
        return f"it does not call super(), and ours {ours.does}. Use {ours.instead}"
    if name in CALLED:
        return None
    return "this version of hf_nanotron does not know the method. Use a newer one"


def methods() -> list[str]:
    """The public and semi-public methods and properties of the installed Trainer, in its order."""
    found: dict[str, None] = {}
    for cls in Trainer.__mro__[:-1]:
        for name, value in vars(cls).items():
            if not name.startswith("__") and (callable(value) or isinstance(value, _WRAPPED)):
                found[name] = None
    return list(found)


_WRAPPED = (staticmethod, classmethod, property, functools.cached_property)


def is_overridden(trainer: Trainer, name: str) -> bool:
    """Whether a method is the user's."""
    return any(not is_hidden for _, _, is_hidden in _overrides(trainer, name))


def is_subclass(trainer: Trainer) -> bool:
    """Whether a user has derived its class: it may do anything between the parts of a step."""
    return type(trainer).__module__.partition(".")[0] != "hf_nanotron"


def _overrides(trainer: Trainer, name: str) -> Iterator[tuple[Any, str, bool]]:
    """The user's functions of that name, where each is, and whether ours keeps it from being called."""
    holders: list[tuple[Any, str, bool]] = [(vars(trainer), "the trainer itself", True)]
    holders += [(vars(cls), cls.__qualname__, issubclass(cls, Trainer)) for cls in type(trainer).__mro__]
    hidden, libraries = False, getattr(trainer, "libraries", LIBRARIES)
    for namespace, place, is_trainer in holders:
        if name not in namespace:
            continue
        function = _function(namespace[name])
        if _is_library(function, libraries):
            hidden = hidden or not calls_next(function, name)
        elif not hidden or is_trainer:  # a mixin that is no Trainer would not be called behind Trainer either
            yield function, place, hidden
            if not calls_next(function, name):
                return


def _function(value: Any) -> Any:
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    elif isinstance(value, functools.cached_property):
        value = value.func
    while isinstance(value, functools.partial):
        value = value.func
    return inspect.unwrap(value) if callable(value) else value


def _is_library(function: Any, libraries: tuple[str, ...]) -> bool:
    return str(getattr(function, "__module__", "")).partition(".")[0] in libraries


def calls_next(function: Any, name: str) -> bool:
    """Whether a function calls the next `name`: by `super()`, by a class, or one that it holds on to."""
    function = _function(function)
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        return False
    if _mentions(code, name):
        return True
    held = [cell.cell_contents for cell in function.__closure__ or () if cell.cell_contents is not function]
    held += [function.__globals__[each] for each in code.co_names if each in function.__globals__]
    for value in held:
        if getattr(value, "__name__", None) == name and callable(value):
            return True
    return any(inspect.isfunction(value) and _mentions(value.__code__, name) for value in held)


def _mentions(code: CodeType, name: str) -> bool:
    return name in code.co_names or any(_mentions(c, name) for c in code.co_consts if isinstance(c, CodeType))


def walk() -> str:
    """The methods of the installed Trainer, one a line, with what each means here."""
    lines = []
    for name in methods():
        if name in CALLED:
            line = f"called: {CALLED[name]}"
        elif name in OURS:
            line = f"ours, {OURS[name].does}; an override calls super(), else it is refused (use {OURS[name].instead})"
        elif name in IRRELEVANT:
            line = f"irrelevant, {IRRELEVANT[name].reason}; an override is refused (use {IRRELEVANT[name].instead})"
        else:
            line = "not known"
        lines.append(f"{name}: {line}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(walk())

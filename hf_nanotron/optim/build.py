"""The optimizer over this rank's segments: which one, and its parameter groups."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from ..parallel.zero.segment import Segment
from .adamw import AdamW
from .lion import Lion
from .matrix_optimizer import ELEMENTWISE as ADAMW, MATRIX, MatrixOptimizer
from .muon import Muon

# Schedulers that are classes, which take keys of their own.
LIBRARY_CLASSES = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


@dataclass(frozen=True)
class UpdateRule:
    """How one weight is updated, where that is not the same for all. Weights of one rule are a parameter group.

    Attributes:
        kind: `"adamw"` is any element-wise optimizer, `"matrix"` one whose direction needs the whole matrix.
        rate: factor of the learning rate. Weight decay is divided by it: a step takes the same part of the weight.
        eps: factor of AdamW's epsilon.
    """

    kind: Literal["adamw", "matrix"] = "adamw"
    rate: float = 1.0
    eps: float = 1.0


OptimizerChoice = tuple[type[torch.optim.Optimizer], dict[str, Any]]

# Each updates every element by its own gradient and state alone, so a part of a matrix is updated as in the whole.
ELEMENTWISE = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
_KNOWN = (*(getattr(torch.optim, name) for name in ELEMENTWISE), AdamW, Lion)


def check_elementwise(optimizer_class: type[torch.optim.Optimizer], argument: str) -> None:
    """Refuse an optimizer that would compute something else on a part of a matrix.

    One that is not in the list above sets `elementwise = True` on its class, or derives from `MatrixOptimizer`.
    """
    known = optimizer_class in _KNOWN or issubclass(optimizer_class, MatrixOptimizer)
    if not known and not getattr(optimizer_class, "elementwise", False):
        raise ValueError(
            f"{argument}: {optimizer_class.__name__} is not known to be element-wise, which sharded parameters "
            f"require. Use one of torch.optim.{', '.join(ELEMENTWISE)}, or, if it is element-wise, set "
            f"{optimizer_class.__name__}.elementwise = True; if it needs whole matrices, derive it from "
            "hf_nanotron.MatrixOptimizer (optim='muon' is one)."
        )


def check_steps_by_parts(optimizer_class: type[torch.optim.Optimizer]) -> None:
    """Refuse an optimizer of which it is not known that several steps over parts are one over all parameters."""
    if optimizer_class not in _KNOWN:
        raise ValueError(
            f"optim_offload: {optimizer_class.__name__} would step once for each part of its state, and it is not "
            f"known that this is one step of all; use one of torch.optim.{', '.join(ELEMENTWISE)}, or optim_offload=0."
        )


def check_scheduler(args: TrainingArguments) -> None:
    """Refuse a learning-rate scheduler that could not be made, or that would ignore what it was given."""
    name, kwargs = SchedulerType(args.lr_scheduler_type), args.lr_scheduler_kwargs
    kwargs = dict(kwargs) if isinstance(kwargs, Mapping) else {}
    if (branch := getattr(args, "wsd_decay_steps", None)) is not None:
        kwargs["num_decay_steps"] = branch
    made_with = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    function: Any = TYPE_TO_SCHEDULER_FUNCTION[name]
    known = [key for key in inspect.signature(function).parameters if key not in made_with]
    if name not in LIBRARY_CLASSES and (unknown := [key for key in kwargs if key not in known]):
        raise ValueError(
            f"lr_scheduler_kwargs: {unknown[0]}={kwargs[unknown[0]]!r} is not a key of lr_scheduler_type="
            f"{name.value!r}; {'its keys are ' + ', '.join(known) if known else 'it has none'}."
        )
    steps = max(args.max_steps, 1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        get_scheduler(name, optimizer, args.get_warmup_steps(steps), steps, kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_type={name.value!r} with lr_scheduler_kwargs={kwargs!r} is invalid: {error}"
        ) from error


def optimizer_choice(args: TrainingArguments, state_dtype: torch.dtype) -> OptimizerChoice:
    """Class and arguments for `args.optim`: transformers' own choice, except where we have the optimizer ourselves."""
    if args.optim == "lion_32bit":  # transformers would take it from bitsandbytes
        return Lion, {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
    if args.optim == "muon":
        return Muon, muon_arguments(args, state_dtype)
    optimizer_class, arguments = Trainer.get_optimizer_cls_and_kwargs(args)
    # In fp32 it computes what torch's fused one does, a third faster (examples/benchmarks/NOTEBOOK.md).
    is_slower = optimizer_class is torch.optim.AdamW and arguments.get("fused") and args.device.type == "cuda"
    if state_dtype != torch.float32 or is_slower:
        return AdamW, {**{k: v for k, v in arguments.items() if k != "fused"}, "state_dtype": state_dtype}
    return optimizer_class, arguments


def muon_arguments(args: Any, state_dtype: torch.dtype) -> dict[str, Any]:
    """Of `Muon`, by the training arguments."""
    return {
        "lr": args.learning_rate,
        "matrix_lr": args.muon_learning_rate,
        "momentum": args.muon_momentum,
        "nesterov": args.muon_nesterov,
        "ns_steps": args.muon_ns_steps,
        "scale": args.muon_scale,
        "matrix_dtype": getattr(torch, args.muon_dtype),
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "state_dtype": state_dtype,
    }


def build_optimizer(
    segments: Sequence[Segment],
    order: Sequence[str],
    decayed: set[str],
    weight_decay: float,
    optimizer_class: type[torch.optim.Optimizer],
    optimizer_arguments: dict[str, Any],
    rules: Mapping[str, UpdateRule] | None = None,
    matrices: Collection[str] = (),
) -> torch.optim.Optimizer:
    """Two parameter groups for each rule: those whose name is in `decayed`, and the others without weight decay.

    With one rule for all they are those of Trainer. The groups are the same on every rank, also where one has none of
    their weights.

    Args:
        order: names of the Hub's tensors in model order, the same on every rank.
        rules: name of the Hub's tensor -> its rule; the others have the plain one, whose groups come first.
        matrices: names of the Hub's tensors that a `MatrixOptimizer` updates as matrices, each by the same rule.
    """
    takes_matrices = issubclass(optimizer_class, MatrixOptimizer)
    rules, plain = dict(rules or {}), UpdateRule()
    if takes_matrices:
        rules |= dict.fromkeys(matrices, UpdateRule("matrix"))
    defaults: dict[str, Any] = {n: p.default for n, p in inspect.signature(optimizer_class).parameters.items()}
    chosen = {**defaults, **optimizer_arguments}
    groups = []
    for rule in dict.fromkeys((plain, *(rules.get(name, plain) for name in order))):
        scaled = {
            name: factor * chosen[name]
            for name, factor in (("lr", rule.rate), ("eps", rule.eps))
            if factor != 1.0 and name in chosen  # Lion has no epsilon
        }
        if takes_matrices:
            scaled["kind"] = MATRIX if rule.kind == "matrix" else ADAMW
        held = [segment for segment in segments if rules.get(segment.spec.name, plain) == rule]
        for decay, is_decayed in ((weight_decay / rule.rate, True), (0.0, False)):
            masters = [segment.master for segment in held if (segment.name in decayed) == is_decayed]
            groups.append({"params": masters, "weight_decay": decay, **scaled})
    optimizer = optimizer_class(groups, **optimizer_arguments)
    if inspect.unwrap(optimizer_class.step) in (inspect.unwrap(AdamW.step), inspect.unwrap(MatrixOptimizer.step)):
        rounds: Any = optimizer  # no step of a user's, which may change masters behind the rounding
        rounds.rounded = {segment.master: segment.weight for segment in segments if segment.weight is not None}
    if isinstance(optimizer, AdamW):
        optimizer.streams = rounding_streams(segments, order)
    return optimizer


def names_to_decay(names: Sequence[str], excluded: Sequence[str], model_names: Collection[str]) -> list[str]:
    """`names` in which none of the regular expressions `excluded` is found.

    Raises:
        ValueError: for one that is in none of `model_names`, those of the whole model.
    """
    for pattern in excluded:
        if not any(re.search(pattern, name) for name in model_names):
            some = ", ".join(list(model_names)[:3])
            raise ValueError(f"no_weight_decay: {pattern!r} is in the name of no weight; there are {some}, ...")
    return [name for name in names if not any(re.search(pattern, name) for pattern in excluded)]


def rounding_streams(segments: Sequence[Segment], order: Sequence[str]) -> dict[nn.Parameter, tuple[int, int]]:
    """The random bits with which AdamW rounds each segment, the same for copies of a weight on several ranks."""
    number = {name: index for index, name in enumerate(order)}
    return {segment.master: (number[segment.spec.name], segment.start) for segment in segments}


def adopt_optimizer(
    optimizer: torch.optim.Optimizer,
    names: dict[nn.Parameter, str],
    segments: Sequence[Segment],
    order: Sequence[str],
) -> None:
    """Replace the model's parameters in an optimizer that was made over them by our segments, group by group.

    The object stays the same, so a scheduler made for it keeps working. AdamW rounds as one from `build_optimizer`,
    except where the user has given a parameter a stream: its segment draws its own part of it. `names` are those of the
    model's parameters as they were when the optimizer was made.
    """
    check_elementwise(type(optimizer), "optimizers")
    if optimizer.state:
        raise ValueError(
            f"optimizers: {type(optimizer).__name__} already has state, which belongs to whole parameters (it has "
            "stepped, or creates its state when it is made). Pass `optimizer_cls_and_kwargs` instead."
        )
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if unknown := sum(parameter not in names for parameter in held):
        raise ValueError(
            f"optimizers: {unknown} of its {len(held)} parameters are not parameters of the model to train. "
            "Sharding a model creates new ones: make the model first (`AutoModelForCausalLM.from_pretrained(..., "
            "parallel=args.parallel)`), then the optimizer over its `named_parameters()`."
        )
    known = set(held)
    if missing := [name for p, name in names.items() if p.requires_grad and p not in known]:
        raise ValueError(
            f"optimizers: no parameter group has {', '.join(sorted(missing)[:3])} ({len(missing)} parameters), which "
            "require gradients. Add them, or set requires_grad_(False)."
        )
    masters = {segment.name: segment.master for segment in segments}
    for group in optimizer.param_groups:
        group["params"] = [masters[names[p]] for p in group["params"] if names[p] in masters]
    if isinstance(optimizer, AdamW):
        given = {names[p]: stream for p, stream in optimizer.streams.items() if p in names}
        optimizer.streams = rounding_streams(segments, order)
        for segment in segments:
            if segment.name in given:
                number, first = given[segment.name]
                optimizer.streams[segment.master] = number, first + segment.start

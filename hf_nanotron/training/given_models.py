"""The models that a trainer is given: sharded if they are stock models, and fit for its arguments."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..models.base import ParallelModel
from ..models.sharding.parallelize import parallelize
from ..models.sharding.selfcheck import compare, try_whole
from ..parallel.mesh import ParallelMesh
from ..parallel.together import together
from ..prepare.frozen import check_tokenizer, freeze
from ..training_args import NanotronTrainingArguments
from .step.forward_pass import ForwardPass


def check_parallel(model: ParallelModel, args: NanotronTrainingArguments, trains_adapters: bool) -> None:
    """Refuse a parallel model that was made for other arguments, or with adapters for another trainer."""
    if model.parallel != args.parallel:
        raise ValueError(
            f"the model was made for {model.parallel}, but the training arguments say {args.parallel}; pass "
            "`parallel=args.parallel` when you make the model."
        )
    if model.adapters and not trains_adapters:
        raise ValueError(
            "the model has adapters of another trainer, which this one would not save. Go on with that "
            "trainer, or merge them into the base first (PEFT's merge_and_unload) and load the result."
        )


def shard_stock(model: PreTrainedModel, mesh: ParallelMesh) -> ParallelModel:
    """Cut a stock model in place, and compare what it computes with the whole one."""
    trial = try_whole(model, mesh)
    parallel = parallelize(model, mesh)
    parallel.to(mesh.device)  # type: ignore[arg-type]
    compare(parallel, trial)
    return parallel


def frozen_beside(
    frozen: ParallelModel, model: ParallelModel, args: NanotronTrainingArguments, tokenizer: Any, what: str
) -> ForwardPass:
    """A frozen model that sees the windows which `model` trains on. All ranks together.

    Args:
        tokenizer: of the trainer, which has to be the frozen model's, too.
        what: it is, for messages.
    """
    check = f"comparing tokenizers with the {what}'s"
    together(model.mesh, check, lambda: check_tokenizer(frozen, tokenizer, what))
    prepared = freeze(frozen, model, args.bf16, args.attention, what)
    return ForwardPass(prepared, model.own_columns - frozen.own_columns)


def place_in_words(model: ParallelModel) -> str:
    """The sizes of the mesh, and which stages this rank has."""
    mesh = model.mesh
    stages = [f"{s.index} (layers {s.layers.start}-{s.layers.stop - 1})" for s in model.stages]
    sizes = f"tp {mesh.tp_size} x cp {mesh.cp_size} x pp {mesh.pp_size} x dp {mesh.dp_size}"
    return f"mesh: {sizes}; stages of this rank: {', '.join(stages)}"

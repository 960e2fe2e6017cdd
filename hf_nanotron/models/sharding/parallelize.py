"""Turn a stock causal LM into this rank's part of a parallel one, in place."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from ...checkpoint.hub.layout import hub_layout
from ...checkpoint.hub.nonfinite_tensors import warn_nonfinite
from ...parallel.collectives import all_reduce
from ...parallel.config import ParallelConfig
from ...parallel.dropout_streams import LayerStreams, fields_of_chance, has_dropout
from ...parallel.mesh import ParallelMesh
from ...parallel.pipeline.executor import PipelineExecutor
from ...parallel.pipeline.schedule import rank_of_stage
from ...parallel.shard_spec import ShardSpec
from ...parallel.tp.overlap import BlockOverlap, Overlap
from ...parallel.tp.regions import (
    Region,
    TokenRegion,
    WholeRegion,
    gather_before_head,
    join_after,
    own_ids_before,
    split_argument,
    split_before,
)
from ...parallel.tp.transport import make_transport
from ..base import ParallelModel, parallel_class
from ..cut import Cut, holding_weights
from ..decorations import Decorations
from ..moe.mixture import make_mixture
from ..stage import Stage
from ..stand_ins import ABSENT, Absent, AbsentLayer, put_stand_in, stand_in
from ..stock.anatomy import Anatomy, dissect
from ..stock.families import NO_PIPELINE, NO_SEQUENCE_PARALLEL, SEQUENCE_DIM, SUMS_BEFORE, TOKEN_ARGUMENTS, row_of
from ..stock.foreign import why_not_causal
from ..stock.hooks import users_hooks
from ..stock.plan import Plan, is_experts, make_plan
from ..stock.torch_hooks import weight_hook_message
from ..training_loss import TrainingLoss
from ..weight_roles import weight_roles
from .stage_split import EMBEDDING_COST, first_shared_layer, split_layers
from .tensor_shards import swap_layers, tensor_specs
from .unwrap import class_of, unwrap


def parallelize(model: PreTrainedModel, mesh: ParallelMesh) -> ParallelModel:
    """Shard `model` (on the meta device or with weights) in place: keep what this rank of `mesh` holds.

    Plans are read and checked on the whole model, so that every rank raises the same error.
    """
    if isinstance(model, ParallelModel):
        raise ValueError(f"{type(model).__name__} is already sharded.")
    model = unwrap(model)
    if (reason := why_not_causal(model)) is not None:
        raise ValueError(f"{reason}; hf_nanotron only trains causal language models.")
    stock = class_of(model)
    _refuse_different_models(model, mesh)

    anatomy = dissect(model)
    refuse_sizes(model, mesh.parallel)
    if message := weight_hook_message(model.named_parameters()):
        raise ValueError(message)
    cut = Cut.of(model)
    tied = _tied_names(anatomy)
    plan = make_plan(anatomy, mesh.tp_size, mesh.ep_size)
    _refuse_what_ranks_would_draw_differently(model, mesh, plan)
    specs = _named_like_the_hub(tensor_specs(anatomy, mesh, plan), tied, anatomy)
    layers_of_stage = layers_by_stage(anatomy, mesh.parallel)
    tensors = model.state_dict(keep_vars=True)
    stage_of = {name: _stage_of(name, anatomy, layers_of_stage) for name in (*specs, *tensors)}
    _refuse_shared_stages(model, stage_of, tied)
    layout = hub_layout(model)
    _refuse_undeclared_ties(model, layout.tied)
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    left_out = (again | tied.keys()) - set(tied.values())  # other names of weights
    hub_shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in left_out}
    roles = weight_roles(anatomy)
    owners = {name: rank_of_stage(stage_of[name], mesh.pp_size) for name in hub_shapes}

    mixture = make_mixture(model, mesh, plan)
    head_is_hooked = bool(users_hooks(cast(nn.Module, model.get_output_embeddings())))

    _take_weights_of_rank_0(model, mesh)
    if mesh.rank == 0:
        for name, parameter in model.named_parameters():
            warn_nonfinite(name, parameter, f"the given {stock.__name__}")
    if mesh.pp_size > 1:
        _leave_out_other_stages(anatomy, mesh, layers_of_stage, specs)
    swap_layers(model, mesh, plan, specs, ABSENT)
    model.__class__ = parallel_class(stock)  # type: ignore[arg-type]
    model = cast(ParallelModel, model)
    model.mesh, model.anatomy, model.mixture = mesh, anatomy, mixture
    model.training_loss, model.decorations = TrainingLoss(), Decorations()
    if mixture is not None:
        mixture.attach(model)
    model.head_is_cut, model.head_is_hooked = anatomy.head in plan.styles, head_is_hooked
    model.vocab_sizes = specs[f"{anatomy.head}.weight"].lengths
    model.vocab_start = sum(model.vocab_sizes[: mesh.tp_rank]) if model.head_is_cut else 0
    model.hub_shapes, model.hub_owners, model.hub_layout = hub_shapes, owners, layout
    model.roles = {name: roles[name] for name in hub_shapes if name in roles}
    held = dict(model.named_parameters())
    model.shard_specs = {name: specs[name] for name in held}
    model.stage_of = {name: _held_stage(stage_of[name], specs[name], mesh) for name in held}
    model.streams = _attach_dropout_streams(model, mesh)
    _attach_communication(model, mesh, plan)
    stages = [index for index in range(len(layers_of_stage)) if rank_of_stage(index, mesh.pp_size) == mesh.pp_rank]
    model.layers_of_stage = tuple(layers_of_stage)
    model.stages = [Stage(model, index, layers_of_stage[index], len(layers_of_stage)) for index in stages]
    model.executor = PipelineExecutor(mesh.pp, mesh.device)
    model.config.architectures = [stock.__name__]
    cut.modules = holding_weights(model)
    model.cut = cut
    return model


def refuse_layout(model: PreTrainedModel, mesh: ParallelMesh) -> None:
    """Refuse what `parallelize` would refuse of the model's sizes, and change nothing.

    Args:
        model: a whole stock model, perhaps on the meta device.
        mesh: of which only sizes and coordinates are read.

    Raises:
        ValueError: as `parallelize`.
    """
    if (reason := why_not_causal(model)) is not None:
        raise ValueError(f"{reason}; hf_nanotron only trains causal language models.")
    anatomy = dissect(model)
    refuse_sizes(model, mesh.parallel)
    tied = _tied_names(anatomy)
    plan = make_plan(anatomy, mesh.tp_size, mesh.ep_size)
    _refuse_what_ranks_would_draw_differently(model, mesh, plan)
    specs = _named_like_the_hub(tensor_specs(anatomy, mesh, plan), tied, anatomy)
    layers = layers_by_stage(anatomy, mesh.parallel)
    _refuse_shared_stages(model, {name: _stage_of(name, anatomy, layers) for name in specs}, tied)
    _refuse_undeclared_ties(model, hub_layout(model).tied)


def _refuse_different_models(model: PreTrainedModel, mesh: ParallelMesh) -> None:
    """Compare what the ranks hand over, but for the values of weights. All ranks together."""
    if mesh.world_size == 1:
        return
    parts = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
    code = zlib.crc32(repr((type(model).__name__, parts)).encode())
    own = torch.tensor([code, -code], device=mesh.device)
    highest, lowest = all_reduce(own, mesh.world, dist.ReduceOp.MAX).tolist()
    if highest != -lowest:
        raise ValueError(
            f"the ranks have different models (rank {mesh.rank}: {type(model).__name__} with {len(parts)} "
            f"parameters, {sum(trained for *_, trained in parts)} of them trained): class, shapes, dtypes and "
            "requires_grad must be the same on every rank. Check whether the script, or `model_init`, depends on the "
            "rank or on an unseeded random number."
        )


def refuse_sizes(model: PreTrainedModel, parallel: ParallelConfig) -> None:
    """Refuse the sizes that a family cannot have."""
    kind = model.config.get_text_config().model_type
    refused = (
        (parallel.pp_size > 1, NO_PIPELINE, f"pp_size={parallel.pp_size}", "pp_size=1"),
        (
            parallel.tp_size > 1 and parallel.sequence_parallel,
            NO_SEQUENCE_PARALLEL,
            "sequence_parallel=True",
            "sequence_parallel=False",
        ),
    )
    for asked, table, what, works in refused:
        if asked and kind in table:
            raise ValueError(
                f"{what} is not supported for {type(model).__name__} ({kind!r}): {table[kind]}; use {works}."
            )


def _refuse_what_ranks_would_draw_differently(model: PreTrainedModel, mesh: ParallelMesh, plan: Plan) -> None:
    """Refuse random numbers in what tensor-parallel ranks compute alike: each has a stream of its own."""
    if mesh.tp_size == 1:
        return
    for name, value in fields_of_chance(model.config.get_text_config()).items():
        if "jitter" in name:
            raise ValueError(
                f"tp_size={mesh.tp_size} with {name}={value}: tensor-parallel ranks would route a token to "
                f"different experts; set {name}=0, or use tp_size=1."
            )
        if "drop" in name and plan.whole and mesh.parallel.sequence_parallel:
            raise ValueError(
                f"sequence_parallel=True with {name}={value}: every rank computes all of {plan.whole[0]!r} "
                f"({len(plan.whole)} such blocks) with its own dropout masks; set {name}=0, or use "
                "sequence_parallel=False."
            )


def _tied_names(anatomy: Anatomy) -> dict[str, str]:
    """Parameter -> the parameter it shares storage with, for pairs that the config ties."""
    head, embedding = anatomy.model.get_output_embeddings(), anatomy.model.get_input_embeddings()
    if getattr(head, "weight", None) is not getattr(embedding, "weight", None):
        return {}
    return {f"{anatomy.head}.weight": f"{anatomy.embedding}.weight"}


def _named_like_the_hub(specs: dict[str, ShardSpec], tied: dict[str, str], anatomy: Anatomy) -> dict[str, ShardSpec]:
    """Give tied parameters the name under which the Hub stores them, and say which stages hold a parameter."""
    sources = set(tied.values())
    named = {}
    for name, spec in specs.items():
        source = tied.get(name, name)
        everywhere = anatomy.place(source) in anatomy.everywhere
        stages: Any = "all" if everywhere else "ends" if source in sources else "one"
        named[name] = replace(spec, name=source, stages=stages)
    return named


def layers_by_stage(anatomy: Anatomy, parallel: ParallelConfig) -> tuple[range, ...]:
    """The decoder layers of each pipeline stage of a whole model."""
    model = anatomy.model
    if parallel.pp_size == 1:
        return (range(model.config.get_text_config().num_hidden_layers),)
    layers = anatomy.decoder_layers()
    costs = [float(sum(p.numel() for p in layer.parameters() if p.dim() > 1)) for layer in layers]
    return split_layers(
        costs,
        parallel.num_stages,
        first_cost=EMBEDDING_COST * cast(nn.Embedding, model.get_input_embeddings()).weight.numel(),
        last_cost=float(cast(nn.Linear, model.get_output_embeddings()).weight.numel()),
        layers_per_stage=parallel.pp_layers_per_stage,
        last_cut=first_shared_layer(layers),
    )


def _stage_of(name: str, anatomy: Anatomy, layers_of_stage: tuple[range, ...]) -> int:
    if anatomy.layers is not None and name.startswith(anatomy.layers + "."):
        layer = int(name[len(anatomy.layers) + 1 :].split(".")[0])
        return next(stage for stage, layers in enumerate(layers_of_stage) if layer in layers)
    return len(layers_of_stage) - 1 if anatomy.place(name) in anatomy.last else 0


def _refuse_shared_stages(model: PreTrainedModel, stage_of: dict[str, int], tied: dict[str, str]) -> None:
    """Refuse a parameter that modules of several stages share: each stage would train a copy of its own."""
    places: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = places.setdefault(parameter, name)
        if name not in tied and first not in tied and stage_of[name] != stage_of[first]:
            raise ValueError(
                f"{first!r} and {name!r} are the same parameter, but belong to pipeline stages {stage_of[first]} and "
                f"{stage_of[name]}; use pp_size=1, or set pp_layers_per_stage so that one stage holds both."
            )


def _refuse_undeclared_ties(model: PreTrainedModel, declared: Mapping[str, str]) -> None:
    """Refuse weights that are shared without being declared: a checkpoint would have each of them once, and whoever
    loads it would fill the others with random numbers.
    """
    places: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in declared:
            continue
        if (first := places.setdefault(parameter, name)) != name:
            raise ValueError(
                f"{first!r} and {name!r} are the same parameter, which {type(model).__name__} does not declare: a "
                "checkpoint would hold it once, and a model that is loaded from it would draw the other anew. Set "
                "config.tie_word_embeddings=True, without which transformers ties nothing, and have the pair in the "
                f"class's `_tied_weights_keys`: {{{name!r}: {first!r}}}."
            )


def _held_stage(stage: int, spec: ShardSpec, mesh: ParallelMesh) -> int:
    """The stage of this rank that a parameter belongs to; one that every stage has goes with the rank's last stage."""
    if spec.stages == "all":
        return mesh.pp_rank + (mesh.parallel.num_stages - mesh.pp_size)
    return stage


def _take_weights_of_rank_0(model: PreTrainedModel, mesh: ParallelMesh) -> None:
    """Make a whole model the same on every rank, as DistributedDataParallel does: each may have drawn its own."""
    if mesh.world.size == 1:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            theirs = tensor.detach().to(mesh.device)
            dist.broadcast(theirs, 0, group=mesh.world.handle)
            tensor.data.copy_(theirs)


def _leave_out_other_stages(
    anatomy: Anatomy, mesh: ParallelMesh, layers_of_stage: tuple[range, ...], specs: dict[str, ShardSpec]
) -> None:
    model = anatomy.model
    layers = anatomy.decoder_layers()
    for stage, indices in enumerate(layers_of_stage):
        if rank_of_stage(stage, mesh.pp_size) != mesh.pp_rank:
            for index in indices:
                layers[index] = AbsentLayer(layers[index], index)
    absent = (*(() if mesh.is_first_stage else anatomy.first), *(() if mesh.is_last_stage else anatomy.last))
    for name in absent:
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        absent_part = stand_in(getattr(owner, leaf), model.dtype, mesh.device)
        if isinstance(absent_part, Absent) and f"{name}.weight" in specs:  # as on the stage that holds it
            absent_part.shape = specs[f"{name}.weight"].local_shape
        put_stand_in(owner, leaf, absent_part)


def _attach_dropout_streams(model: ParallelModel, mesh: ParallelMesh) -> LayerStreams | None:
    if not has_dropout(model.config):
        return None
    # Between regions, tensors are cut along the sequence under sequence parallelism, and replicated over tp otherwise.
    cut_everywhere = mesh.parallel.sequence_parallel and mesh.tp_size > 1
    part = mesh.cp_rank * mesh.tp_size + (mesh.tp_rank if cut_everywhere else 0)
    streams = LayerStreams(torch.initial_seed(), part, mesh.cp_rank)
    # A model that is not cut may keep its layers anywhere: the stream of the micro-batch serves all of it.
    is_cut = mesh.tp_size * mesh.pp_size > 1
    layers = model.anatomy.decoder_layers() if is_cut or model.anatomy.layers is not None else ()
    for index, layer in enumerate(layers):
        if not isinstance(layer, AbsentLayer):
            streams.attach(layer, index)
    return streams


def _attach_communication(model: ParallelModel, mesh: ParallelMesh, plan: Plan) -> None:
    if mesh.tp_size == 1:
        return
    sequence_parallel = mesh.parallel.sequence_parallel
    shared: Overlap | None = None
    if mesh.parallel.overlaps_tp(mesh.device):
        shared = Overlap(mesh.tp, make_transport(mesh.tp, mesh.device))
        mesh.at_close(shared.close)
    for name, block in model.anatomy.blocks():
        if name in plan.regions:
            flat = is_experts(block)
            overlap = None if shared is None or flat else BlockOverlap(shared, block)
            region = Region(mesh.tp, sequence_parallel, model.streams is not None, flat, overlap)
            before = row_of(SUMS_BEFORE, block)
            region.attach(block, None if before is None else block.get_submodule(before))
        elif name in plan.whole and sequence_parallel:
            WholeRegion(mesh.tp).attach(block)
        elif name in plan.spread and sequence_parallel:
            own_ids_before(block, mesh.tp)
        elif name in plan.spread:
            TokenRegion(mesh.tp, flat=is_experts(block)).attach(block)
    kind = model.config.get_text_config().model_type
    if sequence_parallel:
        for layer in model.anatomy.decoder_layers():
            for argument in row_of(TOKEN_ARGUMENTS, layer) or ():
                split_argument(layer, argument, mesh.tp)
    if sequence_parallel and mesh.is_first_stage:
        split_before(model.anatomy.decoder_layers()[0], mesh.tp, SEQUENCE_DIM.get(kind, 1))
    if mesh.is_last_stage:
        head = model.get_output_embeddings()
        if sequence_parallel and model.anatomy.is_foreign:
            join_after(model.anatomy.decoder_layers()[-1], mesh.tp, SEQUENCE_DIM.get(kind, 1))
            sequence_parallel = False  # from here on
        gather_before_head(head, mesh.tp, sequence_parallel, model.head_is_cut)

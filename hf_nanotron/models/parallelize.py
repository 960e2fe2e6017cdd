"""Turn a stock causal LM into this rank's part of a parallel one, in place."""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..parallel.mesh import ParallelMesh
from ..parallel.pipeline.executor import PipelineExecutor
from ..parallel.pipeline.schedule import rank_of_stage
from ..parallel.random import LayerStreams, has_dropout
from ..parallel.region import Region, copy_before, gather_after, split_before
from ..parallel.spec import ShardSpec
from .base import ParallelModel, parallel_class
from .plan import PipelinePlan, backbone_name, decoder_layers, pipeline_plan
from .shard import module_name, regions, sharded_modules, swap_layers, tensor_specs
from .stage import Absent, AbsentEmbedding, AbsentLayer, Stage
from .stages import EMBEDDING_COST, split_layers

CAUSAL_LM_NAMES = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())  # GPT2LMHeadModel and its like


def parallelize(model: PreTrainedModel, mesh: ParallelMesh) -> ParallelModel:
    """Cut `model` (whole, on the meta device or with weights) down to what this rank of `mesh` holds.

    The order is: read the plans and check them on the whole model, so that every rank raises the same error; put
    stand-ins in the place of other stages' modules; cut the remaining layers over the tensor-parallel ranks; attach the
    hooks that communicate; make the stage views.

    Raises:
        ValueError: for a model without a plan, or sizes that do not fit it.
    """
    if isinstance(model, ParallelModel):
        raise ValueError(f"{type(model).__name__} is parallel already.")
    config = getattr(model, "config", None)
    for owner, quirk in ((model, "hf_quantizer"), (model, "peft_config"), (config, "quantization_config")):
        if getattr(owner, quirk, None) is not None:
            raise ValueError(
                f"a model with {quirk} (quantised or with adapters) cannot be cut; hand over the plain one."
            )
    name = type(model).__name__
    is_causal = isinstance(model, PreTrainedModel) and ("ForCausalLM" in name or name in CAUSAL_LM_NAMES)
    if not is_causal or model.get_output_embeddings() is None:
        raise ValueError(f"{name} is not a causal language model; hf_nanotron trains those.")

    tied = _tied_names(model)
    plan = sharded_modules(model) if mesh.tp_size > 1 else {}
    specs = _named_like_the_hub(tensor_specs(model, mesh, plan), tied)
    pipeline = pipeline_plan(model) if mesh.pp_size > 1 else None
    layers_of_stage = _cut_layers(model, mesh, pipeline)
    stage_of = {name: _stage_of(name, model, pipeline, layers_of_stage) for name in specs}
    hub_shapes = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items() if name not in tied
    }
    owners = {
        name: rank_of_stage(_stage_of(name, model, pipeline, layers_of_stage), mesh.pp_size) for name in hub_shapes
    }
    for replicas in sorted({spec.replicas for spec in specs.values()} - {1}):
        mesh.kv_replicas(replicas)  # here, where every rank does, also one whose layers are frozen
    cut_regions = regions(model, plan)
    head_name = module_name(model, model.get_output_embeddings())

    _take_weights_of_rank_0(model, mesh)
    if pipeline is not None:
        _leave_out_other_stages(model, mesh, pipeline, layers_of_stage)
    swap_layers(model, mesh, plan, specs)
    stock = type(model)
    model.__class__ = parallel_class(stock)  # type: ignore[arg-type]
    model = cast(ParallelModel, model)
    model.mesh = mesh
    model.head_is_cut = head_name in plan
    model.vocab_start = specs[f"{head_name}.weight"].ranges[0][0] if model.head_is_cut else 0
    model.hub_shapes, model.hub_owners = hub_shapes, owners
    held = dict(model.named_parameters())
    model.shard_specs = {name: specs[name] for name in held}
    model.stage_of = {name: stage_of[name] for name in held}
    model.streams = _attach_dropout_streams(model, mesh)
    _attach_communication(model, mesh, cut_regions)
    stages = [index for index in range(len(layers_of_stage)) if rank_of_stage(index, mesh.pp_size) == mesh.pp_rank]
    whole = PipelinePlan(backbone_name(model), "", (), ())
    model.stages = [
        Stage(model, pipeline or whole, index, layers_of_stage[index], len(layers_of_stage)) for index in stages
    ]
    model.executor = PipelineExecutor(mesh.pp, model.boundary, mesh.device)
    model.config.architectures = [stock.__name__]
    return model


def _tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameter -> the parameter it shares storage with, for pairs that the config ties."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return {}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:
        return {}
    return {f"{module_name(model, head)}.weight": f"{module_name(model, embedding)}.weight"}


def _named_like_the_hub(specs: dict[str, ShardSpec], tied: dict[str, str]) -> dict[str, ShardSpec]:
    """Give tied parameters the name under which the Hub stores them."""
    sources = set(tied.values())
    named = {}
    for name, spec in specs.items():
        is_tied = name in tied or name in sources
        named[name] = ShardSpec(
            tied.get(name, name), spec.global_shape, spec.dim, spec.parts, spec.tp_rank, spec.partial_grad, is_tied
        )
    return named


def _cut_layers(model: PreTrainedModel, mesh: ParallelMesh, plan: PipelinePlan | None) -> tuple[range, ...]:
    if plan is None:
        return (range(model.config.get_text_config().num_hidden_layers),)
    _, layers = decoder_layers(model)
    head = float(cast(nn.Linear, model.get_output_embeddings()).weight.numel())
    return split_layers(
        [float(sum(p.numel() for p in layer.parameters() if p.dim() > 1)) for layer in layers],
        mesh.parallel.num_stages,
        first_cost=EMBEDDING_COST * cast(nn.Embedding, model.get_input_embeddings()).weight.numel(),
        last_cost=head,
        layers_per_stage=mesh.parallel.pp_layers_per_stage,
    )


def _stage_of(name: str, model: PreTrainedModel, plan: PipelinePlan | None, layers_of_stage: tuple[range, ...]) -> int:
    if plan is None or any(name.startswith(first + ".") for first in plan.first):
        return 0
    if name.startswith(plan.layers + "."):
        layer = int(name[len(plan.layers) + 1 :].split(".")[0])
        return next(stage for stage, layers in enumerate(layers_of_stage) if layer in layers)
    return len(layers_of_stage) - 1


def _take_weights_of_rank_0(model: PreTrainedModel, mesh: ParallelMesh) -> None:
    """Make a whole model the same on every rank, as DistributedDataParallel does: each may have drawn its own."""
    if mesh.world.handle is None:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            theirs = tensor.detach().to(mesh.device)
            dist.broadcast(theirs, 0, group=mesh.world.handle)
            tensor.data.copy_(theirs)


def _leave_out_other_stages(
    model: PreTrainedModel, mesh: ParallelMesh, plan: PipelinePlan, layers_of_stage: tuple[range, ...]
) -> None:
    layers = cast(nn.ModuleList, model.get_submodule(plan.layers))
    for stage, indices in enumerate(layers_of_stage):
        if rank_of_stage(stage, mesh.pp_size) != mesh.pp_rank:
            for index in indices:
                layers[index] = AbsentLayer(layers[index], index)
    if not mesh.is_first_stage:
        hidden_size = model.config.get_text_config().hidden_size
        for name in plan.first:
            model.set_submodule(name, AbsentEmbedding(hidden_size, model.dtype))
    if not mesh.is_last_stage:
        for name in plan.last:
            model.set_submodule(name, Absent())


def _attach_dropout_streams(model: ParallelModel, mesh: ParallelMesh) -> LayerStreams | None:
    if not has_dropout(model.config):
        return None
    # Between regions, tensors are cut along the sequence under sequence parallelism, and replicated otherwise.
    cut_everywhere = mesh.parallel.sequence_parallel and mesh.tp_size > 1
    streams = LayerStreams(torch.initial_seed(), mesh.tp_rank if cut_everywhere else 0)
    # A model that is not cut may keep its layers anywhere: the stream of the micro-batch serves all of it.
    is_cut = mesh.tp_size * mesh.pp_size > 1
    layers = decoder_layers(model)[1] if is_cut or hasattr(model.base_model, "layers") else ()
    for index, layer in enumerate(layers):
        if not isinstance(layer, AbsentLayer):
            streams.attach(layer, index)
    return streams


def _attach_communication(model: ParallelModel, mesh: ParallelMesh, cut_regions: list[str]) -> None:
    if mesh.tp_size == 1:
        return
    sequence_parallel = mesh.parallel.sequence_parallel
    for name in cut_regions:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue  # a layer of another stage
        Region(mesh.tp, sequence_parallel, own_dropout=model.streams is not None).attach(module)
    if sequence_parallel and mesh.is_first_stage:
        split_before(decoder_layers(model)[1][0], mesh.tp)
    if mesh.is_last_stage:
        if sequence_parallel:
            gather_after(_final_norm(model), mesh.tp, model.head_is_cut)
        if model.head_is_cut:
            copy_before(model.get_output_embeddings(), mesh.tp, also_when_training=not sequence_parallel)


def _final_norm(model: ParallelModel) -> nn.Module:
    """The one module of the backbone with parameters besides the embedding and the layers."""
    backbone = model.get_submodule(backbone_name(model))
    known = (model.get_input_embeddings(), decoder_layers(model)[1])
    norms = [m for m in backbone.children() if m not in known and any(True for _ in m.parameters())]
    if len(norms) != 1:
        raise ValueError(
            f"{type(model).__name__}: expected one final norm after the layers, found {len(norms)} modules; use "
            "sequence_parallel=False."
        )
    return norms[0]

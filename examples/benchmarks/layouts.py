"""The layouts that `one_host.py` measures on two, four and eight GPUs, as data, and what each takes of memory and time.

A layout is written for a number of GPUs and a full-size model; another shape or sequence length may be tried with it,
and `obstacle` says if it cannot be.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from figures import Shapes, flops_formulas, shapes_of
from shapes import make_config

from hf_nanotron import ParallelConfig
from hf_nanotron.models.sharding.stage_split import EMBEDDING_COST, split_layers
from hf_nanotron.monitor.flops import IN_LAYERS, NUM_EXPERTS, first_of
from hf_nanotron.monitor.memory import RankStep, activation_bytes
from hf_nanotron.parallel.pipeline.schedule import rank_of_stage

USABLE_GIB = 134.0  # of the 139.8 of an H200, less what CUDA, NCCL and the memory that ranks exchange tokens in take
START_SECONDS = 55.0  # a row's processes, weights and compilation, until its first step has run
# MFU that the time of a row is reckoned with; below what is hoped for, so that a row that is begun also ends.
RECKONED_MFU = {False: 0.42, True: 0.25}
PEAK = 989e12
BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Layout:
    """One row of the table.

    Args:
        name: of the row, without commas.
        gpus: the number that it is written for.
        micro_batches: samples of a micro-batch, the best first; the next is taken when one is out of memory.
        why: this micro-batch.
        fields: of the training arguments (or of the peer).
        recomputed: the share of the layers, evenly spread, that recompute their activations.
        moe: whether it trains the mixture of experts.
    """

    name: str
    gpus: int
    micro_batches: tuple[int, ...]
    why: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    recomputed: float = 0.0
    moe: bool = False

    @cached_property
    def parallel(self) -> ParallelConfig:
        names = ParallelConfig.__dataclass_fields__
        return ParallelConfig(**{name: value for name, value in self.fields.items() if name in names})

    @property
    def peer(self) -> bool:
        return "trainer" in self.fields

    @property
    def copies(self) -> int:
        """Data-parallel ranks."""
        return self.gpus // self.parallel.model_parallel_size


ONE_SAMPLE = "8,192 tokens fill the products; two samples do not fit"
TWO_IF = "larger products, if compiled layers keep the 2/3 of the estimate that one GPU showed; else one sample"
MANY = "{} of them leave a bubble of {} of the work; two samples each would double it"
INTERLEAVED = {"pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2}
PEER = {"trainer": "torchtitan"}
SELECTIVE = {"activation_checkpointing_policy": "selective"}

# By importance: a budget that ends early leaves out the last.
LAYOUTS = (
    Layout("dp 8 ZeRO-1", 8, (2, 1), TWO_IF, {"zero_stage": 1}),
    Layout("torchtitan FSDP 8", 8, (2, 1), "as ours", PEER),
    Layout("pp 4 x dp 2 interleaved", 8, (1,), MANY.format(64, "3/128"), {"pp_size": 4, **INTERLEAVED}),
    Layout("MoE dp 8 ep 8", 8, (2, 1), "4,096 tokens to each 16 experts, or half", {"ep_size": 8}, moe=True),
    Layout("tp 8", 8, (4,), "32,768 rows to a rank's 1,792 columns", {"tp_size": 8}),
    Layout("tp 2 x dp 4", 8, (2,), "16,384 tokens fill the products", {"tp_size": 2}),
    Layout("tp 4 x pp 2", 8, (4,), "32 micro-batches for a bubble of 1/32", {"tp_size": 4, "pp_size": 2}),
    Layout("pp 4 x dp 2 zero bubble", 8, (1,), MANY.format(64, "1/64"), {"pp_size": 4, "pp_schedule": "zb"}),
    Layout("pp 4 x dp 2 1F1B", 8, (1,), MANY.format(64, "3/64"), {"pp_size": 4}),
    Layout("dp 8 ZeRO-3", 8, (2, 1), "weights travel once a micro-batch: the fewer the better", {"zero_stage": 3}),
    Layout("dp 4 ZeRO-1 partly recomputed", 4, (2, 1), "two samples fit so", {"zero_stage": 1, **SELECTIVE}, 3 / 8),
    Layout("dp 4 ZeRO-1", 4, (1,), ONE_SAMPLE, {"zero_stage": 1}),
    Layout("torchtitan FSDP 4", 4, (2, 1), "as it fits", PEER),
    Layout("pp 4 interleaved", 4, (1,), MANY.format(64, "3/128"), {"pp_size": 4, **INTERLEAVED}),
    Layout(
        "MoE dp 4 ep 4 bf16 moments partly recomputed",
        4,
        (1,),
        "with fp32 moments the state alone is 134 GiB",
        {"ep_size": 4, "optim_state_dtype": "bfloat16"},
        recomputed=1 / 2,
        moe=True,
    ),
    Layout("tp 4", 4, (4,), "32,768 rows to a rank's 3,584 columns", {"tp_size": 4}),
    Layout("tp 2 x dp 2", 4, (2,), "16,384 tokens fill the products", {"tp_size": 2}),
    Layout("tp 2 x pp 2", 4, (2,), "32 micro-batches for a bubble of 1/32", {"tp_size": 2, "pp_size": 2}),
    Layout("pp 4 zero bubble", 4, (2, 1), "16,384 tokens fill the products; 1/32", {"pp_size": 4, "pp_schedule": "zb"}),
    Layout("pp 4 1F1B", 4, (1,), MANY.format(64, "3/64"), {"pp_size": 4}),
    Layout("dp 4 ZeRO-3", 4, (2, 1), "weights travel once a micro-batch: the fewer the better", {"zero_stage": 3}),
    Layout("dp 2 ZeRO-1", 2, (2, 1), "two fit a smaller model alone", {"zero_stage": 1}),
    Layout("torchtitan FSDP 2", 2, (2, 1), "as it fits", PEER),
    Layout(
        "pp 2 interleaved", 2, (2, 1), "16 of them leave a bubble of 1/32 of the work", {"pp_size": 2, **INTERLEAVED}
    ),
    Layout("MoE dp 2 ep 2", 2, (4, 1), "a smaller model alone fits", {"ep_size": 2}, moe=True),
    Layout("tp 2", 2, (2, 1), "as it fits", {"tp_size": 2}),
    Layout("pp 2 zero bubble", 2, (2, 1), "as interleaved", {"pp_size": 2, "pp_schedule": "zb"}),
    Layout("pp 2 1F1B", 2, (2, 1), "as interleaved", {"pp_size": 2}),
    Layout("dp 2 ZeRO-3", 2, (2, 1), TWO_IF, {"zero_stage": 3}),
)


@dataclass(frozen=True)
class Model:
    """A shape at a sequence length, as the estimates see it."""

    shape: str
    sequence_length: int

    @cached_property
    def config(self) -> Any:
        return make_config(self.shape, self.sequence_length)

    @cached_property
    def shapes(self) -> Shapes:
        return shapes_of(self.config)

    @cached_property
    def flops(self) -> float:
        """Of a token, causal attention counted once."""
        return flops_formulas(self.shapes, self.config, self.sequence_length)["causal"]


def recomputed_layers(layout: Layout, model: Model) -> list[int]:
    """The decoder layers that recompute."""
    layers = model.config.num_hidden_layers
    count = round(layout.recomputed * layers)
    return [index * layers // count for index in range(count)]


def fields_of(layout: Layout, model: Model) -> dict[str, Any]:
    """What a row says of a layout besides its micro-batch."""
    layers = " ".join(map(str, recomputed_layers(layout, model)))  # a comma would end the field
    chosen = {"activation_checkpointing": True, "activation_checkpointing_layers": f"[{layers}]"} if layers else {}
    return {**layout.fields, **chosen}


def micro_batch_count(layout: Layout, micro_batch: int, samples: int) -> int:
    """Micro-batches of a step of `samples` samples.

    Raises:
        ValueError: it is not whole, or does not fill the pipeline evenly.
    """
    ranks, pp = layout.copies * micro_batch, layout.parallel.pp_size
    if samples % (ranks * pp):
        raise ValueError(
            f"{samples} samples a step: {layout.copies} data-parallel ranks with micro-batches of {micro_batch}"
            + (f", whose number {pp} stages divide," if pp > 1 else "")
            + f" need a multiple of {ranks * pp}"
        )
    return samples // ranks


def layers_of_ranks(layout: Layout, model: Model) -> list[int]:
    """The pipeline rank of each decoder layer.

    Raises:
        ValueError: more stages than layers.
    """
    count, parallel = model.config.num_hidden_layers, layout.parallel
    costs = [0.0] * count
    ends = {"first": 0.0, "last": 0.0}
    for name, shape in model.shapes.items():
        if (found := IN_LAYERS.search(name)) is not None:
            costs[_layer(name, found.group())] += prod(shape) if len(shape) > 1 else 0
        elif len(shape) > 1:
            ends["first" if "embed" in name else "last"] += prod(shape)
    last = ends["last"] or ends["first"]  # a tied head
    stages = split_layers(costs, parallel.num_stages, EMBEDDING_COST * ends["first"], last)
    ranks = [0] * count
    for stage, layers in enumerate(stages):
        for layer in layers:
            ranks[layer] = rank_of_stage(stage, parallel.pp_size)
    return ranks


def _layer(name: str, place: str) -> int:
    return int(place.strip(".").rpartition(".")[2])


def state_bytes(layout: Layout, model: Model, pp_rank: int) -> int:
    """Weights, fp32 gradients, fp32 masters and both moments of a rank, in bf16 training."""
    parallel, ranks = layout.parallel, layers_of_ranks(layout, model)
    experts = first_of(model.config, NUM_EXPERTS)
    moments = 2 * (BF16 if layout.fields.get("optim_state_dtype") == "bfloat16" else FP32)
    total = 0.0
    for name, shape in model.shapes.items():
        found = IN_LAYERS.search(name)
        last = parallel.pp_size - 1
        here = ranks[_layer(name, found.group())] if found else 0 if "embed" in name else last
        if here != pp_rank:
            continue
        routed = len(shape) == 3 and shape[0] == experts and parallel.ep_size > 1
        cut = parallel.ep_size if routed else parallel.tp_size if len(shape) > 1 else 1
        shards = parallel.expert_copies(layout.gpus) if routed else parallel.shard_size(layout.gpus)
        whole, divided = (BF16 + FP32, FP32 + moments) if parallel.zero_stage < 3 else (0, 2 * FP32 + moments)
        total += prod(shape) / cut * (whole + divided / shards)
    return round(total)


def estimate(layout: Layout, model: Model, micro_batch: int, micro_batches: int) -> tuple[int, int]:
    """State and activations of the fullest rank, in bytes, as the trainer reports them before its first step.

    Of torchtitan the same formula, with whole logits and everything sharded over all GPUs; its own buffers are not
    counted.
    """
    parallel = ParallelConfig(zero_stage=3) if layout.peer else layout.parallel
    seen = (
        Layout(layout.name, layout.gpus, layout.micro_batches, layout.why, {"zero_stage": 3}) if layout.peer else layout
    )
    recomputed = len(recomputed_layers(layout, model)) / model.config.num_hidden_layers
    policy = layout.fields.get("activation_checkpointing_policy", "full")
    tokens = micro_batch * model.sequence_length
    totals = []
    for rank in range(parallel.pp_size):
        step = RankStep(model.config, tokens, parallel, rank, micro_batches, BF16, recomputed, policy)
        kept = activation_bytes(step, fused_head=not layout.peer)
        totals.append((state_bytes(seen, model, rank), kept))
    return max(totals, key=sum)


def obstacle(layout: Layout, model: Model, samples: int) -> str:
    """Why a layout cannot run on this model with `samples` samples a step; empty if it can, but for its memory."""
    config, parallel = model.config, layout.parallel
    experts = first_of(config, NUM_EXPERTS)
    if layout.moe and (not experts or experts % parallel.ep_size):
        return f"{experts or 'no'} experts of {model.shape} for ep {parallel.ep_size}"
    if config.num_attention_heads % parallel.tp_size:
        return f"{config.num_attention_heads} heads of {model.shape} for tp {parallel.tp_size}"
    if config.num_hidden_layers < parallel.num_stages:
        return f"{config.num_hidden_layers} layers of {model.shape} for {parallel.num_stages} stages"
    try:
        micro_batch_count(layout, layout.micro_batches[-1], samples)
    except ValueError as error:
        return str(error)
    return ""


def reckoned_seconds(layout: Layout, model: Model, samples: int, steps: int) -> float:
    """How long a row will take, from the start of its processes to their end."""
    flops = model.flops * samples * model.sequence_length
    return START_SECONDS + steps * flops / (layout.gpus * PEAK * RECKONED_MFU[layout.moe])

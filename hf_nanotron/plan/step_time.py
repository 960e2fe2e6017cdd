"""The seconds of an optimizer step of a job, before it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

from ..monitor.gpus import find_gpu
from ..parallel.pipeline.schedule import Action, Tick, Transfer, build_table, compute_order
from . import efficiencies as counted
from .context_time import ContextCost, context_cost
from .default_rates import completed
from .job import Job, parallel_config
from .layer_time import LayerClock, MicroBatch, Parts, Place, Seconds, optimizer_seconds
from .layer_work import LayerWork, ModelWork, WorkTable
from .links import collective_seconds, group_ranks
from .options import Options, options_of
from .rates import Rates
from .schedule_time import Played, play
from .weights import ModelWeights

KINDS = {"F": "forward", "B": "backward", "W": "weight gradients"}


class Interval(NamedTuple):
    """What a rank of the pipeline does from `start` to `end`, seconds after the begin of the step.

    `kind` is `"forward"`, `"backward"`, `"weight gradients"`, `"gather"` (of weights), `"reduce"` (of gradients) or
    `"optimizer"`; `micro_batch` and `chunk` (of the rank, from 0) are -1 where they mean nothing.
    """

    rank: int
    start: float
    end: float
    kind: str
    micro_batch: int
    chunk: int


@dataclass(frozen=True)
class StepTime:
    """One optimizer step.

    Args:
        seconds: of the step.
        mfu: FLOPs of the model (recomputation not counted) over the bf16 peak of the GPU; None without a peak.
        tokens_per_second_per_device: of the whole job.
        bubble: share of the pipeline's time in which its ranks have nothing to compute, mean over ranks.
        exposed_communication: seconds of the step in which the fullest rank waits for others: parts `tp`, `cp`, `ep`,
            `dp` and `pp` (transfers between stages that nothing hides).
        parts: seconds of the rank that computes most, by what they go to; their sum is `seconds`.
        timeline: what the ranks of one pipeline do, each in its own order.
    """

    seconds: float
    mfu: float | None
    tokens_per_second_per_device: float
    bubble: float
    exposed_communication: float
    parts: dict[str, float]
    timeline: list[Interval]


COMMUNICATION = ("tp", "cp", "ep", "dp", "pp")


def step_time(job: Job, rates: Rates, works: WorkTable | None = None) -> StepTime:
    """Seconds of a step of `job` at `rates`, and at the links of the data sheet where they have none.

    Args:
        works: of the job's model, made before, so that many layouts of one model take milliseconds each.

    Raises:
        ValueError: for sizes that do not fit the model, FP8 without its rate, or a link that was not measured, of a GPU
            that is not in the table.
    """
    return _Step(job, completed(rates), works or WorkTable(ModelWeights(job.config))).result()


class _Step:
    """The parts of a step, from the layers to the schedule."""

    def __init__(self, job: Job, rates: Rates, works: WorkTable) -> None:
        self.job, self.rates, self.works = job, rates, works
        self.parallel = parallel_config(job)
        self.parallel.check_micro_batches(job.micro_batches)
        self.work: ModelWork = works.of(self.parallel)
        self.options: Options = options_of(job, len(self.work.layers))
        if self.options.fp8 and rates.fp8 is None:
            raise ValueError(
                f"fp8={job.arguments['fp8']!r}, and the rates of {rates.gpu!r} have no FP8 products: use fp8=None, or "
                "rates of a GPU that has them."
            )
        device = torch.device("cpu" if _is_cpu(rates) else "cuda")
        self.clock = LayerClock(
            rates, self.options, self.parallel, self.parallel.overlaps_tp(device), not _is_cpu(rates)
        )
        self.context: ContextCost = context_cost(job, self.parallel, self.work, rates)
        self.batch = MicroBatch(
            job.samples,
            self.context.length,
            job.documents or (self.context.length,),
            self.parallel.cp_size,
            self.context.attention_share,
        )
        self.copies = self.parallel.weight_copies(job.world_size)
        self.layers: dict[tuple[object, ...], Seconds] = {}

    # Ranks of one pipeline (dp, cp and tp rank 0), and groups of each of them.

    def rank(self, pp_rank: int) -> int:
        return pp_rank * self.copies * self.parallel.tp_size

    def place(self, pp_rank: int) -> Place:
        first, sizes = self.rank(pp_rank), self.parallel
        return Place(group_ranks(first, 1, sizes.tp_size), group_ranks(first, 1, sizes.ep_size), self.job.gpus_per_node)

    def collective(self, operation: str, nbytes: float, first: int, stride: int, size: int) -> float:
        ranks = group_ranks(first, stride, size)
        return collective_seconds(self.rates, operation, nbytes, ranks, self.job.gpus_per_node)

    # One micro-batch.

    def stage(self, index: int) -> Seconds:
        """A micro-batch in one stage."""
        found, place = Seconds(), self.place(index % self.parallel.pp_size)
        for number in self.work.stages[index]:
            layer = self.work.layers[number]
            found.add(self.layer(layer, number, place))
        if index == len(self.work.stages) - 1:
            found.add(self.clock.head(self.work, self.batch))
        if self.parallel.zero_stage == 3:
            ends = self.work.embedding * (index == 0)
            ends += prod(self.work.head) * (index == len(self.work.stages) - 1 and not self.work.tied)
            if ends:  # gathered before anything can hide it
                found.add(self.fully_sharded(float(ends), place, 0.0, 0.0))
        if self.options.offload and self.options.policy != "none":
            shown = self.offload_shown(index, found)
            if shown:
                found.add(Seconds(backward={"host copies": shown}))
        return found

    def layer(self, layer: LayerWork, number: int, place: Place) -> Seconds:
        """Of one layer; those that are alike are computed once."""
        key = (layer, self.options.policy_of(number), self.options.fp8_of(number), place.tp, place.ep)
        if key not in self.layers:
            self.layers[key] = self.layer_once(layer, number, place)
        return self.layers[key]

    def layer_once(self, layer: LayerWork, number: int, place: Place) -> Seconds:
        found = self.clock.layer(layer, number, self.work.hidden, self.batch, place)
        forward, backward = self.context.seconds(layer)
        found.add(Seconds(forward=forward, backward=backward))
        if self.parallel.zero_stage == 3:
            ahead = sum(found.forward.values()), sum(found.backward.values()) + sum(found.weights.values())
            found.add(self.fully_sharded(float(layer.dense + layer.routed), place, *ahead))
        return found

    def fully_sharded(self, held: float, place: Place, forward: float, backward: float) -> Seconds:
        """ZeRO-3's copies, gathers and reductions of `held` elements, these beside `forward`, `backward` seconds."""
        first, size = place.tp[0], self.parallel.shard_size(self.job.world_size)
        copies = counted.FULLY_SHARDED_BYTES * held / self.rates.memory if size > 1 else 0.0
        gather = self.collective("all_gather", 2.0 * held, first, self.parallel.tp_size, size)
        reduce = self.collective("reduce_scatter", 4.0 * held, first, self.parallel.tp_size, size)
        return Seconds(
            forward={"copies": copies / 3, "dp": max(0.0, gather - forward)},
            backward={"copies": copies * 2 / 3, "dp": max(0.0, gather + reduce - backward)},
        )

    def offload_shown(self, index: int, times: Seconds) -> float:
        """Copies of activations to the host and back that nothing hides; the last layer of the model keeps its own."""
        layers = [n for n in self.work.stages[index] if self.options.policy_of(n) != "none"]
        hidden = self.work.hidden * self.batch.tokens * self.options.item / self.parallel.tp_size
        kept = {"full": 1.0, "all_but_attention": 2.0}.get(self.options.policy, 6.0)
        nbytes = self.options.offload * len(layers) * hidden * kept
        # Pinned copies run at the speed of PCIe beside the computation, one direction at a time.
        return max(0.0, 2 * nbytes / counted.PINNED_BYTES_PER_SECOND - sum(sum(p.values()) for p in times.phases))

    # The whole step.

    def owned(self, pp_rank: int) -> tuple[float, float, float]:
        """Elements of a rank: dense weights, those of routed experts, and the embedding among the first."""
        stages = range(pp_rank, len(self.work.stages), self.parallel.pp_size)
        layers = [self.work.layers[number] for stage in stages for number in self.work.stages[stage]]
        dense, routed = float(sum(x.dense for x in layers)), float(sum(x.routed for x in layers))
        first, last = 0 in stages, len(self.work.stages) - 1 in stages
        embedding = self.work.embedding if first or (last and self.work.tied) else 0
        dense += embedding + (prod(self.work.head) if last and not self.work.tied else 0)
        return dense, routed, float(embedding if first else 0)

    def gradients(self, pp_rank: int, window: float) -> tuple[float, float]:
        """Seconds of summing gradients that nothing hides: at the end of the step, and in each backward before.

        Args:
            window: seconds of a backward of the rank, beside which buckets are reduced.
        """
        dense, routed, embedding = self.owned(pp_rank)
        first, tp, world = self.rank(pp_rank), self.parallel.tp_size, self.job.world_size
        shards, stage = self.parallel.shard_size(world), self.parallel.zero_stage
        replicas = self.copies // shards
        reduce = "reduce_scatter" if stage else "all_reduce"

        def summed(elements: float) -> float:
            size = shards if stage else self.copies
            seconds = self.collective(reduce, 4.0 * elements, first, tp, size)
            if stage and replicas > 1:
                seconds += self.collective("all_reduce", 4.0 * elements / shards, first, tp * shards, replicas)
            return seconds

        total, tail = summed(dense), summed(embedding or dense / max(1, len(self.work.layers)))
        if routed:
            ep = self.parallel.ep_size
            size = self.copies * tp // ep if ep > 1 else self.copies
            total += self.collective(reduce, 4.0 * routed, first, ep if ep > 1 else tp, size)
        if stage == 3:  # in each backward, by `fully_sharded`
            return 0.0, 0.0
        shown = max(tail, total - window) if total else 0.0
        every = shown if stage == 2 else 0.0
        shown = 0.0 if stage == 2 else shown  # it has summed all at the end of the last backward
        if self.work.tied and self.parallel.pp_size > 1 and pp_rank in (0, self.parallel.pp_size - 1):
            far = (self.parallel.pp_size - 1) * self.copies * tp
            shown += self.collective("all_reduce", 4.0 * self.work.embedding, self.rank(0), far, 2)
        return shown, every

    def absorbed(self, pp_rank: int) -> float:
        """Seconds in which a backward of ZeRO-2 adds the reduced gradients of a micro-batch to the rank's shard."""
        shards = self.parallel.shard_size(self.job.world_size)
        if self.parallel.zero_stage != 2 or shards == 1:
            return 0.0
        dense, routed, _ = self.owned(pp_rank)
        ep = self.parallel.ep_size
        held = dense / shards + routed / (self.parallel.expert_copies(self.job.world_size) if ep > 1 else shards)
        return counted.ABSORBED_BYTES * held / self.rates.memory

    def gathered(self, pp_rank: int, window: float) -> float:
        """Seconds for which the first forward waits for new weights: for its first bucket, and what it cannot hide."""
        shards = self.parallel.shard_size(self.job.world_size)
        if shards == 1 or self.parallel.zero_stage == 3:
            return 0.0
        dense, routed, embedding = self.owned(pp_rank)
        first, tp = self.rank(pp_rank), self.parallel.tp_size
        total = self.collective("all_gather", 2.0 * dense, first, tp, shards)
        ep = self.parallel.ep_size
        size = self.parallel.expert_copies(self.job.world_size) if ep > 1 else shards
        total += self.collective("all_gather", 2.0 * routed, first, ep if ep > 1 else tp, size)
        waited = self.collective("all_gather", 2.0 * embedding, first, tp, shards)
        return max(waited, total - window)

    def optimizer(self, pp_rank: int) -> float:
        dense, routed, _ = self.owned(pp_rank)
        world = self.job.world_size
        shards = self.parallel.shard_size(world)
        expert_shards = self.parallel.expert_copies(world) if self.parallel.ep_size > 1 else shards
        stages = range(pp_rank, len(self.work.stages), self.parallel.pp_size)

        def matrices() -> list[tuple[int, int]]:
            layers = [self.work.layers[number] for stage in stages for number in self.work.stages[stage]]
            experts = [shape for layer in layers for shape in layer.expert for _ in range(layer.experts)]
            return [shape for layer in layers for shape in (*layer.mixing, *layer.mlp)] + experts

        owned = dense / shards + routed / expert_shards
        seconds = optimizer_seconds(self.rates, self.options, owned, matrices, shards)
        if self.options.fp8:
            seconds += counted.FP8_WEIGHT_BYTES * dense / self.rates.memory
        return seconds

    def result(self) -> StepTime:
        size, micro_batches = self.parallel.pp_size, self.job.micro_batches
        stages = [self.stage(index) for index in range(len(self.work.stages))]
        splits = self.parallel.splits_backward
        lengths = [[sum(phase.values()) for phase in stage.phases] for stage in stages]

        def seconds(action: Action) -> float:
            forward, backward, weights = lengths[action.stage]
            whole = {"F": forward, "B": backward if splits else backward + weights, "W": weights}[action.kind]
            return whole + (behind[action.stage % size] if action.kind == "B" else 0.0)

        own = [[lengths[index] for index in range(rank, len(stages), size)] for rank in range(size)]
        ends, every = [], []
        for rank in range(size):
            end, each = self.gradients(rank, sum(b + w for _, b, w in own[rank]))
            ends.append(end)
            every.append(each)
        added = [self.absorbed(rank) for rank in range(size)]
        behind = [(every[rank] + added[rank]) / len(own[rank]) for rank in range(size)]  # each of the stages has a part
        begins = [self.gathered(rank, sum(f for f, _, _ in own[rank])) for rank in range(size)]
        table = _table(self.parallel.pp_schedule, size, self.parallel.pp_virtual_stages, micro_batches)
        travel = self.travel()
        played = play(table, seconds, travel, begins)
        ideal = play(table, seconds, lambda transfer: 0.0, begins) if size > 1 else played
        optimizers = [self.optimizer(rank) for rank in range(size)]
        summed = max(end + tail for end, tail in zip(played.ends, ends, strict=True))
        total = summed + max(optimizers) + counted.STEP_SECONDS * (0.0 if _is_cpu(self.rates) else 1.0)
        fullest = max(range(size), key=lambda rank: played.busy(rank) + begins[rank] + ends[rank])
        parts = self.parts(stages, fullest, micro_batches)
        parts["dp"] = parts.get("dp", 0.0) + begins[fullest] + ends[fullest] + every[fullest] * micro_batches
        parts["copies"] = parts.get("copies", 0.0) + added[fullest] * micro_batches
        parts["pp"] = max(0.0, played.end - ideal.end)
        parts["optimizer"] = max(optimizers)
        rest = total - sum(parts.values())
        others = total - summed - max(optimizers)
        parts["bubble"], parts["other"] = max(0.0, rest - others), min(rest, others)
        span = played.end - min(begins)
        idle = 1.0 - sum(played.busy(rank) for rank in range(size)) / (size * span) if span else 0.0
        tokens = self.job.tokens_per_step / self.job.world_size / total
        return StepTime(
            seconds=total,
            mfu=self.mfu(tokens),
            tokens_per_second_per_device=tokens,
            bubble=max(0.0, idle),
            exposed_communication=sum(parts.get(name, 0.0) for name in COMMUNICATION),
            parts={name: value for name, value in parts.items() if value > 0.0},
            timeline=_timeline(played, begins, ends, optimizers, summed, size),
        )

    def travel(self) -> Callable[[Transfer], float]:
        """Seconds of a transfer between two ranks of the pipeline."""
        split = self.parallel.tp_size if self.parallel.sequence_parallel else 1
        nbytes = self.batch.tokens * self.work.hidden * self.options.item / split
        stride = self.copies * self.parallel.tp_size

        known: dict[tuple[int, int], float] = {}

        def seconds(transfer: Transfer) -> float:
            ends = transfer.source, transfer.target
            if ends not in known:
                ranks = (ends[0] * stride, ends[1] * stride)
                known[ends] = collective_seconds(self.rates, "send", nbytes, ranks, self.job.gpus_per_node)
            return known[ends]

        return seconds

    def parts(self, stages: list[Seconds], rank: int, micro_batches: int) -> Parts:
        found: Parts = {}
        for index in range(rank, len(stages), self.parallel.pp_size):
            for phase in stages[index].phases:
                for name, seconds in phase.items():
                    found[name] = found.get(name, 0.0) + seconds * micro_batches
        return found

    def mfu(self, tokens: float) -> float | None:
        try:
            peak = find_gpu(self.rates.gpu).bf16
        except ValueError:
            return None
        length = float(self.job.sequence_length)
        if self.job.documents is not None:
            length = sum(x * x for x in self.job.documents) / sum(self.job.documents)
        return self.works.flops(length) * tokens / peak


def _is_cpu(rates: Rates) -> bool:
    return rates.made.get("device_type") == "cpu"


@lru_cache(maxsize=32)
def _table(schedule: str, size: int, virtual_stages: int, micro_batches: int) -> tuple[tuple[Tick, ...], ...]:
    orders = compute_order(schedule, size, virtual_stages, micro_batches)
    return build_table(orders, size * virtual_stages)


def _timeline(
    played: Played, begins: list[float], ends: list[float], optimizers: list[float], summed: float, size: int
) -> list[Interval]:
    found = []
    for rank, actions in enumerate(played.actions):
        if begins[rank]:
            found.append(Interval(rank, 0.0, begins[rank], "gather", -1, -1))
        found += [Interval(rank, a, b, KINDS[x.kind], x.micro_batch, x.stage // size) for x, a, b in actions]
        if ends[rank]:
            found.append(Interval(rank, played.ends[rank], played.ends[rank] + ends[rank], "reduce", -1, -1))
        found.append(Interval(rank, summed, summed + optimizers[rank], "optimizer", -1, -1))
    return found

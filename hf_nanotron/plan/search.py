"""Which layouts of a job fit a GPU, and which of them are fastest: by arithmetic, no rank is run.

Every layout has the same samples in a step. Memory decides first, then time: of each layout and micro-batch the
recomputation that costs least and fits is taken, and the rest are ordered by the model of time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from ..monitor.gpus import GPU
from .estimate import Estimator
from .job import Job, parallel_config
from .layer_work import WorkTable
from .layouts import RECOMPUTATIONS, divisors, layouts
from .long_step import long_step_time
from .memory import RankMemory
from .rates import Rates
from .result import GIB, Change, layout_of, usable_bytes
from .step_time import StepTime, step_time

BEST = 10
MOST_CHANGES = 3  # arguments that are changed at once to make a run fit
EXACT, ROUNDS = 2, (1, 2)  # rounds of a pipeline, beyond which a step is extended, and from which
FEW = 0.01  # of a step in sums of gradients: another placement of shards cannot be faster by more
NOT_OF_A_MICRO_BATCH = ("dp", "pp", "bubble", "optimizer", "other")
SAME = 1e-3  # times that differ by less count as one, and the smaller layout is taken


@dataclass(frozen=True)
class Candidate:
    """A layout that fits.

    Args:
        job: in this layout.
        memory: of its fullest rank, by arithmetic.
        step: the time of an optimizer step.
    """

    job: Job
    memory: RankMemory
    step: StepTime

    @property
    def layout(self) -> dict[str, Any]:
        """By the names of the training arguments, with `dp_size`."""
        return layout_of(self.job)

    @property
    def key(self) -> tuple[Any, ...]:
        """Faster first, then what is simpler and takes less memory."""
        parallel = parallel_config(self.job)
        simple = (parallel.model_parallel_size, parallel.ep_size, parallel.zero_stage, parallel.dp_replicate_size)
        return (round(self.step.seconds, 9), *simple, self.memory.total)

    def why(self, best: Candidate) -> str:
        """Where the time goes that this layout takes longer than `best`; what it does well, of the best itself."""
        if self is best:
            rest = {name: part for name, part in self.step.parts.items() if part > 0}
            least = sorted(rest, key=lambda name: -rest[name])[:2]
            return "the fastest: " + ", ".join(
                f"{name.replace('_', ' ')} {rest[name] / self.step.seconds:.0%}" for name in least
            )
        longer = {name: part - best.step.parts.get(name, 0.0) for name, part in self.step.parts.items()}
        most = max(longer, key=lambda name: longer[name])
        total = self.step.seconds / best.step.seconds - 1
        if total < SAME:
            return "as fast"
        return f"{total:+.1%}, most of it {most.replace('_', ' ')}"


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        best: of each set of sizes the fastest layout, fastest first.
        looked_at: layouts and micro-batches that the trainer would take.
        fit: how many of them fit.
        least_gib: GiB of the fullest rank in the layout that takes least.
        refused: why faster layouts that were run are not among them, in sentences.
    """

    best: tuple[Candidate, ...]
    looked_at: int
    fit: int
    least_gib: float
    refused: tuple[str, ...] = ()

    def without(self, candidate: Candidate) -> Found:
        """All but one."""
        return replace(self, best=tuple(each for each in self.best if each is not candidate))

    def as_json(self) -> dict[str, Any]:
        """As one object of plain values."""
        return {
            "looked_at": self.looked_at,
            "fit": self.fit,
            "refused": list(self.refused),
            "best": [
                {
                    "layout": each.layout,
                    "peak_memory_gib": each.memory.total / GIB,
                    "step_seconds": each.step.seconds,
                    "mfu": each.step.mfu,
                    "bubble": each.step.bubble,
                    "exposed_communication_seconds": each.step.exposed_communication,
                    "why": each.why(self.best[0]),
                }
                for each in self.best
            ],
        }


def search(job: Job, gpu: GPU, rates: Rates, rows: int | None = None, most: int = BEST) -> Found:
    """The fastest layouts of a job that fit.

    Args:
        job: its own layout is not kept, all other arguments are.
        rows: of an optimizer step; those of the job if None.
        most: how many are returned.

    Raises:
        ValueError: for a config that is not of a causal language model, and if no layout exists at all.
    """
    if rows is None:
        rows = job.tokens_per_step // job.sequence_length
    estimator, usable = Estimator(job.config), usable_bytes(gpu)
    works = WorkTable(estimator.weights)
    bounds = Bounds(rates, works)
    by_sizes: dict[tuple[int, ...], list[tuple[float, int, Job, RankMemory]]] = {}
    least_recomputed: dict[tuple[Any, ...], int] = {}
    looked_at, fit, least = 0, 0, float("inf")
    for layout in layouts(job, estimator.weights, rows):
        looked_at += 1
        chosen = cheapest_recomputation(layout, estimator, usable)
        least = min(least, chosen[1].total)
        if chosen[1].total > usable:
            continue
        fit += 1
        parallel = parallel_config(layout)
        sizes = (parallel.tp_size, parallel.cp_size, parallel.pp_size, parallel.ep_size)
        alike = (*sizes, parallel.pp_schedule, parallel.pp_virtual_stages, parallel.dp_replicate_size, layout.samples)
        recomputes = _rank_of_recomputation(chosen[0])
        if alike in least_recomputed and least_recomputed[alike] <= recomputes:
            continue  # a lower stage of ZeRO does it, with less communication
        least_recomputed[alike] = recomputes
        bound = bounds.seconds(chosen[0])
        by_sizes.setdefault(sizes, []).append((bound, looked_at, *chosen))
    if not looked_at:
        raise ValueError(
            f"no layout of {job.world_size} GPUs has steps of {rows} rows: the data-parallel size must divide them; "
            "give another number of tokens a step, or of GPUs."
        )
    best: list[Candidate] = []
    for group in sorted(map(sorted, by_sizes.values())):
        if len(best) == most and group[0][0] >= best[-1].step.seconds:
            break  # and so are those that follow: nothing of them can be among the best
        best = sorted([*best, _fastest(group, rates, works)], key=lambda candidate: candidate.key)[:most]
    exact = [replace(each, step=long_step_time(each.job, rates, works)) for each in best]
    return Found(tuple(sorted(exact, key=lambda candidate: candidate.key)), looked_at, fit, least / GIB)


def _rank_of_recomputation(job: Job) -> int:
    return [all(job.arguments.get(name) == value for name, value in each.items()) for each in RECOMPUTATIONS].index(
        True
    )


def _fastest(group: Sequence[tuple[float, int, Job, RankMemory]], rates: Rates, works: WorkTable) -> Candidate:
    """The fastest of some layouts, which are in the order of the least that they can take."""
    fastest: Candidate | None = None
    shares: dict[tuple[Any, ...], float] = {}
    for bound, _, job, memory in group:
        if fastest is not None and bound >= fastest.step.seconds:
            break
        parallel = parallel_config(job)
        alike = (parallel.pp_schedule, parallel.pp_virtual_stages, job.samples, _rank_of_recomputation(job))
        if shares.get(alike, 1.0) < FEW:
            continue
        candidate = Candidate(job, memory, long_step_time(job, rates, works, EXACT, ROUNDS))
        shares[alike] = candidate.step.parts.get("dp", 0.0) / candidate.step.seconds
        if fastest is None or candidate.key < fastest.key:
            fastest = candidate
    assert fastest is not None
    return fastest


class Bounds:
    """Less than any step of a layout takes: its micro-batches in one stage, shared out, and the pipeline's bubble."""

    def __init__(self, rates: Rates, works: WorkTable) -> None:
        self._rates, self._works = rates, works
        self._micro_batches: dict[tuple[Any, ...], float] = {}

    def seconds(self, job: Job) -> float:
        """Of an optimizer step; `dp` communication and the optimizer are not counted."""
        parallel = parallel_config(job)
        recomputation = _rank_of_recomputation(job)
        key = (parallel.tp_size, parallel.cp_size, parallel.ep_size, job.samples, recomputation)
        if key not in self._micro_batches:
            alone = {"pp_size": 1, "pp_schedule": "1f1b", "pp_virtual_stages": 1, "gradient_accumulation_steps": 1}
            alone |= {"zero_stage": 1, "dp_replicate_size": 1}
            ranks = parallel.tp_size * parallel.cp_size
            world = max(ranks, ranks * parallel.ep_size)  # experts of one pipeline rank find a place
            one = replace(job, arguments={**job.arguments, **alone}, world_size=world)
            parts = step_time(one, self._rates, self._works).parts
            self._micro_batches[key] = sum(part for name, part in parts.items() if name not in NOT_OF_A_MICRO_BATCH)
        idle = (parallel.pp_size - 1) / (parallel.pp_virtual_stages * job.micro_batches)
        share = job.micro_batches / parallel.pp_size
        return self._micro_batches[key] * share * (1 + (idle / 3 if parallel.splits_backward else idle))


def cheapest_recomputation(job: Job, estimator: Estimator, usable: float) -> tuple[Job, RankMemory]:
    """The job with the recomputation that costs least time and fits, or takes least if none does; its fullest rank."""
    offloads = job.arguments.get("activation_offload")
    choices = [each for each in RECOMPUTATIONS if each["activation_checkpointing"] or not offloads]
    choice, memory = estimator.least(job, choices, usable)
    return replace(job, arguments={**job.arguments, **choice}), memory


def cheapest_change(job: Job, gpu: GPU, rates: Rates, estimator: Estimator | None = None) -> Change | None:
    """The fewest other arguments with which a job fits that does not; of several, those with the fastest step.

    The samples of a step stay. None if three changes at once are not enough.

    Args:
        estimator: of the job's model, made before.
    """
    estimator, usable = estimator or Estimator(job.config), usable_bytes(gpu)
    works = WorkTable(estimator.weights)
    rows = job.tokens_per_step // job.sequence_length
    single = list(_changes(job))
    for count in range(1, MOST_CHANGES + 1):
        found: list[tuple[float, Change]] = []
        for together in combinations(single, count):
            names = [name for change in together for name in change]
            if len(set(names)) < len(names):
                continue
            changed = _with(job, {name: value for change in together for name, value in change.items()}, rows)
            if changed is None or estimator.weights.why_not(parallel_config(changed)) is not None:
                continue
            memory = estimator.fullest(changed)
            if memory.total > usable:
                continue
            new = {name: value for name, value in changed.arguments.items() if job.arguments.get(name) != value}
            seconds = long_step_time(changed, rates, works, EXACT, ROUNDS).seconds
            found.append((seconds, Change(new, memory.total / GIB, seconds)))
        if found:
            return min(found, key=lambda each: each[0])[1]
    return None


def _changes(job: Job) -> Iterator[Mapping[str, Any]]:
    """Single changes that save memory."""
    get, parallel = job.arguments.get, parallel_config(job)
    now = layout_of(job)
    policies = [each.get("activation_checkpointing_policy") for each in RECOMPUTATIONS]
    at = policies.index(now.get("activation_checkpointing_policy"))
    yield from RECOMPUTATIONS[at + 1 :]
    yield from ({"per_device_train_batch_size": n} for n in divisors(job.samples)[:-1])
    yield from ({"zero_stage": stage} for stage in range(parallel.zero_stage + 1, 4))
    yield from ({"tp_size": size} for size in divisors(job.gpus_per_node) if size > parallel.tp_size)
    yield from ({"pp_size": parallel.pp_size * factor} for factor in (2, 4, 8))
    if job.sequence_length >= 8192:
        yield from ({"cp_size": parallel.cp_size * factor} for factor in (2, 4))
    if str(get("optim") or "adamw").startswith("adamw") and get("optim_state_dtype") in (None, "float32"):
        yield {"optim_state_dtype": "bfloat16"}
    if now["activation_checkpointing"] and not get("activation_offload"):
        yield {"activation_offload": 1}
    if not get("optim_offload") and get("ema_decay") is None and not str(get("optim") or "").startswith("muon"):
        yield {"optim_offload": 1}


def _with(job: Job, arguments: Mapping[str, Any], rows: int) -> Job | None:
    """The job with other arguments and as many samples in a step; None if there is no such job."""
    merged = {**job.arguments, **arguments}
    if merged.get("pp_layers_per_stage") and "pp_size" in arguments:
        del merged["pp_layers_per_stage"]
    changed = replace(job, arguments=merged)
    try:
        parallel = parallel_config(changed)
        copies = parallel.dp_size(job.world_size)
        if parallel.zero_stage > 1 and parallel.shard_size(job.world_size) == 1 and "zero_stage" in arguments:
            return None
        if rows % (copies * changed.samples):
            return None
        micro_batches = rows // (copies * changed.samples)
        parallel.check_micro_batches(micro_batches)
    except ValueError:
        return None
    if parallel.zero_stage == 3 and merged.get("fp8") is not None:
        return None
    return replace(changed, arguments={**merged, "gradient_accumulation_steps": micro_batches})

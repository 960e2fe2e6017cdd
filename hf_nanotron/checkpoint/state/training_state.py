"""Save and resume a run's masters, optimizer and scheduler, under any other layout. All ranks of the job together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers.utils import logging

from ...optim.ema import WeightAverage
from ...parallel.mesh import Group, ParallelMesh
from ...parallel.together import all_or_none, from_rank_0
from ...parallel.zero.buckets import is_owner
from ...parallel.zero.segment import Segment
from ..files.checked import read_checked
from ..files.inside import inside
from ..files.schema import VALUES, require
from .file import AVERAGE, INDEX, MASTER, StatePiece
from .index import StateIndex
from .read import StoredState, Target
from .saved_values import changed_settings, check_groups, check_scalars, load_scheduler
from .slices import Slice
from .values import encode

logger = logging.get_logger(__name__)
T = TypeVar("T")

DIRECTORY = "training_state"
OWN_KINDS = {MASTER: "the fp32 weights", AVERAGE: "their moving average"}  # of tensors, beside the optimizer's
# Not what a step computes but how and on what: that is for the run that resumes.
OWN_SETTINGS = ("params", "param_names", "foreach", "fused", "capturable")


def state_pieces(
    segments: list[Segment], optimizer: Any, mesh: ParallelMesh, average: WeightAverage | None = None
) -> list[StatePiece]:
    """What this rank writes: views of its masters, of the optimizer's tensors and of the `average`, no copies."""
    pieces = []
    for index, segment in enumerate(segments):
        if not is_owner(segment.spec, mesh):
            continue
        tensors, scalars = {MASTER: segment.master.detach()}, {}
        if average is not None:
            tensors[AVERAGE] = average.shadows[index]
        for kind, value in optimizer.state.get(segment.master, {}).items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                if kind in OWN_KINDS:
                    raise ValueError(f"the optimizer calls a state of its own {kind!r}, which is {OWN_KINDS[kind]}.")
                tensors[kind] = value
            elif value is not None:  # SGD has no momentum buffer before its first step
                scalars[kind] = value
        pieces.append(StatePiece(segment.spec, segment.start, segment.stop, tensors, scalars))
    return pieces


def state_values(mesh: ParallelMesh, optimizer: Any, scheduler: Any, extra: dict[str, Any]) -> dict[str, Any]:
    """What is the same on every rank; rank 0 writes it."""
    groups = [{k: v for k, v in group.items() if k not in OWN_SETTINGS} for group in optimizer.param_groups]
    values = {
        "layout": {"world_size": mesh.world_size, **asdict(mesh.parallel)},  # for people; nothing depends on it
        "optimizer": {"class": type(optimizer).__name__, "groups": groups},
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "extra": extra,
    }
    for name, value in values.items():
        encode(value, name)
    return values


def load_training_state(
    directory: str | os.PathLike[str],
    mesh: ParallelMesh,
    segments: list[Segment],
    optimizer: Any,
    scheduler: Any,
    average: WeightAverage | None = None,
    index: StateIndex | None = None,
) -> dict[str, Any]:
    """Restore masters, optimizer, scheduler and average from what a job of any layout has written. All ranks together.

    The model's own parameters follow with `ShardedWeights.publish`. If this fails, masters and optimizer may hold a
    part of the checkpoint: load another one, or stop. Returns the `extra` of `state_values`.

    `index`: of the state, if it has been read.
    """
    folder = Path(directory) / DIRECTORY

    def load() -> dict[str, Any]:
        if not folder.is_dir():
            raise ValueError(
                f"{directory} has no {DIRECTORY}/ (it was saved with save_only_model=True, or by another program); "
                "start from its weights with from_pretrained instead of resume_from_checkpoint."
            )
        with StoredState(folder, mesh.rank == 0, index) as stored:
            values, where = run_values(stored), f"{stored.directory / INDEX}: values['scheduler']"
            reads = partial(is_reader, mesh)
            changed = fill_from(stored, segments, optimizer, reads)
            if changed and mesh.rank == 0:
                logger.warning(
                    f"{directory} goes on with its own settings of the optimizer: {'; '.join(changed)}. For others "
                    "start from its weights (from_pretrained)."
                )
            fill_average(stored, average, values["extra"].get(AVERAGE), mesh.rank == 0, reads)
            if scheduler is not None and values["scheduler"] is not None:
                load_scheduler(scheduler, values["scheduler"], len(optimizer.param_groups), where)
            return values["extra"]

    extra = all_or_none(mesh, "loading the training state", load)
    hand_on(mesh, segments, optimizer, average)
    return extra


def load_masters(
    directory: str | os.PathLike[str],
    mesh: ParallelMesh,
    segments: Iterable[Segment],
    average: WeightAverage | None = None,
    index: StateIndex | None = None,
) -> None:
    """Restore the fp32 masters and their average alone. All ranks together."""

    def load() -> None:
        with StoredState(Path(directory) / DIRECTORY, mesh.rank == 0, index) as stored:
            reads = partial(is_reader, mesh)
            fill_masters(stored, segments, reads)
            if average is not None:
                fill_average(stored, average, run_values(stored)["extra"].get(AVERAGE), mesh.rank == 0, reads)

    all_or_none(mesh, "loading the weights", load)
    hand_on(mesh, segments, None, average)


# ---- copies of the same segment on several ranks ----

Reads = Callable[[Segment], bool]


def every_rank(_: Segment) -> bool:
    """Each rank reads all of its segments."""
    return True


def holders(mesh: ParallelMesh, segment: Segment) -> Group:
    """The ranks that hold copies of a segment: replicas of the ZeRO shards."""
    return mesh.expert_replica if segment.spec.axis == "ep" else mesh.replica


def is_reader(mesh: ParallelMesh, segment: Segment) -> bool:
    """Whether this rank reads a segment, for all that hold copies of it (`hand_on`)."""
    return holders(mesh, segment).rank == 0


def hand_on(mesh: ParallelMesh, segments: Iterable[Segment], optimizer: Any, average: WeightAverage | None) -> None:
    """What readers have read, to the ranks that hold copies of it. All ranks together; one tensor at a time."""
    for index, segment in enumerate(segments):
        group = holders(mesh, segment)
        if group.size == 1:
            continue
        state = {} if optimizer is None else optimizer.state.get(segment.master, {})
        kept = [value for _, value in sorted(state.items()) if isinstance(value, torch.Tensor) and value.dim()]
        for tensor in [segment.master.data, *kept, *([] if average is None else [average.shadows[index]])]:
            on_device = tensor.to(mesh.device)  # what is at rest on the host, too
            dist.broadcast(on_device, group.ranks[0], group=group.handle)
            if on_device is not tensor:
                tensor.copy_(on_device)


def own_slice(segment: Segment) -> Slice:
    return Slice(segment.spec, segment.start, segment.stop)


def fill_masters(stored: StoredState, segments: Iterable[Segment], reads: Reads = every_rank) -> None:
    """Masters of `segments` from a stored state."""
    stored.fill_all([(own_slice(segment), MASTER, segment.master.data) for segment in filter(reads, segments)])


def fill_average(
    stored: StoredState,
    average: WeightAverage | None,
    saved: dict[str, Any] | None,
    warns: bool = False,
    reads: Reads = every_rank,
) -> None:
    """The average of a stored state; of one that has none it begins with the weights, which are there by now."""
    if average is None or saved is None:
        if saved is not None and warns:
            logger.warning(
                f"{stored.directory} holds a moving average of the weights, which this run does not go on with: it has "
                f"no ema_decay (there it was {saved.get('decay')})."
            )
        if average is not None:
            average.restart()
            if warns:
                logger.warning(f"{stored.directory} holds no moving average: that of this run begins with its weights.")
        return
    pairs = zip(average.weights.segments, average.shadows, strict=True)
    stored.fill_all([(own_slice(segment), AVERAGE, shadow) for segment, shadow in pairs if reads(segment)])
    average.updates.fill_(saved["updates"])


def run_values(stored: StoredState) -> dict[str, Any]:
    """`optimizer`, `scheduler` and `extra`, as `state_values` has made them."""
    return require(VALUES, stored.values, f"{stored.directory / INDEX}: values")


def read_index(mesh: ParallelMesh, checkpoint: str | os.PathLike[str]) -> StateIndex | None:
    """The index of a checkpoint's training state, which rank 0 reads for all; None if it has none. All ranks together.

    Looks at the index alone, not whether the files that it names are there.
    """
    folder = Path(checkpoint) / DIRECTORY

    def read() -> dict[str, Any] | None:
        there = mesh.rank == 0 and (folder / INDEX).is_file()
        return read_checked(inside(folder, INDEX, str(folder))) if there else None

    body = from_rank_0(mesh, all_or_none(mesh, f"reading {folder / INDEX}", read))
    if body is None:
        return None
    return all_or_none(mesh, f"reading {folder / INDEX}", lambda: StateIndex.of(folder / INDEX, body))


def saved_extra(index: StateIndex | None) -> dict[str, Any]:
    """The `extra` of `state_values`; nothing for a checkpoint without a training state."""
    return {} if index is None else saved_run_values(index)["extra"]


def saved_run_values(index: StateIndex) -> dict[str, Any]:
    """`run_values` of a training state."""
    return require(VALUES, index.values, f"{index.path}: values")


def fill_from(stored: StoredState, segments: list[Segment], optimizer: Any, reads: Reads = every_rank) -> list[str]:
    """Masters of `segments`, and of `optimizer` its state and hyper-parameters, from a stored state.

    Returns which hyper-parameters of this run are others, and have no effect.
    """
    saved, name = run_values(stored)["optimizer"], type(optimizer).__name__
    if saved is None:  # converted from the Hub: the optimizer starts afresh
        fill_masters(stored, segments, reads)
        return []
    if saved["class"] != name or len(saved["groups"]) != len(optimizer.param_groups):
        raise ValueError(
            f"{stored.directory} was written by {saved['class']} with {len(saved['groups'])} parameter groups, but "
            f"this run has {name} with {len(optimizer.param_groups)}; resume with the same `optim`, or start from "
            "the weights with from_pretrained."
        )
    state_device = {segment.master: segment.state_device for segment in segments}
    read_here = {segment.master for segment in segments if reads(segment)}
    part_of = {segment.master: own_slice(segment) for segment in segments}
    stored_kinds = {kind for name in stored.shapes() for kind in stored.kinds(name)}
    check_groups(saved["groups"], optimizer.param_groups, stored_kinds, f"{stored.directory / INDEX}: groups")
    changed = changed_settings(saved["groups"], optimizer.param_groups, str(stored.directory))
    for part in part_of.values():
        stored.check(part, MASTER)
    # The optimizer itself says in which dtype and where it keeps its state: it loads one whose tensors have no
    # elements yet. They are then read straight to where they belong, and nothing is there twice.
    state: dict[int, dict[str, Any]] = {}
    groups, count = [], 0
    for group, hyperparameters in zip(optimizer.param_groups, saved["groups"], strict=True):
        numbers = range(count, count + len(group["params"]))
        own = {key: value for key, value in group.items() if key in OWN_SETTINGS}
        # What a group of a later torch has more keeps the value of this run.
        groups.append({**group, **hyperparameters, **own, "params": list(numbers)})
        for number, master in zip(numbers, group["params"], strict=True):
            hub_name = part_of[master].name
            kinds = {kind: dtype for kind, dtype in stored.kinds(hub_name).items() if kind not in OWN_KINDS}
            empty = {kind: torch.empty(0, dtype=dtype) for kind, dtype in kinds.items()}
            scalars = stored.scalars(hub_name)
            is_counted = bool(empty.keys() - {"momentum_buffer"})  # Muon's matrices have that alone
            check_scalars(scalars, optimizer, is_counted, f"{stored.directory / INDEX}: scalars[{hub_name!r}]")
            if entry := {**empty, **scalars}:
                state[number] = entry
        count = numbers.stop
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    targets: list[Target] = []
    for master, part in part_of.items():
        if master in read_here:
            targets.append((part, MASTER, master.data))
        entry = optimizer.state.get(master, {})
        for kind in stored.kinds(part.name).keys() & entry.keys() - OWN_KINDS.keys():
            device = state_device[master] or entry[kind].device
            entry[kind] = torch.empty(part.numel, dtype=entry[kind].dtype, device=device)
            if master in read_here:
                targets.append((part, kind, entry[kind]))
    stored.fill_all(targets)
    return changed

"""Whether all ranks of a job hold the same data, asked once before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from ..parallel.collectives import all_gather
from ..parallel.mesh import ParallelMesh
from ..parallel.together import together
from .fingerprint import SETTINGS, fingerprint, row_hashes
from .loader import DataParallelLoader
from .ordered import brings_order, has_method
from .window_check import say_ranks

UNKNOWN = -1


@dataclass(frozen=True)
class HeldData:
    """A rank's data: samples of the dataset, batches per epoch, its `fingerprint`; `UNKNOWN` where it cannot say."""

    samples: int
    batches: int
    print: int


def dataset_of(loader: Any) -> Any:
    """The dataset that a loader of ours, or of accelerate's, deals over the ranks; None of any other loader."""
    if isinstance(loader, DataParallelLoader):
        return loader.dataset.dataset  # type: ignore[attr-defined]
    return loader.dataset if isinstance(getattr(loader, "batch_sampler", None), BatchSamplerShard) else None


def check_same_data(mesh: ParallelMesh, loader: Any, what: str, reads: bool = True) -> int | None:
    """Compare the data of all ranks, which call together; the common fingerprint, or None.

    Lengths must be equal, and (with `reads`) samples and their order, unless the data draws them anew each time. `what`
    names the data in an error, such as `"training"`.
    """
    dataset = dataset_of(loader)
    reads = reads and dataset is not None
    hashes = together(mesh, f"reading the {what} data", lambda: row_hashes(dataset)) if reads else {}
    own = HeldData(
        samples=len(dataset) if dataset is not None and _is_mapped(dataset) else UNKNOWN,
        batches=len(loader) if not _tells_settings(dataset) and has_length(loader) else UNKNOWN,
        print=_known(fingerprint(hashes)),
    )
    all_ranks = _gather(mesh, own)
    for name in ("samples", "batches"):
        values = [getattr(held, name) for held in all_ranks]
        if len(set(values)) > 1:
            raise ValueError(f"the {what} data has different lengths: {_by_value(values, name)}. {WHY_LENGTHS}")
    prints = [held.print for held in all_ranks]
    if len(set(prints)) == 1:
        return own.print if own.print != UNKNOWN else None
    if UNKNOWN in prints or not is_repeatable(mesh, dataset, own.print):
        return None
    raise ValueError(_difference(mesh, hashes, own.samples, what))


def is_repeatable(mesh: ParallelMesh, dataset: Any, before: int) -> bool:
    """Whether the dataset has the fingerprint of `before` again, on every rank. All ranks together."""
    again = _known(fingerprint(row_hashes(dataset))) == before
    return bool(all_gather(torch.tensor([int(again)], device=mesh.device), mesh.world, 0).all())


def _is_mapped(dataset: Any) -> bool:
    return not (isinstance(dataset, IterableDataset) or _tells_settings(dataset)) and has_length(dataset)


def _tells_settings(dataset: Any) -> bool:
    """As a mixture does, whose length may take long to find, and follows from what its fingerprint says."""
    return brings_order(dataset) and has_method(dataset, "settings")


def _known(value: int | None) -> int:
    return UNKNOWN if value is None else value


def _gather(mesh: ParallelMesh, own: HeldData) -> list[HeldData]:
    mine = torch.tensor([[own.samples, own.batches, own.print]], device=mesh.device)
    return [HeldData(*row) for row in all_gather(mine, mesh.world, 0).tolist()]


WHY_LENGTHS = (
    "Every rank reads the data itself and must read the same: prepare it once, before the job, or on one rank while "
    "the others wait (with args.main_process_first()); drop or filter rows deterministically."
)
WHY_ORDERS = (
    "Every rank runs the script: rows that are shuffled or split without a seed (Dataset.shuffle(), "
    "train_test_split(), random.shuffle before the trainer is made) are in a different order on each, so that "
    "samples would be trained on twice or never. Set a seed (shuffle(seed=42)), or save the prepared data once and "
    "load it on every rank; the trainer itself shuffles with data_seed."
)


def _by_value(values: Sequence[int], name: str) -> str:
    said = {value: [rank for rank, other in enumerate(values) if other == value] for value in dict.fromkeys(values)}
    parts = (f"{'no length' if value == UNKNOWN else f'{value} {name}'} on {say_ranks(r)}" for value, r in said.items())
    return ", ".join(parts)


def _difference(mesh: ParallelMesh, own: dict[int, int], samples: int, what: str) -> str:
    """Which ranks hold different samples, and where first; of ranks of one replica, if there are such. Collective."""
    found: list[Any] = [None] * mesh.world.size
    dist.all_gather_object(found, (mesh.dp_rank, own), group=mesh.world.handle)
    pairs = [
        (found[one][0] != found[two][0], min(place for place in hashes if hashes[place] != others.get(place)), one, two)
        for one, (_, hashes) in enumerate(found)
        for two, (_, others) in enumerate(found[: one + 64])
        if one < two and hashes != others
    ]
    apart, place, one, two = min(pairs)
    if place == SETTINGS:
        return (
            f"{what}, before its first step: ranks {one} and {two} have different data sets: other files, weights or "
            "seeds. Give every rank the same, and copies of the same files."
        )
    whose = "of different replicas" if apart else "of one replica"
    size = "" if samples == UNKNOWN else f" of {samples}"
    return (
        f"{what}, before its first step: ranks {one} and {two} {whose} read different samples or in a different order "
        f"(row {place}{size} is the first of the compared rows that differs). {WHY_ORDERS}"
    )

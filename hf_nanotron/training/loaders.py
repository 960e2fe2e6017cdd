"""Loaders of batches, made by the training arguments."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.data import IterableDataset, Sampler
from transformers.trainer_utils import seed_worker

from ..data.loader import DataParallelLoader, build_loader
from ..data.streaming.lane_loader import build_lane_loader
from ..data.streaming.lane_stream import LaneStream
from ..parallel.mesh import ParallelMesh
from ..training_args import NanotronTrainingArguments


def make_loader(
    args: NanotronTrainingArguments,
    mesh: ParallelMesh,
    dataset: Any,
    sampler: Sampler[int] | None,
    collate: Any,
    batch_size: int,
    is_training: bool,
    step_batches: int | None = None,
) -> DataParallelLoader:
    """A loader by the training arguments, for batches of one rank over the data-parallel ranks of `mesh`.

    Args:
        step_batches: micro-batches of an optimizer step over all ranks, for training.

    Raises:
        ValueError: for a stream of lanes that does not divide among the ranks.
    """
    is_uneven = step_batches is not None and step_batches % mesh.dp_size != 0
    workers: dict[str, Any] = {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory and mesh.device.type == "cuda",
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
    }
    if isinstance(dataset, LaneStream) and dataset.epochs is None:
        if is_uneven:
            raise ValueError(
                f"a step has {step_batches} micro-batches, which do not divide among {mesh.dp_size} data-parallel "
                f"ranks, and a {type(dataset).__name__} deals all ranks the same number of rows; use a "
                "gradient_accumulation_steps x max_dp_size that all sizes to which the run may shrink divide, or a "
                "TokenDataset."
            )
        return build_lane_loader(dataset, collate, batch_size, mesh.dp_rank, mesh.dp_size, positions=True, **workers)
    # As Trainer's, with data-parallel ranks for processes: those of a replica draw the same.
    seeding = partial(seed_worker, num_workers=args.dataloader_num_workers, rank=mesh.dp_rank)
    loader = build_loader(
        dataset,
        sampler,
        collate,
        batch_size,
        mesh.dp_rank,
        mesh.dp_size,
        args.dataloader_drop_last,
        data_seed(args),
        positions=is_training,
        step_batches=None if is_uneven is False and isinstance(dataset, IterableDataset) else step_batches,
        worker_init_fn=seeding if is_training and not isinstance(dataset, IterableDataset) else None,
        **workers,
    )
    loader.device = None if is_training or mesh.device.type == "cpu" else mesh.device
    return loader


def data_seed(args: NanotronTrainingArguments) -> int:
    """Of the order of the samples."""
    return args.data_seed if args.data_seed is not None else args.seed

"""What every rank of a job must be given alike, and the disk that all of them must share."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import has_length

from ...data.same_data import WHY_LENGTHS
from ...parallel.collectives import all_gather, all_reduce
from ...parallel.mesh import ParallelMesh
from ...redaction import printable

# They say how a rank reports, reads or is reached; runs in which they differ train the same.
MAY_DIFFER = frozenset(
    "local_rank run_log log_level log_level_replica log_on_each_node disable_tqdm report_to run_name project "
    "logging_dir "
    "trackio_space_id trackio_bucket_id trackio_static_space_id hub_token skip_memory_metrics "
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context do_train do_eval do_predict".split()
)
EVERY_RANK = "Every rank must get the same values, and picks its own samples of the data itself."
LONGEST = 80  # characters of a value in an error


def compare_ranks(mesh: ParallelMesh, values: Mapping[str, Any]) -> None:
    """Refuse `values` that are not the same on every rank. All ranks together."""
    if mesh.world_size == 1:
        return
    texts = {name: _text(value) for name, value in values.items()}
    digest = sha256(json.dumps(texts, sort_keys=True).encode()).digest()[:6]
    number = torch.tensor([int.from_bytes(digest, "big")], device=mesh.device)
    if int(all_gather(number, mesh.world, 0).unique().numel()) == 1:
        return
    all_texts: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(all_texts, texts, group=mesh.world.handle)
    problems = []
    for name in dict.fromkeys(name for each in all_texts for name in each):
        ranks: dict[str, list[int]] = {}
        for rank, each in enumerate(all_texts):
            ranks.setdefault(each.get(name, "nothing"), []).append(rank)
        if len(ranks) > 1:
            said = "; ".join(
                f"{text if len(text) <= LONGEST else text[:LONGEST] + '...'} on rank "
                f"{', '.join(map(str, who[:8]))}{', ...' if len(who) > 8 else ''}"
                for text, who in ranks.items()
            )
            problems.append(printable(f"{name} differs between ranks: {said}."))
    why = WHY_LENGTHS if any(problem.startswith("the length of") for problem in problems) else EVERY_RANK
    raise ValueError("\n".join([*problems, why]))


def _text(value: Any) -> str:
    def other(item: Any) -> Any:
        if isinstance(item, set | frozenset):
            return sorted(map(str, item))
        return f"{type(item).__module__}.{type(item).__qualname__}"  # its `repr` may hold an address

    return json.dumps(value, sort_keys=True, default=other)


def values_of(trainer: Trainer) -> dict[str, Any]:
    """What a trainer was made with, as far as ranks must agree on it."""
    args: TrainingArguments = trainer.args
    said = args.to_dict()
    values = {entry.name: said.get(entry.name) for entry in fields(args) if entry.name not in MAY_DIFFER}
    if args.save_strategy == "no":  # nothing is written there before `save_model`, which looks at its own directory
        del values["output_dir"]
    config: Any = cast(Any, trainer.model).config
    for name, value in config.to_dict().items():
        if name not in ("_name_or_path", "transformers_version"):
            values[f"model.config.{name}"] = value
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        values[name] = "given" if getattr(trainer, name) is not None else "not given"
    for name in ("train_dataset", "eval_dataset"):
        values[f"the length of {name}"] = _lengths(getattr(trainer, name))
    values["the class of the trainer"] = type(trainer).__qualname__
    return values


def _lengths(dataset: Any) -> Any:
    if isinstance(dataset, Mapping):
        return {str(name): _lengths(part) for name, part in dataset.items()}
    if dataset is None:
        return "no data"
    return len(dataset) if has_length(dataset) else type(dataset).__qualname__


def check_shared(mesh: ParallelMesh, directory: str | os.PathLike[str], argument: str, is_written: bool = True) -> None:
    """Refuse a directory that rank 0 cannot write, or that other ranks do not see. All ranks together.

    Rank 0 writes a small file for a moment, which every rank reads; it only makes the directory unless `is_written`.
    """
    path, token = Path(directory), secrets.randbits(48)
    problem = ""
    if mesh.rank == 0:
        problem = _try(lambda: _write(path, token) if is_written else path.mkdir(parents=True, exist_ok=True))
    numbers = torch.tensor([token if mesh.rank == 0 else 0, bool(problem)], device=mesh.device)
    agreed, failed = all_reduce(numbers, mesh.world).tolist()
    name = path / f".written-by-rank-0-{agreed:012x}"
    if is_written and not failed and mesh.rank != 0:
        problem = _try(lambda: _look(path, name))
    try:
        bad = all_reduce(torch.tensor(float(bool(problem)), device=mesh.device), mesh.world)
        if bad:
            _raise_together(mesh, directory, argument, problem)
    finally:
        if mesh.rank == 0:
            with contextlib.suppress(OSError):
                name.unlink()


def _write(path: Path, token: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / f".written-by-rank-0-{token:012x}").write_text("whether all ranks see this file\n")


def _look(path: Path, name: Path) -> None:
    until = time.monotonic() + 3.0  # network file systems keep what they have listed for a while
    while not name.exists():
        if time.monotonic() > until:
            raise FileNotFoundError("a file that rank 0 has written there is not visible: it is not on a shared disk")
        with contextlib.suppress(OSError):
            os.listdir(path)
        time.sleep(0.1)
    if not os.access(path, os.W_OK):
        raise PermissionError("it is not writable")


def _try(action: Any) -> str:
    try:
        action()
    except OSError as error:
        return str(error)
    return ""


def _raise_together(mesh: ParallelMesh, directory: Any, argument: str, problem: str) -> None:
    problems: list[Any] = [problem]
    if mesh.world_size > 1:
        problems = [None] * mesh.world_size
        dist.all_gather_object(problems, problem, group=mesh.world.handle)
    ranks = [rank for rank, each in enumerate(problems) if each]
    raise ValueError(
        f"{argument}={os.fspath(directory)!r}: {problems[ranks[0]]} (rank {', '.join(map(str, ranks[:8]))}"
        f"{', ...' if len(ranks) > 8 else ''}). Use a directory that every rank can write, on a disk that all nodes "
        "share."
    )

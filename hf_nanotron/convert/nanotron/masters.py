"""The fp32 masters in the optimizer files of a nanotron checkpoint, and whether they are those of its weights.

`optimizer/optimizer_pp-P-of-PP_tp-T-of-TP_exp-0-of-1.pt` holds the masters of one rank in the shards of `model/`, and
nothing that says which shards these are. What tells is that a master rounds to the weight.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .format import Shard, load_tensor

_OPTIMIZER_FILE = re.compile(r"optimizer_pp-(\d+)-of-(\d+)_tp-(\d+)-of-(\d+)(?:_exp-0-of-1)?\.pt")
Masters = Mapping[tuple[str, int], torch.Tensor]  # by the parameter's name and the tensor-parallel rank


@dataclass(frozen=True)
class RankMasters:
    """One optimizer file: parameter name -> fp32 shard, mapped from disk, not read."""

    path: Path
    pp_rank: int
    pp: int
    tp_rank: int
    tp: int
    tensors: dict[str, torch.Tensor]


def open_masters(step: Path) -> list[RankMasters]:
    """The files of all ranks, by pipeline rank.

    Raises:
        FileNotFoundError: if there are no optimizer files, or a rank's is missing.
        ValueError: if a file is truncated, holds anything but tensors and plain containers, has no masters, or is one
            too many.
    """
    folder = step / "optimizer"
    if any(folder.glob("optimizer_*_dp-*.pt")):
        raise ValueError(
            f"{folder}: ZeRO-1 optimizer files (…_dp-…) hold flat pieces of the masters and are not supported; convert "
            "without master weights, or save with zero_stage: 0."
        )
    paths: dict[tuple[int, ...], Path] = {}
    for path in sorted(folder.glob("optimizer_*.pt")):
        match = _OPTIMIZER_FILE.fullmatch(path.name)
        numbers = tuple(map(int, match.groups())) if match else ()
        if not numbers or numbers[0] >= numbers[1] or numbers[2] >= numbers[3] or numbers in paths:
            raise ValueError(f"{path} does not belong to any rank, or to one that has another file; remove it.")
        paths[numbers] = path
    sizes = {(pp, tp) for _, pp, _, tp in paths}
    if len(sizes) != 1:
        raise FileNotFoundError(
            f"{folder} has no optimizer_pp-*-of-*_tp-*-of-*_exp-0-of-1.pt of one single topology (found "
            f"{sorted(path.name for path in paths.values())}): the fp32 masters live there; convert without them."
        )
    pp, tp = sizes.pop()
    files = []
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            if (pp_rank, pp, tp_rank, tp) not in paths:
                name = f"optimizer_pp-{pp_rank}-of-{pp}_tp-{tp_rank}-of-{tp}_exp-0-of-1.pt"
                raise FileNotFoundError(f"{folder / name} is missing: the masters need every rank's file.")
            path = paths[pp_rank, pp, tp_rank, tp]
            files.append(RankMasters(path, pp_rank, pp, tp_rank, tp, _open_optimizer(path)))
    return files


def _open_optimizer(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: holds objects other than tensors, which are never unpickled ({error}).") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a readable torch file, probably truncated; copy it again ({error}).") from error
    masters = state.get("gradient_accumulator") if isinstance(state, dict) else None
    if not masters:
        raise ValueError(
            f"{path}: has no fp32 masters (gradient_accumulator): the run did not set accumulate_grad_in_fp32. Convert "
            "without master weights."
        )
    if not isinstance(masters, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in masters.values()):
        raise ValueError(f"{path}: gradient_accumulator does not map names of parameters to tensors.")
    return {name: tensor.detach() for name, tensor in masters.items()}


def check_masters(step: Path, files: Sequence[RankMasters], shards: Mapping[str, Sequence[Shard]]) -> Masters:
    """The masters of every shard, after comparing each with its weights, which are read for it.

    A tied embedding stands in the first and in the last stage's file; the first stage's is taken, as for the weights.

    Raises:
        ValueError: naming the first parameter that has no such master, or the first master that does not round to the
            weights: of another rank, step or run.
    """
    masters: dict[tuple[str, int], torch.Tensor] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            masters.setdefault((name, file.tp_rank), tensor)
    for shard in (shard for group in shards.values() for shard in group):
        master = masters.get((shard.name, shard.tp_rank))
        if master is None or tuple(master.shape) != shard.shape or master.dtype != torch.float32:
            found = "nothing" if master is None else f"{master.dtype} of shape {tuple(master.shape)}"
            raise ValueError(
                f"{step / 'optimizer'}: {found} for {shard.name} at tensor-parallel rank {shard.tp_rank}, where fp32 "
                f"of shape {shard.shape} is expected as in {shard.path.name}: the optimizer is of another run."
            )
    for file in files:
        for name, tensor in file.tensors.items():
            if name not in shards:
                raise ValueError(f"{file.path}: holds masters of {name}, which the model does not have.")
            _check_master(file, name, tensor, shards[name])
    return masters


def _check_master(file: RankMasters, name: str, tensor: torch.Tensor, group: Sequence[Shard]) -> None:
    """
    Args:
        group: the shards of the parameter: one for each tensor-parallel rank, or one alone.
    """
    if group[0].tp is not None and (group[0].pp, group[0].tp) != (file.pp, file.tp):
        raise ValueError(f"{file.path} is of another topology than {group[0].path}: files of different runs are mixed.")
    shard = group[file.tp_rank if group[0].tp is not None else 0]
    # A tied embedding is in the file of the last stage, too.
    is_tied = name.startswith("model.token_position_embeddings.") and file.pp_rank == file.pp - 1
    if shard.pp_rank not in (None, file.pp_rank) and not is_tied:
        raise ValueError(f"{file.path}: holds masters of {name}, whose stage is {shard.pp_rank} ({shard.path.name}).")
    if not _rounds_to(tensor, shard):
        others = [other.tp_rank for other in group if other is not shard and _rounds_to(tensor, other)]
        is_of = f"those of tensor-parallel rank {others[0]}" if others else "of another rank, step or run"
        raise ValueError(
            f"{file.path}: the masters of {name} do not round to the weights in {shard.path}: they are {is_of}. Copy "
            "the checkpoint again, or convert without master weights."
        )


def _rounds_to(master: torch.Tensor, shard: Shard) -> bool:
    weights = load_tensor(shard.path, "data")
    if master.shape != weights.shape or master.dtype != torch.float32:
        return False
    rounded = master.to(weights.dtype)
    return bool(((rounded == weights) | (rounded.isnan() & weights.isnan())).all())

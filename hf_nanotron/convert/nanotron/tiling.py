"""Whether the files of a nanotron parameter hold what their names say: each of its numbers once, each rank its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from .mapping import Parameter, Slices, shard_slices

Piece = tuple[int, int, int]  # along the cut dimension: first row in the shard, first row in the parameter, rows


def shard_fault(
    parameter: Parameter, shape: Sequence[int], pairs: Iterable[tuple[Slices, Slices]], *, tp: int, rank: int
) -> str | None:
    """Why a header's slices are not those of tensor-parallel rank `rank` of `tp`, in words; None if they are.

    What the ranks of a size hold tiles the parameter, so shards without a fault do.

    Args:
        pairs: (local, global) slices of the header.
    """
    try:
        found = _pieces(parameter, shape, pairs)
        whole = parameter.shape
        assert parameter.cut is not None
        share = (*whole[: parameter.cut], whole[parameter.cut] // tp, *whole[parameter.cut + 1 :])
        of_ranks = [_pieces(parameter, share, shard_slices(parameter, tp, each)) for each in range(tp)]
    except ValueError as error:
        return str(error)
    if found == of_ranks[rank] and tuple(shape) == share:
        return None
    if found in of_ranks:
        return (
            f"its header says that it is the shard of tensor-parallel rank {of_ranks.index(found)}, and its name that "
            f"of rank {rank}: it is a copy of another rank's file"
        )
    return (
        f"its header says that it holds {_show(found)} of {parameter.name}, where rank {rank} of {tp} holds "
        f"{_show(of_ranks[rank])}: files of different runs are mixed, or the header is damaged"
    )


def _pieces(parameter: Parameter, shape: Sequence[int], pairs: Iterable[tuple[Slices, Slices]]) -> list[Piece]:
    pieces: list[Piece] = []
    for local, whole in pairs:
        misfit = f"its slices do not fit its tensor of shape {tuple(shape)}"
        if {len(local), len(whole), len(shape)} != {len(parameter.shape)}:
            raise ValueError(misfit)
        here = [range(*each.indices(size)) for each, size in zip(local, shape, strict=True)]
        there = [range(*each.indices(size)) for each, size in zip(whole, parameter.shape, strict=True)]
        if any(each.step != 1 for each in here + there):
            raise ValueError("its slices have steps other than 1")
        if [len(each) for each in here] != [len(each) for each in there]:
            raise ValueError(misfit)
        for dim, (mine, size) in enumerate(zip(there, parameter.shape, strict=True)):
            if dim != parameter.cut and len(mine) != size:
                raise ValueError(f"its slices hold a part of dimension {dim}, which is not cut")
        assert parameter.cut is not None
        if not here[parameter.cut]:
            raise ValueError("one of its slices is empty")
        pieces.append((here[parameter.cut].start, there[parameter.cut].start, len(here[parameter.cut])))
    joined: list[Piece] = []
    for start, place, rows in sorted(pieces):
        if joined and (start, place) == (joined[-1][0] + joined[-1][2], joined[-1][1] + joined[-1][2]):
            joined[-1] = (*joined[-1][:2], joined[-1][2] + rows)
        else:
            joined.append((start, place, rows))
    return joined


def _show(pieces: Iterable[Piece]) -> str:
    return "rows " + ", ".join(f"{place}:{place + rows} (at {start})" for start, place, rows in pieces)


def stage_fault(stages: Sequence[tuple[str, int]]) -> str | None:
    """Why the pipeline ranks that file names give to blocks cannot be those of one run, in words; None if they can.

    Args:
        stages: (block, pipeline rank) of each parameter that has a rank in its name, in model order.
    """
    for (block, stage), (following, later) in itertools.pairwise(stages):
        if block == following and stage != later:
            return f"{block} is held by the stages {stage} and {later}"
        if later < stage:
            return f"{following} is held by stage {later}, and {block} before it by stage {stage}"
    return None

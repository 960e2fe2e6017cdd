"""Whether ranks that hold copies of a weight hold the same numbers: a script may have set it on some ranks alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ..collectives import all_reduce
from ..mesh import Group, ParallelMesh
from ..shard_spec import ShardSpec
from .buckets import rest_group, shard_group, spans_stages

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def differing_weights(
    parameters: Iterable[tuple[str, torch.Tensor]], specs: Mapping[str, ShardSpec], mesh: ParallelMesh
) -> list[str]:
    """Names of this rank's weights of which another rank holds a different copy. All ranks together.

    Sums of their bits are compared over the ranks that share a weight's masters (stages 0 to 2, where all of them hold
    the weight), and over those that its gradient is summed over.
    """
    groups: dict[tuple[bool, tuple[int, ...]], Group] = {}
    members: dict[tuple[bool, tuple[int, ...]], list[str]] = {}
    sums: dict[str, torch.Tensor] = {}
    for name, parameter in parameters:
        spec, own = specs[name], parameter.detach()
        compared = [rest_group(spec, mesh)]
        if isinstance(own, DTensor):
            own = own.to_local()
        else:
            compared.append(shard_group(spec, mesh))
        sums[name] = own.contiguous().view(BITS[own.element_size()]).sum(dtype=torch.int64)
        for group in compared:
            if group.size > 1:
                key = (spans_stages(spec, mesh), group.ranks)
                groups[key] = group
                members.setdefault(key, []).append(name)
    found: list[str] = []
    # Those that span stages last: their ranks hold other weights before them.
    for key in sorted(groups, key=lambda key: key[0]):
        own = torch.stack([sums[name] for name in members[key]])
        most = all_reduce(torch.stack([own, -own]), groups[key], dist.ReduceOp.MAX)
        differs = (most[0] != -most[1]).tolist()
        found += [name for name, bad in zip(members[key], differs, strict=True) if bad]
    return found

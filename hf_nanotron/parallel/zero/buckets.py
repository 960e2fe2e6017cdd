"""Group the parameters of a model part into buckets: contiguous memory that is reduced and gathered as one tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from torch import nn

from ..mesh import Group, ParallelMesh
from ..shard_spec import ShardSpec

# In elements: every parameter and every shard starts on 256 bytes of bf16, where kernels load and store fastest.
ALIGNMENT = 128


@dataclass(frozen=True)
class Member:
    """A parameter of a bucket, which lies at elements `[offset, offset + numel)` of it."""

    name: str
    parameter: nn.Parameter
    spec: ShardSpec
    offset: int

    @property
    def numel(self) -> int:
        return self.parameter.numel()


@dataclass(frozen=True)
class Bucket:
    """Parameters of one stage whose gradients are summed over the same ranks.

    Args:
        members: in the order in which backward meets them.
        size: elements, padded to a multiple of the ranks that share the bucket.
        shard: ranks over which ZeRO shards these parameters.
        rest: ranks that hold the same shard, over which its gradient is summed after the reduce-scatter over `shard`
            (or instead of it, without sharding).
        spans_stages: `rest` holds ranks of several stages, so the sum waits until every backward is done; otherwise two
            ranks could deadlock.
    """

    stage: int
    members: tuple[Member, ...]
    size: int
    shard: Group
    rest: Group
    spans_stages: bool

    @property
    def own(self) -> slice:
        """Elements of the bucket that this rank's ZeRO shard is."""
        length = self.size // self.shard.size
        return slice(self.shard.rank * length, (self.shard.rank + 1) * length)


def rest_group(spec: ShardSpec, mesh: ParallelMesh) -> Group:
    """Ranks that hold the same shard of a parameter, over which its gradient is summed.

    They saw different samples, or hold copies of a weight for different heads, tokens or stages.
    """
    if spec.axis == "ep":
        return mesh.expert_replica
    if spans_stages(spec, mesh):
        return mesh.tied if spec.stages == "ends" else mesh.every_stage
    if spec.partial_grad:
        return mesh.partial
    if spec.replicas > 1 and spec.dim is not None:
        return mesh.kv_replicas(spec.replicas)
    return mesh.replica


def shard_group(spec: ShardSpec, mesh: ParallelMesh) -> Group:
    """Ranks over which ZeRO spreads a parameter."""
    return mesh.expert_shard if spec.axis == "ep" else mesh.shard


def groups_of_weights(specs: Iterable[ShardSpec], mesh: ParallelMesh) -> list[Group]:
    """All groups in which the weights of `specs` and their gradients are communicated, in one order on all ranks."""
    used = {group for spec in specs for group in (shard_group(spec, mesh), rest_group(spec, mesh))}
    return [group for group in mesh.groups.values() if group in used]


def spans_stages(spec: ShardSpec, mesh: ParallelMesh) -> bool:
    """Whether several pipeline stages hold a copy of a parameter."""
    return spec.stages != "one" and mesh.pp_size > 1


def is_owner(spec: ShardSpec, mesh: ParallelMesh) -> bool:
    """Whether this rank's segment of a parameter counts: over the job, each value counts exactly once.

    It does on the first of the tensor-parallel ranks with the same part, in the first copy of the ZeRO shards, on the
    first stage of several.
    """
    if spec.axis == "ep":
        return mesh.expert_replica.rank == 0
    is_copy = spans_stages(spec, mesh) and not mesh.is_first_stage
    return mesh.coordinates.replica == 0 and spec.is_first_replica and not is_copy


def plan_buckets(
    parameters: dict[str, nn.Parameter],
    specs: dict[str, ShardSpec],
    stage_of: dict[str, int],
    mesh: ParallelMesh,
    bucket_bytes: int,
) -> list[Bucket]:
    """Divide the trainable parameters (in the order of the forward) into buckets, in the order of the backward.

    A bucket is closed at `bucket_bytes` of fp32 gradients.
    """
    buckets: list[Bucket] = []
    # By stage, and the ranks that share the parameter, and those that hold the same shard of it.
    open_members: dict[tuple[int, tuple[int, ...], tuple[int, ...]], list[str]] = {}

    def close(names: list[str]) -> None:
        spec, members, offset = specs[names[0]], [], 0
        for name in names:
            members.append(Member(name, parameters[name], specs[name], offset))
            offset += _round_up(parameters[name].numel(), ALIGNMENT)
        shard = shard_group(spec, mesh)
        size = _round_up(offset, ALIGNMENT * shard.size)
        stage, rest = stage_of[names[0]], rest_group(spec, mesh)
        buckets.append(Bucket(stage, tuple(members), size, shard, rest, spans_stages(spec, mesh)))

    # Backward meets parameters last to first: buckets fill, and are reduced, in that order.
    for name, parameter in reversed(parameters.items()):
        if not parameter.requires_grad:
            continue
        key = (stage_of[name], shard_group(specs[name], mesh).ranks, rest_group(specs[name], mesh).ranks)
        names = open_members.setdefault(key, [])
        names.append(name)
        # By the largest part of any rank: all of them close, and reduce, the same buckets in the same order.
        if 4 * sum(prod(specs[n].longest_shape) for n in names) >= bucket_bytes:
            close(open_members.pop(key))
    for names in open_members.values():
        close(names)
    return buckets


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

"""Group the parameters of a model part into buckets: contiguous memory that is reduced and gathered as one tensor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .mesh import Group, ParallelMesh
from .spec import ShardSpec

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
        stage: index of the stage that owns them.
        members: in the order in which backward meets them.
        size: elements, filled up to a multiple of the ranks that share the bucket.
        rest: ranks that hold the same shard of these parameters, over which its gradient is summed after the
            reduce-scatter over `mesh.shard` (or instead of one, where nothing is sharded).
        spans_stages: `rest` holds ranks of several stages, so that sum waits until every backward is done; else two
            ranks could wait for each other crosswise.
    """

    stage: int
    members: tuple[Member, ...]
    size: int
    rest: Group
    spans_stages: bool


def rest_group(spec: ShardSpec, mesh: ParallelMesh) -> Group:
    """Ranks that hold the same shard of a parameter, over which its gradient is a sum.

    All of them saw different samples, or hold copies of the same weight behind different heads, tokens or stages.
    """
    if spec.tied and mesh.pp_size > 1:
        return mesh.tied
    if spec.partial_grad:
        return mesh.partial
    if spec.replicas > 1 and spec.dim is not None:
        return mesh.kv_replicas(spec.replicas)
    return mesh.replica


def plan_buckets(
    parameters: dict[str, nn.Parameter],
    specs: dict[str, ShardSpec],
    stage_of: dict[str, int],
    mesh: ParallelMesh,
    bucket_bytes: int,
) -> list[Bucket]:
    """Cut the trainable parameters into buckets, in the order in which backward completes them.

    Args:
        parameters: name -> parameter, in the order of the forward.
        specs: their `ShardSpec`s.
        stage_of: name -> index of the stage that owns it.
        bucket_bytes: of fp32 gradients, at which a bucket is closed.
    """
    buckets: list[Bucket] = []
    open_members: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    groups: dict[tuple[int, ...], Group] = {}

    def close(stage: int, rest: Group, names: list[str]) -> None:
        members, offset = [], 0
        for name in names:
            members.append(Member(name, parameters[name], specs[name], offset))
            offset += _round_up(parameters[name].numel(), ALIGNMENT)
        size = _round_up(offset, ALIGNMENT * mesh.shard_size)
        spans_stages = mesh.pp_size > 1 and specs[names[0]].tied
        buckets.append(Bucket(stage, tuple(members), size, rest, spans_stages))

    # Backward meets parameters last to first: buckets fill, and are reduced, in that order.
    for name, parameter in reversed(parameters.items()):
        if not parameter.requires_grad:
            continue
        rest = rest_group(specs[name], mesh)
        groups[rest.ranks] = rest
        names = open_members.setdefault((stage_of[name], rest.ranks), [])
        names.append(name)
        if 4 * sum(parameters[n].numel() for n in names) >= bucket_bytes:
            close(stage_of[name], rest, open_members.pop((stage_of[name], rest.ranks)))
    for (stage, ranks), names in open_members.items():
        close(stage, groups[ranks], names)
    return buckets


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

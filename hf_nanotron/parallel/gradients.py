"""fp32 gradient accumulation in contiguous buckets, reduced while the last backward still runs."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from .mesh import Group, ParallelMesh
from .spec import ShardSpec


@dataclass
class Bucket:
    """Gradients of some parameters of one stage, summed over one group as a single tensor.

    `spans_stages`: the group holds ranks of several stages, so the sum waits until every backward is done; else two
    ranks could wait for each other crosswise.
    """

    stage: int
    group: Group
    spans_stages: bool
    buffer: torch.Tensor
    parameters: tuple[nn.Parameter, ...]
    missing: set[nn.Parameter] = field(default_factory=set)
    work: dist.Work | None = None
    reduced: bool = False


def reduction_group(spec: ShardSpec, mesh: ParallelMesh) -> Group:
    """Ranks over which the gradient of a parameter is summed.

    All of them saw different samples, or hold copies of the same weight behind different heads, tokens or stages.
    """
    if spec.tied and mesh.pp_size > 1:
        return mesh.tied
    if spec.partial_grad:
        return mesh.stage
    if spec.replicas > 1 and spec.dim is not None:
        return mesh.kv_replicas(spec.replicas)
    return mesh.dp


class GradientBuckets:
    """Owns the fp32 gradients of a model part.

    After each backward of a micro-batch, autograd's gradient of a parameter is added to its view of the bucket and
    freed. During the last backward of a stage (`arm`), a bucket is reduced as soon as its last gradient has arrived;
    parameters that get none are reduced by `finish`.

    Args:
        parameters: name -> parameter, in the order of the forward.
        specs: their `ShardSpec`s.
        stage_of: name -> index of the stage that owns it.
        bucket_bytes: size at which a bucket is closed.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        specs: dict[str, ShardSpec],
        stage_of: dict[str, int],
        mesh: ParallelMesh,
        bucket_bytes: int,
    ) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.buckets: list[Bucket] = []
        self._bucket_of: dict[nn.Parameter, Bucket] = {}
        self._view_of: dict[nn.Parameter, torch.Tensor] = {}
        self._armed: set[int] = set()
        self._tied = mesh.tied if mesh.pp_size > 1 else None
        open_buckets: dict[tuple[int, tuple[int, ...]], list[tuple[str, nn.Parameter]]] = {}
        groups: dict[tuple[int, ...], Group] = {}
        # Backward meets parameters last to first: buckets fill, and are reduced, in that order.
        for name, parameter in reversed(parameters.items()):
            if not parameter.requires_grad:
                continue
            group = reduction_group(specs[name], mesh)
            key = (stage_of[name], group.ranks)
            groups[group.ranks] = group
            members = open_buckets.setdefault(key, [])
            members.append((name, parameter))
            if 4 * sum(p.numel() for _, p in members) >= bucket_bytes:
                self._close(stage_of[name], group, open_buckets.pop(key))
        for (stage, ranks), members in open_buckets.items():
            self._close(stage, groups[ranks], members)
        # A strong reference in a hook, which the parameter keeps in C++, would be a cycle that is never collected.
        this = weakref.ref(self)

        def collect(parameter: torch.Tensor) -> None:
            buckets = this()
            if buckets is not None:
                buckets._collect(parameter)

        self._hooks = [parameter.register_post_accumulate_grad_hook(collect) for parameter in self._bucket_of]

    def _close(self, stage: int, group: Group, members: Sequence[tuple[str, nn.Parameter]]) -> None:
        parameters = tuple(parameter for _, parameter in members)
        total = sum(parameter.numel() for parameter in parameters)
        buffer = torch.zeros(total, dtype=torch.float32, device=parameters[0].device)
        bucket = Bucket(stage, group, group is self._tied, buffer, parameters)
        offset = 0
        for name, parameter in members:
            view = bucket.buffer[offset : offset + parameter.numel()].view(parameter.shape)
            self.gradients[name] = self._view_of[parameter] = view
            self._bucket_of[parameter] = bucket
            offset += parameter.numel()
        self.buckets.append(bucket)

    def zero(self) -> None:
        """Start a new optimizer step."""
        self._armed.clear()
        for bucket in self.buckets:
            bucket.buffer.zero_()
            bucket.reduced = False

    def arm(self, stage: int) -> None:
        """The next backward of `stage` is its last: reduce its buckets as they fill."""
        self._armed.add(stage)
        for bucket in self.buckets:
            if bucket.stage == stage:
                bucket.missing = set(bucket.parameters)

    def finish(self) -> None:
        """Reduce what is left (parameters without a gradient, tied pairs) and wait for all reductions."""
        for bucket in self.buckets:
            self._reduce(bucket)
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _collect(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        self._view_of[parameter].add_(parameter.grad)
        parameter.grad = None
        bucket = self._bucket_of[parameter]
        if bucket.stage in self._armed:
            bucket.missing.discard(parameter)
            if not bucket.missing and not bucket.spans_stages:
                self._reduce(bucket)

    def _reduce(self, bucket: Bucket) -> None:
        if bucket.reduced:
            return
        bucket.reduced = True
        if bucket.group.size > 1:
            bucket.work = dist.all_reduce(bucket.buffer, group=bucket.group.handle, async_op=True)

"""ZeRO stages 0 to 2: weights and gradients in contiguous buckets, masters and optimizer state on their owner alone.

Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...ops.embedding import Embedding
from ...ops.linear import Linear
from ..collectives import all_gather_in_place
from ..ep.experts import ParallelExperts
from ..mesh import ParallelMesh
from ..shard_spec import ShardSpec
from .buckets import Bucket, Member, plan_buckets
from .gradients import GradientBuckets, MemberGradient
from .segment import Segment, nothing
from .written import Place


@dataclass
class BucketWeights:
    """The weights of one bucket: `whole` is what the model's parameters are views into."""

    bucket: Bucket
    whole: torch.Tensor
    gathering: dist.Work | None = None

    def view(self, member: Member) -> torch.Tensor:
        """The memory of a parameter, in its shape."""
        return self.whole[member.offset : member.offset + member.numel].view(member.parameter.shape)

    def wait(self) -> None:
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None


class _Wait:
    """A module's hook that waits for its weights. A copy of the module has nothing to wait for.

    A copied decoder layer waits before its blocks are copied. Smaller parts, the embedding and the head are copied as
    they are; call `BucketedWeights.wait` first between an optimizer step and the next forward.
    """

    def __init__(self, awaited: Sequence[BucketWeights]) -> None:
        self._awaited = awaited

    def __call__(self, *_: object) -> None:
        for weights in self._awaited:
            weights.wait()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Wait:
        self()
        return _Wait(())


class BucketedWeights:
    """The `ShardedWeights` of stages 0, 1 and 2.

    The model's parameters become views of contiguous buckets. At stage 0 every rank owns the whole bucket; at stages 1
    and 2 only its shard of the fp32 masters, the optimizer state and (stage 2) the gradients. New weights are gathered
    in place, in the order of the forward, which waits for those of each unit.

    Args:
        model: this rank's part, with whole parameters.
        units: modules before whose forward their parameters must have arrived; together they hold every parameter.
        specs: name -> which part of the Hub's tensor a parameter is.
        stage_of: name -> pipeline stage of a parameter.
        bucket_bytes: size of a bucket's fp32 gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Sequence[nn.Module]],
        specs: dict[str, ShardSpec],
        stage_of: dict[str, int],
        mesh: ParallelMesh,
        compute_dtype: torch.dtype,
        bucket_bytes: int,
    ) -> None:
        self.mesh, self.compute_dtype = mesh, compute_dtype
        self.before_write: Callable[[], None] = nothing
        self._parameters = dict(model.named_parameters())
        buckets = plan_buckets(self._parameters, specs, stage_of, mesh, bucket_bytes)
        for parameter in self._parameters.values():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(compute_dtype)
        masters: dict[str, torch.Tensor] = {}
        self._weights = [self._take(bucket, masters) for bucket in buckets]
        spread = any(bucket.shard.size > 1 for bucket in buckets)
        sharded = mesh.parallel.zero_stage == 2 and spread
        self.gradients = GradientBuckets(buckets, sharded, mesh.device)
        self.segments = self._make_segments(masters)
        self._places = self._make_places()
        self._give_gradients(model)
        self._hooks = [hook for unit in units for hook in self._wait_before(unit)] if spread else []

    # ---- memory ----

    def _take(self, bucket: Bucket, masters: dict[str, torch.Tensor]) -> BucketWeights:
        """Move the parameters of a bucket into contiguous memory, and what this rank owns of them in fp32 too."""
        start, stop = bucket.own.start, bucket.own.stop
        whole = torch.zeros(bucket.size, dtype=self.compute_dtype, device=self.mesh.device)
        own = whole[start:stop]
        if self.compute_dtype != torch.float32:
            own = torch.zeros(stop - start, device=self.mesh.device)
        taken = BucketWeights(bucket, whole)
        for member in bucket.members:
            flat = member.parameter.data.reshape(-1)
            low, high = max(member.offset, start), min(member.offset + member.numel, stop)
            if low < high:
                masters[member.name] = own[low - start : high - start]
                masters[member.name].copy_(flat[low - member.offset : high - member.offset])
            view = taken.view(member)
            view.copy_(member.parameter.data)
            member.parameter.data = view
        return taken

    def _make_segments(self, masters: dict[str, torch.Tensor]) -> list[Segment]:
        """What each parameter has in our shard of its bucket, in the order of the model."""
        segments, has_masters = {}, self.compute_dtype != torch.float32
        for weights, gradients in zip(self._weights, self.gradients.buckets, strict=True):
            start, stop = weights.bucket.own.start, weights.bucket.own.stop
            rounded = weights.whole[start:stop] if has_masters else None
            for member in weights.bucket.members:
                low, high = max(member.offset, start), min(member.offset + member.numel, stop)
                if low < high:
                    own = slice(low - start, high - start)
                    segments[member.name] = Segment(
                        member.name,
                        member.spec,
                        low - member.offset,
                        high - member.offset,
                        nn.Parameter(masters[member.name]),
                        gradients.shard[own],
                        None if rounded is None else rounded[own],
                    )
        return [segments[name] for name in self._parameters if name in segments]

    @property
    def _with_masters(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each weight of ours that has an fp32 master of its own, and that master."""
        return [(own.weight, own.master.data) for own in self.segments if own.weight is not None]

    def _make_places(self) -> list[Place]:
        own = {segment.name: segment for segment in self.segments}
        return [
            Place(member.name, member.parameter, weights.view(member), own.get(member.name))
            for weights in self._weights
            for member in weights.bucket.members
        ]

    def _give_gradients(self, model: nn.Module) -> None:
        """Tell the layers that add weight gradients themselves where to."""
        of: dict[torch.Tensor, MemberGradient] = {m.member.parameter: m for m in self.gradients.members.values()}
        self._linears = [module for module in model.modules() if isinstance(module, Linear)]
        self._embeddings = [module for module in model.modules() if isinstance(module, Embedding)]
        self._experts = [module for module in model.modules() if isinstance(module, ParallelExperts)]
        for linear in self._linears:
            weight = linear._parameters["weight"]  # `linear.weight` may be a copy in another dtype
            linear.accumulate_into(None if weight is None else of.get(weight))
        for embedding in self._embeddings:
            embedding.row_gradient = of.get(embedding.weight)
        for experts in self._experts:
            own = {leaf: of.get(parameter) for leaf, parameter in experts.named_parameters(recurse=False)}
            experts.weight_gradients = {leaf: member for leaf, member in own.items() if member is not None}

    # ---- one step ----

    def begin(self) -> None:
        self.gradients.begin()

    def before_backward(self, stage: int, is_last: bool) -> None:
        self.gradients.before_backward(stage, is_last)

    def after_backward(self, stage: int, is_last: bool) -> None:
        self.gradients.after_backward(stage)

    def start_deferring(self, stage: int, micro_batch: int) -> None:
        self.gradients.start_deferring(stage, micro_batch)

    def stop_deferring(self) -> None:
        self.gradients.stop_deferring()

    def run_deferred(self, stage: int, micro_batch: int, is_last: bool) -> None:
        self.gradients.run_deferred(stage, micro_batch, is_last)

    def finish(self) -> None:
        self.gradients.finish()

    def publish(self, rounded: bool = False) -> None:
        """Round the masters into the model's weights, and start gathering what other ranks own."""
        if not rounded and (own := self._with_masters):
            torch._foreach_copy_([weight for weight, _ in own], [master for _, master in own])
        for weights in reversed(self._weights):
            if weights.bucket.shard.size > 1:
                weights.gathering = all_gather_in_place(weights.whole, weights.bucket.shard)

    def wait(self) -> None:
        for weights in self._weights:
            weights.wait()

    def _wait_before(self, unit: Sequence[nn.Module]) -> list[RemovableHandle]:
        """Hooks that wait for the weights of `unit` when the forward comes to any of its modules."""
        held = {parameter for module in unit for parameter in module.parameters()}
        own = [w for w in self._weights if any(member.parameter in held for member in w.bucket.members)]

        return [module.register_forward_pre_hook(_Wait(own)) for module in unit]

    # ---- reading and writing whole parameters ----

    def whole(self, name: str) -> torch.Tensor:
        self.wait()
        return self._parameters[name].detach()

    def write(self, name: str, value: torch.Tensor) -> None:
        self.wait()
        self.before_write()
        with torch.no_grad():
            self._parameters[name].copy_(value)

    def take_written(self, compare: bool = False) -> None:
        self.wait()
        for place in self._places:
            place.take_written(compare)

    def read_from_model(self) -> None:
        self.before_write()
        for weight, master in self._with_masters:
            master.copy_(weight)

    def bytes_held(self) -> dict[str, int]:
        frozen = [parameter for parameter in self._parameters.values() if not parameter.requires_grad]
        return {
            "parameters": _bytes([*(w.whole for w in self._weights), *frozen]),
            "gradients": _bytes([b.shard if b.whole is None else b.whole for b in self.gradients.buckets]),
            "masters": _bytes([master for _, master in self._with_masters]),
        }

    def close(self) -> None:
        self.wait()
        self.gradients.close()
        _detach(*self._attached)

    def gather_in_backward(self, module: nn.Module | None, needed: bool) -> None:
        """Nothing: every rank has the parameters whole."""

    @contextlib.contextmanager
    def copying(self, memo: dict[int, Any]) -> Iterator[None]:
        """While `copy.deepcopy` copies the model with `memo`: the copy has no part in these weights and gradients."""
        self.wait()
        memo.update((id(gradient), gradient) for gradient in self.gradients.members.values())
        yield
        _detach(*copy.deepcopy(self._attached, memo))  # the copies that there are already

    @property
    def _attached(self) -> tuple[list[RemovableHandle], list[Linear], list[Embedding], list[ParallelExperts]]:
        """What knows of us in the model."""
        return self._hooks, self._linears, self._embeddings, self._experts


def _detach(
    hooks: Sequence[RemovableHandle],
    linears: Sequence[Linear],
    embeddings: Sequence[Embedding],
    experts: Sequence[ParallelExperts],
) -> None:
    for hook in hooks:
        hook.remove()
    for linear in linears:
        linear.accumulate_into(None)
    for embedding in embeddings:
        embedding.row_gradient = None
    for module in experts:
        module.weight_gradients = {}


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

"""fp32 gradients in buckets: accumulated in place, and reduced while the last backward still runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.graph import get_gradient_edge

from ...ops.embedding import add_rows
from ...ops.fp8 import add_scaled_product
from ...ops.grouped_mm import add_grouped_product
from ...ops.linear import add_product, can_add_product
from ..collectives import reduce_scatter_in_place
from .buckets import Bucket, Member
from .deferred import DeferredWork

IN_FLIGHT = 2  # buckets of sharded gradients that are being reduced while the next one fills


class BucketGradients:
    """The fp32 gradients of one bucket.

    With `sharded`, only our shard is kept (ZeRO-2); the whole bucket exists only while a backward fills it.
    """

    def __init__(self, bucket: Bucket, sharded: bool, device: torch.device, deferred: DeferredWork) -> None:
        self.bucket, self.deferred, self._device = bucket, deferred, device
        self._own = bucket.own
        self.whole = None if sharded else torch.zeros(bucket.size, device=device)
        self.shard = (
            torch.zeros(bucket.size // bucket.shard.size, device=device)
            if self.whole is None
            else self.whole[self._own]
        )
        self.holds_sum = False  # of the step's earlier micro-batches, in `shard` of a sharded bucket
        self.members = [MemberGradient(self, member) for member in bucket.members]
        self.missing: set[MemberGradient] = set()
        self.reduced = False
        self.in_flight = False  # a sharded bucket is being reduced
        self.takes_early = False  # a step runs, whose every forward is followed by its backward
        self.work: dist.Work | None = None

    def fill(self) -> torch.Tensor:
        """The whole bucket, to be written to."""
        if self.whole is None:
            self.whole = torch.empty(self.bucket.size, device=self._device)
        return self.whole

    def absorb(self) -> None:
        """Add the reduced micro-batch of a sharded bucket to our shard, and free the whole. Once is enough."""
        if not self.in_flight:
            return
        assert self.whole is not None
        if self.work is not None:
            self.work.wait()
        part = self.whole[self._own]
        self.shard.add_(part) if self.holds_sum else self.shard.copy_(part)
        self.holds_sum, self.in_flight, self.work, self.whole = True, False, None, None


class MemberGradient:
    """The gradient of one parameter: a `WeightGradient` for the linear layers that use it."""

    def __init__(self, owner: BucketGradients, member: Member) -> None:
        self.owner, self.member = owner, member
        self.is_fresh = True  # what the memory holds is of an earlier step
        self.held = 0  # products of this backward that are still to be added
        self.when_added: Callable[[], None] | None = None  # what waits for the last of them

    def view(self) -> torch.Tensor:
        member = self.member
        flat = self.owner.fill()[member.offset : member.offset + member.numel]
        return flat.view(member.parameter.shape)

    def add(self, gradient: torch.Tensor) -> None:
        view = self.view()
        view.copy_(gradient) if self.is_fresh else view.add_(gradient)
        self.is_fresh = False

    def takes_product(self, dtype: torch.dtype) -> bool:
        return can_add_product(self.owner.shard, dtype)

    def add_product(self, grad_output: torch.Tensor, input: torch.Tensor) -> None:
        self.owner.deferred.do(partial(self._add, add_product), grad_output, input)

    def add_grouped_product(self, left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> None:
        self.owner.deferred.do(partial(self._add, add_grouped_product), left, right, offsets)

    def add_scaled_product(
        self, grad_output: torch.Tensor, input: torch.Tensor, grad_scale: torch.Tensor, input_scale: torch.Tensor
    ) -> None:
        self.owner.deferred.do(partial(self._add, add_scaled_product), grad_output, input, grad_scale, input_scale)

    def add_rows(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        self.owner.deferred.do(self._add_rows, ids, rows)

    def _add(self, product: Callable[..., None], *operands: torch.Tensor) -> None:
        product(self.view(), *operands, overwrite=self.is_fresh)
        self.is_fresh = False

    def hold(self) -> None:
        """Announce a product that is added later in this backward, by `add_held_product`."""
        self.held += 1

    def add_held_product(self, grad_output: torch.Tensor, input: torch.Tensor) -> None:
        self.add_product(grad_output, input)
        self.held -= 1
        if self.held == 0 and self.when_added is not None:
            then, self.when_added = self.when_added, None
            then()

    def _add_rows(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        view = self.view()
        if self.is_fresh:
            view.zero_()
        add_rows(view, ids, rows)
        self.is_fresh = False

    def takes_early(self) -> bool:
        """Whether a forward may add a product, which cannot be undone. Makes room for it.

        Only inside a step, where a backward is sure to follow.
        """
        if self.owner.takes_early:
            self.owner.absorb()
        return self.owner.takes_early

    def complete(self) -> None:
        """Zero what no backward has written."""
        if self.is_fresh:
            self.view().zero_()
            self.is_fresh = False


class GradientBuckets:
    """Accumulates and reduces the gradients of a model part.

    Autograd's gradient of a parameter is added to its fp32 memory after each backward and freed; linear layers add
    theirs directly. In the last backward of a stage (in every backward, if `sharded`) a bucket is reduced as soon as
    its last gradient has arrived: reduce-scattered in place over `bucket.shard`, then summed over `bucket.rest`. The
    order of buckets is the same on all ranks, whichever parameters get no gradient.

    A backward may be split (`start_deferring`): weight gradients, and the reductions after them, then run in
    `run_deferred`. Autograd's gradients of other parameters are added at once, except in a sharded bucket, which would
    have to stay whole for longer.

    Args:
        buckets: in the order in which backward completes them.
        sharded: keep only this rank's shard of the sums between micro-batches (ZeRO-2), at the cost of a reduce-scatter
            per micro-batch.
    """

    def __init__(self, buckets: Sequence[Bucket], sharded: bool, device: torch.device) -> None:
        self._sharded = sharded
        self._deferred = DeferredWork()
        self.buckets = [BucketGradients(bucket, sharded, device, self._deferred) for bucket in buckets]
        self.members = {gradient.member.name: gradient for bucket in self.buckets for gradient in bucket.members}
        self._of_stage: dict[int, list[BucketGradients]] = {}
        for bucket in self.buckets:
            self._of_stage.setdefault(bucket.bucket.stage, []).append(bucket)
        self._next: dict[int, int] = {}  # stage -> the bucket to be reduced next, in a backward that reduces
        self._in_flight: list[BucketGradients] = []
        # A chain of two collectives gets a stream of its own: waiting in it does not hold up the backward.
        self._chain = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._hooks = [self._hook(gradient) for gradient in self.members.values()]

    def _hook(self, gradient: MemberGradient) -> tuple[Any, Any]:
        """Call `_collect` once per backward, after all uses of the parameter, also if none returned a gradient.

        A strong reference in the hook, which autograd's node keeps in C++, would be a cycle that is never collected.
        """
        node = get_gradient_edge(gradient.member.parameter).node
        this = weakref.ref(self)

        def collect(*_: Any) -> None:
            buckets = this()
            if buckets is not None:
                buckets._collect(gradient)

        return node, node.register_hook(collect)

    def begin(self) -> None:
        """Start a new optimizer step. Nothing is zeroed: the first gradient of each parameter overwrites."""
        self._next.clear()
        self._deferred.clear()
        for bucket in self.buckets:
            bucket.reduced = bucket.holds_sum = False
            bucket.takes_early = True
            for gradient in bucket.members:
                gradient.is_fresh = True
                gradient.held, gradient.when_added = 0, None  # as a backward that was broken off may have left them

    def before_backward(self, stage: int, is_last: bool) -> None:
        if not (is_last or self._sharded):
            return
        self._absorb_all()
        self._next[stage] = 0
        for bucket in self._of_stage.get(stage, ()):
            bucket.missing, bucket.reduced = set(bucket.members), False

    def after_backward(self, stage: int) -> None:
        """Reduce what is left: buckets with parameters that got no gradient."""
        if self._next.pop(stage, None) is not None:
            for bucket in self._of_stage.get(stage, ()):
                self._reduce(bucket)

    def start_deferring(self, stage: int, micro_batch: int) -> None:
        """A backward comes next, without `before_backward`, that leaves its products to `run_deferred`."""
        self._deferred.start(stage, micro_batch)

    def stop_deferring(self) -> None:
        """That backward has been issued."""
        self._deferred.stop()

    def run_deferred(self, stage: int, micro_batch: int, is_last: bool) -> None:
        """Compute what that backward left; `is_last`: the last one of `stage`, so that buckets are to be reduced."""
        self.before_backward(stage, is_last)
        self._deferred.run(stage, micro_batch)
        self.after_backward(stage)

    def finish(self) -> None:
        """Do the sums that had to wait, and wait for all."""
        assert not self._deferred, "a backward's weight gradients were never computed"
        self._absorb_all()
        for bucket in self.buckets:
            bucket.takes_early = False
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None
        late = [bucket for bucket in self.buckets if bucket.bucket.rest.size > 1 and not self._sums_at_once(bucket)]
        # Those that span stages last: their ranks hold other buckets before them.
        for bucket in sorted(late, key=lambda b: b.bucket.spans_stages):
            bucket.work = self._sum_over_rest(bucket)
        for bucket in late:
            assert bucket.work is not None
            bucket.work.wait()
            bucket.work = None

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for _, hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _collect(self, gradient: MemberGradient) -> None:
        """A backward has done all that it does for this parameter, but for products that are held back."""
        if gradient.held:
            gradient.when_added = lambda: self._collect(gradient)
            return
        parameter = gradient.member.parameter
        if parameter.grad is not None:
            if self._sharded:
                self._deferred.do(gradient.add, parameter.grad)
            else:
                gradient.add(parameter.grad)
            parameter.grad = None
        self._deferred.do(partial(self._complete, gradient))

    def _complete(self, gradient: MemberGradient) -> None:
        """Reduce the buckets whose turn it is, now that this gradient has arrived."""
        bucket = gradient.owner
        stage = bucket.bucket.stage
        if stage not in self._next:
            return
        bucket.missing.discard(gradient)
        queue = self._of_stage[stage]
        while self._next[stage] < len(queue) and not queue[self._next[stage]].missing:
            self._reduce(queue[self._next[stage]])
            self._next[stage] += 1

    def _absorb_all(self, but: int = 0) -> None:
        while len(self._in_flight) > but:
            self._in_flight.pop(0).absorb()

    def _sums_at_once(self, bucket: BucketGradients) -> bool:
        return not (self._sharded or bucket.bucket.spans_stages)

    def _sum_over_rest(self, bucket: BucketGradients) -> dist.Work:
        return dist.all_reduce(bucket.shard, group=bucket.bucket.rest.handle, async_op=True)

    def _reduce(self, bucket: BucketGradients) -> None:
        if bucket.reduced:
            return
        bucket.reduced = True
        for gradient in bucket.members:
            gradient.complete()
        shard, rest = bucket.bucket.shard, bucket.bucket.rest
        sums_rest = rest.size > 1 and self._sums_at_once(bucket)
        if shard.size == 1:
            bucket.work = self._sum_over_rest(bucket) if sums_rest else None
        elif not sums_rest:
            bucket.work = reduce_scatter_in_place(bucket.fill(), shard)
        else:
            bucket.work = self._in_chain(
                lambda: reduce_scatter_in_place(bucket.fill(), shard), lambda: self._sum_over_rest(bucket)
            )
        if self._sharded:
            for gradient in bucket.members:
                gradient.is_fresh = True  # in the memory that the next micro-batch takes
            bucket.in_flight = True
            self._in_flight.append(bucket)
            self._absorb_all(but=IN_FLIGHT)

    def _in_chain(self, first: Callable[[], dist.Work], second: Callable[[], dist.Work]) -> dist.Work:
        """Issue `second` on the result of `first`."""
        if self._chain is None:
            first().wait()
            return second()
        self._chain.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._chain):
            first().wait()
            return second()

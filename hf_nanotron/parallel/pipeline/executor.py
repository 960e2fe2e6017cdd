"""Run any schedule table over the stages of this rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..mesh import Group
from .schedule import Action, Tick, Transfer

Inputs = dict[str, Any]


class StageModule(Protocol):
    """What the executor needs of a stage."""

    index: int
    is_first: bool
    is_last: bool

    def forward(self, inputs: Inputs, received: torch.Tensor | None) -> Any: ...


class _Flight:
    """Transfers under way: buffers and handles, kept until both are done with."""

    def __init__(self) -> None:
        self.receiving: dict[Action, tuple[torch.Tensor, list[dist.Work]]] = {}
        self.sending: list[tuple[torch.Tensor, list[dist.Work]]] = []

    def take(self, action: Action) -> torch.Tensor:
        """The tensor that `action` produced on another rank, waiting for it if need be."""
        tensor, works = self.receiving.pop(action)
        for work in works:
            work.wait()
        return tensor

    def drop_sent(self) -> None:
        """Let go of buffers that have left, so that only micro-batches in flight hold memory."""
        self.sending = [(tensor, works) for tensor, works in self.sending if not all(w.is_completed() for w in works)]

    def finish(self) -> None:
        for _, works in self.sending:
            for work in works:
                work.wait()
        self.sending.clear()


class PipelineExecutor:
    """Runs the ticks of one rank.

    Args:
        group: the pipeline ranks.
        boundary: shape and dtype of the tensor between two stages for a micro-batch.
        device: where boundary tensors live.
    """

    def __init__(
        self,
        group: Group,
        boundary: Callable[[Inputs], tuple[tuple[int, ...], torch.dtype]],
        device: torch.device,
    ) -> None:
        self.group, self.boundary, self.device = group, boundary, device

    def run(
        self,
        table: Sequence[Tick],
        stages: Sequence[StageModule],
        micro_batches: Sequence[Inputs],
        before_forward: Callable[[Action], None] | None = None,
        before_backward: Callable[[Action], None] | None = None,
        after_backward: Callable[[Action], None] | None = None,
    ) -> dict[int, Any]:
        """Run every tick and return the last stage's outputs by micro-batch (empty on other ranks).

        A table with backwards calls `loss.backward()` on the last stage's output and keeps the detached loss alone.

        Args:
            before_forward, before_backward, after_backward: called with each action.
        """
        by_index = {stage.index: stage for stage in stages}
        trains = any(tick.action is not None and tick.action.kind == "B" for tick in table)
        held: dict[tuple[int, int], tuple[torch.Tensor | None, torch.Tensor]] = {}
        produced: dict[Action, torch.Tensor] = {}
        outputs: dict[int, Any] = {}
        flight = _Flight()
        for tick in table:
            action = tick.action
            if action is not None and action.kind == "F":
                if before_forward is not None:
                    before_forward(action)
                stage = by_index[action.stage]
                received = self._received(flight, action, stage)
                if received is not None and trains:
                    received.requires_grad_()
                output = stage.forward(micro_batches[action.micro_batch], received)
                if stage.is_last:
                    outputs[action.micro_batch] = output.loss.detach() if trains else output
                else:
                    produced[action] = output
                if trains:
                    held[action.stage, action.micro_batch] = (received, output.loss if stage.is_last else output)
            elif action is not None:
                if before_backward is not None:
                    before_backward(action)
                received, output = held.pop((action.stage, action.micro_batch))
                grad = None
                if not by_index[action.stage].is_last:
                    grad = flight.take(Action("B", action.stage + 1, action.micro_batch))
                if output.requires_grad:  # not on a first stage that is frozen
                    torch.autograd.backward(output, grad)
                if after_backward is not None:
                    after_backward(action)
                if received is not None:
                    assert received.grad is not None
                    produced[action] = received.grad
            self._exchange(flight, tick.transfers, produced, micro_batches)
        flight.finish()
        return outputs

    def _received(self, flight: _Flight, action: Action, stage: StageModule) -> torch.Tensor | None:
        return None if stage.is_first else flight.take(Action("F", action.stage - 1, action.micro_batch))

    def _exchange(
        self,
        flight: _Flight,
        transfers: Sequence[Transfer],
        produced: dict[Action, torch.Tensor],
        micro_batches: Sequence[Inputs],
    ) -> None:
        """Issue all transfers of a tick at once; sender and receiver list them in the same order."""
        if not transfers:
            return
        flight.drop_sent()
        operations, tensors = [], []
        for transfer in transfers:
            operation: Any
            if transfer.source == self.group.rank:
                operation, peer = dist.isend, transfer.target
                tensor = produced.pop(transfer.action).detach().contiguous()
            else:
                operation, peer = dist.irecv, transfer.source
                shape, dtype = self.boundary(micro_batches[transfer.action.micro_batch])
                tensor = torch.empty(shape, dtype=dtype, device=self.device)
            tensors.append((transfer, tensor))
            operations.append(dist.P2POp(operation, tensor, self.group.ranks[peer], self.group.handle))
        works = dist.batch_isend_irecv(operations)
        # NCCL returns one handle for the batch, gloo one for each operation.
        each = [works] * len(tensors) if len(works) != len(tensors) else [[work] for work in works]
        for (transfer, tensor), own in zip(tensors, each, strict=True):
            if transfer.source == self.group.rank:
                flight.sending.append((tensor, own))
            else:
                flight.receiving[transfer.action] = (tensor, own)

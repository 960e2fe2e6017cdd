"""Run any schedule table over the stages of this rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..batch import batch_shape
from ..mesh import Group
from ..p2p import start_together
from .action_names import named
from .layout import HEADER_SIZE, Layout, read_header, write_header
from .schedule import Action, Tick, Transfer

Inputs = dict[str, Any]
Tensors = tuple[torch.Tensor | None, ...]


class StageModule(Protocol):
    """What the executor needs of a stage."""

    index: int
    is_first: bool
    is_last: bool

    def forward(self, inputs: Inputs, received: Tensors | None) -> Any: ...


class StepHooks:
    """What is done around each action of a table: nothing, unless a subclass says more."""

    def on_forward(self, action: Action) -> None:
        """`action`, a forward, comes next."""

    def before_backward(self, action: Action) -> None:
        """`action`, a backward, comes next."""

    def after_backward(self, action: Action) -> None:
        """It has been issued."""

    def weight_gradients(self, action: Action) -> None:
        """Run the weight gradients that have an action of their own."""


class _Flight:
    """Transfers under way: buffers and handles, kept until both are done with."""

    def __init__(self) -> None:
        self.receiving: dict[Action, tuple[Tensors, list[dist.Work]]] = {}
        self.sending: list[tuple[Tensors, list[dist.Work]]] = []

    def take(self, action: Action) -> Tensors:
        """The tensors that `action` produced on another rank, waiting for them if need be."""
        tensors, works = self.receiving.pop(action)
        for work in works:
            work.wait()
        return tensors

    def drop_sent(self) -> None:
        """Let go of buffers that have left, so that only micro-batches in flight hold memory."""
        self.sending = [(sent, works) for sent, works in self.sending if not all(w.is_completed() for w in works)]

    def finish(self) -> None:
        for _, works in self.sending:
            for work in works:
                work.wait()
        self.sending.clear()


class PipelineExecutor:
    """Runs the ticks of one rank of `group`; boundary tensors live on `device`."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group, self.device = group, device
        # What leaves a stage, by stage, mode and shape of the batch: told once by the stage that sends it.
        self._layouts: dict[tuple[Any, ...], Layout] = {}

    def run(
        self,
        table: Sequence[Tick],
        stages: Sequence[StageModule],
        micro_batches: Sequence[Inputs],
        hooks: StepHooks,
    ) -> dict[int, Any]:
        """Run every tick and return the last stage's outputs by micro-batch (empty on other ranks).

        A table with backwards calls `loss.backward()` on the last stage's output and keeps the detached loss alone.
        """
        by_index = {stage.index: stage for stage in stages}
        trains = any(tick.action is not None and tick.action.kind == "B" for tick in table)
        held: dict[tuple[int, int], tuple[Tensors | None, Any]] = {}
        produced: dict[Action, Tensors] = {}
        outputs: dict[int, Any] = {}
        flight = _Flight()
        for tick in table:
            action = tick.action
            with named(action):
                if action is not None and action.kind == "F":
                    hooks.on_forward(action)
                    stage = by_index[action.stage]
                    received = self._received(flight, action, stage)
                    output = stage.forward(micro_batches[action.micro_batch], received)
                    if stage.is_last:
                        outputs[action.micro_batch] = output.loss.detach() if trains else output
                    else:
                        produced[action] = output
                    if trains:
                        held[action.stage, action.micro_batch] = (received, (output.loss,) if stage.is_last else output)
                elif action is not None and action.kind == "W":
                    hooks.weight_gradients(action)
                elif action is not None:
                    hooks.before_backward(action)
                    received, output = held.pop((action.stage, action.micro_batch))
                    grads: Tensors = (None,)
                    if not by_index[action.stage].is_last:
                        sent = flight.take(Action("B", action.stage + 1, action.micro_batch))
                        # Only what has a gradient comes back.
                        travelled = iter(sent)
                        grads = tuple(next(travelled) if needs_gradient(x) else None for x in output)
                    roots = [(x, g) for x, g in zip(output, grads, strict=True) if needs_gradient(x)]
                    if roots:  # there are none on a first stage that is frozen
                        torch.autograd.backward([x for x, _ in roots], [g for _, g in roots])
                    hooks.after_backward(action)
                    if received is not None:
                        produced[action] = tuple(_gradient(x) for x in received if needs_gradient(x))
            self._exchange(flight, tick.transfers, produced, micro_batches, trains)
        flight.finish()
        return outputs

    def _received(self, flight: _Flight, action: Action, stage: StageModule) -> Tensors | None:
        return None if stage.is_first else flight.take(Action("F", action.stage - 1, action.micro_batch))

    def _exchange(
        self,
        flight: _Flight,
        transfers: Sequence[Transfer],
        produced: dict[Action, Tensors],
        micro_batches: Sequence[Inputs],
        trains: bool,
    ) -> None:
        """Issue all transfers of a tick at once; sender and receiver list them in the same order."""
        if not transfers:
            return
        flight.drop_sent()
        self._tell_layouts(transfers, produced, micro_batches, trains)
        operations: list[dist.P2POp] = []
        counts: list[int] = []
        moved: list[tuple[Transfer, Tensors]] = []
        for transfer in transfers:
            sends = transfer.source == self.group.rank
            peer = self.group.ranks[transfer.target if sends else transfer.source]
            if sends:
                sent = produced.pop(transfer.action)
                tensors: Tensors = tuple(None if x is None else x.detach().contiguous() for x in sent)
            else:
                layout = self._layouts[self._key(transfer, micro_batches, trains)]
                tensors = layout.empty(self.device, gradients=transfer.action.kind == "B")
            own = [x for x in tensors if x is not None]
            operations += [dist.P2POp(dist.isend if sends else dist.irecv, x, peer, self.group.handle) for x in own]
            counts.append(len(own))
            moved.append((transfer, tensors))
        works = start_together(operations)
        # NCCL returns one handle for the batch, gloo one for each operation.
        shared = len(works) != len(operations)
        for (transfer, tensors), count in zip(moved, counts, strict=True):
            mine = works if shared else [works.pop(0) for _ in range(count)]
            if transfer.source == self.group.rank:
                flight.sending.append((tensors, mine))
            else:
                if trains and transfer.action.kind == "F":
                    layout = self._layouts[self._key(transfer, micro_batches, trains)]
                    for x, needs in zip(tensors, layout.needs_gradient, strict=True):
                        if x is not None and needs:
                            x.requires_grad_()
                flight.receiving[transfer.action] = (tensors, mine)

    def _key(self, transfer: Transfer, micro_batches: Sequence[Inputs], trains: bool) -> tuple[Any, ...]:
        """What the layout of a boundary depends on. A backward's goes the way of the forward before it."""
        action = transfer.action
        stage = action.stage if action.kind == "F" else action.stage - 1
        inputs = micro_batches[action.micro_batch]
        return (stage, trains, inputs.get("labels") is not None, tuple(batch_shape(inputs)))

    def forget_layouts(self) -> None:
        """The model has changed its dtype, or what is trained. All ranks together."""
        self._layouts.clear()

    def _tell_layouts(
        self,
        transfers: Sequence[Transfer],
        produced: dict[Action, Tensors],
        micro_batches: Sequence[Inputs],
        trains: bool,
    ) -> None:
        """Tell the next stage what a batch of a new shape becomes, once; both sides know that it is new."""
        headers: list[tuple[tuple[Any, ...], Transfer, torch.Tensor]] = []
        for transfer in transfers:
            key = self._key(transfer, micro_batches, trains)
            if transfer.action.kind == "F" and key not in self._layouts and key not in [k for k, _, _ in headers]:
                header = torch.zeros(HEADER_SIZE, dtype=torch.int64, device=self.device)
                if transfer.source == self.group.rank:
                    layout = Layout.of(produced[transfer.action])
                    header.copy_(write_header(layout))
                headers.append((key, transfer, header))
        if not headers:
            return
        operations = []
        for _, transfer, header in headers:
            sends = transfer.source == self.group.rank
            peer = self.group.ranks[transfer.target if sends else transfer.source]
            operations.append(dist.P2POp(dist.isend if sends else dist.irecv, header, peer, self.group.handle))
        for work in start_together(operations):
            work.wait()
        for key, _, header in headers:
            self._layouts[key] = read_header(header.cpu())


def needs_gradient(x: torch.Tensor | None) -> bool:
    return x is not None and x.requires_grad


def _gradient(x: torch.Tensor | None) -> torch.Tensor:
    """The gradient of something received; zeros if nothing was made of it."""
    assert x is not None
    return torch.zeros_like(x) if x.grad is None else x.grad

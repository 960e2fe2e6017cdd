"""What a rank says to others, in order: its collectives and messages, in a world of imagined ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from ..parallel.p2p import BATCH
from ..parallel.pipeline.action_names import KINDS, action_of
from .roles import Role

# What operators of torch are called here.
OPERATIONS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "barrier": "barrier",
    "send": "send",
    "recv_": "recv",
}
MESSAGES = ("send", "recv")
JOB = "job"  # the group of torch's that has all ranks


@dataclass(frozen=True)
class Event:
    """One communication of one rank.

    Args:
        op: `"all_reduce"`, `"all_gather"`, `"reduce_scatter"`, `"all_to_all"`, `"broadcast"`, ..., `"send"`, `"recv"`.
        group: the axis of the mesh, such as `"tp"`; of ranks that several axes share, the first; `"job"` for all.
        ranks: of the group.
        channel: the number of the communicator of these ranks; each executes in order.
        bytes: of the whole tensor: what is reduced, what was gathered, what is to be scattered, the message.
        dtype: such as `"bfloat16"`.
        peer: the other rank of a message.
        batch: messages of one number start together.
        waits: whether what is launched later waits for it.
        action: of the pipeline: `"forward"`, `"backward"` or `"weight_gradients"`; None outside.
        stage, micro_batch: of the action.
        step: the optimizer step, from 1; 0 before.
    """

    op: str
    group: str
    ranks: tuple[int, ...]
    channel: str
    bytes: int
    dtype: str
    peer: int | None = None
    batch: int | None = None
    waits: bool = True
    action: str | None = None
    stage: int | None = None
    micro_batch: int | None = None
    step: int = 0

    def __str__(self) -> str:
        return self.described(self.peer)

    def described(self, peer: int | None) -> str:
        """In words, of a rank of the role that has another peer than its representative."""
        towards = {"send": f" to rank {peer}", "recv": f" from rank {peer}"}.get(self.op, "")
        where = f", {self.action} of micro-batch {self.micro_batch} on stage {self.stage}" if self.action else ""
        return f"{self.op}{towards} of {self.bytes:,} bytes of {self.dtype} (step {self.step}{where})"


@dataclass(frozen=True)
class RoleTrace:
    """What the ranks of a role say, as their representative says it.

    `groups`: by name, the ranks of all groups of an axis.
    """

    role: Role
    events: tuple[Event, ...]
    groups: Mapping[str, tuple[tuple[int, ...], ...]]


@dataclass
class Recorder:
    """Notes communications for an `Outline`, and hands the rank what it would receive.

    Integers that are received from one rank are what the same message contained where it was sent before, in this
    process or in `told`: a pipeline tells the next stage once which tensors will come.

    Attributes:
        others: whether the other ranks are there, and nothing is to be handed over.
        events: in order.
        told: contents of messages of integers and of broadcasts.
        step: of the events that come.
    """

    told: dict[str, torch.Tensor] = field(default_factory=dict)
    others: bool = False
    events: list[Event] = field(default_factory=list)
    step: int = 0
    _labels: list[str] = field(default_factory=list)
    _batches: int = 0

    def label(self, name: str | None) -> None:
        """A range of this name begins; None ends the innermost."""
        if name is None:
            self._labels.pop()
            return
        self._labels.append(name)
        self._batches += name == BATCH

    def watch(self, func: Any, name: str, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Note an operator of torch's process groups, and do what it does where the others are imagined."""
        op = OPERATIONS.get(name)
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
        tensors: list[torch.Tensor] = []
        result = self._answer(func, op or name, given, tensors, args, kwargs)
        if op is None:
            return result
        group = dist.ProcessGroup.unbox(given["process_group"])
        ranks = tuple(dist.get_process_group_ranks(group))
        largest = max(tensors, key=lambda x: x.numel() * x.itemsize, default=None)
        size = sum(x.numel() * x.itemsize for x in _bulk(given, tensors))
        peer = given.get("dst", given.get("src")) if op in MESSAGES else None
        found = next((action for label in reversed(self._labels) if (action := action_of(label))), None)
        self.events.append(
            Event(
                op=op,
                group="",
                ranks=ranks,
                channel=group.group_name,
                bytes=size,
                dtype="none" if largest is None else str(largest.dtype).removeprefix("torch."),
                peer=None if peer is None else ranks[peer],
                batch=self._batches if BATCH in self._labels else None,
                waits=not given.get("async_op", True) or op in MESSAGES,
                action=KINDS[found.kind] if found else None,
                stage=found.stage if found else None,
                micro_batch=found.micro_batch if found else None,
                step=self.step,
            )
        )
        return result

    def _answer(self, func: Any, op: str, given: Any, tensors: list[torch.Tensor], args: Any, kwargs: Any) -> Any:
        tree_map_only(torch.Tensor, tensors.append, (args, kwargs))
        if not any(x.is_meta for x in tensors):
            result = func(*args, **kwargs)
            if not self.others:
                self._fill(op, given)
            return result
        # A communication of as many tensors of one element: only its handle is needed.
        small = tree_map_only(torch.Tensor, lambda x: torch.empty(1, dtype=x.dtype), (args, dict(kwargs)))
        size = dist.ProcessGroup.unbox(given["process_group"]).size()
        names = [argument.name for argument in func._schema.arguments]
        stood_in = dict(zip(names, small[0], strict=False))
        wide = {"all_gather": "output_tensor", "reduce_scatter": "input_tensor"}.get(op)
        if wide in stood_in:
            stood_in[wide] = torch.empty(size, dtype=stood_in[wide].dtype)
        if op == "all_to_all":
            stood_in.update(output=torch.empty(size), input=torch.empty(size))
            stood_in.update(output_split_sizes=[], input_split_sizes=[])
        result = func(*stood_in.values(), **small[1])
        return _with_tensors(result, args[0])

    def _fill(self, op: str, given: Mapping[str, Any]) -> None:
        """Give what was received a value, where it has memory; keep what is sent and describes other tensors."""
        if op == "all_to_all":
            out, into = given["output"], given["input"]
            out.zero_() if out.shape != into.shape else out.copy_(into)
        elif op in ("send", "recv", "broadcast"):
            x, group = given["tensors"][0], dist.ProcessGroup.unbox(given["process_group"])
            key = f"message of {x.numel()}"
            if op == "broadcast":
                number = sum(event.op == op and event.channel == group.group_name for event in self.events)
                key = f"broadcast {number} of {group.group_name}"
            if op == "send" or op == "broadcast" and group.rank() == given["root_rank"]:
                if not x.is_floating_point():
                    self.told[key] = x.clone()
            elif key in self.told and not x.is_floating_point():
                x.copy_(self.told[key])
            else:
                x.zero_()


def _bulk(given: Mapping[str, Any], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors whose bytes count: the larger side of a collective."""
    for wide in ("output_tensor", "output_tensors", "output", "outputs"):
        if wide in given:
            sides: list[list[torch.Tensor]] = [[], []]
            tree_map_only(torch.Tensor, sides[0].append, given[wide])
            tree_map_only(torch.Tensor, sides[1].append, [v for k, v in given.items() if k.startswith("input")])
            return max(sides, key=lambda side: sum(x.numel() * x.itemsize for x in side))
    return tensors


def _with_tensors(result: Any, first: Any) -> Any:
    """What the operator returns, with the tensors it was given in the place of those that stood in."""
    if isinstance(result, tuple) and len(result) == 2:
        return first, result[1]
    return result

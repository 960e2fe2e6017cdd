"""Copies on the host that are made while others compute: what was given is what is there, whoever comes first."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_nanotron.checkpoint.directory import host_copies
from hf_nanotron.checkpoint.directory.host_copies import HostCopies, Source
from hf_nanotron.ops import host_region
from hf_nanotron.ops.host_region import HostRegion

CPU = torch.device("cpu")


def test_a_tensor_is_copied_before_it_is_written() -> None:
    """By the thread that is about to write it, if the one that writes the checkpoint has not come to it."""
    copies = HostCopies(CPU)
    copies.reserve(1 << 16)
    for value in (1.0, 2.0):  # the memory is used again
        weight, made = torch.full((100,), value), torch.full((7,), value)
        number, large = torch.tensor(value), torch.full((1 << 16,), value)
        copies.begin()
        given = [(weight, Source.KEPT), (made, Source.OWN), (number, Source.CHANGES), (large, Source.KEPT)]
        kept = copies.of(given)
        number.fill_(9.0)
        copies.hold()
        weight.fill_(9.0)
        large.fill_(9.0)
        late = threading.Thread(target=copies.complete)
        late.start()
        late.join()
        assert all(torch.equal(copy, torch.full_like(copy, value)) for copy in kept)
        assert kept[0].data_ptr() not in (weight.data_ptr(), large.data_ptr())
    copies.begin()
    (first,) = copies.of([(weight, Source.KEPT)])
    copies.begin()  # the save was broken off
    weight.fill_(3.0)
    (second,) = copies.of([(weight, Source.KEPT)])
    copies.complete()
    assert first.data_ptr() == second.data_ptr() and torch.equal(second, weight)
    copies.hold()  # nothing is left


def test_tensors_lie_side_by_side_in_a_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_region, "PIECE_BYTES", 4096)
    region = HostRegion(10_000, CPU)
    for _ in range(2):
        region.begin()
        shapes = [(torch.Size([3]), torch.bfloat16), (torch.Size([1500]), torch.float32), (torch.Size([]), torch.int64)]
        taken = []
        for shape, dtype in shapes:
            tensor = region.take(shape, dtype)
            assert tensor is not None and tensor.shape == shape and tensor.dtype == dtype and region.holds(tensor)
            region.copy(tensor, torch.full(shape, len(taken) + 1, dtype=dtype))  # over the ends of pieces
            taken.append(tensor)
        assert [tensor.unique().tolist() for tensor in taken] == [[1], [2], [3]]
        assert region.take(torch.Size([2000]), torch.float32) is None
    region.close()
    assert not region.holds(torch.zeros(3))


def test_memory_that_the_host_does_not_pin_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of locked memory, say: what came before stays pinned, until the region goes."""
    pinned: list[int] = []

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            assert size == 4096
            pinned.append(address)
            return 0 if len(pinned) < 3 else 2

        def cudaHostUnregister(self, address: int) -> None:
            pinned.remove(address)

    monkeypatch.setattr(host_region, "PIECE_BYTES", 4096)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    region = HostRegion(20_000, torch.device("cuda", 0))
    tensor = region.take(torch.Size([5000]), torch.float32)
    assert tensor is not None and len(pinned) == 3 and tensor.sum() == 0
    assert region.unpinned is not None and "returned 2 after 0.00 GiB" in region.unpinned
    region.close()
    assert len(pinned) == 1  # of the call that failed


# ---- streams of a device that does everything late ----


class Streams:
    """A device whose streams do what they were told in their own order, and otherwise at any time."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.told: list[deque[Callable[[], bool]]] = []
        self.now = self.stream()

    def stream(self, device: Any = None) -> Any:
        told: deque[Callable[[], bool]] = deque()
        self.told.append(told)
        stream = SimpleNamespace(told=told)
        stream.wait_event = lambda event: told.append(event.query)
        stream.wait_stream = lambda other: stream.wait_event(self.event(other))
        stream.synchronize = lambda: self.run_until(lambda: not told)
        return stream

    def event(self, stream: Any = None) -> Any:
        done: list[bool] = []
        event = SimpleNamespace(query=lambda: bool(done))
        event.record = lambda stream: stream.told.append(lambda: done.append(True) or True)
        event.synchronize = lambda: self.run_until(event.query)
        if stream is not None:
            event.record(stream)
        return event

    @contextlib.contextmanager
    def using(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before

    def tell(self, action: Callable[[], Any]) -> None:
        self.now.told.append(lambda: action() is not self)

    def run_until(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            told = self.chance.choice([told for told in self.told if told])
            if told[0]():
                told.popleft()


class OnDevice:
    """A tensor of that device: what it has is seen when a stream comes to the copy, and not when that is asked for."""

    device = torch.device("cuda", 0)

    def __init__(self, streams: Streams, values: torch.Tensor) -> None:
        self.values, self.streams = values.clone(), streams
        memory = self.values
        weakref.finalize(self, lambda: streams.tell(lambda: memory.fill_(-1.0)))  # somebody else gets the memory
        self.shape, self.dtype, self.nbytes = values.shape, values.dtype, values.nbytes
        self.data_ptr = self.values.data_ptr

    def detach(self) -> OnDevice:
        return self

    contiguous = detach


def copy_of(target: torch.Tensor, source: OnDevice, non_blocking: bool) -> None:
    assert non_blocking
    values = source.values
    source.streams.tell(lambda: target.view(-1).copy_(values.view(-1)))


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_written_before_a_late_device_has_copied_it(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Whatever the order in which two streams come to what they were told."""
    streams = Streams(seed)
    monkeypatch.setattr(torch.cuda, "Stream", streams.stream)
    monkeypatch.setattr(torch.cuda, "Event", streams.event)
    monkeypatch.setattr(torch.cuda, "stream", streams.using)
    asked = itertools.count()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: (next(asked), streams.now)[1])
    monkeypatch.setattr(host_copies, "MOST_WAITING", 4000)
    monkeypatch.setattr(HostCopies, "_copy", lambda self, target, source: copy_of(target, source, non_blocking=True))
    copies = HostCopies(torch.device("cuda", 0))
    for step in range(3):
        weights = [OnDevice(streams, torch.zeros(50)) for _ in range(8)]
        for number, weight in enumerate(weights):
            streams.tell(lambda weight=weight, value=10.0 * step + number: weight.values.fill_(value))
        copies.begin()
        before = next(asked)
        made = copies.of((OnDevice(streams, torch.full((100,), float(n))), Source.OWN) for n in range(30))
        batches = next(asked) - before - 1
        assert len(streams.told) == 2 and batches == 10, "what a batch has in common was done for each tensor"
        buffers = copies.of((weight, Source.CHANGES) for weight in weights[:2])
        for weight in weights[:2]:
            streams.tell(lambda weight=weight: weight.values.fill_(-2.0))
        kept = copies.of((weight, Source.KEPT) for weight in weights[2:5])
        copies.mark()
        rest = copies.of((weight, Source.KEPT) for weight in weights[5:])
        copies.hold(marked=True)
        for weight in weights[2:5]:
            streams.tell(lambda weight=weight: weight.values.fill_(-3.0))
        copies.hold()
        for weight in weights[5:]:
            streams.tell(lambda weight=weight: weight.values.fill_(-4.0))
        del weights, weight
        copies.complete()
        assert [copy.unique().tolist() for copy in made] == [[float(n)] for n in range(30)]
        found = [copy.unique().tolist() for copy in (*buffers, *kept, *rest)]
        assert found == [[10.0 * step + number] for number in range(8)]

"""Copies on the host that are made while others compute: what was given is what is there, whoever comes first."""

from __future__ import annotations

import threading

import pytest
import torch

from hf_nanotron.checkpoint.directory.host_copies import HostCopies
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
        kept = [copies.of(weight), copies.of(made, passes=True), copies.of(number, changes=True), copies.of(large)]
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
    first = copies.of(weight)
    copies.begin()  # the save was broken off
    weight.fill_(3.0)
    second = copies.of(weight)
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

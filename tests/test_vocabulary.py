"""A vocabulary that the tensor-parallel ranks do not divide: its slices, and how logits are joined."""

from __future__ import annotations

import pytest
import torch
from pool import WorkerPool

from hf_nanotron.parallel.config import ParallelConfig
from hf_nanotron.parallel.mesh import ParallelMesh
from hf_nanotron.parallel.vocabulary import TILE, gather_vocabulary, vocabulary_parts


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("size", [8, 9, 17, 65, 120, 121, 131, 513, 32_001, 50_257, 128_258, 151_669])
def test_slices(size: int, tp_size: int) -> None:
    parts = vocabulary_parts(size, tp_size)
    stops = [stop for ((_, stop),) in parts]
    assert [start for ((start, _),) in parts] == [0, *stops[:-1]] and stops[-1] == size
    lengths = [stop - start for ((start, stop),) in parts]
    assert min(lengths) > 0 and lengths[0] == max(lengths)
    if size % tp_size == 0:
        assert len(set(lengths)) == 1
    elif size >= TILE * tp_size:
        assert all(length % TILE == 0 for length in lengths[:-1]) and max(lengths) < size / tp_size + 2 * TILE
        assert max(lengths[:-1]) - min(lengths[:-1]) <= TILE


def test_fewer_ids_than_ranks() -> None:
    with pytest.raises(ValueError, match="a vocabulary of 3 cannot be cut over 4 ranks"):
        vocabulary_parts(3, 4)


def join(size: int, dtype: torch.dtype) -> None:
    """Logits and their gradient are those of a whole vocabulary."""
    mesh = ParallelMesh(ParallelConfig(tp_size=3))
    sizes = tuple(stop - start for ((start, stop),) in vocabulary_parts(size, 3))
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn((2, 5, size), generator=generator).to(dtype)
    factor = torch.randn((2, 5, size), generator=generator).to(dtype)
    own = whole.split(sizes, -1)[mesh.tp_rank].requires_grad_()
    joined = gather_vocabulary(own, mesh.tp, sizes)
    assert torch.equal(joined, whole)
    (joined * factor).sum().backward()
    assert torch.equal(own.grad, factor.split(sizes, -1)[mesh.tp_rank])
    with torch.no_grad():
        assert torch.equal(gather_vocabulary(own, mesh.tp, sizes), whole)
    mesh.close()


def joins() -> None:
    for size in (9, 10, 131):
        for dtype in (torch.float32, torch.bfloat16):
            join(size, dtype)


def test_logits_are_joined(pool: WorkerPool) -> None:
    pool.run(3, joins)

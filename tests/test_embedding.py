"""The embedding's gradient, row by row into fp32 memory, against plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_nanotron.ops.embedding import Embedding, add_rows


class Rows:
    """A gradient in memory of its own."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.total = torch.zeros_like(weight, dtype=torch.float32)

    def add_rows(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        add_rows(self.total, ids, rows)


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_that_of_stock(dtype: torch.dtype, padding: int | None) -> None:
    torch.manual_seed(0)
    stock = nn.Embedding(11, 8, padding_idx=padding, dtype=dtype)
    ours = nn.Embedding(11, 8, padding_idx=padding, dtype=dtype)
    ours.load_state_dict(stock.state_dict())
    ours.__class__ = Embedding
    ours.row_gradient = rows = Rows(ours.weight)
    exact = nn.Embedding(11, 8, padding_idx=padding, _weight=stock.weight.detach().float())
    for _ in range(2):  # gradients add up
        ids, factor = torch.randint(0, 11, (3, 40)), torch.randn(3, 40, 8).to(dtype)  # every id many times
        assert torch.equal(ours(ids), stock(ids))
        (ours(ids) * factor).sum().backward()
        (exact(ids) * factor.float()).sum().backward()
    assert ours.weight.grad is None and exact.weight.grad is not None
    torch.testing.assert_close(rows.total, exact.weight.grad, rtol=1e-6, atol=1e-6)  # also of bf16: nothing is rounded


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary"), [(1, 8, 4), (500, 700, 7), (4000, 2048, 40000), (999, 96, 1)]
)
def test_rows_on_a_gpu(tokens: int, width: int, vocabulary: int) -> None:
    """Also of one id thousands of times, and the same to the last bit in each run."""
    torch.manual_seed(0)
    ids, rows = torch.randint(0, vocabulary, (tokens,)), torch.randn(tokens, width).bfloat16()
    start = torch.randn(vocabulary, width)
    expected = start.double().index_put_((ids,), rows.double(), accumulate=True)
    totals = [start.cuda() for _ in range(2)]
    for total in totals:
        add_rows(total, ids.cuda(), rows.cuda())
    torch.testing.assert_close(totals[0].cpu().double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(*totals)


def test_without_memory_it_is_stock() -> None:
    embedding = nn.Embedding(5, 4)
    embedding.__class__ = Embedding
    embedding(torch.tensor([1, 1])).sum().backward()
    assert embedding.weight.grad is not None and embedding.weight.grad[1].eq(2).all()

"""Best-fit packing: every token once, whole documents, little waste, the same rows every time."""

from __future__ import annotations

import numpy as np
import pytest

from hf_nanotron.data.tokens.packing import PackedRows, pack, row_count


def check_rows(rows: PackedRows, edges: np.ndarray, capacity: int) -> None:
    sums = np.add.reduceat(rows.lengths, rows.first_piece[:-1])
    assert sums.max() <= capacity and rows.lengths.min() > 0
    order = np.argsort(rows.starts)
    starts, stops = rows.starts[order], (rows.starts + rows.lengths)[order]
    assert starts[0] == edges[0] and stops[-1] == edges[-1]
    np.testing.assert_array_equal(starts[1:], stops[:-1])  # every token once
    whole = np.isin(stops, edges)
    np.testing.assert_array_equal(rows.goes_on[order], ~whole)
    assert (rows.lengths[order][~whole] == capacity).all()  # a document is cut at full rows only
    assert np.isin(edges[:-1][np.diff(edges) > 0], starts).all()


@pytest.mark.parametrize("capacity", [1, 2, 7, 64, 1_000])
def test_all_tokens_once_and_whole_documents(capacity: int) -> None:
    rng = np.random.default_rng(capacity)
    for longest in (1, 3, capacity, 3 * capacity + 1):
        lengths = rng.integers(0, longest + 1, 300)
        lengths[0] = 2 * capacity  # ends with its second full row
        edges = 17 + np.concatenate([[0], np.cumsum(lengths)])
        rows = pack(edges, capacity)
        check_rows(rows, edges, capacity)
        assert len(rows) == row_count(lengths, capacity)
        again = pack(edges, capacity)
        np.testing.assert_array_equal(rows.starts, again.starts)


def test_equals_best_fit_decreasing_one_by_one() -> None:
    """Rows' contents, as multisets of lengths, are those of the textbook."""
    rng = np.random.default_rng(3)
    for _ in range(30):
        capacity = int(rng.integers(5, 60))
        lengths = rng.integers(1, capacity, 80)
        bins: list[list[int]] = []
        for length in sorted(lengths.tolist(), reverse=True):
            fitting = [b for b in bins if sum(b) + length <= capacity]
            if fitting:
                max(fitting, key=sum).append(length)
            else:
                bins.append([length])
        rows = pack(np.concatenate([[0], np.cumsum(lengths)]), capacity)
        assert len(rows) == len(bins)
        assert int(rows.lengths.sum()) == lengths.sum()


@pytest.mark.parametrize("capacity", [512, 2_048, 4_096, 8_192])
@pytest.mark.parametrize("median", [200, 600])
def test_waste_on_log_normal_lengths(capacity: int, median: int) -> None:
    lengths = np.maximum(np.random.default_rng(0).lognormal(np.log(median), 1.2, 2**16).astype(np.int64), 1)
    rows = row_count(lengths, capacity)
    assert 1 - lengths.sum() / (rows * capacity) <= 0.01

"""The deal of tokens to context-parallel ranks, and the kernel calls that follow from it."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch

from hf_nanotron.parallel.cp.calls import calls_of, needs_of
from hf_nanotron.parallel.cp.layout import Layout, filled_length, plan


def packing(generator: np.random.Generator, length: int, shortest: int, longest: int) -> list[int]:
    """Ends of documents, their lengths even on a logarithmic scale."""
    ends = [0]
    while ends[-1] < length:
        size = int(np.exp(generator.uniform(np.log(shortest), np.log(longest))))
        ends.append(min(length, ends[-1] + max(size, 1)))
    return ends[1:]


def bounds_of(rows: list[list[int]], length: int) -> list[int]:
    return [0, *(end + row * length for row, ends in enumerate(rows) for end in ends)]


def seen_by(bounds: list[int], window: int | None) -> np.ndarray:
    """The first key that each token sees, by counting."""
    first = np.concatenate([np.full(b - a, a) for a, b in itertools.pairwise(bounds)])
    place = np.arange(len(first))
    return first if window is None else np.maximum(first, place - window + 1)


def needed(tokens: np.ndarray, first: np.ndarray) -> set[int]:
    """The keys that `tokens` see."""
    return {key for token in tokens.tolist() for key in range(first[token], token + 1)}


def check(layout: Layout, bounds: list[int], windows: tuple[int | None, ...]) -> None:
    """Each token is on one rank; the work and the calls are those of a count by hand."""
    rows, length, size = layout.rows, layout.length, layout.size
    held = torch.stack([layout.tokens(rank) for rank in range(size)])  # [size, rows, length / size]
    for row in range(rows):
        assert held[:, row].flatten().sort().values.equal(torch.arange(length))
    whole = torch.arange(rows * length).view(rows, length)
    joined = torch.cat([whole.gather(1, each).flatten() for each in held])
    first, second = layout.places()
    assert joined.view(len(first), -1)[first].flatten().equal(whole.flatten())
    assert whole.view(len(second), -1)[second].flatten().equal(joined)
    firsts = {window: seen_by(bounds, window) for window in windows}
    keys = sum(np.arange(rows * length) - first + 1 for first in firsts.values())
    for rank in range(size):
        tokens = whole.gather(1, held[rank]).flatten().numpy()
        assert layout.work[rank] == keys[tokens].sum()
        for window, first_key in firsts.items():
            needs = needs_of(layout, rank, window)
            calls = calls_of(layout, needs)
            received = np.concatenate([np.arange(a, b) for a, b in needs.keys])
            assert (np.diff(received) > 0).all() and set(received) == needed(tokens, first_key)
            seen = np.full(len(tokens), -1)
            at, spans = 0, calls.spans.view(-1, 2).tolist()
            for documents, most_queries, most_keys, start, end, count in calls.calls.view(-1, 6).tolist():
                queries, bounds_of_keys = calls.bounds[:, at : at + documents + 1].tolist()
                local = np.concatenate([np.arange(a, b) for a, b in spans[:count]])
                at, spans = at + documents + 1, spans[count:]
                assert queries[-1] == len(local) and bounds_of_keys[-1] == end - start
                assert most_queries == np.diff(queries).max() and most_keys == np.diff(bounds_of_keys).max()
                for (a, b), (c, d) in zip(itertools.pairwise(queries), itertools.pairwise(bounds_of_keys), strict=True):
                    assert d - c >= b - a >= 0 and d > c
                    if a == b:
                        continue
                    # Bottom right: the last query is the last key.
                    document = received[start + c : start + d]
                    assert (np.diff(document) == 1).all()
                    assert (tokens[local[a:b]] == document[-(b - a) :]).all()
                    low = document[-(b - a) :] - (window or length) + 1
                    assert (seen[local[a:b]] == -1).all()
                    seen[local[a:b]] = np.maximum(document[0], low)
            assert at == calls.bounds.shape[1] and not spans
            assert (seen == first_key[tokens]).all()


def test_rows_without_documents_are_the_usual_deal() -> None:
    for rows, size in ((1, 4), (2, 2), (3, 8)):
        length = 16 * size
        layout = plan(bounds_of([[length]] * rows, length), rows, length, size)
        assert layout.imbalance == 1 and layout.chunk == 8
        for rank in range(size):
            assert (layout.held[rank] == [rank, 2 * size - 1 - rank]).all()
        check(layout, bounds_of([[length]] * rows, length), (None,))
        assert len(needs_of(layout, 0).calls) == 2  # also for several rows
        assert len(needs_of(layout, size - 1).calls) == 1  # its chunks are neighbours


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_small_rows_by_counting(size: int) -> None:
    generator = np.random.default_rng(size)
    length = filled_length(150, size)
    cases = [
        [list(range(1, length + 1))],  # documents of one token
        [[1, length]],
        [[length]],
        [packing(generator, length, 1, 20), packing(generator, length, 1, length)],
        [packing(generator, length, 1, length) for _ in range(3)],
    ]
    for rows in cases:
        bounds = bounds_of(rows, length)
        for windows in ((None,), (None, 5), (7,)):
            check(plan(bounds, len(rows), length, size, windows), bounds, windows)


def test_packings_are_balanced(pytestconfig: pytest.Config) -> None:
    """A thousand of them with `--full-matrix`."""
    generator = np.random.default_rng(0)
    worst, spent, calls = 1.0, 0.0, 0
    for index in range(1000 if pytestconfig.getoption("full_matrix") else 200):
        size = int(2 ** generator.integers(1, 5))
        length = filled_length(int(generator.integers(2**15, 2**18)), size)
        shortest, longest = ((1, length), (1024, 131072), (1, 2048), (length // 4, 2 * length))[index % 4]
        rows = [packing(generator, length, shortest, longest) for _ in range(1 + index % 2)]
        bounds = bounds_of(rows, length)
        windows = ((None,), (None, 4096), (1024,))[index % 3]
        begin = time.process_time()
        layout = plan(bounds, len(rows), length, size, windows)
        spent += time.process_time() - begin
        worst = max(worst, layout.imbalance)
        if index % 50 == 0:
            assert (
                plan(torch.tensor(bounds, dtype=torch.int32), len(rows), length, size, windows).ranks == layout.ranks
            ).all()
            calls = max(calls, *(len(needs_of(layout, rank).calls) for rank in range(size)))
    assert worst <= 1.08
    assert calls <= 8
    assert spent < 30  # a second or two


def test_chunks_are_no_smaller_than_the_step_needs() -> None:
    """Where attention is a small part of the work, its balance matters less."""
    length = 8192
    bounds = bounds_of([packing(np.random.default_rng(0), length, 16, 1024)], length)
    chunks = [plan(bounds, 1, length, 8, other_work=other).chunk for other in (0, 10**6)]
    assert chunks[0] < chunks[1] == length // 16


def test_filled_rows() -> None:
    assert filled_length(100, 4, most_pairs=1) == 104
    assert filled_length(100, 4, tp=2, most_pairs=1) == 104
    assert filled_length(100, 2, tp=3, most_pairs=1) == 108
    assert filled_length(128, 4) == 128
    length = filled_length(1001, 2, tp=4)
    assert length % 4 == 0
    bounds = [0, 1001, length]
    check(plan(bounds, 1, length, 2), bounds, (None,))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of 100 tokens cannot be cut into 2 \\* 8 .* fill them up to 112"):
        plan([0, 100], 1, 100, 8)
    for bounds in ([0, 50], [1, 64], [0, 128], [0]):
        with pytest.raises(ValueError, match="do not fill 1 rows of 64 tokens"):
            plan(bounds, 1, 64, 2)
    with pytest.raises(ValueError, match="do not fill 2 rows of 64 tokens"):
        plan([0, 60, 128], 2, 64, 2)
    for windows in ((0,), ()):
        with pytest.raises(ValueError, match="must be at least 1"):
            plan([0, 64], 1, 64, 2, windows=windows)
    with pytest.raises(ValueError, match="other_work=-1"):
        plan([0, 64], 1, 64, 2, other_work=-1)

"""The keyed permutation: a bijection for every length, another one for every key, the same in every release."""

from __future__ import annotations

import numpy as np
import pytest

from hf_nanotron.data.tokens.permutation import Permutation


@pytest.mark.parametrize("length", [*range(40), 63, 64, 65, 127, 128, 1_000, 4_096, 4_097, 99_991])
def test_bijection(length: int) -> None:
    for seed, epoch in [(0, 0), (0, 1), (7, 3)]:
        found = Permutation(length, seed, epoch)(np.arange(length))
        np.testing.assert_array_equal(np.sort(found), np.arange(length))


def test_any_place_without_the_others() -> None:
    permutation = Permutation(10_007, 5, 2)
    whole = permutation(np.arange(10_007))
    places = np.array([[10_006, 3], [3, 77]])
    np.testing.assert_array_equal(permutation(places), whole[places])
    assert permutation(np.array(12)) == whole[12]


def test_stable_values() -> None:
    """A checkpoint counts rows in this order: it must not change."""
    assert Permutation(10)(np.arange(10)).tolist() == [5, 2, 6, 3, 1, 7, 4, 0, 8, 9]
    assert Permutation(10**12, 42, 3)(np.array([0, 1, 2, 10**12 - 1])).tolist() == [
        931996257304,
        994995630510,
        459426704991,
        916499121555,
    ]


def test_orders_differ() -> None:
    """Of a random permutation, one place in n stays; neighbours' distances have no pattern."""
    length = 20_000
    orders = [Permutation(length, *key)(np.arange(length)) for key in [(0, 0), (0, 1), (1, 0), (0, 2)]]
    for number, order in enumerate(orders):
        others = [np.arange(length), *orders[:number]]
        assert max(int((order == other).sum()) for other in others) < 12
        correlation = np.corrcoef(order[:-1], order[1:])[0, 1]
        assert abs(correlation) < 0.03
        steps = np.diff(order)
        assert np.unique(steps).size > 0.6 * len(steps)
        first_half = (order[: length // 2] < length // 2).mean()
        assert abs(first_half - 0.5) < 0.02


@pytest.mark.parametrize("length", [4, 6])
def test_short_orders_are_not_all_alike(length: int) -> None:
    orders = {tuple(Permutation(length, 0, epoch)(np.arange(length))) for epoch in range(200)}
    assert len(orders) > 15


def test_refusals() -> None:
    with pytest.raises(IndexError, match=r"not in \[0, 5\)"):
        Permutation(5)(np.array([5]))
    with pytest.raises(IndexError):
        Permutation(5)(np.array([-1]))
    with pytest.raises(ValueError, match="must not be negative"):
        Permutation(5, -1)
    with pytest.raises(ValueError, match="cannot be permuted"):
        Permutation(2**63)

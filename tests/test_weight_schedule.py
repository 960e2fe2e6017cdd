"""Weights of a mixture that change within a run."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from test_mixture_of_sets import Numbers, by_the_rule, drawn

from hf_nanotron.data import Mixture
from hf_nanotron.data.tokens import blend

SETS = {"a": Numbers(10**6), "b": Numbers(10**6), "c": Numbers(10**6)}
WEIGHTS = ([0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.0, 0.4, 0.6])
STARTS = (0, 700, 1_500)


def scheduled(weights: Any = WEIGHTS, starts: Any = STARTS, **options: Any) -> Mixture:
    later = [{"start_samples": start, "weights": w} for start, w in zip(starts[1:], weights[1:], strict=True)]
    return Mixture(SETS, weights[0], schedule=later, **options)


def test_each_part_by_the_rule_from_its_start() -> None:
    sets, ordinals = scheduled().locate(range(2_500))
    counts = np.zeros(3, np.int64)
    for weights, start, stop in zip(WEIGHTS, STARTS, (700, 1_500, 2_500), strict=True):
        read = np.flatnonzero(weights)  # a set of weight 0 is not read
        own, before = by_the_rule(np.array(weights)[read], stop - start)
        own = read[own]
        np.testing.assert_array_equal(sets[start:stop], own)
        np.testing.assert_array_equal(ordinals[start:stop], before + counts[own])
        counts += np.bincount(own, minlength=3)
    assert list(scheduled().counts(2_500).values()) == counts.tolist()


@pytest.mark.parametrize("at", [0, 5, 699, 700, 701, 1_499, 1_500, 2_000])
@pytest.mark.parametrize("options", [{}, {"max_epochs": None}, {"max_epochs": 2, "when_exhausted": "redistribute"}])
def test_resumed_inside_before_and_after_a_change(at: int, options: dict[str, Any]) -> None:
    whole, resumed = scheduled(**options), scheduled(**options)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(at))))
    assert drawn(resumed, range(at, 2_500)) == drawn(whole, range(at, 2_500))
    assert resumed.state_dict(2_400) == whole.state_dict(2_400)


def test_parts_that_have_not_begun_may_change() -> None:
    whole = scheduled()
    edited = scheduled([*WEIGHTS[:2], [1, 1, 1]], (0, 700, 1_000))
    known = scheduled([*WEIGHTS[:2], [1, 1, 1]], (0, 700, 1_000))
    edited.load_state_dict(json.loads(json.dumps(whole.state_dict(900))))
    assert drawn(edited, range(900, 2_000)) == drawn(known, range(900, 2_000))


def test_ends_in_the_part_in_which_a_set_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend, "BLOCK", 16)
    sets = {"a": Numbers(50), "b": Numbers(400)}
    later = [{"start_samples": 40, "weights": [0.1, 0.9]}, {"start_samples": 100, "weights": [0.9, 0.1]}]
    mixture = Mixture(sets, [0.5, 0.5], schedule=later)
    assert 100 < len(mixture) <= 100 + 24 / 0.9 + 2 and mixture.counts(len(mixture))["a"] >= 48
    assert mixture.end(99) is None and mixture.end(200) == len(mixture)
    with pytest.raises(IndexError, match=r"the set 'a' \(50 rows\) has then been read 1 times"):
        mixture.locate([len(mixture)])
    early = Mixture(sets, [1, 0], schedule=[{"start_samples": 60, "weights": [0, 1]}])
    assert len(early) == 50, "the mixture ends before the other part begins"
    every = Mixture(sets, [0.5, 0.5], schedule=later, when_exhausted="redistribute")
    assert len(every) == 450 and sorted(drawn(every, range(450)))[50:] == [("b", n) for n in range(400)]


def test_tokens_and_the_first_part() -> None:
    class Tokens(Numbers):
        sequence_length = 8

    sets = {"a": Tokens(900), "b": Tokens(900)}
    mixture = Mixture(sets, schedule=[{"weights": [1, 1]}, {"start_tokens": 81, "weights": {"a": 1, "b": 3}}])
    assert [part.start for part in mixture.parts] == [0, 11]
    assert mixture.tokens(11) == {"a": 48, "b": 40}


def test_refusals() -> None:
    sets = {"a": Numbers(9), "b": Numbers(9)}
    for weights, schedule, match in [
        (None, [], r"a mixture needs weights of its sets \(a, b\), or a schedule"),
        (None, [{"start_samples": 5, "weights": [1, 1]}], "begins at sample 5: say the weights that hold before"),
        ([1, 1], [{"weights": [1, 1]}], "it needs `weights`, and `start_samples` or `start_tokens`"),
        ([1, 1], [{"start_samples": 5, "weights": [1, 1], "end": 3}], r"schedule\[0\] has \['end', 'start_samples'"),
        ([1, 1], [{"start_samples": 5, "start_tokens": 5, "weights": [1, 1]}], "start_samples` or"),
        ([1, 1], [{"start_samples": 0.5, "weights": [1, 1]}], "start_samples=0.5 must be a whole number"),
        ([1, 1], [{"start_tokens": 5, "weights": [1, 1]}], "start_tokens needs sets with a sequence_length"),
        ([1, 1], [{"start_samples": 5, "weights": [1]}], "1 weights do not cover 2 sets"),
        ([1, 1], [{"start_samples": n, "weights": [1, 2]} for n in (5, 5)], "the schedule must be in order"),
        ([1, 1], [0.5, 0.5], r"schedule\[0\]=0.5 must be a dict"),
    ]:
        with pytest.raises(ValueError, match=match):
            Mixture(sets, weights, schedule=schedule)  # type: ignore[arg-type]


def test_a_change_far_away_is_not_run_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a mixture lasts for a run is known from what each set has at most; near its end, by running through."""
    sets = {"a": Numbers(10**10), "b": Numbers(10**10)}
    far = [{"start_samples": 10**9, "weights": [1, 3]}, {"start_samples": 2 * 10**9, "weights": [1, 0]}]
    mixture = Mixture(sets, [3, 1], schedule=far)
    monkeypatch.setattr(blend.Blend, "_run", None)  # whoever runs through fails
    assert mixture.end(10**10) is None and mixture.end(3) is None
    with pytest.raises(TypeError):
        mixture.end(11 * 10**9)
    monkeypatch.undo()
    for ending in ("stop", "redistribute"):
        near = Mixture(
            {"a": Numbers(90), "b": Numbers(60)},
            [3, 1],
            schedule=[{"start_samples": 40, "weights": [1, 2]}],
            when_exhausted=ending,  # type: ignore[arg-type]
        )
        near.load_state_dict(near.state_dict(20))
        assert [near.end(samples) for samples in range(20, 200)] == [
            None if samples < len(near) else len(near) for samples in range(20, 200)
        ]

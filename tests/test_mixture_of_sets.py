"""Mixtures: Megatron's rule, the counts as state, epochs and ends, weights that change in the middle of a run."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from token_files import documents, flat, write_ds
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from hf_nanotron.data import Mixture, Stage, Stages, StreamMixture, TokenDataset, TokenStream, tokenize_corpus
from hf_nanotron.data.tokens import blend as blending
from hf_nanotron.data.tokens.blend import BLOCK, UNLIMITED, Blend, Point

LENGTH = 8


class Numbers:
    """A set whose rows are their own numbers."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, int]:
        return {"number": number}


def blend(weights: Any, **options: Any) -> Blend:
    weights = tuple(weights)
    unlimited = {"capacities": (UNLIMITED,) * len(weights), "redistribute": False, "begin": Point.start(len(weights))}
    return Blend(weights, **unlimited | options)


def by_the_rule(weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    weights, counts = weights / weights.sum(), np.zeros(len(weights), np.int64)
    sets, ordinals = [], []
    for number in range(size):
        k = int(np.argmax(weights * max(number, 1) - counts))
        sets.append(k)
        ordinals.append(counts[k])
        counts[k] += 1
    return np.array(sets), np.array(ordinals)


@pytest.mark.parametrize("count", [1, 2, 5, 17, 30])
def test_megatrons_rule(count: int) -> None:
    weights = np.random.default_rng(count).uniform(0.1, 9, count)
    size = 2 * BLOCK + 100
    sets, ordinals = blend(weights).locate(np.arange(size))
    expected = by_the_rule(weights, size)
    np.testing.assert_array_equal(sets, expected[0])
    np.testing.assert_array_equal(ordinals, expected[1])
    shares = np.bincount(sets, minlength=count) - weights / weights.sum() * size
    assert np.abs(shares).max() < 3


@pytest.mark.parametrize("count", [2, 5, 30])
def test_equal_to_megatrons_compiled_helper(count: int) -> None:
    helpers = pytest.importorskip("megatron.core.datasets.helpers_cpp", reason="megatron-core is not installed")
    raw = np.random.default_rng(count).uniform(0.1, 9, count)
    size = 20_000
    theirs = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(*theirs, raw / raw.sum(), count, size, False)
    ours = blend(raw).locate(np.arange(size))
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(ours[1], theirs[1])


def test_any_place_in_any_order() -> None:
    whole = blend([3, 1, 2]).locate(np.arange(3 * BLOCK))
    places = np.random.default_rng(0).permutation(3 * BLOCK)[:500]
    found = blend([3, 1, 2]).locate(places)
    np.testing.assert_array_equal(found[0], whole[0][places])
    np.testing.assert_array_equal(found[1], whole[1][places])


def test_a_long_run_keeps_few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BLOCK": 16, "KEPT_BLOCKS": 2, "KEPT_POINTS": 8}.items():
        monkeypatch.setattr(blending, name, value)
    sets = {name: Numbers(10**6) for name in "abc"}
    mixture, weights = Mixture(sets, [5, 3, 2]), np.array([5.0, 3.0, 2.0])
    expected, before = by_the_rule(weights / weights.sum(), 3_000)
    for first in range(0, 3_000, 8):
        np.testing.assert_array_equal(
            mixture.locate(range(first, first + 8)), [a[first : first + 8] for a in (expected, before)]
        )
        assert list(mixture.counts(first).values()) == np.bincount(expected[:first], minlength=3).tolist()
    points = mixture._blend._blends[0]._points
    assert max(points) == 188 and len(points) <= 8
    for sample in (2_999, 17, 1_600, 0, 900):  # in any order
        assert mixture.locate([sample])[0] == expected[sample]


@pytest.mark.parametrize("at", [0, 1, 999, BLOCK, BLOCK + 7])
def test_resumed_from_the_counts(at: int) -> None:
    weights = [5, 2, 2, 1]
    whole = blend(weights)
    point = whole.at(at)
    assert point.counts == tuple(np.bincount(whole.locate(np.arange(at))[0], minlength=4).tolist())
    rest = np.arange(at, at + 2_000)
    for ours, theirs in zip(blend(weights, begin=point).locate(rest), whole.locate(rest), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def drawn(mixture: Mixture, samples: range) -> list[tuple[str, int]]:
    sets, ordinals = mixture.locate(samples)
    return [(mixture.names[k], n) for k, n in zip(sets.tolist(), ordinals.tolist(), strict=True)]


def test_weights_and_sets_that_change_lose_and_repeat_nothing() -> None:
    """Ten runs of random legs: of each set, rows 0, 1, 2 ... come, each once, and each leg has its own shares."""
    rng = np.random.default_rng(0)
    sets = {name: Numbers(10**6) for name in "abcd"}
    for _ in range(10):
        state: Any = None
        seen: list[tuple[str, int]] = []
        for _ in range(5):
            names = ["a", *(name for name in "bcd" if rng.random() < 0.7)]
            weights = {name: float(rng.uniform(0.1, 1)) for name in names}
            mixture = Mixture({name: sets[name] for name in names}, weights)
            if state is not None:
                mixture.load_state_dict(json.loads(json.dumps(state)))
            begin = mixture.samples
            assert begin == len(seen)
            leg = int(rng.integers(1, 3_000))
            new = drawn(mixture, range(begin, begin + leg))
            for name in names:
                share = sum(other == name for other, _ in new) / leg
                assert abs(share - weights[name] / sum(weights.values())) <= 3 / leg
            seen += new
            state = mixture.state_dict(begin + leg)
        for name in "abcd":
            ordinals = [n for other, n in seen if other == name]
            assert ordinals == list(range(len(ordinals)))
            assert state["counts"].get(name, 0) == len(ordinals)


@pytest.mark.parametrize("at", [1, 10, 433, 5_000])
def test_resumed_with_the_same_weights_as_if_it_had_not_stopped(at: int) -> None:
    sets = {name: Numbers(size) for name, size in {"a": 50, "b": 900, "c": 10_000}.items()}
    options: dict[str, Any] = {"weights": [0.5, 0.3, 0.2], "max_epochs": 3, "when_exhausted": "redistribute"}
    whole, resumed = Mixture(sets, **options), Mixture(sets, **options)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(at))))
    assert len(resumed) == len(whole) == 3 * (50 + 900 + 10_000)
    assert drawn(resumed, range(at, at + 9_000)) == drawn(whole, range(at, at + 9_000))
    again = Mixture(sets, **options)
    again.load_state_dict(resumed.state_dict(at + 9_000))
    assert drawn(again, range(at + 9_000, at + 9_500)) == drawn(whole, range(at + 9_000, at + 9_500))


def test_redistributed() -> None:
    """Each set gives all of its epochs, and the others keep their proportion among themselves."""
    sizes = {"a": 100, "b": 3_000, "c": 9_000}
    mixture = Mixture(
        {n: Numbers(s) for n, s in sizes.items()},
        [0.5, 0.25, 0.25],
        max_epochs={"a": 2, "b": 1, "c": 1},
        when_exhausted="redistribute",
    )
    order = drawn(mixture, range(len(mixture)))
    assert sorted(order) == sorted((name, n) for name, size in sizes.items() for n in range(size * (1 + (name == "a"))))
    names = [name for name, _ in order]
    assert abs(names[:300].count("a") - 150) <= 1
    dry = max(i for i, name in enumerate(names) if name == "a")
    assert 398 <= dry <= 402
    assert abs(names[dry + 1 : dry + 1001].count("b") - 500) <= 2
    with pytest.raises(IndexError, match="all of its sets have been read max_epochs times"):
        mixture.locate([len(mixture)])


def test_stops_before_a_set_repeats_more() -> None:
    for weights in ([0.5, 0.5], [0.999, 0.001], [1 / 3, 2 / 3], [0.1, 0.9]):
        mixture = Mixture({"a": Numbers(100), "b": Numbers(333)}, weights, max_epochs=2)
        counts = mixture.counts(len(mixture))
        assert counts["a"] <= 200 and counts["b"] <= 666
        assert 200 - counts["a"] <= 2 or 666 - counts["b"] <= 2
        with pytest.raises(
            IndexError, match=r"the set '[ab]' \(\d+ rows\) has then been read 2 times; raise max_epochs"
        ):
            mixture.locate([len(mixture)])


def test_no_end() -> None:
    mixture = Mixture({"a": Numbers(3), "b": Numbers(5)}, [1, 1], max_epochs=None)
    with pytest.raises(TypeError, match="has no end"):
        len(mixture)
    assert mixture.epochs(1_000)["a"] == pytest.approx(500 / 3, abs=1)


@pytest.mark.parametrize("weight", [1e-300, 1e-320])
@pytest.mark.parametrize("ending", ["stop", "redistribute"])
def test_a_set_of_next_to_no_weight(weight: float, ending: Any) -> None:
    mixture = Mixture({"a": Numbers(5), "b": Numbers(4)}, [weight, 1], when_exhausted=ending)
    assert len(mixture) == (4 if ending == "stop" else 9)
    endless = Mixture({"a": Numbers(5), "b": Numbers(4)}, [weight, 1], max_epochs={"a": 1, "b": None})
    assert len(endless) > 2**61
    assert endless.counts(1000)["a"] <= 1


def test_a_set_of_weight_zero_is_not_read() -> None:
    mixture = Mixture({"a": Numbers(3), "b": Numbers(500)}, [0, 1])
    assert mixture.counts(len(mixture)) == {"a": 0, "b": 500}


def test_each_epoch_of_a_set_has_its_own_order() -> None:
    mixture = Mixture({"a": Numbers(50), "b": Numbers(50)}, [1, 1], max_epochs=2)
    rows = [mixture[n] for n in range(len(mixture))]
    for domain in (0, 1):
        numbers = [row["number"] for row in rows if row["domain"] == domain]
        first, second = numbers[:50], numbers[50:]
        assert sorted(first) == list(range(50)) != first
        assert first[: len(second)] != second and len(set(second)) == len(second)
    other = Mixture({"b": Numbers(50), "c": Numbers(9)}, [1, 1])  # a set's order does not depend on the others
    assert [r["number"] for r in map(other.__getitem__, range(10)) if r["domain"] == 0] == [
        r["number"] for r in rows if r["domain"] == 1
    ][:5]


def token_sets(folder: Path, **options: Any) -> dict[str, TokenDataset]:
    for number, name in enumerate(["web", "code"]):
        (folder / name).mkdir(exist_ok=True)
        write_ds(folder / name / "a.ds", documents(60 + 30 * number, seed=number))
    handling = {"web": "mask", "code": "cross"}
    return {n: TokenDataset(folder / n, LENGTH, token_size=2, documents=h, **options) for n, h in handling.items()}  # type: ignore[arg-type]


def test_rows_of_token_sets(tmp_path: Path) -> None:
    sets = token_sets(tmp_path)
    mixture = Mixture(sets, {"code": 1, "web": 3}, max_epochs=3)
    places = np.arange(len(mixture))
    rows = mixture.rows(places)
    which, ordinals = mixture.locate(places)
    np.testing.assert_array_equal(rows["domain"], which)
    for place in (0, 5, len(mixture) - 1):
        name = mixture.names[which[place]]
        epoch, row = divmod(int(ordinals[place]), len(sets[name]))
        for column, expected in sets[name].rows([row], epoch).items():
            np.testing.assert_array_equal(rows[column][place], expected[0])
        assert all(torch.equal(mixture[place][column], torch.from_numpy(rows[column])[place]) for column in rows)
    code = rows["position_ids"][rows["domain"] == mixture.names.index("code")]
    assert (code == np.arange(LENGTH)).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_through_a_loader(tmp_path: Path, workers: int) -> None:
    mixture = Mixture(token_sets(tmp_path), [1, 2])
    rows = mixture.rows(np.arange(len(mixture)))
    batches = list(DataLoader(mixture, batch_size=5, num_workers=workers))
    for name, column in rows.items():
        np.testing.assert_array_equal(torch.cat([batch[name] for batch in batches]).numpy(), column)


def test_iteration_counts_and_resumes(tmp_path: Path) -> None:
    mixture, other = (Mixture(token_sets(tmp_path), [1, 2]) for _ in range(2))
    rows = iter(mixture)
    for _ in range(7):
        next(rows)
    assert sum(mixture.counts().values()) == mixture.samples == 7
    other.load_state_dict(mixture.state_dict())
    assert torch.equal(next(iter(other))["input_ids"], next(rows)["input_ids"])
    with pytest.raises(IndexError, match="sample 3 comes before sample 7"):
        other.locate([3])


def test_pickled() -> None:
    mixture = Mixture({"a": Numbers(10**9), "b": Numbers(10**9)}, [1, 2])
    mixture.locate(np.arange(50_000))
    data = pickle.dumps(mixture)
    assert len(data) < 2_000
    assert drawn(pickle.loads(data), range(500)) == drawn(mixture, range(500))


def test_refusals(tmp_path: Path) -> None:
    two = {"a": Numbers(3), "b": Numbers(5)}
    for weights, match in [
        ([0.5, -0.1], "the weight -0.1 of the set 'b' cannot be"),
        ([float("nan"), 1], "the weight nan of the set 'a'"),
        ([float("inf"), 1], "the weight inf of the set 'a'"),
        ({"a": 0.5, "b": "x"}, "the weight 'x' of the set 'b' is no number"),
        ([0, 0], r"the weights \[0.0, 0.0\] sum to 0.0"),
        ([1], r"1 weights do not cover 2 sets \(a, b\)"),
        ({"a": 1}, "'b' has none"),
        ({"a": 1, "b": 1, "c": 1}, "'c' is no set"),
    ]:
        with pytest.raises(ValueError, match=match):
            Mixture(two, weights)
    with pytest.raises(ValueError, match="the name 0 of a set must be text"):
        Mixture({0: Numbers(3), 1: Numbers(5)}, [1, 1])  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="a mixture needs a set"):
        Mixture({}, [])
    with pytest.raises(ValueError, match="the set 'b' has no rows"):
        Mixture({"a": Numbers(3), "b": Numbers(0)}, [1, 1])
    with pytest.raises(ValueError, match="max_epochs=0 of the set 'a'"):
        Mixture(two, [1, 1], max_epochs=0)
    with pytest.raises(ValueError, match="max_epochs names"):
        Mixture(two, [1, 1], max_epochs={"a": 1})
    with pytest.raises(ValueError, match="when_exhausted='end' is not one of"):
        Mixture(two, [1, 1], when_exhausted="end")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no state of a mixture"):
        Mixture(two, [1, 1]).load_state_dict({"samples": 3})
    docs = documents(60)
    for name, tokenizer in (("a", "gpt2"), ("b", "llama")):
        write_ds(tmp_path / f"{name}.ds", docs, metadata=f"{tokenizer}|2\n{len(flat(docs))}\n")
    sets = {name: TokenDataset(tmp_path / f"{name}.ds", LENGTH) for name in "ab"}
    with pytest.raises(
        ValueError, match=r"the set 'b' has another tokenizer than 'a' \('llama', and that is 'gpt2'; by"
    ):
        Mixture(sets, [1, 1])
    sets = {name: TokenDataset(tmp_path / "a.ds", length) for name, length in (("a", 8), ("b", 16))}
    with pytest.raises(ValueError, match="the set 'b' has rows of another length"):
        Mixture(sets, [1, 1])


def a_tokenizer(words: str, name: str, template: str | None = None) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<eos>", *words.split()])}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", chat_template=template)
    made.name_or_path = name
    return made


def test_tokenizers_are_compared_by_their_vocabularies(tmp_path: Path) -> None:
    """Two of one name may differ, and one may have two names; where no plan tells, the name decides."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a b a b c a"}\n' * 4)
    written = {
        "x": a_tokenizer("a b c", "one"),
        "elsewhere": a_tokenizer("a b c", "two", template="{{ messages }}"),
        "changed": a_tokenizer("b a c", "one"),
    }
    for folder, tokenizer in written.items():
        tokenize_corpus(str(texts), tmp_path / folder, tokenizer, progress=False)
    sets = {folder: TokenDataset(tmp_path / folder, 4) for folder in written}
    assert Mixture({n: sets[n] for n in ("x", "elsewhere")}, [1, 1]).vocabulary == sets["x"].vocabulary is not None
    differs = r"has another tokenizer than 'x' \(both are named 'one', and their vocabularies differ\); a {} has one"
    pair = {n: sets[n] for n in ("x", "changed")}
    with pytest.raises(ValueError, match="the set 'changed' " + differs.format("mixture")):
        Mixture(pair, [1, 1])
    with pytest.raises(ValueError, match="the set 'of stage 1' .*one.*; a run has one"):
        Stages([Stage(pair["x"]), Stage(pair["changed"], start_step=2)])
    with pytest.raises(ValueError, match=r"changed/.* was written with another tokenizer than .*; one set has one"):
        TokenDataset([tmp_path / "x", tmp_path / "changed"], 4)
    TokenDataset([tmp_path / "x", tmp_path / "elsewhere"], 4)

    shutil.rmtree(tmp_path / "changed" / ".tokenize")  # as of a plain copy of the files, or those of datatrove
    shutil.rmtree(tmp_path / "elsewhere" / ".tokenize")
    alone = {folder: TokenDataset(tmp_path / folder, 4) for folder in written}
    assert alone["changed"].vocabulary is None
    Mixture({n: alone[n] for n in ("x", "changed")}, [1, 1])
    with pytest.raises(ValueError, match=r"\('two', and that is 'one'; by their names, as no plan beside both tells"):
        Mixture({n: alone[n] for n in ("x", "elsewhere")}, [1, 1])

    stock = IterableDataset.from_generator(lambda: iter([{"text": "a b"}]))
    streams = {name: TokenStream(stock, 4, tokenizer=tokenizer, lanes=1) for name, tokenizer in written.items()}
    StreamMixture({n: streams[n] for n in ("x", "elsewhere")}, [1, 1])
    with pytest.raises(ValueError, match="the set 'changed' " + differs.format("mixture")):
        StreamMixture({n: streams[n] for n in ("x", "changed")}, [1, 1])


def test_the_processing_class_is_compared_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from hf_nanotron.training.data_fit import _compare_tokenizers

    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a b a b c a"}\n' * 4)
    tokenize_corpus(str(texts), tmp_path / "x", a_tokenizer("a b c", "one"), progress=False)
    written = TokenDataset(tmp_path / "x", 4)
    _compare_tokenizers(written, a_tokenizer("a b c", "two"), "training")
    _compare_tokenizers(Stages([Stage(written)]), a_tokenizer("a b c", "two"), "training")
    assert not caplog.records
    _compare_tokenizers(written, a_tokenizer("b a c", "one"), "training")
    assert "written with the tokenizer 'one', and the processing_class ('one') has another vocabulary" in caplog.text

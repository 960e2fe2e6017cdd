"""Streams of tokens: their rows against plain loops, and the same order at any sizes, before and after a kill."""

from __future__ import annotations

import itertools
import json
import logging
import pickle
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import IterableDataset, concatenate_datasets, interleave_datasets, load_dataset
from tiny import VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_nanotron.data import Mixture, StreamMixture, TokenStream
from hf_nanotron.data.dealing import Position
from hf_nanotron.data.fingerprint import fingerprint, row_hashes
from hf_nanotron.data.loader import build_loader
from hf_nanotron.data.ordered import stack
from hf_nanotron.data.streaming.lane_loader import LaneShare, build_lane_loader
from hf_nanotron.data.streaming.lane_stream import joined
from hf_nanotron.data.streaming.sources import source_of
from hf_nanotron.data.tokens.packing import pack
from hf_nanotron.data.tokens.permutation import Permutation

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
END, LENGTH, SEED, BUFFER = 2, 8, 5, 4
Documents = list[list[int]]


def write_shards(folder: Path, shards: int = 6, kind: str = "json") -> tuple[list[Documents], Any]:
    """Documents by shard, with ids from 3 on and the end that the stream adds; and the dataset of their texts."""
    draw = random.Random(shards)
    found: list[Documents] = []
    files = []
    for number in range(shards):
        documents = [
            [*(draw.randrange(3, VOCABULARY) for _ in range(draw.choice((1, 3, 5, 7, 12, 30)))), END]
            for _ in range(7 + number % 4)
        ]
        texts = [" ".join(f"w{token}" for token in document[:-1]) for document in documents]
        file = folder / f"{number}.{kind}"
        files.append(str(file))
        if kind == "parquet":
            from datasets import Dataset

            Dataset.from_dict({"text": texts}).to_parquet(file, batch_size=3)
        else:
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        found.append(documents)
    return found, load_dataset(kind, data_files=files, split="train", streaming=True)


def words(**kwargs: Any) -> PreTrainedTokenizerFast:
    names = ["<pad>", "<unk>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, **{"eos_token": "</s>", **kwargs})


def stream_of(dataset: Any, **kwargs: Any) -> TokenStream:
    return TokenStream(
        dataset, LENGTH, **{"tokenizer": words(), "seed": SEED, "shuffle_buffer": BUFFER, "documents": "mask", **kwargs}
    )


# ---- the reference: plain loops ----


def buffers(shards: list[Documents], lane: int, lanes: int, epochs: int) -> Iterator[tuple[Documents, int, int]]:
    """Shards are dealt to the lanes in turn, epoch after epoch; of fewer shards than lanes, parts."""
    parts = 1 if lanes <= len(shards) else 2 if lanes <= 2 * len(shards) else lanes
    pieces = [shard[part::parts] for part in range(parts) for shard in shards]
    sequence = [
        (epoch, pieces[place])
        for epoch in range(epochs)
        for place in Permutation(len(pieces), SEED, epoch)(np.arange(len(pieces)))
    ]
    documents = [(epoch, document) for epoch, piece in sequence[lane::lanes] for document in piece]
    for number, first in enumerate(range(0, len(documents), BUFFER)):
        part = documents[first : first + BUFFER]
        epoch, key = part[0][0], (number + 1) * lanes + lane
        yield [part[place][1] for place in Permutation(len(part), SEED, epoch, key)(np.arange(len(part)))], epoch, key


Row = dict[str, list[int]]


def cut_rows(shards: list[Documents], lane: int, lanes: int, masked: bool, epochs: int) -> Iterator[Row]:
    tokens = [(t, at) for part, *_ in buffers(shards, lane, lanes, epochs) for d in part for at, t in enumerate(d)]
    for first in range(0, len(tokens) - LENGTH + 1, LENGTH):
        row: Row = {"input_ids": [], "labels": [], "shift_labels": [], "position_ids": []}
        position = 0
        for place in range(first, first + LENGTH):
            token, at = tokens[place]
            position = 0 if at == 0 or place == first else position + 1
            following = tokens[place + 1] if place + 1 < len(tokens) else (0, 0)
            is_last = place + 1 == len(tokens) or (masked and following[1] == 0)
            row["input_ids"].append(token)
            row["labels"].append(-100 if masked and at == 0 else token)
            row["shift_labels"].append(-100 if is_last else following[0])
            row["position_ids"].append(position)
        if not masked:
            del row["position_ids"]
        yield row


def packed_rows(shards: list[Documents], lane: int, lanes: int, epochs: int) -> Iterator[Row]:
    for part, epoch, key in buffers(shards, lane, lanes, epochs):
        starts = np.cumsum([0, *map(len, part)])
        tokens = [token for document in part for token in document]
        packed = pack(starts, LENGTH)
        for number in Permutation(len(packed), SEED, epoch, key)(np.arange(len(packed))).tolist():
            row: Row = {"input_ids": [], "labels": [], "shift_labels": [], "position_ids": []}
            for start, size, goes_on in packed.row(number):
                ids = tokens[start : start + size]
                row["labels"] += [-100 if row["input_ids"] else ids[0], *ids[1:]]
                row["input_ids"] += ids
                row["shift_labels"] += [*ids[1:], tokens[start + size] if goes_on else -100]
                row["position_ids"] += range(size)
            left = LENGTH - len(row["input_ids"])
            row["input_ids"] += [0] * left
            row["labels"] += [-100] * left
            row["shift_labels"] += [-100] * left
            row["position_ids"] += range(left)
            yield row


def reference(
    shards: list[Documents], lanes: int, handling: str = "mask", epochs: int = 8, ends: bool = False
) -> list[Row]:
    """Rows of a stream in order, to its end; or without the last buffers, which would be longer in one without end."""
    each = [
        list(
            packed_rows(shards, lane, lanes, epochs)
            if handling == "pack"
            else cut_rows(shards, lane, lanes, handling == "mask", epochs)
        )
        for lane in range(lanes)
    ]
    if not ends:
        most = BUFFER * 31 // LENGTH + 1
        return [row for group in zip(*(rows[:-most] for rows in each), strict=False) for row in group]
    return [row for group in itertools.zip_longest(*each) for row in group if row is not None]


def plain(row: Any) -> Row:
    return {name: column.tolist() for name, column in row.items()}


@pytest.mark.parametrize("handling", ["cross", "mask", "pack"])
@pytest.mark.parametrize("lanes", [6, 2, 4, 9])
def test_rows_are_those_of_a_plain_loop(tmp_path: Path, handling: Any, lanes: int) -> None:
    """Of lanes with as many shards, with several, with unequal numbers, and with fewer than one."""
    shards, dataset = write_shards(tmp_path, kind="parquet" if lanes == 2 else "json")
    expected = reference(shards, lanes, handling)
    found = itertools.islice(stream_of(dataset, lanes=lanes, documents=handling), len(expected))
    assert [plain(row) for row in found] == expected and len(expected) > 60
    ends = stream_of(dataset, lanes=lanes, documents=handling, epochs=2)
    expected = reference(shards, lanes, handling, epochs=2, ends=True)
    assert [plain(row) for row in ends] == expected
    if handling == "pack":  # every document, whole if it fits a row
        pieces: Counter[tuple[int, ...]] = Counter()
        for row in expected:
            starts = [at for at, position in enumerate(row["position_ids"]) if position == 0]
            pieces.update(tuple(row["input_ids"][a:b]) for a, b in zip(starts, [*starts[1:], LENGTH], strict=True))
        for document in (document for shard in shards for document in shard if len(document) <= LENGTH):
            assert pieces[tuple(document)] >= 2, "once in each epoch"


# ---- ranks and workers ----


class Opened:
    """A source that writes down which shards are read, and how far."""

    def __init__(self, source: Any) -> None:
        self.source, self.shards, self.columns = source, getattr(source, "shards", 0), None
        self.examples = Counter[int]()

    def open(self, shard: int, state: Any = None) -> Any:
        reader, counts = self.source.open(shard, state), self.examples

        class Reader:
            state = staticmethod(reader.state)

            def __next__(self) -> Any:
                counts[shard] += 1
                return next(reader)

        return Reader()


def read(
    stream: Any, ranks: int, batch: int, rounds: int, workers: int = 0, start: Position | None = None
) -> tuple[list[Row], Position, list[Counter[int]]]:
    """What all ranks read, in the order of one process; where they are then; the examples that each has read."""
    by_rank, ends, opened, whole = [], [], [], getattr(stream, "source", None)
    for rank in range(ranks):
        stream.source = Opened(whole)
        loader = build_lane_loader(stream, stack, batch, rank, ranks, True, num_workers=workers)
        if start is not None:
            loader.start_at(start)
        batches = list(itertools.islice(loader, rounds))
        assert not loader.is_finished and loader.rounds == rounds
        by_rank.append([{k: v[n].tolist() for k, v in b.items()} for b in batches for n in range(batch)])
        ends.append(loader.position)
        opened.append(stream.source.examples)
        stream.source = whole
    assert len({end.samples for end in ends}) == 1
    rows = [row for group in zip(*by_rank, strict=True) for row in group]
    return rows, Position(ends[0].samples, json.loads(json.dumps(joined([end.state for end in ends])))), opened


@pytest.mark.parametrize("handling", ["mask", "pack"])
def test_the_order_depends_on_no_size(tmp_path: Path, handling: Any) -> None:
    shards, dataset = write_shards(tmp_path)
    assert stream_of(dataset).lanes == 4, "a power of two"
    stream = stream_of(dataset, documents=handling, lanes=6)
    expected = reference(shards, 6, handling)
    for ranks, batch in itertools.product((1, 2, 3, 4), (1, 2)):
        rounds = 24 // (ranks * batch)
        rows, end, _ = read(stream, ranks, batch, rounds)
        assert rows == expected[:24] and end.samples == 24, (ranks, batch)
    stream = pickle.loads(pickle.dumps(stream))  # as workers get it that are not forked
    for ranks, workers in ((1, 2), (2, 3), (1, 4)):
        assert read(stream, ranks, 2, 4, workers)[0] == expected[: 8 * ranks], (ranks, workers)


def test_each_rank_reads_its_share(tmp_path: Path) -> None:
    """All ranks together read each document once; ranks that share a lane each read all of it."""
    _, dataset = write_shards(tmp_path)
    stream = stream_of(dataset, lanes=6)
    alone = sum(read(stream, 1, 1, 60)[2], Counter())
    apart = read(stream, 6, 1, 2)[2]
    assert [len(counts) for counts in apart] == [1] * 6 and len(sum(apart, Counter())) == 6, "each has a shard"
    assert sum(read(stream, 3, 2, 10)[2], Counter()) == alone
    assert sum(read(stream, 6, 1, 10)[2], Counter()) == alone
    shared = sum(read(stream, 4, 1, 15)[2], Counter())
    assert shared.total() > 1.7 * alone.total()
    said = str(LaneShare(6, 4))
    assert "reads 3 of 6 lanes and trains on one in 2 of their rows" in said and "(4) divides" in said
    assert str(LaneShare(6, 3)) == "each data-parallel rank reads 2 of 6 lanes"
    assert [LaneShare(8, 2).workers(n) for n in (0, 1, 2, 3, 4, 9)] == [0, 1, 2, 2, 4, 4]


def test_a_buffer_that_takes_many_epochs_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Few documents, many lanes: the set is read again and again before the first row."""
    _, dataset = write_shards(tmp_path, 1)
    logger = logging.getLogger("hf_nanotron.data.streaming.documents")
    logger.addHandler(caplog.handler)
    try:
        next(iter(stream_of(dataset, lanes=4, shuffle_buffer=3)))
        assert not caplog.messages
        next(iter(stream_of(dataset, lanes=4, shuffle_buffer=41)))
    finally:
        logger.removeHandler(caplog.handler)
    (said,) = set(caplog.messages)
    assert said.startswith("With lanes=4 and shuffle_buffer=41 a lane of this stream reads its data set 10 times")


def test_one_shard_and_many_ranks(tmp_path: Path) -> None:
    shards, dataset = write_shards(tmp_path, shards=1)
    for lanes in (1, 4):
        stream = stream_of(dataset, lanes=lanes)
        expected = reference(shards, lanes, epochs=40)
        rows, _, opened = read(stream, 4, 1, 5)
        assert rows == expected[:20] and stream.lanes == lanes
        assert all(set(counts) == {0} for counts in opened)


def test_a_killed_run_goes_on_at_other_sizes(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    shards, dataset = write_shards(tmp_path)
    draw = random.Random(3)
    references = {
        (handling, lanes): reference(shards, lanes, handling, epochs=16)
        for handling in ("cross", "mask", "pack")
        for lanes in (6, 4, 9)
    }
    for attempt in range(400 if pytestconfig.getoption("full_matrix") else 12):
        handling, lanes = draw.choice(list(references))
        expected, start, rows = references[handling, lanes], None, []
        for _ in range(3):  # killed twice
            stream = stream_of(dataset, documents=handling, lanes=lanes)
            ranks, batch = draw.choice((1, 2, 3, 4)), draw.choice((1, 2, 3))
            workers = draw.choice((1, 2, 3)) if attempt % 12 == 0 else 0
            found, start, _ = read(stream, ranks, batch, draw.randrange(1, 5), workers, start)
            rows += found
        assert rows == expected[: len(rows)], (attempt, handling, lanes)
        assert len(json.dumps(start.state)) < 600 * lanes


def test_a_stream_with_an_end_resumes(tmp_path: Path) -> None:
    shards, dataset = write_shards(tmp_path)
    expected = reference(shards, 4, ends=True, epochs=1)
    for kill in (1, 7, len(expected) - 2):
        stream, rows, position = stream_of(dataset, lanes=4, epochs=1), [], None
        for dp, start, stop in ((2, 0, kill), (3, kill, None)):
            loader = build_loader(stream, None, stack, 1, 0, 1, False, 0, True, num_workers=dp - 2)
            if position is not None:
                loader.start_at(position)
            batches = list(itertools.islice(loader, None if stop is None else stop - start))
            rows += [{k: v[0].tolist() for k, v in batch.items()} for batch in batches]
            position = Position(loader.position.samples, json.loads(json.dumps(loader.position.state)))
        assert rows == expected, kill
    # As a torch dataset of its own, for stock Trainer.
    stream = stream_of(dataset, lanes=4, epochs=1)
    reading = iter(stream)
    first = [plain(next(reading)) for _ in range(5)]
    other = stream_of(dataset, lanes=4, epochs=1)
    other.load_state_dict(stream.state_dict())
    assert first + [plain(row) for row in other] == expected
    split = [
        plain(row) for row in torch.utils.data.DataLoader(stream_of(dataset, lanes=4, epochs=1), None, num_workers=2)
    ]
    assert split == expected, "workers of torch's own loader divide it"


# ---- sources ----


def double(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {"text": [text for text in rows["text"] for _ in range(2)]}


def test_a_shard_goes_on_behind_any_example(tmp_path: Path) -> None:
    """Of files of several tables, and through what `datasets` lays over them."""
    from datasets import Dataset

    texts = [f"w{number}" for number in range(300)]
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "0.parquet", batch_size=37)
    (tmp_path / "0.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    parquet = load_dataset("parquet", data_files=str(tmp_path / "0.parquet"), split="train", streaming=True)
    lines = load_dataset("json", data_files=str(tmp_path / "0.jsonl"), split="train", streaming=True, chunksize=700)
    memory = Dataset.from_dict({"text": texts}).to_iterable_dataset()
    generated = IterableDataset.from_generator(lambda: iter([{"text": text} for text in texts]))
    for number, dataset in enumerate(
        (
            parquet,
            lines,
            memory,
            generated,
            parquet.map(lambda row: {"text": row["text"] + "!"}),
            lines.filter(lambda row: not row["text"].endswith("7")),
            lines.map(double, batched=True, batch_size=9),
            concatenate_datasets([parquet, memory.skip(250)]),
            interleave_datasets([generated, memory], [0.3, 0.7], seed=1),
            parquet.with_format("torch"),
            parquet.select_columns(["text"]),
        )
    ):
        expected = [row["text"] for row in dataset]
        source = source_of(dataset)
        reader = source.open(0)
        for place in range(len(expected) + 1):
            if place % 23 == 0 or place in (63, 64, 65, 128, len(expected)):
                state = json.loads(json.dumps(reader.state()))
                rest = source.open(0, state)
                assert [row["text"] for row in iter(rest.__next__, None)] == expected[place:], (number, place)
            if place < len(expected):
                assert next(reader)["text"] == expected[place]
        assert len(json.dumps(state)) < 1500


class Lines:
    """Documents of a user's own, with a state or without."""

    def __init__(self, documents: Documents) -> None:
        self.documents = documents

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for document in self.documents:
            yield {"input_ids": document}


class StatefulLines(Lines):
    def __init__(self, documents: Documents) -> None:
        super().__init__(documents)
        self.state = {"next": 0}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.state["next"] < len(self.documents):
            self.state["next"] += 1
            yield {"input_ids": self.documents[self.state["next"] - 1]}
        self.state = {"next": 0}

    def state_dict(self) -> dict[str, int]:
        return self.state  # which changes

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = dict(state)


@pytest.mark.parametrize("kind", [Lines, StatefulLines])
def test_sources_of_a_users_own(tmp_path: Path, kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    shards, _ = write_shards(tmp_path, shards=1)
    expected = reference(shards, 1, epochs=20)

    def stream() -> TokenStream:
        return stream_of(kind(shards[0]), tokenizer=None)

    again = 0
    for rounds in (1, 4, 5, 9):
        rows, end, _ = read(stream(), 2, 1, rounds)
        caplog.clear()
        more, *_ = read(stream(), 1, 1, 5, start=end)
        assert rows + more == expected[: 2 * rounds + 5]
        before = end.state["lanes"]["0"]["buffer"]["state"]
        assert (f"its first {before} documents are read again" in caplog.text) == (kind is Lines and bool(before))
        again += bool(before)
    assert again


def test_parts_that_cannot_be_divided_are_read_as_one(tmp_path: Path) -> None:
    shards, dataset = write_shards(tmp_path)
    all_documents = [document for shard in shards for document in shard]
    stream = stream_of(dataset.skip(5).take(20), shuffle=False)
    tokens = [token for document in all_documents[5:25] for token in document]
    assert stream.lanes == 1
    rows = [plain(row) for row in itertools.islice(stream, len(tokens) // LENGTH)]
    assert [token for row in rows for token in row["input_ids"]] == tokens[: len(rows) * LENGTH]


def test_ranks_learn_that_they_read_other_data(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    _, dataset = write_shards(tmp_path / "one")
    _, other = write_shards(tmp_path / "two", shards=5)
    known = [fingerprint(row_hashes(stream_of(each))) for each in (dataset, dataset, other)]
    assert known[0] == known[1] != known[2] and None not in known


# ---- refusals ----


class Numbers:
    def __iter__(self) -> Any:
        return iter([{"text": 0.0}])


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    _, dataset = write_shards(tmp_path, shards=2)
    ids = IterableDataset.from_generator(lambda: iter([{"input_ids": [5, 300]}]))
    empty = dataset.filter(lambda example: False)
    cases: list[tuple[str, Any]] = [
        ("no column 'body'; it has text", lambda: stream_of(dataset, text_column="body")),
        ("no column 'input_ids'; it has text", lambda: stream_of(dataset, tokenizer=None)),
        ("has no end-of-text token.*pass eos_token_id", lambda: stream_of(dataset, tokenizer=words(eos_token=None))),
        ("eos_token_id=500 is not an id", lambda: stream_of(dataset, eos_token_id=500)),
        ("shuffle_buffer=0 must be.*shuffle=False", lambda: stream_of(dataset, shuffle_buffer=0)),
        ("shuffle_buffer=-3 must be", lambda: stream_of(dataset, shuffle_buffer=-3)),
        ("lanes=0 must be", lambda: stream_of(dataset, lanes=0)),
        ("documents='packed' is not one of", lambda: stream_of(dataset, documents="packed")),
        ("seed=-1", lambda: stream_of(dataset, seed=-1)),
        ("shuffle buffer of its own .buffer_size=7.", lambda: stream_of(dataset.shuffle(seed=1, buffer_size=7))),
        ("splits train: choose one", lambda: stream_of(load_splits(tmp_path))),
        ("not a stream: use dataset.to_iterable_dataset", lambda: stream_of(list_dataset())),
        ("cannot be begun anew", lambda: stream_of(iter([{"text": "w5"}]))),
        ("lanes=2: a Lines has no shards", lambda: stream_of(Lines([[3]]), tokenizer=None, lanes=2)),
        ("has the id 300.*vocabulary of 120", lambda: next(iter(stream_of(ids, tokenizer=None, vocab_size=120)))),
        ("'text' must hold text, not a float", lambda: next(iter(stream_of(Numbers())))),
        (
            "the column 'input_ids' must hold a list of integers",
            lambda: next(iter(stream_of(Lines([["a"]]), tokenizer=None))),
        ),
        ("lane 0 of 2 has found no document with text in 2 shards", lambda: next(iter(stream_of(empty)))),
        ("no column 'text', but the columns input_ids", lambda: next(iter(stream_of(Lines([[3]]))))),
        ("no state of a stream of 2 lanes", lambda: stream_of(dataset).load_state_dict({"lanes": {"7": {"rows": 1}}})),
    ]
    for message, make in cases:
        with pytest.raises(ValueError, match=message):
            make()
    from datasets.distributed import split_dataset_by_node

    with pytest.raises(ValueError, match="divided by split_dataset_by_node: pass the whole"):
        stream_of(split_dataset_by_node(dataset, 0, 2))
    _, end, _ = read(stream_of(dataset), 2, 1, 3)
    with pytest.raises(ValueError, match="behind 3 rows of lane 0, and 8 samples of 2 lanes have 4"):
        read(stream_of(dataset), 1, 1, 1, start=Position(8, end.state))


def load_splits(folder: Path) -> Any:
    return load_dataset("json", data_files={"train": [str(folder / "0.json")]}, streaming=True)


def list_dataset() -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"text": ["w5"]})


# ---- mixtures ----


def mixture(folder: Path, weights: Any, handling: Any = ("mask", "cross"), **kwargs: Any) -> StreamMixture:
    streams = {}
    for name, shards, documents in (("web", 6, handling[0]), ("code", 5, handling[1])):
        (folder / name).mkdir(exist_ok=True)
        streams[name] = stream_of(write_shards(folder / name, shards)[1], lanes=4, documents=documents)
    return StreamMixture(streams, weights, **kwargs)


def test_a_mixture_of_streams(tmp_path: Path) -> None:
    expected = {}
    for name, shards, handling in (("web", 6, "mask"), ("code", 5, "cross")):
        (tmp_path / name).mkdir()
        rows = reference(write_shards(tmp_path / name, shards)[0], 4, handling)
        expected[name] = [rows[lane::4] for lane in range(4)]  # by lane
    weights = {"web": 0.5, "code": 0.5}
    whole = [plain(row) for row in itertools.islice(mixture(tmp_path, weights), 120)]
    taken = {(name, lane): 0 for name in expected for lane in range(4)}
    for sample, row in enumerate(whole):  # each row is the next one of its lane of its set
        name, lane = ("web", "code")[row["domain"]], sample % 4
        wanted = expected[name][lane][taken[name, lane]]
        assert {**{"position_ids": list(range(LENGTH))}, **wanted, "domain": row["domain"]} == row
        taken[name, lane] += 1
    domains = [row["domain"] for row in whole]
    assert all(abs(sum(domains[:n]) - n / 2) <= 2 for n in range(1, 121))
    assert min(taken.values()) > 5, "no set stays with some of the lanes"

    draw = random.Random(1)
    for _ in range(8):
        start, rows = None, []
        for _ in range(3):
            ranks, batch = draw.choice((1, 2, 4)), draw.choice((1, 2))
            found, start, _ = read(mixture(tmp_path, weights), ranks, batch, draw.randrange(1, 6), 0, start)
            rows += found
        assert rows == whole[: len(rows)]

    # Other weights, and another set: each lane of a set goes on.
    rows, start, _ = read(mixture(tmp_path, weights), 2, 1, 7)
    more, end, _ = read(mixture(tmp_path, {"web": 0.0, "code": 1.0}), 1, 1, 9, 2, start)
    assert start.state["mixture"]["anchor"] == 0 and end.state["mixture"]["anchor"] == 14
    last, *_ = read(mixture(tmp_path, weights), 2, 1, 20, 0, end)
    assert {row["domain"] for row in more} == {1} and abs(sum(row["domain"] for row in last) - 20) <= 2
    taken = dict.fromkeys(taken, 0)
    for sample, row in enumerate([*rows, *more, *last]):
        name, lane = ("web", "code")[row["domain"]], sample % 4
        assert row["input_ids"] == expected[name][lane][taken[name, lane]]["input_ids"], sample
        taken[name, lane] += 1


def test_what_no_mixture_of_streams_can_be(tmp_path: Path) -> None:
    _, dataset = write_shards(tmp_path)
    cases: list[tuple[str, Any, Any]] = [
        (
            "'b' has another number of lanes .2. than 'a' .4.",
            {"a": stream_of(dataset), "b": stream_of(dataset, lanes=2)},
            [1, 1],
        ),
        ("the stream 'a' has an end .epochs=1.", {"a": stream_of(dataset, epochs=1)}, [1]),
        ("the set 'a' is a list: a StreamMixture has TokenStreams", {"a": [1]}, [1]),
        ("'a' has none", {"a": stream_of(dataset)}, {}),
        ("less than one row in 4194304", {"a": stream_of(dataset), "b": stream_of(dataset)}, [1, 1e-9]),
        ("needs a stream", {}, []),
    ]
    for message, streams, weights in cases:
        with pytest.raises(ValueError, match=message):
            StreamMixture(streams, weights)
    with pytest.raises(ValueError, match="the set 'a' is a stream .TokenStream.: use StreamMixture"):
        Mixture({"a": stream_of(dataset)}, [1])

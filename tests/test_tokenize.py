"""Texts become files of tokens: datatrove's bytes, every kind of source, workers, a killed run, and what is refused."""

from __future__ import annotations

import bz2
import functools
import gzip
import json
import lzma
import os
import random
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import forked
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from pool import WorkerPool
from test_cli import command, one_line
from token_files import flat, write_ds
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_nanotron.data import TokenDataset, TokenFile, tokenize_corpus
from hf_nanotron.data.tokenize import shards as shards_module, source as source_module
from hf_nanotron.data.tokenize.plan import deal
from hf_nanotron.data.tokenize.source import Piece
from hf_nanotron.data.tokenize.writer import in_words
from hf_nanotron.data.tokens.byte_ranges import short_name

DATATROVE = "datatrove is not installed (pip install hf-nanotron[datatrove])"
EOS = "<eos>"


@functools.cache
def words(count: int) -> Tokenizer:
    """Token 7 is the word "w7". What it adds itself is a first token."""
    made = Tokenizer(models.WordLevel({EOS: 0, **{f"w{n}": n for n in range(1, count)}}, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="w2 $A", special_tokens=[("w2", 2)])
    return made


def saved(folder: Path, count: int = 300) -> str:
    path = folder / f"tokenizer{count}.json"
    words(count).save(str(path))
    return str(path)


def texts(count: int, seed: int = 0, vocabulary: int = 300) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(3, vocabulary)}" for _ in range(rng.randrange(1, 30))) for _ in range(count)]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row if isinstance(row, dict) else {"text": row}) + "\n" for row in rows))
    return path


def tokenized(source: Any, out: Path | str, tokenizer: Any, **options: Any) -> list[list[int]]:
    """Documents that are written, in the order of the files."""
    done = tokenize_corpus(source, out, tokenizer, **{"eos_token": EOS, "progress": False, **options})
    return documents_in(out, done.files)


def documents_in(out: Path | str, files: tuple[str, ...]) -> list[list[int]]:
    found = []
    for name in files:
        file = TokenFile.open(f"{out}/{name}")
        assert file.documents is not None
        edges = file.documents.edges(0, file.documents.count)
        ids = file.read(0, file.tokens)
        found += [ids[a:b].tolist() for a, b in zip(edges, edges[1:], strict=False)]
    return found


def expected(rows: list[str]) -> list[list[int]]:
    return [[*(int(word[1:]) for word in text.split()), 0] for text in rows]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.ds*"))}


# ---- the format ----


@pytest.mark.parametrize(
    ("vocabulary", "way"), [(300, "eos"), (300, "special"), (300, "shuffled"), (70_000, "eos"), (70_000, "shuffled")]
)
def test_files_are_those_of_datatrove(tmp_path: Path, vocabulary: int, way: str) -> None:
    """Byte for byte, with their names."""
    pytest.importorskip("datatrove", reason=DATATROVE)
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer

    tokenizer = saved(tmp_path, vocabulary)
    options: dict[str, Any] = {"append_eos": way != "special", "add_special_tokens": way == "special"}
    seed = 5 if way == "shuffled" else None
    for rank in range(2):
        rows = texts(2500, rank, vocabulary)
        DocumentTokenizer(
            str(tmp_path / "theirs"),
            tokenizer_name_or_path=tokenizer,
            save_filename="web",
            eos_token=None if way == "special" else EOS,
            shuffle_documents=seed is not None,
            seed=seed,
        ).run([Document(text, str(n)) for n, text in enumerate(rows)], rank, 2)
        jsonl(tmp_path / f"{rank}.jsonl", rows)
    sources = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    tokenized(sources, tmp_path / "ours", tokenizer, shards=2, file_name="web", shuffle=seed, **options)
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert ours == theirs and len(ours) == 6
    assert {name.split("_")[0] for name in ours} == {"web"}
    TokenDataset(tmp_path / "ours", 16, documents="pack")


def test_numbers_in_words() -> None:
    humanize = pytest.importorskip("humanize", reason=DATATROVE)
    rng = random.Random(0)
    numbers = [0, 1, 9, 10, 999, 1000, 1005, 9994, 9995, 9999, 99_950, 999_499, 999_500, 999_999, 10**9 - 1, 10**13]
    for number in [*numbers, *(rng.randrange(10 ** rng.randrange(1, 16)) for _ in range(2000))]:
        assert in_words(number) == humanize.metric(number, unit="T"), number


# ---- sources ----


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


def write_sources(folder: Path, rows: list[str]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The same texts in every form."""
    plain = jsonl(folder / "a.jsonl", rows).read_bytes()
    half = len(plain) // 2  # two frames, as parallel compressors write them
    compressed = {"gz": gzip.compress(plain), "bz2": bz2.compress(plain), "xz": lzma.compress(plain),
                  "zst": b"".join(map(zstd, (plain[:half], plain[half:])))}  # fmt: skip
    for end, data in compressed.items():
        (folder / f"a.jsonl.{end}").write_bytes(data)
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in rows], indent=1))
    (folder / "crlf.jsonl").write_bytes(b"\xef\xbb\xbf\r\n" + plain.rstrip(b"\n").replace(b"\n", b"\r\n"))
    (folder / "a.csv").write_text("id,text\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(rows)))
    (folder / "a.tsv").write_text("id\ttext\n" + "".join(f"{n}\t{text}\n" for n, text in enumerate(rows)))
    (folder / "lines.txt").write_text("\n".join(rows))
    (folder / "paragraphs.txt").write_text("\n \n".join(text.replace(" ", "\n") for text in rows))
    dataset = Dataset.from_dict({"id": list(range(len(rows))), "text": rows})
    dataset.save_to_disk(folder / "saved")
    DatasetDict({"train": dataset.select([0]), "all": dataset}).save_to_disk(folder / "splits")
    table = pa.table({"text": rows, "id": list(range(len(rows)))})
    pq.write_table(table, folder / "a.parquet", row_group_size=7)
    (folder / "parts" / "below").mkdir(parents=True)
    (folder / "parts" / "_hidden").mkdir()
    pq.write_table(table.slice(0, 20), folder / "parts" / "a.parquet")
    pq.write_table(table.slice(20), folder / "parts" / "below" / "b.parquet")
    (folder / "parts" / "_hidden" / "c.parquet").write_text("not read")
    with fsspec.open("memory://corpus/a.jsonl.gz", "wb") as file:
        file.write(compressed["gz"])
    names = ["a.jsonl", *(f"a.jsonl.{end}" for end in compressed), "a.json", "crlf.jsonl", "a.csv", "a.tsv", "saved",
             "a.parquet", "parts"]  # fmt: skip
    return {
        **{name: (folder / name, {}) for name in names},
        "pattern": (f"{folder}/parts/**/[ab].parquet", {}),
        "split": (folder / "splits", {"split": "all"}),
        "lines": (folder / "lines.txt", {"sample_by": "line"}),
        "paragraphs": (folder / "paragraphs.txt", {"sample_by": "paragraph"}),
        "dataset": (dataset, {}),
        "url": ("memory://corpus/a.jsonl.gz", {}),
    }


def test_every_source_gives_the_same_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = texts(60)
    tokenizer = words(300)
    sources = write_sources(tmp_path, rows)
    for name, (source, options) in sources.items():
        assert tokenized(source, tmp_path / "out" / name, tokenizer, **options) == expected(rows), name
    # In many pieces: parts of plain JSON, row groups, rows of a dataset.
    monkeypatch.setattr(source_module, "PIECE_BYTES", 300)
    monkeypatch.setattr(source_module, "PIECE_ROWS", 7)
    for name in ("a.jsonl", "crlf.jsonl", "a.parquet", "saved", "dataset"):
        source, options = sources[name]
        pieces = source_module.open_source(source, **options).pieces
        assert len(pieces) > 6, name
        done = tokenized(source, tmp_path / "pieces" / name, tokenizer, shards=5, **options)
        assert done == expected(rows), name
    whole = tokenized(tmp_path / "lines.txt", tmp_path / "whole", tokenizer)
    assert whole == [[*(token for doc in expected(rows) for token in doc[:-1]), 0]]


def test_a_hub_dataset_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands for it here; its commit is part of what a resumed run is compared with."""
    rows = texts(40)
    folder = tmp_path / "hub"
    folder.mkdir()
    for number in range(2):
        table = pa.table({"text": rows[20 * number : 20 * number + 20], "id": list(range(20))})
        pq.write_table(table, folder / f"train-{number}.parquet", row_group_size=5)
    monkeypatch.setattr(source_module, "_is_hub_name", lambda path: True)
    done = tokenized(str(folder), tmp_path / "out", words(300), shards=3)
    assert done == expected(rows)
    plan = json.loads((tmp_path / "out" / ".tokenize" / "plan.json").read_text())
    assert plan["source"]["dataset"]["shards"] == 8 and plan["source"]["dataset"]["commit"]
    with pytest.raises(ValueError, match="has no column 'content'; it has text, id"):
        tokenized(str(folder), tmp_path / "none", words(300), column="content")
    with pytest.raises(ValueError, match="cannot be read: .*test"):
        tokenized(str(folder), tmp_path / "none", words(300), split="test")


def test_a_remote_output(tmp_path: Path) -> None:
    rows = texts(30)
    source = jsonl(tmp_path / "a.jsonl", rows)
    assert tokenized(source, "memory://tokens/web", words(300)) == expected(rows)
    again = tokenize_corpus(source, "memory://tokens/web", words(300), eos_token=EOS, progress=False)
    assert again.kept == again.shards == 1
    rows = TokenDataset("memory://tokens/web", 16).rows([0])["input_ids"].tolist()
    assert len(rows[0]) == 16
    with pytest.raises(ValueError, match="was begun with something else: max_length is 5, and was None"):
        tokenized(source, "memory://tokens/web", words(300), max_length=5)
    assert len(tokenized(source, "memory://tokens/web", words(300), max_length=5, overwrite=True)[0]) <= 5


def test_pieces_are_dealt_in_order() -> None:
    rng = random.Random(1)
    for _ in range(200):
        pieces = [Piece(str(n), "json", size=rng.choice([0, 1, 10, 1000])) for n in range(rng.randrange(1, 30))]
        shards = rng.randrange(1, len(pieces) + 1)
        dealt = deal(pieces, shards)
        assert [piece for shard in dealt for piece in shard] == pieces
        assert len(dealt) == shards and all(dealt)
    even = deal([Piece(str(n), "json", size=100) for n in range(12)], 4)
    assert [len(shard) for shard in even] == [3, 3, 3, 3]
    assert len(deal([Piece("a", "json", size=2**30)] * 3, None)) == 3  # no piece is divided
    assert len(deal([Piece("a", "json", size=2**10)] * 300, None)) == 1


# ---- documents ----


def test_special_tokens_and_lengths(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["w5 w6", "w7 <eos>", "", None, "w8 w9 w10 w11", "w3"])
    cases: list[tuple[dict[str, Any], list[list[int]]]] = [
        ({}, [[5, 6, 0], [7, 0, 0], [8, 9, 10, 11, 0], [3, 0]]),
        ({"append_eos": False}, [[5, 6], [7, 0], [8, 9, 10, 11], [3]]),
        ({"add_special_tokens": True}, [[2, 5, 6, 0], [2, 7, 0], [2, 8, 9, 10, 11, 0], [2, 3, 0]]),
        ({"max_length": 3}, [[5, 6, 0], [7, 0, 0], [8, 9, 10], [3, 0]]),
        ({"max_length": 3, "too_long": "split"}, [[5, 6, 0], [7, 0, 0], [8, 9, 10, 11, 0], [3, 0]]),
        ({"max_length": 3, "too_long": "drop"}, [[5, 6, 0], [7, 0, 0], [3, 0]]),
        ({"max_documents": 2}, [[5, 6, 0], [7, 0, 0]]),
        ({"eos_token": "w9"}, [[5, 6, 9], [7, 0, 9], [8, 9, 10, 11, 9], [3, 9]]),
    ]
    for number, (options, documents) in enumerate(cases):
        assert tokenized(source, tmp_path / str(number), words(300), **options) == documents
    done = tokenize_corpus(source, tmp_path / "3", words(300), eos_token=EOS, max_length=3, progress=False)
    assert done.counts is not None
    assert (done.counts.documents, done.counts.empty, done.counts.truncated) == (4, 2, 1)


def test_a_tokenizer_that_truncates_does_not_here(tmp_path: Path) -> None:
    made = Tokenizer.from_str(words(300).to_str())
    made.enable_truncation(3)
    made.enable_padding(length=8)
    source = jsonl(tmp_path / "a.jsonl", ["w3 w4 w5 w6 w7", "w3"])
    assert tokenized(source, tmp_path / "out", made) == [[3, 4, 5, 6, 7, 0], [3, 0]]


# ---- workers, and runs that end early ----


def test_workers_write_the_same_files(tmp_path: Path) -> None:
    for number in range(4):
        jsonl(tmp_path / f"{number}.jsonl", texts(50, number))
    tokenizer = saved(tmp_path)
    found = []
    for workers in (1, 3):
        tokenized(f"{tmp_path}/*.jsonl", tmp_path / str(workers), tokenizer, shards=4, workers=workers)
        found.append(contents(tmp_path / str(workers)))
    assert found[0] == found[1] and len(found[0]) == 12
    jsonl(tmp_path / "9.jsonl", ["w3", 5])
    with pytest.raises(ValueError, match=r"9.jsonl, line 2: its text is a int \('5'\), not text"):
        tokenized(f"{tmp_path}/*.jsonl", tmp_path / "bad", tokenizer, shards=5, workers=2)


KILLED = """
import os, signal, sys
from hf_nanotron.data.tokenize import shards
from hf_nanotron.data.tokenize.corpus import tokenize_corpus

shards.BATCH_ROWS, write = 10, shards.Job._write
batches = 0
def stops(self, writer, batch):
    global batches
    batches += 1
    writer._ids.flush()
    if batches == 50:  # of 20 for each shard
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, writer, batch)
shards.Job._write = stops
tokenize_corpus(sys.argv[1], sys.argv[2], sys.argv[3], eos_token="<eos>", shards=6)
"""


def test_a_killed_run_goes_on(pool: WorkerPool, tmp_path: Path) -> None:
    """No half file has its final name; what is complete is kept, and the rest is what an undisturbed run writes."""
    for number in range(6):
        jsonl(tmp_path / f"{number}.jsonl", texts(200, number))
    tokenizer, out, pattern = saved(tmp_path), tmp_path / "out", f"{tmp_path}/*.jsonl"
    code, _, err = pool.run_alone(forked.python_apart, KILLED, [pattern, str(out), str(tokenizer)], tmp_path)
    assert code == -signal.SIGKILL, err
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.ds")}
    assert len(before) == 2
    for path in before:
        assert TokenFile.open(str(path)).documents.count == 200  # type: ignore[union-attr]
    assert any(out.glob(".tokenize/unfinished/*/*.ds"))
    tokenized(pattern, tmp_path / "fresh", tokenizer, shards=6)
    done = tokenize_corpus(pattern, out, tokenizer, eos_token=EOS, progress=False)  # the number of shards is known
    assert done.kept == 2 and done.shards == 6 and done.counts is not None and done.counts.documents == 1200
    assert contents(out) == contents(tmp_path / "fresh")
    assert all(path.stat().st_mtime_ns == at for path, at in before.items() if path.name in done.files[: done.kept])
    assert not any(out.glob(".tokenize/unfinished/*"))


def test_what_a_resume_refuses(tmp_path: Path) -> None:
    files = [jsonl(tmp_path / f"{n}.jsonl", texts(20, n)) for n in range(3)]
    tokenizer, out, pattern = saved(tmp_path), tmp_path / "out", f"{tmp_path}/*.jsonl"
    first = tokenized(pattern, out, tokenizer, shards=2)
    assert tokenized(pattern, out, tokenizer) == first

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=f"was begun with something else: .*{match}"):
            tokenized(pattern, out, tokenizer, **options)

    refused("append_eos is False, and was True", append_eos=False)
    refused(r"columns is \['content'\], and was \['text'\]", column="content")
    refused("shards is 3, and was 2", shards=3)
    words(301).save(tokenizer)
    refused("the tokenizer is another one than before, though its name is the same")
    words(300).save(tokenizer)
    jsonl(tmp_path / "3.jsonl", ["w3"])
    refused("3.jsonl was not among the source files")
    (tmp_path / "3.jsonl").unlink()
    stat = files[1].stat()
    os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    refused("1.jsonl was written again since")
    jsonl(files[1], [*texts(20, 1), "w3"])
    refused(r"1.jsonl has \d+ bytes, and had \d+")
    files[0].unlink()
    refused("0.jsonl is not among the source files any more")
    assert documents_in(out, ("00000_unshuffled.ds", "00001_unshuffled.ds")) == first
    (out / "notes.txt").write_text("mine")
    done = tokenized(pattern, out, tokenizer, overwrite=True)
    assert done == expected([*texts(20, 1), "w3", *texts(20, 2)])
    assert (out / "notes.txt").read_text() == "mine" and len(list(out.glob("*.ds"))) == 1


def test_a_file_is_tokenized_once(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", texts(20))
    (tmp_path / "latest.jsonl").symlink_to("a.jsonl")
    with pytest.raises(ValueError, match="latest.jsonl is .*a.jsonl, too: its documents would be written twice"):
        tokenized(f"{tmp_path}/*.jsonl", tmp_path / "out", words(300))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shard would hold what nobody asked for, and the plan would name the file as it was before."""
    source = jsonl(tmp_path / "a.jsonl", texts(20))
    before = shards_module.Job._write

    def written(self: Any, writer: Any, batch: Any) -> Any:
        with open(source, "a") as file:
            file.write('{"text": "w5"}\n')
        return before(self, writer, batch)

    monkeypatch.setattr(shards_module.Job, "_write", written)
    with pytest.raises(ValueError, match=r"a.jsonl was written again, or is gone, .*\(\d+ bytes then, \d+ now\)"):
        tokenized(source, tmp_path / "out", words(300))
    assert not list((tmp_path / "out").glob("*.ds"))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="was begun with something else: .*a.jsonl has"):
        tokenized(source, tmp_path / "out", words(300))
    assert tokenized(source, tmp_path / "out", words(300), overwrite=True) == expected([*texts(20), "w5"])


def test_a_shard_whose_file_is_gone_is_written_again(tmp_path: Path) -> None:
    for number in range(3):
        jsonl(tmp_path / f"{number}.jsonl", texts(20, number))
    out = tmp_path / "out"
    first = tokenized(f"{tmp_path}/*.jsonl", out, words(300), shards=3)
    (out / "00000_unshuffled.ds").write_bytes(b"cut")
    (out / "00001_unshuffled.ds.index").unlink()
    os.truncate(out / "00002_unshuffled.ds.index", 8 * 19)
    done = tokenize_corpus(f"{tmp_path}/*.jsonl", out, words(300), eos_token=EOS, progress=False)
    assert done.kept == 0 and documents_in(out, done.files) == first


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    from hf_nanotron.data.tokenize.output import OutputFolder

    source = jsonl(tmp_path / "a.jsonl", ["w3"])
    with OutputFolder(tmp_path / "out").lock(wait=False):
        with pytest.raises(RuntimeError, match="another process is writing to .*out"):
            tokenized(source, tmp_path / "out", words(300))


# ---- rows that cannot be read ----

BAD: dict[str, tuple[str, bytes, str]] = {
    "number": ("a.jsonl", b'{"text": "w3"}\n{"text": 5}\n', r"a.jsonl, line 2: its text is a int \('5'\), not text"),
    "list": ("a.jsonl", b'{"text": ["w3"]}\n', "line 1: its text is a list"),
    "no column": ("a.jsonl", b'{"text": "w3"}\n\n{"txt": "w3", "id": 1}\n', "3: it has no column 'text'; it has txt"),
    "no object": ("a.jsonl", b'"w3"\n', "line 1: it holds a str instead of columns"),
    "no json": ("a.jsonl", b'{"text": "w3"}\n{"text": "w4\n', "line 2: it is no JSON"),
    "not utf-8": ("a.jsonl", b'{"text": "w3"}\n{"text": "\xff"}\n', "line 2: it is not UTF-8 .* at its byte 10"),
    "half a pair": ("a.jsonl", b'{"text": "w3"}\n{"text": "\\ud800"}\n', "line 2: it cannot be tokenized"),
    "text": ("a.txt", b"w3 \xff", "a.txt: it is not UTF-8"),
    "array": ("a.json", b'[{"text": "w3"}, {"text": 7}]', r"a.json, row 1: its text is a int \('7'\)"),
    "broken array": ("a.json", b'[{"text": "w3"}, ', "a.json is no JSON that can be read"),
    "csv": ("a.csv", b'id,text\n1,w3\n2,"w4\n', "a.csv is no CSV that can be read, after row 0"),
    "csv fields": ("a.csv", b"id,text\n1,w3,w4\n2,w5,w6\n", "more fields than its first line has names"),
    "no csv column": ("a.csv", b"id,content\n1,w3\n", "a.csv, row 0: it has no column 'text'; it has id, content"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "w3"}\n' * 900)[:-9], "gz cannot be read: Compressed file"),
    "no gzip": ("a.jsonl.gz", b"plain", "a.jsonl.gz cannot be read: Not a gzipped file"),
    "no zstd": ("a.jsonl.zst", b"plain", "a.jsonl.zst cannot be read"),
    "no parquet": ("a.parquet", b"plain", "a.parquet is no parquet file that can be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_rows_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    file, data, match = BAD[name]
    (tmp_path / file).write_bytes(data)
    with pytest.raises(ValueError, match=match):
        tokenized(tmp_path / file, tmp_path / "out", words(300))
    assert not any((tmp_path / "out").glob("*.ds*"))


def test_rows_that_cannot_be_read_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [data for name, (file, data, _) in BAD.items() if file == "a.jsonl" and name != "list"]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    done = tokenize_corpus(
        tmp_path / "a.jsonl", tmp_path / "out", words(300), eos_token=EOS, skip_unreadable=True, progress=False
    )
    assert done.counts is not None and (done.counts.documents, done.counts.unreadable) == (5, 6)
    assert "a.jsonl: 6 rows that cannot be read were left out." in caplog.text
    # A run that ended at such a row goes on without it.
    with pytest.raises(ValueError, match="Mend it, or leave out such rows with skip_unreadable"):
        tokenized(tmp_path / "a.jsonl", tmp_path / "again", words(300))
    assert tokenized(tmp_path / "a.jsonl", tmp_path / "again", words(300), skip_unreadable=True) == [[3, 0]] * 5


def test_a_line_is_named_by_its_number_in_any_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "PIECE_BYTES", 100)
    jsonl(tmp_path / "a.jsonl", [*texts(50), 7])
    with pytest.raises(ValueError, match="a.jsonl, line 51: its text is a int"):
        tokenized(tmp_path / "a.jsonl", tmp_path / "out", words(300), shards=4)


# ---- refusals ----


def refusals(folder: Path) -> list[tuple[Any, dict[str, Any], str]]:
    source = jsonl(folder / "a.jsonl", ["w3"])
    (folder / "empty.jsonl").touch()
    jsonl(folder / "blank.jsonl", ["", None])
    mixed = folder / "mixed"
    mixed.mkdir()
    jsonl(mixed / "a.jsonl", ["w3"])
    (mixed / "b.txt").write_text("w3")
    (folder / "none").mkdir()
    (folder / "a.bin").write_bytes(b"1")
    return [
        (folder / "absent.jsonl", {}, "absent.jsonl: there is no such file or folder"),
        (f"{folder}/*.csv", {}, r"\*.csv matches no file"),
        (folder / "none", {}, "holds no .parquet, .jsonl,"),
        (folder / "a.bin", {}, "a.bin: its name does not say what it holds .*; say it with format"),
        (folder / "empty.jsonl", {}, "empty.jsonl is empty"),
        (folder / "blank.jsonl", {}, "blank.jsonl has no document: 2 rows without text were left out"),
        (Dataset.from_dict({"text": []}), {}, "the dataset is empty: it has no rows"),
        (mixed, {}, "mixed holds json files .*a.jsonl.* and text files .*b.txt.*; give those of one kind"),
        ([source, source], {}, "a.jsonl is given twice"),
        ([], {}, "no source was given"),
        (source, {"split": "train"}, "split='train' belongs to a Hub dataset"),
        (source, {"format": "arrow"}, "format='arrow' is not one of parquet, json, csv, text"),
        (source, {"eos_token": None}, "has no end-of-text token to put behind documents: name one with eos_token"),
        (source, {"eos_token": "<end>"}, "eos_token='<end>' is no token of"),
        (source, {"token_size": 2, "tokenizer": words(70_000)}, "token_size=2 holds ids up to 65535, and .* has 70000"),
        (source, {"token_size": 3}, "token_size=3 cannot be"),
        (source, {"shards": 2}, "shards=2: the source can be read in 1 pieces only"),
        (source, {"shards": 0}, "shards=0 must be at least 1"),
        (source, {"workers": 0}, "workers=0 must be at least 1"),
        (source, {"max_length": 0}, "max_length=0 must be at least 1"),
        (source, {"shuffle": -1}, "shuffle=-1 is a seed"),
        (source, {"kind": "image"}, "kind='image' is not one of 'text', 'chat', 'prompt_completion'"),
        (source, {"sample_by": "page"}, "sample_by='page' is not one of"),
        (source, {"too_long": "keep"}, "too_long='keep' is not one of"),
        (source, {"file_name": "a/b"}, "file_name='a/b' must be the beginning"),
        (source, {"tokenizer": "/no/such"}, "tokenizer='/no/such': there is no such file or folder"),
        (source, {"tokenizer": str(folder)}, "tokenizer='.*' cannot be loaded"),
        (source, {"executor": "lsf"}, "executor='lsf' is not one of 'local', 'slurm', 'ray'"),
        (source, {"executor_options": {"time": "1"}}, "belong to executor='slurm' or 'ray'"),
        (source, {"out": source}, "a.jsonl is a file; give a folder to write to"),
    ]  # fmt: skip


def test_refusals(tmp_path: Path) -> None:
    for number, (source, options, match) in enumerate(refusals(tmp_path)):
        options = {"tokenizer": words(300), "out": tmp_path / f"out{number}", **options}
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            tokenized(source, **options)
        out = Path(options["out"])
        assert not (out.is_dir() and any(out.glob("*.ds")))


def test_a_stream_and_foreign_tokens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a stream cannot be tokenized in shards"):
        tokenized(Dataset.from_dict({"text": ["w3"]}).to_iterable_dataset(), tmp_path / "out", words(300))
    (tmp_path / "mine").mkdir()
    write_ds(tmp_path / "mine" / "a.ds", [[1, 2]])
    source = jsonl(tmp_path / "a.jsonl", ["w3"])
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="mine holds a.ds, which this command has not written there"):
            tokenized(source, tmp_path / "mine", words(300), overwrite=overwrite)
    assert TokenFile.open(str(tmp_path / "mine" / "a.ds"), token_size=2).tokens == 2


def test_a_name_that_is_no_path_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(path: str, *args: Any, **options: Any) -> None:
        raise ConnectionError(f"cannot reach https://me:hunter22@host/{path}")

    monkeypatch.setattr("datasets.load_dataset_builder", absent)
    with pytest.raises(ValueError, match="'org/corpus' is no file or folder here, and cannot be read as") as error:
        tokenized("org/corpus", tmp_path / "out", words(300), name="en")
    assert "hunter22" not in str(error.value)


# ---- the command, and other machines ----


def test_command(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ["w5 w6", "", "w7"])
    PreTrainedTokenizerFast(tokenizer_object=words(300), eos_token=EOS).save_pretrained(tmp_path / "tokenizer")
    argv = ["tokenize", f"{tmp_path}/a.jsonl", f"{tmp_path}/out", "--tokenizer", f"{tmp_path}/tokenizer", "--workers=1"]
    code, out, err = command(*argv)
    assert code == 0 and out == f"{tmp_path}/out: 2 documents, 5 tokens of 2 bytes in 1 file.\n" and "shards 1/1" in err
    assert documents_in(tmp_path / "out", ("00000_unshuffled.ds",)) == [[5, 6, 0], [7, 0]]
    assert command(*argv)[1].endswith("in 1 file (1 were there already).\n")
    for more, says in [
        (["--no-append-eos"], "append_eos is False, and was True"),
        (["--executor=slurm"], "executor='slurm' needs the options time and partition"),
        (["--executor=slurm", "--executor-option=speed=3"], "'speed' is no option of executor='slurm'"),
        (["--executor-option=speed"], "--executor-option 'speed' is not NAME=VALUE"),
        (["--column=content", "--overwrite"], "a.jsonl, line 1: it has no column 'content'; it has text"),
    ]:
        if any("slurm" in word for word in more):
            pytest.importorskip("datatrove", reason=DATATROVE)
        assert says in one_line(command(*argv, *more))


def test_slurm_runs_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What datatrove's executor pickles for its jobs, run here as one array would."""
    slurm = pytest.importorskip("datatrove.executor.slurm", reason=DATATROVE)
    import dill

    for number in range(3):
        jsonl(tmp_path / f"{number}.jsonl", texts(30, number))
    tokenizer, out, pattern = saved(tmp_path), tmp_path / "out", f"{tmp_path}/*.jsonl"
    scripts = []
    monkeypatch.setattr(slurm, "launch_slurm_job", lambda script, *_: scripts.append(script) or "1")
    monkeypatch.setattr(slurm, "expand_slurm_nodelist", lambda _: ["here"])
    options: dict[str, Any] = {"executor": "slurm", "executor_options": {"time": "1:00:00", "partition": "cpu"}}
    arguments: dict[str, Any] = {"eos_token": EOS, "progress": False, "shards": 3}
    done = tokenize_corpus(pattern, out, tokenizer, **arguments, **options)
    assert done.counts is None and not done.files and "#SBATCH --array=0-2" in scripts[0]
    monkeypatch.setenv("SLURM_NODELIST", "here")
    for rank in range(3):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(rank))
        with open(out / ".tokenize" / "logs" / "executor.pik", "rb") as file:
            dill.load(file).run()
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    assert documents_in(out, tuple(sorted(path.name for path in out.glob("*.ds")))) == expected(
        [text for number in range(3) for text in texts(30, number)]
    )
    after = tokenize_corpus(pattern, out, tokenizer, **arguments, **options)
    assert after.counts is not None and after.counts.documents == 90 and after.kept == 3
    with pytest.raises(ValueError, match="would write storage_options to its files"):
        tokenize_corpus(pattern, out, tokenizer, **arguments, **options, storage_options={"key": "secret"})
    with pytest.raises(ValueError, match="would write the credentials of memory://\\*\\*\\*@host/tokens to its files"):
        tokenize_corpus(pattern, "memory://me:secret@host/tokens", tokenizer, **arguments, **options)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"executor='ray' needs datatrove: pip install hf-nanotron\[datatrove\] ray"):
        tokenize_corpus(pattern, out, tokenizer, executor="ray")


def test_batches_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By characters, too: documents may be long."""
    monkeypatch.setattr(shards_module, "BATCH_CHARACTERS", 100)
    rows = texts(40)
    sizes: list[int] = []
    write = shards_module.Job._write
    monkeypatch.setattr(shards_module.Job, "_write", lambda *a: sizes.append(len(a[2])) or write(*a))
    assert tokenized(jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out", words(300)) == expected(rows)
    assert max(sizes) < 20 and sum(sizes) == 40
    assert np.array_equal(flat(expected(rows)), np.fromfile(tmp_path / "out" / "00000_unshuffled.ds", "<u2"))


def test_what_has_no_effect_is_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["w3"])
    Dataset.from_dict({"text": ["w3"]}).save_to_disk(tmp_path / "saved")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (source, {"sample_by": "line"}, "sample_by='line' is for text files; .* has a document in each row"),
        (source, {"too_long": "drop"}, "too_long='drop' needs max_length"),
        (source, {"kind": "chat", "eos_token": None, "append_eos": False}, "append_eos=False has no effect on conv"),
        (source, {"kind": "chat"}, "eos_token='<eos>' has no effect on conversations"),
        (tmp_path / "saved", {"name": "x"}, "name='x' has no meaning for .*saved, a folder of save_to_disk"),
        (
            Dataset.from_dict({"text": ["w3"]}),
            {"format": "json"},
            "format='json' has no meaning for a dataset in memory",
        ),
    ]
    for given, options, match in cases:
        with pytest.raises(ValueError, match=match):
            tokenized(given, tmp_path / "out", words(300), **options)


def test_an_output_within_its_source(tmp_path: Path) -> None:
    """A pattern does not match the command's own files."""
    (tmp_path / "a.json").write_text('{"text": "w3"}')
    for _ in range(2):
        assert tokenized(f"{tmp_path}/**/*.json", tmp_path / "out", words(300)) == [[3, 0]]


def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path)
    jsonl(tmp_path / "a.jsonl", ["w3"])
    tokenize_corpus("~/a.jsonl", "~/out", "~/tokenizer300.json", eos_token=EOS, max_length=9, progress=False)
    assert TokenDataset("~/out", 2).rows([0])["input_ids"].tolist() == [[3, 0]]


def test_damaged_records(tmp_path: Path) -> None:
    """A shard without a record that can be read is written again; without a plan, the folder is somebody else's."""
    source, out = jsonl(tmp_path / "a.jsonl", ["w3"]), tmp_path / "out"
    first = tokenized(source, out, words(300))
    for damaged in ("", "{}", "[]", '{"counts": {"rows": 1}, "files": []}'):
        (out / ".tokenize" / "shards" / "00000.json").write_text(damaged)
        assert tokenized(source, out, words(300)) == first
    for damaged in ("{", "{}", "[]"):
        (out / ".tokenize" / "plan.json").write_text(damaged)
        with pytest.raises(ValueError, match="holds 00000_unshuffled.ds, which this command has not written there"):
            tokenized(source, out, words(300), overwrite=True)


def test_a_full_disk(pool: WorkerPool, tmp_path: Path) -> None:
    """The error names the folder, and the same command goes on."""
    script = (
        "import resource, signal, sys\n"
        "from hf_nanotron.data import tokenize_corpus\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))\n"
        "tokenize_corpus(*sys.argv[1:], eos_token='<eos>', progress=False)\n"
    )
    source, out, tokenizer = jsonl(tmp_path / "a.jsonl", ["w3 " * 9000]), tmp_path / "out", saved(tmp_path)
    code, _, err = pool.run_alone(forked.python_apart, script, [str(source), str(out), str(tokenizer)], tmp_path)
    assert code == 1 and f"OSError: {out} cannot be written to ([Errno 27] File too large)" in err
    assert not any(out.glob("*.ds*"))
    assert len(tokenized(source, out, tokenizer)[0]) == 9001


def test_names_hold_no_credentials() -> None:
    """A set's name stands in checkpoints and logs."""
    for url in ("s3://me:pa55word@web", "https://host/data/web.ds?sig=pa55word", "https://me:pa55word@host/web/"):
        assert "pa55word" not in short_name(url) and short_name(url).endswith("web")
    assert short_name("/data/web.v2/") == short_name(Path("web.ds")) == "web"


class Refusing(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A store whose package prints the whole URL."""

    protocol = "refusing"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("refusing://")

    def _refuse(self, path: str, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"no bucket {path!r} for {self.storage_options}")

    info = ls = exists = isdir = _refuse


def test_credentials_of_a_store_are_not_told(tmp_path: Path) -> None:
    """Neither in the message nor in its chain, which a traceback prints."""
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    source, url = jsonl(tmp_path / "a.jsonl", ["w3"]), "refusing://me:pa55word@bucket/x"
    options = {"storage_options": {"secret": "s3cr3tkey"}}
    for call in (
        lambda: tokenized(f"{url}.jsonl", tmp_path / "out", words(300), **options),
        lambda: tokenized(source, url, words(300), **options),
        lambda: TokenDataset(url, 16, **options),
    ):
        with pytest.raises(OSError, match="refusing://.*bucket/x.* cannot be read .no bucket") as caught:
            call()
        told = "".join(traceback.format_exception(caught.value, chain=True))
        assert "pa55word" not in str(caught.value) and "s3cr3tkey" not in str(caught.value)
        assert not any(
            secret in line for line in told.splitlines() for secret in ("no bucket 'me:pa55word", "s3cr3tkey")
        )

"""What `data inspect` says of token files, against NumPy; that it reads little; samples, pictures and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import command, one_line
from test_token_dataset import FILES, SIZES, VastFileSystem
from test_tokenize import words
from token_files import count_requests, documents, flat, write_ds, write_megatron
from transformers import PreTrainedTokenizerFast

from hf_nanotron.data import TokenDataset, inspect_tokens, lengths as lengths_module
from hf_nanotron.data.inspection import histogram


def corpus(kind: str, folder: Path, docs: list[list[list[int]]]) -> tuple[Any, dict[str, Any]]:
    """The same documents in files of a kind, and what must be said of them."""
    for number, part in enumerate(docs):
        if kind in ("ds", "no index"):
            write_ds(folder / f"{number}.ds", part, index=kind == "ds")
        elif kind == "url":
            write_ds(f"memory://inspected/{number}.ds", part)
        elif kind == "megatron":
            write_megatron(folder / str(number), [[doc] for doc in part])
        else:
            np.save(folder / f"{number}.npy", flat(part).astype("int32"))
    told = {"token_size": 2} if kind in ("ds", "no index", "url") else {}
    ends = {"eos_token_id": 0} if kind in ("no index", "npy") else {}
    return "memory://inspected" if kind == "url" else folder, {**told, **ends}


@pytest.mark.parametrize("kind", ["ds", "no index", "url", "megatron", "npy"])
def test_numbers(tmp_path: Path, kind: str) -> None:
    docs = [documents(300, seed, longest=90) for seed in range(3)]
    path, options = corpus(kind, tmp_path, docs)
    found = inspect_tokens(path, sequence_length=64, samples=0, **options)
    lengths = np.array([len(doc) for part in docs for doc in part])
    assert (found.files, found.tokens, found.documents, found.looked_at) == (3, lengths.sum(), 900, 900)
    assert (found.shortest, found.longest, found.mean) == (lengths.min(), lengths.max(), lengths.mean())
    assert found.percentiles == {p: np.percentile(lengths, p) for p in (25, 50, 75, 95, 99)}
    assert found.bytes == lengths.sum() * (4 if kind == "npy" else 2) and not found.is_sample and not found.samples
    edges = [1, 2, 4, 8, 16, 32, 64, 128]
    counts, _ = np.histogram(lengths, edges)
    assert found.histogram == list(zip(edges, edges[1:], counts.tolist(), strict=False))
    packed = TokenDataset(path, 64, documents="pack", **options)
    assert found.packing is not None and found.packing.rows == len(packed)
    assert found.packing.waste == pytest.approx(1 - lengths.sum() / (len(packed) * 64))
    assert found.packing.longer == (lengths > 64).mean()
    assert found.packing.cut_rows == len(TokenDataset(path, 64, **options))


def test_histogram_of_odd_lengths() -> None:
    assert histogram(np.array([], np.int64)) == []
    assert histogram(np.array([0, 0, 1])) == [(0, 1, 2), (1, 2, 1)]
    assert histogram(np.array([5, 2**40])) == [(2**k, 2 ** (k + 1), int(k in (2, 40))) for k in range(2, 41)]


def test_ten_terabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only ends of documents are read, of a sample of them, which is said."""
    import fsspec

    fsspec.register_implementation("vast", VastFileSystem, clobber=True)
    VastFileSystem.read_bytes = 0
    monkeypatch.setattr(lengths_module, "MOST_DOCUMENTS", 2**18)
    found = inspect_tokens("vast://vast", token_size=2, sequence_length=4096, samples=2)
    assert found.tokens == FILES * SIZES[""] // 2 and found.documents == FILES * SIZES[".index"] // 8
    assert found.is_sample and found.looked_at == 2**18 and VastFileSystem.read_bytes < 5 * 2**20
    assert found.shortest == found.longest == 400
    assert any("lengths are those of a sample: 262,144 of" in note for note in found.notes)
    assert found.packing is not None and found.packing.rows == pytest.approx(found.documents / 10, rel=0.01)


def test_a_file_without_ends_is_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = documents(2000)
    write_ds(tmp_path / "a.ds", docs, index=False)
    unknown = inspect_tokens(tmp_path, token_size=2, samples=1)
    assert unknown.documents is None and unknown.histogram == [] and unknown.samples[0].length == 256
    assert any("a.ds does not say where its documents end; give eos_token_id" in note for note in unknown.notes)
    monkeypatch.setattr(lengths_module, "MOST_TOKENS", 10_000)
    found = inspect_tokens(tmp_path, token_size=2, eos_token_id=0)
    assert found.is_sample and found.documents == pytest.approx(2000, rel=0.05)
    assert found.looked_at == int((flat(docs)[:10_000] == 0).sum())


def test_samples(tmp_path: Path) -> None:
    """Documents as text, by the tokenizer that the files name or the one that is given."""
    PreTrainedTokenizerFast(tokenizer_object=words(300), eos_token="<eos>").save_pretrained(tmp_path / "tokenizer")
    docs = [[5, 6, 7, 0], [9] * 600 + [0]]
    tokens = sum(map(len, docs))
    write_ds(tmp_path / "a.ds", docs, loss=[1, 0] * 2 + [1] * 601, metadata=f"{tmp_path}/tokenizer|2\n{tokens}\nfew")
    found = inspect_tokens(tmp_path / "a.ds", samples=20)
    assert {sample.number for sample in found.samples} == {0, 1} and found.losses == 1
    for sample in found.samples:
        expected = ("w5 w6 w7 <eos>", 4, 0.5) if sample.number == 0 else (" ".join(["w9"] * 256), 601, 1.0)
        assert (sample.text, sample.length, sample.trained) == expected
    assert inspect_tokens(tmp_path / "a.ds", samples=20) == found
    assert inspect_tokens(tmp_path / "a.ds", samples=20, seed=1).samples != found.samples
    write_ds(tmp_path / "b.ds", docs, metadata=f"/no/such/tokenizer|2\n{tokens}\nfew")
    absent = inspect_tokens(tmp_path / "b.ds")
    assert absent.samples[0].text is None and absent.samples[0].ids[0] in (5, 9)
    assert any(
        "tokenizer='/no/such/tokenizer': there is no such file or folder; give another" in n for n in absent.notes
    )
    assert inspect_tokens(tmp_path / "b.ds", tokenizer=f"{tmp_path}/tokenizer").samples[0].text
    small = inspect_tokens(tmp_path / "b.ds", tokenizer=words(8), samples=9)
    assert any("b.ds has the id 9, and the tokenizer 8 ids" in note for note in small.notes)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PreTrainedTokenizerFast(tokenizer_object=words(300), eos_token="<eos>").save_pretrained(tmp_path / "tokenizer")
    docs = documents(400, longest=90)
    tokens = sum(map(len, docs))
    write_ds(tmp_path / "a.ds", docs, metadata=f"{tmp_path}/tokenizer|2\n{tokens}\nfew")
    argv = ["data", "inspect", str(tmp_path / "a.ds"), "--sequence-length", "64", "--sample", "2"]
    code, out, _ = command(*argv)
    lengths = [len(doc) for doc in docs]
    assert code == 0
    for text in (f"tokens      {tokens:,} (2 bytes each, ", "documents   400", f"tokenizer   {tmp_path}/tokenizer",
                 f"shortest {min(lengths)}, median {np.median(lengths):,.0f}, ", "packing     at 64: ", "64 to 127",
                 "--- document "):  # fmt: skip
        assert text in out, text
    assert out.count("###") >= 3 and out.count("--- document ") == 2
    pytest.importorskip("matplotlib")
    picture = tmp_path / "lengths.png"
    code, out, _ = command(*argv, "--json", "--histogram", str(picture))
    assert code == 0 and picture.read_bytes()[:4] == b"\x89PNG"
    told = json.loads(out)
    assert told["tokens"] == tokens and told["percentiles"]["50"] == np.median(lengths)
    (tmp_path / "cut.ds").write_bytes(b"123")
    (tmp_path / "a.txt").write_text("text")
    for more, says in [
        ([str(tmp_path / "cut.ds"), "--token-size=2"], "cut.ds: 3 bytes are no whole number of ids of 2 bytes"),
        ([str(tmp_path / "absent.ds")], "absent.ds: there is no such file or folder"),
        (
            [str(tmp_path / "a.txt")],
            "a.txt is no .ds, .bin or .npy file; hf-nanotron tokenize makes .ds files of texts",
        ),
        ([argv[2], "--eos-token-id=-1"], "eos_token_id=-1 must be at least 0"),
        ([argv[2], "--tokenizer=/no/such"], "tokenizer='/no/such': there is no such file or folder"),
        ([argv[2], "--sample=-1"], "samples=-1 must be at least 0"),
        ([argv[2], "--sequence-length=0"], "sequence_length=0 must be at least 1"),
        ([argv[2], "--histogram=/no/such/a.png"], "--histogram /no/such/a.png: its folder does not exist"),
        ([argv[2], f"--histogram={tmp_path}/a.txt"], "a.txt must end with .png, .svg or .pdf"),
    ]:
        assert says in one_line(command("data", "inspect", *more))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "--histogram needs matplotlib: pip install hf-nanotron[plot]" in one_line(
        command(*argv, f"--histogram={picture}")
    )
    requests = count_requests()
    write_ds("counting://inspected/a.ds", docs)
    inspect_tokens("counting://inspected", token_size=2, samples=0)
    assert sum(size for path, _, size in requests if path.endswith(".ds")) == 0

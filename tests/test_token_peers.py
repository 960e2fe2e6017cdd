"""Against the real thing: files of datatrove's and Megatron's writers, their readers' rows, their samples' order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from token_files import documents, flat, write_ds, write_megatron

from hf_nanotron.data import TokenDataset, TokenFile
from hf_nanotron.data.tokens.peer_orders import nanoset_order

LENGTH = 16
DATATROVE = "datatrove is not installed (pip install hf-nanotron[datatrove])"
MEGATRON = "megatron-core is not installed"


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts tokenized, shuffled and merged by datatrove's pipeline, with a mask of losses."""
    pytest.importorskip("datatrove", reason=DATATROVE)
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("datatrove")
    words = Tokenizer(models.WordLevel({"<eos>": 0, **{f"w{n}": n for n in range(1, 200)}}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    for rank in range(2):
        texts = [" ".join(f"w{token}" for token in [3, 4, *doc] if token) for doc in documents(70, seed=rank)]
        docs = [Document(text, f"{n}", metadata={"no_loss_ranges": [(0, 3)]}) for n, text in enumerate(texts)]
        DocumentTokenizer(
            str(folder / "files"),
            tokenizer_name_or_path=str(folder / "tokenizer.json"),
            eos_token="<eos>",
            save_loss_metadata=True,
            shuffle_documents=True,
            seed=rank,
        ).run(docs, rank, 2)
    DocumentTokenizerMerger(
        str(folder / "files"), str(folder / "merged"), "all", save_loss_metadata=True, seed=1, progress=False
    ).run()
    return folder


@pytest.mark.parametrize("folder", ["files", "merged"])
def test_files_of_datatrove(tokenized: Path, folder: str) -> None:
    paths = sorted((tokenized / folder).glob("*.ds"))
    assert len(paths) == (2 if folder == "files" else 1)
    for path in paths:
        file = TokenFile.open(str(path))
        tokens = np.fromfile(path, "<u2")
        assert file.tokenizer == str(tokenized / "tokenizer.json")
        np.testing.assert_array_equal(file.read(0, len(tokens)), tokens)
        ends = np.flatnonzero(tokens == 0) + 1
        assert file.documents is not None and file.documents.count == len(ends) > 60
        np.testing.assert_array_equal(file.documents.edges(0, len(ends)), [0, *ends])
        begins = np.concatenate([[0], ends[:-1]])
        loss = file.read_loss(0, len(tokens))
        assert loss is not None
        np.testing.assert_array_equal(np.flatnonzero(loss == 0), begins)  # the masked first word


@pytest.mark.parametrize("folder", ["files", "merged"])
@pytest.mark.parametrize("ends", ["index", "eos"])
def test_rows_and_positions_of_datatroves_reader(tokenized: Path, folder: str, ends: str) -> None:
    """Its windows of S + 1 tokens are our rows of S + 1 tokens in order, one file at a time."""
    from datatrove.utils.dataset import DatatroveFileDataset

    for path in sorted((tokenized / folder).glob("*.ds")):
        if ends == "eos":
            plain = tokenized / f"{folder}_{path.name}"
            plain.write_bytes(path.read_bytes())
            path = plain
        eos = {"positions_from_eos_token_id": 0} if ends == "eos" else {}
        theirs = DatatroveFileDataset(str(path), LENGTH, 2, return_positions=True, **eos)
        ours = TokenDataset(path, LENGTH + 1, token_size=2, shuffle=False, documents="mask", eos_token_id=0)
        assert len(ours) == len(theirs) > 80
        rows = ours.rows(range(len(ours)))
        for number in range(len(theirs)):
            window = theirs[number]
            np.testing.assert_array_equal(rows["input_ids"][number], window["input_ids"])
            np.testing.assert_array_equal(rows["position_ids"][number], window["positions"])


@pytest.mark.parametrize("name", [None, "org/tokenizer"])
@pytest.mark.parametrize("token_size", [2, 4])
def test_datatroves_writer_without_and_with_a_tokenizers_name(
    tmp_path: Path, name: str | None, token_size: int
) -> None:
    pytest.importorskip("datatrove", reason=DATATROVE)
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile

    docs = documents(20, vocabulary=60_000)
    file = TokenizedFile(
        str(tmp_path), "a.ds", tokenizer_name_or_path=name, save_final_metadata=True, token_size=token_size
    )
    for doc in docs:
        file.write(doc, None)
    file.close()
    ours = TokenFile.open(str(tmp_path / "a.ds"))
    assert (ours.tokenizer, ours.dtype.itemsize) == (name, token_size)
    np.testing.assert_array_equal(ours.read(0, ours.tokens), flat(docs))


@pytest.mark.parametrize("weights", [None, [0.2, 0.8]])
@pytest.mark.parametrize("samples", [None, 700])
def test_nanosets_samples(tmp_path: Path, weights: list[float] | None, samples: int | None) -> None:
    """Nanotron's rule, written out, over datatrove's reader of each folder with shuffled files."""
    pytest.importorskip("datatrove", reason=DATATROVE)
    from datatrove.utils.dataset import DatatroveFolderDataset

    folders = [tmp_path / "a", tmp_path / "b"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        for part in range(4):
            write_ds(folder / f"{part}.ds", documents(40 + 20 * number, seed=10 * number + part))
    theirs = [DatatroveFolderDataset(str(folder), LENGTH, "*.ds", recursive=False, shuffle=True) for folder in folders]
    sizes = np.array([len(dataset) for dataset in theirs])
    shares = np.array(sizes if weights is None else weights, np.float64)
    shares, counts = shares / shares.sum(), np.zeros(2, np.int64)
    sets, places = np.empty(sizes.sum(), "uint"), np.empty(sizes.sum(), "long")
    for number in range(sizes.sum()):
        sets[number] = k = np.argmax(shares * max(number, 1.0) - counts)
        places[number] = counts[k] % sizes[k]
        counts[k] += 1
    for ours, plain in zip(nanoset_order(sizes, weights), (sets, places), strict=True):
        np.testing.assert_array_equal(ours, plain)
    for array in (sets, places):
        np.random.RandomState(1234).shuffle(array)
    options: dict[str, Any] = {"token_size": 2, "seed": 1234, "order": "nanoset", "samples": samples}
    ours = TokenDataset(folders, LENGTH, folder_weights=weights, **options)
    assert len(ours) == (samples or sizes.sum())
    rows = ours.rows(range(len(ours)))
    for number in range(len(ours)):
        at = number % len(sets)
        window = theirs[int(sets[at])][int(places[at])]["input_ids"]
        np.testing.assert_array_equal(rows["input_ids"][number], window[:-1])
        np.testing.assert_array_equal(rows["shift_labels"][number], window[1:])
    rest = TokenDataset(folders, LENGTH, folder_weights=weights, skip_samples=50, **options)
    assert len(rest) == len(ours) - 50 and rest.identity() != ours.identity()
    np.testing.assert_array_equal(rest.rows(range(len(rest)))["input_ids"], rows["input_ids"][50:])


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64", "uint8"])
def test_files_of_megatron(tmp_path: Path, dtype: str) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason=MEGATRON)
    docs = [documents(1 + number % 3, seed=number) for number in range(20)]
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=getattr(np, dtype))
    for doc in docs:
        builder.add_document(torch.tensor(flat(doc)), [len(sequence) for sequence in doc])
    builder.finalize(str(tmp_path / "a.idx"))
    tokens = write_megatron(tmp_path / "ours", docs, dtype)
    for end in (".bin", ".idx"):  # the bytes that our table of the format gives
        assert (tmp_path / f"a{end}").read_bytes() == (tmp_path / f"ours{end}").read_bytes()
    file = TokenFile.open(str(tmp_path / "a"))
    np.testing.assert_array_equal(file.read(0, len(tokens)), tokens)
    assert file.documents is not None and file.documents.count == len(docs)
    np.testing.assert_array_equal(file.documents.edges(0, len(docs)), np.cumsum([0, *(len(flat(doc)) for doc in docs)]))


@pytest.mark.parametrize("samples", [None, 100, 150, 260, 290, 300, 600])
@pytest.mark.parametrize("part", [(0.0, 1.0), (0.0, 0.969)])
def test_megatrons_samples(tmp_path: Path, samples: int | None, part: tuple[float, float]) -> None:
    """Sample for sample, over epochs of which the last is shuffled apart, or not."""
    gpt = pytest.importorskip("megatron.core.datasets.gpt_dataset", reason=MEGATRON)
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    docs = documents(120)
    write_megatron(tmp_path / "a", [[doc] for doc in docs])
    tokenizer = SimpleNamespace(vocab_size=100, eod=0, unique_identifiers={}, pad=-1)
    config = gpt.GPTDatasetConfig(
        random_seed=1234,
        sequence_length=LENGTH,
        blend=([str(tmp_path / "a")], None),
        split="1",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=tokenizer,
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.0,
    )
    indices = np.arange(int(round(part[0] * 120)), int(round(part[1] * 120)), dtype=np.int32)
    low_level = IndexedDataset(str(tmp_path / "a"))
    theirs = gpt.GPTDataset(low_level, str(tmp_path / "a"), indices, samples, Split.train, config)
    options: dict[str, Any] = {"seed": 1234, "order": "megatron", "samples": samples, "split": part}
    ours = TokenDataset(tmp_path / "a", LENGTH, **options)
    masked = TokenDataset(tmp_path / "a", LENGTH, documents="mask", **options)
    assert len(ours) == len(theirs) >= (samples or 1)
    rows, apart = (dataset.rows(range(len(theirs))) for dataset in (ours, masked))
    for number in range(len(theirs)):
        sample = theirs[number]
        np.testing.assert_array_equal(rows["input_ids"][number], sample["tokens"])
        np.testing.assert_array_equal(rows["shift_labels"][number], sample["labels"])
        np.testing.assert_array_equal(apart["position_ids"][number], sample["position_ids"])
        crossing = sample["tokens"] == 0  # the last of a document would predict the first of another
        np.testing.assert_array_equal(apart["shift_labels"][number], np.where(crossing, -100, sample["labels"]))


def test_refusals(tmp_path: Path) -> None:
    write_ds(tmp_path / "a.ds", documents(40))
    write_megatron(tmp_path / "b", [[doc] for doc in documents(40)])
    for path, options, match in [
        ("a.ds", {"order": "megatron"}, "a.ds is none"),
        ("b.bin", {"order": "megatron", "shuffle": False}, "an order of its own"),
        ("b.bin", {"order": "fair"}, "order='fair' is not one of"),
        ("b.bin", {"samples": 9}, "belong to order="),
        ("b.bin", {"skip_samples": 9}, "belong to order="),
        ("a.ds", {"order": "nanoset", "samples": 9, "skip_samples": 9}, "leaves nothing of the 9 samples"),
        ("a.ds", {"order": "nanoset", "skip_samples": -1}, "skip_samples=-1 leaves nothing"),
        ("a.ds", {"order": "nanoset", "folder_weights": [1, 2]}, "2 weights do not cover 1 folders"),
        ("a.ds", {"order": "nanoset", "folder_weights": [0.0]}, r"folder_weights=\[0.0\] cannot be"),
    ]:
        with pytest.raises(ValueError, match=match):
            TokenDataset(tmp_path / path, LENGTH, token_size=2, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="b.bin: .* tokens are no sample of 99999"):
        TokenDataset(tmp_path / "b.bin", 99_999, order="megatron")
    with pytest.raises(FileNotFoundError, match="no path was given"):
        TokenDataset([], LENGTH)

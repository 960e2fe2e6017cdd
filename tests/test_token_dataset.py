"""Rows of tokens: their labels and positions, their order, every token once, workers, and what a large set costs."""

from __future__ import annotations

import logging
import math
import os
import pickle
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.spec import AbstractFileSystem
from token_files import count_requests, documents, flat, write_ds, write_megatron
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from hf_nanotron.data import TokenDataset
from hf_nanotron.data.identity import difference
from hf_nanotron.data.tokens import row_reader
from hf_nanotron.data.tokens.permutation import Permutation

LENGTH = 16


def in_order(path: Any, **options: Any) -> TokenDataset:
    return TokenDataset(path, LENGTH, **{"token_size": 2, "shuffle": False} | options)


def test_rows_in_order(tmp_path: Path) -> None:
    """Row i begins at token i * S, and its last token predicts the first of the next row."""
    tokens = write_ds(tmp_path / "a.ds", documents(60, vocabulary=60_000))
    dataset = in_order(tmp_path / "a.ds")
    assert len(dataset) == len(tokens) // LENGTH
    for number in (0, 3, len(dataset) - 2):
        start = number * LENGTH
        row = dataset[number]
        assert set(row) == {"input_ids", "labels", "shift_labels"} == set(dataset.columns)
        assert row["input_ids"].dtype is torch.int64
        assert row["input_ids"].tolist() == row["labels"].tolist() == tokens[start : start + LENGTH].tolist()
        assert row["shift_labels"].tolist() == tokens[start + 1 : start + LENGTH + 1].tolist()


def test_no_token_follows_the_last(tmp_path: Path) -> None:
    write_ds(tmp_path / "a.ds", [list(range(2 * LENGTH))])
    last = in_order(tmp_path / "a.ds")[1]["shift_labels"].tolist()
    assert last == [*range(LENGTH + 1, 2 * LENGTH), -100]


def expected_mask(docs: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, the same with -100 for the first of each document, and the number of each token's document."""
    tokens = flat(docs)
    owner = np.repeat(np.arange(len(docs)), [len(doc) for doc in docs])
    first = np.concatenate([[True], owner[1:] != owner[:-1]])
    return tokens, np.where(first, -100, tokens), owner


@pytest.mark.parametrize("kind", ["index", "eos", "megatron"])
def test_masked_documents(tmp_path: Path, kind: str) -> None:
    docs = documents(60)
    if kind == "megatron":
        write_megatron(tmp_path / "a", [[doc] for doc in docs])
        dataset = in_order(tmp_path / "a", documents="mask")
    else:
        write_ds(tmp_path / "a.ds", docs, index=kind == "index")
        dataset = in_order(tmp_path / "a.ds", documents="mask", eos_token_id=None if kind == "index" else 0)
    tokens, labels, owner = expected_mask(docs)
    rows = dataset.rows(np.arange(len(dataset)))
    for number in range(len(dataset)):
        part = slice(number * LENGTH, (number + 1) * LENGTH)
        np.testing.assert_array_equal(rows["input_ids"][number], tokens[part])
        np.testing.assert_array_equal(rows["labels"][number][1:], labels[part][1:])
        after = np.append(labels, -100)[part.start + 1 : part.stop + 1]
        np.testing.assert_array_equal(rows["shift_labels"][number], after)
        position, expected = 0, []
        for place, doc in enumerate(owner[part]):
            position = position + 1 if place and doc == owner[part][place - 1] else 0
            expected.append(position)
        np.testing.assert_array_equal(rows["position_ids"][number], expected)


@pytest.mark.parametrize("handling", ["cross", "mask", "pack"])
def test_loss_file(tmp_path: Path, handling: str) -> None:
    """A token of loss 0 is in no label; all others are what they are without the file."""
    docs = [[number + 1] * 9 for number in range(40)]
    tokens = np.arange(40 * 9)
    docs = tokens.reshape(40, 9).tolist()
    loss = np.random.default_rng(1).integers(0, 2, len(tokens))
    write_ds(tmp_path / "a.ds", docs, loss=loss)
    with_loss, without = (in_order(tmp_path / "a.ds", documents=handling, loss_mask=use) for use in (True, False))
    places = np.arange(len(without))
    ours, plain = with_loss.rows(places), without.rows(places)
    for name in ("labels", "shift_labels"):
        kept = (plain[name] != -100) & (loss[np.maximum(plain[name], 0)] == 1)
        np.testing.assert_array_equal(ours[name], np.where(kept, plain[name], -100))
        assert 0 < kept.sum() < kept.size
    np.testing.assert_array_equal(ours["input_ids"], plain["input_ids"])


@pytest.mark.parametrize("kind", ["index", "eos", "megatron"])
@pytest.mark.parametrize("window", [7, 1_000])
def test_packed_documents(tmp_path: Path, kind: str, window: int) -> None:
    """Every document comes once, whole or cut at full rows, in every epoch."""
    docs = [*documents(150, longest=60), [5] * (3 * LENGTH - 1) + [0]]
    docs = [[token if token == 0 else 1 + (7 * n + i) % 99 for i, token in enumerate(d)] for n, d in enumerate(docs)]
    if kind == "megatron":
        write_megatron(tmp_path / "a", [[doc] for doc in docs])
        path = tmp_path / "a"
    else:
        path = tmp_path / "a.ds"
        write_ds(path, docs, index=kind == "index")
    dataset = TokenDataset(path, LENGTH, token_size=2, documents="pack", eos_token_id=0, pack_window=window)
    expected = sorted(
        (tuple(doc[i : i + LENGTH]), doc[i + LENGTH] if i + LENGTH < len(doc) else -100)
        for doc in docs
        for i in range(0, len(doc), LENGTH)
    )
    orders = []
    for epoch in (0, 1):
        rows = dataset.rows(np.arange(len(dataset)), epoch)
        orders.append(rows["input_ids"])
        found = []
        for ids, shifted, positions in zip(
            *(rows[n] for n in ("input_ids", "shift_labels", "position_ids")), strict=True
        ):
            starts = [*np.flatnonzero(positions == 0).tolist(), LENGTH]
            for start, stop in zip(starts, starts[1:], strict=False):
                np.testing.assert_array_equal(positions[start:stop], np.arange(stop - start))
                piece, targets = ids[start:stop], shifted[start:stop]
                if (targets == -100).all() and (piece == 0).all() and (stop - start > 1 or stop == LENGTH):
                    filled = stop == LENGTH
                    if filled and (stop - start > 1 or (tuple(piece), -100) not in expected):
                        continue
                np.testing.assert_array_equal(targets[:-1], piece[1:])
                found.append((tuple(piece.tolist()), int(targets[-1])))
        short = [item for item in expected if item[0] != (0,)]  # a lone 0 looks like what fills a row
        assert sorted(item for item in found if item[0] != (0,)) == short
    assert not np.array_equal(*orders)
    assert sorted(map(tuple, orders[0].tolist())) == sorted(map(tuple, orders[1].tolist()))


def test_packed_waste(tmp_path: Path) -> None:
    lengths = np.maximum(np.random.default_rng(0).lognormal(5, 1.2, 20_000).astype(int), 1)
    (np.arange(lengths.sum()) % 999).astype("<u2").tofile(tmp_path / "a.ds")
    np.cumsum(lengths).astype("<u8").tofile(tmp_path / "a.ds.index")
    dataset = TokenDataset(tmp_path / "a.ds", 1024, token_size=2, documents="pack")
    assert 1 - dataset.tokens / (len(dataset) * 1024) <= 0.01


def test_order_is_a_permutation_of_each_epoch(tmp_path: Path) -> None:
    for number in range(3):
        write_ds(tmp_path / f"{number}.ds", documents(50, seed=number))
    dataset = TokenDataset(tmp_path, LENGTH, token_size=2, seed=5)
    plain = in_order(tmp_path).rows(range(len(dataset)))["input_ids"]
    for epoch in (0, 3):
        order = dataset.order(epoch)
        np.testing.assert_array_equal(order, Permutation(len(dataset), 5, epoch)(np.arange(len(dataset))))
        dataset.set_epoch(epoch)
        np.testing.assert_array_equal(dataset.rows(range(len(dataset)))["input_ids"], plain[order])
        np.testing.assert_array_equal(dataset[-1]["input_ids"], plain[order[-1]])
    assert sorted(dataset.order(0)) == list(range(len(dataset)))


@pytest.mark.parametrize("handling", ["cross", "mask", "pack"])
def test_remote_rows_are_the_local_ones(tmp_path: Path, handling: str) -> None:
    count_requests()
    docs = documents(200)
    loss = [number % 3 > 0 for number in range(len(flat(docs)))]
    write_ds(tmp_path / "a.ds", docs, loss=loss)
    write_ds("counting://rows/a.ds", docs, loss=loss)
    options: dict[str, Any] = {"token_size": 2, "documents": handling}
    local = TokenDataset(tmp_path, LENGTH, **options)
    remote = TokenDataset("counting://rows", LENGTH, block_bytes=128, cache_bytes=512, **options)
    places = np.arange(len(local))
    for name, column in local.rows(places).items():
        np.testing.assert_array_equal(remote.rows(places)[name], column)


def test_a_batch_of_remote_rows_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = count_requests()
    write_ds("counting://rows/a.ds", documents(2_000))
    dataset = TokenDataset("counting://rows/a.ds", LENGTH, token_size=2, block_bytes=64)
    from token_files import CountingFileSystem

    calls = []
    plain = CountingFileSystem.cat_ranges
    monkeypatch.setattr(CountingFileSystem, "cat_ranges", lambda *a, **k: calls.append(len(a[1])) or plain(*a, **k))
    requests.clear()
    dataset.rows(range(8))
    assert calls == [8]
    assert sum(size for _, _, size in requests) <= 8 * 128


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers(tmp_path: Path, context: str) -> None:
    write_ds(tmp_path / "a.ds", documents(80))
    dataset = TokenDataset(tmp_path, LENGTH, token_size=2, documents="mask")
    expected = dataset.rows(range(len(dataset)))
    loader = DataLoader(dataset, batch_size=5, num_workers=1, multiprocessing_context=context)
    batches = list(loader)
    for name, column in expected.items():
        np.testing.assert_array_equal(torch.cat([batch[name] for batch in batches]).numpy(), column)
    assert len(pickle.dumps(dataset)) < 5_000


def test_stock_loss_of_masked_rows(tmp_path: Path) -> None:
    """The loss of a stock model over a row is that over its documents one by one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    docs = [[7, 3, 9, 0], [5, 2, 8, 8, 1, 0], [4, 6, 6, 2, 9, 0]]
    write_ds(tmp_path / "a.ds", docs)
    for handling in ("mask", "pack"):
        row = in_order(tmp_path, documents=handling)[0]
        with torch.no_grad():
            ours = model(**{name: value[None] for name, value in row.items()}, use_cache=False).loss
            alone = [model(input_ids=(ids := torch.tensor([doc])), labels=ids).loss for doc in docs]
        weights = [len(doc) - 1 for doc in docs]
        expected = sum(float(loss) * n for loss, n in zip(alone, weights, strict=True)) / sum(weights)
        assert math.isclose(float(ours), expected, rel_tol=1e-5)


def test_refusals(tmp_path: Path) -> None:
    write_ds(tmp_path / "a.ds", documents(30), index=False)
    for options, match in [
        ({"documents": "mask"}, r"a.ds does not say where its documents end.*eos_token_id"),
        ({"documents": "pack"}, r"a.ds does not say where its documents end"),
        ({"documents": "whole"}, "documents='whole' is not one of 'cross', 'mask', 'pack'"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": "a"}, "seed='a' cannot be: a whole number, at least 0"),
        ({"pack_window": 0}, "pack_window=0 cannot be: a whole number, at least 1"),
        ({"eos_token_id": -1, "documents": "mask"}, "eos_token_id=-1 cannot be"),
        ({"eos_token_id": 70_000, "documents": "mask"}, "eos_token_id=70000 ends no document .* ids reach to 65535"),
        ({"eos_token_id": 300, "documents": "pack", "vocab_size": 300}, "eos_token_id=300 .* vocabulary has 300 ids"),
    ]:
        with pytest.raises(ValueError, match=match):
            in_order(tmp_path, **options)
    with pytest.raises(ValueError, match="a.ds: no file has sequence_length=100000 tokens"):
        TokenDataset(tmp_path, 100_000, token_size=2)
    for length in (0, 16.0, "16", True):
        with pytest.raises(ValueError, match=f"sequence_length={length!r} cannot be: a whole number"):
            TokenDataset(tmp_path, length, token_size=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eos_token_id=120 ends no document .*: the vocabulary has 120 ids"):
        in_order(tmp_path, documents="mask", eos_token_id=120).with_vocabulary(120)
    with pytest.raises(ValueError, match="a.ds would be one document of .* eos_token_id=4444 is not among its ids"):
        len(in_order(tmp_path, documents="pack", eos_token_id=4444))
    write_ds(tmp_path / "book.ds", [[*range(1, 100), 0]], index=False)  # one document, with its end
    assert len(TokenDataset(tmp_path / "book.ds", 16, token_size=2, documents="pack", eos_token_id=0)) == 7
    (tmp_path / "book.ds").unlink()
    (tmp_path / "empty.ds").touch()
    for handling in ("cross", "pack"):
        with pytest.raises(ValueError, match="empty.ds: there are no tokens in it"):
            TokenDataset(tmp_path / "empty.ds", 16, token_size=2, documents=handling, eos_token_id=0)  # type: ignore
    (tmp_path / "empty.ds").unlink()
    with pytest.raises(IndexError, match="of a dataset with"):
        in_order(tmp_path)[10**6]
    with pytest.raises(ValueError, match="a.ds: token .* the vocabulary has 20"):
        in_order(tmp_path, vocab_size=20).rows(range(9))


def test_a_file_is_read_once(tmp_path: Path) -> None:
    """By two names, it would be trained on twice in each epoch."""
    write_ds(tmp_path / "a.ds", documents(30))
    write_ds("memory://twice/a.ds", documents(30))
    path = str(tmp_path / "a.ds")
    (tmp_path / "b.ds").symlink_to(path)
    os.link(path, tmp_path / "c.ds")
    for paths, match in [
        ([path, tmp_path / "b.ds"], "b.ds is .*a.ds, too: an epoch would read it twice"),
        ([path, tmp_path / "c.ds"], "c.ds is .*a.ds, too"),
        ([path, f"{tmp_path}/a*"], "a.ds is given twice"),
        (tmp_path, "b.ds is .*a.ds, too"),
        (["memory://twice", "memory://twice/a.ds"], "a.ds is given twice"),
    ]:
        with pytest.raises(ValueError, match=match):
            TokenDataset(paths, 16, token_size=2)  # type: ignore[arg-type]
    (tmp_path / "b.ds").unlink()
    (tmp_path / "b.ds").write_bytes(Path(path).read_bytes())  # as long, and not the same
    stat = os.stat(path)
    os.utime(tmp_path / "b.ds", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    one = len(in_order(path))
    assert len(in_order([path, str(tmp_path / "b.ds")])) == 2 * one  # type: ignore[arg-type]


def test_identity_tells_a_file_that_changed(tmp_path: Path) -> None:
    write_ds(tmp_path / "a.ds", documents(30))
    before = in_order(tmp_path).identity()
    assert in_order(tmp_path).identity() == before
    assert in_order(tmp_path, seed=1).identity() != before
    write_ds(tmp_path / "a.ds", [*documents(30), [1]])
    assert in_order(tmp_path).identity()["files"] != before["files"]
    (tmp_path / "a.ds.index").unlink()  # packed rows are made of what ends documents then
    one, other = (in_order(tmp_path, documents="pack", eos_token_id=end).identity() for end in (0, 7))
    assert difference(one, other, []).sentence == "eos_token_id was 0 when it was saved, and is 7 now"


FILES, FILE_BYTES, INDEX_BYTES = 500, 20 * 10**9, 2 * 10**8


class VastFileSystem(AbstractFileSystem):
    """Ten terabytes of tokens, made up when they are asked for: documents of 400 tokens."""

    protocol = "vast"
    read_bytes = 0

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        files = [(f"/vast/{n:03d}.ds{end}", size) for n in range(FILES) for end, size in SIZES.items()]
        return [{"name": name, "size": size, "type": "file", "mtime": 1} for name, size in files]

    def cat_file(self, path: str, start: int = 0, end: int = 0, **kwargs: Any) -> bytes:
        type(self).read_bytes += end - start
        if not path.endswith(".index"):
            return bytes(end - start)
        first = start // 8
        ends = (np.arange(first, -(-end // 8), dtype="<u8") + 1) * 400
        return ends.tobytes()[start - 8 * first : end - 8 * first]


SIZES = {"": FILE_BYTES, ".index": FILE_BYTES // 2 // 400 * 8}


@pytest.mark.parametrize("handling", ["cross", "mask"])
def test_first_batch_of_ten_terabytes_reads_little(handling: str) -> None:
    fsspec.register_implementation("vast", VastFileSystem, clobber=True)
    VastFileSystem.read_bytes = 0
    dataset = TokenDataset("vast://vast", 4096, token_size=2, documents=handling)  # type: ignore[arg-type]
    assert len(dataset) == FILES * (FILE_BYTES // 2 // 4096) > 10**9
    assert VastFileSystem.read_bytes <= FILES * 8
    rows = dataset.rows(range(8))
    assert VastFileSystem.read_bytes < 20 * 2**20
    if handling == "mask":
        begins = dataset.order(0, np.arange(8)) % (FILE_BYTES // 2 // 4096) * 4096
        np.testing.assert_array_equal((begins[:, None] + np.arange(4096))[:, 500:] % 400, rows["position_ids"][:, 500:])


def test_first_row_of_ten_terabytes_of_sparse_files(tmp_path: Path) -> None:
    for number in range(FILES):
        with open(tmp_path / f"{number:03d}.ds", "wb") as file:
            file.truncate(FILE_BYTES)
    dataset = TokenDataset(tmp_path, 4096, token_size=2)
    assert dataset.tokens == FILES * FILE_BYTES // 2
    assert not dataset[0]["input_ids"].any()
    assert sum(1 for file in dataset.files if file.file._map is not None) == 1  # type: ignore[union-attr]


def test_ends_of_files_that_are_not_read_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whole files, or more than a hundredth; otherwise nothing."""
    for name, tokens in (("a", 1000), ("b", 30), ("c", 1001)):
        np.arange(1, tokens + 1, dtype="<u2").tofile(tmp_path / f"{name}.ds")

    def said(names: str, length: int) -> str:
        caplog.clear()
        TokenDataset([tmp_path / f"{name}.ds" for name in names], length, token_size=2)
        return caplog.text

    logger = logging.getLogger("hf_nanotron.data.tokens.token_dataset")
    logger.addHandler(caplog.handler)
    short = said("ab", 100)
    assert "30 of 1030 tokens (2.91%) are not read" in short
    assert "1 of 2 files" in short and "b.ds, …) are shorter" in short and 'documents="pack" reads them' in short
    assert not said("c", 100) and not said("c", 91)
    left = said("a", 120)
    assert "40 of 1000 tokens (4.00%) are not read" in left and "shorter" not in left
    logger.removeHandler(caplog.handler)


def test_an_end_that_ends_nothing_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a further read: by the rows that are trained on."""
    rng = np.random.default_rng(0)
    rng.integers(1, 50, 2**19, np.uint16).tofile(tmp_path / "a.ds")
    said: list[str] = []
    monkeypatch.setattr(row_reader.logger, "warning", said.append)
    for end, count in ((99, 1), (3, 0)):
        said.clear()
        dataset = TokenDataset(tmp_path, 2**12, token_size=2, documents="mask", eos_token_id=end)
        for place in range(128):
            dataset.rows([place])
        assert sum(f"eos_token_id={end} ends no document in the first 262144" in each for each in said) == count

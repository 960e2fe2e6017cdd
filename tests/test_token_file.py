"""One reader for `.ds`, Megatron's `.bin/.idx` and `.npy`, local and remote; what it refuses; what it asks for."""

from __future__ import annotations

import gc
import os
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from token_files import count_requests, documents, flat, write_ds, write_megatron

from hf_nanotron.data import TokenDataset
from hf_nanotron.data.tokens import byte_ranges
from hf_nanotron.data.tokens.byte_ranges import BlockCache, RemoteFile
from hf_nanotron.data.tokens.documents import EndsInFile, scan
from hf_nanotron.data.tokens.file_map import map_file
from hf_nanotron.data.tokens.sorted_ints import SortedInts
from hf_nanotron.data.tokens.token_file import TokenFile, open_token_files
from hf_nanotron.data.tokens.token_formats import parse_metadata


def edges_of(docs: list[list[int]]) -> np.ndarray:
    return np.cumsum([0, *map(len, docs)])


def check_documents(file: TokenFile, edges: np.ndarray) -> None:
    """All edges, parts of them, and those within windows."""
    assert file.documents is not None
    count = len(edges) - 1
    assert file.documents.count == count
    for first, stop in [(0, count), (0, 1), (count // 2, count), (1, count - 1)]:
        np.testing.assert_array_equal(file.documents.edges(first, stop), edges[first : stop + 1])
    inner = edges[(edges > 0) & (edges < file.tokens)]
    for start, stop in [
        (1, 50),
        (37, 38),
        (0, file.tokens),
        (file.tokens - 3, file.tokens),
        (int(edges[3]), int(edges[9])),
    ]:
        found = file.documents.within(start, stop)
        expected = inner[(inner >= start) & (inner <= stop)]
        np.testing.assert_array_equal(found[(found > 0) & (found < file.tokens)], expected)


@pytest.mark.parametrize("token_size", [2, 4])
def test_ds(tmp_path: Path, token_size: int) -> None:
    docs = documents(50, vocabulary=60_000)
    tokens = write_ds(tmp_path / "a.ds", docs, token_size)
    file = TokenFile.open(str(tmp_path / "a.ds"), token_size=token_size)
    assert len(file) == len(tokens)
    np.testing.assert_array_equal(file.read(0, len(tokens)), tokens)
    np.testing.assert_array_equal(file.read(7, 20), tokens[7:20])
    assert len(file.read(len(tokens) - 3, len(tokens) + 9)) == 3
    check_documents(file, edges_of(docs))


def test_an_index_that_does_not_end_with_its_file_is_refused(tmp_path: Path) -> None:
    """Cut off, empty or of another file it would join documents, in silence."""
    docs = documents(20)
    write_ds(tmp_path / "a.ds", docs)
    path, index = str(tmp_path / "a.ds"), tmp_path / "a.ds.index"
    ends, count = np.fromfile(index, "<u8"), len(flat(docs))
    for wrong in (ends[:-1].tolist(), [], ends[:7].tolist(), [*ends.tolist(), count + 1]):
        np.array(wrong, "<u8").tofile(index)
        last = wrong[-1] if wrong else 0
        with pytest.raises(ValueError, match=f"its last document ends at token {last}, and the file has {count}"):
            TokenFile.open(path, token_size=2)


@pytest.mark.parametrize("index", [True, False])
def test_ids_read_with_half_their_width_are_refused(tmp_path: Path, index: bool) -> None:
    """Each would become two, of which the second one is 0: all of them are in the vocabulary."""
    docs = documents(20)
    write_ds(tmp_path / "a.ds", docs, token_size=4, index=index)
    match = "ends at token .* another width" if index else "every second one of its first .* pass token_size=4"
    with pytest.raises(ValueError, match=match):
        TokenFile.open(str(tmp_path / "a.ds"), token_size=2, vocab_size=100)
    tokens = TokenFile.open(str(tmp_path / "a.ds"), token_size=4, vocab_size=100).read(0, 10**6)
    np.testing.assert_array_equal(tokens, flat(docs))
    (tmp_path / "a.ds.index").unlink(missing_ok=True)
    for ids in ([0] * 200, [5, 0] * 10):  # nothing is written, or too little to say
        write_ds(tmp_path / "a.ds", [ids], index=False)
        assert TokenFile.open(str(tmp_path / "a.ds"), token_size=2).tokens == len(ids)


def test_width_and_tokenizer_of_the_metadata(tmp_path: Path) -> None:
    docs = documents(9)
    tokens = write_ds(tmp_path / "a.ds", docs, 4, metadata=f"org/name|4\n{len(flat(docs))}\nsome T")
    file = TokenFile.open(str(tmp_path / "a.ds"))
    assert (file.dtype, file.tokenizer) == (np.dtype("<u4"), "org/name")
    np.testing.assert_array_equal(file.read(0, 99), tokens[:99])
    assert parse_metadata("Unknown Tokenizer|2|2\n10\n10 T", "") == (None, 2, 10)
    assert parse_metadata("gpt2\n10\n10 T", "") == ("gpt2", None, 10)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"])
def test_megatron(tmp_path: Path, dtype: str) -> None:
    docs = documents(40)
    tokens = write_megatron(tmp_path / "a_text_document", [[doc] for doc in docs], dtype)
    for name in ("a_text_document.bin", "a_text_document"):
        file = TokenFile.open(str(tmp_path / name))
        np.testing.assert_array_equal(file.read(0, len(tokens)), tokens)
        np.testing.assert_array_equal(file.read(5, 29), tokens[5:29])
    check_documents(file, edges_of(docs))


def test_megatron_documents_of_several_sequences(tmp_path: Path) -> None:
    docs = [documents(1 + number % 4, seed=number) for number in range(30)]
    write_megatron(tmp_path / "a", docs)
    check_documents(TokenFile.open(str(tmp_path / "a")), np.cumsum([0, *(len(flat(doc)) for doc in docs)]))


def test_many_documents_are_searched_in_blocks(tmp_path: Path) -> None:
    docs = [[1] * (1 + number % 3) for number in range(5_000)]
    write_megatron(tmp_path / "a", [[doc] for doc in docs])
    write_ds(tmp_path / "a.ds", docs)
    for file in (TokenFile.open(str(tmp_path / "a.bin")), TokenFile.open(str(tmp_path / "a.ds"), token_size=2)):
        check_documents(file, edges_of(docs))


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i8", "<u4"])
def test_npy(tmp_path: Path, dtype: str) -> None:
    tokens = flat(documents(30))
    np.save(tmp_path / "a.npy", tokens.astype(dtype))
    file = TokenFile.open(str(tmp_path / "a.npy"))
    np.testing.assert_array_equal(file.read(0, len(tokens)), tokens)
    np.testing.assert_array_equal(file.read(11, 13), tokens[11:13])
    assert file.documents is None


def test_loss(tmp_path: Path) -> None:
    docs = documents(20)
    loss = np.random.default_rng(1).integers(0, 2, len(flat(docs)))
    write_ds(tmp_path / "a.ds", docs, loss=loss)
    file = TokenFile.open(str(tmp_path / "a.ds"), token_size=2)
    np.testing.assert_array_equal(file.read_loss(3, 44), loss[3:44])


def test_scan_finds_documents_across_chunks(tmp_path: Path) -> None:
    docs = documents(50)
    write_ds(tmp_path / "a.ds", docs, index=False)
    file = TokenFile.open(str(tmp_path / "a.ds"), token_size=2)
    np.testing.assert_array_equal(scan(file.chunks(7), 0).all_edges, edges_of(docs))
    assert scan(iter([np.array([1, 0, 2])]), 0).all_edges.tolist() == [0, 2, 3]


def test_folder_pattern_and_list(tmp_path: Path) -> None:
    for name in "ba":
        write_ds(tmp_path / f"{name}.ds", documents(5, seed=ord(name)))
    names = [str(tmp_path / f"{name}.ds") for name in "ab"]
    for paths in (str(tmp_path), f"{tmp_path}/*.ds", names):
        assert [file.path for file in open_token_files(paths, token_size=2)] == names


def test_names_with_the_marks_of_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "run[1]"
    (folder / "folder.ds").mkdir(parents=True)
    for name in ("a[1].ds", "a*.ds", "b.ds"):
        write_ds(folder / name, documents(5))

    def names(path: str) -> list[str]:
        return [Path(file.path).name for file in open_token_files(path, token_size=2)]

    assert names(str(folder)) == ["a*.ds", "a[1].ds", "b.ds"]
    assert names(str(folder / "a[1].ds")) == ["a[1].ds"]
    assert names(str(folder / "a*.ds")) == ["a*.ds"]
    write_megatron(folder / "m[2]", [[doc] for doc in documents(5)])
    assert names(str(folder / "m[2]")) == ["m[2].bin"]
    assert names(str(tmp_path / "run*" / "m?2?.bin")) == ["m[2].bin"]
    (folder / "m[2].bin").unlink()
    assert names(str(tmp_path / "run*" / "*.ds")) == ["a*.ds", "a[1].ds", "b.ds"]


def test_remote_reads_blocks_once(tmp_path: Path) -> None:
    requests = count_requests()
    docs = documents(2_000)
    tokens = write_ds("counting://corpus/a.ds", docs)
    cache = BlockCache(block=256, limit=1024)
    (file,) = open_token_files("counting://corpus", token_size=2, cache=cache)
    assert [size for _, _, size in requests] == [8]  # the last end alone
    requests.clear()
    np.testing.assert_array_equal(file.read(1_000, 1_010), tokens[1_000:1_010])
    assert [(start, size) for _, start, size in requests] == [(1792, 256)]
    np.testing.assert_array_equal(file.read(1_001, 1_011), tokens[1_001:1_011])
    assert len(requests) == 1
    np.testing.assert_array_equal(file.read(900, 1_400), tokens[900:1_400])
    assert [(start, size) for _, start, size in requests[1:]] == [(2048, 768)]  # neighbours in one request
    np.testing.assert_array_equal(file.read(0, len(tokens)), tokens)
    assert sum(map(len, cache.blocks.values())) <= 1024
    check_documents(file, edges_of(docs))


def test_remote_search_is_logarithmic() -> None:
    requests = count_requests()
    docs = [[1, 2]] * 20_000
    write_ds("counting://corpus/a.ds", docs)
    (file,) = open_token_files("counting://corpus/a.ds", token_size=2, cache=BlockCache(block=8 * 1024))
    requests.clear()
    assert file.documents is not None
    assert file.documents.within(23_456, 23_459).tolist() == [23_456, 23_458]
    assert len(requests) <= 6


def test_remote_megatron_and_npy(tmp_path: Path) -> None:
    count_requests()
    docs = [documents(1 + number % 2, seed=number) for number in range(300)]
    tokens = write_megatron(tmp_path / "a", docs)
    with fsspec.open("counting://corpus/a.npy", "wb") as file:
        np.save(file, tokens)
    for end in (".bin", ".idx"):
        with fsspec.open(f"counting://corpus/a{end}", "wb") as file:
            file.write((tmp_path / f"a{end}").read_bytes())
    np.testing.assert_array_equal(TokenFile.open("counting://corpus/a.npy").read(3, 50), tokens[3:50])
    for path in ("counting://corpus/a.bin", "counting://corpus/a"):
        (found,) = open_token_files(path, cache=BlockCache(block=256, limit=512))
        np.testing.assert_array_equal(found.read(3, 5_000), tokens[3:5_000])
        check_documents(found, np.cumsum([0, *(len(flat(doc)) for doc in docs)]))


def test_pickled(tmp_path: Path) -> None:
    docs = documents(20)
    tokens = write_ds(tmp_path / "a.ds", docs)
    write_ds("memory://pickled/a.ds", docs)
    for path in (str(tmp_path / "a.ds"), "memory://pickled/a.ds"):
        file = TokenFile.open(path, token_size=2)
        file.read(0, 9)
        data = pickle.dumps(file)
        assert len(data) < 2_000
        np.testing.assert_array_equal(pickle.loads(data).read(0, len(tokens)), tokens)


def test_refusals(tmp_path: Path) -> None:
    docs = documents(20)
    count = len(flat(docs))

    def refused(match: str, error: type[Exception] = ValueError, path: str = "a.ds", **options: object) -> None:
        with pytest.raises(error, match=match):
            file = TokenFile.open(str(tmp_path / path), **options)
            file.read(0, file.tokens)
            if file.documents:
                file.documents.within(0, file.tokens)

    def written(**options: object) -> Path:
        for old in tmp_path.glob("a.*"):
            old.unlink()
        write_ds(tmp_path / "a.ds", docs, **options)
        return tmp_path / "a.ds"

    path = written()
    refused("a.ds does not say how wide")
    refused("token_size=3 cannot be", token_size=3)
    refused("contradict", token_size=2, dtype="uint32")
    refused("ids are integers", dtype="float32")
    refused("are little-endian", dtype=">u2")
    refused(r"a.ds: token \d+ has the id \d+, and the vocabulary has 50", token_size=2, vocab_size=50)
    path.write_bytes(path.read_bytes()[:-1])
    refused("a.ds: .* bytes are no whole number", token_size=2)

    written(metadata=f"gpt2|3\n{count}\n")
    refused(r"a.ds.metadata: ids of 3 bytes cannot be")
    written(metadata=f"gpt2|2\n{count + 1}\n")
    refused(f"a.ds has {count} tokens, and its .metadata says {count + 1}")
    written(metadata=f"gpt2|2\n{count}\n")
    refused("says that an id has 2 bytes, and 4", token_size=4)
    written(loss=[1] * (count - 1))
    refused("a.ds.loss has", token_size=2)

    index = Path(f"{written()}.index")
    ends = np.fromfile(index, "<u8")
    np.append(ends, ends[-1] + np.uint64(1)).tofile(index)
    refused("a.ds.index: its last document ends at token", token_size=2)
    ends[[3, 12]] = ends[[12, 3]]
    ends.tofile(index)
    refused("a.ds.index: number .* must ascend", token_size=2)
    index.write_bytes(index.read_bytes()[:-1])
    refused("a.ds.index: .* bytes are no whole number", token_size=2)

    refused("there is no such file or folder", FileNotFoundError, "absent")
    (tmp_path / "empty").mkdir()
    refused("the folder .*empty holds no .ds, .bin or .npy file", FileNotFoundError, "empty")
    refused("matches no", FileNotFoundError, "x*")


def test_refusals_of_megatron_and_npy(tmp_path: Path) -> None:
    docs = [[doc] for doc in documents(20)]

    def refused(match: str, change: tuple[int, bytes] | None = None, cut: int = 0, path: str = "a.bin") -> None:
        write_megatron(tmp_path / "a", docs, "int32")
        data = bytearray((tmp_path / "a.idx").read_bytes())
        if change:
            data[change[0] : change[0] + len(change[1])] = change[1]
        (tmp_path / "a.idx").write_bytes(data[: len(data) - cut])
        with pytest.raises(ValueError, match=match):
            TokenFile.open(str(tmp_path / path))

    refused("a.idx is no index of Megatron's", (0, b"X"))
    refused("a.idx has version 2", (9, b"\x02"))
    refused("a.idx: 9 is no dtype", (17, b"\x09"))
    refused("a.idx: .* cut off or damaged", cut=3)
    refused("too few for an index", cut=34 + 20 * 12 + 21 * 8 - 10)
    refused("reach from sequence 1", (34 + 20 * 12, b"\x01"))
    refused("they are not of one pair", (17, b"\x03"))
    (tmp_path / "a.idx").unlink()
    with pytest.raises(FileNotFoundError, match="a.bin has no .idx beside it"):
        TokenFile.open(str(tmp_path / "a.bin"))
    write_megatron(tmp_path / "b", [[[1, -2, 3]]], "int32")
    with pytest.raises(ValueError, match=r"b.bin: token 1 has the id -2"):
        TokenFile.open(str(tmp_path / "b.bin")).read(0, 3)
    write_megatron(tmp_path / "b", [[[1, 2.5]]], "float32")
    with pytest.raises(ValueError, match=r"b.bin: token 1 is 2.5"):
        TokenFile.open(str(tmp_path / "b.bin")).read(0, 3)
    np.save(tmp_path / "c.npy", np.zeros((2, 3), np.int32))
    with pytest.raises(ValueError, match=r"c.npy holds int32 of shape \(2, 3\)"):
        TokenFile.open(str(tmp_path / "c.npy"))
    np.save(tmp_path / "c.npy", np.array([1, 2**63 + 5], np.uint64))
    with pytest.raises(ValueError, match=r"c.npy: token 1 has the id 9223372036854775813; rows hold ids as int64"):
        TokenFile.open(str(tmp_path / "c.npy")).read(0, 2)
    for header in (b"{'descr': '<u4',", b"'''aaaaa", b"  a\n b\nc"):
        (tmp_path / "c.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        with pytest.raises(ValueError, match="c.npy is no .npy file that can be read"):
            TokenFile.open(str(tmp_path / "c.npy"))
    np.save(tmp_path / "c.npy", np.zeros(30, np.int32))
    (tmp_path / "c.npy").write_bytes((tmp_path / "c.npy").read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"c.npy: .* cut off"):
        TokenFile.open(str(tmp_path / "c.npy"))


def test_files_of_one_set_agree(tmp_path: Path) -> None:
    docs = documents(5)
    count = len(flat(docs))
    write_ds(tmp_path / "a.ds", docs, metadata=f"gpt2|2\n{count}\n")
    write_ds(tmp_path / "b.ds", docs, metadata=f"llama|2\n{count}\n")
    with pytest.raises(ValueError, match=r"b.ds was written with another tokenizer than .*a.ds \('llama', and that is"):
        open_token_files(str(tmp_path))
    write_ds(tmp_path / "b.ds", docs, 4, metadata=f"gpt2|4\n{count}\n")
    with pytest.raises(ValueError, match="b.ds has ids of 4 bytes, and .*a.ds of 2; one set has one width"):
        open_token_files(str(tmp_path))
    np.save(tmp_path / "c.npy", np.arange(9))
    with pytest.raises(ValueError, match="holds .ds and .npy files"):
        open_token_files(str(tmp_path))


def test_secrets_of_an_address_are_not_shown() -> None:
    with pytest.raises(FileNotFoundError) as error:
        TokenFile.open("memory://user:hunter22@host/absent.ds", token_size=2)
    assert "hunter22" not in str(error.value)


@pytest.mark.parametrize("ends", [[3, 2, 8], [2**63, 8]])
def test_secrets_are_not_shown_by_documents_and_reprs(ends: list[int]) -> None:
    options = {"secret": "hunter33"}
    path, cache = "https://user:hunter22@host/a.ds", BlockCache(options=options)
    file = RemoteFile(path, 8 * len(ends), cache)
    cache.blocks[path, 0] = np.array(ends, "<u8").tobytes()
    documents = EndsInFile(SortedInts(file, 0, len(ends)), 8)
    with pytest.raises(ValueError, match=r"https://\*\*\*@host/a.ds") as error:
        documents.edges(0, len(ends))
    shown = f"{error.value} {file} {cache} {documents} {TokenFile(path, file, np.dtype('u2'), 0, 8, documents)}"
    assert "hunter" not in shown


def test_maps_keep_no_file_open(tmp_path: Path) -> None:
    """A corpus may have more files than a process may open."""
    docs = documents(40, longest=80)
    for number in range(20):
        write_ds(tmp_path / f"{number:02d}.ds", docs)
    dataset = TokenDataset(tmp_path, 16, token_size=2, documents="mask", shuffle=False)
    before = len(os.listdir("/proc/self/fd"))
    rows = dataset.rows(np.arange(len(dataset)))["input_ids"]
    assert len(os.listdir("/proc/self/fd")) == before and all(file.file._map is not None for file in dataset.files)
    of_one = flat(docs)[: len(flat(docs)) // 16 * 16].reshape(-1, 16)
    np.testing.assert_array_equal(rows, np.tile(of_one, (20, 1)))

    path = str(tmp_path / "00.ds")
    array = map_file(path, 10)[2:].view("<u2")
    gc.collect()  # the map lasts as long as what was made of it
    assert array.tolist() == flat(docs)[1:5].tolist() and not array.flags.writeable
    with pytest.raises(
        OSError, match=r"00\.ds has [0-9]+ bytes: it is shorter than when it was opened \(1000000 bytes"
    ):
        map_file(path, 10**6)
    with pytest.raises(FileNotFoundError):
        map_file(path + "x", 1)


class Flaky(BaseHTTPRequestHandler):
    """Serves ranges of `data`; the first of `answers` says what becomes of the next request."""

    data = np.arange(1000, dtype="<u2").tobytes()
    answers: ClassVar[list[str]] = []
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        answer = self.answers.pop(0) if self.answers else "ok"
        start, stop = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = self.data[start : stop + 1]
        self.send_response({"ok": 206, "cut": 206}.get(answer) or int(answer))
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: len(part) // 2] if answer == "cut" else part)
        self.close_connection = answer == "cut"

    def log_message(self, *args: object) -> None: ...


def test_a_server_that_fails_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may pass does not end a run; what lasts is not asked for again."""
    assert len(byte_ranges.PAUSES) == 3 and 10 < sum(byte_ranges.PAUSES) < 11  # as the page says
    monkeypatch.setattr(byte_ranges, "PAUSES", (0.0, 0.0))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/a.ds"
        file = RemoteFile(url, len(Flaky.data), BlockCache(block=64))
        for first, answers in enumerate((["503", "cut"], ["cut"], ["429", "500"])):
            Flaky.answers[:] = answers
            read = file.array(np.dtype("<u2"), 200 * first, 10)
            assert read.tolist() == list(range(100 * first, 100 * first + 10)) and not Flaky.answers
        for answers, left in ((["503"] * 4, 1), (["403", "ok"], 1), (["404", "ok"], 1)):
            Flaky.answers[:] = answers
            with pytest.raises(OSError, match=f"a.ds cannot be read .*{answers[0] if answers[0] != '404' else 'a.ds'}"):
                file.array(np.dtype("<u2"), 1000, 10)
            assert len(Flaky.answers) == left
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_ignores_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    write_ds("memory://whole/a.ds", [[1, 2, 3], [4, 5]])
    files = fsspec.filesystem("memory")
    monkeypatch.setattr(
        type(files), "cat_ranges", lambda self, paths, *_, **__: [self.cat_file(path) for path in paths]
    )
    with pytest.raises(OSError, match="a.ds.index gave 16 bytes when 8 were asked for: its server ignores ranges"):
        open_token_files("memory://whole/a.ds", token_size=2)

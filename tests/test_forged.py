"""Files of a checkpoint that are forged, with valid checksums: a sentence, and nothing is taken for something else."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_training_state import Layout, simulated_mesh
from torch import nn
from transformers.optimization import get_scheduler

from hf_nanotron.checkpoint.directory import retention as manager
from hf_nanotron.checkpoint.directory.commit import begin, commit, describe
from hf_nanotron.checkpoint.directory.retention import choose
from hf_nanotron.checkpoint.directory.verify import MARKER, check, parse_marker, read_marker
from hf_nanotron.checkpoint.files import checked
from hf_nanotron.checkpoint.files.checked import read_checked, write_checked
from hf_nanotron.checkpoint.files.disk import checksum_of
from hf_nanotron.checkpoint.hub.weights import HubWeights
from hf_nanotron.checkpoint.state import file as state_file
from hf_nanotron.checkpoint.state.read import StoredState
from hf_nanotron.checkpoint.state.slices import Slice
from hf_nanotron.checkpoint.state.training_state import DIRECTORY, load_training_state, state_pieces, state_values
from hf_nanotron.checkpoint.state.values import decode, encode
from hf_nanotron.convert.nanotron.config import architecture
from hf_nanotron.convert.nanotron.format import find_shards, refuse_mup
from hf_nanotron.convert.nanotron.mapping import parameters
from hf_nanotron.parallel.shard_spec import ShardSpec, even_parts
from hf_nanotron.parallel.zero.segment import Segment

NANOTRON = Path(__file__).parent / "data" / "nanotron" / "tp2_pp2" / "2"
INDEX = f"{DIRECTORY}/index.json"
PROGRESS = "trainer_state.json"


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


OTHERS: list[Any] = [
    None, True, -1, 0, 1, 7, 10**18, 2**70, 1.5, "", "x", "../x", "0" * 8, [], [[]], [1, 2], {}, {"x": {}},
    {"$": "tensor"}, {"$": "tuple", "value": 3}, {"$": 5}, {"$": "float", "value": "nan"}, nested(250),
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside, but for the items of long texts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutations(body: Any, skip: Callable[[tuple[Any, ...]], bool]) -> Iterator[tuple[str, Any]]:
    """Each value of another kind, left out, or there twice; and `body` of another kind."""
    for other in OTHERS:
        yield f"all = {str(other)[:30]}", other
    for *path, key in places(body):
        if skip((*path, key)):
            continue
        for other in (*OTHERS, "left out", "twice", "negative", "more"):
            mutant = copy.deepcopy(body)
            parent = mutant
            for step in path:
                parent = parent[step]
            value = parent[key]
            if other == "left out":
                del parent[key]
            elif other == "twice" and isinstance(parent, list):
                parent.insert(key, copy.deepcopy(value))
            elif other == "twice":
                parent["a new key"] = copy.deepcopy(value)
            elif other in ("negative", "more") and type(value) is int:
                parent[key] = -value if other == "negative" else value + 8
            elif other not in ("negative", "more"):
                parent[key] = other
            if mutant != body or other == "twice":
                yield f"{'.'.join(map(str, [*path, key]))[:80]} = {str(other)[:30]}", mutant


def attempt_all(
    body: Any, use: Callable[[Any], None], *names: str, skip: Callable[[tuple[Any, ...]], bool] = lambda path: False
) -> Counter[str]:
    """How many mutations of `body` were taken and refused by `use`: by a sentence that has one of `names`."""
    found: Counter[str] = Counter()
    for what, mutant in mutations(body, skip):
        try:
            use(mutant)
        except ValueError as error:
            assert type(error) is ValueError, (what, repr(error))
            assert any(name in str(error) for name in names) and len(str(error)) < 2000, (what, str(error)[:500])
            found["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:300]}") from error
        else:
            found["taken"] += 1
    return found


# ---- a checkpoint of two ranks ----


class Rank:
    """A weight that is cut in two, a vector and a number, with their optimizer."""

    def __init__(self, rank: int) -> None:
        self.mesh = simulated_mesh(Layout(2, 1), rank)
        specs = [ShardSpec("weight", (4, 6), 0, even_parts(4, 2), rank)]
        specs += [ShardSpec(name, shape, rank=rank) for name, shape in {"norm": (3,), "scale": ()}.items()]
        self.segments = []
        for spec in specs:
            size = int(torch.Size(spec.local_shape).numel())
            master = nn.Parameter(torch.arange(size) + 100.0 * rank)
            self.segments.append(Segment(spec.name, spec, 0, size, master, torch.ones(size)))
        self.optimizer = torch.optim.AdamW([s.master for s in self.segments], lr=1e-2)
        self.scheduler = get_scheduler("cosine", self.optimizer, 1, 10)

    def step(self) -> None:
        for segment in self.segments:
            segment.master.grad = segment.master.detach().sin()
        self.optimizer.step()
        self.scheduler.step()


CURSOR = {"step": 1, "epoch": 0, "samples": 4, "order": {"kind": "sequential", "samples": 9, "fingerprint": 77}}


def write_checkpoint(output_dir: Path, step: int) -> Path:
    directory = output_dir / f"checkpoint-{step}"
    begin(directory)
    folder = directory / DIRECTORY
    state_file.clear(folder)
    ranks = [Rank(0), Rank(1)]
    for number, rank in enumerate(ranks):
        rank.step()
        state_file.write_rank(folder, number, state_pieces(rank.segments, rank.optimizer, rank.mesh), 16)
    extra = {"data_cursor": {**CURSOR, "state": {"shard": 1}, "refused": None}}
    state_file.commit(folder, 2, state_values(ranks[0].mesh, ranks[0].optimizer, ranks[0].scheduler, extra))
    (directory / "config.json").write_text("{}")
    progress = {"global_step": step, "epoch": 0.5, "log_history": [{"loss": 1.5, "step": 1}], "best_metric": None}
    (directory / PROGRESS).write_text(json.dumps({**progress, "stateful_callbacks": {"TrainerControl": {"args": {}}}}))
    describe(directory, 0)
    commit(directory, 1, step, 1.0)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("made"), 2)


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "checkpoint-2")


def write_json(path: Path, body: Any) -> None:
    """As `write_checked`, of any value: what is no object has the form of one."""
    if isinstance(body, dict):
        write_checked(path, body, durable=False)
    else:
        write_checked(path, {"x": body}, durable=False)


def sign(directory: Path, *names: str) -> None:
    """Give the marker the lengths and checksums that forged files have."""
    marker = {key: value for key, value in read_checked(directory / MARKER).items() if key != "crc32"}
    for name in names:
        path = directory / name
        marker["files"][name] |= {"bytes": path.stat().st_size}
        if marker["files"][name]["crc32"] is not None:
            marker["files"][name]["crc32"] = checksum_of(path)
    write_checked(directory / MARKER, marker, durable=False)


def body_of(path: Path) -> dict[str, Any]:
    return {key: value for key, value in read_checked(path).items() if key != "crc32"}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    with StoredState(directory / DIRECTORY) as stored:
        for name, shape in stored.shapes().items():
            for kind, dtype in stored.kinds(name).items():
                whole = Slice.whole(name, shape)
                found[f"{name}|{kind}"] = torch.empty(whole.numel, dtype=dtype)
                stored.fill(whole, kind, found[f"{name}|{kind}"])
    return found


# ---- every value of every file ----


def test_markers(checkpoint: Path) -> None:
    """Read, and as a checkpoint of its own: what is taken has the files that it names."""
    marker = checkpoint / MARKER

    def use(body: Any) -> None:
        write_json(marker, body)
        try:
            read_marker(checkpoint)
            parse_marker(marker.read_bytes(), MARKER)
            check(checkpoint)
        except ValueError:
            assert choose(checkpoint.parent) is None
            raise

    found = attempt_all(body_of(marker), use, MARKER, "checkpoint-2/")
    assert found["refused"] > 500 and found["taken"] < 30, found


def test_descriptions_of_ranks(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint-1"
    begin(directory)
    (directory / "a").write_text("a")
    describe(directory, 0, [directory / "a"])
    path = directory / ".written" / "rank-00000.json"
    folder = directory / ".written"

    def use(body: Any) -> None:
        folder.mkdir(exist_ok=True)
        write_json(path, body)
        commit(directory, 1, 1, 1.0)

    found = attempt_all(
        body_of(path), use, "rank-00000.json", "a rank has described it", "a rank names", "checkpoint-1/a "
    )
    assert found["refused"] > 60 and found["taken"] < 30, found


def test_indices(checkpoint: Path) -> None:
    """What is taken gives the tensors that were saved, to all that read it."""
    path, expected = checkpoint / INDEX, tensors(checkpoint)

    def use(body: Any) -> None:
        write_json(path, body)
        found = tensors(checkpoint)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
        sign(checkpoint, INDEX)
        check(checkpoint)

    def is_like_another(path: tuple[Any, ...]) -> bool:
        return path[0] == "values" or (path[0] == "pieces" and (path[1:2] > (1,) or path[3:4] == ("exp_avg_sq",)))

    found = attempt_all(body_of(path), use, "index.json", "rank-0000", skip=is_like_another)
    assert found["refused"] > 1000 and found["taken"] < 150, found


def test_parts_of_an_index(tmp_path: Path) -> None:
    rank = Rank(0)
    state_file.clear(tmp_path)
    state_file.write_rank(tmp_path, 0, state_pieces(rank.segments[1:2], rank.optimizer, rank.mesh), 16)
    path = tmp_path / "rank-00000.json"
    body = body_of(path)

    def use(mutant: Any) -> None:
        write_json(path, mutant)
        state_file.commit(tmp_path, 1, {})
        StoredState(tmp_path)

    found = attempt_all(body, use, "rank-00000.json", "index.json", "rank-0000")
    assert found["refused"] > 300, found


def test_values_that_a_run_loads(checkpoint: Path) -> None:
    """What is taken can be trained on."""
    path = checkpoint / INDEX
    body = body_of(path)
    parts = {"values": body["values"], "scalars": body["scalars"]}

    def use(mutant: Any) -> None:
        write_json(path, {**body, **mutant} if isinstance(mutant, dict) else {**body, "values": mutant})
        rank = Rank(0)
        load_training_state(checkpoint, rank.mesh, rank.segments, rank.optimizer, rank.scheduler)
        rank.step()

    found = attempt_all(parts, use, "index.json", "training_state was written by", skip=lambda path: "layout" in path)
    assert found["refused"] > 900, found


def test_encoded_values() -> None:
    value = {"a": (1, 2.5), "b": {1: "x"}, "c": Counter([3]), "d": torch.zeros(2, 2), "e": torch.zeros(3).numpy()}
    assert attempt_all(encode(value, "v"), lambda body: decode(body, "the state"), "the state")["refused"] > 300


def test_progress(checkpoint: Path) -> None:
    path = checkpoint / PROGRESS

    def use(body: Any) -> None:
        path.write_text(json.dumps(body))
        sign(checkpoint, PROGRESS)
        check(checkpoint, deep=False)

    assert attempt_all(json.loads(path.read_text()), use, PROGRESS)["refused"] > 150
    for text in ("", "{", "[" * 100_000, '{"global_step": 1, "global_step": 2}', "\xff", "9" * 5000):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=rf"{PROGRESS} (is damaged: its crc32|was cut off|has grown)"):
            check(checkpoint, deep=False)  # a checkpoint that is named
        sign(checkpoint, PROGRESS)
        with pytest.raises(ValueError, match=f"{PROGRESS} is truncated or damaged"):
            check(checkpoint, deep=False)


def test_hub_indices(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({f"w{number}": torch.zeros(2)}, tmp_path / f"model-{number}.safetensors")
    path = tmp_path / "model.safetensors.index.json"

    def use(body: Any) -> None:
        path.write_text(json.dumps(body))
        weights = HubWeights(tmp_path)
        for name in weights.names():
            weights.check(name, (2,))

    body = {"metadata": {"total_size": 16}, "weight_map": {"w1": "model-1.safetensors", "w2": "model-2.safetensors"}}
    assert attempt_all(body, use, path.name, "safetensors")["refused"] > 50
    for text in ("", "{", "[" * 100_000, '{"weight_map": {}, "weight_map": {}}', "\xff", "9" * 5000):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=rf"{path.name} is truncated or damaged.*fetch it again"):
            HubWeights(tmp_path)


def test_configs_of_nanotron() -> None:
    body = json.loads((NANOTRON / "model_config.json").read_text())

    def use(mutant: Any) -> None:
        if not isinstance(mutant, dict):
            raise ValueError("model_config.json")  # `read_json` says it
        for _ in parameters(architecture(mutant)):
            pass

    found = attempt_all(body, use, "model_config.json", "hidden_size")
    assert found["refused"] > 300, found


def test_headers_of_nanotron(tmp_path: Path) -> None:
    parameter = next(p for p in parameters(architecture(json.loads((NANOTRON / "model_config.json").read_text()))))
    step = shutil.copytree(NANOTRON, tmp_path / "2")
    shard = find_shards(step, parameter)[0]
    content = shard.path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])

    def use(mutant: Any) -> None:
        raw = json.dumps(mutant).encode()
        shard.path.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])
        find_shards(step, parameter)

    found = attempt_all(header, use, "safetensors", "embedding")
    assert found["refused"] > 150, found
    texts = ["", "0", "0,1", "0,1,0#0,1,0", "None,None,None#1,2", "9" * 5000, "a#b", "0,1,1#0,1,1;", "0,-1,-1#0,1,1"]
    for text in texts:
        with pytest.raises(ValueError, match="safetensors"):
            use({**header, "__metadata__": {**header["__metadata__"], "local_global_slices_pairs": text}})


RUN_FILES = ["[", "- 1", "model: [1]", "model: {init_method: 3}", "a: !!python/object:os.x {}", "\0", "[" * 400]


@pytest.mark.parametrize("text", RUN_FILES)
def test_run_files_of_nanotron(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    try:
        refuse_mup(tmp_path)
    except ValueError as error:
        assert "config.yaml" in str(error)


# ---- one thing taken for another ----


def _swap(one: dict[str, Any], other: dict[str, Any], *kinds: str) -> None:
    one["tensors"][kinds[0]], other["tensors"][kinds[-1]] = other["tensors"][kinds[-1]], one["tensors"][kinds[0]]


def _of(body: dict[str, Any], name: str, rank: int = 0) -> dict[str, Any]:
    return [piece for piece in body["pieces"] if piece["name"] == name][rank]


def _copy(piece: dict[str, Any], kind: str, source: str) -> None:
    piece["tensors"][kind] = copy.copy(piece["tensors"][source])


MIX_UPS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "the moments of a tensor": lambda b: _swap(_of(b, "weight"), _of(b, "weight"), "exp_avg", "exp_avg_sq"),
    "the moments of all pieces": lambda b: [
        _swap(piece, piece, "exp_avg", "exp_avg_sq") for piece in b["pieces"] if piece["name"] == "weight"
    ],
    "a moment and the weights": lambda b: _swap(_of(b, "norm"), _of(b, "norm"), "exp_avg", "master"),
    "one moment read twice": lambda b: _copy(_of(b, "weight"), "exp_avg", "exp_avg_sq"),
    "the weights read as a moment": lambda b: _copy(_of(b, "norm"), "exp_avg_sq", "master"),
    "the same piece of another rank": lambda b: _swap(_of(b, "weight"), _of(b, "weight", 1), "exp_avg"),
    "the files of two pieces": lambda b: (
        _of(b, "weight").update(file="rank-00001.safetensors"),
        _of(b, "weight", 1).update(file="rank-00000.safetensors"),
    ),
    "the ranges of two pieces": lambda b: (
        _of(b, "weight").update(ranges=[[2, 4]]),
        _of(b, "weight", 1).update(ranges=[[0, 2]]),
    ),
    "another dtype of the same bytes": lambda b: _of(b, "norm")["tensors"]["exp_avg"].__setitem__(0, "I32"),
    "another shape of the same size": lambda b: [
        piece.update(shape=[6, 4], ranges=[[piece["ranges"][0][0] // 2 * 3, piece["ranges"][0][1] // 2 * 3]])
        for piece in b["pieces"]
        if piece["name"] == "weight"
    ],
    "two names": lambda b: (_of(b, "norm").update(name="other"), b["scalars"].update(other=b["scalars"].pop("norm"))),
    "the names of kinds": lambda b: _of(b, "norm")["tensors"].update(momentum=_of(b, "norm")["tensors"].pop("exp_avg")),
    "other bytes of the same tensor": lambda b: _of(b, "norm")["tensors"]["exp_avg"].__setitem__(
        1, _of(b, "norm")["tensors"]["exp_avg"][1] + 4
    ),
    "a tensor that is left out": lambda b: (b["pieces"].remove(_of(b, "norm")), b["scalars"].pop("norm")),
    "a piece twice": lambda b: b["pieces"].append(_of(b, "norm")),
    "a file twice": lambda b: b["files"].update({"rank-00002.safetensors": b["files"]["rank-00001.safetensors"]}),
    "files changed for each other": lambda b: b["files"].update(
        dict(zip(b["files"], reversed(list(b["files"].values())), strict=True))
    ),
    "a header of nothing": lambda b: b["files"]["rank-00000.safetensors"].update(header=[0, 0]),
    "a header of a petabyte": lambda b: b["files"]["rank-00000.safetensors"].update(header=[10**15, 0]),
    "blocks of a petabyte": lambda b: b.update(block_bytes=1 << 50),
}


@pytest.mark.parametrize("what", [name for name in MIX_UPS if name != "another shape of the same size"])
def test_one_thing_is_not_taken_for_another(checkpoint: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_checkpoint(checkpoint.parent, 1)
    body = body_of(checkpoint / INDEX)
    MIX_UPS[what](body)
    write_checked(checkpoint / INDEX, body)
    sign(checkpoint, INDEX)
    texts: list[str] = []
    monkeypatch.setattr(manager.logger, "warning", texts.append)
    assert choose(checkpoint.parent) == before
    assert len(texts) == 1 and "skipping checkpoint-2" in texts[0]
    with pytest.raises(ValueError, match=r"(index\.json|rank-0000\d\.safetensors)"):
        rank = Rank(0)
        load_training_state(checkpoint, rank.mesh, rank.segments, rank.optimizer, rank.scheduler)


def test_an_index_of_another_checkpoint(checkpoint: Path) -> None:
    """With its files, each valid by itself, but not those of the marker."""
    other = write_checkpoint(checkpoint.parent / "other", 2)
    (other / DIRECTORY / "rank-00002.safetensors").write_bytes(b"more")
    shutil.copy(other / INDEX, checkpoint / INDEX)
    body = body_of(checkpoint / INDEX)
    del body["files"]["rank-00001.safetensors"]
    body["pieces"] = [piece for piece in body["pieces"] if piece["file"] != "rank-00001.safetensors"]
    for piece in body["pieces"]:
        if piece["name"] == "weight":
            piece["shape"], piece["dim"], piece["ranges"] = [2, 6], None, []
    write_checked(checkpoint / INDEX, body)
    sign(checkpoint, INDEX)
    with pytest.raises(ValueError, match="index.json is not the one of this checkpoint: rank-00001.safetensors"):
        check(checkpoint)


# ---- what is no marker at all ----


def _fifo(path: Path) -> None:
    import os

    os.mkfifo(path)


BAD_MARKERS: dict[str, Callable[[Path], Any]] = {
    "a directory": lambda path: path.mkdir(),
    "a full directory": lambda path: (path / "x").mkdir(parents=True),
    "a pipe": _fifo,
    "nothing": lambda path: path.write_bytes(b""),
    "junk": lambda path: path.write_bytes(bytes(range(256)) * 100),
    "a list": lambda path: path.write_text("[1, 2]"),
    "a terabyte": lambda path: (path.touch(), __import__("os").truncate(path, 1 << 40)),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link out": lambda path: path.symlink_to(__file__),
    "another version": lambda path: write_checked(path, {"format": "hf_nanotron checkpoint", "version": 2}),
    "a true version": lambda path: write_checked(path, {"format": "hf_nanotron checkpoint", "version": True}),
    "deep nesting": lambda path: path.write_bytes(_signed(b'"x":' + b"[" * 50_000 + b"\n")),
    "no text": lambda path: path.write_bytes(_signed(b'"x":"\xff\xfe"}\n')),
    "a number of many digits": lambda path: path.write_bytes(_signed(b'"x":' + b"9" * 5000 + b"}\n")),
    "a key twice": lambda path: path.write_bytes(_signed(b'"files":{},"files":{}}\n')),
}


def _signed(rest: bytes) -> bytes:
    return checked._first_line(rest) + rest


@pytest.mark.parametrize("what", BAD_MARKERS)
def test_a_bad_marker_falls_back(checkpoint: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_checkpoint(checkpoint.parent, 1)
    (checkpoint / MARKER).unlink()
    BAD_MARKERS[what](checkpoint / MARKER)
    texts: list[str] = []
    monkeypatch.setattr(manager.logger, "warning", texts.append)
    assert choose(checkpoint.parent) == before
    assert len(texts) == 1 and texts[0].startswith("skipping checkpoint-2")
    with pytest.raises(ValueError, match=MARKER):
        check(checkpoint, deep=False)  # a checkpoint that is named


def test_files_without_a_digest_are_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As older versions have written them."""
    expected = tensors(checkpoint)
    monkeypatch.setattr(state_file, "DIGEST", "unknown")
    old = write_checkpoint(checkpoint.parent / "old", 2)
    check(old)
    found = tensors(old)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)

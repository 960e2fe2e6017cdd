"""A training state written by the ranks of one layout is read by those of any other, bit by bit, or refused by name."""

from __future__ import annotations

import copy
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf, nan, prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pool import WorkerPool
from safetensors import safe_open
from torch import nn
from torch.optim import lr_scheduler
from transformers.optimization import GreedyLR, get_scheduler

from hf_nanotron.checkpoint.directory import verify
from hf_nanotron.checkpoint.files import readers
from hf_nanotron.checkpoint.state import read
from hf_nanotron.checkpoint.state.file import StatePiece, clear, commit, write_rank
from hf_nanotron.checkpoint.state.index import StateIndex
from hf_nanotron.checkpoint.state.read import StoredState
from hf_nanotron.checkpoint.state.slices import Slice
from hf_nanotron.checkpoint.state.training_state import (
    DIRECTORY,
    is_owner,
    load_training_state,
    state_pieces,
    state_values,
)
from hf_nanotron.checkpoint.state.values import decode, encode
from hf_nanotron.parallel.config import ParallelConfig
from hf_nanotron.parallel.mesh import Coordinates, Group, ParallelMesh
from hf_nanotron.parallel.shard_spec import Ranges, ShardSpec, even_parts, head_parts
from hf_nanotron.parallel.together import together
from hf_nanotron.parallel.zero.segment import Segment

SHAPES: dict[str, tuple[tuple[int, ...], int | None]] = {  # Hub name -> shape, cut dimension
    "norm": ((13,), None),
    "scale": ((), None),
    "router": ((5, 7), None),
    "bias": ((24,), 0),
    "vocabulary": ((17, 6), 0),  # does not divide
    "rowwise": ((11, 24), 1),
    "key": ((8, 5), 0),  # two heads, which several ranks hold
    "gate_up": ((48, 7), 0),  # two ranges a rank
    "experts.gate_up": ((3, 48, 5), 1),
    "experts.down": ((3, 7, 24), 2),
    "experts.whole": ((24, 3, 5), 0),
    "convolution": ((3, 24, 2, 3), 1),
}
KINDS = {"master": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.float32}
State = dict[str, dict[str, torch.Tensor]]


def save_training_state(
    directory: str | Path,
    mesh: ParallelMesh,
    segments: list[Segment],
    optimizer: Any,
    scheduler: Any,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write `training_state/` into a checkpoint, every rank its own part."""
    folder = Path(directory) / DIRECTORY

    def write() -> dict[str, Any]:
        values = state_values(mesh, optimizer, scheduler, extra or {})
        write_rank(folder, mesh.rank, state_pieces(segments, optimizer, mesh))
        return values

    what = "saving the training state"
    together(mesh, what, lambda: clear(folder) if mesh.rank == 0 else None)
    values = together(mesh, what, write)
    together(mesh, what, lambda: commit(folder, mesh.world_size, values) if mesh.rank == 0 else None)


def parts_of(name: str, size: int, tp_size: int) -> tuple[Ranges, ...]:
    if name == "key":
        return head_parts(2, size // 2, tp_size)
    if "gate_up" in name:
        half = size // 2
        return tuple((r[0], (r[0][0] + half, r[0][1] + half)) for r in even_parts(half, tp_size))
    cuts = [size * rank // tp_size for rank in range(tp_size + 1)]
    return tuple(((start, stop),) for start, stop in zip(cuts, cuts[1:], strict=False))


def spec_of(name: str, tp_size: int, tp_rank: int) -> ShardSpec:
    shape, dim = SHAPES[name]
    parts = () if dim is None else parts_of(name, shape[dim], tp_size)
    return ShardSpec(name, shape, dim, parts, tp_rank)


@dataclass(frozen=True)
class Layout:
    """Ranks over tp and ZeRO shards. With a seed, the shards are of any lengths, some of them empty."""

    tp_size: int
    shard_size: int
    seed: int | None = None

    def ranks(self) -> list[list[tuple[ShardSpec, int, int]]]:
        ranks: list[list[tuple[ShardSpec, int, int]]] = [[] for _ in range(self.tp_size * self.shard_size)]
        for name in SHAPES:
            for tp_rank in range(self.tp_size):
                spec = spec_of(name, self.tp_size, tp_rank)
                numel = prod(spec.local_shape)
                cuts = [numel * i // self.shard_size for i in range(1, self.shard_size)]
                if self.seed is not None:  # the same on all ranks with the same part, as of a run
                    chance = random.Random(f"{self.seed} {name} {spec.ranges if spec.parts else ()}")
                    cuts = sorted(chance.randint(0, numel) for _ in cuts)
                for i, (start, stop) in enumerate(zip([0, *cuts], [*cuts, numel], strict=True)):
                    ranks[i * self.tp_size + tp_rank].append((spec, start, stop))
        return ranks


def random_state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {kind: torch.randn(shape, generator=generator).to(dtype) for kind, dtype in KINDS.items()}
        for name, (shape, _) in SHAPES.items()
    }


def write(
    directory: Path, state: State, layout: Layout, block_bytes: int, values: dict[str, Any] | None = None
) -> None:
    clear(directory)
    ranks = layout.ranks()
    for rank, held in enumerate(ranks):
        pieces = [
            StatePiece(
                spec,
                start,
                stop,
                {kind: spec.slice(whole).reshape(-1)[start:stop] for kind, whole in state[spec.name].items()},
                {"step": torch.tensor(7.0)},
            )
            for spec, start, stop in held
            if spec.is_first_replica
        ]
        write_rank(directory, rank, pieces, block_bytes)
    commit(directory, len(ranks), values or {})


def check_read(directory: Path, state: State, layout: Layout) -> list[float]:
    """Read as every rank of `layout`, and compare; returns bytes read / bytes wanted of each rank."""
    factors = []
    for held in layout.ranks():
        wanted_bytes = 0
        with StoredState(directory) as stored:
            for spec, start, stop in held:
                for kind, dtype in KINDS.items():
                    out = torch.full((stop - start,), nan)
                    stored.fill(Slice(spec, start, stop), kind, out)
                    assert torch.equal(out, spec.slice(state[spec.name][kind]).reshape(-1)[start:stop].float())
                    wanted_bytes += out.numel() * dtype.itemsize
                assert stored.scalars(spec.name) == {"step": torch.tensor(7.0)}
            factors.append(stored.bytes_read / max(wanted_bytes, 1))
    return factors


# ---- any layout into any other ----


@pytest.mark.parametrize("seed", range(24))
def test_any_layout_reads_what_any_other_wrote(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if seed % 12 == 2:  # as a state of gigabytes is read: in threads, more files than may be open
        in_threads(monkeypatch)
        monkeypatch.setattr(read, "OPEN_FILES", 2)
    chance = random.Random(seed)
    first, second = (
        Layout(chance.choice((1, 2, 4, 8)), chance.choice((1, 2, 3)), chance.choice((None, seed))) for _ in range(2)
    )
    state = random_state(seed)
    write(tmp_path, state, first, chance.choice((8, 64, 1024, 1 << 20)), {"seed": seed})
    assert {path.name for path in tmp_path.iterdir()} - {"index.json"} <= {
        f"rank-{rank:05d}.safetensors" for rank in range(first.tp_size * first.shard_size)
    }
    assert set(check_read(tmp_path, state, first)) <= {0.0, 1.0}, "the same layout reads its own bytes and no others"
    check_read(tmp_path, state, second)
    with StoredState(tmp_path) as stored:
        assert stored.values == {"seed": seed}
        assert stored.shapes() == {name: shape for name, (shape, _) in SHAPES.items()}
        for name, whole in state.items():
            out = torch.empty(whole["master"].numel())
            stored.fill(Slice.whole(name, SHAPES[name][0]), "master", out)
            assert torch.equal(out, whole["master"].reshape(-1))


def test_slices_are_few_boxes_that_hold_each_element_once() -> None:
    for layout in (Layout(1, 5, 3), Layout(4, 3), Layout(8, 2, 1)):
        counts = {name: torch.zeros(shape, dtype=torch.int) for name, (shape, _) in SHAPES.items()}
        for spec, start, stop in (piece for held in layout.ranks() for piece in held):
            if not spec.is_first_replica:
                continue
            boxes = Slice(spec, start, stop).boxes
            assert len(boxes) <= max(2 * len(spec.global_shape) - 1, 1) * max(len(spec.ranges) if spec.parts else 1, 1)
            for box in boxes:
                counts[spec.name][tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))] += 1
        assert all((count == 1).all() for count in counts.values())


def write_parts(directory: Path, whole: torch.Tensor, dim: int, tp_size: int, shards: int) -> None:
    clear(directory)
    for rank in range(tp_size * shards):
        spec = ShardSpec("w", tuple(whole.shape), dim, even_parts(whole.shape[dim], tp_size), rank % tp_size)
        flat = spec.slice(whole).reshape(-1)
        start, stop = (flat.numel() * i // shards for i in (rank // tp_size, rank // tp_size + 1))
        write_rank(directory, rank, [StatePiece(spec, start, stop, {"master": flat[start:stop]})], 1 << 16)
    commit(directory, tp_size * shards, {})


@pytest.mark.parametrize(
    ("shape", "written", "read", "most"),
    [
        # (dimension, tp, shards) of the writer and the reader; bytes read / bytes wanted
        ((2048, 1024), (0, 1, 3), (0, 4, 2), 2.1),
        ((2048, 1024), (1, 4, 2), (1, 1, 2), 1.1),
        ((2048, 1024), (1, 2, 3), (0, 2, 2), 1.6),
        ((2048, 1024), (1, 1, 2), (1, 4, 2), 4.1),  # short rows: the disk reads the bytes between them anyway
        ((4, 2048, 512), (1, 1, 1), (1, 4, 1), 1.1),  # long ones: skipped
        ((8, 512, 512), (2, 1, 2), (0, 4, 2), 1.1),
    ],
)
def test_few_bytes_are_read_besides_those_wanted(
    tmp_path: Path, shape: tuple[int, ...], written: tuple[int, int, int], read: tuple[int, int, int], most: float
) -> None:
    whole = torch.randn(shape)
    write_parts(tmp_path, whole, *written)
    dim, tp_size, shards = read
    for rank in range(tp_size * shards):
        spec = ShardSpec("w", shape, dim, even_parts(shape[dim], tp_size), rank % tp_size)
        flat = spec.slice(whole).reshape(-1)
        size = flat.numel() // shards
        start = rank // tp_size * size
        with StoredState(tmp_path) as stored:
            out = torch.empty(size)
            stored.fill(Slice(spec, start, start + size), "master", out)
            assert torch.equal(out, flat[start : start + size])
            assert stored.bytes_read <= most * size * 4


def test_many_rows_are_no_loop(tmp_path: Path) -> None:
    """300 000 rows cut into columns, read into columns of another width, with a few calls."""
    whole = torch.randn(300_000, 32)
    write_parts(tmp_path, whole, 1, 4, 3)
    spec = ShardSpec("w", tuple(whole.shape), 1, even_parts(32, 2), 1)
    out, calls = torch.empty(300_000 * 16), Counter[str]()
    with StoredState(tmp_path) as stored:
        sys.setprofile(lambda frame, event, argument: calls.update([event]))
        try:
            stored.fill(Slice(spec, 0, out.numel()), "master", out)
        finally:
            sys.setprofile(None)
    assert calls["call"] + calls["c_call"] < 30_000, calls
    assert torch.equal(out.view(300_000, 16), whole[:, 16:])


def test_other_tools_read_the_files(tmp_path: Path) -> None:
    state = random_state(0)
    write(tmp_path, state, Layout(2, 1), 64)
    with safe_open(tmp_path / "rank-00000.safetensors", "pt") as file:
        part = file.get_tensor("experts.down|exp_avg|0")
        assert torch.equal(part, state["experts.down"]["exp_avg"][:, :, :12].reshape(-1))
        assert torch.equal(file.get_tensor("scale|master|0"), state["scale"]["master"].reshape(1))


def test_a_second_save_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    write(tmp_path, random_state(0), Layout(4, 2), 64)
    state = random_state(1)
    write(tmp_path, state, Layout(1, 2), 64)
    assert {path.name for path in tmp_path.iterdir()} == {
        "index.json",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    }
    check_read(tmp_path, state, Layout(2, 2))


# ---- damage ----


def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read everything in four threads, of chunks of 256 bytes."""
    monkeypatch.setattr(readers, "WORTHWHILE", 0)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1)
    monkeypatch.setattr(readers, "cores", lambda: 4)
    monkeypatch.setattr(read, "CHUNK_BYTES", 256)
    monkeypatch.setattr(verify, "CHUNK_BYTES", 256)


@pytest.mark.parametrize("threads", [False, True])
def test_all_bytes_of_a_file_are_compared_with_their_checksums(
    tmp_path: Path, threads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if threads:
        in_threads(monkeypatch)
    write(tmp_path, random_state(0), Layout(2, 1), 64)
    index = StateIndex.read(tmp_path)
    for path in sorted(tmp_path.glob("*.safetensors")):
        content = path.read_bytes()
        verify.check_blocks(path, index)
        for damaged in (content[:-1], content[:-64], content[: len(content) // 2], content[:-3] + b"abc"):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=path.name):
                verify.check_blocks(path, index)
        path.write_bytes(content)


@pytest.mark.parametrize("threads", [False, True])
def test_a_flipped_bit_is_found_in_any_file(tmp_path: Path, threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if threads:
        in_threads(monkeypatch)
    state, chance = random_state(0), random.Random(0)
    write(tmp_path, state, Layout(2, 2), 64)
    for path in sorted(tmp_path.iterdir()):
        content = path.read_bytes()
        for place in (0, 9, len(content) - 1, *(chance.randrange(len(content)) for _ in range(0 if threads else 12))):
            damaged = bytearray(content)
            damaged[place] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=path.name):
                check_read(tmp_path, state, Layout(1, 1))
        path.write_bytes(content)
    check_read(tmp_path, state, Layout(1, 1))


def test_a_short_or_missing_file_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    write(tmp_path, random_state(0), Layout(2, 2), 64)
    for path in sorted(tmp_path.iterdir()):
        content = path.read_bytes()
        for length in (len(content) - 1, len(content) // 2, 0):
            path.write_bytes(content[:length])
            with pytest.raises(ValueError, match=path.name):
                StoredState(tmp_path)
        path.unlink()
        with pytest.raises(ValueError, match=path.name):
            StoredState(tmp_path)
        path.write_bytes(content)
    StoredState(tmp_path)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    write(tmp_path, random_state(0), Layout(2, 2), 64)
    with StoredState(tmp_path) as stored:
        stored.check(Slice.whole("norm", (13,)), "exp_avg")
        with pytest.raises(ValueError, match="'momentum_buffer' for 'norm', only master, exp_avg, exp_avg_sq|only"):
            stored.check(Slice.whole("norm", (13,)), "momentum_buffer")
        with pytest.raises(ValueError, match=r"'norm'.*shape \(13,\), but in the model \(14,\)"):
            stored.fill(Slice.whole("norm", (14,)), "master", torch.empty(14))
        with pytest.raises(ValueError, match="no tensor 'other'"):
            stored.check(Slice.whole("other", (14,)), "master")
    with pytest.raises(ValueError, match="index.json"):
        StoredState(tmp_path / "nowhere")


def test_an_incomplete_state_is_not_committed(tmp_path: Path) -> None:
    spec = ShardSpec("w", (4, 6), 1, even_parts(6, 2), 0)
    other = ShardSpec("w", (4, 6), 1, even_parts(6, 2), 1)

    def pieces(*parts: tuple[ShardSpec, int, int], step: int = 1) -> list[StatePiece]:
        return [StatePiece(s, a, b, {"master": torch.zeros(b - a)}, {"step": step}) for s, a, b in parts]

    first = [pieces((spec, 0, 12))]
    for given, message in (
        (first, "elements 3:6 of dimension 1 are missing"),
        ([*first, pieces((other, 0, 5))], r"elements 5:12 of ranges \(3, 6\) of dimension 1 are missing"),
        (
            [*first, pieces((other, 0, 7)), pieces((other, 5, 12))],
            "elements 5:7 of ranges .* are stored more than once",
        ),
        ([*first, pieces((other, 0, 12), step=2)], "differs between its pieces"),
    ):
        clear(tmp_path)
        for rank, mine in enumerate(given):
            write_rank(tmp_path, rank, mine)
        with pytest.raises(ValueError, match=f"'w'.*{message}"):
            commit(tmp_path, len(given), {})
        with pytest.raises(ValueError, match="index.json"):
            StoredState(tmp_path)
    with pytest.raises(ValueError, match="rank-00002.json is missing"):
        commit(tmp_path, 3, {})
    with pytest.raises(ValueError, match=r"'w\|master\|0' twice"):
        write_rank(tmp_path, 0, first[0] * 2)
    for tensor in (torch.zeros(11), torch.zeros(12, dtype=torch.complex64), torch.zeros(4, 3)):
        with pytest.raises(ValueError, match=r"'w\|master\|0'"):
            write_rank(tmp_path, 0, [StatePiece(spec, 0, 12, {"master": tensor})])


# ---- what is not a tensor for each element ----


def test_values_come_back_as_they_were() -> None:
    value = {
        "numbers": [1, -0.0, 1e-300, inf, -inf, 2**70, True, None, np.float64(0.1)],
        "tuple": (0.9, (0.999,)),
        "keys": {1: "a", "$": 2.5, (1, 2): [()]},
        "counter": Counter([30, 30, 60]),
        "empty": {},
        "text": "ü\n$",
    }
    got = decode(json.loads(json.dumps(encode(value, "value"), allow_nan=False)))
    assert got == value
    assert type(got["counter"]) is Counter
    assert str(got["numbers"][1]) == "-0.0"
    tensors = [torch.tensor(3.0), torch.randn(2, 3).bfloat16(), torch.empty(0, 4), torch.get_rng_state()]
    for tensor, back in zip(tensors, decode(json.loads(json.dumps(encode(tensors, "value")))), strict=True):
        assert back.dtype == tensor.dtype
        assert torch.equal(back, tensor)
    assert decode(encode(nan, "value")) != decode(encode(nan, "value"))
    state = decode(json.loads(json.dumps(encode(np.random.get_state(), "value"))))
    np.random.set_state(state)
    for bad in (lambda: 0, object(), {1, 2}, b"bytes"):
        with pytest.raises(ValueError, match=r"scheduler\['lr_lambdas'\]\[1\] is a .*not pickle"):
            encode({"lr_lambdas": [None, bad]}, "scheduler")


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda o: get_scheduler("cosine", o, 2, 20),
    "wsd": lambda o: get_scheduler("warmup_stable_decay", o, 2, 20, {"num_decay_steps": 5, "min_lr_ratio": 0.1}),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "greedy": lambda o: GreedyLR(o, patience=1, smooth=True, window_size=3),
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [3, 3, 7]),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 20),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 20)], [3]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on(name: str) -> None:
    def run(steps: int, state: dict[str, Any] | None = None) -> tuple[list[float], dict[str, Any]]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler, rates = SCHEDULERS[name](optimizer), []
        if state is not None:
            optimizer.param_groups[0].update(state["group"])
            scheduler.load_state_dict(state["scheduler"])
        for _ in range(steps):
            optimizer.step()
            scheduler.step(*([1.0] if name in ("plateau", "greedy") else []))
            rates.append(optimizer.param_groups[0]["lr"])
        group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        return rates, {"scheduler": scheduler.state_dict(), "group": group}

    expected, _ = run(12)
    before, state = run(5)
    after, _ = run(7, decode(json.loads(json.dumps(encode(state, "state"), allow_nan=False))))
    assert before + after == expected


# ---- optimizers ----


class Half(torch.optim.Optimizer):
    """Momentum in bfloat16, which a plain `load_state_dict` would make fp32."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter).bfloat16())
                momentum.mul_(0.9).add_(parameter.grad)
                parameter.sub_(momentum, alpha=group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["momentum"] = state["momentum"].bfloat16()


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-2, amsgrad=True),
    "sgd": partial(torch.optim.SGD, lr=1e-2),
    "momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "nadam": partial(torch.optim.NAdam, lr=1e-2),
    "adagrad": partial(torch.optim.Adagrad, lr=1e-2),
    "half": lambda groups: Half(groups, {"lr": 1e-2}),
    "rprop": partial(torch.optim.Rprop, lr=1e-2),
}


def simulated_mesh(layout: Layout, rank: int, pp_size: int = 1, pp: int = 0, replica: int = 0) -> Any:
    shard, tp = divmod(rank, layout.tp_size)
    return SimpleNamespace(
        coordinates=Coordinates(pp=pp, dp=shard, cp=0, tp=tp, shard=shard, replica=replica, ep=0, expert_copy=rank),
        pp_size=pp_size,
        is_first_stage=pp == 0,
        rank=0,
        world_size=1,
        world=Group((0,), 0, None),
        replica=Group((0,), 0, None),
        expert_replica=Group((0,), 0, None),
        device=torch.device("cpu"),
        parallel=Layout(1, 1),
    )


class Rank:
    """Masters and optimizer of one simulated rank. The gradient of a value is a function of it and of the step."""

    def __init__(self, layout: Layout, rank: int, optimizer: str) -> None:
        self.mesh = simulated_mesh(layout, rank)
        self.segments = []
        for spec, start, stop in layout.ranks()[rank]:
            master = nn.Parameter(spec.slice(random_state(0)[spec.name]["master"]).reshape(-1)[start:stop].clone())
            self.segments.append(Segment(spec.name, spec, start, stop, master, torch.empty_like(master)))
        decayed = [s.master for s in self.segments if s.spec.dim is not None]
        others = [s.master for s in self.segments if s.spec.dim is None]
        self.optimizer = OPTIMIZERS[optimizer]([{"params": decayed, "weight_decay": 0.1}, {"params": others}])
        self.scheduler = get_scheduler("cosine", self.optimizer, 1, 10)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            for segment in self.segments:
                segment.master.grad = (segment.master.detach() * 3).sin() * self.scheduler.last_epoch + 0.1
            self.optimizer.step()
            self.scheduler.step()


def save(directory: Path, ranks: list[Rank]) -> None:
    folder = directory / "training_state"
    clear(folder)
    for number, rank in enumerate(ranks):
        write_rank(folder, number, state_pieces(rank.segments, rank.optimizer, rank.mesh))
    commit(folder, len(ranks), state_values(ranks[0].mesh, ranks[0].optimizer, ranks[0].scheduler, {"step": 3}))


def ranks_of(layout: Layout, optimizer: str) -> list[Rank]:
    return [Rank(layout, rank, optimizer) for rank in range(layout.tp_size * layout.shard_size)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_goes_on_in_another_layout(tmp_path: Path, optimizer: str) -> None:
    first, second = ranks_of(Layout(4, 2, 5), optimizer), ranks_of(Layout(2, 3), optimizer)
    for rank in first:
        rank.train(3)
    save(tmp_path, first)
    for rank in second:
        for group in rank.optimizer.param_groups:
            group["lr"] = 123.0
        extra = load_training_state(tmp_path, rank.mesh, rank.segments, rank.optimizer, rank.scheduler)
        assert extra == {"step": 3}
        rank.train(2)
    for group in second[0].optimizer.param_groups:
        assert group["lr"] < 1e-2
    save(tmp_path, second)
    for rank in first:
        rank.train(2)
        expected = copy.deepcopy([rank.optimizer.state_dict(), [s.master for s in rank.segments]])
        load_training_state(tmp_path, rank.mesh, rank.segments, rank.optimizer, rank.scheduler)
        torch.testing.assert_close(
            [rank.optimizer.state_dict(), [s.master for s in rank.segments]], expected, rtol=0, atol=0
        )


def test_one_process_saves_and_loads(tmp_path: Path) -> None:
    (rank,) = ranks_of(Layout(1, 1), "adamw")
    rank.train(1)
    rank.optimizer.param_groups[0]["fused"] = None
    rank.mesh.parallel = Layout(1, 1)
    save_training_state(tmp_path, rank.mesh, rank.segments, rank.optimizer, rank.scheduler, {"best": inf})
    (other,) = ranks_of(Layout(1, 1), "adamw")
    assert load_training_state(tmp_path, other.mesh, other.segments, other.optimizer, other.scheduler) == {"best": inf}
    assert other.optimizer.state_dict()["state"].keys() == rank.optimizer.state_dict()["state"].keys()
    assert other.scheduler.state_dict() == rank.scheduler.state_dict()
    (sgd,) = ranks_of(Layout(1, 1), "sgd")
    with pytest.raises(ValueError, match="written by AdamW with 2 parameter groups, but this run has SGD"):
        load_training_state(tmp_path, sgd.mesh, sgd.segments, sgd.optimizer, sgd.scheduler)
    with pytest.raises(ValueError, match="save_only_model"):
        load_training_state(tmp_path / "other", other.mesh, other.segments, other.optimizer, other.scheduler)
    rank.optimizer.state[rank.segments[0].master]["matrix"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="'norm|matrix|0' has shape"):
        save_training_state(tmp_path, rank.mesh, rank.segments, rank.optimizer, rank.scheduler)


@pytest.mark.parametrize(("pp_size", "stages"), [(1, "ends"), (2, "ends"), (2, "all")])
def test_each_value_has_one_writer(pp_size: int, stages: str) -> None:
    layout = Layout(4, 2)
    for name in SHAPES:
        written: Counter[tuple[Ranges, int]] = Counter()
        for pp in range(pp_size):  # a tensor of both stages
            for replica in range(2):
                for rank in range(8):
                    mesh = simulated_mesh(layout, rank, pp_size, pp, replica)
                    spec = ShardSpec(**{**vars(spec_of(name, 4, mesh.coordinates.tp)), "stages": stages})
                    if is_owner(spec, mesh):
                        written[(spec.ranges if spec.parts else (), mesh.coordinates.shard)] += 1
        parts = set(spec_of(name, 4, 0).parts) or {()}
        assert written == {(part, shard): 1 for part in parts for shard in range(2)}


def save_and_damage(directory: str, sizes: dict[str, Any]) -> list[str]:
    """Save with four ranks; what each says to a missing file, to damage that one rank meets, and to its own mistake."""
    mesh = ParallelMesh(ParallelConfig(**sizes))
    spec = ShardSpec("w", (8, 6), 0, even_parts(8, mesh.tp_size), mesh.tp_rank)
    numel = prod(spec.local_shape) // mesh.shard_size
    start = mesh.coordinates.shard * numel
    whole = torch.arange(48.0).view(8, 6)
    own = spec.slice(whole).reshape(-1)[start : start + numel]
    master = nn.Parameter(own.clone())
    segments = [Segment("w", spec, start, start + numel, master, torch.ones(numel))]
    optimizer = torch.optim.SGD([master], lr=0.1, momentum=0.9)
    save_training_state(directory, mesh, segments, optimizer, None)
    master.data.zero_()
    load_training_state(directory, mesh, segments, optimizer, None)
    assert torch.equal(master.detach(), own)
    said = []

    def attempt(action: Callable[..., Any], *more: Any) -> None:
        try:
            action(directory, mesh, segments, optimizer, None, *more)
        except (ValueError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")

    path = Path(directory) / "training_state/rank-00000.safetensors"
    content = path.read_bytes()
    dist.barrier()
    if mesh.rank == 0:
        path.write_bytes(content[:-1] + b"x")
    dist.barrier()
    attempt(load_training_state)
    if mesh.rank == 0:
        path.unlink()
    dist.barrier()
    attempt(load_training_state)
    attempt(save_training_state, {"mistake": object()} if mesh.rank == 3 else {})
    mesh.close()
    return said


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"tp_size": 2, "dp_replicate_size": 2}, {"zero_stage": 3}])
def test_ranks_fail_together(pool: WorkerPool, tmp_path: Path, sizes: dict[str, Any]) -> None:
    damage, missing, mistake = zip(*pool.run(4, save_and_damage, str(tmp_path), sizes), strict=True)
    assert "ValueError" in damage[0] and "rank-00000.safetensors is damaged" in damage[0]
    assert all("failed on" in said or "rank-00000.safetensors is damaged" in said for said in damage)
    assert all("rank-00000.safetensors is missing" in said for said in missing)
    assert "extra['mistake'] is a builtins.object" in mistake[3]
    assert all("RuntimeError: saving the training state failed on 1 other ranks" in said for said in mistake[:3])

"""The optimizer's state on the host: the same numbers to the last bit, in memory that is somewhere else."""

from __future__ import annotations

from mmap import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pool import JobError, WorkerPool
from segments_alone import SegmentsAlone
from tiny import History, pad_batch, random_dataset, tiny_config, training_arguments
from torch import nn

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments, ParallelConfig
from hf_nanotron.monitor.memory import MemoryReport
from hf_nanotron.ops import host_memory
from hf_nanotron.ops.host_buffers import HostBuffer
from hf_nanotron.optim.adamw import AdamW
from hf_nanotron.optim.build import build_optimizer
from hf_nanotron.optim.offload import StateOnHost
from hf_nanotron.optim.optimizer_link import OptimizerLink, give_gradients, take_gradients
from hf_nanotron.parallel.shard_spec import ShardSpec
from hf_nanotron.parallel.zero.segment import Segment

STEPS = 3
BF16: dict[str, Any] = {"bf16": True, "torch_compile": False}
SMALL = {**BF16, "optim_state_dtype": "bfloat16"}
PIPELINE = {**BF16, "pp_size": 2, "gradient_accumulation_steps": 2, "pp_layers_per_stage": [2, 2]}

Run = tuple[str, dict[str, Any], float]  # a name, what both runs have, the fraction on the host
RUNS: dict[int, list[Run]] = {
    1: [
        ("fp32", {}, 1.0),
        ("bf16 moments", SMALL, 1.0),
        ("half of it", BF16, 0.5),
        ("accumulated", {**BF16, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}, 1.0),
        ("not fused", {**BF16, "optim": "adamw_torch"}, 1.0),
        ("Lion", {**BF16, "optim": "lion_32bit"}, 1.0),
        ("SGD", {**BF16, "optim": "sgd", "optim_args": "momentum=0.9"}, 1.0),
        ("Adagrad", {**BF16, "optim": "adagrad"}, 1.0),
    ],
    2: [
        ("ZeRO-0", {**BF16, "zero_stage": 0}, 1.0),
        ("ZeRO-1", SMALL, 1.0),
        ("ZeRO-2", {**BF16, "zero_stage": 2}, 1.0),
        ("ZeRO-3", {**SMALL, "zero_stage": 3}, 1.0),
        ("tp 2", {**SMALL, "tp_size": 2}, 1.0),
        ("cp 2", {**BF16, "cp_size": 2}, 0.5),
        ("pp 2", {**PIPELINE}, 1.0),
        ("zero bubble", {**PIPELINE, "pp_schedule": "zb"}, 1.0),
    ],
}
DEFAULT = ("fp32", "half of it", "ZeRO-1", "ZeRO-3")

State = dict[str, dict[str, torch.Tensor]]


def state_of(trainer: NanotronTrainer) -> State:
    """Master and state of each segment."""
    assert trainer.optimizer is not None
    return {
        segment.name: {"": segment.master.detach().clone(), **trainer.optimizer.state[segment.master]}
        for segment in trainer.weights.segments
    }


def train(
    checkpoint: str, resume: str | None = None, **values: Any
) -> tuple[History, State, MemoryReport, tuple[int, int]]:
    """Losses, the state afterwards, the report, and the bytes on the host: claimed, and really of its memory."""
    torch.manual_seed(0)
    args = NanotronTrainingArguments(**training_arguments(**{"max_steps": STEPS, **values}))
    history = History()
    trainer = NanotronTrainer(
        model=AutoModelForCausalLM.from_pretrained(checkpoint, parallel=args.parallel),
        args=args,
        train_dataset=random_dataset(20),
        data_collator=pad_batch,
        callbacks=[history],
    )
    trainer.train(resume_from_checkpoint=resume)
    host, found = trainer.training_state.host, (0, 0)
    state = state_of(trainer)
    if host is not None:
        assert trainer.optimizer is not None
        homes = {buffer.bytes.untyped_storage().data_ptr() for buffer in host._buffers}
        at_rest = [s.master.data for s in trainer.weights.segments if s.weight is not None]
        at_rest += [x for of in trainer.optimizer.state.values() for x in of.values() if x.dim()]
        found = host.held, sum(x.nbytes for x in at_rest if x.untyped_storage().data_ptr() in homes)
    trainer.mesh.close()
    return history, state, trainer.memory_report, found


def train_pairs(checkpoint: str, runs: list[Run]) -> list[Any]:
    return [(train(checkpoint, **both), train(checkpoint, **both, optim_offload=share)) for _, both, share in runs]


def assert_equal(state: State, wanted: State, what: str) -> None:
    assert state.keys() == wanted.keys()
    for name, tensors in wanted.items():
        assert state[name].keys() == tensors.keys()
        for kind, tensor in tensors.items():
            assert torch.equal(state[name][kind], tensor), f"{what}: {kind} of {name}"


@pytest.mark.parametrize("ranks", [1, 2])
def test_offloading_changes_no_bit(pool: WorkerPool, tmp_path: Path, pytestconfig: pytest.Config, ranks: int) -> None:
    AutoModelForCausalLM.from_config(tiny_config(), parallel=ParallelConfig()).save_pretrained(tmp_path)
    runs = [run for run in RUNS[ranks] if pytestconfig.getoption("full_matrix") or run[0] in DEFAULT]
    for results in pool.run(ranks, train_pairs, str(tmp_path), runs):
        for (name, _, share), (plain, moved) in zip(runs, results, strict=True):
            assert (moved[0].losses, moved[0].norms) == (plain[0].losses, plain[0].norms), name
            assert_equal(moved[1], plain[1], name)
            held, at_rest = moved[3]
            assert held >= at_rest > 0.9 * held, f"{name}: what is at rest is not in the host's memory"
            before, after = plain[2], moved[2]
            assert before.host == 0 and after.total + after.host == before.total, name
            assert after.host == pytest.approx(at_rest, rel=0.01), name
            assert share < 1 or after.masters == after.moments == 0, name


# ---- Resume ----------------------------------------------------------------------------------------------------


def save_and_resume(checkpoint: str, output: str, values: dict[str, Any]) -> tuple[Any, Any, Any]:
    """A run without offload; one whose first half is offloaded, and one whose second is."""
    whole, first = f"{output}/whole", f"{output}/first"
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **values}
    plain = train(checkpoint, output_dir=whole, **saved)
    train(checkpoint, output_dir=first, optim_offload=1.0, async_save=True, **saved)
    after = train(checkpoint, f"{first}/checkpoint-2", output_dir=f"{output}/after", **saved)
    into = train(
        checkpoint,
        f"{whole}/checkpoint-2",
        output_dir=f"{output}/into",
        optim_offload=1.0,
        skip_nonfinite_steps=True,
        **saved,
    )
    return plain, after, into


RESUMES = {"fused, fp32": (1, BF16), "ZeRO-3": (2, {**SMALL, "zero_stage": 3}), "own": (1, SMALL)}


@pytest.mark.parametrize("name", RESUMES)
def test_resuming_with_and_without(pool: WorkerPool, tmp_path: Path, pytestconfig: pytest.Config, name: str) -> None:
    if name != "own" and not pytestconfig.getoption("full_matrix"):
        pytest.skip("with --full-matrix")
    ranks, values = RESUMES[name]
    AutoModelForCausalLM.from_config(tiny_config(), parallel=ParallelConfig()).save_pretrained(tmp_path / "model")
    for plain, after, into in pool.run(ranks, save_and_resume, str(tmp_path / "model"), str(tmp_path), values):
        for resumed in (after, into):
            assert resumed[0].losses == plain[0].losses[2:]
            assert_equal(resumed[1], plain[1], name)
        assert into[3][1] > 0.9 * into[3][0] > 0


# ---- Parts -----------------------------------------------------------------------------------------------------


def segments_of(sizes: list[int]) -> list[Segment]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, size in enumerate(sizes):
        master = nn.Parameter(torch.randn(size, generator=generator))
        gradient, weight = torch.randn(size, generator=generator), torch.empty(size, dtype=torch.bfloat16)
        made.append(Segment(f"w{index}", ShardSpec(f"w{index}", (size,)), 0, size, master, gradient, weight))
    return made


def test_few_parts_are_on_the_device_together() -> None:
    segments = segments_of([100, 100, 300, 50, 50, 20])
    optimizer = torch.optim.SGD([segment.master for segment in segments], lr=0.1, momentum=0.9)
    host = StateOnHost(segments, torch.device("cpu"), 1.0, part_elements=150)

    def addresses() -> list[list[int]]:
        """Of each segment, its master and its momentum."""
        momenta = [optimizer.state[segment.master].get("momentum_buffer") for segment in segments]
        tensors = [[segment.master, momentum] for segment, momentum in zip(segments, momenta, strict=True)]
        return [[tensor.data_ptr() for tensor in own if tensor is not None] for own in tensors]

    for step in range(3):
        seen, homes = [], addresses()
        for part in host.on_device(optimizer):
            numbers = [segments.index(segment) for segment in part]
            seen.append(numbers)
            for index, (now, home) in enumerate(zip(addresses(), homes, strict=True)):
                # The first step makes the momenta.
                assert not set(now) & set(home) if index in numbers else now[: len(home)] == home
            give_gradients(part)
            optimizer.step()
            take_gradients(part)
        assert seen == [[0, 1], [2], [3, 4, 5]]
        assert step == 0 or addresses() == homes
    assert host.elements == 620 and host.master_bytes == 4 * 620


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["AdamW", "Adadelta", "NAdam", "RMSprop"])
def test_a_step_by_parts_is_one_step(kind: str, fraction: float) -> None:
    def stepped(offloaded: bool) -> tuple[list[torch.Tensor], list[Segment], list[bool]]:
        segments = segments_of([100, 100, 300, 50])
        masters = [segment.master for segment in segments]
        groups = [{"params": masters[::2]}, {"params": masters[1::2], "lr": 0.3}]
        optimizer = getattr(torch.optim, kind)(groups, lr=0.1)
        weights = SegmentsAlone(segments)
        host = StateOnHost(segments, torch.device("cpu"), fraction, part_elements=150) if offloaded else None
        link = OptimizerLink(optimizer, weights, host)  # type: ignore[arg-type]
        for index in range(4):
            link.skips_next = index == 2
            optimizer.step()
            assert all(master.grad is None for master in masters)
        state = [x for master in masters for x in optimizer.state[master].values()]
        return [*masters, *state], segments, weights.published

    wanted, _, published = stepped(False)
    found, segments, by_parts = stepped(True)
    assert published == [False] * 3 and by_parts == [True] * 3
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    for segment, master in zip(segments, wanted, strict=False):
        assert segment.weight is not None and torch.equal(segment.weight, master.bfloat16())


class Projected(torch.optim.AdamW):
    """A user's optimizer: torch's, with gradients and weights that are kept small."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for master in group["params"]:
                master.grad = master.grad.clamp(-0.1, 0.1)
        loss = super().step(closure)
        for group in self.param_groups:
            for master in group["params"]:
                master.clamp_(-0.2, 0.2)
        return loss


class Derived(AdamW):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_a_step_that_calls_that_of_its_base() -> None:
    """torch then runs the hooks on steps twice, once an object of the base was made; ours act once, around all."""
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    segments, calls = segments_of([100, 30]), []
    optimizer = Projected([segment.master for segment in segments], lr=0.1)
    weights = SegmentsAlone(segments)
    link = OptimizerLink(optimizer, weights)  # type: ignore[arg-type]
    link.average = SimpleNamespace(update=lambda number, skipped: calls.append(number))  # type: ignore[assignment]
    plain = [torch.nn.Parameter(segment.master.detach().clone()) for segment in segments]
    reference = torch.optim.AdamW(plain, lr=0.1)
    hooks: list[int] = []
    optimizer.register_step_post_hook(lambda *_: hooks.append(1))
    for _ in range(2):
        for parameter, segment in zip(plain, segments, strict=True):
            parameter.grad = segment.gradient.clamp(-0.1, 0.1)
        link.hold_gradients()
        optimizer.step()
        reference.step()
        for parameter in plain:
            parameter.data.clamp_(-0.2, 0.2)
        assert not link.holds_gradients
    assert len(hooks) == 4  # torch's own way
    assert len(weights.published) == len(calls) == 2
    assert all(torch.equal(p, segment.master) for p, segment in zip(plain, segments, strict=True))


def test_a_step_of_a_user_that_fails_is_not_the_last() -> None:
    segments = segments_of([100])
    optimizer = Projected([segment.master for segment in segments])
    weights = SegmentsAlone(segments)
    link = OptimizerLink(optimizer, weights)  # type: ignore[arg-type]
    gradient, segments[0].gradient = segments[0].gradient, None
    with pytest.raises(AttributeError, match="clamp"):
        optimizer.step()
    segments[0].gradient = gradient
    link.hold_gradients()
    optimizer.step()
    assert len(weights.published) == 1


def test_weights_are_rounded_behind_the_step_of_a_user() -> None:
    """An update writes the rounded weights itself, unless something may follow it."""
    for kind, writes in ((AdamW, True), (Projected, False), (Derived, False)):
        segments = segments_of([100])
        optimizer = build_optimizer(segments, [s.spec.name for s in segments], set(), 0.0, kind, {"lr": 0.1})
        assert bool(getattr(optimizer, "rounded", None)) is writes
        assert isinstance(optimizer, AdamW) is bool(getattr(optimizer, "streams", None))


def test_a_step_that_fails_leaves_all_on_the_host() -> None:
    segments = segments_of([100, 300, 50])
    optimizer = AdamW([segment.master for segment in segments], state_dtype=torch.bfloat16)
    host = StateOnHost(segments, torch.device("cpu"), 1.0, part_elements=90)
    link = OptimizerLink(optimizer, SegmentsAlone(segments), host)  # type: ignore[arg-type]
    homes = [segment.master.data_ptr() for segment in segments]
    optimizer.step()
    segments[1].gradient = torch.zeros(7)
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()
    assert [segment.master.data_ptr() for segment in segments] == homes and not link._running


def test_memory_that_the_host_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: HostBuffer, size: int, device: torch.device) -> None:
        raise MemoryError("cudaHostRegister returned 2")

    monkeypatch.setattr(HostBuffer, "__init__", refused)
    with pytest.raises(MemoryError, match=r"optim_offload: .*\(cudaHostRegister returned 2\); offload less of it"):
        StateOnHost(segments_of([8]), torch.device("cpu"), 1.0)


# ---- Refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-0.1, 2, "all"])
def test_fractions(value: Any) -> None:
    with pytest.raises(ValueError, match=r"optim_offload=.* must be"):
        NanotronTrainingArguments(**training_arguments(optim_offload=value))


def test_a_moving_average() -> None:
    with pytest.raises(ValueError, match=r"optim_offload=1.0 with ema_decay=0.9: the moving average is on the device"):
        NanotronTrainingArguments(**training_arguments(optim_offload=1.0, ema_decay=0.9))


def test_muon() -> None:
    with pytest.raises(ValueError, match=r"optim_offload=1.0 with optim='muon': a direction needs whole matrices"):
        NanotronTrainingArguments(**training_arguments(optim_offload=1.0, optim="muon"))


class Counting(torch.optim.SGD):
    """Steps that it counts by itself would be parts."""

    elementwise = True


def train_with_own(cls: type[torch.optim.Optimizer]) -> None:
    args = NanotronTrainingArguments(**training_arguments(max_steps=1, optim_offload=1.0))
    model = AutoModelForCausalLM.from_config(tiny_config(), parallel=args.parallel)
    data = {"train_dataset": random_dataset(4), "data_collator": pad_batch}
    NanotronTrainer(model=model, args=args, optimizer_cls_and_kwargs=(cls, {"lr": 0.1}), **data).train()


def test_an_optimizer_of_ones_own(pool: WorkerPool) -> None:
    with pytest.raises(JobError, match=r"optim_offload: Counting would step once for each part") as failed:
        pool.run(2, train_with_own, Counting)
    assert set(failed.value.kinds.values()) == {"ValueError"}


# ---- The host's memory -----------------------------------------------------------------------------------------


def limited(folder: Path, available: int, limit: str) -> dict[str, Path]:
    """Files that say so, with the kernel's names."""
    group = folder / "cgroup" / "jobs" / "mine"
    group.mkdir(parents=True)
    (folder / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {available // 1024} kB\n")
    (folder / "self").write_text("0::/jobs/mine\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("5000\n")
    (group.parent / "memory.max").write_text(limit)
    (group.parent / "memory.current").write_text("6000\n")
    (group.parent / "memory.stat").write_text("anon 3000\ninactive_file 2048\n")
    return {"MEMINFO": folder / "meminfo", "GROUPS": folder / "cgroup", "GROUP": folder / "self"}


@pytest.mark.parametrize(("limit", "expected"), [("max", 1 << 20), ("10240", 10240 - 6000 + 2048), ("100", 0)])
def test_what_a_host_has_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, expected: int) -> None:
    """The least of the host's and of all groups around this process; files in memory can go."""
    for name, path in limited(tmp_path, 1 << 20, limit).items():
        monkeypatch.setattr(host_memory, name, path)
    assert host_memory.available_bytes() == expected
    (tmp_path / "meminfo").unlink()
    (tmp_path / "self").unlink()
    assert host_memory.available_bytes() is None


def test_a_host_that_lacks_the_memory_says_so_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = segments_of([100, 300, 50])
    host = StateOnHost(segments, torch.device("cpu"), 1.0, part_elements=90)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 0)
    monkeypatch.setattr(host_memory, "GROWTH_SECONDS", 0.0)
    with pytest.raises(MemoryError, match=r"optim_offload: .*the host has 0.00 GiB left, and .* more are needed"):
        host.reserve(2, torch.float32)


def test_a_host_that_grows_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([0, 2**40, 2**40, 2**40, 2**40])
    monkeypatch.setattr(host_memory, "available_bytes", lambda: next(free))
    monkeypatch.setattr(host_memory, "CHUNK", 4096)
    pages = host_memory.make_pages(mmap(-1, 3 * 4096))
    assert pages.numel() == 3 * 4096 and not pages.any()
    assert len(list(free)) == 1, "each chunk asks once, and the first twice"


def test_reserved_memory_is_what_the_state_gets() -> None:
    segments = segments_of([100, 300, 50])
    optimizer = AdamW([segment.master for segment in segments], state_dtype=torch.bfloat16)
    host = StateOnHost(segments, torch.device("cpu"), 1.0, part_elements=90)
    OptimizerLink(optimizer, SegmentsAlone(segments), host)  # type: ignore[arg-type]
    host.reserve(2, torch.bfloat16)
    held = host.held
    optimizer.step()
    assert host.held == held and not host._reserved

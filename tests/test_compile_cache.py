"""Processes that share a cache folder compile a graph one after another, until one of them has; none waits for ever."""

from __future__ import annotations

import argparse
import errno
import logging
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from family_runs import tiny_model
from pool import WorkerPool
from torch._inductor.exc import InductorError

from hf_nanotron.models.sharding.parallelize import parallelize
from hf_nanotron.models.stock.anatomy import dissect
from hf_nanotron.parallel import node
from hf_nanotron.parallel.config import ParallelConfig
from hf_nanotron.parallel.mesh import ParallelMesh
from hf_nanotron.prepare import compile_cache
from hf_nanotron.prepare.compile import CompiledForward, backend_of, compile_layers
from hf_nanotron.prepare.compile_cache import FOLDER, share_threads, turn


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


LONG = 600.0  # seconds; only a fault takes as long


def compile_once(record: Path, seconds: float, dies: bool = False, others: Any = None) -> None:
    """`others`: a barrier for those that come after the first."""
    with turn("graph", patience=LONG):
        is_first = not record.exists()
        with record.open("a") as file:
            file.write(f"begin {os.getpid()}\n")
        if dies:
            living = os.fork()  # a process of the compiler that lives on
            if living == 0:
                time.sleep(LONG)
                os._exit(0)
            record.with_name("living").write_text(str(living))
            os.kill(os.getpid(), signal.SIGKILL)
        if is_first or others is None:
            time.sleep(seconds)
        else:
            others.wait(LONG)
        with record.open("a") as file:
            file.write(f"end {os.getpid()}\n")


def start(*arguments: object) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=compile_once, args=arguments)
    process.start()
    return process


def test_one_compiles_and_the_others_follow_at_once(folder: Path, tmp_path: Path) -> None:
    record = tmp_path / "record"
    others = multiprocessing.get_context("fork").Barrier(3)
    processes = [start(record, 0.5, False, others) for _ in range(4)]
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    events = [line.split()[0] for line in record.read_text().splitlines()]
    assert events[:2] == ["begin", "end"]  # nobody else has begun before the first was done
    assert events.count("begin") == events.count("end") == 4
    assert events[2:5].count("begin") == 3  # and then they do not take turns any more
    assert {path.name for path in folder.iterdir()} == {FOLDER}  # nothing is written elsewhere


def test_a_rank_that_dies_while_it_compiles_holds_nobody_up(folder: Path, tmp_path: Path) -> None:
    record = tmp_path / "record"
    first = start(record, 0.0, True)
    first.join()  # with a limit it would wait for the process that lives on, too
    assert first.exitcode == -signal.SIGKILL
    living = int((tmp_path / "living").read_text())
    second = start(record, 0.0)
    try:
        second.join(LONG / 2)
        os.kill(living, 0)  # it is still there
        assert second.exitcode == 0
    finally:
        os.kill(living, signal.SIGKILL)
        second.kill()
    assert (folder / FOLDER / "graph.done").exists()


def test_patience_ends_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is stopped while it compiles holds up another once, and not for each of its graphs."""
    monkeypatch.setattr(compile_cache, "PATIENCE", 1.0)
    monkeypatch.setattr(compile_cache, "name_of", lambda graph, inputs: "graph")
    process = start(tmp_path / "record", LONG)
    while not (tmp_path / "record").exists():
        time.sleep(0.02)
    (folder / FOLDER / "graph.lock").rename(folder / FOLDER / "pp0-graph.lock")
    backend = compile_cache.one_at_a_time(lambda graph, inputs: graph, "pp0")
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
    monkeypatch.setattr(compile_cache, "time", clock)
    seconds = []
    for _ in range(3):
        slept.clear()
        backend(torch.fx.symbolic_trace(lambda x: x.sin()), [])
        seconds.append(sum(slept))
        (folder / FOLDER / "pp0-graph.done").unlink()
    process.kill()
    process.join(600)
    assert seconds[0] == pytest.approx(1.0, abs=0.1) and max(seconds[1:]) == 0.0


def test_without_a_folder_it_compiles_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    reached = False
    with turn("graph"):
        reached = True
    assert reached


def compile_on_a_full_disk(folder: str) -> tuple[list[float], list[float], list[str]]:
    """Gradients, those of the function as it is, and what was said."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    compile_cache.logger.addHandler(handler)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        function = torch.compile(double_sine, backend=backend_of("inductor", None, False))
        gradients = []
        for one in (function, double_sine):
            x = torch.arange(8.0, requires_grad=True)
            one(x).sum().backward()
            assert x.grad is not None
            gradients.append(x.grad.tolist())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        compile_cache.logger.removeHandler(handler)
    return gradients[0], gradients[1], said


def double_sine(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * 2).cumsum(0)


def test_on_a_full_disk_blocks_run_uncompiled(pool: WorkerPool, tmp_path: Path) -> None:
    """None of the compiler's files may have a byte."""
    ((found, expected, said),) = pool.run(1, compile_on_a_full_disk, str(tmp_path / "cache"))
    assert found == pytest.approx(expected)
    assert any("TORCHINDUCTOR_CACHE_DIR says where the files go" in sentence for sentence in said)


def test_without_a_folder_nothing_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    model = parallelize(tiny_model("llama"), ParallelMesh(ParallelConfig()))
    compile_layers(model, "inductor", None)
    assert not any(isinstance(part.forward, CompiledForward) for part in model.modules())


@pytest.mark.parametrize(
    ("error", "has_room"),
    [(OSError(errno.ENOSPC, "No space left"), True), (RuntimeError("g++ failed"), False), (RuntimeError("g++"), True)],
)
def test_other_errors_of_a_compiler_end_the_run(
    error: Exception, has_room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise InductorError(error, None)

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / ("cache" if has_room else "file/cache")))
    run = compile_cache.where_files_can_be_written(backend)
    graph = torch.fx.symbolic_trace(lambda x: x.sin())
    if isinstance(error, RuntimeError) and has_room:
        with pytest.raises(InductorError, match=r"g\+\+"):
            run(graph, [torch.ones(2)])
    else:
        assert torch.equal(run(graph, [torch.ones(2)])(torch.ones(2)), torch.ones(2).sin())


def test_what_fails_is_not_marked_as_done(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), turn("graph"):
        raise ZeroDivisionError
    assert not (folder / FOLDER / "graph.done").exists()
    with turn("graph", patience=1):  # and the lock is free
        pass
    assert (folder / FOLDER / "graph.done").exists()


def test_names_differ_by_shape_and_device() -> None:
    graph = torch.fx.symbolic_trace(lambda x: x.sin())
    inputs = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, device="meta"), torch.zeros(2, 3).bfloat16()]
    names = [compile_cache.name_of(graph, [x]) for x in inputs]
    assert len(set(names)) == 4 and names[0] == compile_cache.name_of(graph, [torch.ones(2, 3)])


@pytest.mark.parametrize(("ranks", "cpus", "threads"), [(8, 64, 8), (8, 4, 1), (1, 64, 32), (2, 128, 32)])
def test_ranks_share_the_cpus(ranks: int, cpus: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    with torch._inductor.config.patch(compile_threads=32):
        share_threads(ranks, cpus)
        assert torch._inductor.config.compile_threads == threads


def test_threads_that_were_asked_for_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "16")
    with torch._inductor.config.patch(compile_threads=16):
        share_threads(8, 8)
        assert torch._inductor.config.compile_threads == 16


@pytest.mark.parametrize("disabled", [False, True])
def test_without_a_cache_nobody_waits(disabled: bool, folder: Path) -> None:
    backend = compile_cache.one_at_a_time(lambda graph, inputs: graph, "pp0")
    with torch._inductor.config.patch(force_disable_caches=disabled, fx_graph_cache=True):
        backend(torch.fx.symbolic_trace(lambda x: x.sin()), [torch.zeros(2)])
    marks = [path.name for path in (folder / FOLDER).glob("pp0-*.done")]
    assert len(marks) == (0 if disabled else 1)


@pytest.mark.full_matrix
def test_ranks_take_compiled_code_from_each_other(pool: WorkerPool, tmp_path: Path) -> None:
    """By the compiler itself: one rank compiles forward and backward, the other takes both as they were traced."""
    first, second = sorted(pool.run(2, compile_a_layer, str(tmp_path / "cache")))
    assert (first, second) == ((0, 1), (1, 0))
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


def compile_a_layer(folder: str) -> tuple[int, int]:
    """Graphs whose traced forward and backward came from the cache, and those that did not."""
    from torch._dynamo.utils import counters

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model("llama").train()
    _, layer = dissect(model).numbered_layers()[0]
    layer.forward = torch.compile(layer.forward, backend=backend_of("inductor", None, False))
    model(torch.arange(8)[None], use_cache=False).logits.sum().backward()
    found = counters["aot_autograd"]
    return found["autograd_cache_hit"], found["autograd_cache_miss"]


@pytest.mark.parametrize(
    ("variables", "local", "number"),
    [
        ({"RANK": "5", "LOCAL_WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "1"}, 0, 1),  # --virtual-local-rank
        ({"RANK": "4", "LOCAL_WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "0"}, 0, 0),
        ({"RANK": "5", "LOCAL_WORLD_SIZE": "4"}, 1, 1),
        ({"RANK": "4", "LOCAL_WORLD_SIZE": "8"}, 0, 0),  # a node of four before one of eight
        ({}, 0, 0),
    ],
)
def test_ranks_know_their_number_on_the_node(
    variables: dict[str, str], local: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(node, "PartialState", lambda: argparse.Namespace(local_process_index=local))
    assert node.rank_on_node() == number

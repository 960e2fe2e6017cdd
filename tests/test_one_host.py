"""The layouts of one host: what they take by hand and by the trainer's report, budget and fallback, and dry runs."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from benchmark_scripts import FOLDER, scripts
from pool import WorkerPool


@pytest.fixture(scope="module")
def bench() -> Iterator[argparse.Namespace]:
    with scripts(["host_table", "layouts", "one_host", "rows", "throughput"]) as modules:
        yield modules


def test_layouts_of_eight_and_four_gpus_fit(bench: argparse.Namespace) -> None:
    """By the trainer's own estimate, with micro-batches that divide a step of 1 M tokens and fill the pipeline."""
    for gpus in (8, 4):
        cli = bench.one_host.make_parser().parse_args(["--gpus", str(gpus)])
        cli.tokens_per_step = gpus * bench.one_host.TOKENS_OF_A_GPU
        for item in bench.one_host.plan(bench.one_host.chosen(cli), cli):
            layout, smallest = item.layout, item.layout.micro_batches[-1]
            assert item.sizes == layout.micro_batches and not item.skipped, layout.name
            count = item.count(smallest)
            assert count * smallest * layout.copies * item.model.sequence_length == cli.tokens_per_step
            assert count % layout.parallel.pp_size == 0
            state, kept = bench.layouts.estimate(layout, item.model, smallest, count)
            assert state + kept < bench.layouts.USABLE_GIB * 2**30, layout.name


def test_state_of_a_layout_by_hand(bench: argparse.Namespace) -> None:
    """8.03 B parameters, 18 bytes of each, of which ZeRO-1 divides 12; a head of 2.4 layers shortens its stage."""
    model = bench.layouts.Model("8b", 8192)
    parameters = 2 * 128256 * 4096 + 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336 + 2 * 4096) + 4096
    found = {layout.name: layout for layout in bench.layouts.LAYOUTS}
    assert bench.layouts.state_bytes(found["dp 8 ZeRO-1"], model, 0) == parameters * (6 + 12 / 8)
    assert bench.layouts.state_bytes(found["dp 8 ZeRO-3"], model, 0) == parameters * 16 / 8
    assert bench.layouts.state_bytes(found["tp 8"], model, 0) == pytest.approx(parameters * 18 / 8, rel=1e-3)
    for name in ("pp 4 x dp 2 1F1B", "pp 4 x dp 2 interleaved"):
        ranks = bench.layouts.layers_of_ranks(found[name], model)
        assert [ranks.count(rank) for rank in range(4)] == [8, 9, 9, 6]
    experts = 48 * 128 * 3 * 2048 * 768
    others = 48 * (2048 * (2 * 4096 + 2 * 512) + 2 * 128 + 2 * 2048 + 128 * 2048) + 2048 * (2 * 151936 + 1)
    mixture = bench.layouts.state_bytes(found["MoE dp 8 ep 8"], bench.layouts.Model("moe-30b-a3b", 4096), 0)
    assert mixture == experts * 18 / 8 + others * (6 + 12 / 8)


def test_layouts_that_cannot_run_say_why(bench: argparse.Namespace) -> None:
    cli = bench.one_host.make_parser().parse_args(["--gpus", "2", "--shape", "tiny"])
    cli.tokens_per_step = 30 * 8192
    plans = {item.layout.name: item for item in bench.one_host.plan(bench.one_host.chosen(cli), cli)}
    assert "do not fit" in plans["MoE dp 2 ep 2"].skipped and not plans["MoE dp 2 ep 2"].sizes
    assert plans["tp 2"].sizes == (2, 1)
    cli.gpus, cli.only = 8, "pp 4 x dp 2 interleaved,dp 8 ZeRO-1"
    interleaved, data = bench.one_host.plan(bench.one_host.chosen(cli), cli)
    assert interleaved.skipped == "4 layers of tiny for 8 stages"
    assert "30 samples a step: 8 data-parallel ranks" in data.skipped and "a multiple of 8" in data.skipped
    table = bench.one_host.plan_table([interleaved, data], 8)
    assert "left out: 4 layers" in table
    cli.only = "dp 3"
    with pytest.raises(ValueError, match="'dp 3': no layout for 8 GPUs; there are dp 8 ZeRO-1"):
        bench.one_host.chosen(cli)


def in_this_process(text: str, shape: str, out: str) -> None:
    """A row of a layout, in bf16, on a worker of the pool."""
    options = ["--shape", shape, "--sequence-length", "32", "--warmup-steps", "1", "--timed-steps", "1", "--out", out]
    with scripts(["throughput"]) as modules:
        cli = modules.throughput.make_parser().parse_args([*options, "--bf16"])
        assert modules.throughput.run_here(text, cli)


NAMES = ("dp 4 ZeRO-3", "tp 2 x pp 2", "pp 4 interleaved", "MoE dp 4 ep 4 bf16 moments partly recomputed")


def test_estimates_are_the_trainers(
    bench: argparse.Namespace, pool: WorkerPool, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """State and activations of the fullest rank as the trainer reports them, and one first loss for all layouts."""
    out = tmp_path / "rows.jsonl"
    names = [name for name in NAMES if pytestconfig.getoption("full_matrix") or "interleaved" not in name]
    cli = bench.one_host.make_parser().parse_args(["--gpus", "4", "--only", ",".join(names)])
    cli.shape, cli.moe_shape, cli.sequence_length, cli.moe_sequence_length = "8b-tiny", "moe-tiny", 32, 32
    cli.tokens_per_step = 8 * 32
    plans = bench.one_host.plan(bench.one_host.chosen(cli), cli)
    for item in plans:
        pool.run(4, in_this_process, item.row(item.sizes[0]), item.model.shape, str(out))
    results = bench.one_host.read(out)
    assert [result["name"] for result in results] == names
    for item, result in zip(plans, results, strict=True):
        state, kept = bench.layouts.estimate(item.layout, item.model, item.sizes[0], item.count(item.sizes[0]))
        ranks = result["by_rank"]
        totals = map(sum, zip(ranks["estimated_state"], ranks["estimated_activations"], strict=True))
        assert state + kept == pytest.approx(max(totals), rel=0.02), item.layout.name
        assert state in [pytest.approx(rank, rel=0.02) for rank in ranks["estimated_state"]], item.layout.name
        assert bench.host_table.samples_per_step(result) == item.samples
    first = [result["first_loss"] for result in results[:-1]]
    assert max(first) - min(first) < 1e-3 * max(first)


def host_result(name: str, loss: float, **more: Any) -> dict[str, Any]:
    collectives = {
        "AllGather": {"kernels_ms": 30.0, "exposed_ms": 10.0},
        "SendRecv": {"kernels_ms": 9.0, "exposed_ms": 5.0},
    }
    return {
        **{"name": name, "row": {}, "tokens_per_second_per_device": 10000, "spread": [9000, 11000]},
        "peak_memory_gib": 100.5,
        **{"shape": "8b", "sequence_length": 8192, "micro_batch": 2, "micro_batches": 8, "tp": 1, "pp": 1, "dp": 8},
        **{"warmup_steps": 2, "timed_steps": 2, "steps": 6, "mfu": 0.5512, "first_loss": loss, "last_loss": loss},
        **{"device": "NVIDIA H200", "date": "2027-01-01", "versions": {"torch": "2.11.0"}},
        "overlap": {"span_ms": 100.0, "computing_ms": 80.0, "idle_ms": 5.0, "collectives": collectives},
        **more,
    }


def test_table_of_a_host(bench: argparse.Namespace) -> None:
    """One table for what ran on one machine, with its versions and date; why the others have no figures."""
    failed = {"name": "tp 8", "row": {}, "shape": "8b", "error": "not begun: 1 | 2"}
    results = [
        {"name": "a", "row": {}, "shape": "8b", "out_of_memory": "x"},
        host_result("a", 12.0),
        {"name": "a", "row": {}, "shape": "8b", "error": "not begun"},
        host_result("b", 12.001, overlap={"span_ms": 0.0, "collectives": {}}),
        failed,
    ]
    table = bench.host_table.table(results)
    assert (
        "`8b`, sequence 8,192, 1,048,576 tokens a step. 2027-01-01, eight NVIDIA H200 of one host, torch 2.11.0"
        in table
    )
    figures = "10,000 | 9,000 – 11,000 | 55.1% | 100.5 GiB | 15.0% | 5.0% | 12.00000 |"
    assert f"| a | 8 of 2 (larger ones: out of memory) | {figures}" in table.splitlines()
    assert "| b | 8 of 2 | 10,000 | 9,000 – 11,000 | 55.1% | 100.5 GiB |  |  | 12.00100 |" in table.splitlines()
    assert "| tp 8 | not begun: 1 / 2 |" in table.splitlines()
    assert table.count("| a |") == 1


def test_losses_that_are_apart(bench: argparse.Namespace) -> None:
    """bf16 may differ by 1e-3, fp32 by 1e-5; rows with other samples, and peers, are not compared."""
    differences = bench.host_table.loss_differences
    near = [host_result("a", 12.0), host_result("b", 12.001), host_result("c", 15.0, steps=5)]
    near.append(host_result("d", 16.0, row={"trainer": "torchtitan"}))
    (line,) = differences(near)
    assert "2 layouts of 8b" in line and not line.endswith(bench.host_table.TOO_FAR)
    (line,) = differences([{**result, "device": "cpu"} for result in near])
    assert line.endswith(bench.host_table.TOO_FAR) and "8.3e-05" in line
    (line,) = differences([*near, host_result("e", 12.1)])
    assert line.endswith(bench.host_table.TOO_FAR)


def test_rows_of_a_host_by_budget(bench: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory: the next smaller micro-batch. Too little time: not begun, and left to the next call."""
    out, clock, begun = tmp_path / "rows.jsonl", [350.0], []
    cli = bench.one_host.make_parser().parse_args(["--gpus", "8", "--out", str(out)])
    cli.only, cli.tokens_per_step = "dp 8 ZeRO-1,tp 8,MoE dp 8 ep 8", 2**20
    plans = bench.one_host.plan(bench.one_host.chosen(cli), cli)

    def pretend(texts: list[str], options: argparse.Namespace, seconds: float) -> None:
        (fields,) = map(bench.rows.parse_row, texts)
        begun.append((options.shape, fields["name"], fields["per_device_train_batch_size"]))
        result = host_result(fields["name"], 12.0, micro_batch=1, micro_batches=16)
        if fields["per_device_train_batch_size"] == 2:
            result = {"name": fields["name"], "row": fields, "shape": options.shape, "error": "another rank is gone"}
            bench.throughput.write({**result, "out_of_memory": "x"}, options)
        clock[0] -= 100.0
        bench.throughput.write(result, options)

    monkeypatch.setattr(bench.throughput, "run_apart", pretend)
    bench.one_host.run_apart(plans, cli, lambda: clock[0])
    assert begun == [("8b", "dp 8 ZeRO-1", 2), ("8b", "dp 8 ZeRO-1", 1), ("8b", "tp 8", 4)]
    done = bench.host_table.latest(bench.one_host.read(out))
    assert [bench.one_host.is_done(item, done) for item in plans] == [True, True, False]
    clock[0] = 350.0
    bench.one_host.run_apart([item for item in plans if not bench.one_host.is_done(item, done)], cli, lambda: clock[0])
    assert begun[3:] == [("moe-30b-a3b", "MoE dp 8 ep 8", 2), ("moe-30b-a3b", "MoE dp 8 ep 8", 1)]
    assert done["moe-30b-a3b", "MoE dp 8 ep 8"]["error"].startswith("not begun: it takes about ")


IGNORE = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


@pytest.mark.parametrize(
    "ignoring", [pytest.param("", marks=pytest.mark.full_matrix), IGNORE], ids=["heeding", "ignoring"]
)
def test_a_stopped_row_leaves_no_worker(
    bench: argparse.Namespace, tmp_path: Path, ignoring: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun gives each worker a session of its own: killing its group would leave them on the GPUs."""
    script = tmp_path / "sleeps.py"
    script.write_text(
        f"{ignoring}import os, sys, time\nopen(os.path.join(sys.argv[1], os.environ['RANK']), 'w')"
        ".write(str(os.getpid()))\ntime.sleep(3600)\n"
    )
    pids = tmp_path / "pids"
    pids.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen([*launch, str(script), str(pids)], start_new_session=True)
    while len([path for path in pids.iterdir() if path.read_text()]) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    workers = [int(path.read_text()) for path in pids.iterdir()]
    monkeypatch.setattr(bench.throughput, "STOP_SECONDS", 4.0)  # torchrun would wait 30 for one that ignores SIGTERM
    bench.throughput.stop(process)
    process.wait(600)
    gone, living = psutil.wait_procs([psutil.Process(each) for each in workers if psutil.pid_exists(each)], 600)
    assert not living


def test_stopping_a_row_is_within_its_time(
    bench: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, out = tmp_path / "sleeps.py", tmp_path / "rows.jsonl"
    script.write_text(f"{IGNORE}import time\ntime.sleep(3600)\n")
    waits: list[float] = []
    wait = subprocess.Popen.wait

    def noted(process: subprocess.Popen[bytes], timeout: float) -> int:
        waits.append(timeout)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", noted)
    monkeypatch.setattr(bench.throughput, "STOP_SECONDS", 4.0)
    monkeypatch.setattr(bench.throughput, "__file__", str(script))
    cli = bench.throughput.make_parser().parse_args(["--out", str(out)])
    bench.throughput.run_apart(["name=a"], cli, 5.0)
    assert waits[0] == 1.0 and sum(waits) <= 5.0
    (result,) = bench.one_host.read(out)
    assert result["name"] == "a" and re.fullmatch(r"stopped after \d+ s", result["error"])


SHORT = ("--warmup-steps", "1", "--timed-steps", "1", "--budget", "1500")
DRY = ["--shape", "8b-tiny", "--moe-shape", "moe-tiny", "--sequence-length", "32", "--moe-sequence-length", "32"]


def dry_run(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "one_host.py"), *DRY, "--together", "--no-profile", "--out", str(out)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *more], env=environment, capture_output=True, text=True)


def test_dry_run_of_one_host(bench: argparse.Namespace, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """The whole script on two processes: rows, table, plot and the comparison of losses in fp32."""
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    out = tmp_path / "rows.jsonl"
    only = ("tp 2", "pp 2 interleaved")
    steps = (*SHORT, "--tokens-per-step", "128")
    ended = dry_run(out, "--gpus", "2", "--only", ",".join(only), *steps)
    assert ended.returncode == 0, ended.stderr[-2000:]
    results = bench.one_host.read(out)
    assert [result["name"] for result in results] == list(only) and all(map(bench.host_table.ran, results))
    assert "losses of 2 layouts of 8b-tiny" in ended.stdout and "as they should" in ended.stdout
    assert bench.host_table.table(results) in ended.stdout
    last = [result["last_loss"] for result in results]
    assert max(last) - min(last) < 1e-5 * max(last)


def test_dry_run_on_eight_processes(bench: argparse.Namespace, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Every layout of the table but the peer's."""
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    out = tmp_path / "rows.jsonl"
    names = [layout.name for layout in bench.layouts.LAYOUTS if layout.gpus == 8 and not layout.peer]
    ended = dry_run(out, "--gpus", "8", "--only", ",".join(names), "--tokens-per-step", "1024", *SHORT)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    results = bench.host_table.latest(bench.one_host.read(out)).values()
    assert {result["name"] for result in results if bench.host_table.ran(result)} == set(names)
    assert f"losses of {len(names) - 1} layouts of 8b-tiny" in ended.stdout

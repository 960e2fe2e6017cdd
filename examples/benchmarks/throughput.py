"""Tokens per second on random tokens, of `NanotronTrainer` and of its peers, any number of layouts in one run.

    python throughput.py --shape moe-3b-a0.8b --row zero_stage=0 --row trainer=stock,tf32=true --out rows.jsonl
    python throughput.py --shape 1b --samples-per-step 32 --floor --compare titan --row torch_compile=true,name=ours \\
        --row trainer=torchtitan,name=titan --row trainer=liger,per_device_train_batch_size=8
    torchrun --nproc-per-node 2 throughput.py --shape 8b-10 --sequence-length 8192 --row zero_stage=0 --row tp_size=2

Each `--row` holds fields of the training arguments, separated by commas, and may hold

    name=...                        of the row, in tables
    trainer=stock                   transformers' model and Trainer: bf16 autocast over fp32 weights, fused AdamW, SDPA
    trainer=liger                   the same with `use_liger_kernel`
    trainer=accelerate_cp           stock Trainer with accelerate's context parallelism: `peer_accelerate_cp.py`
    trainer=torchtitan              torchtitan's own Trainer; its fields are in `peer_torchtitan.py`
    dtype=bfloat16                  of a stock model's weights (and optimizer state)
    experts_implementation=eager    of a stock model; grouped_mm if not named
    documents=1024-131072           samples are packed: lengths of their documents, in tokens, log-uniform
    per_device_train_batch_size=auto    the largest that fits: halved from --largest-batch until it does

A step takes as many samples in every row: `gradient_accumulation_steps` follows from the micro-batch and
`--samples-per-step` unless the row names it. Without torchrun, each row runs in processes of its own (`--processes`),
so that one that fails, or runs out of memory, is reported and the next goes on. The clock is an event on the device in
each step; the host waits for none of them before the last.

Prints one JSON line for each row: what ran, on what and when, median and range over the timed steps, MFU by three
formulas (`mfu` counts causal attention once), the bytes a parameter takes before an optimizer step, with `--floor` what
the device would allow (`floor.py`), and with `--profile` how much of the communication was hidden, and (to a file
beside `--out`) a table of the kernels. `--compare NAME` ends with a table of ratios over that row.
"""

import argparse
import contextlib
import datetime
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import floor
import psutil
import torch
import torch.distributed as dist
import transformers
from clock import PROFILED_STEPS, Watch
from figures import comparison, flops_formulas, matmul_weights, shapes_of, speed
from kernels import kernel_table
from overlap import overlap_table
from rows import MICRO, OF_THE_ROW, PACKAGES, STEPS, TRAINERS, Outcome, Task, label, parse_row, seen_length
from shapes import SHAPES, make_config

from hf_nanotron.monitor.flops import peak_flops

LEAST_SECONDS = 30.0  # a row that has less of the budget left is not begun
STOP_SECONDS = 10.0  # for a row that is stopped; half of it to end by itself
OUT_OF_MEMORY_SIGNS = ("out of memory", "ALLOC_FAILED")
OUT_OF_MEMORY = 3  # exit status of a process that has reported its row as such


def run(row: dict[str, Any], cli: argparse.Namespace) -> dict[str, Any] | None:
    """Train one layout; its figures on rank 0, None on others.

    Raises:
        ValueError: a trainer that is not in the table.
    """
    name = row.get("trainer", "nanotron")
    if name not in TRAINERS:
        raise ValueError(f"trainer={name}: there is no such row; there are {', '.join(TRAINERS)}.")
    config = make_config(cli.shape, cli.sequence_length)
    transformers.set_seed(0)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # or each rank would open the first
        torch.cuda.reset_peak_memory_stats()
    directory = Path(tempfile.mkdtemp())
    trace = directory / "trace.json" if cli.profile else None
    watch = Watch(cli.warmup_steps, cli.timed_steps, trace, cli.profiled_steps)
    task = Task(cli.shape, config, cli.sequence_length, watch, cli.bf16, directory, bounds(row))
    outcome = TRAINERS[name]({key: value for key, value in row.items() if key not in OF_THE_ROW}, task)
    if not outcome.main:
        return None
    result = figures(row, outcome, task)
    if watch.trace is not None:
        result["overlap"] = overlap_table(watch.trace)
        if cli.out is not None:
            with cli.out.with_suffix(".kernels.txt").open("a") as file:
                file.write(f"== {json.dumps(row)}\n{kernel_table(watch.trace, watch.profiled)}\n")
    return result


def bounds(row: dict[str, Any]) -> tuple[int, int] | None:
    """Shortest and longest document of a row."""
    if "documents" not in row:
        return None
    shortest, _, longest = str(row["documents"]).partition("-")
    return int(shortest), int(longest)


def figures(row: dict[str, Any], outcome: Outcome, task: Task) -> dict[str, Any]:
    """What is reported of a row that ran."""
    config, watch, cut = task.config, task.watch, outcome.sizes["tp"] * outcome.sizes["pp"]
    gpu, dp = torch.cuda.is_available(), outcome.world_size // (cut * outcome.sizes.get("cp", 1))
    shapes = shapes_of(config)
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    formulas = flops_formulas(shapes, config, seen_length(task, outcome.micro_batch * outcome.micro_batches * dp))
    tokens = outcome.micro_batch * outcome.micro_batches * task.sequence_length * dp / outcome.world_size
    result = {
        "row": row,
        "shape": task.shape,
        "parameters": parameters,
        "active_matmul_parameters": round(matmul_weights(shapes, config)),
        "flops_per_token": formulas["causal"],
        "sequence_length": task.sequence_length,
        "micro_batch": outcome.micro_batch,
        "micro_batches": outcome.micro_batches,
        **outcome.sizes,
        "dp": dp,
        "shards": outcome.shards,
        "warmup_steps": watch.warmup,
        "steps": watch.steps,
        **speed(watch.seconds(), tokens, formulas, peak_flops(torch.device("cuda" if gpu else "cpu"))),
        "first_loss": watch.losses[0],
        "last_loss": watch.losses[-1],
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "versions": versions(row),
        "date": datetime.date.today().isoformat(),
    }
    if gpu:
        statistic = torch.cuda.memory_stats()
        result["peak_memory_gib"] = round(statistic["allocated_bytes.all.peak"] / 2**30, 2)
        result["peak_reserved_gib"] = round(statistic["reserved_bytes.all.peak"] / 2**30, 2)
        result["allocator_retries"] = statistic["num_alloc_retries"]  # memory was so short that speed suffered
        result["state_bytes_per_parameter"] = round(watch.state_bytes * cut / parameters, 3)
    return {**result, **outcome.notes}


def versions(row: dict[str, Any]) -> dict[str, str]:
    """Of what the row ran on, as far as it is installed."""
    found = {"torch": torch.__version__, "transformers": transformers.__version__}
    for package in ("triton", "accelerate", *PACKAGES.get(row.get("trainer", "nanotron"), ())):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def with_floor(result: dict[str, Any], cli: argparse.Namespace) -> dict[str, Any]:
    """The result beside what this device would allow, measured after the row has freed its memory."""
    row = result["row"]
    try:
        result["floor"] = floor.measure(
            make_config(cli.shape, cli.sequence_length),
            cli.sequence_length,
            result["micro_batch"],
            result["micro_batches"],
            state=row.get("optim_state_dtype", "float32"),
            shards=result["shards"],
            cut=result["tp"] * result["pp"],
            fa4=row.get("attn_implementation") == "flash_attention_4",
        )
    except (RuntimeError, TimeoutError) as error:  # the row's own figures stand
        result["floor"] = {"error": f"{type(error).__name__}: {error}"[:300]}
    return result


def attempts(row: dict[str, Any], cli: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The row with each micro-batch that may be tried, the largest first."""
    wanted = row.get(MICRO, cli.per_device_train_batch_size)
    size = min(cli.largest_batch, cli.samples_per_step or cli.largest_batch) if wanted == "auto" else int(wanted)
    samples = cli.samples_per_step or size * cli.gradient_accumulation_steps
    while True:
        yield {STEPS: max(1, samples // size), **row, MICRO: size}
        if wanted != "auto" or size == 1:
            return
        size //= 2


def several_processes() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1  # a trainer may have taken its process group down


def clear(error: BaseException | None = None) -> None:
    """Free what a row, also one that failed, has left."""
    if error is not None:
        traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def write(result: dict[str, Any], cli: argparse.Namespace) -> None:
    line = json.dumps(result)
    print(line, flush=True)
    if cli.out is not None:
        with cli.out.open("a") as file:
            file.write(line + "\n")


def run_here(text: str, cli: argparse.Namespace) -> bool:
    """One row in this process. False if it ran out of memory."""
    row, message = parse_row(text), ""
    name = label(row)  # an attempt's fields are no part of it
    for attempt in attempts(row, cli):
        began = time.perf_counter()
        clear()
        try:
            result = run(attempt, cli)
        except RuntimeError as error:
            message = str(error).partition("\n")[0][:300]
            if not any(sign in message for sign in OUT_OF_MEMORY_SIGNS):
                raise
            clear(error)
            if several_processes():
                break  # the other ranks wait in a collective
            continue
        clear()
        if result is not None:
            seconds = round(time.perf_counter() - began, 1)
            measured = with_floor(result, cli) if cli.floor and torch.cuda.is_available() else result
            write({"name": name, **measured, "seconds": seconds}, cli)
        return True
    write({"name": name, "row": attempt, "shape": cli.shape, "out_of_memory": message}, cli)
    return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a launched row within `STOP_SECONDS`.

    torchrun's workers are in sessions of their own: it has to be asked, and ends them itself. But it waits 30 seconds
    for one that ignores SIGTERM, so what is left of them by then is killed one by one.
    """
    end = time.monotonic() + STOP_SECONDS
    try:
        workers = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        workers = []
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS / 2)
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # torchrun sees that its workers are gone
        process.wait(STOP_SECONDS / 4 if workers else 0.0)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # nothing ends one that hangs in a driver
        process.wait(max(0.0, end - time.monotonic()))
    psutil.wait_procs(workers, max(0.0, end - time.monotonic()))


def run_apart(texts: Sequence[str], cli: argparse.Namespace, seconds: float) -> None:
    """Rows, as a rule one, in processes of their own. If they write nothing, the first one is reported as failed.

    Args:
        seconds: after which it returns at the latest: a row that takes longer is stopped `STOP_SECONDS` before.
    """
    launch = [sys.executable]
    if cli.processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cli.processes)]
    skipped = {"row", "processes", "row_timeout", "budget", "compare"}
    options = {name: value for name, value in vars(cli).items() if name not in skipped and value not in (None, False)}
    command = [*launch, __file__, "--here", *(part for text in texts for part in ("--row", text))]
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        command += [option] if value is True else [option, str(value)]
    before = cli.out.stat().st_size if cli.out is not None and cli.out.exists() else 0
    began, limit = time.monotonic(), max(0.0, seconds - STOP_SECONDS)
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(limit)
        problem = f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        problem = f"stopped after {time.monotonic() - began:.0f} s"
        stop(process)
    after = cli.out.stat().st_size if cli.out is not None and cli.out.exists() else 0
    if problem and after == before:  # a line of its own would say more
        write_problem(texts[0], problem, cli)


def write_problem(text: str, problem: str, cli: argparse.Namespace) -> None:
    row = parse_row(text)
    write({"name": label(row), "row": row, "shape": cli.shape, "error": problem}, cli)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--per-device-train-batch-size", default="2", help="a number, or auto")
    parser.add_argument("--gradient-accumulation-steps", type=int, default=4)
    parser.add_argument("--samples-per-step", type=int, help="per device, instead of gradient accumulation steps")
    parser.add_argument("--largest-batch", type=int, default=8, help="first size that auto tries")
    parser.add_argument("--warmup-steps", type=int, default=10, help="steps before the clock starts")
    parser.add_argument("--timed-steps", type=int, default=20)
    parser.add_argument("--row", action="append", help="fields of the training arguments, such as tp_size=2")
    parser.add_argument("--bf16", action="store_true", help="use bf16 without a GPU as well")
    parser.add_argument("--profile", action="store_true", help="trace two more steps: kernels and overlap")
    parser.add_argument("--profiled-steps", type=int, default=PROFILED_STEPS, help="steps that --profile traces")
    parser.add_argument("--floor", action="store_true", help="also measure, for each row, the limit of the device")
    parser.add_argument("--compare", metavar="NAME", help="end with a table of ratios over the row of this name")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--processes", type=int, default=1, help="per row, without torchrun")
    parser.add_argument("--row-timeout", type=float, default=600.0, help="seconds of a row, and of stopping it")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no row begins")
    parser.add_argument("--here", action="store_true", help="all rows in this process")
    return parser


def main() -> None:
    parser = make_parser()
    cli = parser.parse_args()
    if min(cli.warmup_steps, cli.timed_steps, cli.profiled_steps) < 1:
        parser.error("--warmup-steps, --timed-steps and --profiled-steps are 1 at least: the first step compiles")
    apart = not cli.here and "LOCAL_RANK" not in os.environ
    if cli.compare is not None:
        names = [label(parse_row(text)) for text in cli.row or [""]]
        if cli.compare not in names:
            parser.error(f"--compare {cli.compare} names no row; the rows are {', '.join(names)}")
        if not apart:
            parser.error("--compare needs rows in processes of their own: without torchrun, with --processes")
        if cli.out is None:
            cli.out = Path(tempfile.mkdtemp()) / "rows.jsonl"
    written = cli.out.stat().st_size if cli.out is not None and cli.out.exists() else 0
    began = time.perf_counter()
    for text in cli.row or [""]:
        left = cli.budget - (time.perf_counter() - began)
        if apart:
            if left < LEAST_SECONDS:
                write_problem(text, "not begun: the time is over", cli)
            else:
                run_apart([text], cli, min(cli.row_timeout, left))
        else:
            try:
                fits = run_here(text, cli)
            except Exception as error:
                if os.environ.get("RANK", "0") == "0":
                    write_problem(text, f"{type(error).__name__}: {error}"[:500], cli)
                raise
            if not fits and several_processes():
                os._exit(OUT_OF_MEMORY)  # the other ranks wait for this one
    if cli.compare is not None:
        with cli.out.open() as file:
            file.seek(written)
            results = [json.loads(line) for line in file]
        try:
            print(comparison(results, cli.compare), flush=True)
        except ValueError as error:
            parser.exit(1, f"--compare: {error}\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

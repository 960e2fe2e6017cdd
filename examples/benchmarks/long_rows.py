"""Long sequences on one device: which length each way to save memory reaches, and how fast.

    python long_rows.py --out long.jsonl
    python long_rows.py --shape 8b-10 --rows 32768:selective 131072:full 131072:all --budget 500 --out long.jsonl
    python long_rows.py --shape 8b --plan 131072 262144 524288     # on a CPU, in a second: what would fit

Each row is `LENGTH:WAY`, one sample a step, in a process of its own, which imports its packages while the row before
runs. A first step compiles and makes the optimizer's state; the next ones, `--timed-tokens` in all and one at least,
are timed by events on the device. A line at each step tells the peak so far, so that a row that is stopped has told
what it needs. Prints a JSON line for each row, with the fields of `throughput.py`. `--plan` prints instead what every
way needs at these lengths on the device and on the host, by the memory report, and ends with the rows that fit.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import shapes_of
from shapes import make_config

from hf_nanotron.monitor.memory import MemoryReport, RankStep, activation_bytes, offloaded_bytes
from hf_nanotron.parallel.config import ParallelConfig

CHUNK, BF16 = 8192, 2
ON = {"activation_checkpointing": True}
ATTENTION = {**ON, "activation_checkpointing_policy": "all_but_attention"}
SELECTIVE = {**ON, "activation_checkpointing_policy": "selective"}
ALL = {**ATTENTION, "activation_offload": 1.0, "mlp_chunk_tokens": CHUNK}
STATE_ON_HOST = {"optim_state_dtype": "bfloat16", "optim_offload": 1.0}
WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "full": ON,
    "selective": SELECTIVE,
    "selective-chunks": {**SELECTIVE, "mlp_chunk_tokens": CHUNK},
    "selective-all": {**SELECTIVE, "mlp_chunk_tokens": CHUNK, "activation_offload": 1.0},
    "attention": ATTENTION,
    "offload": {**ATTENTION, "activation_offload": 1.0},
    "chunks": {**ATTENTION, "mlp_chunk_tokens": CHUNK},
    "all": ALL,
    "all-bf16": {**ALL, "optim_state_dtype": "bfloat16"},
    "host": {**ALL, "optim_offload": 1.0},
    "chunks-bf16": {**ATTENTION, "mlp_chunk_tokens": CHUNK, "optim_state_dtype": "bfloat16"},
    # The optimizer's state on the host, with activations on the device, half of them, and all.
    "host-0": {**ATTENTION, "mlp_chunk_tokens": CHUNK, **STATE_ON_HOST},
    "host-half": {**ATTENTION, "activation_offload": 0.5, "mlp_chunk_tokens": CHUNK, **STATE_ON_HOST},
    "host-all": {**ALL, **STATE_ON_HOST},
    "host-fp32": {**ATTENTION, "mlp_chunk_tokens": CHUNK, "optim_offload": 1.0},
    "host-full-0": {**ON, "mlp_chunk_tokens": CHUNK, **STATE_ON_HOST},
    "host-full-half": {**ON, "activation_offload": 0.5, "mlp_chunk_tokens": CHUNK, **STATE_ON_HOST},
    "host-full": {**ON, "activation_offload": 1.0, "mlp_chunk_tokens": CHUNK, **STATE_ON_HOST},
    "fp8": {**ATTENTION, "fp8": "tensorwise"},
    "fp8-host": {**ATTENTION, "activation_offload": 0.5, "fp8": "tensorwise", **STATE_ON_HOST},
    "fp8-host-full": {**ON, "fp8": "tensorwise", **STATE_ON_HOST},
}
DEVICE_GIB, HOST_GIB = 132.0, 112.0  # of one H200 beside the driver and what is freed and not used; of its host
ROWS = (
    *("32768:selective", "32768:attention", "32768:offload", "32768:all"),
    *("131072:full", "131072:attention", "131072:all", "262144:all", "327680:all-bf16", "524288:host"),
)


def work(row: str, cli: argparse.Namespace) -> None:
    """Import everything, wait for a line on stdin, train, and print the result."""
    import torch
    import transformers
    from clock import Watch
    from rows import TRAINERS, Task
    from throughput import figures

    print(f"{row}: ready", flush=True)
    sys.stdin.readline()

    class Short(Watch):
        """Ends with the last timed step."""

        @property
        def steps(self) -> int:
            return self.warmup + self.timed

        def mark(self, profile: bool = True) -> None:
            super().mark(profile)
            if torch.cuda.is_available():
                peak = torch.cuda.max_memory_allocated() / 2**30
                print(
                    f"{row}: step {len(self.clock)} after {time.monotonic() - began:.1f} s, peak {peak:.2f} GiB",
                    flush=True,
                )

    began = time.monotonic()
    length, way = row.split(":")
    timed = max(1, cli.timed_tokens // int(length))
    transformers.set_seed(0)
    task = Task(
        cli.shape,
        make_config(cli.shape, int(length)),
        int(length),
        Short(1, timed),
        True,
        Path(tempfile.mkdtemp()),
    )
    values = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, **WAYS[way]}
    outcome = TRAINERS["nanotron"](values, task)
    result = figures(values, outcome, task)
    result["losses"], result["seconds"] = task.watch.losses, round(time.monotonic() - began, 1)
    print(json.dumps({"name": row, **result}), flush=True)


def needs(shape: str, length: int, way: str) -> MemoryReport:
    """What a row takes, without a model or a GPU: as `training/run_report.py`, on one device."""
    config, fields = make_config(shape, length), WAYS[way]
    shapes = shapes_of(config)
    parameters = sum(math.prod(one) for one in shapes.values())
    linears = sum(math.prod(one) for name, one in shapes.items() if ".layers." in name and len(one) == 2)
    step = RankStep(
        config,
        length,
        ParallelConfig(),
        0,
        1,
        BF16,
        float("activation_checkpointing" in fields),
        fields.get("activation_checkpointing_policy", "full"),
        fields.get("activation_offload", 0.0),
        fields.get("mlp_chunk_tokens"),
    )
    away = round(fields.get("optim_offload", 0.0) * parameters)
    moments = 4 if fields.get("optim_state_dtype") == "bfloat16" else 8
    return MemoryReport(
        parameters=BF16 * parameters + linears * ("fp8" in fields),
        gradients=4 * parameters,
        masters=4 * (parameters - away),
        moments=moments * (parameters - away),
        activations=activation_bytes(step, fused_head=True),
        host=offloaded_bytes(step) + (4 + moments) * away,
    )


def plan(shape: str, lengths: list[int]) -> None:
    """Print what every way takes at every length, and the rows that fit."""
    fit = []
    print(f"{'row':>22} {'state':>7} {'activations':>12} {'device':>7} {'host':>7}  GiB")
    for length in lengths:
        for way in WAYS:
            found = needs(shape, length, way)
            total, host = found.total / 2**30, found.host / 2**30
            fits = total <= DEVICE_GIB and host <= HOST_GIB
            sizes = f"{found.state / 2**30:7.1f} {found.activations / 2**30:12.1f} {total:7.1f} {host:7.1f}"
            print(f"{length}:{way}".rjust(22), sizes, "" if fits else " does not fit")
            fit += [f"{length}:{way}"] if fits else []
    print(f"--shape {shape} --rows", *fit)


def start(row: str, cli: argparse.Namespace) -> subprocess.Popen[str]:
    options = ["--here", row, "--shape", cli.shape, "--timed-tokens", str(cli.timed_tokens)]
    return subprocess.Popen(
        [sys.executable, __file__, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b-10")
    parser.add_argument("--rows", nargs="+", default=ROWS, help="LENGTH:WAY; ways are " + ", ".join(WAYS))
    parser.add_argument("--plan", nargs="+", type=int, metavar="LENGTH", help="estimate all ways, and run nothing")
    parser.add_argument("--timed-tokens", type=int, default=131072, help="of the timed steps together")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which everything is stopped")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--here", metavar="ROW", help="one row in this process")
    cli = parser.parse_args()
    if cli.plan:
        plan(cli.shape, cli.plan)
        return
    if cli.here:
        work(cli.here, cli)
        return
    for row in cli.rows:
        length, _, way = row.partition(":")
        if not length.isdigit() or way not in WAYS:
            parser.error(f"{row!r} is no LENGTH:WAY; ways are {', '.join(WAYS)}")
    began, rows = time.monotonic(), list(cli.rows)
    following = start(rows[0], cli)
    for index, row in enumerate(rows):
        process = following
        if index + 1 < len(rows):
            following = start(rows[index + 1], cli)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        try:
            report(row, process, began + cli.budget - time.monotonic(), cli)
        except subprocess.TimeoutExpired:
            print(f"{row}: stopped, the time is over", flush=True)
            for left in {process, following}:
                left.kill()
            return


def report(row: str, process: subprocess.Popen[str], seconds: float, cli: argparse.Namespace) -> None:
    """Print what a row says, and note its result or that there is none."""
    import threading

    found: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith('{"name"'):
                found.append(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    status = process.wait(max(1.0, seconds))
    reader.join()
    line = found[0] if found else json.dumps({"name": row, "error": f"exit status {status}"}) + "\n"
    if not found:
        print(line, end="", flush=True)
    if cli.out is not None:
        with cli.out.open("a") as file:
            file.write(line)


if __name__ == "__main__":
    main()

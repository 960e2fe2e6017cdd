"""A full Llama-3.1-8B on rows of 32 thousand to a million tokens, on two, four or eight GPUs of one host.

    python long_host.py --plan                                  # what would run: GiB, seconds; on a CPU, in seconds
    python long_host.py --budget 530 --out long_host.jsonl      # nine minutes; the same again goes on with the rest
    python long_host.py --only "128k cp 8 heads,1M cp 8 packed" --out long_host.jsonl
    python long_host.py --table long_host.jsonl                 # Markdown for NOTEBOOK.md
    python long_host.py --gpus 8 --shape 8b-tiny --divide 1024 --out dry.jsonl    # a dry run on CPUs, gloo

Each row is one of `throughput.py`, in processes of its own: one sample a step of each set of cp ranks, in whole rows
or in documents of 1,024 to 131,072 tokens. Rows come by importance. What a row takes is what `hf-nanotron plan` says;
one that does not fit is left out, and one that would not end within `--budget` is not begun. A step of a million tokens
in one document takes eight GPUs four minutes, and a row has three: it needs a budget of 13 minutes, and one of ten
layers stands before it.
`--gpus 2` takes ten layers (`8b-10`): the full model's state does not fit beside long rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import host_table
import throughput
import torch
from figures import percent
from one_host import asked_for, parser_of_rows, read
from rows import MICRO, STEPS, packings
from shapes import SHAPES, make_config

from hf_nanotron.monitor.gpus import find_gpu
from hf_nanotron.plan.default_rates import default_rates
from hf_nanotron.plan.estimate import Estimator
from hf_nanotron.plan.job import Job
from hf_nanotron.plan.layer_work import WorkTable
from hf_nanotron.plan.long_step import long_step_time

K = 1024
SHORTEST, LONGEST = 1024, 131_072  # documents, in tokens
USABLE_GIB = 132.0  # of an H200, beside CUDA, NCCL and what is freed and not used
START_SECONDS = 60.0  # imports, connections, weights, and compiling
SLOWER = 1.15  # than planned, so that a row that is begun also ends
FINISH_SECONDS = 10.0

# Attention's output is kept and the rest of a layer computed again; MLPs go over blocks of tokens; gradients and
# optimizer state are divided over all ranks.
SAVING = {
    "torch_compile": True,
    "activation_checkpointing": True,
    "activation_checkpointing_policy": "all_but_attention",
    "mlp_chunk_tokens": 8 * K,
    "zero_stage": 2,
}
HALF_AWAY = {**SAVING, "activation_offload": 0.5}
FULL_HALF_AWAY = {**HALF_AWAY, "activation_checkpointing_policy": "full"}


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        name: without commas.
        gpus: the number that it is written for.
        tokens: of a row.
        cp_size: ranks that share a row.
        fields: of the training arguments, or of a peer; without `trainer`, on top of `SAVING`.
        packed: whether rows hold documents.
        steps: of warm-up, and timed.
        shape: instead of the call's.
        traced: whether a step more is traced.
    """

    name: str
    gpus: int
    tokens: int
    cp_size: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    packed: bool = False
    steps: tuple[int, int] = (1, 2)
    shape: str | None = None
    traced: bool = True

    @property
    def peer(self) -> bool:
        return "trainer" in self.fields


HEADS, GATHER = {"cp_mode": "heads"}, {"cp_mode": "gather"}
ACCELERATE = {"trainer": "accelerate_cp", "activation_checkpointing": True}
TITAN = {"trainer": "torchtitan", "activation_checkpointing": "full"}

# By importance: a budget that ends early leaves out the last.
ROWS = (
    Row("128k cp 8 heads", 8, 128 * K, 8, HEADS),
    Row("1M cp 8 packed", 8, 1024 * K, 8, {**HEADS, **HALF_AWAY}, packed=True, steps=(1, 1)),
    Row("128k cp 8 heads packed", 8, 128 * K, 8, HEADS, packed=True),
    Row("32k cp 2 heads", 8, 32 * K, 2, HEADS, steps=(2, 4)),
    Row("512k cp 8 heads", 8, 512 * K, 8, {**HEADS, **HALF_AWAY}, steps=(1, 1)),
    Row("128k cp 4 heads", 8, 128 * K, 4, HEADS),
    Row("128k cp 8 gather", 8, 128 * K, 8, GATHER),
    Row("32k cp 2 accelerate", 8, 32 * K, 2, ACCELERATE, steps=(2, 4)),
    Row("128k cp 8 accelerate", 8, 128 * K, 8, ACCELERATE),
    Row("128k cp 8 torchtitan", 8, 128 * K, 8, TITAN),
    Row("128k cp 8 gather packed", 8, 128 * K, 8, GATHER, packed=True),
    Row("512k cp 8 heads packed", 8, 512 * K, 8, {**HEADS, **HALF_AWAY}, packed=True, steps=(1, 1)),
    Row("32k cp 2 gather", 8, 32 * K, 2, GATHER, steps=(2, 4)),
    Row("32k cp 2 heads packed", 8, 32 * K, 2, HEADS, packed=True, steps=(2, 4)),
    Row("128k cp 4 heads packed", 8, 128 * K, 4, HEADS, packed=True),
    Row("1M cp 8 heads ten layers", 8, 1024 * K, 8, {**HEADS, **HALF_AWAY}, steps=(1, 1), shape="8b-10", traced=False),
    Row("1M cp 8 heads", 8, 1024 * K, 8, {**HEADS, **HALF_AWAY}, steps=(1, 1), traced=False),
    Row("128k cp 4 heads", 4, 128 * K, 4, HEADS),
    Row("128k cp 4 heads packed", 4, 128 * K, 4, HEADS, packed=True),
    Row("32k cp 2 heads", 4, 32 * K, 2, HEADS, steps=(2, 4)),
    Row("512k cp 4 packed", 4, 512 * K, 4, {**HEADS, **FULL_HALF_AWAY}, packed=True, steps=(1, 1)),
    Row("128k cp 4 gather", 4, 128 * K, 4, GATHER),
    Row("128k cp 4 accelerate", 4, 128 * K, 4, ACCELERATE),
    Row("32k cp 2 accelerate", 4, 32 * K, 2, ACCELERATE, steps=(2, 4)),
    Row("32k cp 2 gather", 4, 32 * K, 2, GATHER, steps=(2, 4)),
    Row("512k cp 4 heads", 4, 512 * K, 4, {**HEADS, **FULL_HALF_AWAY}, steps=(1, 1)),
    Row("128k cp 2 heads", 2, 128 * K, 2, HEADS),
    Row("128k cp 2 heads packed", 2, 128 * K, 2, HEADS, packed=True),
    Row("128k cp 2 accelerate", 2, 128 * K, 2, ACCELERATE),
    Row("512k cp 2 packed", 2, 512 * K, 2, {**HEADS, **HALF_AWAY}, packed=True, steps=(1, 1)),
    Row("32k cp 2 gather", 2, 32 * K, 2, GATHER, steps=(2, 4)),
)


@dataclass(frozen=True)
class Planned:
    """A row as it will run.

    Attributes:
        tokens: of a row, after `--divide`.
        gib: of the fullest rank, by arithmetic; None of a peer.
        seconds: of the row with its start; a peer's are those of ours twice.
        step_seconds: of one step of ours.
    """

    row: Row
    tokens: int
    gib: float | None
    seconds: float
    step_seconds: float

    @property
    def fits(self) -> bool:
        return self.gib is None or self.gib <= USABLE_GIB

    def documents(self, divide: int) -> tuple[int, int] | None:
        """Shortest and longest."""
        return (max(1, SHORTEST // divide), max(2, LONGEST // divide)) if self.row.packed else None

    def text(self, divide: int) -> str:
        """As `throughput.py` takes it."""
        fields = {} if self.row.peer else {**SAVING}
        if divide > 1 and fields:
            fields["mlp_chunk_tokens"] = max(8, SAVING["mlp_chunk_tokens"] // divide)
        fields |= {**self.row.fields, "cp_size": self.row.cp_size, MICRO: 1, STEPS: 1}
        if (bounds := self.documents(divide)) is not None:
            fields["documents"] = "-".join(map(str, bounds))
        if self.row.peer:
            fields.pop(STEPS)
        pairs = (f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in fields.items())
        return ",".join([f"name={self.row.name}", *pairs])


def shape_of(row: Row, cli: argparse.Namespace) -> str:
    """A dry run has one shape."""
    return row.shape if row.shape and cli.divide == 1 else cli.shape


def plan(rows: Iterable[Row], cli: argparse.Namespace) -> list[Planned]:
    """What each row takes, by the arithmetic of `hf-nanotron plan` on H200s."""
    gpu = find_gpu("h200")
    rates = default_rates(gpu)
    planned = []
    for row in rows:
        tokens = row.tokens // cli.divide
        config = make_config(shape_of(row, cli), tokens)
        lengths = tuple(packings((SHORTEST // cli.divide or 1, LONGEST // cli.divide), tokens, 1)[0])
        own = {} if row.peer else dict(row.fields)
        arguments = {**SAVING, **own, "cp_size": row.cp_size, MICRO: 1, STEPS: 1, "bf16": True}
        job = Job(config, arguments, row.gpus, row.gpus, tokens, lengths if row.packed else None)
        estimator = Estimator(config)
        step = long_step_time(job, rates, WorkTable(estimator.weights)).seconds
        gib = None if row.peer else estimator.fullest(job).total / 2**30
        steps = sum(row.steps) + 1 + (row.traced and cli.profile)  # the last one logs
        seconds = START_SECONDS + SLOWER * step * steps * (2 if row.peer else 1)
        planned.append(Planned(row, tokens, gib, seconds, step))
    return planned


def plan_table(plans: Sequence[Planned], cli: argparse.Namespace) -> str:
    """The plan as Markdown."""
    lines = [
        f"{cli.gpus} H200s, shape {cli.shape}, by the arithmetic of `hf-nanotron plan`; a peer takes ours twice.",
        "",
        "| row | tokens | GiB of the fullest rank | seconds a step | seconds with the start |",
        "|---|---|---|---|---|",
    ]
    for item in plans:
        gib = "" if item.gib is None else f"{item.gib:.1f}" + ("" if item.fits else ": does not fit")
        step = "" if item.row.peer else f"{item.step_seconds:.1f}"
        lines.append(f"| {item.row.name} | {item.tokens:,} | {gib} | {step} | {item.seconds:.0f} |")
    return "\n".join([*lines, "", f"{sum(item.seconds for item in plans if item.fits):.0f} s for all rows"])


def options_of(item: Planned, cli: argparse.Namespace) -> argparse.Namespace:
    """The options of `throughput.py` for a row."""
    warmup, timed = item.row.steps
    texts = [
        *("--shape", shape_of(item.row, cli), "--sequence-length", str(item.tokens), "--bf16"),
        *("--warmup-steps", str(warmup), "--timed-steps", str(timed), "--profiled-steps", "1"),
        *("--processes", str(cli.gpus), "--out", str(cli.out)),
        *(["--profile"] if cli.profile and item.row.traced else []),
    ]
    return throughput.make_parser().parse_args(texts)


def run(plans: Sequence[Planned], cli: argparse.Namespace, began: float) -> None:
    """Each row in processes of its own, as long as the budget lasts."""
    done = {result["name"] for result in read(cli.out) if "tokens_per_second_per_device" in result}
    for item in plans:
        if item.row.name in done:
            continue
        left, options = cli.budget - (time.perf_counter() - began), options_of(item, cli)
        if not item.fits:
            throughput.write_problem(item.text(cli.divide), f"left out: it needs {item.gib:.0f} GiB", options)
        elif left < item.seconds + throughput.STOP_SECONDS + FINISH_SECONDS:
            problem = f"not begun: it takes about {item.seconds:.0f} s, and {max(0.0, left):.0f} s were left"
            throughput.write_problem(item.text(cli.divide), problem, options)
        else:
            throughput.run_apart([item.text(cli.divide)], options, left - FINISH_SECONDS)


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """The newest result of each row, as Markdown."""
    newest = {result["name"]: result for result in results}
    lines = [
        "| row | tokens | tokens/s per GPU | range | MFU | peak GiB | communication exposed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in newest.items():
        if "tokens_per_second_per_device" not in result:
            why = result.get("error") or f"out of memory: {result.get('out_of_memory')}"
            lines.append(f"| {name} | | {why} | | | | |")
            continue
        low, high = result["spread"]
        mfu, exposed = percent(result["mfu"]), percent(host_table.exposed(result))
        lines.append(
            f"| {name} | {result['sequence_length']:,} | {result['tokens_per_second_per_device']:,.0f} | "
            f"{low:,.0f} – {high:,.0f} | {mfu} | {result.get('peak_memory_gib', '')} | {exposed} |"
        )
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = parser_of_rows(__doc__, "long_host.jsonl")
    parser.add_argument("--shape", choices=SHAPES, help="default: 8b; 8b-10 on two GPUs")
    parser.add_argument("--divide", type=int, default=1, help="all lengths by this, for a dry run")
    return parser


def chosen(cli: argparse.Namespace) -> list[Row]:
    """The rows to run; a ValueError as `asked_for`."""
    return asked_for({row.name: row for row in ROWS if row.gpus == cli.gpus}, cli, "row")


def main() -> int:
    parser = make_parser()
    cli = parser.parse_args()
    began = time.perf_counter()
    if cli.table is not None:
        print(table(read(cli.table)))
        return 0
    if cli.divide < 1:
        parser.error(f"--divide {cli.divide} must be at least 1")
    cli.gpus = cli.gpus or torch.cuda.device_count() or 8
    if cli.gpus not in (2, 4, 8):
        parser.error(f"{cli.gpus} GPUs: there are rows for 2, 4 and 8; say --gpus")
    cli.shape = cli.shape or ("8b-10" if cli.gpus == 2 else "8b")
    try:
        plans = plan(chosen(cli), cli)
    except ValueError as error:
        parser.error(str(error))
    print(plan_table(plans, cli), flush=True)
    if cli.plan:
        return 0
    run(plans, cli, began)
    results = read(cli.out)
    print(table(results), flush=True)
    return int(not any("tokens_per_second_per_device" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())

"""A full Llama-3.1-8B and a mixture of 30 B parameters on two, four or eight GPUs of one host, layout by layout.

    python one_host.py --plan                                     # what would run: micro-batches, memory, seconds
    python one_host.py --budget 530 --out one_host.jsonl          # nine minutes; the same again goes on with the rest
    python one_host.py --only "dp 8 ZeRO-1,tp 8" --tokens-per-step 524288 --out one_host.jsonl
    python one_host.py --table one_host.jsonl                     # Markdown for NOTEBOOK.md
    python one_host.py --gpus 8 --shape 8b-tiny --moe-shape moe-tiny --sequence-length 64 --moe-sequence-length 64 \\
        --tokens-per-step 2048 --together                         # a dry run on CPUs, gloo

The layouts, and why each has its micro-batch, are data: `layouts.py`. Each row is one of `throughput.py`, which writes
its JSON line as soon as it is there. A row has processes of its own, because one that fails or runs out of memory takes
its process group along, and because torchtitan wants one of its own; what a common one would save, about 20 s a row of
imports and connections, is less than a lost row costs (compiled code is cached on disk in both cases). `--together`
shares one among the rows of a shape all the same.

A step of 1 M tokens takes eight GPUs 12 to 16 s, and a row seven of them (3 of warm-up, 2 timed, 1 traced, 1 that logs)
besides its start: four rows in nine minutes, the whole table in three calls. Rows come by importance. One that would
not end within `--budget`, at the pace of the rows before it, is not begun; a call with the same `--out` leaves out what
has its figures there. A micro-batch that is out of memory is followed by the layout's next smaller one, if it has one.

All layouts of a shape see the same samples from the same weights, so their first losses agree but for rounding: the
largest difference is printed, and beyond `host_table.TOLERANCE` the exit status is 1. torchtitan has weights and data
of its own.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import plot
import throughput
import torch
from host_table import TOO_FAR, latest, loss_differences, ran, samples_per_step, table
from layouts import (
    LAYOUTS,
    USABLE_GIB,
    Layout,
    Model,
    estimate,
    fields_of,
    micro_batch_count,
    obstacle,
    reckoned_seconds,
)
from rows import MICRO, STEPS
from shapes import SHAPES

T = TypeVar("T")
COMPILED = 2 / 3  # of the estimated activations is what compiled layers kept on one GPU: 132 of 209 kB a token, 8B
TOKENS_OF_A_GPU = 131_072  # in a step: 1 M on eight
FINISH_SECONDS = 10.0  # for the table and the plot, and for a row that takes longer than reckoned


@dataclass(frozen=True)
class Planned:
    """A layout as it will run, or why it will not.

    Attributes:
        sizes: micro-batches to try, largest first; empty if it cannot run.
        gib: estimated for the first of them (or for the layout's last, if it cannot run): state, and activations.
    """

    layout: Layout
    model: Model
    samples: int
    sizes: tuple[int, ...]
    gib: tuple[float, float]
    seconds: float
    skipped: str = ""

    def row(self, micro_batch: int) -> str:
        """As `throughput.py` takes it."""
        fields = {**fields_of(self.layout, self.model), MICRO: micro_batch, STEPS: self.count(micro_batch)}
        values = (
            f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in fields.items()
        )
        return ",".join([f"name={self.layout.name}", *values])

    def count(self, micro_batch: int) -> int:
        return micro_batch_count(self.layout, micro_batch, self.samples)


def plan(layouts: Iterable[Layout], cli: argparse.Namespace) -> list[Planned]:
    """What will run, in order."""
    dense = Model(cli.shape, cli.sequence_length)
    mixture = Model(cli.moe_shape, cli.moe_sequence_length)
    steps = cli.warmup_steps + cli.timed_steps + 1 + cli.profiled_steps * cli.profile
    return [planned(layout, mixture if layout.moe else dense, cli.tokens_per_step, steps) for layout in layouts]


def planned(layout: Layout, model: Model, tokens_per_step: int, steps: int) -> Planned:
    """A layout on a model: which of its micro-batches divide a step and fit."""
    samples = tokens_per_step // model.sequence_length
    if why := obstacle(layout, model, samples):
        return Planned(layout, model, samples, (), (0.0, 0.0), 0.0, why)
    gib, sizes = {}, []
    for size in layout.micro_batches:
        try:
            count = micro_batch_count(layout, size, samples)
        except ValueError:  # the last one divides
            continue
        state, kept = (part / 2**30 for part in estimate(layout, model, size, count))
        gib[size] = (state, kept)
        if state + COMPILED * kept <= USABLE_GIB:
            sizes.append(size)
    seconds = reckoned_seconds(layout, model, samples, steps)
    if not sizes:
        state, kept = gib[layout.micro_batches[-1]]
        why = f"{state:.0f} GiB of state and about {COMPILED * kept:.0f} of activations do not fit"
        return Planned(layout, model, samples, (), (state, kept), seconds, why)
    return Planned(layout, model, samples, tuple(sizes), gib[sizes[0]], seconds)


def plan_table(plans: Sequence[Planned], gpus: int) -> str:
    """The plan as Markdown."""
    lines = [
        f"{gpus} GPUs. GiB of the fullest rank: state and activations by the trainer's estimate, their sum, and that "
        f"with {COMPILED:.0%} of the activations, as compiled layers keep.",
        "",
        "| layout | shape | samples a step | micro-batches | state | activations | sum | compiled | seconds | why |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for item in plans:
        state, kept = item.gib
        what = " or ".join(f"{item.count(size)} of {size}" for size in item.sizes)
        memory = f"{state:.1f} | {kept:.1f} | {state + kept:.1f} | {state + COMPILED * kept:.1f}" if state else "| | |"
        why = f"left out: {item.skipped}" if item.skipped else item.layout.why
        lines.append(
            f"| {item.layout.name} | {item.model.shape}, {item.model.sequence_length:,} | {item.samples} | {what} | "
            f"{memory} | {item.seconds:.0f} | {why} |"
        )
    total = sum(item.seconds for item in plans if not item.skipped)
    return "\n".join([*lines, "", f"{total:.0f} s for all rows"])


def options_of(item: Planned, cli: argparse.Namespace) -> argparse.Namespace:
    """The options of `throughput.py` for a row."""
    texts = [
        *("--shape", item.model.shape, "--sequence-length", str(item.model.sequence_length)),
        *("--warmup-steps", str(cli.warmup_steps), "--timed-steps", str(cli.timed_steps)),
        *("--profiled-steps", str(cli.profiled_steps), "--processes", str(cli.gpus), "--out", str(cli.out)),
        *(["--profile"] if cli.profile else []),
    ]
    return throughput.make_parser().parse_args(texts)


def run_apart(plans: Sequence[Planned], cli: argparse.Namespace, left: Callable[[], float]) -> None:
    """Each row in processes of its own, with the next smaller micro-batch if it is out of memory."""
    paces: list[float] = []  # how long rows took, over how long they were reckoned to take
    for item in plans:
        for size in item.sizes:
            text, options, began, seen = item.row(size), options_of(item, cli), left(), len(read(cli.out))
            need = item.seconds * max(paces, default=1.0) + throughput.STOP_SECONDS + FINISH_SECONDS
            if began < need:
                problem = f"not begun: it takes about {need:.0f} s, and {max(0.0, began):.0f} s were left"
                throughput.write_problem(text, problem, options)
                break
            throughput.run_apart([text], options, began - FINISH_SECONDS)
            written = read(cli.out)[seen:]  # when one rank is out of memory, others may report what followed from it
            if any(map(ran, written)):
                paces.append((began - left()) / item.seconds)
            if not any("out_of_memory" in result for result in written):
                break


def run_together(plans: Sequence[Planned], cli: argparse.Namespace, left: Callable[[], float]) -> None:
    """The rows of a shape in one process group; after a failure, the rest in another one."""
    for shape in dict.fromkeys(item.model.shape for item in plans):
        pending = {item.layout.name: item for item in plans if item.model.shape == shape}
        while pending:
            first = next(iter(pending.values()))
            if left() < throughput.STOP_SECONDS + FINISH_SECONDS:
                for item in pending.values():
                    throughput.write_problem(
                        item.row(item.sizes[0]), "not begun: the time is over", options_of(item, cli)
                    )
                break
            seen = len(read(cli.out))
            alone = first.layout.peer  # it makes a process group of its own
            now = [first] if alone else [item for item in pending.values() if not item.layout.peer]
            texts = [item.row(item.sizes[0]) for item in now]
            throughput.run_apart(texts, options_of(first, cli), left() - FINISH_SECONDS / 2)
            for result in read(cli.out)[seen:]:
                pending.pop(result["name"], None)


def key_of(item: Planned) -> tuple[str, str]:
    return item.model.shape, item.layout.name


def read(path: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def is_done(item: Planned, results: Mapping[tuple[str, str], Mapping[str, Any]]) -> bool:
    """Whether a row of the same model and step has its figures already."""
    result = results.get(key_of(item), {})
    step = (item.model.sequence_length, item.samples)
    return ran(result) and (result["sequence_length"], samples_per_step(result)) == step


def parser_of_rows(description: str | None, out: str) -> argparse.ArgumentParser:
    """The arguments of a script that runs a table's rows as long as its budget lasts, and goes on in a next call."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, choices=(2, 4, 8), help="default: all")
    parser.add_argument("--only", help="names of rows, separated by commas")
    parser.add_argument("--no-profile", dest="profile", action="store_false", help="do not trace a step")
    parser.add_argument("--budget", type=float, default=530.0, help="seconds of the whole call")
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--plan", action="store_true", help="print what would run, and exit")
    parser.add_argument("--table", type=Path, metavar="JSONL", help="print these results as Markdown, and exit")
    return parser


def make_parser() -> argparse.ArgumentParser:
    parser = parser_of_rows(__doc__, "one_host.jsonl")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--moe-shape", choices=SHAPES, default="moe-30b-a3b")
    parser.add_argument("--sequence-length", type=int, default=8192)
    parser.add_argument("--moe-sequence-length", type=int, default=4096)
    parser.add_argument("--tokens-per-step", type=int, help=f"of all GPUs; default: {TOKENS_OF_A_GPU:,} per GPU")
    parser.add_argument("--warmup-steps", type=int, default=3, help="the first optimizer step falls into the second")
    parser.add_argument("--timed-steps", type=int, default=2)
    parser.add_argument("--profiled-steps", type=int, default=1)
    parser.add_argument("--together", action="store_true", help="the rows of a shape in one process group")
    return parser


def asked_for(there: Mapping[str, T], cli: argparse.Namespace, what: str) -> list[T]:
    """Those of the rows for this number of GPUs that `--only` names; all without it.

    Raises:
        ValueError: it names one that there is not.
    """
    names = [name.strip() for name in cli.only.split(",")] if cli.only else list(there)
    if unknown := [name for name in names if name not in there]:
        raise ValueError(f"--only {unknown[0]!r}: no {what} for {cli.gpus} GPUs; there are {', '.join(there)}.")
    return [there[name] for name in names]


def chosen(cli: argparse.Namespace) -> list[Layout]:
    """The layouts to run; a ValueError as `asked_for`."""
    return asked_for({layout.name: layout for layout in LAYOUTS if layout.gpus == cli.gpus}, cli, "layout")


def finish(results: Sequence[Mapping[str, Any]], out: Path) -> int:
    """Print table and differences of losses, draw the plot; the exit status."""
    print(table(results), flush=True)
    differences = loss_differences(results)
    print("\n".join(["", *differences]), flush=True)
    if not any(map(ran, results)):
        print("no row ran")
        return 1
    try:
        figure = plot.draw(list(latest(results).values()), plot.caption(results))
        figure.savefig(out.with_suffix(".svg"))
    except SystemExit as error:  # matplotlib is not installed
        print(error)
    return int(any(line.endswith(TOO_FAR) for line in differences))


def main() -> int:
    parser = make_parser()
    cli = parser.parse_args()
    began = time.perf_counter()
    if cli.table is not None:
        print(table(read(cli.table)))
        return 0
    cli.gpus = cli.gpus or torch.cuda.device_count()
    if cli.gpus not in (2, 4, 8):
        parser.error(f"{cli.gpus} GPUs: there are layouts for 2, 4 and 8; say --gpus")
    cli.tokens_per_step = cli.tokens_per_step or cli.gpus * TOKENS_OF_A_GPU
    try:
        plans = plan(chosen(cli), cli)
    except ValueError as error:
        parser.error(str(error))
    print(plan_table(plans, cli.gpus), flush=True)
    if cli.plan:
        return 0
    done = latest(read(cli.out))
    for item in plans:
        if item.skipped and key_of(item) not in done:
            throughput.write_problem(f"name={item.layout.name}", f"left out: {item.skipped}", options_of(item, cli))
    todo = [item for item in plans if not item.skipped and not is_done(item, done)]
    (run_together if cli.together else run_apart)(todo, cli, lambda: cli.budget - (time.perf_counter() - began))
    return finish(read(cli.out), cli.out)


if __name__ == "__main__":
    sys.exit(main())

"""`hf-nanotron plot`: curves of one run, or of several, as a picture."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import explained
from .plotting import check_picture

DESCRIPTION = """\
Draw loss, loss of the evaluation, learning rate, gradient norm and throughput of a run, or of several to compare:

  hf-nanotron plot out --output curves.png
  hf-nanotron plot out-a out-b --by tokens --output compared.png

A run is its output_dir, one of its checkpoints, or a trainer_state.json, also of a stock Trainer. Resumed runs are one
curve."""

# Panel -> the metric that it shows, and its axis; what a run lacks is left out.
PANELS = (
    ("loss", "loss"),
    ("learning_rate", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_second", "tokens / s"),
)
THROUGHPUTS = ("tokens_per_second", "train_tokens_per_second")  # ours, a stock Trainer's
SHOWN_NAMES = 30  # of metrics, in a message
DOTS = 40  # points up to which each is marked


def add_plot_arguments(parser: argparse.ArgumentParser) -> None:
    """The parsed arguments get `run`, which takes them."""
    parser.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="OUT",
        help="output_dir of a run, a checkpoint, or a trainer_state.json",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.png", help="picture to write (.png, .svg or .pdf)"
    )
    parser.add_argument(
        "--by", choices=("step", "tokens"), default="step", help="what is on the x-axis (default: %(default)s)"
    )
    parser.add_argument(
        "--metric",
        action="append",
        metavar="NAME",
        help="draw this metric of the log instead, such as eval_loss or mfu; repeat for several",
    )
    parser.set_defaults(run=_plot)


def _plot(args: argparse.Namespace) -> None:
    check_picture("--output", args.output)
    from ..monitor.history import read_history

    histories = [read_history(path) for path in args.sources]
    for path, history in zip(args.sources, histories, strict=True):
        if args.by == "tokens" and history.tokens is None:
            raise ValueError(
                f"--by tokens: {history.source} does not say how many tokens were read (a stock Trainer does with "
                "include_num_input_tokens_seen); use --by step."
            )
        for name in args.metric or ():
            if name not in history.names():
                raise ValueError(f"--metric {name}: {path} has not logged it; it has {listed(history.names())}.")
    if not args.metric and not any(_has(history, name) for history in histories for name, _ in PANELS):
        raise ValueError(f"{histories[0].source} has no loss, learning rate, gradient norm or throughput to draw yet.")
    with explained(f"--output {args.output} cannot be drawn"):
        draw(histories, labels(args.sources), args.output, args.by, args.metric)
    print(f"{args.output}: {', '.join(str(history.source) for history in histories)}")


def listed(names: Sequence[str]) -> str:
    """`names`, of which there may be thousands, for a message."""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


def labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart."""
    parts = [path.absolute().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-length:]) for part in parts]
        if len(set(short)) == len({*parts}):
            return short
    return [str(path) for path in paths]


def draw(
    histories: Sequence[Any], names: Sequence[str], path: Path, by: str, metrics: Sequence[str] | None = None
) -> None:
    """One panel for each metric, one colour for each run."""
    import matplotlib

    matplotlib.use("Agg")  # draws files; needs no display
    import matplotlib.pyplot as plt

    panels = (
        [(name, name) for name in metrics] if metrics else [p for p in PANELS if any(_has(h, p[0]) for h in histories)]
    )
    columns = 1 if len(panels) == 1 else 2
    rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(5.5 * columns + 1, 3.2 * rows + 0.6), layout="constrained", squeeze=False
    )
    for axes, (name, title) in zip(grid.flat, panels, strict=False):
        for number, (history, label) in enumerate(zip(histories, names, strict=True)):
            colour = f"C{number % 10}"
            metric = name if name != "tokens_per_second" else _throughput(history)
            _line(axes, history.series(metric, by == "tokens"), colour, label)
            if name == "loss" and not metrics:
                for each in evaluation_losses(history):
                    suffix = each.removeprefix("eval").removesuffix("loss").strip("_")
                    said = f"{label}, evaluation{' ' + suffix if suffix else ''}"
                    _line(axes, history.series(each, by == "tokens"), colour, said, linestyle="--", marker="o")
        axes.set_ylabel(title)
        axes.set_xlabel("tokens" if by == "tokens" else "step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _throughput(history: Any) -> str:
    return next((name for name in THROUGHPUTS if history.series(name)[0]), THROUGHPUTS[0])


def _has(history: Any, name: str) -> bool:
    wanted = _throughput(history) if name == "tokens_per_second" else name
    return bool(history.series(wanted)[0] or (name == "loss" and evaluation_losses(history)))


def evaluation_losses(history: Any) -> list[str]:
    """The losses of evaluations: eval_loss, eval_NAME_loss of several sets."""
    return [name for name in history.names() if name.startswith("eval_") and name.endswith("loss")]


def _line(axes: Any, series: tuple[list[float], list[float]], colour: str, label: str, **style: Any) -> None:
    places, values = series
    if not places:
        return
    style = {"marker": "o" if len(places) <= DOTS else None, **style}
    axes.plot(places, values, color=colour, label=label, linewidth=1.2, markersize=3, **style)

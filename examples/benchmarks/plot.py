"""Draw the rows of one run of `throughput.py`: tokens/s with its range, the floor of each row, peak memory beside it.

    python plot.py rows.jsonl --out images/throughput.svg --title "Llama-3.2-1B, sequence 4,096, one H100"

Rows without figures (out of memory, stopped) are named with their reason. The suffix of `--out` is the format.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OURS, PEER, MEMORY, FLOOR = "#1b6ca8", "#9aa5b1", "#d9a441", "#c0392b"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines.

    Raises:
        ValueError: it holds none, or none that ran.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    if not any("tokens_per_second_per_device" in row for row in rows):
        raise ValueError(f"{path} holds no row with figures; write it with `throughput.py --out {path}`.")
    return rows


def failure(row: Mapping[str, Any]) -> str:
    """Why a row has no figures, in a few words; empty if it has."""
    if "tokens_per_second_per_device" in row:
        return ""
    return "out of memory" if "out_of_memory" in row else str(row.get("error", "no figures"))[:40]


def draw(rows: Sequence[Mapping[str, Any]], title: str) -> Any:
    """The figure: one bar a row, from the top, in the order of the run."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("plot.py needs matplotlib: pip install 'hf-nanotron[plot]'") from error

    figure = Figure(figsize=(10, 1.2 + 0.5 * len(rows)), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True, width_ratios=[2, 1])
    for at, row in enumerate(rows):
        if why := failure(row):
            speed.text(0, at, f" {why}", va="center", color=PEER)
            continue
        median, (low, high) = row["tokens_per_second_per_device"], row["spread"]
        ours = row["row"].get("trainer", "nanotron") == "nanotron"
        error = [[median - low], [high - median]]
        speed.barh(at, median, xerr=error, color=OURS if ours else PEER, height=0.6, capsize=3)
        mfu = f", {row['mfu']:.1%} MFU" if row.get("mfu") is not None else ""
        speed.text(0, at, f" {median:,}{mfu}", va="center", color="white", fontsize=9)
        if (floor := row.get("floor", {}).get("tokens_per_second_per_device")) is not None:
            speed.plot([floor, floor], [at - 0.4, at + 0.4], color=FLOOR, linewidth=2)
        if row.get("peak_memory_gib") is not None:
            memory.barh(at, row["peak_memory_gib"], color=MEMORY, height=0.6)
            memory.text(0, at, f" {row['peak_memory_gib']}", va="center", fontsize=9)
    if any("tokens_per_second_per_device" in row.get("floor", {}) for row in rows):
        speed.plot([], [], color=FLOOR, linewidth=2, label="floor: nothing but products, attention and optimizer")
        figure.legend(loc="outside lower left", frameon=False, fontsize=9)
    speed.set_yticks(range(len(rows)), [str(row["name"]) for row in rows])
    speed.set_ylim(len(rows) - 0.5, -0.5)
    speed.set_xlabel("tokens/s per GPU: median, and range of the steps")
    memory.set_xlabel("peak memory, GiB")
    for axes in (speed, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure


def caption(rows: Sequence[Mapping[str, Any]]) -> str:
    """Shape, machine, torch and date of the first row that ran."""
    row = next(row for row in rows if not failure(row))
    machine = f"{row['device']}, torch {row['versions']['torch']}, {row['date']}"
    return f"{row['shape']}, sequence {row['sequence_length']:,}: {machine}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSON lines of one run")
    parser.add_argument("--out", type=Path, default=Path("examples/benchmarks/images/throughput.svg"))
    parser.add_argument("--title", help="default: shape, machine and date")
    cli = parser.parse_args()
    try:
        rows = read(cli.rows)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    figure = draw(rows, cli.title or caption(rows))
    cli.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(cli.out)


if __name__ == "__main__":
    main()

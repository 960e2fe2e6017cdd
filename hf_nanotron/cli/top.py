"""`hf-nanotron top`: a running job in the terminal, from its own log. Does not import torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ..monitor.read_log import RUN_LOG, LogReader, Run, joined
from ..monitor.run_status import Status, status_of
from ..monitor.stragglers import table

DESCRIPTION = """\
Show a job in the terminal, from the log that it writes into its output_dir: steps, loss, learning rate, tokens/s, MFU,
memory, which rank is slow, the last checkpoint, and when it will be done.

  hf-nanotron top out
  hf-nanotron top out --once

It reads files alone, so that it works from any machine that sees the folder, also for a job that has ended."""

SPARKS, PLAIN_SPARKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
SHOWN_RUNS = 5  # before the last one
KEPT = 200  # log lines of each run that are looked at
ENTER, HOME, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[H\x1b[J", "\x1b[?25h\x1b[?1049l"


def add_top_arguments(parser: argparse.ArgumentParser) -> None:
    """The parsed arguments get `run`, which takes them."""
    parser.add_argument("folder", type=Path, metavar="OUT", help="output_dir of the job")
    parser.add_argument("--once", action="store_true", help="print it once and exit")
    parser.add_argument("--json", action="store_true", help="print it once as one JSON object")
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="S", help="seconds between two looks (default: %(default)s)"
    )
    parser.set_defaults(run=_top)


def _top(args: argparse.Namespace) -> None:
    if not 0.1 <= args.interval <= 86400:
        raise ValueError(f"--interval {args.interval} must be at least 0.1 and at most 86400 seconds.")
    if not args.folder.is_dir():
        raise ValueError(f"{args.folder} is no folder; give the output_dir of a job.")
    reader = LogReader(args.folder / RUN_LOG, keep=KEPT)
    if args.json or args.once or not sys.stdout.isatty():
        runs = _read(reader)
        if not runs:
            raise ValueError(
                f"{args.folder} has no {RUN_LOG} with a run in it: no job has trained there, or it has run_log=False."
            )
        print(as_json(runs, args.folder, time.time()) if args.json else render(runs, args.folder, time.time()))
        return
    sys.stdout.write(ENTER)
    try:
        while True:
            size = shutil.get_terminal_size()
            text = f"{args.folder}: waiting for the first line of a job."
            try:
                if runs := _read(reader):
                    text = render(runs, args.folder, time.time(), size.columns)
            except OSError as error:  # of a file system that is away for a while, say
                text = f"{reader.path} cannot be read: {error.strerror}"
            lines = [line[: size.columns] for line in text.splitlines()]
            sys.stdout.write(
                HOME + "\n".join([*lines[: max(1, size.lines - 2)], "", "ctrl-C ends this view, not the job"])
            )
            sys.stdout.flush()
            time.sleep(args.interval)
    except KeyboardInterrupt:
        pass
    finally:
        sys.stdout.write(LEAVE)
        sys.stdout.flush()


def _read(reader: LogReader) -> list[Run]:
    try:
        return reader.read()
    except FileNotFoundError:
        return []


def as_json(runs: Sequence[Run], folder: Path, now: float) -> str:
    """The last run: its `begin` line and its `Status`, as one object."""
    body = {"run": runs[-1].id, "begin": runs[-1].begin, **dataclasses.asdict(status_of(runs[-1], folder, now))}
    return json.dumps(_finite(body), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def render(runs: Sequence[Run], folder: Path, now: float, width: int = 100) -> str:
    """The last run in full, and the ones before in a line each."""
    run, status = runs[-1], status_of(runs[-1], folder, now)
    lines = [*_head(run, status, folder, width), "", *_numbers(status), *_spark(joined(runs), width)]
    lines += ["", _checkpoint(status, now), f"last line       {duration(status.age)} ago"]
    if status.ranks:
        lines += ["", *_ranks(status)]
    if len(runs) > 1:
        lines += ["", "runs before"]
        lines += [_short(each, folder, now) for each in runs[-1 - SHOWN_RUNS : -1]]
    return "\n".join(clean(line) for line in lines)


def _head(run: Run, status: Status, folder: Path, width: int) -> list[str]:
    done = f"step {status.step:,}"
    share = min(1.0, status.step / status.max_steps) if status.max_steps else 0.0
    if status.max_steps:
        done += f" of {status.max_steps:,} ({100 * share:.0f} %)"
    eta = "" if status.eta is None else f"   eta {duration(status.eta)}"
    why = f": {status.why}" if status.why else ""
    begin = run.begin
    sizes = " x ".join(f"{name} {size}" for name, size in (begin.get("sizes") or {}).items() if size != 1)
    bar = max(10, min(60, width - 2))
    filled = round(share * bar)
    return [
        f"{folder}   {status.state}{why}",
        f"{done}{eta}",
        "[" + "#" * filled + "-" * (bar - filled) + "]",
        f"{begin.get('model', '?')}, {count(begin.get('parameters'))} parameters, on {begin.get('world_size', '?')} x "
        f"{begin.get('device', '?')}{': ' + sizes if sizes else ''}; host {begin.get('host', '?')}, process "
        f"{begin.get('pid', '?')}",
    ]


def _numbers(status: Status) -> list[str]:
    latest = status.latest

    def value(label: str, name: str, form: str, factor: float = 1.0, unit: str = "") -> str | None:
        return None if name not in latest else f"{label} {factor * latest[name]:{form}}{unit}"

    rows = (
        (
            value("loss", "loss", ".4f"),
            value("grad norm", "grad_norm", ".3g"),
            value("learning rate", "learning_rate", ".3g"),
            value("epoch", "epoch", ".2f"),
        ),
        (
            value("tokens/s", "tokens_per_second", ",.0f"),
            value("a device", "tokens_per_second_per_device", ",.0f"),
            value("step", "step_time", ".3g", unit=" s"),
            value("MFU", "mfu", ".1f", 100, " %"),
            value("peak memory", "peak_memory_gib", ".3g", unit=" GiB"),
        ),
        tuple(
            value(name.replace("_", " "), name, ".4f", unit=f" (step {status.latest_step[name]:,})")
            for name in latest
            if name.startswith("eval_") and name.endswith("loss")
        ),
    )
    shown = ["   ".join(part for part in row if part) for row in rows]
    return [row for row in shown if row] or ["no step has been logged yet"]


def _spark(lines: Sequence[dict[str, Any]], width: int) -> list[str]:
    losses = [line["loss"] for line in lines if math.isfinite(line.get("loss", math.nan))][
        -max(10, min(60, width - 40)) :
    ]
    if len(losses) < 2:
        return []
    low, high = min(losses), max(losses)
    sparks = SPARKS if "utf" in (sys.stdout.encoding or "utf-8").lower() else PLAIN_SPARKS
    marks = "".join(sparks[round((len(sparks) - 1) * (loss - low) / ((high - low) or 1))] for loss in losses)
    return [f"loss {marks}  {low:.3f} to {high:.3f}"]


def _checkpoint(status: Status, now: float) -> str:
    last = status.checkpoint
    if last is None:
        return "last checkpoint none"
    said = {True: "", False: ", not complete: it is being written, or was interrupted", None: ", not in this folder"}
    return (
        f"last checkpoint {last['checkpoint']} ({duration(max(0.0, now - last['time']))} ago"
        f"{said[last['is_complete']]})"
    )


def _ranks(status: Status) -> list[str]:
    """What ranks do alone, and which one is slow."""
    return table(status.ranks, status.latest.get("step_time", 0.0))


def _short(run: Run, folder: Path, now: float) -> str:
    status = status_of(run, folder, now)
    begin = datetime.fromtimestamp(run.begin.get("time", run.last)).strftime("%Y-%m-%d %H:%M")
    loss = f", loss {status.latest['loss']:.4f}" if "loss" in status.latest else ""
    why = f": {status.why}" if status.why else ""
    return f"  {begin}   steps {run.begin.get('step', 0):,} to {status.step:,}{loss}   {status.state}{why}"


def duration(seconds: float) -> str:
    """In words: 45 s, 12 min, 3 h 20 min, 5 d 2 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def count(number: Any) -> str:
    """1240000 as 1.24 M."""
    if not isinstance(number, int | float):
        return "?"
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def clean(text: str) -> str:
    """Without characters that would steer the terminal: the log may hold any text."""
    return "".join(character if character.isprintable() else "?" for character in text)

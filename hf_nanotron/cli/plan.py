"""`hf-nanotron plan`: what a run costs in its layout, or in the best one, before a GPU is rented."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from functools import partial
from pathlib import Path

from .errors import explained
from .plotting import check_picture

DESCRIPTION = """\
Say what a run costs before it has a GPU: memory of each rank by part, the time of a step and where it goes, and
whether the ranks would wait for each other forever. The real trainer runs as each kind of rank of the job, in processes
that hold no weights; times are arithmetic with measured rates.

  hf-nanotron plan run.yaml --gpus 64 --gpu h100
  hf-nanotron plan run.yaml --gpus 64 --gpu h100 --search --output best.yaml
  hf-nanotron plan --model meta-llama/Llama-3.1-8B --sequence-length 8192 --tokens-per-step 4194304 \\
      --gpus 64 --gpu h200 --search"""


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The parsed arguments get `run`, which takes them."""
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG.yaml", help="of hf-nanotron train")
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="override a key, as train does"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.svg", help="draw the step and the memory (pip install hf-nanotron[plot])"
    )
    parser.add_argument(
        "--no-run", action="store_true",
        help="do not run the trainer: memory by arithmetic, and ranks are not compared (seconds faster)",
    )  # fmt: skip
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the job, a process for each")
    machine.add_argument(
        "--gpu", metavar="NAME", help="kind of GPU, such as h100, h200 or b200 (default: that of --rates)"
    )
    machine.add_argument(
        "--nodes", type=int, metavar="N", help="nodes that have them (default: 8 GPUs a node, or all on one)"
    )
    machine.add_argument(
        "--rates", type=Path, metavar="FILE.json", help="rates that hf-nanotron bench --rates measured (default: ours)"
    )
    what = parser.add_argument_group("the run; values of the file where nothing is given")
    what.add_argument("--model", metavar="NAME", help="Hub id, folder or config.json, instead of a file")
    what.add_argument("--sequence-length", type=int, metavar="N", help="tokens of a row")
    what.add_argument(
        "--document-length", type=int, metavar="N", help="tokens of each document packed into a row (default: the row)"
    )
    what.add_argument("--tokens-per-step", type=int, metavar="N", help="of all GPUs together")
    what.add_argument("--tokens", type=float, metavar="N", help="of the run, such as 1e12 (default: max_steps steps)")
    searching = parser.add_argument_group("search")
    searching.add_argument(
        "--search", action="store_true", help="find the fastest layout that fits, with the same samples a step"
    )
    searching.add_argument("--output", type=Path, metavar="BEST.yaml", help="write the run in the best layout")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    _check(args)
    from ..monitor.gpus import find_gpu
    from ..plan.default_rates import default_rates, refuse_other_gpu
    from ..plan.make import make_plan, search_and_plan
    from ..plan.pictures import draw
    from ..plan.rates import load_rates
    from ..plan.table import as_text, ranking
    from ..trainer import NanotronTrainer
    from .planned_run import check_run, planned_run, write_run

    measured = None if args.rates is None else load_rates(args.rates)
    gpu = find_gpu(args.gpu if measured is None or args.gpu is not None else measured.gpu)
    rates = measured or default_rates(gpu)
    refuse_other_gpu(rates, gpu)
    run = planned_run(args, needs_layout=not args.search)
    check_run(run, args.search)
    planned = partial(
        make_plan, gpu=gpu, rates=rates, trainer_class=NanotronTrainer, run=not args.no_run, steps=run.steps,
        tokens=args.tokens,
    )  # fmt: skip
    if args.search:
        found, plan = search_and_plan(run.job, run.rows, gpu, rates, planned)
        record = {**plan.as_json(), "search": found.as_json()}
        text = f"{ranking(found)}\n\n{as_text(plan)}"
    else:
        plan = planned(run.job)
        record, text = plan.as_json(), as_text(plan)
    print(json.dumps(record, indent=1) if args.json else text, flush=True)
    # One JSON object is all that is on standard output.
    notes = sys.stderr if args.json else sys.stdout
    if args.output is not None:
        print(f"\n{write_run(args.output, run, plan)}.", file=notes)
    if args.picture is not None:
        with explained(f"--picture {args.picture} cannot be drawn"):
            draw(plan, args.picture)
        print(f"\n{args.picture} has the picture.", file=notes)


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be seen without torch."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("plan runs in one process, which plays all ranks; start it without torchrun.")
    if args.gpu is None and args.rates is None:
        raise ValueError("plan needs --gpu, such as --gpu h100, or --rates of one.")
    if (args.config is None) == (args.model is None):
        raise ValueError("plan needs either CONFIG.yaml or --model.")
    for name in ("gpus", "nodes", "sequence_length", "document_length", "tokens_per_step", "tokens"):
        value = getattr(args, name)
        if value is not None and not 1 <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1.")
    if args.picture is not None:
        check_picture("--picture", args.picture)
    if args.output is None:
        return
    if not args.search:
        raise ValueError(f"--output {args.output} needs --search: without it, the layout is that of the file.")
    if args.output.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--output {args.output} must end with .yaml or .yml.")
    if not args.output.absolute().parent.is_dir():
        raise ValueError(f"--output {args.output}: its folder does not exist.")
    if args.output.exists():
        raise ValueError(f"--output {args.output} exists; delete it, or give another name.")

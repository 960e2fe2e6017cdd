"""`hf-nanotron check`: does a run compute on many processes what it computes on one?"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checking.report import Check, Row, as_text, finite
from .errors import SettingsError, explained

if TYPE_CHECKING:
    from .checking.job import Job
    from .checking.processes import Ranks
    from .checking.records import Record
    from .checking.sizes import Layout

DESCRIPTION = """\
Train a small model like that of a run for a few steps, on CPU processes in the run's layout and on one process, and
compare: losses, gradient norms, what each module returns, gradients and weights. The first tensor that differs is
named, with the ranks on which it does.

The model is that of the YAML file with fewer layers, narrower, and a smaller vocabulary; family, ratio of heads,
experts, tied weights, packing, recomputation, schedule, optimizer and losses stay. Sizes of the layout above 4 become
smaller, until it fits into --most-processes. What a CPU cannot do is replaced, and said.

  hf-nanotron check run.yaml                        # the layout of the file against one process
  hf-nanotron check run.yaml --layouts              # and a set of layouts that meets every axis
  hf-nanotron check run.yaml --against transformers # stock model and Trainer instead of one process of ours
  hf-nanotron check run.yaml --script parts.py      # with your own model, loss, collator, optimizer or callbacks

The script has make_model(config), which returns a stock model, or trainer_arguments(model, args), which returns
keywords of NanotronTrainer, or both.

Exit status: 0 if all is the same, 1 if something differs or fails, 2 for what the trainer refuses."""

DATA = ("auto", "own", "random")


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """The parsed arguments get `run`, which takes them."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="of hf-nanotron train")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="of the run (default: the fewest with two data-parallel ranks)"
    )
    parser.add_argument(
        "--most-processes", type=int, default=8, metavar="N", help="to start here at once (default: %(default)s)"
    )
    parser.add_argument("--layouts", action="store_true", help="also check layouts of 2 to 4 processes for every axis")
    parser.add_argument(
        "--against", choices=("one-process", "transformers"), default="one-process", help="what to compare with"
    )
    parser.add_argument("--script", type=Path, metavar="FILE.py", help="your own parts of the run")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--sequence-length", type=int, default=32, metavar="N", help="tokens of a row (default: %(default)s)"
    )
    parser.add_argument(
        "--data",
        choices=DATA,
        default="auto",
        help="own: rows of the file's training data, whatever it takes to open them; random: random tokens; auto: own "
        "if they are local and tokenized",
    )
    parser.add_argument("--as-is", action="store_true", help="do not make the model smaller")
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="SECONDS", help="for each layout (default: %(default).0f)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="override a key, as train does"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    for name, least in (("steps", 1), ("sequence_length", 8), ("most_processes", 1), ("timeout", 1), ("processes", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value:g} must be at least {least}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"check starts its own processes, but this is one of WORLD_SIZE={os.environ['WORLD_SIZE']}: run it without "
            "torchrun."
        )
    from .checking.processes import ending_on_signals

    try:
        with ending_on_signals():
            found = check(args)
    except KeyboardInterrupt:
        print("hf-nanotron: check was interrupted; its processes have ended.", file=sys.stderr)
        sys.exit(130)
    print(json.dumps(finite(found.to_dict()), indent=1) if args.json else as_text(found))
    if found.is_same is False:
        sys.exit(1)


def check(args: argparse.Namespace) -> Check:
    """Run all layouts.

    Raises:
        ValueError: for what the trainer refuses of the run itself, or what cannot be checked.
    """
    from .checking.arguments import on_cpu, shortened
    from .checking.job import Job
    from .checking.processes import Ranks
    from .checking.refusals import RealRun, refuse
    from .checking.script import load_script
    from .checking.shrink import chosen_layers, described, smaller
    from .checking.sizes import Layout, Reduced, as_arguments, covering, least_processes, one_process, reduced
    from .checking.stock import refuse_ours
    from .settings import check_complete, read_settings
    from .train import load_tokenizer

    settings, tokenizer_name = read_settings(args.config, [f"--{key}={value}" for key, value in args.set])
    plan = check_complete(settings)
    if args.script is not None:
        load_script(args.script)
    if args.against == "transformers":
        refuse_ours(settings["training"])
    tokenizer = load_tokenizer(tokenizer_name)
    config, options, notes = _model(settings["model"], tokenizer)
    asked = settings["training"]
    training, replaced = on_cpu(asked, args.against == "transformers")
    notes += replaced
    notes += ["doremi is left out: its reference has the size of the real model"] if settings["doremi"] else []
    training.pop("output_dir", None)

    full = _parallel(asked)
    processes = args.processes or least_processes(full)
    with Ranks(args.timeout) as ranks:
        _speak(ranks, refuse, RealRun(asked, processes, config, options))
        mine = reduced(full, args.most_processes)
        if args.processes is not None and args.processes <= args.most_processes:
            mine = Layout(full, processes)
        layouts = [mine]
        text = config.get_text_config()
        if args.layouts:
            layouts += [layout for layout in covering(_has_experts(text)) if layout.name != mine.name]
        small = config
        layers = list(range(text.num_hidden_layers))
        if not args.as_is:
            sizes = Reduced.of(layouts, training.get("parametrization") == "spectral")
            layers = chosen_layers(text, sizes)
            small = smaller(config, full, sizes)
            notes.insert(0, f"the model has {described(small)} (the run's: {described(config)})")
        _without_dropout(small, notes)
        if mine.parallel != full or (args.processes is not None and mine.processes != processes):
            notes.append(f"the layout is {mine.name} (the run's: {Layout(full, processes).name})")
        if training.get("parametrization") == "spectral" and not args.as_is:
            training |= _half_base(small)
        rows_of_batch = min(2, training.get("per_device_train_batch_size") or 2)
        count = micro_batches(layouts, training.get("gradient_accumulation_steps") or 1)
        training = shortened(training, args.steps, rows_of_batch, count, layers)
        data = _rows(args, settings, plan, tokenizer, small, args.steps * count * rows_of_batch, notes)
        with tempfile.TemporaryDirectory(prefix="hf-nanotron-check-") as folder:
            place = Path(folder)
            job = Job(small, training, options, data, place, args.script)
            reference = one_process(full)
            found = Check(described(small), args.against.replace("-", " "), args.steps, notes)
            single = job.with_arguments(_made(place / "one"), **as_arguments(reference.parallel))
            _compare(ranks, single, layouts, count, args.against == "transformers", found)
    return found


def _compare(ranks: Ranks, single: Job, layouts: Sequence[Layout], count: int, stock: bool, found: Check) -> None:
    """Run the reference and each layout, and note what is found."""
    from dataclasses import replace

    from .checking.compare import compare
    from .checking.job import read_record, train_rank
    from .checking.processes import RankError
    from .checking.sizes import as_arguments
    from .checking.stock import train_stock

    place = single.folder.parent
    single = replace(single, weights=place / "weights" if stock else None)
    name = "one process"
    try:
        reference = read_record(ranks.run(1, train_rank, single)[0])
        if stock:
            name, ours = "transformers", reference
            stock_job = replace(single, folder=_made(place / "stock"))
            reference = read_record(ranks.run(1, train_stock, stock_job)[0])
            found.rows.append(Row("one process", 1, compared=compare([ours], reference)))
    except RankError as error:
        if error.is_refusal:
            raise SettingsError(str(error)) from None
        found.rows.append(Row(name, 1, failed=str(error)))
        return
    if reference.has_own_loss and not stock:
        found.rows.append(_other_micro_batches(ranks, single, reference))
    for index, layout in enumerate(layouts):
        if layout.processes == 1:
            continue
        row = Row(layout.name, layout.processes)
        arguments = as_arguments(layout.parallel) | {"gradient_accumulation_steps": count // layout.dp_size}
        job = replace(single.with_arguments(_made(place / str(index)), **arguments), weights=None)
        begun = time.monotonic()
        try:
            paths = ranks.run(layout.processes, train_rank, job)
        except RankError as error:
            if error.is_refusal and index > 0:
                row.refused = str(error)
            elif error.is_refusal:
                raise SettingsError(str(error)) from None
            else:
                row.failed = str(error)
        else:
            row.compared = compare([read_record(path) for path in paths], reference)
        row.seconds = time.monotonic() - begun
        found.rows.append(row)
    if not found.rows:
        found.notes.append("the run has one process, so there is nothing to compare; --layouts compares others with it")


def _other_micro_batches(ranks: Ranks, single: Job, reference: Record) -> Row:
    """One process with the same rows in other micro-batches: the losses of a loss that divides by its own batch differ.

    Layouts do not show it: their micro-batches are the same.
    """
    from .checking.compare import compare, without_outputs
    from .checking.job import read_record, train_rank
    from .checking.processes import RankError

    rows, count = (single.arguments[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    rows, count = (1, count * rows) if rows > 1 else (count, 1)
    sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": count}
    row = Row(f"one process, micro-batches of {rows}", 1)
    job = single.with_arguments(_made(single.folder.parent / "other"), **sizes)
    try:
        found = read_record(ranks.run(1, train_rank, job)[0])
    except RankError as error:
        row.failed = str(error)
    else:
        row.compared = compare([without_outputs(found)], without_outputs(reference))
    return row


def _speak(ranks: Ranks, function: Any, argument: Any) -> list[Any]:
    """Run in one process; what it raises is for the user."""
    from .checking.processes import RankError

    try:
        return ranks.run(1, function, argument)
    except RankError as error:
        raise SettingsError(str(error)) from None


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _model(section: dict[str, Any], tokenizer: Any) -> tuple[Any, dict[str, Any], list[str]]:
    """The config of the section `model`, options for its class, and what is said of them."""
    from transformers import AutoConfig

    from .errors import existing_model
    from .model_config import changed_config, make_config

    notes = []
    if (name := section.get("name_or_path")) is not None:
        name = existing_model("model.name_or_path", name)
        source = {"revision": section["revision"]} if "revision" in section else {}
        with explained(f"model.name_or_path={name!r} cannot be loaded"):
            config: Any = AutoConfig.from_pretrained(name, **source)
            if overrides := section.get("config_overrides"):
                config = changed_config(name, overrides, **source)
        notes.append(f"the weights of {name} are not read: the model has fresh ones")
    else:
        config = make_config(section["config"], tokenizer)
    options = {}
    attention = section.get("attn_implementation")
    if attention is not None:
        options["attn_implementation"] = attention if attention in ("eager", "sdpa") else "sdpa"
        if options["attn_implementation"] != attention:
            notes.append(f"model.attn_implementation: 'sdpa' instead of {attention!r}, because that needs a GPU")
    if section.get("dtype") not in (None, "float32", "auto"):
        notes.append(f"model.dtype: 'float32' instead of {section['dtype']!r}, whose rounding would hide differences")
    return config, options, notes


def _parallel(training: dict[str, Any]) -> Any:
    """The sizes of the run; those that the arguments refuse are refused by them."""
    from dataclasses import fields

    from ..arguments.values import plain_value
    from ..parallel.config import ParallelConfig

    names = [entry.name for entry in fields(ParallelConfig)]
    sizes = {name: plain_value(training[name], [int]) for name in names if training.get(name) is not None}
    layers = sizes.get("pp_layers_per_stage")
    if isinstance(layers, str):
        numbers = layers.strip("[]() ").replace(",", " ").split()
        sizes["pp_layers_per_stage"] = tuple(int(number) for number in numbers if number.isdecimal()) or None
    return ParallelConfig(**sizes)


def micro_batches(layouts: Sequence[Layout], accumulation: int) -> int:
    """Micro-batches of a step that every layout can deal, and that fill its pipeline.

    Args:
        accumulation: of the run: more than 1 stays more than 1 in its layout, which is the first.
    """
    least = [layout.dp_size * layout.parallel.pp_size for layout in layouts]
    least[0] = max(least[0], min(accumulation, 2) * layouts[0].dp_size)
    step = math.lcm(*(layout.dp_size for layout in layouts))
    return -(-max(least) // step) * step


def _has_experts(text: Any) -> bool:
    from .checking.shrink import NUMBER_OF_EXPERTS

    return any((getattr(text, name, None) or 0) > 1 for name in NUMBER_OF_EXPERTS)


def _without_dropout(config: Any, notes: list[str]) -> None:
    """Masks of dropout are drawn for the heads of a rank."""
    from ..parallel.dropout_streams import fields_of_chance

    text = config.get_text_config()
    for name, value in fields_of_chance(text).items():
        setattr(text, name, type(value)(0))
        notes.append(f"model.config.{name}: 0 instead of {value}, because chance would hide differences")


def _half_base(config: Any) -> dict[str, Any]:
    """A base model of half the width, for a parametrization."""
    return {"base_hidden_size": config.get_text_config().hidden_size // 2, "base_sizes": None}


def _rows(
    args: argparse.Namespace, settings: Any, plan: Any, tokenizer: Any, config: Any, count: int, notes: list[str]
) -> list[dict[str, list[int]]]:
    from .checking.rows import is_quick, own_rows, packs, random_rows

    vocabulary, length = config.get_text_config().vocab_size, args.sequence_length
    if args.data == "own" or (args.data == "auto" and is_quick(plan)):
        notes.append(f"rows: the first {count} of the training data, {length} tokens of each, ids modulo {vocabulary}")
        return own_rows(plan, tokenizer, count, length, vocabulary)
    packed = packs(settings["dataset"])
    notes.append(f"rows: {count} of {length} random tokens" + (" in three documents" if packed else ""))
    return random_rows(count, length, vocabulary, packed)

"""Write the tables of the documentation that are made from the code, between `<!-- table: NAME -->` and `<!-- end -->`.

python docs/settings/tables.py            # write them
python docs/settings/tables.py --check    # exit with 1 if a page is not up to date
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_nanotron import NanotronTrainingArguments
from hf_nanotron.cli.data_keys import MEANINGS, SETS
from hf_nanotron.cli.main import build_parser
from hf_nanotron.monitor.gpus import GPUS
from hf_nanotron.training import trainer_methods
from hf_nanotron.trl import arguments as sft_arguments

DOCS = Path(__file__).resolve().parent.parent
MARK = re.compile(r"(<!-- table: (\w+) -->)\n.*?(?<=\n)(<!-- end -->)", re.DOTALL)


def own_fields() -> list[dataclasses.Field[Any]]:
    """The fields of `NanotronTrainingArguments` that transformers does not have, or has with another default."""
    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    return [
        field
        for field in dataclasses.fields(NanotronTrainingArguments)
        if field.init and (field.name not in theirs or field.default is not theirs[field.name])
    ]


def arguments() -> str:
    """One row for each field: its key, its type, its default and its help text."""
    rows = [
        (f"`{field.name}`", _cell(f"`{_type(field)}`"), f"`{_yaml(field.default)}`", _cell(field.metadata["help"]))
        for field in own_fields()
    ]
    return _table(("key of `training`", "type", "default", "meaning"), rows)


def dataset() -> str:
    """One row for each key of a set: its type, and the kinds of sets that have it."""
    keys = {key: kind for types in SETS.values() for key, kind in types.items()}
    rows = []
    for key in keys:
        kinds = [kind for kind, types in SETS.items() if key in types]
        types = dict.fromkeys(_plain(SETS[kind][key]) for kind in kinds)
        rows.append((f"`{key}`", ", ".join(types), ", ".join(f"`{kind}`" for kind in kinds), _cell(MEANINGS[key])))
    return _table(("key", "type", "sets", "meaning"), rows)


def called() -> str:
    """The methods that are called as in Trainer."""
    rows = [(f"`{name}`", _cell(when)) for name, when in trainer_methods.CALLED.items()]
    return _table(("method", "when it is called"), rows)


def ours() -> str:
    """The methods that `NanotronTrainer` replaces."""
    rows = [(f"`{name}`", _cell(rule.does), _cell(rule.instead)) for name, rule in trainer_methods.OURS.items()]
    return _table(("method", "what ours does", "without `super()`, use instead"), rows)


def irrelevant() -> str:
    """The methods that no run calls."""
    rows = [(f"`{name}`", _cell(rule.reason), _cell(rule.instead)) for name, rule in trainer_methods.IRRELEVANT.items()]
    return _table(("method", "why it is not called", "use instead"), rows)


def commands() -> str:
    """A section for each command of `hf-nanotron`: what it does, and a table of its arguments."""
    return "\n\n".join(section for parser in _commands_of(build_parser()) for section in _command(parser))


def sft() -> str:
    """What each argument of TRL means here."""
    return _table(("argument of TRL", "here"), ((name, _cell(text)) for name, text in sft_arguments.rows()))


def accuracy() -> str:
    """What a plan predicts beside the steps that were measured."""
    return _benchmark("plan_accuracy")


def memory() -> str:
    """What a plan predicts beside the peaks that were measured."""
    return _benchmark("plan_memory")


def families_on_gpus() -> str:
    """Every family through the Trainer, as it was walked on a GPU."""
    walk = _script("tests", "family_walk")
    rows: str = walk.table(walk.read(walk.RECORD))
    return rows


def _script(folder: str, name: str) -> Any:
    """A script of the project, whose folder has others that it imports by short names."""
    path = str(DOCS.parent / folder)
    sys.path.insert(0, path)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(path)


def _benchmark(name: str) -> str:
    """The summary and table of a script of the benchmarks."""
    script = _script("examples/benchmarks", name)
    rows = script.predict()
    return f"{script.summary(rows)}\n\n{script.table(rows)}"


def gpus() -> str:
    """The GPUs that plans know."""
    rows = [
        (
            f"`{gpu.name}`",
            f"{gpu.bf16 / 1e12:,.0f}",
            "" if gpu.fp8 is None else f"{gpu.fp8 / 1e12:,.0f}",
            f"{gpu.bytes_ / 2**30:.1f}",
            f"{gpu.memory / 1e12:.2f}",
            f"{gpu.link / 1e9:.0f}",
            f"{gpu.network / 1e9:g}",
        )
        for gpu in GPUS
    ]
    return _table(("GPU", "bf16, TFLOP/s", "FP8", "memory, GiB", "TB/s", "link, GB/s", "network"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "arguments": arguments,
    "dataset": dataset,
    "called": called,
    "ours": ours,
    "irrelevant": irrelevant,
    "commands": commands,
    "sft": sft,
    "accuracy": accuracy,
    "memory": memory,
    "gpus": gpus,
    "families_on_gpus": families_on_gpus,
}


def renewed(page: str) -> str:
    """`page` with its tables made anew."""
    return MARK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", page)


def pages() -> list[Path]:
    """The pages that have such tables."""
    return [path for path in sorted(DOCS.rglob("*.md")) if MARK.search(path.read_text(encoding="utf-8"))]


def _commands_of(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of the commands below `parser`, each followed by those below it."""
    found = []
    for action in parser._actions:  # argparse has no public list
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found += [command, *_commands_of(command)]
    return found


def _command(parser: argparse.ArgumentParser) -> Iterable[str]:
    """Heading, description and arguments. Not argparse's own text, whose form depends on Python and the terminal."""
    yield f"## {parser.prog}"
    summary, _, rest = (parser.description or "").strip().partition("\n\n")
    yield " ".join(summary.split())
    if rest:
        yield f"```text\n{rest}\n```"
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if below:
        return
    rows = [_argument(action) for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    yield f"`{_usage(parser)}`"
    yield _table(("argument", "default", "meaning"), rows)


def _usage(parser: argparse.ArgumentParser) -> str:
    places = [_metavar(action) for action in parser._actions if not action.option_strings]
    options = [action for action in parser._actions if action.option_strings and action.required]
    needed = [f"{option.option_strings[-1]} {_metavar(option)}".strip() for option in options]
    for group in parser._mutually_exclusive_groups:
        if group.required:
            needed.append("(" + " | ".join(option.option_strings[-1] for option in group._group_actions) + ")")
    return " ".join([parser.prog, *places, *needed, "[options]"])


def _argument(action: argparse.Action) -> tuple[str, str, str]:
    name = _metavar(action) if not action.option_strings else f"{', '.join(action.option_strings)} {_metavar(action)}"
    default = action.default
    is_plain = isinstance(default, str | int | float) and not isinstance(default, bool)
    meaning = re.sub(r" \(default: %\(default\)[.\d]*\w\)", "", action.help or "")
    meaning = meaning.replace("%(default)s", str(default)).replace("%%", "%")
    return f"`{_cell(name.strip())}`", f"`{default}`" if is_plain else "", _cell(meaning)


def _metavar(action: argparse.Action) -> str:
    """What stands for the value, or for its parts; nothing for a switch."""
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, tuple):
        return " ".join(action.metavar)
    name = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper())
    if isinstance(action.nargs, int):
        return " ".join([name] * action.nargs)
    return {"+": f"{name} ...", "*": f"[{name} ...]", "?": f"[{name}]", argparse.REMAINDER: f"[{name} ...]"}.get(
        str(action.nargs), name
    )


def _type(field: dataclasses.Field[Any]) -> str:
    # As it is written: HfArgumentParser puts what it stands for into `field.type`.
    bodies = (vars(kind).get("__annotations__", {}) for kind in NanotronTrainingArguments.__mro__)
    written = next(body[field.name] for body in bodies if field.name in body)
    return written if isinstance(written, str) else getattr(written, "__name__", str(written))


def _plain(kind: Any) -> str:
    """What a key takes, in words."""
    names = {str: "text", int: "integer", float: "number", bool: "boolean", dict: "mapping", list: "list"}
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    return " or ".join(
        f"list of {names[typing.get_args(part)[0]]}s" if typing.get_args(part) else names[part] for part in parts
    )


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Write the tables, or say which pages are not up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = [path for path in pages() if renewed(path.read_text(encoding="utf-8")) != path.read_text(encoding="utf-8")]
    for path in stale:
        print(f"{path.relative_to(DOCS.parent)} {'is not up to date' if check else 'is written'}")
        if not check:
            path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()

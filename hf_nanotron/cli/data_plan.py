"""What the section `dataset` of a configuration asks for: sets, a mixture or stages of them, and evaluation sets.

Nothing is opened here. Whatever is wrong with the section itself is refused before a process group exists.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..arguments.values import plain_value, wrong_type
from ..data.tokens.mixture import ENDINGS
from ..data.tokens.token_dataset import HANDLING
from ..redaction import shown
from .hints import refuse_unknown

Types = Mapping[str, Any]
Section = dict[str, Any]

TEXT, MAPPING, NUMBER, SWITCH = str | None, dict | None, int | None, bool | None
PATHS = str | list[str] | None

# Keys of a set of token files: the arguments of `TokenDataset`.
TOKENS: dict[str, Any] = {
    "tokens": PATHS,
    "sequence_length": NUMBER,
    "documents": TEXT,
    "token_size": NUMBER,
    "dtype": TEXT,
    "eos_token_id": NUMBER,
    "seed": NUMBER,
    "shuffle": SWITCH,
    "loss_mask": SWITCH,
    "vocab_size": NUMBER,
    "order": TEXT,
    "samples": NUMBER,
    "skip_samples": NUMBER,
    "folder_weights": list[float] | None,
    "split": list[float] | None,
    "pack_window": NUMBER,
    "storage_options": MAPPING,
    "block_bytes": NUMBER,
    "cache_bytes": NUMBER,
}
# Keys of a set that `datasets` reads; all but the last three are arguments of `load_dataset`.
TABLE: dict[str, Any] = {
    "path": TEXT,
    "name": TEXT,
    "data_files": str | list | dict | None,
    "split": TEXT,
    "text_column": TEXT,
    "sequence_length": NUMBER,
    "documents": TEXT,
    "num_proc": NUMBER,
}
# Keys of a set of conversations: the arguments of `ChatDataset`.
CHAT: dict[str, Any] = {
    "chat": TEXT,
    "name": TEXT,
    "split": TEXT,
    "revision": TEXT,
    "format": TEXT,
    "kind": TEXT,
    "column": TEXT,
    "sequence_length": NUMBER,
    "train_on": TEXT,
    "too_long": TEXT,
    "append_eos": SWITCH,
    "add_special_tokens": SWITCH,
    "seed": NUMBER,
    "shuffle": SWITCH,
    "pack_window": NUMBER,
    "cache_dir": TEXT,
    "workers": NUMBER,
    "skip_unreadable": SWITCH,
    "storage_options": MAPPING,
}
# Keys of a stream: the arguments of `TokenStream`, and of the `load_dataset` whose result it reads.
STREAM: dict[str, Any] = {
    "stream": TEXT,
    "name": TEXT,
    "data_files": str | list | dict | None,
    "split": TEXT,
    "text_column": TEXT,
    "sequence_length": NUMBER,
    "documents": TEXT,
    "eos_token_id": NUMBER,
    "seed": NUMBER,
    "shuffle": SWITCH,
    "shuffle_buffer": NUMBER,
    "lanes": NUMBER,
    "epochs": NUMBER,
    "vocab_size": NUMBER,
}
SETS = {"tokens": TOKENS, "chat": CHAT, "path": TABLE}  # which may be parts of a mixture
ALONE = {**SETS, "stream": STREAM}
MEANINGS = {
    "tokens": "`.ds` files of datatrove, `.bin` with `.idx` of Megatron, `.npy`; folders, patterns, URLs",
    "path": "a folder of `save_to_disk`, a file (`.json`, `.jsonl`, `.parquet`, `.csv`), or a name for `load_dataset`",
    "stream": "a name for `load_dataset`, or a folder of files, read while it is trained on",
    "shuffle_buffer": "documents of a lane that are shuffled, or packed, together",
    "lanes": "parts of the stream that are read side by side; by the shards if not given",
    "epochs": "how often the stream is read; without end if not given",
    "chat": "files, a folder or a Hub dataset with `messages`, `conversations`, or `prompt` and `completion`",
    "sequence_length": "tokens of a sample",
    "documents": "`cross`: samples are cut wherever documents end; `mask`: and no attention crosses documents; `pack`: "
    "samples are packed of whole documents (files of tokens only)",
    "token_size": "bytes of an id in `.ds` files without `.metadata`",
    "dtype": "the same, as NumPy calls it",
    "eos_token_id": "last id of each document, where files do not say where documents end; the tokenizer's by default",
    "seed": "of the order",
    "shuffle": "false: in the order of the files",
    "loss_mask": "false: also predict tokens that `.loss` files leave out",
    "vocab_size": "ids must be smaller; the tokenizer's by default",
    "order": "`megatron` or `nanoset`: the samples of such a run, in its order",
    "samples": "of that run, in all",
    "skip_samples": "of that run, that it has trained on",
    "folder_weights": "of nanosets' folders",
    "split": "of `path` and `chat` its name (`train[:90%]`); of `order: megatron` two shares, `[0, 0.99]`",
    "pack_window": "documents that are packed together",
    "storage_options": "of fsspec, for URLs",
    "block_bytes": "of remote files, asked for at a time",
    "cache_bytes": "of remote files, kept by a process",
    "name": "configuration of a Hub dataset",
    "data_files": "of `load_dataset`",
    "text_column": "text to be tokenized; without it rows have `input_ids`",
    "num_proc": "processes that tokenize",
    "revision": "of a Hub dataset",
    "format": "of files whose names do not tell it",
    "kind": "`chat` or `prompt_completion`; by the columns if not given",
    "column": "of the conversations",
    "train_on": "`replies` of the assistant (or completions), or `all`",
    "too_long": "of conversations longer than a sample: `truncate`, `split` or `drop`",
    "append_eos": "end completions with the end-of-text token",
    "add_special_tokens": "of the tokenizer, for texts",
    "cache_dir": "where the tokens are kept",
    "workers": "processes that tokenize",
    "skip_unreadable": "leave out rows that cannot be read",
}
KIND_OF_SET = "tokens (files of token ids), chat (conversations) or path (a set of datasets)"
OWN = (  # never of several sets
    "tokens", "path", "chat", "name", "data_files", "split", "revision", "format", "kind", "column", "order", "samples",
    "skip_samples", "folder_weights",
)  # fmt: skip
SHARED = {key: kind for types in SETS.values() for key, kind in types.items() if key not in OWN}
OF_TRAINING = ("seed", "shuffle")  # of the order, which evaluation has its own of
MIXING = {"when_exhausted": TEXT, "max_epochs": NUMBER}
SCHEDULE = {"weights": MAPPING, "start_tokens": NUMBER, "start_samples": NUMBER}
MEMBER = {"weight": int | float | None, "max_epochs": NUMBER}
STAGE = {"start_tokens": NUMBER, "start_step": NUMBER, "global_batch_size": NUMBER}

# What the whole section may hold, by the key that says what the data are.
KINDS: dict[str, dict[str, Any]] = {
    "path": {**{key: kind for key, kind in TABLE.items() if key != "split"}, "train_split": TEXT, "eval_split": TEXT},
    "tokens": TOKENS,
    "chat": CHAT,
    "stream": STREAM,
    "mixture": {"mixture": MAPPING, "schedule": list | None, **MIXING, **SHARED},
    "stages": {"stages": list | None, **MIXING, **SHARED},
}
KEYS: dict[str, Any] = {}
for _kinds in KINDS.values():
    KEYS |= {key: kind | KEYS[key] if key in KEYS else kind for key, kind in _kinds.items()}
KEYS["eval"] = MAPPING

LEAST = {
    "sequence_length": 2,
    **dict.fromkeys(("samples", "vocab_size", "pack_window", "block_bytes", "cache_bytes", "num_proc"), 1),
    **dict.fromkeys(
        ("token_size", "max_epochs", "global_batch_size", "workers", "shuffle_buffer", "lanes", "epochs"), 1
    ),
    **dict.fromkeys(("skip_samples", "eos_token_id", "seed", "start_tokens", "start_step", "start_samples"), 0),
}
CHOICES = {
    "kind": ("chat", "prompt_completion"),
    "train_on": ("replies", "all"),
    "too_long": ("truncate", "split", "drop"),
    "documents": HANDLING,
    "order": ("megatron", "nanoset"),
    "when_exhausted": ENDINGS,
}
WHAT = (
    "tokens (files of token ids), chat (conversations), path (a set of datasets), mixture (several of them), stages "
    "(one after the other) or stream (a set that is read while it is trained on)"
)


@dataclass(frozen=True)
class SetPlan:
    """One set. `where` is the dotted key of the section that describes it, `kind` one of `ALONE`."""

    where: str
    kind: str
    options: dict[str, Any]


@dataclass(frozen=True)
class MixturePlan:
    """Sets by name, with their weights."""

    where: str
    sets: dict[str, SetPlan]
    weights: dict[str, float]
    max_epochs: dict[str, int | None]
    when_exhausted: Literal["stop", "redistribute"]
    schedule: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class StagePlan:
    """One stage and where it begins, in tokens or in steps of the run."""

    data: SetPlan | MixturePlan
    start_tokens: int | None
    start_step: int | None
    global_batch_size: int | None


@dataclass(frozen=True)
class DataPlan:
    """What to train on, what to evaluate on, and the seed of all orders (None: that of training)."""

    train: SetPlan | MixturePlan | list[StagePlan]
    evaluation: SetPlan | dict[str, SetPlan] | None
    seed: int | None

    @property
    def has_no_end(self) -> bool:
        """Whether the steps of the run must be given."""
        if isinstance(self.train, list):
            return True
        if isinstance(self.train, SetPlan):
            return self.train.kind == "stream" and "epochs" not in self.train.options
        endless = [self.train.max_epochs[name] is None for name, weight in self.train.weights.items() if weight]
        return any(endless) if self.train.when_exhausted == "redistribute" else all(endless)

    @property
    def brings_order(self) -> bool:
        """Whether rows come in the order of the data, and not in one of Trainer's."""
        return not isinstance(self.train, SetPlan) or self.train.kind != "path"


def plan_data(section: Section) -> DataPlan:
    """The plan of a section `dataset`.

    Raises:
        ValueError: for keys that do not go together, missing ones, values of a wrong type or out of range, weights that
            cannot be, stages that do not follow each other.
    """
    kind = _one_of(section, KINDS, "dataset", WHAT)
    _check(section, "dataset", KINDS[kind] | {"eval": MAPPING})
    shared = {key: value for key, value in section.items() if key in SHARED}
    train: SetPlan | MixturePlan | list[StagePlan]
    evaluation: SetPlan | dict[str, SetPlan] | None = None
    if kind == "mixture":
        train = _mixture("dataset", section, shared)
    elif kind == "stages":
        train = _stages(section["stages"], shared, {key: section[key] for key in MIXING if key in section})
    else:
        own = {key: value for key, value in section.items() if key not in ("train_split", "eval_split", "eval")}
        if kind == "path":
            own["split"] = section.get("train_split") or "train"
        train = _set("dataset", own, {})
        if section.get("eval_split") is not None:
            evaluation = _set("dataset", {**own, "split": section["eval_split"]}, {})
    if section.get("eval") is not None:
        if evaluation is not None:
            raise ValueError("dataset has both eval_split and eval; one of them says what to evaluate on.")
        evaluation = _evaluation(section["eval"], {k: v for k, v in shared.items() if k not in OF_TRAINING})
    if kind in ("mixture", "stages"):
        _refuse_idle(shared, [*sets_of(train), *sets_of(evaluation)])
    return DataPlan(train, evaluation, section.get("seed"))


def sets_of(plan: Any) -> Iterator[SetPlan]:
    """All sets of a plan, or of a part of one."""
    if isinstance(plan, SetPlan):
        yield plan
    elif isinstance(plan, StagePlan):
        yield from sets_of(plan.data)
    elif isinstance(plan, MixturePlan | dict | list):
        parts = plan.sets if isinstance(plan, MixturePlan) else plan
        for part in parts.values() if isinstance(parts, dict) else parts:
            yield from sets_of(part)


def check_types(where: str, section: Section, types: Types) -> list[str]:
    """Sentences about values of a wrong type; numbers that are spelled as text become numbers."""
    problems = []
    for key, value in section.items():
        section[key] = plain_value(value, [int] if types[key] == NUMBER else [])
        problems.append(wrong_type(f"{where}.{key}", section[key], types[key]))
    return [problem for problem in problems if problem is not None]


# ---- parts ----


def _evaluation(section: Section, shared: Section) -> SetPlan | dict[str, SetPlan]:
    if any(kind in section for kind in SETS):
        return _set("dataset.eval", section, shared)
    if not section:
        raise ValueError(f"dataset.eval is empty: it needs {' or '.join(SETS)}, or sets by name that have them.")
    return {
        name: _set(f"dataset.eval.{name}", _mapping(f"dataset.eval.{name}", part), shared)
        for name, part in _named("dataset.eval", section)
    }


def _mixture(where: str, section: Section, shared: Section) -> MixturePlan:
    parts = section["mixture"]
    if not isinstance(parts, dict) or not parts:
        raise ValueError(f"{where}.mixture={shown('mixture', parts)} must name its sets: NAME: {{tokens, weight}}.")
    sets, weights, epochs = {}, {}, {}
    for name, part in _named(f"{where}.mixture", parts):
        here = f"{where}.mixture.{name}"
        sets[name] = _set(here, _mapping(here, part), shared, MEMBER)
        if part.get("weight") is None:
            raise ValueError(f"{here} has no weight: its share of the rows, such as 0.2 (weights need not sum to 1).")
        weights[name] = float(part["weight"])
        if not _is_weight(weights[name]):
            raise ValueError(f"{here}.weight={part['weight']!r} must be finite and not negative.")
        epochs[name] = part["max_epochs"] if "max_epochs" in part else section.get("max_epochs", 1)
    if not sum(weights.values()):
        raise ValueError(f"the weights of {where}.mixture are all 0; one of them must be positive.")
    schedule = _schedule(where, section.get("schedule") or [], tuple(sets))
    ending: Any = section.get("when_exhausted") or ENDINGS[0]
    return MixturePlan(where, sets, weights, epochs, ending, schedule)


def _schedule(where: str, parts: list[Any], names: tuple[str, ...]) -> tuple[dict[str, Any], ...]:
    """Weights that hold from a later sample on."""
    found, before = [], dict.fromkeys(SCHEDULE, 0)
    for number, part in enumerate(parts):
        here = f"{where}.schedule[{number}]"
        part = _mapping(here, part)
        _check(part, here, SCHEDULE)
        starts = [key for key in ("start_tokens", "start_samples") if part.get(key) is not None]
        if len(starts) != 1:
            raise ValueError(f"{here} needs start_tokens or start_samples: from where on its weights hold.")
        if part[starts[0]] <= before[starts[0]]:
            raise ValueError(
                f"{here}.{starts[0]}={part[starts[0]]} must be above {before[starts[0]]}, where the weights before it "
                "begin to hold."
            )
        before[starts[0]] = part[starts[0]]
        weights = part.get("weights") or {}
        refuse_unknown(f"{here}.weights.", weights, names)
        if missing := [name for name in names if weights.get(name) is None]:
            raise ValueError(f"{here}.weights has none of {missing[0]!r}; it needs those of {', '.join(names)}.")
        wrong = [name for name in names if wrong_type("", weights[name], float) or not _is_weight(weights[name])]
        if wrong:
            raise ValueError(
                f"{here}.weights.{wrong[0]}={weights[wrong[0]]!r} must be a number, finite and not negative."
            )
        if not sum(weights.values()):
            raise ValueError(f"the weights of {here} are all 0; one of them must be positive.")
        found.append({"weights": {name: float(weights[name]) for name in names}, starts[0]: part[starts[0]]})
    return tuple(found)


def _is_weight(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _stages(parts: Any, shared: Section, mixing: Section) -> list[StagePlan]:
    if not parts:
        raise ValueError("dataset.stages is empty: each stage needs start_tokens or start_step, and tokens or mixture.")
    stages: list[StagePlan] = []
    for number, part in enumerate(parts):
        where = f"dataset.stages[{number}]"
        part = _mapping(where, part)
        kind = _one_of(part, (*SETS, "mixture"), where, "tokens, chat, path or mixture")
        if kind == "mixture":
            _check(part, where, {"mixture": MAPPING, **MIXING, **SHARED, **STAGE})
            own = {key: value for key, value in part.items() if key in SHARED}
            data: SetPlan | MixturePlan = _mixture(where, mixing | part, shared | own)
        else:
            data = _set(where, part, shared, STAGE)
        start = {key: part.get(key) for key in ("start_tokens", "start_step")}
        if all(value is not None for value in start.values()):
            raise ValueError(f"{where} has both start_tokens and start_step; one of them says where it begins.")
        if all(value is None for value in start.values()):
            if number:
                raise ValueError(f"{where} needs start_tokens or start_step: where it begins.")
            start["start_step"] = 0
        stages.append(StagePlan(data, **start, global_batch_size=part.get("global_batch_size")))
        _check_start(where, stages)
    return stages


def _check_start(where: str, stages: list[StagePlan]) -> None:
    """Of the last of these stages."""
    *before, last = stages
    for key in ("start_tokens", "start_step"):
        start = getattr(last, key)
        if start is None:
            continue
        if not before and start:
            raise ValueError(f"{where}.{key}={start} must be 0: a run begins with its first stage.")
        known = [getattr(stage, key) for stage in before if getattr(stage, key) is not None]
        if before and start <= max([0, *known]):
            raise ValueError(
                f"{where}.{key}={start} must be above {max([0, *known])}, where the stage before begins: stages are "
                "listed in the order of the run."
            )


def _set(where: str, section: Section, shared: Section, extra: Types | None = None) -> SetPlan:
    """A set, with the values that it shares with others. `extra` are keys that are not of the set itself."""
    kind = _one_of(section, ALONE if where == "dataset" else SETS, where, KIND_OF_SET)
    _check(section, where, ALONE[kind] | dict(extra or {}))
    options = {key: value for key, value in shared.items() if key in ALONE[kind]}
    options |= {key: value for key, value in section.items() if key in ALONE[kind]}
    options = {key: value for key, value in options.items() if value is not None}
    if kind == "path" and "text_column" not in options:
        for key in ("sequence_length", "documents", "num_proc"):
            if section.get(key) is not None:
                raise ValueError(f"{where}.{key} needs {where}.text_column: rows of input_ids are used as they are.")
        options = {key: value for key, value in options.items() if key in OWN}
    elif "sequence_length" not in options:
        raise ValueError(f"{where}.{kind} needs dataset.sequence_length: the tokens of a sample.")
    if kind == "path" and options.get("documents") == "pack":
        raise ValueError(
            f"{where}: documents='pack' is for files of token ids; use 'mask' or 'cross' for text, or make files of it "
            "with hf-nanotron tokenize."
        )
    if "order" in options and "seed" not in options:
        raise ValueError(f"{where}.order={options['order']!r} needs seed: that of the run whose samples are read.")
    for key in ("samples", "skip_samples", "folder_weights"):
        if key in options and "order" not in options:
            raise ValueError(f"{where}.{key} belongs to order, which is not given: 'megatron' or 'nanoset'.")
    if not options[kind]:
        raise ValueError(f"{where}.{kind} is empty: name files, or folders of them.")
    return SetPlan(where, kind, options)


# ---- keys and values ----


def _one_of(section: Section, kinds: Collection[str], where: str, what: str) -> str:
    found = [kind for kind in kinds if section.get(kind) is not None]
    if not found:
        raise ValueError(f"{where} needs one of {what}.")
    if len(found) > 1:
        raise ValueError(f"{where} has {' and '.join(found)}; give one of them.")
    return found[0]


def _check(section: Section, where: str, types: Types) -> None:
    """Keys, types and ranges."""
    foreign = [key for key in section if key not in types]
    if where == "dataset" and foreign and foreign[0] in KEYS:
        users = [f"dataset.{kind}" for kind, keys in KINDS.items() if foreign[0] in keys]
        given = next(kind for kind in KINDS if section.get(kind) is not None)
        instead = " Its split is train_split." if (foreign[0], given) == ("split", "path") else ""
        raise ValueError(f"dataset.{foreign[0]} goes with {' or '.join(users)}, not with dataset.{given}.{instead}")
    refuse_unknown(f"{where}.", foreign, list(types), {"dataset": KEYS})
    problems = check_types(where, section, types)
    if not problems:
        problems = [
            problem for key, value in section.items() if (problem := _out_of_range(f"{where}.{key}", key, value))
        ]
    if problems:
        raise ValueError("\n".join(problems))


def _out_of_range(name: str, key: str, value: Any) -> str | None:
    if value is None:
        return None
    if key in LEAST and value < LEAST[key]:
        return f"{name}={value!r} must be at least {LEAST[key]}."
    if key in CHOICES and value not in CHOICES[key]:
        return f"{name}={value!r} is not one of {', '.join(map(repr, CHOICES[key]))}."
    if key == "split" and isinstance(value, list) and not (len(value) == 2 and 0 <= value[0] < value[1] <= 1):
        return f"{name}={value!r} must be two shares that ascend, such as [0, 0.99]."
    return None


def _named(where: str, section: Section) -> Iterator[tuple[str, Any]]:
    for name, part in section.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where}: the name {name!r} of a set must be text (in YAML: '{name}', in quotes).")
        yield name, part


def _mapping(where: str, part: Any) -> Section:
    if not isinstance(part, dict):
        raise ValueError(f"{where}: {shown(where, part)} must be a mapping with keys such as tokens.")
    return part


def _refuse_idle(shared: Section, sets: list[SetPlan]) -> None:
    """Refuse a value for all sets that none of them takes."""
    for key, value in shared.items():
        if value is not None and not any(key in SETS[plan.kind] for plan in sets):
            users = " or ".join(kind for kind, types in SETS.items() if key in types)
            raise ValueError(f"dataset.{key} is used by no set: only sets with {users} take it.")

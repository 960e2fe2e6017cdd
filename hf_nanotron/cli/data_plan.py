"""What the section `dataset` of a configuration asks for: sets, mixtures, stages, and evaluation sets.

Nothing is opened here. Whatever is wrong with the section itself is refused before a process group exists.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..arguments.values import wrong_type
from ..data.tokens.mixture import ENDINGS
from ..redaction import shown
from .data_keys import (
    KINDS,
    MAPPING,
    MEMBER,
    MIXING,
    OF_TRAINING,
    OWN,
    SCHEDULE,
    SETS,
    SHARED,
    STAGE,
    WITH_LENGTH,
    Section,
    Types,
    check_keys,
)  # fmt: skip
from .hints import refuse_unknown

KIND_OF_SET = "tokens (files of token ids), chat (conversations), path (a set of datasets) or stream"
WHAT = (
    "tokens (files of token ids), chat (conversations), path (a set of datasets), mixture (several of them), stages "
    "(one after the other) or stream (a set that is read while it is trained on)"
)


@dataclass(frozen=True)
class SetPlan:
    """One set. `where` is the dotted key of the section that describes it, `kind` one of `SETS`."""

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

    @property
    def is_stream(self) -> bool:
        """Whether its sets are streams: all are, or none is."""
        return any(part.kind == "stream" for part in self.sets.values())


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
        if self.train.is_stream:
            return True
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
    check_keys(section, "dataset", KINDS[kind] | {"eval": MAPPING})
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


# ---- parts ----


def _evaluation(section: Section, shared: Section) -> SetPlan | dict[str, SetPlan]:
    if any(kind in section for kind in SETS):
        return _set("dataset.eval", section, shared, kinds=WITH_LENGTH)
    if not section:
        raise ValueError(f"dataset.eval is empty: it needs {' or '.join(WITH_LENGTH)}, or sets by name that have them.")
    return {
        name: _set(f"dataset.eval.{name}", _mapping(f"dataset.eval.{name}", part), shared, kinds=WITH_LENGTH)
        for name, part in _named("dataset.eval", section)
    }


def _mixture(where: str, section: Section, shared: Section, kinds: Collection[str] = tuple(SETS)) -> MixturePlan:
    parts = section["mixture"]
    if not isinstance(parts, dict) or not parts:
        raise ValueError(f"{where}.mixture={shown('mixture', parts)} must name its sets: NAME: {{tokens, weight}}.")
    sets, weights, epochs = {}, {}, {}
    for name, part in _named(f"{where}.mixture", parts):
        here = f"{where}.mixture.{name}"
        sets[name] = _set(here, _mapping(here, part), shared, MEMBER, kinds)
        if part.get("weight") is None:
            raise ValueError(f"{here} has no weight: its share of the rows, such as 0.2 (weights need not sum to 1).")
        weights[name] = float(part["weight"])
        if not _is_weight(weights[name]):
            raise ValueError(f"{here}.weight={part['weight']!r} must be finite and not negative.")
        epochs[name] = part["max_epochs"] if "max_epochs" in part else section.get("max_epochs", 1)
    if not sum(weights.values()):
        raise ValueError(f"the weights of {where}.mixture are all 0; one of them must be positive.")
    _check_streams(where, section, sets)
    schedule = _schedule(where, section.get("schedule") or [], tuple(sets))
    ending: Any = section.get("when_exhausted") or ENDINGS[0]
    return MixturePlan(where, sets, weights, epochs, ending, schedule)


def _check_streams(where: str, section: Section, sets: Mapping[str, SetPlan]) -> None:
    """Refuse streams beside sets that have a length, and what streams, which have no end, do not have."""
    streams = [name for name, plan in sets.items() if plan.kind == "stream"]
    if not streams:
        return
    if others := [name for name in sets if name not in streams]:
        raise ValueError(
            f"{where}.mixture mixes the stream {streams[0]!r} with {others[0]!r}, which has a length: make all of them "
            "streams, or none."
        )
    for key in ("max_epochs", "when_exhausted", "schedule"):
        given = [f"{where}.mixture.{name}" for name in streams if key in section["mixture"][name]]
        if key in section or given:
            raise ValueError(f"{(given or [where])[0]}.{key} does not go with streams, which have no end.")
    for name in streams:
        if "epochs" in sets[name].options:
            raise ValueError(f"{where}.mixture.{name}.epochs: a stream of a mixture has no end; leave epochs out.")


def _schedule(where: str, parts: list[Any], names: tuple[str, ...]) -> tuple[dict[str, Any], ...]:
    """Weights that hold from a later sample on."""
    found, before = [], dict.fromkeys(SCHEDULE, 0)
    for number, part in enumerate(parts):
        here = f"{where}.schedule[{number}]"
        part = _mapping(here, part)
        check_keys(part, here, SCHEDULE)
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
            check_keys(part, where, {"mixture": MAPPING, **MIXING, **SHARED, **STAGE})
            own = {key: value for key, value in part.items() if key in SHARED}
            data: SetPlan | MixturePlan = _mixture(where, mixing | part, shared | own, WITH_LENGTH)
        else:
            data = _set(where, part, shared, STAGE, WITH_LENGTH)
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


def _set(
    where: str,
    section: Section,
    shared: Section,
    extra: Types | None = None,
    kinds: Collection[str] = tuple(SETS),
) -> SetPlan:
    """A set, with the values that it shares with others. `extra` are keys that are not of the set itself."""
    if section.get("stream") is not None and "stream" not in kinds:
        raise ValueError(f"{where}.stream: streams are trained on alone or in a mixture of streams, without stages.")
    kind = _one_of(section, kinds, where, KIND_OF_SET)
    check_keys(section, where, SETS[kind] | dict(extra or {}))
    options = {key: value for key, value in shared.items() if key in SETS[kind]}
    options |= {key: value for key, value in section.items() if key in SETS[kind]}
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
    if not options[kind] or (isinstance(options[kind], list) and not all(options[kind])):
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

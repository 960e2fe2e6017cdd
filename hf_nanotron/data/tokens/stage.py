"""A stage of a run: from where on which data is read, and what may follow what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..hashing import of_the_model, sample_hash
from ..identity import order_facts
from ..ordered import gives_arrays, has_method
from .mixture import Mixture, set_identity


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        data: a `Mixture`, or a map-style dataset, which is read again and again. The length of its rows is that of the
            stage.
        start_tokens: begins with the first step before which so many tokens were read in the run.
        start_step: begins behind so many steps. The first stage has neither, or 0; others one of both.
        global_batch_size: samples of a step over all ranks; that of the training arguments if None.
    """

    data: Any
    start_tokens: int | None = None
    start_step: int | None = None
    global_batch_size: int | None = None


def start_of(stage: Stage) -> str:
    """Where it begins, in the words of its arguments."""
    return f"start_step={stage.start_step}" if stage.start_step is not None else f"start_tokens={stage.start_tokens}"


def check_numbers(number: int, stage: Stage) -> None:
    """Refuse a stage whose numbers cannot be, or that says its beginning twice, or not at all."""
    for name, least in (("start_tokens", 0), ("start_step", 0), ("global_batch_size", 1)):
        value = getattr(stage, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"stage {number}: {name}={value!r} must be a whole number, at least {least}.")
    given = [name for name in ("start_tokens", "start_step") if getattr(stage, name) is not None]
    if number and len(given) != 1:
        raise ValueError(
            f"stage {number} needs one of start_tokens and start_step, and has {' and '.join(given) or 'none'}."
        )
    if not number and (stage.start_tokens or stage.start_step):
        raise ValueError(f"stage 0 begins at {start_of(stage)}: the first stage begins at 0, or says nothing.")


def check_starts(stages: Sequence[Stage], mixtures: Sequence[Mixture]) -> None:
    """Refuse stages that do not begin one after the other."""
    for name in ("start_tokens", "start_step"):
        begun = [(n, start) for n, stage in enumerate(stages) if (start := getattr(stage, name)) is not None]
        for (_, before), (number, start) in zip(begun, begun[1:], strict=False):
            if start <= before:
                raise ValueError(
                    f"stage {number} begins at {name}={start}, and one before it at {before}: list them in order."
                )
    for number, stage in enumerate(stages[1:], 1):
        unknown = [n for n in range(number) if mixtures[n].sequence_length is None]
        if stage.start_tokens is not None and unknown:
            raise ValueError(
                f"stage {number} begins at start_tokens={stage.start_tokens}, but the data of stage {unknown[0]} does "
                "not say how many tokens a row has (sequence_length); use start_step."
            )


def check_goes_on(name: str, number: int, before: Mixture, now: Mixture) -> None:
    """Whether a set of a stage can go on where that of an earlier one has ended."""
    old, new = before.datasets[name], now.datasets[name]
    other = f"give the set {name!r} of stage {number} another name in a Mixture, if it is to be read from its beginning"
    if old is not new:
        ours, theirs = (order_facts(set_identity(each)) | _some_rows(each) for each in (new, old))
        differ = [key for key in ours if ours[key] != theirs.get(key)]
        if type(old) is not type(new) or differ:
            what = differ[0] if differ else "type"
            raise ValueError(f"the sets {name!r} of stage {number} and of the one before differ in {what}: {other}.")
    if not gives_arrays(old) and before.seed != now.seed:
        raise ValueError(
            f"the mixture of stage {number} shuffles the set {name!r} by another seed: use seed={before.seed}."
        )
    lengths = before.sequence_length, now.sequence_length
    if lengths[0] != lengths[1] and not (getattr(old, "counts_tokens", False) and getattr(new, "counts_tokens", False)):
        raise ValueError(
            f"the set {name!r} has rows of {lengths[1]} tokens in stage {number}, and of {lengths[0]} before: shuffled "
            "or packed rows of one length do not say which tokens are left for rows of another. Read it in the order "
            "of its files (shuffle=False and documents='cross' or 'mask'; shuffle the documents when you tokenize), or "
            f"{other}."
        )


def _some_rows(dataset: Any) -> dict[str, Any]:
    """Hashes of rows of a set that does not say what it is made of: two of one length need not be the same."""
    if has_method(dataset, "identity"):
        return {}
    places = sorted({0, len(dataset) // 2, len(dataset) - 1})
    return {f"row {place}": sample_hash(of_the_model(dataset[place])) for place in places}


def definition(number: int, stage: Stage, mixture: Mixture) -> dict[str, Any]:
    """What must stay as it is once a stage was trained on."""
    return {
        "start_tokens": stage.start_tokens if number else None,
        "start_step": stage.start_step if number else None,
        "global_batch_size": stage.global_batch_size,
        "sequence_length": mixture.sequence_length,
        "weights": dict(zip(mixture.names, mixture.parts[0].weights, strict=True)),
        "max_epochs": dict(zip(mixture.names, mixture.max_epochs, strict=True)),
        "when_exhausted": mixture.when_exhausted,
    }


def check_trained(trained: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> None:
    """Refuse stages of which one that was trained on has another `definition` now."""
    for number, before in enumerate(trained):
        if number >= len(now):
            raise ValueError(
                f"stage {number} has been trained on, and there are {len(now)} stages now: keep those that have begun, "
                "and change the ones that follow."
            )
        changed = [name for name, value in now[number].items() if value != before.get(name)]
        if changed:
            name = changed[0]
            raise ValueError(
                f"stage {number} has been trained on with {name}={before.get(name)!r}, and has {now[number][name]!r} "
                "now: leave it as it was, and add a stage that begins at the step from which the change is to hold."
            )

"""A stage that is read: its mixture where it goes on, and what the next stage goes on from."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .mixture import Mixture
from .stage_plan import Point


class Opening(NamedTuple):
    """What a stage goes on from.

    Attributes:
        samples: of the run before it.
        state: of the mixture before it.
        lengths: of the rows that a set was last read in.
        firsts: the epoch, file and token from which a set's rows of this length were cut.
        sets: as they were last read.
        read_before: rows, tokens and epochs of each set.
        is_estimated: counts are not exact.
    """

    samples: int = 0
    state: dict[str, Any] = {}  # noqa: RUF012
    lengths: dict[str, int | None] = {}  # noqa: RUF012
    firsts: dict[str, tuple[int, int, int]] = {}  # noqa: RUF012
    sets: dict[str, Any] = {}  # noqa: RUF012
    read_before: dict[str, tuple[int, int, float]] = {}  # noqa: RUF012
    is_estimated: bool = False


class Opened(NamedTuple):
    """A stage that can be read: `base` is the number of its first sample in its mixture."""

    number: int
    opening: Opening
    mixture: Mixture
    base: int

    @property
    def is_estimated(self) -> bool:
        return self.opening.is_estimated

    def read(self, samples: int, names: Sequence[str], state: dict[str, Any] | None = None) -> dict[str, Any]:
        """Rows, tokens and epochs of each set among the first `samples` of the run."""
        before, found = self.opening.state.get("counts", {}), {}
        counts = state["counts"] if state else self.mixture.counts(self.base + samples - self.opening.samples)
        length = self.mixture.sequence_length or 0
        lengths = dict(zip(self.mixture.names, self.mixture.lengths, strict=True))
        for name in names:
            rows, tokens, epochs = self.opening.read_before.get(name, (0, 0, 0.0))
            new = counts[name] - before.get(name, 0) if name in lengths else 0
            found[name] = (rows + new, tokens + new * length, epochs + (new / lengths[name] if new else 0.0))
        return found

    def behind(self, samples: int, estimates: bool = False) -> Opening:
        """What the next stage goes on from, behind so many samples of the run."""
        mixture, place = self.mixture, self.base + samples - self.opening.samples
        state = _estimated(mixture, self.base, place) if estimates else mixture.state_dict(place)
        names = (*self.opening.read_before, *mixture.names)
        return Opening(
            samples,
            state,
            self.opening.lengths | dict.fromkeys(mixture.names, mixture.sequence_length),
            self.opening.firsts,
            self.opening.sets | mixture.datasets,
            self.read(samples, tuple(dict.fromkeys(names)), state),
            estimates,
        )


def begin_stage(number: int, mixture: Mixture, opening: Opening) -> Opened:
    """A stage from its first sample on. A set whose rows have another length now goes on with its next token."""
    mixture = copy.copy(mixture)
    mixture.datasets, firsts, moved = dict(mixture.datasets), dict(opening.firsts), {}
    length = mixture.sequence_length
    for name, dataset in mixture.datasets.items():
        known = opening.lengths.get(name, length)
        if known != length:
            before = opening.sets[name].token_after(opening.state["counts"].get(name, 0))
            mixture.datasets[name], moved[name] = dataset.from_token(*before)
            firsts[name] = before
        elif name in firsts:
            mixture.datasets[name], _ = dataset.from_token(*firsts[name])
    state = opening.state
    if moved:
        counts = {**state["counts"], **moved}
        state = {"counts": counts, "anchor": counts, "mixing": None}
    if state:
        mixture.load_state_dict(state)
    return Opened(number, opening._replace(firsts=firsts, state=state), mixture, mixture.begin)


def resume_stage(
    point: Point, saved: Mapping[str, Any], mixtures: Sequence[Mixture], state: Mapping[str, Any]
) -> Opened:
    """The stage of a saved point.

    Args:
        saved: what is kept of its opening.
        mixtures: of the stages.
        state: of its mixture.
    """
    mixture = copy.copy(mixtures[point.stage])
    firsts = {name: tuple(first) for name, first in saved["firsts"].items()}
    mixture.datasets = _from_firsts(mixture, firsts)
    mixture.load_state_dict(state)
    read = {name: tuple(values) for name, values in saved["read"].items()}
    earlier: dict[str, Any] = {}
    for other in mixtures[: point.stage]:
        earlier |= _from_firsts(other, firsts)
    opening = Opening(point.begin, {"counts": dict(saved["counts"])}, dict(saved["lengths"]), firsts, earlier, read)
    return Opened(point.stage, opening, mixture, mixture.begin - (point.samples - point.begin))


def _from_firsts(mixture: Mixture, firsts: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Its sets, those of `firsts` from that token on."""
    sets = mixture.datasets.items()
    return {name: dataset.from_token(*firsts[name])[0] if name in firsts else dataset for name, dataset in sets}


def _estimated(mixture: Mixture, first: int, place: int) -> dict[str, Any]:
    """The state at a place, with counts that follow the weights from the first sample on."""
    state, weights = mixture.state_dict(first), mixture.parts[0].weights
    counts = dict(state["counts"])
    for name, weight, length, epochs in zip(mixture.names, weights, mixture.lengths, mixture.max_epochs, strict=True):
        reached = counts[name] + round((place - first) * weight / sum(weights))
        counts[name] = reached if epochs is None else min(reached, max(epochs * length, counts[name]))
    return {"counts": counts, "anchor": counts, "mixing": None}

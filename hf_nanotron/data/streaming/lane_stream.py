"""A stream dealt from lanes in turn: which sample is which row of which lane, and where all lanes are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from .lane_rows import LaneRows, Row

State = dict[str, Any]


class LaneStream(IterableDataset[dict[str, torch.Tensor]]):
    """Sample i is row `i // lanes` of lane `i % lanes`; a lane that has ended is passed over.

    A stream without end (`epochs` is None) can be read in part: which lane a sample comes from is known without the
    others. So `samples` reads only the lanes of the samples that are asked for.

    Attributes:
        lanes: how many. The order depends on it, and on nothing that a topology is.
        epochs: after which a lane ends; None for never.
        epoch: in which the lanes begin (`set_epoch`).
    """

    lanes: int
    epochs: int | None
    epoch: int = 0
    _begin: State | None = None
    _at: dict[str, State]

    # ---- of a kind of stream ----

    @abstractmethod
    def open_lane(self, lane: int, state: Mapping[str, Any]) -> LaneRows:
        """A lane behind a state, or from its beginning if that is empty."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the rows and their order depend on, in JSON types; compared when a run is resumed."""

    @abstractmethod
    def first_documents(self) -> Iterator[Any]:
        """Some, cheap to read, by which ranks learn that they read the same stream."""

    def common_state(self) -> State:
        """What a state holds besides that of the lanes."""
        return {}

    def begin_at(self, state: Mapping[str, Any] | None, given: int) -> None:
        """Take up the common part of a state behind `given` samples; None for the beginning."""

    # ---- reading ----

    def set_epoch(self, epoch: int) -> None:
        """Lanes begin in this epoch from the next iteration on."""
        self.epoch = epoch

    def samples(
        self, given: int, state: Mapping[str, Any] | None, first: int, step: int
    ) -> Iterator[tuple[int, Row, State]]:
        """Every `step`-th sample of a stream without end: its lane, the row, the state of the lane behind it.

        Only the lanes of these samples are opened.

        Args:
            given: samples before.
            state: behind them; None if there are none.
            first: of the samples that follow.

        Raises:
            ValueError: for a state behind other samples, or without one of these lanes.
        """
        if self.epochs is not None:
            raise ValueError("a stream with an end is read whole: where a lane ends is not known without reading it.")
        if given:
            self.check_state(state)
        self.begin_at(state if given else None, given)
        opened: dict[int, LaneRows] = {}
        for sample in count(given + first, step):
            lane, row = sample % self.lanes, sample // self.lanes
            if lane not in opened:
                opened[lane] = self._opened(lane, state if given else None)
                before = max(-((lane - given) // self.lanes), 0)
                if opened[lane].rows != before:
                    raise ValueError(
                        f"the state of the stream is behind {opened[lane].rows} rows of lane {lane}, and {given} "
                        f"samples of {self.lanes} lanes have {before}; use another checkpoint."
                    )
            rows = opened[lane]
            while rows.rows < row:  # of another reader's samples
                rows.next_row()
            found = rows.next_row()
            assert found is not None
            yield lane, found, rows.state()

    def _opened(self, lane: int, state: Mapping[str, Any] | None) -> LaneRows:
        return self.open_lane(lane, {} if state is None else state["lanes"].get(str(lane), {}))

    def _all(self, state: Mapping[str, Any] | None) -> Iterator[tuple[int, Row, State]]:
        """All samples in their order: lane, row, state of the lane."""
        self.begin_at(state, 0 if state is None else sum(lane["rows"] for lane in state["lanes"].values()))
        opened = {lane: self._opened(lane, state) for lane in range(self.lanes)}
        row = min(lane.rows for lane in opened.values())
        while opened:
            for lane in sorted(opened):
                rows = opened[lane]
                if rows.rows > row:
                    continue
                found = rows.next_row()
                if found is None:
                    del opened[lane]
                else:
                    yield lane, found, rows.state()
            row += 1

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Rows from the state on that was loaded. In worker w of n, every n-th from the w-th on, as torch deals them.

        `state_dict` follows what has been given.
        """
        state, worker = self._begin, get_worker_info()
        self._at = {} if state is None else dict(state["lanes"])
        every, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        for place, (lane, row, after) in enumerate(self._all(state)):
            if place % every == number:
                self._at[str(lane)] = after
                yield tensors(row)

    def state_dict(self) -> State:
        """Behind the rows that `iter` has given; of a stream that is not iterated over, where it would begin."""
        lanes = getattr(self, "_at", None)
        if lanes is None:
            lanes = {} if self._begin is None else self._begin["lanes"]
        return {"lanes": dict(lanes), **self.common_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iterations begin behind this state.

        Raises:
            ValueError: if it is no state of a stream like this.
        """
        self.check_state(state)
        self._begin, self._at = dict(state), dict(state["lanes"])

    def check_state(self, state: Any) -> None:
        """Refuse what is no state of this stream."""
        lanes = state.get("lanes") if isinstance(state, Mapping) else None
        known = {str(lane) for lane in range(self.lanes)}
        if (
            not isinstance(lanes, Mapping)
            or not set(lanes) <= known
            or not all(isinstance(each, Mapping) and isinstance(each.get("rows"), int) for each in lanes.values())
        ):
            raise ValueError(f"this is no state of a stream of {self.lanes} lanes: {state!r:.200}.")


def tensors(row: Row) -> dict[str, torch.Tensor]:
    """A row as the collator takes it."""
    return {name: torch.from_numpy(column) for name, column in row.items()}


def joined(states: Sequence[Mapping[str, Any]]) -> State:
    """The state behind the samples of several readers, each of which knows its own: of each lane the latest."""
    lanes: dict[str, Any] = {}
    for state in states:
        for lane, known in state["lanes"].items():
            if lane not in lanes or known["rows"] > lanes[lane]["rows"]:
                lanes[lane] = known
    return {**states[0], "lanes": {lane: lanes[lane] for lane in sorted(lanes, key=int)}}

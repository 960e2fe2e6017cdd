"""Several streams as one, by weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..tokens.blend import UNLIMITED, Blend, Point
from ..tokens.mixture import same, shares_of
from ..tokens.permutation import Permutation
from ..tokens.same_tokenizer import check_one_tokenizer
from .lane_rows import LaneRows, Row
from .lane_stream import LaneStream
from .token_stream import TokenStream

PERIOD = 2**22  # samples after which the counts of the sets begin anew


class StreamMixture(LaneStream):
    """Rows of several `TokenStream`s with as many lanes each, in proportion to weights. Rows have a `domain`, too.

    Lane l of the mixture takes the rows of lane l of each stream, so that a rank reads its share of every stream. Which
    set is next is what `Mixture` says (see `blend`), with two differences that need no counts: among `lanes` samples
    that follow each other the sets are shuffled, so that no set stays with some of the lanes; and counts begin anew
    after 4 million samples.

    Args:
        streams: by name; without end, with one `lanes` and one `sequence_length`.
        weights: by name, or in the order of the streams; shares of the rows. They may be others when a run is resumed,
            and sets may be added: every lane of a set goes on with its next row. To leave a set out, give it 0.
        seed: of which set is next.

    Raises:
        ValueError: for weights that cannot be, streams with an end, or with different lanes, lengths or tokenizers.

    Attributes:
        names: of the sets; `domain` is the place in it.
    """

    epochs = None

    def __init__(
        self, streams: Mapping[str, TokenStream], weights: Mapping[str, float] | Sequence[float], seed: int = 0
    ) -> None:
        self.streams, self.names, self.seed = dict(streams), tuple(streams), seed
        if not self.names:
            raise ValueError("a mixture needs a stream.")
        for name, stream in self.streams.items():
            if not isinstance(stream, TokenStream):
                raise ValueError(
                    f"the set {name!r} is a {type(stream).__name__}: a StreamMixture has TokenStreams, a Mixture sets "
                    "that have a length."
                )
            if stream.epochs is not None:
                raise ValueError(f"the stream {name!r} has an end (epochs={stream.epochs}); leave epochs out.")
        self.lanes = same(self.streams, "lanes", "another number of lanes", "a mixture")
        self.sequence_length = same(self.streams, "sequence_length", "rows of another length", "a mixture")
        if len({id(stream.ids.tokenizer) for stream in self.streams.values()}) > 1:
            check_one_tokenizer(self.streams, "a mixture")
        self.weights = shares_of(self.names, weights)
        for name, weight in zip(self.names, self.weights, strict=True):
            if 0 < weight < sum(self.weights) / PERIOD:
                raise ValueError(f"the weight {weight} of {name!r} is less than one row in {PERIOD}; use 0.")
        self._anchor = 0  # the sample with which these weights begin
        self._blend = Blend(self.weights, (UNLIMITED,) * len(self.names), False, Point.start(len(self.names)))
        self._cycle: tuple[int, np.ndarray] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Of a row, without `domain`: those of all streams, so that every batch has the same."""
        return tuple(dict.fromkeys(name for stream in self.streams.values() for name in stream.columns))

    def set_of(self, sample: int) -> int:
        """The place in `names` of the set that a sample comes from; not of samples before the weights' first."""
        cycle, place = divmod(sample - self._anchor, self.lanes)
        if self._cycle is None or self._cycle[0] != cycle:
            first = cycle % max(PERIOD // self.lanes, 1) * self.lanes
            order = Permutation(self.lanes, self.seed, cycle)(np.arange(self.lanes))
            self._cycle = (cycle, self._blend.locate(first + order)[0])
        return int(self._cycle[1][place])

    def open_lane(self, lane: int, state: Mapping[str, Any]) -> LaneRows:
        """See `LaneStream`."""
        return _MixedLane(self, lane, state)

    def set_epoch(self, epoch: int) -> None:
        """See `LaneStream`."""
        self.epoch = epoch
        for stream in self.streams.values():
            stream.set_epoch(epoch)

    def begin_at(self, state: Mapping[str, Any] | None, given: int) -> None:
        """See `LaneStream`. Weights that the state does not have begin behind it."""
        known = {} if state is None else state.get("mixture", {})
        self._anchor = known["anchor"] if known.get("mixing") == self._mixing() else given
        self._cycle = None

    def common_state(self) -> dict[str, Any]:
        """See `LaneStream`."""
        return {"mixture": {"anchor": self._anchor, "mixing": self._mixing()}}

    def _mixing(self) -> dict[str, Any]:
        return {"seed": self.seed, "weights": dict(zip(self.names, self.weights, strict=True))}

    def identity(self) -> dict[str, Any]:
        """See `LaneStream`. Weights are not part of it."""
        return {"lanes": self.lanes, **{f"set {name}": stream.identity() for name, stream in self.streams.items()}}

    def first_documents(self) -> Iterator[Any]:
        """See `LaneStream`."""
        for stream in self.streams.values():
            yield from stream.first_documents()


class _MixedLane:
    """A lane of a mixture: one of each stream."""

    def __init__(self, mixture: StreamMixture, lane: int, state: Mapping[str, Any]) -> None:
        self.mixture, self.lane, self.rows = mixture, lane, state.get("rows", 0)
        self._states: dict[str, Any] = dict(state.get("sets", {}))
        self._opened: dict[str, LaneRows] = {}

    def next_row(self) -> Row | None:
        mixture = self.mixture
        domain = mixture.set_of(self.rows * mixture.lanes + self.lane)
        name = mixture.names[domain]
        if name not in self._opened:
            self._opened[name] = mixture.streams[name].open_lane(self.lane, self._states.get(name, {}))
        row = self._opened[name].next_row()
        assert row is not None
        self._states[name] = self._opened[name].state()
        self.rows += 1
        if "position_ids" in mixture.columns and "position_ids" not in row:  # of documents that are not kept apart
            row["position_ids"] = np.arange(mixture.sequence_length)
        return {**row, "domain": np.array(domain)}

    def state(self) -> dict[str, Any]:
        return {"rows": self.rows, "sets": dict(self._states)}

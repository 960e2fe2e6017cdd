"""A stand-in for the weights of a model, for tests of what takes segments alone."""

from hf_nanotron.parallel.zero.segment import Segment


class SegmentsAlone:
    """A `ShardedWeights` that has segments alone.

    Attributes:
        published: whether each publication was of rounded weights.
    """

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments
        self.published: list[bool] = []

    def take_written(self, compare: bool) -> None: ...

    def wait(self) -> None: ...

    def publish(self, rounded: bool) -> None:
        self.published.append(rounded)

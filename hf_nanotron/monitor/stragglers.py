"""Which rank is slow, in words: a table of what ranks do alone, and a warning when one stays slow. Without torch."""

from __future__ import annotations

from collections.abc import Mapping

from .read_log import SPREAD

LABELS = {
    "step_time": "a whole step",
    "data_time": "reading data, a step",
    "host_time": "processor time, a step",
    "probe_time": "one matrix product",
}
SLOW = 1.5  # times the median of all ranks
WORTH_NAMING = 0.05  # of a step: what is faster slows nothing
PATIENCE = 3  # log lines in a row
Spreads = Mapping[str, Mapping[str, float]]


def is_slow(name: str, spread: Mapping[str, float], step: float) -> bool:
    """Whether the rank with the largest figure slows the others. `step`: seconds of a step."""
    _, median, most, _ = (spread[key] for key in SPREAD)
    is_long = name == "probe_time" or most - median > WORTH_NAMING * step
    return bool(median) and most > SLOW * median and is_long


def table(ranks: Spreads, step: float) -> list[str]:
    """A line for each figure: least, median and most of all ranks, and who has the most."""
    lines = [f"{'seconds of ranks':24}{'least':>10}{'median':>10}{'most':>10}   rank"]
    for name, label in LABELS.items():
        if (found := ranks.get(name)) is None:
            continue
        least, median, most, rank = (found[key] for key in SPREAD)
        slow = f"   slow: {most / median:.1f} x the median" if is_slow(name, found, step) else ""
        lines.append(f"{label:24}{least:10.3g}{median:10.3g}{most:10.3g}   {rank:.0f}{slow}")
    return lines


class Stragglers:
    """Tells of a rank that is the slow one in some log lines in a row; again only after it was not."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, int], int] = {}

    def note(self, ranks: Spreads, step: float) -> str | None:
        """The figures of a log line. What there is to say, if anything."""
        slow = [(name, int(found["rank"])) for name, found in ranks.items() if is_slow(name, found, step)]
        self._lines = {key: self._lines.get(key, 0) + 1 for key in slow}
        told = [key for key, lines in self._lines.items() if lines == PATIENCE]
        if not told:
            return None
        who = "; ".join(f"rank {rank} ({LABELS.get(name, name)})" for name, rank in told)
        return "\n  ".join(
            [f"The others wait for a slow rank, in {PATIENCE} log lines in a row: {who}.", *table(ranks, step)]
        )

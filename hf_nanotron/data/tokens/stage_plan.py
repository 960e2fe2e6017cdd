"""Which steps each stage of a run has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..legs import Leg
from .stage import Stage, start_of


class Point(NamedTuple):
    """Between two steps: the stage of the step before; what was done in the run; the stage's first sample; tokens of
    the last step."""

    stage: int = 0
    step: int = 0
    samples: int = 0
    tokens: int = 0
    begin: int = 0
    last_tokens: int = 0


def plan_legs(
    stages: Sequence[Stage], lengths: Sequence[int | None], point: Point, batch: int, max_steps: int
) -> tuple[Leg, ...]:
    """The steps of each stage, from a point of the run to the step that ends it.

    Args:
        lengths: tokens of a row, by stage; None where the data does not say it.
        batch: samples of a step, of stages that do not say it.
        max_steps: steps of the whole run.

    Raises:
        ValueError: for a stage without a step, or one that would begin before steps that were trained.
    """
    legs: list[Leg] = []
    while True:
        number = point.stage
        size = stages[number].global_batch_size or batch
        steps = _steps_of(stages, lengths, point, size)
        last = steps is None or point.step + steps >= max_steps
        if steps is None or last:
            steps = max(max_steps - point.step, 0)
        stop = point.samples + steps * size
        if steps or last:
            legs.append(Leg(number, point.step, point.samples, stop, size, point.samples - point.begin))
        if last:
            return tuple(legs)
        tokens = point.tokens + steps * size * (lengths[number] or 0)
        point = Point(number + 1, point.step + steps, stop, tokens, stop)


def point_of(number: int, legs: Sequence[Leg], lengths: Sequence[int | None], point: Point) -> Point:
    """Where the leg of a stage begins, of legs that were planned from `point` on."""
    for leg in legs:
        if leg.number >= number:
            break
        tokens = point.tokens + (leg.stop - leg.first) * (lengths[leg.number] or 0)
        point = Point(leg.number + 1, leg.step + leg.steps, leg.stop, tokens, leg.stop)
    return point


def _steps_of(stages: Sequence[Stage], lengths: Sequence[int | None], point: Point, size: int) -> int | None:
    """Steps from a point to where the next stage begins; None in the last stage."""
    number = point.stage
    if number + 1 == len(stages):
        return None
    after, tokens = stages[number + 1], size * (lengths[number] or 0)
    if after.start_step is not None:
        steps = after.start_step - point.step
        late = steps < 0
    else:
        missing = (after.start_tokens or 0) - point.tokens
        steps = -(-missing // tokens)
        late = missing <= -(point.last_tokens or tokens)  # it would have begun a step earlier, or before that
    if point.samples > point.begin:
        if late:
            raise ValueError(
                f"stage {number + 1} begins at {start_of(after)}, but step {point.step} of stage {number} "
                f"({point.tokens} tokens of the run) has been trained: it can begin from there on."
            )
    elif steps <= 0:
        raise ValueError(
            f"stage {number} would have no step: it begins at step {point.step} ({point.tokens} tokens), and stage "
            f"{number + 1} at {start_of(after)}."
        )
    return max(steps, 0)

"""Where the records of a layout part from those of one process: the first tensor, and on which ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .records import Activation, Piece, Record

# Relative differences that fp32 makes by adding in another order. What is left out or done twice makes 1e-2 and more.
TOLERANCE = {
    "initial weight": 1e-6, "initial buffer": 1e-6, "activation": 1e-4, "loss": 2e-5, "gradient": 1e-3, "norm": 1e-4,
    "weight": 1e-2, "buffer": 1e-3,
}  # fmt: skip
GROWTH = 10.0  # of the tolerance after the first step, whose update has rounded in another way
FLOOR = 1e-4  # of the global norm: gradients that are zero but for rounding are compared with it
MAY_MISS = ("activation", "initial buffer", "buffer")  # which no rank need have whole
SMALL = 1e-3  # of the gradient's root mean square: below, an optimizer's step may have either sign


@dataclass(frozen=True)
class Difference:
    """The first tensor that differs.

    Attributes:
        kind: one of `TOLERANCE`.
        name: of the module whose output it is, of the buffer, or of the weight in the Hub's files; empty for a figure.
        step: optimizer step, from 1; 0 before the first.
        ranks: those on which it differs.
        where: their coordinates, in words.
        error: relative; the largest of them.
    """

    kind: str
    name: str
    step: int
    ranks: tuple[int, ...]
    where: str
    error: float
    tolerance: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        what = {
            "initial weight": f"the initial values of {self.name} differ",
            "initial buffer": f"the initial values of the buffer {self.name} differ",
            "activation": f"the output of {self.name} differs in the forward of step {self.step}",
            "gradient": f"the gradient of {self.name} differs in step {self.step}",
            "weight": f"{self.name} differs after the update of step {self.step}",
            "buffer": f"the buffer {self.name} differs after step {self.step}",
            "loss": f"the loss of step {self.step} differs",
            "norm": f"the gradient norm of step {self.step} differs",
        }[self.kind]
        return f"{what}, on {self.where} (relative error {self.error:.1e}, tolerance {self.tolerance:.0e})"


@dataclass(frozen=True)
class Compared:
    """Largest relative errors by kind over what was equal, and the first difference, or None.

    Attributes:
        unseen: modules whose outputs were not compared, or not for every token: no rank could write them down.
    """

    errors: dict[str, float]
    first: Difference | None
    unseen: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        first = None if self.first is None else self.first.to_dict()
        return {"errors": self.errors, "first_difference": first, "not_compared": list(self.unseen)}


class _Whole:
    """Whole tensors of one process: of its record."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.gradients = [_assembled(pieces) for pieces in record.gradients]
        self.weights = [_assembled(pieces) for pieces in record.weights]
        self.outputs = [
            {(name, noted.place): noted for name, all_noted in step.items() for noted in all_noted}
            for step in record.activations
        ]


def compare(records: list[Record], reference: Record) -> Compared:
    """What the ranks of a layout have written down, against one process, in the order of a run."""
    whole, errors = _Whole(reference), dict.fromkeys(TOLERANCE, 0.0)
    unseen = _unseen(records, whole)
    for kind, name, step, found in _in_order(records, whole):
        tolerance = TOLERANCE[kind] * (GROWTH if step > 1 else 1.0)
        if not found and kind not in MAY_MISS:
            found = dict.fromkeys((record.rank for record in records), math.inf)  # no rank has it
        wrong = {rank: error for rank, error in found.items() if not error <= tolerance}
        if wrong:
            worst = max(wrong.values(), key=lambda error: math.inf if math.isnan(error) else error)
            ranks = tuple(sorted(wrong))
            first = Difference(kind, name, step, ranks, _where(records, ranks), worst, tolerance)
            return Compared(errors, first, unseen)
        errors[kind] = max([errors[kind], *found.values()])
    return Compared(errors, None, unseen)


def without_outputs(record: Record) -> Record:
    """Losses, gradients and weights alone, of runs whose micro-batches differ."""
    return replace(record, modules=[], shapeless=[], activations=[{} for _ in record.activations])


def _unseen(records: list[Record], whole: _Whole) -> tuple[str, ...]:
    """Modules of the reference, in its order, of whose outputs some tokens are in no record."""
    incomplete = set()
    for step, outputs in enumerate(whole.outputs):
        missing = {key: torch.ones(noted.values.shape[:2], dtype=torch.bool) for key, noted in outputs.items()}
        held = [record.activations[step] for record in records if step < len(record.activations)]
        for name, noted in ((name, noted) for own in held for name, all_noted in own.items() for noted in all_noted):
            left = missing.get((name, noted.place))
            if left is not None and len(left) == len(noted.columns):
                rows = torch.arange(len(left))[:, None].expand_as(noted.columns)
                real = noted.columns < left.shape[1]
                left[rows[real], noted.columns[real]] = False
        incomplete |= {name for (name, _), left in missing.items() if left.any()}
    modules = whole.record.modules
    never = [name for name in whole.record.shapeless if name not in modules]
    return (*(name for name in modules if name in incomplete), *never)


def _in_order(records: list[Record], whole: _Whole) -> Iterator[tuple[str, str, int, dict[int, float]]]:
    """(kind, name, step, relative error by rank) of all that is compared, in the order of a run."""
    steps = len(whole.record.losses)
    yield from _weights(records, whole, 0, "initial weight")
    yield from _buffers(records, whole, 0, "initial buffer")
    for step in range(steps):
        for name in whole.record.modules:
            yield "activation", name, step + 1, _outputs(records, whole, step, name)
        yield "loss", "", step + 1, _figures(records, [record.losses for record in records], whole.record.losses, step)
        gradients = whole.gradients[step]
        floor = FLOOR * math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        for name, gradient in gradients.items():
            size = float(gradient.norm()) + floor
            pieces = _of(records, [record.gradients[step] for record in records], name)
            errors = {rank: float((piece.values - piece.of(gradient)).norm()) / (size or 1.0) for rank, piece in pieces}
            yield "gradient", name, step + 1, errors
        yield "norm", "", step + 1, _figures(records, [record.norms for record in records], whole.record.norms, step)
        yield from _weights(records, whole, step + 1, "weight")
        yield from _buffers(records, whole, step + 1, "buffer")


def _outputs(records: list[Record], whole: _Whole, step: int, name: str) -> dict[int, float]:
    """Of the tokens that a rank has; those that only fill a row up are left out."""
    errors: dict[int, float] = {}
    for record in records:
        for noted in record.activations[step].get(name, []):
            expected = whole.outputs[step].get((name, noted.place))
            if expected is not None:
                errors[record.rank] = max(errors.get(record.rank, 0.0), _output_error(noted, expected))
    return errors


def _output_error(noted: Activation, expected: Activation) -> float:
    rows, length = expected.values.shape[:2]
    if noted.values.shape[0] != rows or noted.values.shape[-1] != expected.values.shape[-1]:
        return math.inf
    real = noted.columns < length
    columns = noted.columns.clamp(max=length - 1)[..., None].expand(-1, -1, expected.values.shape[-1])
    wanted = expected.values.gather(1, columns)
    error = float((noted.values - wanted)[real].norm())
    size = float(wanted[real].norm()) + 1e-3 * float(expected.values.norm())
    return error / size if size else error


def _weights(
    records: list[Record], whole: _Whole, step: int, kind: str
) -> Iterator[tuple[str, str, int, dict[int, float]]]:
    """An update is compared with its size, where the gradient says which way it goes."""
    if step >= len(whole.weights):
        return
    for name, wanted in whole.weights[step].items():
        clear, size = torch.ones_like(wanted, dtype=torch.bool), float(wanted.norm())
        if step and name in whole.gradients[step - 1]:
            steepest = torch.stack([whole.gradients[before][name].abs() for before in range(step)]).amin(0)
            every = torch.cat([gradient.flatten() for gradient in whole.gradients[step - 1].values()])
            clear = steepest > SMALL * float(every.square().mean().sqrt())
            size = float((wanted - whole.weights[0][name])[clear].norm()) + 1e-4 * size
        errors: dict[int, float] = {}
        for rank, piece in _of(records, [record.weights[step] for record in records], name):
            error = float(((piece.values - piece.of(wanted)) * piece.of(clear)).norm())
            errors[rank] = max(errors.get(rank, 0.0), error / size if size else error)
        yield kind, name, step, errors


def _buffers(
    records: list[Record], whole: _Whole, step: int, kind: str
) -> Iterator[tuple[str, str, int, dict[int, float]]]:
    """Those that ranks have whole."""
    if step >= len(whole.record.buffers):
        return
    for name, wanted in whole.record.buffers[step].items():
        size, errors = float(wanted[wanted.isfinite()].norm()), {}
        for record in records:
            if step < len(record.buffers) and (found := record.buffers[step].get(name)) is not None:
                if found.shape == wanted.shape:
                    same = (found == wanted) | (found.isnan() & wanted.isnan())  # such as masks of -inf
                    error = float(torch.where(same, 0.0, found - wanted).norm())
                    errors[record.rank] = error / size if size else error
        yield kind, name, step, errors


def _figures(records: list[Record], found: list[list[float]], expected: list[float], step: int) -> dict[int, float]:
    size = abs(expected[step]) or 1.0
    return {
        record.rank: abs(figures[step] - expected[step]) / size if step < len(figures) else math.inf
        for record, figures in zip(records, found, strict=True)
    }


def _of(records: list[Record], pieces: list[list[Piece]], name: str) -> Iterator[tuple[int, Piece]]:
    """(rank, piece) of what the ranks hold of a tensor."""
    for record, held in zip(records, pieces, strict=True):
        yield from ((record.rank, piece) for piece in held if piece.name == name)


def _assembled(pieces: list[Piece]) -> dict[str, torch.Tensor]:
    """Whole tensors of the pieces of one process, by name."""
    found: dict[str, torch.Tensor] = {}
    for piece in pieces:
        if piece.name not in found:
            found[piece.name] = torch.zeros(piece.shape)
        found[piece.name].view(-1)[piece.start : piece.stop] = piece.values
    return found


def _where(records: list[Record], ranks: tuple[int, ...]) -> str:
    """Such as `rank 2 (pp 1, tp 0; stage 1)`, and `all ranks`, if several have it."""
    if len(ranks) == len(records) > 1:
        return "all ranks"
    told = []
    by_rank = {record.rank: record for record in records}
    for rank in ranks[:4]:
        record = by_rank[rank]
        place = ", ".join(f"{axis} {number}" for axis, number in record.where.items())
        stages = f"; stage {', '.join(map(str, record.stages))}" if "pp" in record.where else ""
        told.append(f"rank {rank}" + (f" ({place}{stages})" if place else ""))
    return ", ".join(told) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")

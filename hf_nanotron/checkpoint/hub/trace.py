"""Which elements of one tensor are which of another, as grids, and torch operations traced in terms of them.

transformers describes how a family's Hub files differ from its modules by operations on whole tensors (chunk, stack,
transpose, ...). Run on a `Traced` tensor, which has no data, they tell where every element goes. The cost is that of
the names, not of the elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import prod
from typing import Any, Literal, cast

import torch

Sizes = tuple[int, ...]
End = Literal["own", "source"]

ZEROS = ""  # stands for the source of elements that are zero, such as the rows that pad a vocabulary


@dataclass(frozen=True)
class Side:
    """Where a grid lies in a tensor."""

    start: Sizes  # coordinates of its first element
    # for each axis of the grid the dimension of the tensor along which it runs, and its step there
    axes: tuple[tuple[int, int], ...]

    def shift(self, dim: int, by: int) -> Side:
        return replace(self, start=(*self.start[:dim], self.start[dim] + by, *self.start[dim + 1 :]))

    def box(self, sizes: Sizes) -> list[tuple[int, int]]:
        """The smallest half-open range of each dimension that holds a grid of these sizes."""
        last = list(self.start)
        for size, (dim, step) in zip(sizes, self.axes, strict=True):
            last[dim] += (size - 1) * step
        return [(low, high + 1) for low, high in zip(self.start, last, strict=True)]

    def view(self, sizes: Sizes, data: torch.Tensor, origin: Sequence[int] | None = None) -> torch.Tensor:
        """The grid's elements, shape `sizes`, without a copy.

        Args:
            data: contiguous; the tensor, or a box of it.
            origin: coordinates of the box's first corner.
        """
        origin = origin or (0,) * len(self.start)
        strides = row_strides(tuple(data.shape))
        offset = sum((at - zero) * stride for at, zero, stride in zip(self.start, origin, strides, strict=True))
        return data.as_strided(sizes, [step * strides[dim] for dim, step in self.axes], data.storage_offset() + offset)


@dataclass(frozen=True)
class Grid:
    """Elements of a tensor (`own`) that are elements of another (`source`), one by one."""

    # extent of each axis, at least two. Axes run along dimensions of either tensor in any order; several may run along
    # one dimension
    sizes: Sizes
    own: Side
    source: Side
    name: str  # of the source, or `ZEROS`

    @classmethod
    def whole(cls, name: str, shape: Sizes) -> Grid:
        """All of a tensor, as it is."""
        axes = tuple((dim, 1) for dim, size in enumerate(shape) if size > 1)
        side = Side((0,) * len(shape), axes)
        return cls(tuple(size for size in shape if size > 1), side, side, name)

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    def cut(self, axis: int, first: int, last: int) -> Grid:
        """Positions `[first, last)` of an axis. An axis of one position is left out."""
        sides = []
        for side in (self.own, self.source):
            dim, step = side.axes[axis]
            sides.append(side.shift(dim, first * step))
        sizes = (*self.sizes[:axis], last - first, *self.sizes[axis + 1 :])
        if last - first == 1:
            sizes = (*sizes[:axis], *sizes[axis + 1 :])
            sides = [replace(side, axes=(*side.axes[:axis], *side.axes[axis + 1 :])) for side in sides]
        return Grid(sizes, sides[0], sides[1], self.name)

    def split(self, axis: int, inner: int) -> Grid:
        """An axis as two: blocks of `inner` positions, and those inside of a block."""

        def axes(side: Side) -> Side:
            dim, step = side.axes[axis]
            return replace(side, axes=(*side.axes[:axis], (dim, step * inner), (dim, step), *side.axes[axis + 1 :]))

        sizes = (*self.sizes[:axis], self.sizes[axis] // inner, inner, *self.sizes[axis + 1 :])
        return Grid(sizes, axes(self.own), axes(self.source), self.name)

    def within(self, end: End, dim: int, start: int, stop: int) -> Iterator[Grid]:
        """What of the grid lies in `[start, stop)` of a dimension of one of its tensors."""
        side: Side = getattr(self, end)
        along = sorted((a for a, (d, _) in enumerate(side.axes) if d == dim), key=lambda a: -side.axes[a][1])
        low = side.start[dim]
        if not along:
            if start <= low < stop:
                yield self
            return
        axis, step = along[0], side.axes[along[0]][1]
        reach = sum((self.sizes[a] - 1) * side.axes[a][1] for a in along[1:])  # of the finer axes
        touched = range(max(0, -((low + reach - start) // step)), min(self.sizes[axis], (stop - 1 - low) // step + 1))
        inside = range(max(0, -((low - start) // step)), min(self.sizes[axis], (stop - 1 - low - reach) // step + 1))
        if inside:
            yield self.cut(axis, inside.start, inside.stop)
        for position in touched:
            if position not in inside:
                yield from self.cut(axis, position, position + 1).within(end, dim, start, stop)


def row_strides(shape: Sizes) -> Sizes:
    """Elements between neighbours of each dimension of a contiguous tensor."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def copy_grids(out: torch.Tensor, grids: Iterable[Grid], sources: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Fill `out` (contiguous, of the shape of the grids' own tensor) from whole, contiguous tensors. Returns it."""
    for grid in grids:
        own = grid.own.view(grid.sizes, out)
        if grid.name == ZEROS:
            own.zero_()
        else:
            own.copy_(grid.source.view(grid.sizes, sources(grid.name)))
    return out


# ---- tracing ----


class Traced(torch.Tensor):
    """A tensor without data that knows which elements of which named tensors it is made of.

    It takes the operations of `OPERATIONS`; another one is a ValueError. Copies count as the tensor itself.
    """

    grids: tuple[Grid, ...]

    @classmethod
    def of(cls, name: str, shape: Sizes) -> Traced:
        """A named tensor itself."""
        return cls.made(shape, (Grid.whole(name, shape),))

    @classmethod
    def made(cls, shape: Sizes, grids: Iterable[Grid]) -> Traced:
        traced = torch.empty(shape, device="meta").as_subclass(cls)
        traced.grids = tuple(grids)
        return traced

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            plain = func(*args, **kwargs)  # shapes are torch's own, and so are errors
            if name in QUERIES:
                return plain
            if name not in OPERATIONS:
                raise ValueError(f"the operation {name!r} on the layout of a tensor is not known.")
            traced = OPERATIONS[name](plain, *args, **kwargs)
            for mine, theirs in zip(_listed(traced), _listed(plain), strict=True):
                if mine.shape != theirs.shape:
                    raise ValueError(f"{name!r} gives {tuple(theirs.shape)}, traced as {tuple(mine.shape)}.")
            return traced


def _listed(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _map_own(traced: Traced, change: Callable[[Side], Side]) -> Iterator[Grid]:
    return (replace(grid, own=change(grid.own)) for grid in traced.grids)


def _narrow(traced: Traced, dim: int, start: int, stop: int) -> Traced:
    shape = (*traced.shape[:dim], stop - start, *traced.shape[dim + 1 :])
    kept = (part for grid in traced.grids for part in grid.within("own", dim, start, stop))
    return Traced.made(shape, (replace(grid, own=grid.own.shift(dim, -start)) for grid in kept))


def _select(traced: Traced, dim: int, index: int) -> Traced:
    row = _narrow(traced, dim, index, index + 1)
    return Traced.made(
        (*row.shape[:dim], *row.shape[dim + 1 :]),
        _map_own(
            row,
            lambda side: Side(
                (*side.start[:dim], *side.start[dim + 1 :]), tuple((d - (d > dim), step) for d, step in side.axes)
            ),
        ),
    )


def _unsqueeze(traced: Traced, dim: int) -> Traced:
    return Traced.made(
        (*traced.shape[:dim], 1, *traced.shape[dim:]),
        _map_own(
            traced,
            lambda side: Side(
                (*side.start[:dim], 0, *side.start[dim:]), tuple((d + (d >= dim), step) for d, step in side.axes)
            ),
        ),
    )


def _transpose(plain: torch.Tensor, traced: Traced, dim0: int, dim1: int) -> Traced:
    order = list(range(traced.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]

    def permuted(side: Side) -> Side:
        return Side(tuple(side.start[d] for d in order), tuple((order.index(d), step) for d, step in side.axes))

    return Traced.made(tuple(plain.shape), _map_own(traced, permuted))


def _joined(parts: Sequence[Traced], dim: int) -> Traced:
    ends = list(accumulate((part.shape[dim] for part in parts), initial=0))
    grids: list[Grid] = []
    for part, offset in zip(parts, ends[:-1], strict=True):
        grids += (replace(grid, own=grid.own.shift(dim, offset)) for grid in part.grids)
    first = parts[0].shape
    return Traced.made((*first[:dim], ends[-1], *first[dim + 1 :]), grids)


def _cat(plain: torch.Tensor, parts: Sequence[Traced], dim: int = 0) -> Traced:
    return _joined(parts, dim % plain.dim())


def _stack(plain: torch.Tensor, parts: Sequence[Traced], dim: int = 0) -> Traced:
    return _cat(plain, [_unsqueeze(part, dim % plain.dim()) for part in parts], dim)


def _pieces(plain: Sequence[torch.Tensor], traced: Traced, _: Any, dim: int = 0) -> tuple[Traced, ...]:
    """Of `chunk` and `split`."""
    dim %= traced.dim()
    ends = accumulate((piece.shape[dim] for piece in plain), initial=0)
    return tuple(_narrow(traced, dim, start, stop) for start, stop in pairwise(ends))


def _unbind(plain: Sequence[torch.Tensor], traced: Traced, dim: int = 0) -> tuple[Traced, ...]:
    return tuple(_select(traced, dim % traced.dim(), index) for index in range(len(plain)))


def _squeeze(plain: torch.Tensor, traced: Traced, dim: int) -> Traced:
    return traced if plain.dim() == traced.dim() else _select(traced, dim % traced.dim(), 0)


def _getitem(plain: torch.Tensor, traced: Traced, index: Any) -> Traced:
    """Integers, slices without a step, and one list of integers."""
    dim = lists = 0
    entries = index if isinstance(index, tuple) else (index,)
    for entry in entries:
        if entry is Ellipsis:
            dim = traced.dim() - (len(entries) - 1 - entries.index(Ellipsis))
            continue
        size = traced.shape[dim] if dim < traced.dim() else 0
        if isinstance(entry, int) and not isinstance(entry, bool):
            traced = _select(traced, dim, entry % size)
            continue
        if isinstance(entry, slice) and entry.step in (None, 1):
            start, stop, _ = entry.indices(size)
            traced = _narrow(traced, dim, start, max(start, stop))
        elif isinstance(entry, list) and entry and all(type(at) is int for at in entry) and not lists:
            traced = _joined([_narrow(traced, dim, at % size, at % size + 1) for at in entry], dim)
            lists += 1
        else:
            raise ValueError(f"the index {index!r} of a traced tensor is not known.")
        dim += 1
    return traced


def _zeros(plain: torch.Tensor, *_: Any, **__: Any) -> Traced:
    shape = tuple(plain.shape)
    return Traced.made(shape, (Grid.whole(ZEROS, shape),))


def _reshape(plain: torch.Tensor, traced: Traced, *_: Any, **__: Any) -> Traced:
    shape, flat = tuple(plain.shape), row_strides(tuple(traced.shape))

    def flattened(side: Side) -> Side:
        offset = sum(at * stride for at, stride in zip(side.start, flat, strict=True))
        return Side((offset,), tuple((0, step * flat[dim]) for dim, step in side.axes))

    return Traced.made(shape, (_unflatten(grid, shape) for grid in _map_own(traced, flattened)))


def _unflatten(grid: Grid, shape: Sizes) -> Grid:
    """A grid in a 1-D tensor as one in a tensor of `shape`."""
    strides, axis = row_strides(shape), 0
    axes: list[tuple[int, int]] = []
    while axis < len(grid.sizes):
        step, size = grid.own.axes[axis][1], grid.sizes[axis]
        dim = next((d for d, s in enumerate(strides) if shape[d] > 1 and step % s == 0 and step < s * shape[d]), None)
        if dim is None:
            raise ValueError(f"{grid} is no grid in a tensor of shape {shape}.")
        room = -(-shape[dim] * strides[dim] // step)  # positions until the axis would run into the next dimension
        if size > room:
            if size % room:
                raise ValueError(f"{grid} is no grid in a tensor of shape {shape}.")
            grid = grid.split(axis, room)
            continue
        axes.append((dim, step // strides[dim]))
        axis += 1
    start, rest = [], grid.own.start[0]
    for stride in strides:
        start.append(rest // stride)
        rest %= stride
    own = Side(tuple(start), tuple(axes))
    if any(stop > size for (_, stop), size in zip(own.box(grid.sizes), shape, strict=True)):
        raise ValueError(f"{grid} is no grid in a tensor of shape {shape}.")
    return replace(grid, own=own)


def _same(plain: torch.Tensor, traced: Traced, *_: Any, **__: Any) -> Traced:
    return traced


QUERIES = frozenset({"__get__", "size", "dim", "numel", "__len__", "is_contiguous", "is_floating_point"})
OPERATIONS = cast(
    dict[str, Callable[..., Any]],
    {
        "cat": _cat, "stack": _stack, "chunk": _pieces, "split": _pieces, "unbind": _unbind, "squeeze": _squeeze,
        "transpose": _transpose, "reshape": _reshape, "view": _reshape, "__getitem__": _getitem,
        "flatten": _reshape, "unflatten": _reshape, "new_zeros": _zeros,
        "contiguous": _same, "clone": _same, "detach": _same, "to": _same,
    },
)  # fmt: skip

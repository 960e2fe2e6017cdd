"""What travels between two stages: how many tensors of which shape and dtype, in a form that can be sent itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool)
MAX_TENSORS, MAX_DIMS = 6, 8
ENTRY = MAX_DIMS + 3  # dtype (-1: None), whether it needs a gradient, number of dimensions, sizes
HEADER_SIZE = 1 + MAX_TENSORS * ENTRY


@dataclass(frozen=True)
class Layout:
    """Shapes and dtypes of a tuple of tensors, None for an absent one, and which of them have a gradient."""

    shapes: tuple[tuple[int, ...] | None, ...]
    dtypes: tuple[torch.dtype, ...]
    needs_gradient: tuple[bool, ...]

    @classmethod
    def of(cls, tensors: tuple[torch.Tensor | None, ...]) -> Layout:
        """The layout of what a stage made."""
        for x in tensors:
            if x is not None and (x.dtype not in DTYPES or x.dim() > MAX_DIMS):
                raise ValueError(f"a stage cannot send a tensor of {x.dim()} dimensions and dtype {x.dtype}.")
        if len(tensors) > MAX_TENSORS:
            raise ValueError(f"a stage can send at most {MAX_TENSORS} tensors, not {len(tensors)}.")
        return cls(
            tuple(None if x is None else tuple(x.shape) for x in tensors),
            tuple(torch.float32 if x is None else x.dtype for x in tensors),
            tuple(x is not None and x.requires_grad for x in tensors),
        )

    def empty(self, device: torch.device, gradients: bool) -> tuple[torch.Tensor | None, ...]:
        """Memory to receive the tensors, or the gradients of those that have one."""
        return tuple(
            None if shape is None else torch.empty(shape, dtype=dtype, device=device)
            for shape, dtype, needs in zip(self.shapes, self.dtypes, self.needs_gradient, strict=True)
            if needs or not gradients
        )


def write_header(layout: Layout) -> torch.Tensor:
    """`[HEADER_SIZE]` int64 on the host."""
    numbers = [len(layout.shapes)]
    for shape, dtype, needs in zip(layout.shapes, layout.dtypes, layout.needs_gradient, strict=True):
        entry = [-1] if shape is None else [DTYPES.index(dtype), int(needs), len(shape), *shape]
        numbers += entry + [0] * (ENTRY - len(entry))
    return torch.tensor(numbers + [0] * (HEADER_SIZE - len(numbers)))


def read_header(header: torch.Tensor) -> Layout:
    """What `write_header` was given."""
    count, *numbers = header.tolist()
    entries = [numbers[i * ENTRY : (i + 1) * ENTRY] for i in range(count)]
    return Layout(
        tuple(None if e[0] < 0 else tuple(e[3 : 3 + e[2]]) for e in entries),
        tuple(DTYPES[max(0, e[0])] for e in entries),
        tuple(bool(e[1]) and e[0] >= 0 for e in entries),
    )

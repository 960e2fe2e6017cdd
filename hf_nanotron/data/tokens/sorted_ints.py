"""Search in long sorted arrays of integers that stay in their file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...redaction import printable_url
from .byte_ranges import AnyFile


@dataclass
class SortedInts:
    """`[length]` int64 of a file, ascending, read where a search looks.

    Attributes:
        file: holds them as little-endian 64-bit integers, one after the other.
        offset: of the first, in bytes.
        length: how many.
        scale: what each is divided by: Megatron stores bytes where tokens are meant.
    """

    file: AnyFile
    offset: int
    length: int
    scale: int = 1

    def slice(self, start: int, stop: int) -> np.ndarray:
        """`[stop - start]` int64.

        Raises:
            ValueError: if they do not ascend.
        """
        found = self._raw(start, stop)
        if len(found) > 1 and (found[1:] < found[:-1]).any():
            place = start + int(np.argmax(found[1:] < found[:-1]))
            shown = printable_url(self.file.path)
            raise ValueError(f"{shown}: number {place + 1} is smaller than the one before; it must ascend.")
        return found // self.scale if self.scale > 1 else found

    def search(self, values: np.ndarray, side: str = "left") -> np.ndarray:
        """`np.searchsorted(self, values, side)`, in O(log length) reads for each value."""
        values = np.asarray(values, np.int64)
        if self.file.is_local and self.offset % 8 == 0:
            # v//scale is below x where v is below x*scale
            wanted = values * self.scale if side == "left" else values * self.scale + (self.scale - 1)
            return np.searchsorted(self._raw(0, self.length), wanted, side)  # type: ignore[call-overload]
        return np.array([self._search_one(int(value), side) for value in values.ravel()], np.int64).reshape(
            values.shape
        )

    def _raw(self, start: int, stop: int) -> np.ndarray:
        return self.file.array(np.dtype("<i8"), self.offset + 8 * start, max(stop - start, 0))

    def _search_one(self, value: int, side: str) -> int:
        """Bisection that begins in blocks, so that a remote file is asked for few of them."""
        low, high = 0, self.length  # the answer is in [low, high]
        window = 1024
        while high - low > window:
            middle = (low + high) // 2
            found = int(self._raw(middle, middle + 1)[0]) // self.scale
            if found < value or (side == "right" and found == value):
                low = middle + 1
            else:
                high = middle
        return low + int(np.searchsorted(self._raw(low, high) // self.scale, value, side))  # type: ignore[call-overload]

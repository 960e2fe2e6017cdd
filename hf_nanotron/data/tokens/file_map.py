"""Files mapped into memory without an open file for each: a corpus may have more files than a process may open.

Python's `mmap` (before 3.13), and so `np.memmap`, keeps a descriptor of each map; many systems allow 1,024 of them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

import numpy as np

_C = ctypes.CDLL(None, use_errno=True)
_C.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_ssize_t,
)
_C.mmap.restype = ctypes.c_void_p
_C.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


def map_file(path: str, size: int) -> np.ndarray:
    """`[size]` uint8, to be read only: the first bytes of a file. The map lasts as long as an array of it.

    Raises:
        OSError: for a file that cannot be mapped, or is shorter.
    """
    return np.asarray(_Map(path, size)) if size else np.empty(0, np.uint8)


class _Map:
    """What NumPy makes an array of, and keeps."""

    _address: int | None = None

    def __init__(self, path: str, size: int) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if (found := os.fstat(descriptor).st_size) < size:  # reading behind its end would end the process
                raise OSError(f"{path} has {found} bytes: it is shorter than when it was opened ({size} bytes).")
            address = _C.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
            if address == _FAILED:
                number = ctypes.get_errno()
                raise OSError(number, f"cannot be mapped into memory ({os.strerror(number)})", path)
        finally:
            os.close(descriptor)
        self._address, self._size = address, size

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "shape": (self._size,), "typestr": "|u1", "data": (self._address, True)}

    def __del__(self) -> None:
        if self._address is not None:
            _C.munmap(self._address, self._size)

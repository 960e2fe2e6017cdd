"""Megatron's `.idx`: where the sequences and the documents of a `.bin` file begin.

The format is that of `megatron.core.datasets.indexed_dataset` (Megatron-Core 0.16; version 1), little-endian:

    bytes 0-8    MMIDIDX and two zeros
    bytes 9-16   uint64, the version, 1
    byte  17     the ids' dtype, see `DTYPES`
    bytes 18-25  uint64 n, sequences
    bytes 26-33  uint64 d, document indices
    then         n int32 lengths in ids, n int64 offsets in bytes, d int64 numbers of the sequences at which documents
                 begin, the first of them 0 and the last of them n
    and maybe    n int8 modes of multimodal data, which are not read
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}


class MegatronIndex(NamedTuple):
    """The header of an `.idx` file.

    Attributes:
        dtype: of the ids in the `.bin` file.
        sequences: how many.
        documents: entries of the array of document indices; one more than documents.
    """

    dtype: np.dtype
    sequences: int
    documents: int

    @property
    def lengths_at(self) -> int:
        return HEADER_BYTES

    @property
    def pointers_at(self) -> int:
        return HEADER_BYTES + 4 * self.sequences

    @property
    def documents_at(self) -> int:
        return HEADER_BYTES + 12 * self.sequences

    @property
    def size(self) -> int:
        """Bytes of the file, without modes."""
        return HEADER_BYTES + 12 * self.sequences + 8 * self.documents


def parse_header(header: bytes, path: str, size: int) -> MegatronIndex:
    """Read the first `HEADER_BYTES` bytes of an `.idx` file.

    Args:
        path: for what is said of it.
        size: of the whole file, in bytes.

    Raises:
        ValueError: if it is no such file, of another version, or cut off.
    """
    if len(header) < HEADER_BYTES:
        raise ValueError(f"{path}: {size} bytes are too few for an index of Megatron's (header of {HEADER_BYTES}).")
    if header[:9] != MAGIC:
        raise ValueError(f"{path} is no index of Megatron's: it begins with {header[:9]!r} instead of {MAGIC!r}.")
    version, code, sequences, documents = struct.unpack("<QBQQ", header[9:HEADER_BYTES])
    if version != 1:
        raise ValueError(f"{path} has version {version} of Megatron's index; only version 1 is known.")
    if code not in DTYPES:
        raise ValueError(f"{path}: {code} is no dtype of Megatron's index (1 to {max(DTYPES)}).")
    index = MegatronIndex(np.dtype(DTYPES[code]), sequences, documents)
    if size not in (index.size, index.size + sequences):
        raise ValueError(
            f"{path}: {sequences} sequences and {documents} document indices take {index.size} bytes, and the file "
            f"has {size}; it is cut off or damaged."
        )
    return index

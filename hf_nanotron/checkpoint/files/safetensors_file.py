"""Open a safetensors file, and write one while its tensors arrive, holding one at a time.

The format: eight bytes with the length of a JSON header, the header, the bytes of the tensors one after the other
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .disk import durable_file

DTYPES = {  # as safetensors names them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def open_safetensors(path: Path, advice: str) -> Any:
    """A handle of `safe_open`, which compares the header with the file's length."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); {advice}.") from error


def header_of(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """The bytes that come before the tensors, which lie in the order of `entries`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for entry in entries:
        end = offset + entry.dtype.itemsize * prod(entry.shape)
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def bytes_of_tensor(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def write_safetensors(path: Path, entries: Sequence[Entry], tensors: Iterable[torch.Tensor]) -> None:
    """Write `tensors`, which come in the order of `entries`. The file survives a power failure."""
    with durable_file(path) as file:
        file.write(header_of(entries, {}))
        for entry, tensor in zip(entries, tensors, strict=True):
            if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
                raise ValueError(f"{path}: {entry} came as {tensor.dtype}, {tuple(tensor.shape)}.")
            file.write(bytes_of_tensor(tensor))

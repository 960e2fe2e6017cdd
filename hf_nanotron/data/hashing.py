"""Hashes of batches and samples, the same in every process and for every way of holding the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash

COLUMNS = ("input_ids", "labels", "shift_labels", "position_ids", "attention_mask")
HASH_BITS = 31  # so that a sum over many ranks, each weighted by their number, is exact in 64 bits


def batch_hash(batch: Mapping[str, Any], seed: int = 0) -> int:
    """Hash of a collated batch (names, shapes, dtypes and contents) in `HASH_BITS` bits; waits for a device."""
    hasher = xxhash.xxh3_64(seed=seed)
    for name in sorted(batch, key=str):
        hasher.update(f"{type(batch).__name__}|{name}|".encode())
        _update(hasher, batch[name])
    return hasher.intdigest() >> (64 - HASH_BITS)


def window_hash(window: Sequence[Mapping[str, Any]], seed: int = 0) -> int:
    """Hash of micro-batches, their number and their order, in `HASH_BITS` bits."""
    return combined([seed, *(batch_hash(batch, seed) for batch in window)])


def tensor_hashes(batch: Mapping[str, Any]) -> dict[str, int]:
    """Hash of each entry of a batch."""
    return {str(name): batch_hash({name: value}) for name, value in batch.items()}


def of_the_model(row: Any) -> Any:
    """What the model reads of a row of a dataset; all of it if that is made later."""
    known = {name: row[name] for name in COLUMNS if name in row} if isinstance(row, Mapping) else {}
    return known or row


def sample_hash(sample: Any) -> int:
    """Hash of one row of a dataset. Integers count by value, in a list, an array or a tensor of any width."""
    hasher = xxhash.xxh3_64()
    _update_sample(hasher, sample)
    return hasher.intdigest() >> (64 - HASH_BITS)


def _update(hasher: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        hasher.update(f"{value.dtype}{tuple(value.shape)}".encode())
        hasher.update(value.view(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for name in sorted(value, key=str):
            hasher.update(f"{name}|".encode())
            _update(hasher, value[name])
    elif isinstance(value, list | tuple):
        hasher.update(f"{len(value)}|".encode())
        for item in value:
            _update(hasher, item)
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        hasher.update(f"{value.dtype}{value.shape}".encode())
        hasher.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, str | bytes | int | float | None):
        hasher.update(repr(value).encode())
    else:  # its text may hold an address, which differs in each process
        hasher.update(type(value).__name__.encode())


def _update_sample(hasher: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for name in sorted(value, key=str):
            hasher.update(f"{name}|".encode())
            _update_sample(hasher, value[name])
        return
    array = _as_numbers(value)
    if array is not None:
        hasher.update(str(array.shape).encode())
        hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    elif isinstance(value, list | tuple):
        for item in value:
            _update_sample(hasher, item)
    else:
        _update(hasher, value)


def _as_numbers(value: Any) -> np.ndarray | None:
    """Numbers of any container in one dtype; None if there are none."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    if not isinstance(value, np.ndarray | list | tuple | int | float):
        return None
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # rows of different lengths; tensors on a device, or with gradients
        return None
    if array.dtype.kind in "biu":
        return array.astype(np.int64)
    return array.astype(np.float64) if array.dtype.kind == "f" else None


def combined(hashes: Sequence[int]) -> int:
    """One hash of several, in their order."""
    return xxhash.xxh3_64_intdigest(np.array(hashes, np.int64).tobytes()) >> (64 - HASH_BITS)

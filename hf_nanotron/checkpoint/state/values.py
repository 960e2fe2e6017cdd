"""Small values (hyper-parameters, counters, the state of a scheduler) as JSON, and back with the same types and bits.

JSON has no inf and nan, tuples, tensors or keys that are not strings. Such a value is written as an object with the
key `"$"`, which says what it is: `{"$": "float", "value": "inf"}`.
"""

from __future__ import annotations

import base64
import reprlib
from collections import Counter
from collections.abc import Callable
from math import inf, isfinite, nan
from typing import Any

import numpy as np
import torch

TAG = "$"
DEEPEST = 100  # how far values may be nested; a level may take two of JSON


def encode(value: Any, path: str, depth: int = 0) -> Any:
    """`value` in terms of what `json` writes exactly. Subclasses of int, float and str become those."""
    if depth > DEEPEST:
        raise ValueError(f"{path[:200]}... is nested more than {DEEPEST} times, which a training state cannot hold.")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.generic):
        return encode(value.item(), path)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        return float(value) if isfinite(value) else {TAG: "float", "value": repr(float(value))}
    if isinstance(value, list):
        return [encode(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    if type(value) is tuple:
        return {TAG: "tuple", "value": [encode(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]}
    if isinstance(value, dict):
        return _encode_dict(value, path, depth + 1)
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        raw = data.reshape(-1).view(torch.uint8).numpy().tobytes()
        return _array("tensor", str(data.dtype).removeprefix("torch."), data.shape, raw)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return _array("ndarray", value.dtype.str, value.shape, value.tobytes())
    raise ValueError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which a training state cannot hold: it is "
        "JSON, not pickle. Numbers, strings, None, lists, tuples, dicts, tensors and arrays of numbers work."
    )


def _encode_dict(value: dict[Any, Any], path: str, depth: int) -> Any:
    plain = all(type(key) is str for key in value) and TAG not in value
    if plain and not isinstance(value, Counter):
        return {key: encode(item, f"{path}[{key!r}]", depth) for key, item in value.items()}
    pairs = [
        [encode(key, f"a key of {path}", depth), encode(item, f"{path}[{key!r}]", depth)] for key, item in value.items()
    ]
    return {TAG: "counter" if isinstance(value, Counter) else "dict", "value": pairs}


def _array(kind: str, dtype: str, shape: Any, raw: bytes) -> dict[str, Any]:
    return {TAG: kind, "dtype": dtype, "shape": list(shape), "value": base64.b64encode(raw).decode()}


def decode(value: Any, where: str = "the training state", depth: int = 0) -> Any:
    """What `encode` was given. Tensors are on the host."""
    if depth > 2 * DEEPEST:
        raise ValueError(f"{where} is nested more than {DEEPEST} times.")
    if isinstance(value, list):
        return [decode(item, where, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    tag = value.get(TAG)
    if tag is None and TAG not in value:
        return {key: decode(item, where, depth + 1) for key, item in value.items()}
    if not isinstance(tag, str) or tag not in _DECODERS:
        raise ValueError(f"{where} holds a value of kind {reprlib.repr(tag)}, which this version does not know.")
    content: Any = value
    if tag in ("tuple", "dict", "counter"):
        if not isinstance(value.get("value"), list):
            raise ValueError(f"{where} holds a {tag} without a list of its items.")
        content = [decode(item, where, depth + 1) for item in value["value"]]
    try:
        return _DECODERS[tag](content)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{where} holds a {tag} that cannot be read ({type(error).__name__}: {error}).") from error


def _float(value: dict[str, Any]) -> float:
    return {"inf": inf, "-inf": -inf, "nan": nan}[value["value"]]


def _pairs(content: list[Any]) -> dict[Any, Any]:
    return {key: item for key, item in content}  # noqa: C416 - each must be a pair


def _tensor(value: dict[str, Any]) -> torch.Tensor:
    dtype = _DTYPES[value["dtype"]]
    raw = bytearray(base64.b64decode(value["value"], validate=True))
    # `frombuffer` refuses a buffer without bytes.
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.reshape(_shape(value))


def _ndarray(value: dict[str, Any]) -> np.ndarray:
    dtype = np.dtype(value["dtype"])
    if dtype.kind not in "biuf" or not isinstance(value["dtype"], str):
        raise TypeError(f"{value['dtype']!r} is no dtype of numbers")
    return np.frombuffer(bytearray(base64.b64decode(value["value"], validate=True)), dtype).reshape(_shape(value))


def _shape(value: dict[str, Any]) -> list[int]:
    if not isinstance(value["shape"], list) or not all(type(size) is int and size >= 0 for size in value["shape"]):
        raise TypeError("its shape is no list of sizes")
    return value["shape"]


_DTYPES = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
_DECODERS: dict[str, Callable[[Any], Any]] = {
    "float": _float,
    "tuple": tuple,
    "dict": _pairs,
    "counter": lambda content: Counter(_pairs(content)),
    "tensor": _tensor,
    "ndarray": _ndarray,
}

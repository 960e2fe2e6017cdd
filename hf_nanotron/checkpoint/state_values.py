"""Small values (hyper-parameters, counters, the state of a scheduler) as JSON, and back with the same types and bits.

JSON has no inf and nan, tuples, tensors or keys that are not strings. Such a value is written as an object with the
key `"$"`, which says what it is: `{"$": "float", "value": "inf"}`.
"""

from __future__ import annotations

import base64
from collections import Counter
from math import isfinite
from typing import Any

import numpy as np
import torch

TAG = "$"


def encode(value: Any, path: str) -> Any:
    """`value` in terms of what `json` writes exactly. Subclasses of int, float and str become those.

    Args:
        path: how to call `value` in an error message, such as `"scheduler"`.

    Raises:
        ValueError: naming the first value inside that cannot be stored (a function, an object of a class).
    """
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
        return [encode(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if type(value) is tuple:
        return {TAG: "tuple", "value": [encode(item, f"{path}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, dict):
        return _encode_dict(value, path)
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


def _encode_dict(value: dict[Any, Any], path: str) -> Any:
    plain = all(type(key) is str for key in value) and TAG not in value
    if plain and not isinstance(value, Counter):
        return {key: encode(item, f"{path}[{key!r}]") for key, item in value.items()}
    pairs = [[encode(key, f"a key of {path}"), encode(item, f"{path}[{key!r}]")] for key, item in value.items()]
    return {TAG: "counter" if isinstance(value, Counter) else "dict", "value": pairs}


def _array(kind: str, dtype: str, shape: Any, raw: bytes) -> dict[str, Any]:
    return {TAG: kind, "dtype": dtype, "shape": list(shape), "value": base64.b64encode(raw).decode()}


def decode(value: Any) -> Any:
    """What `encode` was given. Tensors are on the host.

    Raises:
        ValueError: for a tag of a later version.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = value.get(TAG)
    if tag is None:
        return {key: decode(item) for key, item in value.items()}
    content = value["value"]
    if tag == "float":
        return float(content)
    if tag == "tuple":
        return tuple(decode(item) for item in content)
    if tag in ("dict", "counter"):
        pairs = {decode(key): decode(item) for key, item in content}
        return pairs if tag == "dict" else Counter(pairs)
    if tag == "tensor":
        raw = bytearray(base64.b64decode(content))
        dtype = getattr(torch, value["dtype"])
        # `frombuffer` refuses a buffer without bytes.
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return flat.reshape(value["shape"])
    if tag == "ndarray":
        return np.frombuffer(bytearray(base64.b64decode(content)), value["dtype"]).reshape(value["shape"])
    raise ValueError(f"the training state holds a value of kind {tag!r}, which this version does not know.")

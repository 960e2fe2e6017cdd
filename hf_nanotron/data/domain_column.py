"""The column `domain` of a batch: which part of the data each row comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..ops.cross_entropy import IGNORE_INDEX
from ..parallel.batch import DOMAIN, batch_shape
from .ordered import wrapped

MOST_UNNAMED = 4096  # domains without names, whose number nothing else limits


def domain_names(dataset: Any) -> tuple[str, ...] | None:
    """Names of the domains of `dataset`, by their numbers; None if it has none.

    From its attribute `domain_names` or `names`, or of a `datasets.Dataset` from the `ClassLabel` of the column. Of
    torch's `Subset` and `ConcatDataset`, those of what is in them.

    Raises:
        ValueError: for names that are no text, or not different; for parts with different names.
    """
    found = list(dict.fromkeys(_own_names(part) for part in wrapped(dataset)))
    if len(found) > 1:
        raise ValueError(
            f"the parts of the {type(dataset).__name__} have different names of domains ({', '.join(map(str, found))}),"
            " so that one number would stand for two: make a Mixture of them, or give them the same names."
        )
    return found[0] if found else None


def _own_names(dataset: Any) -> tuple[str, ...] | None:
    features = getattr(dataset, "features", None)
    label = features.get(DOMAIN) if isinstance(features, Mapping) else None
    places = (dataset, "domain_names"), (dataset, "names"), (label, "names")
    for owner, attribute in places:
        found = getattr(owner, attribute, None)
        if found is None or callable(found):
            continue
        what = f"{type(dataset).__name__}.{attribute}"
        if isinstance(found, str) or not isinstance(found, Sequence) or not all(isinstance(n, str) for n in found):
            raise ValueError(f"{what} must be a list of the names of the column {DOMAIN!r}, not {found!r}.")
        if twice := [name for name in found if list(found).count(name) > 1]:
            raise ValueError(f"{what} has the name {twice[0]!r} twice: each domain needs a name of its own.")
        return tuple(found)
    return None


def check_column(batch: Mapping[str, Any], names: Sequence[str] | None) -> int:
    """How many domains the column of `batch` says there are at least: the largest number in it, and one.

    Raises:
        ValueError: for a column that is not int64 `[B]` or `[B, S]`, or has a number without a name.
    """
    column, (rows, length) = batch[DOMAIN], batch_shape(batch)
    other = "it is the number of the part of the data that a row comes from; give another column another name"
    if not isinstance(column, torch.Tensor) or column.is_floating_point() or column.dtype == torch.bool:
        what = f"a tensor of {column.dtype}" if isinstance(column, torch.Tensor) else f"a {type(column).__name__}"
        raise ValueError(f"the column {DOMAIN!r} of a batch must be a tensor of integers, not {what}; {other}.")
    if column.shape not in ((rows,), (rows, length)):
        raise ValueError(
            f"the column {DOMAIN!r} of a batch of {rows} rows with {length} tokens has the shape "
            f"{tuple(column.shape)}, but must be ({rows},), or ({rows}, {length}) for tokens; {other}."
        )
    numbers = column[column != IGNORE_INDEX]
    if not numbers.numel():
        return 0
    low, high = int(numbers.min()), int(numbers.max())
    limit = MOST_UNNAMED if names is None else len(names)
    if low >= 0 and high < limit:
        return high + 1
    wrong = low if low < 0 else high
    if names is None:
        known = f"from 0 to {limit - 1}; give the dataset the attribute `names`, and use their places"
    else:
        known = f"from 0 to {limit - 1}, the places in its names ({', '.join(map(repr, names[:8]))})"
    raise ValueError(f"the column {DOMAIN!r} of a batch has {wrong}, but domains are {known} ({IGNORE_INDEX}: none).")

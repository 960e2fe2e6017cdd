"""Which columns of a dataset reach the collator that makes batches of its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.trainer_utils import RemoveColumnsCollator

from ..data.ordered import COLUMNS, brings_order, stack, wrapped
from ..data.streaming.lane_stream import LaneStream
from ..parallel.batch import DOMAIN

Collate = Callable[[list[Any]], Any]


def collator_of(
    dataset: Any, collate: Collate, is_default: bool, drop_columns: Callable[[Collate], Collate]
) -> Collate:
    """`collate` behind Trainer's removal of columns that `forward` does not name, which keeps those that are ours: of
    datasets that bring their order, or of a part of one, and domains that have names.

    Args:
        is_default: whether the user has given none; ours stacks the rows of datasets that bring their order.
        drop_columns: Trainer's, for this dataset.
    """
    parts = wrapped(dataset)
    ordered = all(brings_order(part) or isinstance(part, LaneStream) for part in parts)
    named = any(getattr(part, "domain_names", None) is not None for part in parts)
    found = drop_columns(stack if ordered and is_default else collate)
    if isinstance(found, RemoveColumnsCollator):
        kept = COLUMNS if ordered else (DOMAIN,) if named else ()
        found.signature_columns = [*found.signature_columns, *kept]
    return found

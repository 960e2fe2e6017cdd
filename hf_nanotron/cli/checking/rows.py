"""The rows that every layout trains on: the first of the run's own data, or random tokens."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from typing import Any

import torch

from ...data.padding import PADDING
from ...data.streaming.lane_stream import LaneStream
from ...ops.cross_entropy import IGNORE_INDEX
from ..data import load_data
from ..data_plan import DataPlan, SetPlan
from ..errors import SettingsError

Row = dict[str, list[int]]
NO_DOCUMENTS = (None, "cross")


def random_rows(count: int, length: int, vocabulary: int, packed: bool) -> list[Row]:
    """Random tokens, of which rows predict different numbers; `packed`: of three documents, by `position_ids`."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        ids = torch.randint(0, vocabulary, (length,), generator=generator)
        labels = ids.clone()
        labels[: 1 + index % 5 * (length // 8)] = IGNORE_INDEX
        row = {"input_ids": ids.tolist(), "labels": labels.tolist()}
        if packed:
            first = 1 + int(torch.randint(length - 2, (), generator=generator))
            parts = sorted({0, first, min(length - 1, first + length // 4), length})
            row["position_ids"] = [i for a, b in zip(parts, parts[1:], strict=False) for i in range(b - a)]
        rows.append(row)
    return rows


def own_rows(plan: DataPlan, tokenizer: Any, count: int, length: int, vocabulary: int) -> list[Row]:
    """The first `count` rows of the training data, cut after `length` tokens, with ids below `vocabulary`.

    Of stages: those of the first. Data of fewer rows begin anew.

    Raises:
        SettingsError: for data without a row.
    """
    train = plan.train[0].data if isinstance(plan.train, list) else plan.train
    dataset, _ = load_data(DataPlan(train, None, plan.seed), tokenizer, 0)
    rows = []
    for found in dataset if isinstance(dataset, LaneStream) else _in_order(dataset, count):
        row = {name: torch.as_tensor(found[name]).tolist()[:length] for name in PADDING if name in found}
        row["input_ids"] = [token % vocabulary for token in row["input_ids"]]
        for name in ("labels", "shift_labels"):
            if name in row:
                row[name] = [token % vocabulary if token >= 0 else token for token in row[name]]
        rows.append(row)
        if len(rows) == count:
            break
    if not rows:
        raise SettingsError("the training data has no row.")
    names = {name for row in rows for name in row}
    if any(set(row) != names for row in rows):
        raise SettingsError("the first rows of the training data have different columns; use --data random.")
    return [rows[index % len(rows)] for index in range(count)]


def _in_order(dataset: Any, count: int) -> Iterator[Any]:
    """The first `count` rows, or all; a mixture that is repeated without end has no length."""
    with contextlib.suppress(TypeError):
        count = min(count, len(dataset))
    return (dataset[index] for index in range(count))


def is_quick(plan: DataPlan) -> bool:
    """Whether the data are here and can be opened without reading all of them first: files of tokens, a stored set."""
    train = plan.train
    if not isinstance(train, SetPlan):
        return False
    options = train.options
    if train.kind == "tokens":
        paths = options["tokens"] if isinstance(options["tokens"], list) else [options["tokens"]]
        return all("://" not in path and glob.glob(os.path.expanduser(path)) for path in paths)
    return train.kind == "path" and "text_column" not in options and os.path.exists(options["path"])


def packs(section: dict[str, Any]) -> bool:
    """Whether attention is to stay inside of documents, in any set of a section `dataset`."""
    if section.get("documents") not in NO_DOCUMENTS:
        return True
    parts = [*(section.get("mixture") or {}).values(), *(section.get("stages") or [])]
    return any(isinstance(part, dict) and packs(part) for part in parts)

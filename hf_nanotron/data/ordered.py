"""Datasets that bring their order: what they have, and how their rows become batches.

Such a dataset is read from its first sample on, without a sampler of Trainer's, and says itself what the next sample
depends on. It is map-style and has one of

- `identity() -> dict`: what its rows and their order depend on. Its samples are those of an epoch (`set_epoch`).
- `state_dict(samples) -> dict` and `load_state_dict(state)`: where it is behind its first `samples`. Its samples are
  those of the whole run. After `load_state_dict` it goes on with the sample of the number that the state was asked for.

What both return is compared or stored in checkpoints: dicts of numbers, text, lists and None.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from ..parallel.batch import DOMAIN

COLUMNS = ("input_ids", "labels", "shift_labels", "position_ids", DOMAIN)


def brings_order(dataset: Any) -> bool:
    """Whether the dataset is read in its own order."""
    return is_run(dataset) or (has_method(dataset, "identity") and not isinstance(dataset, IterableDataset))


def has_method(dataset: Any, name: str) -> bool:
    """A dataset of a user's own may have an attribute of that name, which is something else."""
    return callable(getattr(dataset, name, None))


def gives_arrays(dataset: Any) -> bool:
    """Whether it has `rows(places, epoch) -> arrays by column`, and `columns`, as `TokenDataset` does."""
    return has_method(dataset, "rows") and hasattr(dataset, "columns")


def is_run(dataset: Any) -> bool:
    """Whether its samples are those of the whole run. A `state_dict()` that takes no `samples` is another protocol."""
    methods = ("state_dict", "load_state_dict", "__getitem__")
    if isinstance(dataset, IterableDataset) or not all(has_method(dataset, name) for name in methods):
        return False
    try:
        return "samples" in inspect.signature(dataset.state_dict).parameters
    except (TypeError, ValueError):  # of a compiled function, which does not say
        return False


def wrapped(dataset: Any) -> list[Any]:
    """Itself; of torch's `Subset` and `ConcatDataset`, the datasets that the rows come from."""
    if isinstance(dataset, Subset):
        return wrapped(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return [inner for part in dataset.datasets for inner in wrapped(part)]
    return [dataset]


def sets_of(dataset: Any) -> dict[str, Any]:
    """The sets that a dataset is made of, by name; itself if it is not made of any."""
    sets = getattr(dataset, "datasets", None)
    return dict(sets) if isinstance(sets, Mapping) else {"data": dataset}


def identities_of(dataset: Any, samples: int | None) -> dict[str, dict[str, Any]]:
    """Identities of its sets, by name: of those read among the first `samples`, or of all; of those that tell."""
    if has_method(dataset, "identities"):
        return dataset.identities(samples)
    return {name: each.identity() for name, each in sets_of(dataset).items() if has_method(each, "identity")}


def shown_files(dataset: Any, name: str) -> list[str]:
    """The files of a set, for an error."""
    return [file.shown for file in getattr(sets_of(dataset).get(name), "files", ())]


def stack(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch `[B, ...]` of rows of equal lengths, by column.

    Raises:
        ValueError: for rows with different columns or shapes.
    """
    batch = {}
    for name in rows[0]:
        column = [torch.as_tensor(row[name]) for row in rows if name in row]
        shapes = {tuple(value.shape) for value in column}
        if len(column) < len(rows) or len(shapes) > 1:
            raise ValueError(
                f"the column {name!r} is not in all rows of a batch"
                if len(column) < len(rows)
                else f"rows of a batch have different shapes of {name!r} ({', '.join(map(str, sorted(shapes)))})"
                ": cut them to one length, or pass a data_collator that pads."
            )
        batch[name] = torch.stack(column)
    return batch

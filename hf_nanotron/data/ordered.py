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
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import IterableDataset

from ..parallel.batch import DOMAIN

COLUMNS = ("input_ids", "labels", "shift_labels", "position_ids", DOMAIN)


@runtime_checkable
class HasIdentity(Protocol):
    """Has epochs, in an order of its own."""

    def identity(self) -> dict[str, Any]:
        """What rows and their order depend on."""


@runtime_checkable
class IsRun(Protocol):
    """Has the samples of a whole run."""

    def state_dict(self, samples: int) -> dict[str, Any]:
        """Where it is behind the first `samples` of the run."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind a state."""


def brings_order(dataset: Any) -> bool:
    """Whether the dataset is read in its own order."""
    return is_run(dataset) or (isinstance(dataset, HasIdentity) and not isinstance(dataset, IterableDataset))


def is_run(dataset: Any) -> bool:
    """Whether its samples are those of the whole run. A `state_dict()` that takes no `samples` is another protocol."""
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, IsRun) or not hasattr(dataset, "__getitem__"):
        return False
    return "samples" in inspect.signature(dataset.state_dict).parameters


def sets_of(dataset: Any) -> dict[str, Any]:
    """The sets that a dataset is made of, by name; itself if it is not made of any."""
    sets = getattr(dataset, "datasets", None)
    return dict(sets) if isinstance(sets, Mapping) else {"data": dataset}


def identities_of(dataset: Any, samples: int | None) -> dict[str, dict[str, Any]]:
    """Identities of its sets, by name: of those read among the first `samples`, or of all; of those that tell."""
    if hasattr(dataset, "identities"):
        return dataset.identities(samples)
    return {name: each.identity() for name, each in sets_of(dataset).items() if isinstance(each, HasIdentity)}


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

"""A fingerprint of samples: whether two ranks, or two runs, hold the same rows in the same order."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from .dealing import twin
from .hashing import combined, of_the_model, sample_hash
from .identity import without_times
from .ordered import brings_order, has_method, identities_of, is_run, sets_of

ROWS = 16  # read of a dataset; few, since a row may be tokenised, or fetched, when it is read
STREAM_ROWS = 2
SETS = 64  # of a mixture, of which rows are read
SETTINGS = -1  # stands for what the order depends on: files, weights, seeds


def row_hashes(dataset: Any) -> dict[int, int]:
    """Hashes of rows at fixed places (first, last, and some between; of a stream, its first rows): place -> hash.

    Random numbers that the dataset draws from the global generators, or its own, are the same in each call, and the
    generators are restored. Empty where the rows cannot be read without consequences: an empty dataset, one without
    integer indices, and a stream other than `datasets.IterableDataset`, whose samples may be consumed.

    Raises:
        Exception: of a dataset that brings its order, if its rows cannot be read: an id that the vocabulary lacks, say.
    """
    if brings_order(dataset):
        with unnoticed(dataset):
            return _hashes_of_sets(dataset)
    try:
        with unnoticed(dataset):
            return {place: sample_hash(of_the_model(row)) for place, row in _rows(dataset)}
    except Exception:  # the loader may read it in another way, and says itself what is wrong
        return {}


def fingerprint(hashes: dict[int, int]) -> int | None:
    """One number for `row_hashes`; None if there are none."""
    return combined([number for item in hashes.items() for number in item]) if hashes else None


def _hashes_of_sets(dataset: Any) -> dict[int, int]:
    """Of one that brings its order: `SETTINGS`, and rows of its sets. A row far into a mixture takes long to find."""
    settings = dataset.settings() if has_method(dataset, "settings") else None
    facts = {name: without_times(identity) for name, identity in identities_of(dataset, None).items()}
    hashes = {SETTINGS: sample_hash(json.dumps([settings, facts], sort_keys=True, default=str))}
    for number, each in enumerate(islice(sets_of(dataset).values(), SETS)):
        if each is dataset and is_run(dataset):  # of another class
            return {**hashes, 0: sample_hash(of_the_model(dataset[getattr(dataset, "begin", 0)]))}
        length = len(each)
        for place in sorted({0, length // 2, length - 1}):
            hashes[number * length + place] = sample_hash(of_the_model(each[place]))
    return hashes


def _rows(dataset: Any) -> Iterator[tuple[int, Any]]:
    if isinstance(dataset, IterableDataset):
        if hasattr(dataset, "first_documents"):
            yield from enumerate(dataset.first_documents())
        elif hasattr(dataset, "_ex_iterable"):
            yield from enumerate(islice(twin(dataset), STREAM_ROWS))
        return
    length = len(dataset)
    for place in sorted({number * (length - 1) // (ROWS - 1) for number in range(ROWS)}) if length else ():
        yield place, dataset[place]


@contextlib.contextmanager
def unnoticed(dataset: Any) -> Iterator[None]:
    """Read a dataset without a trace: generators and counters are afterwards as they were, and seeded meanwhile."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    own = [(owner, _own_state(owner)) for owner in _datasets(dataset)]
    torch.random.default_generator.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
        for owner, (values, generators) in own:
            vars(owner).update(values)
            for generator, state in generators:
                generator.set_state(state)


def _datasets(dataset: Any) -> Iterator[Any]:
    """A dataset and those that it is made of, as far as they are objects of torch's kind."""
    if not hasattr(dataset, "__dict__") or hasattr(dataset, "_ex_iterable") or hasattr(dataset, "_data"):
        return  # datasets' own have no such state
    yield dataset
    inner = getattr(dataset, "datasets", None) or ()
    inner = [getattr(dataset, "dataset", None), *(inner.values() if isinstance(inner, Mapping) else inner)]
    for other in inner:
        if other is not None and other is not dataset:
            yield from _datasets(other)


def _own_state(owner: Any) -> tuple[dict[str, Any], list[tuple[torch.Generator, torch.Tensor]]]:
    kinds = (int, float, random.Random, np.random.Generator, np.random.RandomState)
    values = {name: copy.deepcopy(value) for name, value in vars(owner).items() if isinstance(value, kinds)}
    generators = [(value, value.get_state()) for value in vars(owner).values() if isinstance(value, torch.Generator)]
    return values, generators

"""Context parallelism: losses and gradient norms of stock `transformers.Trainer` in one process, whole and packed rows.

Tolerances are those of `test_parity.py`: 1e-6 for the first loss, 2e-5 for every loss, 1e-4 for every gradient norm.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from family_runs import KNOWN, compare as compare_family, reference as family_reference
from pool import WorkerPool
from test_parity import HEADER as COLUMNS, TOLERANCE, llama_for, relative
from tiny import History, train_parallel, train_stock

from hf_nanotron.models.stock.families import FAST_ATTENTION

TITLE = "context parallelism: relative error against stock Trainer in one process, four steps in fp32"
HEADER = COLUMNS
ROWS: list[str] = []  # conftest.py prints them when all tests have run
FAMILY_TOLERANCE = {"loss": 1e-6, "norm": 1e-5, "gradient": 2e-5}
ONE_STEP = (2,)
LENGTH = 22  # which is filled up on every layout
DOCUMENTS = ([22], [1, 13, 8], [5, 17], [3, 3, 3, 3, 10])


def rows_of_documents(packed: bool, samples: int = 48, vocabulary: int = 120) -> Dataset:
    """Rows of one document, or of several that `position_ids` mark; some labels are ignored."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for index in range(samples):
        ids = torch.randint(3, vocabulary, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[: index % 4] = -100
        row = {"input_ids": ids.tolist(), "labels": labels.tolist()}
        if packed:
            documents = DOCUMENTS[index % len(DOCUMENTS)]
            row["position_ids"] = [place for length in documents for place in range(length)]
        rows.append(row)
    return Dataset.from_list(rows)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


@functools.cache
def reference(directory: str, packed: bool, global_batch: int, rows: int) -> History:
    sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": global_batch}
    return train_stock(directory, rows_of_documents(packed), collate=collate, **sizes)


def train(directory: str, packed: bool, sizes: dict[str, Any]) -> History:
    return train_parallel(directory, rows_of_documents(packed), collate=collate, **sizes)


def compare(
    pool: WorkerPool,
    directory: str,
    packed: bool,
    layout: tuple[int, int, int, int],
    accumulation: int = 2,
    rows: int = 1,
    name: str = "llama",
    **options: Any,
) -> None:
    """`layout`: pp, dp, cp, tp."""
    pp, dp, cp, tp = layout
    sizes = {"pp_size": pp, "cp_size": cp, "tp_size": tp, **options, "per_device_train_batch_size": rows}
    accumulation = max(accumulation, pp)
    histories = pool.run(
        pp * dp * cp * tp, train, directory, packed, {**sizes, "gradient_accumulation_steps": accumulation}
    )
    expected, got = reference(directory, packed, dp * accumulation, rows), histories[0]
    assert len(got.losses) == len(expected.losses) == 4
    assert all(h.losses == got.losses and h.norms == got.norms for h in histories), "ranks report different figures"
    error = {
        "first loss": relative(got.losses[:1], expected.losses[:1]),
        "loss": relative(got.losses, expected.losses),
        "norm": relative(got.norms, expected.norms),
    }
    told = "packed" if packed else "whole"
    label = f"{name} pp {pp} dp {dp} cp {cp} tp {tp} {told} " + " ".join(f"{k}={v}" for k, v in options.items())
    ROWS.append(f"{label:86s} " + " ".join(f"{error[each]:10.1e}" for each in TOLERANCE))
    assert all(error[each] <= TOLERANCE[each] for each in TOLERANCE), f"{label}: {error}"


@pytest.mark.parametrize("mode", ["gather", "heads"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("layout", [(1, 1, 2, 1), (1, 2, 2, 1), (2, 1, 2, 1), (1, 1, 2, 2), (1, 1, 4, 1)], ids=str)
def test_layouts(pool: WorkerPool, layout: tuple[int, int, int, int], packed: bool, mode: str) -> None:
    compare(pool, llama_for(layout[3], layout[0]), packed, layout, cp_mode=mode, rows=1 + packed)


# ---- families ----

DEFAULT = ("mistral", "gemma3_text", "qwen3_moe", "deepseek_v3")
DOCUMENT_ROWS = ((22,), (9, 1, 12))
FAMILY_LAYOUTS = [
    {"cp_size": 2, "documents": documents, "micro_batches": ONE_STEP, **mode}
    for documents in DOCUMENT_ROWS
    for mode in ({}, {"cp_mode": "heads"})
]


@pytest.mark.parametrize("family", sorted(set(FAST_ATTENTION) & set(KNOWN)))
def test_families(pool: WorkerPool, pytestconfig: pytest.Config, tmp_path: Path, family: str) -> None:
    if family not in DEFAULT and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    path = tmp_path / "reference.pt"
    references = {rows: family_reference(family, ONE_STEP, rows, attn_implementation="sdpa") for rows in DOCUMENT_ROWS}
    torch.save(references, path)
    for results in zip(*pool.run(2, compare_family, family, str(path), FAMILY_LAYOUTS, {}), strict=True):
        assert not isinstance(results[0], str), results[0]
        for kind, most in FAMILY_TOLERANCE.items():
            assert max(result[kind] for result in results) <= most, results

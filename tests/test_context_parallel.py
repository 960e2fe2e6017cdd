"""Context parallelism: losses and gradient norms of stock `transformers.Trainer` in one process, whole and packed rows.

Tolerances are those of `test_parity.py`: 1e-6 for the first loss, 2e-5 for every loss, 1e-4 for every gradient norm.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset
from family_runs import KNOWN, compare as compare_family, reference as family_reference
from pool import WorkerPool
from test_parity import HEADER as COLUMNS, TOLERANCE, llama_for, relative
from tiny import History, train_parallel, train_stock

from hf_nanotron.models.stock.families import FAST_ATTENTION
from hf_nanotron.parallel.cp.plan import make_context_plan

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


def llama(pp: int, cp: int, tp: int, mode: str, **overrides: Any) -> str:
    """Heads that `mode` can deal, and few key-value heads: one on each rank, or fewer."""
    if mode == "heads":
        heads = next(heads for heads in (8, 6, 5, 7) if heads % (cp * tp) == 0)
        kv_heads = {8: 2, 6: 3}.get(heads, 1)
        overrides = {
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "hidden_size": 8 * heads,
            **overrides,
        }
    return llama_for(tp, pp, **overrides)


Layout = tuple[int, int, int, int]  # pp, dp, cp, tp
SIZES = range(1, 9)
LAYOUTS: list[Layout] = [
    (pp, dp, cp, tp)
    for pp, dp, cp, tp in itertools.product(SIZES, repeat=4)
    if cp > 1 and pp * dp * cp * tp <= 8 and tp in (1, 2, 3, 4)
]
# What each of them meets in turn. An option that its sizes do not allow is passed over.
ZERO = [{"zero_stage": stage} for stage in range(4)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"gradient_checkpointing": True},
    {"sequence_parallel": False},
    {"dp_replicate_size": 2},
    {"torch_compile": True, "torch_compile_backend": "aot_eager"},
]
SCHEDULES: list[dict[str, Any]] = [
    {},
    {"pp_schedule": "zb"},
    {"pp_schedule": "afab"},
    {"pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2},
]


def options_of(layout: Layout, packed: bool, mode: str) -> dict[str, Any]:
    """ZeRO stage, schedule and one more option of a row of the table, by turns."""
    pp, dp, cp, tp = layout
    turn = LAYOUTS.index(layout) + 2 * packed + (mode == "heads")
    found = {**ZERO[turn % 4], **OPTIONS[turn % 5], **(SCHEDULES[turn // 2 % 4] if pp > 1 else {})}
    if found.get("pp_schedule") == "zb" and found["zero_stage"] == 3:
        found["zero_stage"] = 2
    if found.get("dp_replicate_size") and (dp * cp % 2 or not found["zero_stage"]):
        del found["dp_replicate_size"]
    if tp == 1:
        found.pop("sequence_parallel", None)
    return found


CHOSEN: set[tuple[Layout, bool, str]] = {
    ((1, 1, 2, 1), True, "gather"),
    ((1, 2, 2, 1), True, "heads"),
    ((2, 1, 2, 1), True, "gather"),
    ((1, 1, 2, 2), True, "gather"),
    ((1, 1, 4, 1), False, "heads"),
    ((2, 1, 2, 2), True, "gather"),
}


@pytest.mark.parametrize("mode", ["gather", "heads"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda sizes: "pp{} dp{} cp{} tp{}".format(*sizes))
def test_layouts(pool: WorkerPool, pytestconfig: pytest.Config, layout: Layout, packed: bool, mode: str) -> None:
    """Every (pp, dp, cp, tp) with a product of at most 8; ZeRO stages, schedules and other options take turns."""
    if (layout, packed, mode) not in CHOSEN and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    pp, _, cp, tp = layout
    if mode == "heads" and all(heads % (cp * tp) for heads in (8, 6, 5, 7)):
        pytest.skip("no tiny model has so many heads")
    options = options_of(layout, packed, mode)
    stages = pp * options.get("pp_virtual_stages", 1)
    interleaved = stages > pp
    directory = llama(stages, cp, tp, mode)
    compare(pool, directory, packed, layout, pp + 1 if interleaved else 2, 1 + packed, cp_mode=mode, **options)


def test_noise_on_embeddings(pool: WorkerPool) -> None:
    """NEFTune's is drawn for whole rows: it is that of one process."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "neftune_noise_alpha": 5.0}
    directory = llama_for(1, 1)
    expected = pool.run(1, train, directory, True, sizes)[0]
    for got in pool.run(2, train, directory, True, {**sizes, "cp_size": 2}):
        assert relative(got.losses, expected.losses) <= TOLERANCE["loss"]
    assert relative(expected.losses, reference(directory, True, 2, 2).losses) > 100 * TOLERANCE["loss"]


def test_documents_that_see_each_other_cannot_pass(pool: WorkerPool) -> None:
    """Packed rows whose attention forgets where documents begin miss the tolerance by far."""
    directory = llama_for(1, 1)
    got = pool.run(2, train_without_bounds, directory)[0]
    expected = reference(directory, True, 2, 1)
    assert relative(got.losses[:1], expected.losses[:1]) > 100 * TOLERANCE["first loss"]
    assert relative(got.norms, expected.norms) > 10 * TOLERANCE["norm"]


def train_without_bounds(directory: str) -> History:
    from hf_nanotron.training.step import context

    def bounds_of_rows(mesh: Any, rows: int, length: int, bounds: Any, windows: Any) -> Any:
        filled = context.row_length(mesh, length)
        return make_context_plan(mesh, rows, length, torch.arange(rows + 1) * filled, windows)

    with mock.patch.object(context, "make_context_plan", bounds_of_rows):
        return train(directory, True, {"cp_size": 2, "gradient_accumulation_steps": 2})


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

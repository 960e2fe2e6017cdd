"""The table of families: tiny models of every type with a plan, under every layout, against stock transformers.

The types are found by asking transformers, so that a new release of it adds rows. By default the families of
`family_mechanisms.BY_DEFAULT` run, which need together what all need, under the layout that asks most of them, and the
round trip through the Hub's files: tp 2 x pp 2 with sequence parallelism, or ep 2 x tp 2 x pp 2 for families with
experts. Every sixth also runs without sequence parallelism, tp 4 or tp 2 by turns. `--full-matrix` runs all families
and all columns of `family_table.COLUMNS`.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from family_mechanisms import BY_DEFAULT, mechanisms
from family_runs import FAMILIES, KNOWN, UNPLANNED, compare, reference, tiny_model
from family_table import (
    COLUMNS,
    DENSE,
    ONE_STEP,
    ROUND_TRIP,
    SPARSE,
    Cell,
    as_record,
    describe,
    make_context_cells,
    make_row,
    planned_types,
)
from pool import WorkerPool
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_nanotron import ParallelConfig, register_plan
from hf_nanotron.models.sharding.tensor_shards import tensor_specs
from hf_nanotron.models.stock import families
from hf_nanotron.models.stock.anatomy import dissect
from hf_nanotron.models.stock.plan import make_plan

# Relative to stock. A reduction that is left out or done twice misses them by three orders of magnitude.
TOLERANCE = {"loss": 1e-6, "norm": 1e-5, "gradient": 2e-5}
# Whose gradients lose digits in the stock model already.
ILL_CONDITIONED = {name: 1e-4 for name in KNOWN if name.startswith("gemma4") or name == "diffllama"}
NO_STOCK = {"gemma3n": "timm"}  # what stock transformers needs to build it
ROWS: dict[str, dict[str, Any]] = {}  # conftest.py prints and writes them when all tests have run
TITLE = "families: cells of each layout"

# Without rows in the tables: weights that are no linear layers, or one key-value head next to all queries.
PIPELINE_ONLY = ("bloom", "falcon", "gpt2", "gpt_bigcode", "gpt-sw3", "gpt_neo", "mpt")
PIPELINE_ONLY += ("codegen",) if "codegen" in UNPLANNED else ()
FUSED = ("phi3", "phi4_multimodal")

# Family -> columns that are refused, and a part of the sentence.
PIPELINE = ("pp 2", "tp 2 pp 2", "tp 2 pp 2 sp")
SEQUENCE = ("tp 2 sp", "tp 2 pp 2 sp")
REFUSED: dict[str, tuple[set[str], str]] = {
    "hrm_text": ({*PIPELINE, *SEQUENCE}, "): two stacks of layers"),
    "inkling2_text": ({*PIPELINE, *SEQUENCE, "ep 2 tp 2 pp 2"}, "): its layers attend"),
    "inkling2_loop_text": (
        {*PIPELINE, *SEQUENCE, "ep 2 tp 2 pp 2"},
        "): its layers run in loops",
    ),
    "dory": ({*PIPELINE, *SEQUENCE}, "): its middle layers run in loops"),
    "zaya": ({*SEQUENCE, "ep 2 tp 2 pp 2"}, "): its layers pass on a second state"),
    **{name: ({*SPARSE}, "has no experts with") for name in ("llama4", "llama4_text", "longcat_flash")},
    **{name: ({*DENSE} - {"pp 2"}, "declares no tensor-parallel plan") for name in PIPELINE_ONLY},
    **{name: ({"tp 4"}, "queries, keys and values are one weight") for name in FUSED},
    "gptj": ({*SEQUENCE}, "): its "),
}


def columns_of(family: str, all_of_them: bool) -> list[str]:
    sparse = [*SPARSE] if describe(family)["experts"] else []
    if all_of_them:
        return [*DENSE, *sparse]
    refused = REFUSED.get(family, (set(), ""))[0]
    demanding = ("ep 2 tp 2 pp 2", "tp 2 pp 2 sp") if sparse else ("tp 2 pp 2 sp",)
    first = next((name for name in demanding if name not in refused), demanding[-1])
    if first in refused:
        return [first, next(name for name in ("tp 2", "pp 2") if name not in refused)]
    # Every sixth family also without sequence parallelism and pipeline.
    turn = BY_DEFAULT.index(family)
    return [first] if turn % 6 else [first, "tp 4" if turn % 12 else "tp 2"]


@pytest.mark.parametrize("family", KNOWN)
def test_family(pool: WorkerPool, pytestconfig: pytest.Config, tmp_path: Path, family: str) -> None:
    if family not in BY_DEFAULT and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    try:
        columns = columns_of(family, pytestconfig.getoption("full_matrix"))
    except ImportError as error:
        if NO_STOCK.get(family, "nothing") in str(error):
            pytest.skip(f"stock transformers builds {family} with {NO_STOCK[family]} alone, which is not here")
        raise
    row = make_row(pool, family, columns, tmp_path)
    check_row(family, row)
    record = as_record(family, row)
    ROWS[family] = {**record, "cells": {**ROWS.get(family, record)["cells"], **record["cells"]}}


NO_CONTEXT: set[str] = set()
# Gradients of whose decay rates lose as much in the stock model, over as many tokens: 4e-5 in fp32, against fp64.
DELTA_RULES = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
SHARED_BY_DEFAULT = ("gemma3_text", "lfm2")


@pytest.mark.parametrize("family", KNOWN)
def test_rows_that_ranks_share(pool: WorkerPool, pytestconfig: pytest.Config, tmp_path: Path, family: str) -> None:
    """Context parallelism, of whole and of packed rows, in both modes."""
    if family not in SHARED_BY_DEFAULT and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    try:
        kind = AutoConfig.for_model(family, **KNOWN[family]["config"]).get_text_config().model_type
        trains = kind in (*families.FAST_ATTENTION, *families.CONTEXT_PARALLEL)
        trains = trains and kind not in (*families.NO_DOCUMENTS, *families.NO_CONTEXT_PARALLEL)
        row = make_context_cells(pool, family, tmp_path, trains)
    except ImportError as error:
        if NO_STOCK.get(family, "nothing") in str(error):
            pytest.skip(f"stock transformers builds {family} with {NO_STOCK[family]} alone, which is not here")
        raise
    conditioned = {**ILL_CONDITIONED, **dict.fromkeys(DELTA_RULES, 1e-4)}
    tolerance = {**TOLERANCE, "gradient": conditioned.get(family, TOLERANCE["gradient"])}
    for name, cell in row.items():
        assert bool(cell.refused) is not trains, f"{name}: {cell}"
        assert trains or "cp_size=2 is not supported for" in cell.refused, cell.refused
        assert all(getattr(cell, kind) <= most for kind, most in tolerance.items()), f"{name}: {cell}"
    known = ROWS.setdefault(family, as_record(family, {}))
    known["cells"] |= as_record(family, row)["cells"]


def check_row(family: str, row: dict[str, Cell]) -> None:
    refused, sentence = REFUSED.get(family, (set(), ""))
    tolerance = {**TOLERANCE, "gradient": ILL_CONDITIONED.get(family, TOLERANCE["gradient"])}
    for name, cell in row.items():
        assert bool(cell.refused) == (name in refused), f"{name}: {cell}"
        assert not cell.refused or sentence in cell.refused, cell.refused
        assert all(getattr(cell, kind) <= most for kind, most in tolerance.items()), f"{name}: {cell}"
    assert ROUND_TRIP in row


def test_every_type_with_a_plan_has_a_tiny_config() -> None:
    planned = set(planned_types())
    assert planned >= FAMILIES.keys() and not planned & UNPLANNED.keys()
    assert not planned - KNOWN.keys(), (
        "transformers declares a plan for these types: add a tiny config of each to tests/families.json, so that the "
        "table says whether it works."
    )


def test_families_that_run_by_default_need_what_all_need() -> None:
    """Every family is built without weights, and its plan is found: one that changes has to run."""
    needed: dict[str, set[tuple[Any, ...]]] = {}
    for family in KNOWN:
        try:
            needed[family] = mechanisms(family)
        except ImportError as error:
            assert NO_STOCK.get(family, "nothing") in str(error)
    run = set[tuple[Any, ...]]().union(*(found for family, found in needed.items() if family in BY_DEFAULT))
    missing = {family: found - run for family, found in needed.items() if found - run}
    assert not missing, f"add one family for each of these to BY_DEFAULT: {missing}"


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mamba2"])
def test_a_wrong_reduction_cannot_pass(pool: WorkerPool, tmp_path: Path, family: str) -> None:
    """Gradients that are parts on each tensor-parallel rank, and are not summed."""
    path = tmp_path / "reference.pt"
    torch.save(reference(family, ONE_STEP), path)
    layouts = [{**COLUMNS[name], "wrong": True} for name in ("tp 2 sp",)]
    for rank in pool.run(2, compare, family, str(path), layouts, {}):
        for errors in rank:
            assert errors["gradient"] > 1000 * TOLERANCE["gradient"] and errors["norm"] > TOLERANCE["norm"]


@pytest.mark.parametrize(
    "family", [name for name in ("inkling2_text", "inkling2_loop_text", "minimax") if name in KNOWN]
)
def test_layers_that_stock_keeps_in_fp32(pool: WorkerPool, family: str) -> None:
    """A model with all its weights in bfloat16 computes, though its stock code hands fp32 to some layers."""
    ((rounded, exact),) = pool.run(1, losses_by_precision, family)
    assert rounded == pytest.approx(exact, rel=1e-2)


def losses_by_precision(family: str) -> tuple[float, float]:
    from hf_nanotron.models.moe.routers import find_routers, fp32_router
    from hf_nanotron.models.sharding.parallelize import parallelize
    from hf_nanotron.parallel.mesh import ParallelMesh

    batch = {"input_ids": torch.arange(3, 35).view(2, 16), "labels": torch.arange(3, 35).view(2, 16)}
    mesh = ParallelMesh(ParallelConfig())
    model = parallelize(tiny_model(family), mesh).train()
    for router in find_routers(model):  # as the trainer does
        fp32_router(router)
    exact = float(model(**batch, use_cache=False).loss)
    rounded = model.to(torch.bfloat16)(**batch, use_cache=False).loss
    rounded.backward()
    mesh.close()
    return float(rounded), exact


@pytest.mark.skipif("codegen" in UNPLANNED, reason="this transformers declares no plan for CodeGen")
def test_a_projection_in_parts_is_cut_between_them() -> None:
    """CodeGen stores queries, keys and values in four parts, whatever the number of heads."""
    with torch.device("meta"):
        model = tiny_model("codegen", n_head=8, n_embd=128)
    anatomy = dissect(model)
    sizes: dict[str, Any] = {"tp_rank": 0, "ep_size": 1, "parallel": ParallelConfig()}
    assert tensor_specs(anatomy, SimpleNamespace(tp_size=4, **sizes), make_plan(anatomy, 4, 1))
    with pytest.raises(ValueError, match=r"tp_size=8 does not divide the 4 parts .* must be one of \[1, 2, 4\]"):
        tensor_specs(anatomy, SimpleNamespace(tp_size=8, **sizes), make_plan(anatomy, 8, 1))


# ---- docs/adding_a_family.md ----

GUIDE = Path(__file__).parent.parent / "docs" / "adding_a_family.md"


def test_the_guides_example_is_cut(pool: WorkerPool) -> None:
    code = GUIDE.read_text().split("```python\n")[1].split("```")[0]
    for loss, expected, is_cut in pool.run(2, _cut_example, code):
        assert is_cut and loss == pytest.approx(expected, rel=1e-6)


def _cut_example(code: str) -> tuple[float, float, bool]:
    from hf_nanotron.models.sharding.parallelize import parallelize
    from hf_nanotron.parallel.mesh import ParallelMesh

    scope: dict[str, Any] = {"__name__": "example"}
    exec(code, scope)
    ids = torch.arange(16).view(2, 8)
    model = scope["model"]
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    mesh = ParallelMesh(ParallelConfig(tp_size=2))
    try:
        cut = parallelize(model, mesh).eval()
        inner = cut.get_submodule("model.layers.1.mlp.narrow")
        with torch.no_grad():
            loss = float(cut(input_ids=ids, labels=ids).loss)
        return loss, expected, inner.weight.shape == (64, 64)
    finally:
        mesh.close()


def test_a_block_that_would_count_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its row, the shared expert of Qwen2 MoE is whole inside a block whose outputs are summed."""
    with torch.device("meta"):
        model = tiny_model("qwen2_moe")
    anatomy = dissect(model)
    assert make_plan(anatomy, tp_size=2, ep_size=1).regions
    monkeypatch.delitem(families.SHARDING, "Qwen2MoeSparseMoeBlock")
    with pytest.raises(ValueError, match="shared_expert.down_proj' is replicated") as refusal:
        make_plan(anatomy, tp_size=2, ep_size=1)
    assert " ".join(str(refusal.value).split()) in " ".join(GUIDE.read_text().replace("\n> ", " ").split())


def test_register_plan_refuses_an_unknown_style() -> None:
    with pytest.raises(ValueError, match="'sideways' is not one of colwise, heads"):
        register_plan("LlamaMLP", {"up_proj": "sideways"})


def test_the_page_names_every_other_type() -> None:
    """What neither declares a plan nor has rows is said to train with data parallelism alone."""
    page = (Path(__file__).parent / "families_notes.md").read_text()
    named = set(re.findall(r"[\w-]+", page.split("## Data parallelism alone")[1]))
    assert not MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - KNOWN.keys() - named

"""The table of families: its columns, how a row is made, and `docs/families.md`.

The layouts of two axes take two optimizer steps, the others one, of fewer micro-batches: they differ in the gradients,
not in what follows.
"""

from __future__ import annotations

import functools
import json
import platform
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from family_runs import FAMILIES, KNOWN, compare, reference, tiny_model
from pool import WorkerPool
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_nanotron.models.stock.anatomy import dissect
from hf_nanotron.models.stock.plan import make_plan, mixes_tokens
from hf_nanotron.parallel.cp.attention import MODES as CP_MODES

WHOLE: dict[str, Any] = {"sequence_parallel": False}
ONE_STEP, TWO_STEPS = (2,), (2, 2)  # micro-batches of each
ONE: dict[str, Any] = {"micro_batches": ONE_STEP}
TWO: dict[str, Any] = {"micro_batches": TWO_STEPS}
DENSE: dict[str, dict[str, Any]] = {
    "tp 2 sp": {"tp_size": 2, **ONE},
    "tp 2": {"tp_size": 2, **WHOLE, **ONE},
    "pp 2": {"pp_size": 2, **ONE},
    "tp 2 pp 2 sp": {"tp_size": 2, "pp_size": 2, **TWO},
    "tp 2 pp 2": {"tp_size": 2, "pp_size": 2, **WHOLE, **ONE},
    "tp 4": {"tp_size": 4, **WHOLE, **ONE},
}
SPARSE: dict[str, dict[str, Any]] = {
    "ep 2": {"ep_size": 2, **ONE},
    "ep 2 tp 2 pp 2": {"ep_size": 2, "tp_size": 2, "pp_size": 2, **TWO},
}
COLUMNS = {**DENSE, **SPARSE}
# Documents of a row; over two ranks, by the worse of both `cp_mode`s. Of other tests than the columns above.
CONTEXT: dict[str, tuple[int, ...]] = {"cp 2": (22,), "cp 2 packed": (9, 1, 12)}
ROUND_TRIP = "Hub round trip"
SAVED = ("tp 2 pp 2 sp", "ep 2 tp 2 pp 2", "tp 2", "pp 2")  # what saves; the last two where the first is refused
PLANS = ("base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan")


@dataclass
class Cell:
    """One family under one layout: relative errors, or the sentence with which every rank refused it."""

    refused: str = ""
    loss: float = 0.0
    norm: float = 0.0
    gradient: float = 0.0


def planned_types() -> list[str]:
    """Model types with a causal LM whose config, or that of its text model, declares a plan, as transformers says."""
    found = []
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = CONFIG_MAPPING[kind]
        text = [part for name, part in (config.sub_configs or {}).items() if "text" in name or name == "llm_config"]
        if any(getattr(part, plan, None) for part in (config, *text) for plan in PLANS):
            found.append(kind)
    return found


@functools.cache
def describe(family: str) -> dict[str, Any]:
    """What the plan makes of a family's blocks.

    Returns:
        `"attention"`: how many blocks that mix tokens are sharded, `"mixing"`: of how many; `"whole"`: classes of those
        left whole; `"experts"`: whether it has any.
    """
    with torch.device("meta"):
        model = tiny_model(family)
    anatomy = dissect(model)
    mixing = [(path, type(block).__name__) for path, block in anatomy.blocks() if mixes_tokens(block)]
    try:
        regions = make_plan(anatomy, 2, 1).regions
    except ValueError:
        regions = ()
    return {
        "attention": sum(path in regions for path, _ in mixing),
        "mixing": len(mixing),
        "whole": sorted({name for path, name in mixing if path not in regions}),
        "experts": any("expert" in name for name, _ in model.named_parameters()),
    }


def make_row(pool: WorkerPool, family: str, columns: list[str], folder: Path) -> dict[str, Cell]:
    """A family under `columns`, and the round trip of what some of them saved.

    Raises:
        AssertionError: if ranks disagree about a refusal, or the Hub files differ from those that stock writes.
    """
    path = folder / "reference.pt"
    asked = {COLUMNS[name]["micro_batches"] for name in columns}
    torch.save({numbers: reference(family, numbers) for numbers in asked}, path)
    row: dict[str, Cell] = {}
    for ranks in sorted({ranks_of(name) for name in columns}, reverse=True):
        names = [name for name in columns if ranks_of(name) == ranks]
        saves = [name for name in names if name in (SAVED if any(c.refused for c in row.values()) else SAVED[:2])]
        layouts = [{**COLUMNS[name], **({"save": name} if name in saves else {})} for name in names]
        by_rank = pool.run(ranks, compare, family, str(path), layouts, {}, str(folder))
        for index, name in enumerate(names):
            results = [rank[index] for rank in by_rank]
            if isinstance(results[0], str):
                assert all(result == results[0] for result in results), f"{name}: {results}"
                row[name] = Cell(refused=results[0])
            else:
                row[name] = Cell(**{kind: max(result[kind] for result in results) for kind in results[0]})
    for saved in sorted(folder.glob("*/config.json")):
        _check_round_trip(family, saved.parent)
        row[ROUND_TRIP] = Cell()
    return row


def make_context_cells(pool: WorkerPool, family: str, folder: Path, trains: bool) -> dict[str, Cell]:
    """A family whose rows two ranks share. `trains`: whether it is to be compared, rather than refused."""
    path = folder / "context.pt"
    torch.save({rows: reference(family, ONE_STEP, rows) if trains else None for rows in CONTEXT.values()}, path)
    modes = CP_MODES if trains else CP_MODES[:1]
    asked = [(name, {"cp_size": 2, "cp_mode": mode, "documents": CONTEXT[name]}) for name in CONTEXT for mode in modes]
    by_rank = pool.run(2, compare, family, str(path), [{**layout, **ONE} for _, layout in asked], {})
    row: dict[str, Cell] = {name: Cell() for name in CONTEXT}
    for (name, _), *results in zip(asked, *by_rank, strict=True):
        if isinstance(results[0], str):
            assert all(result == results[0] for result in results), f"{name}: {results}"
            row[name].refused = results[0]
        else:
            errors = [asdict(row[name]), *results]
            row[name] = Cell(**{kind: max(error[kind] for error in errors) for kind in results[0]})
    return row


def ranks_of(column: str) -> int:
    """How many ranks a column needs; expert parallelism takes the place of data or tensor parallelism."""
    sizes = COLUMNS[column]
    model = sizes.get("tp_size", 1) * sizes.get("pp_size", 1)
    return int(max(model, sizes.get("ep_size", 1)))


def _check_round_trip(family: str, folder: Path) -> None:
    stock = tiny_model(family)  # its class: AutoModelForCausalLM cannot load what some types save
    loaded, info = type(stock).from_pretrained(folder, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], f"{folder.name}: {problem} {info[problem]}"
    expected, state = stock.state_dict(), loaded.state_dict()
    assert state.keys() == expected.keys()
    if any(not torch.equal(state[name], tensor) for name, tensor in expected.items()):
        stock.save_pretrained(folder / "stock")  # a few classes change what they load, such as a padding row
        expected = type(stock).from_pretrained(folder / "stock").state_dict()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), f"{folder.name}: {name}"


# ---- the page ----

HEADER = """# Families

Every causal-LM type of transformers {release} for which a tensor-, pipeline- or expert-parallel plan is
declared, and those that the tables of `models/stock/families.py` add. A tiny model of each trains under each layout,
and its loss, its gradient norm and every gradient are compared with stock transformers in one process.

Made with Python {python}, gloo on two CPU cores, in fp32. To make it anew:

```
pytest tests/test_families.py --full-matrix --write-families
```

The columns run on as many ranks as they need (two data-parallel ones for "ep 2"). *sp* is sequence parallelism. In
"tp 4" there are more ranks than key-value heads for families with grouped heads. *Hub round trip*: saved under a
layout, loaded by stock `from_pretrained`, every weight bit-equal to what stock saves and loads. In "cp 2" two ranks
share each row of one document, in "cp 2 packed" each row of three, in both modes of context parallelism. The gradient
error is a family's largest over all columns, parameters and steps, of the norm of the gradient's error, relative to
the norm of the gradient plus 1e-4 of the global norm. "Attention" counts the token-mixing blocks of the tiny model
that are cut over the ranks; each rank computes the others whole.

`gemma3n` has no row: stock transformers builds it with timm alone. Its text model is the row `gemma3n_text`.
"""


def _kind(row: dict[str, Any], column: str) -> str:
    cell = row["cells"].get(column)
    if cell is None:
        return "n.a." if column in SPARSE and not row["experts"] else "not run"
    return "refused" if cell["refused"] else "ok"


def counts(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Lines that count the cells of each column."""
    lines = []
    for name in (*COLUMNS, *CONTEXT, ROUND_TRIP):
        kinds = Counter(_kind(row, name) for row in rows.values())
        lines.append(
            f"{name:16s} " + ", ".join(f"{kinds[k]} {k}" for k in ("ok", "refused", "n.a.", "not run") if kinds[k])
        )
    return lines


def as_record(family: str, row: dict[str, Cell]) -> dict[str, Any]:
    return {**describe(family), "cells": {name: asdict(cell) for name, cell in row.items()}}


def write_page(results: Path, rows: dict[str, dict[str, Any]], page: Path, date: str) -> None:
    """Add `rows` to those of earlier runs in `results`, and write `page` from all.

    A row without a column keeps what an earlier run has found, with the versions of most columns.
    """
    versions = f"on {date} with torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    merged = json.loads(results.read_text()) if results.exists() else {}
    for name, row in rows.items():
        before = merged.get(name, {"cells": {}})
        is_partial = before["cells"].keys() - CONTEXT.keys() - row["cells"].keys()
        row["made"] = before["made"] if is_partial else versions
        merged[name] = {**row, "cells": {**before["cells"], **row["cells"]}}
    results.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")
    page.write_text(render({name: merged[name] for name in KNOWN if name in merged}))


def _made_with(rows: dict[str, dict[str, Any]]) -> str:
    """When, and with which versions, the rows were made: the largest group first, the others by name."""
    groups: dict[str, list[str]] = {}
    for name, row in rows.items():
        groups.setdefault(row["made"], []).append(name)
    first, *others = sorted(groups, key=lambda made: -len(groups[made]))
    lines = [f"Rows were made {first}" + ("; those of other runs:" if others else "."), ""]
    lines += [f"- {made}: {', '.join(f'`{name}`' for name in groups[made])}" for made in others]
    return "\n".join(lines).rstrip() + "\n"


def render(rows: dict[str, dict[str, Any]]) -> str:
    reasons: dict[str, int] = {}
    parts = [
        HEADER.format(
            release=transformers.__version__,
            python=platform.python_version(),
        ),
        _made_with(rows),
        "\n## Counts\n",
        "Families with a declared plan:\n",
        "```\n" + "\n".join(counts({k: v for k, v in rows.items() if k in FAMILIES})) + "\n```\n",
        "Families that the tables add:\n",
        "```\n" + "\n".join(counts({k: v for k, v in rows.items() if k not in FAMILIES})) + "\n```\n",
    ]
    for title, is_planned in (("Families with a declared plan", True), ("Families that the tables add", False)):
        parts.append(f"## {title}\n")
        names = (*COLUMNS, *CONTEXT, ROUND_TRIP)
        parts.append("| family | attention | MoE | " + " | ".join(names) + " | gradient error |")
        parts.append("|---|---|---|" + "---|" * len(names) + "---|")
        for family, row in rows.items():
            if (family in FAMILIES) == is_planned:
                parts.append(_line(family, row, names, reasons))
        parts.append("")
    parts.append("## Refusals\n")
    parts += [f"{number}. {reason}" for reason, number in reasons.items()]
    parts.append("")
    parts.append(_whole_section(rows))
    parts.append((Path(__file__).parent / "families_notes.md").read_text())
    return "\n".join(parts).rstrip() + "\n"


def _line(family: str, row: dict[str, Any], names: tuple[str, ...], reasons: dict[str, int]) -> str:
    cells = []
    for name in names:
        kind = _kind(row, name)
        if kind == "refused":
            reason = row["cells"][name]["refused"]
            kind = f"refused ({reasons.setdefault(reason, len(reasons) + 1)})"
        cells.append(kind)
    worst = max((cell["gradient"] for cell in row["cells"].values()), default=0.0)
    attention = f"{row['attention']} of {row['mixing']}" if row["mixing"] else "none"
    return f"| {family} | {attention} | {'yes' if row['experts'] else ''} | {' | '.join(cells)} | {worst:.0e} |"


def _whole_section(rows: dict[str, dict[str, Any]]) -> str:
    owners: dict[str, list[str]] = {}
    for family, row in rows.items():
        for name in row["whole"]:
            owners.setdefault(name, []).append(family)
    lines = ["## Blocks that mix tokens and stay whole\n", "| block | families |", "|---|---|"]
    return "\n".join(lines + [f"| `{name}` | {', '.join(owners[name])} |" for name in sorted(owners)]) + "\n"

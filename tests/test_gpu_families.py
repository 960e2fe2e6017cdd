"""Families through the Trainer on GPUs, in bf16, beside stock Trainer: `family_walk.py`.

By default those whose blocks are unlike others, and those that were wrong once; with `--full-matrix` all in all modes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch
from family_runs import KNOWN
from family_walk import MODES, summary, walk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BY_DEFAULT = ("llama", "qwen3_moe", "gemma4_text", "jamba", "minimax", "laguna", "lfm3")
MODES_BY_DEFAULT = ("default", "fp8")


def test_families_on_gpus(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    everything = pytestconfig.getoption("full_matrix")
    families, modes = (KNOWN, MODES) if everything else (BY_DEFAULT, MODES_BY_DEFAULT)
    workers = max(1, min(32, (os.cpu_count() or 1) - 2, len(families) * len(modes)))
    cli = argparse.Namespace(out=tmp_path / "walk.jsonl", workers=workers, compile=None, limit=300.0, seconds=1e9)
    rows = walk([(family, mode) for mode in modes for family in families if family in KNOWN], cli)
    print(summary(rows))
    wrong = [row for row in rows if row["state"] in ("off", "failed")]
    assert not wrong, summary(rows)
    assert len(rows) == len(modes) * len([family for family in families if family in KNOWN])

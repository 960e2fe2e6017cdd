"""`hf-nanotron coordinate-check`: what a few steps change is of one size at every width, on one rank and on two."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from family_runs import KNOWN
from pool import WorkerPool
from tiny import message

from hf_nanotron.cli.coordinate_check import slope
from hf_nanotron.cli.main import build_parser

SHARED = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3}
SHARED |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
HEADS = {"intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama": HEADS,
    "qwen3": HEADS,
    "gemma": HEADS,
    "mixtral": {**HEADS, "intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16},
}
BATCH = ["--rows", "4", "--sequence-length", "32"]


def write(folder: str, family: str, tp_size: int = 1, **training: Any) -> None:
    """The file of a run."""
    fields = {"output_dir": folder, "learning_rate": 4e-3, "adam_beta2": 0.95, "use_cpu": True, "tp_size": tp_size}
    fields |= {"parametrization": "spectral", "base_hidden_size": 64, "seed": 0, **training}
    # Matrices of the base have entries of fan_in^-1/2, as the spectral condition wants.
    config = {"model_type": family, **SHARED, "initializer_range": 0.125, **MODELS[family]}
    text = yaml.safe_dump({"model": {"config": config, "dtype": "float32"}, "training": fields})
    Path(folder, "run.yaml").write_text(text)


def run(folder: str, options: list[str]) -> dict[str, Any]:
    """The JSON that the command writes, on the first rank of a job."""
    path, out = Path(folder, "run.yaml"), Path(folder, "out.json")
    args = build_parser().parse_args(["coordinate-check", str(path), "--json", str(out), *options])
    args.run(args)
    is_first = os.environ.get("RANK", "0") == "0"
    found: dict[str, Any] = json.loads(out.read_text()) if is_first else {}
    return found


def test_slopes_of_a_small_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(str(tmp_path), "llama")
    found = run(str(tmp_path), ["--widths", "64", "256", "--seeds", "1", *BATCH])
    spectral, standard = (found[name]["slopes"] for name in ("spectral", "standard"))
    assert list(spectral) == ["embedding", "layer 0", "layer 1", "layer 2", "logits"]
    assert max(map(abs, spectral.values())) <= 0.1
    assert min(standard[f"layer {index}"] for index in range(3)) > 0.5
    assert "largest slope" in capsys.readouterr().out


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("family", MODELS)
def test_slopes(family: str, tp_size: int, pool: WorkerPool, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """At every layer and the logits at most 0.1."""
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    write(str(tmp_path), family, tp_size)
    found = pool.run(tp_size, run, str(tmp_path), ["--widths", "64", "128", "256", "512", "--seeds", "2", *BATCH])[0]
    slopes = found["spectral"]["slopes"]
    assert max(map(abs, slopes.values())) <= 0.1, slopes
    others = [value for place, value in found["standard"]["slopes"].items() if place.startswith(("layer", "logits"))]
    assert max(others) > 0.3


@pytest.mark.parametrize("family", ["inkling_text", "gemma3"])
def test_configs_of_another_form(tmp_path: Path, family: str) -> None:
    """One that does not say whether the head is tied, and one whose text has a config of its own."""
    if family not in KNOWN:
        pytest.skip("this transformers does not know the type")
    values = {"output_dir": str(tmp_path), "use_cpu": True, "learning_rate": 4e-3}
    model = {"config": {"model_type": family, **KNOWN[family]["config"]}, "dtype": "float32"}
    Path(tmp_path, "run.yaml").write_text(yaml.safe_dump({"model": model, "training": values}))
    found = run(str(tmp_path), ["--seeds", "1", "--steps", "1", "--rows", "2", "--sequence-length", "8"])
    assert found["standard"]["widths"] == [64, 128, 256] and "logits" in found["standard"]["changes"]


def test_slope_is_that_of_a_line() -> None:
    assert slope([64, 128, 256], [1.0, 2.0, 4.0]) == pytest.approx(1.0)
    assert slope([64, 128, 256], [3.0, 3.0, 3.0]) == 0.0


@pytest.mark.parametrize(
    ("options", "training", "says"),
    [
        (["--widths", "64"], {}, "two or more different hidden sizes"),
        (["--steps", "0"], {}, "--steps 0 must be at least 1"),
        (["--widths", "64", "96"], {"base_sizes": {"num_key_value_heads": 2}}, "so its size at other widths"),
        (["--plot", "widths.txt"], {}, "must end with .png"),
    ],
)
def test_options_are_refused(tmp_path: Path, options: list[str], training: dict[str, Any], says: str) -> None:
    write(str(tmp_path), "llama", **training)
    assert says in message(lambda: run(str(tmp_path), options))

"""`from_config` gives every tensor what stock transformers would give it, and leaves none uninitialised."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from family_runs import FAMILIES
from pool import WorkerPool
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM as StockAuto

from hf_nanotron import AutoModelForCausalLM, ParallelConfig
from hf_nanotron.models import auto
from hf_nanotron.models.sharding import initialize

OTHERS: dict[str, dict[str, Any]] = {  # whose modules set tensors of their children
    "gpt2": {"n_embd": 64, "n_layer": 8, "n_head": 4, "vocab_size": 128},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 128, "state_size": 8},
}


def config_of(family: str) -> Any:
    values = OTHERS[family] if family in OTHERS else FAMILIES[family]["config"]
    return AutoConfig.for_model(family, **values)


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def poison(tensor: torch.Tensor) -> None:
    """What no initialisation gives."""
    tensor.data.fill_(torch.nan if tensor.is_floating_point() else 1 if tensor.dtype == torch.bool else 77)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that `from_config` allocates is full of NaN, and 65 elements make a large tensor."""
    to_empty = torch.nn.Module.to_empty

    def to_poison(self: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
        module = to_empty(self, **kwargs)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                poison(tensor)
        return module

    def materialise(model: Any, device: torch.device) -> None:
        initialize.materialise(model, device)
        for tensor in tensors_of(model).values():
            poison(tensor)

    monkeypatch.setattr(torch.nn.Module, "to_empty", to_poison)
    monkeypatch.setattr(auto, "materialise", materialise)
    monkeypatch.setattr(initialize, "SMALL", 64)


ONCE_WRONG = {"apertus", "gemma3", "gemma3n_text", "gpt2", "phi4_multimodal", "qwen3_5_moe", "qwen3_next", "qwen4_exp"}


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_every_tensor_is_initialised_as_stock_does(family: str, poisoned: None, pytestconfig: pytest.Config) -> None:
    """Constants are equal; random values have the same mean and spread, within what chance allows.

    A third of the families, and those that once failed; all with `--full-matrix`.
    """
    chosen = [*FAMILIES, *OTHERS].index(family) % 3 == 0 or family in ONCE_WRONG
    if not chosen and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    try:
        torch.manual_seed(0)
        stock = StockAuto.from_config(config_of(family), dtype=torch.float32)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
    model = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32)
    expected, found = tensors_of(stock), tensors_of(model)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert not tensor.is_floating_point() or not tensor.isnan().any(), f"{name} {tuple(tensor.shape)} has no values"
    samples: dict[str, list[str]] = {}  # tensors of all layers -> their names
    for name, tensor in found.items():
        if not torch.equal(tensor, expected[name]):
            assert tensor.is_floating_point(), name
            samples.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    for names in samples.values():
        ours, theirs = (torch.cat([tensors[n].flatten() for n in names]) for tensors in (found, expected))
        # Two samples of one distribution: their means and spreads differ by a few standard errors.
        error, spread = 8 / ours.numel() ** 0.5, theirs.std().item()
        assert ours.numel() >= 8 and spread > 0, (names, ours, theirs)
        assert abs(ours.mean() - theirs.mean()) <= error * spread, (names, ours.mean(), theirs.mean())
        assert abs(ours.std().item() / spread - 1) <= error, (names, ours.std(), spread)
    for name, module in model.named_modules():
        for leaf, value in vars(module).items():
            assert not (isinstance(value, torch.Tensor) and value.is_meta), f"{name}.{leaf}"


def save_fresh(family: str, directory: str, sizes: dict[str, Any]) -> None:
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # that of rank 0 counts
    model = AutoModelForCausalLM.from_config(config_of(family), ParallelConfig(**sizes), dtype=torch.float32)
    model.save_pretrained(directory)
    model.mesh.close()


@pytest.mark.parametrize("family", ["apertus", "qwen3_next", "gemma3n_text"])
def test_every_topology_has_the_same_values(pool: WorkerPool, tmp_path: Path, family: str) -> None:
    """Also those that a constructor gives (apertus), or the module around (qwen3_next); also parts of every stage."""
    pool.run(1, save_fresh, family, str(tmp_path / "one"), {})
    pool.run(4, save_fresh, family, str(tmp_path / "four"), {"tp_size": 2, "pp_size": 2})
    one, four = (
        {name: tensor for path in (tmp_path / which).glob("*.safetensors") for name, tensor in load_file(path).items()}
        for which in ("one", "four")
    )
    torch.testing.assert_close(four, one, rtol=0, atol=0)

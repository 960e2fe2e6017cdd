"""`optim="muon"` on every layout against `torch.optim.Muon` and `torch.optim.AdamW` in one process."""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from family_runs import tiny_model
from muon_runs import differences, in_fp32, run, stock_losses
from pool import WorkerPool
from tiny import checkpoint, message, pad_batch, random_dataset, training_arguments
from torch import nn

from hf_nanotron import (
    AutoModelForCausalLM as NanotronAuto,
    MatrixOptimizer,
    NanotronTrainer,
    NanotronTrainingArguments,
)
from hf_nanotron.cli.settings import check_complete, read_settings
from hf_nanotron.ops.newton_schulz import COEFFICIENTS, SCALES, iterate_gram, orthogonalize
from hf_nanotron.optim.muon import Muon

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "muon"
TWO_LAYERS = {"num_hidden_layers": 2}
TIED = {**TWO_LAYERS, "tie_word_embeddings": True}
INTERLEAVED = {"pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2}

# Ranks, family, layouts, scale, overrides of the config; the first rows by default, all with --full-matrix.
CASES: dict[str, tuple[int, str, list[dict[str, Any]], str, dict[str, Any]]] = {
    "dense, two ranks": (
        2,
        "llama",
        [{"tp_size": 2}, {"zero_stage": 3}, {"zero_stage": 0}, {"pp_size": 2}],
        "match_rms_adamw",
        TWO_LAYERS,
    ),
    "tied, four ranks": (
        4,
        "llama",
        [{"tp_size": 4}, {"tp_size": 2, "zero_stage": 3}, {"tp_size": 2, "pp_size": 2, **INTERLEAVED}],
        "original",
        {"tie_word_embeddings": True},
    ),
    "experts": (
        2,
        "qwen3_moe",
        [{"ep_size": 2}, {"tp_size": 2, "ep_size": 2}, {"zero_stage": 3}],
        "original",
        TWO_LAYERS,
    ),
    "replicas": (
        4,
        "llama",
        [
            {"dp_replicate_size": 2},
            {"dp_replicate_size": 2, "zero_stage": 3},
            {"cp_size": 2, "zero_stage": 2},
            {"tp_size": 2, "cp_size": 2},
            {"pp_size": 2, "pp_schedule": "zb"},
            {"pp_size": 2, "zero_stage": 3},
        ],
        "match_rms_adamw",
        TIED,
    ),
    "experts, four ranks": (
        4,
        "qwen3_moe",
        [
            {"ep_size": 2},
            {"ep_size": 4, "tp_size": 2, "zero_stage": 3},
            {"ep_size": 2, "pp_size": 2},
            {"tp_size": 4},
            {"ep_size": 2, "dp_replicate_size": 2},
        ],
        "match_rms_adamw",
        TWO_LAYERS,
    ),
    "experts stored transposed": (
        2,
        "gpt_oss",
        [{"tp_size": 2}, {"ep_size": 2}, {"zero_stage": 3}],
        "match_rms_adamw",
        TWO_LAYERS,
    ),
    "spectral": (2, "llama", [{"tp_size": 2}, {"zero_stage": 1}], "spectral", TWO_LAYERS),
    "transposed layers": (2, "gpt2", [{"zero_stage": 1}, {"pp_size": 2}], "match_rms_adamw", {"n_layer": 2}),
}
DEFAULT = ("dense, two ranks", "tied, four ranks", "experts")


def only_if_torch_has(scale: str) -> None:
    if scale == "spectral" and torch.__version__ < "2.14":
        pytest.skip("torch.optim.Muon has this scale from torch 2.14 on")


def only_in_full(chosen: bool, config: pytest.Config) -> None:
    if not chosen and not config.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")


@pytest.mark.parametrize("fp32", [True, False], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_layouts_are_torchs(pool: WorkerPool, case: str, fp32: bool, pytestconfig: pytest.Config) -> None:
    """Three steps from the same gradients, one of which is skipped: bit for bit the weights of torch's optimizers.

    In bfloat16, Newton-Schulz is torch's as it is; in fp32, torch's code without its cast.
    """
    only_in_full(case in DEFAULT and fp32, pytestconfig)
    world, family, layouts, scale, overrides = CASES[case]
    only_if_torch_has(scale)
    for errors in pool.run(world, differences, family, layouts, scale, fp32, overrides):
        assert errors == [{} for _ in layouts]


@pytest.mark.parametrize("family", ["phi3", "mamba2"])
def test_fused_weights_are_taken_apart(pool: WorkerPool, family: str, pytestconfig: pytest.Config) -> None:
    """Queries, keys and values, gates and ups, the layers of a Mamba: each as a matrix of its own.

    The factors of unlike parts of one weight are applied in two products, which costs the last bit.
    """
    only_in_full(family == "phi3", pytestconfig)
    only_if_torch_has("spectral")
    layouts = [{"tp_size": 2}, {"zero_stage": 3}]
    for errors in pool.run(2, differences, family, layouts, "spectral", True, TWO_LAYERS):
        for of_layout in errors:
            assert all("qkv_proj" in name or "in_proj" in name for name in of_layout)
            assert max(of_layout.values(), default=0.0) < 1e-6


# ---- whole runs --------------------------------------------------------------------------------------------------

STEPS = 20
# Layout of a whole run -> its ranks and its data-parallel ranks.
RUNS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "tp 2 dp 2": (4, 2, {"tp_size": 2}),
    "one process": (1, 1, {}),
    "dp 4 zero 3": (4, 4, {"zero_stage": 3}),
    "tp 2 pp 2 interleaved": (4, 1, {"tp_size": 2, "pp_size": 2, **INTERLEAVED}),
    "pp 2 dp 2 zb": (4, 2, {"pp_size": 2, "pp_schedule": "zb", "zero_stage": 2}),
    "cp 2 dp 2": (4, 2, {"cp_size": 2}),
}


@functools.cache
def start() -> str:
    directory = tempfile.mkdtemp()
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("layout", RUNS)
def test_losses_are_torchs(pool: WorkerPool, tmp_path: Path, layout: str, pytestconfig: pytest.Config) -> None:
    """Through the trainer, with clipping, a schedule and decay: losses of stock `Trainer` with torch's optimizers."""
    only_in_full(layout == "tp 2 dp 2", pytestconfig)
    world, dp, sizes = RUNS[layout]
    expected = stock_losses(start(), random_dataset(96), gradient_accumulation_steps=4, max_steps=STEPS).losses
    losses = pool.run(world, run, start(), str(tmp_path), sizes, dp, None, {"max_steps": STEPS})[0]
    assert len(losses) == len(expected) == STEPS
    assert max(abs(a - b) / b for a, b in zip(losses, expected, strict=True)) < 2e-5


@pytest.mark.parametrize("resumed_on", ["dp 4 zero 3", "tp 2 pp 2 interleaved", "one process"])
def test_resume_on_other_layouts(
    pool: WorkerPool, tmp_path: Path, resumed_on: str, pytestconfig: pytest.Config
) -> None:
    only_in_full(resumed_on == "dp 4 zero 3", pytestconfig)
    world, dp, sizes = RUNS["tp 2 dp 2"]
    saves = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    losses = pool.run(world, run, start(), str(tmp_path / "a"), sizes, dp, None, saves)[0]
    world, dp, sizes = RUNS[resumed_on]
    source = str(tmp_path / "a" / "checkpoint-3")
    again = pool.run(world, run, start(), str(tmp_path / "b"), sizes, dp, source, saves)[0]
    assert max(abs(a - b) / b for a, b in zip(again, losses[3:], strict=True)) < 1e-5


# ---- the optimizer by itself -------------------------------------------------------------------------------------


def random_matrices(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((24, 16), (16, 24), (16, 16), (24, 16))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_of_whole_parameters_is_torchs(dtype: torch.dtype, nesterov: bool) -> None:
    ours, theirs = random_matrices(), random_matrices()
    values = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov, "ns_steps": 4}
    optimizer = Muon(ours, **values, matrix_dtype=dtype, batch_elements=700)
    reference = torch.optim.Muon(theirs, **values, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for parameters in (ours, theirs):
            for parameter, other in zip(parameters, random_matrices(step + 1), strict=True):
                parameter.grad = other.detach()
        optimizer.step()
        in_fp32(reference.step) if dtype == torch.float32 else reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(optimizer.state[a]["momentum_buffer"], reference.state[b]["momentum_buffer"])


def test_singular_values_are_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 40, 24), steps=5))
    assert values.min() > 0.6 and values.max() < 1.25


def test_long_matrices_are_iterated_on_their_gram_matrix() -> None:
    """What a GPU does in 16 bits is nearer to fp32 than the plain iteration in bfloat16 is, small values or not."""
    generator = torch.Generator().manual_seed(0)
    plain, low_rank = torch.randn(48, 160, generator=generator), torch.randn(48, 4, generator=generator)
    noise = 0.02 * torch.randn(48, 160, generator=generator)
    for matrix in (plain, low_rank @ torch.randn(4, 160, generator=generator) + noise, plain**5):
        batch = matrix[None]
        exact = orthogonalize(batch.clone())
        found, rounded = iterate_gram(batch.bfloat16(), 5, COEFFICIENTS).float(), orthogonalize(batch.bfloat16())
        assert (found - exact).norm() < (rounded.float() - exact).norm()
        assert torch.linalg.svdvals(found).max() < 1.25
        tall = iterate_gram(batch.mT.contiguous().bfloat16(), 5, COEFFICIENTS).float()
        assert (tall.mT - exact).norm() < (rounded.float() - exact).norm()


@pytest.mark.parametrize("steps", [3, 6, 12])
def test_any_number_of_steps(steps: int) -> None:
    """Rounding errors of the Gram matrix grow with the steps, so it is computed anew after three."""
    values = torch.logspace(-4, 0, 48)
    (u, _), (v, _) = (torch.linalg.qr(torch.randn(size, 48)) for size in (48, 160))
    batch = ((u * values) @ v.T)[None].bfloat16()
    exact = orthogonalize(batch.float(), steps)
    found, plain = iterate_gram(batch.clone(), steps, COEFFICIENTS).float(), orthogonalize(batch.clone(), steps).float()
    assert (found - exact).norm() < 1.2 * (plain - exact).norm()


def test_a_direction_must_be_there() -> None:
    with pytest.raises(TypeError, match="direction"):
        MatrixOptimizer([torch.nn.Parameter(torch.zeros(2, 2))])  # type: ignore[abstract]


class Polar(MatrixOptimizer):
    """A user's: the exact orthogonal factor."""

    def direction(self, matrices: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        u, _, v = torch.linalg.svd(matrices.float(), full_matrices=False)
        return (u @ v).to(matrices.dtype)


def test_an_optimizer_of_a_user() -> None:
    matrix, vector = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3))
    groups = [{"params": [matrix]}, {"params": [vector], "kind": "adamw"}]
    optimizer = Polar(groups, lr=0.1, weight_decay=0.0, momentum=0.0, nesterov=False, matrix_dtype=torch.float32)
    matrix.grad, vector.grad, before = torch.randn(6, 4), torch.ones(3), matrix.detach().clone()
    optimizer.step()
    step = (before - matrix.detach()) / 0.1
    torch.testing.assert_close(step.T @ step, torch.eye(4), atol=1e-5, rtol=0.0)
    assert list(optimizer.state[vector]) == ["step", "exp_avg", "exp_avg_sq"]
    with pytest.raises(ValueError, match="is no matrix"):
        vector_alone = Polar([vector])
        vector_alone.step()


def test_the_example(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A few steps of the script, and a real size whose keys are all known."""
    spec = importlib.util.spec_from_file_location("train", EXAMPLE / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module  # where dataclasses look up annotations
    spec.loader.exec_module(module)
    options = ["--max-steps", "2", "--per-device-train-batch-size", "1", "--output-dir", str(tmp_path)]
    assert 4.0 < module.main([*options, "--disable_tqdm", "True"]) < 7.0
    sections, _ = read_settings(EXAMPLE / "real_size.yaml", [])
    check_complete(sections)
    assert sections["training"]["optim"] == "muon"


# ---- arguments ---------------------------------------------------------------------------------------------------


def arguments(**overrides: Any) -> NanotronTrainingArguments:
    return NanotronTrainingArguments(**training_arguments(**overrides))


def test_the_name_survives() -> None:
    args = arguments(optim="muon", muon_scale="spectral", muon_learning_rate=0.02, optim_state_dtype="bfloat16")
    assert args.optim == "muon" and args.to_dict()["optim"] == "muon"
    args.check()
    assert NanotronTrainingArguments(**{**args.to_dict(), "hub_token": None}).optim == "muon"
    assert SCALES["spectral"](32, 8) == 2.0 and SCALES["original"](8, 32) == 1.0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"muon_scale": "spectral"}, "muon_scale='spectral' with optim='adamw_torch_fused': it is read by Muon alone"),
        ({"optim": "muon", "muon_scale": "rms"}, "muon_scale='rms' is not one of"),
        ({"optim": "muon", "muon_dtype": "float16"}, "muon_dtype='float16' is not one of"),
        ({"optim": "muon", "muon_scale": "original"}, "muon_scale='original' without muon_learning_rate"),
        ({"optim": "muon", "muon_momentum": 1.0}, "muon_momentum=1.0 must be"),
        ({"optim": "muon", "optim_offload": 1.0}, "optim_offload=1.0 with optim='muon'"),
        ({"optim": "muon", "optim_args": "eps=1e-5"}, "optim_args='eps=1e-5'"),
    ],
)
def test_refused(values: dict[str, Any], says: str) -> None:
    assert says in message(lambda: arguments(**values))


# ---- other settings on resume ------------------------------------------------------------------------------------


def resumed(output: Path, frozen: str = "lm_head", **overrides: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Parameter groups, and what is told, of a run that goes on from its first step (without `output`: begins)."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hf_nanotron.checkpoint.state.training_state")
    logger.addHandler(handler)
    saves = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    args = arguments(output_dir=str(output), **{**saves, "optim": "muon", "muon_learning_rate": 0.02, **overrides})
    model = NanotronAuto.from_pretrained(checkpoint(), parallel=args.parallel)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    trainer = NanotronTrainer(model=model, args=args, train_dataset=random_dataset(4), data_collator=pad_batch)
    try:
        trainer.train(resume_from_checkpoint=str(output / "checkpoint-1") if overrides else None)
    finally:
        logger.removeHandler(handler)
        model.mesh.close()
    assert trainer.optimizer is not None
    return trainer.optimizer.param_groups, told


def test_other_settings_on_resume_are_told(tmp_path: Path) -> None:
    """A run goes on with the numbers of its checkpoint, and says which of its own are others; not by another rule."""
    groups, _ = resumed(tmp_path)
    assert resumed(tmp_path, max_steps=2)[1] == []
    changes = {"weight_decay": 0.0, "muon_momentum": 0.5, "adam_beta2": 0.5, "muon_learning_rate": 0.1}
    again, told = resumed(tmp_path, max_steps=2, **changes)
    for one, other in zip(groups, again, strict=True):
        keys = ("weight_decay", "momentum", "betas", "initial_lr")
        assert [one.get(key) for key in keys] == [other.get(key) for key in keys]
    assert len(told) == 1 and "checkpoint-1 goes on with its own settings of the optimizer: " in told[0]
    assert "betas=[0.9, 0.999], not [0.9, 0.5]; learning rate=0.02, not 0.1; momentum=0.95, not 0.5;" in told[0]
    assert "weight_decay=0.1, not 0.0. For others" in told[0]
    assert resumed(tmp_path, max_steps=2, learning_rate=1e-4)[1] == []  # told of with the schedule
    said = message(lambda: resumed(tmp_path, max_steps=2, muon_scale="original"))
    assert "was written with scale='match_rms_adamw' of the optimizer, and this run has 'original'" in said
    said = message(lambda: resumed(tmp_path, frozen="model.norm", max_steps=2))
    assert "has no tensor 'lm_head.weight', which this run trains: it was frozen in the run that wrote it" in said

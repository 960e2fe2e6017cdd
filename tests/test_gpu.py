"""The parity table on GPUs, through NCCL; skips where there are none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

GPUS = torch.cuda.device_count()
HERE = Path(__file__).resolve().parent
ROWS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"torch_compile": True}),
    (2, {"torch_compile": True, "tp_size": 2}),
    (2, {"tp_size": 2}),
    (2, {"tp_size": 2, "sequence_parallel": False}),
    (2, {"zero_stage": 0}),
    (2, {"zero_stage": 1}),
    (2, {"zero_stage": 2}),
    (2, {"zero_stage": 3}),
    (2, {"pp_size": 2, "pp_schedule": "afab"}),
    (2, {"pp_size": 2}),
    (2, {"pp_size": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2}),
    (2, {"pp_size": 2, "pp_schedule": "zb"}),
    (2, {"pp_size": 2, "pp_schedule": "zb", "torch_compile": True}),
    (2, {"pp_size": 2, "pp_schedule": "zb", "pp_virtual_stages": 2, "gradient_checkpointing": True}),
    (4, {"pp_size": 2, "pp_schedule": "zb", "zero_stage": 2}),
    (4, {"tp_size": 2, "pp_size": 2}),
    (4, {"tp_size": 2}),
    (4, {"tp_size": 2, "zero_stage": 2}),
    (4, {"tp_size": 2, "zero_stage": 3}),
    (4, {"pp_size": 2}),
    (4, {"pp_size": 2, "zero_stage": 3}),
    (4, {"dp_replicate_size": 2}),
    (4, {"dp_replicate_size": 2, "zero_stage": 3}),
]
EXPERT_ROWS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"ep_size": 2}),
    (2, {"ep_size": 2, "zero_stage": 0}),
    (2, {"ep_size": 2, "zero_stage": 2}),
    (2, {"ep_size": 2, "zero_stage": 3}),
    (2, {"ep_size": 2, "tp_size": 2}),
    (2, {"ep_size": 2, "tp_size": 2, "sequence_parallel": False}),
    (2, {"tp_size": 2}),
    (2, {"pp_size": 2}),
    (2, {"pp_size": 2, "pp_schedule": "zb"}),
    (4, {"ep_size": 2, "tp_size": 2}),
    (4, {"ep_size": 4, "zero_stage": 3}),
    (4, {"ep_size": 2, "pp_size": 2}),
]
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
ROUTERS = {"output_router_logits": True, "router_aux_loss_coef": 0.1}


def launch(world: int, *arguments: str) -> None:
    """Run this file on `world` GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command += [str(Path(__file__).resolve()), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])}
    subprocess.run(command, check=True, timeout=300, env=environment)


def generate(directory: str, sizes: dict[str, Any]) -> None:
    """What torchrun starts: greedy and sampled tokens of every rank."""
    from transformers import set_seed

    from hf_nanotron import AutoModelForCausalLM, ParallelConfig

    model = AutoModelForCausalLM.from_pretrained(directory, ParallelConfig(**sizes))
    prompt = torch.tensor([[5, 17, 31, 8]], device=model.mesh.device)
    greedy = model.generate(prompt, max_new_tokens=12, do_sample=False)
    set_seed(int(os.environ["RANK"]))  # the ranks of one model must agree all the same
    sampled = model.generate(prompt, max_new_tokens=12, do_sample=True)
    tokens = {"greedy": greedy.tolist(), "sampled": sampled.tolist()}
    Path(directory, f"tokens-{os.environ['RANK']}.json").write_text(json.dumps(tokens))


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"pp_size": 2}], ids=["tp2", "pp2"])
def test_generation_on_gpus(sizes: dict[str, Any], tmp_path: Path) -> None:
    """Token for token what a stock model generates on one GPU; sampling agrees on all ranks."""
    from tiny import tiny_config
    from transformers import AutoModelForCausalLM

    torch.manual_seed(2)
    stock = AutoModelForCausalLM.from_config(tiny_config("qwen3", eos_token_id=None)).eval()
    stock.save_pretrained(tmp_path)
    prompt = torch.tensor([[5, 17, 31, 8]], device="cuda")
    expected = stock.cuda().generate(prompt, max_new_tokens=12, do_sample=False).tolist()
    launch(2, "generate", str(tmp_path), json.dumps(sizes))
    first, second = (json.loads((tmp_path / f"tokens-{rank}.json").read_text()) for rank in (0, 1))
    assert first["greedy"] == second["greedy"] == expected
    assert first["sampled"] == second["sampled"]


def run_rows(directory: str, rows: list[dict[str, Any]]) -> None:
    """What torchrun starts: train every row on this job's ranks and let rank 0 write the figures.

    The reference runs here too: outside torchrun, stock Trainer would spread itself over all GPUs it sees.
    """
    from tiny import random_dataset, train_parallel, train_stock

    world = int(os.environ["WORLD_SIZE"])
    figures = []
    for row in rows:
        dp = world // (row.get("tp_size", 1) * row.get("pp_size", 1))
        train = train_stock if row.pop("stock", False) else train_parallel
        history = train(directory, random_dataset(96), use_cpu=False, gradient_accumulation_steps=4 // dp, **row)
        figures.append({"losses": history.losses, "norms": history.norms})
    if os.environ["RANK"] == "0":
        Path(directory, f"figures-{world}.json").write_text(json.dumps(figures))


@pytest.mark.skipif(GPUS == 0, reason="needs a GPU")
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_parity_on_gpus(family: str, tmp_path: Path) -> None:
    """fp32 on the GPU against stock Trainer on one GPU, at the tolerances of the CPU table."""
    from test_parity import TOLERANCE, relative
    from tiny import tiny_config
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    experts = {**EXPERTS, **ROUTERS} if family == "qwen3_moe" else {}
    config = tiny_config(family, tie_word_embeddings=family == "llama", **experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    expected: dict[str, list[float]] = {}
    for world in (1, 2, 4):
        if world > GPUS:
            continue
        rows = [row for size, row in (EXPERT_ROWS if experts else ROWS) if size == world]
        if world == 1:
            rows = [{"stock": True}, *rows]
        launch(world, "train", str(tmp_path), json.dumps(rows))
        for row, got in zip(rows, json.loads((tmp_path / f"figures-{world}.json").read_text()), strict=True):
            expected = expected or got
            errors = (
                relative(got["losses"][:1], expected["losses"][:1]),
                relative(got["losses"], expected["losses"]),
                relative(got["norms"], expected["norms"]),
            )
            print(f"{family} {world} GPUs {row} first loss {errors[0]:.1e} loss {errors[1]:.1e} norm {errors[2]:.1e}")
            assert all(error <= bound for error, bound in zip(errors, TOLERANCE.values(), strict=True)), (row, errors)


RESUMED_ON: list[dict[str, Any]] = [
    {"zero_stage": 1},
    {"zero_stage": 1, "async_save": True},
    {"zero_stage": 2},
    {"zero_stage": 3, "async_save": True},
    {"tp_size": 2},
    {"pp_size": 2},
]


def save_and_resume(directory: str, rows: list[dict[str, Any]]) -> None:
    """What torchrun starts: a whole run on the first row, then the second half on every row."""
    from test_saving import run

    common = {"use_cpu": False, "max_steps": 6, "save_steps": 3, "bf16": True}
    figures = []
    for number, row in enumerate([rows[0], *rows]):
        dp = 2 // (row.get("tp_size", 1) * row.get("pp_size", 1))
        resume = f"{directory}/0/checkpoint-3" if number else False
        overrides = {**common, **row, "gradient_accumulation_steps": 4 // dp}
        figures.append(run(f"{directory}/{number}", overrides, resume)[0])
    if os.environ["RANK"] == "0":
        Path(directory, "resumed.json").write_text(json.dumps(figures))


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_resume_on_gpus(tmp_path: Path) -> None:
    """bf16 through NCCL: bit by bit on the same layout, within bf16's rounding on others."""
    from test_gradients import stock_model

    stock_model("llama").save_pretrained(tmp_path / "start")
    launch(2, "resume", str(tmp_path), json.dumps(RESUMED_ON))
    whole, *resumed = json.loads((tmp_path / "resumed.json").read_text())
    assert len(whole) == 6
    for row, losses in zip(RESUMED_ON, resumed, strict=True):
        print(f"2 GPUs zero1 -> {row}: {losses} after {whole[3:]}")
        exact = row.get("zero_stage") == 1
        assert losses == (whole[3:] if exact else pytest.approx(whole[3:], rel=5e-3))


@pytest.mark.skipif(GPUS == 0, reason="needs a GPU")
def test_weight_gradients_go_straight_into_fp32() -> None:
    """bf16 operands, fp32 sum: as close to float64 as fp32 allows, and without a bf16 gradient in between."""
    from hf_nanotron.ops.linear import Linear, add_product, can_add_product

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 40, 96, generator=generator).bfloat16().cuda() for _ in range(3)]
    gradients = [torch.randn(3, 40, 64, generator=generator).bfloat16().cuda() for _ in range(3)]

    class Total:
        def __init__(self) -> None:
            self.total, self.is_fresh = torch.full((64, 96), float("nan"), device="cuda"), True

        def takes_product(self, dtype: torch.dtype) -> bool:
            return can_add_product(self.total, dtype)

        def add_product(self, grad_output: torch.Tensor, input: torch.Tensor) -> None:
            add_product(self.total, grad_output, input, overwrite=self.is_fresh)
            self.is_fresh = False

    layer = Linear(96, 64, dtype=torch.bfloat16, device="cuda")
    layer.weight_gradient = total = Total()
    for x, gradient in zip(inputs, gradients, strict=True):
        x.requires_grad_()
        layer(x).backward(gradient)
        assert torch.equal(x.grad, gradient @ layer.weight)
    assert layer.weight.grad is None
    expected = sum(
        g.double().flatten(0, 1).T @ x.double().flatten(0, 1) for x, g in zip(inputs, gradients, strict=True)
    )
    assert float((total.total - expected).norm() / expected.norm()) < 1e-6
    bias = sum(g.double().flatten(0, 1).sum(0) for g in gradients)  # autograd's, which adds in bf16
    assert float((layer.bias.grad.double() - bias).norm() / bias.norm()) < 1e-2


if __name__ == "__main__":
    {"train": run_rows, "generate": generate, "resume": save_and_resume}[sys.argv[1]](
        sys.argv[2], json.loads(sys.argv[3])
    )

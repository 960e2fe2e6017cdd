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
    (2, {"tp_size": 2}),
    (2, {"tp_size": 2, "sequence_parallel": False}),
    (2, {}),
    (2, {"pp_size": 2, "pp_schedule": "afab"}),
    (2, {"pp_size": 2}),
    (2, {"pp_size": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2}),
    (4, {"tp_size": 2, "pp_size": 2}),
    (4, {"tp_size": 2}),
    (4, {"pp_size": 2}),
]


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
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_parity_on_gpus(family: str, tmp_path: Path) -> None:
    """fp32 on the GPU against stock Trainer on one GPU, at the tolerances of the CPU table."""
    from test_parity import TOLERANCE, relative
    from tiny import tiny_config
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = tiny_config(family, tie_word_embeddings=family == "llama")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    expected: dict[str, list[float]] = {}
    for world in (1, 2, 4):
        if world > GPUS:
            continue
        rows = [row for size, row in ROWS if size == world]
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


if __name__ == "__main__":
    {"train": run_rows, "generate": generate}[sys.argv[1]](sys.argv[2], json.loads(sys.argv[3]))

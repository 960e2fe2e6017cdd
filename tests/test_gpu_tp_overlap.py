"""Tensor-parallel communication beside matrix products on GPUs; skips without two of them.

The transport over memory that GPUs see of each other is compared with NCCL's collectives, with ranks that are late at
random; then a whole model with stock Trainer on one GPU.
"""

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
ROUNDS = 60
ROWS: list[tuple[int, dict[str, Any]]] = [
    (2, {"tp_size": 2}),
    (2, {"tp_size": 2, "tp_overlap": False}),
    (2, {"tp_size": 2, "torch_compile": True}),
    (2, {"tp_size": 2, "activation_checkpointing": True}),
    (2, {"tp_size": 2, "activation_checkpointing": True, "torch_compile": True}),
    (4, {"tp_size": 4}),
    (4, {"tp_size": 2, "pp_size": 2}),
    (4, {"tp_size": 2, "zero_stage": 2, "torch_compile": True}),
]


def launch(world: int, *arguments: str, file: str = __file__) -> None:
    """Run a file, this one unless another is named, on `world` GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command += [str(Path(file).resolve()), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])}
    subprocess.run(command, check=True, timeout=300, env=environment)


def be_late(generator: torch.Generator) -> None:
    """Hold this rank's stream for up to about a millisecond."""
    torch.cuda._sleep(int(torch.randint(0, 2_000_000, (), generator=generator)))


def transports(directory: str, _: Any) -> None:
    """What torchrun starts: every exchange through both transports, and through NCCL's collectives."""
    from hf_nanotron import ParallelConfig
    from hf_nanotron.ops.linear import Linear
    from hf_nanotron.parallel.collectives import all_gather, reduce_scatter
    from hf_nanotron.parallel.mesh import ParallelMesh
    from hf_nanotron.parallel.tp.overlap import Overlap
    from hf_nanotron.parallel.tp.transport import Messages, SymmetricMemory, make_transport

    mesh = ParallelMesh(ParallelConfig(tp_size=int(os.environ["WORLD_SIZE"])))
    transport = make_transport(mesh.tp, mesh.device)
    assert isinstance(transport, SymmetricMemory), "these GPUs have no access to each other's memory"
    delays = torch.Generator().manual_seed(mesh.rank)
    size = mesh.tp_size
    layers = [Linear(512, features, bias=features == 256, device=mesh.device) for features in (1024, 256)]
    last = Linear(512, 384, bias=False, device=mesh.device)
    failed = []
    for index in range(ROUNDS):
        dtype = (torch.bfloat16, torch.float32)[index % 2]
        shape = ((4, 256), (1, 96), (3, 40), (1, 1), (2, 2048))[index % 5]  # the last one makes memory grow
        found: list[list[torch.Tensor]] = []
        x = torch.randn((*shape, 512), device=mesh.device).to(dtype)
        for module in (*layers, last):
            module.to(dtype)
        for overlap in (Overlap(mesh.tp, transport), Overlap(mesh.tp, Messages(mesh.tp))):
            be_late(delays)
            whole, outputs = overlap.gather(x, layers)
            be_late(delays)
            summed = overlap.reduce(whole * (1 + mesh.rank))
            sent = overlap.multiply_and_send(whole, last.weight, None)
            be_late(delays)
            if index % 7 == 3:  # a recomputation leaves it there
                sent = overlap.multiply_and_send(whole, last.weight, None)
            taken = overlap.take(sent)
            assert taken is not None
            found.append([whole, *outputs, summed, sent, taken])
        ours, messages = found
        whole, summed = ours[0], ours[-3]
        same = all(torch.equal(a, b) for a, b in zip(ours, messages, strict=True))
        right = torch.equal(whole, all_gather(x, mesh.tp, 1))
        expected = reduce_scatter((whole * (1 + mesh.rank)).float(), mesh.tp, 1)
        right &= bool((summed.float() - expected).abs().max() <= 2**-7 * expected.abs().max())
        if dtype == torch.float32 and size == 2:
            right &= torch.equal(summed, expected)
        if not (same and right):
            failed.append((index, str(dtype), shape, same, right))
    if mesh.rank == 0:
        Path(directory, "transports.json").write_text(json.dumps(failed))
    transport.close()
    mesh.close()


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_transports_agree(tmp_path: Path) -> None:
    for world in (2, 4):
        if world <= GPUS:
            launch(world, "transports", str(tmp_path), "null")
            assert json.loads((tmp_path / "transports.json").read_text()) == []


def train(directory: str, rows: list[dict[str, Any]]) -> None:
    """What torchrun starts: train every row."""
    from tiny import random_dataset, train_parallel, train_stock

    world = int(os.environ["WORLD_SIZE"])
    figures = []
    for row in rows:
        dp = world // (row.get("tp_size", 1) * row.get("pp_size", 1))
        function = train_stock if row.pop("stock", False) else train_parallel
        history = function(directory, random_dataset(96), use_cpu=False, gradient_accumulation_steps=4 // dp, **row)
        figures.append({"losses": history.losses, "norms": history.norms})
    if os.environ["RANK"] == "0":
        Path(directory, "figures.json").write_text(json.dumps(figures))


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_parity(tmp_path: Path) -> None:
    """fp32 on GPUs against stock Trainer on one GPU, at the tolerances of the CPU table."""
    from test_parity import TOLERANCE, relative
    from tiny import tiny_config
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(tiny_config("llama", attention_bias=True)).save_pretrained(tmp_path)
    launch(1, "train", str(tmp_path), json.dumps([{"stock": True}]))
    (expected,) = json.loads((tmp_path / "figures.json").read_text())
    for world in (2, 4):
        rows = [row for size, row in ROWS if size == world]
        if world > GPUS:
            continue
        launch(world, "train", str(tmp_path), json.dumps(rows))
        for row, got in zip(rows, json.loads((tmp_path / "figures.json").read_text()), strict=True):
            errors = (
                relative(got["losses"][:1], expected["losses"][:1]),
                relative(got["losses"], expected["losses"]),
                relative(got["norms"], expected["norms"]),
            )
            print(f"{world} GPUs {row} first loss {errors[0]:.1e} loss {errors[1]:.1e} norm {errors[2]:.1e}")
            assert all(error <= bound for error, bound in zip(errors, TOLERANCE.values(), strict=True)), (row, errors)


if __name__ == "__main__":
    {"transports": transports, "train": train}[sys.argv[1]](sys.argv[2], json.loads(sys.argv[3]))

"""How long process groups take at the start of a job on GPUs: one after another, and side by side.

    torchrun --nproc-per-node 2 group_start.py
    torchrun --nproc-per-node 2 group_start.py --bind --losses tp_size=2

Rank 0 prints one line of JSON: seconds of as many communicators of all ranks, made by `new_group` and connected by a
first sum each, or connected in lanes at the same time; seconds of a mesh; with `--losses`, the losses of a tiny model
in that layout, which say that a step is right.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from hf_nanotron.parallel.communicators import connect_side_by_side, make_process_group
from hf_nanotron.parallel.config import ParallelConfig
from hf_nanotron.parallel.mesh import ParallelMesh


def timed(action: Callable[[], object]) -> float:
    """Seconds from when all ranks begin until the last is done."""
    dist.barrier()
    torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - began, device="cuda")
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return round(float(seconds), 3)


def in_turn(count: int) -> None:
    """As `new_group` and first use do it."""
    for _ in range(count):
        dist.all_reduce(torch.ones(1, device="cuda"), group=dist.new_group(list(range(dist.get_world_size()))))


def side_by_side(count: int, lanes: int) -> None:
    """As a mesh does it."""
    ranks, store = range(dist.get_world_size()), dist.distributed_c10d._get_default_store()
    made: list[list[dist.ProcessGroup]] = []
    for lane in range(lanes):
        own = dist.PrefixStore(f"lane {lanes} {lane}", store.clone())
        names = [f"{lanes} {lane} {i}" for i in range(count // lanes)]
        made.append([make_process_group(ranks, own, name, None) for name in names])
    connect_side_by_side(made, None, torch.device("cuda", torch.cuda.current_device()))


def losses(layout: dict[str, int]) -> list[float]:
    """Of three steps of a tiny model."""
    from transformers import LlamaConfig

    from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = LlamaConfig(vocab_size=512, num_hidden_layers=4, **sizes)
    args = NanotronTrainingArguments(
        "/tmp/group_start", max_steps=3, logging_steps=1, per_device_train_batch_size=2, bf16=True, learning_rate=1e-3,
        gradient_accumulation_steps=4, save_strategy="no", report_to="none", disable_tqdm=True, **layout,
    )  # fmt: skip
    torch.manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(512, (256, 128))]
    model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)
    trainer = NanotronTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.mesh.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=6)
    parser.add_argument("--bind", action="store_true", help="bind the job to a device, as a script may have done")
    parser.add_argument("--losses", nargs="*", metavar="SIZE=N", help="train a tiny model in this layout as well")
    given = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    began = time.perf_counter()
    dist.init_process_group("nccl", device_id=device if given.bind else None)
    dist.all_reduce(torch.ones(1, device=device))
    torch.cuda.synchronize()
    found: dict[str, object] = {"ranks": dist.get_world_size(), "bound": given.bind}
    found["job"] = round(time.perf_counter() - began, 3)
    meshes: list[ParallelMesh] = []
    layout = {name: int(size) for name, _, size in (item.partition("=") for item in given.losses or [])}
    found["mesh"] = timed(lambda: meshes.append(ParallelMesh(ParallelConfig(**layout))))  # type: ignore[arg-type]
    found[f"{given.groups} in turn"] = timed(lambda: in_turn(given.groups))
    found[f"{given.groups} in one lane"] = timed(lambda: side_by_side(given.groups, 1))
    found[f"{given.groups} in two lanes"] = timed(lambda: side_by_side(given.groups, 2))
    found[f"{given.groups} all at once"] = timed(lambda: side_by_side(given.groups, given.groups))
    if given.losses is not None:
        found["losses"] = losses(layout)
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""How long process groups take at the start of a job on GPUs: as torch makes them, and as a mesh does.

    torchrun --nproc-per-node 2 group_start.py
    torchrun --nproc-per-node 2 group_start.py --bind --losses tp_size=2

Rank 0 prints a line of JSON for each part when it is done, so that a run that stands still says where: seconds of the
job's first sum, of a mesh, of as many communicators of all ranks made by `new_group` and by a mesh's way, each with a
first sum; with `--losses`, the losses of a tiny model in that layout, which say that a step is right. A first step
compiles: that takes longest.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from hf_nanotron.parallel.communicators import make_process_group
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


def use(group: dist.ProcessGroup | None) -> None:
    """As a mesh connects a group."""
    dist.all_reduce(torch.ones(1, device="cuda"), group=group)
    torch.cuda.synchronize()


def by_new_group(count: int) -> None:
    for _ in range(count):
        use(dist.new_group(list(range(dist.get_world_size()))))


def by_members(count: int) -> None:
    store = dist.PrefixStore("group_start", dist.distributed_c10d._get_default_store())
    for number in range(count):
        use(make_process_group(range(dist.get_world_size()), store, f"group_start {number}", None))


def tell(**found: object) -> None:
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)


def losses(layout: dict[str, int]) -> list[float]:
    """Of three steps of a tiny model."""
    from transformers import LlamaConfig

    from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = LlamaConfig(vocab_size=512, num_hidden_layers=4, **sizes)
    folder = os.path.join(tempfile.gettempdir(), "group_start")
    args = NanotronTrainingArguments(
        folder, max_steps=3, logging_steps=1, per_device_train_batch_size=2, bf16=True, learning_rate=1e-3,
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
    tell(ranks=dist.get_world_size(), bound=given.bind, job=round(time.perf_counter() - began, 3))
    meshes: list[ParallelMesh] = []
    layout = {name: int(size) for name, _, size in (item.partition("=") for item in given.losses or [])}
    tell(mesh=timed(lambda: meshes.append(ParallelMesh(ParallelConfig(**layout)))))  # type: ignore[arg-type]
    tell(groups=given.groups, by_new_group=timed(lambda: by_new_group(given.groups)))
    tell(groups=given.groups, by_members=timed(lambda: by_members(given.groups)))
    if given.losses is not None:
        tell(losses=losses(layout))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

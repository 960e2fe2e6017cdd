"""What the trainer would say of the real run, in its own sentences: of the arguments, and of the model's sizes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ...models.sharding.parallelize import refuse_layout
from ...parallel.mesh import ParallelMesh
from ...training_args import NanotronTrainingArguments

OF_GPUS = ("tf32", "ddp_backend")  # which transformers refuses without one


@dataclass(frozen=True)
class RealRun:
    """The run as it is: `arguments` as in the file."""

    arguments: dict[str, Any]
    processes: int
    config: PreTrainedConfig | None
    options: dict[str, Any]


def refuse(run: RealRun) -> None:
    """In a process of its own, which becomes rank 0 of as many as the real run has; no other rank exists.

    `config` None: only the arguments.

    Raises:
        ValueError: as the trainer would.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore  # torch has no public name for it

    if run.processes > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=run.processes)
        number = str(run.processes)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=number, LOCAL_WORLD_SIZE=number)
    here = {name: value for name, value in run.arguments.items() if name not in OF_GPUS}
    args = NanotronTrainingArguments(**{"output_dir": "out", **here, "use_cpu": True, "disable_tqdm": True})
    if run.config is None:
        return
    parallel = args.parallel
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(run.config, **run.options)
    ranks = SimpleNamespace(
        tp_size=parallel.tp_size, pp_size=parallel.pp_size, cp_size=parallel.cp_size, ep_size=parallel.ep_size,
        parallel=parallel, tp_rank=0, pp_rank=0, rank=0, coordinates=SimpleNamespace(ep=0, tp=0, pp=0),
    )  # fmt: skip
    refuse_layout(model, cast(ParallelMesh, ranks))

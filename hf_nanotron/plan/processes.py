"""Rehearse many roles, each in a process of its own, a few at a time.

One process imports everything, for seconds, and is forked for each role. It is started anew rather than forked from the
one that plans, which may have threads, a GPU, or be a rank of a job.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .job import Job
from .rehearse import Rehearsal, rehearse_role
from .roles import Role

# What a process that torchrun or a scheduler has started would find, and GPUs, which it is not to touch.
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS")
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def rehearse(
    job: Job, roles: Sequence[Role], trainer_class: type[Any], processes: int | None = None
) -> list[Rehearsal]:
    """Train one optimizer step as each of `roles`; the first is that of rank 0.

    Args:
        trainer_class: `NanotronTrainer`, or a subclass that can be imported.
        processes: that run at a time; as many as there are CPUs if None.

    Raises:
        ValueError: for what the trainer refuses, with its sentence.
        RuntimeError: if a process fails otherwise, with what it said.
    """
    environment = {name: value for name, value in os.environ.items() if name not in RANKS} | HIDDEN
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder, "asked")
        count = processes or len(os.sched_getaffinity(0))
        asked.write_bytes(pickle.dumps((job, list(roles), trainer_class, count)))
        command = [sys.executable, "-m", __name__, folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        answers = [Path(folder, str(index)) for index in range(len(roles))]
        results = [pickle.loads(answer.read_bytes()) if answer.is_file() else None for answer in answers]
    for result in results:
        if isinstance(result, ValueError):
            raise result
    failed = [result for result in results if not isinstance(result, Rehearsal)]
    if done.returncode or failed:
        said = next((result for result in failed if result is not None), done.stderr[-2000:])
        raise RuntimeError(f"a rank could not be rehearsed: {said}")
    return [result for result in results if isinstance(result, Rehearsal)]


def _serve(folder: Path) -> None:
    """Rehearse what is asked in `folder`, and leave a file for each role."""
    job, roles, trainer_class, count = pickle.loads((folder / "asked").read_bytes())
    import torch

    torch.set_num_threads(1)
    running: dict[int, int] = {}
    told: Mapping[str, Any] | None = None
    for index, role in enumerate(roles):
        while len(running) >= count:
            _wait_for_one(running)
        if (pid := os.fork()) == 0:
            _rehearse_and_leave(job, role, trainer_class, told, folder / str(index))
        running[pid] = index
        if index == 0:  # the others are told what rank 0 tells them
            _wait_for_one(running)
            first = pickle.loads((folder / "0").read_bytes())
            if not isinstance(first, Rehearsal):
                return
            told = first.told
    while running:
        _wait_for_one(running)


def _wait_for_one(running: dict[int, int]) -> None:
    pid, _ = os.wait()
    running.pop(pid, None)


def _rehearse_and_leave(job: Job, role: Role, trainer_class: type[Any], told: Any, answer: Path) -> None:
    """In a process of its own, which ends here."""
    result: Any
    try:
        result = rehearse_role(job, role, trainer_class, told)
    except ValueError as error:
        result = ValueError(str(error))
    except Exception:
        result = traceback.format_exc(limit=-6)
    unfinished = answer.with_suffix(".part")
    unfinished.write_bytes(pickle.dumps(result))
    unfinished.rename(answer)
    os._exit(0)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))

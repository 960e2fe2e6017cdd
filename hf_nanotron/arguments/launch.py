"""Processes that were started side by side but know nothing of each other."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Variables with the number of processes, and those with the rank and the rank on its node.
MPI = {
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MV2_COMM_WORLD_SIZE": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    "PMI_SIZE": ("PMI_RANK", "MPI_LOCALRANKID"),
}
SPECIAL_STEPS = 0xFFFFFFF0  # numbers of steps from here on are Slurm's own, such as that of a batch script


def check_launch(environment: Mapping[str, str]) -> None:
    """Refuse a launch by srun or mpirun alone: each of its processes would train a model of its own.

    A process that runs alone inside of an allocation (a batch script, or a shell of salloc) is not refused.
    """
    if dist.is_initialized() or environment.get("WORLD_SIZE") or environment.get("RANK"):
        return
    for size, (rank, local_rank) in MPI.items():
        if _number(environment, size) > 1:
            raise ValueError(_refusal("mpirun", size, environment[size], size, rank, local_rank))
    size, task = "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_PROCID")
    if size not in environment and (task > 0 or _number(environment, "SLURM_STEP_ID", 2**32) < SPECIAL_STEPS):
        size = "SLURM_NTASKS"
    if _number(environment, size) > 1:
        raise ValueError(_refusal("srun", size, environment[size], size, "SLURM_PROCID", "SLURM_LOCALID"))
    if _number(environment, "SLURM_NTASKS") > 1:
        logger.warning(
            f"SLURM_NTASKS={environment['SLURM_NTASKS']}, but this process runs alone; to train on all tasks, start it "
            "with torchrun under srun."
        )


def _number(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdigit() else default


def _refusal(launcher: str, name: str, value: str, size: str, rank: str, local_rank: str) -> str:
    return (
        f"{launcher} has started {value} processes ({name}={value}), but WORLD_SIZE is not set: each would train a "
        f"model of its own. Start one torchrun on each node ({launcher} with one process a node: torchrun --nnodes ... "
        "--nproc-per-node ... --rdzv-backend c10d --rdzv-endpoint HOST:PORT script.py), or export "
        f"WORLD_SIZE=${size}, RANK=${rank}, LOCAL_RANK=${local_rank}, MASTER_ADDR and MASTER_PORT in each process."
    )

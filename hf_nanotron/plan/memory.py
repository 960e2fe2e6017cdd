"""Bytes of one rank: its training state from the real one, its activations by arithmetic or counted."""

from __future__ import annotations

from dataclasses import dataclass

from .activations import exchange_bytes, peak_of_step
from .job import Job
from .rehearse import Rehearsal


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank, as torch's allocator has them at the fullest moment of a step.

    Args:
        parameters: what the model computes with (fp32 shards at ZeRO stage 3), and its copies in FP8.
        gradients: fp32.
        masters: fp32 weights besides.
        moments: the optimizer's state.
        activations: what a step keeps and needs at its fullest moment.
        buffers: of communication.
        average: the moving average of the weights.
        host: pinned memory of the host, no part of `total`.
    """

    parameters: int
    gradients: int
    masters: int
    moments: int
    activations: int
    buffers: int = 0
    average: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """On the device. A process takes 0.5 to 0.6 GiB more for its CUDA context, and NCCL its channels."""
        return sum(vars(self).values()) - self.host


def rank_memory(job: Job, rehearsal: Rehearsal) -> RankMemory:
    """Bytes of the ranks of a role.

    Where decoder layers are compiled (the default on GPUs with bf16), activations are arithmetic; where
    `torch_compile=False` asks for none, they are what the rehearsal counted.
    """
    report, at = rehearsal.report, rehearsal.trace.role.coordinates
    compiled = job.arguments.get("torch_compile")
    peak = peak_of_step(job, at.pp, rehearsal.layers)
    counted = rehearsal.peak - rehearsal.live
    activations = peak.device if compiled or (compiled is None and bool(job.arguments.get("bf16"))) else counted
    return RankMemory(
        parameters=report.parameters,
        gradients=report.gradients,
        masters=report.masters,
        moments=report.moments,
        activations=activations,
        buffers=exchange_bytes(job),
        average=report.average,
        host=report.host,
    )

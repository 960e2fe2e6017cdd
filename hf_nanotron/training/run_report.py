"""What a run says of itself: the metrics of its log lines, summed over the job, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerState
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..data.dealing import FillerBatch
from ..data.fingerprint import unnoticed
from ..data.ordered import brings_order
from ..models.base import ParallelModel
from ..models.token_figures import TokenFigures
from ..monitor.flops import squared_lengths
from ..monitor.memory import (
    MemoryReport,
    RankStep,
    activation_bytes,
    fullest,
    gathered_bytes,
    moment_bytes,
    offloaded_bytes,
)
from ..monitor.stragglers import Stragglers
from ..monitor.throughput import Throughput
from ..ops.host_copy import to_device
from ..optim.ema import WeightAverage
from ..parallel.batch import batch_shape
from ..parallel.collectives import all_reduce
from ..parallel.mesh import ParallelMesh
from ..prepare.fp8 import fp8_bytes
from ..prepare.training_state import TrainingState
from ..training_args import NanotronTrainingArguments
from .step.forward_pass import ForwardPass

logger = logging.get_logger(__name__)


class RunReport:
    """Metrics of the whole job; `loads` are those of the experts in the step that is logged next."""

    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput
        self.loads: dict[str, torch.Tensor] = {}
        self._stragglers = Stragglers()

    def sum_step(
        self,
        mesh: ParallelMesh,
        loss: torch.Tensor,
        batches: Sequence[dict[str, Any]],
        is_told_to_stop: bool,
        figures: TokenFigures | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One sum over the job: the loss lives on the last stage, and every rank reports it. All ranks together.

        Args:
            loss: this rank's part.
            batches: the window of this rank: whole rows.
            figures: of the window; they become those of all ranks.

        Returns:
            The loss of the step, fp32, and how many ranks were told to stop.
        """
        real = [batch for batch in batches if not isinstance(batch, FillerBatch)]
        tokens = sum(batch_shape(batch).numel() for batch in real)
        speaks = mesh.speaks_for_tokens
        counts = speaks and mesh.cp_rank == 0  # context-parallel ranks share rows, and the loss
        values = torch.tensor([0.0, tokens * counts, 0.0, float(is_told_to_stop)], dtype=torch.float64)
        told = to_device(values, loss.device)
        told[0] = loss * speaks
        if counts:
            for batch in real:
                told[2] += to_device(squared_lengths(batch), loss.device)
        if figures is None:
            told = all_reduce(told, mesh.world)
        else:
            told = all_reduce(torch.cat((told, figures.own_part(batches, mesh).flatten())), mesh.world)
            figures.total = told[4:].view_as(figures.total)
        self.throughput.add_tokens(told[1], told[2])
        return told[0].float(), told[3]

    def metrics(
        self, model: ParallelModel, log_loads: str, of_ranks: Mapping[str, Sequence[float]] | None = None
    ) -> dict[str, float]:
        """What a log line with a loss says besides. All ranks together.

        `of_ranks`: see `Throughput.report`.
        """
        metrics = self.throughput.report(of_ranks)
        if metrics and model.mesh.rank == 0 and model.mesh.world_size > 1:
            told = self._stragglers.note(self.throughput.by_rank, metrics["step_time"])
            if told is not None:
                logger.warning(told)
        if self.loads and model.mixture is not None:
            metrics |= model.mixture.report(self.loads, log_loads)
            self.loads = {}
        return metrics


def logs_next(args: NanotronTrainingArguments, state: TrainerState) -> bool:
    """Whether Trainer's flow of control logs after the optimizer step that runs now."""
    step = state.global_step + 1
    first = step == 1 and args.logging_first_step
    if args.logging_strategy == "steps":
        return first or step % state.logging_steps == 0
    return first or args.logging_strategy == "epoch"  # any step may turn out to be the last of its epoch


def report_memory(
    args: NanotronTrainingArguments,
    state: TrainingState,
    optimizer: torch.optim.Optimizer,
    dataset: Any,
    average: WeightAverage | None = None,
    frozen: Sequence[ForwardPass | None] = (),
) -> MemoryReport:
    """What this rank takes; logs that of the fullest, before the first step takes it. All ranks together.

    `frozen`: models beside the one that is trained.
    """
    model, weights, host = state.model, state.weights, state.host
    length, mesh = _sample_length(dataset, model), model.mesh
    step = RankStep(
        model.config,
        args.per_device_train_batch_size * -(-length // mesh.cp_size),
        args.parallel,
        mesh.pp_rank,
        args.gradient_accumulation_steps,
        model.dtype.itemsize,
        len(state.recomputed) / max(1, model.config.get_text_config().num_hidden_layers),
        args.activation_checkpointing_policy,
        args.activation_offload,
        args.mlp_chunk_tokens,
    )
    fused = model.linear_head is not None and not model.makes_logits
    activations = activation_bytes(step, fused, model.makes_logits)
    rows = args.per_device_train_batch_size * length
    activations += gathered_bytes(model.config, rows, args.parallel, model.dtype.itemsize)
    held = weights.bytes_held()
    beside = [parameter for other in frozen if other is not None for parameter in other.model.parameters()]
    held["parameters"] += fp8_bytes(model) + sum(parameter.nbytes for parameter in beside)
    held["moments"], away = moment_bytes(optimizer, weights), offloaded_bytes(step)
    if host is not None:
        elements = sum(segment.master.numel() for segment in weights.segments)
        moved = {"masters": host.master_bytes, "moments": held["moments"] * host.elements // max(1, elements)}
        held |= {name: held[name] - size for name, size in moved.items()}
        away += sum(moved.values())
    held["average"] = 0 if average is None else average.nbytes
    report = MemoryReport(**held, activations=activations, host=away)
    rank, most = fullest(report, mesh)
    logger.info(f"memory of the fullest rank ({rank}), for samples of {length} tokens: {most}")
    return report


def _sample_length(dataset: Any, model: ParallelModel) -> int:
    """Tokens of the first sample, or those that the data says; of the longest that the model takes if it does not."""
    if brings_order(dataset) and (length := getattr(dataset, "sequence_length", None)):
        return int(length)
    has_rows = hasattr(dataset, "__getitem__") and has_length(dataset) and len(dataset)
    with unnoticed(dataset):  # or crops would not be those of one process
        sample: Any = dataset[0] if has_rows else None
    if isinstance(sample, Mapping) and "input_ids" in sample:
        return len(sample["input_ids"])
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 0))

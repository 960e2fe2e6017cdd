"""The part of the trainer that says how a run goes: its log lines, floating-point operations, tokens and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..data.fingerprint import unnoticed
from ..data.loader import FillerBatch
from ..models.base import ParallelModel
from ..monitor.memory import MemoryReport, activation_bytes, fullest, moment_bytes
from ..monitor.throughput import Throughput
from ..parallel.mesh import ParallelMesh
from ..parallel.zero.segment import ShardedWeights
from ..prepare.fp8 import fp8_bytes
from ..training_args import NanotronTrainingArguments

logger = logging.get_logger(__name__)


class FiguresTrainer(Trainer):
    """A Trainer whose figures are those of the whole job."""

    args: NanotronTrainingArguments
    model: ParallelModel
    mesh: ParallelMesh
    weights: ShardedWeights
    throughput: Throughput
    memory_report: MemoryReport
    _recomputed: frozenset[int]  # layers
    _loads: dict[str, torch.Tensor]  # of the experts, in the step that is logged next

    def _logs_this_step(self) -> bool:
        """Whether Trainer's flow of control logs after this optimizer step."""
        args, step = self.args, self.state.global_step + 1
        first = step == 1 and args.logging_first_step
        if args.logging_strategy == "steps":
            return first or step % self.state.logging_steps == 0
        return first or args.logging_strategy == "epoch"  # whichever step will be its last

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.weights.wait()  # callbacks that look at the weights find the new ones
        if "loss" in logs:
            logs.update(self.throughput.report())
            if self._loads and self.model.mixture is not None:
                logs.update(self.model.mixture.report(self._loads, self.args.moe_log_loads))
                self._loads = {}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0 if isinstance(inputs, FillerBatch) else super().floating_point_ops(inputs)

    def store_flos(self) -> None:
        """Trainer sums over all ranks; those that see the same batch count once."""
        self.current_flos /= self.get_tp_size()  # type: ignore[assignment]
        super().store_flos()

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if self.args.include_num_input_tokens_seen == "no":
            return
        if isinstance(inputs, FillerBatch):
            inputs = {name: value[:0] for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        super()._track_num_input_tokens(inputs)

    def _report_memory(self) -> None:
        """Say what the fullest rank will take, before the first step takes it."""
        assert self.optimizer is not None
        args, model = self.args, self.model
        length = self._sample_length()
        activations = activation_bytes(
            model.config,
            args.per_device_train_batch_size * length,
            args.parallel,
            self.mesh.pp_rank,
            args.gradient_accumulation_steps,
            model.dtype.itemsize,
            len(self._recomputed) / max(1, model.config.get_text_config().num_hidden_layers),
            fused_head=model.linear_head is not None and not model.makes_logits,
            whole_logits=model.makes_logits,
            selective=args.activation_checkpointing_policy == "selective",
        )
        moments = moment_bytes(self.optimizer, self.weights)
        held = self.weights.bytes_held()
        held["parameters"] += fp8_bytes(model)
        self.memory_report = MemoryReport(**held, moments=moments, activations=activations)
        rank, report = fullest(self.memory_report, self.mesh)
        logger.info(f"memory of the fullest rank ({rank}), for samples of {length} tokens: {report}")

    def _sample_length(self) -> int:
        """Tokens of the first sample; of the longest that the model takes if the data does not say."""
        dataset: Any = self.train_dataset
        has_rows = hasattr(dataset, "__getitem__") and has_length(dataset) and len(dataset)
        with unnoticed(dataset):  # or crops would not be those of one process
            sample: Any = dataset[0] if has_rows else None
        if isinstance(sample, Mapping) and "input_ids" in sample:
            return len(sample["input_ids"])
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 0))

"""What is planned: a model, the arguments of its training, and how many GPUs there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from ..arguments.sizes import parallel_sizes
from ..parallel.config import ParallelConfig


@dataclass(frozen=True)
class Job:
    """A run that is planned.

    Args:
        config: of a stock causal language model.
        arguments: those of `NanotronTrainingArguments`, as under `training:` of a YAML file, without `output_dir`.
        world_size: processes, one for each GPU.
        gpus_per_node: GPUs of one host.
        sequence_length: tokens of a row.
        documents: lengths of the documents packed into a row, whose sum is `sequence_length`; `None` for whole rows.

    Raises:
        ValueError: for a size that is not at least 1, nodes that are not full, or documents that do not fill the row.
    """

    config: PretrainedConfig
    arguments: Mapping[str, Any]
    world_size: int
    gpus_per_node: int
    sequence_length: int
    documents: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("world_size", "gpus_per_node", "sequence_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
        if self.world_size > self.gpus_per_node and self.world_size % self.gpus_per_node:
            raise ValueError(
                f"gpus_per_node={self.gpus_per_node} does not divide world_size={self.world_size}; every node has as "
                "many GPUs."
            )
        if self.documents is not None and (sum(self.documents) != self.sequence_length or min(self.documents) < 1):
            raise ValueError(
                f"documents of {sum(self.documents)} tokens together do not fill a row of sequence_length="
                f"{self.sequence_length}; their lengths must be at least 1, and their sum must be the row's."
            )

    @property
    def samples(self) -> int:
        """Rows of one micro-batch of a data-parallel rank."""
        return int(self.arguments.get("per_device_train_batch_size", 8))  # the default of transformers

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an optimizer step."""
        return int(self.arguments.get("gradient_accumulation_steps", 1))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step of the whole job."""
        copies = parallel_config(self).dp_size(self.world_size)
        return copies * self.samples * self.micro_batches * self.sequence_length


def parallel_config(job: Job) -> ParallelConfig:
    """The sizes that the job's arguments say.

    Raises:
        ValueError: as `ParallelConfig` does, or if the sizes do not divide `world_size`.
    """
    config = parallel_sizes(job.arguments)
    config.expert_copies(job.world_size)
    return config

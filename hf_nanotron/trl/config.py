"""`NanotronSFTConfig`: `trl.SFTConfig` with the sizes of a parallel run."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import SFTConfig

from ..arguments.values import check_values, set_plain_values
from ..training_args import NanotronTrainingArguments
from .arguments import RULED, check_sft_arguments


@dataclass(repr=False)
class NanotronSFTConfig(NanotronTrainingArguments, SFTConfig):
    """`NanotronTrainingArguments` with the fields and the defaults of `trl.SFTConfig`.

    Every field either does what TRL and transformers document or is refused at construction; the tables are in
    `hf_nanotron.trl.arguments` and `hf_nanotron.arguments.policy`.

    Raises:
        ValueError: as `NanotronTrainingArguments`, and for what TRL does and this package cannot.
    """

    # Where TRL's default differs from transformers'. A test compares all of them.
    learning_rate: float = field(default=2e-5, metadata={"help": "The initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every X update steps."})
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=True, metadata={"help": "Recompute activations in the backward, to save memory."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Compute in bfloat16, with fp32 master weights. If unset, True."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16
        super().__post_init__()

    def check(self, world_size: int | None = None) -> None:
        """As `NanotronTrainingArguments.check`, and the fields of TRL."""
        super().check(world_size)
        set_plain_values(self, NanotronSFTConfig)
        check_values(self, NanotronSFTConfig, RULED)
        check_sft_arguments(self)

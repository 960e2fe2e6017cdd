"""The same small model trained with AdamW and with Muon, on the bytes of Python's standard library.

torchrun --nproc-per-node 2 train.py --optim muon --tp-size 2
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import HfArgumentParser, LlamaConfig, default_data_collator, set_seed

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments

LENGTH = 128


@dataclass
class Arguments(NanotronTrainingArguments):
    """Every argument of the trainer, with defaults for this example."""

    output_dir: str = field(default="out")
    max_steps: int = field(default=100)
    optim: str = field(default="muon")
    learning_rate: float = field(default=3e-3)
    per_device_train_batch_size: int = field(default=8)
    warmup_steps: int = field(default=10)
    weight_decay: float = field(default=0.1)
    logging_steps: int = field(default=10)
    save_strategy: str = field(default="no")
    report_to: str = field(default="none")


def rows(count: int) -> Dataset:
    """Rows of bytes of the library's files, in a fixed order."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= count * LENGTH:
            break
    ids = [list(text[start : start + LENGTH]) for start in range(0, count * LENGTH, LENGTH)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def main(arguments: list[str] | None = None) -> float:
    """Train, and return the mean loss of the run."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    set_seed(args.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.06,
    )
    model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)
    trainer = NanotronTrainer(model=model, args=args, train_dataset=rows(2000), data_collator=default_data_collator)
    return float(trainer.train().training_loss)


if __name__ == "__main__":
    main()

"""Pretrain a small Llama on short rows, and go on with long ones that two ranks share.

torchrun --nproc-per-node 2 train.py --output-dir out/first --sequence-length 128 --per-device-train-batch-size 16
torchrun --nproc-per-node 2 train.py --output-dir out/short --sequence-length 2048 --model out/first
python extend.py out/short out/extended --sequence-length 16384
torchrun --nproc-per-node 2 train.py --output-dir out/long --sequence-length 16384 --cp-size 2 \
    --model out/extended --short out/short

With `--short`, a table says what answers far from the start of their document cost before and after.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from questions import VOCABULARY, Questions
from transformers import AutoConfig, LlamaConfig, default_data_collator, set_seed

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments


class ByPosition(torch.utils.data.Dataset):
    """Rows with a column `domain`: at which positions a token is predicted.

    The first bucket ends at `short` tokens, and each other one is as long as all before it.
    """

    def __init__(self, data: Questions, short: int) -> None:
        self.data = data
        edges = [short]
        while edges[-1] < data.length:
            edges.append(2 * edges[-1])
        self.buckets = torch.bucketize(torch.arange(data.length), torch.tensor(edges), right=True)
        self.domain_names = tuple(f"{begin}-{end}" for begin, end in zip([0, *edges], edges, strict=False))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**self.data[index], "domain": self.buckets}


def main(argv: Sequence[str] | None = None) -> tuple[NanotronTrainer, dict[str, dict[str, float]]]:
    """Train, save, and return the trainer, and for each column of the table the held-out losses by position."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--sequence-length", type=int, required=True, help="tokens of a row")
    parser.add_argument("--model", help="weights to go on with (fresh ones)")
    parser.add_argument("--short", help="the model before it was extended, for the table")
    parser.add_argument("--max-positions", type=int, default=2048, help="of fresh weights (%(default)s)")
    parser.add_argument("--cp-size", type=int, default=1, help="ranks that share a row (%(default)s)")
    parser.add_argument("--max-steps", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--per-device-train-batch-size", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--eval-rows", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="(%(default)s)")
    cli = parser.parse_args(argv)

    args = NanotronTrainingArguments(
        output_dir=cli.output_dir,
        max_steps=cli.max_steps,
        per_device_train_batch_size=cli.per_device_train_batch_size,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=cli.gradient_accumulation_steps,
        cp_size=cli.cp_size,
        learning_rate=cli.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, cli.max_steps // 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=10,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        seed=1,
    )
    of_a_step = cli.per_device_train_batch_size * cli.gradient_accumulation_steps * args.world_size // cli.cp_size
    rows = Questions(cli.max_steps * of_a_step, cli.sequence_length, seed=1)

    def trainer_of(path: str | None, **fields: Any) -> NanotronTrainer:
        if path is not None:
            model = AutoModelForCausalLM.from_pretrained(path, parallel=args.parallel, **fields)
        else:
            config = LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=cli.max_positions,
                initializer_range=0.06,  # a model this narrow learns slowly from the usual 0.02
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
            set_seed(args.seed)
            model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)
        held_out = ByPosition(Questions(cli.eval_rows, cli.sequence_length, seed=2), bucket)
        return NanotronTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=held_out,
            data_collator=default_data_collator,
        )

    def by_position(trainer: NanotronTrainer) -> dict[str, float]:
        prefix = "eval_loss/"
        return {name.removeprefix(prefix): v for name, v in trainer.evaluate().items() if name.startswith(prefix)}

    bucket, table = min(cli.max_positions, cli.sequence_length), {}
    if cli.short is not None:
        bucket = AutoConfig.from_pretrained(cli.short).max_position_embeddings
        table["short model"] = by_position(trainer_of(cli.short, max_position_embeddings=cli.sequence_length))
    trainer = trainer_of(cli.model)
    if cli.short is not None:
        table["YaRN, not trained"] = by_position(trainer)
    trainer.train()
    table["trained"] = by_position(trainer)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"saved {cli.output_dir}; held-out loss of answers by position:")
        print_table(table)
    return trainer, table


def print_table(table: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(table.values())))
    print("".join(f"{name:>20}" for name in ("positions", *table)))
    for name in names:
        print(f"{name:>20}" + "".join(f"{losses[name]:20.3f}" for losses in table.values()))


if __name__ == "__main__":
    main()[0].end()

"""Pretrain a tiny Llama on the tokens that `prepare.py` has written.

torchrun --nproc-per-node 2 train.py
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.data import TokenDataset

HERE = Path(__file__).resolve().parent


def main(argv: Sequence[str] | None = None) -> NanotronTrainer:
    """Train, and return the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output-dir", type=Path, default=HERE / "out", help="has tokenizer/ and tokens/ (%(default)s)"
    )
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens of a row (%(default)s)")
    parser.add_argument("--max-steps", type=int, default=100, help="optimizer steps (%(default)s)")
    parser.add_argument("--tp-size", type=int, default=1, help="ranks that share every layer (%(default)s)")
    cli = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(cli.output_dir / "tokenizer")
    data = TokenDataset(
        cli.output_dir / "tokens",
        cli.sequence_length,
        documents="pack",  # whole documents; "cross" is the plain stream that datatrove and nanotron read
        vocab_size=len(tokenizer),  # ids are checked against it
    )
    args = NanotronTrainingArguments(
        output_dir=str(cli.output_dir / "run"),
        max_steps=cli.max_steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        tp_size=cli.tp_size,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=cli.max_steps // 10,
        logging_steps=max(1, cli.max_steps // 10),
        logging_first_step=True,
        report_to="none",
        save_steps=cli.max_steps,
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=cli.sequence_length,
        initializer_range=0.06,  # a model this narrow learns slowly from the usual 0.02
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)
    trainer = NanotronTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return trainer


if __name__ == "__main__":
    main().end()

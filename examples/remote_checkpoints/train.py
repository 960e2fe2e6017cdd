"""Pretrain a tiny Llama on bytes, with its checkpoints in a bucket, and go on from there on an empty disk.

torchrun --nproc-per-node 2 train.py --url s3://bucket/run --max-steps 20
rm -r out                                                                  # or go to another machine
torchrun --nproc-per-node 2 train.py --url s3://bucket/run --max-steps 40 --resume
"""

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import LlamaConfig

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments

HERE = Path(__file__).resolve().parent
BLOCK = 128  # tokens of a sample


def bytes_of_python() -> Dataset:
    """Blocks of the bytes of a module that every Python has: nothing to download, and no tokenizer."""
    text = inspect.getsource(argparse).encode()
    blocks = [list(text[start : start + BLOCK]) for start in range(0, len(text) - BLOCK + 1, BLOCK)]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def main(argv: Sequence[str] | None = None) -> NanotronTrainer:
    """Train, and return the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="a folder of a bucket, such as s3://bucket/run")
    parser.add_argument("--output-dir", default=str(HERE / "out"), help="(%(default)s)")
    parser.add_argument("--max-steps", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--save-steps", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint, here or in the bucket")
    cli = parser.parse_args(argv)

    args = NanotronTrainingArguments(
        output_dir=cli.output_dir,
        max_steps=cli.max_steps,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        lr_scheduler_type="constant",  # so that it does not matter that the run is cut in two
        logging_steps=5,
        report_to="none",
        save_steps=cli.save_steps,
        save_total_limit=3,  # in the bucket
        async_save=True,  # a save holds the training up for the time of a copy
        remote_checkpoints=cli.url,
        remote_keep_local=1,  # of those that are uploaded
        remote_pending_limit=5,  # while the bucket does not answer
        remote_wait_timeout=600,  # seconds at the end
    )
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=BLOCK,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)
    trainer = NanotronTrainer(model=model, args=args, train_dataset=bytes_of_python())
    trainer.train(resume_from_checkpoint=cli.resume or None)
    return trainer


if __name__ == "__main__":
    main().end()

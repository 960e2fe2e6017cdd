"""Pretrain a small Llama on files that are read, tokenized and packed while it trains.

    torchrun --nproc-per-node 2 train.py --tokenizer TOKENIZER --files 'corpus/*.txt' --max-steps 20
    torchrun --nproc-per-node 1 train.py --tokenizer TOKENIZER --files 'corpus/*.txt' --max-steps 40 --resume

`--dataset NAME` streams a data set of the Hub instead. The second command goes on with the next sample, on another
number of ranks and workers.
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import AutoTokenizer, LlamaConfig, set_seed

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.data import TokenStream


def main(argv: list[str] | None = None) -> NanotronTrainer:
    """Train, and return the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder or name on the Hub")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--files", help="pattern of text files, each of which is a document")
    source.add_argument("--dataset", help="name on the Hub, with a column `text`")
    parser.add_argument(
        "--output-dir", type=Path, default=Path(__file__).resolve().parent / "out", help="(%(default)s)"
    )
    parser.add_argument("--sequence-length", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--lanes", type=int, default=8, help="a multiple of ranks times workers (%(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="of each rank (%(default)s)")
    parser.add_argument("--global-batch", type=int, default=8, help="samples of a step (%(default)s)")
    parser.add_argument("--max-steps", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    cli = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(cli.tokenizer)
    if cli.files:
        texts = load_dataset("text", data_files=cli.files, sample_by="document", split="train", streaming=True)
    else:
        texts = load_dataset(cli.dataset, split="train", streaming=True)
    stream = TokenStream(
        texts, cli.sequence_length, tokenizer=tokenizer, documents="pack", lanes=cli.lanes, shuffle_buffer=64
    )
    args = NanotronTrainingArguments(
        output_dir=str(cli.output_dir),
        max_steps=cli.max_steps,
        per_device_train_batch_size=1,
        dataloader_num_workers=cli.workers,
        lr_scheduler_type="constant",
        learning_rate=3e-3,
        logging_steps=5,
        save_steps=20,
        seed=0,
    )
    args.gradient_accumulation_steps = cli.global_batch // args.dp_size
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=cli.sequence_length,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)
    trainer = NanotronTrainer(model=model, args=args, train_dataset=stream, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=cli.resume or None)
    return trainer


if __name__ == "__main__":
    main()

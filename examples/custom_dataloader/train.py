"""Pretrain a tiny Llama on data of your own making, stop, and go on with the next sample.

python train.py --data stream --max-steps 20              # a stream that says where it is
python train.py --data loader --max-steps 20              # a DataLoader of your own
python train.py --data stream --max-steps 40 --resume
torchrun --nproc-per-node 2 train.py --data stream        # each sample goes to one of the two ranks
"""

import argparse
import inspect
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import LlamaConfig, set_seed

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments

HERE = Path(__file__).resolve().parent
LENGTH = 64  # bytes of a sample


def text() -> bytes:
    """A module that every Python has."""
    return inspect.getsource(argparse).encode()


class Passages(IterableDataset[dict[str, torch.Tensor]]):
    """Passages of a text from random places, without end. Sample n is the same in each run, and on each rank.

    `state_dict` is what the next sample depends on, in JSON's types: a checkpoint keeps it, and a run that is resumed
    goes on from there without reading what came before.
    """

    def __init__(self, source: bytes, seed: int = 0) -> None:
        self.source, self.seed, self.next = source, seed, 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            # The place follows from the number of the sample alone, not from a generator that was asked before.
            place = random.Random(f"{self.seed}/{self.next}").randrange(len(self.source) - LENGTH)
            ids = torch.tensor(list(self.source[place : place + LENGTH]))
            self.next += 1  # before the sample is given: it is the state behind it
            yield {"input_ids": ids, "labels": ids}

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


class Blocks(Dataset[bytes]):
    """The blocks of a text, for a loader that makes batches itself."""

    def __init__(self, source: bytes) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source) // LENGTH

    def __getitem__(self, number: int) -> bytes:
        return self.source[number * LENGTH : (number + 1) * LENGTH]


def collate(blocks: list[bytes]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([list(block) for block in blocks])
    return {"input_ids": ids, "labels": ids}


class OwnLoader(NanotronTrainer):
    """`get_train_dataloader` returns any DataLoader; `accelerator.prepare` deals its batches over the ranks.

    All ranks must shuffle alike, so the sampler has a seed. A run that is resumed reads the batches before its step
    once more, and drops them, as in Trainer.
    """

    def get_train_dataloader(self) -> DataLoader[Any]:
        order = torch.randperm(len(self.train_dataset), generator=torch.Generator().manual_seed(7)).tolist()
        size = self.args.per_device_train_batch_size
        loader = DataLoader(self.train_dataset, size, sampler=order, collate_fn=collate, drop_last=True)
        return self.accelerator.prepare(loader)


def main(argv: Sequence[str] | None = None, callbacks: Sequence[Any] = ()) -> NanotronTrainer:
    """Train, and return the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("stream", "loader"), default="stream", help="(%(default)s)")
    parser.add_argument("--output-dir", default=str(HERE / "out"), help="(%(default)s)")
    parser.add_argument("--max-steps", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--save-steps", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--gradient-accumulation-steps", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint of the output directory")
    cli = parser.parse_args(argv)

    args = NanotronTrainingArguments(
        output_dir=cli.output_dir,
        max_steps=cli.max_steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=cli.gradient_accumulation_steps,
        learning_rate=3e-3,
        lr_scheduler_type="constant",  # so that it does not matter that the run is cut in two
        logging_steps=1,
        save_steps=cli.save_steps,
        report_to="none",
    )
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )
    set_seed(args.seed)  # fresh weights follow from it
    model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)
    kind, data = (NanotronTrainer, Passages(text())) if cli.data == "stream" else (OwnLoader, Blocks(text()))
    trainer = kind(model=model, args=args, train_dataset=data, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=cli.resume or None)
    return trainer


if __name__ == "__main__":
    main().end()

"""Fine-tune a Hub model on conversations with TRL, on as many processes as torchrun starts.

torchrun --nproc-per-node 2 train.py --config run.yaml [--learning_rate 1e-5 ...]
"""

import dataclasses

from datasets import load_dataset
from trl import TrlParser

from hf_nanotron.trl import NanotronSFTConfig, NanotronSFTTrainer


@dataclasses.dataclass
class Run:
    """What is trained on what: the keys of run.yaml that are not those of NanotronSFTConfig."""

    model: str = dataclasses.field(metadata={"help": "Hub id or folder of a model and its tokenizer."})
    dataset: str = dataclasses.field(metadata={"help": "Hub id of a data set, or a JSON Lines file of conversations."})
    train_split: str = "train"
    eval_split: str | None = None


def load(run: Run, split: str):
    """A split, as `datasets` slices them: train[:90%]."""
    if run.dataset.endswith((".json", ".jsonl")):
        return load_dataset("json", data_files=run.dataset, split=split)
    return load_dataset(run.dataset, split=split)


def main() -> None:
    run, args = TrlParser((Run, NanotronSFTConfig)).parse_args_and_config()
    trainer = NanotronSFTTrainer(
        model=run.model,
        args=args,
        train_dataset=load(run, run.train_split),
        eval_dataset=None if run.eval_split is None else load(run, run.eval_split),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if run.eval_split is not None:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()

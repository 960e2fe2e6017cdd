"""Train a small Llama, or distil one that is trained into a smaller one.

python ../mixture_and_stages/prepare.py --output-dir out --max-chars 600000
torchrun --nproc-per-node 2 train.py --output-dir out/teacher --hidden-size 128
torchrun --nproc-per-node 2 train.py --output-dir out/student --teacher out/teacher --tp-size 2

With `--teacher`, the loss is that of Hinton et al. 2015 (arXiv:1503.02531): forward KL to the teacher at a temperature,
mixed with cross-entropy.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, set_seed

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.data import TokenDataset

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Distillation:
    """A `compute_loss_func`: `(1 - hard) * T^2 * KL(teacher || student) + hard * cross-entropy`, a mean over tokens.

    Args:
        temperature: T, by which the logits of both are divided in the KL divergence. T^2 keeps its gradient as large as
            that of the cross-entropy.
        hard: the share of the cross-entropy with the labels.
    """

    temperature: float = 2.0
    hard: float = 0.0

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None, shift_labels: Any = None
    ) -> torch.Tensor:
        """`outputs` has `logits` and `teacher_logits`, both `[B, S, V]`; `shift_labels` `[B, S]` are the targets."""
        counted = shift_labels != -100
        student, teacher, targets = outputs.logits[counted], outputs.teacher_logits[counted], shift_labels[counted]
        scaled = (student / self.temperature).log_softmax(-1), (teacher / self.temperature).log_softmax(-1)
        loss = (1 - self.hard) * self.temperature**2 * F.kl_div(*scaled, reduction="sum", log_target=True)
        if self.hard:
            loss = loss + self.hard * F.cross_entropy(student, targets, reduction="sum")
        return loss / (counted.sum() if num_items_in_batch is None else num_items_in_batch)


def main(argv: Sequence[str] | None = None) -> NanotronTrainer:
    """Train, save, and return the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE / "out", help="what prepare.py has written (%(default)s)")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--tokens", nargs=2, metavar=("TRAIN", "EVAL"), help="folders (code of prepare.py)")
    parser.add_argument("--sequence-length", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--model", help="a folder, or a Hub id, to begin with (fresh weights)")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--learning-rate", type=float, default=6e-3, help="(%(default)s)")
    parser.add_argument("--teacher", help="a folder, or a Hub id, of a model of the same tokenizer (none)")
    parser.add_argument("--temperature", type=float, default=2.0, help="(%(default)s)")
    parser.add_argument("--hard", type=float, default=0.1, help="share of the cross-entropy (%(default)s)")
    parser.add_argument("--hidden-size", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--max-steps", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--per-device-train-batch-size", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--gradient-accumulation-steps", type=int, default=4, help="(%(default)s)")
    for size in ("tp", "cp", "pp"):
        parser.add_argument(f"--{size}-size", type=int, default=1, help="(%(default)s)")
    cli = parser.parse_args(argv)

    args = NanotronTrainingArguments(
        output_dir=cli.output_dir,
        max_steps=cli.max_steps,
        per_device_train_batch_size=cli.per_device_train_batch_size,
        gradient_accumulation_steps=cli.gradient_accumulation_steps,
        tp_size=cli.tp_size,
        cp_size=cli.cp_size,
        pp_size=cli.pp_size,
        bf16=cli.bf16,
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
    tokenizer = AutoTokenizer.from_pretrained(cli.model or cli.data / "tokenizer")
    set_seed(args.seed)
    if cli.model is not None:
        model = AutoModelForCausalLM.from_pretrained(cli.model, parallel=args.parallel)
    else:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=cli.hidden_size,
            intermediate_size=3 * cli.hidden_size,
            num_hidden_layers=cli.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=cli.sequence_length,
            initializer_range=0.06,  # a model this narrow learns slowly from the usual 0.02
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
        model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)
    taught: dict[str, Any] = {}
    if cli.teacher is not None:
        teacher = AutoModelForCausalLM.from_pretrained(cli.teacher, mesh=model.mesh)
        taught = {"teacher": teacher, "compute_loss_func": Distillation(cli.temperature, cli.hard)}
    rows = [
        TokenDataset(folder, cli.sequence_length, documents="mask")
        for folder in cli.tokens or (cli.data / "tokens" / "code", cli.data / "held_out" / "code")
    ]
    trainer = NanotronTrainer(
        model=model,
        args=args,
        train_dataset=rows[0],
        eval_dataset=rows[1],
        processing_class=tokenizer,
        **taught,
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main().end()

"""Pretrain a small Llama on a mixture of three sets in two stages. Run prepare.py first.

torchrun --nproc-per-node 2 train.py --tp-size 2 --gradient-accumulation-steps 4
hf-nanotron train run.yaml          # the same run from a YAML file
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig, set_seed

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.data import Mixture, Stage, Stages, TokenDataset

HERE = Path(__file__).resolve().parent
FIRST = {"code": 0.6, "docstrings": 0.3, "reference": 0.1}
SECOND = {"code": 0.3, "docstrings": 0.3, "reference": 0.4}


def tokens(folder: Path, length: int) -> TokenDataset:
    """Rows in the order of the files: a set then goes on with its next token in rows of another length."""
    return TokenDataset(folder, length, documents="mask", shuffle=False)


def main(argv: Sequence[str] | None = None) -> NanotronTrainer:
    """Train, evaluate each set by itself, save, and return the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE / "out", help="what prepare.py has written (%(default)s)")
    parser.add_argument("--output-dir", default=str(HERE / "out" / "run"), help="(%(default)s)")
    parser.add_argument("--max-steps", type=int, default=150, help="(%(default)s)")
    parser.add_argument("--save-steps", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--second-stage", type=int, default=102_400, help="tokens before it (%(default)s)")
    parser.add_argument("--gradient-accumulation-steps", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--tp-size", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint of the output directory")
    cli = parser.parse_args(argv)

    args = NanotronTrainingArguments(
        output_dir=cli.output_dir,
        max_steps=cli.max_steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=cli.gradient_accumulation_steps,
        tp_size=cli.tp_size,
        learning_rate=6e-3,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": cli.max_steps // 3, "decay_type": "1-sqrt"},
        warmup_steps=cli.max_steps // 10,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=10,
        logging_first_step=True,
        save_steps=cli.save_steps,
        report_to="none",
    )
    tokenizer = AutoTokenizer.from_pretrained(cli.data / "tokenizer")

    def mixture(weights: dict[str, float], length: int) -> Mixture:
        sets = {name: tokens(cli.data / "tokens" / name, length) for name in weights}
        return Mixture(sets, weights, seed=args.seed, max_epochs=None)

    stages = Stages(
        [
            Stage(mixture(FIRST, 128)),
            Stage(mixture(SECOND, 256), start_tokens=cli.second_stage, global_batch_size=4),
        ]
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.06,  # a model this narrow learns slowly from the usual 0.02
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)
    trainer = NanotronTrainer(
        model=model,
        args=args,
        train_dataset=stages,
        eval_dataset={name: tokens(cli.data / "held_out" / name, 128) for name in FIRST},
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=cli.resume or None)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main().end()

"""Find weights for three sets by DoReMi, and train on them by these weights.

python ../mixture_and_stages/prepare.py --output-dir out --max-chars 600000
torchrun --nproc-per-node 2 train.py --output-dir out/reference
torchrun --nproc-per-node 2 train.py --output-dir out/proxy --reference out/reference
torchrun --nproc-per-node 2 train.py --output-dir out/main --weights out/proxy/domain_weights.json --hidden-size 128

Reference and proxy are small, and sample the sets evenly; the model that is trained by the weights may be larger.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig, set_seed

from hf_nanotron import AutoModelForCausalLM, DoReMi, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.data import Mixture, TokenDataset

HERE = Path(__file__).resolve().parent
SETS = ("code", "docstrings", "reference")


def main(argv: Sequence[str] | None = None) -> NanotronTrainer:
    """Train, evaluate each set by itself, save, and return the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE / "out", help="what prepare.py has written (%(default)s)")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--reference", help="train a proxy, compared with this model")
    parser.add_argument("--weights", type=Path, help="JSON with the weight of each set (all alike)")
    parser.add_argument("--rate", type=float, default=1.0, help="eta of DoReMi (%(default)s)")
    parser.add_argument("--smoothing", type=float, default=1e-3, help="c of DoReMi (%(default)s)")
    parser.add_argument("--hidden-size", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--max-steps", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--save-steps", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--gradient-accumulation-steps", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--tp-size", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--pp-size", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint of the output directory")
    cli = parser.parse_args(argv)

    args = NanotronTrainingArguments(
        output_dir=str(cli.output_dir),
        max_steps=cli.max_steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=cli.gradient_accumulation_steps,
        tp_size=cli.tp_size,
        pp_size=cli.pp_size,
        learning_rate=6e-3,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, cli.max_steps // 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=10,
        logging_first_step=True,
        save_steps=cli.save_steps,
        report_to="none",
        seed=1,
    )
    tokenizer = AutoTokenizer.from_pretrained(cli.data / "tokenizer")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=cli.hidden_size,
        intermediate_size=3 * cli.hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.06,  # a model this narrow learns slowly from the usual 0.02
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)
    doremi = None
    if cli.reference is not None:
        reference = AutoModelForCausalLM.from_pretrained(cli.reference, mesh=model.mesh)
        doremi = DoReMi(reference, rate=cli.rate, smoothing=cli.smoothing)

    def tokens(folder: str, name: str) -> TokenDataset:
        return TokenDataset(cli.data / folder / name, 128, documents="mask")

    weights = dict.fromkeys(SETS, 1 / len(SETS)) if cli.weights is None else json.loads(cli.weights.read_text())
    trainer = NanotronTrainer(
        model=model,
        args=args,
        train_dataset=Mixture({name: tokens("tokens", name) for name in SETS}, weights, seed=1, max_epochs=None),
        eval_dataset={name: tokens("held_out", name) for name in SETS},
        processing_class=tokenizer,
        doremi=doremi,
    )
    trainer.train(resume_from_checkpoint=cli.resume or None)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    if doremi is not None and trainer.is_world_process_zero():
        path = cli.output_dir / "domain_weights.json"
        path.write_text(json.dumps(doremi.weights, indent=2) + "\n")
        print(f"{path}: {doremi.weights}")
    return trainer


if __name__ == "__main__":
    main().end()

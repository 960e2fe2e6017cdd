"""Pretrain a small Llama on the prepared data with tensor, pipeline and data parallelism.

    torchrun --nproc-per-node 4 train.py --tp-size 2 --pp-size 2

The data-parallel size is the number of processes divided by tp x pp. Run `prepare.py` first.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_from_disk
from transformers import AutoTokenizer, LlamaConfig
from transformers.trainer_utils import get_last_checkpoint

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments

HERE = Path(__file__).resolve().parent


def plot_loss(log_history: list[dict[str, float]], path: Path) -> None:
    """Draw the logged training loss, and the evaluation loss where there is one, into a PNG."""
    try:
        import matplotlib
    except ImportError:
        print(f"matplotlib is not installed, so {path} is not drawn: pip install matplotlib")
        return
    matplotlib.use("Agg")  # draws files; needs no display
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss per token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train, evaluate, save, and draw the loss curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=HERE / "out", help="has tokenizer/ and data/ (%(default)s)")
    parser.add_argument("--tp-size", type=int, default=2, help="ranks that share every layer (%(default)s)")
    parser.add_argument("--pp-size", type=int, default=2, help="ranks that share the stack of layers (%(default)s)")
    parser.add_argument("--max-steps", type=int, default=200, help="optimizer steps (%(default)s)")
    parser.add_argument("--per-device-train-batch-size", type=int, default=2, help="micro-batch (%(default)s)")
    parser.add_argument("--gradient-accumulation-steps", type=int, default=4, help="micro-batches (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=6e-3, help="(%(default)s)")
    parser.add_argument("--hidden-size", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--num-layers", type=int, default=4, help="(%(default)s)")
    cli = parser.parse_args()

    data = load_from_disk(str(cli.output_dir / "data"))
    tokenizer = AutoTokenizer.from_pretrained(cli.output_dir / "tokenizer")
    gpu = torch.cuda.is_available()

    args = NanotronTrainingArguments(
        output_dir=str(cli.output_dir),
        max_steps=cli.max_steps,
        per_device_train_batch_size=cli.per_device_train_batch_size,
        gradient_accumulation_steps=cli.gradient_accumulation_steps,  # the micro-batches of the pipeline
        tp_size=cli.tp_size,
        pp_size=cli.pp_size,
        learning_rate=cli.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, cli.max_steps // 10),
        adam_beta2=0.95,
        weight_decay=0.1,
        logging_steps=10,
        logging_first_step=True,
        save_steps=cli.max_steps,  # one checkpoint, at the end
        bf16=gpu,
        use_cpu=not gpu,  # NCCL between GPUs, gloo between CPU processes
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=cli.hidden_size,
        intermediate_size=3 * cli.hidden_size,
        num_hidden_layers=cli.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        initializer_range=0.06,  # a model this narrow learns slowly from the usual 0.02
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)

    trainer = NanotronTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.evaluate()
    if trainer.is_world_process_zero():
        plot_loss(trainer.state.log_history, cli.output_dir / "loss.png")
        print(f"Saved {get_last_checkpoint(str(cli.output_dir))}")
    trainer.end()


if __name__ == "__main__":
    main()

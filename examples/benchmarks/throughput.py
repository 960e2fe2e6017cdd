"""Tokens per second of a Llama shape on random tokens, through `NanotronTrainer`.

    torchrun --nproc-per-node 2 throughput.py --shape 1b --tp-size 2

Prints one JSON line on rank 0: what ran, on what, and the median step after the warm-up steps.
"""

import argparse
import json
import statistics
import tempfile
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import LlamaConfig, TrainerCallback, default_data_collator

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    "1b": {  # Llama-3.2-1B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
}


class Steps(TrainerCallback):
    """Keeps every log line."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.lines.append(dict(logs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--per-device-train-batch-size", type=int, default=2)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=4)
    parser.add_argument("--max-steps", type=int, default=20)
    parser.add_argument("--warm-up-steps", type=int, default=5, help="steps left out of the median")
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--pp-size", type=int, default=1)
    parser.add_argument("--pp-schedule", default="1f1b")
    parser.add_argument("--pp-virtual-stages", type=int, default=1)
    parser.add_argument("--activation-checkpointing", action="store_true")
    cli = parser.parse_args()

    gpu = torch.cuda.is_available()
    args = NanotronTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=cli.max_steps,
        per_device_train_batch_size=cli.per_device_train_batch_size,
        gradient_accumulation_steps=cli.gradient_accumulation_steps,
        tp_size=cli.tp_size,
        pp_size=cli.pp_size,
        pp_schedule=cli.pp_schedule,
        pp_virtual_stages=cli.pp_virtual_stages,
        activation_checkpointing=cli.activation_checkpointing,
        learning_rate=3e-4,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        bf16=gpu,
        use_cpu=not gpu,
    )
    config = LlamaConfig(max_position_embeddings=cli.sequence_length, **SHAPES[cli.shape])
    transformers.set_seed(0)
    model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (64, cli.sequence_length), generator=generator).tolist()
    steps = Steps()
    trainer = NanotronTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        data_collator=default_data_collator,
        callbacks=[steps],
    )
    trainer.train()
    timed = [line["tokens_per_second_per_device"] for line in steps.lines[cli.warm_up_steps :]]
    if trainer.is_world_process_zero():
        result = {
            "shape": cli.shape,
            "parameters": model.num_parameters(),
            "sequence_length": cli.sequence_length,
            "micro_batch": cli.per_device_train_batch_size,
            "micro_batches": cli.gradient_accumulation_steps,
            "tp": trainer.mesh.tp_size,
            "pp": trainer.mesh.pp_size,
            "dp": trainer.mesh.dp_size,
            "schedule": cli.pp_schedule if cli.pp_size > 1 else None,
            "tokens_per_second_per_device": round(statistics.median(timed)),
            "spread": [round(min(timed)), round(max(timed))],
            "mfu": round(statistics.median([line.get("mfu", 0.0) for line in steps.lines[cli.warm_up_steps :]]), 4),
            "peak_memory_gib": round(max(line["peak_memory_gib"] for line in steps.lines), 2),
            "first_loss": steps.lines[0]["loss"],
            "last_loss": steps.lines[-1]["loss"],
            "device": torch.cuda.get_device_name() if gpu else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        print(json.dumps(result), flush=True)
    trainer.end()


if __name__ == "__main__":
    main()

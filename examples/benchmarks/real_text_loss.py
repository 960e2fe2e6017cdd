"""Losses of one small model on real text, from one seed, under several training arguments: what does precision cost?

    python real_text_loss.py --row name=bf16 --row fp8=tensorwise --row fp8=rowwise --row name=again --out losses.json
    python real_text_loss.py --model gemma4 --row name=ours --row name=fp32,trainer=stock,bf16=false \\
        --row name=autocast,trainer=stock

Every row begins from the same weights and reads the same samples in the same order; the first row is the one that the
others are compared with. Each `--row` holds fields of `NanotronTrainingArguments` and may have a `name`; with
`trainer=stock` it trains with transformers' own Trainer, whose `bf16=true` is autocast, in one process. Prints the
mean loss of each ten steps, the mean of the last twenty, and its relative difference; a row beyond `--limit` makes the
exit status 1. A row with the arguments of the first shows the noise. Works under torchrun.

The Llama has 110 M parameters (12 layers of 768, 32,768 byte pairs, tied), the Gemma 4 113 M; 200 steps of 32 samples
of 1,024 tokens read about 20 MB, once.
"""

import argparse
import contextlib
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from datasets import Dataset
from real_text import blocks, byte_pairs, documents
from rows import label, parse_row
from transformers import (
    AutoConfig,
    LlamaConfig,
    PreTrainedConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments

WINDOW, LAST = 10, 20  # steps of a mean that is printed, and of the one that counts


class Losses(TrainerCallback):
    """The loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.values.append(logs["loss"])


def means(losses: Sequence[float], window: int = WINDOW) -> list[float]:
    """The mean of each `window` steps; a rest at the end is left out."""
    return [statistics.fmean(losses[at : at + window]) for at in range(0, len(losses) - window + 1, window)]


def differences(rows: Mapping[str, Sequence[float]], last: int = LAST) -> dict[str, dict[str, Any]]:
    """Of each row: mean of the last steps, its relative difference from the first row's, and the largest of any window.

    Raises:
        ValueError: a row has fewer steps than `last`, or than the first row.
    """
    base = next(iter(rows.values()))
    table = {}
    for name, losses in rows.items():
        if len(losses) < last or len(losses) != len(base):
            raise ValueError(
                f"row {name!r} has {len(losses)} losses; {last} at least, and as many as the first, count."
            )
        final, reference = statistics.fmean(losses[-last:]), statistics.fmean(base[-last:])
        largest = max((abs(a - b) / b for a, b in zip(means(losses), means(base), strict=True)), default=0.0)
        table[name] = {
            "means": [round(mean, 4) for mean in means(losses)],
            "last": final,
            "relative": (final - reference) / reference,
            "largest_of_a_window": largest,
        }
    return table


def llama(cli: argparse.Namespace) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=cli.vocabulary,
        hidden_size=cli.hidden_size,
        intermediate_size=cli.hidden_size * 8 // 3,
        num_hidden_layers=cli.layers,
        num_attention_heads=cli.hidden_size // 64,
        num_key_value_heads=cli.hidden_size // 64,
        max_position_embeddings=cli.sequence_length,
        tie_word_embeddings=True,
    )


def gemma4(cli: argparse.Namespace) -> PreTrainedConfig:
    """As the small Gemma 4 are: every third layer sees all, the last third shares keys and values, and each layer has
    an embedding of its own.
    """
    kinds = ["full_attention" if index % 3 == 2 else "sliding_attention" for index in range(cli.layers)]
    return AutoConfig.for_model(
        "gemma4_text",
        vocab_size=cli.vocabulary,
        vocab_size_per_layer_input=cli.vocabulary,
        hidden_size=cli.hidden_size,
        hidden_size_per_layer_input=16,
        intermediate_size=cli.hidden_size * 8 // 3,
        num_hidden_layers=cli.layers,
        num_attention_heads=cli.hidden_size // 64,
        num_key_value_heads=max(1, cli.hidden_size // 256),
        head_dim=64,
        global_head_dim=128,
        sliding_window=256,
        layer_types=kinds,
        num_kv_shared_layers=cli.layers // 3,
        max_position_embeddings=cli.sequence_length,
        tie_word_embeddings=True,
    )


MODELS: dict[str, Callable[[argparse.Namespace], PreTrainedConfig]] = {"llama": llama, "gemma4": gemma4}


def train(row: dict[str, Any], samples: Dataset, cli: argparse.Namespace) -> list[float]:
    """The loss of each step of one row."""
    is_stock = row.get("trainer", "nanotron") == "stock"
    gpu = torch.cuda.is_available()
    fields = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": cli.steps,
        "per_device_train_batch_size": cli.per_device_train_batch_size,
        "learning_rate": 6e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, cli.steps // 10),
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "seed": cli.seed,
        "bf16": gpu,
        "use_cpu": not gpu,
    }
    fields |= {key: row[key] for key in row if key not in ("name", "trainer")}
    args = TrainingArguments(**fields) if is_stock else NanotronTrainingArguments(**fields)
    transformers.set_seed(cli.seed)
    config = MODELS[cli.model](cli)
    model = AutoModelForCausalLM.from_config(config, parallel=getattr(args, "parallel", None))
    mesh = model.mesh
    with contextlib.closing(mesh):
        if is_stock:
            model = as_stock(model, config)
        record = Losses()
        trainer = (Trainer if is_stock else NanotronTrainer)(
            model=model, args=args, train_dataset=samples, data_collator=default_data_collator, callbacks=[record]
        )
        trainer.callback_handler.pop_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train()
    return record.values


def as_stock(model: Any, config: PreTrainedConfig) -> Any:
    """The stock model with the weights of ours, which are drawn in another order.

    Raises:
        ValueError: there are several processes, each with a part of the weights.
    """
    if model.mesh.world_size > 1:
        raise ValueError("trainer=stock trains in one process; start the script without torchrun.")
    stock = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stock.load_state_dict(model.state_dict())
    return stock


def make_parser(description: str | None, steps: int, megabytes: float) -> argparse.ArgumentParser:
    """Options of the model, its text and its rows; `steps` and `megabytes` are defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", help="fields of the training arguments, such as fp8=rowwise")
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--per-device-train-batch-size", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--megabytes", type=float, default=megabytes, help="of text, 10 at least for a figure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser


def main() -> None:
    parser = make_parser(__doc__, steps=200, megabytes=24.0)
    parser.add_argument("--limit", type=float, default=0.005, help="largest acceptable relative difference")
    cli = parser.parse_args()
    if cli.steps < LAST:
        parser.error(f"--steps {cli.steps}: the last {LAST} count")

    rows = [parse_row(text) for text in cli.row or [""]]
    names = [label(row) for row in rows]
    if len(set(names)) < len(names):
        parser.error(f"two rows have one name: {', '.join(names)}; give them name=...")
    texts = documents(cli.megabytes)
    tokenizer = byte_pairs(texts, cli.vocabulary)
    found = blocks(texts, tokenizer, cli.sequence_length)
    samples = Dataset.from_dict({"input_ids": found, "labels": found}).with_format("torch")
    print(f"{len(texts)} documents, {len(samples)} samples of {cli.sequence_length} tokens", flush=True)

    setup = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    setup.update(torch=torch.__version__, steps=cli.steps, samples=len(samples), limit=cli.limit)
    losses: dict[str, list[float]] = {}
    table: dict[str, dict[str, Any]] = {}
    for name, row in zip(names, rows, strict=True):
        losses[name] = train(row, samples, cli)
        gc.collect()
        table = differences(losses)
        if int(dist.get_rank() if dist.is_initialized() else 0) == 0:
            line = table[name]
            print(
                f"{name}: last {LAST} steps {line['last']:.4f} ({line['relative']:+.3%}), means {line['means']}",
                flush=True,
            )
            if cli.out is not None:  # after each row: a later one may fail
                cli.out.write_text(json.dumps({"setup": setup, "rows": table, "losses": losses}, indent=1))
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(any(abs(line["relative"]) > cli.limit for line in table.values()))


if __name__ == "__main__":
    main()

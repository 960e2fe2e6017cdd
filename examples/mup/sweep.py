"""The best learning rate of a narrow and of a wide model, with the standard and the spectral parametrization.

Trains small Llamas on the bytes of the standard library's source, so that nothing is downloaded, and prints the loss of
the last steps for each width and learning rate. The best rate is marked by a star.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, PrinterCallback, TrainerCallback, set_seed

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments

BASE = 64


def byte_rows(rows: int, length: int) -> Dataset:
    """Rows of bytes, spread over the files of the standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    data = b"\n".join(path.read_bytes() for path in files)
    starts = range(0, len(data) - length, (len(data) - length) // rows)
    ids = [list(data[start : start + length]) for start in starts][:rows]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


class Losses(TrainerCallback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.values.append(float(logs["loss"]))


def train(width: int, rate: float, parametrization: str, steps: int, rows: Dataset) -> float:
    """The mean loss of the last tenth of a run."""
    base = {"base_hidden_size": BASE} if parametrization == "spectral" else {}
    with tempfile.TemporaryDirectory() as folder:
        args = NanotronTrainingArguments(
            folder,
            parametrization=parametrization,
            learning_rate=rate,
            max_steps=steps,
            per_device_train_batch_size=8,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=steps // 10,
            adam_beta2=0.95,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **base,
        )
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=2,
            num_attention_heads=width // 16,
            num_key_value_heads=width // 16,
            head_dim=16,
            tie_word_embeddings=False,
        )
        set_seed(args.seed)
        model = AutoModelForCausalLM.from_config(
            config, parallel=args.parallel, parametrization=args.spectral, dtype=torch.float32
        )
        losses = Losses()
        trainer = NanotronTrainer(model=model, args=args, train_dataset=rows, callbacks=[losses])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    last = losses.values[-max(1, steps // 10) :]
    return sum(last) / len(last)


def main(argv: list[str] | None = None) -> dict[str, dict[int, dict[float, float]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rates", type=float, nargs="+", default=[2**-exponent for exponent in (10, 9, 8, 7, 6, 5)])
    parser.add_argument("--parametrizations", nargs="+", default=["standard", "spectral"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=64)
    args = parser.parse_args(argv)
    rows = byte_rows(8 * args.steps, args.length)
    found: dict[str, dict[int, dict[float, float]]] = {}
    for name in args.parametrizations:
        print(f"{name:<12}" + "".join(f"{rate:>10.4g}" for rate in args.rates))
        for width in args.widths:
            losses = {rate: train(width, rate, name, args.steps, rows) for rate in args.rates}
            found.setdefault(name, {})[width] = losses
            best = min(losses.values())
            marked = "".join(f"{loss:>9.3f}{'*' if loss == best else ' '}" for loss in losses.values())
            print(f"  width {width:<4}{marked}", flush=True)
    return found


if __name__ == "__main__":
    main()

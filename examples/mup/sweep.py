"""The best learning rate of narrow and of wide models, with the standard and the spectral parametrization.

Trains small Llamas on the bytes of the standard library's source, so that nothing is downloaded. Prints the loss of the
last steps, a mean over seeds, for each width and learning rate, and the rate of the lowest loss. Runs that --out has
are not repeated, so a sweep that was ended goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, PrinterCallback, TrainerCallback, set_seed

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments

BASE = 64
ROWS_OF_A_STEP = 8
Run = tuple[str, int, float, int]  # parametrization, width, learning rate, seed


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


def train(run: Run, steps: int, length: int, spread: float) -> float:
    """The mean loss of the last tenth of a run whose base draws weights with this standard deviation."""
    parametrization, width, rate, seed = run
    torch.set_num_threads(1)
    base = {"base_hidden_size": BASE} if parametrization == "spectral" else {}
    with tempfile.TemporaryDirectory() as folder:
        args = NanotronTrainingArguments(
            folder,
            parametrization=parametrization,
            learning_rate=rate,
            max_steps=steps,
            per_device_train_batch_size=ROWS_OF_A_STEP,
            lr_scheduler_type="linear",
            warmup_steps=steps // 10,
            adam_beta2=0.95,
            seed=seed,
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
            initializer_range=spread,
        )
        set_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, parallel=args.parallel, parametrization=args.spectral, dtype=torch.float32
        )
        losses, rows = Losses(), byte_rows(ROWS_OF_A_STEP * steps, length)
        trainer = NanotronTrainer(model=model, args=args, train_dataset=rows, callbacks=[losses])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return statistics.mean(losses.values[-max(1, steps // 10) :])


def train_all(runs: list[Run], workers: int, *settings: Any) -> Iterator[tuple[Run, float]]:
    """Runs and their losses, as they end."""
    if workers == 1:
        yield from ((run, train(run, *settings)) for run in runs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        started = {pool.submit(train, run, *settings): run for run in runs}
        yield from ((started[future], future.result()) for future in as_completed(started))


def best_rate(losses: dict[float, float]) -> float:
    """Where a parabola through the lowest loss and its neighbors, over log2(rate), is lowest."""
    rates = sorted(losses)
    at = min(range(len(rates)), key=lambda index: losses[rates[index]])
    if at in (0, len(rates) - 1):
        return rates[at]
    left, middle, right = (losses[rate] for rate in rates[at - 1 : at + 2])
    return rates[at] * float(2 ** ((left - right) / (2 * (left - 2 * middle + right))))


def table(found: dict[Run, float]) -> Iterator[str]:
    """Lines of text. The best rates are in powers of 2, the mean and the spread of those of the seeds."""
    rates = sorted({rate for _, _, rate, _ in found})
    for name in sorted({run[0] for run in found}):
        yield f"{name:<12}" + "".join(f"{'2^' + format(math.log2(rate), '.3g'):>9}" for rate in rates) + "   best rate"
        for width in sorted({run[1] for run in found if run[0] == name}):
            by_seed: dict[int, dict[float, float]] = {}
            for (*row, rate, seed), loss in found.items():
                if row == [name, width]:
                    by_seed.setdefault(seed, {})[rate] = loss
            whole = [losses for losses in by_seed.values() if len(losses) == len(rates)]
            if not whole:
                continue
            means = [statistics.mean(losses[rate] for losses in whole) for rate in rates]
            best = [math.log2(best_rate(losses)) for losses in whole]
            marked = "".join(f"{loss:>8.3f}{'*' if loss == min(means) else ' '}" for loss in means)
            yield f"  width {width:<4}{marked}   2^{statistics.mean(best):.1f} ± {statistics.pstdev(best):.1f}"


def draw(found: dict[Run, float], path: Path) -> None:
    """Losses over learning rates, a panel for each parametrization and a line for each width."""
    import matplotlib

    matplotlib.use("Agg")  # draws files; needs no display
    import matplotlib.pyplot as plt

    names = sorted({run[0] for run in found})
    figure, panels = plt.subplots(
        1, len(names), figsize=(5 * len(names), 4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, name in zip(panels[0], names, strict=True):
        for width in sorted({run[1] for run in found if run[0] == name}):
            by_rate: dict[float, list[float]] = {}
            for run, loss in sorted(found.items()):
                if run[:2] == (name, width):
                    by_rate.setdefault(run[2], []).append(loss)
            axes.plot(list(by_rate), [statistics.mean(losses) for losses in by_rate.values()], "o-", label=str(width))
        axes.set_xscale("log", base=2)
        axes.set(title=name, xlabel="learning rate", ylabel="loss")
        axes.legend(title="hidden size")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> dict[Run, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--rates", type=float, nargs="+", default=[2**-exponent for exponent in range(11, 4, -1)])
    parser.add_argument("--parametrizations", nargs="+", default=["spectral", "standard"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--spread", type=float, default=0.1, help="initializer_range of the config")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--out", type=Path, help="folder for losses.jsonl, table.txt and sweep.png")
    args = parser.parse_args(argv)
    found: dict[Run, float] = {}
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        for line in (
            (args.out / "losses.jsonl").read_text().splitlines() if (args.out / "losses.jsonl").exists() else ()
        ):
            *run, loss = json.loads(line)
            found[tuple(run)] = loss
    # Seeds one after the other, and in each the longest runs first.
    widths = sorted(args.widths, reverse=True)
    runs = [
        (name, width, rate, seed)
        for seed, width, name, rate in itertools.product(range(args.seeds), widths, args.parametrizations, args.rates)
    ]
    missing = [run for run in runs if run not in found]
    for run, loss in train_all(missing, args.workers, args.steps, args.length, args.spread):
        found[run] = loss
        if args.out is not None:
            with open(args.out / "losses.jsonl", "a") as file:
                file.write(json.dumps([*run, loss]) + "\n")
    lines = "\n".join(table(found))
    print(lines)
    if args.out is not None:
        (args.out / "table.txt").write_text(lines + "\n")
        draw(found, args.out / "sweep.png")
    return found


if __name__ == "__main__":
    main()

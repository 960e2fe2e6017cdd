"""How long a step waits for its data: a mixture of token sets, packed, beside the same rows held in memory.

    python examples/benchmarks/data_wait.py --shape 1b --out rows.jsonl
    python examples/benchmarks/data_wait.py --shape tiny --sequence-length 64 --tokens 20000 --bf16    # on a CPU

Writes `--sets` token files of documents with log-normal lengths, and trains on them with `documents="pack"`: by the
main process, by `--workers` data workers, and on rows that were read before. Each is one run of `--warmup-steps` and
`--timed-steps`, in turns (`--rounds`). Prints one JSON line a run:

    tokens_per_second    median over the timed steps
    host_share           of a step in which the host reads a batch; the device computes meanwhile
    idle_share           of a step in which the device has nothing to compute while the host reads

and at the end the ratios of speed to the rows in memory. Without a GPU the host is the device, and both are equal.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from clock import Watch
from rows import Record
from shapes import SHAPES, make_config

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.data import Mixture, TokenDataset


class Timed(NanotronTrainer):
    """Notes, for the reading of each step, the host's time and the time for which the device had nothing to do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.host: list[float] = []
        self.marks: list[tuple[Any, Any]] = []

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        before, began = event(), time.perf_counter()
        window = super().get_batch_samples(epoch_iterator, *args, **kwargs)
        self.host.append(time.perf_counter() - began)
        self.marks.append((before, event()))
        return window

    def idle(self) -> list[float]:
        """Seconds of each step. Waits for the device."""
        if not torch.cuda.is_available():
            return self.host
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in self.marks]


def event() -> Any:
    """A moment on the device's time line; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.Event(enable_timing=True)
    found.record()
    return found


def write(path: Path, tokens: int, vocabulary: int, seed: int, median: float = 600, sigma: float = 1.2) -> None:
    """Random ids of four bytes, in documents of log-normal lengths."""
    rng = np.random.default_rng(seed)
    lengths = np.maximum(rng.lognormal(np.log(median), sigma, max(int(tokens / median), 1)).astype(np.int64), 1)
    ends = np.cumsum(lengths)
    ends = np.append(ends[ends < tokens], tokens)
    rng.integers(1, vocabulary, tokens, dtype=np.uint32).tofile(path)
    ends.astype("<u8").tofile(f"{path}.index")


def mixture(folder: Path, cli: argparse.Namespace, vocabulary: int) -> Mixture:
    """Of `cli.sets` sets with weights 1, 2, …"""
    sets = {}
    for number in range(cli.sets):
        name = f"set{number:02d}"
        path = folder / f"{name}.ds"
        if not path.exists():
            write(path, cli.tokens, vocabulary, number)
        sets[name] = TokenDataset(path, cli.sequence_length, token_size=4, documents="pack", vocab_size=vocabulary)
    return Mixture(sets, [number + 1.0 for number in range(cli.sets)], max_epochs=100)


class Held:
    """Rows in memory, in the order of the mixture."""

    def __init__(self, data: Mixture, rows: int) -> None:
        self.rows = data.__getitems__(range(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {name: value for name, value in self.rows[place].items() if name != "domain"}


def run(kind: str, cli: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run of `kind`: memory, main or workers."""
    gpu = torch.cuda.is_available()
    config = make_config(cli.shape, cli.sequence_length)
    watch = Watch(cli.warmup_steps, cli.timed_steps)
    data: Any = mixture(folder, cli, config.vocab_size)
    samples = cli.per_device_train_batch_size * cli.gradient_accumulation_steps
    args = NanotronTrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=watch.steps,
        per_device_train_batch_size=cli.per_device_train_batch_size,
        gradient_accumulation_steps=cli.gradient_accumulation_steps,
        learning_rate=3e-4,
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        bf16=gpu or cli.bf16,
        use_cpu=not gpu,
        dataloader_num_workers=cli.workers if kind == "workers" else 0,
        train_sampling_strategy="sequential",
    )
    transformers.set_seed(0)
    model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)
    trainer = Timed(
        model=model,
        args=args,
        train_dataset=Held(data, samples * watch.steps) if kind == "memory" else data,
        data_collator=transformers.default_data_collator if kind == "memory" else None,
        callbacks=[Record(watch)],
    )
    trainer.train()
    seconds = watch.seconds()
    first, last = cli.warmup_steps, cli.warmup_steps + cli.timed_steps
    total = sum(seconds)
    result = {
        "kind": kind,
        "tokens_per_second": round(samples * cli.sequence_length / statistics.median(seconds)),
        "spread": [round(samples * cli.sequence_length / value) for value in (max(seconds), min(seconds))],
        "step_ms": round(1e3 * statistics.median(seconds), 3),
        "host_share": round(sum(trainer.host[first:last]) / total, 6),
        "idle_share": round(sum(trainer.idle()[first:last]) / total, 6),
        "losses": watch.losses,
        "shape": cli.shape,
        "sets": cli.sets,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": datetime.date.today().isoformat(),
    }
    trainer.mesh.close()
    del trainer, model
    if gpu:
        torch.cuda.empty_cache()
    return result


KINDS = ("memory", "main", "workers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--per-device-train-batch-size", type=int, default=2)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=4)
    parser.add_argument("--sets", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=4_000_000, help="of each set")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--warmup-steps", type=int, default=5)
    parser.add_argument("--timed-steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="without a GPU as well")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    cli = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(cli.rounds):
            for kind in KINDS:
                result = run(kind, cli, Path(folder))
                results[kind].append(result)
                print(line := json.dumps(result), flush=True)
                if cli.out is not None:
                    with cli.out.open("a") as file:
                        file.write(line + "\n")
    held = statistics.median(result["tokens_per_second"] for result in results["memory"])
    for kind in KINDS[1:]:
        speed = statistics.median(result["tokens_per_second"] for result in results[kind])
        idle = max(result["idle_share"] for result in results[kind])
        print(f"{kind}: {speed / held:.4f} of the speed of rows in memory; {100 * idle:.4f} % of a step without work")


if __name__ == "__main__":
    main()

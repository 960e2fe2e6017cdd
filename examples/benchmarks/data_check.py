"""What it costs that ranks compare what they have read: one run, in which steps with and without the check alternate.

    torchrun --nproc-per-node 4 examples/benchmarks/data_check.py --cpu --shape tiny --row tp_size=2,pp_size=2
    python examples/benchmarks/data_check.py --shape 1b --row per_device_train_batch_size=8

Prints one JSON object: steps a second of both (median over the steps of all blocks), their ratio, and the milliseconds
a step for which the host waits: for the gradient of the step before, and for the verdict. With `--read-once` it also
measures what the check spares: reading on one rank of a replica, and broadcasting the batch to the others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import transformers
from clock import Clock
from rows import parse_row
from shapes import SHAPES, make_config
from transformers import TrainerCallback, default_data_collator

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.data.window_check import PendingWindow, Window, WindowCheck
from hf_nanotron.ops.host_copy import to_device
from hf_nanotron.parallel.collectives import all_reduce
from hf_nanotron.parallel.early_sum import EarlySum

BLOCK = 10  # steps before the other kind has its turn; the first of a block is not counted


class Unchecked(WindowCheck):
    """The sum of a step's tokens alone, over the data-parallel ranks, on the stream that computes."""

    def start(self, window: Window, count: int = 0, *args: Any, **kwargs: Any) -> PendingWindow:
        total = all_reduce(to_device(torch.tensor([count]), self.mesh.device), self.mesh.dp)
        return PendingWindow(window, [], None, 0, EarlySum(total))

    def judge(self, pending: PendingWindow, where: str) -> list[int]:
        return [0, 0, 0, len(pending.window), 0, 0]


class Alternating(TrainerCallback):
    """Marks the clock in each step, and changes the check after each block."""

    def __init__(self, trainer: NanotronTrainer) -> None:
        self.trainer, self.clock = trainer, Clock()
        self.checks = {"checked": trainer.window_check, "unchecked": Unchecked(trainer.mesh, trainer.model.vocabulary)}
        self.kinds: list[str] = []  # of the window of each step

    def choose(self, step: int) -> None:
        kind = list(self.checks)[step // BLOCK % 2]
        self.trainer._windows.check = self.checks[kind]
        self.kinds.append(kind)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.choose(0)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.clock.mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.choose(state.global_step)

    def steps(self, kind: str, first: int, count: int) -> list[int]:
        """Numbers of the timed steps of a kind, each of which ends an interval between two marks."""
        return [n for n in range(first, first + count) if self.kinds[n] == kind == self.kinds[n - 1] and n % BLOCK > 1]


def time_waits(trainer: NanotronTrainer) -> defaultdict[int, float]:
    """For how many seconds the host waits in each step, filled in while the trainer trains."""
    waits: defaultdict[int, float] = defaultdict(float)
    read = trainer._windows.read_verdict

    def timed() -> None:
        began = time.perf_counter()
        read()
        waits[trainer.state.global_step] += time.perf_counter() - began

    trainer._windows.read_verdict = timed  # type: ignore[method-assign]
    return waits


def read_once(trainer: NanotronTrainer, window: list[dict[str, torch.Tensor]], repeats: int = 30) -> float | None:
    """Milliseconds for handing a window from the first rank of a replica to the others, as Megatron does."""
    group = trainer.mesh.model
    if group.size == 1:
        return None
    shape = [{name: tensor.shape for name, tensor in batch.items()} for batch in window]

    def hand_on() -> None:
        told: list[Any] = [shape]
        dist.broadcast_object_list(told, group.ranks[0], group=group.handle)
        for batch in window:
            for tensor in batch.values():
                dist.broadcast(to_device(tensor, trainer.mesh.device), group.ranks[0], group=group.handle)

    return median_ms(hand_on, repeats)


def median_ms(function: Callable[[], object], repeats: int = 30) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return round(statistics.median(times), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=tuple(SHAPES))
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--row", type=parse_row, default={}, help="training arguments, such as tp_size=2,pp_size=2")
    parser.add_argument("--blocks", type=int, default=8, help="of ten steps, half of them with the check")
    parser.add_argument("--read-once", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    cli = parser.parse_args()
    gpu = torch.cuda.is_available() and not cli.cpu
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    transformers.set_seed(0)
    config = make_config(cli.shape, cli.sequence_length)
    warmup, timed = BLOCK, BLOCK * cli.blocks
    steps = warmup + timed + 1
    given = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, **cli.row}
    args = NanotronTrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=steps, logging_strategy="no", save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=not gpu, bf16=gpu, **given,
    )  # fmt: skip
    samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.dp_size * steps
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, config.vocab_size, (samples, cli.sequence_length), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in rows]
    model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)
    trainer = NanotronTrainer(model=model, args=args, train_dataset=data, data_collator=default_data_collator)  # type: ignore
    waits, alternating = time_waits(trainer), Alternating(trainer)
    trainer.add_callback(alternating)
    trainer.train()
    intervals = [0.0, *alternating.clock.seconds(0, steps - 1)]  # interval n ends in step n
    result: dict[str, Any] = {"shape": cli.shape, "sequence_length": cli.sequence_length, **given}
    for kind in alternating.checks:
        counted = alternating.steps(kind, warmup, timed)
        result[f"{kind}_steps_per_second"] = round(1 / statistics.median(intervals[n] for n in counted), 4)
        result[f"{kind}_host_wait_ms"] = round(1e3 * statistics.median(waits[n] for n in counted), 3)
    result["ratio"] = round(result["checked_steps_per_second"] / result["unchecked_steps_per_second"], 4)
    window = [default_data_collator(data[:1]) for _ in range(args.gradient_accumulation_steps)]
    check = alternating.checks["checked"]
    result["check_alone_ms"] = median_ms(lambda: check.judge(check.start(window), "benchmark"))
    if cli.read_once:
        result["broadcast_alone_ms"] = read_once(trainer, window)
    if trainer.is_world_process_zero():
        print(json.dumps(result))
    trainer.mesh.close()


if __name__ == "__main__":
    main()

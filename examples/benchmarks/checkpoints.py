"""What loading and saving cost: host memory above what a rank holds anyway, and how long training stands still.

    torchrun --nproc-per-node 2 checkpoints.py --shape 1b --row zero_stage=1 --row tp_size=2

For each `--row` (fields of `NanotronTrainingArguments`): load a Hub checkpoint, train three steps with synchronous and
three with asynchronous saves, and resume. Prints one JSON line for each row on rank 0, every figure that of the rank
where it is largest. Memory is anonymous memory, sampled every 2 ms; pages of mapped files are the system's to drop.
"""

import argparse
import gc
import json
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rows import parse_row
from saved_run import largest, make_trainer, training_arguments, write_source
from shapes import SHAPES
from transformers import TrainerCallback

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments


def anonymous_bytes() -> int:
    """Memory of this process that belongs to no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon; this measurement needs Linux.")


class Peak:
    """Seconds of a block, and the most anonymous memory inside it above what there was before."""

    def __enter__(self) -> "Peak":
        gc.collect()
        self.before = self.most = anonymous_bytes()
        self.began = time.perf_counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.most = max(self.most, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.began
        self._stop.set()
        self._thread.join()
        self.bytes = self.most - self.before
        self.kept = anonymous_bytes() - self.before


class Standstill(TrainerCallback):
    """How long the training loop is held by a save: from the end of its step to the end of the save.

    A save that comes while an earlier one is still being written waits for it; that is left out here.
    """

    def __init__(self) -> None:
        self.trainer: Any = None
        self.seconds: list[float] = []
        self.bytes = 0
        self._peak: Peak | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self.trainer._checkpointer.background.wait()
            if dist.is_initialized():
                dist.barrier()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._peak = Peak().__enter__()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._peak is not None
        self._peak.__exit__()
        self.seconds.append(self._peak.seconds)
        self.bytes = max(self.bytes, self._peak.bytes)


def run(row: dict[str, Any], cli: argparse.Namespace, source: str, scratch: Path) -> dict[str, Any]:
    def trainer(**overrides: Any) -> tuple[NanotronTrainer, Standstill]:
        values = {"max_steps": 3, "save_steps": 2, "gradient_accumulation_steps": 2, **row, **overrides}
        args = training_arguments(cli, output_dir=str(scratch), **values)
        with Peak() as load:
            model = AutoModelForCausalLM.from_pretrained(source, parallel=args.parallel, dtype=torch.bfloat16)
        held = sum(p.numel() * p.element_size() for p in model.parameters())
        loads.append((load.bytes - (held if cli.cpu else 0), load.seconds))
        standstill = Standstill()
        made = make_trainer(model, args, 16, cli.sequence_length, standstill)
        return made, standstill

    loads: list[tuple[int, float]] = []
    figures: dict[str, Any] = {}
    for name, asynchronous in (("save", False), ("async_save", True)):
        made, standstill = trainer(async_save=asynchronous)
        made.train()
        parameters, report = made.model.num_parameters(), made.memory_report
        # The first asynchronous save gets the memory that later ones use again.
        figures[f"{name}_standstill_seconds"] = [round(largest(seconds), 2) for seconds in standstill.seconds]
        figures[f"{name}_peak_mib"] = round(largest(standstill.bytes) / 2**20)
        made.mesh.close()
        del made, standstill
        gc.collect()
    made, _ = trainer()
    with Peak() as resume:
        made.train(resume_from_checkpoint=str(scratch / "checkpoint-3"))
    figures["resume_seconds"] = round(largest(resume.seconds), 2)
    checkpoint = scratch / "checkpoint-3"
    figures["checkpoint_gib"] = round(sum(p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()) / 2**30, 2)
    figures["load_peak_mib"] = round(largest(max(size for size, _ in loads)) / 2**20)
    figures["load_seconds"] = round(largest(min(seconds for _, seconds in loads)), 2)
    made.mesh.close()
    return {
        "row": row,
        "shape": cli.shape,
        "parameters": parameters,
        "state_gib_per_rank": round(largest(report.state) / 2**30, 2),
        "largest_tensor_mib": round(SHAPES[cli.shape]["vocab_size"] * SHAPES[cli.shape]["hidden_size"] * 2 / 2**20),
        **figures,
        "device": "cpu" if cli.cpu else torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--row", action="append", help="fields of NanotronTrainingArguments, such as tp_size=2")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--scratch", type=Path, required=True, help="a directory that all ranks share; emptied")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    cli = parser.parse_args()
    cli.cpu |= not torch.cuda.is_available()
    arguments = NanotronTrainingArguments(output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=cli.cpu)
    source = write_source(cli, arguments)
    for text in cli.row or [""]:
        result = run(parse_row(text), cli, source, cli.scratch / "run")
        if int(arguments.process_index) == 0:
            print(json.dumps(result), flush=True)
            if cli.out is not None:
                with cli.out.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            shutil.rmtree(cli.scratch / "run")
        gc.collect()
        if dist.is_initialized():
            dist.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

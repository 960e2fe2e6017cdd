"""How long an asynchronous save keeps training: the host's standstill, and what the step that follows takes longer.

    torchrun --nproc-per-node 2 standstill.py --shape 1b --scratch /tmp/scratch --row zero_stage=1

Loads a Hub checkpoint, trains with two saves on the way and one at the end, compares what the second checkpoint holds
with the bits that the masters and the optimizer's state had when it was asked for, resumes from it, and compares
losses. Prints one JSON line on rank 0. Every step is timed alone, on an idle device, so that nothing of a save hides in
the step before. The disk holds two checkpoints at a time.
"""

import argparse
import cProfile
import json
import os
import pstats
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rows import parse_row
from saved_run import largest, make_trainer, training_arguments, write_source
from shapes import SHAPES
from transformers import TrainerCallback

from hf_nanotron import AutoModelForCausalLM, NanotronTrainingArguments
from hf_nanotron.checkpoint.state.file import MASTER
from hf_nanotron.checkpoint.state.read import StoredState
from hf_nanotron.checkpoint.state.slices import Slice
from hf_nanotron.parallel.zero.buckets import is_owner

Sums = dict[tuple[str, int, str], int]


def settle() -> float:
    """The time when all devices of the job are idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.perf_counter()


def bits(tensor: torch.Tensor) -> int:
    return int(tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int64))


class Clock(TrainerCallback):
    """Seconds of each step and of each save, and the bits of what is saved."""

    def __init__(self, kept: Path, profiles: bool) -> None:
        self.trainer: Any = None
        self.kept = kept  # where the second checkpoint stays
        self.steps: list[tuple[float, bool]] = []  # seconds, whether a save came before
        self.stood_still: list[float] = []
        self.losses: list[float] = []
        self.sums: dict[int, Sums] = {}
        self.profile = cProfile.Profile() if profiles else None
        self.unpinned: str | None = None  # why the host's memory is not pinned
        self._began, self._saved = 0.0, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = settle()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = settle()
        self.steps.append((now - self._began, self._saved))
        self._saved = control.should_save
        if state.global_step == 3 * args.save_steps - 1 and not self.kept.exists():
            self.trainer._checkpointer.background.wait()
            settle()
            if self.trainer.mesh.rank == 0:
                second = Path(args.output_dir) / self.kept.name
                shutil.copytree(second, self.kept, copy_function=os.link)
        if control.should_save:
            self.sums[state.global_step] = self._sums()
            self.trainer._checkpointer.background.wait()  # a save that is waited for is another figure
        self._began = settle()
        if control.should_save and self.profile is not None:
            self.profile.enable()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profile is not None:
            self.profile.disable()
        self.stood_still.append(time.perf_counter() - self._began)
        self.unpinned = self.trainer._checkpointer._copies.unpinned

    def _sums(self) -> Sums:
        found: Sums = {}
        for segment in self.trainer.weights.segments:
            if is_owner(segment.spec, self.trainer.mesh):
                own = {MASTER: segment.master.detach(), **self.trainer.optimizer.state[segment.master]}
                for kind, tensor in own.items():
                    if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.element_size() == 4:
                        found[segment.spec.name, segment.start, kind] = bits(tensor)
        return found


def differing(trainer: Any, checkpoint: Path, sums: Sums) -> int:
    """Tensors of this rank whose bits in a checkpoint are not those that they had."""
    wrong = 0
    with StoredState(checkpoint / "training_state") as stored:
        for segment in trainer.weights.segments:
            for (name, start, kind), expected in sums.items():
                if (name, start) == (segment.spec.name, segment.start):
                    out = torch.empty(segment.stop - segment.start)
                    stored.fill(Slice(segment.spec, segment.start, segment.stop), kind, out)
                    wrong += bits(out) != expected
    return wrong


def run(cli: argparse.Namespace, source: str) -> dict[str, Any]:
    row, second = parse_row(cli.row), cli.scratch / "kept" / f"checkpoint-{2 * cli.save_steps}"

    def train(resume: Path | None = None, **overrides: Any) -> tuple[Any, Clock, float]:
        values = {
            "max_steps": 3 * cli.save_steps,
            "save_steps": cli.save_steps,
            "save_total_limit": 1,
            "logging_steps": 1,
            "gradient_accumulation_steps": 8,
            "async_save": True,
            **row,
            **overrides,
        }
        args = training_arguments(cli, output_dir=str(cli.scratch / "run"), **values)
        began = settle()
        model = AutoModelForCausalLM.from_pretrained(source, parallel=args.parallel, dtype=torch.bfloat16)
        loaded = settle() - began
        samples = 3 * cli.save_steps * args.train_batch_size * args.gradient_accumulation_steps * args.dp_size
        generator = torch.Generator().manual_seed(1)
        clock = Clock(second, cli.profile and resume is None)
        trainer = make_trainer(model, args, samples, cli.sequence_length, clock, generator)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer, clock, loaded

    trainer, clock, loaded = train()
    wrong = differing(trainer, second, clock.sums[2 * cli.save_steps])
    plain = statistics.median(seconds for seconds, saved in clock.steps[2:] if not saved)
    after = [seconds - plain for seconds, saved in clock.steps if saved]
    copied = sum(path.stat().st_size for path in second.rglob("*.safetensors"))
    if clock.profile is not None and trainer.mesh.rank == 0:
        pstats.Stats(clock.profile).sort_stats("cumulative").print_stats(25)
    figures = {
        "shape": cli.shape,
        "row": row,
        "checkpoint_gib": round(copied / 2**30, 2),
        "load_seconds": round(largest(loaded), 2),
        "step_seconds": round(largest(plain), 3),
        "stood_still_seconds": [round(largest(seconds), 3) for seconds in clock.stood_still],
        "next_step_longer_by_seconds": [round(largest(seconds), 3) for seconds in after],
        "differing_tensors": int(largest(wrong)),
        "unpinned": clock.unpinned,
    }
    losses = clock.losses
    trainer.mesh.close()
    del trainer
    if cli.resume:
        trainer, again, _ = train(second, save_strategy="no")
        pairs = zip(losses[2 * cli.save_steps :], again.losses, strict=True)
        figures["losses"] = losses
        figures["resumed_losses_differ_by"] = largest(max(abs(one - other) for one, other in pairs))
        trainer.mesh.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--row", default="zero_stage=1", help="fields of NanotronTrainingArguments, such as tp_size=2")
    parser.add_argument("--save-steps", type=int, default=4)
    parser.add_argument("--profile", action="store_true", help="print where the host's time of a save goes")
    parser.add_argument("--no-resume", dest="resume", action="store_false")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--scratch", type=Path, required=True, help="a directory that all ranks share; emptied")
    cli = parser.parse_args()
    cli.cpu |= not torch.cuda.is_available()
    arguments = NanotronTrainingArguments(output_dir=str(cli.scratch / "none"), report_to="none", use_cpu=cli.cpu)
    result = run(cli, write_source(cli, arguments))
    if int(arguments.process_index) == 0:
        print(json.dumps(result), flush=True)
        shutil.rmtree(cli.scratch, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

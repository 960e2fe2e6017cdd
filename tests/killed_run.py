"""A run whose ranks are killed (SIGKILL) and started again by torchrun: what `kills.py` starts as each rank.

`python killed_run.py JOB.json`: `start` (a model's folder), `training` (arguments), `folder` (for notes) and `kills`:
each is [rank, phase, step], and happens once, one in each start, in this order.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.time()
JOB = json.loads(Path(sys.argv[1]).read_text())
FOLDER, RANK, ATTEMPT = Path(JOB["folder"]), int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
(FOLDER / f"pid-{RANK}").write_text(str(os.getpid()))


def mark(name: str, at: float | None = None) -> None:
    """Note when this start came so far; `kills.py --gpus` prints it."""
    with open(FOLDER / f"marks-{RANK}-{ATTEMPT}", "a") as file:
        file.write(f"{name} {at or time.time()}\n")


def die(number: int) -> None:
    """Once for each kill, whatever starts again."""
    try:
        with open(FOLDER / f"killed-{number}", "x") as file:
            file.write(str(time.time()))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


STEP = 0  # that runs, of this start


def dying(phase: str, action: Callable[..., Any] = lambda *_, **__: None) -> Callable[..., Any]:
    """`action`, before which the rank is killed if it is to be in this phase of this step, or of one before."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if ATTEMPT < len(JOB["kills"]):  # one a start, or ranks that are in the same phase would die together
            rank, at, step = JOB["kills"][ATTEMPT]
            if rank == RANK and at == phase and step <= STEP:
                die(ATTEMPT)
        return action(*args, **kwargs)

    return call


dying("start")()
mark("python", STARTED)

import torch  # noqa: E402
from tiny import pad_batch, random_dataset, training_arguments  # noqa: E402
from transformers import AutoConfig, TrainerCallback  # noqa: E402

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments  # noqa: E402
from hf_nanotron.checkpoint.directory import save  # noqa: E402
from hf_nanotron.checkpoint.memory import threads  # noqa: E402
from hf_nanotron.training import snapshots  # noqa: E402
from hf_nanotron.training.step.train_step import TrainingHooks  # noqa: E402

torch.set_num_threads(1)
PARTS = {
    "forward": (TrainingHooks, "on_forward"), "backward": (TrainingHooks, "before_backward"),
    "save": (save, "write_rank"), "snapshot": (threads, "write_rank"), "marker": (threads, "write_part"),
    "resume": (snapshots, "make_checkpoint"),
}  # fmt: skip
for name, (owner, attribute) in PARTS.items():
    setattr(owner, attribute, dying(name, getattr(owner, attribute)))


class Phases(TrainerCallback):
    """Counts the steps, and kills where Trainer calls back."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        mark("state")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        mark("step")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        global STEP
        STEP = state.global_step + 1
        if JOB["pause"] and not (FOLDER / "calm").exists():  # so that a run is not over before its kills
            time.sleep(JOB["pause"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        dying("step")()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        dying("evaluation")()


def main() -> None:
    mark("imports")
    args = NanotronTrainingArguments(**training_arguments(**JOB["training"]))
    mark("arguments")
    if JOB["config"] is None:
        model = AutoModelForCausalLM.from_pretrained(JOB["start"], parallel=args.parallel)
    else:
        config = AutoConfig.for_model(**JOB["config"])
        model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)
    mark("model")
    rows = random_dataset(JOB["samples"], JOB["length"])
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=random_dataset(8, seed=1), data_collator=pad_batch,
        callbacks=[Phases()],
    )  # fmt: skip
    mark("trainer")
    trainer.weights.finish = dying("reduce", trainer.weights.finish)  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint="auto")


if __name__ == "__main__":
    main()

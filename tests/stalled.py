"""Ranks that are struck in the middle of a run, each on its own: no launcher ends the others.

    python tests/stalled.py RANKS FOLDER SCENARIO ...

Each scenario is JSON: `phase` and `rank` of the blow, `how` ("kill", "stop", "raise", or the path of a FIFO, which it
opens, and waits for the other end), and perhaps `sizes`, `args`, `asleep` (ranks whose thread sleeps in a callback
meanwhile), `timeout`, and `gpu` (one for each rank). What rank R says is in FOLDER/NUMBER-R.txt; a line of JSON for
each scenario tells the exit codes and the seconds from the blow to each end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from forked import end_as_script
from ports import reserved_port
from tiny import pad_batch, random_dataset, tiny_config, training_arguments
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed

STRUCK = "STRUCK"


def strike(how: Any) -> None:
    print(f"{STRUCK} {time.time():.3f}", flush=True)
    if how == "raise":
        raise RuntimeError("the user's code has a fault")
    if how in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    else:
        os.close(os.open(how, os.O_RDONLY))


class Blow:
    """Falls once, on one rank, when a phase is reached for the `after`th time."""

    def __init__(self, scenario: dict[str, Any], rank: int) -> None:
        self.phase = scenario["phase"] if scenario["rank"] == rank else ""
        self.how, self.left = scenario["how"], scenario.get("after", 2)

    def at(self, phase: str) -> None:
        if phase == self.phase:
            self.left -= 1
            if self.left == 0:
                strike(self.how)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, blow: Blow) -> None:
        self.rows, self.blow = random_dataset(32, length=8), blow

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        # A run looks at its first rows before it reads them for a step.
        if any(frame.name == "get_batch_samples" for frame in traceback.extract_stack()):
            self.blow.at("data")
        return self.rows[index]


class Sleepy(TrainerCallback):
    """Asleep where no collective can raise an error, from the second step on."""

    def __init__(self, blow: Blow, sleeps: bool) -> None:
        self.blow, self.sleeps = blow, sleeps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.blow.at("callback")
        if self.sleeps and state.global_step == 2:
            time.sleep(600)


def train(scenario: dict[str, Any], rank: int, folder: str) -> None:
    """A run of four steps with a save and an evaluation after the second, in which a blow falls."""
    from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

    blow = Blow(scenario, rank)

    class Trainer(NanotronTrainer):
        def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
            blow.at("evaluation")
            return super().prediction_step(*args, **kwargs)

        def _write_own_files(self, save: Any) -> None:
            blow.at("save")
            super()._write_own_files(save)

    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"output_dir": folder, "gradient_accumulation_steps": 2, "ddp_timeout": 100, "stall_warning": 1}
    if scenario.get("gpu"):
        settings |= {"use_cpu": False, "bf16": True, "torch_compile": False, "log_level": "info"}
    args = NanotronTrainingArguments(**training_arguments(**settings | scenario.get("args", {})), **scenario["sizes"])
    set_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=4))
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Rows(blow),
        eval_dataset=random_dataset(4, length=8),
        data_collator=pad_batch,
        callbacks=[Sleepy(blow, rank in scenario.get("asleep", ()))],
    )
    if "timeout" in scenario:  # shorter than may be asked for
        trainer.args.stall_timeout = scenario["timeout"]
    if blow.phase in ("forward", "backward"):
        layer = trainer.model.model.layers[trainer.model.stages[-1].layers.start]
        if blow.phase == "forward":
            layer.register_forward_pre_hook(lambda *_: blow.at("forward"))
        else:
            layer.register_full_backward_hook(lambda *_: blow.at("backward"))
    if blow.phase == "reduce":
        reducing = trainer.weights.gradients  # called by the weights' own `finish`
        finish = reducing.finish

        def late() -> None:
            blow.at("reduce")
            finish()

        reducing.finish = late  # type: ignore[method-assign]
    trainer.train()
    print("TRAINED", flush=True)


def run(scenario: dict[str, Any], ranks: int, folder: Path, number: int) -> dict[str, Any]:
    with reserved_port() as port:
        return run_at(port, scenario, ranks, folder, number)


def run_at(port: int, scenario: dict[str, Any], ranks: int, folder: Path, number: int) -> dict[str, Any]:
    running, ended = dict[int, int](), dict[int, tuple[int, float]]()
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            said = os.open(folder / f"{number}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="stalled",
            )  # fmt: skip
            if not scenario.get("gpu"):
                os.environ["CUDA_VISIBLE_DEVICES"] = ""
            end_as_script(lambda rank=rank: train(scenario, rank, str(folder / f"out-{number}")))
        running[process] = rank
    until = time.time() + scenario.get("limit", 300)
    while running and time.time() < until:
        for each in list(running):  # a worker of the pool may have children of an earlier job
            process, status = os.waitpid(each, os.WNOHANG)
            if process:
                ended[running.pop(process)] = (os.waitstatus_to_exitcode(status), time.time())
        if scenario["how"] == "stop" and list(running.values()) == [scenario["rank"]]:
            break
        time.sleep(0.02)
    for process in running:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    words = (folder / f"{number}-{scenario['rank']}.txt").read_text().split()
    struck = float(words[words.index(STRUCK) + 1]) if STRUCK in words else 0.0
    return {
        "codes": {rank: code for rank, (code, _) in ended.items()},
        "seconds": {rank: round(when - struck, 2) for rank, (_, when) in ended.items()},
        "left": sorted(running.values()),
    }


if __name__ == "__main__":
    with contextlib.suppress(ImportError):  # of an extra, where there is a GPU; what comes before it is there
        import preloaded  # noqa: F401
    for number, text in enumerate(sys.argv[3:]):
        scenario = {"sizes": {}, **json.loads(text)}
        print(json.dumps(run(scenario, int(sys.argv[1]), Path(sys.argv[2]), number)), flush=True)

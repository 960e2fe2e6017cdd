"""Ranks that do different things: a flag of one rank acts on all, and what must agree is compared."""

from __future__ import annotations

import atexit
import os
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import forked
import pytest
import torch.distributed as dist
from pool import WorkerPool
from tiny import pad_batch, random_dataset, tiny_config, training_arguments
from transformers import AutoModelForCausalLM, Trainer as StockTrainer, TrainerCallback, TrainingArguments, set_seed

from hf_nanotron import ParallelConfig
from hf_nanotron.arguments.launch import check_launch
from hf_nanotron.parallel import roll_call, together
from hf_nanotron.parallel.mesh import ParallelMesh

STEPS = 6


class Ask(TrainerCallback):
    """Sets a flag at one event of one step, on some ranks."""

    def __init__(self, event: str, step: int, flag: str, here: bool) -> None:
        def ask(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if here and state.global_step == step:
                setattr(control, flag, True)

        setattr(self, event, ask)


class Steps(TrainerCallback):
    """What happened at which step."""

    def __init__(self) -> None:
        self.seen: dict[str, list[int]] = {"save": [], "evaluate": [], "log": [], "end": []}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen["save"].append(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen["evaluate"].append(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.seen["log"].append(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen["end"].append(state.global_step)


def asked(
    directory: str, requests: list[tuple[str, int, str]], everywhere: bool, logging_steps: int
) -> list[dict[str, list[int]]]:
    """What each request leads to, on this rank. `directory` is the job's."""
    from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

    parallel = {"tp_size": 2}
    results = []
    for number, (event, step, flag) in enumerate(requests):
        settings = training_arguments(
            output_dir=f"{directory}/{number}",
            num_train_epochs=2,
            max_steps=-1,
            logging_steps=logging_steps,
        )
        args = NanotronTrainingArguments(**settings, **parallel)
        set_seed(0)
        seen = Steps()
        here = everywhere or args.process_index == 1
        trainer = NanotronTrainer(
            model=AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=1)),
            args=args,
            train_dataset=random_dataset(STEPS // 2, length=6),
            eval_dataset=random_dataset(2, length=6),
            data_collator=pad_batch,
            callbacks=[seen, Ask(event, step, flag, here)],
        )
        trainer.train()
        trainer.model.mesh.close()
        results.append(seen.seen)
    return results


def asked_of_stock(directory: str, requests: list[tuple[str, int, str]], logging_steps: int) -> list[dict[str, Any]]:
    results = []
    for event, step, flag in requests:
        set_seed(0)
        seen = Steps()
        trainer = StockTrainer(
            model=AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=1)),
            args=TrainingArguments(
                **training_arguments(
                    output_dir=directory, num_train_epochs=2, max_steps=-1, logging_steps=logging_steps
                )
            ),
            train_dataset=random_dataset(STEPS // 2, length=6),
            eval_dataset=random_dataset(2, length=6),
            data_collator=pad_batch,
            callbacks=[seen, Ask(event, step, flag, True)],
        )
        trainer.train()
        results.append(seen.seen)
    return results


# Of two epochs of three steps.
REQUESTS = [
    ("on_train_begin", 0, "should_training_stop"),
    ("on_step_begin", 1, "should_training_stop"),
    ("on_step_end", 1, "should_training_stop"),
    ("on_step_end", 1, "should_epoch_stop"),
    ("on_step_end", 1, "should_save"),
    ("on_step_end", 3, "should_save"),  # the last of an epoch
    ("on_step_end", 2, "should_evaluate"),
    ("on_pre_optimizer_step", 3, "should_log"),
    ("on_epoch_end", 3, "should_training_stop"),
    ("on_epoch_end", 3, "should_evaluate"),
    ("on_log", 2, "should_save"),
    ("on_log", 2, "should_training_stop"),
]

# What one rank asks for at a step that does not log: all ranks do it at the end of the next.
LATER = {
    ("on_step_end", 1, "should_training_stop"): {"save": [], "evaluate": [], "log": [2], "end": [2]},
    ("on_step_end", 1, "should_epoch_stop"): {"save": [], "evaluate": [], "log": [2, 4], "end": [5]},
    ("on_step_end", 1, "should_save"): {"save": [2], "evaluate": [], "log": [2, 4, 6], "end": [6]},
}


def test_flags_of_one_rank(pool: WorkerPool, tmp_path: Any) -> None:
    """In every event: all ranks do the same, at the step of stock Trainer or, between log lines, at the next."""
    wanted = asked_of_stock(str(tmp_path), REQUESTS, 2)
    later = [request for request in REQUESTS if request in LATER]
    everywhere = pool.run(2, asked, str(tmp_path / "all"), later, True, 2)
    assert everywhere[0] == everywhere[1] == [wanted[REQUESTS.index(request)] for request in later]
    alone = pool.run(2, asked, str(tmp_path / "one"), REQUESTS, False, 2)
    assert alone[0] == alone[1]
    for request, got, stock in zip(REQUESTS, alone[0], wanted, strict=True):
        assert got == LATER.get(request, stock), request


# ---- what must agree ---------------------------------------------------------------------------------------------


def made_differently(directory: str) -> None:
    """A trainer whose rank 1 is given something else: refused on both ranks."""
    from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

    rank = int(os.environ["RANK"])

    def make(
        settings: dict[str, Any], data: int = 4, config: dict[str, Any] | None = None, **arguments: Any
    ) -> NanotronTrainer:
        args = NanotronTrainingArguments(
            **training_arguments(**{"output_dir": f"{directory}/same", "max_steps": 2, **settings})
        )
        set_seed(0)
        return NanotronTrainer(
            model=AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=1, **(config or {}))),
            args=args,
            train_dataset=random_dataset(4, length=4),
            eval_dataset=random_dataset(data, length=4),
            data_collator=pad_batch,
            **arguments,
        )

    for name, values in (
        ("learning_rate", (1e-3, 2e-3)),
        ("max_steps", (2, 3)),
        ("seed", (1, 2)),
        ("save_steps", (5, 7)),
        ("logging_steps", (1, 2)),
        ("lr_scheduler_kwargs", ({}, {"num_cycles": 2})),
    ):
        with pytest.raises(ValueError, match=f"{name} differs between ranks: .*{values[0]!r}.* on rank 0.* on rank 1"):
            make({name: values[rank]})
    with pytest.raises(ValueError, match="output_dir"):
        make({"output_dir": f"{directory}/{rank}", "save_strategy": "steps"})
    with pytest.raises(ValueError, match="the length of eval_dataset differs between ranks: 4 on rank 0; 5 on rank 1"):
        make({}, data=4 + rank)
    with pytest.raises(ValueError, match="model.config.rms_norm_eps differs"):
        make({}, config={"rms_norm_eps": 1e-6 * (1 + rank)})
    with pytest.raises(ValueError, match='compute_metrics differs between ranks: "given" on rank 0; "not given" on'):
        make({}, compute_metrics=None if rank else len)
    with pytest.raises(ValueError, match='compute_loss_func differs between ranks: "given" on rank 0; "not given" on'):
        make({}, compute_loss_func=None if rank else len)
    sizes = {"pp_size": 2, "gradient_accumulation_steps": 2} if rank else {"tp_size": 2}
    with pytest.raises(ValueError, match="(?=.*rank 0 calls making .*tp_size=2)(?=.*rank 1 calls making .*pp_size=2)"):
        make(sizes)
    if rank:
        with pytest.raises(ValueError, match="max_steps=0"):
            make({"max_steps": 0})
        with pytest.raises(ValueError, match="differ"):
            make({"max_steps": 3})
    else:  # which waits meanwhile
        with pytest.raises(ValueError, match="max_steps differs"):
            make({})
    trainer = make({"report_to": "none", "disable_tqdm": bool(rank), "log_level": ("error", "warning")[rank]})
    if rank == 0:  # no rank waits for others
        assert trainer.get_num_trainable_parameters() == trainer.model.num_parameters()
    with pytest.raises(ValueError, match="rank 0 calls train with resume_from_checkpoint=None"):
        trainer.train(resume_from_checkpoint="checkpoint-1" if rank else None)
    hook = trainer.add_gradient_hook("*", lambda gradient, part: gradient * 0) if rank else None
    with pytest.raises(
        ValueError, match=r"what add_gradient_hook was called for differs between ranks: \[\] on rank 0"
    ):
        trainer.train()
    if hook is not None:
        hook.remove()
    # In place of a disk that ranks do not share: one path, two directories.
    link = Path(directory) / f"home-{rank}"
    link.mkdir(exist_ok=True)
    os.chdir(link)
    with pytest.raises(ValueError, match="output_dir='out': .*is not visible.*rank 1"):
        make({"output_dir": "out", "save_strategy": "steps"})
    with pytest.raises(ValueError, match="output_dir='out': .*is not visible.*rank 1"):
        trainer.save_model("out")
    (Path(directory) / "file").touch()
    with pytest.raises(ValueError, match=r"file.*: .*Not a directory.* \(rank 0\)"):
        make({"output_dir": f"{directory}/file/below", "save_strategy": "steps"})
    assert not list(Path(directory, "same").glob(".written*"))
    with pytest.raises(
        ValueError,
        match="(?=.*rank 1 calls save_model to)(?=.*rank 0 calls evaluate over 4 )",
    ):
        trainer.save_model(f"{directory}/saved") if rank else trainer.evaluate()
    os.chdir("/")


def test_what_must_agree(pool: WorkerPool, tmp_path: Any) -> None:
    pool.run(2, made_differently, str(tmp_path))


SRUN = {"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "refused"),
    [
        (SRUN, "srun has started 4 processes .*torchrun"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "srun has started 2 processes"),
        ({**SRUN, "SLURM_PROCID": "0"}, "export WORLD_SIZE=.SLURM_STEP_NUM_TASKS, RANK=.SLURM_PROCID"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun has started 2 processes"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "mpirun has started 2"),
        ({**SRUN, "WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "0"}, None),  # torchrun under srun
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967291"}, None),
        ({"SLURM_NTASKS": "4"}, None),  # a shell of salloc
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "2"}, None),
        ({}, None),
    ],
)
def test_launch(environment: dict[str, str], refused: str | None) -> None:
    if refused is None:
        check_launch(environment)
        return
    with pytest.raises(ValueError, match=refused):
        check_launch(environment)


# ---- ranks that come alone, in processes that end -------------------------------------------------------------------

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from tiny import *
from transformers import set_seed
from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

args = NanotronTrainingArguments(**training_arguments(output_dir={directory!r}), tp_size=2)
set_seed(0)
trainer = NanotronTrainer(
    model=AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=1)), args=args,
    train_dataset=random_dataset(4, length=4), data_collator=pad_batch,
)
try:
    if trainer.is_world_process_zero():
        trainer.save_model()
except Exception as error:
    print(f"SAID {{type(error).__name__}}: {{error}}", flush=True)
    sys.exit(1)
"""


def test_only_rank_0_comes(pool: WorkerPool, tmp_path: Path) -> None:
    """`if trainer.is_world_process_zero(): trainer.save_model()` at the end of a script fails at once, and not after
    the half hour of the process group."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), directory=str(tmp_path / "out")))
    code, out, err = pool.run_alone(forked.run_apart, 2, [str(script)], tmp_path)
    match = re.search(r"SAID ValueError: (.*)", out)
    assert match is not None and code == 1, (code, out, err)
    assert match[1] == "save_model must be called on every rank; only rank 0 came: rank 1 has ended."


def alone(directory: str) -> None:
    """Rank 0 comes alone while rank 1 waits for it elsewhere, and is told so; then it goes there."""
    from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

    class Saves(TrainerCallback):
        said = ""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero and state.global_step == 1:
                with pytest.raises(ValueError, match="save_model must be called on every rank; only rank 0 came: rank"):
                    trainer.save_model()
                self.said = "told"

    callback = Saves()
    args = NanotronTrainingArguments(**training_arguments(output_dir=directory, max_steps=2), tp_size=2)
    set_seed(0)
    trainer = NanotronTrainer(
        model=AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=1)),
        args=args,
        train_dataset=random_dataset(4, length=4),
        data_collator=pad_batch,
        callbacks=[callback],
    )
    trainer.train()  # rank 1 is in its second step meanwhile
    assert bool(callback.said) == trainer.is_world_process_zero()
    if trainer.is_world_process_zero():
        with pytest.raises(ValueError, match="only rank 0 came: rank 1 is in barrier .*, called by alone"):
            trainer.save_model()
    dist.barrier()


def test_others_wait_elsewhere(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(2, alone, str(tmp_path))


def questions(count: int) -> int:
    """How often this rank asks where the others are while the last of four, in another block than the first, stays away
    until `count` questions have been asked."""
    mesh = ParallelMesh(ParallelConfig())
    store = dist.PrefixStore("roll_call", dist.distributed_c10d._get_default_store())
    mesh.assemble("to begin")
    before = store.add("asked", 0)
    # The next one asks after two such times without a question, so that one of these is how late a rank may be.
    late, own = mock.patch.object(roll_call, "ASK_AFTER", 4.0), roll_call.RollCall._ask
    counting = mock.patch.object(roll_call.RollCall, "_ask", autospec=True, side_effect=own)
    with mock.patch.object(roll_call, "BLOCK", 2), late, counting as asked:
        while mesh.rank == 3 and store.add("asked", 0) < before + count:
            time.sleep(0.1)
        mesh.assemble("to meet")
    return asked.call_count


def test_one_rank_asks_for_all_that_wait(pool: WorkerPool) -> None:
    """Also when the second of them would have its turn."""
    assert sorted(pool.run(4, questions, 2))[:3] == [0, 0, 0]


class Held:
    """A watch that waits in torch's store until a key is there: the thread that looks is in C++ meanwhile."""

    def __init__(self, gate: str) -> None:
        self.gate, self.is_there = gate, threading.Event()

    def look(self, store: Any, question: int) -> None:
        self.is_there.set()
        store.get(self.gate)

    def state(self) -> dict[str, Any]:
        return {}


def leave_while_held() -> bool:
    """Whether the thread that answers is left over after the end of a process, in which no time-out is long enough."""
    store: Any = dist.distributed_c10d._get_default_store()
    presence = roll_call.RollCall(store, dist.get_rank())
    presence.watch = held = Held(f"gate/{dist.get_rank()}")
    held.is_there.wait()
    join = threading.Thread.join

    def join_at_once(thread: threading.Thread, timeout: float | None = None) -> None:
        if timeout is None:
            dist.PrefixStore("roll_call", store).set(held.gate, "1")
            join(thread)

    with mock.patch.object(threading.Thread, "join", join_at_once):
        presence._leave()
    atexit.unregister(presence._leave)
    return presence._answering.is_alive()


def test_a_process_ends_after_its_thread(pool: WorkerPool) -> None:
    """One that comes back from torch's store after the interpreter's end aborts the process."""
    assert pool.run(2, leave_while_held) == [False, False]


def taken_over() -> int:
    """How often this rank asks. The first of three stands still when it asks; the last comes when another has asked."""
    mesh = ParallelMesh(ParallelConfig())
    store = dist.PrefixStore("roll_call", dist.distributed_c10d._get_default_store())
    mesh.assemble("to begin")
    before, own = store.add("asked", 0), roll_call.RollCall._ask

    def stops(*_: Any) -> tuple[dict[int, str], dict[int, str]]:
        store.set("stopped", "1")
        store.wait(["met"])
        return {}, {}

    ask = stops if mesh.rank == 0 else own
    asking = mock.patch.object(roll_call.RollCall, "_ask", autospec=True, side_effect=ask)
    with mock.patch.object(roll_call, "ASK_AFTER", 0.2), asking as asked:
        if mesh.rank:
            store.wait(["stopped"])
        while mesh.rank == 2 and store.add("asked", 0) == before:
            time.sleep(0.05)
        if mesh.rank == 2:
            store.set("met", "1")
        mesh.assemble("to meet")
    return asked.call_count


def test_another_rank_asks_where_the_first_no_longer_does(pool: WorkerPool) -> None:
    first, second, last = pool.run(3, taken_over)
    assert first and second and not last


def test_a_process_waits_at_its_end_for_an_action_that_it_has_left() -> None:
    """For a while: one that comes back from C++ in the midst of Python's end aborts the process."""
    gate, registered = threading.Event(), list[Any]()
    mesh: Any = SimpleNamespace(device="cpu", world=None)
    with (
        mock.patch.object(together.atexit, "register", lambda *call: registered.append(call)),
        mock.patch.object(together, "all_reduce", side_effect=RuntimeError("rank 1 has ended")),
        pytest.raises(RuntimeError, match="rank 1 has ended"),
    ):
        together.together_for_long(mesh, "waiting", gate.wait)
    ((join, seconds),) = registered
    join(0.01)
    assert join.__self__.is_alive() and seconds == together.END_SECONDS
    gate.set()
    join()

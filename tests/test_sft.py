"""TRL on top: the same losses, norms and metrics on every topology as stock `trl.SFTTrainer` in one process.

Four optimizer steps in fp32 on the same conversations. TRL's metrics are means over micro-batches of all ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hub_server import HubServer
from pool import WorkerPool
from sft_runs import MODES, Log, chat_checkpoint, chats, sft_arguments, texts, train_our_sft, train_stock_sft
from test_chat_dataset import tokenizer
from test_examples import load
from tiny import message
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, pipeline

from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

pytest.importorskip("trl", reason="trl is not installed (pip install hf-nanotron[trl])")
from trl import SFTConfig, SFTTrainer

import hf_nanotron.trl as ours
from hf_nanotron.trl import NanotronSFTConfig, NanotronSFTTrainer, arguments

TOLERANCE = dict.fromkeys(("first loss", "loss", "norm", "metrics"), 1e-6)
TITLE = "relative error against stock trl.SFTTrainer in one process, four steps in fp32"
HEADER = f"{'topology':64s} " + " ".join(f"{name:>10s}" for name in TOLERANCE)
ROWS: list[str] = []

# Data-parallel ranks, arguments, and the modes that run by default: each way of ours once.
TOPOLOGIES: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    "one process": (1, {}, ()),
    "tp 2": (1, {"tp_size": 2}, ("packing", "assistant-only", "label smoothing")),
    "tp 2 whole sequences": (1, {"tp_size": 2, "sequence_parallel": False}, ()),
    "pp 2": (1, {"pp_size": 2}, ("dft",)),
    "pp 2 interleaved": (1, {"pp_size": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2}, ()),
    "pp 2 zb": (1, {"pp_size": 2, "pp_schedule": "zb"}, ()),
    "dp 2 zero 0": (2, {"zero_stage": 0}, ()),
    "dp 2 zero 1": (2, {}, ()),
    "dp 2 zero 2": (2, {"zero_stage": 2}, ()),
    "dp 2 zero 3": (2, {"zero_stage": 3}, ("streamed",)),
    "cp 2": (1, {"cp_size": 2}, ("dft packed",)),
    "tp 2 pp 2": (1, {"tp_size": 2, "pp_size": 2}, ()),
    "tp 2 dp 2": (2, {"tp_size": 2, "zero_stage": 2}, ()),
    "tp 2 cp 2": (1, {"tp_size": 2, "cp_size": 2}, ()),
}
CP_CANNOT = {"label smoothing"}  # it needs whole rows
COMMON: dict[str, Any] = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 4}


@functools.cache
def reference(mode: str, layers: int, dp: int) -> Log:
    """TRL's metrics are of the batches of all ranks; `eval_loss` is a mean over the batches of each, as in Trainer."""
    directory, common = chat_checkpoint(num_hidden_layers=layers), {**COMMON, "per_device_train_batch_size": 2 * dp}
    log = train_stock_sft(directory, mode, True, **common, per_device_eval_batch_size=2 * dp)
    if dp > 1:
        of_ranks = train_stock_sft(directory, mode, True, **common, per_device_eval_batch_size=2)
        for whole, parts in zip(log.evaluations, of_ranks.evaluations, strict=True):
            whole["eval_loss"] = parts["eval_loss"]
    return log


def run(modes: tuple[str, ...], layers: int, directory: str, sizes: dict[str, Any]) -> list[Log]:
    common = {**COMMON, "per_device_train_batch_size": 2}
    return [train_our_sft(directory, mode, True, **common, **sizes) for mode in modes]


def relative(got: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(got, expected, strict=True))


def errors(got: Log, expected: Log) -> dict[str, float]:
    """By the columns of the table."""

    def column(log: Log, name: str) -> list[float]:
        return [line[name] for line in log.lines]

    assert len(got.lines) == len(expected.lines) == 4
    assert [set(line) for line in got.lines] == [set(line) for line in expected.lines]
    assert [set(line) for line in got.evaluations] == [set(line) for line in expected.evaluations]
    both = [*zip(got.evaluations, expected.evaluations, strict=True)]
    names = sorted(set(expected.lines[0]) - {"loss", "grad_norm"})
    of_metrics = [relative(column(got, name), column(expected, name)) for name in names]
    of_metrics += [relative(list(one.values()), [other[name] for name in one]) for one, other in both]
    assert column(got, "num_tokens") == column(expected, "num_tokens")
    return {
        "first loss": relative(column(got, "loss")[:1], column(expected, "loss")[:1]),
        "loss": relative(column(got, "loss"), column(expected, "loss")),
        "norm": relative(column(got, "grad_norm"), column(expected, "grad_norm")),
        "metrics": max(of_metrics),
    }


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_sft_on_every_topology(pool: WorkerPool, pytestconfig: pytest.Config, name: str) -> None:
    dp, sizes, by_default = TOPOLOGIES[name]
    modes = tuple(MODES) if pytestconfig.getoption("full_matrix") else by_default
    modes = tuple(mode for mode in modes if not ("cp_size" in sizes and mode in CP_CANNOT))
    if not modes:
        pytest.skip("runs with --full-matrix")
    layers = max(2, sizes.get("pp_size", 1) * sizes.get("pp_virtual_stages", 1))
    world = dp * sizes.get("tp_size", 1) * sizes.get("pp_size", 1) * sizes.get("cp_size", 1)
    results = pool.run(world, run, modes, layers, chat_checkpoint(num_hidden_layers=layers), sizes)
    for index, mode in enumerate(modes):
        got = results[0][index]
        assert all(logs[index].lines == got.lines for logs in results), "ranks report different figures"
        error = errors(got, reference(mode, layers, dp))
        ROWS.append(f"{f'{mode}: {name}':64s} " + " ".join(f"{error[each]:10.1e}" for each in TOLERANCE))
        assert all(error[each] <= TOLERANCE[each] for each in TOLERANCE), f"{mode} on {name}: {error}"


# ---- mixtures of experts ----


def run_moe(directory: str, sizes: dict[str, Any]) -> Log:
    return train_our_sft(directory, "packing", **{"per_device_train_batch_size": 1, **sizes})


MOE: dict[str, tuple[int, int, dict[str, Any]]] = {  # processes, micro-batches of a process, sizes
    "tp 2": (2, 2, {"tp_size": 2}),
    "pp 2": (2, 2, {"pp_size": 2}),
    "ep 2": (2, 1, {"ep_size": 2}),
    "cp 2": (2, 2, {"cp_size": 2}),
}


@pytest.mark.parametrize("name", MOE)
def test_losses_over_routers(pool: WorkerPool, pytestconfig: pytest.Config, name: str) -> None:
    """On unless `router_aux_loss_coef=0`, and a mean over micro-batches: TRL's way, which is not Trainer's."""
    if name != "ep 2" and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    directory = chat_checkpoint("mixtral", num_local_experts=4, num_experts_per_tok=2)
    world, accumulation, sizes = MOE[name]
    common = {"per_device_train_batch_size": 1, "router_aux_loss_coef": 0.1}
    expected = train_stock_sft(directory, "packing", **common, gradient_accumulation_steps=2)
    assert all(line["aux_loss"] > 0 for line in expected.lines)
    sizes = {**sizes, **common, "gradient_accumulation_steps": accumulation}
    got = pool.run(world, run_moe, directory, sizes)[0]
    for name in ("loss", "grad_norm", "aux_loss"):
        assert relative([line[name] for line in got.lines], [line[name] for line in expected.lines]) < 1e-4, name


# ---- resume ----


def run_parts(directory: str, output_dir: str, sizes: dict[str, Any], until: int, resume: bool) -> list[Any]:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == until

    log = Log()
    args = {"output_dir": output_dir, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "packing": True}
    trainer = NanotronSFTTrainer(
        model=directory,
        args=NanotronSFTConfig(**sft_arguments(**args, max_length=96, **sizes)),
        train_dataset=chats(),
        callbacks=[log, Stop()],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.mesh.close()
    return log.lines


def test_a_run_goes_on_at_other_sizes(pool: WorkerPool, tmp_path: Path) -> None:
    """With the losses and the count of tokens of a run that was not interrupted; TRL itself counts anew."""
    directory = chat_checkpoint()
    whole = pool.run(1, run_parts, directory, str(tmp_path / "a"), {"gradient_accumulation_steps": 2}, 4, False)[0]
    other = str(tmp_path / "b")
    first = pool.run(2, run_parts, directory, other, {"tp_size": 2, "gradient_accumulation_steps": 2}, 2, False)[0]
    rest = pool.run(2, run_parts, directory, other, {"zero_stage": 2, "gradient_accumulation_steps": 1}, 4, True)[0]
    for name in ("loss", "grad_norm", "num_tokens"):
        expected = [line[name] for line in whole]
        assert [line[name] for line in first + rest] == pytest.approx(expected, rel=1e-4), name
    card = (tmp_path / "b" / "README.md").read_text()
    assert "- sft" in card and "Trained with hf-nanotron" in card and "(dp_size 2)" in card


# ---- what is refused ----


def args_of(**options: Any) -> NanotronSFTConfig:
    return NanotronSFTConfig(**sft_arguments(**options))


def trainer_of(args: dict[str, Any] | None = None, **options: Any) -> NanotronSFTTrainer:
    given = {"model": chat_checkpoint(), "train_dataset": chats(), **options}
    return NanotronSFTTrainer(args=args_of(**(args or {})), **given)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"activation_offloading": True}, "activation_offload=1"),
        ({"loss_type": "other"}, "'nll' or 'dft'"),
        ({"loss_type": "dft", "label_smoothing_factor": 0.1}, "loss_type='dft' has no smoothed labels"),
        ({"loss_type": "dft", "z_loss_coefficient": 1e-4}, "a z-loss is no part of that"),
        ({"use_liger_kernel": True}, "it replaces layers that are sharded"),
        ({"dataset_kwargs": {"add_special_tokens": False}}, "the keys are skip_prepare_dataset"),
        ({"model_init_kwargs": {"device_map": "auto"}}, "each rank has one device"),
        ({"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}}, "quantised weights cannot be sharded"),
        ({"trust_remote_code": True}, "loaded with transformers"),
        ({"gradient_checkpointing_kwargs": {"selective": True}}, "selective=True is refused"),
        ({"batch_size_warmup_tokens": 100, "batch_size_warmup_start": 1}, "TRL prepares the data"),
        ({"max_length": "long"}, "max_length='long'"),
        ({"max_length": -5}, "max_length=-5 is refused"),  # TRL would drop the last 5 tokens of each sample
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0 is refused"),
        ({"pad_to_multiple_of": "x"}, "pad_to_multiple_of='x' is refused"),
        ({"dataset_num_proc": 0}, "dataset_num_proc=0 is refused"),
        ({"model_init_kwargs": {"dtype": "int3"}}, "dtype='int3' is refused"),
        ({"truncation_mode": "middle", "packing": True}, "'middle' is not one of"),
        ({"packing_strategy": 3}, "packing_strategy=3"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef=-1.0 is refused"),
    ],
    ids=str,
)
def test_arguments_that_would_be_ignored_are_refused(options: dict[str, Any], says: str) -> None:
    assert says in message(lambda: args_of(**options))


def test_trainers_refuse_what_they_cannot_train(tmp_path: Path) -> None:
    images = Dataset.from_dict({"images": [["a"]], "messages": [[{"role": "user", "content": "a"}]]})
    found = {
        "args": message(lambda: NanotronSFTTrainer(chat_checkpoint(), None, train_dataset=chats())),
        "stock args": message(
            lambda: NanotronSFTTrainer(
                chat_checkpoint(), NanotronTrainingArguments(**sft_arguments()), train_dataset=chats()
            )
        ),
        "images": message(lambda: trainer_of(train_dataset=images)),
        "tokens": message(lambda: trainer_of(train_dataset=[{"input_ids": [1]}])),
        "no data": message(lambda: trainer_of(train_dataset=None)),
        "empty": message(lambda: trainer_of(train_dataset=chats().take(0))),
        "empty evaluation": message(lambda: trainer_of(eval_dataset={"a": chats(), "b": chats().take(0)})),
        "evaluation": message(lambda: trainer_of(eval_dataset=[{"input_ids": [1]}])),
        "columns": message(lambda: trainer_of({"dataset_text_field": "story"}, train_dataset=texts())),
        "template": message(lambda: trainer_of({"chat_template_path": "none.jinja"})),
        "completions": message(lambda: trainer_of({"completion_only_loss": True})),
        "peft": message(lambda: trainer_of(peft_config=object())),
        "quantised": message(lambda: trainer_of(quantization_config=object())),
        "tokenizer": message(lambda: trainer_of(processing_class=str)),
        "adapter": message(lambda: trainer_of(model=torch.nn.Linear(1, 1))),
        "doremi": message(lambda: trainer_of(doremi=object())),
        "loss": message(lambda: trainer_of({"loss_type": "dft"}, compute_loss_func=lambda *a, **k: 0)),
    }
    expected = {
        "args": "needs `args` of type NanotronSFTConfig",
        "stock args": "not NanotronTrainingArguments",
        "images": "a column 'images': images are not supported",
        "tokens": "train_dataset=list is not a Dataset",
        "no data": "train_dataset=NoneType is not a Dataset",
        "empty": "train_dataset is empty",
        "empty evaluation": "eval_dataset['b'] is empty",
        "evaluation": "eval_dataset=list is not a Dataset",
        "columns": "(its columns are text); name the column of text with dataset_text_field",
        "template": "chat_template_path='none.jinja' is no file.",
        "completions": "train_dataset has no completions (its columns are messages)",
        "peft": "peft_config=object is refused",
        "quantised": "quantised weights cannot be sharded",
        "tokenizer": "is no tokenizer of transformers",
        "adapter": "model=Linear is neither a Hub id",
        "doremi": "TRL drops the column of domains",
        "loss": "compute_loss_func",
    }
    assert {name: text if expected[name] not in text else expected[name] for name, text in found.items()} == expected


def test_what_a_trainer_takes_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    """TRL would say that the model's arguments are ignored. A plan is of the same arguments, with TRL's defaults."""
    trainer = trainer_of({"model_init_kwargs": {"dtype": "bfloat16"}, "packing": True, "max_length": 96, "bf16": True})
    assert trainer.model.dtype == torch.bfloat16 and trainer.args.model_init_kwargs == {"dtype": "bfloat16"}
    assert "model_init_kwargs" not in caplog.text
    assert message(lambda: trainer.evaluate(chats().take(0))) == "eval_dataset is empty."
    job = trainer.plan("h100", 2, run=False).job
    assert job.sequence_length == 96 and job.arguments["activation_checkpointing"] and "packing" not in job.arguments


def test_bases_in_another_order_are_refused() -> None:
    """They would silently take other defaults, or leave half of a trainer out."""
    said = message(lambda: type("X", (SFTTrainer, NanotronTrainer), {}))
    assert said.startswith("class X: SFTTrainer stands before NanotronTrainer") and "NanotronSFTTrainer" in said
    said = message(lambda: type("X", (SFTConfig, NanotronTrainingArguments), {}))
    assert said.startswith("class X: SFTConfig stands before NanotronTrainingArguments") and "NanotronSFTConfig" in said
    said = message(lambda: type("X", (NanotronTrainingArguments, SFTConfig), {}))
    assert "would be" in said and "(NanotronTrainingArguments), not" in said and "NanotronSFTConfig" in said
    type("X", (NanotronSFTConfig,), {})
    type("X", (NanotronSFTTrainer,), {})


def test_defaults_are_those_of_trl() -> None:
    """But for those that this package has changed."""
    ours = {entry.name: entry.default for entry in dataclasses.fields(NanotronSFTConfig)}
    changed = {
        entry.name
        for entry in dataclasses.fields(NanotronTrainingArguments)
        if entry.name in vars(NanotronTrainingArguments)["__annotations__"]
    }
    for entry in dataclasses.fields(SFTConfig):
        if entry.name not in changed:
            assert ours[entry.name] == entry.default, entry.name
    assert changed & {entry.name for entry in dataclasses.fields(SFTConfig)} == {"optim", "torch_compile"}
    args = NanotronSFTConfig(output_dir="unused", use_cpu=True)
    assert args.bf16 and args.learning_rate == 2e-5 and args.logging_steps == 10 and args.activation_checkpointing


def test_every_argument_of_trl_is_in_a_table() -> None:
    own = arguments.own_fields()
    assert sorted(own) == sorted({*arguments.HONOURED, *arguments.REFUSED})
    stock = set(inspect.signature(Trainer.__init__).parameters)
    of_trainer = set(inspect.signature(SFTTrainer.__init__).parameters) - stock
    listed = {*arguments.TRAINER_HONOURED, *arguments.TRAINER_REFUSED} - {"model", "args", "doremi"}
    assert of_trainer == listed


def test_another_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "version", lambda name: "1.17.0")
    with pytest.raises(ImportError, match=r"others than 1.17.0; install trl>=1.16,<1.17"):
        ours.check_trl()

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(ours, "version", missing)
    with pytest.raises(ImportError, match=r"not installed; install .*pip install 'hf-nanotron\[trl\]'"):
        ours.check_trl()


# ---- the example ----

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "sft"


def conversations(folder: Path) -> Path:
    """A base model without a chat template, and conversations in a file."""
    chosen = tokenizer(None)
    model = AutoModelForCausalLM.from_pretrained(chat_checkpoint())
    model.save_pretrained(folder / "base")
    chosen.save_pretrained(folder / "base")
    chats().to_json(folder / "chats.jsonl")
    return folder / "chats.jsonl"


def example_arguments(folder: Path, data: Path) -> list[str]:
    """`run.yaml`, at a tiny size."""
    options = {
        "model": folder / "base", "dataset": data, "train_split": "train[:24]", "eval_split": "train[24:]",
        "output_dir": folder / "out", "max_length": 128, "bf16": False, "use_cpu": True, "max_steps": 2,
        "eval_steps": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "warmup_steps": 0, "logging_steps": 1,
        "save_steps": 2,
    }  # fmt: skip
    return ["--config", "run.yaml", *(text for name, value in options.items() for text in (f"--{name}", str(value)))]


def run_example(arguments: list[str]) -> None:
    module = load("sft_example", EXAMPLE / "train.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(EXAMPLE)
        patch.setattr(sys, "argv", ["train.py", *arguments])
        module.main()


def check_chat_model(folder: Path) -> None:
    """Plain transformers talks to it, and stops where a turn ends."""
    chosen = AutoTokenizer.from_pretrained(folder)
    assert chosen.eos_token == "<|im_end|>" and "generation" in chosen.chat_template
    chat = pipeline("text-generation", model=str(folder))
    said = chat([{"role": "user", "content": "Hi"}], max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert [turn["role"] for turn in said] == ["user", "assistant"]
    assert chosen.eos_token_id in chat.model.generation_config.eos_token_id


def test_the_example_makes_a_chat_model(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(2, run_example, example_arguments(tmp_path, conversations(tmp_path)))
    check_chat_model(tmp_path / "out")
    log = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert {"entropy", "mean_token_accuracy", "num_tokens"} <= set(log[0])
    assert any("eval_mean_token_accuracy" in entry for entry in log)


def test_the_example_is_pushed(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """As its README says, under torchrun, to a Hub on loopback."""
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    arguments = example_arguments(tmp_path, conversations(tmp_path))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    with HubServer(token="hf_loopback") as hub:
        env = {**os.environ, **hub.client_env(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        push = ["--push_to_hub", "true", "--hub_model_id", "user/chat"]
        done = subprocess.run(
            [*torchrun, *arguments, *push], cwd=EXAMPLE, env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        pushed = tmp_path / "pushed"
        pushed.mkdir()
        for name, file in hub.files("user/chat").items():
            (pushed / name).write_bytes(file.data)
    check_chat_model(pushed)
    card = (pushed / "README.md").read_text()
    assert "- sft" in card and "(tp_size 2)" in card

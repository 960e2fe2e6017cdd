"""`hf-nanotron plan`: what a run costs, the best layout of it, pictures, and what is refused."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from pool import WorkerPool
from tiny import message
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MambaConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from hf_nanotron import (
    AutoModelForCausalLM as AutoParallelModel,
    NanotronTrainer,
    NanotronTrainingArguments,
    ParallelConfig,
)
from hf_nanotron.cli.main import build_parser
from hf_nanotron.cli.settings import check_complete, read_settings
from hf_nanotron.monitor.gpus import find_gpu
from hf_nanotron.plan.default_rates import default_rates
from hf_nanotron.plan.estimate import Estimator
from hf_nanotron.plan.job import Job, parallel_config
from hf_nanotron.plan.layer_work import WorkTable
from hf_nanotron.plan.layouts import RECOMPUTATIONS, layouts
from hf_nanotron.plan.long_step import long_step_time
from hf_nanotron.plan.result import usable_bytes
from hf_nanotron.plan.search import cheapest_change, search
from hf_nanotron.plan.step_time import step_time
from hf_nanotron.plan.weights import ModelWeights

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=False,
)  # fmt: skip
QWEN3_30B = Qwen3MoeConfig(
    vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
    head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, tie_word_embeddings=False,
)  # fmt: skip
TINY: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
KEYS = {
    "layout", "peak_memory_gib", "step_seconds", "mfu", "bubble", "exposed_communication_seconds", "deadlock_free",
    "parts", "fits", "tokens_per_second", "gpu_hours",
}  # fmt: skip


def main(words: list[str]) -> None:
    """The command, whose errors are raised."""
    args = build_parser().parse_args(words)
    args.run(args)


def job(config: PretrainedConfig, world: int, length: int = 8192, **arguments: Any) -> Job:
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    return Job(config, {"bf16": True, **batch, **arguments}, world, min(8, world), length)


def write(folder: Path, **training: Any) -> Path:
    """The file of a tiny run, and its data."""
    data = folder / "data"
    Dataset.from_dict({"input_ids": [[i % 512] * 32 for i in range(64)]}).save_to_disk(data)
    sections = {
        "model": {"config": TINY},
        "dataset": {"path": str(data)},
        "training": {
            "output_dir": str(folder / "out"), "bf16": True, "max_steps": 2, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4, "report_to": "none", **training,
        },
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


# ---- the command ----


def test_search_runs_the_best_layout_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON object; the file that is written is one of `train`, with the same samples a step and no secret."""
    path, best = write(tmp_path, hub_token="hf_abcdefghijklmnop"), tmp_path / "best.yaml"
    options = ["--gpus", "2", "--gpu", "h100", "--sequence-length", "32", "--search", "--output", str(best), "--json"]
    main(["plan", str(path), *options])
    said = capsys.readouterr()
    assert said.err.endswith(f"{best} has the run in this layout, without training.hub_token.\n")
    found = json.loads(said.out)
    assert set(found) >= KEYS
    assert found["deadlock_free"] is True and found["faults"] == []
    assert found["fits"] and 0 < found["peak_memory_gib"] < 1
    assert sum(rank["ranks"] for rank in found["parts"]["memory_gib"]) == 2
    assert found["step_seconds"] == pytest.approx(sum(found["parts"]["step_seconds"].values()))
    times = [each["step_seconds"] for each in found["search"]["best"]]
    assert times == sorted(times) and len(times) > 1
    text = best.read_text(encoding="utf-8")
    assert "hf_abcdef" not in text and "Left out, since it may be a secret: training.hub_token" in text
    sections, _ = read_settings(best, [])
    check_complete(sections)
    training = sections["training"]
    sizes = ParallelConfig(**{name: training[name] for name in ("tp_size", "pp_size", "cp_size", "ep_size")})
    rows = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * sizes.dp_size(2)
    assert rows == 2 * 4 * 2
    assert message(lambda: main(["plan", str(path), *options])).startswith(f"--output {best} exists")


def train(path: str) -> None:
    main(["train", path, "--use_cpu", "true"])


def test_train_takes_the_best_layout(tmp_path: Path, pool: WorkerPool, pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    path, best = write(tmp_path), tmp_path / "best.yaml"
    size = ["--gpus", "4", "--gpu", "h100", "--sequence-length", "32"]
    main(["plan", str(path), *size, "--search", "--output", str(best), "--no-run"])
    pool.run(4, train, str(best))
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("file", "gpus"), [("smollm3/real_size.yaml", 384), ("moe/real_size.yaml", 64), ("mamba/real_size.yaml", 64)]
)
def test_examples_are_planned(
    file: str, gpus: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], pytestconfig: pytest.Config
) -> None:
    """Text and a picture, by arithmetic."""
    if file != "moe/real_size.yaml" and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    picture = tmp_path / "plan.svg"
    sizes = ["--gpus", str(gpus), "--gpu", "h100", "--no-run", "--picture", str(picture)]
    main(["plan", str(EXAMPLES / file), *sizes])
    text = capsys.readouterr().out
    for said in ("memory by rank, GiB", "on the fullest rank", "time of a step", "MFU", "bubble", "GPU hours"):
        assert said in text
    assert "Not measured: links between more than 2 GPUs of a node and between nodes (90% of the data sheet's)." in text
    assert text.endswith(f"{picture} has the picture.\n")
    drawn = picture.read_text(encoding="utf-8")
    for said in ("forward", "backward", "idle", "pp rank 0", "activations", "memory by rank"):
        assert said in drawn


def test_a_trainer_plans_itself(tmp_path: Path) -> None:
    arguments = NanotronTrainingArguments(
        str(tmp_path), use_cpu=True, bf16=True, max_steps=10, per_device_train_batch_size=2, report_to="none"
    )
    config = LlamaConfig(**{name: value for name, value in TINY.items() if name != "model_type"})
    data = Dataset.from_dict({"input_ids": [[1] * 32] * 8})
    trainer = NanotronTrainer(model=AutoModelForCausalLM.from_config(config), args=arguments, train_dataset=data)
    plan = trainer.plan(gpu="h100", gpus=16, run=False)
    assert plan.layout["dp_size"] == 16 and plan.job.sequence_length == 32 and plan.job.tokens_per_step == 16 * 2 * 32
    assert plan.steps == 10 and plan.fits and plan.deadlock_free is None
    assert "torch_compile" not in plan.job.arguments  # a CPU compiles nothing, and the GPU is another
    assert message(lambda: trainer.plan(run=False)) == "plan needs gpu, such as gpu='h100': this process has none."
    for wrong in ({"gpus": 0}, {"gpus": "8"}, {"gpus": 12}, {"gpus_per_node": True}, {"sequence_length": 0}):
        said = message(lambda wrong=wrong: trainer.plan(gpu="h100", run=False, **wrong))
        assert next(iter(wrong)) in said or "does not divide world_size=12" in said


def plan_here(folder: str) -> tuple[dict[str, Any], str]:
    """Runs on each rank; only the first reads data."""
    rank = int(os.environ["RANK"])
    arguments = NanotronTrainingArguments(folder, use_cpu=True, bf16=True, max_steps=10, report_to="none")
    config = LlamaConfig(**{name: value for name, value in TINY.items() if name != "model_type"})
    model = AutoParallelModel.from_config(config, parallel=arguments.parallel)
    data = Dataset.from_dict({"input_ids": [[1] * 32] * 64}) if rank == 0 else [{}] * 64
    trainer = NanotronTrainer(model=model, args=arguments, train_dataset=data)
    return trainer.plan(gpu="h100", run=False).as_json(), message(lambda: trainer.plan(gpu="h300", run=False))


def test_the_first_rank_plans_for_all(tmp_path: Path, pool: WorkerPool) -> None:
    first, second = pool.run(2, plan_here, str(tmp_path))
    assert first == second
    assert first[0]["gpus"] == 2 and first[0]["sequence_length"] == 32
    assert first[1].startswith("GPU 'h300' is not in the table")
    page = (Path(__file__).parent.parent / "docs" / "planning.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", page.split("## In a script")[1], re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"\w+", row)} == {*first[0], "search"}


# ---- arithmetic ----


@pytest.mark.parametrize(
    ("config", "billions"),
    [(LLAMA_8B, 8.03), (QWEN3_30B, 30.53), (DeepseekV3Config(), 671.0)],
    ids=lambda x: str(x)[:12],
)
def test_weights_are_those_of_the_model_cards(config: PretrainedConfig, billions: float) -> None:
    """And every layout holds all of them: the sum over ranks, less what they hold alike."""
    weights = ModelWeights(config)
    assert weights.total / 1e9 == pytest.approx(billions, rel=1e-3)
    whole = weights.held(ParallelConfig(), 0)
    assert whole.dense + whole.experts == weights.total
    parallel = ParallelConfig(pp_size=4)
    held = [weights.held(parallel, rank) for rank in range(4)]
    assert sum(each.dense + each.experts for each in held) == weights.total


@pytest.mark.parametrize("sizes", [{"pp_size": 4}, {"pp_size": 4, "pp_schedule": "zb"}, {"tp_size": 2}])
def test_long_steps_are_extended_from_short_ones(sizes: dict[str, Any]) -> None:
    works, rates = WorkTable(ModelWeights(LLAMA_8B)), default_rates("h100")
    long = job(LLAMA_8B, 8, **sizes, gradient_accumulation_steps=64)
    exact, extended = step_time(long, rates, works), long_step_time(long, rates, works, exact=3)
    assert extended.seconds == pytest.approx(exact.seconds, rel=2e-3)
    assert extended.mfu == pytest.approx(exact.mfu, rel=2e-3)
    assert extended.bubble == pytest.approx(exact.bubble, abs=5e-3)
    assert extended.exposed_communication == pytest.approx(exact.exposed_communication, rel=2e-2, abs=1e-4)


def test_search_finds_what_trying_all_finds() -> None:
    """What is skipped by bounds is never the fastest."""
    config = LlamaConfig(**{**LLAMA_8B.to_dict(), "num_hidden_layers": 4})
    asked, gpu, rates = (
        job(config, 4, length=4096, gradient_accumulation_steps=4),
        find_gpu("rtx-4090"),
        default_rates("rtx-4090"),
    )
    rows = asked.tokens_per_step // asked.sequence_length
    found = search(asked, gpu, rates)
    estimator = Estimator(config)
    works = WorkTable(estimator.weights)
    every = [
        replace(layout, arguments={**layout.arguments, **recomputation})
        for layout in layouts(asked, estimator.weights, rows)
        for recomputation in RECOMPUTATIONS
    ]
    assert {each.tokens_per_step // each.sequence_length for each in every} == {rows}
    fitting = [each for each in every if estimator.fullest(each).total <= usable_bytes(gpu)]
    assert 0 < len(fitting) < len(every)
    fastest = min(long_step_time(each, rates, works).seconds for each in fitting)
    assert found.best[0].step.seconds == pytest.approx(fastest, rel=2e-3)
    assert all(each.memory.total <= usable_bytes(gpu) for each in found.best)


def test_the_cheapest_change_fits_and_keeps_the_samples() -> None:
    asked, gpu, rates = job(LLAMA_8B, 8, length=8192), find_gpu("h100"), default_rates("h100")
    estimator = Estimator(LLAMA_8B)
    assert estimator.fullest(asked).total > usable_bytes(gpu)
    change = cheapest_change(asked, gpu, rates)
    assert change is not None
    changed = replace(asked, arguments={**asked.arguments, **change.arguments})
    assert estimator.fullest(changed).total <= usable_bytes(gpu)
    assert changed.tokens_per_step == asked.tokens_per_step
    assert parallel_config(changed).dp_size(8) >= 1
    assert cheapest_change(job(DeepseekV3Config(), 8), gpu, rates) is None


def test_rows_that_ranks_cannot_share_are_not_shared() -> None:
    """A search leaves out what the trainer refuses when training starts, in the same words."""
    config = MambaConfig(vocab_size=512, hidden_size=64, state_size=8, num_hidden_layers=2)
    weights = ModelWeights(config)
    assert "cp_size=2 is not supported for MambaForCausalLM: " in (weights.why_not(ParallelConfig(cp_size=2)) or "")
    assert (
        weights.why_not(ParallelConfig()) is None and ModelWeights(LLAMA_8B).why_not(ParallelConfig(cp_size=2)) is None
    )


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpu", "h300"], "GPU 'h300' is not in the table; it has h100-pcie"),
        (["--gpus", "12"], "--gpus 12 is no multiple of 8, the GPUs of a node; give --nodes"),
        (["--nodes", "3"], "--nodes 3 does not divide --gpus 8"),
        (["--gpus", "0"], "--gpus 0 must be at least 1"),
        (["--set", "tp_size", "3"], "tp_size=3 x pp_size=1 x cp_size=1 = 3 does not divide the world size 8"),
        (
            ["--set", "pp_size", "4", "--set", "gradient_accumulation_steps", "2"],
            "gradient_accumulation_steps=2 is the number of micro-batches of the pipeline",
        ),
        (["--tokens-per-step", "1000"], "--tokens-per-step 1000 is no multiple of the 32 tokens of a row; give 992 or"),
        (["--tokens-per-step", "320"], "--tokens-per-step 320 is no multiple of 512, the tokens of one micro-batch"),
        (["--output", "x.yaml"], "--output x.yaml needs --search"),
        (["--picture", "x.txt"], "--picture x.txt must end with .png, .svg or .pdf."),
        (["--rates", "none.json"], "the file of rates none.json cannot be read"),
        (["--gpu", ""], "GPU '' is not in the table"),
        (["--rates", "h200.json"], "the rates are of h200, and the plan is for h100: measure them on h100"),
        (["--set", "optim_offload", "2"], "optim_offload=2 must be a fraction of the optimizer's state"),
        (["--set", "optim_offload", "2", "--search"], "optim_offload=2 must be a fraction"),
        (["--set", "tp_size", "8"], "cannot shard"),
        (["--set", "profile_steps", "1-2", "--set", "profile_ranks", "9"], "profile_ranks"),
        (["--model", "m"], "plan needs either CONFIG.yaml or --model."),
        (["--set", "model.name_or_path", "./none", "--set", "model.config", "null"], "'./none': folder"),
    ],
)
def test_refusals(options: list[str], says: str, tmp_path: Path) -> None:
    path = write(tmp_path)
    default_rates("h200").write(tmp_path / "h200.json")
    options = [str(tmp_path / word) if word == "h200.json" else word for word in options]
    sizes = ["--gpus", "8", "--gpu", "h100", "--sequence-length", "32", "--no-run"]
    assert says in message(lambda: main(["plan", str(path), *sizes, *options]))


def test_a_file_without_the_length_of_rows(tmp_path: Path) -> None:
    said = message(lambda: main(["plan", str(write(tmp_path)), "--gpus", "8", "--gpu", "h100"]))
    assert said == "the tokens of a row are not known: dataset.sequence_length is not set; give --sequence-length."


def test_no_layout_fits(tmp_path: Path) -> None:
    DeepseekV3Config().save_pretrained(tmp_path)
    options = ["--model", str(tmp_path / "config.json"), "--sequence-length", "4096", "--tokens-per-step", "65536"]
    said = message(lambda: main(["plan", *options, "--gpus", "8", "--gpu", "h100", "--search"]))
    assert said.startswith("no layout of 8 h100 fits with 16 rows a step: the smallest takes ")

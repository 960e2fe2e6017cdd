"""Runs over mixtures and stages through the trainer: killed, resumed with other weights, stages and layouts.

The reference is one process that is never stopped and knows the later weights and stages from the start.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import WorkerPool
from tiny import VOCABULARY, History, tiny_config, training_arguments
from token_files import documents, write_ds
from transformers import AutoModelForCausalLM, TrainerCallback

STEPS = 6
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {}),
    (2, {"tp_size": 2}),
    (2, {"pp_size": 2}),
    (2, {"tp_size": 2, "sequence_parallel": False}),
    (4, {"tp_size": 2, "pp_size": 2}),
    (4, {"pp_size": 2, "zero_stage": 2}),
    (2, {"zero_stage": 3}),
    (2, {"cp_size": 2}),
    (4, {"cp_size": 2, "pp_size": 2, "cp_mode": "heads"}),
]
DEFAULT = (0, 1)
CASES = 10


class StopAt(TrainerCallback):
    """Ends the run after a step, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def token_set(folder: str, name: str, length: int, **options: Any) -> Any:
    from hf_nanotron.data import TokenDataset

    return TokenDataset(f"{folder}/{name}.ds", length, token_size=2, **options)


def data_of(folder: str, plan: dict[str, Any]) -> Any:
    """The dataset that a plan in JSON's types stands for."""
    from hf_nanotron.data import Mixture, Stage, Stages

    def mixture(length: int, weights: dict[str, float], **options: Any) -> Any:
        sets = {}
        for name in weights:  # `math` goes on with its next token in rows of another length; others begin anew
            in_order = name == "math"
            documents = "cross" if in_order else "mask"
            source = name.removeprefix("long_")
            sets[name] = token_set(folder, source, length, documents=documents, shuffle=not in_order, seed=5)
        return Mixture(sets, weights, max_epochs=4, when_exhausted="redistribute", **options)

    if "stages" not in plan:
        return mixture(16, plan["weights"], schedule=plan.get("schedule", ()))
    return Stages(
        [
            Stage(mixture(stage["length"], stage["weights"]), global_batch_size=stage["batch"], **stage["start"])
            for stage in plan["stages"]
        ]
    )


def train(
    folder: str, plan: dict[str, Any], sizes: dict[str, Any], output: str, resume: str | None, until: int
) -> dict[str, Any]:
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    replicas = world // math.prod(sizes.get(name, 1) for name in ("tp_size", "pp_size", "cp_size"))
    args = NanotronTrainingArguments(
        **training_arguments(output_dir=output, max_steps=STEPS, include_num_input_tokens_seen="all"),
        **sizes,
        gradient_accumulation_steps=8 // replicas,
    )
    history = History()
    model = ParallelAuto.from_pretrained(f"{folder}/model", parallel=args.parallel)
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=data_of(folder, plan), callbacks=[history, StopAt(until)]
    )
    trainer.train(resume_from_checkpoint=resume)
    consumed, state = trainer._data_order.consumed, trainer.state
    assert args.gradient_accumulation_steps == 8 // replicas
    model.mesh.close()
    return {
        "losses": history.losses,
        "seen": state.num_input_tokens_seen,
        "epoch": state.epoch,
        "steps": (state.global_step, state.max_steps),
        "tokens": consumed.tokens,
        "rows": consumed.rows,
    }


def random_case(seed: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]:
    """Plans: before the kill, after it, and of one process that knows both; and the step of the kill."""
    rng = np.random.default_rng(seed)
    kill = int(rng.integers(1, STEPS))
    shares = [round(float(share), 2) for share in rng.uniform(0.2, 0.8, 4)]
    if seed % 2 == 0:  # weights that change
        before = {"web": shares[0], "code": 1 - shares[0]}
        after = {"web": shares[1], "code": 1 - shares[1]}
        schedule = [{"start_samples": 8 * kill, "weights": after}]
        return {"weights": before}, {"weights": after}, {"weights": before, "schedule": schedule}, kill

    def stage(length: int, batch: int | None, share: float, **start: int) -> dict[str, Any]:
        name = "web" if length == 16 else "long_web"
        return {"length": length, "batch": batch, "weights": {name: share, "math": 1 - share}, "start": start}

    first = stage(16, None, shares[0])
    begins = int(rng.integers(1, STEPS))
    second = stage(32, int(rng.choice([4, 8])), shares[1], start_step=begins)
    other = stage(32, int(rng.choice([4, 8])), shares[2], start_tokens=8 * 16 * max(kill, begins) - 40)
    last = stage(16, int(rng.choice([4, 16])), shares[3], start_step=STEPS)
    begun = begins < kill
    after = {"stages": [first, second if begun else other, *([last] if begun else [])]}
    if begun:
        after["stages"][-1]["start"] = {"start_step": min(kill + 1, STEPS - 1)}
        if kill + 1 >= STEPS:
            after["stages"] = after["stages"][:-1]
    return {"stages": [first, second]}, after, after, kill


def write_corpus(folder: Path) -> None:
    for seed, name in enumerate(("web", "code", "math")):
        write_ds(folder / f"{name}.ds", documents(90, seed, vocabulary=VOCABULARY))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2)).save_pretrained(folder / "model")


@pytest.mark.parametrize("case", range(CASES))
def test_killed_and_resumed(pool: WorkerPool, tmp_path: Path, case: int, request: pytest.FixtureRequest) -> None:
    if case not in DEFAULT and not request.config.getoption("full_matrix"):
        pytest.skip("--full-matrix")
    write_corpus(tmp_path)
    before, after, whole, kill = random_case(case)
    (ranks, sizes), (other_ranks, other_sizes) = LAYOUTS[(case + 2) % 10], LAYOUTS[(5 * case + 1) % 10]
    folder = str(tmp_path)
    expected, *_ = pool.run(1, train, folder, whole, {}, f"{folder}/whole", None, STEPS)
    first, *_ = pool.run(ranks, train, folder, before, sizes, f"{folder}/out", None, kill)
    resume = f"{folder}/out/checkpoint-{kill}"
    second, *_ = pool.run(other_ranks, train, folder, after, other_sizes, f"{folder}/out", resume, STEPS)
    print(f"case {case}: {ranks} ranks {sizes} to step {kill}, then {other_ranks} ranks {other_sizes}")
    worst = max(abs(a / b - 1) for a, b in zip(first["losses"] + second["losses"], expected["losses"], strict=True))
    print(f"  largest relative difference of a loss {worst:.1e}; rows {expected['rows']}")
    assert first["losses"] + second["losses"] == pytest.approx(expected["losses"], rel=2e-5)
    for name in ("seen", "steps", "tokens", "rows"):
        assert second[name] == expected[name], name
    assert sum(expected["tokens"].values()) == expected["seen"]
    assert expected["steps"] == (STEPS, STEPS)

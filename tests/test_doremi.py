"""Weights of domains by DoReMi: algorithm 1 of the paper, in numpy over a stock model's losses, on every layout."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import WorkerPool
from test_domains import GLOBAL_BATCH, NAMES, SAMPLES, Rows, checkpoint, dp_size, losses_of_rows, stacked
from tiny import message, tiny_config, training_arguments
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_nanotron import DoReMi
from hf_nanotron.cli.settings import check_complete
from hf_nanotron.training import doremi
from hf_nanotron.training.doremi import DomainWeights

RATE, SMOOTHING, STEPS, LEARNING_RATE = 1.3, 1e-2, 3, 1e-2
# By domain: losses of its tokens, the proxy's and the reference's.
Step = list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]


def paper(steps: list[Step], rate: float, smoothing: float) -> tuple[list[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Algorithm 1 of arXiv:2305.10429: alpha of each step, and their mean. A domain without tokens keeps its lambda."""
    domains = len(steps[0])
    alpha, score, found = np.full(domains, 1 / domains), np.zeros(domains), []
    for step in steps:
        for domain, (proxy, reference) in enumerate(step):
            if len(proxy):
                score[domain] = np.maximum(proxy - reference, 0).mean()
        grown = alpha * np.exp(rate * score)
        alpha = (1 - smoothing) * grown / grown.sum() + smoothing / domains
        found.append(alpha)
    return found, np.mean(found, 0)


@functools.cache
def reference_model() -> str:
    """Another model of the same vocabulary, which finds some tokens easier and some harder."""
    directory = tempfile.mkdtemp()
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=4, hidden_size=16)).save_pretrained(directory)
    return directory


def windows() -> list[range]:
    return [range(first, min(first + GLOBAL_BATCH, SAMPLES)) for first in range(0, SAMPLES, GLOBAL_BATCH)]


def by_domain(form: str, directory: str, rows: range) -> Step:
    both = [
        list(map(torch.cat, zip(*losses_of_rows(model, form, 0.0)[rows.start : rows.stop], strict=True)))
        for model in (directory, reference_model())
    ]
    (proxy, counts, domains), (reference, *_) = both
    owns = [counts & (domains == number) for number in range(len(NAMES))]
    return [(proxy[own].numpy(), reference[own].numpy()) for own in owns]


class Lines(TrainerCallback):
    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.lines.append(dict(logs))


def make(directory: str, reference: Any, rows: Any, lines: Lines, dtype: Any = torch.float64, **overrides: Any) -> Any:
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    doremi = {name: overrides.pop(name) for name in ("rate", "smoothing") if name in overrides}
    kwargs = {name: overrides.pop(name) for name in ("compute_loss_func",) if name in overrides}
    values = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.0,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
    }
    args = NanotronTrainingArguments(**training_arguments(**{**values, **overrides}))
    model = ParallelAuto.from_pretrained(directory, parallel=args.parallel, dtype=dtype)
    if isinstance(reference, str):
        reference = ParallelAuto.from_pretrained(reference, mesh=model.mesh, dtype=dtype)
    return NanotronTrainer(
        model=model, args=args, train_dataset=rows, data_collator=stacked, callbacks=[lines],
        doremi=DoReMi(reference, **{"rate": RATE, "smoothing": SMOOTHING, **doremi}), **kwargs,
    )  # fmt: skip


def train(directory: str, reference: str, runs: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    found = []
    for form, overrides in runs:
        lines = Lines()
        trainer = make(directory, reference, Rows(form), lines, **overrides)
        trainer.train()
        trainer.mesh.close()
        found.append((lines.lines, trainer.doremi.weights))
    return found


RUNS: dict[str, tuple[int, list[tuple[str, dict[str, Any]]]]] = {
    "one": (1, [("rows", {})]),
    "two": (2, [("tokens", {"tp_size": 2}), ("packed", {"pp_size": 2, "pp_schedule": "zb"})]),
}
INTERLEAVED = {"tp_size": 2, "pp_size": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2}
WIDE: dict[str, tuple[int, list[tuple[str, dict[str, Any]]]]] = {
    "four": (4, [("tokens", {})]),
    "recomputed": (1, [("tokens", {"gradient_checkpointing": True})]),
    "cp 2, zero 3": (
        2,
        [("tokens", {"cp_size": 2}), ("rows", {"zero_stage": 3, "average_tokens_across_devices": False})],
    ),
    "tp 2 pp 2, cp 2 pp 2": (4, [("packed", INTERLEAVED), ("packed", {"cp_size": 2, "pp_size": 2})]),
}


def weights_of(line: dict[str, Any]) -> list[float]:
    return [line[f"weight/{name}"] for name in NAMES]


@pytest.mark.parametrize("name", [*RUNS, *WIDE])
def test_weights_are_those_of_the_paper(pool: WorkerPool, request: pytest.FixtureRequest, name: str) -> None:
    """Of each step, and their mean; the loss is the weighted one. A domain is absent from all batches but the last."""
    if name in WIDE and not request.config.getoption("--full-matrix"):
        pytest.skip("runs with --full-matrix")
    world, runs = (RUNS | WIDE)[name]
    runs = [
        (form, {**options, "gradient_accumulation_steps": GLOBAL_BATCH // 2 // dp_size(world, options)})
        for form, options in runs
    ]
    directory = checkpoint(num_hidden_layers=4)
    ranks = pool.run(world, train, directory, reference_model(), runs)
    for run, (form, options) in enumerate(runs):
        steps = [by_domain(form, directory, rows) for rows in windows()]
        alphas, mean = paper(steps, RATE, SMOOTHING)
        assert all(rank[run][1] == ranks[0][run][1] for rank in ranks)
        lines, answer = ranks[0][run]
        assert len(lines) == STEPS and list(answer) == list(NAMES)
        assert list(answer.values()) == pytest.approx(mean.tolist(), rel=1e-7), (form, options)
        for line, alpha, step in zip(lines, alphas, steps, strict=True):
            assert weights_of(line) == pytest.approx(alpha.tolist(), rel=1e-7), (form, options)
            loss = sum(weight * proxy.mean() for weight, (proxy, _) in zip(alpha, step, strict=True) if len(proxy))
            assert line["loss"] == pytest.approx(loss, rel=1e-6), (form, options)


def test_the_rule() -> None:
    """Over many steps with random losses, without models."""
    random = np.random.default_rng(3)
    weights = DomainWeights(("a", "b", "c", "d"), 0.7, 1e-3, torch.device("cpu"))
    steps = []
    for _ in range(50):
        step = [(random.normal(size=n), random.normal(size=n)) for n in random.integers(0, 4, size=4)]
        steps.append(step)
        sums = [float(np.maximum(proxy - reference, 0).sum()) for proxy, reference in step]
        counts = [len(proxy) for proxy, _ in step]
        weights.update(torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64))
    alphas, mean = paper(steps, 0.7, 1e-3)
    np.testing.assert_allclose(weights.weights.numpy(), alphas[-1], rtol=1e-12)
    np.testing.assert_allclose(list(weights.average().values()), mean, rtol=1e-12)
    other = DomainWeights(("d", "b", "a", "c"), 0.7, 1e-3, torch.device("cpu"))
    other.load(weights.state(), "checkpoint-1")
    assert other.average() == weights.average()
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(doremi.logger, "warning", said.append)
        doremi.warn_without_doremi({}, "checkpoint-1")
        doremi.warn_without_doremi({doremi.DOREMI: weights.state()}, "checkpoint-2")
    assert len(said) == 1 and said[0].startswith("checkpoint-2 was written by a run with doremi, and this one has none")
    before = weights.weights
    assert torch.isfinite(weights.update(torch.full((4,), float("nan")), torch.ones(4))).all()
    assert not torch.equal(before, weights.weights)  # the scores before that step still count


# ---- training ----


@functools.cache
def trained_by_the_paper(directory: str, form: str) -> tuple[list[float], list[list[float]]]:
    """Losses and weights of a stock proxy, which AdamW trains in one process by the weighted objective."""
    proxy, reference = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (directory, reference_model())
    )
    named = list(proxy.named_parameters())
    groups = [
        {"params": [p for name, p in named if ("norm" in name) == plain], "weight_decay": 0.0 if plain else 0.1}
        for plain in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    steps: list[Step] = []
    losses, weights = [], []
    for rows in windows():
        batch = stacked([Rows(form).rows[row] for row in rows])
        targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100).flatten()
        domains = batch["domain"].repeat_interleave(batch["input_ids"].shape[1])
        mine, other = (
            F.cross_entropy(model(batch["input_ids"]).logits.flatten(0, 1), targets, reduction="none")
            for model in (proxy, reference)
        )
        owns = [(targets != -100) & (domains == number) for number in range(len(NAMES))]
        steps.append([(mine[own].detach().numpy(), other[own].detach().numpy()) for own in owns])
        alpha = paper(steps, RATE, SMOOTHING)[0][-1].tolist()
        loss = sum(weight * mine[own].mean() for weight, own in zip(alpha, owns, strict=True) if own.any())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(proxy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        weights.append(alpha)
    return losses, weights


TRAINED = {
    "dp 2": (2, {}),
    "pp 2": (2, {"pp_size": 2}),
    "tp 2 dp 2": (4, {"tp_size": 2}),
}
LEARNS = {"dtype": torch.float32, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "warmup_steps": 0}


@pytest.mark.parametrize("name", TRAINED)
def test_the_proxy_is_trained_by_the_weighted_objective(
    pool: WorkerPool, request: pytest.FixtureRequest, name: str
) -> None:
    if not request.config.getoption("--full-matrix"):
        pytest.skip("runs with --full-matrix; test_a_run_resumes_on_another_layout has two of these layouts")
    world, sizes = TRAINED[name]
    directory = checkpoint(num_hidden_layers=2)
    options = {**LEARNS, **sizes, "gradient_accumulation_steps": GLOBAL_BATCH // 2 // dp_size(world, sizes)}
    lines, _ = pool.run(world, train, directory, reference_model(), [("rows", options)])[0][0]
    losses, weights = trained_by_the_paper(directory, "rows")
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=2e-5)
    for line, alpha in zip(lines, weights, strict=True):
        assert weights_of(line) == pytest.approx(alpha, rel=1e-5)


def resume(directory: str, reference: str, output: str) -> Any:
    """Two steps over two replicas, and a third over two stages."""
    lines, layouts = Lines(), ({"gradient_accumulation_steps": 2}, {"pp_size": 2, "gradient_accumulation_steps": 4})
    for number, sizes in enumerate(layouts):
        arguments = {"output_dir": output, "save_strategy": "steps", "save_steps": 2, "max_steps": 2 + number, **sizes}
        trainer = make(directory, reference, Rows("rows"), lines, **{**LEARNS, **arguments})
        trainer.train(resume_from_checkpoint=number > 0)
        trainer.mesh.close()
    return lines.lines, trainer.doremi.weights


def test_a_run_resumes_on_another_layout(pool: WorkerPool, tmp_path: Path) -> None:
    directory = checkpoint(num_hidden_layers=2)
    losses, weights = trained_by_the_paper(directory, "rows")
    for lines, answer in pool.run(2, resume, directory, reference_model(), str(tmp_path)):
        assert [line["loss"] for line in lines] == pytest.approx(losses, rel=2e-5)
        assert list(answer.values()) == pytest.approx(np.mean(weights, 0).tolist(), rel=1e-5)


# ---- what is refused ----


def test_values_out_of_range() -> None:
    reference = AutoModelForCausalLM.from_pretrained(reference_model())
    assert "needs a reference model" in message(lambda: DoReMi(None))  # type: ignore[arg-type]
    for rate in (0, -1.0, float("inf"), "1"):
        assert f"rate={rate!r}" in message(lambda rate=rate: DoReMi(reference, rate=rate))  # type: ignore[misc]
    for smoothing in (-1e-3, 1.0, None):
        assert f"smoothing={smoothing!r}" in message(lambda s=smoothing: DoReMi(reference, smoothing=s))  # type: ignore[misc]
    settings = {"model": {"name_or_path": "a"}, "doremi": {"rate": 1.0}, "dataset": {"tokens": "b"}, "training": {}}
    assert "doremi needs reference" in message(lambda: check_complete(settings))
    assert "no weights yet" in message(lambda: DoReMi(reference).weights)


def stock(path: str, **fields: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **fields)


def refusals(directory: str, reference: str, larger: str, folder: str) -> dict[str, str]:
    lines, found = Lines(), {}

    def caught(name: str, run: Callable[[], Any]) -> None:
        found[name] = message(run)

    small = {"max_steps": 1, "dtype": torch.float32}
    caught("vocabulary", lambda: make(directory, stock(larger), Rows("rows"), lines, **small))
    unnamed = Rows("rows", names=None)
    caught("names", lambda: make(directory, stock(reference), unnamed, lines, **small).train())
    loss = {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()}
    caught("loss", lambda: make(directory, stock(reference), Rows("rows"), lines, **small, **loss))
    without = Rows("rows")
    without.rows = [{k: v for k, v in row.items() if k != "domain"} for row in without.rows]
    caught("column", lambda: make(directory, stock(reference), without, lines, **small).train())
    output = {"output_dir": folder, "save_strategy": "steps", "save_steps": 1}
    make(directory, stock(reference), Rows("rows"), lines, **small, **output).train()
    others = Rows("rows", names=("web", "code", "books"))
    more = {**small, **output, "max_steps": 2}
    again = make(directory, stock(reference), others, lines, **more)
    caught("domains", lambda: again.train(resume_from_checkpoint=True))
    return found


def test_what_cannot_be_weighed(pool: WorkerPool, tmp_path: Path) -> None:
    torch.manual_seed(6)
    config = tiny_config(num_hidden_layers=1, hidden_size=16, vocab_size=128)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "larger")
    arguments = checkpoint(num_hidden_layers=2), reference_model(), str(tmp_path / "larger"), str(tmp_path / "run")
    (found,) = pool.run(1, refusals, *arguments)
    assert "the reference has a vocabulary of 128 ids" in found["vocabulary"]
    assert "no names for any" in found["names"]
    assert "the loss of LlamaForCausalLM is another" in found["loss"]
    assert "no column 'domain'" in found["column"]
    assert "has weights of the domains web, code, rare, but the data has web, code, books" in found["domains"]

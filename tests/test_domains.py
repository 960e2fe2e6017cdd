"""Losses and tokens by domain, on every topology: masked means of a stock model's logits, in fp64 and one process."""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset as HubDataset, Features, Value
from pool import WorkerPool
from tiny import VOCABULARY, message, tiny_config, training_arguments
from token_files import documents, write_ds
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from hf_nanotron.data.domain_column import MOST_UNNAMED, check_column, domain_names
from hf_nanotron.ops.domain_sums import domain_sums

NAMES = ("web", "code", "rare")
LENGTH, SAMPLES, GLOBAL_BATCH = 13, 22, 8  # windows of 8, 8 and 6 rows; tensor-parallel ranks fill 13 tokens up
STEPS = 3
Z_LOSS = 1e-2
FORMS = ("rows", "tokens", "packed")


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Random rows with a domain each (`rows`); with one for each token (`tokens`); of several documents (`packed`)."""

    def __init__(self, form: str, samples: int = SAMPLES, names: Any = NAMES) -> None:
        if names is not None:
            self.names = names
        random = torch.Generator().manual_seed(5)
        self.rows = []
        for index in range(samples):
            ids = torch.randint(3, VOCABULARY, (LENGTH,), generator=random)
            labels = ids.clone()
            labels[: index % 4] = -100
            domain = torch.tensor(2 if index == 17 else (index * 5 % 3) % 2)  # `rare` is in the last step alone
            row = {"input_ids": ids, "labels": labels, "domain": domain}
            if form != "rows":
                cuts = [0, 3 + index % 3, 9, LENGTH]
                lengths = [b - a for a, b in zip(cuts, cuts[1:], strict=False)]
                row["domain"] = torch.cat(
                    [(domain + n) % (2 + (index == 17)) * torch.ones(k) for n, k in enumerate(lengths)]
                ).long()
                if index == 3:
                    row["domain"][:4] = -100  # of no domain
            if form == "packed":
                row["position_ids"] = torch.cat([torch.arange(k) for k in lengths])
                shifted = torch.cat([labels[1:], torch.tensor([7])])  # the last token predicts the next row
                shifted[torch.tensor(cuts[1:-1]) - 1] = -100
                row["shift_labels"] = shifted
            self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def stacked(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@functools.cache
def checkpoint(family: str = "llama", **overrides: Any) -> str:
    directory = tempfile.mkdtemp()
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).save_pretrained(directory)
    return directory


@functools.cache
@torch.no_grad()
def losses_of_rows(directory: str, form: str, z_loss: float) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each row, in fp64: the losses of its tokens, which of them count, and their domains."""
    choices: dict[str, Any] = (
        {"experts_implementation": "eager"} if AutoConfig.from_pretrained(directory).model_type != "llama" else {}
    )
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, **choices).eval()
    found = []
    for row in Rows(form).rows:
        ids, positions = row["input_ids"], row.get("position_ids", torch.arange(LENGTH))
        targets = row.get("shift_labels", F.pad(row["labels"][1:], (0, 1), value=-100))
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), LENGTH]
        logits = torch.cat([model(ids[None, a:b]).logits[0] for a, b in zip(starts, starts[1:], strict=False)])
        losses = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
        losses = losses + z_loss * logits.logsumexp(-1) ** 2
        found.append((losses, targets != -100, row["domain"].expand(LENGTH)))
    return found


def reference(directory: str, form: str, z_loss: float, rows: range) -> dict[str, tuple[float, int]]:
    """Mean loss and number of the predicted tokens of each domain, over rows."""
    losses, counts, domains = map(
        torch.cat, zip(*losses_of_rows(directory, form, z_loss)[rows.start : rows.stop], strict=True)
    )
    found = {}
    for number, name in enumerate(NAMES):
        own = counts & (domains == number)
        if own.any():
            found[name] = (float(losses[own].mean()), int(own.sum()))
    return found


class Lines(TrainerCallback):
    """The log lines with a loss."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.lines.append(dict(logs))


def make(
    directory: str,
    rows: Any,
    callbacks: Any = (),
    loss: Any = None,
    kind: Any = None,
    collator: Any = stacked,
    **overrides: Any,
) -> Any:
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    values = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.0,  # so that all steps have the weights of the checkpoint
    }
    if collator is not None:  # a mixture brings its order and its columns
        values |= {"train_sampling_strategy": "sequential", "remove_unused_columns": False}
    args = NanotronTrainingArguments(**training_arguments(**{**values, **overrides}))
    model = ParallelAuto.from_pretrained(directory, parallel=args.parallel)
    return (kind or NanotronTrainer)(
        model=model, args=args, train_dataset=rows, data_collator=collator, callbacks=list(callbacks),
        compute_loss_func=loss,
    )  # fmt: skip


def log_lines(directory: str, runs: list[tuple[str, dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    found = []
    for form, overrides in runs:
        lines = Lines()
        trainer = make(directory, Rows(form), [lines], **overrides)
        trainer.train()
        trainer.model.mesh.close()
        found.append(lines.lines)
    return found


# ranks -> runs of one job: the form of the data, and arguments. Each has one optimizer step of 8 rows.
RECOMPUTED = {"gradient_checkpointing": True}
RUNS: dict[str, tuple[int, dict[str, Any], list[tuple[str, dict[str, Any]]]]] = {
    "one": (
        1,
        {},
        [("rows", {"logging_steps": 3}), ("tokens", RECOMPUTED), ("packed", {"z_loss_coefficient": Z_LOSS})],
    ),
    "two": (
        2,
        {},
        [
            ("tokens", {"tp_size": 2, "gradient_checkpointing": True, "z_loss_coefficient": Z_LOSS}),
            ("rows", {"tp_size": 2, "sequence_parallel": False}),
            ("packed", {"pp_size": 2, "pp_schedule": "zb"}),
            ("tokens", {"zero_stage": 3, "average_tokens_across_devices": False}),
            ("tokens", {"cp_size": 2, "z_loss_coefficient": Z_LOSS}),
        ],
    ),
    "four": (
        4,
        {},
        [
            ("packed", {"tp_size": 2, "gradient_checkpointing": True}),
            ("tokens", {"pp_size": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2}),
        ],
    ),
    "experts": (
        2,
        {"family": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        [("rows", {"ep_size": 2}), ("packed", {"ep_size": 2, "cp_size": 2})],
    ),
    "experts that tensor-parallel ranks share": (
        2,
        {"family": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        [("packed", {"ep_size": 2, "tp_size": 2})],
    ),
    # Its logits are made, a slice on each rank, since they are capped before the loss.
    "soft-capped": (
        2,
        {"family": "gemma2", "final_logit_softcapping": 3.0, "head_dim": 8},
        [("packed", {"tp_size": 2})],
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full_matrix] * name.startswith("experts that")) for name in RUNS]
)
def test_log_lines(pool: WorkerPool, name: str) -> None:
    """Losses of domains are those of stock logits, and weigh up to the loss; tokens are counted once, on all ranks."""
    world, model, runs = RUNS[name]
    check(pool, world, model, runs)


WIDE = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 4, 1), (4, 1, 1), (2, 2, 2)]


@pytest.mark.parametrize(("pp", "dp", "tp"), WIDE)
def test_covering(pool: WorkerPool, request: pytest.FixtureRequest, pp: int, dp: int, tp: int) -> None:
    """Each topology with each schedule and each form of data; the rest in turn."""
    if not request.config.getoption("--full-matrix"):
        pytest.skip("runs with --full-matrix")
    schedules = ("1f1b", "afab", "interleaved_1f1b", "zb") if pp > 1 else ("1f1b",)
    for index, (schedule, form) in enumerate(itertools.product(schedules, FORMS)):
        turn = index + WIDE.index((pp, dp, tp))
        options = {
            "pp_size": pp,
            "tp_size": tp,
            "pp_schedule": schedule,
            "pp_virtual_stages": 2 if schedule == "interleaved_1f1b" else 1,
            "gradient_checkpointing": bool(turn % 2),
            "z_loss_coefficient": Z_LOSS * (turn % 3 == 0),
            "sequence_parallel": turn % 4 > 0,
            "zero_stage": (1, 2, 3)[turn % 3] if pp == 1 else 1,
            "logging_steps": 1 + 2 * (turn % 5 == 4),
            "torch_compile": turn % 7 == 3,
        }
        check(pool, pp * dp * tp, {"num_hidden_layers": 8 if pp == 4 else 4}, [(form, options)])


def check(pool: WorkerPool, world: int, fields: dict[str, Any], runs: list[tuple[str, dict[str, Any]]]) -> None:
    runs = [
        (form, {**options, "gradient_accumulation_steps": GLOBAL_BATCH // 2 // dp_size(world, options)})
        for form, options in runs
    ]
    directory = checkpoint(**{"num_hidden_layers": 4, **fields})
    ranks = pool.run(world, log_lines, directory, runs)
    for run, (form, options) in enumerate(runs):
        every = options.get("logging_steps", 1)
        tokens: dict[str, int] = {}
        assert all(
            [without_speed(line) for line in lines[run]] == [without_speed(line) for line in ranks[0][run]]
            for lines in ranks
        )
        assert len(ranks[0][run]) == STEPS // every
        for number, line in enumerate(ranks[0][run]):
            rows = range(number * every * GLOBAL_BATCH, min(SAMPLES, (number + 1) * every * GLOBAL_BATCH))
            expected = reference(directory, form, options.get("z_loss_coefficient", 0.0), rows)
            tokens = {name: tokens.get(name, 0) + expected.get(name, (0, 0))[1] for name in NAMES}
            where = f"{form}, {options}, line {number}"
            assert {key for key in line if key.startswith("loss/")} == {f"loss/{name}" for name in expected}, where
            assert {key: value for key, value in line.items() if key.startswith("tokens/")} == {
                f"tokens/{name}": count for name, count in tokens.items() if count
            }, where
            for name, (loss, _) in expected.items():
                assert line[f"loss/{name}"] == pytest.approx(loss, rel=1e-6), (name, where)
            if every == 1 and form == "rows" and options.get("average_tokens_across_devices", True):
                total = sum(
                    loss * count for loss, count in ((line[f"loss/{name}"], expected[name][1]) for name in expected)
                )
                assert total / sum(count for _, count in expected.values()) == pytest.approx(line["loss"], rel=1e-6), (
                    where
                )


def dp_size(world: int, options: dict[str, Any]) -> int:
    return world // (options.get("tp_size", 1) * options.get("pp_size", 1) * options.get("cp_size", 1))


def without_speed(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key.startswith(("loss", "tokens/", "epochs/"))}


# ---- other losses, evaluation, resuming ----


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / num_items_in_batch


def losses_of_users(directory: str) -> list[Any]:
    """Log lines under `compute_loss_func`, and under an overridden `compute_loss`, with the columns that it saw."""
    from hf_nanotron import NanotronTrainer

    func, method, seen = Lines(), Lines(), set[str]()
    trainer = make(directory, Rows("rows"), [func], own_loss, pp_size=2, gradient_accumulation_steps=4)
    trainer.train()
    trainer.model.mesh.close()

    class Own(NanotronTrainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            seen.update(inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = make(directory, Rows("tokens"), [method], kind=Own, tp_size=2, gradient_accumulation_steps=4)
    trainer.train()
    trainer.model.mesh.close()
    return [func.lines, method.lines, seen]


def test_losses_of_users(pool: WorkerPool) -> None:
    """Of a loss that need not be a sum over tokens, domains have tokens alone. `compute_loss` gets the column."""
    directory = checkpoint(num_hidden_layers=2)
    for func, method, seen in pool.run(2, losses_of_users, directory):
        assert "domain" in seen
        for form, lines in (("rows", func), ("tokens", method)):
            counts = reference(directory, form, 0.0, range(SAMPLES))
            assert len(lines) == STEPS
            assert not [key for line in lines for key in line if key.startswith("loss/")]
            for name, (_, count) in counts.items():
                assert lines[-1][f"tokens/{name}"] == count


def evaluate(directory: str) -> list[Any]:
    found = []
    for sizes in ({"pp_size": 2, "gradient_accumulation_steps": 2}, {"tp_size": 2}, {"cp_size": 2}, {}):
        trainer = make(directory, None, per_device_eval_batch_size=2, prediction_loss_only="pp_size" in sizes, **sizes)
        both = trainer.evaluate(Rows("packed")), trainer.evaluate({"half": Rows("rows", 11), "all": Rows("rows")})
        found.append((*both, trainer.predict(Rows("tokens")).metrics))
        trainer.model.mesh.close()
    return found


def test_evaluation(pool: WorkerPool) -> None:
    """`eval_loss/<domain>` of data with the column, each token counted once; several datasets as in stock Trainer."""
    directory = checkpoint(num_hidden_layers=2)
    for packed, several, predicted in (found for rank in pool.run(2, evaluate, directory) for found in rank):
        cases = [
            ("packed", packed, "eval_loss", SAMPLES),
            ("rows", several, "eval_half_loss", 11),
            ("rows", several, "eval_all_loss", SAMPLES),
            ("tokens", predicted, "test_loss", SAMPLES),
        ]
        for form, metrics, key, samples in cases:
            expected = reference(directory, form, 0.0, range(samples))
            got = {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith(f"{key}/")}
            assert got == pytest.approx({name: loss for name, (loss, _) in expected.items()}, rel=1e-6)


def resume(directory: str, output: str) -> list[dict[str, Any]]:
    """Two steps over two replicas, and a third with tensor parallelism. Names of domains keep their column."""
    lines, rows = Lines(), Rows("rows", names=None)
    rows.domain_names = NAMES  # type: ignore[attr-defined]
    for number, sizes in enumerate(
        ({"gradient_accumulation_steps": 2}, {"tp_size": 2, "gradient_accumulation_steps": 4})
    ):
        arguments = {"output_dir": output, "save_strategy": "steps", "save_steps": 2, "max_steps": 2 + number, **sizes}
        trainer = make(directory, rows, [lines], logging_steps=3, remove_unused_columns=True, **arguments)
        trainer.train(resume_from_checkpoint=number > 0)
        trainer.model.mesh.close()
    return lines.lines


def test_tokens_continue(pool: WorkerPool, tmp_path: Any) -> None:
    """Tokens are those of the run, losses those since the last line, on another layout, and after no line at all."""
    directory = checkpoint(num_hidden_layers=2)
    tokens = reference(directory, "rows", 0.0, range(SAMPLES))
    losses = reference(directory, "rows", 0.0, range(2 * GLOBAL_BATCH, SAMPLES))
    for lines in pool.run(2, resume, directory, str(tmp_path)):
        (line,) = lines
        assert {name: line[f"tokens/{name}"] for name in NAMES} == {name: count for name, (_, count) in tokens.items()}
        assert {name: line[f"loss/{name}"] for name in NAMES} == pytest.approx(
            {name: loss for name, (loss, _) in losses.items()}, rel=1e-6
        )


def mixture(folder: str) -> Any:
    from hf_nanotron.data import Mixture, TokenDataset

    sets = {
        name: TokenDataset([f"{folder}/{name}.ds"], 16, documents="mask", token_size=2, seed=3)
        for name in ("web", "code")
    }
    return Mixture(sets, {"web": 0.7, "code": 0.3}, max_epochs=3)


def train_mixture(directory: str, folder: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log lines of runs, each of which resumes the one before."""
    lines = Lines()
    for number, overrides in enumerate(runs):
        arguments = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3, **overrides}
        trainer = make(
            directory,
            mixture(folder),
            [lines],
            collator=None,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            warmup_steps=0,
            **arguments,
        )
        trainer.train(resume_from_checkpoint=number > 0)
        trainer.model.mesh.close()
    return [without_speed(line) for line in lines.lines]


def test_mixture(pool: WorkerPool, tmp_path: Any) -> None:
    """Of a mixture in a trainer without further arguments; resumed on another layout, as one process without a stop."""
    for seed, name in enumerate(("web", "code")):
        write_ds(tmp_path / f"{name}.ds", documents(40, seed, vocabulary=VOCABULARY))
    directory, folder = checkpoint(num_hidden_layers=2), str(tmp_path)
    whole = {"output_dir": f"{folder}/one", "max_steps": 6, "gradient_accumulation_steps": 4}
    parts = [
        {"output_dir": f"{folder}/two", "max_steps": 3, "gradient_accumulation_steps": 2},
        {"output_dir": f"{folder}/two", "max_steps": 6, "gradient_accumulation_steps": 4, "tp_size": 2},
    ]
    (expected,) = pool.run(1, train_mixture, directory, folder, [whole])
    data = mixture(folder)
    rows = [data[index] for index in range(48)]
    for number, line in enumerate(expected):
        read = rows[: 8 * (number + 1)]
        for place, name in enumerate(("web", "code")):
            own = [row for row in read if row["domain"] == place]
            assert line[f"tokens/{name}"] == sum(int(row["shift_labels"].ne(-100).sum()) for row in own)
            assert line[f"epochs/{name}"] == len(own) / len(data.datasets[name])
    for lines in pool.run(2, train_mixture, directory, folder, parts):
        assert len(lines) == 6
        assert all(line == pytest.approx(wanted, rel=2e-5) for line, wanted in zip(lines, expected, strict=True))


# ---- without a trainer ----


def test_sums_are_exact() -> None:
    """Masked sums, of rows and of tokens, in parts or at once; a loss that is not finite stays in its domain."""
    torch.manual_seed(0)
    losses, counts = torch.rand(6 * 50), torch.rand(6 * 50) > 0.3
    losses = losses.masked_fill(~counts, 0.0)
    losses[0], counts[0] = math.inf, True
    for domain in (
        torch.tensor([1, 0, 1, 2, 4, 1]),
        torch.randint(0, 4, (6, 50)).index_fill_(1, torch.tensor([7]), -100),
    ):
        of_tokens = domain.reshape(6, -1).expand(6, 50).flatten()
        found = domain_sums(losses, counts, domain, 5)
        for number in range(5):
            own = of_tokens == number
            assert found[number, 0] == pytest.approx(float(losses[own].double().sum()), rel=1e-12)
            assert found[number, 1] == int(counts[own].sum())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hf_nanotron.ops.domain_sums.ELEMENTS", 35)
            assert torch.allclose(domain_sums(losses, counts, domain, 5), found, rtol=1e-12)


def test_steps_that_are_not_finite() -> None:
    """Are no part of a mean, as in the logged loss; their tokens are counted. Without any other step it is NaN."""
    from hf_nanotron.training.domains import DomainLog
    from hf_nanotron.training.run_order import Consumed

    def nothing() -> None:
        return None

    group = SimpleNamespace(size=1)
    mesh: Any = SimpleNamespace(world=group, world_size=1, speaks_for_tokens=True, device=torch.device("cpu"))
    model: Any = SimpleNamespace(mesh=mesh, own_columns=frozenset())
    log = DomainLog(model, Rows("rows"))
    assert log.metrics(nothing) == {}  # no batch had the column
    batch = {"input_ids": torch.zeros(2, 3), "domain": torch.tensor([0, 1])}
    log.totals.check([batch])

    def step(losses: list[float], filters: bool) -> None:
        sums = log.totals.sums_of([batch])
        assert sums is not None
        sums.note(torch.tensor(losses), torch.ones(6, dtype=torch.bool))
        log.end_step(sums, True, torch.tensor(losses).sum(), filters)

    step([1.0, 2.0, 3.0, 4.0, 4.0, 4.0], filters=True)
    step([math.nan, 2.0, 3.0, 5.0, 5.0, 5.0], filters=True)
    assert log.metrics(nothing) == {"loss/web": 2.0, "loss/code": 4.0, "tokens/web": 6, "tokens/code": 6}
    step([math.nan, 2.0, 3.0, 5.0, 5.0, 5.0], filters=True)
    assert log.metrics(lambda: Consumed(("web",), {}, {}, {"web": 1.5})) == pytest.approx(
        {"loss/web": math.nan, "loss/code": math.nan, "tokens/web": 9, "tokens/code": 9, "epochs/web": 1.5}, nan_ok=True
    )
    step([math.nan, 2.0, 3.0, 5.0, 5.0, 5.0], filters=False)
    assert log.metrics(nothing)["loss/code"] == 5.0
    assert log.state() == {"domains": {"tokens": {"web": 12, "code": 12, "rare": 0}}}


def test_a_users_own_loss_may_read_a_column_of_that_name() -> None:
    """Whatever is in it, unless the dataset names its domains."""
    from hf_nanotron.training.domains import DomainTotals

    model: Any = SimpleNamespace(own_columns=frozenset())
    inputs = {"input_ids": torch.zeros(2, 4)}
    windows = [[{**inputs, "domain": column}] for column in (["x", "y"], torch.rand(2), torch.tensor([0, 10**6]))]
    for window in windows:
        own, plain, named = DomainTotals(model, None), DomainTotals(model, None), DomainTotals(model, Rows("rows"))
        own.only_named = named.only_named = True
        own.check(window)
        assert own.sums_of(window) is None and not own.is_used
        assert "the column 'domain' of a batch" in message(lambda: plain.check(window))  # noqa: B023
        assert "the column 'domain' of a batch" in message(lambda: named.check(window))  # noqa: B023


def test_names() -> None:
    labelled = HubDataset.from_dict({"domain": [0, 1]}, features=Features({"domain": ClassLabel(names=["a", "b"])}))
    plain = HubDataset.from_dict({"domain": [0, 1]}, features=Features({"domain": Value("int64")}))
    assert domain_names(labelled) == ("a", "b")
    assert domain_names(plain) is domain_names(None) is domain_names([1]) is None
    assert domain_names(SimpleNamespace(names=["x"], domain_names=["y"])) == ("y",)
    assert "the name 'x' twice" in message(lambda: domain_names(SimpleNamespace(names=["x", "x"])))
    named, other = Rows("rows"), Rows("rows", names=("x", "y", "z"))
    assert domain_names(Subset(ConcatDataset([named, named]), [0])) == NAMES
    assert "make a Mixture of them" in message(lambda: domain_names(ConcatDataset([named, other])))
    assert "must be a list of the names" in message(lambda: domain_names(SimpleNamespace(names="web")))


def test_columns() -> None:
    def said(domain: Any, names: Any = NAMES) -> str:
        return message(lambda: check_column({"input_ids": torch.zeros(2, 4), "domain": domain}, names))

    assert check_column({"input_ids": torch.zeros(2, 4), "domain": torch.tensor([-100, 1])}, NAMES) == 2
    assert "must be a tensor of integers, not a list" in said(["web", "code"])
    assert "not a tensor of torch.float32" in said(torch.zeros(2))
    assert "has the shape (3,), but must be (2,), or (2, 4)" in said(torch.tensor([0, 1, 2]))
    assert "has 3, but domains are from 0 to 2, the places in its names ('web', 'code', 'rare')" in said(
        torch.tensor([0, 3])
    )
    assert "has -1, but" in said(torch.tensor([0, -1]))
    assert "give the dataset the attribute `names`" in said(torch.tensor([0, MOST_UNNAMED]), None)


def disagree(directory: str) -> list[str]:
    """What is said where ranks have other columns or domains; and numbers for names, some on one rank alone."""
    rank = torch.distributed.get_rank()

    class Without(Rows):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = dict(super().__getitem__(index))
            return row if rank == 0 else {name: row[name] for name in ("input_ids", "labels")}

    class Beyond(Rows):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {**super().__getitem__(index), "domain": torch.tensor(index // 2 % 2 * 5)}  # batches of two rows

    said = []
    for rows in (Without("rows"), Beyond("rows")):
        trainer = make(directory, rows)
        try:
            trainer.train()
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
        trainer.model.mesh.close()
    lines = Lines()
    trainer = make(directory, Beyond("rows", names=None), [lines], max_steps=2)
    trainer.train()
    trainer.model.mesh.close()
    return [*said, {key for key in lines.lines[-1] if "/" in key}]  # type: ignore[list-item]


def test_ranks_disagree(pool: WorkerPool) -> None:
    for columns, beyond, keys in pool.run(2, disagree, checkpoint(num_hidden_layers=2)):
        assert "the batches of rank 0 have a column 'domain', and those of rank 1 have not" in columns
        assert "has 5, but domains are from 0 to 2" in beyond
        assert keys == {f"{what}/{domain}" for what in ("loss", "tokens") for domain in (0, 5)}

"""`trainer.accelerator` deals and joins over data-parallel ranks, and refuses what needs a whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from pool import WorkerPool
from tiny import message, pad_batch, random_dataset, tiny_config, training_arguments
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM as StockAuto

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.training.accelerator import AS_IT_IS, OVER_DATA_PARALLEL_RANKS, REFUSED as REFUSALS, UNUSED

REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "prepare": (lambda t: t.accelerator.prepare(t.model), "use it as it is"),
    "clip_grad_norm_": (lambda t: t.accelerator.clip_grad_norm_(t.model.parameters(), 1.0), "max_grad_norm"),
    "clip_grad_value_": (lambda t: t.accelerator.clip_grad_value_(t.model.parameters(), 1.0), "max_grad_norm"),
    "save_model": (lambda t: t.accelerator.save_model(t.model, "nowhere"), "trainer.save_model()"),
    "get_state_dict": (lambda t: t.accelerator.get_state_dict(t.model), "trainer.save_model()"),
    "save_state": (lambda t: t.accelerator.save_state("nowhere"), "save_strategy"),
    "load_state": (lambda t: t.accelerator.load_state("nowhere"), "resume_from_checkpoint"),
    "prepare a scheduler": (
        lambda t: t.accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(t.optimizer, lambda step: 1.0)),
        "optimizers=(optimizer, scheduler)",
    ),
}


def use(directory: str) -> dict[str, Any]:
    args = NanotronTrainingArguments(**training_arguments(tp_size=2, include_num_input_tokens_seen="all"))
    model = AutoModelForCausalLM.from_pretrained(directory, parallel=args.parallel)
    rows = random_dataset(10)
    trainer = NanotronTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=pad_batch)
    accelerator, dp = trainer.accelerator, model.mesh.dp_rank
    numbered = DataLoader(range(10), 2)  # type: ignore[arg-type]
    dealt = [batch.tolist() for batch in accelerator.prepare(numbered)]
    with accelerator.split_between_processes(["a", "b", "c"], apply_padding=True) as part:
        prompts = list(part)
    own = torch.tensor([dp, dp])
    trainer.train()
    figures = trainer.evaluate()
    told = {
        "dealt": dealt,
        "prompts": prompts,
        "gather": accelerator.gather({"x": own, "y": torch.tensor(dp)}),
        "metrics": accelerator.gather_for_metrics([f"rank {dp}"]),
        "reduce": [accelerator.reduce(torch.tensor(1.0 + dp), how).item() for how in ("sum", "mean", "max")],
        "tokens": trainer.state.num_input_tokens_seen,
        "rounds": round(figures["eval_steps_per_second"] * figures["eval_runtime"]),
        "refused": {name: message(lambda run=run: run(trainer)) for name, (run, _) in REFUSED.items()},
        "ranks": (accelerator.data_parallel_rank, accelerator.tensor_parallel_rank),
        "processes": (accelerator.num_processes, accelerator.process_index),
        "own module": type(accelerator.prepare_model(torch.nn.Linear(2, 2), evaluation_mode=True)).__name__,
    }
    model.mesh.close()
    return told


def test_data_parallel_ranks_are_the_processes_of_data(pool: WorkerPool, tmp_path: Any) -> None:
    torch.manual_seed(1)
    StockAuto.from_config(tiny_config(num_hidden_layers=2)).save_pretrained(tmp_path)
    results = pool.run(4, use, str(tmp_path))
    for rank, told in enumerate(results):
        dp = rank // 2
        # accelerate evens out five batches on two ranks with samples of the beginning.
        assert told["dealt"] == ([[0, 1], [4, 5], [8, 9]] if dp == 0 else [[2, 3], [6, 7], [0, 1]])
        assert told["prompts"] == (["a", "b"] if dp == 0 else ["c", "c"])
        assert told["gather"]["x"].tolist() == [0, 0, 1, 1] and told["gather"]["y"].tolist() == [0, 1]
        assert told["metrics"] == ["rank 0", "rank 1"]
        assert told["reduce"] == [3.0, 1.5, 2.0]
        assert told["tokens"] == 4 * 2 * 16  # four steps of one sample on each data-parallel rank
        assert told["rounds"] == 1  # batches of 8 on two ranks
        assert told["processes"] == (4, rank)
        assert told["ranks"] == divmod(rank, 2)
        assert told["own module"] == "Linear"
        for name, (_, works) in REFUSED.items():
            assert works in told["refused"][name], (name, told["refused"][name])


def test_each_name_of_accelerates_class_has_a_place() -> None:
    """A release that adds one fails here."""
    public = {name for name in vars(Accelerator) if not name.startswith("_")}
    places = (OVER_DATA_PARALLEL_RANKS, frozenset(REFUSALS), AS_IT_IS, UNUSED)
    assert sum(map(len, places)) == len(frozenset.union(*places))
    assert frozenset.union(*places) == public


@pytest.mark.parametrize("wrong", ["median"])
def test_an_unknown_reduction(pool: WorkerPool, tmp_path: Any, wrong: str) -> None:
    StockAuto.from_config(tiny_config(num_hidden_layers=2)).save_pretrained(tmp_path)
    assert all("'sum', 'mean', 'max', 'none'" in told for told in pool.run(2, reduce_wrongly, str(tmp_path), wrong))


def reduce_wrongly(directory: str, wrong: str) -> str:
    args = NanotronTrainingArguments(**training_arguments())
    model = AutoModelForCausalLM.from_pretrained(directory, parallel=args.parallel)
    trainer = NanotronTrainer(model=model, args=args, train_dataset=random_dataset(2), data_collator=pad_batch)
    told = message(lambda: trainer.accelerator.reduce(torch.ones(1), wrong))
    model.mesh.close()
    return told

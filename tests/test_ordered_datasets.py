"""Datasets that bring their order: what reaches the model, where a run ends, files that changed, refusals."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pool import WorkerPool
from test_ordered_training import token_set, write_corpus
from tiny import VOCABULARY, History, message, training_arguments
from token_files import documents, write_ds
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, SequentialSampler, Subset

from hf_nanotron.data import Mixture, TokenDataset
from hf_nanotron.data.fingerprint import row_hashes
from hf_nanotron.data.identity import LISTED, FileFacts, difference, file_prints, without_times
from hf_nanotron.data.loader import build_loader
from hf_nanotron.data.ordered import brings_order, is_run, stack

LENGTH = 16


def test_which_datasets_bring_their_order(tmp_path: Path) -> None:
    from datasets import Dataset, IterableDataset

    write_ds(tmp_path / "a.ds", documents(60))
    tokens = TokenDataset(tmp_path / "a.ds", LENGTH, token_size=2)
    mixture = Mixture({"a": tokens}, [1])
    rows = Dataset.from_list([{"input_ids": [1]}])

    class Own(torch.utils.data.Dataset):
        def __getitem__(self, number: int) -> Any:
            return {}

        def state_dict(self) -> dict[str, Any]:  # of another protocol
            return {}

        def load_state_dict(self, state: Any) -> None: ...

    class OwnRun(Own):
        def state_dict(self, samples: int = 0) -> dict[str, Any]:
            return {"samples": samples}

    class Named(torch.utils.data.Dataset):
        """A user's own, whose attributes mean something else."""

        identity, rows, settings, state_dict, names = "speaker", ((1, 2), (3, 4)), {"lr": 1}, {}, {"web": 1}

        def __len__(self) -> int:
            return 2

        def __getitem__(self, number: int) -> Any:
            return {"input_ids": list(self.rows[number])}

    assert not brings_order(Named()) and len(row_hashes(Named())) == 2
    assert sorted(row["input_ids"] for row in Mixture({"own": Named()}, [1])) == [[1, 2], [3, 4]]
    streams = rows.to_iterable_dataset(), IterableDataset.from_generator(lambda: iter([{"a": 1}]))
    assert [brings_order(each) for each in (tokens, mixture, OwnRun(), Own(), rows, *streams, [1])] == [True] * 3 + [
        False
    ] * 5
    assert [is_run(each) for each in (tokens, mixture, OwnRun())] == [False, True, True]


def test_rows_that_do_not_stack() -> None:
    with pytest.raises(ValueError, match=r"different shapes of 'input_ids' \(\(2,\), \(3,\)\): cut them"):
        stack([{"input_ids": [1, 2]}, {"input_ids": [1, 2, 3]}])
    with pytest.raises(ValueError, match="the column 'labels' is not in all rows"):
        stack([{"labels": [1]}, {}])


@pytest.mark.parametrize("workers", [0, 1])
def test_persistent_workers_read_the_epoch_that_is_trained(tmp_path: Path, workers: int) -> None:
    """A worker that outlives an epoch has its own copy of the dataset, which `set_epoch` does not reach."""
    write_ds(tmp_path / "a.ds", documents(40))
    dataset = TokenDataset(tmp_path / "a.ds", LENGTH, token_size=2)
    options = {"num_workers": workers, "persistent_workers": True} if workers else {}
    loader = build_loader(dataset, SequentialSampler(dataset), stack, 4, 0, 1, False, 0, True, **options)
    for epoch in range(3):
        loader.set_epoch(epoch)
        found = torch.cat([batch["input_ids"] for batch in loader]).numpy()
        np.testing.assert_array_equal(found, dataset.rows(range(len(dataset)), epoch)["input_ids"])


@pytest.mark.parametrize("kept_apart", ["cross", "mask", "pack"])
def test_ids_of_another_vocabulary_name_the_file(tmp_path: Path, kept_apart: Any) -> None:
    write_ds(tmp_path / "a.ds", documents(60, vocabulary=50))
    dataset = TokenDataset(tmp_path / "a.ds", LENGTH, token_size=2, documents=kept_apart)
    mixture = Mixture({"a": dataset}, [1])
    rows = mixture.rows(range(len(mixture)))
    for _ in range(2):
        known = mixture.with_vocabulary(50)
        for name, column in known.rows(range(len(known))).items():
            np.testing.assert_array_equal(column, rows[name])
    with pytest.raises(ValueError, match=r"a.ds: token [0-9]+ has the id [0-9]+, and the vocabulary has 9 "):
        mixture.with_vocabulary(9).rows(range(len(mixture)))
    mixture.rows(range(len(mixture)))
    if kept_apart == "pack":
        assert len(dataset._reader._windows) == 1  # type: ignore[attr-defined]


def facts(count: int, **changed: tuple[str, str, str]) -> list[FileFacts]:
    return [FileFacts(*changed.get(f"f{n}", (f"{n:05d}_tokens.ds", "100|uint16", "17"))) for n in range(count)]


def test_a_file_that_changed_is_named() -> None:
    def told(before: list[FileFacts], now: list[FileFacts]) -> str | None:
        shown = [f"/data/{file.name}" for file in now]
        old, new = ({"files": file_prints(each), "seed": 0} for each in (before, now))
        found = difference(json.loads(json.dumps(old)), new, shown)
        assert found is None or found.in_files
        return found and found.sentence

    same = facts(10_000)
    assert told(same, facts(10_000)) is None
    name = "04711_tokens.ds"
    longer, later = (name, "104|uint16", "17"), (name, "100|uint16", "18")
    assert told(same, facts(10_000, f4711=longer)) == (
        f"/data/{name} has another length than when the checkpoint was saved"
    )
    assert (
        told(same, facts(10_000, f4711=later))
        == f"/data/{name} was written again, or copied, since the checkpoint was saved"
    )
    assert "/data/10000_tokens.ds was not there when it was saved (and 1 others)" == told(same, facts(10_002))
    assert told(same, same[5:]) == "5 of the 10000 files that it had are gone"
    assert told(same, [*same[1:], same[0]]) == "its files are in another order, from /data/00001_tokens.ds on"
    many = 3 * LISTED
    group = told(facts(many), facts(many, f4711=longer))
    assert group is not None and group.startswith("/data/04710_tokens.ds (or one of the 2 files after it) has another")
    assert len(json.dumps(file_prints(same))) < 170_000 and len(json.dumps(file_prints(facts(many)))) < 270_000
    prints = {"files": file_prints(facts(9, f3=("00003_tokens.ds", "100|uint16", "18")))}
    assert without_times(prints) == without_times({"files": file_prints(facts(9))})


def test_another_order_is_told() -> None:
    found = difference({"seed": 0, "documents": "cross"}, {"seed": 1, "documents": "mask"}, [])
    assert found == ("seed was 0 when it was saved, and is 1 now", False)
    assert difference({"documents": "cross"}, {"documents": "mask"}, []) is None


def in_one_process(folder: str) -> dict[str, Any]:
    """Runs of one process, and what is said of those that cannot be."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments
    from hf_nanotron.data import Stage, Stages

    web, code = (token_set(folder, name, LENGTH, documents="mask") for name in ("web", "code"))

    def mixture(**options: Any) -> Mixture:
        return Mixture({"web": web, "code": code}, [0.5, 0.5], **options)

    def run(data: Any, resume: str | None = None, collator: Any = None, evaluated: Any = code, **values: Any) -> Any:
        args = NanotronTrainingArguments(
            **training_arguments(
                **{"max_steps": 2, "output_dir": folder + "/out", "per_device_eval_batch_size": 1} | values
            )
        )
        model = ParallelAuto.from_pretrained(f"{folder}/model", parallel=args.parallel)
        history = History()
        trainer = NanotronTrainer(
            model=model,
            args=args,
            train_dataset=data,
            eval_dataset=evaluated,
            data_collator=collator,
            callbacks=[history],
        )
        trainer.train(resume_from_checkpoint=resume)
        trainer.losses = history.losses
        return trainer

    warned: list[str] = []
    handler = SimpleNamespace(level=logging.WARNING, handle=lambda record: warned.append(record.getMessage()))
    logging.getLogger("hf_nanotron").addHandler(handler)  # type: ignore[arg-type]
    logging.getLogger("transformers").addHandler(handler)  # type: ignore[arg-type]
    found: dict[str, Any] = {}

    endless = run(mixture(max_epochs=None), save_strategy="steps", save_steps=1)
    found["endless"] = endless.state.epoch, endless.state.max_steps, endless._data_order.consumed.rows
    found["eval"] = endless.evaluate()["eval_loss"]
    losses = []
    with torch.no_grad():
        for row in code:  # batches of one row, of which Trainer takes the mean
            logits = endless.model(row["input_ids"][None], position_ids=row["position_ids"][None]).logits[0]
            losses.append(F.cross_entropy(logits, row["shift_labels"]))
    found["eval by hand"] = float(torch.stack(losses).mean())
    again = run(mixture(max_epochs=None))
    found["same again"] = again.losses == endless.losses
    ends = Mixture({"web": web, "code": code}, [1, 0])
    trainer = run(ends, max_steps=500, per_device_train_batch_size=16)
    found["ends"] = (
        trainer.state.global_step,
        trainer.state.max_steps,
        len(ends),
        round(trainer._get_learning_rate(), 9),
    )
    found["ends, told"] = [text for text in warned if "ends the run" in text]
    half = run(mixture(), max_steps=-1, num_train_epochs=0.1, per_device_train_batch_size=4)
    found["a tenth"] = half.state.global_step, -(-(len(mixture()) // 10 + 1) // 4)

    seen: list[Any] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(int(row["domain"]) for row in rows)
        return stack(rows)

    run(mixture(), collator=collate)
    found["own collator"] = len(seen) >= 2 and set(seen) == {0, 1}

    # Sixteen rows of each set, as one batch.
    parts = ConcatDataset([Subset(code, range(16)), Subset(code, range(16, 32))])
    values = {"per_device_train_batch_size": 32, "max_steps": 1, "train_sampling_strategy": "sequential"}
    found["wrapped"] = run(parts, **values).losses == run(code, **values).losses
    some = run(Subset(mixture(), range(9)), max_steps=1, per_device_train_batch_size=9).state.log_history[0]
    found["wrapped mixture"] = {key for key in some if "/" in key}

    long_rows = token_set(folder, "web", 128)
    stages = [Stage(mixture()), Stage(mixture(), start_step=1, global_batch_size=3)]
    small = ParallelAuto.from_pretrained(
        f"{folder}/small", parallel=NanotronTrainingArguments(**training_arguments()).parallel
    )
    for name, action in {
        "group": lambda: run(mixture(), train_sampling_strategy="group_by_length"),
        "epochs": lambda: run(mixture(), max_steps=-1),
        "length": lambda: run(long_rows),
        "evaluated": lambda: run(mixture(), evaluated={"a": code, "b": mixture(max_epochs=None)}),
        "evaluated stages": lambda: run(mixture(), evaluated=Stages(stages)),
        "stages without steps": lambda: run(Stages(stages), max_steps=-1),
        "stages by the batch": lambda: run(Stages(stages), per_device_train_batch_size=2),
        "vocabulary": lambda: NanotronTrainer(
            model=small, args=NanotronTrainingArguments(**training_arguments()), train_dataset=mixture()
        ).train(),
    }.items():
        found[name] = message(action)

    checkpoint = f"{folder}/out/checkpoint-2"  # of which `code` was read
    over = Stages([Stage(mixture(max_epochs=None)), Stage(mixture(max_epochs=None), start_step=1)])
    run(over, save_strategy="epoch", output_dir=folder + "/stages")
    found["done"] = [
        run(data, resume=where, save_strategy="no").state.global_step
        for data, where in ((mixture(max_epochs=None), checkpoint), (over, f"{folder}/stages/checkpoint-2"))
    ]
    tokens = run(web, save_strategy="steps", save_steps=1, output_dir=folder + "/plain")
    plain = f"{folder}/plain/checkpoint-1"
    found["plain"] = run(web, resume=plain).losses == tokens.losses[1:]
    write_ds(Path(folder) / "code.ds", documents(91, 1, vocabulary=120))
    code = token_set(folder, "code", LENGTH, documents="mask")
    found["changed"] = message(lambda: run(mixture(max_epochs=None), resume=checkpoint, max_steps=3))
    accepted = run(mixture(max_epochs=None), resume=checkpoint, max_steps=3, accept_changed_data=True)
    found["accepted"] = accepted.state.global_step, [text for text in warned if "accept_changed_data=True:" in text][:1]
    found["anew"] = run(
        mixture(max_epochs=None), resume=checkpoint, max_steps=3, ignore_data_skip=True
    ).state.global_step
    web = token_set(folder, "web", LENGTH, documents="mask", seed=9)
    found["seed"] = message(lambda: run(web, resume=plain))
    found["kind"] = message(lambda: run(mixture(max_epochs=None), resume=plain))
    for each in (small, trainer.model):
        each.mesh.close()
    return found


def test_in_one_process(pool: WorkerPool, tmp_path: Path) -> None:
    from tiny import tiny_config
    from transformers import AutoModelForCausalLM

    write_corpus(tmp_path)
    AutoModelForCausalLM.from_config(tiny_config(vocab_size=60)).save_pretrained(tmp_path / "small")
    found = pool.run(1, in_one_process, str(tmp_path))[0]
    assert found["endless"] == (1.0, 2, {"web": 1, "code": 1})
    assert found["eval"] == pytest.approx(found["eval by hand"], rel=1e-5)
    assert found["same again"] and found["own collator"] and found["plain"]
    steps, max_steps, samples, rate = found["ends"]
    assert steps == max_steps == -(-samples // 16) < 500 and rate == 0
    assert f"The Mixture ends the run after {samples} samples" in found["ends, told"][0]
    assert "the set 'web'" in found["ends, told"][0] and "max_steps=500" in found["ends, told"][0]
    assert found["wrapped"] and found["done"] == [2, 2]
    assert found["wrapped mixture"] == {"loss/web", "loss/code", "tokens/web", "tokens/code"}
    assert found["a tenth"][0] == found["a tenth"][1]
    for name, texts in {
        "group": ["train_sampling_strategy='group_by_length' with a Mixture: it brings its order"],
        "epochs": ["num_train_epochs=3 with a Mixture", "use num_train_epochs=1 for all of it, or max_steps"],
        "length": ["has rows of 128 tokens, but the model has max_position_embeddings=64", "lower sequence_length"],
        "evaluated": ["this Mixture has no end of its own: to evaluate, use a Mixture with max_epochs=1"],
        "evaluated stages": ["this Stages has no end of its own"],
        "stages without steps": ["max_steps has to be specified"],
        "stages by the batch": ["stage 1: global_batch_size=3 is not a multiple of per_device_train_batch_size=2 x 1"],
        "vocabulary": ["web.ds: token", "and the vocabulary has 60 (ids 0 to 59)"],
        "changed": [
            "the data set 'code' is not the one",
            "code.ds has another length than",
            "accept_changed_data=True",
        ],
        "seed": ["seed was 0 when it was saved, and is 9 now. Resume with the same data"],
        "kind": ["saved in the middle of data with kind='sequential'", "but this run has kind='run'"],
    }.items():
        for text in texts:
            assert text in found[name], (name, found[name])
    assert found["accepted"][0] == found["anew"] == 3 and "code.ds has another length" in found["accepted"][1][0]


def copies_of_ranks(folder: str) -> list[Any]:
    """Each rank reads a copy of its own; the copies were made at other times."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    rank = torch.distributed.get_rank()
    own = Path(folder) / f"copy{rank}"
    own.mkdir()
    for number, name in enumerate(("web", "code")):
        write_ds(own / f"{name}.ds", documents(60, number, vocabulary=VOCABULARY))
        os.utime(own / f"{name}.ds", (1_000 + rank, 1_000 + rank))

    def run(kind: str, resume: str | None) -> str:
        sets = {name: token_set(str(own), name, LENGTH) for name in ("web", "code")}
        data = Mixture(sets, [0.5, 0.5]) if kind == "mixture" else sets["web"]
        steps = 1 if resume is None else 2
        args = NanotronTrainingArguments(
            **training_arguments(max_steps=steps, save_strategy="steps", save_steps=1, output_dir=f"{folder}/{kind}")
        )
        model = ParallelAuto.from_pretrained(f"{folder}/model", parallel=args.parallel)
        trainer = NanotronTrainer(model=model, args=args, train_dataset=data)
        said = message(lambda: trainer.train(resume_from_checkpoint=resume))
        model.mesh.close()
        return f"{trainer.state.global_step}: {said}"

    kinds = {kind: f"{folder}/{kind}/checkpoint-1" for kind in ("mixture", "plain")}
    found = [[run(kind, None) for kind in kinds]]
    found.append([run(kind, resume) for kind, resume in kinds.items()])
    if rank == 0:
        os.utime(own / "web.ds", (5_000, 5_000))
    found.append([run(kind, resume) for kind, resume in kinds.items()])
    if rank == 0:
        os.utime(own / "web.ds", (1_000, 1_000))
    else:
        write_ds(own / "web.ds", documents(61, 0, vocabulary=VOCABULARY))
    found.append([run(kind, resume) for kind, resume in kinds.items()])
    return found


def test_ranks_read_copies(pool: WorkerPool, tmp_path: Path) -> None:
    """Times are those of rank 0's files. What one rank finds changed ends the run on all, with one sentence."""
    write_corpus(tmp_path)
    for first, resumed, written, longer in pool.run(2, copies_of_ranks, str(tmp_path)):
        assert first == ["1: nothing was raised"] * 2 and resumed == ["2: nothing was raised"] * 2
        for said, what in ((written, "copy0/web.ds was written again"), (longer, "copy1/web.ds has another length")):
            assert said[0].startswith("0: the data set 'web'") and what in said[0], said
        assert "copy0/web.ds was written again" in written[1] and "ranks 0 and 1 have different data sets" in longer[1]

"""The section `dataset` of a YAML file: token files, mixtures, evaluation sets, stages; refusals and runs."""

from __future__ import annotations

import copy
import gzip
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pool import WorkerPool
from test_cli import checkpoint, command, corpus, figures, fresh, history, one_line, tokenizer, write_settings
from tiny import VOCABULARY
from token_files import documents, flat, write_ds
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hf_nanotron.cli import data as cli_data
from hf_nanotron.cli.data_keys import CHAT, STREAM, TOKENS
from hf_nanotron.cli.data_plan import MixturePlan, SetPlan, plan_data
from hf_nanotron.cli.settings import check_complete, read_settings
from hf_nanotron.cli.train import load_tokenizer
from hf_nanotron.data import ChatDataset, Mixture, Stages, StreamMixture, TokenDataset, TokenStream

LENGTH = 8


def test_every_argument_of_a_dataset_is_a_key() -> None:
    loading = {"name", "data_files", "split"}
    assert {*STREAM} == {*loading, "stream", *inspect.signature(TokenStream).parameters} - {"dataset", "tokenizer"}
    classes = ((TokenDataset, TOKENS, "tokens", "paths"), (ChatDataset, CHAT, "chat", "source"))
    for dataset, keys, ours, theirs in classes:
        parameters = set(inspect.signature(dataset).parameters) - {"tokenizer"}
        assert {*keys, theirs} == {*parameters, ours}


def plan(text: str) -> Any:
    return plan_data(yaml.safe_load(text))


def test_sets_share_values_and_have_their_own() -> None:
    found = plan(
        """
        {sequence_length: 4096, documents: mask, text_column: text, seed: 5, max_epochs: 2,
         mixture: {
           web: {tokens: /web, weight: 3},
           code: {tokens: [/a, /b], documents: pack, weight: 1.5, max_epochs: null},
           qa: {path: qa.jsonl, weight: 0, sequence_length: 1.0e+3},
           ids: {path: ids, text_column: null, weight: 1}},
         eval: {web: {tokens: /web-eval}, qa: {path: qa.jsonl, split: test}}}
        """
    )
    assert isinstance(found.train, MixturePlan) and isinstance(found.evaluation, dict) and found.seed == 5
    shared = {"sequence_length": 4096, "documents": "mask"}
    assert {name: part.options for name, part in found.train.sets.items()} == {
        "web": {"tokens": "/web", "seed": 5, **shared},
        "code": {"tokens": ["/a", "/b"], "seed": 5, "sequence_length": 4096, "documents": "pack"},
        "qa": {"path": "qa.jsonl", "text_column": "text", "sequence_length": 1000, "documents": "mask"},
        "ids": {"path": "ids"},
    }
    assert found.train.weights == {"web": 3.0, "code": 1.5, "qa": 0.0, "ids": 1.0}
    assert found.train.max_epochs == {"web": 2, "code": None, "qa": 2, "ids": 2}
    assert found.train.when_exhausted == "stop"
    assert {name: part.options for name, part in found.evaluation.items()} == {
        "web": {"tokens": "/web-eval", **shared},  # no seed: evaluation is in order
        "qa": {"path": "qa.jsonl", "split": "test", "text_column": "text", **shared},
    }
    alone = plan("{tokens: x, sequence_length: 16, split: [0, 0.9], order: megatron, seed: 1, samples: 100}")
    assert alone.train == SetPlan("dataset", "tokens", {
        "tokens": "x", "sequence_length": 16, "split": [0, 0.9], "order": "megatron", "seed": 1, "samples": 100,
    })  # fmt: skip
    assert alone.brings_order and not plan("{path: x}").brings_order


REFUSED: dict[str, str] = {
    "{}": "dataset needs one of tokens (files of token ids), chat (conversations), path (a set of datasets), mixture",
    "{tokens: a, path: b}": "dataset has path and tokens; give one of them.",
    "{tokens: a, mixture: {}}": "dataset has tokens and mixture; give one of them.",
    "{tokens: a}": "dataset.tokens needs dataset.sequence_length: the tokens of a sample.",
    "{tokens: [], sequence_length: 8}": "dataset.tokens is empty",
    "{tokens: ['a', ''], sequence_length: 8}": "dataset.tokens is empty",
    "{tokens: {a: 1}, sequence_length: 8}": "dataset.tokens={'a': 1} must be text, a list of texts or null.",
    "{tokens: a, sequence_length: 1}": "dataset.sequence_length=1 must be at least 2.",
    "{tokens: a, sequence_length: 8, documents: packed}": "documents='packed' is not one of 'cross', 'mask', 'pack'.",
    "{tokens: a, sequence_length: 8, train_split: a}": "train_split goes with dataset.path, not with dataset.tokens.",
    "{path: a, sequence_length: 8}": "dataset.sequence_length needs dataset.text_column",
    "{path: a, text_column: a}": "dataset.path needs dataset.sequence_length",
    "{path: a, text_column: a, sequence_length: 8, documents: pack}": "documents='pack' is for files of token ids",
    "{path: a, loss_mask: true}": "loss_mask goes with dataset.tokens or dataset.mixture or dataset.stages, not with",
    "{tokens: a, sequence_length: 8, samples: 5}": "dataset.samples belongs to order, which is not given",
    "{tokens: a, sequence_length: 8, order: nanoset}": "dataset.order='nanoset' needs seed: that of the run",
    "{tokens: a, sequence_length: 8, order: sorted, seed: 1}": "order='sorted' is not one of 'megatron', 'nanoset'.",
    "{tokens: a, sequence_length: 8, split: [0.5, 0.2]}": "split=[0.5, 0.2] must be two shares that ascend",
    "{tokens: a, sequence_length: 8, split: test}": "dataset.split='test' must be a list or null.",
    "{path: a, split: test}": "Its split is train_split.",
    "{stream: a}": "dataset.stream needs dataset.sequence_length",
    "{stream: a, sequence_length: 8, lanes: 0}": "dataset.lanes=0 must be at least 1",
    "{stream: a, sequence_length: 8, path: b}": "dataset has path and stream; give one of them.",
    "{mixture: {a: {stream: a, weight: 1}, b: {tokens: b, weight: 1}}, sequence_length: 8}": (
        "dataset.mixture mixes the stream 'a' with 'b', which has a length"
    ),
    "{mixture: {a: {stream: a, weight: 1}}, sequence_length: 8, max_epochs: 2}": (
        "dataset.max_epochs does not go with streams, which have no end."
    ),
    "{mixture: {a: {stream: a, weight: 1, max_epochs: 2}}, sequence_length: 8}": (
        "dataset.mixture.a.max_epochs does not go with streams"
    ),
    "{mixture: {a: {stream: a, weight: 1, epochs: 2}}, sequence_length: 8}": "a.epochs: a stream of a mixture has no",
    "{stages: [{stream: a}], sequence_length: 8}": "dataset.stages[0].stream: streams are trained on alone or in",
    "{path: a, eval: {stream: a, sequence_length: 8}}": "dataset.eval.stream: streams are trained on alone",
    "{chat: a}": "dataset.chat needs dataset.sequence_length",
    "{chat: a, sequence_length: 8, documents: mask}": "documents goes with dataset.path or dataset.tokens or",
    "{chat: a, sequence_length: 8, train_on: answers}": "train_on='answers' is not one of 'replies', 'all'.",
    "{mixture: {a: {tokens: a, weight: 1}}, sequence_length: 8, schedule: [{weights: {a: 1}}]}": (
        "dataset.schedule[0] needs start_tokens or start_samples"
    ),
    "{mixture: {a: {tokens: a, weight: 1}}, sequence_length: 8, schedule: [{weights: {b: 1}, start_samples: 5}]}": (
        "unknown key dataset.schedule[0].weights.b; known keys are a."
    ),
    "{mixture: {a: {tokens: a, weight: 1}}, sequence_length: 8, schedule: [{weights: {}, start_samples: 5}]}": (
        "dataset.schedule[0].weights has none of 'a'"
    ),
    "{mixture: {a: {tokens: a, weight: 1}}, sequence_length: 8, schedule: [{weights: {a: x}, start_samples: 5}]}": (
        "dataset.schedule[0].weights.a='x' must be a number"
    ),
    "{mixture: {a: {tokens: a, weight: 1}}, sequence_length: 8, schedule: [{weights: {a: 1}, start_samples: 0}]}": (
        "start_samples=0 must be above 0"
    ),
    "{mixture: {}, sequence_length: 8}": "dataset.mixture={} must name its sets",
    "{mixture: [a], sequence_length: 8}": "dataset.mixture=['a'] must be a mapping",
    "{mixture: {a: x}, sequence_length: 8}": "dataset.mixture.a: 'x' must be a mapping with keys such as tokens.",
    "{mixture: {5: {tokens: a, weight: 1}}, sequence_length: 8}": "the name 5 of a set must be text",
    "{mixture: {a: {tokens: a}}, sequence_length: 8}": "dataset.mixture.a has no weight",
    "{mixture: {a: {weight: 1}}, sequence_length: 8}": "dataset.mixture.a needs one of tokens",
    "{mixture: {a: {tokens: a, weight: 1}}}": "dataset.mixture.a.tokens needs dataset.sequence_length",
    "{mixture: {a: {tokens: a, weight: -1}}, sequence_length: 8}": "a.weight=-1 must be finite and not negative.",
    "{mixture: {a: {tokens: a, weight: .inf}}, sequence_length: 8}": "a.weight=inf must be finite",
    "{mixture: {a: {tokens: a, weight: much}}, sequence_length: 8}": "a.weight='much' must be",
    "{mixture: {a: {tokens: a, weight: 0}}, sequence_length: 8}": "the weights of dataset.mixture are all 0",
    "{mixture: {a: {tokens: a, wieght: 1}}, sequence_length: 8}": "did you mean dataset.mixture.a.weight?",
    "{mixture: {a: {tokens: a, weight: 1, when_exhausted: stop}}, sequence_length: 8}": (
        "unknown key dataset.mixture.a.when_exhausted; it belongs to the section dataset: dataset.when_exhausted."
    ),
    "{mixture: {a: {tokens: a, weight: 1, max_epochs: 0}}, sequence_length: 8}": "a.max_epochs=0 must be at least 1.",
    "{mixture: {a: {tokens: a, weight: 1}}, sequence_length: 8, when_exhausted: end}": "'end' is not one of 'stop'",
    "{mixture: {a: {tokens: a, weight: 1}}, sequence_length: 8, text_column: text}": (
        "dataset.text_column is used by no set: only sets with path or stream take it."
    ),
    "{mixture: {a: {path: a, weight: 1}}, eos_token_id: 0}": "eos_token_id is used by no set: only sets with tokens",
    "{path: a, eval_split: test, eval: {path: b}}": "dataset has both eval_split and eval",
    "{path: a, eval: {}}": "dataset.eval is empty",
    "{path: a, eval: {a: {}}}": "dataset.eval.a needs one of tokens",
    "{path: a, eval: {a: {path: b, weight: 1}}}": "unknown key dataset.eval.a.weight",
    "{stages: [], sequence_length: 8}": "dataset.stages is empty",
    "{stages: [{}], sequence_length: 8}": "dataset.stages[0] needs one of tokens, chat, path or mixture.",
    "{stages: [5], sequence_length: 8}": "dataset.stages[0]: 5 must be a mapping",
    "{stages: [{tokens: a, mixture: {}}], sequence_length: 8}": "dataset.stages[0] has tokens and mixture",
    "{stages: [{tokens: a, start_step: 5}], sequence_length: 8}": "dataset.stages[0].start_step=5 must be 0",
    "{stages: [{tokens: a}, {tokens: b}], sequence_length: 8}": "dataset.stages[1] needs start_tokens or start_step",
    "{stages: [{tokens: a, start_step: 0, start_tokens: 0}], sequence_length: 8}": "has both start_tokens and",
    "{stages: [{tokens: a}, {tokens: b, start_step: 9}, {tokens: c, start_step: 9}], sequence_length: 8}": (
        "dataset.stages[2].start_step=9 must be above 9, where the stage before begins"
    ),
    "{stages: [{tokens: a, weight: 1}], sequence_length: 8}": "unknown key dataset.stages[0].weight",
    "{stages: [{tokens: a, global_batch_size: 0}], sequence_length: 8}": "global_batch_size=0 must be at least 1",
    "{stages: [{mixture: {a: {tokens: a}}}], sequence_length: 8}": "dataset.stages[0].mixture.a has no weight",
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_refused(text: str) -> None:
    with pytest.raises(ValueError) as error:
        plan(text)
    assert REFUSED[text] in str(error.value)


def token_files(folder: Path) -> dict[str, Any]:
    """Two files of documents whose last token is the tokenizer's end of text, one of them without `.index`."""
    found = {}
    for seed, name in enumerate(("web", "code")):
        docs = [[token + 3 for token in doc[:-1]] + [2] for doc in documents(60, seed, vocabulary=VOCABULARY - 3)]
        write_ds(folder / f"{name}.ds", docs, index=name == "web")
        found[name] = docs
    return found


def settings(folder: Path, dataset: Any, **training: Any) -> str:
    values = yaml.safe_load(Path(fresh(folder)).read_text())
    values["training"] |= {"learning_rate": 0.01, "save_strategy": "no", **training}
    return write_settings(folder, {**values, "dataset": dataset})


def test_token_files_are_trained_on(pool: WorkerPool, tmp_path: Path) -> None:
    """In the order of the file, from existing weights: the first loss is that of stock transformers."""
    docs = token_files(tmp_path)
    dataset = {"tokens": str(tmp_path / "web.ds"), "token_size": 2, "sequence_length": LENGTH, "shuffle": False}
    path = settings(tmp_path, dataset, max_steps=2)
    argv = ["train", path, "--model.config=null", f"--model.name_or_path={checkpoint()}", "--model.dtype=float32"]
    results = pool.run(2, command, *argv, "--tp_size=2")
    assert [code for code, *_ in results] == [0, 0], results[0][2]
    stream = torch.from_numpy(flat(docs["web"]))
    ids, targets = (stream[start : start + 4 * LENGTH].view(4, LENGTH) for start in (0, 1))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32)(input_ids=ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert figures(tmp_path / "out")[0] == pytest.approx(float(expected), rel=1e-5)


def test_a_mixture_is_trained_on_and_resumed(pool: WorkerPool, tmp_path: Path) -> None:
    """Token files and text by weights, evaluated by domain; the same figures on two layouts and after a resume."""
    token_files(tmp_path)
    held_out = {"web": {"tokens": str(tmp_path / "web.ds")}, "text": {"path": corpus(tmp_path), "text_column": "text"}}
    sets = {
        "web": {"tokens": [str(tmp_path / "web.ds")], "weight": 0.5},
        "code": {"tokens": str(tmp_path / "code.ds"), "weight": 0.3, "max_epochs": 3},
        "text": {"path": corpus(tmp_path), "text_column": "text", "weight": 0.2, "max_epochs": None},
    }
    dataset = {"sequence_length": LENGTH, "documents": "mask", "token_size": 2, "mixture": sets, "eval": held_out}
    path = settings(tmp_path, dataset, max_steps=4, save_strategy="steps", save_steps=2)
    expected, evaluated = [], []
    for name, sizes in (("one", []), ("two", ["--gradient_accumulation_steps=1"])):
        results = pool.run(1 + bool(sizes), command, "train", path, f"--output_dir={tmp_path / name}", *sizes)
        assert {code for code, *_ in results} == {0}, results[0][2]
        expected = expected or figures(tmp_path / name)
        assert figures(tmp_path / name) == pytest.approx(expected, rel=2e-4)
        logged = {key: value for entry in history(tmp_path / name) for key, value in entry.items()}
        domains = [logged["eval_web_loss"], logged["eval_text_loss"]]
        evaluated = evaluated or domains
        assert domains == pytest.approx(evaluated, rel=2e-4)
    again = [f"--output_dir={tmp_path / 'one'}", f"--resume_from_checkpoint={tmp_path / 'one' / 'checkpoint-2'}"]
    (result,) = pool.run(1, command, "train", path, *again)
    assert result[0] == 0, result[2]
    assert figures(tmp_path / "one")[:8] == pytest.approx(expected[:8], rel=1e-6)


FAULTS = [
    ({"tokens": "{tmp}/none.ds"}, "none.ds"),
    ({"tokens": "{tmp}/web.ds", "vocab_size": 50}, "50"),
    ({"tokens": "{tmp}/web.ds", "documents": "pack", "order": "nanoset", "seed": 1}, "order='nanoset' is an order"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), FAULTS, ids=["missing", "vocabulary", "order"])
def test_files_that_cannot_be(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    token_files(tmp_path)
    text = json.dumps({"sequence_length": LENGTH, "token_size": 2, **changes})
    dataset = json.loads(text.replace("{tmp}", str(tmp_path)))
    assert says in one_line(command("train", settings(tmp_path, dataset)))


def test_conflicts_with_training(tmp_path: Path) -> None:
    token_files(tmp_path)
    dataset = {"tokens": str(tmp_path / "web.ds"), "sequence_length": LENGTH, "token_size": 2, "seed": 3}
    for training, says in (
        ({"data_seed": 4}, "dataset.seed=3 and training.data_seed=4 differ"),
        ({"max_steps": -1}, None),
        ({"train_sampling_strategy": "random"}, "train_sampling_strategy='random': files of tokens and mixtures come"),
    ):
        if says is not None:
            assert says in one_line(command("train", settings(tmp_path, dataset, **training)))
        else:
            check_complete(read_settings(Path(settings(tmp_path, dataset, **training)), [])[0])
    mixture = {"mixture": {"web": {"tokens": "x", "weight": 1}, "code": {"tokens": "y", "weight": 1, "max_epochs": 2}}}
    endless = {"sequence_length": LENGTH, "max_epochs": None, **mixture}
    stages = {"sequence_length": LENGTH, "stages": [{"tokens": "x"}]}
    stream = {"stream": "x", "sequence_length": LENGTH}
    for data in ({**endless, "when_exhausted": "redistribute"}, stages, stream):
        path = settings(tmp_path, data, max_steps=-1)
        assert "training.max_steps is needed" in one_line(command("train", path))
    check_complete(read_settings(Path(settings(tmp_path, endless, max_steps=-1)), [])[0])


def test_stages_are_overridden_by_place(tmp_path: Path) -> None:
    path = settings(tmp_path, {"sequence_length": 8, "stages": [{"tokens": "a"}, {"tokens": "b", "start_step": 5}]})
    overrides = ["--dataset.stages.1.start_step=7", "--dataset.stages.0.documents", "mask"]
    assert read_settings(Path(path), overrides)[0]["dataset"]["stages"] == [
        {"tokens": "a", "documents": "mask"}, {"tokens": "b", "start_step": 7},
    ]  # fmt: skip
    for override in ("--dataset.stages.2.start_step=7", "--dataset.stages.x.tokens=a", "--dataset.stages.-1=a"):
        assert "is no place in a list of 2 (0 to 1)" in one_line(command("train", path, override))


def test_rows_of_several_sets_make_a_batch() -> None:
    """What some rows say, and others leave out, is filled in; `domain` is kept."""
    rows = [
        {name: torch.tensor(value) for name, value in (
            ("input_ids", [5, 6, 7]), ("labels", [5, -100, 7]), ("shift_labels", [-100, 7, 8]),
            ("position_ids", [0, 0, 1]), ("domain", 1),
        )},
        {"input_ids": [8, 9], "attention_mask": [1, 1], "domain": torch.tensor(0)},
    ]  # fmt: skip
    assert {name: value.tolist() for name, value in cli_data.collate(rows).items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 0]],
        "labels": [[5, -100, 7], [8, 9, -100]],
        "shift_labels": [[-100, 7, 8], [9, -100, -100]],
        "position_ids": [[0, 0, 1], [0, 1, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "domain": [1, 0],
    }


def test_texts_are_kept_apart() -> None:
    from datasets import Dataset

    from hf_nanotron.cli.table_data import _tokenised

    texts = Dataset.from_dict({"text": ["w5 w6 w7", "", "w8", None, "w9 w10 w11"]})  # of nothing, nothing is trained
    section = {"text_column": "text", "sequence_length": 4, "documents": "mask"}
    packed = _tokenised(texts, section, tokenizer())
    assert packed["input_ids"][:] == [[5, 6, 7, 2], [8, 2, 9, 10]]
    assert packed["position_ids"][:] == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert packed["labels"][:] == [[-100, 6, 7, 2], [-100, 2, -100, 10]]
    numbers = Dataset.from_dict({"text": [1.5]})
    with pytest.raises(ValueError, match=r"dataset.text_column='text' holds a float \(1.5\), which is no text"):
        _tokenised(numbers, section, tokenizer())
    with pytest.raises(ValueError, match="the texts of dataset are too short"):
        _tokenised(Dataset.from_dict({"text": ["", None]}), section, tokenizer())


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The home folder, and compressed files, for tables and streams alike."""
    monkeypatch.setenv("HOME", str(tmp_path))
    tokenizer().save_pretrained(tmp_path / "words")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "w5 w6 w7"}\n' * 4))
    words = load_tokenizer("~/words")
    for kind, reads in (("path", lambda data: data[0]), ("stream", lambda data: next(iter(data)))):
        section = {kind: "~/a.jsonl.gz", "text_column": "text", "sequence_length": 4}
        train, _ = cli_data.load_data(plan_data(section), words, 0)
        assert torch.as_tensor(reads(train)["input_ids"]).tolist() == [5, 6, 7, 2]
        for more, says in (
            ({"data_files": "b"}, f"dataset.data_files='b' .*dataset.{kind}"),
            ({kind: "https://me:pa55word@host/a.jsonl"}, r"'https://\*\*\*@host/a.jsonl' is a URL; give a file or"),
        ):
            with pytest.raises(ValueError, match=says):
                cli_data.load_data(plan_data(section | more), words, 0)


def test_stages_and_schedules_are_those_of_the_plan(tmp_path: Path) -> None:
    """Stages share values and sets, and differ in rows, weights and batch; a schedule changes weights in a mixture."""
    token_files(tmp_path)
    web, code = (
        {"tokens": str(tmp_path / f"{name}.ds"), "weight": weight} for name, weight in (("web", 3), ("code", 1))
    )
    first = {"start_tokens": 0, "mixture": {"web": web, "code": code}, "max_epochs": None}
    later = {"start_tokens": 4 * 4 * LENGTH, "sequence_length": 2 * LENGTH, "global_batch_size": 2}
    last = {"start_step": 9, "tokens": str(tmp_path / "code.ds"), "shuffle": False}
    section = {"sequence_length": LENGTH, "token_size": 2, "shuffle": False, "documents": "mask", "eos_token_id": 2}
    text = {"start_step": 12, "path": corpus(tmp_path), "text_column": "text"}
    stages = [first, {**later, "mixture": {"web": web}}, last, text]
    train, _ = cli_data.load_data(plan_data({**section, "stages": stages}), tokenizer(), 0)
    assert isinstance(train, Stages) and train.names == ("web", "code", text["path"])
    legs = train.plan(4, 15)
    assert [(leg.step, leg.batch) for leg in legs] == [(0, 4), (4, 2), (9, 4), (12, 4)]
    assert [len(train[leg.first]["input_ids"]) for leg in legs] == [LENGTH, 2 * LENGTH, LENGTH, LENGTH]
    schedule = [{"start_tokens": 4 * LENGTH, "weights": {"web": 0, "code": 1}}]
    part = {**section, "mixture": {"web": web, "code": code}, "schedule": schedule}
    mixture, _ = cli_data.load_data(plan_data(part), tokenizer(), 0)
    assert isinstance(mixture, Mixture)
    assert mixture.counts(4) == {"web": 3, "code": 1} and mixture.counts(8) == {"web": 3, "code": 5}


def test_conversations_are_a_set(tmp_path: Path) -> None:
    words = copy.deepcopy(tokenizer())
    words.chat_template = "{% for m in messages %}{% generation %}{{ m['content'] }} w2 {% endgeneration %}{% endfor %}"
    rows = [{"messages": [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]}] * 8
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"chat": str(path), "sequence_length": LENGTH, "cache_dir": str(tmp_path / "cache"), "train_on": "all"}
    train, held_out = cli_data.load_data(plan_data({**section, "eval": {"chat": str(path)}}), words, 0)
    assert isinstance(train, ChatDataset) and not held_out.shuffle
    assert train[0]["input_ids"].tolist()[:5] == [5, 6, 2, 7, 2]
    with pytest.raises(ValueError, match="dataset.chat needs tokenizer"):
        cli_data.load_data(plan_data(section), None, 0)


def test_a_stream_is_trained_on_and_resumed(pool: WorkerPool, tmp_path: Path) -> None:
    """Texts that are tokenized while they are read: the same figures on two ranks, and after a resume."""
    section = {"stream": corpus(tmp_path), "text_column": "text", "sequence_length": LENGTH, "documents": "mask"}
    path = settings(tmp_path, section, max_steps=4, save_strategy="steps", save_steps=2)
    (result,) = pool.run(1, command, "train", path)
    assert result[0] == 0, result[2]
    expected = figures(tmp_path / "out")
    dp = ["--gradient_accumulation_steps=1", f"--output_dir={tmp_path / 'two'}"]
    assert {code for code, *_ in pool.run(2, command, "train", path, *dp)} == {0}
    assert figures(tmp_path / "two") == pytest.approx(expected, rel=2e-4) and len(expected) == 8
    (result,) = pool.run(1, command, "train", path, f"--resume_from_checkpoint={tmp_path / 'out' / 'checkpoint-2'}")
    assert result[0] == 0, result[2]
    assert figures(tmp_path / "out")[:8] == pytest.approx(expected, rel=1e-6)
    sets = {name: {"stream": section["stream"], "weight": weight} for name, weight in (("a", 3), ("b", 1))}
    section = {key: value for key, value in section.items() if key != "stream"}
    mixture, _ = cli_data.load_data(plan_data({**section, "lanes": 1, "mixture": sets}), tokenizer(), 0)
    assert isinstance(mixture, StreamMixture) and mixture.names == ("a", "b") and mixture.lanes == 1
    message = one_line(command("train", path, "--dataset.stream=./none"))
    assert "dataset.stream='./none': file or folder not found" in message

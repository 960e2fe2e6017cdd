"""What `hf-nanotron` says to wrong input: one sentence that names the value and what would work, and status 2."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import yaml
from datasets import Dataset
from pool import WorkerPool
from test_cli import DATA, checkpoint, command, fresh, one_line, write_settings

from hf_nanotron import NanotronTrainingArguments
from hf_nanotron.cli import settings as cli_settings
from hf_nanotron.cli.hints import SYNONYMS


def shown(value: Any) -> str | None:
    """A parameter in a test's name."""
    return " ".join(value)[:60] if isinstance(value, list) else ""


# ---- values of a wrong type, or out of range ----

# field, value as in YAML, what the message says
VALUES: list[tuple[str, str, str]] = [
    ("max_steps", "many", "max_steps='many' must be an integer"),
    ("max_steps", "1.5", "max_steps=1.5 must be an integer"),
    ("max_steps", "0", "max_steps=0 must be at least 1, or -1 to train for num_train_epochs"),
    ("max_steps", "-5", "max_steps=-5 must be at least 1"),
    ("max_steps", "null", "max_steps=None must be an integer"),
    ("max_steps", "true", "max_steps=True must be an integer"),
    ("max_steps", "[1]", "max_steps=[1] must be an integer"),
    ("max_steps", "1:30", "max_steps='1:30' must be an integer"),
    ("learning_rate", "abc", "learning_rate='abc' must be a number"),
    ("learning_rate", "-1e-3", "learning_rate=-0.001 must be at least 0"),
    ("learning_rate", ".nan", "learning_rate=nan must be at least 0"),
    ("learning_rate", ".inf", "learning_rate=inf must be at least 0"),
    ("learning_rate", "1e39", "learning_rate=1e+39 must be at least 0 and below 3.4e+38"),
    ("learning_rate", "{a: 1}", "learning_rate={'a': 1} must be a number"),
    ("bf16", "yes", "bf16='yes' must be true or false"),
    ("bf16", "2", "bf16=2 must be true or false"),
    ("sequence_parallel", "null", "sequence_parallel=None must be true or false"),
    ("skip_nonfinite_steps", "maybe", "skip_nonfinite_steps='maybe' must be true or false"),
    ("per_device_train_batch_size", "0", "per_device_train_batch_size=0 must be at least 1"),
    ("per_device_eval_batch_size", "-2", "per_device_eval_batch_size=-2 must be at least 1"),
    ("gradient_accumulation_steps", "0", "gradient_accumulation_steps=0"),
    ("gradient_accumulation_steps", "true", "gradient_accumulation_steps=True"),
    ("gradient_accumulation_steps", "two", "gradient_accumulation_steps='two'"),
    ("logging_steps", "0", "logging_steps=0 must be above 0"),
    ("save_steps", "-1", "save_steps=-1 must be above 0"),
    ("dataloader_num_workers", "-1", "dataloader_num_workers=-1 must be at least 0"),
    ("warmup_steps", "-1", "warmup_steps=-1 must be at least 0"),
    ("z_loss_coefficient", ".inf", "z_loss_coefficient=inf must be at least 0 and below 3.4e+38"),
    ("moe_bias_update_rate", ".inf", "moe_bias_update_rate=inf must be at least 0"),
    ("adam_beta2", "1", "adam_beta2=1 must be at least 0 and below 1"),
    ("max_grad_norm", "-1", "max_grad_norm=-1 must be at least 0"),
    ("seed", "-1", "seed=-1 must be at least 0"),
    ("seed", "abc", "seed='abc' must be an integer"),
    ("max_skipped_steps", "0", "max_skipped_steps=0 must be at least 1"),
    ("tp_size", "0", "tp_size=0"),
    ("tp_size", "two", "tp_size='two' must be an integer"),
    ("zero_stage", "7", "zero_stage=7 is not one of 0"),
    ("pp_schedule", "zigzag", "pp_schedule='zigzag' is not one of"),
    ("save_strategy", "sometimes", "'sometimes' is not one of 'no', 'steps', 'epoch', 'best'."),
    ("save_strategy", "true", "save_strategy=True must be 'no'"),
    ("eval_strategy", "stepz", "'stepz' is not one of 'no', 'steps', 'epoch'."),
    ("logging_strategy", "3", "logging_strategy=3 must be"),
    ("lr_scheduler_type", "cosin", "'cosin' is not one of 'linear', 'cosine'"),
    ("lr_scheduler_kwargs", "5", "lr_scheduler_kwargs=5 must be a mapping"),
    ("optim", "adamm", "optim='adamm' is refused"),
    ("optim_args", "5", "is refused"),
    ("label_names", "5", "label_names=5 is refused"),
    ("report_to", "nothing", "'nothing' is not one of 'none', 'all'"),
    ("report_to", "[wandbb]", "'wandbb' is not one of"),
    ("log_level", "loud", "'loud' is not one of"),
    ("include_for_metrics", "[losses]", "'losses' is not one of 'inputs', 'loss'"),
]  # fmt: skip
# Text keys, which the command line takes as they are.
IN_THE_FILE = [
    ("training.output_dir", 5, "output_dir=5 must be text or null (in YAML: '5', in quotes)"),
    ("training.output_dir", ["a", "b"], "output_dir=['a', 'b'] must be text"),
    ("training.run_name", 7, "run_name=7 must be text"),
    ("training.hub_token", ["secret"], "hub_token="),
    ("model.dtype", 16, "model.dtype=16 must be text"),
    ("model.name_or_path", 7, "model.name_or_path=7 must be text"),
    ("tokenizer", 5, "tokenizer=5 must be text"),
    ("dataset.text_column", 5, "dataset.text_column=5 must be text"),
]


@pytest.mark.parametrize(("field", "value", "says"), VALUES, ids=lambda value: None if " " in value else value)
def test_values(tmp_path: Path, field: str, value: str, says: str) -> None:
    """On the command line, in the file, and in Python."""
    path = fresh(tmp_path)
    given = ["--save_strategy", "steps"] if field == "save_steps" else []
    assert says in one_line(command("train", path, *given, f"--{field}={value}"))
    arguments = {"output_dir": "out", "use_cpu": True, "save_strategy": "steps"}
    with pytest.raises(ValueError) as error:
        NanotronTrainingArguments(**{**arguments, field: cli_settings._parse(value, "")})
    assert says in str(error.value)


@pytest.mark.parametrize(("key", "value", "says"), IN_THE_FILE)
def test_values_that_are_no_text(tmp_path: Path, key: str, value: Any, says: str) -> None:
    path = Path(fresh(tmp_path))
    settings = yaml.safe_load(path.read_text())
    section, _, name = key.rpartition(".")
    (settings.setdefault(section, {}) if section else settings)[name] = value
    path.write_text(yaml.safe_dump(settings))
    assert says in one_line(command("train", str(path)))
    if section == "training":
        with pytest.raises(ValueError) as error:
            NanotronTrainingArguments(**{"output_dir": "out", "use_cpu": True, name: value})
        assert says in str(error.value)


def test_plain_values(tmp_path: Path) -> None:
    """What spells a value of the right type is one."""
    args = NanotronTrainingArguments(
        output_dir=tmp_path, use_cpu=1, max_steps=1e3, learning_rate="1e-4", seed="7", logging_steps=0.5, report_to=[],
        num_train_epochs=np.int64(2), weight_decay=np.float32(0.5), save_total_limit=np.int64(3),
        per_device_train_batch_size=4.0, gradient_accumulation_steps=2.0,
    )  # fmt: skip
    assert (args.max_steps, args.learning_rate, args.seed) == (1000, 1e-4, 7)
    assert all(type(value) is int for value in (args.max_steps, args.seed, args.per_device_train_batch_size))
    assert type(args.gradient_accumulation_steps) is int and args.use_cpu is True and args.logging_steps == 0.5
    assert type(args.save_total_limit) is int and args.weight_decay == 0.5
    args.check()  # as a trainer does, of what transformers has made of them
    args.max_steps = "abc"
    with pytest.raises(ValueError, match="max_steps='abc' must be an integer"):
        args.check()
    off = {"save_strategy": "no", "save_steps": 0, "max_steps": 1, "num_train_epochs": 0}
    assert NanotronTrainingArguments(output_dir=tmp_path, use_cpu=True, **off).save_steps == 0
    with pytest.raises(ValueError, match="num_train_epochs=0 must be above 0"):
        NanotronTrainingArguments(output_dir=tmp_path, use_cpu=True, num_train_epochs=0)


@dataclass(repr=False)
class OwnArguments(NanotronTrainingArguments):
    """A user's class: fields of its own, and another default."""

    corpus: str = 5  # type: ignore[assignment]
    bf16: bool = None  # type: ignore[assignment]


def test_a_class_of_the_users_own(tmp_path: Path) -> None:
    assert OwnArguments(output_dir=str(tmp_path), use_cpu=True).corpus == 5
    with pytest.raises(ValueError, match="max_steps='abc'"):
        OwnArguments(output_dir=str(tmp_path), use_cpu=True, max_steps="abc")  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ctrl_c_is_one_line_of_a_job(rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_nanotron.cli.train.train", interrupted)
    monkeypatch.setenv("RANK", rank)
    said = "hf-nanotron: stopped by Ctrl-C\n" if rank == "0" else ""
    assert command("train", str(tmp_path / "run.yaml")) == (130, "", said)
    with pytest.raises(KeyboardInterrupt):
        command("--traceback", "train", str(tmp_path / "run.yaml"))


# ---- files ----

NOT_SETTINGS: dict[str, tuple[bytes | None, str]] = {
    "latin-1": ("training: {run_name: Müller}".encode("latin-1"), "is not UTF-8 text: invalid"),
    "utf-16": ("training: {}".encode("utf-16"), "is not UTF-8 text"),
    "binary": (bytes(range(256)), "is not"),
    "no yaml": (b"training: {", "is not valid YAML"),
    "tabs": (b"training:\n\tmax_steps: 1\n", "YAML does not allow tabs"),
    "python": (b"training: !!python/object/apply:os.system ['true']", "is not valid YAML"),
    "two documents": (b"training: {}\n---\nmodel: {}\n", "is not valid YAML"),
    "twice": (b"training:\n  max_steps: 1\n  max_steps: 2\n", "duplicate key 'max_steps', first in line 2"),
    "sections twice": (b"model: {}\nmodel: {}\n", "duplicate key 'model'"),
    "unhashable": (b"? [a]\n: 1\n", "is not valid YAML"),
    "no anchor": (b"training: *other\n", "is not valid YAML"),
    "itself": (b"training: &t {run_name: *t}\n", ""),
    "empty": (b"", "is empty"),
    "comment": (b"# nothing\n", "is empty"),
    "null": (b"~", "is empty"),
    "list": (b"- training\n", "holds a list"),
    "text": (b"training", "holds a str"),
    "number": (b"5", "holds a int"),
    "number as a key": (b"5: {}\n", "unknown key 5; known keys are model, dataset, doremi, training, tokenizer."),
    "list for a section": (b"training: [max_steps, 5]\n", "training: ['max_steps', 5] must be a mapping"),
    "text for a section": (b"model: llama\n", "model: 'llama' must be a mapping"),
    "number for a section": (b"dataset: 0\n", "dataset: 0 must be a mapping"),
    "list for the tokenizer": (b"tokenizer: [a]\n", "tokenizer=['a'] must be text"),
    "missing": (None, "file not found"),
}


@pytest.mark.parametrize("name", NOT_SETTINGS)
def test_files(tmp_path: Path, name: str) -> None:
    content, says = NOT_SETTINGS[name]
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    assert says in one_line(command("train", str(path)))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert "is a folder" in one_line(command("train", str(tmp_path)))


def test_anchors_and_a_mark_of_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = "model: &m {dtype: float32}\ndataset: {path: x}\n"
    path.write_text("\ufeff" + text + "tokenizer: ~\n", encoding="utf-8")
    sections, _ = cli_settings.read_settings(path, [])
    assert sections["model"] == {"dtype": "float32"}
    path.write_text("training: {<<: &d {max_steps: 3, seed: 1}, seed: 2}\n")
    assert cli_settings.read_settings(path, [])[0]["training"] == {"max_steps": 3, "seed": 2}


# ---- sections ----

IDS = [
    "--dataset.text_column=null",
    "--dataset.sequence_length=null",
    "--dataset.eval_split=null",
    "--dataset.train_split=train",
]
SECTIONS: list[tuple[list[str], str]] = [
    (["--model.config", "llama"], "model.config='llama' must be a mapping or null"),
    (["--model.config", "[llama]"], "model.config=['llama'] must be a mapping"),
    (["--model.config.model_type", "5"], "model.config.model_type=5 must be text"),
    (["--model.config.model_type", "null"], "model.config needs model_type"),
    (["--model.config.hidden_size", "[1]"], "model.config"),
    (["--model.config.vocab_size", "many"], "'vocab_size' expected int"),
    (["--model.config.num_attention_heads", "0"], "model"),
    (["--model.dtype", "floaty"], "model.dtype='floaty' is not one of 'auto', 'float32'"),
    (["--model.dtype", "16"], "model.dtype='16' is not one of"),
    (["--model.attn_implementation", "lightning"], "lightning"),
    (["--model.config=null", "--model.name_or_path=/no/such/model"], "'/no/such/model': folder not found"),
    (["--model.config=null", "--model.name_or_path=./model"], "'./model': folder not found"),
    (["--model.config=null", "--model.name_or_path={tmp}"], "no config.json"),
    (["--tokenizer", "/no/such/tokenizer"], "tokenizer='/no/such/tokenizer': folder not found"),
    (["--tokenizer", "{tmp}"], "cannot be loaded"),
    (["--dataset.path", "/no/such/data"], "dataset.path='/no/such/data': file or folder not found"),
    (["--dataset.path", "absent.jsonl"], "dataset.path='absent.jsonl': file not found"),
    (["--dataset.path", "{tmp}/empty.jsonl"], "is an empty file"),
    (["--dataset.path", "{tmp}/broken.jsonl"], "cannot be read"),
    (["--dataset.train_split", "train[:0]"], "cannot be read: Instruction"),
    (["--dataset.train_split=train", "--dataset.path", "{tmp}/none"], "has no samples"),
    (["--dataset.train_split=train", "--dataset.path", "{tmp}/none.parquet"], "cannot be read: Instruction"),
    (["--dataset.path", "{tmp}/numbers.jsonl"], "dataset.text_column='text' holds a int (5), which is no text"),
    (["--dataset.path", "null"], "dataset needs one of tokens (files of token ids), chat"),
    (["--dataset.name", "en"], "dataset.name='en' needs a dataset.path that is a name for datasets.load_dataset"),
    (["--dataset.data_files", "[a]"], "dataset.data_files=['a'] needs a dataset.path"),
    ([*IDS, "--dataset.path={tmp}/floats.jsonl"], "the column input_ids of the dataset must hold a list of integers"),
    ([*IDS, "--dataset.path={tmp}/words.jsonl"], "the column input_ids of the dataset must hold a list of integers"),
    ([*IDS, "--dataset.path={tmp}/nulls.jsonl"], "the column input_ids of the dataset is empty (null) in 4 rows"),
    ([*IDS, "--dataset.path={tmp}/short.jsonl"], "a sample has 3 input_ids and 2 labels"),
    (["--model.config.num_key_value_heads", "3"], "num_key_value_heads=3 does not divide"),
    (["--lr_scheduler_type", "warmup_stable_decay"], "'num_decay_steps'"),
    (["--training.lr_scheduler_kwargs.cycles=1"], "cycles=1 is not a key of lr_scheduler_type='constant'"),
    (["--include_num_input_tokens_seen", "some"], "include_num_input_tokens_seen='some': 'some' is not one of"),
    (["--dataset.train_split", "nope"], "cannot be read"),
    (["--dataset.text_column", "texts"], "text_column='texts' is not one of text, id"),
    (["--dataset.text_column", "5"], "text_column='5' is not one of text, id"),
    (["--dataset.sequence_length", "-4"], "dataset.sequence_length=-4 must be at least 2"),
    (["--dataset.sequence_length", "wide"], "dataset.sequence_length='wide' must be an integer"),
    (["--dataset.sequence_length", "true"], "dataset.sequence_length=True must be an integer"),
    (["--dataset.num_proc", "0"], "dataset.num_proc=0 must be at least 1"),
    (["--resume_from_checkpoint", "/no/such/checkpoint"], "/no/such/checkpoint"),
    (["--eval_strategy", "steps", "--dataset.eval_split", "null"], "eval_strategy"),
    (["--=5"], "'--=5' is not a key"),
    (["--model."], "'--model.' is not a key"),
    (["--", "5"], "'5' is not preceded by a --key"),
]


@pytest.mark.parametrize(
    ("overrides", "says"), SECTIONS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_sections(tmp_path: Path, overrides: list[str], says: str) -> None:
    path = fresh(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    (tmp_path / "numbers.jsonl").write_text('{"text": 5, "id": 1}\n' * 10)
    rows = {
        "floats": '{"input_ids": [1.5, 2.0]}\n', "words": '{"input_ids": ["a", "b"]}\n',
        "nulls": '{"input_ids": null}\n{"input_ids": [1, 2]}\n',
        "short": '{"input_ids": [1, 2, 3], "labels": [1, 2]}\n',
    }  # fmt: skip
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(row * 4)
    if "none" in overrides[-1]:
        none = Dataset.from_dict({"text": []})
        none.save_to_disk(tmp_path / "none")
        none.to_parquet(tmp_path / "none.parquet")
    if "numbers" in overrides[-1]:
        overrides = [*overrides, "--dataset.train_split=train"]
    assert says in one_line(command("train", path, *(text.format(tmp=tmp_path) for text in overrides)))


# ---- hints ----

HINTS: dict[str, str] = {
    # in the wrong section, also a flat file
    "per_device_train_batch_size: 4": "it belongs to the section training: training.per_device_train_batch_size.",
    "model: {bf16: true}": "unknown key model.bf16; it belongs to the section training: training.bf16.",
    "training: {sequence_length: 8}": "it belongs to the section dataset: dataset.sequence_length.",
    "training: {model: llama}": "model is a section: write model.KEY, one of name_or_path, config",
    "training: {tokenizer: gpt2}": "tokenizer is a top-level key",
    # other programs' names
    "training: {lr: 1}": "unknown key training.lr; the equivalent is training.learning_rate.",
    "lr: 1": "unknown key lr; the equivalent is training.learning_rate.",
    "training: {dp: 2}": "the equivalent is the number of processes / (tp_size x pp_size x cp_size)",
    "training: {tp: 2}": "the equivalent is training.tp_size.",
    "pp: 2": "the equivalent is training.pp_size.",
    "training: {micro_batch_size: 2}": "the equivalent is training.per_device_train_batch_size.",
    "training: {global_batch_size: 2}": "training.per_device_train_batch_size x training.gradient_accumulation_steps",
    "dataset: {block_size: 2048}": "the equivalent is dataset.sequence_length.",
    "training: {warmup_ratio: 0.1}": "training.warmup_steps (a number below 1 is a fraction of all steps).",
    "training: {evaluation_strategy: steps}": "the equivalent is training.eval_strategy.",
    "model_name_or_path: x": "the equivalent is model.name_or_path.",
    "model: {hidden_size: 64}": "the equivalent is model.config.hidden_size.",
    "training: {epochs: 3}": "the equivalent is training.num_train_epochs.",
    "epochs: 3": "the equivalent is training.num_train_epochs.",
    "model: {vocab_size: 64}": "the equivalent is model.config.vocab_size.",
    "training: {dataset_folder: x}": "the equivalent is dataset.tokens.",
    "dataset: {weights: {a: 1}}": "the equivalent is a weight in each set of dataset.mixture.",
    # near misses, in this section first
    "training: {max_stesp: 1}": "did you mean training.max_steps?",
    "dataset: {max_stesp: 1}": "did you mean training.max_steps?",
    "model: {name_or_pth: x}": "did you mean model.name_or_path?",
    # and none at all
    "training: {xyzzy: 1}": "unknown key training.xyzzy; known keys are output_dir, per_device_train_batch_size,",
    "dataset: {qwkj: 1}": "unknown key dataset.qwkj; known keys are path, name, data_files,",
    "qwkj: 1": "unknown key qwkj; known keys are model, dataset, doremi, training, tokenizer.",
}


@pytest.mark.parametrize("text", HINTS)
def test_hints(tmp_path: Path, text: str) -> None:
    message = one_line(command("train", write_settings(tmp_path, text)))
    assert HINTS[text] in message, message
    if "known keys are" in HINTS[text]:
        assert "did you mean" not in message


def test_hints_of_overrides_and_configs(tmp_path: Path) -> None:
    path = fresh(tmp_path)
    for overrides, says in (
        (["--lr", "1"], "unknown key training.lr; the equivalent is training.learning_rate."),
        (["--model", "gpt2"], "unknown key training.model; model is a section"),
        (["--seq-length", "8"], "the equivalent is dataset.sequence_length."),
        (["--model.config.learning_rate", "1"], "it belongs to the section training: training.learning_rate."),
        (["--model.config.hidden_sise", "1"], "did you mean model.config.hidden_size?"),
        (["--model.config.xyzzy", "1"], "unknown key model.config.xyzzy; known keys are"),
    ):
        assert says in one_line(command("train", path, *overrides))


def test_synonyms_mean_what_there_is() -> None:
    paths = {f"{section}.{name}" for section, names in cli_settings.SECTIONS.items() for name in names}
    for meaning in set(SYNONYMS.values()):
        keys = [
            word for word in meaning.split() if word.startswith(tuple(f"{name}." for name in cli_settings.SECTIONS))
        ]
        assert all(key in paths or key == "model.config.{}" for key in keys), meaning
    for name, meaning in SYNONYMS.items():
        known = [section for section, names in cli_settings.SECTIONS.items() if name in names]
        if known == ["dataset"] and not meaning.startswith("dataset"):
            continue  # it is shown in the section that it means, and outside of any
        assert not known, f"{name} is a key of {known}, and {meaning} would not be shown"


def test_a_configuration_of_nanotron(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "general": {"project": "x", "run": "y"},
        "model": {"model_config": {"hidden_size": 16}},
        "parallelism": {"dp": 2, "tp": 2, "pp": 1},
        "tokens": {"micro_batch_size": 2, "sequence_length": 32, "train_steps": 10},
        "data_stages": [],
    }
    message = one_line(command("train", write_settings(tmp_path, settings)))
    for part in ("a configuration of huggingface/nanotron (it has ", "general", "data_stages",
                 f"convert nanotron-config {tmp_path / 'run.yaml'} OUT.yaml", "convert nanotron-to-hub"):  # fmt: skip
        assert part in message
    for path in sorted(DATA.glob("*/**/config.yaml"))[:1]:
        assert "huggingface/nanotron" in one_line(command("train", str(path)))


# ---- other commands ----

COMMANDS: list[tuple[list[str], str]] = [
    (["generate", "/no/such/model", "--prompt", "x"], "MODEL='/no/such/model': folder not found"),
    (["generate", "{tmp}", "--prompt", "x"], "MODEL: {tmp} holds no config.json: no model was saved there"),
    (["generate", "{model}", "--prompt", "w5", "--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
    (
        ["generate", "{model}", "--prompt", "w5", "--do-sample", "--temperature", "0"],
        "--temperature 0.0 must be above 0",
    ),
    (
        ["generate", "{model}", "--prompt", "w5", "--do-sample", "--top-p", "2"],
        "--top-p 2.0 must be above 0 and at most 1",
    ),
    (["generate", "{model}", "--prompt", "w5", "--do-sample", "--seed", "-1"], "--seed -1 must be at least 0"),
    (["generate", "{model}", "--prompt", "w5", "--cpu", "--pp-size", "-1"], "pp_size=-1"),
    (["convert", "sharded-to-hub", "/no/such", "{tmp}/out"], "/no/such"),
    (["convert", "hub-to-sharded", "/no/such", "{tmp}/out"], "/no/such"),
    (["convert", "nanotron-to-hub", "/no/such", "{tmp}/out"], "/no/such"),
    (["convert", "hub-to-nanotron", "/no/such", "{tmp}/out"], "/no/such"),
    (["convert", "hub-to-nanotron", "{broken}", "{tmp}/out"], "not valid JSON"),
    (["convert", "hub-to-sharded", "{broken}", "{tmp}/out"], "not valid JSON"),
    (["convert", "sharded-to-hub", "{broken}", "{tmp}/out"], ""),
    (["convert", "hub-to-nanotron", "{model}", "{tmp}/out", "--tp", "0"], "tp"),
    (["convert", "hub-to-nanotron", "{model}", "{tmp}/out", "--pp", "-1"], "pp"),
    (["convert", "hub-to-nanotron", "{model}", "{tmp}/out", "--tp", "7"], "7"),
    (["convert", "hub-to-sharded", "{model}", "{tmp}/out", "--max-shard-size", "much"], "much"),
]


@pytest.mark.parametrize(
    ("argv", "says"), COMMANDS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_commands(tmp_path: Path, argv: list[str], says: str) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    names = {"tmp": str(tmp_path), "model": checkpoint(), "broken": str(broken)}
    assert says.format(**names) in one_line(command(*(text.format(**names) for text in argv)))


# ---- processes ----


@pytest.mark.full_matrix
def test_one_process(tmp_path: Path) -> None:
    """`test_a_job_says_it_once` has ranks; all messages are in `test_commands`."""
    argv = [sys.executable, "-m", "hf_nanotron.cli", "train", fresh(tmp_path), "--learning_rate", "abc"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and not done.stdout
    assert one_line((2, "", done.stderr)).endswith("learning_rate='abc' must be a number.")


def test_traceback(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="file not found"):  # for Python to print
        command("--traceback", "train", str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["--max_steps", "abc"], "max_steps='abc' must be an integer"),
        (["--dataset.path", "/none"], "file or folder not found"),
    ],
    ids=["before a process group", "in a process group"],
)
def test_a_job_says_it_once(
    pool: WorkerPool, tmp_path: Path, overrides: list[str], says: str, pytestconfig: pytest.Config
) -> None:
    if "max_steps" in says and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    program = ["-m", "hf_nanotron.cli", "train", fresh(tmp_path), "--tp_size=2", *overrides]
    code, out, err = pool.run_alone(forked.run_apart, 2, program, tmp_path)
    lines = [line for line in err.splitlines() if "hf-nanotron: error: " in line]
    assert len(lines) == 1 and says in lines[0] and not out, err[-3000:]
    assert code == 2

"""The `hf-nanotron` command, in process and on the ranks of a job."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from pool import WorkerPool
from safetensors.torch import load_file
from tiny import VOCABULARY, random_dataset, tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, set_seed

from hf_nanotron.cli import data as cli_data, main, table_data, train as cli_train
from hf_nanotron.cli.model_config import changed_config, make_config
from hf_nanotron.cli.settings import check_complete, read_settings, sections_of

DATA = Path(__file__).parent / "data" / "nanotron"
PROMPTS = ["w5 w6 w7 w8", "w20 w21"]
TOPOLOGIES = [(1, []), (2, ["--tp-size", "2"]), (2, ["--pp-size", "2"])]

Result = tuple[int, str, str]


def command(*argv: str) -> Result:
    """Exit status, stdout and stderr of `hf-nanotron` in this process."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = str(Path(tempfile.gettempdir(), "hf-nanotron-tests"))
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(argv)
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
    return code, out.getvalue(), err.getvalue()


def one_line(result: Result) -> str:
    """The message of a command that failed the way users are to see."""
    code, out, err = result
    (line,) = [line for line in err.splitlines() if line.startswith("hf-nanotron: error: ")]
    assert code == 2 and not out and "Traceback" not in err
    return line


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Token 7 is the word "w7"."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")


@functools.cache
def checkpoint() -> str:
    """A Hub repository with random weights and a tokenizer."""
    directory = tempfile.mkdtemp()
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2, initializer_range=0.3))
    # What a chat model's repository asks for; without --do-sample it must not count.
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def test_help_is_there_without_torch() -> None:
    program = """
import contextlib, io, sys
from hf_nanotron.cli import main
for argv in (["--help"], ["--version"], ["generate", "--help"], ["train", "--help"], ["convert", "--help"],
             ["convert", "nanotron-to-hub", "--help"], ["convert", "hub-to-nanotron", "--help"], ["tokenize", "--help"],
             ["launch", "--help"],
             ["data", "inspect", "--help"], ["generate"], []):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(argv)
        except SystemExit as exit:
            print(argv, exit.code, len(out.getvalue()) > 10, file=sys.__stdout__)
for name in ("torch", "transformers", "numpy", "yaml"):
    assert name not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert not done.stderr and done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 12
    assert all(line.endswith("0 True") for line in lines if line.startswith("['--v") or "--help" in line)
    assert lines[-2].endswith(" 2 True") and lines[-1] == "[] 2 True"


# ---- generate ----


def stock_text(prompts: list[str], new: int, **options: Any) -> list[str]:
    words = AutoTokenizer.from_pretrained(checkpoint(), padding_side="left")
    inputs = words(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoint()).eval()
    tokens = model.generate(**inputs, max_new_tokens=new, **options)
    return words.batch_decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(("world", "sizes"), TOPOLOGIES)
def test_generate(pool: WorkerPool, world: int, sizes: list[str]) -> None:
    argv = ["generate", checkpoint(), "--cpu", "--max-new-tokens", "6", *sizes]
    for prompt in PROMPTS:
        argv += ["--prompt", prompt]
    first, *others = pool.run(world, command, *argv)
    texts = stock_text(PROMPTS, 6, do_sample=False)
    assert texts[0].startswith(PROMPTS[0]) and len(texts[0].split()) == 10
    assert first[:2] == (0, "".join(f"--- {prompt!r}\n{text}\n" for prompt, text in zip(PROMPTS, texts, strict=True)))
    assert all(other[:2] == (0, "") for other in others)
    assert "temperature" not in first[2]


@pytest.mark.parametrize(("world", "sizes"), TOPOLOGIES)
def test_generate_samples(pool: WorkerPool, world: int, sizes: list[str]) -> None:
    argv = ["generate", checkpoint(), "--cpu", "--prompt", PROMPTS[0], "--max-new-tokens", "6", *sizes]
    argv += ["--do-sample", "--temperature", "3", "--top-p", "0.95", "--dtype", "float32"]
    set_seed(5)
    (expected,) = stock_text(PROMPTS[:1], 6, do_sample=True, temperature=3.0, top_p=0.95)
    assert pool.run(world, command, *argv, "--seed", "5")[0][1] == expected + "\n"
    unseeded = [pool.run(world, command, *argv)[0][1] for _ in range(2)]
    assert len({*unseeded, expected + "\n"}) == 3


@pytest.mark.parametrize(
    ("world", "argv", "says"),
    [
        (1, ["--temperature", "0.5"], "--temperature needs --do-sample"),
        (1, ["--prompt", "x", "--tp-size", "2"], "does not divide the world size 1"),
        (1, ["--prompt", ""], "is empty"),
        (2, [], "would hold 2 replicas"),
        (2, ["--pp-size", "2", "--tp-size", "0"], "tp_size=0"),
    ],
)
def test_generate_refuses(pool: WorkerPool, world: int, argv: list[str], says: str) -> None:
    results = pool.run(world, command, "generate", checkpoint(), "--cpu", "--prompt", "w5", *argv)
    assert len(results) == world
    for result in results:
        assert says in one_line(result)


def test_foreign_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("of somebody else's code")

    monkeypatch.setattr(cli_train, "train", fail)
    with pytest.raises(ValueError, match="somebody else"):
        main(["train", "x.yaml"])


# ---- convert ----


def test_convert(tmp_path: Path) -> None:
    """There and back: the fixtures' weights, cut for another tp and pp, with the options that the flags name."""
    hub, nanotron, again = (str(tmp_path / name) for name in ("hub", "nanotron", "again"))
    source = str(DATA / "tp2_pp2")
    assert command("convert", "nanotron-to-hub", source, hub, "--max-shard-size", "20KB")[0] == 0
    assert len(list(Path(hub).glob("*.safetensors"))) > 1
    assert command("convert", "hub-to-nanotron", hub, nanotron, "--tp", "2", "--pp", "1", "--step", "3")[0] == 0
    assert (Path(nanotron) / "latest.txt").read_text() == "3"
    assert command("convert", "nanotron-to-hub", nanotron, again)[0] == 0
    expected = load_file(Path(again) / "model.safetensors")
    got = {name: t for path in Path(hub).glob("*.safetensors") for name, t in load_file(path).items()}
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)

    masters = str(tmp_path / "masters")
    assert command("convert", "nanotron-to-hub", source, masters, "--master-weights")[0] == 0
    assert {t.dtype for t in load_file(Path(masters) / "model.safetensors").values()} == {torch.float32}


def test_convert_refuses(tmp_path: Path) -> None:
    assert "latest.txt" in one_line(command("convert", "nanotron-to-hub", str(tmp_path), str(tmp_path / "hub")))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    source = str(DATA / "tp2_pp2")
    assert "not empty" in one_line(command("convert", "nanotron-to-hub", source, str(tmp_path / "used")))


# ---- train ----


def write_settings(folder: Path, settings: Any) -> str:
    path = folder / "run.yaml"
    path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return str(path)


def corpus(folder: Path) -> str:
    """Texts of different lengths, which repeat themselves, so that there is something to learn."""
    path = folder / "corpus.jsonl"
    rows = [
        {"text": " ".join(f"w{3 + (start + i) % 20}" for i in range(10 + start)), "id": start} for start in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def history(output_dir: Path) -> list[dict[str, Any]]:
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]


def figures(output_dir: Path) -> list[float]:
    return [
        entry[name] for entry in history(output_dir) for name in ("loss", "grad_norm", "eval_loss") if name in entry
    ]


FRESH = """
model:
  config:
    model_type: llama
    hidden_size: 32
    intermediate_size: 48
    num_hidden_layers: 2
    num_attention_heads: 4
    num_key_value_heads: 2
    initializer_range: 1e-1
    rope_theta: 5e3
tokenizer: {tokenizer}
dataset:
  path: {corpus}
  text_column: text
  sequence_length: 8
  train_split: train[:80%]
  eval_split: train[80%:]
training:
  output_dir: {out}
  max_steps: 3
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  learning_rate: 1e-2
  lr_scheduler_type: constant
  logging_steps: 1
  save_strategy: no
  report_to: none
  disable_tqdm: true
  use_cpu: true
"""


def fresh(folder: Path, **changes: str) -> str:
    return write_settings(
        folder, FRESH.format(tokenizer=checkpoint(), corpus=corpus(folder), out=folder / "out", **changes)
    )


def test_train_from_a_config_and_text(pool: WorkerPool, tmp_path: Path) -> None:
    """The same figures on every topology; a stock checkpoint with its tokenizer; overrides; a resumed run."""
    path, expected = fresh(tmp_path), []
    for index, sizes in enumerate(([], ["--tp_size", "2"], ["--pp-size=2", "--sequence_parallel", "false"])):
        out = tmp_path / f"out{index}"
        results = pool.run(2 if sizes else 1, command, "train", path, "--output_dir", str(out), *sizes)
        assert [result[0] for result in results] == [0] * len(results), results[0][2]
        expected = expected or figures(out)
        assert figures(out) == pytest.approx(expected, rel=1e-4)
    assert len(expected) == 7 and expected[4] < expected[0]  # three steps and an evaluation; it learns

    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == VOCABULARY and model.config.eos_token_id == 2
    assert model.config.rope_parameters["rope_theta"] == 5000.0
    assert len(AutoTokenizer.from_pretrained(out)) == VOCABULARY
    assert not list(out.glob("checkpoint-*"))  # save_strategy: no

    resumed = tmp_path / "resumed"
    common = ["train", path, "--output_dir", str(resumed), "--save_strategy", "steps", "--save_steps", "2"]
    assert pool.run(1, command, *common, "--max_steps", "2")[0][0] == 0
    assert pool.run(1, command, *common, "--resume_from_checkpoint")[0][0] == 0
    assert figures(resumed)[:6] == pytest.approx(expected[:6], rel=1e-6)


def test_train_from_weights_and_tokens(pool: WorkerPool, tmp_path: Path) -> None:
    """A folder of `save_to_disk` whose samples differ in length, weights to start from, no tokenizer, no evaluation."""
    tokens = random_dataset(16, ragged=True)
    DatasetDict({"all": tokens}).save_to_disk(tmp_path / "data")
    settings = {
        "model": {"name_or_path": checkpoint(), "dtype": "float32"},
        "dataset": {"path": str(tmp_path / "data"), "train_split": "all"},
        "training": {
            **yaml.safe_load(FRESH.format(tokenizer="", corpus="", out=tmp_path / "out"))["training"],
            "learning_rate": 0.0,
            "save_strategy": "no",
            "train_sampling_strategy": "sequential",
            "max_steps": 1,
        },
    }
    (result,) = pool.run(1, command, "train", write_settings(tmp_path, settings))
    assert result[0] == 0, result[2]
    # One step at a learning rate of zero: the loss of the first four samples under the checkpoint's weights.
    model = AutoModelForCausalLM.from_pretrained(checkpoint()).eval()
    total, count = 0.0, 0
    for row in tokens.select(range(4)):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        predicted = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total, count = total + model(ids, labels=labels).loss.item() * predicted, count + predicted
    loss, norm = figures(tmp_path / "out")
    assert loss == pytest.approx(total / count, rel=1e-5) and norm > 0
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        torch.equal(tensor, kept[name]) for name, tensor in load_file(f"{checkpoint()}/model.safetensors").items()
    )
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("world", "overrides", "says"),
    [
        (2, ["--tp_size", "3"], "does not divide the world size 2"),
        (2, ["--tp_size", "2", "--model.config.intermediate_size", "49"], "does not divide the 49 features"),
        (1, ["--model.config.num_attention_heads", "5"], "not a multiple of the number of attention heads"),
        (1, ["--model.config.hidden_size", "wide"], "'hidden_size' expected int"),
        (1, ["--fp16"], "fp16=True"),
        (1, ["--save_strategy", "best", "--eval_strategy", "no"], "metric_for_best_model"),
        (1, ["--dataset.text_column", "texts"], "text_column='texts' is not one of text, id"),
        (1, ["--dataset.text_column", "null"], "dataset.sequence_length needs dataset.text_column"),
        (1, ["--dataset.text_column", "null", "--dataset.sequence_length", "null"], "without input_ids"),
        (1, ["--dataset.sequence_length", "0"], "dataset.sequence_length=0 must be at least 2"),
        (1, ["--dataset.sequence_length", "5000"], "too short"),
        (1, ["--tokenizer", "null"], "needs a tokenizer"),
        (1, ["--model.config.vocab_size", "7"], "smaller than the tokenizer's 120"),
        (1, ["--model.config.hidden_sise", "7"], "did you mean model.config.hidden_size?"),
        (1, ["--model.config.model_type", "lama"], "did you mean model.config.model_type=llama?"),
        (1, ["--model.config", "null"], "either name_or_path"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_train_refuses(pool: WorkerPool, tmp_path: Path, world: int, overrides: Sequence[str], says: str) -> None:
    results = pool.run(world, command, "train", fresh(tmp_path), *overrides)
    for result in results:
        assert says in one_line(result)


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("trainning: {}", [], "unknown key trainning; did you mean training?"),
        ("training: {max_step: 1}", [], "unknown key training.max_step; did you mean training.max_steps?"),
        ("", ["--learning-rat", "1"], "did you mean training.learning_rate?"),
        ("", ["--model.nameorpath", "x"], "did you mean model.name_or_path?"),
        ("model: {name_or_path: x}\ndataset: {path: x, split: a}", [], "Its split is train_split."),
        ("model: llama", [], "must be a mapping"),
        ("model: llama", ["--model.name_or_path", "x"], "not a section"),
        ("[1]", [], "holds a list"),
        ("a: [", [], "is not valid YAML"),
        ("", ["max_steps", "3"], "is not preceded by a --key"),
    ],
)
def test_settings_refuse(tmp_path: Path, text: str, overrides: list[str], says: str) -> None:
    assert says in one_line(command("train", write_settings(tmp_path, text), *overrides))
    assert "file not found" in one_line(command("train", str(tmp_path / "absent.yaml")))


def test_settings(tmp_path: Path) -> None:
    """YAML's surprises are none here, and overrides are YAML too."""
    path = write_settings(
        tmp_path,
        "training: {save_strategy: no, learning_rate: 1e-3, adam_epsilon: 1.5E-8, max_steps: 10,\n"
        "  run_name: 2024-01-01, bf16: false, weight_decay: .1, hub_model_id: 1e, warmup_steps: -1}\n",
    )
    overrides = ["--bf16", "--max-steps=20", "--learning_rate", "2e-4", "--pp_layers_per_stage", "[1, 2]"]
    overrides += ["--model.config.model_type", "llama", "--tokenizer", "some/where", "--optim_args", "a=1,b=2"]
    overrides += ["--output_dir", "/a #1", "--report_to=&b c", "--trackio_space_id", "'#1: b'", "--hub_token", "null"]
    sections, name = cli_train.read_settings(Path(path), overrides)
    assert name == "some/where" and sections["model"] == {"config": {"model_type": "llama"}}
    assert sections["training"] == {
        "save_strategy": "no",
        "learning_rate": 2e-4,
        "adam_epsilon": 1.5e-8,
        "max_steps": 20,
        "run_name": "2024-01-01",
        "output_dir": "/a #1",
        "report_to": "&b c",
        "trackio_space_id": "#1: b",
        "hub_token": None,
        "bf16": True,
        "weight_decay": 0.1,
        "hub_model_id": "1e",
        "warmup_steps": -1,
        "pp_layers_per_stage": [1, 2],
        "optim_args": "a=1,b=2",
    }
    assert "NanotronTrainingArguments" in command("train", path, "--help")[1]


TEXTS = ("/a #1", "/a: b", "[x", "{x}", "'q", "*a", "&a", "!a", "| a", "yes", "true", "1e-4", "007", "1_0", "=", "<<")


def test_overrides_keep_text(tmp_path: Path) -> None:
    """What a key that takes text is given is not read as YAML; what would be left of its value is asked for."""
    path = Path(write_settings(tmp_path, "dataset: {chat: c}\ntraining: {save_steps: 5}\n"))
    for text in (*TEXTS, "2026-11-30", "a\nb", "s3://b/k?x=1#y"):
        for key in ("output_dir", "model.revision", "dataset.split", "dataset.eval.split", "tokenizer"):
            sections, tokenizer = sections_of(yaml.safe_load(path.read_text()), "here", [f"--{key}={text}"])
            section: Any = {"tokenizer": tokenizer} if key == "tokenizer" else {**sections, **sections["training"]}
            for part in key.split("."):
                section = section[part]
            assert section == text
    typed = ["--seed=7", "--learning-rate", "1e-4", "--report_to=[a]", "--optim_args=a: 1"]
    typed += ["--dataset.mixture={}", "--dataset.schedule=[{weights: {}}]", "--dataset.schedule.0.weights.split=.5"]
    sections, _ = cli_train.read_settings(path, typed)
    assert sections["training"] == {
        "save_steps": 5, "seed": 7, "learning_rate": 1e-4, "report_to": ["a"], "optim_args": "a: 1"
    }  # fmt: skip
    assert sections["dataset"] == {"chat": "c", "mixture": {}, "schedule": [{"weights": {"split": 0.5}}]}
    with pytest.raises(ValueError, match="--output_dir needs a value, which is text; write --output_dir=TEXT"):
        cli_train.read_settings(path, ["--output_dir", "--bf16"])


@pytest.mark.parametrize("in_file", [True, False])
def test_a_removed_key_is_refused(tmp_path: Path, in_file: bool) -> None:
    text = f"training: {{output_dir: {tmp_path}, {'ep_parts: auto' if in_file else 'use_cpu: true'}}}\n"
    with pytest.raises(ValueError, match="^ep_parts was removed: .* Delete the setting"):
        cli_train.read_settings(Path(write_settings(tmp_path, text)), [] if in_file else ["--ep_parts", "2"])


def test_packing_keeps_every_token() -> None:
    """Texts are joined with the end-of-text token between, and only the tail is dropped."""
    texts = Dataset.from_dict({"text": ["w5 w6 w7", "w8", "w9 w10 w11 w12"]})
    packed = table_data._tokenised(texts, {"text_column": "text", "sequence_length": 3}, tokenizer())
    assert packed["input_ids"][:] == [[5, 6, 7], [2, 8, 2], [9, 10, 11]]
    assert packed.column_names == ["input_ids"]
    batch = cli_data.collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]


# ---- the config of a model ----


def test_fields_that_a_model_reads_are_known() -> None:
    """Published configs have fields that transformers' classes do not declare, and their models read."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    config = make_config({"model_type": "qwen3_moe", **sizes, **experts, "head_dim": 16, "vocab_size": 8}, None)
    assert AutoModelForCausalLM.from_config(config).model.layers[0].self_attn.q_proj.weight.shape == (64, 32)
    hybrid = make_config({"model_type": "nemotron_h", "hybrid_override_pattern": "M-*"}, None)
    assert hybrid.layers_block_type == ["linear_attention", "mlp", "full_attention"]
    with pytest.raises(ValueError, match=r"unknown key model.config.head_dims; did you mean model.config.head_dim\?"):
        make_config({"model_type": "qwen3_moe", "head_dims": 16}, None)


def test_a_router_loss_that_would_be_left_out_is_refused() -> None:
    with pytest.raises(ValueError, match="router_aux_loss_coef=0.01 has no effect without .*output_router_logits"):
        make_config({"model_type": "qwen3_moe", "router_aux_loss_coef": 0.01}, None)
    config = make_config({"model_type": "qwen3_moe", "router_aux_loss_coef": 0}, None)
    assert type(config.router_aux_loss_coef) is float  # transformers itself takes no 0 for 0.0


def test_weights_with_another_config(pool: WorkerPool, tmp_path: Path) -> None:
    """`config_overrides` is what training computes with, on two ranks, and what the checkpoint says."""
    path, out = fresh(tmp_path), tmp_path / "out"
    weights = ["--model.config", "null", "--model.name_or_path", checkpoint(), "--max_steps", "1"]
    overrides = ["--model.config_overrides", "{rope_theta: 5e6, max_position_embeddings: 96}"]
    for result in pool.run(2, command, "train", path, *weights, *overrides, "--learning_rate", "0", "--tp_size", "2"):
        assert result[0] == 0, result[2]
    saved = AutoModelForCausalLM.from_pretrained(out)
    assert saved.config.rope_parameters == {"rope_type": "default", "rope_theta": 5e6}
    assert saved.config.max_position_embeddings == 96
    stock = AutoModelForCausalLM.from_pretrained(checkpoint())
    evaluated = [figures(out)[-1]]
    for model in (saved, stock):
        dataset = cli_data.load_data(check_complete(read_settings(Path(path), [])[0]), tokenizer(), 42)[1]
        batch = cli_data.collate(list(dataset))
        with torch.no_grad():
            evaluated.append(model.eval()(**batch).loss.item())
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5) and evaluated[2] != pytest.approx(
        evaluated[1], rel=1e-4
    )


@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_other_positions_scale_those_of_the_weights(tmp_path: Path, field: str) -> None:
    """A scaling keeps the base of a model, and scales from the length that it was trained with."""
    LlamaConfig(rope_theta=5e5, max_position_embeddings=64).save_pretrained(tmp_path)
    longer = {field: {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 256}
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5, "original_max_position_embeddings": 64}
    assert changed_config(str(tmp_path), longer).rope_parameters == yarn
    assert changed_config(str(tmp_path), {**longer, "rope_theta": 1e6}).rope_parameters == {**yarn, "rope_theta": 1e6}
    changed_config(str(tmp_path), longer).save_pretrained(tmp_path)
    off = {"rope_type": "default", "rope_theta": 5e5}
    assert changed_config(str(tmp_path), {field: None}).rope_parameters == off
    with pytest.raises(ValueError, match="rope_parameters"):
        changed_config(str(tmp_path), {field: "yarn"})


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"rope_thetta": 1}, "did you mean model.config_overrides.rope_theta?"),
        ({"num_attention_heads": 5}, "model.config_overrides"),
        ({"intermediate_size": 50}, "but the config implies"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors"),
        ({"rope_theta": "1e6x"}, "model.config_overrides.rope_theta='1e6x' must be a number above 0"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(tmp_path: Path, overrides: dict[str, Any], says: str) -> None:
    path, changed = fresh(tmp_path), ["--model.config_overrides", json.dumps(overrides)]
    assert "needs model.name_or_path" in one_line(command("train", path, *changed))
    weights = ["--model.config", "null", "--model.name_or_path", checkpoint()]
    assert says in one_line(command("train", path, *weights, *changed))

"""The examples: two scripts that must stay the same but for imports and sizes, data preparation, a run in a bucket."""

import difflib
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from faulty_s3 import FaultyS3
from pool import WorkerPool
from test_cli import command
from transformers import TrainerCallback

from hf_nanotron.cli.settings import check_complete, read_settings

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PAIR = EXAMPLES / "from_stock_trainer"


def changed_lines() -> tuple[list[str], list[str]]:
    """Return the lines only the stock script has, and those only the parallel script has; blank lines left out."""
    stock = (PAIR / "train_stock.py").read_text().splitlines()
    parallel = (PAIR / "train_parallel.py").read_text().splitlines()
    diff = list(difflib.unified_diff(stock, parallel, n=0, lineterm=""))[2:]
    removed = [line[1:].strip() for line in diff if line.startswith("-")]
    added = [line[1:].strip() for line in diff if line.startswith("+")]
    return [line for line in removed if line], [line for line in added if line]


def test_scripts_differ_only_in_imports_and_sizes() -> None:
    """What a user of the stock Trainer has to change is imports, sizes, and `parallel=` where the model is made."""
    an_import = re.compile(r"from (transformers|hf_nanotron) import ")
    a_size = re.compile(r"(tp_size|pp_size)=\d+,$")
    removed, added = changed_lines()
    model_before = [line for line in removed if not an_import.match(line)]
    model_after = [line for line in added if not an_import.match(line) and not a_size.match(line)]
    assert len(model_before) == len(model_after) == 1
    assert model_after[0] == model_before[0].replace("(config)", "(config, parallel=args.parallel)")
    assert any(a_size.match(line) for line in added)


def test_readme_shows_the_diff() -> None:
    """The diff in the README is the diff of the two files."""
    shown = re.search(r"```diff\n(.*?)```", (PAIR / "README.md").read_text(), re.DOTALL)
    assert shown is not None
    lines = shown.group(1).splitlines()[2:]
    removed = [line[1:].strip() for line in lines if line.startswith("-") and line[1:].strip()]
    added = [line[1:].strip() for line in lines if line.startswith("+") and line[1:].strip()]
    assert (removed, added) == changed_lines()


def load(name: str, path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    """The data preparation script, as a module."""
    return load("prepare", EXAMPLES / "stdlib_llama" / "prepare.py")


def test_prepare(prepare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A small corpus gives a tokenizer that loses nothing, and blocks of one length that hold their own labels."""
    from datasets import load_from_disk
    from transformers import AutoTokenizer

    arguments = ["--output-dir", str(tmp_path), "--max-chars", "300000", "--vocab-size", "512", "--block-size", "64"]
    prepare.main(arguments)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    data = load_from_disk(str(tmp_path / "data"))

    text = "def f(x):\n    return  x + 1  # naïve\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 512
    assert tokenizer.eos_token_id != tokenizer.pad_token_id

    for split in ("train", "eval"):
        blocks = data[split]
        assert len(blocks) > 0
        assert all(len(block) == 64 and max(block) < 512 for block in blocks["input_ids"])
        assert blocks["labels"] == blocks["input_ids"]
    # A file ends with the end-of-text token, so the model can learn to stop.
    assert any(tokenizer.eos_token_id in block for block in data["train"]["input_ids"])

    capsys.readouterr()
    prepare.main(arguments)
    assert "already prepared" in capsys.readouterr().out


def test_prepare_says_when_the_corpus_is_too_small(prepare: ModuleType, tmp_path: Path) -> None:
    """A vocabulary that the corpus cannot fill is refused, and nothing is left that a second call would trust."""
    with pytest.raises(SystemExit, match="--vocab-size"):
        prepare.main(["--output-dir", str(tmp_path), "--max-chars", "20000", "--vocab-size", "8192"])
    assert not (tmp_path / "prepared.json").exists()


# ---- remote_checkpoints ----


def train_in_a_bucket(endpoint: str, *arguments: str) -> list[dict[str, float]]:
    names = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**names, "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1"}.items():
            patch.setenv(name, value)
        module = load("remote_train", EXAMPLES / "remote_checkpoints" / "train.py")
        trainer = module.main(["--url", "s3://example/run", "--save-steps", "2", *arguments])
        trainer.mesh.close()
        return trainer.state.log_history


def test_a_run_in_a_bucket_goes_on_from_an_empty_disk(pool: WorkerPool, tmp_path: Path) -> None:
    s3fs = pytest.importorskip("s3fs")
    server = FaultyS3()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1")
        fs = s3fs.S3FileSystem(key="a", secret="b", endpoint_url=server.endpoint, skip_instance_cache=True)
        fs.mkdir("example")
        for steps, resume in (("2", ()), ("4", ("--resume",))):
            where = ("--output-dir", str(tmp_path / f"disk-{steps}"), "--max-steps", steps)
            log = pool.run(2, train_in_a_bucket, server.endpoint, *where, *resume)[0]
        assert log[-1]["step"] == 4 and [p.name for p in (tmp_path / "disk-4").glob("checkpoint-*")] == ["checkpoint-4"]
        for step in (2, 4):
            assert fs.exists(f"example/run/checkpoint-{step}/committed.json")
    server.stop()


# ---- custom_dataloader ----


class Killed(Exception):
    """What ends a run at any place."""


class KillsAtStep(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def train_custom(kind: str, folder: str, accumulation: int, kill: int | None, *argv: str) -> list[float]:
    """Losses of the steps of a run with data of its own, which is killed before a step, and resumed, or not."""
    module = load("custom_train", EXAMPLES / "custom_dataloader" / "train.py")
    common = ["--data", kind, "--output-dir", folder, "--max-steps", "4", "--save-steps", "2"]
    common += ["--gradient-accumulation-steps", str(accumulation), *argv]
    torch.manual_seed(0)
    if kill is not None:
        with pytest.raises(Killed):
            module.main(common, [KillsAtStep(kill)])
        common.append("--resume")
    trainer = module.main(common)
    trainer.mesh.close()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["stream", "loader"])
def test_data_of_ones_own_goes_on_with_the_next_sample(pool: WorkerPool, tmp_path: Path, kind: str) -> None:
    """A run that was killed has the losses of one that was not; two ranks have those of one."""
    expected, *_ = pool.run(1, train_custom, kind, str(tmp_path / "whole"), 2, None)
    assert len(expected) == 4 and expected[3] < expected[0]
    resumed, *_ = pool.run(1, train_custom, kind, str(tmp_path / "killed"), 2, 3)
    assert resumed == pytest.approx(expected, rel=1e-6)
    for losses in pool.run(2, train_custom, kind, str(tmp_path / "two"), 1, None):
        assert losses == pytest.approx(expected, rel=1e-4)


# ---- mixture_and_stages ----


def train_mixture(folder: str) -> list[dict[str, float]]:
    module = load("mixture_train", EXAMPLES / "mixture_and_stages" / "train.py")
    sizes = ("--max-steps", "6", "--save-steps", "3", "--second-stage", "3072")
    trainer = module.main(["--data", folder, "--output-dir", f"{folder}/script", *sizes])
    trainer.mesh.close()
    return trainer.state.log_history


def train_mixture_from_yaml(path: str, *overrides: str) -> tuple[int, str]:
    return command("train", path, *overrides)[::2]


def test_a_mixture_in_stages(pool: WorkerPool, tmp_path: Path) -> None:
    """The script and the YAML file are one run, on one rank and two; rows and batch change with the stage."""
    example = EXAMPLES / "mixture_and_stages"
    prepare = load("mixture_prepare", example / "prepare.py")
    prepare.main(["--output-dir", str(tmp_path), "--max-chars", "150000", "--vocab-size", "320"])
    log, *_ = pool.run(1, train_mixture, str(tmp_path))
    settings = yaml.safe_load((example / "run.yaml").read_text().replace(" out/", f" {tmp_path}/"))
    settings["dataset"]["stages"][1]["start_tokens"] = 3072
    steps = {"max_steps": 6, "save_steps": 3, "warmup_steps": 0, "use_cpu": True, "disable_tqdm": True}
    settings["training"] |= {**steps, "lr_scheduler_kwargs": {"num_decay_steps": 2, "decay_type": "1-sqrt"}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    for result in pool.run(2, train_mixture_from_yaml, str(path), "--tp_size=2"):
        assert result[0] == 0, result[1]
    ours = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    names = [name for entry in log for name in entry if "loss" in name]
    assert {"eval_code_loss", "eval_docstrings_loss", "eval_reference_loss", "train_loss"} <= set(names)
    both = ({name: value for entry in each for name, value in entry.items() if "loss" in name} for each in (log, ours))
    expected, got = both
    assert got == pytest.approx(expected, rel=1e-4)


# That of `sft` is for TRL's parser; test_sft.py reads it.
@pytest.mark.parametrize(
    "path", sorted({*EXAMPLES.glob("*/*.yaml")} - {*EXAMPLES.glob("sft/*")}), ids=lambda path: path.name
)
def test_the_configurations_of_the_examples_are_accepted(path: Path) -> None:
    sections, _ = read_settings(path, [])
    check_complete(sections)


def test_the_scripts_of_the_examples_are_shell() -> None:
    assert shutil.which("bash")
    for script in EXAMPLES.glob("*/run.sh"):
        assert os.access(script, os.X_OK)
        subprocess.run(["bash", "-n", str(script)], check=True)


# ---- datatrove ----


def train_from_datatrove(folder: str) -> list[dict[str, float]]:
    module = load("datatrove_train", EXAMPLES / "datatrove" / "train.py")
    trainer = module.main(["--output-dir", folder, "--max-steps", "4", "--sequence-length", "64"])
    trainer.mesh.close()
    return trainer.state.log_history


def test_datatrove_tokenizes_and_two_processes_train(pool: WorkerPool, tmp_path: Path) -> None:
    pytest.importorskip("datatrove", reason="datatrove is not installed (pip install hf-nanotron[datatrove])")
    from transformers import AutoTokenizer

    from hf_nanotron.data import TokenDataset

    prepare = load("datatrove_prepare", EXAMPLES / "datatrove" / "prepare.py")
    sizes = ["--max-chars", "300000", "--vocab-size", "512", "--tasks", "2", "--workers", "1"]
    prepare.main(["--output-dir", str(tmp_path), *sizes])
    data = TokenDataset(tmp_path / "tokens", 64, documents="pack")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(data.files) == 2 and data.tokens > 50_000
    documents = data.files[0].documents
    assert documents is not None
    start, stop = documents.edges(0, 1)
    text = tokenizer.decode(data.files[0].read(int(start), int(stop)))
    assert text.endswith(tokenizer.eos_token) and text.removesuffix(
        tokenizer.eos_token
    ) in prepare.stdlib_llama().read_corpus(300_000)
    log = pool.run(2, train_from_datatrove, str(tmp_path))[0]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0] < 8 and (tmp_path / "run" / "checkpoint-4").is_dir()


def test_the_example_of_streams_resumes(tmp_path: Path) -> None:
    from test_token_stream import words

    words().save_pretrained(tmp_path / "tokenizer")
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(" ".join(f"w{3 + (number * 7 + i) % 100}" for i in range(60)))
    module = load("streaming_example", EXAMPLES / "streaming" / "train.py")
    files = ["--tokenizer", str(tmp_path / "tokenizer"), "--files", str(tmp_path / "*.txt"), "--workers", "0"]
    sizes = ["--output-dir", str(tmp_path / "out"), "--sequence-length", "16", "--global-batch", "2", "--lanes", "2"]
    assert module.main([*files, *sizes, "--max-steps", "2"]).state.global_step == 2
    resumed = module.main([*files, *sizes, "--max-steps", "4", "--resume"])
    cursor = resumed.data_cursor()
    assert cursor["samples"] == 8 and cursor["order"]["lanes"] == 2
    assert [lane["rows"] for lane in cursor["state"]["lanes"].values()] == [4, 4]


# ---- long_context ----


LONG = EXAMPLES / "long_context"


def train_long(*argv: str) -> dict[str, dict[str, float]]:
    sys.path.insert(0, str(LONG))  # as for a script
    try:
        trainer, table = load("long_train", LONG / "train.py").main(argv)
    finally:
        sys.path.remove(str(LONG))
    trainer.mesh.close()
    return table


def answers_of_stock(folder: Path, length: int, rows: int, edges: tuple[int, ...]) -> list[float]:
    """What transformers computes of a saved model: the mean loss of answers between each two of `edges`."""
    from transformers import AutoModelForCausalLM

    data = load("long_questions", LONG / "questions.py").Questions(rows, length, seed=2)
    model, sums = AutoModelForCausalLM.from_pretrained(folder), torch.zeros(len(edges) - 1, 2)
    for row in (data[place] for place in range(rows)):
        labels = row["labels"][1:]
        with torch.no_grad():
            logits = model(row["input_ids"][None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")  # zero where there is no label
        for place, (begin, end) in enumerate(itertools.pairwise(edges)):
            sums[place] += torch.stack([losses[begin:end].sum(), (labels[begin:end] >= 0).sum()])
    return (sums[:, 0] / sums[:, 1]).tolist()


@pytest.mark.parametrize("is_whole", [False, True], ids=["2 steps", "as in the README"])
def test_a_short_model_is_extended_on_two_ranks(
    pool: WorkerPool, tmp_path: Path, is_whole: bool, pytestconfig: pytest.Config
) -> None:
    """Losses by position are those of stock transformers, which reads YaRN from the saved model; far ones fall."""
    if is_whole and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    extend = load("long_extend", LONG / "extend.py")
    names = ("first", "second", "short", "extended", "long")
    first, second, short, extended, long = (str(tmp_path / name) for name in names)
    lengths, steps, rows = (
        ((128, 512, 2048, 16384), (250, 150, 80, 20), 4) if is_whole else ((32, 48, 64, 256), (2, 1, 2, 2), 2)
    )
    sizes: tuple[list[str], ...] = tuple(
        ["--sequence-length", str(length), "--max-steps", str(count), "--eval-rows", str(rows), "--learning-rate", rate]
        for length, count, rate in zip(lengths, steps, ("5e-3", "3e-3", "2e-3", "1e-3"), strict=True)
    )
    fresh = ["--max-positions", str(lengths[2])]
    stages = ((first, "16", fresh), (second, "8", ["--model", first]), (short, "2", ["--model", second]))
    for size, (folder, batch, start) in zip(sizes, stages, strict=False):
        pool.run(2, train_long, *size, "--output-dir", folder, "--per-device-train-batch-size", batch, *start)
    extend.main([short, extended, "--sequence-length", str(lengths[3])])
    with pytest.raises(SystemExit, match="is the model's own folder"):
        extend.main([short, short, "--sequence-length", str(lengths[3])])
    with pytest.raises(SystemExit, match="only rope_type 'default'"):
        extend.main([extended, long, "--sequence-length", "32768"])
    with pytest.raises(SystemExit, match=f"rows of {lengths[3]} tokens already"):
        extend.main([extended, long, "--sequence-length", str(lengths[3])])
    shared = ["--output-dir", long, "--cp-size", "2", "--model", extended, "--short", short]
    table, other = pool.run(2, train_long, *sizes[3], *shared)
    assert table == other and list(table) == ["short model", "YaRN, not trained", "trained"]
    edges = (0, lengths[2])
    while edges[-1] < lengths[3]:
        edges += (2 * edges[-1],)
    assert list(table["trained"]) == [f"{begin}-{end}" for begin, end in itertools.pairwise(edges)]
    for column, folder in (("YaRN, not trained", extended), ("trained", long)):
        stock = answers_of_stock(Path(folder), lengths[3], rows, edges)
        assert list(table[column].values()) == pytest.approx(stock, rel=1e-5, abs=1e-6)
    before, untrained, after = (list(column.values()) for column in table.values())
    assert before[1:] != untrained[1:]
    if is_whole:
        assert before[0] < 0.2 and min(before[1:]) > 1.5, before  # it finds what is near, and guesses what is far
        assert max(after) < 0.2 and after[-1] < untrained[-1] < 0.1 * before[-1], table


# ---- doremi, distillation ----


def train_example(name: str, *argv: str) -> list[dict[str, float]]:
    trainer = load(f"{name}_train", EXAMPLES / name / "train.py").main(argv)
    trainer.mesh.close()
    return trainer.state.log_history


@pytest.fixture(scope="module")
def three_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three_sets")
    prepare = load("mixture_prepare", EXAMPLES / "mixture_and_stages" / "prepare.py")
    prepare.main(["--output-dir", str(folder), "--max-chars", "150000", "--vocab-size", "320"])
    return folder


def doremi_from_yaml(folder: str, *overrides: str) -> tuple[int, str]:
    settings = yaml.safe_load((EXAMPLES / "doremi" / "real_size.yaml").read_text())
    small = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings["model"]["config"] |= {**small, "num_key_value_heads": 2, "max_position_embeddings": 128}
    settings["tokenizer"], settings["dataset"]["sequence_length"] = f"{folder}/tokenizer", 128
    names = ("code", "docstrings", "reference")
    settings["dataset"]["mixture"] = {name: {"tokens": f"{folder}/tokens/{name}", "weight": 1} for name in names}
    settings["doremi"]["reference"] = f"{folder}/reference"
    one = {"per_device_train_batch_size": 1, "warmup_steps": 0, "use_cpu": True, "disable_tqdm": True, "bf16": False}
    settings["training"] |= {**one, "output_dir": f"{folder}/yaml", "max_steps": 2, "report_to": "none"}
    path = Path(folder, "doremi.yaml")
    if int(os.environ.get("RANK", 0)) == 0:
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
    torch.distributed.barrier()
    return command("train", str(path), *overrides)[::2]


def test_weights_of_a_proxy_are_those_of_a_mixture(
    pool: WorkerPool, three_sets: Path, pytestconfig: pytest.Config
) -> None:
    """Reference, proxy, and a model that is trained by the weights; a proxy from a YAML file writes them, too.

    By default the reference and the YAML file.
    """
    run = functools.partial(pool.run, 2, train_example, "doremi", "--data", str(three_sets), "--max-steps", "3")
    run("--output-dir", f"{three_sets}/reference", "--gradient-accumulation-steps", "2")
    for code, said in pool.run(2, doremi_from_yaml, str(three_sets), "--tp_size=2"):
        assert code == 0, said
    from_yaml = json.loads((three_sets / "yaml" / "domain_weights.json").read_text())
    assert list(from_yaml) == ["code", "docstrings", "reference"]
    if not pytestconfig.getoption("full_matrix"):
        return
    proxy = ("--output-dir", f"{three_sets}/proxy", "--reference", f"{three_sets}/reference", "--pp-size", "2")
    log, other = run(*proxy)
    weights = json.loads((three_sets / "proxy" / "domain_weights.json").read_text())
    assert list(weights) == ["code", "docstrings", "reference"] and sum(weights.values()) == pytest.approx(1)
    assert len({round(weight, 6) for weight in weights.values()}) == 3
    assert [line.get("weight/code") for line in log] == [line.get("weight/code") for line in other]
    log, _ = run("--output-dir", f"{three_sets}/main", "--weights", f"{three_sets}/proxy/domain_weights.json")
    assert not [name for line in log for name in line if name.startswith("weight/")]


def test_a_teacher_is_distilled(pool: WorkerPool, three_sets: Path) -> None:
    run = functools.partial(pool.run, 2, train_example, "distillation", "--data", str(three_sets))
    run("--output-dir", f"{three_sets}/teacher", "--max-steps", "2", "--hidden-size", "96")
    sizes = ("--tp-size", "2", "--max-steps", "3", "--teacher", f"{three_sets}/teacher")
    log, _ = run("--output-dir", f"{three_sets}/student", *sizes)
    assert (three_sets / "student" / "model.safetensors").is_file() and log[0]["loss"] > 0


# ---- mup ----


def test_mup_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the base both parametrizations are the same run; at twice its width they are not. Runs are kept."""
    sweep = load("mup_sweep", EXAMPLES / "mup" / "sweep.py")
    options = ["--widths", "64", "128", "--rates", "0.004", "--steps", "10", "--length", "32", "--seeds", "1"]
    found = sweep.main([*options, "--out", str(tmp_path)])
    assert found["standard", 64, 0.004, 0] == found["spectral", 64, 0.004, 0]
    assert found["standard", 128, 0.004, 0] != found["spectral", 128, 0.004, 0]
    assert capsys.readouterr().out.count("*") == 4
    sweep.train = None
    assert sweep.main([*options, "--out", str(tmp_path)]) == found
    parabola = {2.0**exponent: (exponent + 7.25) ** 2 for exponent in (-9, -8, -7, -6)}
    assert sweep.best_rate(parabola) == pytest.approx(2**-7.25)

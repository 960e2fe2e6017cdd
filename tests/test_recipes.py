"""The recipes of the examples: the small runs end to end, and what can be known of the real ones without their size."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import yaml
from family_runs import tiny_model
from hub_server import HubServer
from pool import WorkerPool
from test_cli import command
from test_examples import load
from tiny import History, pad_batch, random_dataset, tiny_config, train_parallel, training_arguments
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline, set_seed
from transformers.utils import logging as transformers_logging

from hf_nanotron import NanotronTrainingArguments
from hf_nanotron.cli.model_config import make_config
from hf_nanotron.cli.settings import check_complete, read_settings
from hf_nanotron.models.stock.anatomy import dissect
from hf_nanotron.models.stock.families import SEES_DOCUMENTS
from hf_nanotron.models.stock.plan import carries_state, make_plan
from hf_nanotron.optim.build import names_to_decay
from hf_nanotron.training.step.micro_batches import warn_of_documents

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

# Configuration of published sizes -> the parameters that were published, in billions; processes; tokens of a step.
REAL = {
    "mamba/real_size.yaml": (8.10, 64, 768 * 8192),
    "mamba/real_size_mamba2.yaml": (2.70, 32, 512 * 2048),
    "moe/real_size.yaml": (30.5, 64, 1024 * 4096),
    "moe/real_size_bias.yaml": (16.0, 32, 512 * 8192),
    "smollm3/real_size.yaml": (3.08, 384, 576 * 4096),
    "smollm3/real_size_32k.yaml": (None, 96, 72 * 32768),
    "smollm3/real_size_64k.yaml": (None, 96, 36 * 65536),
    "continue_llama/real_size.yaml": (None, 16, 256 * 8192),
}
SIZES = ("tp_size", "pp_size", "cp_size", "ep_size")


@pytest.mark.parametrize("name", REAL)
def test_a_real_size_is_what_its_comment_says(name: str, tmp_path: Path) -> None:
    """Arguments are taken, a step has the tokens, the model has the parameters, and its weights can be cut."""
    parameters, processes, tokens = REAL[name]
    sections, _ = read_settings(EXAMPLES / name, [])
    check_complete(sections)
    training = dict(sections["training"])
    sizes = {size: training.pop(size, 1) for size in SIZES}
    remote = {key: training.pop(key) for key in list(training) if "hub" in key}
    NanotronTrainingArguments(**{**training, "output_dir": str(tmp_path), "bf16": False, "use_cpu": True}, report_to=[])
    dp = processes / math.prod(sizes[size] for size in ("tp_size", "pp_size", "cp_size"))
    samples = dp * training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    assert samples * sections["dataset"]["sequence_length"] == tokens and dp % sizes["ep_size"] == 0
    assert not remote or remote["push_to_hub"]
    if parameters is None:
        return
    config = make_config(sections["model"]["config"], None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(parameters, rel=0.005)
    plan = make_plan(dissect(model), sizes["tp_size"], sizes["ep_size"])
    assert bool(plan.styles) == (sizes["tp_size"] * sizes["ep_size"] > 1)


# ---- what recipes met in the library ----

STATES = ("mamba2", "nemotron_h", "llama", "gpt_oss")
MORE_STATES = """mamba falcon_mamba bamba falcon_h1 qwen3_next qwen3_5_text lfm2 lfm2_moe lfm3 kimi_linear minimax jamba
granitemoehybrid olmo_hybrid bailing_hybrid lara_mini inkling_text zaya qwen4_exp_text qwen3_moe deepseek_v3
gemma3 gemma3_text gemma4 gemma4_unified emu3 phi4_multimodal afmoe biogpt bloom deepseek_v4 minimax_m3_vl_text mpt opt
xglm""".split()


@pytest.mark.parametrize("family", (*STATES, *MORE_STATES))
def test_blocks_that_do_not_keep_documents_apart_are_known(family: str, request: pytest.FixtureRequest) -> None:
    """Stock transformers' logits of a packed document are those of the document alone, or a warning names the block."""
    if family in MORE_STATES and not request.config.getoption("full_matrix"):
        pytest.skip("needs --full-matrix")
    try:
        model = tiny_model(family).eval()
    except (ImportError, KeyError, ValueError) as error:
        pytest.skip(f"{family}: {error}")
    ids = torch.randint(3, 60, (1, 24), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "position_ids": torch.arange(24)[None] % 12}
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[:, 12:]
        alone = model(ids[:, 12:], position_ids=batch["position_ids"][:, 12:], use_cache=False).logits
    apart = torch.allclose(packed, alone, atol=1e-4 * float(alone.abs().max()))
    sees = model.config.get_text_config().model_type in SEES_DOCUMENTS
    assert apart == (not sees and not any(carries_state(block) for _, block in dissect(model).blocks()))


def _parts(family: str) -> Any:
    model = tiny_model(family)
    return SimpleNamespace(anatomy=dissect(model), config=model.config)


def test_states_that_cross_documents_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model, sees = (_parts(family) for family in ("mamba2", "gpt_oss"))
    whole, packed = torch.arange(8)[None], torch.arange(8)[None] % 4
    root = transformers_logging.get_logger("hf_nanotron")
    root.propagate, before = True, root.propagate
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        for batch in ({}, {"position_ids": whole}, {"position_ids": packed, "seq_idx": packed}):
            warn_of_documents(cast(dict[str, Any], batch), model)
        assert not caplog.records
        warn_of_documents({"position_ids": packed}, model)
        warn_of_documents({"position_ids": whole}, sees)
        assert len(caplog.records) == 1
        warn_of_documents({"position_ids": packed, "seq_idx": packed}, sees)
    root.propagate = before
    assert "Mamba2Mixer blocks of SimpleNamespace carry their state" in caplog.text
    assert "attention of SimpleNamespace sees all of its row" in caplog.text


def test_weights_without_decay() -> None:
    names = ["embed.weight", "layers.0.mixer.A_log", "layers.0.mixer.D", "layers.0.mixer.Dt.weight"]
    assert names_to_decay(names, [], names) == names
    assert names_to_decay(names[1:], ["A_log", r"\.D$"], names) == [names[3]]
    with pytest.raises(ValueError, match="no_weight_decay: 'embedding' is in the name of no weight; there are embed"):
        names_to_decay(names, ["embedding"], names)
    with pytest.raises(ValueError, match="no_weight_decay has an empty name"):
        NanotronTrainingArguments(output_dir="x", use_cpu=True, no_weight_decay=[""])
    with pytest.raises(ValueError, match=r"no_weight_decay: '\(' is no regular expression"):
        NanotronTrainingArguments(output_dir="x", use_cpu=True, no_weight_decay=["("])


def test_a_trainer_leaves_them_out(tmp_path: Path) -> None:
    """The losses of a stock Trainer whose own rule is narrowed in the same way, and not those of the whole rule."""
    set_seed(1)
    AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2, initializer_range=0.3)).save_pretrained(tmp_path)
    options = {"weight_decay": 20.0, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0}
    data = random_dataset(4)

    class Narrowed(Trainer):
        def get_decay_parameter_names(self, model: Any) -> list[str]:
            return [name for name in super().get_decay_parameter_names(model) if "embed_tokens" not in name]

    history = History()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    args = TrainingArguments(**training_arguments(**options))
    Narrowed(model=stock, args=args, train_dataset=data, data_collator=pad_batch, callbacks=[history]).train()
    ours = train_parallel(str(tmp_path), data, no_weight_decay=["embed_tokens"], **options)
    assert ours.losses == pytest.approx(history.losses, rel=1e-5)
    assert train_parallel(str(tmp_path), data, **options).losses[-1] != pytest.approx(history.losses[-1], rel=1e-3)


# ---- the small runs ----


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare.py` writes, small."""
    folder = tmp_path_factory.mktemp("recipes")
    prepare = load("recipes_prepare", EXAMPLES / "mixture_and_stages" / "prepare.py")
    prepare.main(["--output-dir", str(folder), "--max-chars", "150000", "--vocab-size", "320"])
    return folder


SHORT = ("--max_steps=4", "--warmup_steps=1", "--logging_steps=1", "--use_cpu", "--disable_tqdm", "--save_strategy=no")
SHORT = (*SHORT, "--gradient_accumulation_steps=2", "--per_device_train_batch_size=1")
NO_EVALUATION = "--dataset.eval=null"


def run(path: str, *overrides: str) -> tuple[int, str, list[dict[str, Any]]]:
    """On a rank: exit status, errors, and the log of a command that trains. The log is rank 0's, which writes it."""
    status, _, errors = command("train", path, *overrides)
    out = Path(read_settings(Path(path), list(overrides))[0]["training"]["output_dir"])
    state = out / "trainer_state.json"
    is_written = state.is_file() and not (dist.is_initialized() and dist.get_rank())
    return status, errors, json.loads(state.read_text())["log_history"] if is_written else []


def small(name: str, tokens: Path, folder: Path) -> str:
    """A configuration of the examples, whose `out` is made of the fixture's tokens and a folder of the test's."""
    prepared = ("tokenizer", "tokens", "held_out")
    place = lambda found: f"{tokens if found[1] in prepared else folder}/{found[1]}"  # noqa: E731
    path = folder / Path(name).name
    path.write_text(re.sub(r"\bout/(\w+)", place, (EXAMPLES / name).read_text()))
    return str(path)


def losses(log: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.full_matrix  # by default test_stages.py has stages, and test_cli_data.py those of a YAML file
def test_three_stages_and_longer_rows(pool: WorkerPool, tokens: Path, tmp_path: Path) -> None:
    """Mixtures change, the last with the rate; the second run has the weights, and the rows and theta it is given."""
    decay = "--lr_scheduler_kwargs={num_decay_steps: 1, decay_type: linear}"
    stages = ("--dataset.stages.1.start_tokens=512", "--dataset.stages.2.start_tokens=768", decay)
    path = small("smollm3/run.yaml", tokens, tmp_path)
    status, errors, log = pool.run(1, run, path, *SHORT, *stages, NO_EVALUATION)[0]
    assert status == 0, errors
    assert [entry["epoch"] for entry in log if "loss" in entry] == [0.5, 1, 2, 3] and losses(log)[-1] < losses(log)[0]
    pretrained = AutoModelForCausalLM.from_pretrained(tmp_path / "pretrained")
    assert pretrained.config.no_rope_layers == [1, 1, 1, 0]
    assert pretrained.config.rope_parameters["rope_theta"] == 5e4

    still = ("--learning_rate=0", "--cp_size=2", "--max_steps=1", NO_EVALUATION)
    status, errors, log = pool.run(2, run, small("smollm3/long.yaml", tokens, tmp_path), *SHORT, *still)[0]
    assert status == 0, errors
    long = AutoModelForCausalLM.from_pretrained(tmp_path / "long")
    assert long.config.rope_parameters["rope_theta"] == 2e6 and long.config.max_position_embeddings == 256
    kept = long.state_dict()
    assert all(torch.equal(weight, kept[name]) for name, weight in pretrained.state_dict().items())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mamba/mamba2.yaml", ("--tp_size=2", r"--no_weight_decay=[A_log, '\.D$']")),
        ("mamba/hybrid.yaml", ("--pp_size=2",)),
        ("moe/run.yaml", ()),
        ("moe/bias.yaml", ()),
    ],
)
def test_two_ranks_have_the_losses_of_one(
    pool: WorkerPool, tokens: Path, tmp_path: Path, name: str, sizes: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    if name != "mamba/hybrid.yaml" and not request.config.getoption("full_matrix"):
        pytest.skip("needs --full-matrix")
    path, few = small(name, tokens, tmp_path), ("--max_steps=3", NO_EVALUATION)
    alone = ("--ep_size=1", "--gradient_accumulation_steps=4") if not sizes else sizes[1:]
    status, errors, expected = pool.run(1, run, path, *SHORT, *few, *alone, f"--output_dir={tmp_path}/one")[0]
    assert status == 0, errors
    status, errors, got = pool.run(2, run, path, *SHORT, *few, *sizes, f"--output_dir={tmp_path}/two")[0]
    assert status == 0, errors
    assert losses(got) == pytest.approx(losses(expected), rel=1e-4) and len(losses(got)) == 3
    assert ("moe/load_max_over_mean" in got[0]) == name.startswith("moe/")
    generate = pipeline("text-generation", model=str(tmp_path / "two"))
    assert generate("def ", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("def ")


def test_a_llama_goes_on_and_is_pushed(pool: WorkerPool, tokens: Path, tmp_path: Path, pytestconfig: Any) -> None:
    """From a folder to a repository of a Hub on loopback, which stock transformers reads."""
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("needs --full-matrix")
    base = pool.run(1, run, small("continue_llama/base.yaml", tokens, tmp_path), *SHORT)[0]
    assert base[0] == 0, base[1]
    path = small("continue_llama/run.yaml", tokens, tmp_path)
    with HubServer(token="hf_loopback") as hub:
        train = [sys.executable, "-m", "hf_nanotron.cli", "train", path, *SHORT]
        push = ["--push_to_hub", "--hub_model_id=user/more", "--hub_private_repo"]
        env = {**os.environ, **hub.client_env(tmp_path / "home")}
        done = subprocess.run([*train, *push], env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        files = hub.files("user/more")
        pushed = tmp_path / "pushed"
        pushed.mkdir()
        for name, file in files.items():
            (pushed / name).write_bytes(file.data)
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    evaluated = [entry["eval_code_loss"] for entry in log if "eval_code_loss" in entry]
    assert evaluated[0] == pytest.approx(base[2][-1]["eval_code_loss"], rel=1e-5) and evaluated[-1] < evaluated[0]
    generate = pipeline("text-generation", model=str(pushed))
    assert generate("def ", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("def ")


# ---- one YAML each ----

FEW = ("--use_cpu", "--disable_tqdm", "--save_strategy=no", "--logging_steps=1", "--max_steps=2", "--warmup_steps=1")


def test_the_ancestors_first_configuration(pool: WorkerPool, tokens: Path, tmp_path: Path) -> None:
    """tp 2, pp 2 and dp 2, with the losses of one process."""
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"completion": f"def f{n}(x): return {n} + x * {n % 7}\n" * 4}) + "\n" for n in range(24))
    )
    path = str(EXAMPLES / "tiny_llama" / "run.yaml")
    text = (f"--tokenizer={tokens}/tokenizer", f"--dataset.path={tmp_path}/corpus.jsonl")
    few = (*FEW, *text, "--learning_rate=1e-2")
    alone = ("--tp_size=1", "--pp_size=1", "--gradient_accumulation_steps=2", f"--output_dir={tmp_path}/one")
    status, errors, expected = pool.run(1, run, path, *few, *alone)[0]
    assert status == 0, errors
    status, errors, found = pool.run(8, run, path, *few, f"--output_dir={tmp_path}/eight")[0]
    assert status == 0, errors
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5) and len(losses(found)) == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "eight").config.num_hidden_layers == 2


def test_the_ancestors_values(tmp_path: Path) -> None:
    """What the converter makes of the ancestor's file is what the example has."""
    from test_nanotron_config import LLAMA, convert

    theirs = copy.deepcopy(LLAMA)
    theirs["tokens"] |= {"batch_accumulation_per_replica": 1, "sequence_length": 32, "train_steps": 10}
    theirs["optimizer"]["learning_rate_scheduler"] |= {"lr_decay_steps": 8}
    converted, _, _ = convert(tmp_path, theirs)
    ours = yaml.safe_load((EXAMPLES / "tiny_llama" / "run.yaml").read_text())
    same = ours["training"].keys() - {"output_dir", "report_to"}
    assert {key: ours["training"][key] for key in same} == {key: converted["training"].get(key) for key in same}
    model = ours["model"]["config"]
    assert model == {key: converted["model"]["config"][key] for key in model}


def push_small(repo: str, source: str) -> None:
    from huggingface_hub import HfApi

    HfApi().create_repo(repo)
    HfApi().upload_folder(repo_id=repo, folder_path=source)


def test_from_the_hub_and_back(pool: WorkerPool, tokens: Path, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """A small model of a folder by default; with --full-matrix one of a Hub on loopback, and the push of the result."""
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    words = AutoTokenizer.from_pretrained(tokens / "tokenizer")
    set_seed(0)
    config = tiny_config(num_hidden_layers=2, vocab_size=len(words), max_position_embeddings=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    words.save_pretrained(base)
    text = (EXAMPLES / "from_hub_llama" / "run.yaml").read_text()
    path = tmp_path / "run.yaml"
    path.write_text(text.replace("out/tokens", f"{tokens}/tokens/code").replace("out/run", f"{tmp_path}/run"))
    few = (*FEW, "--dataset.sequence_length=32", "--gradient_accumulation_steps=2")
    if not pytestconfig.getoption("full_matrix"):
        local = (f"--model.name_or_path={base}", f"--tokenizer={base}", "--push_to_hub=false")
        status, errors, log = pool.run(2, run, str(path), *few, *local, "--tp_size=2")[0]
        assert status == 0, errors
        assert len(losses(log)) == 2 and (tmp_path / "run" / "model.safetensors").is_file()
        return
    with HubServer(token="hf_loopback") as hub:
        env = {**os.environ, **hub.client_env(tmp_path / "home")}
        script = "import sys, test_recipes; test_recipes.push_small(*sys.argv[1:])"
        place = {**env, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), env.get("PYTHONPATH", "")])}
        subprocess.run([sys.executable, "-c", script, "user/base", str(base)], env=place, check=True, timeout=600)
        train = [sys.executable, "-m", "hf_nanotron.cli", "train", str(path), *few]
        names = ["--model.name_or_path=user/base", "--tokenizer=user/base", "--hub_model_id=user/more"]
        done = subprocess.run([*train, *names], env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= hub.files("user/more").keys()
        assert hub.files("user/more")["model.safetensors"].data != (base / "model.safetensors").read_bytes()

"""Python of the pages, run as it stands there; test_docs.py only compiles it."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from pool import WorkerPool
from test_cli import tokenizer
from tiny import (
    VOCABULARY,
    History,
    StockTrainer,
    checkpoint,
    pad_batch,
    random_dataset,
    training_arguments,
)
from token_files import documents, write_ds, write_megatron
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, pipeline

from hf_nanotron import NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.data import TokenDataset

DOCS = Path(__file__).resolve().parent.parent / "docs"


def snippet(page: str, part: str, replace: Mapping[str, str] | None = None, **given: Any) -> dict[str, Any]:
    """What is defined by the block of a page that has `part`. `given` are names that the page takes for granted.

    `replace` has what a test cannot take as it stands: names of the Hub, and sizes.
    """
    text = (DOCS / page).read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if part in block)
    for old, new in (replace or {}).items():
        assert old in code, f"{page} has no {old!r} any more"
        code = code.replace(old, new)
    names = dict(given)
    exec(compile(code, page, "exec"), names)
    return names


def trained(base: type[Trainer], **options: Any) -> tuple[History, Any]:
    """A short run of ours, or of stock Trainer with the same options."""
    history, is_ours = History(), issubclass(base, NanotronTrainer)
    arguments = NanotronTrainingArguments if is_ours else TrainingArguments
    trainer = base(
        model=AutoModelForCausalLM.from_pretrained(checkpoint()),
        args=arguments(
            **training_arguments(max_steps=2, gradient_accumulation_steps=2, weight_decay=0.0, warmup_steps=0)
        ),
        train_dataset=random_dataset(8),
        data_collator=pad_batch,
        callbacks=[history],
        **options,
    )
    return history, trainer


def run(base: type[Trainer], **options: Any) -> list[float]:
    history, trainer = trained(base, **options)
    trainer.train()
    return [*history.losses, *history.norms]


def losses_and_overrides() -> dict[str, list[list[float]]]:
    focal = snippet("losses.md", "def focal")["focal"]
    ours = snippet("overrides.md", "class Shifted")["Shifted"]
    stock = type("Shifted", (StockTrainer,), {})
    stock.training_step = _of_stock(ours.training_step)
    return {
        "focal": [run(base, compute_loss_func=focal) for base in (NanotronTrainer, StockTrainer)],
        "shifted": [run(ours), run(stock), run(StockTrainer)],
    }


def _of_stock(step: Any) -> Any:
    """The same lines, in a class derived from the stock Trainer."""

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        cell = type(step.__closure__[0])(type(self))
        function = type(step)(step.__code__, step.__globals__, step.__name__, step.__defaults__, (cell,))
        return function(self, model, inputs, num_items_in_batch)

    return training_step


def test_losses_and_overrides(pool: WorkerPool) -> None:
    """As with stock Trainer."""
    (found,) = pool.run(1, losses_and_overrides)
    for name, (ours, stock, *others) in found.items():
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(stock), rtol=2e-5, atol=1e-6)
        assert all(abs(other[0] - stock[0]) > 1e-3 for other in others), name


def hooks_of_gradients() -> dict[str, Any]:
    """The mask keeps old tokens, and the callback's halved gradients are those of half the learning rate of SGD."""
    page, found = "gradients_and_weights.md", {}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "torch": torch}
    _, trainer = trained(NanotronTrainer)
    before = trainer.model.model.embed_tokens.weight.detach().clone()
    snippet(page, "mask[:32000]", trainer=trainer, **sizes)
    trainer.train()
    found["all masked"] = torch.equal(trainer.model.model.embed_tokens.weight, before)
    weights = []
    for rate, hooked in ((0.1, True), (0.05, False), (0.1, False)):
        args = NanotronTrainingArguments(
            **training_arguments(max_steps=2, optim="sgd", learning_rate=rate, weight_decay=0.0, warmup_steps=0)
        )
        model = AutoModelForCausalLM.from_pretrained(checkpoint())
        trainer = NanotronTrainer(model=model, args=args, train_dataset=random_dataset(4), data_collator=pad_batch)
        if hooked:
            snippet(page, "class Noise", trainer=trainer, TrainerCallback=TrainerCallback)
        trainer.train()
        weights.append(trainer.model.model.norm.weight.detach().clone())
    found["halved"], found["whole"] = ((weights[0] - other).abs().max().item() for other in weights[1:])
    return found


def test_hooks_of_gradients(pool: WorkerPool) -> None:
    (found,) = pool.run(1, hooks_of_gradients)
    assert found["all masked"]
    assert found["halved"] < 1e-6 < 1e-5 < found["whole"], found


# ---- whole scripts, each with a few short rows on a CPU ----

CPU = 'use_cpu=True, report_to="none", disable_tqdm=True'


def of_one_process(**options: Any) -> dict[str, Any]:
    """What a page takes for granted: arguments, a model, rows and the classes."""
    args = NanotronTrainingArguments(**training_arguments(max_steps=2, **options))
    model = AutoModelForCausalLM.from_pretrained(checkpoint())
    return {"args": args, "model": model, "rows": random_dataset(8), "NanotronTrainer": NanotronTrainer}


def first_script_and_plan(folder: str) -> dict[str, Any]:
    with contextlib.chdir(folder):
        shutil.copytree(checkpoint(), "tiny")
        tokenizer().save_pretrained("tiny")
        random_dataset(16).save_to_disk("tokenized")
        given = {"meta-llama/Llama-3.2-1B": "tiny", "max_steps=1000": "max_steps=2"}
        sizes = {"tp_size=2": "tp_size=1", "pp_size=2": "pp_size=1", "bf16=True": f"bf16=True, {CPU}"}
        snippet("../README.md", "# train.py", {**given, **sizes})
        said = pipeline("text-generation", model="out/checkpoint-2")("w5 w6", max_new_tokens=2)
        planned = NanotronTrainer(**{"train_dataset": load_from_disk("tokenized"), **_of(of_one_process(bf16=True))})
        peak = snippet("planning.md", "def peak_on", {"gpus=64": "gpus=64, run=False"})["peak_on"](planned)
    return {"generated": said[0]["generated_text"], "peak": peak}


def _of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a trainer."""
    return {name: given[name] for name in ("args", "model")}


def test_first_script_and_plan(pool: WorkerPool, tmp_path: Path) -> None:
    (found,) = pool.run(1, first_script_and_plan, str(tmp_path))
    assert found["generated"].startswith("w5 w6") and 0 < found["peak"] < 0.01


def corpora(folder: str) -> dict[str, Any]:
    """The data that pages build, and what is trained on it."""
    found: dict[str, Any] = {}
    with contextlib.chdir(folder):
        for number, name in enumerate(("web", "code", "papers", "books")):
            Path("tokens", name).mkdir(parents=True)
            texts = documents(60, seed=number)
            write_ds(Path("tokens", name, "0.ds"), texts, metadata=f"tiny|2\n{sum(map(len, texts))}\nfew")
        write_megatron(Path("code_text_document"), [[each] for each in documents(60)])
        local = {"s3://corpora/web": "tokens/web", "/data/code": "code", "4096": "16"}
        sets = snippet("token_data.md", "s3://", local)
        found["rows"] = {name: len(row) for name, row in sets["data"][0].items() if name != "domain"}
        sets = {name: sets[name] for name in ("Mixture", "web", "code")}
        found["scheduled"] = snippet("token_data.md", "schedule=", **sets)["data"].names
        sets |= {"books": TokenDataset("tokens/books", 16), "long_books": TokenDataset("tokens/papers", 32)}
        found["stages"] = snippet("token_data.md", "Stages(", **sets)["data"].names
        made = snippet(
            "recipes.md",
            "DoReMi(",
            {
                "20_000": "2",
                "tp_size=2": CPU,
                "1024": "16",
                '"fresh"': repr(checkpoint()),
                '"reference"': repr(checkpoint()),
            },
        )
        found["mixture"] = made["mixture"].parts[0].weights

        texts = [" ".join(f"w{word}" for word in each) for each in documents(20)]
        Path("corpus").mkdir()
        Dataset.from_dict({"text": texts}).to_parquet("corpus/0.parquet")
        given = of_one_process() | {"tokenizer": tokenizer()}
        few = {"4096": "16", "corpus/": f"{folder}/corpus/", "lanes=64": "lanes=2, shuffle_buffer=4"}
        streamed = snippet("streaming.md", "streaming=True", few, **given)
        streamed["trainer"].train()
        found["streamed"] = streamed["trainer"].state.global_step
        web, code = (
            type(streamed["stream"])(streamed["texts"], 16, tokenizer=tokenizer(), lanes=2, shuffle_buffer=4)
            for _ in range(2)
        )
        rows = iter(snippet("streaming.md", "StreamMixture(", web=web, code=code)["data"])
        found["of web"] = sum(int(next(rows)["domain"]) == 0 for _ in range(10))
    return found


def test_corpora(pool: WorkerPool, tmp_path: Path) -> None:
    (found,) = pool.run(1, corpora, str(tmp_path))
    assert found["rows"] == dict.fromkeys(("input_ids", "labels", "shift_labels", "position_ids"), 16)
    assert found["scheduled"] == ("web", "code")
    assert found["stages"] == ("web", "code", "books", "papers")  # of a set alone, the last part of its path
    assert sum(found["mixture"]) == pytest.approx(1) and min(found["mixture"]) > 0.1
    assert found["streamed"] == 2 and found["of web"] == 8


def rules_of_updates(folder: str) -> dict[str, Any]:
    """An optimizer of one's own, a width four times that of the base, and a teacher."""
    with contextlib.chdir(folder):
        given = {"NanotronTrainer(...": "NanotronTrainer(model=model, args=args, train_dataset=rows"}
        polar = snippet("optimizers.md", "class Polar", given, **of_one_process())
        weight = polar["model"].model.layers[0].mlp.down_proj.weight
        before = weight.detach().clone()
        polar["trainer"].train()
        moved = (weight.detach() - before).float()
        alone = torch.nn.Parameter(torch.zeros(4, 6))
        alone.grad = torch.randn(4, 6)
        polar["Polar"]([alone], lr=1.0).step()
        wide = snippet("parametrization.md", "base_hidden_size=64", {'"out"': f'"out", {CPU}'})["model"]
        layer = wide.model.layers[0].self_attn.q_proj.weight
        distil = snippet(
            "recipes.md",
            "def distil",
            {
                "tp_size=2, pp_size=2, gradient_accumulation_steps=8": f"max_steps=1, {CPU}",
                '"small"': repr(checkpoint()),
                '"large"': repr(checkpoint()),
            },
        )
        distil["distil"](random_dataset(8))
    return {
        "directions": torch.linalg.svdvals(moved / moved.norm()).max().item(),
        "alone": torch.linalg.svdvals(alone.detach()).tolist(),
        "spread": [weight.float().std().item() for weight in (layer, wide.model.embed_tokens.weight)],
        "head": wide.lm_head.weight.float().std().item(),
    }


def test_rules_of_updates(pool: WorkerPool, tmp_path: Path) -> None:
    (found,) = pool.run(1, rules_of_updates, str(tmp_path))
    assert found["directions"] < 0.5
    assert found["alone"] == pytest.approx([0.2 * 6**0.5] * 4, rel=0.01)  # in bfloat16
    assert found["spread"] == pytest.approx([0.02 / 2, 0.02], rel=0.03)  # four times the width
    assert found["head"] == pytest.approx(0.02 / 4, rel=0.03)


def fine_tuning(folder: str) -> dict[str, list[str]]:
    from sft_runs import chat_checkpoint, chats

    data = {'load_dataset("trl-lib/Capybara", split="train")': "chats"}
    one = {"tp_size=2,": f"max_steps=1, {CPU},"}
    model = chat_checkpoint()
    with contextlib.chdir(folder):
        whole = {"Qwen/Qwen3-1.7B-Base": model, "4096": "64", "=16,": "=2,", "pp_size=2": "pp_size=1"}
        snippet("trl.md", "# sft.py", {**data, **one, **whole}, chats=chats())
        snippet("trl.md", "LoraConfig(", {**data, **one, "Qwen/Qwen3-8B-Base": model}, chats=chats())
        return {name: sorted(path.name for path in Path(name).iterdir()) for name in ("chat", "adapter")}


def test_fine_tuning(pool: WorkerPool, tmp_path: Path) -> None:
    for name in ("trl", "peft"):
        pytest.importorskip(name, reason=f"{name} is not installed (pip install hf-nanotron[{name}])")
    (found,) = pool.run(1, fine_tuning, str(tmp_path))
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(found["chat"])
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(found["adapter"])
    assert not {"config.json", "model.safetensors"} & set(found["adapter"])

"""`hf-nanotron check`: what is equal on all layouts is found equal, and a fault is named by its first tensor."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from family_runs import FAMILIES
from pool import WorkerPool
from test_cli import command, one_line
from transformers import AutoConfig, AutoModelForCausalLM

from hf_nanotron import ParallelConfig
from hf_nanotron.cli.check import micro_batches
from hf_nanotron.cli.checking.arguments import on_cpu, shortened
from hf_nanotron.cli.checking.compare import TOLERANCE, compare
from hf_nanotron.cli.checking.processes import Begun, RankError, Ranks
from hf_nanotron.cli.checking.records import Activation, Piece, Record
from hf_nanotron.cli.checking.report import Check, Row, as_text
from hf_nanotron.cli.checking.rows import is_quick, own_rows, random_rows
from hf_nanotron.cli.checking.script import keywords, load_script
from hf_nanotron.cli.checking.shrink import chosen_layers, parameters, small_head_counts, smaller
from hf_nanotron.cli.checking.sizes import Layout, Reduced, covering, least_processes, reduced
from hf_nanotron.cli.errors import SettingsError
from hf_nanotron.cli.settings import check_complete, read_settings

ROOT = Path(__file__).resolve().parent.parent
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
MIXTURE = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128,
    "num_experts_per_tok": 8, "vocab_size": 151936, "output_router_logits": True,
}  # fmt: skip
QUICK = ("--steps", "2", "--sequence-length", "16")

# Faults that a script can have, and what the check is to say: the first tensor, and where it differs.
FAULTS = {
    "loss": (["tp_size", "1"], r"the loss of step 1 differs, on all ranks"),
    "collator": (["tp_size", "1"], r"the loss of step 1 differs"),
    "callback": (["tp_size", "2"], r"model\.norm\.weight differs after the update of step 1, on rank 1 \(tp 1\)"),
    "optimizer": (["tp_size", "2"], r"model\.embed_tokens\.weight differs after the update of step 1"),
    "local": (["tp_size", "1"], r"one process, micro-batches of 1: the loss of step 1 differs"),
    "buffer": (["tp_size", "1"], r"the buffer model\.layers\.1\.input_layernorm\.mean differs after step 1, on all"),
    "dropout": (
        ["zero_stage", "3"],
        r"the output of model\.layers\.1\.mlp differs in the forward of step 1, on rank 1",
    ),
    "shape": (["tp_size", "2"], r"model\.embed_tokens\.weight differs after the update of step 1"),
    "hangs": (["tp_size", "2", "--timeout", "30"], r"failed: rank 0, 1 did not finish within 30 s"),
    "none": (["average_tokens_across_devices", "false"], r"the loss of step 1 differs, on all ranks"),
    "module": (["tp_size", "1"], r"the output of model\.layers\.0\.mlp differs in the forward of step 1, on rank 1"),
}
SCRIPT = """\
import time

import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import LlamaForCausalLM, TrainerCallback

from hf_nanotron.cli.data import collate

FAULT = {fault!r}


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def loss(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs.logits[:, :-1].float(), labels[:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    processes = dist.get_world_size() if dist.is_initialized() else 1
    return total / num_items_in_batch * processes  # DistributedDataParallel would divide by them


def local(outputs, labels, num_items_in_batch=None):
    return loss(outputs, labels, (labels != -100).sum() * (dist.get_world_size() if dist.is_initialized() else 1))


def masked(rows):
    batch = collate(rows)
    if rank() == 1:
        batch["labels"][:, :8] = -100
    return batch


class Writes(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name == "model.norm.weight":
                    parameter.mul_(1 + rank())


class Sleeps(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(600 * rank())


class Mean(torch.nn.Module):
    def __init__(self, norm, size):
        super().__init__()
        self.norm = norm
        self.register_buffer("mean", torch.zeros(size))

    def forward(self, hidden):
        output = self.norm(hidden)
        self.mean.lerp_(output.detach().mean((0, 1)), 0.1)
        return output


def make_model(config):
    model = LlamaForCausalLM(config)
    layer = model.model.layers[1]
    if FAULT == "buffer":
        layer.input_layernorm = Mean(layer.input_layernorm, config.hidden_size)
    if FAULT == "dropout":
        layer.mlp.register_forward_hook(lambda module, inputs, output: F.dropout(output, 0.1))
    return model


class Sized(torch.optim.SGD):
    elementwise = True  # it is not: a step depends on how much of a tensor a rank has

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(parameter.numel() ** 0.5)
        return super().step(closure)


class Normed(torch.optim.SGD):
    elementwise = True  # it is not: a norm is of the whole tensor

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(parameter.grad.norm() + 1e-6)
        return super().step(closure)


PARTS = {{
    "loss": {{"compute_loss_func": loss}},
    "local": {{"compute_loss_func": local}},
    "hangs": {{"callbacks": [Sleeps()]}},
    "shape": {{"optimizer_cls_and_kwargs": (Sized, {{"lr": 0.01}})}},
    "collator": {{"data_collator": masked}},
    "callback": {{"callbacks": [Writes()]}},
    "optimizer": {{"optimizer_cls_and_kwargs": (Normed, {{"lr": 0.01}})}},
}}


def trainer_arguments(model, args):
    if FAULT == "module":
        mlp = model.model.layers[0].mlp
        mlp.register_forward_hook(lambda module, inputs, output: output * (1 + rank()))
    return PARTS.get(FAULT, {{}})
"""


def configuration(folder: Path, model: dict[str, Any] = LLAMA, dataset: Any = None, **training: Any) -> str:
    """The YAML file of a run that nobody would start here."""
    sections = {
        "model": {"config": model},
        "dataset": dataset or {"path": "nowhere/corpus", "text_column": "text", "sequence_length": 4096},
        "training": {
            "output_dir": str(folder / "out"),
            "max_steps": 1000,
            "bf16": True,
            "max_grad_norm": 0.5,
            **training,
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return str(path)


def checked(path: str, *argv: str) -> tuple[int, dict[str, Any]]:
    """Exit status, and the JSON object."""
    code, out, err = command("check", path, *QUICK, "--json", *argv)
    assert code in (0, 1), err
    return code, json.loads(out)


@pytest.fixture(scope="module", autouse=True)
def fork_server(pool: WorkerPool) -> None:
    """The suite's own fork server is there before a check would start one that has imported less."""
    pool.run(1, os.getpid)


# ---- runs ----


def test_layout_and_one_process_are_as_stock_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is transformers' own model and Trainer; sequence parallelism, tied heads, packed rows, clipping."""
    dataset = {"path": "nowhere/corpus", "text_column": "text", "sequence_length": 4096, "documents": "mask"}
    model = {**LLAMA, "tie_word_embeddings": True}
    path = configuration(tmp_path, model, dataset, tp_size=2, activation_checkpointing=True, lr_scheduler_type="cosine")
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    code, found = checked(path, "--processes", "2", "--against", "transformers")
    assert code == 0 and found["same"], found
    assert not [*here.iterdir(), *temporary.glob("hf-nanotron-check-*")], "nothing stays"
    assert [row["layout"] for row in found["layouts"]] == ["one process", "tp 2"]
    for row in found["layouts"]:
        assert all(row["errors"][kind] <= limit for kind, limit in TOLERANCE.items())
        assert row["errors"]["gradient"] > 0 and row["errors"]["activation"] > 0  # something was compared
    assert any(note.startswith("bf16: False instead of True") for note in found["notes"])
    assert "random tokens in three documents" in found["notes"][-1]
    assert not (tmp_path / "out").exists(), "nothing is written where the run would write"


def test_a_fault_of_a_script_is_named(tmp_path: Path) -> None:
    path, (sizes, says) = configuration(tmp_path), FAULTS["callback"]
    script = tmp_path / "parts.py"
    script.write_text(SCRIPT.format(fault="callback"), encoding="utf-8")
    code, out, err = command("check", path, *QUICK, "--processes", "2", "--set", *sizes, "--script", str(script))
    assert code == 1 and not err
    assert re.search(rf"^tp 2: {says}", out, re.MULTILINE), out
    assert out.endswith("Not the same.\n")


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_a_script_is_named(pytestconfig: pytest.Config, tmp_path: Path, fault: str) -> None:
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    path, (sizes, says) = configuration(tmp_path), FAULTS[fault]
    script = tmp_path / "parts.py"
    script.write_text(SCRIPT.format(fault=fault), encoding="utf-8")
    code, out, _ = command("check", path, *QUICK, "--processes", "2", "--set", *sizes, "--script", str(script))
    assert code == 1 and re.search(says, out), out


def test_what_the_trainer_refuses_is_refused_with_its_sentence(tmp_path: Path) -> None:
    """With the numbers of the run, not of the small model."""
    path = configuration(tmp_path, tp_size=3)
    said = one_line(command("check", path))
    assert "tp_size=3 cannot shard 32 attention heads and 8 key-value heads" in said


HOST_AND_NOISE = {
    "neftune_noise_alpha": 5.0, "activation_checkpointing": True, "activation_offload": 1.0, "optim_offload": 0.5
}  # fmt: skip
SMALL_ROWS = {
    "host memory and noise": (LLAMA, {"tp_size": 2, "zero_stage": 2, **HOST_AND_NOISE}, 4),
    "mixture": (MIXTURE, {"tp_size": 2, "ep_size": 4, "zero_stage": 2, "optim": "muon"}, 8),
    "pipeline": (LLAMA, {"pp_size": 2, "pp_schedule": "zb", "gradient_accumulation_steps": 4}, 4),
    "context": (LLAMA, {"cp_size": 2, "zero_stage": 3}, 4),
    "spectral": (LLAMA, {"tp_size": 2, "parametrization": "spectral", "base_hidden_size": 1024}, 2),
}


@pytest.mark.parametrize("name", SMALL_ROWS)
def test_layouts_are_the_same(pytestconfig: pytest.Config, tmp_path: Path, name: str) -> None:
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    model, training, processes = SMALL_ROWS[name]
    code, found = checked(configuration(tmp_path, model, **training), "--processes", str(processes))
    assert code == 0, found


def test_every_axis_by_one_command(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    code, found = checked(configuration(tmp_path, MIXTURE), "--processes", "2", "--layouts")
    assert code == 0, found
    assert len(found["layouts"]) == 15 and not [row for row in found["layouts"] if row["refused"]]


# ---- what differs ----


def record(rank: int = 0, **where: int) -> Record:
    """Of a model of one weight and one module: a step on one micro-batch of two rows of four tokens."""
    generator = torch.Generator().manual_seed(0)
    outputs, gradient, weight = (torch.randn(shape, generator=generator) for shape in ((2, 4, 3), (6,), (6,)))
    found = Record(
        rank, where, [where.get("pp", 0)], modules=["layers.0"], losses=[2.0], norms=[float(gradient.norm())]
    )
    columns = torch.arange(4).expand(2, 4)
    found.activations.append({"layers.0": [Activation(0, columns, outputs)]})
    found.gradients.append([Piece("w", (2, 3), None, (), 0, 6, gradient)])
    found.weights = [[Piece("w", (2, 3), None, (), 0, 6, weight - 0.1 * step * gradient)] for step in (0, 1)]
    found.buffers = [{"norm.mean": torch.tensor([1.0, -math.inf])} for _ in range(2)]
    return found


def halves(whole: Record) -> list[Record]:
    """The same on two tensor-parallel ranks with half of the columns and half of the tokens each, and filling."""
    found = []
    for rank in (0, 1):
        own, ranges = copy.deepcopy(whole), ((rank, rank + 1),)
        own.rank, own.where = rank, {"tp": rank}
        (noted,) = whole.activations[0]["layers.0"]
        columns = torch.tensor([[3, 0, 5], [1, 2, 9]])[rank].expand(2, 3)  # 5 and 9 only fill rows up
        values = noted.values.gather(1, columns.clamp(max=3)[..., None].expand(2, 3, 3).clone())
        own.activations[0]["layers.0"] = [
            Activation(0, columns, values.where(columns[..., None] < 4, torch.tensor(7.0)))
        ]
        for pieces in (*own.gradients, *own.weights):
            part = pieces[0].values.view(2, 3)[rank]
            pieces[0] = Piece("w", (2, 3), 0, ranges, 0, 3, part.clone())
        found.append(own)
    return found


def test_parts_of_ranks_are_compared_with_the_same_parts() -> None:
    result = compare(halves(record()), record())
    assert result.first is None and max(result.errors.values()) < 1e-6 and not result.unseen


CHANGES = {
    "initial weight": (lambda r: r.weights[0][0].values.mul_(1.01), "w", 0),
    "initial buffer": (lambda r: r.buffers[0]["norm.mean"][:1].mul_(1.01), "norm.mean", 0),
    "activation": (lambda r: r.activations[0]["layers.0"][0].values.mul_(1.01), "layers.0", 1),
    "loss": (lambda r: r.losses.__setitem__(0, 2.01), "", 1),
    "gradient": (lambda r: r.gradients[0][0].values.mul_(1.01), "w", 1),
    "norm": (lambda r: r.norms.__setitem__(0, math.nan), "", 1),
    "weight": (lambda r: r.weights[1][0].values.add_(0.1), "w", 1),
    "buffer": (lambda r: r.buffers[1]["norm.mean"][:1].mul_(1.01), "norm.mean", 1),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_the_first_difference_is_named(kind: str) -> None:
    """Whatever comes later differs as well."""
    change, name, step = CHANGES[kind]
    ranks = halves(record())
    for later in list(CHANGES)[list(CHANGES).index(kind) :]:
        CHANGES[later][0](ranks[1])
    first = compare(ranks, record()).first
    assert first is not None and (first.kind, first.name, first.step, first.ranks) == (kind, name, step, (1,))
    assert str(first).count("on rank 1 (tp 1)") == 1 and not first.error <= first.tolerance


def test_a_tensor_that_no_rank_has_differs() -> None:
    ranks = halves(record())
    for own in ranks:
        own.gradients[0].clear()
    first = compare(ranks, record()).first
    assert first is not None and (first.kind, first.ranks) == ("gradient", (0, 1))


def test_outputs_that_no_rank_has_are_told() -> None:
    """Of a module, or of some of its tokens; and those that one process could not write down either."""
    whole, ranks = record(), halves(record())
    whole.shapeless = ["layers.0.router"]
    ranks[1].activations[0].clear()
    result = compare(ranks, whole)
    assert result.first is None and result.unseen == ("layers.0", "layers.0.router")
    assert result.to_dict()["not_compared"] == ["layers.0", "layers.0.router"]
    said = as_text(Check("a model", "one process", 1, rows=[Row("tp 2", 2, compared=result)]))
    assert "\ntp 2: not compared: the outputs of layers.0, layers.0.router, of which no rank has" in said


def test_refusals_alone_are_not_called_the_same() -> None:
    """And what fails is a failure, whether or not another layout was the same."""
    same, refused = (
        Row("dp 2", 2, compared=compare(halves(record()), record())),
        Row("tp 2", 2, refused="tp_size=2 ..."),
    )
    failed = Row("cp 2", 2, failed="rank 1: ...")
    for rows, is_same, ending in (
        ([], None, "Nothing was compared."),
        ([refused], None, "Nothing was compared."),
        ([same, refused], True, "The same on every layout that was compared."),
        ([same, failed], False, "Not the same."),
    ):
        found = Check("a model", "one process", 1, rows=rows)
        assert found.is_same is is_same and as_text(found).endswith(ending)


# ---- smaller models and layouts ----


@pytest.mark.parametrize(
    ("heads", "shared", "full", "tp"), [(32, 8, 8, 4), (32, 8, 16, 2), (64, 64, 8, 4), (71, 1, 1, 1)]
)
def test_heads_divide_as_those_of_the_run(heads: int, shared: int, full: int, tp: int) -> None:
    small, small_shared = small_head_counts(heads, shared, full, tp)
    assert small % tp == 0 and small % small_shared == 0 and small <= heads
    assert small // small_shared == min(8, heads // shared)
    assert (small_shared % tp == 0) == (shared % full == 0)


def test_small_model_keeps_what_is_peculiar() -> None:
    layout = Layout(ParallelConfig(tp_size=2, pp_size=2), 4)
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=12)
    sizes = Reduced.of([layout], False)
    small = smaller(config, layout.parallel, sizes)
    kinds = [config.layer_types[index] for index in chosen_layers(config, sizes)]
    assert small.layer_types == kinds and len(set(kinds)) == 2
    assert parameters(small) < 1_000_000 and small.sliding_window < 16
    assert small.vocab_size % 24 == config.vocab_size % 24 and small.pad_token_id < small.vocab_size
    config = AutoConfig.for_model("deepseek_v3")
    small = smaller(config, layout.parallel, sizes)
    assert small.first_k_dense_replace == 1 < small.num_hidden_layers and small.n_routed_experts % small.n_group == 0


# Transformers' default has a part for pictures that stays large, layers that depend on others by number, or no values.
NOT_SMALL = {"cohere_compass_text", "dots3_note", "dots3_note_text", "gemma3", "gemma3n_text", "longcat_flash"}
NOT_SMALL |= {"phi4_multimodal", "deepseek_v2"}


def test_all_families_become_small(pytestconfig: pytest.Config) -> None:
    """From the sizes that transformers gives a family by default, if it makes a model of them; and they train."""
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    layout = Layout(ParallelConfig(), 2)
    sizes, failed = Reduced.of([layout], False), {}
    for family in FAMILIES:
        try:
            config = smaller(AutoConfig.for_model(family), layout.parallel, sizes)
            assert parameters(config) < 20_000_000
            ids = torch.randint(config.get_text_config().vocab_size, (2, 32))
            loss = AutoModelForCausalLM.from_config(config)(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            assert loss.isfinite()
        except Exception as error:
            with contextlib.suppress(Exception):
                parameters(AutoConfig.for_model(family))
                failed[family] = str(error)[:200]
    assert set(failed) <= NOT_SMALL, {name: said for name, said in failed.items() if name not in NOT_SMALL}


@pytest.mark.parametrize(
    ("sizes", "most", "name"),
    [
        ({"tp_size": 8, "pp_size": 4, "ep_size": 16}, 8, "tp 2 pp 2 (1f1b) ep 4 dp 2 (zero 1)"),
        ({"tp_size": 8, "zero_stage": 3}, 8, "tp 4 dp 2 (zero 3)"),
        ({"cp_size": 8, "tp_size": 2}, 4, "tp 2 cp 2 (auto) (zero 1)"),
        ({"pp_size": 4, "pp_layers_per_stage": (3, 4, 4, 3)}, 4, "pp 2 (1f1b) dp 2 (zero 1)"),
    ],
)
def test_large_layouts_keep_their_axes(sizes: dict[str, Any], most: int, name: str) -> None:
    layout = reduced(ParallelConfig(**sizes), most)
    assert layout.name == name and layout.processes <= most
    layout.parallel.expert_copies(layout.processes)


def test_layouts_deal_one_batch() -> None:
    layouts = [Layout(ParallelConfig(pp_size=2, pp_schedule="1f1b"), 4), *covering(True)]
    count = micro_batches(layouts, 1)
    for layout in layouts:
        assert count % layout.dp_size == 0
        layout.parallel.check_micro_batches(count // layout.dp_size)
    assert (
        micro_batches([Layout(ParallelConfig(), 2)], 1) == 2 and micro_batches([Layout(ParallelConfig(), 2)], 64) == 4
    )
    assert least_processes(ParallelConfig(ep_size=8, tp_size=2)) == 8


def test_arguments_for_the_cpu() -> None:
    given = {"bf16": True, "fp8": "tensorwise", "fp8_skip_layers": [0], "optim": "muon", "warmup_steps": 2000}
    given |= {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 500, "min_lr_ratio": 0.1},
    }
    changed, told = on_cpu(given)
    assert changed["bf16"] is False and changed["fp8"] is None and changed["muon_dtype"] == "float32"
    assert [sentence.partition(":")[0] for sentence in told] == ["bf16", "fp8"]
    assert on_cpu(HOST_AND_NOISE)[1] == [] and HOST_AND_NOISE.items() <= on_cpu(HOST_AND_NOISE)[0].items()
    beside, (said,) = on_cpu(HOST_AND_NOISE, beside_stock=True)
    assert beside["neftune_noise_alpha"] is None and said.startswith("neftune_noise_alpha: None instead of 5.0")
    short = shortened({**changed, "activation_checkpointing_layers": "8,9"}, 3, 2, 4, [0, 9])
    assert short["lr_scheduler_kwargs"] == {"num_decay_steps": 1, "min_lr_ratio": 0.1} and short["warmup_steps"] == 1
    assert short["activation_checkpointing_layers"] == [1] and short["max_steps"] == 3


# ---- rows and scripts ----


def test_rows_of_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Data that are local and tokenized are read: the first rows, cut, begun anew, with ids that the model knows."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.chdir(ROOT)
    settings, _ = read_settings(Path("examples/debugging/run.yaml"), [])
    plan = check_complete(settings)
    stored = [json.loads(line)["input_ids"] for line in open("examples/debugging/rows.jsonl", encoding="utf-8")]
    rows = own_rows(plan, None, 10, 12, 50)
    assert is_quick(plan) and len(rows) == 10
    assert [row["input_ids"] for row in rows[:8]] == [[token % 50 for token in row[:12]] for row in stored]
    assert rows[8:] == rows[:2]
    settings, _ = read_settings(Path("examples/debugging/run.yaml"), ["--dataset.text_column", "text"])
    settings["dataset"]["sequence_length"] = 16
    assert not is_quick(check_complete(settings))  # it would be tokenized first
    for tokens, there in (("nowhere/tokens", False), (str(tmp_path), True), (str(tmp_path / "*.ds"), False)):
        settings["dataset"] = {"tokens": tokens, "sequence_length": 16}
        assert is_quick(check_complete(settings)) is there  # the data of a cluster are not on a laptop


def test_random_rows_weigh_differently() -> None:
    """So that a loss which is not divided by the tokens of all ranks is another one."""
    rows = random_rows(8, 16, 100, packed=True)
    assert len({sum(label != -100 for label in row["labels"]) for row in rows}) > 1
    assert all(row["position_ids"].count(0) > 1 and len(row["position_ids"]) == 16 for row in rows)


def test_script_of_the_page(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "debugging.md").read_text(encoding="utf-8")
    text = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert text is not None
    path = tmp_path / "parts_of_the_page.py"
    path.write_text(text.group(1), encoding="utf-8")
    script = load_script(path)
    assert keywords(script, None, None) == {"callbacks": []}
    model = script.make_model(AutoConfig.for_model("llama", hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                                   num_attention_heads=1, vocab_size=8))  # fmt: skip
    assert type(model).__name__ == "LlamaForCausalLM"


# ---- processes ----


def hang(seconds: float) -> int:
    if os.environ.get("RANK") == "1":
        time.sleep(seconds)
    return os.getpid()


def test_a_rank_that_hangs_is_ended() -> None:
    expected = pytest.raises(RankError, match=r"^rank (0, )?1 did not finish within 3 s")
    with Ranks(timeout=3.0) as ranks, expected as raised:
        ranks.run(2, hang, 3600.0)
    assert not raised.value.is_refusal


def refuse_late(has_begun: bool) -> None:
    try:
        raise SettingsError("no such size")
    except SettingsError as error:
        if has_begun:
            raise Begun from error
        raise


@pytest.mark.parametrize("has_begun", [False, True])
def test_what_comes_while_it_trains_is_no_refusal(has_begun: bool) -> None:
    """Or a fault that makes ranks disagree would be taken for a layout that cannot be."""
    with Ranks(timeout=600.0) as ranks, pytest.raises(RankError, match=r"no such size$") as raised:
        ranks.run(1, refuse_late, has_begun)
    assert raised.value.is_refusal is not has_begun


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_stays_of_an_interrupted_check(
    pytestconfig: pytest.Config, tmp_path: Path, number: signal.Signals
) -> None:
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    path, script = configuration(tmp_path, tp_size=2), tmp_path / "parts.py"
    began = tmp_path / "began"
    script.write_text(
        "import os, time\n"
        "def trainer_arguments(model, args):\n"
        f"    open({str(began)!r} + os.environ.get('RANK', ''), 'w').write(str(os.getpid()))\n"
        "    time.sleep(600 if 'RANK' in os.environ else 0)\n"
        "    return {}\n"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    argv = [sys.executable, "-m", "hf_nanotron.cli", "check", path, "--processes", "2", "--script", str(script)]
    running = subprocess.Popen(argv, env={**os.environ, "TMPDIR": str(temporary)}, start_new_session=True)
    while not (Path(f"{began}0").exists() and Path(f"{began}1").exists()):
        assert running.poll() is None
        time.sleep(0.2)
    while not all(Path(f"{began}{rank}").read_text() for rank in (0, 1)):  # written, too
        time.sleep(0.05)
    ranks = [int(Path(f"{began}{rank}").read_text()) for rank in (0, 1)]
    os.kill(running.pid, number)
    statuses = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: -9}
    assert running.wait(600) == statuses[number]
    deadline = time.monotonic() + 600
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline, "ranks are still there"
        time.sleep(0.2)
    if number != signal.SIGKILL:
        assert not list(temporary.glob("hf-nanotron-check-*"))


# ---- bad input ----


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--steps", "0"], "--steps 0 must be at least 1."),
        (
            ["--script", "nowhere.py"],
            "--script nowhere.py: file not found; it is a Python file with make_model(config)",
        ),
        (["--set", "optim", "muon", "--against", "transformers"], "optim='muon' is not in transformers"),
        (["--set", "z_loss_coefficient", "1e-4", "--against", "transformers"], "z_loss_coefficient=0.0001 is not in"),
        (["--set", "tp_sise", "2"], "did you mean training.tp_size?"),
    ],
)
def test_bad_input(tmp_path: Path, argv: list[str], says: str) -> None:
    assert says in one_line(command("check", configuration(tmp_path), *argv))


def test_is_not_started_by_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "run it without torchrun" in one_line(command("check", configuration(tmp_path)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1", "has no function make_model(config) or trainer_arguments(model, args)"),
        ("def make_model(): pass", "make_model takes (); it must take (config)"),
        ("import nowhere_at_all", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_bad_scripts(tmp_path: Path, text: str, says: str) -> None:
    script = tmp_path / "bad_parts.py"
    script.write_text(text, encoding="utf-8")
    assert says in one_line(command("check", configuration(tmp_path), "--script", str(script)))

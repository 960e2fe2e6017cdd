"""The benchmarks' own arithmetic: FLOPs, floor, ratios and losses against figures worked out by hand, and one run."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from benchmark_scripts import scripts
from torch.utils.flop_counter import FlopCounterMode

MODULES = (
    "clock",
    "figures",
    "floor",
    "peer_accelerate_cp",
    "peer_torchtitan",
    "plot",
    "real_text",
    "real_text_loss",
    "rows",
    "shapes",
    "sustained",
    "throughput",
    "tokens_to_loss",
)


@pytest.fixture(scope="module")
def bench() -> Iterator[argparse.Namespace]:
    with scripts(MODULES) as modules:
        yield modules


def test_sustained_products(bench: argparse.Namespace) -> None:
    assert bench.sustained.parse_product("16384x14336x4096") == (16384, 14336, 4096)
    for text in ("16384x4096", "0x2x3", "ax2x3"):
        with pytest.raises(ValueError, match=f"--product {text}: say tokens x out x in"):
            bench.sustained.parse_product(text)
    assert bench.sustained.summary([750e12, 700e12, 690e12, 691e12, 689e12, 690e12]) == {
        "first": 750.0,
        "sustained": 690.0,
    }
    with pytest.raises(ValueError, match="4 windows"):
        bench.sustained.summary([750e12] * 4)


def test_flops_are_what_torch_counts(bench: argparse.Namespace) -> None:
    """Full attention's formula is what torch's own counter sees of a stock model, to the last FLOP."""
    config, length = bench.shapes.make_config("tiny", 64), 64
    config.tie_word_embeddings = False
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        ids = torch.zeros(1, length, dtype=torch.long)
        model(input_ids=ids).logits.sum().backward()
    shapes = bench.figures.shapes_of(config)
    formulas = bench.figures.flops_formulas(shapes, config, length)
    assert counter.get_total_flops() == formulas["full_attention"] * length
    assert formulas["parameters"] == 6 * model.num_parameters()
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    assert formulas["full_attention"] - formulas["causal"] == attention
    assert formulas["causal"] == 6 * bench.figures.matmul_weights(shapes, config) + attention


def test_parameters_of_experts(bench: argparse.Namespace) -> None:
    """Of experts, six times the parameters counts those that a token meets: two of eight here."""
    config = bench.shapes.make_config("moe-tiny", 64)
    shapes = bench.figures.shapes_of(config)
    config.num_experts_per_tok = 2
    experts = sum(torch.Size(shape).numel() for shape in shapes.values() if len(shape) == 3)
    everything = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert experts == 2 * 8 * 3 * 64 * 32
    assert bench.figures.flops_formulas(shapes, config, 64)["parameters"] == 6 * (everything - experts * 6 / 8)


def test_speed(bench: argparse.Namespace) -> None:
    figures = bench.figures.speed([2.0, 1.0, 4.0], 100.0, {"causal": 10.0, "full_attention": 20.0}, 5000.0)
    assert figures["step_ms"] == 2000 and figures["step_ms_range"] == [1000, 4000]
    assert figures["tokens_per_second_per_device"] == 50 and figures["spread"] == [25, 100]
    assert figures["mean_tokens_per_second_per_device"] == round(300 / 7)
    assert (figures["mfu"], figures["mfu_full_attention"]) == (0.1, 0.2)
    assert bench.figures.speed([1.0], 1.0, {"causal": 1.0}, None)["mfu"] is None


def test_floor(bench: argparse.Namespace) -> None:
    """Seconds of the work, one thing after the other, and a mean rate that slow products weigh down."""
    floor, config = bench.floor, bench.shapes.make_config("tiny", 64)
    shapes = bench.figures.shapes_of(config)
    work = floor.work_of(shapes, config, 64, tokens=1000, optimizer_bytes=30, shards=2)
    assert work.matmul_flops + work.attention_flops == 1000 * bench.figures.flops_formulas(shapes, config, 64)["causal"]
    assert work.optimizer_bytes == 15 * sum(torch.Size(shape).numel() for shape in shapes.values())
    rates = floor.Rates(matmul=2.0, attention=4.0, bandwidth=5.0)
    assert floor.floor_seconds(floor.Work(10.0, 20.0, 30.0), rates) == 5 + 5 + 6
    assert floor.mean_rate({"a": (30.0, 10.0), "b": (10.0, 1.0)}) == pytest.approx(40 / 13)
    with pytest.raises(ValueError, match="no product"):
        floor.mean_rate({})
    products = floor.linears(shapes, config)
    assert 3 * 2 * sum(out * size * count for (out, size), count in products.items()) * 1000 == work.matmul_flops


def row(name: str, speed: int, spread: list[int], memory: float) -> dict[str, Any]:
    figures = {"tokens_per_second_per_device": speed, "spread": spread, "mfu": None, "peak_memory_gib": memory}
    return {"name": name, "row": {}, **figures}


def test_ratios(bench: argparse.Namespace) -> None:
    rows = [row("a", 100, [80, 120], 10.0), row("b", 150, [120, 160], 5.0), {"name": "c", "out_of_memory": "x"}]
    first, second, third = bench.figures.ratios(rows, "a")
    assert first == {"name": "a", "ratio": 1.0, "range": (80 / 120, 120 / 80), "memory": 1.0}
    assert second == {"name": "b", "ratio": 1.5, "range": (1.0, 2.0), "memory": 0.5}
    assert third == {"name": "c"}
    table = bench.figures.comparison(rows, "a").splitlines()
    assert len(table) == 5 and "| 1.500 | 1.000 – 2.000 | 0.500 |" in table[3] and "out of memory" in table[4]
    for base in ("c", "d"):
        with pytest.raises(ValueError, match=f"no row named '{base}'.*a, b"):
            bench.figures.ratios(rows, base)


def test_differences_of_losses(bench: argparse.Namespace) -> None:
    """The last twenty steps count, and a bump before them shows in the largest difference of a window."""
    base = [4.0] * 20 + [2.0] * 20
    table = bench.real_text_loss.differences({"a": base, "b": [4.0] * 10 + [5.0] * 10 + [2.01] * 20})
    assert table["a"]["relative"] == table["a"]["largest_of_a_window"] == 0
    assert table["b"]["relative"] == pytest.approx(0.005) and table["b"]["largest_of_a_window"] == 0.25
    assert table["b"]["means"] == [4.0, 5.0, 2.01, 2.01]
    with pytest.raises(ValueError, match="'b' has 39 losses"):
        bench.real_text_loss.differences({"a": base, "b": base[1:]})


def test_rows_of_their_own_length(bench: argparse.Namespace) -> None:
    """A share of the steps has a schedule of its own; figures in a row are numbers."""
    row = bench.rows.parse_row("name=m,optim=muon,learning_rate=2.5e-3,optim_offload=1.0,share=0.75,documents=8-64")
    assert row["learning_rate"] == 0.0025 and row["optim_offload"] == 1.0 and row["documents"] == "8-64"
    found = bench.tokens_to_loss.of_its_length(row, 400)
    assert found["max_steps"] == 300 and found["warmup_steps"] == 30 and "share" not in found
    for share in (1.5, 0.04):
        with pytest.raises(ValueError, match=f"share={share} of 400 steps"):
            bench.tokens_to_loss.of_its_length({"share": share}, 400)


def test_real_text(bench: argparse.Namespace) -> None:
    """Text comes back from its tokens, and blocks hold every token once but for the rest."""
    texts = bench.real_text.documents(0.1)
    assert sum(map(len, texts)) > 2**16
    texts = [text[:500] for text in texts[:40]]
    tokenizer = bench.real_text.byte_pairs(texts, 400)
    assert tokenizer.decode(tokenizer.encode(texts[0]).ids) == texts[0]
    found = bench.real_text.blocks(texts, tokenizer, 32)
    count = sum(len(tokenizer.encode(text).ids) + 1 for text in texts)
    assert len(found) == count // 32 and {len(block) for block in found} == {32}


@pytest.mark.parametrize("shape", ["tiny", "1b", "8b-10"])
def test_torchtitan_shapes(bench: argparse.Namespace, shape: str) -> None:
    """Its rule for the inner size of an MLP gives ours."""
    config = bench.shapes.make_config(shape, 4096)
    fields = bench.peer_torchtitan.model_fields(config, 4096)
    inner = int(fields["ffn_dim_multiplier"] * int(2 * 4 * fields["dim"] / 3))
    multiple = fields["multiple_of"]
    assert multiple * -(-inner // multiple) == config.intermediate_size


def test_attention_of_packed_rows(bench: argparse.Namespace, tmp_path: Path) -> None:
    """Of the documents in the timed steps, not of others."""
    watch = bench.clock.Watch(2, 3)
    config = bench.shapes.make_config("tiny", 64)
    task = bench.rows.Task("tiny", config, 64, watch, False, tmp_path, documents=(2, 64))
    rows = bench.rows.packings((2, 64), 64, 40)
    assert all(sum(row) == 64 for row in rows)
    expected = [sum(length**2 for length in row) / 64 for row in rows[4:10]]
    assert bench.rows.seen_length(task, 2) == pytest.approx(sum(expected) / 6)
    task.documents = None
    assert bench.rows.seen_length(task, 2) == 64.0


def test_torchtitan_refuses_other_families(bench: argparse.Namespace) -> None:
    with pytest.raises(ValueError, match="'qwen3_moe'.*only Llama shapes"):
        bench.peer_torchtitan.model_fields(bench.shapes.make_config("moe-tiny", 64), 64)


def test_context_parallelism_of_accelerate(bench: argparse.Namespace) -> None:
    """Its fields become arguments of stock Trainer; a row that divides nothing would be another's figure."""
    row = {"cp_size": 2, "activation_checkpointing": True, "per_device_train_batch_size": 1}
    fields = bench.peer_accelerate_cp.arguments(row)
    assert fields["parallelism_config"].cp_size == 2 and "cp_size" not in fields
    assert fields["fsdp"] and fields["fsdp_config"] == {"activation_checkpointing": True}
    assert "activation_checkpointing" not in fields and fields["per_device_train_batch_size"] == 1
    with pytest.raises(ValueError, match="cp_size=1: it divides samples over 2 ranks"):
        bench.peer_accelerate_cp.arguments({})


def test_plot(bench: argparse.Namespace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row("a", 100, [80, 120], 10.0), {"name": "b", "row": {}, "out_of_memory": "x"}]
    rows[0]["floor"] = {"tokens_per_second_per_device": 200, "mfu": 0.6}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    bench.plot.draw(bench.plot.read(tmp_path / "rows.jsonl"), "title").savefig(tmp_path / "rows.svg")
    assert (tmp_path / "rows.svg").stat().st_size > 1000
    (tmp_path / "none.jsonl").write_text(json.dumps(rows[1]))
    with pytest.raises(ValueError, match="no row with figures"):
        bench.plot.read(tmp_path / "none.jsonl")


def test_one_run(bench: argparse.Namespace, tmp_path: Path) -> None:
    """Ours and stock: as many marks as steps, each timed step once, first and last loss of the same data."""
    cli = argparse.Namespace(shape="tiny", sequence_length=16, warmup_steps=2, timed_steps=3, bf16=False, profile=False)
    cli.profiled_steps = 2
    cli.per_device_train_batch_size, cli.samples_per_step, cli.largest_batch, cli.floor = "auto", 2, 8, True
    cli.out = tmp_path / "rows.jsonl"
    assert bench.throughput.run_here("name=ours", cli) and bench.throughput.run_here("trainer=stock", cli)
    ours, stock = map(json.loads, cli.out.read_text().splitlines())
    assert (ours["name"], stock["name"]) == ("ours", "trainer=stock")
    for result in (ours, stock):
        assert (result["micro_batch"], result["micro_batches"], result["timed_steps"]) == (2, 1, 3)
        assert result["tokens_per_second_per_device"] == pytest.approx(32e3 / result["step_ms"], rel=0.01)
        assert 8.0 < result["last_loss"] < 9.0 and 8.0 < result["first_loss"] < 9.0  # log(4096) is 8.3
        low, high = result["step_ms_range"]
        assert low <= result["step_ms"] <= high
    assert ours["parameters"] == stock["parameters"] == 4458752


def test_marks_do_not_make_our_trainer_wait(bench: argparse.Namespace) -> None:
    """The clock uses none of the events at which weights that are on their way must have arrived."""
    from transformers import TrainerCallback

    events = ("on_optimizer_step", "on_step_end", "on_step_begin", "on_epoch_begin", "on_epoch_end", "on_save")
    for event in events:
        assert getattr(bench.rows.Record, event) is getattr(TrainerCallback, event)


def test_watch_counts_steps(bench: argparse.Namespace, tmp_path: Path) -> None:
    """Warm-up, timed steps, two that are traced, one that logs; the trace is there after them."""
    watch = bench.clock.Watch(warmup=2, timed=3, trace=tmp_path / "trace.json")
    assert watch.steps == 8 and bench.clock.Watch(warmup=2, timed=3).steps == 6
    for _ in range(watch.steps):
        watch.mark()
    assert len(watch.seconds()) == 3 and watch.trace.exists()
    with pytest.raises(ValueError, match="9 intervals from mark 0 on, but there are 8 marks"):
        watch.clock.seconds(0, 9)

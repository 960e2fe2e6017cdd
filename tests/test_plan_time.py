"""The seconds of a plan: beside measured steps, published formulas of schedules, and torch's own count of FLOPs."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_scripts import scripts
from pool import WorkerPool
from tiny import message, tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from hf_nanotron.cli import main
from hf_nanotron.monitor.gpus import GPUS, find_gpu
from hf_nanotron.parallel.config import ParallelConfig
from hf_nanotron.parallel.mesh import ParallelMesh
from hf_nanotron.parallel.pipeline.schedule import Action, build_table, compute_order
from hf_nanotron.plan.default_rates import assumed_links, default_rates, refuse_other_gpu
from hf_nanotron.plan.job import Job
from hf_nanotron.plan.layer_time import optimizer_seconds
from hf_nanotron.plan.layer_work import WorkTable, seen_keys
from hf_nanotron.plan.links import collective_seconds
from hf_nanotron.plan.measure_links import groups_to_measure
from hf_nanotron.plan.measure_rates import measure_rates
from hf_nanotron.plan.options import Options
from hf_nanotron.plan.rates import LinkRate, load_rates, product_seconds
from hf_nanotron.plan.schedule_time import play
from hf_nanotron.plan.step_time import step_time
from hf_nanotron.plan.weights import ModelWeights

H200 = default_rates("h200")
MOE = {
    "moe_intermediate_size": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "experts_implementation": "eager",
}


def job(config: Any = None, world_size: int = 1, gpus_per_node: int = 8, length: int = 4096, **arguments: Any) -> Job:
    said = {"bf16": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, **arguments}
    return Job(config or llama(), said, world_size, gpus_per_node, length)


def llama(**sizes: Any) -> Any:
    """Large enough that the host is not what a step waits for."""
    wide = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    return tiny_config(**{**wide, "num_hidden_layers": 16, "vocab_size": 32000, **sizes})


# ---- measured steps ----


@pytest.fixture(scope="module")
def measured() -> list[Any]:
    """The measured rows with their predictions."""
    with scripts(["plan_accuracy"]) as found:
        return list(found.plan_accuracy.predict())


def errors(rows: list[Any]) -> tuple[float, float]:
    sizes = [abs(row.predicted.seconds / row.measured - 1) for row in rows]
    return statistics.median(sizes), max(sizes)


def test_measured_steps(measured: list[Any]) -> None:
    """Median and worst error over the rows that set nothing; they are more than half of all."""
    tests = [row for row in measured if row.said["use"] == "test"]
    (median, worst), (every_median, every_worst) = errors(tests), errors(measured)
    rows = measured
    assert len(tests) > len(rows) / 2 and len(tests) >= 40
    assert median <= 0.08 and worst <= 0.15
    assert every_median <= 0.08 and every_worst <= 0.15
    kinds = {key for row in tests for key in row.said["arguments"]}
    assert {"tp_size", "pp_size", "cp_size", "fp8", "zero_stage", "activation_checkpointing_policy"} <= kinds


def test_measured_rows_are_those_of_the_notebook() -> None:
    """Each number of tokens/s is printed in the notebook."""
    with scripts(["measured"]) as found:
        rows = found.measured.read("measured_rows.json")
        text = (found.measured.FOLDER / "NOTEBOOK.md").read_text(encoding="utf-8")
    step_alone = [row["name"] for row in rows if f"{row['tokens_per_second']:,}" not in text]
    assert step_alone == ["mixture, ep 2, micro-batches of 1"] and "a step of 726 ms" in text  # said as a time there
    assert all(row["section"] in text for row in rows)


def test_a_state_on_the_host_takes_what_was_measured() -> None:
    """An optimizer's step over 10^9 elements with fp32 moments ("The optimizer's state on the host"), on one H200."""
    on_device = Options(
        item=2, compiled=True, fp8=False, fp8_skipped=frozenset(), policy="none", recomputed=None, offload=0.0,
        mlp_chunks=False, optimizer="adamw_torch_fused", moment=4, state_offload=0.0, capacity=False,
    )  # fmt: skip
    on_host = replace(on_device, state_offload=1.0)
    assert optimizer_seconds(H200, on_device, 1e9, list, 1) == pytest.approx(0.008, rel=0.2)
    assert optimizer_seconds(H200, on_host, 1e9, list, 1) == pytest.approx(0.264, rel=0.05)


def test_parts_and_timeline_add_up(measured: list[Any]) -> None:
    for row in measured:
        step = row.predicted
        assert sum(step.parts.values()) == pytest.approx(step.seconds, rel=1e-6), row.said["name"]
        assert max(interval.end for interval in step.timeline) <= step.seconds
        assert 0 <= step.bubble < 1 and 0 <= step.exposed_communication < step.seconds
        if row.said["mfu"]:  # the plan counts FLOPs as the run did, so both MFUs differ as the seconds do
            assert step.mfu * step.seconds / row.measured == pytest.approx(row.said["mfu"], rel=0.01)


# ---- schedules ----


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("micro_batches", [8, 32])
def test_bubbles_of_published_schedules(size: int, micro_batches: int) -> None:
    """With stages as long as each other and transfers of no time: (p - 1) / m of the ideal time, divided by the stages
    of a rank where they are interleaved (Narayanan et al. 2021, arXiv:2104.04473, section 2.2), and a third of it in
    ZB-H1 (Qi et al. 2023, arXiv:2401.10241, table 1), where backwards are twice forwards."""
    lengths = {"F": 1.0, "B": 2.0, "W": 0.0}
    for schedule, virtual, idle in (
        ("afab", 1, (size - 1) / micro_batches),
        ("1f1b", 1, (size - 1) / micro_batches),
        ("interleaved_1f1b", 2, (size - 1) / micro_batches / 2),
    ):
        table = build_table(compute_order(schedule, size, virtual, micro_batches), size * virtual)
        played = play(table, lambda action: lengths[action.kind], lambda transfer: 0.0)
        found = played.end / (3.0 * micro_batches * virtual) - 1
        if size == 8 and virtual == 2:  # both ranks of a transfer must have come to it, which the formula leaves out
            assert idle <= found <= 1.3 * idle
        else:
            assert found == pytest.approx(idle), schedule
    table = build_table(compute_order("zb", size, 1, micro_batches), size)
    played = play(table, lambda action: 1.0, lambda transfer: 0.0)
    assert played.end / (3.0 * micro_batches) - 1 == pytest.approx((size - 1) / micro_batches / 3)


@pytest.mark.parametrize("schedule", ["afab", "1f1b", "interleaved_1f1b", "zb"])
def test_played_tables_keep_what_is_needed(schedule: str) -> None:
    """With any durations: a rank does one thing at a time in the order of its table, and nothing before its input."""
    draw = random.Random(0)
    virtual = 2 if schedule == "interleaved_1f1b" else 1
    for size, micro_batches in ((2, 3), (3, 7), (4, 8)):
        orders = compute_order(schedule, size, virtual, micro_batches)
        stages = size * virtual
        travel = draw.uniform(0.0, 2.0)
        played = play(build_table(orders, stages), lambda action: draw.uniform(0.1, 3.0), lambda transfer, t=travel: t)
        ends: dict[Action, float] = {}
        starts: dict[Action, float] = {}
        for rank, order in enumerate(orders):
            assert [action for action, _, _ in played.actions[rank]] == list(order)
            for (_, _, end), (_, start, _) in zip(played.actions[rank], played.actions[rank][1:], strict=False):
                assert start >= end
            starts |= {action: start for action, start, _ in played.actions[rank]}
            ends |= {action: end for action, _, end in played.actions[rank]}
        for action, start in starts.items():
            if action.kind == "F" and action.stage:
                assert start >= ends[Action("F", action.stage - 1, action.micro_batch)] + travel - 1e-9
            if action.kind == "B" and action.stage + 1 < stages:
                assert start >= ends[Action("B", action.stage + 1, action.micro_batch)] + travel - 1e-9


# ---- work ----


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_flops_are_those_that_torch_counts(family: str) -> None:
    """Products of a whole model, of one tp rank times their number, and pairs that attention sees."""
    config = tiny_config("llama") if family == "llama" else tiny_config("qwen3_moe", **MOE)
    config._attn_implementation = "eager"
    tokens = 16
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.randint(0, 100, (1, tokens)))
    works = WorkTable(ModelWeights(config))
    for tp in (1, 2):
        work = works.of(ParallelConfig(tp_size=tp))
        found = 2.0 * tokens * math.prod(work.head) * tp
        for layer in work.layers:
            for shape in (*layer.mixing, *layer.mlp):
                cut = 1 if shape == (6, 32) and family != "llama" else tp  # the router is whole on each rank
                found += 2.0 * tokens * math.prod(shape) * cut
            found += sum(2.0 * tokens * layer.top_k * math.prod(shape) * tp for shape in layer.expert)
            # Eager attention computes whole squares.
            found += 2.0 * layer.heads * tp * (layer.key_width + layer.value_width) * tokens * tokens
        rotary = 2.0 * tokens * config.hidden_size // config.num_attention_heads // 2  # angles, as a product
        assert counter.get_total_flops() == pytest.approx(found, abs=rotary * 1.01)


def test_seen_keys() -> None:
    """Against a count of pairs: half a square for each document, and a band for a window."""
    for documents, window in (((64,), None), ((40, 24), None), ((64,), 16), ((40, 24), 16)):
        pairs = sum(min(i, window or i) for length in documents for i in range(length))
        assert seen_keys(documents, window) == pytest.approx(pairs, rel=0.04)


def test_what_costs_more_takes_longer() -> None:
    """The order of seconds of neighbouring choices, none of which a constant may turn around."""
    plain = step_time(job(), H200).seconds
    both = {"activation_checkpointing": True}
    kept = step_time(job(**both, activation_checkpointing_policy="selective"), H200).seconds
    attention = step_time(job(**both, activation_checkpointing_policy="all_but_attention"), H200).seconds
    full = step_time(job(**both), H200).seconds
    assert plain < kept < attention < full
    some = step_time(job(**both, activation_checkpointing_layers=[0, 1]), H200).seconds
    assert plain < some < full
    assert step_time(job(fp8="tensorwise"), H200).seconds < plain
    assert step_time(job(fp8="tensorwise", fp8_skip_layers=[0, -1]), H200).seconds < plain
    assert step_time(job(torch_compile=False), H200).seconds > plain
    assert step_time(job(optim_offload=1.0), H200).seconds > plain
    assert step_time(job(optim="muon"), H200).seconds > plain
    assert step_time(job(length=8192), H200).seconds > 2 * plain * 0.95
    packed = replace(job(), documents=(1024,) * 4)
    assert step_time(packed, H200).seconds < plain
    assert step_time(job(bf16=False), H200).seconds > 5 * plain
    for gpu in GPUS:
        if gpu.bf16 < 900e12 and gpu.memory < 4e12:
            assert step_time(job(), default_rates(gpu)).seconds > plain


def test_placement() -> None:
    """Communication between hosts is slower than inside one, and tensor parallelism suffers most."""
    for sizes in ({"tp_size": 4}, {"pp_size": 4}, {"cp_size": 4}, {}, {"zero_stage": 3}):
        inside = step_time(job(world_size=4, **sizes), H200)
        between = step_time(job(world_size=4, gpus_per_node=1, **sizes), H200)
        assert between.seconds > inside.seconds, sizes
        assert between.exposed_communication > inside.exposed_communication
    slow = step_time(job(world_size=4, gpus_per_node=1, tp_size=4), H200).seconds
    assert slow > 1.3 * step_time(job(world_size=4, gpus_per_node=1, pp_size=4), H200).seconds


def test_collectives() -> None:
    """Latency and bytes of a ring (Thakur et al. 2005), and a network adapter for each rank of a group on a host."""
    links = (LinkRate("all_gather", 8, 1e-5, 100e9), LinkRate("all_gather", 4, 2e-5, 10e9, "between"))
    rates = replace(H200, links=links)
    assert collective_seconds(rates, "all_gather", 8e9, range(8), 8) == pytest.approx(1e-5 + 0.07)
    assert collective_seconds(rates, "all_gather", 8e9, range(0, 32, 8), 8) == pytest.approx(4e-5 + 0.6)
    assert collective_seconds(rates, "all_gather", 8e9, range(32), 8) == pytest.approx(4e-5 + 31 / 32 * 0.1)
    assert collective_seconds(rates, "all_reduce", 8e9, range(8), 8) == pytest.approx(1e-5 + 0.14)
    assert collective_seconds(rates, "all_gather", 8e9, range(1), 8) == 0
    inside = replace(rates, links=links[:1])
    text = message(lambda: collective_seconds(inside, "send", 1.0, (0, 8), 8))
    assert "have no link between hosts" in text and "bench --rates" in text


def test_products_of_measured_sizes_take_what_was_measured() -> None:
    for rate in H200.products:
        found = product_seconds(H200, rate.tokens, rate.inner, rate.outer, rate.kind)
        assert found == pytest.approx(rate.seconds, rel=0.03)
    large = product_seconds(H200, 16384, 4096, 4096, "forward")
    assert 64 * product_seconds(H200, 256, 4096, 4096, "forward") > 1.2 * large  # small ones move more bytes


def test_links_that_were_not_measured() -> None:
    """A file of one GPU serves for plans of many, with the data sheet's links; of an unknown GPU it does not."""
    alone = replace(H200, links=())
    many = job(world_size=16, tp_size=2)
    assert step_time(many, alone).seconds == step_time(many, H200).seconds
    inside = replace(H200, links=tuple(replace(x, bytes_per_second=1e9) for x in H200.links if x.place == "inside"))
    assert step_time(many, inside).seconds > 2 * step_time(many, H200).seconds  # what was measured stays
    assert "no link between GPUs of a host" in message(lambda: step_time(many, replace(alone, gpu="NVIDIA X1")))
    assert step_time(job(), replace(alone, gpu="NVIDIA X1")).mfu is None


def test_links_that_were_not_measured_are_named() -> None:
    assert assumed_links(H200, 2, 8) is None
    assert assumed_links(H200, 8, 8) == "Not measured: links between more than 2 GPUs of a node."
    both = "links between more than 2 GPUs of a node and between nodes (90% of the data sheet's)."
    assert assumed_links(H200, 16, 8) == f"Not measured: {both}"
    assert assumed_links(default_rates("a100"), 2, 8) == "Not measured: links between GPUs of a node."
    own = replace(H200, made={"date": "2026-01-01"})
    assert assumed_links(own, 16, 8) is None
    inside = replace(own, links=tuple(link for link in own.links if link.place == "inside"))
    assert assumed_links(inside, 16, 8) == "Not measured: links between nodes (90% of the data sheet's)."


def test_rates_of_another_gpu() -> None:
    refuse_other_gpu(H200, find_gpu("h200"))
    refuse_other_gpu(replace(H200, gpu="NVIDIA H200"), find_gpu("h200"))
    refuse_other_gpu(replace(H200, gpu="NVIDIA X1"), find_gpu("h100"))  # the most similar in the table
    assert "are of h200, and the plan is for h100" in message(lambda: refuse_other_gpu(H200, find_gpu("h100")))
    cpu = replace(H200, gpu="some CPU", made={"device_type": "cpu"})
    assert "are of a CPU, and the plan is for h100" in message(lambda: refuse_other_gpu(cpu, find_gpu("h100")))


# ---- what is refused ----


def test_refusals(tmp_path: Path) -> None:
    text = message(lambda: find_gpu("H1000"))
    assert text.startswith("GPU 'H1000' is not in the table; it has h100-pcie, ") and text.count(".") == 1
    assert all(gpu.name in text for gpu in GPUS)
    assert "have no FP8 products" in message(lambda: step_time(job(fp8="tensorwise"), default_rates("a100")))
    assert "tp_size" in message(lambda: step_time(job(tp_size=3, world_size=3), H200))
    assert "gradient_accumulation_steps=1" in message(
        lambda: step_time(job(pp_size=2, world_size=2, gradient_accumulation_steps=1), H200)
    )
    assert "pipeline stages" in message(
        lambda: step_time(job(pp_size=32, world_size=32, gradient_accumulation_steps=32), H200)
    )
    path = tmp_path / "rates.json"
    H200.write(path)
    assert load_rates(path) == H200
    good = json.loads(path.read_text())
    for change, said in (
        ({"format": 2}, "of format 1"),
        ({"memory": 0}, "memory=0 must be a positive number"),
        ({"memory": float("inf")}, "must be a positive number"),
        ({"products": []}, "it has no products"),
        ({"products": [{**good["products"][0], "kind": "sideways"}]}, "'sideways'"),
        ({"attention": [{"head_dim": 64}]}, "is damaged"),
        ({"more": 1}, "not 'more'"),
        ({"gpu": None}, "gpu=None must be of type str"),
        ({"made": []}, "made=[] must be of type Mapping"),
    ):
        path.write_text(json.dumps({**good, **change}))
        text = message(lambda: load_rates(path))
        assert said in text and "hf-nanotron bench --rates" in text and str(path) in text, text
    for content in (b"", b"\xff\xfe", b"[1]"):
        path.write_bytes(content)
        assert str(path) in message(lambda: load_rates(path))
    assert "cannot be read" in message(lambda: load_rates(tmp_path / "none.json"))


def test_names_of_gpus() -> None:
    for gpu in GPUS:
        assert find_gpu(gpu.name.upper()) is gpu and find_gpu(gpu.name.replace("-", " ")) is gpu
    for driver, name in {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100 80GB PCIe": "a100",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA GH200 480GB": "gh200",
        "AMD Instinct MI325X": "mi325x",
    }.items():
        assert find_gpu(driver).name == name
    assert find_gpu("h100").bytes_ == 81559 * 2**20  # as nvidia-smi says
    # Vendors' figures relate so: FP8 is twice bf16 on all that have it.
    assert all(gpu.fp8 is None or gpu.fp8 == pytest.approx(2 * gpu.bf16, rel=0.03) for gpu in GPUS)


# ---- measuring ----


def measure_here() -> dict[str, Any]:
    mesh = ParallelMesh(ParallelConfig())
    try:
        return asdict(measure_rates(mesh))
    finally:
        mesh.close()


def test_rates_of_two_processes(pool: WorkerPool, tmp_path: Path) -> None:
    """Equal on both, complete, read back, and enough for a plan of every axis."""
    first, second = pool.run(2, measure_here)
    assert first == second
    operations = {link["operation"] for link in first["links"]}
    assert operations == {"all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send"}
    assert all(link["ranks"] == 2 and link["place"] == "inside" for link in first["links"])
    (tmp_path / "rates.json").write_text(json.dumps({"format": 1, **first}))
    rates = load_rates(tmp_path / "rates.json")
    for sizes in ({"tp_size": 2}, {"pp_size": 2}, {"cp_size": 2}, {}):
        step = step_time(job(tiny_config(), world_size=2, length=64, bf16=False, **sizes), rates)
        assert step.seconds > 0 and step.mfu is None


def test_groups_to_measure() -> None:
    assert groups_to_measure(["a"]) == []
    assert groups_to_measure(["a"] * 6) == [("inside", (0, 1)), ("inside", (0, 1, 2, 3)), ("inside", tuple(range(6)))]
    two = groups_to_measure(["a", "a", "b", "b"])
    assert two == [("inside", (0, 1)), ("between", (0, 2))]


def test_bench_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rates.json"
    main(["bench", "--rates", str(path)])
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"wrote {path}"
    assert said[-2].startswith("not measured: links between GPUs of a host and between hosts;")
    rates = load_rates(path)
    assert rates.made["device_type"] == "cpu" and rates.made["versions"]["torch"] in torch.__version__
    assert str(tmp_path) not in path.read_text() and rates.made["date"].count("-") == 2
    before = path.read_text()
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--rates", str(path)])
    assert stopped.value.code == 2 and f"{path} exists; add --overwrite" in capsys.readouterr().err
    assert path.read_text() == before
    with pytest.raises(SystemExit):
        main(["bench", "--rates", str(tmp_path / "no" / "rates.json")])
    assert "there is no folder" in capsys.readouterr().err

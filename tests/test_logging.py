"""What a log line says on every topology: stock Trainer's figures, and throughput, step time and memory."""

from __future__ import annotations

import functools
import gc
import itertools
import tempfile
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pool import WorkerPool
from tiny import VOCABULARY, checkpoint, pad_batch, random_dataset, tiny_config, training_arguments
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_nanotron.monitor.flops import flops_per_token, peak_flops, squared_lengths
from hf_nanotron.monitor.throughput import Throughput
from hf_nanotron.prepare.attention import documents_of

STOCK_FIGURES = {"loss", "grad_norm", "learning_rate", "epoch"}
OUR_FIGURES = {"tokens_per_second", "tokens_per_second_per_device", "step_time", "peak_memory_gib"}
SAMPLES, LENGTH, GLOBAL_BATCH = 15, 16, 4  # windows of 4, 4, 4 and 3 samples
STEPS = 8
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {  # queries and keys of 8 + 4 features, values of 6; the first layer is dense, and one expert is shared
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 10,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}


class Reporter(TrainerCallback):
    """Stands for tensorboard and its like, which get their figures this way too."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.is_first_process: list[bool] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.lines.append(dict(logs or {}))
        self.is_first_process.append(state.is_world_process_zero)


def run(trainer_class: type[Trainer], model: Any, args: TrainingArguments) -> tuple[Reporter, dict[str, float]]:
    reporter = Reporter()
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=random_dataset(SAMPLES, LENGTH),
        data_collator=pad_batch,
        callbacks=[reporter],
    )
    return reporter, trainer.train().metrics


@functools.cache
def reference(logging_steps: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The log lines and final metrics of stock Trainer in one process."""
    args = TrainingArguments(**arguments(GLOBAL_BATCH, logging_steps))
    reporter, metrics = run(Trainer, AutoModelForCausalLM.from_pretrained(checkpoint()), args)
    return reporter.lines, metrics


def arguments(micro_batches: int, logging_steps: int) -> dict[str, Any]:
    return training_arguments(
        max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=micro_batches, logging_steps=logging_steps
    )


def log_parallel(directory: str, sizes: dict[str, Any], micro_batches: int) -> list[Any]:
    """Log lines with a line for every step, and for every three, on every rank."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    results = []
    for logging_steps in (1, 3):
        args = NanotronTrainingArguments(**arguments(micro_batches, logging_steps), **sizes)
        model = ParallelAuto.from_pretrained(directory, parallel=args.parallel)
        reporter, metrics = run(NanotronTrainer, model, args)
        results.append((reporter.lines, reporter.is_first_process, metrics))
    return results


TOPOLOGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tp2": (2, {"tp_size": 2}),
    "pp2": (2, {"pp_size": 2}),
    "dp2": (2, {}),
    "tp2 pp2": (4, {"tp_size": 2, "pp_size": 2, "pp_schedule": "afab"}),
}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_log_lines(pool: WorkerPool, name: str, pytestconfig: pytest.Config) -> None:
    """Every figure on every rank; those that Trainer has equal stock, and throughput follows from the tokens."""
    if name not in ("dp2", "pp2") and not pytestconfig.getoption("full_matrix"):
        pytest.skip("--full-matrix")
    world, sizes = TOPOLOGIES[name]
    dp = world // (sizes.get("tp_size", 1) * sizes.get("pp_size", 1))
    ranks = pool.run(world, log_parallel, checkpoint(), sizes, GLOBAL_BATCH // dp)
    for index, logging_steps in enumerate((1, 3)):
        wanted, wanted_metrics = reference(logging_steps)
        for rank, results in enumerate(ranks):
            lines, is_first_process, metrics = results[index]
            assert set(is_first_process) == {rank == 0}
            steps = [line for line in lines if "loss" in line]
            assert len(steps) == STEPS // logging_steps
            for number, (line, stock_line) in enumerate(zip(steps, wanted, strict=False)):
                assert set(line) == STOCK_FIGURES | OUR_FIGURES
                assert set(stock_line) == STOCK_FIGURES
                assert all(isinstance(value, int | float) for value in line.values())  # what reporters take
                for figure, tolerance in {"loss": 2e-5, "grad_norm": 1e-4, "learning_rate": 1e-12}.items():
                    assert line[figure] == pytest.approx(stock_line[figure], rel=tolerance, abs=0), figure
                    assert line[figure] == ranks[0][index][0][number][figure], f"{figure} differs between ranks"
                # no padding, and no token counted twice: not a filler's, nor another rank's
                tokens = sum(tokens_of_step(number * logging_steps + step) for step in range(logging_steps))
                seconds = line["step_time"] * logging_steps
                assert line["tokens_per_second"] * seconds == pytest.approx(tokens, rel=1e-6)
                assert line["tokens_per_second_per_device"] * world == pytest.approx(line["tokens_per_second"])
                assert 0.05 < line["peak_memory_gib"] < 64
                assert line["peak_memory_gib"] == ranks[0][index][0][number]["peak_memory_gib"]
            seconds = sum(line["step_time"] for line in steps) * logging_steps
            assert 0 < seconds <= metrics["train_runtime"]
            assert metrics["train_loss"] == pytest.approx(wanted_metrics["train_loss"], rel=2e-5)
            assert lines[-1]["total_flos"] == pytest.approx(wanted[-1]["total_flos"], rel=1e-6)
            samples = metrics["train_samples_per_second"] * metrics["train_runtime"]
            assert samples == pytest.approx(2 * SAMPLES, rel=0.05)


def tokens_of_step(step: int) -> int:
    samples = GLOBAL_BATCH if step % 4 < 3 else SAMPLES % GLOBAL_BATCH
    return samples * LENGTH


# ---- figures by hand ----


def lonely_mesh() -> Any:
    """What `Throughput` reads of a mesh of one rank."""
    from hf_nanotron.parallel.config import ParallelConfig
    from hf_nanotron.parallel.mesh import ParallelMesh

    TrainingArguments(output_dir=tempfile.mkdtemp(), use_cpu=True).device  # noqa: B018 - sets accelerate up
    return ParallelMesh(ParallelConfig())


def test_throughput_counts_steps_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for data is part of a step; evaluating and saving are not."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("hf_nanotron.monitor.throughput.time", SimpleNamespace(perf_counter=lambda: clock.now))
    config = tiny_config()
    shapes = {name: tuple(p.shape) for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    throughput = Throughput(lonely_mesh(), shapes, config)
    assert throughput.report() == {}

    def step(begin: float, end: float, tokens: int, length: int) -> None:
        clock.now = begin
        throughput.on_step_begin()
        throughput.add_tokens(torch.tensor(tokens), torch.tensor(tokens * length))
        clock.now = end
        throughput.on_step_end()

    throughput.on_train_begin()
    step(10, 12, tokens=64, length=16)  # 2 s
    step(13, 15, tokens=64, length=12)  # 3 s, with a second of waiting for data
    throughput.on_evaluate()
    step(30, 30.5, tokens=32, length=8)  # 0.5 s
    throughput.on_predict()
    step(50, 50.5, tokens=32, length=8)  # 0.5 s
    figures = throughput.report()
    assert figures.pop("peak_memory_gib") > 0
    assert figures == {"step_time": 1.5, "tokens_per_second": 32.0, "tokens_per_second_per_device": 32.0}
    assert throughput.report() == {}

    step(51, 52, tokens=30, length=8)  # 1.5 s: the line before does not interrupt
    assert throughput.report()["tokens_per_second"] == 20.0

    throughput.on_save()
    throughput.peak = 1e9
    step(60, 64, tokens=16, length=4)
    figures = throughput.report()
    assert figures["tokens_per_second"] == 4.0
    assert figures["mfu"] == pytest.approx(4.0 * flops_per_token(shapes, config, 4) / 1e9)
    step(64, 66, tokens=16, length=4)
    step(66, 68, tokens=8, length=10)  # steps of different lengths
    flops = 16 * flops_per_token(shapes, config, 4) + 8 * flops_per_token(shapes, config, 10)
    assert throughput.report()["mfu"] == pytest.approx(flops / 4 / 1e9)


def test_throughput_leaves_out_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full garbage collections, within a step or at its end; those beside steps are left out with what they are in."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("hf_nanotron.monitor.throughput.time", SimpleNamespace(perf_counter=lambda: clock.now))
    throughput = Throughput(lonely_mesh(), {}, tiny_config())
    watching = list(gc.callbacks)
    throughput.on_train_begin()
    (on_collection,) = [callback for callback in gc.callbacks if callback not in watching]

    def collect(seconds: float, generation: int = 2) -> None:
        on_collection("start", {"generation": generation})
        clock.now += seconds
        on_collection("stop", {"generation": generation})

    def step(seconds: float, collecting: float = 0.0, generation: int = 2) -> None:
        throughput.on_step_begin()
        throughput.add_tokens(torch.tensor(8), torch.tensor(8))
        clock.now += seconds
        collect(collecting, generation)
        throughput.on_step_end()

    collect(5.0)  # before the first step
    step(1.0)
    step(1.0, collecting=3.0)
    collect(4.0)  # after the step, as `FreezeGarbage` does
    step(1.0)
    step(1.0, collecting=1.0, generation=0)  # a part of every Python program
    figures = throughput.report()
    assert figures["step_time"] == 5.0 / 4 and figures["tokens_per_second"] == 4 * 8 / 5.0
    collect(2.0)  # of the save that comes to its end now
    clock.now += 7.0
    throughput.on_save()
    step(2.0)
    assert throughput.report()["step_time"] == 2.0
    throughput.on_step_begin()
    throughput.add_tokens(torch.tensor(1000), torch.tensor(8))
    clock.now += 3.0
    throughput.on_save()  # by a callback, before the step has ended: such a step is left out
    throughput.on_step_end()
    step(2.0)
    figures = throughput.report()
    assert figures["step_time"] == 2.0 and figures["tokens_per_second"] == 4.0
    throughput.release()
    assert gc.callbacks == watching


def test_collections_of_a_run_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Python itself, which calls what is in `gc.callbacks`."""
    throughput = Throughput(lonely_mesh(), {}, tiny_config())
    throughput.on_train_begin()
    try:
        throughput.on_step_begin()
        throughput.add_tokens(torch.tensor(8), torch.tensor(8))
        gc.collect()
        throughput.on_step_end()
        ((begin, end),) = throughput._stalls
        assert end > begin
    finally:
        throughput.release()


def test_squared_lengths() -> None:
    """By hand, and by the bounds that attention gets; what marks no documents is a row of one."""
    ids = torch.zeros(2, 6, dtype=torch.long)
    assert squared_lengths({"input_ids": ids}) == 2 * 36
    assert squared_lengths({"inputs_embeds": torch.zeros(2, 6, 3)}) == 2 * 36
    packed = torch.tensor([[0, 1, 2, 0, 0, 1], [3, 4, 5, 6, 7, 8]])  # 3, 1, 2; and one that does not begin at 0
    batch = {"input_ids": ids, "position_ids": packed}
    documents = documents_of(batch)
    assert documents is not None
    assert squared_lengths(batch) == 9 + 1 + 4 + 36 == documents.bounds.diff().square().sum()
    assert squared_lengths({**batch, "position_ids": packed[:1]}) == 2 * (9 + 1 + 4)  # for all rows
    assert squared_lengths({**batch, "attention_mask": torch.ones(2, 6)}) == 2 * 36  # transformers sees no documents
    assert squared_lengths({**batch, "position_ids": packed.expand(3, 2, 6)}) == 2 * 36  # of text, width and height
    generator = torch.Generator().manual_seed(0)
    for length in (1, 7, 300):
        random = torch.randint(0, 3, (3, length), generator=generator)
        batch = {"input_ids": random, "position_ids": random}
        documents = documents_of(batch)
        assert documents is not None and squared_lengths(batch) == documents.bounds.diff().square().sum()


PACKED = [[16], [9, 7], [1, 15], [4, 4, 8]]  # documents of the rows of a step


def packed_samples(micro_batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([torch.tensor(sample[name]) for sample in micro_batch]) for name in micro_batch[0]}


def log_packed(directory: str, sizes: dict[str, Any], micro_batches: int) -> tuple[dict[str, float], float]:
    """The log line of a step over packed rows on devices of 1 GFLOP/s, and what a token of them costs by hand."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    args = NanotronTrainingArguments(
        **training_arguments(max_steps=1, gradient_accumulation_steps=micro_batches, logging_steps=1), **sizes
    )
    ids = list(range(3, 3 + LENGTH))
    positions = [[place for length in documents for place in range(length)] for documents in PACKED]
    rows = [{"input_ids": ids, "labels": ids, "position_ids": row} for row in positions]
    model = ParallelAuto.from_pretrained(directory, parallel=args.parallel)
    trainer = NanotronTrainer(model=model, args=args, train_dataset=rows, data_collator=packed_samples)
    trainer.throughput.peak = 1e9
    trainer.train()
    squares = sum(length**2 for documents in PACKED for length in documents)
    cost = flops_per_token(trainer.model.hub_shapes, model.config, squares / (len(PACKED) * LENGTH))
    return trainer.state.log_history[0], cost


def say(directory: str, strategy: str) -> Counter[tuple[str, int]]:
    """What this rank says to others in two steps: collectives, and the ranks that they join."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments
    from hf_nanotron.plan.outline import Outline
    from hf_nanotron.plan.trace import Recorder

    recorder = Recorder(others=True)
    own = {"max_steps": 2, "logging_strategy": strategy, "metrics_detail": "weights", "metrics_detail_steps": 9}
    args = NanotronTrainingArguments(**training_arguments(**own))
    model = ParallelAuto.from_pretrained(directory, parallel=args.parallel)
    with Outline(recorder.watch, recorder.label, has_values=True):
        data = random_dataset(SAMPLES, LENGTH)
        NanotronTrainer(model=model, args=args, train_dataset=data, data_collator=pad_batch).train()
    return Counter((event.op, len(event.ranks)) for event in recorder.events)


def test_a_log_line_costs_one_gather(pool: WorkerPool) -> None:
    """Trainer's loss and FLOPs travel with all figures of the ranks; other steps cost none."""
    silent, telling = (pool.run(2, say, checkpoint(), strategy)[0] for strategy in ("no", "steps"))
    assert telling - silent == {("all_gather", 2): 2} and not silent - telling


@pytest.mark.parametrize(("sizes", "micro_batches"), [({}, 2), ({"cp_size": 2}, 4)])
def test_mfu_of_packed_rows(pool: WorkerPool, sizes: dict[str, Any], micro_batches: int) -> None:
    """Attention counts by the real lengths of documents, those of whole rows where ranks share them."""
    for line, cost in pool.run(2, log_packed, checkpoint(), sizes, micro_batches):
        assert line["mfu"] == pytest.approx(line["tokens_per_second_per_device"] * cost / 1e9, rel=1e-6)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"num_attention_heads": 4, "head_dim": 16}),  # heads x head_dim is not the hidden size
        ("qwen2", {"use_sliding_window": False}),  # biases
        ("qwen3", {}),
        ("qwen3_moe", {**ROUTED, "num_experts": 8}),
        ("qwen3_moe", {**ROUTED, "num_experts": 8, "mlp_only_layers": [0]}),
        ("qwen2_moe", {**ROUTED, "num_experts": 8, "shared_expert_intermediate_size": 20, "use_sliding_window": False}),
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),  # biases of experts, other way round
        ("deepseek_v3", LATENT),
    ],
)
def test_flops_per_token(family: str, overrides: dict[str, Any]) -> None:
    """torch's count of a stock forward and backward, less the half of attention that a causal mask leaves out."""
    config = tiny_config(family, num_hidden_layers=2, **overrides)
    choices = {"experts_implementation": "eager"} if "num_experts_per_tok" in overrides else {}
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **choices)
    batch, length = 2, 24
    ids = torch.randint(3, VOCABULARY, (batch, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counts = counter.get_flop_counts()
    rotary = sum(sum(c.values()) for name, c in counts.items() if name.endswith("rotary_emb"))
    head_dim = model.model.layers[0].self_attn.o_proj.in_features // config.num_attention_heads
    query_dim = getattr(config, "qk_head_dim", head_dim)
    one_attention = 2 * length * config.num_attention_heads * (query_dim + head_dim)  # scores and values of one token
    masked = 3 * one_attention * config.num_hidden_layers / 2
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    counted = (counter.get_total_flops() - rotary) / (batch * length)
    assert flops_per_token(shapes, config, length) == counted - masked


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("mamba", {"state_size": 8}), ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8})],
)
def test_flops_without_attention(family: str, overrides: dict[str, Any]) -> None:
    """Linear layers and head, as torch counts their products; neither the scan nor its decay rates, a matrix too."""
    config = AutoConfig.for_model(family, hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, **overrides)
    assert not hasattr(config, "num_attention_heads")
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(3, VOCABULARY, (2, 12))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    products = counts[torch.ops.aten.mm] + counts.get(torch.ops.aten.addmm, 0)  # of scans: bmm
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert flops_per_token(shapes, config, 12) == flops_per_token(shapes, config, 24) == products / ids.numel()


def test_flops_of_active_parameters() -> None:
    """Qwen3-MoE by hand: two layers of hidden size 8, queries of 2 heads of 6, keys of 1, two of five experts of 3."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        **{**ROUTED, "moe_intermediate_size": 3, "num_experts": 5},
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        vocab_size=11,
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in AutoModelForCausalLM.from_config(config).named_parameters()}
    attention = 8 * 12 + 2 * 8 * 6 + 12 * 8
    layer = attention + 5 * 8 + 2 * 3 * 8 * 3  # the router, then gate, up and down of two experts
    by_hand = 6 * (2 * layer + 11 * 8) + 6 * 2 * 2 * 6 * 10
    assert flops_per_token(shapes, config, 10) == pytest.approx(by_hand, rel=1e-12)

    one_by_one = {name: shape for name, shape in shapes.items() if ".experts." not in name}
    for layer_index, expert in itertools.product(range(2), range(5)):
        experts = f"model.layers.{layer_index}.mlp.experts.{expert}"
        one_by_one |= {f"{experts}.{name}_proj.weight": (3, 8) for name in ("gate", "up", "down")}
    assert flops_per_token(one_by_one, config, 10) == pytest.approx(by_hand, rel=1e-12)

    convolved = {**shapes, "model.layers.0.linear_attn.conv1d.weight": (24, 1, 4)}
    assert flops_per_token(convolved, config, 10) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA H20", 148),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_peak_flops(monkeypatch: pytest.MonkeyPatch, name: str, teraflops: float | None) -> None:
    """By the name that the driver reports; nothing for a device that is not known, rather than a wrong MFU."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (None if teraflops is None else teraflops * 1e12)
    assert peak_flops(torch.device("cpu")) is None

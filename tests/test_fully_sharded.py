"""ZeRO stage 3: gradients, masters and weights of fully sharded models equal those of the stock model in one process.

Every rank compares its rows of every gradient with the same rows of plain autograd's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pool import JobError, WorkerPool
from tiny import VOCABULARY, tiny_config
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_nanotron import ParallelConfig
from hf_nanotron.models.base import ParallelModel
from hf_nanotron.models.sharding.parallelize import parallelize
from hf_nanotron.models.stand_ins import AbsentLayer
from hf_nanotron.parallel.collectives import all_reduce
from hf_nanotron.parallel.mesh import ParallelMesh
from hf_nanotron.parallel.pipeline.executor import StepHooks
from hf_nanotron.parallel.pipeline.schedule import Action, build_table, compute_order
from hf_nanotron.parallel.shard_spec import ShardSpec
from hf_nanotron.parallel.zero.fully_sharded import FullyShardedWeights
from hf_nanotron.parallel.zero.segment import Segment, ShardedWeights

GRADIENT_TOLERANCE = 1e-5  # of the largest value of the parameter's gradient
LOSS_TOLERANCE = 1e-6
ACCUMULATION = 3
TIED = {"tie_word_embeddings": True}
ONE_KV_HEAD = {"num_key_value_heads": 1}
INTERLEAVED = {"pp_size": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2}
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A topology and what is peculiar about the model or what is trained of it."""

    sizes: dict[str, Any]
    family: str = "llama"
    overrides: dict[str, Any] = field(default_factory=dict)
    world_size: int = 2
    frozen: tuple[str, ...] = ()
    checkpointed: bool = False


CASES = {
    "dp2": Case({}),
    "dp2-tied": Case({}, "qwen3", TIED),
    "dp2-checkpointed": Case({}, "smollm3", checkpointed=True),
    "dp2-frozen-embedding": Case({}, frozen=("embed_tokens", "input_layernorm")),
    "dp4-replicated": Case({"dp_replicate_size": 2}, "qwen2", TIED, world_size=4),
    "dp2-tp2": Case({"tp_size": 2}, "qwen3", {"attention_bias": True}, world_size=4),
    "dp2-tp2-one-kv-head": Case({"tp_size": 2}, "qwen3", {**ONE_KV_HEAD, **TIED}, world_size=4, checkpointed=True),
    "dp2-pp2-tied": Case({"pp_size": 2}, "mistral", TIED, world_size=4),
    "dp2-pp2-afab-frozen": Case({"pp_size": 2, "pp_schedule": "afab"}, frozen=("embed", "s.0.", "s.1."), world_size=4),
    "dp2-pp2-interleaved": Case(INTERLEAVED, overrides=TIED, world_size=4, checkpointed=True),
}


def units_of(model: ParallelModel) -> list[list[nn.Module]]:
    """Every decoder layer; embedding; final norm and head; all but the layers, where embedding and head are tied."""
    backbone = model.get_submodule("model")
    layers = [[layer] for layer in backbone.layers if not isinstance(layer, AbsentLayer)]
    first, last = [backbone.embed_tokens], [backbone.norm, model.lm_head]
    tied = model.config.tie_word_embeddings and model.mesh.pp_size == 1
    units = [[*first, *last], *layers] if tied else [first, *layers, last]
    return [unit for unit in units if any(True for module in unit for _ in module.parameters())]


def shard(model: ParallelModel, dtype: torch.dtype = torch.float32) -> FullyShardedWeights:
    weights = FullyShardedWeights(model, units_of(model), model.shard_specs, model.stage_of, model.mesh, dtype)
    model.weights = weights
    return weights


def train_step(model: ParallelModel, weights: ShardedWeights, window: list[Batch], step: int = 0) -> torch.Tensor:
    """Gradients of `window`, which is that of all data-parallel ranks; the loss of all of it."""
    mesh, parallel = model.mesh, model.parallel
    own = window[mesh.dp_rank :: mesh.dp_size]
    order = compute_order(parallel.pp_schedule, mesh.pp_size, parallel.pp_virtual_stages, len(own))
    table = build_table(order, parallel.num_stages)[mesh.pp_rank]
    last = {tick.action.stage: tick.action for tick in table if tick.action is not None and tick.action.kind == "B"}

    class Hooks(StepHooks):
        def on_forward(self, action: Action) -> None:
            if model.streams is not None:
                model.streams.begin(step, action.micro_batch * mesh.dp_size + mesh.dp_rank)

        def before_backward(self, action: Action) -> None:
            weights.before_backward(action.stage, action == last[action.stage])

    model.train()
    weights.begin()
    inputs = [{**batch, "use_cache": False} for batch in own]
    losses = model.executor.run(table, model.stages, inputs, Hooks())
    if model.streams is not None:
        model.streams.end()
    weights.finish()
    loss = torch.stack(list(losses.values())).sum() if losses and mesh.tp_rank == 0 else torch.zeros(())
    return all_reduce(loss, mesh.world)


def make_window(count: int) -> list[Batch]:
    """Micro-batches of different lengths that tp_size=2 divides, with labels that are ignored here and there."""
    window = []
    for index in range(count):
        ids = torch.randint(0, VOCABULARY, (2, 10 + 4 * (index % 3)), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        labels[:, : 1 + index % 4] = -100
        window.append({"input_ids": ids, "labels": labels})
    items = torch.tensor(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window))
    return [{**batch, "num_items_in_batch": items} for batch in window]


def stock_model(family: str, **overrides: Any) -> PreTrainedModel:
    """Random weights, biases and norms: zeros and ones would hide a wrong slice."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def train_stock(model: PreTrainedModel, window: list[Batch]) -> torch.Tensor:
    """Sum gradients over `window` in one process; the loss."""
    model.train()
    total = torch.zeros(())
    for batch in window:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        total += loss.detach()
    return total


def own_rows(segment: Segment, whole: torch.Tensor) -> torch.Tensor:
    """What `segment` covers of a Hub tensor."""
    return segment.spec.slice(whole).reshape(-1)[segment.start : segment.stop]


def gradient_errors(case: Case) -> tuple[dict[str, float], list[str], float]:
    """On one rank: the relative error of each of its gradients, the names of all trained parameters, the loss's."""
    stock = stock_model(case.family, **case.overrides)
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(not any(part in name for part in case.frozen))
    mesh = ParallelMesh(ParallelConfig(zero_stage=3, **case.sizes))
    model = parallelize(copy.deepcopy(stock), mesh)
    if case.checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = shard(model)
    window = make_window(ACCUMULATION * mesh.dp_size)
    expected = train_stock(stock, window)
    loss = train_step(model, weights, window)
    whole = {name: parameter.grad for name, parameter in stock.named_parameters() if parameter.requires_grad}
    errors = {}
    for segment in weights.segments:
        wanted = whole[segment.spec.name]
        error = (segment.gradient - own_rows(segment, wanted)).abs().max() / wanted.abs().max()
        errors[segment.spec.name] = float(error)
    mesh.close()
    return errors, list(whole), float((loss - expected).abs() / expected)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradients(pool: WorkerPool, case: Case) -> None:
    results = pool.run(case.world_size, gradient_errors, case)
    trained = set(results[0][1])
    assert set().union(*(errors for errors, _, _ in results)) == trained, "a gradient is on no rank"
    wrong = {n: error for errors, _, _ in results for n, error in errors.items() if not error <= GRADIENT_TOLERANCE}
    assert not wrong, wrong
    assert all(loss <= LOSS_TOLERANCE for _, _, loss in results)


def two_steps_and_evaluations(sizes: dict[str, Any]) -> dict[str, float]:
    """Largest differences to the stock model over: evaluate, AdamW step, evaluate, AdamW step, generate."""
    stock = stock_model("llama", **TIED)
    mesh = ParallelMesh(ParallelConfig(zero_stage=3, **sizes))
    model = parallelize(copy.deepcopy(stock), mesh)
    weights = shard(model)
    # With a small eps, the first steps of AdamW have one size, whatever the size of the gradient.
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}
    ours = torch.optim.AdamW([segment.master for segment in weights.segments], **settings)
    theirs = torch.optim.AdamW(stock.parameters(), **settings)
    batch = {name: tensor for name, tensor in make_window(1)[0].items() if name != "num_items_in_batch"}
    differences: dict[str, float] = {}

    def compare(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        differences[what] = float((ours - theirs).abs().max())

    def evaluate(when: str) -> None:
        with torch.no_grad():
            compare(f"logits {when}", model.eval()(**batch).logits, stock.eval()(**batch).logits)

    evaluate("before")
    for step in range(2):
        window = make_window(ACCUMULATION * mesh.dp_size)
        theirs.zero_grad()
        train_stock(stock, window)
        train_step(model, weights, window)
        theirs.step()
        for segment in weights.segments:
            segment.master.grad = segment.gradient
        ours.step()
        weights.publish()
        model.zero_grad()
        evaluate(f"after step {step}")
    parameters = dict(stock.named_parameters())
    for segment in weights.segments:
        compare(f"master {segment.name}", segment.master, own_rows(segment, parameters[segment.spec.name]))
    for name, spec in model.shard_specs.items():
        compare(f"whole {name}", weights.whole(name), spec.slice(parameters[spec.name]))
    # Ranks of different replicas write texts of different lengths, and still gather layers together.
    prompt = batch["input_ids"][:1, : 3 + mesh.dp_rank]
    length = {"max_new_tokens": 3 + 2 * mesh.dp_rank, "min_new_tokens": 3, "do_sample": False}
    compare("text", model.generate(prompt, **length), stock.generate(prompt, **length))
    mesh.close()
    return differences


@pytest.mark.parametrize("sizes", [{}, {"pp_size": 2}], ids=["dp2", "dp2-pp2"])
def test_steps_and_evaluations(pool: WorkerPool, sizes: dict[str, Any]) -> None:
    for differences in pool.run(2 * sizes.get("pp_size", 1), two_steps_and_evaluations, sizes):
        assert not {what: value for what, value in differences.items() if not value <= 2e-5}


def bf16_gradients(sizes: dict[str, Any]) -> tuple[float, set[torch.dtype]]:
    """Largest relative error against fp32 sums of the gradients of a bf16 model; dtypes of what we hold."""
    stock = stock_model("llama")
    mesh = ParallelMesh(ParallelConfig(zero_stage=3, **sizes))
    model = parallelize(copy.deepcopy(stock), mesh)
    weights = shard(model, torch.bfloat16)
    masters = {segment.name: segment.master.detach().clone() for segment in weights.segments}
    window = make_window(ACCUMULATION * mesh.dp_size)
    train_step(model, weights, window)

    exact = dict(stock.named_parameters())
    rounded = parallelize(copy.deepcopy(stock), ParallelMesh(ParallelConfig()))  # with our loss, which rounds nothing
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)  # and not the buffers of rotary embeddings
    sums = {name: torch.zeros(parameter.shape) for name, parameter in exact.items()}
    for batch in window:
        train_stock(rounded, [batch])
        for name, parameter in rounded.named_parameters():
            sums[name] += parameter.grad
        rounded.zero_grad()
    errors = []
    for segment in weights.segments:
        wanted = sums[segment.spec.name]
        errors.append(float((segment.gradient - own_rows(segment, wanted)).abs().max() / wanted.abs().max()))
        assert torch.equal(masters[segment.name], own_rows(segment, exact[segment.spec.name]))
        assert torch.equal(masters[segment.name], segment.master)
    for name in model.shard_specs:
        assert torch.equal(weights.whole(name), exact[name].to(torch.bfloat16))
    assert model.dtype == torch.bfloat16
    dtypes = {tensor.dtype for segment in weights.segments for tensor in (segment.master, segment.gradient)}
    mesh.close()
    return max(errors), dtypes


@pytest.mark.parametrize("sizes", [{}, {"pp_size": 2}], ids=["dp2", "dp2-pp2"])
def test_bf16_computes_for_fp32_masters(pool: WorkerPool, sizes: dict[str, Any]) -> None:
    for error, dtypes in pool.run(2 * sizes.get("pp_size", 1), bf16_gradients, sizes):
        assert error <= GRADIENT_TOLERANCE and dtypes == {torch.float32}


def dropout_gradients() -> tuple[float, float]:
    """Largest differences of gradients under dropout: to the model that is not sharded, and with checkpointing."""
    mesh = ParallelMesh(ParallelConfig(zero_stage=3))
    model = parallelize(stock_model("llama", attention_dropout=0.3), mesh)
    window = make_window(2 * mesh.dp_size)
    for index, batch in enumerate(window[mesh.dp_rank :: mesh.dp_size]):
        model.train()
        model.streams.begin(0, index * mesh.dp_size + mesh.dp_rank)
        model(**batch, use_cache=False).loss.backward()
    model.streams.end()
    wanted = {name: all_reduce(parameter.grad, mesh.dp) for name, parameter in model.named_parameters()}
    model.zero_grad()
    weights = shard(model)
    differences = []
    for _ in range(2):
        train_step(model, weights, window)
        differences.append(max(float((s.gradient - own_rows(s, wanted[s.name])).abs().max()) for s in weights.segments))
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mesh.close()
    return differences[0], differences[1]


def test_dropout(pool: WorkerPool) -> None:
    for differences in pool.run(2, dropout_gradients):
        assert max(differences) <= 1e-6


def unsharded_layers() -> tuple[int, int, list[int], bool]:
    """Most layers that were gathered at once; layers; bytes left of gathered weights afterwards; whether all is cut."""
    mesh = ParallelMesh(ParallelConfig(zero_stage=3, pp_size=2))
    model = parallelize(stock_model("llama", num_hidden_layers=12), mesh)
    weights = shard(model)
    layers = [layer for layer in model.model.layers if not isinstance(layer, AbsentLayer)]
    gathered: dict[int, torch.Tensor] = {}
    counts = []

    def count(*_: Any) -> None:
        whole = [layer.mlp.up_proj.weight for layer in layers if not isinstance(layer.mlp.up_proj.weight, DTensor)]
        gathered.update({id(weight): weight for weight in whole})
        counts.append(sum(weight.untyped_storage().size() > 0 for weight in gathered.values()))

    for layer in layers:
        layer.mlp.register_forward_hook(count)
        layer.mlp.register_full_backward_hook(count)
    train_step(model, weights, make_window(4 * mesh.dp_size))
    left = [weight.untyped_storage().size() for weight in gathered.values()]
    all_cut = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    held = sum(segment.master.numel() for segment in weights.segments)
    assert held <= sum(parameter.numel() for parameter in model.parameters()) // 2 + 32  # rows that 2 does not divide
    mesh.close()
    return max(counts), len(layers), left, all_cut


def test_weights_are_there_only_while_needed(pool: WorkerPool) -> None:
    for most, layers, left, all_cut in pool.run(4, unsharded_layers):
        assert most <= 2 and len(left) == layers == 6
        assert not any(left) and all_cut


class Uneven(nn.Module):
    """Parameters of three and two rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def uneven_shards() -> dict[str, list[tuple[int, int]]]:
    """Ranges of every parameter on this rank, after checking gradients and reading and writing."""
    mesh = ParallelMesh(ParallelConfig(zero_stage=3))
    model, reference = Uneven(), Uneven()
    parameters = dict(reference.named_parameters())
    names = list(parameters)
    specs = {name: ShardSpec(name, tuple(parameter.shape)) for name, parameter in parameters.items()}
    units = [[model.first], [model.second], [model.unused]]
    weights = FullyShardedWeights(model, units, specs, dict.fromkeys(specs, 0), mesh, torch.float32)
    assert type(model) is Uneven and [name for name, _ in model.named_parameters()] == names
    x = torch.randn((5, 4), generator=torch.Generator().manual_seed(mesh.rank))
    everyone = torch.cat([torch.randn((5, 4), generator=torch.Generator().manual_seed(r)) for r in range(mesh.dp_size)])
    reference(everyone).square().sum().backward()
    for _ in range(2):  # the second step does not see the first one's gradients
        weights.begin()
        model(x).square().sum().backward()
        weights.finish()
    for segment in weights.segments:
        wanted = parameters[segment.name].grad
        wanted = torch.zeros_like(parameters[segment.name]) if wanted is None else wanted
        torch.testing.assert_close(segment.gradient, own_rows(segment, wanted))

    masters = {segment.name: segment.master for segment in weights.segments}
    for name, parameter in parameters.items():
        assert torch.equal(weights.whole(name), parameter)
        weights.write(name, parameter + 1)
        assert torch.equal(weights.whole(name), parameter + 1)
    assert torch.equal(model(x), reference_plus_one(reference, x))
    for segment in weights.segments:
        assert torch.equal(segment.master, own_rows(segment, parameters[segment.name] + 1))

    # A second trainer takes the model: its masters are the same weights.
    weights.close()
    again = FullyShardedWeights(model, units, specs, dict.fromkeys(specs, 0), mesh, torch.float32)
    assert all(torch.equal(segment.master, masters[segment.name]) for segment in again.segments)
    with pytest.raises(ValueError, match="computes in torch.float32, not in torch.bfloat16"):
        FullyShardedWeights(model, units, specs, dict.fromkeys(specs, 0), mesh, torch.bfloat16)
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    for segment in again.segments:
        ranges[segment.name].append((segment.start, segment.stop))
    mesh.close()
    return ranges


def reference_plus_one(reference: nn.Module, x: torch.Tensor) -> torch.Tensor:
    raised = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in raised.parameters():
            parameter.add_(1)
    return raised(x)


@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_that_the_ranks_do_not_divide(pool: WorkerPool, ranks: int) -> None:
    by_rank = pool.run(ranks, uneven_shards)
    covered = {name: [piece for ranges in by_rank for piece in ranges[name]] for name in by_rank[0]}
    rows = {2: {3: [2, 1], 2: [1, 1]}, 4: {3: [1, 1, 1], 2: [1, 1]}}[ranks]
    for name, pieces in covered.items():
        width = {"first.weight": 4, "second.weight": 3, "unused.weight": 2}.get(name, 1)
        assert [stop - start for start, stop in pieces] == [n * width for n in rows[3 if "first" in name else 2]]
        assert [0, *(stop for _, stop in pieces)][:-1] == [start for start, _ in pieces], name


def wrong_units(units: str) -> None:
    mesh = ParallelMesh(ParallelConfig(zero_stage=3, dp_replicate_size=2 if units == "replicas alone" else 1))
    model = Uneven()
    if units == "a tied parameter in two":
        model.unused.weight, model.unused.bias = model.second.weight, model.second.bias
    specs = {name: ShardSpec(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    modules = [model] if units == "the model" else [model.first, model.second, model.unused]
    chosen = [[module] for module in modules[: 2 if units == "too few" else 3]]
    FullyShardedWeights(model, chosen, specs, dict.fromkeys(specs, 0), mesh, torch.float32)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ("too few", "unused.weight"),
        ("a tied parameter in two", "second.weight is in two units"),
        ("the model", "as a whole"),
        ("replicas alone", "at least two data-parallel ranks"),
    ],
)
def test_wrong_units_are_refused(pool: WorkerPool, units: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        pool.run(2, wrong_units, units)

"""Selective recomputation: the gradients of stock, no product twice, and nothing kept but products and attention."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from family_runs import micro_batches, reference, tiny_model, whole_gradient
from pool import JobError, WorkerPool
from test_gradients import plain, stock_model
from tiny import History, pad_batch, random_dataset, tiny_config, train_parallel, train_stock, training_arguments
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments, ParallelConfig
from hf_nanotron.models.sharding.parallelize import parallelize
from hf_nanotron.monitor.memory import RankStep, activation_bytes
from hf_nanotron.parallel.mesh import ParallelMesh
from hf_nanotron.prepare.compile import compile_layers, compiled_parts
from hf_nanotron.prepare.compile_passes import rewriting
from hf_nanotron.prepare.recompute import (
    CONTEXTS,
    chosen_layers,
    keeps,
    keeps_attention,
    recompute_selectively,
    recompute_wholly,
)
from hf_nanotron.prepare.shard_weights import shard_weights
from hf_nanotron.prepare.training_state import TrainingState
from hf_nanotron.training.step.train_step import TrainStep

TOLERANCE = 1e-5
aten: Any = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Case:
    """One layout of one family, and how it recomputes."""

    family: str
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)
    policy: str | None = "selective"
    layers: tuple[int, ...] | None = None
    backend: str | None = None


def set_up(model: Any, policy: str | None, layers: tuple[int, ...] | None = None) -> frozenset[int]:
    chosen = frozenset() if policy is None else chosen_layers(model, layers)
    if policy in CONTEXTS:
        recompute_selectively(model, chosen, {}, policy)
    elif policy == "full":
        recompute_wholly(model, chosen, {})
    return chosen


# ---- Gradients -------------------------------------------------------------------------------------------------

ONE = [
    Case("llama"),
    Case("llama", layers=(1,)),
    Case("llama", policy="full", layers=(0,)),
    Case("qwen3_moe"),
    Case("falcon"),  # adds to the output of a linear layer in place
    Case("llama4_text"),
    Case("llama", policy="all_but_attention", backend="aot_eager"),
]
MORE = [  # `test_compiled_layers_that_write_to_their_weights` has the family that clips weights in place
    Case("llama", backend="aot_eager"),
    Case("gemma3n_text", backend="aot_eager"),
    Case("llama", policy="all_but_attention"),
    Case("qwen3_moe", policy="all_but_attention"),
    Case("gemma3n_text", policy="full", layers=(0, 2), backend="aot_eager"),
]
TWO = [
    Case("llama", {"tp_size": 2, "sequence_parallel": False}),
    Case("llama", {"tp_size": 2}, "full", (1,)),
    Case("llama", {"pp_size": 2}, layers=(1,)),
    Case("llama", {"zero_stage": 3}),
    Case("llama", {"tp_size": 2}, "all_but_attention"),
    Case("qwen3_moe", {"ep_size": 2}, "all_but_attention"),
    Case("qwen3_moe", {"tp_size": 2, "ep_size": 2}),
    Case("llama", {"tp_size": 2, "tp_overlap": True}),
    Case("llama", {"tp_size": 2}, backend="aot_eager"),
]
MORE_ON_TWO = [Case("llama", {"tp_size": 2}), Case("qwen3_moe", {"ep_size": 2})]


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (1, ONE),
        (2, TWO),
        pytest.param(1, MORE, marks=pytest.mark.full_matrix),
        pytest.param(2, MORE_ON_TWO, marks=pytest.mark.full_matrix),
    ],
    ids=["one", "two", "one more", "two more"],
)
def test_gradients_are_those_of_stock(pool: WorkerPool, tmp_path: Path, ranks: int, cases: list[Case]) -> None:
    for family in {case.family for case in cases}:
        torch.save(reference(family), tmp_path / family)
    for results in pool.run(ranks, gradient_errors, cases, str(tmp_path)):
        for case, (error, breaks) in zip(cases, results, strict=True):
            assert error < TOLERANCE and breaks == 0, case


def gradient_errors(cases: list[Case], folder: str) -> list[tuple[float, int]]:
    """The largest relative error of a gradient in the first step, and graph breaks."""
    from torch._dynamo.utils import counters

    results = []
    for case in cases:
        torch._dynamo.reset()
        counters.clear()
        expected = torch.load(Path(folder) / case.family)
        mesh = ParallelMesh(ParallelConfig(**case.sizes))
        model = parallelize(tiny_model(case.family), mesh)
        weights = shard_weights(model, torch.float32, 1 << 16)
        recomputed = set_up(model, case.policy, case.layers)
        if case.backend is not None:
            compile_layers(model, case.backend, None, recomputed)
        TrainStep(TrainingState(model, weights)).run(micro_batches(model, mesh.dp_rank, mesh.dp_size)[0], 0)
        floor, errors = 1e-4 * expected["norms"][0], [0.0]
        for segment in weights.segments:
            whole = whole_gradient(expected, 0, segment.spec.name)
            wanted = segment.spec.slice(whole).reshape(-1)[segment.start : segment.stop]
            errors.append(float((segment.gradient - wanted).norm() / (whole.norm() + floor)))
        weights.close()
        mesh.close()
        results.append((max(errors), sum(counters["graph_break"].values())))
    return results


DROPOUT: list[dict[str, Any]] = [{}, {"tp_size": 2}, {"tp_size": 2, "sequence_parallel": False}]


def test_masks_are_drawn_again(pool: WorkerPool) -> None:
    for rank in pool.run(2, dropout_gradients, DROPOUT):
        for kept, again, other in rank:
            scale = kept.abs().max()
            torch.testing.assert_close(again, kept, rtol=0, atol=1e-5 * float(scale))
            assert (other - kept).abs().max() > 1e-2 * scale  # of other masks


def dropout_gradients(layouts: list[dict[str, Any]]) -> list[list[torch.Tensor]]:
    """This rank's gradients: kept, recomputed, and with other masks."""
    results = []
    for sizes in layouts:
        gradients = []
        for policy, position in ((None, 3), ("selective", 3), (None, 4)):
            mesh = ParallelMesh(ParallelConfig(**sizes))
            model = parallelize(stock_model("llama", num_hidden_layers=2, attention_dropout=0.3), mesh)
            weights = shard_weights(model, torch.float32, 1000)
            set_up(model, policy)
            window = [{**plain(i), "num_items_in_batch": torch.tensor(100)} for i in range(2)]
            TrainStep(TrainingState(model, weights)).run(window, step=position)
            gradients.append(torch.cat([segment.gradient.clone() for segment in weights.segments]))
            mesh.close()
        results.append(gradients)
    return results


# ---- What is kept, and what is computed twice ------------------------------------------------------------------

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
TOKENS = 64
PRODUCTS = {"mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu"}


class Ledger(TorchDispatchMode):
    """Counts operators by name, and knows which of the tensors that they made are alive."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._given = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.calls: Counter[str] = Counter()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[func._schema.name.removeprefix("aten::")] += 1
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._given:  # views of weights are no activations
                    self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    @property
    def products(self) -> int:
        return sum(self.calls[name] for name in PRODUCTS)

    def alive(self) -> int:
        return sum(size for ref, size in self._made.values() if not ref.expired())


def backbone_step(model: Any, ledger: Ledger) -> int:
    """Run the layers forward and backward; the bytes alive between."""
    model.train()
    ids = torch.arange(TOKENS)[None] % SHAPE["vocab_size"]
    with ledger:
        out = model.model(input_ids=ids, use_cache=False).last_hidden_state.sum()
        alive = ledger.alive()
        out.backward()
    return alive


def eager_costs() -> dict[str, tuple[int, int, int]]:
    """Bytes alive after a forward, products, and norms computed in a step, by what recomputes."""
    costs = {}
    cases = (
        *(("none", None, None), ("selective", "selective", None), ("full", "full", None), ("one", "full", (1,))),
        ("attention", "all_but_attention", None),
    )
    for name, policy, layers in cases:
        mesh = ParallelMesh(ParallelConfig())
        model = parallelize(LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa")), mesh)
        weights = shard_weights(model, torch.float32, 1 << 20)
        weights.begin()
        set_up(model, policy, layers)
        ledger = Ledger(model)
        costs[name] = (backbone_step(model, ledger), ledger.products, ledger.calls["rsqrt"])
        mesh.close()
    return costs


@pytest.fixture(scope="module")
def costs(pool: WorkerPool) -> dict[str, tuple[int, int, int]]:
    return pool.run(1, eager_costs)[0]


def test_no_product_is_computed_twice(costs: dict[str, tuple[int, int, int]]) -> None:
    held, products, norms = zip(*(costs[name] for name in ("none", "selective", "one", "full")), strict=True)
    assert held[0] > held[2] > held[3] and held[0] > held[1] > held[3]
    assert products[1] == products[0], "a product was computed again"
    layers = SHAPE["num_hidden_layers"]
    again = 7 + 1  # linear layers and attention
    assert (products[2] - products[0], products[3] - products[0]) == (again, layers * again)
    assert [count - norms[0] for count in norms] == [0, 2 * layers, 2, 2 * layers], "norms were not recomputed"


def test_attention_alone_is_kept(costs: dict[str, tuple[int, int, int]]) -> None:
    layers, (least, most, _), (kept, products, _) = SHAPE["num_hidden_layers"], costs["full"], costs["attention"]
    assert most - products == layers, "attention was computed again, or a product was not"
    assert kept - least == layers * 4 * TOKENS * (SHAPE["hidden_size"] + SHAPE["num_attention_heads"])


@pytest.mark.parametrize("kind", ["none", "selective", "full", "one", "attention"])
def test_the_estimate_of_what_is_kept(costs: dict[str, tuple[int, int, int]], kind: str) -> None:
    config, one = LlamaConfig(**SHAPE), ParallelConfig(zero_stage=0)
    share = {"none": 0.0, "one": 1 / SHAPE["num_hidden_layers"]}.get(kind, 1.0)
    policy = {"selective": "selective", "attention": "all_but_attention"}.get(kind, "full")

    def estimate(layers: int, share: float, policy: str = "full") -> int:
        changed = LlamaConfig(**{**SHAPE, "num_hidden_layers": layers})
        return activation_bytes(RankStep(changed, TOKENS, one, 0, 1, 4, share, policy=policy))

    logits = TOKENS * config.vocab_size * (2 * 4 + 8)
    wanted = estimate(SHAPE["num_hidden_layers"], share, policy) - logits
    if share:  # what one layer computes again comes with its backward
        wanted -= estimate(1, 0.0) - estimate(0, 0.0)
        wanted += estimate(1, 1.0, policy) - estimate(0, 1.0, policy) if policy != "full" else 0
    assert costs[kind][0] == pytest.approx(wanted, rel=0.12)


def compiled_costs() -> dict[str, tuple[int, Counter[str]]]:
    """Bytes that compiled layers save for their backward, inputs apart, and operators in their graphs."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    costs = {}
    for policy in (None, "selective", "all_but_attention"):
        torch._dynamo.reset()
        mesh = ParallelMesh(ParallelConfig())
        model = parallelize(LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa")), mesh)
        weights = shard_weights(model, torch.float32, 1 << 20)
        weights.begin()
        set_up(model, policy)
        calls: Counter[str] = Counter()
        made: dict[int, int] = {}

        def collect(graph: Any, inputs: Any, calls: Counter[str] = calls) -> Any:
            calls.update(node.target._schema.name for node in graph.graph.nodes if hasattr(node.target, "_schema"))
            return make_boxed_func(graph.forward)

        partition = min_cut_rematerialization_partition
        backend = rewriting(aot_autograd(fw_compiler=collect, bw_compiler=collect, partition_fn=partition))
        for part in compiled_parts(model):
            part.forward = torch.compile(part.forward, backend=backend)
        weights_at = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def pack(tensor: torch.Tensor, made: dict[int, int] = made, weights_at: set[int] = weights_at) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if tensor.is_floating_point() and storage.data_ptr() not in weights_at:
                made[storage.data_ptr()] = storage.nbytes()
            return tensor

        model.train()
        hidden = torch.randn(1, TOKENS, SHAPE["hidden_size"], requires_grad=True)
        rotary = model.model.rotary_emb(hidden, torch.arange(TOKENS)[None])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model.model.layers[0](hidden, position_embeddings=rotary)
        for given in (hidden, *rotary):
            made.pop(given.untyped_storage().data_ptr(), None)
        out.sum().backward()
        costs[str(policy)] = (sum(made.values()), calls)
        mesh.close()
    return costs


def test_compiled_layers_keep_products_and_attention_alone(pool: WorkerPool) -> None:
    (costs,) = pool.run(1, compiled_costs)
    (kept, calls), (less, calls_less), (least, calls_least) = costs.values()
    names = ("linear", "linear_backward")
    for graph in (calls, calls_less):
        assert [graph[f"hf_nanotron::{name}"] for name in names] == [7, 7]
        assert graph["aten::_scaled_dot_product_flash_attention_for_cpu"] == 1
    assert calls_less["aten::rsqrt"] == 2 * calls["aten::rsqrt"]
    hidden, heads = SHAPE["hidden_size"], SHAPE["num_attention_heads"]
    # Queries, keys and values (2 hidden), attention and its log-sums, output projection, gate and up.
    assert less == 4 * TOKENS * (2 * hidden + hidden + heads + hidden + 2 * SHAPE["intermediate_size"])
    assert kept > 1.4 * less
    # Attention and its log-sums; all products but those whose output nobody needs are computed again.
    assert least == 4 * TOKENS * (hidden + heads)
    assert calls_least["aten::_scaled_dot_product_flash_attention_for_cpu"] == 1
    assert calls_least["hf_nanotron::linear"] == 7 + 6


def test_what_is_kept() -> None:
    x = torch.zeros(2, 2)
    mine: Any = torch.ops.hf_nanotron
    flash = aten._scaled_dot_product_flash_attention.default
    assert keeps(aten.mm.default, (x, x), {}) and keeps(mine.linear.default, (x, x), {})
    assert keeps(flash, (x, x, x), {}) and keeps(flash, (x, x, x, 0.0, True), {})
    assert not keeps(flash, (x, x, x, 0.1, True), {}) and not keeps(flash, (x, x, x), {"dropout_p": 0.1})
    assert not keeps(aten.mm.out, (x, x), {"out": x}), "an operator that writes must run again"
    assert keeps_attention(flash, (x, x, x), {}) and not keeps_attention(mine.linear.default, (x, x), {})
    assert not keeps(aten.silu.default, (x,), {}) and not keeps(aten.native_dropout.default, (x, 0.1, True), {})


# ---- Through the trainer ---------------------------------------------------------------------------------------


def test_training(pool: WorkerPool, tmp_path: Path) -> None:
    stock_model("llama").save_pretrained(tmp_path)
    expected = train_stock(str(tmp_path), random_dataset(20), gradient_accumulation_steps=2)
    for first, second, switched in pool.run(2, train_twice, str(tmp_path)):
        assert first.losses == pytest.approx(expected.losses, rel=1e-5)
        assert first.norms == pytest.approx(expected.norms, rel=1e-4)
        assert second.losses and switched == [[], ["forward"], []]


def train_twice(checkpoint: str) -> tuple[History, History, list[list[str]]]:
    """With selective recomputation of two layers, and with another trainer without; what instances override."""
    histories, overridden = [], []
    sizes = {"pp_size": 2, "gradient_accumulation_steps": 2}
    on = {
        "activation_checkpointing": True,
        "activation_checkpointing_policy": "selective",
        "activation_checkpointing_layers": "0 3",
    }
    args = NanotronTrainingArguments(**training_arguments(**sizes, **on))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, parallel=args.parallel)

    def overrides() -> list[str]:
        return sorted({name for layer in model.model.layers for name in vars(layer) if name in ("forward", "compute")})

    overridden.append(overrides())
    for arguments in (args, NanotronTrainingArguments(**training_arguments(**sizes, max_steps=1))):
        history = History()
        trainer = NanotronTrainer(
            model=model,
            args=arguments,
            train_dataset=random_dataset(20),
            data_collator=pad_batch,
            callbacks=[history],
        )
        trainer.train()
        assert not model.is_activation_checkpointing
        histories.append(history)
        overridden.append(overrides())
    model.mesh.close()
    return histories[0], histories[1], overridden


FULL = {"activation_checkpointing": True}
KEEPING = {**FULL, "activation_checkpointing_policy": "selective"}
ONE_LAYER = {"activation_checkpointing_layers": [1]}
RUNS: list[tuple[dict[str, Any], list[int]]] = [  # arguments of one trainer after the other, and what they mean
    (FULL, [2, 2, 2, 2]),
    ({"activation_checkpointing": False}, [1, 1, 1, 1]),
    (KEEPING, [2, 2, 2, 2]),
    (FULL, [2, 2, 2, 2]),
    (KEEPING | ONE_LAYER, [1, 2, 1, 1]),
    (FULL | ONE_LAYER, [1, 2, 1, 1]),
    ({}, [1, 1, 1, 1]),
]
OF_THE_USER: list[tuple[dict[str, Any], list[int]]] = [
    ({}, [2, 2, 2, 2]),
    (FULL | ONE_LAYER, [1, 2, 1, 1]),
    (KEEPING | ONE_LAYER, [1, 2, 1, 1]),
    ({"activation_checkpointing": False}, [2, 2, 2, 2]),
]


def test_each_trainer_sets_what_its_arguments_say(pool: WorkerPool, tmp_path: Path) -> None:
    model = stock_model("llama")
    model.save_pretrained(tmp_path)
    model.activation_checkpointing_enable()
    data, arguments = random_dataset(4), training_arguments(max_steps=1)
    for _ in range(2):  # stock leaves on what its user has switched on
        Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=data, data_collator=pad_batch).train()
        assert model.is_activation_checkpointing
    for calls, switched, hooks in pool.run(1, run_trainers, str(tmp_path)):
        assert calls == [wanted for _, wanted in (*RUNS, *OF_THE_USER, RUNS[-1])]
        assert switched == [False] * len(RUNS) + [True] * len(OF_THE_USER) + [False]
        assert hooks == [0] * len(RUNS) + [1] * (len(OF_THE_USER) + 1)  # stock's, of whoever switched it on


def run_trainers(checkpoint: str) -> tuple[list[list[int]], list[bool], list[int]]:
    """One trainer after the other over a model: activations of each layer's MLP in a step, and what it leaves on."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, parallel=ParallelConfig())
    calls = [0] * len(model.model.layers)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.act_fn.register_forward_hook(lambda *_, i=index: calls.__setitem__(i, calls[i] + 1))
    counted, switched, hooks = [], [], []
    for number, (values, _) in enumerate((*RUNS, *OF_THE_USER, RUNS[-1])):
        if number == len(RUNS):
            model.activation_checkpointing_enable()
        if number == len(RUNS) + len(OF_THE_USER):
            model.activation_checkpointing_disable()
        calls[:] = [0] * len(calls)
        args = NanotronTrainingArguments(**training_arguments(max_steps=1, **values))
        NanotronTrainer(model=model, args=args, train_dataset=random_dataset(4), data_collator=pad_batch).train()
        counted.append(list(calls))
        switched.append(model.is_activation_checkpointing)
        hooks.append(len(model.get_input_embeddings()._forward_hooks))
    return counted, switched, hooks


@pytest.mark.parametrize(
    "values", [pytest.param(FULL, marks=pytest.mark.full_matrix), KEEPING], ids=["full", "selective"]
)
def test_compiled_layers_that_write_to_their_weights(pool: WorkerPool, tmp_path: Path, values: dict[str, Any]) -> None:
    tiny_model("gemma3n_text").save_pretrained(tmp_path)
    expected = train_stock(str(tmp_path), random_dataset(4), max_steps=1)
    for history in pool.run(1, train_compiled, str(tmp_path), values):
        assert history.losses == pytest.approx(expected.losses, rel=1e-6)
        assert history.norms == pytest.approx(expected.norms, rel=1e-5)


def train_compiled(checkpoint: str, values: dict[str, Any]) -> History:
    """None of the many kinds of blocks is left uncompiled because torch has compiled others."""
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 1}
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        return train_parallel(checkpoint, random_dataset(4), **compiled, **values)


def test_layers_that_are_not_there(pool: WorkerPool) -> None:
    with pytest.raises(JobError, match=r"names layer 4, but .* has 4 decoder layers: 0 to 3") as failed:
        pool.run(2, train_absent_layer)
    assert failed.value.kinds == {0: "ValueError", 1: "ValueError"}


def train_absent_layer() -> None:
    wrong = {"activation_checkpointing": True, "activation_checkpointing_layers": [1, 4]}
    args = NanotronTrainingArguments(**training_arguments(pp_size=2, gradient_accumulation_steps=2, **wrong))
    NanotronTrainer(model=AutoModelForCausalLM.from_config(tiny_config(), parallel=args.parallel), args=args)


ON = {"activation_checkpointing": True}
SELECTIVE = {"activation_checkpointing_policy": "selective"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (SELECTIVE, "without activation_checkpointing=True"),
        ({"activation_checkpointing_layers": [1]}, "without activation_checkpointing=True"),
        ({**ON, "activation_checkpointing_policy": "some"}, "not one of 'full', 'selective'"),
        ({**ON, "activation_checkpointing_layers": [0, -1]}, "counted from 0"),
        ({**ON, "activation_checkpointing_layers": ""}, "counted from 0"),
        ({**ON, "activation_checkpointing_layers": "one"}, "list of integers"),
        (
            {**ON, "activation_checkpointing_layers": [0], "activation_checkpointing_kwargs": {"every_n_layers": 2}},
            "both select layers",
        ),
        ({**ON, **SELECTIVE, "activation_checkpointing_kwargs": {"debug": True}}, "sets its own context_fn"),
    ],
)
def test_contradictions(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NanotronTrainingArguments(**training_arguments(**values))


def test_the_deprecated_alias_and_text() -> None:
    values = {"gradient_checkpointing": True, **SELECTIVE, "activation_checkpointing_layers": ["2", "0,1"]}
    with pytest.warns(FutureWarning):
        args = NanotronTrainingArguments(**training_arguments(**values))
    assert args.activation_checkpointing and args.activation_checkpointing_layers == [0, 1, 2]

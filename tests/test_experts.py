"""Experts of stock models (`parallel/ep/experts.py`), alone and over several ranks, against stock eager code."""

from __future__ import annotations

import functools
import importlib
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from pool import WorkerPool
from torch import nn
from torch.distributed import new_group
from torch.utils.checkpoint import checkpoint

from hf_nanotron.ops.grouped_mm import add_expert_bias, add_grouped_product, grouped_linear
from hf_nanotron.ops.permute import permute, sort_by_expert, sort_into_slots, unpermute
from hf_nanotron.parallel.ep.exchange import TokenRoute, all_to_all, dispatch
from hf_nanotron.parallel.ep.experts import ALONE, ParallelExperts, capacity_of, experts_class
from hf_nanotron.parallel.mesh import Group

MODELS = Path(transformers.__file__).parent / "models"
DECORATED = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)

EXPERTS, HIDDEN, INNER, TOP_K = 8, 6, 4, 2
TOLERANCE = 1e-11
# These compute something in fp32 whatever the dtype.
IN_FP32 = ("BeamExperts", "Inkling2Experts", "Inkling2LoopExperts", "MuseSparkExperts", "OpenAIPrivacyFilterExperts")


@functools.cache
def stock_classes() -> list[tuple[str, str]]:
    """Module and name of every experts class that transformers decorates."""
    found = []
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        for name in DECORATED.findall(path.read_text()):
            found.append((f"transformers.models.{path.parent.name}.{path.stem}", name))
    return found


def config(**changes: Any) -> Any:
    """Sizes under all the names that the families have for them."""
    sizes = SimpleNamespace(
        num_experts=EXPERTS, num_local_experts=EXPERTS, n_routed_experts=EXPERTS, moe_num_experts=EXPERTS,
        hidden_size=HIDDEN, moe_hidden_size=HIDDEN, moe_latent_size=None,
        intermediate_size=INNER, moe_intermediate_size=INNER, expert_ffn_hidden_size=INNER,
        hidden_act="silu", hidden_activation="gelu_pytorch_tanh", mlp_hidden_act="relu2",
        swiglu_limit=0.5, swiglu_alpha=1.7, post_norm_eps=1e-6, mlp_gate_softcap=2.0, mlp_up_softcap=3.0,
        _experts_implementation="eager",
    )  # fmt: skip
    vars(sizes).update(changes)
    return sizes


def build(module: str, name: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A stock instance with random weights."""
    stock = getattr(importlib.import_module(module), name)
    experts = stock(config(**changes)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return experts


QWEN = ("transformers.models.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts")
GPT_OSS = ("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts")
NEMOTRON = ("transformers.models.nemotron_h.modeling_nemotron_h", "NemotronHExperts")


def batch(tokens: int, seed: int = 1, kind: str = "random") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, distinct experts of each token, and routing weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    scores[:, 3] = -1.0  # an expert without tokens
    index = scores.topk(TOP_K).indices
    if kind == "one expert":
        index = torch.tensor([[5, EXPERTS]]).expand(tokens, TOP_K).contiguous()
    if kind == "sentinels":
        index[::3, 0], index[1::4, 1] = EXPERTS, -1
    weights = torch.rand(tokens, TOP_K, generator=generator, dtype=torch.float64) + 0.1
    return x, index, weights


def gradients(
    experts: nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, recompute: bool = False
) -> dict[str, torch.Tensor]:
    """Output and all gradients, for an upstream gradient that depends on the position and the output."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    experts.zero_grad()
    out = checkpoint(experts, x, index, weights, use_reentrant=False) if recompute else experts(x, index, weights)
    out.square().sum().backward()
    found = {"out": out.detach(), "x": x.grad, "weights": weights.grad}
    for name, parameter in experts.named_parameters():
        found[name] = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    return found


def assert_same(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        error = (ours[name] - expected).norm() / expected.norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: {error:.2e}"


def without_sentinels(experts: nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
    """The reference for pairs of no expert, which not all stock classes take: expert 0 with weight 0."""
    none = (index < 0) | (index >= EXPERTS)
    found = gradients(experts, x, index.masked_fill(none, 0), weights.masked_fill(none, 0.0))
    found["weights"] = found["weights"].masked_fill(none, 0.0)
    return found


def parallel(experts: nn.Module, **attributes: Any) -> ParallelExperts:
    experts.__class__ = experts_class(type(experts))
    for name, value in attributes.items():
        setattr(experts, name, value)
    return experts  # type: ignore[return-value]


def test_all_decorated_classes_are_tested() -> None:
    assert len(stock_classes()) >= 64
    text = sum(path.read_text().count("\n@use_experts_implementation") for path in MODELS.glob("*/modeling_*.py"))
    assert len(stock_classes()) == text


@pytest.mark.parametrize(("module", "name"), stock_classes(), ids=[name for _, name in stock_classes()])
def test_stock_class(module: str, name: str) -> None:
    stock = build(module, name)
    arguments = batch(17)
    reference = gradients(stock, *arguments)
    assert reference["out"].norm() > 0.1
    masked = without_sentinels(stock, *batch(17, kind="sentinels"))
    ours = parallel(stock)
    assert type(ours).__name__ == f"Parallel{name}" and isinstance(ours, getattr(importlib.import_module(module), name))
    tolerance = 2e-6 if name in IN_FP32 else TOLERANCE
    assert_same(gradients(ours, *arguments), reference, tolerance)
    assert_same(gradients(ours, *batch(17, kind="sentinels")), masked, tolerance)


def test_undecorated_class_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear is not one of the experts classes"):
        experts_class(nn.Linear)


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_no_tokens(capacity_factor: float | None) -> None:
    ours = parallel(build(*GPT_OSS), capacity_factor=capacity_factor)
    found = gradients(ours, *batch(0))
    assert found["out"].shape == (0, HIDDEN)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in ours.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    """Lower precision keeps its dtype, with routing weights in fp32, and without gradients."""
    x, index, weights = batch(33)
    exact = build(*QWEN)(x, index, weights)
    ours = parallel(build(*QWEN, dtype=dtype))
    with torch.no_grad():
        out = ours(x.to(dtype), index, weights.float())
    assert out.dtype == dtype and not out.requires_grad
    assert (out.double() - exact).norm() / exact.norm() < (2e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_linear_gradcheck(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([2, 2, 7], dtype=torch.int32)  # an empty expert, and a row of none
    shape = (3, 4, 5) if transposed else (3, 5, 4)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, offsets, transposed), (x, weight))
    assert not grouped_linear(x, weight, offsets, transposed)[7:].any()


def test_expert_bias_gradcheck() -> None:
    offsets = torch.tensor([2, 2, 7], dtype=torch.int32)
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: add_expert_bias(x, bias, offsets), (x, bias))
    torch.testing.assert_close(add_expert_bias(x, bias, offsets), x + bias[[0, 0, 2, 2, 2, 2, 2]])


def test_bad_shapes() -> None:
    offsets = torch.tensor([2, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"take rows \[rows, 3\]"):
        grouped_linear(torch.zeros(4, 5), torch.zeros(2, 5, 3), offsets)
    with pytest.raises(ValueError, match="cast the rows"):
        grouped_linear(torch.zeros(4, 3, dtype=torch.float64), torch.zeros(2, 5, 3), offsets)
    with pytest.raises(ValueError, match="is the product of"):
        add_grouped_product(torch.zeros(2, 5, 3), torch.zeros(4, 3), torch.zeros(4, 5), offsets, True)
    with pytest.raises(ValueError, match=r"expected weights of shape \(2, 2\), got \(2, 1\)"):
        unpermute(torch.zeros(4, 3), sort_by_expert(torch.zeros(2, 2, dtype=torch.int64), 2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="8 experts cannot be divided over 3"):
        index, weights = torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
        dispatch(torch.zeros(4, 3), index, weights, 8, Group((0, 1, 2), 0, None))


def test_sorting() -> None:
    index = torch.tensor([[2, 0], [-1, 2], [0, 3], [2, 1]])
    sorting = sort_by_expert(index, 3)
    assert sorting.order.tolist() == [1, 4, 7, 0, 3, 6, -1, -1]
    assert sorting.inverse.tolist() == [[3, 0], [-1, 4], [1, -1], [5, 2]]
    assert sorting.counts.tolist() == [2, 1, 3] and sorting.offsets.tolist() == [2, 3, 6]
    slots = sort_into_slots(index, 3, 2)
    assert slots.order.tolist() == [1, 4, 7, -1, 0, 3]
    assert slots.inverse.tolist() == [[4, 0], [-1, 5], [1, -1], [-1, 2]]
    assert slots.counts.tolist() == [2, 1, 3] and slots.offsets.tolist() == [2, 4, 6]


@pytest.mark.parametrize("capacity", [None, 2])
def test_gradcheck(capacity: int | None) -> None:
    check_gradients(ALONE, 5, capacity)


def check_gradients(group: Group, tokens: int, capacity: int | None) -> None:
    """`gradcheck` of dispatch and combine: a rank's outputs depend on its own tokens alone."""
    x, index, weights = batch(tokens, kind="sentinels")

    def apply(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows, way = dispatch(x, index, weights, EXPERTS, group, capacity)
        return way.combine(rows.tanh() * 2)

    assert torch.autograd.gradcheck(apply, (x.requires_grad_(), weights.requires_grad_()))


def test_permute_gradcheck() -> None:
    x, index, weights = batch(5, kind="sentinels")
    for sorting in (sort_by_expert(index, EXPERTS), sort_into_slots(index, EXPERTS, 1)):
        assert torch.autograd.gradcheck(lambda x, sorting=sorting: permute(x, sorting), x.requires_grad_())
        y = torch.randn(sorting.order.shape[0], 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda y, weights, sorting=sorting: unpermute(y, sorting, weights), (y, weights.requires_grad_())
        )
        assert torch.autograd.gradcheck(lambda y, sorting=sorting: unpermute(y, sorting), y)


class Sink:
    """Sums products in a tensor of its own, which starts as what must be overwritten."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.total = torch.full_like(parameter, math.nan)
        self.is_fresh = True

    def takes_product(self, dtype: torch.dtype) -> bool:
        return dtype == self.total.dtype

    def add_grouped_product(self, left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> None:
        add_grouped_product(self.total, left, right, offsets, self.is_fresh)
        self.is_fresh = False


@pytest.mark.parametrize("family", [QWEN, GPT_OSS, NEMOTRON], ids=lambda family: family[1])
def test_gradient_sinks(family: tuple[str, str]) -> None:
    """Weight gradients of two micro-batches go to the sinks; autograd's node of the weight is still visited."""
    ours = parallel(build(*family))
    reference = [gradients(ours, *batch(9, seed)) for seed in (1, 2)]
    names = [name for name, parameter in ours.named_parameters() if parameter.dim() == 3]
    sinks = {name: Sink(getattr(ours, name)) for name in names}
    ours.weight_gradients = sinks
    visits: list[str] = []
    nodes = [torch.autograd.graph.get_gradient_edge(getattr(ours, name)).node for name in names]
    hooks = [node.register_hook(lambda *_, name=name: visits.append(name)) for node, name in zip(nodes, names)]  # noqa: B905
    for seed in (1, 2):
        found = gradients(ours, *batch(9, seed))
        torch.testing.assert_close(found["x"], reference[seed - 1]["x"])
        assert all(getattr(ours, name).grad is None for name in names)
    for hook in hooks:
        hook.remove()
    assert sorted(visits) == sorted(2 * names)
    for name in names:
        torch.testing.assert_close(sinks[name].total, reference[0][name] + reference[1][name], rtol=1e-11, atol=1e-12)


def slice_features(experts: Any, part: int, parts: int) -> None:
    """Keep a slice of the features of every expert: of the gate, of the up, and of what the down projection reads."""
    transposed = experts.is_transposed
    for name, parameter in list(experts.named_parameters()):
        if name == "down_proj_bias" or "proj" not in name:
            continue
        dim = 1 if name.endswith("_bias") or (name == "down_proj") == transposed else 2
        packed = name.startswith("gate_up") and experts.is_concatenated
        halves = parameter.detach().chunk(2 if packed else 1, dim)
        part_of_it = torch.cat([half.chunk(parts, dim)[part] for half in halves], dim)
        setattr(experts, name, nn.Parameter(part_of_it.clone()))


@pytest.mark.parametrize("family", [QWEN, GPT_OSS, NEMOTRON], ids=lambda family: family[1])
def test_slices_of_features(family: tuple[str, str]) -> None:
    arguments = batch(11)
    expected = build(*family)(*arguments)
    total = torch.zeros_like(expected)
    for part in range(2):
        ours = parallel(build(*family), adds_bias=part == 0)
        slice_features(ours, part, 2)
        total += ours(*arguments).detach()
    torch.testing.assert_close(total, expected.detach(), rtol=1e-11, atol=1e-12)


def test_slices_of_normalized_experts_are_refused() -> None:
    ours = parallel(build("transformers.models.muse_spark.modeling_muse_spark", "MuseSparkExperts"))
    slice_features(ours, 0, 2)
    with pytest.raises(ValueError, match="this rank has 2 of 4 features"):
        ours(*batch(3))


def drop(index: torch.Tensor, capacity: int) -> torch.Tensor:
    """Pairs beyond an expert's capacity, in the order of tokens, become pairs of no expert."""
    index, seen = index.clone(), [0] * EXPERTS
    for token in range(index.shape[0]):
        for k in range(index.shape[1]):
            expert = int(index[token, k])
            if 0 <= expert < EXPERTS:
                seen[expert] += 1
                if seen[expert] > capacity:
                    index[token, k] = EXPERTS
    return index


@pytest.mark.parametrize("factor", [0.5, 1.0, 100.0])
@pytest.mark.parametrize("kind", ["random", "one expert", "sentinels"])
def test_capacity(kind: str, factor: float) -> None:
    x, index, weights = batch(23, kind=kind)
    kept = drop(index, math.ceil(factor * 23 * TOP_K / EXPERTS))
    expected = without_sentinels(build(*GPT_OSS), x, kept, weights)
    ours = parallel(build(*GPT_OSS), capacity_factor=factor)
    assert_same(gradients(ours, x, index, weights), expected, TOLERANCE)
    assert ours.dropped is not None and int(ours.dropped) == int((kept != index).sum())
    assert (int(ours.dropped) > 0) == (factor < 100 and not (kept == index).all())


# --- several ranks ---


def whole_group(rank: int, size: int) -> Group:
    return Group(tuple(range(size)), rank, new_group(list(range(size))))


def rank_and_size() -> tuple[int, int]:
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def own_experts(family: tuple[str, str], rank: int, size: int) -> Any:
    experts = build(*family)
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(parameter.detach().chunk(size)[rank].clone()))
    return experts


def run_rank(
    family: tuple[str, str], tokens: list[int], kind: str, factor: float | None, recompute: bool
) -> tuple[dict[str, torch.Tensor], int]:
    rank, size = rank_and_size()
    start = sum(tokens[:rank])
    mine = [part[start : start + tokens[rank]] for part in batch(sum(tokens), kind=kind)]
    group = whole_group(rank, size)
    ours = parallel(own_experts(family, rank, size), group=group, capacity_factor=factor)
    assert ours.num_local_experts == EXPERTS // size
    found = gradients(ours, *mine, recompute=recompute)
    return found, 0 if ours.dropped is None else int(ours.dropped)


def joined(results: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tokens of all ranks, and experts of all ranks, in order."""
    return {name: torch.cat([result[name] for result in results]) for name in results[0]}


CASES = [
    (QWEN, [7, 7], "random", False),
    (QWEN, [9, 0], "random", False),
    (QWEN, [3, 11, 0, 6], "random", True),
    (QWEN, [4, 8, 1, 3], "one expert", False),
    (GPT_OSS, [5, 8], "sentinels", True),
    (NEMOTRON, [0, 0, 0, 5], "sentinels", False),
]


@pytest.mark.parametrize(("family", "tokens", "kind", "recompute"), CASES)
def test_expert_parallel(
    pool: WorkerPool, family: tuple[str, str], tokens: list[int], kind: str, recompute: bool
) -> None:
    reference = without_sentinels(build(*family), *batch(sum(tokens), kind=kind))
    results = pool.run(len(tokens), run_rank, family, tokens, kind, None, recompute)
    assert_same(joined([found for found, _ in results]), reference, TOLERANCE)


@pytest.mark.parametrize(("size", "factor"), [(2, 0.75), (4, 1.0), (2, 100.0)])
def test_expert_parallel_capacity(pool: WorkerPool, size: int, factor: float) -> None:
    tokens = 12
    x, index, weights = batch(tokens * size)
    capacity = math.ceil(factor * tokens * TOP_K / EXPERTS)
    kept = torch.cat([drop(part, capacity) for part in index.chunk(size)])
    reference = without_sentinels(build(*GPT_OSS), x, kept, weights)
    results = pool.run(size, run_rank, GPT_OSS, [tokens] * size, "random", factor, True)
    assert_same(joined([found for found, _ in results]), reference, TOLERANCE)
    assert sum(dropped for _, dropped in results) == int((kept != index).sum())
    assert factor == 100.0 or int((kept != index).sum()) > 0


def gradcheck_rank(capacity: int | None) -> None:
    rank, size = rank_and_size()
    check_gradients(whole_group(rank, size), 4, capacity)


@pytest.mark.parametrize("capacity", [None, 1])
def test_gradcheck_of_two_ranks(pool: WorkerPool, capacity: int | None) -> None:
    pool.run(2, gradcheck_rank, capacity)


def exchange_rank(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rank, size = rank_and_size()
    sent = [[0, 2, 1], [0, 0, 0], [3, 0, 1]]
    mine, theirs = sent[rank], [row[rank] for row in sent]
    x = torch.arange(2 * sum(mine), dtype=torch.float32).view(-1, 2).add(100 * rank).to(dtype).requires_grad_()
    out = all_to_all(x, mine, theirs, whole_group(rank, size))
    (out * out.detach()).sum().backward()
    assert x.grad is not None
    return out.detach().float(), x.grad.float() - x.detach().float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_to_all(pool: WorkerPool, dtype: torch.dtype) -> None:
    """Uneven parts, a rank that sends nothing, and the way back."""
    results = pool.run(3, exchange_rank, dtype)
    first = torch.tensor([[200.0, 201.0], [202.0, 203.0], [204.0, 205.0]])
    assert torch.equal(results[0][0], first)
    assert torch.equal(results[1][0], torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    assert torch.equal(results[2][0], torch.tensor([[4.0, 5.0], [206.0, 207.0]]))
    assert all(not difference.any() for _, difference in results)


def test_all_to_all_of_bad_sizes() -> None:
    with pytest.raises(ValueError, match=r"\[4\] rows to and \[3\] from 1 ranks do not fit a tensor of 3"):
        all_to_all(torch.zeros(3, 2), [4], [3], ALONE)
    x = torch.zeros(3, 2)
    assert all_to_all(x, [2], [2], ALONE).shape == (2, 2)


def travel_rank() -> tuple[list[int], list[list[int]]]:
    """Three tokens on each rank, experts 0 to 3 on rank 0: how many rows leave, and the pairs of those that came."""
    rank, size = rank_and_size()
    index = torch.tensor([[[0, 3, 1], [2, 5, 6], [7, -1, 4]], [[EXPERTS, -1, EXPERTS], [1, 4, 2], [6, 5, 6]]])[rank]
    x, weights = torch.zeros(3, HIDDEN), torch.ones(3, 3)
    rows, way = dispatch(x, index, weights, EXPERTS, whole_group(rank, size))
    assert isinstance(way, TokenRoute) and len(rows) == int(way.offsets[-1]) == int((way.here.inverse >= 0).sum())
    return way.sent, (way.here.inverse >= 0).int().tolist()


def test_a_token_exchanges_once_to_a_rank(pool: WorkerPool) -> None:
    """However many of its experts are there; nowhere if it has none."""
    (first, here), (second, there) = pool.run(2, travel_rank)
    assert first == [2, 2] and second == [1, 2]
    assert here == [[1, 1, 1], [1, 0, 0], [1, 0, 1]]  # two of its own, and one of rank 1
    assert there == [[0, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 1]]


def test_capacity_of() -> None:
    assert capacity_of(1.25, 64, 8) == 10
    assert capacity_of(1.0, 65, 8) == 9

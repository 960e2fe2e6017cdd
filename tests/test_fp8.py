"""FP8 linears on the CPU, where the numbers are rounded as on a GPU and multiplied in fp32.

The reference is plain autograd through the same rounding: `rounded_linear` below, put into the stock model.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from pool import WorkerPool
from test_gradients import plain, stock_model
from tiny import local_gradients
from torch import nn

from hf_nanotron import NanotronTrainingArguments
from hf_nanotron.models.sharding.parallelize import parallelize
from hf_nanotron.ops.fp8 import RECIPES, add_scaled_product, product, quantize, quantize_columns, quantize_rows, scales
from hf_nanotron.ops.fp8_linear import Fp8Linear, WeightCopies, fp8_class
from hf_nanotron.ops.linear import Linear
from hf_nanotron.parallel.config import ParallelConfig
from hf_nanotron.parallel.mesh import ParallelMesh
from hf_nanotron.prepare.fp8 import fp8_bytes, use_fp8
from hf_nanotron.prepare.shard_weights import shard_weights
from hf_nanotron.prepare.training_state import TrainingState
from hf_nanotron.training.step.train_step import TrainStep

E4M3 = torch.float8_e4m3fn
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = {"hidden_size": 64, "intermediate_size": 96}  # multiples of 16 also when cut in two
MICRO_BATCHES = 4
Parts = dict[str, torch.Tensor]


def error(x: torch.Tensor, reference: torch.Tensor) -> float:
    x, reference = x.detach().double(), reference.detach().double()
    return float((x - reference).norm() / reference.norm())


def numbers(x: torch.Tensor, recipe: str, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What e4m3 numbers are made of `x`, and their scale: one, or one for each slice along `dim`."""
    largest = x.abs().amax() if recipe == "tensorwise" else x.abs().amax(dim, keepdim=True)
    scale = torch.where(largest == 0, 1, largest / 448)
    return (x * (1 / scale)).to(E4M3).to(x.dtype), scale


def rounded(x: torch.Tensor, recipe: str, dim: int) -> torch.Tensor:
    """`x` with the precision of e4m3."""
    values, scale = numbers(x, recipe, dim)
    return values * scale


class _RoundedLinear(torch.autograd.Function):
    # Scales come after the sums, as everywhere: else the last bit of a number would decide how another is rounded.
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, recipe: str) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        (left, left_scale), (right, right_scale) = numbers(x, recipe, 1), numbers(weight, recipe, 1)
        return left @ right.t() * left_scale * right_scale.t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        (left, left_scale), (right, right_scale) = numbers(grad, ctx.recipe, 1), numbers(weight, ctx.recipe, 0)
        grad_x = left @ right * left_scale * right_scale
        return grad_x, rounded(grad, ctx.recipe, 0).t() @ rounded(x, ctx.recipe, 0), None


def rounded_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, recipe: str) -> torch.Tensor:
    out = _RoundedLinear.apply(x.flatten(0, -2), weight, recipe).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


class Memory:
    """Poisoned memory for a weight gradient, which the first product overwrites."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.total = torch.full(weight.shape, math.nan)
        self.is_fresh = True

    def takes_product(self, dtype: torch.dtype) -> bool:
        return False

    def add_product(self, grad_output: torch.Tensor, input: torch.Tensor) -> None:
        raise AssertionError("not in FP8")

    def add_scaled_product(self, *operands: torch.Tensor) -> None:
        add_scaled_product(self.total, *operands, overwrite=self.is_fresh)
        self.is_fresh = False


def layer(width: int, out: int, recipe: str, bias: bool = False, copies: WeightCopies | None = None) -> Any:
    module: Any = Linear(width, out, bias=bias)
    module.__class__ = fp8_class(Linear)
    module.copies, module.recipe = copies or WeightCopies(recipe), recipe
    module.memory = Memory(module.weight)
    module.accumulate_into(module.memory)
    return module


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operands(recipe: str, dtype: torch.dtype) -> None:
    x = (torch.randn(21, 48) * torch.logspace(-3, 3, 48) * torch.logspace(-2, 2, 21)[:, None]).to(dtype)
    row_scale, column_scale = scales(x, recipe)
    rows, columns = quantize(x, row_scale, column_scale)
    assert rows.shape == (21, 48) and columns.shape == (48, 32) and not columns[:, 21:].float().any()
    assert torch.equal(rows.float() * row_scale.view(-1, 1), rounded(x.float(), recipe, 1))
    assert torch.equal(columns.float()[:, :21].t() * column_scale, rounded(x.float(), recipe, 0))
    assert float(rows.float().abs().max()) == 448  # the whole range is used


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_order_alone(recipe: str) -> None:
    """Each copy by itself has the bits of the two together, and so has the transposed one of a step's weight copy."""
    weight = torch.randn(21, 48) * torch.logspace(-3, 3, 48)
    row_scale, column_scale = scales(weight, recipe)
    rows, columns = quantize(weight, row_scale, column_scale)
    memory = torch.full_like(rows.float(), 7).to(E4M3)
    assert quantize_rows(weight, row_scale, memory) is memory and torch.equal(memory.float(), rows.float())
    assert torch.equal(quantize_columns(weight, column_scale).float(), columns.float())
    module = layer(48, 21, recipe)
    module.weight.data.copy_(weight)
    turned, scale = module.fp8_weight.columns(module.weight)
    assert torch.equal(turned.float(), columns.float()) and torch.equal(scale, column_scale)


@pytest.mark.parametrize("recipe", RECIPES)
def test_products(recipe: str) -> None:
    """The three products of a layer, exact in float64 on the same FP8 numbers; weight gradients add up."""
    module = layer(64, 48, recipe, bias=True)
    expected = torch.zeros(48, 64, dtype=torch.float64)
    for seed in range(2):
        torch.manual_seed(seed)
        x, grad = torch.randn(3, 7, 64).requires_grad_(), torch.randn(3, 7, 48) * 1e-5
        y = module(x)
        y.backward(grad)
        rows, weight, g = x.detach().view(21, 64), module.weight.detach(), grad.view(21, 48)

        def exact(matrix: torch.Tensor, dim: int) -> torch.Tensor:
            return rounded(matrix, recipe, dim).double()

        bias = module.bias.detach().double()
        assert error(y.view(21, 48), exact(rows, 1) @ exact(weight, 1).t() + bias) < 1e-6
        assert x.grad is not None
        assert error(x.grad.view(21, 64), exact(g, 1) @ exact(weight, 0)) < 1e-6
        expected += exact(g, 0).t() @ exact(rows, 0)
        assert error(module.memory.total, expected) < 1e-6
        assert error(y.view(21, 48), rows @ weight.t() + bias) < 0.05  # and not far from what was meant
    assert error(module.bias.grad, 1e-5 * sum(torch.manual_seed(s) and grads(3, 7, 64, 48) for s in range(2))) < 1e-6


def grads(*sizes: int) -> torch.Tensor:
    torch.randn(*sizes[:3])
    return torch.randn(*sizes[:2], sizes[3]).sum((0, 1))


@pytest.mark.parametrize("recipe", RECIPES)
def test_edges(recipe: str) -> None:
    """Zeros, the largest and the smallest numbers; and what is not finite reaches the loss and every gradient."""
    module = layer(32, 16, recipe)
    for factor in (0.0, 1e-30, 1e30):
        module.memory.is_fresh = True
        x = (factor * torch.ones(5, 32)).requires_grad_()
        y = module(x)
        y.backward(torch.full((5, 16), factor and 1 / factor))
        assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
        assert module.memory.total.isfinite().all()
        if factor:
            assert error(y, x @ module.weight.t()) < 0.1 and error(module.memory.total, torch.full((16, 32), 5.0)) < 0.1
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.ones(5, 32)
        x[2, 3] = bad
        y = module(x.requires_grad_())
        assert not y[2].isfinite().any()
        module.memory.is_fresh = True
        y.backward(torch.ones(5, 16))
        assert not module.memory.total[:, 3].isfinite().any()
        x = torch.ones(5, 32, requires_grad=True)
        grad = torch.ones(5, 16)
        grad[1, 4] = bad
        module.memory.is_fresh = True
        module(x).backward(grad)
        assert x.grad is not None and not x.grad[1].isfinite().any()
        assert not module.memory.total[4].isfinite().any()


def test_weight_copies_last_one_step() -> None:
    copies = WeightCopies("tensorwise")
    module = layer(32, 16, "tensorwise", copies=copies)
    x = torch.randn(4, 32, requires_grad=True)

    def change(value: float) -> bool:
        """Whether the layer notices that its weights have changed."""
        module.weight.data.fill_(value)
        return error(module(x), value * x.sum(-1, keepdim=True).expand(4, 16)) < 0.1

    assert change(1.0) and change(2.0)  # outside of a step always
    copies.begin()
    assert change(3.0) and not change(4.0)
    held = module.fp8_weight.copy(module.weight)
    copies.end()
    assert change(5.0) and torch.equal(held.rows.float() * held.row_scale, torch.full((16, 32), 3.0))
    copies.begin()
    assert change(6.0)
    again = module.fp8_weight.copy(module.weight)
    assert again.rows.data_ptr() == held.rows.data_ptr()  # no new memory


def test_one_input_is_quantized_once() -> None:
    """Compiled, layers that read one input share its FP8 copy, and keep that alone for the backward."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    modules = [layer(64, size, "tensorwise") for size in (48, 32, 32)]
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def block(x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.silu(x)
        return torch.cat([module(x) for module in modules], -1)

    torch._dynamo.reset()
    x, grad = torch.randn(2, 8, 64, requires_grad=True), torch.randn(2, 8, 112)
    # As inductor divides a graph into forward and backward.
    backend = aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    y = compiled(x)
    y.backward(grad)
    found, gradients = x.grad, [module.memory.total.clone() for module in modules]
    calls = [[str(node.target) for node in graph.graph.nodes if node.op == "call_function"] for graph in graphs]
    count = [sum("fp8_quantize" in call for call in graph) for graph in calls]
    assert count == [1, 3]
    assert [sum("fp8_linear" in call for call in graph) for graph in calls] == [3, 3]
    outputs = next(node for node in graphs[0].graph.nodes if node.op == "output").args[0]
    kept = [node.meta["val"] for node in outputs[1:] if isinstance(node.meta.get("val"), torch.Tensor)]
    # The input of `silu`, its FP8 copy with its scale, and what lives anyway.
    weights = {module.weight.shape for module in modules}
    sizes = [(tensor.numel(), tensor.dtype) for tensor in kept if tensor.shape not in weights]
    assert [size for size, dtype in sizes if dtype == E4M3] == [64 * 16]
    assert sorted(size for size, dtype in sizes if dtype == torch.float32) == [1, 16 * 64]

    x.grad = None
    for module in modules:
        module.memory.is_fresh = True
    z = block(x)
    z.backward(grad)
    assert error(y, z) < 1e-6 and x.grad is not None and found is not None and error(found, x.grad) < 1e-6
    assert all(torch.equal(module.memory.total, before) for module, before in zip(modules, gradients, strict=True))


# ---- Whole models ------------------------------------------------------------------------------------------------


def window() -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    batches = [plain(index) for index in range(MICRO_BATCHES)]
    return batches, torch.tensor(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches))


def reference(recipe: str | None, skipped: tuple[int, ...] = ()) -> tuple[float, Parts]:
    """Loss and gradients of the stock model, with rounded linears in its layers."""
    model = stock_model("llama", **SIZES).train()
    for name, module in model.named_modules():
        if recipe and name.endswith(LINEARS) and int(name.split(".")[2]) not in skipped:
            linear: Any = module
            linear.forward = lambda x, m=linear: rounded_linear(x, m.weight, m.bias, recipe)
    batches, items = window()
    loss = torch.zeros(())
    for batch in batches:
        part = model(**batch, num_items_in_batch=items, use_cache=False).loss
        part.backward()
        loss += part.detach()
    return float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def fp8_errors(sizes: dict[str, Any], recipe: str, how: dict[str, Any], expected: tuple[float, Parts]) -> Any:
    """On one rank: the worst error of a gradient, the loss of this rank, and how many layers compute in FP8."""
    from hf_nanotron.prepare.compile import compile_layers

    torch._dynamo.reset()
    mesh = ParallelMesh(ParallelConfig(**sizes))
    model = parallelize(copy.deepcopy(stock_model("llama", **SIZES)), mesh)
    copies = use_fp8(model, recipe, how.get("skip"))
    if how.get("checkpoint"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    weights = shard_weights(model, torch.float32, 1000)
    if how.get("compile"):
        compile_layers(model, "aot_eager", None)
    batches, items = window()
    own = [{**batch, "num_items_in_batch": items} for batch in batches[mesh.dp_rank :: mesh.dp_size]]
    step = TrainStep(TrainingState(model, weights, copies))
    for factor in (2.0, 0.5):  # the first step is with other weights, of which nothing may be left
        for segment in weights.segments:
            segment.master.data.mul_(factor)
        weights.publish()
        loss = float(step.run(own, step=0))
    errors = []
    for name, gradient in local_gradients(model).items():
        spec = model.shard_specs[name]
        whole = expected[1][spec.name]
        errors.append(float((gradient - spec.slice(whole)).norm() / (whole.norm() + 1e-6)))
    count = sum(isinstance(module, Fp8Linear) for module in model.modules())
    speaks = mesh.is_last_stage and mesh.tp_rank == 0
    mesh.close()
    return max(errors), loss * speaks, count


def products_by_policy() -> dict[str | None, int]:
    """FP8 products of one step, forwards and input gradients, by what recomputes."""
    from unittest import mock

    from hf_nanotron.ops import fp8_linear
    from hf_nanotron.prepare.recompute import recompute_selectively, recompute_wholly

    counts: dict[str | None, int] = {}
    for policy, recompute in ((None, None), ("selective", recompute_selectively), ("full", recompute_wholly)):
        mesh = ParallelMesh(ParallelConfig())
        model = parallelize(copy.deepcopy(stock_model("llama", **SIZES)), mesh)
        copies = use_fp8(model, "tensorwise")
        weights = shard_weights(model, torch.float32, 1000)
        if recompute is not None:
            recompute(model, range(model.config.num_hidden_layers), {})
        batches, items = window()
        with mock.patch.object(fp8_linear, "product", wraps=fp8_linear.product) as product:
            TrainStep(TrainingState(model, weights, copies)).run(
                [{**batch, "num_items_in_batch": items} for batch in batches], step=0
            )
        counts[policy] = product.call_count
        mesh.close()
    return counts


def test_selective_recomputation_keeps_products(pool: WorkerPool) -> None:
    (counts,) = pool.run(1, products_by_policy)
    assert 0 < counts[None] == counts["selective"] < counts["full"]


# Of an FP8 number, where each rank has scales of its own; and of fp32 where all have the same.
LOCAL, SAME = 0.3, 1e-5


@pytest.mark.parametrize(
    ("world", "sizes", "recipe", "how", "limit"),
    [
        (1, {}, "tensorwise", {}, SAME),
        (1, {}, "rowwise", {}, SAME),
        (1, {}, "tensorwise", {"compile": True}, SAME),
        (1, {}, "tensorwise", {"checkpoint": True, "skip": [-4]}, SAME),
        (2, {"zero_stage": 1}, "tensorwise", {}, SAME),
        (4, {"pp_size": 2, "zero_stage": 2}, "tensorwise", {}, SAME),
        (2, {"tp_size": 2, "sequence_parallel": False}, "tensorwise", {}, LOCAL),
        (4, {"tp_size": 2, "pp_size": 2}, "rowwise", {}, LOCAL),
    ],
)
def test_gradients(
    pool: WorkerPool, world: int, sizes: dict[str, Any], recipe: str, how: dict[str, Any], limit: float
) -> None:
    """Every gradient of a model, and its loss, against the stock model with rounded linears."""
    skipped = tuple(index % 4 for index in how.get("skip", ()))
    expected = reference(recipe, skipped)
    results = pool.run(world, fp8_errors, sizes, recipe, how, expected)
    assert max(worst for worst, _, _ in results) < limit
    loss = sum(loss for _, loss, _ in results)
    assert abs(loss - expected[0]) < (1e-6 if limit == SAME else 1e-2) * expected[0]
    assert sum(count for _, _, count in results) == (4 - len(skipped)) * 7 * world / sizes.get("pp_size", 1)
    # Without FP8 they are elsewhere, so the comparison means something.
    exact = reference(None)[1]
    assert max(error(expected[1][name], exact[name]) for name in exact) > 2e-2


def test_training(pool: WorkerPool) -> None:
    """Losses of a run, FP8 beside bf16: they fall alike."""
    ((plain_run, *runs),) = pool.run(1, losses, [None, *RECIPES])
    for run in runs:
        assert run[-1] < 0.9 * run[0] and run != plain_run
        assert max(abs(a - b) / b for a, b in zip(run, plain_run, strict=True)) < 0.05


def losses(recipes: list[str | None]) -> list[list[float]]:
    import tempfile

    from tiny import History, pad_batch, random_dataset, training_arguments

    from hf_nanotron import NanotronTrainer

    runs = []
    for recipe in recipes:
        fields = training_arguments(max_steps=10, bf16=True, fp8=recipe, output_dir=tempfile.mkdtemp())
        args, history = NanotronTrainingArguments(**fields), History()
        model: Any = stock_model("llama", **SIZES)
        NanotronTrainer(
            model=model, args=args, train_dataset=random_dataset(4), data_collator=pad_batch, callbacks=[history]
        ).train()
        runs.append(history.losses)
    return runs


# ---- What is chosen, and what is refused -------------------------------------------------------------------------


def test_layers_that_are_chosen(pool: WorkerPool) -> None:
    assert pool.run(1, choices) == [None]


def choices() -> None:
    from family_runs import tiny_model

    mesh = ParallelMesh(ParallelConfig())
    odd = parallelize(stock_model("llama", hidden_size=32, intermediate_size=40), mesh)
    before = {name: set(vars(module)) for name, module in odd.named_modules()}
    use_fp8(odd, "tensorwise")
    names = {name.rpartition(".")[2] for name, module in odd.named_modules() if isinstance(module, Fp8Linear)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert fp8_bytes(odd) == 4 * (2 * 32 * 32 + 2 * 16 * 32)
    for skip in ([4], [-5]):
        with pytest.raises(ValueError, match=rf"fp8_skip_layers: there is no layer {skip[0]}; the model has 4"):
            use_fp8(odd, "tensorwise", skip)
    assert use_fp8(odd, None) is None and not any(isinstance(module, Fp8Linear) for module in odd.modules())
    assert {name: set(vars(module)) for name, module in odd.named_modules() if name} == {
        name: found for name, found in before.items() if name
    }
    with pytest.raises(ValueError, match="no linear layer .* multiples of 16"):
        use_fp8(parallelize(stock_model("llama", hidden_size=24, intermediate_size=40), mesh), "rowwise")
    mixture = parallelize(tiny_model("qwen2_moe", hidden_size=64, num_experts=16), mesh)
    use_fp8(mixture, "tensorwise")
    chosen = {name for name, module in mixture.named_modules() if isinstance(module, Fp8Linear)}
    assert chosen and not any("gate." in f"{name}." or "experts" in name or "head" in name for name in chosen)
    mesh.close()


def test_evaluation_is_exact(pool: WorkerPool) -> None:
    assert pool.run(1, evaluate) == [None]


def evaluate() -> None:
    stock = stock_model("llama", **SIZES).eval()
    mesh = ParallelMesh(ParallelConfig())
    model = parallelize(copy.deepcopy(stock), mesh)
    copies = use_fp8(model, "tensorwise")
    weights = shard_weights(model, torch.float32, 1000)
    model.eval()
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            assert error(model(**plain(0)).logits, stock(**plain(0)).logits) < 1e-6
    hook = model.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle of a step"):
        TrainStep(TrainingState(model, weights, copies)).run(
            [{**plain(0), "num_items_in_batch": torch.tensor(8)}], step=0
        )
    hook.remove()
    assert copies is not None and not copies.is_open  # nobody after it gets the copies of that step
    mesh.close()


def fail(*_: Any) -> None:
    raise RuntimeError("in the middle of a step")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fp8": "e4m3", "bf16": True}, r"fp8='e4m3' is not one of 'tensorwise', 'rowwise', None"),
        ({"fp8": "tensorwise"}, "needs bf16=True"),
        ({"fp8": "tensorwise", "bf16": True, "zero_stage": 3}, "zero_stage=3.*use zero_stage=2"),
        ({"fp8_skip_layers": [0]}, "fp8_skip_layers needs fp8"),
        ({"fp8": "rowwise", "bf16": True, "fp8_skip_layers": ["x"]}, "must be a list of integers"),
    ],
)
def test_refused_arguments(tmp_path: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NanotronTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **fields)


def test_device_without_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_nanotron.prepare.fp8 import check_device

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ValueError, match=r"A100 has compute capability 8\.0; .* 8\.9"):
        check_device(torch.device("cuda", 0))


def test_product_takes_a_bias() -> None:
    left, right = torch.randn(4, 16), torch.randn(16, 16)
    one = torch.ones(())
    out = product(left.to(E4M3), right.to(E4M3), one, one, torch.bfloat16, torch.ones(16, dtype=torch.bfloat16))
    expected = left.to(E4M3).double() @ right.to(E4M3).double().t() + 1
    assert out.dtype == torch.bfloat16 and error(out, expected) < 5e-3


def test_layers_keep_their_class() -> None:
    class Special(Linear):
        pass

    assert fp8_class(Special) is fp8_class(Special) and issubclass(fp8_class(Special), Special)
    assert issubclass(fp8_class(Special), nn.Linear) and fp8_class(Special).stock_class is Special

"""Blocks compiled one by one: the same gradients as stock transformers, one graph for all layers, nothing anew.

With the backend `aot_eager`, which captures forward and backward as `inductor` does but generates no code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_runs import STEP_LENGTH, micro_batches, reference, tiny_model, whole_gradient
from pool import WorkerPool
from torch._dynamo import lookup_backend

from hf_nanotron.prepare.compile import backend_of
from hf_nanotron.prepare.compile_passes import rewriting

TOLERANCE = 1e-5


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen3_moe", {}),
        ("gemma2", {}),
        ("deepseek_v3", {}),
        ("qwen3_5_text", {}),
        ("qwen3", {"tp_size": 2, "zero_stage": 1}),
    ],
)
def test_gradients_are_those_of_stock(pool: WorkerPool, tmp_path: Path, family: str, sizes: dict[str, Any]) -> None:
    path = str(tmp_path / "reference")
    torch.save(reference(family), path)
    for errors, _, breaks in pool.run(4 if sizes else 1, compiled_steps, family, path, sizes, {}):
        assert max(errors) < TOLERANCE and breaks == 0


def test_layers_share_their_graphs(pool: WorkerPool, tmp_path: Path) -> None:
    path = str(tmp_path / "reference")
    torch.save(reference("llama", num_hidden_layers=12), path)
    ((_, graphs, breaks),) = pool.run(1, compiled_steps, "llama", path, {}, {"num_hidden_layers": 12})
    assert graphs == 1 and breaks == 0


@pytest.mark.parametrize("partial", [False, True])
def test_rotary_embeddings_are_rolled(partial: bool) -> None:
    """Values and gradients to the last bit; a cut that is not in the middle is left alone."""
    rolled: list[int] = []

    def count(graph_module: Any, inputs: Any) -> Any:
        rolled.append(sum(node.target is torch.roll for node in graph_module.graph.nodes))
        return lookup_backend("aot_eager")(graph_module, inputs)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        cut = 4 if partial else x.shape[-1] // 2
        return torch.cat((-x[..., cut:], x[..., :cut]), dim=-1).sin()

    torch._dynamo.reset()
    x = torch.randn(2, 3, 16, requires_grad=True)
    results = [function(x) for function in (rotate, torch.compile(rotate, backend=rewriting(count)))]
    gradients = [torch.autograd.grad((y * y.detach().cos()).sum(), x)[0] for y in results]
    assert rolled == [0 if partial else 1]
    assert torch.equal(*results) and torch.equal(*gradients)


def test_trainers_share_compiled_code() -> None:
    """Which torch keeps by its backend."""
    assert backend_of("aot_eager", None, False) is backend_of("aot_eager", None, False)
    assert backend_of("aot_eager", None, False) is not backend_of("inductor", None, False)


def test_restoring_finds_layers_with_new_hooks(pool: WorkerPool) -> None:
    assert pool.run(1, restore_after_a_hook) == [0]


def restore_after_a_hook() -> int:
    from hf_nanotron.models.sharding.parallelize import parallelize
    from hf_nanotron.parallel.config import ParallelConfig
    from hf_nanotron.parallel.mesh import ParallelMesh
    from hf_nanotron.prepare.compile import compile_layers, restore_layers

    model = parallelize(tiny_model("llama"), ParallelMesh(ParallelConfig()))
    compile_layers(model, "aot_eager", None)
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    restore_layers(model)
    return sum("forward" in vars(module) for module in model.modules())


def test_evaluation_is_not_compiled(pool: WorkerPool) -> None:
    assert pool.run(1, evaluate_after_compiling) == [0]


def compiled_steps(family: str, path: str, sizes: dict[str, Any], overrides: dict[str, Any]) -> Any:
    """Errors of the gradients in each step, graphs captured, and breaks in them."""
    from torch._dynamo.utils import counters

    from hf_nanotron.models.sharding.parallelize import parallelize
    from hf_nanotron.optim.norm import global_norm
    from hf_nanotron.parallel.config import ParallelConfig
    from hf_nanotron.parallel.mesh import ParallelMesh
    from hf_nanotron.prepare.compile import compile_layers
    from hf_nanotron.prepare.shard_weights import shard_weights
    from hf_nanotron.prepare.training_state import TrainingState
    from hf_nanotron.training.step.train_step import TrainStep

    torch._dynamo.reset()
    counters.clear()
    expected = torch.load(path)
    mesh = ParallelMesh(ParallelConfig(**sizes))
    model = parallelize(tiny_model(family, **overrides), mesh)
    weights = shard_weights(model, torch.float32, 1 << 16)
    compile_layers(model, "aot_eager", None)
    step, errors, graphs = TrainStep(TrainingState(model, weights)), [], 0
    for index, batches in enumerate(micro_batches(model, mesh.dp_rank, mesh.dp_size)):
        step.run(batches, index)
        norm = float(global_norm(weights.segments, mesh))
        floor = 1e-4 * expected["norms"][index]
        for segment in weights.segments:
            whole = whole_gradient(expected, index, segment.spec.name)
            wanted = segment.spec.slice(whole).reshape(-1)[segment.start : segment.stop]
            errors.append(float((segment.gradient - wanted).norm() / (whole.norm() + floor)))
            segment.master.data.add_(segment.gradient, alpha=-STEP_LENGTH / norm)
        weights.publish()
        if index == 0:
            graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs, "a later step was compiled anew"
    breaks = sum(counters["graph_break"].values())
    mesh.close()
    return errors, graphs, breaks


def evaluate_after_compiling() -> int:
    from torch._dynamo.utils import counters

    from hf_nanotron.models.sharding.parallelize import parallelize
    from hf_nanotron.parallel.config import ParallelConfig
    from hf_nanotron.parallel.mesh import ParallelMesh
    from hf_nanotron.prepare.compile import compile_layers

    torch._dynamo.reset()
    counters.clear()
    model = parallelize(tiny_model("llama"), ParallelMesh(ParallelConfig()))
    compile_layers(model, "aot_eager", None)
    model.eval()
    for length in (5, 7, 9):
        model(torch.arange(length)[None] + 3)
    return int(counters["stats"].get("unique_graphs", 0))


def test_blocks_with_loops_stay_eager_and_the_log_names_them(pool: WorkerPool) -> None:
    ((compiled, messages),) = pool.run(1, compile_a_model_with_loops)
    assert (
        "Qwen3_5GatedDeltaNet" not in compiled and {"Qwen3_5MLP", "Qwen3_5RMSNorm", "Qwen3_5DecoderLayer"} <= compiled
    )
    (message,) = messages
    assert "Qwen3_5GatedDeltaNet (torch_" in message and "modeling_qwen3_5.py" in message


def compile_a_model_with_loops() -> Any:
    import logging

    from hf_nanotron.models.sharding.parallelize import parallelize
    from hf_nanotron.parallel.config import ParallelConfig
    from hf_nanotron.parallel.mesh import ParallelMesh
    from hf_nanotron.prepare import compile as under_test

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    under_test.logger.addHandler(handler)
    model = parallelize(tiny_model("qwen3_5_text"), ParallelMesh(ParallelConfig()))
    under_test.compile_layers(model, "aot_eager", None)
    under_test.logger.removeHandler(handler)
    parts = {
        type(m).__name__ for m in model.modules() if isinstance(vars(m).get("forward"), under_test.CompiledForward)
    }
    return parts, messages

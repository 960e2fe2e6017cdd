"""The Hub's layout of every family, against what stock `save_pretrained` writes and `from_pretrained` takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_runs import FAMILIES
from pool import WorkerPool
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, ParallelConfig
from hf_nanotron.checkpoint.hub.layout import HubLayout, hub_layout, layout_of
from hf_nanotron.checkpoint.hub.trace import Traced, copy_grids
from hf_nanotron.checkpoint.hub.weights import HubWeights
from hf_nanotron.checkpoint.state.buffers import buffer_pieces, load_buffers
from hf_nanotron.checkpoint.state.file import clear, commit, write_rank
from hf_nanotron.parallel.shard_spec import ShardSpec

Weights = dict[str, torch.Tensor]


def family_config(family: str, **overrides: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **{**FAMILIES[family]["config"], **overrides})


def build(config: PreTrainedConfig) -> Any:
    """The stock model, each value of which is another one."""
    try:
        model = AutoModelForCausalLM.from_config(config)
    except ImportError as error:
        pytest.skip(f"stock transformers cannot build it: {str(error).strip().splitlines()[0]}")
    count = 0
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and name not in model.all_tied_weights_keys:
                tensor.copy_(torch.arange(count, count + tensor.numel()).view(tensor.shape) % 2**24)
                count += tensor.numel()
    return model


def stored(folder: Path) -> Weights:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def written(layout: HubLayout, state: Weights) -> Weights:
    return {name: tensor.made_of(state) for name, tensor in layout.tensors.items()}


def read(folder: Path, layout: HubLayout) -> Weights:
    weights = HubWeights(folder)
    sources = weights.sources(layout)
    assert not sources.missing and not sources.unused
    return {
        name: weights.read(ShardSpec(name, shape), sources.grids[name], layout.dtypes[name].is_floating_point)
        for name, shape in layout.shapes.items()
    }


def assert_same(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(actual[name], tensor), name


# ---- tracing ----


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, y: [c.contiguous().squeeze(0) for half in x.chunk(2, 1) for c in half.chunk(4, 0)],
        lambda x, y: [torch.stack([x, y], 1), torch.cat([x, y], -1), torch.transpose(x, dim0=0, dim1=2)],
        lambda x, y: list(x.reshape(4, 2, 3, 5).transpose(1, 2).reshape(4, 6, 5).split([1, 4, 1], 1)),
        lambda x, y: list(torch.cat([x.reshape(4, 3, 2, 5).transpose(1, 2).reshape(4, 6, 5), y], 1).chunk(5, 1)),
        lambda x, y: [x.view(2, 2, 2, 3, 5).transpose(1, 2).reshape(8, 15), *torch.stack([x, y], -1).unbind(2)],
        lambda x, y: [x[:, [0, 3]].flatten(0, 1), y[1:, 2], x[-1], y[:, -3:-1].contiguous(), x.unflatten(0, (-1, 2))],
        lambda x, y: [torch.cat([x[:, :2], x.new_zeros(4, 3, 5), y[1:].new_zeros(4, 1, 5).to(y.dtype)], 1)[..., 0]],
    ],
)
def test_traced_operations_are_those_on_values(operation: Callable[..., list[torch.Tensor]]) -> None:
    values = {"x": torch.arange(120).view(4, 6, 5), "y": 200 + torch.arange(120).view(4, 6, 5)}
    traced = operation(*(Traced.of(name, (4, 6, 5)) for name in values))
    for mine, expected in zip(traced, operation(*values.values()), strict=True):
        assert isinstance(mine, Traced) and sum(grid.numel for grid in mine.grids) == expected.numel()
        out = torch.full(expected.shape, -1)
        assert torch.equal(copy_grids(out, mine.grids, values.__getitem__), expected)


def test_an_operation_that_is_no_rearrangement_is_refused() -> None:
    tensor = Traced.of("x", (4, 6))
    with pytest.raises(ValueError, match="'mul'"):
        _ = tensor * 2
    for index in (slice(0, 4, 2), ([0, 1], [0, 1]), None, torch.tensor([0])):
        with pytest.raises(ValueError, match="the index"):
            _ = tensor[index]
    with pytest.raises(ValueError, match="no grid"):
        torch.cat([tensor[0], tensor[1].split([2, 4])[0]]).reshape(2, 4)


# ---- families ----


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    """The files that stock writes, made from the state dict, and back; and the modules' own layout."""
    config = family_config(family)
    model = build(config)
    layout = layout_of(config)
    model.save_pretrained(tmp_path / "stock")
    state = model.state_dict()
    files = stored(tmp_path / "stock")
    assert_same(written(layout, state), files)
    assert sorted(name for part in layout.parts for name in part.hub) == sorted(files)
    kept = {name: state[name] for name in layout.shapes}
    assert_same(read(tmp_path / "stock", layout), kept)
    (tmp_path / "merged").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in kept.items()}, tmp_path / "merged" / "model.safetensors")
    assert_same(read(tmp_path / "merged", layout), kept)


def test_a_large_model_costs_its_names() -> None:
    """The layout of 30 billion weights."""
    sizes = {"num_hidden_layers": 48, "num_experts": 128, "hidden_size": 2048, "moe_intermediate_size": 768}
    layout = layout_of(family_config("qwen3_moe", **sizes, vocab_size=151936))
    merged = [name for name in layout.shapes if ".experts." in name]
    assert len(layout.tensors) == len(layout.shapes) - len(merged) + len(merged) // 2 * 3 * 128 > 18_000
    sources = layout.sources(layout.hub_shapes)
    assert not sources.missing and not sources.unused
    name = "model.layers.47.mlp.experts.gate_up_proj"
    assert layout.shapes[name] == (128, 1536, 2048) and len(sources.grids[name]) == 256


# ---- slices ----


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HubLayout, Weights]:
    folder = tmp_path_factory.mktemp("qwen3_moe")
    model = build(family_config("qwen3_moe"))
    model.save_pretrained(folder)
    return folder, hub_layout(model), model.state_dict()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_slices_read_their_own_bytes_alone(qwen3_moe: tuple[Path, HubLayout, Weights], dim: int) -> None:
    """Experts (0), a packed cut of gate and up (1), and a cut that each of the files' tensors has (2)."""
    folder, layout, state = qwen3_moe
    name = next(name for name in layout.shapes if name.endswith("experts.gate_up_proj"))
    shape = layout.shapes[name]
    half, quarter = shape[dim] // 2, shape[dim] // 4
    parts = (((0, quarter), (half, half + quarter)), ((quarter, half), (half + quarter, 2 * half)))
    for rank, ranges in enumerate(parts):
        weights = HubWeights(folder)
        grids = weights.sources(layout).grids[name]
        mine = weights.read(ShardSpec(name, shape, dim, parts, rank), grids)
        expected = torch.cat([state[name].narrow(dim, start, stop - start) for start, stop in ranges], dim)
        assert torch.equal(mine, expected)
        assert weights.bytes_read == expected.numel() * 4


def test_interleaved_slices(tmp_path: Path) -> None:
    """The file has rows of gate and of up in turn."""
    model = build(family_config("inkling2_text"))
    model.save_pretrained(tmp_path)
    layout, state = hub_layout(model), model.state_dict()
    weights = HubWeights(tmp_path)
    sources = weights.sources(layout)
    names = [name for name, grids in sources.grids.items() if any(len(g.sizes) > len(g.own.start) for g in grids)]
    assert names
    for name in names:
        shape = layout.shapes[name]
        for start, stop in ((0, shape[1] // 4), (1, shape[1] - 3)):
            spec = ShardSpec(name, shape, 1, (((start, stop),),))
            assert torch.equal(weights.read(spec, sources.grids[name]), state[name][:, start:stop])


# ---- refused, or taken with a word ----


def test_faults_are_named(qwen3_moe: tuple[Path, HubLayout, Weights], tmp_path: Path) -> None:
    folder, layout, _ = qwen3_moe
    files = stored(folder)
    lost = next(name for name in files if name.endswith("experts.3.up_proj.weight"))
    for tensor, match in ((None, "gate_up_proj.* Sizes of tensors"), (torch.zeros(3, 5), "gate_up_proj.* equal size")):
        changed = {name: value for name, value in files.items() if name != lost or tensor is not None}
        if tensor is not None:
            changed[lost] = tensor
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=match):
            HubWeights(tmp_path).sources(layout)
    save_file({**files, "stranger": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert HubWeights(tmp_path).sources(layout).unused == ["stranger"]
    quantised = {**files, lost: files[lost].to(torch.float8_e4m3fn)}
    save_file(quantised, tmp_path / "model.safetensors")
    weights = HubWeights(tmp_path)
    name = lost.replace("3.up_proj.weight", "gate_up_proj")
    with pytest.raises(ValueError, match=f"{lost}.*quantized"):
        weights.check(name, layout.shapes[name], weights.sources(layout).grids[name])


def test_what_was_loaded_is_saved_alike(tmp_path: Path) -> None:
    """A prefix that the files have and the family's default does not: kept, as stock keeps it."""
    config = family_config("qwen3_5_text")
    model = build(config)
    layout = layout_of(config)
    plain = written(layout, model.state_dict())
    prefixed = {name.replace("model.", "model.language_model.", 1): tensor.clone() for name, tensor in plain.items()}
    config.save_pretrained(tmp_path)
    save_file(prefixed, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    weights = HubWeights(tmp_path)
    sources = weights.sources(layout)
    assert not sources.missing and not sources.unused
    for after in (layout.after_loading(sources), hub_layout(loaded)):
        assert_same(written(after, loaded.state_dict()), stored(tmp_path / "again"))


@pytest.mark.parametrize("layout_of_files", ["the head alone", "no prefix"])
def test_other_names_of_tied_weights(layout_of_files: str, tmp_path: Path) -> None:
    """What `from_pretrained` takes besides: the tied head instead of the embedding, and the bare base model."""
    config = family_config("llama", tie_word_embeddings=True)
    model = build(config)
    state = dict(model.state_dict())
    embedding = state.pop("model.embed_tokens.weight")
    if layout_of_files == "no prefix":
        state.pop("lm_head.weight")
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()} | {
            "embed_tokens.weight": embedding
        }
    save_file(state, tmp_path / "model.safetensors")
    layout = layout_of(config)
    assert_same(read(tmp_path, layout), {name: model.state_dict()[name] for name in layout.shapes})


# ---- through the parallel model ----


def fill_buffers(model: Any) -> None:
    """Values that neither the stock initialisation nor a file has. Whole numbers: dtypes do not matter."""
    for name, buffer in model.named_buffers():
        if name in model.state_dict():
            buffer.copy_((torch.arange(buffer.numel()) + sum(map(ord, name))).view(buffer.shape) % 5)


def save_and_load(family: str, folder: str, sizes: dict[str, int]) -> tuple[bool, bool, list[str]]:
    """Saves a repository and a training state's buffers; whether either gives this rank its tensors back."""
    config = family_config(family)
    torch.manual_seed(3)
    model = ParallelAuto.from_config(config, ParallelConfig(**sizes))
    fill_buffers(model)
    model.save_pretrained(folder, max_shard_size="200KB")
    again = ParallelAuto.from_pretrained(folder, ParallelConfig(**sizes))
    mine, theirs = model.state_dict(), again.state_dict()
    from_files = mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    state, mesh = Path(folder, "training_state"), model.mesh
    if mesh.rank == 0:
        clear(state)
    torch.distributed.barrier()
    pieces = buffer_pieces(model)
    write_rank(state, mesh.rank, pieces)
    torch.distributed.barrier()
    if mesh.rank == 0:
        commit(state, mesh.world_size, {})
    torch.distributed.barrier()
    fresh = ParallelAuto.from_config(config, ParallelConfig(**sizes))
    load_buffers(folder, fresh)
    restored = dict(fresh.named_buffers())
    from_state = all(torch.equal(buffer, restored[name]) for name, buffer in model.named_buffers())
    return from_files, from_state, [piece.spec.name for piece in pieces]


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", {"tp_size": 2}),
        ("qwen3_moe", {"ep_size": 2}),
        ("deepseek_v3", {}),
        ("deepseek_v3", {"pp_size": 2}),
        ("deepseek_v4", {}),
    ],
)
def test_two_ranks_save_and_load(pool: WorkerPool, family: str, sizes: dict[str, int], tmp_path: Path) -> None:
    results = pool.run(2, save_and_load, family, str(tmp_path), sizes)
    assert [result[:2] for result in results] == [(True, True)] * 2
    config = family_config(family)
    layout = layout_of(config)
    assert sorted(results[0][2] + results[1][2]) == sorted(layout.buffers)  # each by one rank
    stock, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    torch.manual_seed(3)
    alone = ParallelAuto.from_config(config)
    fill_buffers(alone)
    expected = alone.state_dict()
    assert_same(dict(stock.state_dict()), dict(expected))
    assert_same(stored(tmp_path), written(layout, expected))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {name: path.name for path in tmp_path.glob("*.safetensors") for name in load_file(path)}
    assert index["weight_map"] == files and len(set(files.values())) > 2
    sizes = [tensor.numel() * tensor.element_size() for tensor in stored(tmp_path).values()]
    parameters = sum(p.numel() for p in stock.parameters())
    assert index["metadata"] == {"total_parameters": parameters, "total_size": sum(sizes)}

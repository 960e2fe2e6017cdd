"""nanotron <-> Hub: against checkpoints that nanotron itself wrote, and bit for bit through every topology."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from hf_nanotron.checkpoint.hub.weights import HubWeights
from hf_nanotron.convert.nanotron import convert as nanotron_convert
from hf_nanotron.convert.nanotron.convert import hub_to_nanotron, nanotron_to_hub
from hf_nanotron.convert.nanotron.format import format_slices, parse_shape, parse_slices
from hf_nanotron.convert.nanotron.mapping import Architecture, check_tp, parameters, place_blocks, unstack

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data" / "nanotron"
SAMPLES = {"tp1_pp1": (1, 1), "tp2_pp2": (2, 2)}
QKV = Path("model/model/decoder/1/pp_block/attn/qkv_proj")
IDS = torch.arange(24).view(2, 12) * 7 % 96


def hub_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(IDS).logits


def config(folder: Path) -> dict:
    """config.json without the version of the transformers that wrote it."""
    return {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k != "transformers_version"}


def rewrite_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A copy of the tp 2, pp 2 checkpoint that a test may damage."""
    return shutil.copytree(DATA / "tp2_pp2", tmp_path / "sample")


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen2-tied"])
def hub_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hub folder of each kind; the Qwen2 ones random, with random biases and norms too."""
    if request.param == "llama":
        return DATA / "expected" / "llama"
    torch.manual_seed(0)
    tiny = Qwen2Config(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=40,
        vocab_size=96,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
        tie_word_embeddings=request.param == "qwen2-tied",
        bos_token_id=3,
        eos_token_id=[5, 6],
    )
    model = AutoModelForCausalLM.from_config(tiny, dtype=torch.bfloat16)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder


# --- nanotron -> Hub --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", SAMPLES)
def test_samples_become_the_expected_hub_model(topology: str, tmp_path: Path) -> None:
    expected = DATA / "expected" / "llama"
    nanotron_to_hub(DATA / topology, tmp_path)
    assert_same_tensors(hub_tensors(tmp_path), hub_tensors(expected))
    assert config(tmp_path) == config(expected)
    generation = [json.loads((folder / "generation_config.json").read_text()) for folder in (tmp_path, expected)]
    assert {**generation[0], "transformers_version": ""} == {**generation[1], "transformers_version": ""}
    assert torch.equal(logits(tmp_path), logits(expected))


def test_masters_become_the_fp32_model(sample: Path, tmp_path: Path) -> None:
    # The random states beside them must not even be looked at: this one would execute on unpickling.
    (sample / "2" / "random").mkdir()
    (sample / "2" / "random" / "tp-0.pt").write_bytes(pickle.dumps(Boom()))
    nanotron_to_hub(sample, tmp_path / "out", master_weights=True)
    expected = DATA / "expected" / "llama-fp32"
    assert_same_tensors(hub_tensors(tmp_path / "out"), hub_tensors(expected))
    assert config(tmp_path / "out") == config(expected)


class Boom:
    def __reduce__(self) -> tuple:
        return pytest.fail, ("a pickle was executed",)


def test_masters_are_never_unpickled_as_objects(sample: Path, tmp_path: Path) -> None:
    optimizer = sample / "2" / "optimizer" / "optimizer_pp-1-of-2_tp-0-of-2_exp-0-of-1.pt"
    torch.save({"gradient_accumulator": Boom()}, optimizer)
    with pytest.raises(ValueError, match=f"{optimizer.name}.*never unpickled"):
        nanotron_to_hub(sample, tmp_path / "out", master_weights=True)


def test_large_models_are_written_in_several_files(tmp_path: Path) -> None:
    nanotron_to_hub(DATA / "tp2_pp2", tmp_path, max_shard_size="16KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert [path.name for path in files] == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, 7)]
    contents = {path.name: load_file(path) for path in files}
    assert all(sum(tensor.nbytes for tensor in tensors.values()) <= 16_000 for tensors in contents.values())
    assert index["weight_map"] == {name: file for file, tensors in contents.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in contents.values() for t in tensors.values())
    assert_same_tensors(hub_tensors(tmp_path), hub_tensors(DATA / "expected" / "llama"))
    assert torch.equal(logits(tmp_path), logits(DATA / "expected" / "llama"))


def test_a_hub_tensor_is_in_one_file(tmp_path: Path) -> None:
    """Else which one counts would depend on who reads."""
    nanotron_to_hub(DATA / "tp2_pp2", tmp_path / "hub", max_shard_size="16KB")
    first, second, *_ = sorted((tmp_path / "hub").glob("*.safetensors"))
    kept, other = load_file(first), load_file(second)
    name, index = next(iter(other)), tmp_path / "hub" / "model.safetensors.index.json"
    text = index.read_text()
    moved = json.loads(text)
    moved["weight_map"][name] = first.name
    for tensors, listed, says in (
        ({**kept, name: other[name]}, text, f"{first.name} holds {name!r}, which .* have in {second.name}"),
        (kept, json.dumps(moved), f"{second.name} holds {name!r}, which .* have in {first.name}"),
        (kept, text.replace(f'"{name}":', f'"{name}": "{first.name}", "{name}":'), "twice"),
    ):
        save_file(tensors, first, metadata={"format": "pt"})
        index.write_text(listed)
        for read in (lambda: HubWeights(tmp_path / "hub"), lambda: hub_to_nanotron(tmp_path / "hub", tmp_path / "out")):
            with pytest.raises(ValueError, match=says):
                read()
    assert not (tmp_path / "out").exists()


def test_conversion_holds_one_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    living: dict[int, int] = {}
    most = 0

    def watched(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal most
        if id(tensor) not in living:  # a parameter of one part comes by twice
            living[id(tensor)] = tensor.nbytes
            weakref.finalize(tensor, living.pop, id(tensor))
            most = max(most, sum(living.values()))
        return tensor

    merge, split = nanotron_convert.merge_shards, nanotron_convert.unstack
    monkeypatch.setattr(nanotron_convert, "merge_shards", lambda *args: watched(merge(*args)))
    monkeypatch.setattr(nanotron_convert, "unstack", lambda *args: watched(split(*args)))
    nanotron_to_hub(DATA / "tp2_pp2", tmp_path, max_shard_size=10_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    gate_up = 2 * 64 * 32 * 2
    assert gate_up < most <= 2 * gate_up


def test_interleaved_rotary_rows_keep_attention_scores(tmp_path: Path) -> None:
    """nanotron's `rope_interleaved` rotates rows (2i, 2i+1); scores must survive the Hub's (i, i + head_dim/2)."""
    arch = Architecture(16, 1, 2, 1, 8, 8, qkv_bias=False, untied=True, rope_interleaved=True)
    qkv = next(parameter for parameter in parameters(arch) if "qkv_proj" in parameter.name)
    torch.manual_seed(0)
    weight, x = torch.randn(qkv.shape, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    angles = torch.outer(torch.arange(5.0), 100.0 ** -(torch.arange(0, 8, 2) / 8)).double()

    def rotate(states: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        a, b = states[..., first], states[..., second]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    even, odd, low, high = torch.arange(0, 8, 2), torch.arange(1, 8, 2), torch.arange(4), torch.arange(4, 8)
    q, k, v = (unstack(weight, qkv, index, arch) for index in range(3))
    for head in range(2):
        rows = slice(8 * head, 8 * head + 8)
        score = rotate(x @ weight[rows].T, even, odd) @ rotate(x @ weight[16:24].T, even, odd).T
        assert torch.allclose(rotate(x @ q[rows].T, low, high) @ rotate(x @ k.T, low, high).T, score)
    assert torch.equal(v, weight[24:])


def test_qwen2_without_biases_becomes_llama(sample: Path, tmp_path: Path) -> None:
    path = sample / "2" / "model_config.json"
    fields = json.loads(path.read_text())
    del fields["is_llama_config"]
    path.write_text(json.dumps({**fields, "is_qwen2_config": True, "moe_config": None, "log_attn_probs": True}))
    nanotron_to_hub(sample, tmp_path / "out")
    assert_same_tensors(hub_tensors(tmp_path / "out"), hub_tensors(DATA / "expected" / "llama"))
    assert config(tmp_path / "out")["architectures"] == ["LlamaForCausalLM"]


# --- Hub -> nanotron --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("topology", "tp", "pp"), [(name, *sizes) for name, sizes in SAMPLES.items()])
def test_written_checkpoint_equals_the_sample(topology: str, tp: int, pp: int, tmp_path: Path) -> None:
    hub_to_nanotron(DATA / "expected" / "llama", tmp_path, tp=tp, pp=pp, step=2)
    written, sampled = tmp_path / "2", DATA / topology / "2"

    names = {path.relative_to(sampled) for path in sampled.rglob("*.safetensors")}
    assert {path.relative_to(written) for path in written.rglob("*.safetensors")} == names
    assert len(names) == {"tp1_pp1": 27, "tp2_pp2": 45}[topology]
    for name in names:
        with safe_open(written / name, "pt") as ours, safe_open(sampled / name, "pt") as theirs:
            assert ours.metadata() == theirs.metadata(), name
        assert_same_tensors(load_file(written / name), load_file(sampled / name))

    assert (tmp_path / "latest.txt").read_text() == "2"
    fields, sampled_fields = (json.loads((folder / "model_config.json").read_text()) for folder in (written, sampled))
    assert fields == sampled_fields
    metadata, sampled_metadata = (
        json.loads((folder / "checkpoint_metadata.json").read_text()) for folder in (written, sampled)
    )
    # The counters differ by nature: a converted model has trained on nothing.
    assert {**metadata, "metas": None} == {**sampled_metadata, "metas": None}
    assert metadata["metas"].keys() == sampled_metadata["metas"].keys()
    run, sampled_run = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (written, sampled))
    assert run["model"]["model_config"] == sampled_run["model"]["model_config"]
    assert run["model"]["dtype"] == sampled_run["model"]["dtype"]
    assert run["parallelism"].items() <= sampled_run["parallelism"].items()


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2])
def test_round_trip_is_bit_exact(hub_model: Path, tp: int, pp: int, tmp_path: Path) -> None:
    hub_to_nanotron(hub_model, tmp_path / "nanotron", tp=tp, pp=pp)
    nanotron_to_hub(tmp_path / "nanotron", tmp_path / "hub")
    assert_same_tensors(hub_tensors(tmp_path / "hub"), hub_tensors(hub_model))
    assert config(tmp_path / "hub") == config(hub_model)
    if (tp, pp) == (2, 2):
        assert torch.equal(logits(tmp_path / "hub"), logits(hub_model))


@pytest.mark.parametrize("hub_model", ["qwen2", "qwen2-tied"], indirect=True)
def test_biases_are_cut_inside_q_k_and_v(hub_model: Path, tmp_path: Path) -> None:
    hub_to_nanotron(hub_model, tmp_path, tp=2, pp=2)
    step, stored = tmp_path / "0", hub_tensors(hub_model)
    q, k, v = (stored[f"model.layers.1.self_attn.{name}_proj.bias"] for name in "qkv")
    file = step / QKV / "model_bias_pp-rank-0-of-2_tp-rank-1-of-2.safetensors"
    assert torch.equal(load_file(file)["data"], torch.cat([q[12:], k[4:], v[4:]]))
    with safe_open(file, "pt") as handle:
        assert handle.metadata() == {
            "version": "1.5",
            "unsharded_shape": "(40,)",
            "local_global_slices_pairs": "0,12,None#12,24,None;12,16,None#28,32,None;16,20,None#36,40,None",
        }
    head = step / "model/model/lm_head"
    assert head.exists() == ("lm_head.weight" in stored)
    fields = json.loads((step / "model_config.json").read_text())
    assert fields["is_qwen2_config"] and fields["attention_bias"]
    # nanotron's YAML reader takes one integer only, so a list of ids stays in model_config.json alone.
    assert fields["eos_token_id"] == [5, 6]
    assert "eos_token_id" not in yaml.safe_load((step / "config.yaml").read_text())["model"]["model_config"]


def test_tied_masters_come_from_the_first_stage(tmp_path: Path) -> None:
    """nanotron keeps a tied embedding in both end stages' optimizers; either name must not disturb the other."""
    torch.manual_seed(0)
    tiny = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=32,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(tiny).save_pretrained(tmp_path / "hub")
    hub_to_nanotron(tmp_path / "hub", tmp_path / "nanotron", pp=2)
    step = tmp_path / "nanotron" / "0"
    masters = {
        ".".join(path.parent.relative_to(step / "model").parts) + ".weight": load_file(path)["data"]
        for path in step.rglob("model_weight*.safetensors")
    }
    embedding = "model.token_position_embeddings.pp_block.token_embedding.weight"
    (step / "optimizer").mkdir()
    with_head = {name for name in masters if "final" in name}
    first = {name: tensor for name, tensor in masters.items() if name not in with_head}
    last = {name: masters[name] for name in (*with_head, embedding)}
    files = [step / "optimizer" / f"optimizer_pp-{rank}-of-2_tp-0-of-1_exp-0-of-1.pt" for rank in range(2)]
    torch.save({"gradient_accumulator": first}, files[0])
    torch.save({"gradient_accumulator": {**last, embedding: masters[embedding] + 1}}, files[1])
    refuse_to_hub(
        tmp_path / "nanotron", ValueError, f"{files[1].name}.*do not round to the weights", master_weights=True
    )
    torch.save({"gradient_accumulator": last}, files[1])
    nanotron_to_hub(tmp_path / "nanotron", tmp_path / "out", master_weights=True)
    assert_same_tensors(hub_tensors(tmp_path / "out"), hub_tensors(tmp_path / "hub"))


def test_rope_scaling_is_carried_with_a_warning(tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "expected" / "llama", tmp_path / "hub")
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    rewrite_json(folder / "config.json", rope_parameters=rope)
    with pytest.warns(UserWarning, match="without using it"):
        hub_to_nanotron(folder, tmp_path / "nanotron")
    fields = json.loads((tmp_path / "nanotron" / "0" / "model_config.json").read_text())
    assert fields["rope_theta"] == 5000.0
    assert fields["rope_scaling"] == {name: value for name, value in rope.items() if name != "rope_theta"}
    with pytest.warns(UserWarning, match="without using it"):
        nanotron_to_hub(tmp_path / "nanotron", tmp_path / "out")
    assert config(tmp_path / "out") == config(folder)


# --- pieces of the format ---------------------------------------------------------------------------------------------


def test_header_fields_of_every_numpy_are_read() -> None:
    assert parse_shape("(64, 32)") == parse_shape("(np.int64(64), 32)") == (64, 32)
    assert parse_shape("(40,)") == parse_shape("(np.int64(40),)") == (40,)
    text = "0,16,None|None,None,None#32,48,None|None,None,None;16,24,2|None,None,None#48,56,2|None,None,None"
    pairs = parse_slices(text)
    assert pairs[1] == ((slice(16, 24, 2), slice(None)), (slice(48, 56, 2), slice(None)))
    assert format_slices(pairs) == text


def test_blocks_are_placed_by_cost_and_empty_stages_refused() -> None:
    even, wide, wider = (
        Architecture(32, 4, 4, 2, 64, vocabulary, qkv_bias=False, untied=True, rope_interleaved=False)
        for vocabulary in (8, 1200, 1280)
    )
    assert [place_blocks(even, 4)[f"model.decoder.{i}"] for i in range(4)] == [0, 0, 1, 2]
    # A head almost as dear as the four layers has the second stage to itself.
    assert place_blocks(wide, 2) == {
        "model.token_position_embeddings": 0,
        **{f"model.decoder.{i}": 0 for i in range(4)},
        "model.final_layer_norm": 1,
        "model.lm_head": 1,
    }
    # As dear as all four: the layers reach half of the compute without exceeding it, and the head joins them.
    with pytest.raises(ValueError, match=r"pp=2.*use one of \[1\]"):
        place_blocks(wider, 2)
    with pytest.raises(ValueError, match=r"pp=9.*use one of \[1, 2"):
        place_blocks(even, 9)
    with pytest.raises(ValueError, match="pp=0"):
        place_blocks(even, 0)
    with pytest.raises(ValueError, match=r"tp=4 does not divide num_key_value_heads=2; use one of \[1, 2\]"):
        check_tp(even, 4)


# --- refusals ---------------------------------------------------------------------------------------------------------


def refuse_to_hub(checkpoint: Path, error: type[Exception], match: str, **options: bool) -> None:
    """The conversion must fail before it writes anything."""
    out = checkpoint.parent / "refused"
    with pytest.raises(error, match=match):
        nanotron_to_hub(checkpoint, out, **options)
    assert not out.exists()


def test_damaged_checkpoints_are_refused_by_name(sample: Path) -> None:
    shard = sample / "2" / QKV / "model_weight_pp-rank-0-of-2_tp-rank-1-of-2.safetensors"
    whole = shard.read_bytes()

    for size in (len(whole) - 10, 40, 0):
        shard.write_bytes(whole[:size])
        refuse_to_hub(sample, ValueError, f"{shard.name} is truncated or damaged")
    shard.unlink()
    refuse_to_hub(sample, FileNotFoundError, r"qkv_proj.*tp-rank-1-of-2.safetensors is missing")
    stale = shard.with_name("model_weight_pp-rank-0-of-1_tp-rank-0-of-1.safetensors")
    stale.write_bytes(whole)
    refuse_to_hub(sample, ValueError, "qkv_proj mixes shards of several topologies")
    stale.unlink()

    shard.write_bytes(whole)
    with safe_open(shard, "pt") as handle:
        metadata = handle.metadata()
    data = load_file(shard)
    save_file(data, shard, metadata={**metadata, "unsharded_shape": "(64, 16)"})
    refuse_to_hub(sample, ValueError, rf"{shard.name}.*\(64, 16\).*model_config.json means \(64, 32\)")
    save_file(data, shard, metadata={**metadata, "local_global_slices_pairs": "0,16,None#0,16,None"})
    refuse_to_hub(sample, ValueError, f"{shard.name}: its slices do not fit")
    save_file(data, shard, metadata={"version": "1.1"})
    refuse_to_hub(sample, ValueError, f"{shard.name}.*does not say which slices")
    save_file(data, shard, metadata={**metadata, "version": "1.6"})
    refuse_to_hub(sample, ValueError, "1.6 is newer than 1.5")
    save_file({"data": data["data"].float()}, shard, metadata=metadata)
    refuse_to_hub(sample, ValueError, f"{shard.name} is torch.float32, but .* torch.bfloat16")
    shard.write_bytes(whole)

    norm = sample / "2" / "model/model/final_layer_norm/pp_block/model_weight.safetensors"
    norm.rename(norm.with_name("model_bias.safetensors"))
    refuse_to_hub(sample, ValueError, "has no parameter model.final_layer_norm.pp_block.bias")
    norm.with_name("model_bias.safetensors").unlink()
    refuse_to_hub(sample, FileNotFoundError, "final_layer_norm/pp_block/model_weight.safetensors is missing")


# ---- whose shard a file holds ----

SHARDED = {  # parameter -> its folder, and the dimension that is cut
    "qkv": ("decoder/1/pp_block/attn/qkv_proj", 0),
    "o": ("decoder/3/pp_block/attn/o_proj", 1),
    "gate_up": ("decoder/0/pp_block/mlp/gate_up_proj", 0),
    "down": ("decoder/2/pp_block/mlp/down_proj", 1),
    "embedding": ("token_position_embeddings/pp_block/token_embedding", 0),
    "head": ("lm_head/pp_block", 0),
}
COPY = r"{rank1}: its header says .* rank 0, and its name that of rank 1: it is a copy of another rank's file"
HOLDS = r"{rank1}: its header says that it holds .* where rank 1 of 2 holds rows 16:32 \(at 0\), 40:48 \(at 16\), 56:64"
FULL = "None,None,None"

# The header of rank 1's shard of qkv: q, k and v are rows 0:32, 32:48 and 48:64, of which it has the second halves.
OTHER_SLICES: dict[str, tuple[list[tuple[str, str]], str | None]] = {
    "other order": ([("24,32", "56,64"), ("0,16", "16,32"), ("16,24", "40,48")], None),
    "in two": ([("0,8", "16,24"), ("8,16", "24,32"), ("16,24", "40,48"), ("24,32", "56,64")], None),
    "from the end": ([("0,16", "-48,-32"), ("16,24", "-24,-16"), ("-8,None", "-8,None")], None),
    "a gap": ([("0,16", "16,32"), ("16,24", "40,48")], HOLDS),
    "one alone": ([("0,16", "16,32")], HOLDS),
    "twice": ([("0,16", "16,32"), ("0,16", "16,32")], HOLDS),
    "overlapping, as many": ([("0,16", "16,32"), ("16,24", "40,48"), ("24,32", "40,48")], HOLDS),
    "overlapping in the file": ([("0,16", "16,32"), ("8,16", "40,48"), ("24,32", "56,64")], HOLDS),
    "of rank 0, in part": ([("0,16", "0,16"), ("16,24", "40,48"), ("24,32", "56,64")], HOLDS),
    "k and v exchanged": ([("0,16", "16,32"), ("16,24", "56,64"), ("24,32", "40,48")], HOLDS),
    "contiguous": ([("0,32", "32,64")], HOLDS),
    "beyond the end": ([("0,16", "16,32"), ("16,24", "40,48"), ("24,32", "58,66")], "do not fit"),
    "one empty": ([("0,16", "16,32"), ("16,24", "40,48"), ("24,32", "56,64"), ("3,3", "3,3")], "is empty"),
    "backwards": ([("15,None,-1", "31,15,-1"), ("16,24", "40,48"), ("24,32", "56,64")], "steps other than 1"),
    "every second": ([("0,32,2", "16,48,2"), ("1,32,2", "17,49,2")], "steps other than 1"),
    "step 0": ([("0,16,0", "16,32,0")], "step"),
    "other lengths": ([("0,16", "16,30")], "do not fit"),
    "nothing": ([], "does not say which slices"),
}


def header(path: Path, pairs: list[tuple[str, str]], cut: int = 0) -> None:
    """Write these slices of the cut dimension into a shard's header."""
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()

    def side(text: str) -> str:
        full = text if text.count(",") == 2 else f"{text},None"
        return "|".join(full if dim == cut else FULL for dim in range(2))

    text = ";".join(f"{side(local)}#{side(whole)}" for local, whole in pairs)
    save_file(load_file(path), path, metadata={**metadata, "local_global_slices_pairs": text})


def of_rank(sample: Path, parameter: str, rank: int) -> Path:
    (path,) = (sample / "2/model/model" / SHARDED[parameter][0]).glob(f"*_tp-rank-{rank}-of-2.safetensors")
    return path


@pytest.mark.parametrize("parameter", SHARDED)
def test_a_shard_is_that_of_the_rank_in_its_name(sample: Path, parameter: str) -> None:
    first, second = (of_rank(sample, parameter, rank) for rank in range(2))
    kept = second.read_bytes()
    shutil.copy(first, second)
    refuse_to_hub(sample, ValueError, COPY.format(rank1=second.name))
    first.write_bytes(kept)  # both exchanged: each number once, and every one in another's place
    refuse_to_hub(sample, ValueError, f"{first.name}: .* rank 1, and its name that of rank 0")


def test_slices_tile_a_parameter(sample: Path, tmp_path: Path) -> None:
    shard, expected = of_rank(sample, "qkv", 1), hub_tensors(DATA / "expected/llama")
    for name, (pairs, says) in OTHER_SLICES.items():
        header(shard, pairs)
        if says is not None:
            refuse_to_hub(sample, ValueError, says.format(rank1=shard.name))
        else:
            nanotron_to_hub(sample, tmp_path / name)
            assert_same_tensors(hub_tensors(tmp_path / name), expected)
    rows = [("0,16", "16,32"), ("16,24", "40,48"), ("24,32", "56,64")]
    header(shard, rows, cut=1)  # the other dimension
    refuse_to_hub(sample, ValueError, "do not fit|a part of dimension")
    for text in (
        "0,16,None#16,32,None",
        "|".join(["0,16,None"] * 3) + "#" + "|".join(["16,32,None"] * 3),
        "a#b",
        "0#1#2",
    ):
        with safe_open(shard, "pt") as handle:
            metadata = {**handle.metadata(), "local_global_slices_pairs": text}
        save_file(load_file(shard), shard, metadata=metadata)
        refuse_to_hub(sample, ValueError, f"{shard.name}: .*(do not fit|does not say which slices)")


def test_files_are_of_one_run(sample: Path) -> None:
    """Every file of a parameter is taken or refused, and all are of one topology."""
    folder, norm = of_rank(sample, "qkv", 0).parent, sample / "2/model/model/decoder/1/pp_block/input_layernorm"
    shard = of_rank(sample, "qkv", 0)
    extra = {
        norm / "model_weight_pp-rank-0-of-2_tp-rank-0-of-2.safetensors": "input_layernorm.weight is replicated",
        folder / "model_weight.safetensors": "mixes shards",
        folder / "model_weight_pp-rank-0-of-2_tp-rank-0-of-2 (copy).safetensors": "mixes shards",
        folder / "model_weight_pp-rank-1-of-2_tp-rank-0-of-2.safetensors": "mixes shards",
        folder / "model_weight_pp-rank-0-of-2_tp-rank-5-of-2.safetensors": "ranks that do not exist",
        folder / "model_weight_pp-rank-00-of-2_tp-rank-0-of-2.safetensors": "mixes shards",
    }
    for path, says in extra.items():
        shutil.copy(norm / "model_weight.safetensors" if path.parent == norm else shard, path)
        refuse_to_hub(sample, ValueError, says)
        path.unlink()

    rewrite_json(sample / "2/checkpoint_metadata.json", tp=4)
    refuse_to_hub(sample, ValueError, r"of tp=2, but .*checkpoint_metadata.json says 4: two runs are mixed")
    rewrite_json(sample / "2/checkpoint_metadata.json", tp=2)

    def renamed(old: str, new: str, paths: list[Path], says: str) -> None:
        moved = [path.rename(path.with_name(path.name.replace(old, new))) for path in paths]
        refuse_to_hub(sample, ValueError, says)
        for path in moved:
            path.rename(path.with_name(path.name.replace(new, old)))

    layer = sorted((sample / "2/model/model/decoder/0").rglob("*_pp-rank-*"))
    shards = sorted(folder.glob("*"))
    renamed("pp-rank-0", "pp-rank-1", shards, r"decoder.1 is held by the stages")
    renamed(
        "pp-rank-0", "pp-rank-1", layer, r"model.decoder.1 is held by stage 0, and model.decoder.0 before it by stage 1"
    )
    renamed("pp-rank-0", "pp-rank-7", shards, "ranks that do not exist")
    renamed("of-2_tp", "of-3_tp", shards, "are of different topologies: two runs are mixed")
    shutil.rmtree(folder)
    shutil.copytree(DATA / "tp1_pp1/2" / folder.relative_to(sample / "2"), folder)
    refuse_to_hub(sample, ValueError, "are of different topologies: two runs are mixed")


def test_masters_are_those_of_the_weights(sample: Path, tmp_path: Path) -> None:
    folder = sample / "2/optimizer"
    file = {
        (pp, tp): folder / f"optimizer_pp-{pp}-of-2_tp-{tp}-of-2_exp-0-of-1.pt" for pp in range(2) for tp in range(2)
    }
    kept = {path: path.read_bytes() for path in file.values()}

    def refused(says: str) -> None:
        refuse_to_hub(sample, ValueError, says, master_weights=True)
        for path, data in kept.items():
            path.write_bytes(data)

    for pp in range(2):
        shutil.copy(file[pp, 0], file[pp, 1])
        refused(rf"{file[pp, 1].name}: the masters of .* do not round .* they are those of tensor-parallel rank 0")
        file[pp, 0].write_bytes(kept[file[pp, 1]])
        refused(rf"{file[pp, 0].name}: the masters of .* they are those of tensor-parallel rank 1")
    shutil.copy(file[0, 0], file[1, 0])
    refused("nothing for model.decoder.3.* at tensor-parallel rank 0")

    def changed(path: Path, name: str, change: Callable) -> None:
        state = torch.load(path, weights_only=True)
        masters = state["gradient_accumulator"]
        masters[name] = change(masters.get(name))
        torch.save(state, path)

    norm, head = "model.decoder.1.pp_block.input_layernorm.weight", "model.lm_head.pp_block.weight"
    changed(file[0, 1], norm, lambda tensor: tensor * 2)  # of which the other rank's file has the right ones
    refused(f"{file[0, 1].name}: the masters of {norm} do not round .* of another rank, step or run")
    changed(file[1, 0], head, lambda tensor: tensor + 0.1)
    refused(f"{file[1, 0].name}: the masters of {head} do not round")
    changed(file[0, 0], head, lambda _: torch.load(file[1, 0], weights_only=True)["gradient_accumulator"][head])
    refused(f"{file[0, 0].name}: holds masters of {head}, whose stage is 1")
    changed(file[0, 0], "model.decoder.9.weight", lambda _: torch.zeros(2))
    refused("holds masters of model.decoder.9.weight, which the model does not have")
    changed(file[0, 0], norm, lambda _: 5)
    refused("does not map names of parameters to tensors")
    for name in (
        "optimizer_pp-0-of-2_tp-0-of-2.pt",
        "optimizer_pp-2-of-2_tp-0-of-2_exp-0-of-1.pt",
        "optimizer_copy.pt",
    ):
        shutil.copy(file[0, 0], folder / name)
        refused("does not belong to any rank, or to one that has another file")
        (folder / name).unlink()
    for path in file.values():
        path.unlink()
    (folder / "optimizer_pp-0-of-1_tp-0-of-1_exp-0-of-1.pt").write_bytes(kept[file[0, 0]])
    refuse_to_hub(sample, ValueError, "the optimizer is of another run", master_weights=True)


def test_damaged_masters_are_refused_by_name(sample: Path) -> None:
    optimizer = sample / "2" / "optimizer" / "optimizer_pp-1-of-2_tp-1-of-2_exp-0-of-1.pt"
    whole = optimizer.read_bytes()
    optimizer.write_bytes(whole[:-1000])
    refuse_to_hub(sample, ValueError, f"{optimizer.name}.*truncated", master_weights=True)
    optimizer.unlink()
    refuse_to_hub(sample, FileNotFoundError, f"{optimizer.name} is missing", master_weights=True)
    torch.save({"state": {}}, optimizer)
    refuse_to_hub(sample, ValueError, f"{optimizer.name}: has no fp32 masters", master_weights=True)
    torch.save({"gradient_accumulator": {"model.lm_head.pp_block.weight": torch.zeros(3)}}, optimizer)
    refuse_to_hub(sample, ValueError, "for model.decoder.3.* at tensor-parallel rank 1", master_weights=True)
    optimizer.rename(optimizer.with_name("optimizer_pp-0-of-2_dp-0-of-2_tp-0-of-2_exp-0-of-1.pt"))
    refuse_to_hub(sample, ValueError, "ZeRO-1", master_weights=True)
    shutil.rmtree(optimizer.parent)
    refuse_to_hub(sample, FileNotFoundError, "fp32 masters live there", master_weights=True)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"is_llama_config": False, "is_starcoder2_config": True}, "unsupported architecture.*is_starcoder2_config"),
        ({"moe_config": {"num_experts": 8}}, "moe_config.*mixture of experts"),
        ({"sliding_window_size": 128}, "sliding_window_size=128"),
        ({"qk_norm": True}, "unknown settings {'qk_norm': True}"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"tie_word_embeddings": True}, "no parameter model.lm_head"),
        ({"hidden_size": 64}, r"shape \(96, 32\) there, but model_config.json means \(96, 64\)"),
    ],
)
def test_models_nanotron_to_hub_cannot_express_are_refused(sample: Path, changes: dict, match: str) -> None:
    rewrite_json(sample / "2" / "model_config.json", **changes)
    refuse_to_hub(sample, ValueError, match)


def test_incomplete_configurations_are_refused(sample: Path, tmp_path: Path) -> None:
    path = sample / "2" / "model_config.json"
    fields = json.loads(path.read_text())
    del fields["rope_interleaved"]
    path.write_text(json.dumps(fields))
    refuse_to_hub(sample, ValueError, "lacks rope_interleaved")
    (sample / "2" / "config.yaml").write_text("model: {init_method: {use_mup: true}}")
    path.write_text(json.dumps({**fields, "rope_interleaved": False}))
    refuse_to_hub(sample, ValueError, "use_mup scales attention")
    path.write_text("{")
    refuse_to_hub(sample, ValueError, "model_config.json: not valid JSON")
    path.unlink()
    refuse_to_hub(sample, FileNotFoundError, "model_config.json is missing")
    (sample / "latest.txt").unlink()
    refuse_to_hub(sample, FileNotFoundError, "not a nanotron checkpoint")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "gpt2"}, "unsupported architecture.*gpt2"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"head_dim": 16}, "head_dim=16"),
        ({"intermediate_size": 32}, r"gate_proj.* has shape \(64, 32\), but the config implies \(32, 32\)"),
        ({"num_hidden_layers": 5}, "has no tensor 'model.layers.4"),
        ({"num_hidden_layers": 3}, "no place for the tensor model.layers.3"),
    ],
)
def test_models_hub_to_nanotron_cannot_express_are_refused(tmp_path: Path, changes: dict, match: str) -> None:
    folder = shutil.copytree(DATA / "expected" / "llama", tmp_path / "hub")
    rewrite_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=match):
        hub_to_nanotron(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_hub_folders_and_wrong_arguments_are_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "expected" / "llama", tmp_path / "hub")
    out, weights = tmp_path / "out", folder / "model.safetensors"
    for options, match in (({"tp": 4}, "use one of"), ({"tp": 0}, "tp=0"), ({"pp": 40}, "pp=40")):
        with pytest.raises(ValueError, match=match):
            hub_to_nanotron(folder, out, **options)
    with pytest.raises(ValueError, match="max_shard_size='5 parsecs'"):
        nanotron_to_hub(DATA / "tp1_pp1", out, max_shard_size="5 parsecs")
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="model.safetensors is truncated or damaged"):
        hub_to_nanotron(folder, out)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "gone.safetensors"}}')
    with pytest.raises(ValueError, match="gone.safetensors is missing"):
        hub_to_nanotron(folder, out)
    (folder / "model.safetensors.index.json").unlink()
    weights.unlink()
    with pytest.raises(ValueError, match="contains neither model.safetensors"):
        hub_to_nanotron(folder, out)
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        hub_to_nanotron(tmp_path / "nowhere", out)
    assert not out.exists()
    with pytest.raises(ValueError, match="is not empty"):
        nanotron_to_hub(DATA / "tp1_pp1", folder)


def test_destinations(sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier conversion is replaced on request; a run's own checkpoints never; a failure leaves nothing behind."""
    hub, nanotron = tmp_path / "hub", tmp_path / "nanotron"
    nanotron_to_hub(sample, hub, max_shard_size="16KB")
    hub_to_nanotron(hub, nanotron, step=3)
    with pytest.raises(ValueError, match="is not empty.*--overwrite"):
        hub_to_nanotron(hub, nanotron)
    hub_to_nanotron(hub, nanotron, tp=2, overwrite=True)
    assert sorted(path.name for path in nanotron.iterdir()) == ["0", "latest.txt"]
    nanotron_to_hub(nanotron, hub, overwrite=True)
    assert [path.name for path in hub.glob("*.safetensors")] == ["model.safetensors"]
    assert_same_tensors(hub_tensors(hub), hub_tensors(DATA / "expected" / "llama"))
    before = sorted(sample.rglob("*"))
    with pytest.raises(ValueError, match="no conversion writes optimizer_"):
        hub_to_nanotron(hub, sample, overwrite=True)
    for convert, folder in ((nanotron_to_hub, sample), (hub_to_nanotron, hub)):
        with pytest.raises(ValueError, match="source and destination are the same folder"):
            convert(folder, folder, overwrite=True)
    assert sorted(sample.rglob("*")) == before

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(nanotron_convert, "merge_shards", fail)
    monkeypatch.setattr(nanotron_convert, "write_run_files", fail)
    for convert, folder in ((nanotron_to_hub, sample), (hub_to_nanotron, hub)):
        with pytest.raises(OSError, match="disk is full"):
            convert(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


# --- scripts ----------------------------------------------------------------------------------------------------------


def run_script(name: str, *argv: str) -> None:
    path = ROOT / "conversions" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(argv)


def test_scripts_convert_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub, nanotron = str(tmp_path / "hub"), str(tmp_path / "nanotron")
    run_script("nanotron_to_hub", str(DATA / "tp2_pp2"), hub, "--master-weights", "--max-shard-size", "100KB")
    run_script("hub_to_nanotron", hub, nanotron, "--tp", "2", "--pp", "2", "--step", "7")
    assert (tmp_path / "nanotron" / "7" / QKV / "model_weight_pp-rank-0-of-2_tp-rank-1-of-2.safetensors").is_file()
    assert_same_tensors(hub_tensors(tmp_path / "hub"), hub_tensors(DATA / "expected" / "llama-fp32"))
    with pytest.raises(SystemExit, match="1"):
        run_script("nanotron_to_hub", str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert "nowhere is not a nanotron checkpoint" in capsys.readouterr().err

"""Training state <-> Hub: bit for bit what the trainer itself writes and holds, or refused by name."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from family_runs import FAMILIES
from pool import WorkerPool
from safetensors.torch import load_file, save_file
from test_cli import command, one_line, tokenizer
from test_gradients import stock_model
from tiny import pad_batch, random_dataset, tiny_config, training_arguments
from transformers import AutoConfig, AutoModelForCausalLM

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.checkpoint.directory.verify import check
from hf_nanotron.checkpoint.state.file import MASTER, StatePiece, clear, commit, write_rank
from hf_nanotron.checkpoint.state.read import StoredState
from hf_nanotron.checkpoint.state.slices import Slice
from hf_nanotron.convert import sharded as sharded_convert
from hf_nanotron.convert.sharded import hub_to_sharded, sharded_to_hub
from hf_nanotron.parallel.shard_spec import ShardSpec

ROOT = Path(__file__).parent.parent
Weights = dict[str, torch.Tensor]
Held = list[tuple[ShardSpec, int, int, np.ndarray]]


def hub_tensors(folder: Path) -> Weights:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def masters(checkpoint: Path) -> Weights:
    with StoredState(checkpoint / "training_state") as stored:
        tensors = {}
        for name, shape in stored.shapes().items():
            if MASTER not in stored.kinds(name):
                continue  # a buffer
            tensors[name] = torch.empty(shape)
            stored.fill(Slice.whole(name, shape), MASTER, tensors[name].view(-1))
        return tensors


def assert_same(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def assert_loads(folder: Path) -> None:
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report


# ---- what a run has written ----


def train(start: str, output: str, overrides: dict[str, Any], freeze: bool) -> Held:
    """Two steps, and what this rank then holds of the masters."""
    saving = {"output_dir": output, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    args = NanotronTrainingArguments(**training_arguments(**{**saving, **overrides}))
    model = ParallelAuto.from_pretrained(start, parallel=args.parallel)
    if freeze and model.mesh.is_first_stage:
        model.get_input_embeddings().requires_grad_(False)
    trainer = NanotronTrainer(
        model=model,
        args=args,
        train_dataset=random_dataset(16),
        data_collator=pad_batch,
        processing_class=tokenizer(),
    )
    trainer.train()
    held = [(s.spec, s.start, s.stop, s.master.detach().numpy().copy()) for s in trainer.weights.segments]
    model.mesh.close()
    return held


def join(ranks: list[Held]) -> Weights:
    """Whole masters from what all ranks hold."""
    wholes: Weights = {}
    for spec, start, stop, values in (piece for held in ranks for piece in held):
        whole = wholes.setdefault(spec.name, torch.full(spec.global_shape, torch.nan))
        numbers = spec.slice(torch.arange(whole.numel()).view(spec.global_shape)).reshape(-1)[start:stop]
        whole.view(-1)[numbers] = torch.from_numpy(values)
    return wholes


RUNS: dict[str, tuple[dict[str, Any], str, bool, bool]] = {  # sizes, family, tied, frozen embedding
    "tp2 bf16": ({"tp_size": 2, "bf16": True}, "llama", False, False),
    "pp2 bf16 tied": ({"pp_size": 2, "bf16": True, "gradient_accumulation_steps": 2}, "qwen3", True, False),
    "zero1 bf16 frozen": ({"zero_stage": 1, "bf16": True}, "qwen2", False, True),
    "zero3 bf16 tied": ({"zero_stage": 3, "bf16": True}, "qwen3", True, False),
    "tp2 tied": ({"tp_size": 2}, "qwen2", True, False),
    "pp2 frozen": ({"pp_size": 2, "gradient_accumulation_steps": 2}, "llama", False, True),
    "zero3 frozen": ({"zero_stage": 3}, "llama", False, True),
}
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def run(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Weights]]:
    """The checkpoint of a run of `RUNS`, and the masters that its ranks held. Not to be written to."""
    made: dict[str, tuple[Path, Weights]] = {}

    def make(name: str) -> tuple[Path, Weights]:
        if name not in made:
            sizes, family, tied, frozen = RUNS[name]
            folder = tmp_path_factory.mktemp("run")
            stock_model(family, tie_word_embeddings=tied, num_hidden_layers=2).save_pretrained(folder / "start")
            ranks = pool.run(2, train, str(folder / "start"), str(folder / "out"), sizes, frozen)
            made[name] = folder / "out" / "checkpoint-2", join(ranks)
        return made[name]

    return make


@pytest.fixture
def checkpoint(run: Callable[[str], tuple[Path, Weights]], tmp_path: Path) -> Path:
    """A copy of one that a test may damage."""
    return shutil.copytree(run("tp2 bf16")[0], tmp_path / "checkpoint-2")


@pytest.mark.parametrize("name", RUNS)
def test_the_hub_files_are_the_trainers(run: Callable[[str], tuple[Path, Weights]], tmp_path: Path, name: str) -> None:
    checkpoint, expected = run(name)
    own, hub, exact = hub_tensors(checkpoint), tmp_path / "hub", tmp_path / "exact"
    sharded_to_hub(checkpoint, hub)
    assert_same(hub_tensors(hub), own)
    if not RUNS[name][0].get("pp_size"):  # whose trainer writes a file for each stage
        assert (hub / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert_loads(hub)
    texts = {path.name for path in checkpoint.iterdir() if path.suffix in (".json", ".md", ".jinja")}
    texts -= {"trainer_state.json", "committed.json", "model.safetensors.index.json"}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= texts
    assert {path.name for path in hub.iterdir()} == {*texts, "model.safetensors"}
    for text in texts:
        assert (hub / text).read_bytes() == (checkpoint / text).read_bytes(), text

    # The masters themselves, and what nobody trained, widened.
    sharded_to_hub(checkpoint, exact, dtype="float32")
    frozen = {EMBEDDING: own[EMBEDDING].float()} if RUNS[name][3] else {}
    assert_same(hub_tensors(exact), {**expected, **frozen})
    assert json.loads((exact / "config.json").read_text())["dtype"] == "float32"
    assert_loads(exact)

    # And back: a checkpoint with the same masters, from which the same file comes.
    again, third = tmp_path / "checkpoint-0", tmp_path / "third"
    hub_to_sharded(exact, again)
    assert_same(masters(again), {**expected, **frozen})
    assert_loads(again)
    sharded_to_hub(again, third)
    assert (third / "model.safetensors").read_bytes() == (exact / "model.safetensors").read_bytes()


def test_a_checkpoint_without_weights(pool: WorkerPool, tmp_path: Path) -> None:
    """All but the last of a run with `save_hub_weights="last"`."""
    stock_model("qwen3", tie_word_embeddings=True, num_hidden_layers=2).save_pretrained(tmp_path / "start")
    sizes = {"pp_size": 2, "bf16": True, "gradient_accumulation_steps": 2, "save_hub_weights": "last", "save_steps": 1}
    pool.run(2, train, str(tmp_path / "start"), str(tmp_path / "out"), sizes, False)
    source, hub = tmp_path / "out" / "checkpoint-1", tmp_path / "hub"
    assert not list(source.glob("model*"))
    sharded_to_hub(source, hub)
    assert_same(hub_tensors(hub), {name: tensor.bfloat16() for name, tensor in masters(source).items()})
    assert_loads(hub)
    sharded_to_hub(tmp_path / "out" / "checkpoint-2", tmp_path / "last")
    assert_same(hub_tensors(tmp_path / "last"), hub_tensors(tmp_path / "out" / "checkpoint-2"))


def test_frozen_weights_are_asked_for(run: Callable[[str], tuple[Path, Weights]], tmp_path: Path) -> None:
    complete = run("zero1 bf16 frozen")[0]
    source, hub = shutil.copytree(complete, tmp_path / "checkpoint-2"), tmp_path / "hub"
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{EMBEDDING} \(1 tensors\) were not trained.*--frozen-from"):
        sharded_to_hub(source, hub)
    assert not hub.exists()
    sharded_to_hub(source, hub, frozen_from=complete)
    assert_same(hub_tensors(hub), hub_tensors(complete))


def test_files_and_index_are_those_of_transformers(checkpoint: Path, tmp_path: Path) -> None:
    sharded_to_hub(checkpoint, tmp_path / "hub", max_shard_size="15KB")
    AutoModelForCausalLM.from_pretrained(tmp_path / "hub").save_pretrained(tmp_path / "stock", max_shard_size="15KB")
    index, stock = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("hub", "stock")
    )
    assert index["metadata"] == stock["metadata"] and index["weight_map"].keys() == stock["weight_map"].keys()
    files = sorted(path.name for path in (tmp_path / "hub").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert list(index) == list(stock)
    assert_same(hub_tensors(tmp_path / "hub"), hub_tensors(tmp_path / "stock"))


def test_float16(run: Callable[[str], tuple[Path, Weights]], tmp_path: Path) -> None:
    checkpoint, expected = run("tp2 bf16")
    sharded_to_hub(checkpoint, tmp_path / "hub", dtype="float16")
    assert_same(hub_tensors(tmp_path / "hub"), {name: tensor.half() for name, tensor in expected.items()})
    hub = tmp_path / "large"
    shutil.copytree(tmp_path / "hub", hub)
    large = {name: tensor.float() for name, tensor in hub_tensors(hub).items()}
    large["model.norm.weight"][3] = 65520.0
    save_file(large, hub / "model.safetensors")
    hub_to_sharded(hub, tmp_path / "checkpoint-0")
    with pytest.raises(ValueError, match="'model.norm.weight' has values that float16 cannot hold"):
        sharded_to_hub(tmp_path / "checkpoint-0", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


# ---- Hub -> sharded ----


def test_a_checkpoint_at_step_0(run: Callable[[str], tuple[Path, Weights]], tmp_path: Path) -> None:
    """From bf16 files: widened masters in several files, complete and committed, without an optimizer."""
    source = run("tp2 bf16")[0]
    hub_to_sharded(source, tmp_path / "checkpoint-0", max_shard_size="30KB")
    check(tmp_path / "checkpoint-0")
    assert_same(masters(tmp_path / "checkpoint-0"), {k: t.float() for k, t in hub_tensors(source).items()})
    assert_same(hub_tensors(tmp_path / "checkpoint-0"), hub_tensors(source))
    assert len(list((tmp_path / "checkpoint-0" / "training_state").glob("*.safetensors"))) > 3
    with StoredState(tmp_path / "checkpoint-0" / "training_state") as stored:
        assert stored.values["optimizer"] is None and stored.values["scheduler"] is None
        assert all(stored.kinds(name) == {MASTER: torch.float32} for name in stored.shapes())
    state = json.loads((tmp_path / "checkpoint-0" / "trainer_state.json").read_text())
    assert state["global_step"] == 0
    names = {path.name for path in (tmp_path / "checkpoint-0").iterdir()}
    assert "tokenizer.json" in names and "training_args.bin" not in names

    hub_to_sharded(source, tmp_path / "bare", copy_weights=False)
    check(tmp_path / "bare")
    assert not list((tmp_path / "bare").glob("model*"))
    sharded_to_hub(tmp_path / "bare", tmp_path / "hub")
    assert_same(hub_tensors(tmp_path / "hub"), hub_tensors(source))


def test_a_hub_id_is_fetched(
    run: Callable[[str], tuple[Path, Weights]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(name: str, **options: Any) -> str:
        if name == "some/body":
            raise OSError("no such repository")
        asked.append((name, options["revision"], "tokenizer*" in options["allow_patterns"]))
        return str(run("tp2 bf16")[0])

    monkeypatch.setattr(sharded_convert, "snapshot_download", fetch)
    hub_to_sharded("some/model", tmp_path / "checkpoint-0", revision="v1")
    assert asked == [("some/model", "v1", True)]
    check(tmp_path / "checkpoint-0")
    for missing in ("some/body", str(tmp_path / "nowhere")):
        with pytest.raises(FileNotFoundError, match=missing):
            hub_to_sharded(missing, tmp_path / "out")


def test_a_family_that_merges_experts(tmp_path: Path) -> None:
    """There and back: the state has what the modules hold, the repository the Hub's layout, buffers their own dtype."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **FAMILIES["deepseek_v3"]["config"]))
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.normal_()
    model.save_pretrained(tmp_path / "stock")
    wanted, state = hub_tensors(tmp_path / "stock"), model.state_dict()
    hub_to_sharded(tmp_path / "stock", tmp_path / "checkpoint-0", max_shard_size="200KB", copy_weights=False)
    assert_same(masters(tmp_path / "checkpoint-0"), {name: state[name] for name, _ in model.named_parameters()})
    sharded_to_hub(tmp_path / "checkpoint-0", tmp_path / "hub", dtype="float32", max_shard_size="200KB")
    assert_same(hub_tensors(tmp_path / "hub"), wanted)
    sharded_to_hub(tmp_path / "checkpoint-0", tmp_path / "bf16", dtype="bfloat16")
    rounded = hub_tensors(tmp_path / "bf16")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert rounded.keys() == wanted.keys() and torch.equal(rounded[bias], wanted[bias])
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in rounded.items() if "correction" not in name)


# ---- memory ----

MEASURE = """
import sys
from pathlib import Path
from hf_nanotron.convert.sharded import hub_to_sharded, sharded_to_hub

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

def there_and_back(folder):
    sharded_to_hub(folder, folder / "hub", dtype="float32")
    print(status("VmHWM") - before)
    hub_to_sharded(folder / "hub", folder / "checkpoint-0", max_shard_size="20MB", copy_weights=False)
    print(status("VmHWM") - before)

before = 0
there_and_back(Path(sys.argv[1], "small"))  # what is imported on the way
before = status("VmRSS")
there_and_back(Path(sys.argv[1], "large"))
"""


def write_state(folder: Path, hidden_size: int, layers: int) -> int:
    """A checkpoint without weights, and with tensors of at most 10 MB for a hidden size of 1024; its bytes."""
    config = tiny_config(
        "llama", hidden_size=hidden_size, intermediate_size=2 * hidden_size + 512, num_hidden_layers=layers
    )
    config.save_pretrained(folder)
    shapes = sharded_convert.layout_of(config).shapes
    state = folder / "training_state"
    clear(state)
    for rank, (name, shape) in enumerate(shapes.items()):
        spec = ShardSpec(name, shape)
        values = torch.full(shape, float(rank)).view(-1)
        write_rank(state, rank, [StatePiece(spec, 0, values.numel(), {MASTER: values})])
    commit(state, len(shapes), {"optimizer": None, "scheduler": None, "extra": {}})
    return sum(path.stat().st_size for path in state.iterdir())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the high-water mark from /proc")
def test_memory(pool: WorkerPool, tmp_path: Path) -> None:
    """Both ways far less than the model: one tensor, or one file of masters."""
    size = write_state(tmp_path / "large", 1024, 5) / 2**20
    write_state(tmp_path / "small", 32, 1)
    assert 190 < size < 240

    code, out, err = pool.run_alone(forked.python_apart, MEASURE, [str(tmp_path)], tmp_path)
    assert code == 0, err
    to_hub, back = map(float, out.split()[-2:])
    print(f"{size:.0f} MiB: to the Hub {to_hub:.0f} MiB more, back {back:.0f} MiB")
    assert to_hub < 0.3 * size and back < 0.4 * size


# ---- commands ----


def run_script(name: str, *argv: str) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "conversions" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(argv)


def test_commands(
    run: Callable[[str], tuple[Path, Weights]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, expected = run("tp2 bf16")
    hub, again, bf16 = (str(tmp_path / name) for name in ("hub", "checkpoint-0", "bf16"))
    flags = ("--dtype", "float32", "--max-shard-size", "50KB")
    assert command("convert", "sharded-to-hub", str(source), hub, *flags)[0] == 0
    assert_same(hub_tensors(Path(hub)), expected)
    assert len(list(Path(hub).glob("*.safetensors"))) > 1
    assert "not empty" in one_line(command("convert", "sharded-to-hub", str(source), hub))
    run_script("hub_to_sharded", hub, again, "--no-weights", "--max-shard-size", "50KB")
    run_script("sharded_to_hub", again, bf16, "--dtype", "bfloat16")
    assert_same(hub_tensors(Path(bf16)), hub_tensors(source))
    assert command("convert", "hub-to-sharded", hub, again, "--overwrite")[0] == 0
    assert_same(masters(Path(again)), expected)
    assert_same(hub_tensors(Path(again)), expected)
    assert command("convert", "sharded-to-hub", str(source), hub, "--overwrite")[0] == 0
    assert_same(hub_tensors(Path(hub)), hub_tensors(source))

    assert "checkpoint-2" in one_line(command("convert", "sharded-to-hub", str(source.parent), bf16 + "x"))
    for script in ("sharded_to_hub", "hub_to_sharded"):
        with pytest.raises(SystemExit, match="1"):
            run_script(script, str(tmp_path / "nowhere"), str(tmp_path / "out"))
        assert "nowhere" in capsys.readouterr().err


def test_help_is_there_without_torch() -> None:
    program = (
        "import sys; from hf_nanotron.cli.main import build_parser; build_parser(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=600).returncode == 0
    for name in ("sharded_to_hub", "hub_to_sharded"):
        argv = [sys.executable, str(ROOT / "conversions" / f"{name}.py"), "--help"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=600, cwd=ROOT)
        assert done.returncode == 0 and "--overwrite" in done.stdout, done.stderr


# ---- refusals ----


def refuse(convert: Callable[..., None], source: Path, says: str, **options: Any) -> None:
    out = source.parent / "refused"
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        convert(source, out, **options)
    assert not out.exists()


def damage(path: Path) -> None:
    """Flip a bit near the end."""
    data = bytearray(path.read_bytes())
    data[-20] ^= 4
    path.write_bytes(data)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_damaged_states_are_refused_by_name(checkpoint: Path) -> None:
    file = checkpoint / "training_state" / "rank-00001.safetensors"
    whole = file.read_bytes()
    damage(file)
    # Optimizer state is not read, so it is the last byte of a master that must be wrong.
    kinds = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    end = max(entry["data_offsets"][1] for name, entry in kinds.items() if f"|{MASTER}|" in name)
    data = bytearray(whole)
    data[8 + int.from_bytes(whole[:8], "little") + end - 1] ^= 1
    file.write_bytes(data)
    refuse(sharded_to_hub, checkpoint, f"{file.name} is damaged: the checksum of master")
    file.write_bytes(whole[:-1])
    refuse(
        sharded_to_hub, checkpoint, f"{file.name} was cut off: it has .* bytes instead of .*; use an earlier checkpoint"
    )
    file.unlink()
    refuse(sharded_to_hub, checkpoint, f"{file.name} is missing, but index.json names it; use an earlier checkpoint")
    file.write_bytes(whole)
    index = checkpoint / "training_state" / "index.json"
    damage(index)
    refuse(sharded_to_hub, checkpoint, "index.json is truncated or damaged")
    index.unlink()
    refuse(sharded_to_hub, checkpoint, "saving was not finished")
    shutil.rmtree(index.parent)
    refuse(sharded_to_hub, checkpoint, "has no training_state/; name a checkpoint-N")


def test_files_beside_the_state_are_compared_with_the_marker(checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint-0"
    hub_to_sharded(checkpoint, source)
    (source / "README.md").write_text("edited")
    sharded_to_hub(source, tmp_path / "hub")
    assert (tmp_path / "hub" / "README.md").read_text() == "edited"
    damage(source / "tokenizer.json")
    refuse(sharded_to_hub, source, "tokenizer.json differs from what was saved")
    (source / "tokenizer.json").unlink()
    refuse(sharded_to_hub, source, "tokenizer.json is missing")


def test_other_models_are_refused(checkpoint: Path) -> None:
    (checkpoint / "committed.json").unlink(missing_ok=True)
    edit_config(checkpoint, num_hidden_layers=1)
    refuse(sharded_to_hub, checkpoint, r"holds model.layers.1.*\(9 tensors\), which the LlamaForCausalLM")
    edit_config(checkpoint, num_hidden_layers=3)
    refuse(sharded_to_hub, checkpoint, r"model.layers.2.*\(9 tensors\) were not trained")
    refuse(hub_to_sharded, checkpoint, "has no tensor 'model.layers.2.")
    edit_config(checkpoint, num_hidden_layers=2, vocab_size=121)
    refuse(sharded_to_hub, checkpoint, r"'model.embed_tokens.weight' in .* has shape \(120, 32\), but .* \(121, 32\)")
    refuse(hub_to_sharded, checkpoint, r"'model.embed_tokens.weight' in .* has shape \(120, 32\), but .* \(121, 32\)")
    edit_config(checkpoint, vocab_size=120, model_type="unheard-of")
    refuse(sharded_to_hub, checkpoint, "config.json: .*unheard-of")
    (checkpoint / "config.json").write_text("{")
    refuse(hub_to_sharded, checkpoint, "config.json: not valid JSON")
    (checkpoint / "config.json").unlink()
    refuse(sharded_to_hub, checkpoint, r"holds model\S*safetensors\S* and no config.json")


def test_damaged_repositories_are_refused_by_name(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint / "model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[:-1])
    refuse(hub_to_sharded, checkpoint, "model.safetensors is truncated or damaged")
    save_file({**tensors, "model.norm.weight": torch.ones(32, dtype=torch.int8)}, path)
    refuse(hub_to_sharded, checkpoint, "'model.norm.weight' .* is stored as I8.* quantized")
    path.unlink()
    refuse(hub_to_sharded, checkpoint, "contains neither model.safetensors nor")
    path.write_bytes(whole)

    def fail(*_: Any) -> None:
        raise ValueError("no space left")

    # In the middle of writing: nothing of it stays.
    monkeypatch.setattr(sharded_convert, "commit_state", fail)
    refuse(hub_to_sharded, checkpoint, "no space left")


def test_destinations(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source and destination are the same folder"):
        sharded_to_hub(checkpoint, checkpoint, overwrite=True)
    hub_to_sharded(checkpoint, tmp_path / "checkpoint-0")
    for convert in (sharded_to_hub, hub_to_sharded):
        with pytest.raises(ValueError, match="is not empty.*--overwrite"):
            convert(checkpoint, tmp_path / "checkpoint-0")
    # A repository is not written over a checkpoint, whose state would be another model's.
    with pytest.raises(ValueError, match="no conversion writes committed.json, trainer_state.json, training_state"):
        sharded_to_hub(checkpoint, tmp_path / "checkpoint-0", overwrite=True)
    check(tmp_path / "checkpoint-0")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="refusing to overwrite"):
        sharded_to_hub(checkpoint, tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    hub_to_sharded(checkpoint, tmp_path / "empty")
    check(tmp_path / "empty")
    with pytest.raises(ValueError, match="dtype='int8' is not one of auto, float32"):
        sharded_to_hub(checkpoint, tmp_path / "out", dtype="int8")
    with pytest.raises(ValueError, match="max_shard_size='5 parsecs'"):
        sharded_to_hub(checkpoint, tmp_path / "out", max_shard_size="5 parsecs")
    assert not (tmp_path / "out").exists()

"""`hf-nanotron average`: the mean of Hub repositories, whoever has written them, against float64 of whole tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import message, pad_batch, random_dataset, tiny_config, training_arguments
from transformers import AutoModelForCausalLM as StockAuto

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.checkpoint.hub import nonfinite_tensors
from hf_nanotron.cli.main import main
from hf_nanotron.convert import average as module
from hf_nanotron.convert.average import average

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def repository(directory: Path, seed: int, dtype: str = "float32", shard: str = "5GB", **overrides: Any) -> Path:
    torch.manual_seed(seed)
    model = StockAuto.from_config(tiny_config(num_hidden_layers=2, **overrides)).to(DTYPES[dtype])
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(directory.glob("*.safetensors")) for name, value in load_file(path).items()}


def expected(folders: list[Path], shares: list[float]) -> dict[str, torch.Tensor]:
    stored = [weights(folder) for folder in folders]
    means = {}
    for name, value in stored[0].items():
        parts = [share * each[name].double() for share, each in zip(shares, stored, strict=True)]
        means[name] = (torch.stack(parts).sum(0) / sum(shares)).to(value.dtype)
    return means


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shares", [None, [2.0, 1.0, 1.0]])
def test_mean(tmp_path: Path, dtype: str, shares: list[float] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one file or several, in blocks that do not divide the tensors, with the dtype kept; stock loads it."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 8 * 32)
    sizes = ("5GB", "20KB", "30KB")
    folders = [repository(tmp_path / str(i), i, dtype, shard) for i, shard in enumerate(sizes)]
    assert len(list(folders[1].glob("*.safetensors"))) > 1
    (folders[0] / "tokenizer_config.json").write_text("{}")
    average(folders, tmp_path / "out", weights=shares, max_shard_size="20KB")
    found, reference = weights(tmp_path / "out"), expected(folders, shares or [1.0] * 3)
    assert found.keys() == reference.keys()
    assert all(torch.equal(found[name], value) for name, value in reference.items())
    model = StockAuto.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == DTYPES[dtype] and (tmp_path / "out" / "tokenizer_config.json").exists()
    assert torch.equal(model.state_dict()["model.norm.weight"], reference["model.norm.weight"])


def test_checkpoints_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command line; the moving averages of a run are folders as others. A damaged one is refused."""
    start = repository(tmp_path / "start", 0)
    values = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "ema_decay": 0.5}
    args = NanotronTrainingArguments(**training_arguments(output_dir=str(tmp_path / "run"), **values))
    model = ParallelAuto.from_pretrained(start, parallel=args.parallel)
    NanotronTrainer(model=model, args=args, train_dataset=random_dataset(8), data_collator=pad_batch).train()
    model.mesh.close()
    for part in ("", "ema"):
        folders, out = [tmp_path / "run" / f"checkpoint-{step}" / part for step in (1, 2)], tmp_path / f"out{part}"
        main(["average", *map(str, folders), str(out), "--weights", "1,3"])
        reference = expected(folders, [1.0, 3.0])
        assert all(torch.equal(value, reference[name]) for name, value in weights(out).items())
        StockAuto.from_pretrained(out)
    assert "is the average of 2 repositories" in capsys.readouterr().out
    first, second = (tmp_path / "run" / f"checkpoint-{step}" for step in (1, 2))
    (second / "model.safetensors").write_bytes((first / "model.safetensors").read_bytes())
    assert "differs from what was saved" in message(lambda: average([first, second], tmp_path / "damaged"))


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sentence, and nothing is left behind."""
    one, two = repository(tmp_path / "one", 0), repository(tmp_path / "two", 1)
    wider, half = repository(tmp_path / "wide", 1, intermediate_size=64), repository(tmp_path / "half", 1, "bfloat16")
    out = tmp_path / "out"
    say = lambda *sources, **options: message(lambda: average(sources, out, **options))  # noqa: E731
    assert "at least two repositories, not of 1" in say(one)
    assert "is given twice" in say(one, one)
    assert "3 weights for 2 repositories" in say(one, two, weights=[1, 2, 3])
    assert "each must be at least 0, and one above" in say(one, two, weights=[-1, 2])
    assert "intermediate_size is 48 and 64 in config.json" in say(one, wider)
    assert "as torch.float32 and torch.bfloat16" in say(one, half)
    (wider / "config.json").write_text((one / "config.json").read_text())
    assert "has shapes (48, 32) and (64, 32)" in say(one, wider) or "has shapes (32, 48) and (32, 64)" in say(
        one, wider
    )
    stored = load_file(two / "model.safetensors")
    lacking = {name: value for name, value in stored.items() if name != "lm_head.weight"}
    save_file(lacking, two / "model.safetensors", {"format": "pt"})
    assert "only one of them has lm_head.weight (1 tensors)" in say(one, two)
    for number, folder in enumerate((one, two)):
        save_file({**stored, "counter": torch.tensor([number])}, folder / "model.safetensors", {"format": "pt"})
    assert "holds whole numbers, of which there is no mean" in say(one, two)
    assert not out.exists()
    spoilt = {**stored, "model.norm.weight": torch.full_like(stored["model.norm.weight"], torch.nan)}
    save_file(stored, one / "model.safetensors", {"format": "pt"})
    save_file(spoilt, two / "model.safetensors", {"format": "pt"})
    with monkeypatch.context() as patch:  # whose values they are, not the first folder's
        said: list[str] = []
        patch.setattr(nonfinite_tensors.logger, "warning", said.append)
        average([one, two], tmp_path / "spoilt")
    assert len(said) == 1 and f"32 of 32 values of 'model.norm.weight' in {two} are not finite" in said[0]
    assert "source and destination are the same" in message(lambda: average([one, two], one))
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
        average([one, tmp_path / "nowhere"], out)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert f"{adapter} is an adapter (adapter_config.json), whose factors have no mean" in say(one, adapter)

"""A checkpoint that somebody has forged executes nothing: no pickle in it is read as objects."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import WorkerPool
from tiny import pad_batch, random_dataset, tiny_config, training_arguments

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.checkpoint.directory.verify import MARKER, read_marker
from hf_nanotron.checkpoint.files.checked import write_checked
from hf_nanotron.checkpoint.files.disk import checksum_of


class Boom:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def forge(checkpoint: Path, name: str, executed: Path) -> None:
    """Write a pickle, with a marker that knows it."""
    marker, file = read_marker(checkpoint), checkpoint / name
    if name.endswith("model.bin"):
        torch.save({"model.norm.weight": Boom(executed)}, file)
    else:
        file.write_bytes(pickle.dumps(Boom(executed)))
    entry = {"bytes": file.stat().st_size, "crc32": checksum_of(file)}
    marker["files"][name] = {**marker["files"].get(name, {}), **entry}
    write_checked(checkpoint / MARKER, {key: value for key, value in marker.items() if key != "crc32"})


def resume_forged(output: str) -> dict[str, str]:
    """Trains, forges one file after the other, and resumes; what each resume says."""

    def run(steps: int, **resume: Any) -> str:
        settings = {"output_dir": output, "save_strategy": "steps", "save_steps": 2, "max_steps": steps}
        args = NanotronTrainingArguments(**training_arguments(**settings))
        model = AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=1), parallel=args.parallel)
        trainer = NanotronTrainer(model=model, args=args, train_dataset=random_dataset(8), data_collator=pad_batch)
        try:
            return f"step {trainer.train(**resume).global_step}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    assert run(2) == "step 2"
    checkpoint, said = Path(output, "checkpoint-2"), {}
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "pytorch_model.bin", "rng_state.pth"):
        forge(checkpoint, name, Path(output, "executed"))
        said[name] = run(3, resume_from_checkpoint=str(checkpoint))
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="weights in other formats"):  # there is a pytorch_model.bin
        AutoModelForCausalLM.from_pretrained(checkpoint)
    return said


def test_pickles_are_not_executed(pool: WorkerPool, tmp_path: Path) -> None:
    (said,) = pool.run(1, resume_forged, str(tmp_path))
    assert not (tmp_path / "executed").exists(), said
    rng = said.pop("rng_state.pth")
    assert "Weights only load failed" in rng, rng
    assert said == dict.fromkeys(said, "step 3")
    Boom(tmp_path / "executed").__reduce__()[0](tmp_path / "executed")
    assert (tmp_path / "executed").exists()  # it would have been

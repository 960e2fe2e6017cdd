"""Folders that are given where a model is asked for: each is told what it is instead, in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_nanotron.checkpoint.files.model_folder import why_no_model
from hf_nanotron.cli import main
from hf_nanotron.cli.errors import SettingsError, existing_model
from hf_nanotron.convert.average import average
from hf_nanotron.convert.folder import load_config
from hf_nanotron.convert.sharded import hub_to_sharded

# What is in the folder, and what is said of it.
FOLDERS: dict[str, tuple[dict[str, str], str]] = {
    "adapter": (
        {"adapter_config.json": json.dumps({"base_model_name_or_path": "org/base"}), "adapter_model.safetensors": ""},
        "is an adapter (adapter_config.json of org/base) and no whole model: merge it into its base first",
    ),
    "damaged adapter": ({"adapter_config.json": "{"}, "is an adapter (adapter_config.json) and no whole model"),
    "empty": ({}, "is empty."),
    "run": (
        {"checkpoint-9/x": "", "checkpoint-10/x": "", "checkpoint-11": "", "trainer_state.json": ""},
        "is the folder of a run; give one of its checkpoints, such as checkpoint-10.",
    ),
    "no config": ({"model.safetensors": ""}, "holds model.safetensors and no config.json, which says what model it"),
    "half": ({"generation_config.json": "{}"}, "holds no config.json: no model was saved there, or not completely."),
}


def made(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_what_a_folder_is(name: str, tmp_path: Path) -> None:
    files, says = FOLDERS[name]
    folder = made(tmp_path / "given", files)
    assert why_no_model(folder) is not None and says in str(why_no_model(folder))
    with pytest.raises(SettingsError) as told:
        existing_model("model.name_or_path", str(folder))
    assert str(told.value).startswith(f"model.name_or_path: {folder} ") and says in str(told.value)
    with pytest.raises(FileNotFoundError) as told_too:
        load_config(folder)
    assert says in str(told_too.value)


def test_what_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = made(tmp_path / "good", {"config.json": "{}"})
    assert why_no_model(good) is None and existing_model("MODEL", str(good)) == str(good)
    assert existing_model("MODEL", "org/name") == "org/name"  # of the Hub
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="file is a file; give the folder of a model"):
        hub_to_sharded(file, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"org/name: there is no such folder. .* \(hf download org/name"):
        average(["org/name", good], tmp_path / "out")
    for given, says in (
        (file, "is a file; give the folder of a run, with its checkpoint-N"),
        (tmp_path / "absent", "does not exist; give the folder of a run"),
        (made(tmp_path / "half", {"checkpoint-5/model.safetensors": ""}), "of checkpoint-5 the save was not completed"),
    ):
        with pytest.raises(SystemExit):
            main(["upload", str(given), f"file://{tmp_path}/store"])
        assert says in capsys.readouterr().err

"""The folders that a conversion reads and writes: what belongs to one, and what a failure takes away again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from ..checkpoint.directory.own_files import files_in, is_from_a_save
from ..checkpoint.directory.verify import MARKER, read_marker
from ..checkpoint.files.disk import check_length, checksum_of
from ..checkpoint.files.inside import inside
from ..checkpoint.files.model_folder import why_no_model
from ..checkpoint.state.training_state import DIRECTORY

WEIGHTS = ("model*.safetensors", SAFE_WEIGHTS_INDEX_NAME)
TEXTS = (  # what else a Hub repository may hold; everything besides belongs to the run
    CONFIG_NAME, "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges.txt", "*.model", "*.tiktoken", "*.jinja", "chat_template*", "additional_chat_templates",
    "preprocessor_config.json", "processor_config.json", "README.md", "LICENSE*", "NOTICE*",
)  # fmt: skip


def refuse_same(source: Path, destination: Path) -> None:
    if source.resolve() == destination.resolve():
        raise ValueError(f"source and destination are the same folder ({destination}); choose another destination.")


def load_config(folder: Path) -> PreTrainedConfig:
    path = inside(folder, CONFIG_NAME, str(folder))
    read_json(path)  # by itself first: for a missing file, transformers' own message would speak of the Hub
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)  # or it would ask, and wait
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def check_unchanged(checkpoint: Path, patterns: tuple[str, ...]) -> None:
    """Compare what matches `patterns` with the marker of a checkpoint. One without a marker may be anything."""
    if not (checkpoint / MARKER).exists():
        return
    for name, entry in read_marker(checkpoint)["files"].items():
        if any(fnmatch(name, pattern) for pattern in patterns):
            path = inside(checkpoint, name, str(checkpoint / MARKER))
            check_length(path, entry["bytes"], f"{MARKER} names it")
            if entry["crc32"] is not None and checksum_of(path) != entry["crc32"]:
                raise ValueError(f"{path} differs from what was saved (its checksum differs): damaged or edited.")


def matches(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if any(fnmatch(path.name, pattern) for pattern in patterns)]


def copy_files(source: Path, destination: Path, patterns: Iterable[str]) -> None:
    """Copy what matches, other than `config.json`."""
    for path in matches(source, patterns):
        for file in path.rglob("*") if path.is_dir() else [path]:
            name = file.relative_to(source).as_posix()
            inside(source, name, str(source))
            if file.is_dir() or name == CONFIG_NAME:
                continue
            if not file.is_file():
                raise ValueError(f"{file} is not a regular file, so it is not copied; remove it.")
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, destination / name)


@contextmanager
def writing(
    folder: Path, owned: tuple[str, ...], key: str, overwrite: bool, inner: tuple[str, ...] | None = None
) -> Iterator[None]:
    """A folder for what is written inside the `with`; if that fails, it is taken away again.

    Args:
        owned: patterns of what may be in the folder with `overwrite`, and is removed.
        key: the file that made it usable, which goes first.
        inner: patterns of the files in its folders; None for what is in a checkpoint or a Hub repository.
    """
    existed = folder.exists()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        if not overwrite:
            raise ValueError(
                f"{folder} is not empty: files of two models would mix. Choose a new or empty folder, or set "
                "`overwrite` (--overwrite) if it holds an earlier conversion."
            )
        _remove_conversion(folder, owned, key, inner)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in folder.iterdir() if folder.is_dir() else ():
            _remove(path)
        if not existed and folder.is_dir():
            folder.rmdir()
        raise


def _remove_conversion(folder: Path, owned: tuple[str, ...], key: str, inner: tuple[str, ...] | None) -> None:
    """Empty a folder that holds nothing but what a conversion writes."""
    kept = sorted(set(folder.iterdir()) - set(matches(folder, owned))) if folder.is_dir() else [folder]
    names = sorted(files_in(folder)) if folder.is_dir() else ()
    if inner is None:  # of a name like those of our weights, or beside our state, but none that a conversion gives
        like_ours = (name for name in names if fnmatch(name, WEIGHTS[0]) or name.startswith(f"{DIRECTORY}/"))
        kept += [folder / name for name in like_ours if not is_from_a_save(name)]
    else:
        kept += [folder / name for name in names if "/" in name and not any(fnmatch(name, each) for each in inner)]
    if kept:
        raise ValueError(
            f"refusing to overwrite {folder}: no conversion writes {', '.join(path.name for path in kept[:5])}. "
            "Choose a new or empty folder."
        )
    (folder / key).unlink(missing_ok=True)
    for path in folder.iterdir():
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """As transformers writes its own."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; a missing or damaged file is refused by name."""
    if not path.is_file():
        why = why_no_model(path.parent) if path.name == CONFIG_NAME and path.parent.exists() else None
        raise FileNotFoundError(why or f"{path} is missing: the folder is not a complete checkpoint.")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Copy the checkpoint again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a {type(found).__name__} and not an object with keys. Copy the checkpoint again.")
    return found

"""A set of rows that `datasets` reads, of tokens or of text that is tokenized here."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path
from typing import Any

from ..ops.cross_entropy import IGNORE_INDEX
from .data_plan import SetPlan
from .errors import existing_path, explained

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
FILE_TYPES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_table(plan: SetPlan, tokenizer: Any) -> Any:
    """A `datasets.Dataset` with `input_ids`: its own, or those of its texts."""
    where = plan.where
    section = {**plan.options, "path": existing_path(f"{where}.path", plan.options["path"], "file or folder")}
    with explained(f"{where}.path={section['path']!r} cannot be read"):
        dataset = _read(section, where)
    if not len(dataset):
        raise ValueError(f"{where}.path={section['path']!r} has no samples in its split {_split(section)!r}.")
    return _tokenised(dataset, section, tokenizer, where)


def load_stream(where: str, stream: str, name: str | None, data_files: Any, split: str | None) -> Any:
    """A `datasets.IterableDataset` over files, a folder of them, or a Hub dataset."""
    from datasets import load_dataset

    stream = existing_path(f"{where}.stream", stream, "file or folder")
    if (kind := _file_type(stream)) is not None:
        for key, value in (("name", name), ("data_files", data_files)):
            if value is not None:
                raise ValueError(
                    f"{where}.{key}={value!r} does not go with {where}.stream={stream!r}, which is a file."
                )
        stream, data_files = kind, stream
    return load_dataset(stream, name, data_files=data_files, split=split or "train", streaming=True)


def _file_type(path: str) -> str | None:
    """What `datasets` calls the format of a file, by its name, also of a compressed one; None for other names."""
    stem, end = os.path.splitext(path)
    return FILE_TYPES.get(os.path.splitext(stem)[1] if end in COMPRESSIONS else end)


def _split(section: dict[str, Any]) -> str:
    return str(section.get("split") or "train")


def _read(section: dict[str, Any], where: str) -> Any:
    from datasets import DatasetDict, load_dataset, load_from_disk

    path, split = Path(section["path"]), _split(section)
    is_saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    for name in ("name", "data_files"):
        if section.get(name) is not None and (is_saved or _file_type(section["path"])):
            raise ValueError(
                f"{where}.{name}={section[name]!r} needs a {where}.path that is a name for datasets.load_dataset, but "
                f"{section['path']!r} is a {'folder of save_to_disk' if is_saved else 'file'}; remove {where}.{name}."
            )
    if not is_saved:
        files, builder = section.get("data_files"), section["path"]
        if (kind := _file_type(section["path"])) is not None:
            if not path.is_file():
                raise ValueError(f"{where}.path={section['path']!r}: file not found.")
            if not path.stat().st_size:
                raise ValueError(f"{where}.path={section['path']!r} is an empty file.")
            files, builder = str(path), kind
        return load_dataset(builder, section.get("name"), data_files=files, split=split)
    if not any(path.rglob("*.arrow")):
        raise ValueError(f"{where}.path={section['path']!r} has no samples.")
    saved = load_from_disk(str(path))
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(splits)}.")
    return splits[split]


def _tokenised(dataset: Any, section: dict[str, Any], tokenizer: Any, where: str = "dataset") -> Any:
    """`dataset` with `input_ids`: its own, or its texts, each ended by the end-of-text token, cut into samples. Rows
    without text (empty or null) are left out.

    With `documents="mask"` samples have `position_ids`, which restart with each text, and `labels`, which do not
    predict the first token of one.
    """
    column, size = section.get("text_column"), int(section.get("sequence_length", 0))
    if column is None:
        if "input_ids" not in dataset.column_names:
            raise ValueError(
                f"the data of {where} have the columns {', '.join(dataset.column_names)}: without input_ids they need "
                f"{where}.text_column, dataset.sequence_length and tokenizer."
            )
        _check_ids(dataset)
        return dataset
    if column not in dataset.column_names:
        raise ValueError(f"{where}.text_column={column!r} is not one of {', '.join(dataset.column_names)}.")
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise ValueError(f"{where}.text_column needs a tokenizer with an end-of-text token.")
    kept_apart, what = section.get("documents") == "mask", f"{where}.text_column={column!r}"

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        # verbose=False: texts longer than the model are expected, they are cut.
        given = _texts(batch[column], what)
        rows = tokenizer(given, return_attention_mask=False, verbose=False)["input_ids"] if given else []
        end = tokenizer.eos_token_id
        texts = [row if row[-1:] == [end] else [*row, end] for row in rows]
        streams = {"input_ids": list(chain.from_iterable(texts))}
        if kept_apart:
            streams["position_ids"] = list(chain.from_iterable(range(len(text)) for text in texts))
            streams["labels"] = list(chain.from_iterable([IGNORE_INDEX, *text[1:]] for text in texts))
        starts = range(0, len(streams["input_ids"]) - size + 1, size)
        return {name: [stream[start : start + size] for start in starts] for name, stream in streams.items()}

    with explained(f"{what} cannot be tokenized"):
        packed = dataset.map(
            tokenise,
            batched=True,
            remove_columns=dataset.column_names,
            num_proc=section.get("num_proc"),
            desc="Packing",
        )
    if not len(packed):
        raise ValueError(f"the texts of {where} are too short for one sample of sequence_length={size} tokens.")
    return packed


def _texts(values: list[Any], what: str) -> list[str]:
    """Those with something in them: of nothing, only its end would be trained on."""
    for value in values:
        if not isinstance(value, str | None):
            raise ValueError(f"{what} holds a {type(value).__name__} ({value!r:.40}), which is no text.")
    return [value for value in values if value]


def _check_ids(dataset: Any) -> None:
    """Refuse a column of tokens or labels that does not hold a list of integers in every row."""
    for name in ("input_ids", "labels"):
        if name not in dataset.column_names:
            continue
        kind, values = dataset.features[name], dataset.data.column(name)
        if not str(getattr(getattr(kind, "feature", None), "dtype", "")).startswith(("int", "uint")):
            raise ValueError(f"the column {name} of the dataset must hold a list of integers in each row, not {kind}.")
        if values.null_count:
            raise ValueError(f"the column {name} of the dataset is empty (null) in {values.null_count} rows.")

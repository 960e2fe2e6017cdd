"""nanotron's data stages -> the section `dataset`: sets of `datasets`, nanosets in their order, stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .keys import Keys

UNNAMED = "name-the-data-here"
# Keys of nanosets that came with another reader (nanotron's `tokenized_bytes.py`), whose samples are others.
LATER_READER = (
    "dataset_read_path", "dataset_max_tokens", "pad_samples_to_global_batch_size", "shuffle_files", "skip_in_stream",
    "token_size_in_bytes", "tokenizer_name", "use_old_brrr_dataloader",
)  # fmt: skip

# Keys of its two kinds of datasets.
TABLE = (
    "hf_dataset_or_datasets", "hf_dataset_splits", "hf_dataset_config_name", "text_column_name", "sft_dataloader",
    "dataset_processing_num_proc_per_process", "dataset_overwrite_cache", "debug_max_samples",
)  # fmt: skip
NANOSET = ("dataset_folder", "dataset_weights", "vocab_size", "return_positions", *LATER_READER)


@dataclass(frozen=True)
class Run:
    """Of the run that is converted.

    Attributes:
        samples: of the whole run, by the batch of all ranks and the steps.
        step: after which it goes on; 0 for one that begins.
        consumed: samples that a checkpoint's stages have given, by name.
        masks_documents: whether attention is kept inside documents.
    """

    sequence_length: int
    samples: int
    step: int = 0
    consumed: dict[str, int] = field(default_factory=dict)
    masks_documents: bool = False


@dataclass
class Found:
    """The section, a tokenizer that only the data name, and loading workers of the first stage."""

    section: dict[str, Any]
    tokenizer: str | None = None
    workers: int | None = None


def dataset_section(keys: Keys, run: Run) -> Found:
    """The section `dataset` of all stages that are not over at the step with which the run goes on."""
    stages = []
    for place, prefix in enumerate(_stages(keys)):
        start = keys.number(f"{prefix}.start_training_step", 1) - 1  # theirs count from 1
        name = str(keys.take(f"{prefix}.name", place))
        length = keys.number(f"{prefix}.sequence_length", run.sequence_length)
        stages.append((start, place, name, length, f"{prefix}.data" if prefix else "data"))
    stages.sort()
    if not stages:
        keys.note("data_stages", "no stage says what to train on: name it in dataset")
    over = ([stop <= run.step for stop in [start for start, *_ in stages[1:]]] + [False])[: len(stages)]
    tokenizer, workers, parts = None, None, []
    for (start, _, name, length, prefix), is_over in zip(stages, over, strict=True):
        if is_over:
            for key in keys.below(prefix):
                keys.note(f"{prefix}.{key}", "of a stage that the checkpoint has left behind")
            continue
        part, told = _set(keys, prefix, run, run.consumed.get(name, 0))
        count = keys.number(f"{prefix}.num_loading_workers", 1)
        workers = count if workers is None else workers
        if count != workers:
            keys.note(f"{prefix}.num_loading_workers", f"one number holds for all stages: {workers}")
        tokenizer = tokenizer or told
        if part is None:
            keys.note(
                f"{prefix}.dataset",
                "a dataloader of the run's own, or random tokens; the stage is left out. Name its data in dataset, or "
                "write a script (see examples/custom_dataloader)",
            )
            continue
        parts.append((name, {"start_step": max(0, start - run.step), "sequence_length": length, **part}))
    if not parts:
        return Found({"path": UNNAMED}, tokenizer, workers)
    if len(parts) == 1:
        ((_, part),) = parts
        del part["start_step"]
        if "path" in part:
            part["train_split"] = part.pop("split")
        return Found(part, tokenizer, workers)
    shared = run.sequence_length
    parts[0][1]["start_step"] = 0
    written = [_stage(name, part, shared) for name, part in parts]
    return Found({"sequence_length": shared, "stages": written}, tokenizer, workers)


def _stage(name: str, part: dict[str, Any], shared: int) -> dict[str, Any]:
    """A stage. A nanoset begins at its first sample in each of them, as a set of the stage's name does."""
    of_stage = {key: part.pop(key) for key in ("start_step", "sequence_length")}
    if of_stage["sequence_length"] == shared:
        del of_stage["sequence_length"]
    if "order" not in part:
        return {**of_stage, **part}
    return {**of_stage, "max_epochs": None, "mixture": {name: {**part, "weight": 1.0}}}


def _stages(keys: Keys) -> list[str]:
    """Prefixes of the stages; `""` for data without stages, as before there were any."""
    found = list(dict.fromkeys(key.split(".")[0] for key in keys.values if key.startswith("data_stages[")))
    if not found and any(key.startswith("data.") for key in keys.values):
        return [""]
    return found


def _set(keys: Keys, prefix: str, run: Run, consumed: int) -> tuple[dict[str, Any] | None, str | None]:
    """One stage's set or mixture (None if it has none), and the tokenizer that it names."""
    seed = keys.number(f"{prefix}.seed", 42)
    given = keys.below(f"{prefix}.dataset")
    heads = {name.partition(".")[0] for name in given}
    is_nanoset, is_table = "dataset_folder" in heads, "hf_dataset_or_datasets" in heads
    known = NANOSET if is_nanoset else TABLE if is_table else ()
    for name, value in given.items():
        if name.partition(".")[0] not in known and value is not None and name:
            keys.note(f"{prefix}.dataset.{name}", "not known here")
    if is_nanoset:
        return _nanoset(keys, f"{prefix}.dataset", given, run, seed, consumed)
    if not is_table:
        return None, None
    if consumed:
        keys.note(f"{prefix}.dataset", f"begins anew: the {consumed} samples that were read are not skipped")
    return _table(keys, f"{prefix}.dataset", given), None


def _table(keys: Keys, prefix: str, given: dict[str, Any]) -> dict[str, Any]:
    """Text, or chats, that `datasets` reads."""
    is_chat = "sft_dataloader" in given or "debug_max_samples" in given
    kind = "chat" if is_chat else "path"
    shared: dict[str, Any] = {}
    if not is_chat:
        shared["text_column"] = given.get("text_column_name") or "text"
        if (given.get("dataset_processing_num_proc_per_process") or 1) > 1:
            shared["num_proc"] = given["dataset_processing_num_proc_per_process"]
    if (name := given.get("hf_dataset_config_name")) is not None:
        shared["name"] = name
    split = given.get("hf_dataset_splits") or "train"
    if isinstance(split, list):
        keys.note(f"{prefix}.hf_dataset_splits", f"one split is read: {split[0]!r}")
        split = split[0]
    for key in ("dataset_overwrite_cache", "debug_max_samples"):
        if given.get(key):
            keys.note(f"{prefix}.{key}", "none: the cache of `datasets` follows what is read and how")
    names = given.get("hf_dataset_or_datasets")
    shares = {key.partition(".")[2]: value for key, value in given.items() if key.startswith("hf_dataset_or_datasets.")}
    if isinstance(names, list):
        shares = dict.fromkeys(map(str, names), 1.0)
    if not shares:
        return {kind: str(names), "split": str(split), **shared}
    if len(shares) == 1:
        ((name, share),) = shares.items()
        part = "" if share == 1 else f"[:{100 * float(share):g}%]"
        return {kind: name, "split": f"{split}{part}", **shared}
    keys.note(
        f"{prefix}.hf_dataset_or_datasets",
        "nanotron joins these shares of the sets, and a weight is a share of the rows that are trained on: multiply "
        "each by the number of rows of its set",
    )
    sets = {name: {kind: name, "split": str(split), **shared, "weight": share} for name, share in shares.items()}
    return {"mixture": sets}


def _nanoset(
    keys: Keys, prefix: str, given: dict[str, Any], run: Run, seed: int, consumed: int
) -> tuple[dict[str, Any], str | None]:
    """Folders of files of tokens."""
    folders, weights = given.get("dataset_folder"), given.get("dataset_weights")
    by_name = {key.partition(".")[2]: value for key, value in given.items() if key.startswith("dataset_folder.")}
    if by_name:
        folders, weights = list(by_name), list(by_name.values())
    folders = [folders] if isinstance(folders, str) else list(folders or [])
    if given.get("dataset_read_path"):
        read = given["dataset_read_path"]
        keys.note(f"{prefix}.dataset_read_path", f"read instead of dataset_folder={folders}")
        folders = [read] if isinstance(read, str) else list(read)
    options: dict[str, Any] = {}
    if (width := given.get("token_size_in_bytes")) is not None:
        options["token_size"] = width
    if (size := given.get("vocab_size")) is not None:
        options["vocab_size"] = size
    if run.masks_documents and given.get("return_positions", True):
        options["documents"] = "mask"
    elif given.get("return_positions"):
        keys.note(
            f"{prefix}.return_positions",
            "nanotron leaves the first token of each document out of the loss; documents: mask does so too, and keeps "
            "attention inside documents, documents: cross does neither",
        )
    for key, why in (
        ("dataset_max_tokens", "sets are read whole; a mixture's max_epochs and weights say how much of each"),
        ("pad_samples_to_global_batch_size", "the last batch of a stage holds what there is"),
        ("skip_in_stream", "local files are mapped into memory, remote ones are read by ranges"),
        ("use_old_brrr_dataloader", "there is one reader"),
    ):
        if given.get(key):
            keys.note(f"{prefix}.{key}", why)
    shares = None if weights is None else _shares(f"{prefix}.dataset_weights", folders, weights)
    tokenizer = given.get("tokenizer_name")
    if any(given.get(key) is not None for key in LATER_READER):
        keys.note(
            f"{prefix}.dataset_folder",
            "this version of nanotron read with its tokenized_bytes.py, whose samples are others than those of "
            "nanosets: they come in another order here"
            + (f", and the {consumed} that were read are not skipped" if consumed else ""),
        )
        options |= {"shuffle": bool(given.get("shuffle_files")), "seed": seed}
        if len(folders) == 1:
            return {"tokens": folders, **options}, tokenizer
        sets: dict[str, dict[str, Any]] = {}
        for folder, share in zip(folders, shares or [1.0] * len(folders), strict=True):
            before = sets.get(folder, {}).get("weight", 0.0)  # one that is named twice counts twice
            sets[folder] = {"tokens": [folder], "weight": before + share}
        return {"mixture": sets, "max_epochs": None, **options}, tokenizer
    options |= {"order": "nanoset", "seed": seed, "samples": run.samples}
    if shares is not None and len(folders) > 1:
        options["folder_weights"] = shares
    if consumed:
        options["skip_samples"] = consumed
    return {"tokens": folders, **options}, tokenizer


def _shares(key: str, folders: list[str], weights: Any) -> list[float]:
    """Weights of folders.

    Raises:
        ValueError: if they are not a number of 0 or more for each folder.
    """
    listed = weights if isinstance(weights, list) else [weights]
    are_numbers = all(isinstance(each, int | float) and 0 <= each < float("inf") for each in listed)
    if len(listed) != len(folders) or not are_numbers:
        raise ValueError(f"{key}={weights!r} must be a number of 0 or more for each of the {len(folders)} folders.")
    return [float(each) for each in listed]

"""The keys of the section `dataset` of a configuration: what each takes, and which go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..arguments.values import plain_value, wrong_type
from ..data.tokens.mixture import ENDINGS
from ..data.tokens.token_dataset import HANDLING
from .hints import refuse_unknown

Types = Mapping[str, Any]
Section = dict[str, Any]

TEXT, MAPPING, NUMBER, SWITCH = str | None, dict | None, int | None, bool | None
PATHS = str | list[str] | None

# Keys of a set of token files: the arguments of `TokenDataset`.
TOKENS: dict[str, Any] = {
    "tokens": PATHS,
    "sequence_length": NUMBER,
    "documents": TEXT,
    "token_size": NUMBER,
    "dtype": TEXT,
    "eos_token_id": NUMBER,
    "seed": NUMBER,
    "shuffle": SWITCH,
    "loss_mask": SWITCH,
    "vocab_size": NUMBER,
    "order": TEXT,
    "samples": NUMBER,
    "skip_samples": NUMBER,
    "folder_weights": list[float] | None,
    "split": list[float] | None,
    "pack_window": NUMBER,
    "storage_options": MAPPING,
    "block_bytes": NUMBER,
    "cache_bytes": NUMBER,
}
# Keys of a set that `datasets` reads; all but the last three are arguments of `load_dataset`.
TABLE: dict[str, Any] = {
    "path": TEXT,
    "name": TEXT,
    "data_files": str | list | dict | None,
    "split": TEXT,
    "text_column": TEXT,
    "sequence_length": NUMBER,
    "documents": TEXT,
    "num_proc": NUMBER,
}
# Keys of a set of conversations: the arguments of `ChatDataset`.
CHAT: dict[str, Any] = {
    "chat": TEXT,
    "name": TEXT,
    "split": TEXT,
    "revision": TEXT,
    "format": TEXT,
    "kind": TEXT,
    "column": TEXT,
    "sequence_length": NUMBER,
    "train_on": TEXT,
    "too_long": TEXT,
    "append_eos": SWITCH,
    "add_special_tokens": SWITCH,
    "seed": NUMBER,
    "shuffle": SWITCH,
    "pack_window": NUMBER,
    "cache_dir": TEXT,
    "workers": NUMBER,
    "skip_unreadable": SWITCH,
    "storage_options": MAPPING,
}
# Keys of a stream: the arguments of `TokenStream`, and of the `load_dataset` whose result it reads.
STREAM: dict[str, Any] = {
    "stream": TEXT,
    "name": TEXT,
    "data_files": str | list | dict | None,
    "split": TEXT,
    "text_column": TEXT,
    "sequence_length": NUMBER,
    "documents": TEXT,
    "eos_token_id": NUMBER,
    "seed": NUMBER,
    "shuffle": SWITCH,
    "shuffle_buffer": NUMBER,
    "lanes": NUMBER,
    "epochs": NUMBER,
    "vocab_size": NUMBER,
}
SETS = {"tokens": TOKENS, "chat": CHAT, "path": TABLE, "stream": STREAM}
WITH_LENGTH = ("tokens", "chat", "path")
MEANINGS = {
    "tokens": "`.ds` files of datatrove, `.bin` with `.idx` of Megatron, `.npy`; folders, patterns, URLs",
    "path": "a folder of `save_to_disk`, a file (`.json`, `.jsonl`, `.parquet`, `.csv`, compressed or not), or a name "
    "for `load_dataset`",
    "stream": "a name for `load_dataset`, such a file, or a folder of them, read while it is trained on",
    "shuffle_buffer": "documents of a lane that are shuffled, or packed, together",
    "lanes": "parts of the stream that are read side by side; by the shards if not given",
    "epochs": "how often the stream is read; without end if not given",
    "chat": "files, a folder or a Hub dataset with `messages`, `conversations`, or `prompt` and `completion`",
    "sequence_length": "tokens of a sample",
    "documents": "`cross`: samples are cut wherever documents end; `mask`: and no attention crosses documents; `pack`: "
    "samples are packed of whole documents (files of tokens only)",
    "token_size": "bytes of an id in `.ds` files without `.metadata`",
    "dtype": "the same, as NumPy calls it",
    "eos_token_id": "last id of each document, where files do not say where documents end; the tokenizer's by default",
    "seed": "of the order",
    "shuffle": "false: in the order of the files",
    "loss_mask": "false: also predict tokens that `.loss` files leave out",
    "vocab_size": "ids must be smaller; the tokenizer's by default",
    "order": "`megatron` or `nanoset`: the samples of such a run, in its order",
    "samples": "of that run, in all",
    "skip_samples": "of that run, that it has trained on",
    "folder_weights": "of nanosets' folders",
    "split": "of `path` and `chat` its name (`train[:90%]`); of `order: megatron` two shares, `[0, 0.99]`",
    "pack_window": "documents that are packed together",
    "storage_options": "of fsspec, for URLs",
    "block_bytes": "of remote files, asked for at a time",
    "cache_bytes": "of remote files, kept by a process",
    "name": "configuration of a Hub dataset",
    "data_files": "of `load_dataset`",
    "text_column": "text to be tokenized; without it rows have `input_ids`",
    "num_proc": "processes that tokenize",
    "revision": "of a Hub dataset",
    "format": "of files whose names do not tell it",
    "kind": "`chat` or `prompt_completion`; by the columns if not given",
    "column": "of the conversations",
    "train_on": "`replies` of the assistant (or completions), or `all`",
    "too_long": "of conversations longer than a sample: `truncate`, `split` or `drop`",
    "append_eos": "end completions with the end-of-text token",
    "add_special_tokens": "of the tokenizer, for texts",
    "cache_dir": "where the tokens are kept",
    "workers": "processes that tokenize",
    "skip_unreadable": "leave out rows that cannot be read",
}
OWN = (  # never of several sets
    "tokens", "path", "chat", "stream", "name", "data_files", "split", "revision", "format", "kind", "column", "order",
    "samples", "skip_samples", "folder_weights", "epochs",
)  # fmt: skip
SHARED = {key: kind for types in SETS.values() for key, kind in types.items() if key not in OWN}
OF_TRAINING = ("seed", "shuffle")  # of the order, which evaluation has its own of
MIXING = {"when_exhausted": TEXT, "max_epochs": NUMBER}
SCHEDULE = {"weights": MAPPING, "start_tokens": NUMBER, "start_samples": NUMBER}
MEMBER = {"weight": int | float | None, "max_epochs": NUMBER}
STAGE = {"start_tokens": NUMBER, "start_step": NUMBER, "global_batch_size": NUMBER}

# What the whole section may hold, by the key that says what the data are.
KINDS: dict[str, dict[str, Any]] = {
    "path": {**{key: kind for key, kind in TABLE.items() if key != "split"}, "train_split": TEXT, "eval_split": TEXT},
    "tokens": TOKENS,
    "chat": CHAT,
    "stream": STREAM,
    "mixture": {"mixture": MAPPING, "schedule": list | None, **MIXING, **SHARED},
    "stages": {"stages": list | None, **MIXING, **SHARED},
}
KEYS: dict[str, Any] = {}
for _kinds in KINDS.values():
    KEYS |= {key: kind | KEYS[key] if key in KEYS else kind for key, kind in _kinds.items()}
KEYS["eval"] = MAPPING

LEAST = {
    "sequence_length": 2,
    **dict.fromkeys(("samples", "vocab_size", "pack_window", "block_bytes", "cache_bytes", "num_proc"), 1),
    **dict.fromkeys(
        ("token_size", "max_epochs", "global_batch_size", "workers", "shuffle_buffer", "lanes", "epochs"), 1
    ),
    **dict.fromkeys(("skip_samples", "eos_token_id", "seed", "start_tokens", "start_step", "start_samples"), 0),
}
CHOICES = {
    "kind": ("chat", "prompt_completion"),
    "train_on": ("replies", "all"),
    "too_long": ("truncate", "split", "drop"),
    "documents": HANDLING,
    "order": ("megatron", "nanoset"),
    "when_exhausted": ENDINGS,
}


def check_types(where: str, section: Section, types: Types) -> list[str]:
    """Sentences about values of a wrong type; numbers that are spelled as text become numbers."""
    problems = []
    for key, value in section.items():
        section[key] = plain_value(value, [int] if types[key] == NUMBER else [])
        problems.append(wrong_type(f"{where}.{key}", section[key], types[key]))
    return [problem for problem in problems if problem is not None]


def check_keys(section: Section, where: str, types: Types) -> None:
    """Refuse keys that are not in `types`, wrong types, and values out of range.

    Raises:
        ValueError: with a line for each value.
    """
    foreign = [key for key in section if key not in types]
    if where == "dataset" and foreign and foreign[0] in KEYS:
        users = [f"dataset.{kind}" for kind, keys in KINDS.items() if foreign[0] in keys]
        given = next(kind for kind in KINDS if section.get(kind) is not None)
        instead = " Its split is train_split." if (foreign[0], given) == ("split", "path") else ""
        raise ValueError(f"dataset.{foreign[0]} goes with {' or '.join(users)}, not with dataset.{given}.{instead}")
    refuse_unknown(f"{where}.", foreign, list(types), {"dataset": KEYS})
    problems = check_types(where, section, types)
    if not problems:
        problems = [
            problem for key, value in section.items() if (problem := _out_of_range(f"{where}.{key}", key, value))
        ]
    if problems:
        raise ValueError("\n".join(problems))


def _out_of_range(name: str, key: str, value: Any) -> str | None:
    if value is None:
        return None
    if key in LEAST and value < LEAST[key]:
        return f"{name}={value!r} must be at least {LEAST[key]}."
    if key in CHOICES and value not in CHOICES[key]:
        return f"{name}={value!r} is not one of {', '.join(map(repr, CHOICES[key]))}."
    if key == "split" and isinstance(value, list) and not (len(value) == 2 and 0 <= value[0] < value[1] <= 1):
        return f"{name}={value!r} must be two shares that ascend, such as [0, 0.99]."
    return None

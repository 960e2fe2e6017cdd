"""Conversations, and prompts with completions, as packed rows with the labels of what is trained on."""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import xxhash
from huggingface_hub.constants import HF_HOME

from ..tokens.byte_ranges import short_name
from ..tokens.documents import SCAN_TOKENS
from ..tokens.packing import WINDOW
from ..tokens.token_dataset import TokenDataset
from .corpus import prepare, write_here
from .rows import RowReader, Unreadable
from .source import Source, open_source

COLUMNS = ("messages", "conversations", "prompt", "completion")


class ChatDataset(TokenDataset):
    """Supervised fine-tuning on packed rows: a `TokenDataset` of conversations with `documents="pack"`.

    The conversations are tokenized once, into a `.ds` with the `.loss` of what is trained on, in a folder of the cache
    that is named by source, tokenizer and arguments. The processes of one machine wait for the first, and read the
    same files; so does a later run. Rows have `input_ids`, `labels` and `shift_labels` (-100 on prompts, between
    conversations, and in what stays empty) and `position_ids` that restart with each conversation.

    Args:
        source: as for `tokenize_corpus`: files, a folder, a `datasets.Dataset`, the name of a Hub dataset.
        tokenizer: name, folder or object; conversations need its chat template.
        sequence_length: tokens of a row, S.
        kind: `"chat"` or `"prompt_completion"`; by the columns of the first row if None.
        column: of the conversations; `"messages"` or `"conversations"` if None.
        name, split, revision, format: of the source.
        train_on: `"replies"`: the assistant's messages (see `ChatEncoder`), or completions; `"all"`: everything, which
            is TRL's default for conversations.
        too_long: what happens to conversations longer than a row: `"truncate"` leaves their end out, as TRL does when
            it packs (`"bfd"`); `"split"` goes on in other rows (`"bfd_split"`); `"drop"` leaves them out. The log says
            how many.
        append_eos, add_special_tokens: of texts, as for `tokenize_corpus`.
        seed, shuffle: of the order of rows.
        pack_window: conversations that are packed together.
        cache_dir: where the tokens are kept; `hf_nanotron/tokens` of the Hugging Face cache if None.
        workers: processes that tokenize.
        skip_unreadable: leave out rows that cannot be read, instead of ending at the first.
        storage_options: for fsspec, where the source is a URL.

    Raises:
        ValueError: for a source without conversations, a tokenizer without a chat template, a template whose replies
            cannot be told, and what `tokenize_corpus` and `TokenDataset` refuse.
    """

    def __init__(
        self,
        source: Any,
        tokenizer: Any,
        sequence_length: int,
        *,
        kind: Literal["chat", "prompt_completion"] | None = None,
        column: str | None = None,
        name: str | None = None,
        split: str | None = None,
        revision: str | None = None,
        format: str | None = None,
        train_on: Literal["replies", "all"] = "replies",
        too_long: Literal["truncate", "split", "drop"] = "truncate",
        append_eos: bool = True,
        add_special_tokens: bool | None = None,
        seed: int = 0,
        shuffle: bool = True,
        pack_window: int = WINDOW,
        cache_dir: str | os.PathLike[str] | None = None,
        workers: int = 1,
        skip_unreadable: bool = False,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        if kind not in (None, "chat", "prompt_completion"):
            raise ValueError(f"kind={kind!r} is not 'chat' or 'prompt_completion'.")
        where: dict[str, Any] = {"name": name, "split": split, "revision": revision, "format": format}
        where["storage_options"] = storage_options
        if kind is None:
            kind, column = ("chat", column) if column else kind_of(open_source(source, **where))
        how: dict[str, Any] = {
            **where,
            "kind": kind,
            "column": column,
            "train_on": train_on,
            "max_length": sequence_length,
            "too_long": too_long,
            "append_eos": append_eos,
            "add_special_tokens": add_special_tokens,
        }
        corpus = prepare(source, tokenizer, **how)
        key = xxhash.xxh3_64_hexdigest(json.dumps(corpus.plan, sort_keys=True).encode())
        cache = Path(HF_HOME, "hf_nanotron", "tokens") if cache_dir is None else Path(cache_dir)
        folder = cache / key
        write_here(corpus, folder, workers, skip_unreadable)
        super().__init__(folder, sequence_length, documents="pack", seed=seed, shuffle=shuffle, pack_window=pack_window)

        self.name = "chat" if hasattr(source, "column_names") else _name(source)

    @cached_property
    def _content(self) -> int:
        hasher = xxhash.xxh3_64()
        for file in self.files:
            for start in range(0, file.tokens, SCAN_TOKENS):
                kept = file.read_loss(start, start + SCAN_TOKENS)
                assert kept is not None  # of conversations, it is always written
                hasher.update(file.read(start, start + SCAN_TOKENS).tobytes())
                hasher.update(kept.tobytes())
        return hasher.intdigest()

    def identity(self) -> dict[str, Any]:
        """As of a `TokenDataset`; `files` is a hash of their contents, since each machine may have made its own."""
        return {**super().identity(), "files": self._content}


def _name(source: Any) -> str:
    """Of the first path of a source, without its folder and ending."""
    first = source if isinstance(source, str | os.PathLike) else next(iter(source))
    return short_name(first)


def kind_of(source: Source) -> tuple[Literal["chat", "prompt_completion"], str | None]:
    """Kind and column of a source's conversations, by its first row.

    Raises:
        ValueError: if it has none.
    """
    reader = RowReader(source, (), COLUMNS)
    for _, row in reader.read(source.pieces[0]):
        if isinstance(row, Unreadable):
            raise ValueError(f"{source.shown}: its first row cannot be read: {row.why}.")
        for column in COLUMNS[:2]:
            if row[column] is not None:
                return "chat", column
        if row["prompt"] is not None and row["completion"] is not None:
            return "prompt_completion", None
        break
    raise ValueError(
        f"{source.shown} has neither {' or '.join(COLUMNS[:2])} nor prompt and completion in its first row; say with "
        "kind and column where its conversations are."
    )

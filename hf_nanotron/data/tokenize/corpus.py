"""Tokenize a corpus: texts of files or datasets become files of tokens, on all cores, and a killed run goes on."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...redaction import printable_url
from .encoders import ChatEncoder, Encoder, PromptCompletionEncoder, TextEncoder
from .machines import check_executor, submit
from .output import OutputFolder
from .plan import VERSION, Counts, begin, deal, finished, read_plan, shard_name
from .rows import RowReader
from .shards import TOO_LONG, Job
from .source import SAMPLE_BY, Piece, open_source
from .tokenizers import ChosenTokenizer, choose_tokenizer
from .workers import Bar, run_here

logger = logging.getLogger(__name__)

KINDS = ("text", "chat", "prompt_completion")


@dataclass(frozen=True)
class TokenizedCorpus:
    """What `tokenize_corpus` has written.

    Attributes:
        folder: that it was written to, for `TokenDataset`.
        files: names of the `.ds` files, in the order of the source.
        counts: what became of the rows; None if an executor has taken the shards and is not done.
        kept: shards that an earlier run had completed.
        shards: in all.
        token_size: bytes of an id.
    """

    folder: str
    files: tuple[str, ...]
    counts: Counts | None
    kept: int
    shards: int
    token_size: int


def tokenize_corpus(
    source: Any,
    out: str | os.PathLike[str],
    tokenizer: Any,
    *,
    kind: Literal["text", "chat", "prompt_completion"] = "text",
    column: str | None = None,
    name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    format: str | None = None,
    sample_by: Literal["document", "line", "paragraph"] = "document",
    append_eos: bool = True,
    eos_token: str | None = None,
    add_special_tokens: bool | None = None,
    train_on: Literal["replies", "all"] = "replies",
    max_length: int | None = None,
    too_long: Literal["truncate", "split", "drop"] = "truncate",
    token_size: int | None = None,
    shuffle: int | None = None,
    max_documents: int | None = None,
    shards: int | None = None,
    file_name: str = "",
    workers: int = 1,
    executor: Literal["local", "slurm", "ray"] = "local",
    executor_options: Mapping[str, Any] | None = None,
    skip_unreadable: bool = False,
    overwrite: bool = False,
    wait: bool = False,
    storage_options: dict[str, Any] | None = None,
    progress: bool = True,
) -> TokenizedCorpus:
    """Tokenize a corpus into the `.ds` files of datatrove, which `TokenDataset` reads.

    Each shard becomes `NAME_00000_unshuffled.ds` with its `.index` and `.metadata`, and `.loss` for conversations. A
    shard gets its name when it is complete. Called again with the same arguments, only the shards that are missing are
    written. Rows without text are left out, and counted.

    Args:
        source: a file, folder or pattern with `*` of `.parquet`, `.jsonl` (`.json`), `.csv` (`.tsv`) or `.txt`, also
            with `.gz`, `.zst`, `.bz2` or `.xz`, local or by a URL that fsspec knows; several of them; a folder of
            `save_to_disk`; a `datasets.Dataset`; or the name of a Hub dataset, which is streamed.
        out: folder for the files, or its URL.
        tokenizer: name or folder of one, a `tokenizer.json`, or an object of transformers or tokenizers.
        kind: `"text"`: a column of texts. `"chat"`: a column of conversations, in the tokenizer's chat template.
            `"prompt_completion"`: the columns `prompt` and `completion`, texts or messages.
        column: of the texts (`"text"`) or conversations (`"messages"`).
        name, split, revision: of a Hub dataset; its split is `"train"` if None.
        format: of files whose names do not say it: `"parquet"`, `"json"`, `"csv"` or `"text"`.
        sample_by: what a document of a text file is.
        append_eos: the end-of-text token comes behind each document.
        eos_token: text of that token; the tokenizer's if None.
        add_special_tokens: those that the tokenizer itself adds, such as a first token. None: for prompts with
            completions alone, as TRL does; datatrove adds none where it puts an end-of-text token.
        train_on: `"replies"`: the assistant's messages, or completions; `"all"`: everything.
        max_length: longest document, in tokens; None for any.
        too_long: what happens to longer ones: their end is left out (as in TRL), they stay whole, so that
            `TokenDataset` cuts them into rows, or they are left out.
        token_size: bytes of an id, 2 or 4; by the vocabulary if None.
        shuffle: seed of a random order of the documents of each shard, that of datatrove; None keeps theirs.
        max_documents: rows that are read at most, an equal share of each shard.
        shards: files to write; one for each 256 MiB of the source if None.
        file_name: begins the names of the files.
        workers: processes. Where there is one, its tokenizer uses all cores; a script that uses more needs
            `if __name__ == "__main__"`.
        executor: `"local"`: this machine. `"slurm"`, `"ray"`: datatrove's executors; Slurm's is not waited for.
        executor_options: of datatrove's executor, such as `time` and `partition`.
        skip_unreadable: leave out rows that cannot be read or encoded, and count them, instead of ending at the first.
        overwrite: begin anew.
        wait: for another process of this machine that writes to `out`, instead of ending.
        storage_options: for fsspec, where `source` or `out` are URLs.
        progress: show a bar.

    Raises:
        FileNotFoundError: for a source or tokenizer that is not there.
        ValueError: for arguments that cannot be, an empty source, a row that cannot be read (with file and row), a
            folder that was begun with something else (naming it).
        RuntimeError: if another process writes to `out`, or a worker has died.
        ImportError: if an executor is not installed.
    """
    options = dict(executor_options or {})
    found = check_executor(executor, options) if executor != "local" else None
    if found is None and options:
        raise ValueError(f"executor_options={options!r} belong to executor='slurm' or 'ray'.")
    if found is not None and storage_options:
        raise ValueError(f"executor={executor!r} would write storage_options to its files; use the environment.")
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1.")
    folder = OutputFolder(out, storage_options)
    before = None if overwrite else read_plan(folder)
    corpus = prepare(
        source,
        tokenizer,
        kind=kind,
        column=column,
        name=name,
        split=split,
        revision=revision,
        format=format,
        sample_by=sample_by,
        append_eos=append_eos,
        eos_token=eos_token,
        add_special_tokens=add_special_tokens,
        train_on=train_on,
        max_length=max_length,
        too_long=too_long,
        token_size=token_size,
        shuffle=shuffle,
        max_documents=max_documents,
        shards=shards,
        earlier_shards=None if before is None else before["options"]["shards"],
        file_name=file_name,
        storage_options=storage_options,
    )
    if found is not None:
        _refuse_credentials(executor, [folder.path, *(piece.path for pieces in corpus.pieces for piece in pieces)])

    def run(job: Job, missing: list[int], done: Mapping[int, Counts]) -> None:
        if found is not None:
            submit(found, options, job, frozenset(done))
            return
        with Bar(len(corpus.pieces), done, disable=not progress) as bar:
            run_here(job, missing, workers, bar)

    return _written(corpus, folder, run, skip_unreadable=skip_unreadable, overwrite=overwrite, wait=wait)


def write_here(
    corpus: PreparedCorpus, out: str | os.PathLike[str], workers: int, skip_unreadable: bool
) -> TokenizedCorpus:
    """As `tokenize_corpus` of what was prepared, on this machine, after other processes that write to `out`."""
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1.")

    def run(job: Job, missing: list[int], done: Mapping[int, Counts]) -> None:
        with Bar(len(corpus.pieces), done, disable=False) as bar:
            run_here(job, missing, workers, bar)

    return _written(corpus, OutputFolder(out), run, skip_unreadable=skip_unreadable, overwrite=False, wait=True)


def _written(
    corpus: PreparedCorpus,
    folder: OutputFolder,
    run: Callable[[Job, list[int], Mapping[int, Counts]], None],
    *,
    skip_unreadable: bool,
    overwrite: bool,
    wait: bool,
) -> TokenizedCorpus:
    """Have `run` write the shards that are missing, and say what is there: `run(job, missing, done)`."""
    job = Job(corpus.plan, corpus.pieces, corpus.reader, corpus.encoder, folder, skip_unreadable)
    size = corpus.plan["options"]["token_size"]
    with folder.lock(wait):
        goes_on = begin(folder, corpus.plan, overwrite)
        done = finished(folder, len(corpus.pieces), size) if goes_on else {}
        missing = [number for number in range(len(corpus.pieces)) if number not in done]
        if missing:
            run(job, missing, done)
    after = finished(folder, len(corpus.pieces), size)
    names = tuple(shard_name(corpus.plan, number) for number in sorted(after) if after[number].documents)
    complete = len(after) == len(corpus.pieces)
    counts = sum(after.values(), Counts()) if complete else None
    if counts is not None and not counts.documents:
        raise ValueError(f"{corpus.reader.source.shown} has no document: {_said(counts) or 'it has no rows'}.")
    if counts is not None and (text := _said(counts)):
        logger.warning("%s: %s.", corpus.reader.source.shown, text)
    return TokenizedCorpus(folder.path, names, counts, len(done), len(corpus.pieces), size)


@dataclass(frozen=True)
class PreparedCorpus:
    """What is to be tokenized, and how.

    Attributes:
        plan: in JSON's types; another one gives other files.
        pieces: of each shard.
    """

    plan: dict[str, Any]
    pieces: list[list[Piece]]
    reader: RowReader
    encoder: Encoder


def prepare(
    source: Any,
    tokenizer: Any,
    *,
    kind: str = "text",
    column: str | None = None,
    name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    format: str | None = None,
    sample_by: str = "document",
    append_eos: bool = True,
    eos_token: str | None = None,
    add_special_tokens: bool | None = None,
    train_on: str = "replies",
    max_length: int | None = None,
    too_long: str = "truncate",
    token_size: int | None = None,
    shuffle: int | None = None,
    max_documents: int | None = None,
    shards: int | None = None,
    earlier_shards: int | None = None,
    file_name: str = "",
    storage_options: dict[str, Any] | None = None,
) -> PreparedCorpus:
    """Check the arguments of `tokenize_corpus`, and find what the source consists of.

    Args:
        earlier_shards: that an earlier run has planned, used if `shards` is None and the source allows it.
    """
    _check(kind, sample_by, too_long, max_length, max_documents, shuffle, file_name)
    opened = open_source(
        source,
        name=name,
        split=split,
        revision=revision,
        format=format,
        shards=shards,
        storage_options=storage_options,
    )
    if sample_by != "document" and any(piece.format != "text" for piece in opened.pieces):
        raise ValueError(f"sample_by={sample_by!r} is for text files; {opened.shown} has a document in each row.")
    if kind == "chat" and (eos_token is not None or not append_eos):
        given = f"eos_token={eos_token!r}" if eos_token is not None else f"append_eos={append_eos}"
        raise ValueError(f"{given} has no effect on conversations: their chat template ends them.")
    chosen = choose_tokenizer(tokenizer, eos_token)
    size = chosen.token_size(token_size)
    encoder = make_encoder(chosen, kind, column, append_eos, add_special_tokens, train_on)
    if shards is None and earlier_shards is not None:
        shards = min(earlier_shards, len(opened.pieces))
    pieces = deal(opened.pieces, shards)
    plan = {
        "version": VERSION,
        "source": opened.identity,
        "tokenizer": chosen.identity(),
        "options": {
            "kind": kind,
            "columns": list(encoder.columns),
            "sample_by": sample_by,
            "append_eos": append_eos,
            "add_special_tokens": add_special_tokens,
            "train_on": train_on if encoder.masked else None,
            "max_length": max_length,
            "too_long": too_long,
            "token_size": size,
            "shuffle": shuffle,
            "max_documents": max_documents,
            "shards": len(pieces),
            "name": file_name,
        },
    }
    return PreparedCorpus(plan, pieces, RowReader(opened, encoder.columns, encoder.optional, sample_by), encoder)


def make_encoder(
    chosen: ChosenTokenizer,
    kind: str,
    column: str | None,
    append_eos: bool,
    add_special_tokens: bool | None,
    train_on: str,
) -> Encoder:
    """The encoder of a kind of rows."""
    if kind == "text":
        return TextEncoder(chosen, column or "text", append_eos, bool(add_special_tokens))
    if kind == "chat":
        if add_special_tokens is not None:
            raise ValueError("add_special_tokens has no effect on conversations: their chat template writes them.")
        return ChatEncoder(chosen, column or "messages", train_on)
    if column is not None:
        raise ValueError(f"column={column!r}: prompts and completions are read from the columns prompt and completion.")
    special = True if add_special_tokens is None else add_special_tokens
    return PromptCompletionEncoder(chosen, train_on, append_eos, special)


def _check(
    kind: str,
    sample_by: str,
    too_long: str,
    max_length: int | None,
    max_documents: int | None,
    shuffle: int | None,
    file_name: str,
) -> None:
    choices: Sequence[tuple[str, str, Sequence[str]]] = (
        ("kind", kind, KINDS),
        ("sample_by", sample_by, SAMPLE_BY),
        ("too_long", too_long, TOO_LONG),
    )
    for argument, value, known in choices:
        if value not in known:
            raise ValueError(f"{argument}={value!r} is not one of {', '.join(map(repr, known))}.")
    for argument, number in (("max_length", max_length), ("max_documents", max_documents)):
        if number is not None and number < 1:
            raise ValueError(f"{argument}={number} must be at least 1.")
    if too_long != "truncate" and max_length is None:
        raise ValueError(f"too_long={too_long!r} needs max_length: the tokens of the longest document.")
    if shuffle is not None and shuffle < 0:
        raise ValueError(f"shuffle={shuffle} is a seed, and must not be negative.")
    if "/" in file_name or file_name.startswith("."):
        raise ValueError(f"file_name={file_name!r} must be the beginning of a file's name.")


_WHAT = {
    "empty": "{} rows without text were left out",
    "unreadable": "{} rows that cannot be read were left out",
    "untrained": "{} documents without a token to train on were left out",
    "dropped": "{} documents longer than max_length were left out",
    "truncated": "the end of {} documents longer than max_length was left out",
}


def _refuse_credentials(executor: str, paths: Sequence[str]) -> None:
    for path in paths:
        if printable_url(path) != path:
            raise ValueError(
                f"executor={executor!r} would write the credentials of {printable_url(path)} to its files; use the "
                "environment."
            )


def _said(counts: Counts) -> str:
    """What was not written."""
    values = dataclasses.asdict(counts)
    return ", ".join(text.format(values[name]) for name, text in _WHAT.items() if values[name])

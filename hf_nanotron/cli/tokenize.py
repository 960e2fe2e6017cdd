"""`hf-nanotron tokenize`: texts or conversations become files of tokens, for `TokenDataset`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

DESCRIPTION = """\
Tokenize a corpus into datatrove's .ds files, which TokenDataset, datatrove and nanotron read:

  hf-nanotron tokenize "corpus/*.jsonl.zst" tokens --tokenizer HuggingFaceTB/SmolLM2-1.7B
  hf-nanotron tokenize HuggingFaceFW/fineweb-edu tokens --name sample-10BT --tokenizer HuggingFaceTB/SmolLM2-1.7B
  hf-nanotron tokenize chats.parquet tokens --chat --tokenizer HuggingFaceTB/SmolLM2-1.7B-Instruct

The command goes on where it was stopped: files that are complete are kept."""


def add_tokenize_arguments(parser: argparse.ArgumentParser) -> None:
    """The parsed arguments get `run`, which takes them."""
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="Hub dataset, folder of save_to_disk, or files, folders and patterns of .parquet, .jsonl, .csv or .txt "
        "(also .gz, .zst, .bz2, .xz), local or by URL",
    )
    parser.add_argument("out", metavar="OUT", help="folder or URL to write to")
    parser.add_argument("--tokenizer", required=True, metavar="NAME", help="Hub name, folder, or tokenizer.json")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: one for each core, here %(default)s)",
    )
    reading = parser.add_argument_group("reading")
    reading.add_argument("--column", metavar="NAME", help="column of the texts (default: text), or chats (messages)")
    reading.add_argument("--name", metavar="CONFIG", help="configuration of a Hub dataset")
    reading.add_argument("--split", help="of a Hub dataset, or a saved one (default: train)")
    reading.add_argument("--revision", help="branch, tag or commit of a Hub dataset")
    reading.add_argument(
        "--format", choices=("parquet", "json", "csv", "text"), help="of files whose names do not say it"
    )
    reading.add_argument(
        "--sample-by",
        choices=("document", "line", "paragraph"),
        default="document",
        help="what a document of a text file is (default: the whole file)",
    )
    reading.add_argument(
        "--max-documents", type=int, metavar="N", help="rows to read, an equal share of each file written"
    )
    reading.add_argument(
        "--skip-unreadable", action="store_true", help="leave out rows that cannot be read, and count them"
    )
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument(
        "--append-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put the end-of-text token behind each document (default: yes)",
    )
    tokens.add_argument("--eos-token", metavar="TEXT", help="the end-of-text token (default: the tokenizer's)")
    tokens.add_argument(
        "--add-special-tokens",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="add those of the tokenizer, such as a first token (default: for prompts with completions)",
    )
    tokens.add_argument("--max-length", type=int, metavar="N", help="longest document in tokens (default: any)")
    tokens.add_argument(
        "--too-long",
        choices=("truncate", "split", "drop"),
        default="truncate",
        help="what happens to longer documents (default: %(default)s)",
    )
    chats = parser.add_argument_group("conversations")
    kinds = chats.add_mutually_exclusive_group()
    kinds.add_argument(
        "--chat",
        dest="kind",
        action="store_const",
        const="chat",
        default="text",
        help="rows are conversations, written in the tokenizer's chat template, with a .loss file",
    )
    kinds.add_argument(
        "--prompt-completion",
        dest="kind",
        action="store_const",
        const="prompt_completion",
        help="rows have a prompt and a completion",
    )
    chats.add_argument(
        "--train-on",
        choices=("replies", "all"),
        default="replies",
        help="what is trained on: the assistant's messages or completions, or everything (default: %(default)s)",
    )
    writing = parser.add_argument_group("writing")
    writing.add_argument(
        "--token-size", type=int, choices=(2, 4), help="bytes of an id (default: 2 if the vocabulary allows)"
    )
    writing.add_argument("--shuffle", type=int, metavar="SEED", help="shuffle the documents of each file")
    writing.add_argument("--shards", type=int, metavar="N", help="files to write (default: one for each 256 MiB)")
    writing.add_argument("--file-name", default="", metavar="TEXT", help="begins the names of the files")
    writing.add_argument("--overwrite", action="store_true", help="begin anew")
    machines = parser.add_argument_group("machines")
    machines.add_argument(
        "--executor",
        choices=("local", "slurm", "ray"),
        default="local",
        help="this machine, or datatrove's executors (pip install hf-nanotron[datatrove])",
    )
    machines.add_argument(
        "--executor-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of datatrove's executor, such as time=04:00:00 and partition=cpu for Slurm; repeat for several",
    )
    parser.set_defaults(run=_tokenize)


def _tokenize(args: argparse.Namespace) -> None:
    from ..data.tokenize.corpus import tokenize_corpus

    given = {name: value for name, value in vars(args).items() if name not in _NOT_ARGUMENTS}
    given["source"] = args.source if len(args.source) > 1 else args.source[0]
    try:
        done = tokenize_corpus(**given, executor_options=dict(map(_option, args.executor_option)))
    except KeyboardInterrupt:
        print("\nstopped. Files that are complete are kept: the same command goes on.", file=sys.stderr)
        sys.exit(130)
    kept = f" ({done.kept} were there already)" if done.kept else ""
    if done.counts is None:
        print(f"{done.folder}: {done.shards - done.kept} of {done.shards} shards were given to {args.executor}{kept}.")
        return
    print(
        f"{done.folder}: {done.counts.documents:,} documents, {done.counts.tokens:,} tokens of {done.token_size} bytes "
        f"in {len(done.files)} file{'s' * (len(done.files) != 1)}{kept}."
    )


_NOT_ARGUMENTS = ("run", "explains", "traceback", "executor_option")


def _option(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"--executor-option {text!r} is not NAME=VALUE.")
    # 4:00:00 is a time, which YAML would read as a number.
    return key, value if ":" in value and not value.startswith("{") else yaml.safe_load(value)

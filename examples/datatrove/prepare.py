"""Tokenize the Python standard library with datatrove's own pipeline.

The corpus and the tokenizer are those of `../stdlib_llama`, so nothing is downloaded. The result, under `--output-dir`,
is `tokenizer/` and `tokens/`, with a `.ds` file, its `.index` and its `.metadata` for each of datatrove's tasks.
"""

import argparse
import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.tokens import DocumentTokenizer

HERE = Path(__file__).resolve().parent


def stdlib_llama() -> ModuleType:
    """The preparation of the other example."""
    spec = importlib.util.spec_from_file_location("stdlib_llama", HERE.parent / "stdlib_llama" / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class StandardLibrary:
    """The first step of a pipeline: its documents. Task `rank` gets every `world_size`-th file."""

    def __init__(self, max_chars: int) -> None:
        self.max_chars = max_chars

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        texts = stdlib_llama().read_corpus(self.max_chars)
        for number in range(rank, len(texts), world_size):
            yield Document(text=texts[number], id=str(number))


def long_enough(document: Document) -> bool:
    """Some modules are a line or two."""
    return len(document.text) > 200


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tokenizer and the tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=HERE / "out", help="(%(default)s)")
    parser.add_argument("--max-chars", type=int, default=4_000_000, help="most source text to read (%(default)s)")
    parser.add_argument("--vocab-size", type=int, default=2048, help="(%(default)s)")
    parser.add_argument("--tasks", type=int, default=4, help="files to write (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="tasks at a time (%(default)s)")
    args = parser.parse_args(argv)

    other = stdlib_llama()
    tokenizer = other.train_tokenizer(other.read_corpus(args.max_chars), args.vocab_size, block_size=256)
    tokenizer.save_pretrained(args.output_dir / "tokenizer")
    # Another tokenizer gives other tokens, and datatrove does not run tasks again that its logs call complete.
    for name in ("tokens", "logs"):
        shutil.rmtree(args.output_dir / name, ignore_errors=True)
    LocalPipelineExecutor(  # SlurmPipelineExecutor takes the same pipeline to a cluster
        pipeline=[
            StandardLibrary(args.max_chars),
            LambdaFilter(long_enough),
            DocumentTokenizer(
                str(args.output_dir / "tokens"),
                tokenizer_name_or_path=str(args.output_dir / "tokenizer" / "tokenizer.json"),
                eos_token=tokenizer.eos_token,
                shuffle_documents=True,
                seed=0,
            ),
        ],
        tasks=args.tasks,
        workers=args.workers,
        logging_dir=str(args.output_dir / "logs"),
    ).run()


if __name__ == "__main__":
    main()

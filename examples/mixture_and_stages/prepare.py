"""Three tokenized sets from the Python that runs this: sources, docstrings, and the chapters of its reference.

Nothing is downloaded. Under `--output-dir` are `tokenizer/` (a byte-level BPE tokenizer), `text/NAME.jsonl`, and
`tokens/NAME/` and `held_out/NAME/` with the files of tokens. Documents are shuffled here, once, so that the sets can be
read in the order of their files.
"""

import argparse
import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_nanotron.data import tokenize_corpus

HERE = Path(__file__).resolve().parent
EOS = "<|endoftext|>"
SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
HELD_OUT = 20  # one document in so many is for evaluation


def sources() -> Iterator[str]:
    """Files of the standard library, in a fixed random order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if not SKIP.intersection(path.relative_to(root).parts))
    random.Random(0).shuffle(files)
    for path in files:
        try:
            yield path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue


def docstrings(texts: list[str]) -> Iterator[str]:
    for text in texts:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (found := ast.get_docstring(node)):
                yield found


def some(texts: Iterator[str], most: int) -> list[str]:
    """Texts until there are so many characters."""
    found, size = [], 0
    for text in texts:
        if size >= most:
            break
        found.append(text[: most - size])
        size += len(text)
    return [text for text in found if text.strip()]


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, clean_up_tokenization_spaces=False)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=HERE / "out", help="(%(default)s)")
    parser.add_argument("--max-chars", type=int, default=2_000_000, help="of each set (%(default)s)")
    parser.add_argument("--vocab-size", type=int, default=1024, help="(%(default)s)")
    cli = parser.parse_args(argv)
    code = some(sources(), cli.max_chars)
    whole = [text for text in code if not text.isspace()][:-1] or code  # the last one may have been cut
    sets = {
        "code": code,
        "docstrings": some(docstrings(whole), cli.max_chars),
        "reference": some(iter(topics.values()), cli.max_chars),
    }
    tokenizer = make_tokenizer([text for texts in sets.values() for text in texts], cli.vocab_size)
    tokenizer.save_pretrained(cli.output_dir / "tokenizer")
    for name, texts in sets.items():
        random.Random(0).shuffle(texts)
        for part in ("tokens", "held_out"):
            documents = [text for place, text in enumerate(texts) if bool(place % HELD_OUT) == (part == "tokens")]
            path = cli.output_dir / "text" / f"{name}-{part}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
            folder = cli.output_dir / part / name
            done = tokenize_corpus(path, folder, cli.output_dir / "tokenizer", overwrite=True, progress=False)
            assert done.counts is not None
            print(f"{folder}: {len(documents):,} documents, {done.counts.tokens:,} tokens")


if __name__ == "__main__":
    main()

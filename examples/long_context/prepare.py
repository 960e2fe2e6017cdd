"""Tokenize long documents: each package of the Python that runs this, its files one after the other.

Nothing is downloaded. Under `--output-dir` are `tokenizer/` (a byte-level BPE tokenizer), and `tokens/` and `held_out/`
with the files of tokens. Packages and single files that are shorter than `--min-chars` are left out.
"""

import argparse
import json
import random
import sysconfig
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_nanotron.data import tokenize_corpus

HERE = Path(__file__).resolve().parent
EOS = "<|endoftext|>"
SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
HELD_OUT = 5  # one document in so many is for evaluation


def long_documents(min_chars: int) -> list[str]:
    """Packages and modules of the standard library, in a fixed random order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    packages = defaultdict[str, list[str]](list)
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not SKIP.intersection(parts):
            try:
                packages[parts[0]].append(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError):
                continue
    documents = [text for files in packages.values() if len(text := "\n\n".join(files)) >= min_chars]
    random.Random(0).shuffle(documents)
    return documents


def make_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, clean_up_tokenization_spaces=False)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=HERE / "out", help="(%(default)s)")
    parser.add_argument("--min-chars", type=int, default=60_000, help="of a document (%(default)s)")
    parser.add_argument("--max-documents", type=int, help="(all)")
    parser.add_argument("--vocab-size", type=int, default=512, help="(%(default)s)")
    cli = parser.parse_args(argv)
    documents = long_documents(cli.min_chars)[: cli.max_documents]
    tokenizer = make_tokenizer(documents, cli.vocab_size)
    tokenizer.save_pretrained(cli.output_dir / "tokenizer")
    for name in ("tokens", "held_out"):
        texts = [text for place, text in enumerate(documents) if bool(place % HELD_OUT) == (name == "tokens")]
        path = cli.output_dir / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        done = tokenize_corpus(
            path, cli.output_dir / name, cli.output_dir / "tokenizer", overwrite=True, progress=False
        )
        assert done.counts is not None
        print(f"{cli.output_dir / name}: {len(texts)} documents, {done.counts.tokens:,} tokens")


if __name__ == "__main__":
    main()

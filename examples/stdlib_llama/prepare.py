"""Turn the Python standard library into a pretraining data set: a tokenizer and fixed blocks of tokens.

The corpus is the `.py` sources of the Python that runs this script, so nothing is downloaded. The result, under
`--output-dir`, is `tokenizer/` (a byte-level BPE tokenizer) and `data/` (a `datasets.DatasetDict` with the splits
`train` and `eval`). A second call with the same settings finds them and does nothing.
"""

import argparse
import json
import random
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
EOS, PAD = "<|endoftext|>", "<|pad|>"
# Third-party packages and tests are no part of the library; `encodings` is tables of characters rather than code.
SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
EVAL_EVERY = 50  # one file in so many is held out


def read_corpus(max_chars: int) -> list[str]:
    """Return the texts of standard library files, at most `max_chars` together, in a fixed random order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if not SKIP.intersection(path.relative_to(root).parts))
    # Shuffled, so that a bound does not mean "the modules whose names start with a".
    random.Random(0).shuffle(files)
    texts, size = [], 0
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        text = text[: max_chars - size]
        if text:
            texts.append(text)
            size += len(text)
        if size >= max_chars:
            break
    if len(texts) < 2:
        raise SystemExit(f"Found {len(texts)} readable source file(s) under {root}: too few to train on.")
    return texts


def train_tokenizer(texts: list[str], vocab_size: int, block_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with exactly `vocab_size` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    if tokenizer.get_vocab_size() != vocab_size:
        raise SystemExit(
            f"The corpus gave {tokenizer.get_vocab_size()} tokens where --vocab-size asks for {vocab_size}: "
            "use a smaller --vocab-size or a larger --max-chars."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=block_size,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast, block_size: int, num_proc: int | None) -> Dataset:
    """Tokenize `texts`, join them with an end-of-text token between, and cut the result into blocks."""
    eos = tokenizer.eos_token_id

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        # verbose=False: files longer than a block are expected here, they are cut below.
        encoded = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
        return {"input_ids": [[*ids, eos] for ids in encoded["input_ids"]]}

    def cut(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        tokens = list(chain.from_iterable(batch["input_ids"]))
        end = len(tokens) - len(tokens) % block_size
        blocks = [tokens[start : start + block_size] for start in range(0, end, block_size)]
        return {"input_ids": blocks, "labels": blocks}  # the model shifts the labels itself

    dataset = Dataset.from_dict({"text": texts})
    # One process by default: the tokenizer's own threads use every core, and a fork costs more than this corpus.
    dataset = dataset.map(tokenize, batched=True, remove_columns=["text"], num_proc=num_proc, desc="Tokenizing")
    return dataset.map(cut, batched=True, num_proc=num_proc, desc=f"Packing into blocks of {block_size}")


def split_files(texts: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Split the texts by file, so that no evaluated file is seen in training."""
    yield "train", [text for i, text in enumerate(texts) if i % EVAL_EVERY]
    yield "eval", texts[::EVAL_EVERY]


def main(argv: list[str] | None = None) -> None:
    """Prepare the data unless it is there already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=HERE / "out", help="where tokenizer/ and data/ go")
    parser.add_argument("--max-chars", type=int, default=4_000_000, help="most source text to read")
    parser.add_argument("--vocab-size", type=int, default=2048, help="a multiple of 64 suits every tp size")
    parser.add_argument("--block-size", type=int, default=256, help="tokens in a training sample")
    parser.add_argument("--num-proc", type=int, default=None, help="processes of datasets.map")
    args = parser.parse_args(argv)
    if args.vocab_size % 64:
        parser.error(f"--vocab-size {args.vocab_size} is not a multiple of 64")

    settings = {"max_chars": args.max_chars, "vocab_size": args.vocab_size, "block_size": args.block_size}
    done = args.output_dir / "prepared.json"  # written last: it marks a complete result
    if done.exists() and json.loads(done.read_text()) == settings:
        print(f"{args.output_dir}: already prepared")
        return
    done.unlink(missing_ok=True)

    texts = read_corpus(args.max_chars)
    print(f"Corpus: {len(texts)} files, {sum(map(len, texts)):,} characters of the Python standard library")
    tokenizer = train_tokenizer(texts, args.vocab_size, args.block_size)
    tokenizer.save_pretrained(args.output_dir / "tokenizer")
    data = DatasetDict({n: pack(t, tokenizer, args.block_size, args.num_proc) for n, t in split_files(texts)})
    data.save_to_disk(args.output_dir / "data")
    done.write_text(json.dumps(settings))
    for name, split in data.items():
        print(f"{name}: {len(split):,} blocks, {len(split) * args.block_size:,} tokens")


if __name__ == "__main__":
    main()

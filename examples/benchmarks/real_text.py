"""Real text without a network: what every machine with Python and this package's dependencies has on its disk.

The documentation of installed packages first (descriptions, licences), then their and the standard library's sources,
whose docstrings and comments are English and whose code is as structured as text gets.
"""

import importlib.util
import random
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|end|>"
PACKAGES = ("transformers", "datasets", "accelerate", "huggingface_hub", "numpy", "torch")


def descriptions() -> Iterator[str]:
    """The long description of each installed package, by name."""
    found = {str(item.metadata["Name"]): item for item in distributions()}
    for name in sorted(found):
        text = found[name].metadata.get_payload()
        if isinstance(text, str) and len(text) > 500:
            yield text


def sources() -> Iterator[Path]:
    """Python files of the standard library (its tests left out) and of a few packages, in an order of their own."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in library.rglob("*.py") if not {"site-packages", "test", "tests"} & set(file.parts)]
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        for folder in (found.submodule_search_locations or ()) if found is not None else ():
            files += Path(folder).rglob("*.py")
    files.sort(key=str)
    random.Random(0).shuffle(files)
    yield from files


def documents(megabytes: float) -> list[str]:
    """Documents of about `megabytes` in sum, the same ones at each call on one machine.

    Raises:
        ValueError: the machine has less than a tenth of that.
    """
    found: list[str] = []
    left = megabytes * 2**20

    def take(text: str) -> None:
        nonlocal left
        found.append(text)
        left -= len(text.encode(errors="replace"))

    for text in descriptions():
        take(text)
    for path in sources():
        if left <= 0:
            break
        try:
            take(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue  # some tests of encodings are no text
    if left > 0.9 * megabytes * 2**20:
        raise ValueError(f"less than a tenth of {megabytes} MB of text is on this machine; ask for less.")
    random.Random(1).shuffle(found)
    return found


def byte_pairs(texts: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer of `vocabulary` tokens, trained on every fourth text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[::4], trainer)
    return tokenizer


def blocks(texts: list[str], tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """Samples of `length` tokens of the texts one after the other, an end token after each; the rest is left out."""
    end = tokenizer.token_to_id(END)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids += encoding.ids
        ids.append(end)
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]

"""Which tokenizer a corpus is written with: its name, what identifies it, and how wide its ids are."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

from ...redaction import printable
from ..tokens.same_tokenizer import vocabulary_hash

NARROW = 2**16  # ids that two bytes hold


@dataclass
class ChosenTokenizer:
    """A tokenizer of transformers.

    Attributes:
        tokenizer: itself.
        name: as the user gave it; empty if nothing names it. It is written to the metadata.
        eos_token_id: ends each document; None if the tokenizer has none.
    """

    tokenizer: Any
    name: str
    eos_token_id: int | None
    eos_token: str | None

    @property
    def ids(self) -> int:
        """One more than its largest id."""
        return max(self.tokenizer.get_vocab().values(), default=-1) + 1

    def token_size(self, asked: int | None) -> int:
        """Bytes of an id.

        Raises:
            ValueError: if `asked` for a number that does not hold all ids.
        """
        needed = 2 if self.ids <= NARROW else 4
        if asked is None:
            return needed
        if asked not in (2, 4):
            raise ValueError(f"token_size={asked} cannot be; ids are written in 2 or 4 bytes.")
        if asked < needed:
            raise ValueError(
                f"token_size={asked} holds ids up to {NARROW - 1}, and {self.name or 'the tokenizer'} has "
                f"{self.ids} ids; use token_size=4."
            )
        return asked

    def identity(self) -> dict[str, Any]:
        """In JSON's types; another one gives other tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            content = backend.to_str()
        else:
            content = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        parts = (content, repr(self.tokenizer.chat_template), repr(self.tokenizer.all_special_tokens))
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        vocabulary = vocabulary_hash(self.tokenizer)
        ids = {"ids": self.ids, "eos_token_id": self.eos_token_id}
        return {"name": self.name, "sha256": digest, "vocabulary": vocabulary, **ids}


def choose_tokenizer(tokenizer: Any, eos_token: str | None = None) -> ChosenTokenizer:
    """Load a tokenizer.

    Args:
        tokenizer: Hub name, folder, or `tokenizer.json`; or a tokenizer of transformers, or of tokenizers.
        eos_token: text of the token that ends documents; the tokenizer's own if None.

    Raises:
        ValueError: if there is none, or it does not know `eos_token`.
    """
    found, name = _loaded(tokenizer)
    if "|" in name or "\n" in name:
        raise ValueError(f"the tokenizer's name {name!r} cannot be written to the metadata, where | ends it.")
    eos = eos_token if eos_token is not None else found.eos_token
    end = None if eos is None else found.convert_tokens_to_ids(eos)
    if eos_token is not None and eos_token not in found.get_vocab():
        raise ValueError(f"eos_token={eos_token!r} is no token of {name or 'the tokenizer'}.")
    return ChosenTokenizer(found, name, end, eos)


def _loaded(tokenizer: Any) -> tuple[Any, str]:
    if not isinstance(tokenizer, str | os.PathLike):
        if hasattr(tokenizer, "encode_batch"):
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast(tokenizer_object=tokenizer), ""
        return tokenizer, str(getattr(tokenizer, "name_or_path", "") or "")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name = os.path.expanduser(os.fspath(tokenizer))
    if (os.path.isabs(name) or name.startswith(("./", "../", "~")) or name.count("/") > 1) and not os.path.exists(name):
        raise FileNotFoundError(f"tokenizer={name!r}: there is no such file or folder.")
    try:
        if os.path.isfile(name):
            return PreTrainedTokenizerFast(tokenizer_file=name), name
        return AutoTokenizer.from_pretrained(name), name
    except Exception as error:  # of several libraries
        text = printable(" ".join(str(error).split()))
        raise ValueError(f"tokenizer={name!r} cannot be loaded: {text[:400]}") from error

"""Whether sets were written with one tokenizer: by its vocabulary where that is known, else by its name.

A name alone says little: the same tokenizer lies in several folders, and a folder may have got another one since. Where
`tokenize_corpus` has written the files of a local folder, its plan there says which vocabulary it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .byte_ranges import is_remote, local_path

OWN = ".tokenize"  # the folder of `tokenize_corpus` among the files that it writes
PLAN = f"{OWN}/plan.json"


class Tokenizer(NamedTuple):
    """What a set says of the tokenizer that it was written with; None where it does not."""

    name: str | None
    vocabulary: str | None

    def is_other(self, than: Tokenizer) -> bool:
        """Whether another vocabulary was used, as far as the two say it."""
        if None not in (self.vocabulary, than.vocabulary):
            return self.vocabulary != than.vocabulary
        return None not in (self.name, than.name) and self.name != than.name

    def difference(self, than: Tokenizer) -> str:
        """Behind "another tokenizer": which two."""
        if self.name == than.name:
            named = f"both are named {self.name!r}" if self.name else "neither has a name"
            return f"{named}, and their vocabularies differ"
        unknown = "" if None not in (self.vocabulary, than.vocabulary) else "; by their names, as no plan beside both "
        unknown += "tells their vocabularies" if unknown else ""
        return f"{self.name!r}, and that is {than.name!r}{unknown}"


def vocabulary_hash(tokenizer: Any) -> str:
    """Of which id each token has, of a tokenizer of transformers."""
    tokens = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(tokens.encode()).hexdigest()


def noted_vocabularies(files: Iterable[tuple[str, str | None]]) -> list[str | None]:
    """Vocabularies of files, each a path and the tokenizer's name in its metadata, by the plan in its local folder."""
    known: dict[str, Tokenizer] = {}
    found = []
    for path, name in files:
        folder = os.path.dirname(path)
        if folder not in known:
            known[folder] = _noted(folder)
        noted = known[folder]  # of a file that was put there from elsewhere it says nothing
        found.append(noted.vocabulary if noted.vocabulary is not None and noted.name == (name or "") else None)
    return found


def _noted(folder: str) -> Tokenizer:
    if is_remote(folder):
        return Tokenizer(None, None)
    try:
        said = json.loads(Path(local_path(folder), PLAN).read_bytes())["tokenizer"]
        name, vocabulary = said["name"], said.get("vocabulary")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return Tokenizer(None, None)
    is_text = isinstance(name, str) and isinstance(vocabulary, str)
    return Tokenizer(name, vocabulary) if is_text else Tokenizer(None, None)


def check_one_tokenizer(sets: Mapping[str, Any], whole: str) -> None:
    """Refuse sets by name, with `tokenizer` and `vocabulary` where they have them, that are not of one tokenizer.

    Raises:
        ValueError: naming two of them, and how they differ.
    """
    known = [(name, tokenizer_of(dataset)) for name, dataset in sets.items()]
    for number, (name, tokenizer) in enumerate(known):
        for before, other in known[:number]:
            if tokenizer.is_other(other):
                raise ValueError(
                    f"the set {name!r} has another tokenizer than {before!r} ({tokenizer.difference(other)}); {whole} "
                    "has one."
                )


def tokenizer_of(dataset: Any) -> Tokenizer:
    """What a set, or a file, says. A set of a user's own may have the tokenizer itself."""
    said, vocabulary = getattr(dataset, "tokenizer", None), getattr(dataset, "vocabulary", None)
    if hasattr(said, "get_vocab"):
        return Tokenizer(getattr(said, "name_or_path", None) or None, vocabulary_hash(said))
    known = (value if isinstance(value, str) else None for value in (said, vocabulary))
    return Tokenizer(*known)

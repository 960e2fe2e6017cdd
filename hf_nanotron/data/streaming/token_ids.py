"""Token ids of the documents of a stream: of a column of text, or of one that holds ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TOGETHER = 64  # documents that are tokenized in one call


class TokenIds:
    """What a stream's documents are made of.

    Args:
        tokenizer: of transformers; None for a column of ids.
        column: of the texts, or the ids.
        eos_token_id: appended to documents that do not end with it; the tokenizer's if None; of ids, none if None.
        vocab_size: ids must be smaller.
        columns: of the stream, where known.

    Raises:
        ValueError: if the stream has no such column, or no id ends the texts.
    """

    def __init__(
        self,
        tokenizer: Any,
        column: str,
        eos_token_id: int | None,
        vocab_size: int | None,
        columns: Sequence[str] | None,
    ) -> None:
        if columns is not None and column not in columns:
            raise ValueError(
                f"the dataset has no column {column!r}; it has {', '.join(columns)}. Name the texts with text_column, "
                "or leave out the tokenizer to read ids from input_ids."
            )
        self.tokenizer, self.column, self.vocab_size = tokenizer, column, vocab_size
        if tokenizer is not None and eos_token_id is None:
            eos_token_id = tokenizer.eos_token_id
            if eos_token_id is None:
                raise ValueError(
                    f"the tokenizer ({getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}) has no "
                    "end-of-text token, so that documents would run into each other: pass eos_token_id."
                )
        if vocab_size is None and tokenizer is not None:
            vocab_size = len(tokenizer)
        if eos_token_id is not None and not 0 <= eos_token_id < (vocab_size or np.inf):
            raise ValueError(f"eos_token_id={eos_token_id} is not an id of a vocabulary of {vocab_size}.")
        self.eos_token_id = eos_token_id

    def content(self, example: Any) -> Any:
        """The text or the ids of an example; None if it is empty.

        Raises:
            ValueError: if the example has no such column, or the column something else.
        """
        if not isinstance(example, Mapping) or self.column not in example:
            had = f"the columns {', '.join(map(str, example))}" if isinstance(example, Mapping) else repr(type(example))
            raise ValueError(f"a document of the stream has no column {self.column!r}, but {had}.")
        value = example[self.column]
        if value is None:
            return None
        if self.tokenizer is None:
            return self._checked(value)
        if not isinstance(value, str):
            raise ValueError(
                f"the column {self.column!r} must hold text, not a {type(value).__name__} ({value!r:.40})."
            )
        return value or None

    def _checked(self, value: Any) -> np.ndarray | None:
        if isinstance(value, str):
            raise ValueError(f"the column {self.column!r} holds text: pass a tokenizer.")
        ids = np.asarray(value)
        if ids.shape == (0,):
            return None
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"the column {self.column!r} must hold a list of integers, not {value!r:.60}.")
        return ids.astype(np.int64)

    def of(self, documents: Sequence[Any]) -> list[np.ndarray]:
        """int64 ids of each of these documents, with the token that ends it.

        Raises:
            ValueError: for an id that the vocabulary does not have.
        """
        if self.tokenizer is not None and documents:
            # verbose=False: texts longer than the model are expected.
            told = self.tokenizer(list(documents), return_attention_mask=False, verbose=False)["input_ids"]
            documents = [np.asarray(ids, np.int64) for ids in told]
        return [self._ended(ids) for ids in documents]

    def _ended(self, ids: np.ndarray) -> np.ndarray:
        if self.vocab_size is not None or self.tokenizer is None:
            wrong = ids[(ids < 0) | (ids >= (self.vocab_size or np.inf))]
            if len(wrong):
                raise ValueError(
                    f"the column {self.column!r} has the id {wrong[0]}, which a vocabulary of "
                    f"{self.vocab_size or 'any size'} does not have."
                )
        if self.eos_token_id is None or (len(ids) and ids[-1] == self.eos_token_id):
            return ids
        return np.append(ids, self.eos_token_id)

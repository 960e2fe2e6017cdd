"""Rows that only a model that sees far can predict: values of keys first, then questions about them to the end.

A document is `set(k, v)` for some keys in random order, and then `ask(k) answer(v)` for random keys among them. Each is
one token: `KEYS * VALUES` of the first kind, then `KEYS` and `VALUES`. Only answers have labels, so a loss of zero says
that all were found, and log(16) = 2.77 is a guess. An answer at position 16,000 is 16,000 tokens from its value.
"""

import torch

KEYS, VALUES = 16, 16
ASK = KEYS * VALUES
ANSWER = ASK + KEYS
VOCABULARY = ANSWER + VALUES


class Questions(torch.utils.data.Dataset):
    """`rows` documents of `length` tokens each. Those of another `seed` are others."""

    def __init__(self, rows: int, length: int, seed: int) -> None:
        self.rows, self.length, self.seed = rows, length, seed

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.rows:
            raise IndexError(index)
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        count = int(torch.randint(2, min(KEYS, self.length // 8) + 1, (), generator=random))
        keys = torch.randperm(KEYS, generator=random)[:count]
        values = torch.randint(VALUES, (count,), generator=random)
        asked = torch.randint(count, (self.length // 2,), generator=random)
        questions = torch.stack([ASK + keys[asked], ANSWER + values[asked]], dim=1).flatten()
        input_ids = torch.cat([keys * VALUES + values, questions])[: self.length]
        return {"input_ids": input_ids, "labels": input_ids.where(input_ids >= ANSWER, -100)}

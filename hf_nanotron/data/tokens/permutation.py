"""A permutation of [0, n) by a key, any place of which is known without the others.

A Feistel network (Luby and Rackoff 1988) is a bijection whatever its round function is: each round adds, modulo two, a
function of one half of the bits to the other half. Here the halves are as equal as `(n - 1).bit_length()` bits allow,
so that the network permutes fewer than 2n numbers, and "cycle walking" (Black and Rogaway 2002, "Ciphers with arbitrary
finite domains") restricts it to [0, n): a number that comes out too large goes in again, less than once on average.
The rounds' keys are words of `numpy.random.SeedSequence`, which NumPy promises not to change; the round function is a
multiplicative hash. It is good for shuffling, not for secrets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROUNDS = 6
FEW = 16  # places that Python's integers are faster for than arrays are
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93)  # odd: no two inputs have one product
_WORD = 2**64 - 1
_HALF_WORD = np.uint64(32)


@dataclass(frozen=True)
class Permutation:
    """A permutation of [0, `length`); another one for each key.

    Attributes:
        length: at most 2**62.
        seed, epoch, stream: the key; not negative. Streams are for several permutations of one epoch.
    """

    length: int
    seed: int = 0
    epoch: int = 0
    stream: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0 or self.epoch < 0:
            raise ValueError(f"seed={self.seed} and epoch={self.epoch} must not be negative.")
        if not 0 <= self.length <= 2**62:
            raise ValueError(f"length={self.length} cannot be permuted: it must be from 0 to 2**62.")
        words = np.random.SeedSequence([self.seed, self.epoch, self.stream]).generate_state(ROUNDS, np.uint64)
        object.__setattr__(self, "_keys", words)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """What stands at these places, int64 of their shape.

        Raises:
            IndexError: if one is not in [0, length).
        """
        places = np.asarray(places, np.int64)
        if places.size and (places.min() < 0 or places.max() >= self.length):
            raise IndexError(f"a place is not in [0, {self.length}).")
        if self.length < 2:
            return places.copy()
        if places.size <= FEW:
            return np.array([self._one(place) for place in places.ravel().tolist()], np.int64).reshape(places.shape)
        found = self._network(places.ravel().astype(np.uint64))
        while len(outside := np.flatnonzero(found >= self.length)):
            found[outside] = self._network(found[outside])
        return found.astype(np.int64).reshape(places.shape)

    def _one(self, number: int) -> int:
        """As `_network` and the walk, for one number."""
        bits = max((self.length - 1).bit_length(), 2)
        low = bits // 2
        low_mask, high_mask = (1 << low) - 1, (1 << (bits - low)) - 1
        while True:
            right, left = number & low_mask, number >> low
            for round_number, key in enumerate(self._keys.tolist()):  # type: ignore[attr-defined]
                if round_number % 2:
                    right ^= _hash_one(left, key) & low_mask
                else:
                    left ^= _hash_one(right, key) & high_mask
            number = (left << low) | right
            if number < self.length:
                return number

    def _network(self, numbers: np.ndarray) -> np.ndarray:
        bits = max((self.length - 1).bit_length(), 2)
        low, high = np.uint64(bits // 2), np.uint64(bits - bits // 2)
        one = np.uint64(1)
        right, left = numbers & ((one << low) - one), numbers >> low
        for number, key in enumerate(self._keys):  # type: ignore[attr-defined]
            if number % 2:
                right = right ^ (_hash(left, key) & ((one << low) - one))
            else:
                left = left ^ (_hash(right, key) & ((one << high) - one))
        return (left << low) | right


def _hash(numbers: np.ndarray, key: np.uint64) -> np.ndarray:
    """The upper half of a 64-bit hash; 32 bits, and no more are needed: a half has at most 31."""
    mixed = (numbers ^ key) * np.uint64(_MULTIPLIERS[0])
    mixed ^= mixed >> _HALF_WORD
    mixed *= np.uint64(_MULTIPLIERS[1])
    return mixed >> _HALF_WORD


def _hash_one(number: int, key: int) -> int:
    mixed = ((number ^ key) * _MULTIPLIERS[0]) & _WORD
    mixed ^= mixed >> 32
    return ((mixed * _MULTIPLIERS[1]) & _WORD) >> 32

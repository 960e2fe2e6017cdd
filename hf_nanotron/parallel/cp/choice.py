"""Which way attention takes with `cp_mode="auto"`, for each micro-batch and window: by counting bytes.

A layer's forward and backward together, 2 bytes a number, with T tokens of a rank, S of all rows, n ranks, Q the
features of queries and outputs, E those of keys and values (E' if repeated for ranks without a key-value head), R
tokens that a rank receives from others:

- "gather" copies E * (12 (R + T) + 22 T) + 8 T Q / 2, and 2 S E if an all-gather brings R, else 26 R E; 6 R E are sent
  beside kernels. In rows of which all ranks need most tokens, kernels over parts of a row lose what `SPLIT_ROW` says.
- "heads" copies 16 T (Q + E') and sends 4 (n - 1) / n T (Q + E') while nothing is computed.

So rows of long documents go by heads, and short documents and windows gather what they need.
"""

from __future__ import annotations

from typing import NamedTuple

from .exchange import Exchange

# Bytes in memory, at 3 TB/s, that cost the time of one over NVLink. Measured on two H200, ten layers of Llama-3.1-8B
# (docs/design/context_parallelism.md): "heads" showed 3.2 ms of communication a layer at 32k tokens and 11.4 ms at
# 128k, 104 and 118 GB/s.
LINK = 25

# The same for one that is sent beside kernels, from which it takes multiprocessors: "gather" computed 3.6 ms a layer
# longer than "heads" at 32k and 15 ms at 128k, and showed 0.7 and 5.5 ms of communication. What `SPLIT_ROW` and copies
# do not explain of that is 46 and 59.
BESIDE = 50

# Bytes for each token of the rows and feature of queries and outputs, in the time that kernels lose: measured on an
# H200 with heads of an 8B, 1 to 2 ms a layer at 32k and 4 ms at 128k, whatever the number of ranks.
SPLIT_ROW = 15

MARGIN = 0.8  # of gathering, which takes less memory: 52 GiB and not 65 there, at 128k


class HeadShape(NamedTuple):
    """The attention of one layer on a rank."""

    heads: int
    kv_heads: int
    key_width: int
    value_width: int


def divides(size: int, heads: int, kv_heads: int) -> bool:
    """Whether `size` ranks can have some heads each; key-value heads are repeated where there are fewer than ranks."""
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


class Traffic(NamedTuple):
    """What a layer's forward and backward cost beside products and attention, in bytes of memory.

    Attributes:
        copied: read and written by copies, and the time that kernels lose over parts of a row.
        sent: the time of what is sent.
    """

    copied: float
    sent: float


def by_gathering(shape: HeadShape, size: int, tokens: float, exchange: Exchange) -> Traffic:
    """Of `"gather"`.

    Args:
        size: ranks that share a row.
        tokens: of a rank.
        exchange: what it sends.
    """
    queries, keys = _features(shape, shape.kv_heads)
    received = exchange.most_received
    copied: float = keys * (12 * (received + tokens) + 22 * tokens) + 4 * tokens * queries
    if exchange.is_all:
        copied += size * tokens * (2 * keys + SPLIT_ROW * queries)
    else:
        copied += 26 * received * keys
    return Traffic(copied, BESIDE * 6 * received * keys)


def by_heads(shape: HeadShape, size: int, tokens: float) -> Traffic:
    """Of `"heads"`; arguments as for `by_gathering`."""
    moved = tokens * sum(_features(shape, max(shape.kv_heads, size)))
    return Traffic(16 * moved, LINK * 4 * (size - 1) / size * moved)


def cheaper(shape: HeadShape, size: int, tokens: float, exchange: Exchange) -> str:
    """`"gather"` or `"heads"`; the same on all ranks. Arguments as for `by_gathering`."""
    if not divides(size, shape.heads, shape.kv_heads):
        return "gather"
    gather, heads = sum(by_gathering(shape, size, tokens, exchange)), sum(by_heads(shape, size, tokens))
    return "heads" if heads < MARGIN * gather else "gather"


def _features(shape: HeadShape, kv_heads: int) -> tuple[int, int]:
    """Of queries and outputs together, and of the keys and values of `kv_heads`."""
    width = shape.key_width + shape.value_width
    return shape.heads * width, kv_heads * width

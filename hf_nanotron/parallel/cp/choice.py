"""Which way attention takes with `cp_mode="auto"`, for each micro-batch and window: by counting bytes.

A layer's forward and backward together, 2 bytes a number, with T tokens of a rank, S of all rows, n ranks, Q the
features of queries and outputs, E those of keys and values (E' if repeated for ranks without a key-value head), R
tokens that a rank receives from others, in G groups of heads:

- "gather" copies E * (12 (R + T) + 22 T) + 8 T Q / 2, and 2 S E if an all-gather brings R, else 26 R E; 6 R E / G are
  sent while nothing is computed. In rows of which all ranks need most tokens, kernels over parts of a row lose what
  `SPLIT_ROW` says.
- "heads" copies 16 T (Q + E') and sends 4 (n - 1) / n T (Q + E') while nothing is computed.

So long whole rows go by heads over four ranks or more, and short documents and windows gather what they need.
"""

from __future__ import annotations

from typing import NamedTuple

from .exchange import Exchange
from .gather import groups_worth_sending

# Bytes in memory that a GPU moves in the time of one over NVLink: 3 TB/s and 300 GB/s.
LINK = 10

# Bytes for each token of the rows and feature of queries and outputs, in the time that kernels lose: measured on an
# H200 with heads of an 8B, 1 to 2 ms a layer at 32k and 4 ms at 128k, whatever the number of ranks.
SPLIT_ROW = 15

MARGIN = 0.8  # of gathering: what is counted is not known better, and gathering needs no heads to divide


class HeadShape(NamedTuple):
    """The attention of one layer on a rank."""

    heads: int
    kv_heads: int
    key_width: int
    value_width: int


def divides(size: int, heads: int, kv_heads: int) -> bool:
    """Whether `size` ranks can have some heads each; key-value heads are repeated where there are fewer than ranks."""
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def cheaper(shape: HeadShape, size: int, tokens: int, exchange: Exchange) -> str:
    """`"gather"` or `"heads"`; the same on all ranks.

    Args:
        tokens: of a rank.
        exchange: what "gather" would send.
    """
    if not divides(size, shape.heads, shape.kv_heads):
        return "gather"
    width = shape.key_width + shape.value_width
    queries, keys = shape.heads * width, shape.kv_heads * width
    repeated = max(shape.kv_heads, size) * width
    received = exchange.most_received
    gather: float = keys * (12 * (received + tokens) + 22 * tokens) + 4 * tokens * queries
    gather += LINK * 6 * received * keys / groups_worth_sending(2 * received * keys)
    if exchange.is_all:
        gather += size * tokens * (2 * keys + SPLIT_ROW * queries)
    else:
        gather += 26 * received * keys
    heads = tokens * (queries + repeated) * (16 + LINK * 4 * (size - 1) / size)
    return "heads" if heads < MARGIN * gather else "gather"

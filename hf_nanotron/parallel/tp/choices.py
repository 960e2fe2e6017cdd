"""What a model thinks of each token: the entropy of its prediction, and whether it would have chosen the target.

The vocabulary may be cut over the tensor-parallel ranks; logits are never joined for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from ..collectives import all_reduce
from ..mesh import Group

# Is told of each token `[T]`: the entropy of what is predicted, in nats; whether the target is the most probable id;
# and whether anything is predicted. No gradient. The first two are zero where nothing is.
NoteChoices = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
BLOCK_BYTES = 2**26  # of a temporary in fp32
LOWEST = -1e4  # below it a probability is zero in fp32


@torch.no_grad()
def choices(
    logits: torch.Tensor,
    target: torch.Tensor,
    maximum: torch.Tensor,
    total: torch.Tensor,
    start: int,
    group: Group,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy `[T]`, in the dtype of `total`, and whether `target` is the most probable id (the first of equals).

    Args:
        logits: `[T, V_local]`, this rank's slice; all ranks of `group` hold the same tokens.
        target: `[T]` global ids.
        maximum, total: `[T]`, of whole rows: the largest of `scale * logits`, and the sum of `exp(x - maximum)`.
        start: first global id of our slice.
    """
    weighted = torch.empty_like(total)
    first = torch.empty_like(target)
    rows = max(1, BLOCK_BYTES // (4 * max(1, logits.shape[-1])))
    for begin in range(0, len(logits), rows):
        part = slice(begin, begin + rows)
        below = (logits[part].to(total.dtype) * scale).sub_(maximum[part].unsqueeze(-1))
        # Ids of other ranks are behind every one of ours.
        highest, column = below.max(-1)
        first[part] = (column + start).masked_fill_(highest < 0, torch.iinfo(torch.int64).max)
        weighted[part] = (below.clamp_(min=LOWEST).exp() * below).sum(-1)
    if group.size > 1:
        weighted, first = all_reduce(weighted, group), all_reduce(first, group, dist.ReduceOp.MIN)
    return total.log() - weighted / total, first == target

"""What is told of the tokens that a model predicts, besides their loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..data.dealing import FillerBatch
from ..ops.cross_entropy import IGNORE_INDEX, token_statistics
from ..ops.host_copy import to_device
from ..parallel.batch import batch_shape
from ..parallel.mesh import Group, ParallelMesh
from ..parallel.tp.choices import choices
from ..parallel.tp.loss import shifted

ENTROPY, CORRECT, PREDICTED, TOKENS, AUXILIARY, BATCHES = range(6)


def tokens_of(batch: Mapping[str, Any]) -> int | torch.Tensor:
    """Tokens that are no padding, as the attention mask says."""
    mask = batch.get("attention_mask")
    return batch_shape(batch).numel() if mask is None or mask.dim() != 2 else mask.sum()


class TokenFigures:
    """Sums over the tokens of each micro-batch of a window, or of one batch that is evaluated.

    Args:
        micro_batches: how many.
        device: of the sums.

    Attributes:
        total: `[micro_batches, 6]` in fp64, by the columns above: summed entropies in nats, tokens whose target is the
            most probable id, predicted tokens, all tokens (for the caller to fill in), the load-balancing loss of the
            routers, and the micro-batches that were counted. Of this rank: zero where it does not compute the loss.
        index: the micro-batch whose loss is computed now.
    """

    def __init__(self, micro_batches: int, device: torch.device) -> None:
        self.total = torch.zeros(micro_batches, 6, dtype=torch.float64, device=device)
        self.index = 0

    def own_part(self, batches: Sequence[Mapping[str, Any]], mesh: ParallelMesh) -> torch.Tensor:
        """`total` as it is to be summed over all ranks, with the tokens of `batches`: whole rows, one batch for each
        micro-batch, of which a `FillerBatch` counts nothing.
        """
        own = self.total * mesh.speaks_for_tokens
        if mesh.speaks_for_tokens and mesh.cp_rank == 0:  # context-parallel ranks share rows
            for index, batch in enumerate(batches):
                if not isinstance(batch, FillerBatch):
                    own[index, TOKENS] = to_device(torch.as_tensor(tokens_of(batch), dtype=torch.float64), own.device)
                    own[index, BATCHES] = 1.0
        return own

    def note_choices(self, entropy: torch.Tensor, is_first: torch.Tensor, keep: torch.Tensor) -> None:
        """See `NoteChoices`."""
        self.total[self.index, :TOKENS] += torch.stack([each.double().sum() for each in (entropy, is_first, keep)])

    @torch.no_grad()
    def note_logits(
        self, logits: torch.Tensor, labels: torch.Tensor | None, shift_labels: torch.Tensor | None, alone: Group
    ) -> None:
        """The same of whole logits `[B, S, V]`, which a loss of the user's is computed from."""
        if labels is None and shift_labels is None:
            return
        target = shifted(logits.new_empty(0) if labels is None else labels, shift_labels).reshape(-1)
        rows = logits.detach().reshape(-1, logits.shape[-1])
        keep = (target != IGNORE_INDEX).to(rows.device)
        target = target.to(rows.device)
        maximum, total, _ = token_statistics(rows, target)
        entropy, is_first = choices(rows, target, maximum, total, 0, alone)
        self.note_choices(entropy.masked_fill(~keep, 0.0), is_first & keep, keep)

    def note_auxiliary(self, loss: torch.Tensor) -> None:
        """The load-balancing loss of the routers, without its coefficient."""
        self.total[self.index, AUXILIARY] += loss.detach().double()

"""How the loss of a training model is made, as its trainer has set it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ops.cross_entropy import IGNORE_INDEX
from ..ops.domain_sums import domain_sums, filled_up
from ..parallel.tp.choices import NoteChoices
from ..parallel.tp.loss import NoteLosses, Reweigh, TokenShares, predicted
from .token_figures import TokenFigures

Loss = Callable[[Any, torch.Tensor | None, Any], torch.Tensor]


@dataclass
class MicroBatch:
    """What a stage knows of the micro-batch that it trains on, besides the inputs of the model.

    Attributes:
        share: what its loss is multiplied by.
        counts: False for one that only keeps this rank in step with others, and whose loss is zero.
        loss: `(outputs, labels, items)` -> loss, on the last stage; the model's own if None.
        items: the predicted tokens of the step.
        filled: id of a tensor -> the same, padded to a length that sequence parallelism can split.
        by_caller: whoever calls the model computes the loss.
        logits: whole ones that the head made.
    """

    share: float | torch.Tensor = 1.0
    counts: bool = True
    loss: Loss | None = None
    labels: torch.Tensor | None = None
    shift_labels: torch.Tensor | None = None
    items: torch.Tensor | None = None
    filled: dict[int, torch.Tensor] = field(default_factory=dict)
    by_caller: bool = False
    logits: torch.Tensor | None = None

    def fill(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs`, each tensor of the batch filled up."""
        return {name: self.filled.get(id(value), value) for name, value in inputs.items()}

    def finish(self, output: Any) -> None:
        """Put the loss of this micro-batch into the output of the last stage."""
        if self.by_caller:
            return
        loss = self.loss(output, self.labels, self.items) if self.loss is not None and self.counts else output.loss
        output.loss, self.logits = self.weigh(loss), None

    def weigh(self, loss: Any) -> torch.Tensor:
        """What is differentiated for `loss`."""
        if not self.counts:
            assert self.logits is not None
            return self.logits.float().sum() * 0.0
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(f"the loss must be a tensor with one element, but the loss of this micro-batch is {what}.")
        if not loss.requires_grad:
            raise ValueError(
                "the loss of this micro-batch has no gradient: it does not depend on the logits, or was computed from "
                "a detached copy of them."
            )
        return loss.reshape(()) * self.share


class DomainSums:
    """The summed loss and the predicted tokens of each domain, over the micro-batches of a window.

    Args:
        columns: of each micro-batch, `domain` `[B]` or `[B, S]`; None if it has none.
        number: of domains.
        device: of the sums.

    Attributes:
        total: `[number, 2]` in fp64: this rank's sums, which are zero where it does not compute the loss.
        index: the micro-batch whose loss is computed now.
        shares: `[number]`, what the loss of each token of a domain is multiplied by in the loss that is trained, in the
            place of one over the predicted tokens. None for the plain loss.
    """

    def __init__(self, columns: Sequence[torch.Tensor | None], number: int, device: torch.device) -> None:
        self.columns, self.index = columns, 0
        self.shares: torch.Tensor | None = None
        self.total = torch.zeros(number, 2, dtype=torch.float64, device=device)

    def note(self, losses: torch.Tensor, counts: torch.Tensor) -> None:
        """See `NoteLosses`."""
        column = self.columns[self.index]
        if column is not None:
            column = filled_up(column, len(losses) // len(column))
            self.total += domain_sums(losses, counts, column, len(self.total))

    def token_shares(self, tokens: int) -> torch.Tensor:
        """See `TokenShares`. Tokens of no domain count nothing."""
        column, shares = self.columns[self.index], self.shares
        assert shares is not None
        if column is None:
            return shares.new_zeros(tokens)
        column = filled_up(column, tokens // len(column)).to(shares.device)
        found = torch.where(column == IGNORE_INDEX, 0.0, shares[column.clamp(min=0)])
        return found.repeat_interleave(tokens // len(column)) if found.dim() == 1 else found.flatten()

    def note_labels(self, batch: Mapping[str, Any]) -> None:
        """Of a micro-batch whose loss is not a sum over tokens: what is predicted, without losses."""
        if batch.get("labels") is not None:
            counts = predicted(batch["labels"], batch.get("shift_labels"))
            self.note(torch.zeros(counts.numel(), device=counts.device), counts.flatten())


@dataclass
class TokenLosses:
    """The losses of the tokens of one micro-batch, which is measured without gradients.

    Attributes:
        losses, counts: `[B * S]`, see `NoteLosses`; None on a rank that does not compute the loss.
    """

    losses: torch.Tensor | None = None
    counts: torch.Tensor | None = None

    def note(self, losses: torch.Tensor, counts: torch.Tensor) -> None:
        """See `NoteLosses`."""
        self.losses, self.counts = losses, counts


@dataclass
class TrainingLoss:
    """What the forward of a model reads of the trainer that trains or evaluates it.

    A model has one for life, shared with the views of its pipeline stages. It cannot be an argument: the user's
    `compute_loss` calls the model itself, with the batch alone.

    Attributes:
        z_loss: coefficient of `log(Z)^2` in the loss of each predicted token.
        needs_logits: make whole logits, for whoever computes the loss from them.
        micro_batch: the one that is trained on now, where the model `makes_logits`.
        domains: what the losses of tokens are added to, if they are told by domain.
        measured: what the losses of tokens are put into, by a forward that is for nothing else.
        figures: what is summed up of the tokens of a window besides, or of a batch that is evaluated.
        reweigh: multiplies the loss of each token, by what it is, in training and evaluation.
    """

    z_loss: float = 0.0
    needs_logits: bool = False
    micro_batch: MicroBatch | None = None
    domains: DomainSums | None = None
    measured: TokenLosses | None = None
    figures: TokenFigures | None = None
    reweigh: Reweigh | None = None

    @property
    def note_choices(self) -> NoteChoices | None:
        """Who is told what the model thinks of tokens."""
        return None if self.figures is None or self.measured is not None else self.figures.note_choices

    @property
    def note(self) -> NoteLosses | None:
        """Who is told the losses of tokens."""
        listener = self.domains if self.measured is None else self.measured
        return None if listener is None else listener.note

    @property
    def shares(self) -> TokenShares | None:
        """How the tokens are weighed, if not all alike."""
        if self.domains is None or self.domains.shares is None or self.measured is not None:
            return None
        return self.domains.token_shares

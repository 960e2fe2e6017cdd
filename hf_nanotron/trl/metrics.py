"""The metrics of `trl.SFTTrainer`, from what ranks have summed up of their tokens."""

from __future__ import annotations

import torch

from ..models.token_figures import AUXILIARY, BATCHES, CORRECT, ENTROPY, PREDICTED, TOKENS, TokenFigures


class SFTMetrics:
    """What was noted since a line of each mode ("train" or "eval") was logged. The host reads it then, not before.

    Attributes:
        tokens: of all training batches, padding left out, of this run and of those that it goes on from.
    """

    def __init__(self, device: torch.device) -> None:
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self._noted: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}

    def note(self, figures: TokenFigures, mode: str) -> None:
        """Take the sums over all ranks of a window, or of a batch that is evaluated."""
        self._noted[mode].append(figures.total)
        if mode == "train":
            self.tokens += figures.total[:, TOKENS].sum()

    def take(self, mode: str, with_auxiliary: bool) -> dict[str, list[float]]:
        """TRL's lists, of which its `log` takes means: an entry for each micro-batch of all ranks."""
        if not self._noted[mode]:
            return {}
        rows = torch.cat(self._noted[mode]).tolist()
        self._noted[mode] = []
        metrics = {
            "entropy": [row[ENTROPY] / row[PREDICTED] if row[PREDICTED] else 0.0 for row in rows],
            "mean_token_accuracy": [row[CORRECT] / row[PREDICTED] if row[PREDICTED] else 0.0 for row in rows],
            "num_tokens": [self.tokens.item()],
        }
        if with_auxiliary:
            metrics["aux_loss"] = [row[AUXILIARY] / max(1.0, row[BATCHES]) for row in rows]
        return metrics

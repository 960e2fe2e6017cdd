"""Weights of domains by DoReMi (Xie et al. 2023, arXiv:2305.10429, algorithm 1): which data a small model can still
learn most from, compared with a reference model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checkpoint.state.index import StateIndex
from ..checkpoint.state.training_state import saved_extra
from ..models.base import ParallelModel
from ..models.training_loss import DomainSums
from ..parallel.batch import DOMAIN
from ..parallel.collectives import all_reduce
from .step.forward_pass import ForwardPass

logger = logging.get_logger(__name__)

DOREMI = "doremi"  # its key in the `extra` of a training state


class DomainWeights:
    """The weights of domains, updated with each step by their excess losses.

    All are fp64, and the same on every rank.

    Args:
        names: of the domains.
        rate: eta, by which the logarithm of a weight grows for each nat of excess loss.
        smoothing: c, the share of the uniform distribution in the weights of a step.

    Attributes:
        weights: `[domains]` of the step, which sum up to one; at first uniform.
        scores: `[domains]` excess loss of each domain where it was last seen; at first zero.
        total: `[domains]` weights, summed over the steps.
    """

    def __init__(self, names: Sequence[str], rate: float, smoothing: float, device: torch.device) -> None:
        self.names, self.rate, self.smoothing = tuple(names), rate, smoothing
        count = len(self.names)
        self.weights = torch.full((count,), 1 / count, dtype=torch.float64, device=device)
        self.scores, self.total = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.steps = 0

    def update(self, excess: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """New weights `[domains]`, without waiting for the device.

        Args:
            excess: `[domains]`, summed over the predicted tokens of the global batch.
            tokens: `[domains]`, how many these are. A domain without any keeps its score, as one whose loss is not
                finite.
        """
        scores = excess / tokens
        self.scores = torch.where((tokens > 0) & scores.isfinite(), scores, self.scores)
        grown = (self.weights.log() + self.rate * self.scores).softmax(0)
        self.weights = (1 - self.smoothing) * grown + self.smoothing / len(self.names)
        self.total = self.total + self.weights
        self.steps += 1
        return self.weights

    def average(self) -> dict[str, float]:
        """The answer: the mean over all steps, by name; uniform before the first."""
        mean = self.total / self.steps if self.steps else self.weights
        return dict(zip(self.names, mean.tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        values = {name: getattr(self, name).tolist() for name in ("weights", "scores", "total")}
        return {"names": list(self.names), "steps": self.steps, **values}

    def load(self, state: Any, where: str) -> None:
        """Go on from a state.

        Raises:
            ValueError: if it is that of other domains, or is damaged.
        """
        names = state.get("names") if isinstance(state, Mapping) else None
        if not isinstance(names, list) or not _is_sound(state):
            raise ValueError(f"{where}: `{DOREMI}` of its training state holds no weights of domains, but {state!r}.")
        if set(names) != set(self.names):
            raise ValueError(
                f"{where} has weights of the domains {', '.join(map(str, names))}, but the data has "
                f"{', '.join(self.names)}; resume with the same sets, or start a new run."
            )
        places = [names.index(name) for name in self.names]
        for name in ("weights", "scores", "total"):
            setattr(self, name, self.weights.new_tensor([state[name][place] for place in places]))
        self.steps = state["steps"]


def _is_sound(state: Mapping[str, Any]) -> bool:
    lists = [state.get(name) for name in ("weights", "scores", "total")]
    sound = all(
        isinstance(values, list) and len(values) == len(state["names"]) and all(_is_weight(value) for value in values)
        for values in lists
    )
    return sound and type(state.get("steps")) is int and state["steps"] >= 0


def _is_weight(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value >= 0


class DoReMi:
    """Trains a proxy model on domains that are weighed anew with each step; hand it to `NanotronTrainer(doremi=...)`.

    The objective of a step is the sum over domains of `w_d` times the mean loss of the domain's predicted tokens in
    the global batch. `w` is updated before by `log w_d += rate * excess_d`, normalised, and mixed with
    `smoothing` of the uniform distribution. `excess_d` is the mean over the same tokens of `max(proxy - reference,
    0)`, from the weights of the proxy before the step. Sample the domains evenly.

    Args:
        reference: a trained model of the same tokenizer, whose losses are compared: one of
            `hf_nanotron.AutoModelForCausalLM` made with the same sizes, or a stock causal LM.
        rate: eta.
        smoothing: c.

    Raises:
        ValueError: without a reference, or for a `rate` or a `smoothing` out of range.
    """

    def __init__(self, reference: PreTrainedModel, rate: float = 1.0, smoothing: float = 1e-3) -> None:
        if not isinstance(reference, PreTrainedModel):
            raise ValueError(
                f"DoReMi needs a reference model to compare losses with, not {reference!r}; train one on the same "
                "domains first, and load it with AutoModelForCausalLM.from_pretrained."
            )
        if not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise ValueError(f"DoReMi(rate={rate!r}): the rate of the weights must be a number above 0, such as 1.0.")
        if not isinstance(smoothing, int | float) or not 0 <= smoothing < 1:
            raise ValueError(
                f"DoReMi(smoothing={smoothing!r}): the share of the uniform distribution must be at least 0 and below "
                "1, such as 1e-3."
            )
        self.reference, self.rate, self.smoothing = reference, float(rate), float(smoothing)
        self._run: DomainWeights | None = None

    def begin_run(
        self,
        names: Sequence[str] | None,
        proxy: ForwardPass,
        reference: ForwardPass,
        checkpoint: str | None,
        index: StateIndex | None,
    ) -> None:
        """Start, or go on from a checkpoint, whose training state has this index. Called by the trainer, on every rank.

        Raises:
            ValueError: for data without names of domains, or a checkpoint of other ones.
        """
        if not names:
            raise ValueError(
                "doremi weighs domains, and the training data has no names for any: use a Mixture, or a dataset with "
                "`domain_names` and a column `domain`."
            )
        if len(names) == 1:
            raise ValueError(f"doremi weighs domains, and {names[0]!r} is the only one; use a Mixture of two or more.")
        self._proxy, self._reference = proxy, reference
        run = DomainWeights(names, self.rate, self.smoothing, proxy.model.mesh.device)
        if checkpoint is not None:
            run.load(_stored(checkpoint, index), checkpoint)
        self._run = run

    def weigh(self, micro_batches: Sequence[dict[str, Any]], domains: DomainSums) -> None:
        """Update the weights by a window, and have its losses weighed by them. All ranks together."""
        run, mesh = self._weights, self._proxy.model.mesh
        sums = DomainSums(domains.columns, len(run.names), mesh.device)
        both = zip(self._proxy.losses(micro_batches), self._reference.losses(micro_batches), strict=True)
        for sums.index, (own, other) in enumerate(both):
            assert own.losses is not None and own.counts is not None and other.losses is not None
            sums.note((own.losses - other.losses).clamp(min=0), own.counts)
        total = sums.total if mesh.speaks_for_tokens else torch.zeros_like(sums.total)
        excess, tokens = all_reduce(total, mesh.world).unbind(1)
        weights = run.update(excess, tokens)
        domains.shares = torch.where(tokens > 0, weights / tokens, 0.0)

    @property
    def _weights(self) -> DomainWeights:
        if self._run is None:
            raise ValueError("DoReMi has no weights yet: they are made by trainer.train().")
        return self._run

    @property
    def weights(self) -> dict[str, float]:
        """The answer, for `Mixture`: the weight of each domain, averaged over the steps of the run so far."""
        return self._weights.average()

    def metrics(self) -> dict[str, float]:
        """Of a log line: the weights of its step, and the excess losses. The host waits."""
        run = self._weights
        weights, scores = torch.stack((run.weights, run.scores)).tolist()
        return {
            **{f"weight/{name}": weight for name, weight in zip(run.names, weights, strict=True)},
            **{f"excess_loss/{name}": score for name, score in zip(run.names, scores, strict=True)},
        }

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {DOREMI: self._weights.state()}


def _stored(checkpoint: str, index: StateIndex | None) -> Any:
    found = saved_extra(index).get(DOREMI)
    if found is None:
        raise ValueError(f"{checkpoint} was not written by a run with doremi, so it has no weights of domains.")
    return found


def warn_without_doremi(extra: Mapping[str, Any], checkpoint: str) -> None:
    """Where a run without doremi goes on from a state whose `extra` has weights of domains."""
    if DOREMI in extra:
        logger.warning(
            f"{checkpoint} was written by a run with doremi, and this one has none: its loss is the plain one, and the "
            "weights of the domains are not gone on with."
        )


def check_domains(window: Sequence[Any]) -> None:
    """Refuse batches that do not say which domains they come from."""
    for batch in window:
        if isinstance(batch, Mapping) and batch.get(DOMAIN) is None:
            raise ValueError(
                f"doremi weighs domains, and a batch has no column {DOMAIN!r} (it has {sorted(batch)}); have the "
                "data_collator keep it."
            )


def check_doremi(model: ParallelModel, reference: ParallelModel, is_own: bool, is_mean_of_means: bool) -> None:
    """Refuse losses that are not sums over tokens.

    Args:
        is_own: whether the loss that is trained is not the model's plain one.
        is_mean_of_means: whether it is a mean over each micro-batch.
    """
    own = is_own or is_mean_of_means or model.makes_logits
    if own or reference.makes_logits:
        whose = f"the loss of {(model if own else reference).stock_class.__name__}"
        raise ValueError(
            f"doremi weighs the plain next-token losses of tokens, but {whose} is another: leave compute_loss_func, "
            "compute_loss and label_smoothing_factor out, and use models of transformers."
        )

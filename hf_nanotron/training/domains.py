"""What the log lines of a run say of each domain of its data: the loss, the tokens, the epochs.

A batch with a column `domain` says which part of the data each row, or what each token predicts, comes from. The last
stage sums losses and predicted tokens by domain where it computes the loss (`ops/domain_sums.py`). The sums stay on the
device, and ranks join them when a line is logged or a checkpoint is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers.utils import logging

from ..checkpoint.state.index import StateIndex
from ..checkpoint.state.training_state import saved_extra
from ..data.domain_column import check_column, domain_names
from ..models.base import ParallelModel
from ..models.training_loss import DomainSums
from ..parallel.batch import DOMAIN
from ..parallel.collectives import all_reduce
from .agreement.values import compare_ranks
from .run_order import Consumed

logger = logging.get_logger(__name__)

DOMAINS = "domains"  # its key in the `extra` of a training state
LOSS, COUNT, TOKENS = range(3)  # of a domain: summed loss, tokens in that sum, predicted tokens


class DomainTotals:
    """Sums of each domain since they were last read, over all ranks, and by name.

    Args:
        model: whose loss it is.
        dataset: that the rows come from. It may have names for the domains.

    Attributes:
        is_used: whether a batch had domains. The same on all ranks, which compare their windows.
        only_named: whether a column is domains only if the dataset has names for them: for losses of a user's own,
            which may read a column of that name as they like.
    """

    def __init__(self, model: ParallelModel, dataset: Any) -> None:
        self._model, self._dataset = model, dataset
        self.only_named = False
        self._found_names: tuple[Sequence[str] | None] | None = None  # once they are asked for
        self._are_compared = False  # with those of other ranks
        self._number = 0  # domains that this rank has seen, by the largest
        self._since: torch.Tensor | None = None  # `[domains, 3]` of this rank
        self.is_used = False

    def check(self, window: Sequence[Any]) -> None:
        """Look at the columns of a window that this rank has read.

        Raises:
            ValueError: for a column that says no domain, or one that the dataset has no name for.
        """
        found = [batch for batch in window if self._has_domains(batch)]
        if found and not self.is_used:
            self._number, self.is_used = len(self._names or ()), True
        for batch in found:
            self._number = max(self._number, check_column(batch, self._names))

    def sums_of(self, batches: Sequence[Any]) -> DomainSums | None:
        """Where the losses of micro-batches are summed; None without a column. After `check`."""
        columns = [batch[DOMAIN] if self._has_domains(batch) else None for batch in batches]
        if all(column is None for column in columns):
            return None
        if not self.is_used:
            raise ValueError(f"the column {DOMAIN!r} was added after the batch was read; have the collator add it.")
        return DomainSums(columns, self._number, self._model.mesh.device)

    def _has_domains(self, batch: Any) -> bool:
        """Not if the model's own forward takes a column of that name, which is something of the user's then."""
        has = isinstance(batch, Mapping) and batch.get(DOMAIN) is not None and DOMAIN not in self._model.own_columns
        return has and not (self.only_named and self._names is None)

    @property
    def _names(self) -> Sequence[str] | None:
        if self._found_names is None:
            self._found_names = (domain_names(self._dataset),)
        return self._found_names[0]

    def add(self, sums: torch.Tensor) -> None:
        """`sums` `[domains, 3]` of this rank."""
        if self._since is not None:
            longest = max(len(self._since), len(sums))
            sums = _longer(self._since, longest) + _longer(sums, longest)
        self._since = sums

    def read(self) -> dict[str, list[float]]:
        """By name, what was added since the last time, over the job. All ranks together; the host waits."""
        mesh = self._model.mesh
        if not self.is_used:
            return {}
        device, number = mesh.device, self._number
        since, self._since = self._since, None
        if not self._are_compared:
            compare_ranks(mesh, {"the list of the domains' names": self._names})
            self._are_compared = True
        if self._names is None:  # a rank may have seen more domains than another
            largest = torch.tensor(number, device=device)
            number = int(all_reduce(largest, mesh.world, dist.ReduceOp.MAX))
        own = torch.zeros(number, 3, dtype=torch.float64, device=device)
        if since is not None and mesh.speaks_for_tokens:
            own[: len(since)] = since
        return dict(zip(self._keys(number), all_reduce(own, mesh.world).tolist(), strict=True))

    def _keys(self, number: int) -> Sequence[str]:
        return self._names or [str(domain) for domain in range(number)]


class DomainLog:
    """Losses since the last log line, and tokens since the run began, of the domains that it trains on.

    Args:
        dataset: that is trained on.
        index: of the training state that the run resumes: its tokens are those of the run.
    """

    def __init__(self, model: ParallelModel, dataset: Any, index: StateIndex | None = None) -> None:
        self.totals = DomainTotals(model, dataset)
        self._line: dict[str, list[float]] = {}  # since the last log line
        self._tokens = {} if index is None else read_tokens(index)
        self._has_losses = True  # since the last log line

    def end_step(self, sums: DomainSums | None, has_losses: bool, loss: torch.Tensor, filters: bool) -> None:
        """Add the sums of a step, without waiting.

        Args:
            has_losses: whether the loss is a sum over tokens; else there are numbers of tokens alone.
            loss: of the step, over all ranks.
            filters: whether a loss that is not finite is no part of a logged mean.
        """
        if sums is None:
            return
        total, tokens = sums.total, sums.total[:, 1:]
        logged = torch.where(loss.isfinite(), total, 0.0) if filters else total
        self.totals.add(torch.cat((logged if has_losses else torch.zeros_like(total), tokens), 1))
        if not has_losses:
            self._has_losses = False
            logger.warning_once(
                "loss/<domain> is not logged: the loss that is trained is not the model's plain one, and need not be a "
                "sum over tokens. tokens/<domain> and epochs/<domain> are."
            )

    def settle(self) -> None:
        """Join what ranks have summed up. All ranks together."""
        for name, (loss, count, tokens) in self.totals.read().items():
            line = self._line.setdefault(name, [0.0, 0.0, 0.0])
            line[LOSS], line[COUNT], line[TOKENS] = line[LOSS] + loss, line[COUNT] + count, line[TOKENS] + tokens
            self._tokens[name] = self._tokens.get(name, 0) + round(tokens)

    def metrics(self, consumed: Callable[[], Consumed | None]) -> dict[str, float]:
        """Of the next log line. All ranks together.

        Args:
            consumed: what the run has read of each set, of data that consists of sets.
        """
        if not self.totals.is_used:
            return {}
        self.settle()
        line, has_losses = self._line, self._has_losses
        self._line, self._has_losses = {}, True
        read = consumed()
        losses = {name: sums for name, sums in line.items() if has_losses and sums[TOKENS]}
        return {
            **{f"loss/{name}": loss / count if count else math.nan for name, (loss, count, _) in losses.items()},
            **{f"tokens/{name}": self._tokens[name] for name in line if self._tokens[name]},
            **{f"epochs/{name}": epochs for name, epochs in (read.epochs if read is not None else {}).items()},
        }

    def state(self) -> dict[str, Any]:
        """For a checkpoint, after `settle`: the tokens of each domain; nothing for a run without domains."""
        return {DOMAINS: {"tokens": dict(self._tokens)}} if self._tokens else {}


def read_tokens(index: StateIndex) -> dict[str, int]:
    """The tokens of each domain that a checkpoint has been trained on."""
    found = saved_extra(index).get(DOMAINS, {"tokens": {}})
    tokens = found.get("tokens") if isinstance(found, dict) else None
    if not isinstance(tokens, dict) or not all(type(n) is int and n >= 0 for n in tokens.values()):
        raise ValueError(f"{index.path}: `{DOMAINS}` holds no tokens by domain, but {found!r}.")
    return {str(name): number for name, number in tokens.items()}


def _longer(sums: torch.Tensor, number: int) -> torch.Tensor:
    return F.pad(sums, (0, 0, 0, number - len(sums)))

"""Cross-entropy over logits whose vocabulary is cut over the tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from .collectives import all_reduce
from .mesh import Group

IGNORE_INDEX = -100


class _VocabParallelNLL(torch.autograd.Function):
    """-log softmax(logits)[target] per token, in fp32, without ever joining the vocabulary.

    Three small all-reduces: the maximum, the target's logit and the sum of exponentials, each of one float a token
    (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor, start: int, group: Group) -> torch.Tensor:
        logits = logits.float()
        shifted = logits - all_reduce(logits.amax(-1), group, dist.ReduceOp.MAX).unsqueeze(-1)
        local = target - start
        present = (local >= 0) & (local < logits.shape[-1])
        index = local.masked_fill(~present, 0).unsqueeze(-1)
        target_logit = shifted.gather(-1, index).squeeze(-1).masked_fill(~present, 0.0)
        exp = shifted.exp_()
        sums = all_reduce(torch.stack((target_logit, exp.sum(-1))), group) if group.size > 1 else None
        target_logit, total = (target_logit, exp.sum(-1)) if sums is None else (sums[0], sums[1])
        ctx.save_for_backward(exp.div_(total.unsqueeze(-1)), index, present)
        return total.log() - target_logit

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        probabilities, index, present = ctx.saved_tensors
        grad_logits = probabilities.scatter_add(-1, index, -present.to(probabilities.dtype).unsqueeze(-1))
        return grad_logits.mul_(grad.unsqueeze(-1)), None, None, None


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    start: int,
    group: Group,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Next-token loss, as `transformers.loss.ForCausalLMLoss`, over a slice of the vocabulary.

    Args:
        logits: `[B, S, V_local]`, this rank's slice; all ranks of `group` hold the same positions.
        labels: `[B, S]` global ids, `-100` where nothing is predicted; shifted here unless `shift_labels` is given.
        start: first global id of our slice.
        num_items_in_batch: what the summed loss is divided by; the number of predicted tokens if None.

    Returns:
        A scalar in fp32, the same on every rank of `group`.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
    target = shift_labels.reshape(-1).to(logits.device)
    keep = target != IGNORE_INDEX
    nll = _VocabParallelNLL.apply(logits.reshape(-1, logits.shape[-1]), target.masked_fill(~keep, 0), start, group)
    total = nll.masked_fill(~keep, 0.0).sum()
    if num_items_in_batch is None:
        return total / keep.sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch

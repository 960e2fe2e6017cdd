"""Cross-entropy over logits whose vocabulary is cut over the tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...ops.columns import multiply, multiply_back
from ...ops.cross_entropy import ABSENT, IGNORE_INDEX, token_statistics, write_gradient
from ...ops.linear import WeightGradient, add_product, can_add_product
from ..collectives import all_reduce
from ..mesh import Group
from .choices import NoteChoices, choices

# Where the head and the loss are one, the logits of this many tokens exist at a time. Each chunk reads and writes the
# weight's fp32 gradient, so few tokens are slow. On an H100, twice as many would be at most 5 % faster.
CHUNK_TOKENS = 4096
CHUNK_BYTES = 2**30  # fewer, if their logits take more
TILE = 256  # tokens: matrix products work in whole tiles

# Is told the loss of each token `[B * S]`, zero where nothing is predicted, and where something is. No gradient.
NoteLosses = Callable[[torch.Tensor, torch.Tensor], None]
# What the loss of each of so many tokens is multiplied by, `[B * S]`, in the place of one over the predicted tokens.
TokenShares = Callable[[int], torch.Tensor]
# What the loss of each token is multiplied by, `[T]`, of the losses `[T]`. It has no gradient.
Reweigh = Callable[[torch.Tensor], torch.Tensor]


class _VocabParallelNLL(torch.autograd.Function):
    """-log softmax(logits)[target] per token, in fp32, without ever joining the vocabulary.

    Three small all-reduces: the maximum, the target's logit and the sum of exponentials, each of one float a token
    (Shoeybi et al. 2019, arXiv:1909.08053, section 3). With `z_loss`, plus `z_loss * log(Z)^2`, where Z is the
    softmax's denominator (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, start: int, group: Group, z_loss: float
    ) -> torch.Tensor:
        logits = logits.float()
        maximum = all_reduce(logits.amax(-1), group, dist.ReduceOp.MAX)
        shifted = logits - maximum.unsqueeze(-1)
        local = target - start
        present = (local >= 0) & (local < logits.shape[-1])
        index = local.masked_fill(~present, 0).unsqueeze(-1)
        target_logit = shifted.gather(-1, index).squeeze(-1).masked_fill(~present, 0.0)
        exp = shifted.exp_()
        sums = all_reduce(torch.stack((target_logit, exp.sum(-1))), group) if group.size > 1 else None
        target_logit, total = (target_logit, exp.sum(-1)) if sums is None else (sums[0], sums[1])
        probabilities = exp.div_(total.unsqueeze(-1))
        nll = total.log() - target_logit
        if z_loss:
            log_z = total.log() + maximum
            probabilities.mul_((1 + 2 * z_loss * log_z).unsqueeze(-1))
            nll = nll + z_loss * log_z.square()
        ctx.save_for_backward(probabilities, index, present)
        return nll

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        probabilities, index, present = ctx.saved_tensors
        grad_logits = probabilities.scatter_add(-1, index, -present.to(probabilities.dtype).unsqueeze(-1))
        return grad_logits.mul_(grad.unsqueeze(-1)), None, None, None, None


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    start: int,
    group: Group,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    z_loss: float = 0.0,
    note: NoteLosses | None = None,
    shares: TokenShares | None = None,
    note_choices: NoteChoices | None = None,
    reweigh: Reweigh | None = None,
) -> torch.Tensor:
    """Next-token loss, as `transformers.loss.ForCausalLMLoss`, over a slice of the vocabulary.

    Args:
        logits: `[B, S, V_local]`, this rank's slice; all ranks of `group` hold the same positions.
        labels: `[B, S]` global ids, `-100` where nothing is predicted; shifted here unless `shift_labels` is given.
        start: first global id of our slice.
        num_items_in_batch: divisor of the summed loss; the number of predicted tokens if None.
        z_loss: coefficient of `log(Z)^2`, added for each predicted token.
        note: is told the loss of each token, the same on every rank of `group`.
        shares: weigh the tokens, instead of the divisor.
        note_choices: is told what the model thinks of each token, the same on every rank of `group`.
        reweigh: multiplies the loss of each token, by what it is; `note` is told the losses before.

    Returns:
        A scalar in fp32, the same on every rank of `group`.
    """
    target, keep, items = _targets(labels, shift_labels, num_items_in_batch, logits.device)
    rows = logits.reshape(-1, logits.shape[-1])
    nll = _VocabParallelNLL.apply(rows, target.masked_fill(~keep, 0), start, group, z_loss)
    losses = nll.masked_fill(~keep, 0.0)
    if note is not None:
        note(losses.detach(), keep)
    if note_choices is not None:
        _tell_choices(note_choices, rows.detach(), target, keep, start, group)
    if reweigh is not None:
        losses = losses * reweigh(losses.detach())
    if shares is not None:
        return (losses * shares(len(losses)).to(losses.dtype)).sum()
    return losses.sum() / items


@torch.no_grad()
def _tell_choices(
    note: NoteChoices, logits: torch.Tensor, target: torch.Tensor, keep: torch.Tensor, start: int, group: Group
) -> None:
    column = torch.zeros_like(target).masked_fill_(~keep, IGNORE_INDEX)  # no logit is chosen here
    maximum, total, _ = _over_group(token_statistics(logits, column), group)
    entropy, is_first = choices(logits, target, maximum, total, start, group)
    note(entropy.masked_fill(~keep, 0.0), is_first & keep, keep)


def predicted_tokens(labels: torch.Tensor, shift_labels: torch.Tensor | None = None) -> torch.Tensor:
    """Number of tokens of a micro-batch that are predicted, on its device; 1 if there are none."""
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    return (targets != IGNORE_INDEX).sum().clamp(min=1)


def predicted(labels: torch.Tensor, shift_labels: torch.Tensor | None = None) -> torch.Tensor:
    """`[B, S]` bool: whether a token predicts something."""
    return shifted(labels, shift_labels) != IGNORE_INDEX


def shifted(labels: torch.Tensor, shift_labels: torch.Tensor | None = None) -> torch.Tensor:
    """What each token predicts `[B, S]`."""
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:] if shift_labels is None else shift_labels


def _targets(
    labels: torch.Tensor,
    shift_labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | int]:
    """What each token predicts `[B * S]`, where that counts, and what the summed loss is divided by."""
    target = shifted(labels, shift_labels).reshape(-1).to(device)
    keep = target != IGNORE_INDEX
    if num_items_in_batch is None:
        return target, keep, keep.sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(device)
    return target, keep, num_items_in_batch


@runtime_checkable
class EarlyWeightGradient(WeightGradient, Protocol):
    """A weight gradient that a forward may add to, when its own backward is sure to follow."""

    def takes_early(self) -> bool:
        """Make ready for `add_product` in a forward. False if a backward alone may add now."""


@dataclass(frozen=True)
class _Head:
    """What stays the same for all chunks."""

    start: int
    group: Group
    z_loss: float
    scale: float
    chunk: int
    sink: EarlyWeightGradient | None
    differentiates: bool
    note: NoteLosses | None
    shares: TokenShares | None
    note_choices: NoteChoices | None
    reweigh: Reweigh | None


class _LinearLoss(torch.autograd.Function):
    """The summed loss over `items`, with gradients computed in the forward, a chunk of tokens at a time.

    Only the logits of one chunk exist at once. The backward multiplies the stored gradients by its own; those that a
    sink took cannot be scaled, and are right for a gradient of one only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        keep: torch.Tensor,
        items: torch.Tensor | int,
        head: _Head,
    ) -> torch.Tensor:
        exact = torch.promote_types(weight.dtype, torch.float32)
        wants = [wanted and head.differentiates for wanted in ctx.needs_input_grad[:3]]
        column = target - head.start
        column = column.masked_fill_((column < 0) | (column >= len(weight)), ABSENT).masked_fill_(~keep, IGNORE_INDEX)
        # What a token's loss counts in the sum.
        share = keep.to(exact) / items if head.shares is None else head.shares(len(keep)).to(exact) * keep
        losses = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        told = None if head.note_choices is None else (torch.zeros_like(losses), torch.zeros_like(keep))
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wants[1] and head.sink is None else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if wants[2] and bias is not None else None
        for first in range(0, len(hidden), head.chunk):
            part = slice(first, first + head.chunk)
            logits = multiply(hidden[part], weight, bias)
            maximum, total, chosen = _over_group(token_statistics(logits, column[part], head.scale), head.group)
            log_total = total.log()
            log_z = log_total + maximum
            losses[part] = log_total + (maximum - chosen) + head.z_loss * log_z.square()
            if told is not None:
                of_rows = target[part], maximum, total, head.start, head.group, head.scale
                told[0][part], told[1][part] = choices(logits, *of_rows)
            if head.reweigh is not None:
                share[part] *= head.reweigh(losses[part])
            if not any(wants):
                del logits
                continue
            weights = share[part] * head.scale
            factor = weights * (1 + 2 * head.z_loss * log_z) / total
            write_gradient(logits, column[part], maximum, factor, weights, head.scale)
            if grad_hidden is not None:
                multiply_back(logits, weight, grad_hidden[part])
            if wants[1]:
                _add_weight_product(head.sink, grad_weight, logits, hidden[part])
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=exact)
            del logits  # or the next chunk's would be made beside it
        ctx.gradients = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ctx.added_early = wants[1] and head.sink is not None
        losses.masked_fill_(~keep, 0.0)
        if head.note is not None:
            head.note(losses, keep)
        if told is not None and head.note_choices is not None:
            head.note_choices(told[0].masked_fill_(~keep, 0.0), told[1] & keep, keep)
        plain = head.shares is None and head.reweigh is None
        return losses.sum() / items if plain else (losses * share).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss have already been used; compute the loss again.")
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.added_early:
            # What is in the sink cannot be scaled any more. Not a number ends the step, without waiting for the GPU.
            grad = torch.where(grad == 1, grad, float("nan"))
        return (*(None if each is None else each.mul_(grad) for each in gradients), None, None, None, None)


def _over_group(
    statistics: tuple[torch.Tensor, torch.Tensor, torch.Tensor], group: Group
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Statistics of whole rows from those of the ranks' slices."""
    if group.size == 1:
        return statistics
    own, total, chosen = statistics
    maximum = all_reduce(own, group, dist.ReduceOp.MAX)
    sums = all_reduce(torch.stack((total * (own - maximum).exp(), chosen)), group)
    return maximum, sums[0], sums[1]


def _early_sink(
    gradient: WeightGradient | None, weight: torch.Tensor, dtype: torch.dtype
) -> EarlyWeightGradient | None:
    """`gradient`, made ready, if a forward may add products of `dtype` to it now."""
    if not isinstance(gradient, EarlyWeightGradient) or not weight.requires_grad or not gradient.takes_product(dtype):
        return None
    return gradient if gradient.takes_early() else None


def _add_weight_product(
    sink: WeightGradient | None, total: torch.Tensor | None, grad_logits: torch.Tensor, hidden: torch.Tensor
) -> None:
    """Add `grad_logits.T @ hidden` to the sink, or else to `total`, without rounding it to the operands' dtype."""
    if sink is not None:
        sink.add_product(grad_logits, hidden)
        return
    assert total is not None
    if can_add_product(total, hidden.dtype):
        add_product(total, grad_logits, hidden, overwrite=False)
    else:
        add_product(total, grad_logits.to(total.dtype), hidden.to(total.dtype), overwrite=False)


def chunk_size(tokens: int, bytes_per_token: int) -> int:
    """Into how many tokens at a time `tokens` are cut: few chunks, about as long as each other, of whole tiles."""
    most = max(1, min(CHUNK_TOKENS, CHUNK_BYTES // bytes_per_token))
    tokens = max(1, tokens)
    even = -(-tokens // -(-tokens // most))
    return min(-(-even // TILE) * TILE, most // TILE * TILE) if most >= TILE else even


def linear_causal_lm_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    start: int,
    group: Group,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    z_loss: float = 0.0,
    chunk: int | None = None,
    scale: float = 1.0,
    weight_gradient: WeightGradient | None = None,
    note: NoteLosses | None = None,
    shares: TokenShares | None = None,
    note_choices: NoteChoices | None = None,
    reweigh: Reweigh | None = None,
) -> torch.Tensor:
    """`causal_lm_loss` of `scale * (hidden @ weight.T + bias)`, without the logits.

    Tokens go through head and loss in chunks, forward and backward at once (Hsu et al. 2024, arXiv:2410.10989, section
    3.2): three matmuls, as the head alone, and the memory of one chunk of logits. Under tensor parallelism the gradient
    of `hidden` is partial; the caller sums it.

    Args:
        hidden: `[B, S, H]`, the same on every rank of `group`.
        weight: `[V_local, H]`, to whose dtype `hidden` is rounded; it may be freed after the call.
        bias: `[V_local]` or None.
        labels, start, group, num_items_in_batch, shift_labels, z_loss, note, shares, note_choices, reweigh: as in
            `causal_lm_loss`.
        chunk: tokens at a time, the same on every rank of `group`; by default see `chunk_size`, for slices of one
            length.
        scale: multiplies the head's output.
        weight_gradient: accumulates the weight's gradient if it accepts products in a forward (`EarlyWeightGradient`),
            and autograd gets none; else autograd gets it in the dtype of `weight`.

    Returns:
        A scalar in fp32 (fp64 for fp64 weights), the same on every rank of `group`.
    """
    if chunk is None:
        chunk = chunk_size(labels.numel(), len(weight) * weight.element_size())
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 token.")
    target, keep, items = _targets(labels, shift_labels, num_items_in_batch, hidden.device)
    if target.numel() != hidden[..., 0].numel():
        raise ValueError(
            f"{target.numel()} labels for hidden states of shape {tuple(hidden.shape)}: the fused loss needs one label "
            "per position."
        )
    hidden = hidden.to(weight.dtype)
    differentiates = torch.is_grad_enabled()
    sink = _early_sink(weight_gradient, weight, hidden.dtype) if differentiates else None
    head = _Head(start, group, z_loss, scale, chunk, sink, differentiates, note, shares, note_choices, reweigh)
    rows = hidden.reshape(-1, hidden.shape[-1])
    return _LinearLoss.apply(rows, weight, bias, target, keep, items, head)

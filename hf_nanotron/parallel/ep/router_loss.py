"""Losses over the router logits of a mixture of experts, from sums that are passed from stage to stage.

The load-balancing loss is `E * sum_e f_e * p_e`, where `f_e` (how often expert `e` is among the `k` best) and `p_e`
(its mean probability) are means over the tokens of all layers, taken before they are multiplied (Fedus et al. 2021,
arXiv:2101.03961, equations 4 to 6). So each stage adds the sums of its layers, `2 E + 2` numbers per micro-batch, and
the last one computes the loss. It is linear in the probabilities, and their gradient is the same for every token of an
expert, so the gradient of the sums is all that other stages need.

The z-loss (Zoph et al. 2022, arXiv:2202.08906, equation 5) is a mean over the same tokens of all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..collectives import reduce_from
from ..mesh import Group


@dataclass(frozen=True)
class RouterSums:
    """Sums over the tokens of some layers, in one tensor that is passed between stages.

    `packed` is fp32 `[2 E + 2]`, with a gradient for the probabilities and the z sum. For a z-loss alone, `E = 0`.
    """

    packed: torch.Tensor

    @property
    def num_experts(self) -> int:
        return self.packed.numel() // 2 - 1

    @property
    def counts(self) -> torch.Tensor:
        """`[E]`: how often each expert was among the `top_k` best. No gradient."""
        return self.packed[: self.num_experts].detach()

    @property
    def probabilities(self) -> torch.Tensor:
        """`[E]`: sum of the softmax over tokens."""
        return self.packed[self.num_experts : -2]

    @property
    def z(self) -> torch.Tensor:
        """Sum over tokens of `logsumexp(logits) ** 2`."""
        return self.packed[-2]

    @property
    def tokens(self) -> torch.Tensor:
        """How many tokens were added, each once a layer. No gradient."""
        return self.packed[-1].detach()


def pack(sums: RouterSums) -> torch.Tensor:
    """The fp32 `[2 E + 2]` to be sent."""
    return sums.packed


def unpack(received: torch.Tensor, num_experts: int) -> RouterSums:
    """The sums that the previous stage sent."""
    if received.shape != (2 * num_experts + 2,) or received.dtype != torch.float32:
        raise ValueError(
            f"sums over routers of {num_experts} experts are float32 of shape ({2 * num_experts + 2},); received "
            f"{received.dtype} of shape {tuple(received.shape)}."
        )
    return RouterSums(received)


def empty(num_experts: int, device: torch.device | str | None = None) -> RouterSums:
    """The sums of no layer, with which the first stage begins."""
    return RouterSums(torch.zeros(2 * num_experts + 2, device=device))


def add(sums: RouterSums, layer_sums: RouterSums) -> RouterSums:
    """The sums of both."""
    if sums.packed.shape != layer_sums.packed.shape:
        raise ValueError(
            f"routers of {sums.num_experts} and of {layer_sums.num_experts} experts cannot share a load-balancing loss."
        )
    return RouterSums(sums.packed + layer_sums.packed)


class _SumOverTokens(torch.autograd.Function):
    """Keeps nothing but the logits for the backward: softmaxes of all layers would cost several times their memory."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, weights: torch.Tensor | None, num_experts: int, top_k: int
    ) -> torch.Tensor:
        ctx.save_for_backward(logits, weights)
        ctx.num_experts = num_experts
        x = logits.float()
        z = x.logsumexp(-1).square()
        tokens = x.new_tensor(len(x)) if weights is None else weights.sum()
        parts = [(z if weights is None else z * weights).sum().view(1), tokens.view(1)]
        if num_experts:
            probabilities = x.softmax(-1)
            chosen = torch.zeros_like(x).scatter_(-1, probabilities.topk(top_k, dim=-1).indices, 1.0)
            if weights is not None:
                probabilities, chosen = probabilities * weights.unsqueeze(-1), chosen * weights.unsqueeze(-1)
            parts = [chosen.sum(0), probabilities.sum(0), *parts]
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, weights = ctx.saved_tensors
        x = logits.float()
        probabilities = x.softmax(-1)
        inner = 2 * grad[-2] * x.logsumexp(-1, keepdim=True)
        if ctx.num_experts:
            upstream = grad[ctx.num_experts : -2]
            inner = inner + upstream - (probabilities * upstream).sum(-1, keepdim=True)
        grad_logits = probabilities * inner
        if weights is not None:
            grad_logits = grad_logits * weights.unsqueeze(-1)
        return grad_logits.to(logits.dtype), None, None, None


def sum_over_tokens(logits: torch.Tensor, num_experts: int, top_k: int, mask: torch.Tensor | None = None) -> RouterSums:
    """The sums of one layer. Softmax and sums are in fp32 (transformers' softmax is in the logits' dtype).

    Args:
        logits: `[tokens, E]`.
        num_experts: `E`, or 0 to omit what only the load-balancing loss needs.
        top_k: experts per token that count as chosen.
        mask: any shape with one element per token, in their order; 0 where a token does not count.
    """
    if logits.dim() != 2 or (num_experts and logits.shape[1] != num_experts):
        raise ValueError(f"expected router logits [tokens, {num_experts or 'experts'}], got {tuple(logits.shape)}.")
    if mask is None:
        return RouterSums(_SumOverTokens.apply(logits, None, num_experts, top_k))
    if mask.numel() != len(logits):
        raise ValueError(
            f"the attention mask has shape {tuple(mask.shape)}, but the router saw {len(logits)} tokens; the mask is "
            "[batch, sequence] over the tokens of this rank, 1 where a token counts."
        )
    weights = mask.reshape(-1).to(logits.device, torch.float32)
    return RouterSums(_SumOverTokens.apply(logits, weights, num_experts, top_k))


def sum_over_ranks(sums: RouterSums, group: Group) -> RouterSums:
    """The sums over tokens that are sharded over `group`, on the last stage.

    Every rank then computes the loss of all tokens, but its gradient reaches only this rank's tokens: parameter
    gradients are to be summed over `group`, as for any loss over sharded tokens.
    """
    return RouterSums(reduce_from(sums.packed, group))


def auxiliary_loss(sums: RouterSums) -> torch.Tensor:
    """The load-balancing loss `E * sum_e f_e * p_e`, as transformers' `load_balancing_loss_func` over all layers.

    It is not divided by `top_k` (uniform routing gives `top_k`). A micro-batch without a valid token gives 0.
    """
    tokens = sums.tokens.clamp(min=1.0)
    return sums.num_experts * ((sums.counts / tokens) * (sums.probabilities / tokens)).sum()


def z_loss(sums: RouterSums) -> torch.Tensor:
    """Mean of `logsumexp(logits) ** 2` over the tokens of all layers; 0 without a valid token."""
    return sums.z / sums.tokens.clamp(min=1.0)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """`x`, whose gradient is multiplied by `factor`.

    In a tensor-parallel region every rank routes all tokens and computes the whole loss, but gradients of the region's
    input and replicated parameters are summed over ranks: a factor of `1 / tp` corrects for it.
    """
    return x if factor == 1.0 else _ScaleGradient.apply(x, factor)

"""What the spectral parametrization multiplies: the spread of initial weights, learning rates and AdamW's epsilon.

Every factor follows from a weight's shape here and in the base model. With inputs m_in times and outputs m_out times
the base's:

    spread of initial values    m_in^-1/2 min(1, (m_out / m_in)^1/2)    the spectral norm goes with (m_out / m_in)^1/2
    learning rate               1 / m_in                                AdamW's update has a full spectral norm
    epsilon                     1 / m_out                               as the gradient of each element

(Yang, Simon & Bernstein 2023, arXiv:2310.17813; Yang et al. 2022, arXiv:2203.03466.) A head has m_out = 1, an embedding
m_in = 1, vectors too. What else depends on the width becomes a multiplier c of some weights' outputs. It is folded into
them: their values and learning rate times c, epsilon by c, which trains the same function under AdamW. So a stock model
computes the same, and nothing but weights is saved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from ...optim.build import UpdateRule
from ..stock.anatomy import Anatomy, dissect, join
from ..weight_roles import WeightRole, weight_roles
from .sizes import Spectral

# Model types whose forward depends on the width in other ways.
REFUSED: dict[str, str] = {
    "afmoe": "its config scales the embedding with the width (mup_enabled)",
    "dory": "its weights are normalised, so their spread has no effect",
    "gemma3n_text": "the inputs of its layers are scaled by its width",
    "gemma4_text": "the inputs of its layers are scaled by its width",
    "minicpm3": "its config has a parametrization of its own (dim_model_base)",
}


@dataclass(frozen=True)
class WeightScale:
    """The factors of one weight, relative to the base model's.

    Attributes:
        spread: of the initial values of each of the layers that the weight stores.
        rate: of the learning rate.
        eps: of AdamW's epsilon.
        multiplier: what is folded into the values. `rate` and `eps` have it already; `spread` has not.
    """

    spread: tuple[float, ...] = (1.0,)
    rate: float = 1.0
    eps: float = 1.0
    multiplier: float = 1.0

    @property
    def rule(self) -> UpdateRule:
        return UpdateRule(rate=self.rate, eps=self.eps)


@dataclass(frozen=True)
class SpectralWeights:
    """The parametrization of a model at hand: its base, and the factors of each weight by its name on the Hub."""

    sizes: Spectral
    scales: dict[str, WeightScale] = field(repr=False)


def weight_scales(model: PreTrainedModel, base: PreTrainedModel, tied: bool) -> dict[str, WeightScale]:
    """The factors of every weight of a stock model. Both models may be on the meta device.

    Raises:
        ValueError: if the models differ in more than widths, or for a family whose forward depends on the width in a
            way that weights cannot undo.
    """
    kind = model.config.get_text_config().model_type
    if kind in REFUSED and (kind != "afmoe" or model.config.get_text_config().mup_enabled):
        raise ValueError(f"parametrization='spectral' is not supported for {kind!r}: {REFUSED[kind]}.")
    anatomy, small = dissect(model), dissect(base)
    roles, base_roles = weight_roles(anatomy), weight_roles(small)
    if differing := sorted(roles.keys() ^ base_roles.keys()):
        raise ValueError(
            f"the base model of parametrization='spectral' has other weights ({differing[0]!r}, {len(differing)} in "
            "all): it may differ in widths alone, not in the number of layers or experts."
        )
    multipliers = _multipliers(anatomy, small, tied)
    return {name: _scale(role, base_roles[name], multipliers.get(name, 1.0)) for name, role in roles.items()}


def _scale(role: WeightRole, base: WeightRole, multiplier: float) -> WeightScale:
    inputs = role.fan_in / base.fan_in
    outputs = [size / base_size for size, base_size in zip(role.part_sizes, base.part_sizes, strict=True)]
    spread = (1.0,)
    if role.kind not in ("norm", "bias") and (role.fan_in > 1 or role.kind != "other"):
        spread = tuple(inputs**-0.5 * min(1.0, (each / inputs) ** 0.5) for each in outputs)
    return WeightScale(spread, multiplier / inputs, 1 / (multiplier * max(outputs)), multiplier)


# ---- multipliers, and the weights that they are folded into ----


def _multipliers(anatomy: Anatomy, base: Anatomy, tied: bool) -> dict[str, float]:
    """Weight -> by what its outputs are multiplied."""
    model = anatomy.model
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        small = base.model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            factor, target = _embedding(small) / _embedding(module), name
        else:
            factor = _attention(small, module)
            target = name if factor == 1.0 else _query(name, module)
        if factor != 1.0:
            found |= dict.fromkeys(_weights(model, target), factor)
    if tied:
        norm = _last_norm(anatomy)
        width, small_width = (a.model.config.get_text_config().hidden_size for a in (anatomy, base))
        embedding = found.get(f"{anatomy.embedding}.weight", 1.0)
        found |= dict.fromkeys(_weights(model, norm), small_width / width / embedding)
    return {name: factor for name, factor in found.items() if not math.isclose(factor, 1.0)}


def _embedding(module: nn.Module) -> float:
    """What an embedding multiplies its rows by: the root of the width in Gemma and other families."""
    factors = (getattr(module, name, None) for name in EMBEDDING_SCALES)
    return next((factor for factor in factors if isinstance(factor, float)), 1.0)


def _weights(model: PreTrainedModel, name: str) -> list[str]:
    return [join(name, leaf) for leaf, _ in model.get_submodule(name).named_parameters(recurse=False)]


def _attention(base: nn.Module, module: nn.Module) -> float:
    """What makes the scale of attention 1/d: a head's products are sums over d features that learn together."""
    scale, small = getattr(module, "scaling", None), getattr(base, "scaling", None)
    if not isinstance(scale, float) or not isinstance(small, float):
        return 1.0
    sizes = [next((s for n in HEAD_SIZES if isinstance(s := getattr(m, n, None), int)), 1) for m in (module, base)]
    factor = small * sizes[1] / (scale * sizes[0])
    return 1.0 if math.isclose(factor, 1.0) else factor


EMBEDDING_SCALES = ("scalar_embed_scale", "embed_scale")
HEAD_SIZES = ("head_dim", "head_size", "qk_head_dim")
QUERY_NORMS = ("q_norm", "q_layernorm", "query_layernorm")


def _query(path: str, module: nn.Module) -> str:
    """The module whose weights an attention's queries are in proportion to: their norm, or their projection."""
    for name in QUERY_NORMS:
        if (norm := getattr(module, name, None)) is not None and getattr(norm, "weight", None) is not None:
            return join(path, name)
    if isinstance(getattr(module, "q_proj", None), nn.Linear) and not any(hasattr(module, n) for n in QUERY_NORMS):
        return join(path, "q_proj")
    raise ValueError(
        f"parametrization='spectral': {type(module).__name__} has no layer of queries alone, so the size of its heads "
        "must be the base's; scale the number of heads instead."
    )


def _last_norm(anatomy: Anatomy) -> str:
    """The norm in front of the head: with tied weights, the head's share of the parametrization is folded into it."""
    model = anatomy.model
    after = [name for name in anatomy.last if name != anatomy.head]
    if len(after) == 1 and getattr(model.get_submodule(after[0]), "weight", None) is not None:
        return after[0]
    raise ValueError(
        f"parametrization='spectral' with tied embedding and head: {type(model).__name__} has no single norm with "
        "weights in front of its head to make up for it; set tie_word_embeddings=False."
    )

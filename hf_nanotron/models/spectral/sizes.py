"""The base of a parametrization: the sizes of the small model whose learning rates carry over."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

HIDDEN = ("hidden_size", "n_embd", "d_model")  # how configs store it

# Fields of configs that are as many times the base's as the hidden size, unless `base_sizes` says otherwise. Sizes of
# heads, ranks, states and kernels stay, as the numbers of layers and experts do.
WIDTHS = (
    *("intermediate_size", "intermediate_size_mlp", "dense_intermediate_size", "prefix_dense_intermediate_size"),
    *("moe_intermediate_size", "shared_intermediate_size", "shared_expert_intermediate_size"),
    *("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"),
    *("ffn_hidden_size", "ffn_dim", "n_inner", "word_embed_proj_dim", "mamba_d_ssm"),
    *("num_attention_heads", "num_key_value_heads", "num_kv_heads", "num_heads", "n_head", "n_heads"),
    *("attention_heads", "num_attention_heads_per_layer", "swa_num_attention_heads", "swa_num_key_value_heads"),
    *("mamba_n_heads", "mamba_num_heads", "linear_num_heads", "linear_num_key_heads", "linear_num_value_heads"),
)


@dataclass(frozen=True)
class Spectral:
    """The sizes of the base model, in which the spectral parametrization is the standard one.

    Args:
        base_hidden_size: hidden size of the base model.
        base_sizes: other fields of its config that are not in proportion to the hidden size.

    Raises:
        ValueError: for sizes that are not whole numbers above 0, or a second hidden size.
    """

    base_hidden_size: int
    base_sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, size in {"base_hidden_size": self.base_hidden_size, **self.base_sizes}.items():
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}={size!r} of the base model must be a whole number, at least 1.")
        if twice := [name for name in HIDDEN if name in self.base_sizes]:
            raise ValueError(
                f"base_sizes: {twice[0]!r} is the hidden size, which base_hidden_size={self.base_hidden_size} says; "
                "leave it out."
            )

    def to_dict(self) -> dict[str, Any]:
        return {"base_hidden_size": self.base_hidden_size, "base_sizes": dict(self.base_sizes)}

    def base_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The config of the base model of the model of this config.

        Raises:
            ValueError: for a base that is wider, or has sizes that the config does not know or that do not divide.
        """
        width = config.get_text_config().hidden_size
        if self.base_hidden_size > width:
            raise ValueError(
                f"base_hidden_size={self.base_hidden_size} is above the model's hidden_size={width}: the base is the "
                "small model whose learning rate was found; take its width, or one of at most the model's."
            )
        return with_width(config, self.base_hidden_size, self.base_sizes, "base_sizes")


def with_width(
    config: PreTrainedConfig, hidden_size: int, sizes: Mapping[str, int] | None = None, where: str | None = None
) -> PreTrainedConfig:
    """A config like this one with another width: each field of `WIDTHS` in proportion, but for those in `sizes`.

    Args:
        where: what `sizes` is called, for errors; None if the user cannot give any.
    """
    sizes = dict(sizes or {})
    scaled = copy.deepcopy(config)
    text: Any = scaled.get_text_config()
    width = int(text.hidden_size)
    fields = {key: value for key, value in vars(text).items() if key not in HIDDEN}
    if unknown := [name for name in sizes if not hasattr(text, name)]:
        raise ValueError(f"{where}: {unknown[0]!r} is no field of a {text.model_type!r} config.")
    if others := [name for name in sizes if isinstance(getattr(text, name), str | bool | float | dict)]:
        raise ValueError(f"{where}: {others[0]!r} of a {text.model_type!r} config is no size.")
    text.hidden_size = hidden_size
    for name in WIDTHS:
        value = fields.get(name)
        if value is None or name in sizes or name in {text.attribute_map.get(key) for key in sizes}:
            continue
        values = value if isinstance(value, list) else [value]
        if any(number * hidden_size % width for number in values):
            near = {name: max(1, values[0] * hidden_size // width)}
            instead = f"say what it is at hidden_size={hidden_size}, such as {where}={near}"
            raise ValueError(
                f"{name}={value} cannot become {hidden_size}/{width} of itself, as hidden_size does; "
                f"{instead if where else 'choose another width'}."
            )
        new = [number * hidden_size // width for number in values]
        setattr(text, name, new if isinstance(value, list) else new[0])
    for name, size in sizes.items():
        setattr(text, name, size)
    return scaled

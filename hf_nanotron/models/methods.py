"""What the methods of `PreTrainedModel` that read or write weights do on a sharded model.

Each public method of transformers and torch is refused, written here, or right as it is (`tests/model_methods.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel
from transformers.utils import logging

from .parts import ModelParts

logger = logging.get_logger(__name__)

BEFORE = "Do it on the stock model before it is sharded"

# Refused on a sharded model, with the reason and what to do instead.
REFUSED: dict[str, str] = {
    "_init_weights": "ranks would draw the same numbers for different shards. Use "
    "AutoModelForCausalLM.from_config for fresh weights",
    "init_weights": "each rank would draw its own shard. Use AutoModelForCausalLM.from_config for fresh weights",
    "initialize_weights": "each rank would draw its own shard. Use AutoModelForCausalLM.from_config for fresh weights",
    "post_init": f"it would initialise and tie weights again. {BEFORE}",
    "resize_position_embeddings": f"other ranks and the optimizer hold shards of the weights. {BEFORE}",
    "prune_heads": f"attention heads are sharded over ranks. {BEFORE}",
    "set_decoder": f"an unsharded module cannot replace a sharded one. {BEFORE}",
    "set_encoder": f"an unsharded module cannot replace a sharded one. {BEFORE}",
    "set_submodule": f"an unsharded module cannot replace a sharded one. {BEFORE}",
    "add_adapter": "adapters of sharded weights would be saved as if they were of full weights. Merge them before the "
    "model is sharded (`merge_and_unload()`, and `requires_grad_(True)`)",
    "load_adapter": "adapters are made for unsharded weights. Merge them into the stock model before it is sharded "
    "(`merge_and_unload()`, and `requires_grad_(True)`)",
    "enable_peft_hotswap": "adapters are made for unsharded weights. Merge them into the stock model before it is "
    "sharded",
    "dequantize": "a quantised model cannot be sharded. Dequantise the stock model before it is sharded",
    "push_to_hub": "every rank would push its own shard. Use NanotronTrainer.push_to_hub(), or save_pretrained on all "
    "ranks and upload the directory from one",
    "save_distributed_checkpoint": "it expects the sharding of transformers. Use save_pretrained, which writes "
    "full weights",
    "gather_sharded_state_dict_for_save": "it expects the sharding of transformers. Use save_pretrained, which writes "
    "full weights",
    "set_use_kernels": "kernels would replace the forwards of sharded modules. Use the kernel options of "
    "NanotronTrainingArguments",
}


def _refusing(name: str, reason: str) -> Callable[..., Any]:
    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(f"{type(self).__name__}.{name} is not supported on a sharded model: {reason}.")

    refuse.__name__ = name
    refuse.__doc__ = f"Refused: {reason}."
    return refuse


# A base class whose methods are those of the table above.
Refusals: Any = type("Refusals", (), {name: _refusing(name, reason) for name, reason in REFUSED.items()})


class WholeModel(Refusals, ModelParts):
    """The methods of a cut model that speak of the whole one, or take whole tensors."""

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Parameters of the whole model, as the stock model counts them; not of this rank.

        A weight of another pipeline stage counts as frozen if it was when the model was cut, or when a trainer took it.
        """
        skipped = set(self.cut.embeddings) if exclude_embeddings else set()
        if only_trainable:
            skipped |= self.frozen_now()
        return sum(prod(shape) for name, shape in self.weight_shapes.items() if name not in skipped)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the weights that this rank holds, and of its buffers; not of the whole model."""
        held: list[torch.Tensor] = [local_part(parameter) for parameter in self.parameters()]
        return sum(x.numel() * x.element_size() for x in (*held, *(self.buffers() if return_buffers else ())))

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """The embeddings, if the whole vocabulary has this size already.

        Raises:
            ValueError: for any other size.
        """
        embedding = cast(nn.Embedding, self.get_input_embeddings())
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embedding
        have = self.vocabulary.inputs
        if pad_to_multiple_of is not None and not isinstance(pad_to_multiple_of, int):
            raise ValueError(f"pad_to_multiple_of={pad_to_multiple_of!r} is not an integer.")
        want, multiple = have if new_num_tokens is None else int(new_num_tokens), pad_to_multiple_of or 1
        want = -(-want // multiple) * multiple
        if want == have:
            return embedding
        raise ValueError(
            f"resize_token_embeddings to {want} tokens: the model is sharded, with a vocabulary of {have}. Resize the "
            "stock model before it is sharded. (`weight.shape[0]` is the size of this rank's shard; the size of the "
            "vocabulary is `model.config.get_text_config().vocab_size`.)"
        )

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Nothing for the embeddings that it has. Raises ValueError for others."""
        _refuse_other(value, self.get_input_embeddings(), "set_input_embeddings")

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Nothing for the head that it has. Raises ValueError for another."""
        _refuse_other(new_embeddings, self.get_output_embeddings(), "set_output_embeddings")

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, if the weights that the config ties were tied when the model was cut.

        Raises:
            ValueError: if its config has changed since.
        """
        now, then = self.config.get_text_config().tie_word_embeddings, self.cut.sizes["tie_word_embeddings"]
        if bool(now) != bool(then):
            raise ValueError(
                f"tie_weights with config.tie_word_embeddings={now}: the model was sharded with {then}. {BEFORE}."
            )

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As in any model. A trainer keeps an attention that was named."""
        super().set_attn_implementation(*args, **kwargs)
        self.names_attention = True

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in any module: the tensors of this rank, its parts of those that are cut. `load_state_dict` takes them.

        `save_pretrained` writes the whole model. New weights that are still on their way are waited for.
        """
        if self.weights is not None:
            self.weights.wait()
        if self.mesh.tp_size * self.mesh.pp_size > 1:
            logger.warning_once(
                "state_dict() of a parallel model holds only the shards of this rank, for this layout; use "
                "save_pretrained (on all ranks) for the full model."
            )
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take the weights of a whole stock model, or what `state_dict()` of this rank has returned.

        All ranks call it with the same tensors; each keeps its parts of whole ones. A trainer that owns the weights
        trains these on.

        Raises:
            ValueError: naming the tensor whose shape is neither that of the whole weight nor of this rank's part; with
                `strict`, those that are missing or unknown; with `assign`.
        """
        if assign:
            raise ValueError(
                "load_state_dict(assign=True) is not supported: weights are copied into existing memory; omit `assign`."
            )
        held, tied = _held(self), self.hub_layout.tied
        known = {**self.hub_shapes, **{name: self.hub_shapes[source] for name, source in tied.items()}}
        for name, value in state_dict.items():
            own = tuple(held[name].shape) if name in held else None
            if name in known and tuple(value.shape) not in (known[name], own):
                raise ValueError(
                    f"load_state_dict: {name} has shape {tuple(value.shape)}, neither that of the full weight, "
                    f"{known[name]}, nor that of this rank's shard."
                )
        # Anything but this rank's own tensors is taken for the whole model, so that all ranks say the same of it.
        expected = [name for name in (held if state_dict.keys() == held.keys() else known) if name in known]
        missing = [name for name in expected if name not in state_dict]
        unexpected = [name for name in state_dict if name not in known and name not in held]
        if strict and (missing or unexpected):
            raise ValueError(
                f"load_state_dict: missing {missing[:3]} ({len(missing)} tensors), unknown {unexpected[:3]} "
                f"({len(unexpected)}). Use strict=False to load the others."
            )
        for name in held:
            names = [name, *(other for other, source in tied.items() if source == name)]
            given = next((state_dict[n] for n in reversed(names) if n in state_dict), None)
            if given is None:
                given = state_dict.get(tied.get(name, name))
            if given is not None:
                _load(self, name, held[name], given)
        return _IncompatibleKeys(missing, unexpected)


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _refuse_other(given: nn.Module | None, own: nn.Module | None, method: str) -> None:
    if given is not own:
        raise ValueError(f"{method}: an unsharded module cannot replace a sharded one. {BEFORE}.")


def _held(model: ModelParts) -> dict[str, torch.Tensor]:
    """Name -> parameter or persistent buffer of this rank; a tied one has each of its names."""
    names = PreTrainedModel.state_dict(model, keep_vars=True)
    return cast(dict[str, torch.Tensor], dict(names))


@torch.no_grad()
def _load(model: ModelParts, name: str, target: torch.Tensor, value: torch.Tensor) -> None:
    """Write a whole tensor, or this rank's part of it, into a parameter or buffer."""
    if not isinstance(target, nn.Parameter) or isinstance(value, DTensor):
        target.copy_(value)
        return
    own = parameter_name(model, name, target)
    spec = model.shard_specs[own]
    value = spec.slice(value) if tuple(value.shape) == spec.global_shape else value
    model.write_parameter(own, value.to(target.device))


def parameter_name(model: ModelParts, name: str, parameter: nn.Parameter) -> str:
    """The key of `shard_specs` for a parameter that may be listed under the name it is tied to."""
    if name in model.shard_specs:
        return name
    return next(other for other in model.shard_specs if model.get_parameter(other) is parameter)

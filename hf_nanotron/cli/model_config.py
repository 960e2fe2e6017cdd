"""The section `model` of a configuration: a config for fresh weights, or other values for that of existing ones."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .errors import SettingsError, explained
from .hints import refuse_unknown
from .settings import SECTIONS

# How a config class reads a field that it does not declare, and how a model reads one that its config may lack.
_CONFIG_READS = re.compile(r"""kwargs\.(?:pop|get)\(\s*"(\w+)"|"(\w+)" in kwargs""")
_MODEL_READS = re.compile(r"""getattr\(\s*(?:self\.)?config,\s*"(\w+)\"""")


def make_config(fields: dict[str, Any], tokenizer: Any) -> PreTrainedConfig:
    """A config of `model_type` with these fields; the size of the vocabulary and special tokens are the tokenizer's.

    Unknown types and fields are refused: transformers accepts any field and ignores those it does not know.
    """
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError("model.config needs model_type, such as llama.")
    if not isinstance(model_type, str):
        raise ValueError(f"model.config.model_type={model_type!r} must be text, such as llama.")
    refuse_unknown("model.config.model_type=", [model_type], list(CONFIG_MAPPING.keys()))
    refuse_unknown("model.config.", fields, known_fields(AutoConfig.for_model(model_type)), SECTIONS)
    if tokenizer is not None:
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        fields = {"vocab_size": len(tokenizer), **special, **fields}
        if isinstance(fields["vocab_size"], int) and fields["vocab_size"] < len(tokenizer):
            raise ValueError(
                f"model.config.vocab_size={fields['vocab_size']} is smaller than the tokenizer's {len(tokenizer)}."
            )
    return _checked("model.config", fields, {"model_type": model_type, **fields})


def changed_config(name: str, fields: Mapping[str, Any], **source: Any) -> PreTrainedConfig:
    """The config of a folder or a Hub id with other values for some `fields`.

    `rope_theta` is one of the `rope_parameters`, and changes that one alone. `source`: where on the Hub, such as
    `revision`.
    """
    config = AutoConfig.from_pretrained(name, **source)
    refuse_unknown("model.config_overrides.", fields, known_fields(config), SECTIONS)
    values = {**config.to_dict(), **fields}
    if "rope_theta" in fields and isinstance(rope := values.get("rope_parameters"), dict):
        if any(isinstance(value, dict) for value in rope.values()):
            raise ValueError(
                f"model.config_overrides.rope_theta: the layers of {name!r} have several; give rope_parameters instead."
            )
        values["rope_parameters"] = {**rope, "rope_theta": values.pop("rope_theta")}
    return _checked("model.config_overrides", dict(fields), values)


def known_fields(config: PreTrainedConfig) -> list[str]:
    """Fields that take effect in a config: declared ones, older spellings, and what the model reads if it is there."""
    known = {*config.to_dict(), *config.attribute_map}
    if "rope_parameters" in known:
        known |= {"rope_theta", "rope_scaling"}  # how configs before transformers 5 spell them
    module = inspect.getmodule(type(config))
    if module is not None:
        known |= {name for found in _CONFIG_READS.findall(inspect.getsource(module)) for name in found if name}
        try:
            model = importlib.import_module(module.__name__.replace("configuration_", "modeling_"))
        except ImportError:  # a type whose model is that of another
            return sorted(known)
        known |= {name for name in _MODEL_READS.findall(inspect.getsource(model)) if not name.startswith("_")}
    return sorted(known)


def _checked(section: str, fields: Mapping[str, Any], values: dict[str, Any]) -> PreTrainedConfig:
    """The config of these `values`, of which the user gave `fields` in `section`.

    Raises:
        ValueError: for a value that the config class does not take, or that has no effect beside the others.
    """
    default = AutoConfig.for_model(values["model_type"])
    for name, value in values.items():  # transformers refuses 0 where it declares 0.0
        if type(value) is int and type(getattr(default, name, None)) is float:
            values[name] = float(value)
    try:
        with explained(section):
            config = AutoConfig.for_model(**values)
    except SettingsError as error:
        if isinstance(error.__cause__, StrictDataclassError):
            raise ValueError(f"{section}: {error.__cause__}") from error
        raise
    heads, shared = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise ValueError(
            f"{section}.num_key_value_heads={shared} does not divide {section}.num_attention_heads={heads}."
        )
    if fields.get("router_aux_loss_coef") and getattr(config, "output_router_logits", True) is False:
        raise ValueError(
            f"{section}.router_aux_loss_coef={fields['router_aux_loss_coef']} has no effect without "
            f"{section}.output_router_logits: true, which computes the load-balancing loss."
        )
    return config

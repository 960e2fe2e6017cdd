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

# Types of rope_parameters that know how long the rows were before. Transformers would take the new length.
_FROM_SHORT = ("yarn", "longrope", "llama3")


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

    `rope_theta` is one of the `rope_parameters`, and changes that one alone. Other `rope_parameters` (`rope_scaling`
    before transformers 5) keep it, and scale from the positions of the stored config. `source`: where on the Hub, such
    as `revision`.
    """
    config = AutoConfig.from_pretrained(name, **source)
    refuse_unknown("model.config_overrides.", fields, known_fields(config), SECTIONS)
    stored = config.to_dict()
    values = {**stored, **fields}
    if isinstance(rope := stored.get("rope_parameters"), dict):
        theta = {key: values.pop(key) for key in ("rope_theta",) if key in fields}
        given = [values.pop(key) for key in ("rope_scaling", "rope_parameters") if key in fields]
        if theta and not _is_flat(rope):
            raise ValueError(
                f"model.config_overrides.rope_theta: the layers of {name!r} have several; give rope_parameters instead."
            )
        values["rope_parameters"] = _changed_rope(stored, given[0]) if given else rope
        if theta and isinstance(values["rope_parameters"], dict):
            values["rope_parameters"] = {**values["rope_parameters"], **theta}
    return _checked("model.config_overrides", dict(fields), values)


def _changed_rope(stored: Mapping[str, Any], given: Any) -> Any:
    """The `rope_parameters` that are `given` (None: without scaling), with what they leave of a `stored` config's."""
    rope = stored["rope_parameters"]
    given = {"rope_type": "default"} if given is None else given
    if not isinstance(given, dict) or not _is_flat(rope) or not _is_flat(given):
        return given
    kept = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if given.get("rope_type", given.get("type")) in _FROM_SHORT:
        before = rope.get("original_max_position_embeddings", stored.get("max_position_embeddings"))
        kept["original_max_position_embeddings"] = before
    return {**kept, **given}


def _is_flat(rope: Mapping[str, Any]) -> bool:
    """Whether these `rope_parameters` are those of all layers, not a mapping for each type of layer."""
    return not any(isinstance(value, dict) for value in rope.values())


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
    theta = fields.get("rope_theta")
    if "rope_theta" in fields and (isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0):
        raise ValueError(f"{section}.rope_theta={theta!r} must be a number above 0.")
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

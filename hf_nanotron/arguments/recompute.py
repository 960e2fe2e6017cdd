"""What the training arguments say about recomputing activations, checked before any model exists."""

from __future__ import annotations

from typing import Any, Protocol

from .rules import as_mapping

POLICIES = ("full", "selective", "all_but_attention")


class RecomputationArguments(Protocol):
    """The training arguments that are read here."""

    activation_checkpointing: bool | None
    activation_checkpointing_policy: str
    activation_checkpointing_layers: Any
    activation_checkpointing_kwargs: Any
    gradient_checkpointing: bool | None
    gradient_checkpointing_kwargs: Any
    activation_offload: float


def check_recomputation(args: RecomputationArguments) -> None:
    policy, layers = args.activation_checkpointing_policy, layer_numbers(args.activation_checkpointing_layers)
    options = as_mapping(args.activation_checkpointing_kwargs or args.gradient_checkpointing_kwargs or {})
    if policy not in POLICIES:
        raise ValueError(f"activation_checkpointing_policy={policy!r} is not one of {', '.join(map(repr, POLICIES))}.")
    if not recomputes(args):
        for name, value, default in (("policy", policy, "full"), ("layers", layers, None)):
            if value != default:
                raise ValueError(
                    f"activation_checkpointing_{name}={value!r} has no effect without "
                    f"activation_checkpointing=True; set it, or omit activation_checkpointing_{name}."
                )
    if not 0 <= args.activation_offload <= 1:
        raise ValueError(
            f"activation_offload={args.activation_offload!r} must be a fraction of the layers that recompute: from 0 "
            "(none) to 1 (all)."
        )
    if args.activation_offload and not recomputes(args):
        raise ValueError(
            f"activation_offload={args.activation_offload!r} has no effect without activation_checkpointing=True: it "
            "offloads what layers that recompute keep."
        )
    if args.activation_offload and options.get("debug"):
        raise ValueError(
            f"activation_offload={args.activation_offload!r} with debug=True of activation_checkpointing_kwargs: its "
            "hooks would not see what torch records; set only one of them."
        )
    if layers is not None and (not layers or min(layers) < 0):
        raise ValueError(
            f"activation_checkpointing_layers={layers!r} must be numbers of decoder layers, counted from 0 over the "
            "whole model; omit it for all layers, or set activation_checkpointing=False for none."
        )
    if layers is not None and "every_n_layers" in options:
        raise ValueError(
            f"activation_checkpointing_layers={layers!r} and every_n_layers={options['every_n_layers']!r} of "
            "activation_checkpointing_kwargs both select layers; set only one of them."
        )
    if policy != "full":
        for key in ("context_fn", "debug"):
            if options.get(key):
                raise ValueError(
                    f"activation_checkpointing_kwargs sets {key!r} to {options[key]!r}, but "
                    f"activation_checkpointing_policy={policy!r} sets its own context_fn; use "
                    "activation_checkpointing_policy='full'."
                )


def recomputes(args: RecomputationArguments) -> bool:
    """Whether activations are recomputed, by the new or the deprecated name of the switch."""
    new, old = args.activation_checkpointing, args.gradient_checkpointing
    return bool(old if new is None else new)


def layer_numbers(value: Any) -> list[int] | None:
    """`activation_checkpointing_layers` from a list, or from text like "0,2", "0 2" or "[0, 2]"."""
    if value is None:
        return None
    try:
        text = value if isinstance(value, str) else ",".join(map(str, value))
        return sorted({int(number) for number in text.strip("[]() ").replace(",", " ").split()})
    except (TypeError, ValueError):
        raise ValueError(
            f"activation_checkpointing_layers={value!r} must be a list of integers, or text like '0,2,4': numbers "
            "of decoder layers of the whole model."
        ) from None

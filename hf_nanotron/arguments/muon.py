"""The arguments of `optim="muon"`: which belong together."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from ..ops.newton_schulz import SCALES

MUON = "muon"


def check_muon(args: Any) -> None:
    """Refuse `muon_*` arguments that are out of range, or that nothing would read.

    Raises:
        ValueError: naming the value, the reason, and what works.
    """
    optim = str(getattr(args.optim, "value", args.optim))
    own = {entry.name: entry.default for entry in fields(args) if entry.name.startswith("muon_")}
    if optim != MUON:
        if changed := [name for name, default in own.items() if getattr(args, name) != default]:
            name = changed[0]
            raise ValueError(
                f"{name}={getattr(args, name)!r} with optim={optim!r}: it is read by Muon alone; use optim='muon', or "
                f"leave {name} out."
            )
        return
    if args.muon_scale != "match_rms_adamw" and args.muon_learning_rate is None:
        raise ValueError(
            f"muon_scale={args.muon_scale!r} without muon_learning_rate: its updates are not as large as AdamW's, so "
            f"learning_rate={args.learning_rate:g} does not serve both; set muon_learning_rate (0.02 is common), or "
            "use muon_scale='match_rms_adamw'."
        )


def without_muon(args: TrainingArguments) -> str | None:
    """Hide `optim="muon"`, which transformers does not know, from it; what to set again afterwards."""
    if args.optim != MUON:
        return None
    args.optim = "adamw_torch"
    return MUON


MUON_CHOICES = {"muon_scale": tuple(SCALES), "muon_dtype": ("bfloat16", "float32")}

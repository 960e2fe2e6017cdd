"""Training arguments about FP8: which belong together."""

from __future__ import annotations

from typing import Any

from ..ops.fp8 import RECIPES


def check_fp8(args: Any) -> None:
    """
    Raises:
        ValueError: for an unknown recipe, one that ZeRO-3 or the dtype rules out, or layers that no recipe skips.
    """
    if args.fp8 not in (None, *RECIPES):
        raise ValueError(f"fp8={args.fp8!r} is not one of {', '.join(map(repr, RECIPES))}, None.")
    if args.fp8 is not None and not args.bf16:
        raise ValueError(f"fp8={args.fp8!r} needs bf16=True: everything outside FP8 is computed in bfloat16.")
    if args.fp8 is not None and args.zero_stage == 3:
        raise ValueError(
            f"fp8={args.fp8!r} with zero_stage=3: weights are gathered twice per micro-batch with ZeRO-3 and "
            "would be quantized each time; use zero_stage=2."
        )
    if args.fp8_skip_layers is not None:
        if args.fp8 is None:
            raise ValueError("fp8_skip_layers needs fp8, such as fp8='tensorwise'; without it all layers are in bf16.")
        if not isinstance(args.fp8_skip_layers, list) or any(type(i) is not int for i in args.fp8_skip_layers):
            raise ValueError(f"fp8_skip_layers={args.fp8_skip_layers!r} must be a list of integers, such as [0, -1].")

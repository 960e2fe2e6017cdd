"""What `mlp_chunk_tokens` goes with."""

from __future__ import annotations

from typing import Any


def check_mlp_chunks(args: Any) -> None:
    """
    Raises:
        ValueError: with FP8, overlapped communication or split backwards.
    """
    refused = {
        f"fp8={args.fp8!r}": (args.fp8 is not None, "FP8 products take all tokens at once", "fp8=None"),
        "tp_overlap=True": (
            args.tp_overlap,
            "products that overlap with communication have blocks of their own",
            "tp_overlap=False",
        ),
        "pp_schedule='zb'": (
            args.pp_schedule == "zb",
            "weight gradients that are computed later keep the activations of all blocks",
            "pp_schedule='1f1b'",
        ),
    }
    for name, (applies, reason, instead) in refused.items():
        if args.mlp_chunk_tokens is not None and applies:
            raise ValueError(f"mlp_chunk_tokens={args.mlp_chunk_tokens} with {name}: {reason}; use {instead}.")

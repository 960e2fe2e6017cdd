"""Training arguments about the optimizer: which belong together."""

from __future__ import annotations

import re
from typing import Any

from .muon import MUON


def check_optimizer(args: Any) -> None:
    """
    Raises:
        ValueError: for a state that the optimizer cannot have, or names of weights that mean none.
    """
    optim = str(getattr(args.optim, "value", args.optim))
    if args.optim_state_dtype == "bfloat16" and not optim.startswith(("adamw", MUON)):
        raise ValueError(
            f"optim_state_dtype='bfloat16' with optim={optim!r}: only AdamW's moments can be bfloat16; use "
            "optim='adamw_torch_fused', or optim_state_dtype='float32'."
        )
    if not 0 <= args.optim_offload <= 1:
        raise ValueError(
            f"optim_offload={args.optim_offload!r} must be a fraction of the optimizer's state: from 0 (none) to 1 "
            "(all)."
        )
    if args.optim_offload and optim == MUON:
        raise ValueError(
            f"optim_offload={args.optim_offload} with optim='muon': a direction needs whole matrices, and the "
            "state is on the device in parts; use optim_offload=0, or optim='adamw_torch_fused'."
        )
    if args.optim_offload and args.ema_decay is not None:
        raise ValueError(
            f"optim_offload={args.optim_offload} with ema_decay={args.ema_decay}: the moving average is on the "
            "device and would need all masters there; use one of them."
        )
    for pattern in args.no_weight_decay or ():
        if not pattern:
            raise ValueError("no_weight_decay has an empty name, which is a part of every weight's; leave it out.")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"no_weight_decay: {pattern!r} is no regular expression: {error}.") from error

"""Trainer's states of random number generators, `rng_state*.pth`: whether they could be restored."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import torch
from transformers.trainer_pt_utils import safe_globals

from ..files.schema import EARLIER

LARGEST = 1 << 26  # bytes; the states of eight GPUs take 40 KiB


def check_generators(path: Path) -> None:
    """Restore the states of the host into generators of their own."""
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{path} has {size} bytes, more than states of random number generators take; {EARLIER}.")
    try:
        with safe_globals():
            found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or not isinstance(found["python"], tuple):  # a tensor is taken with a warning
            raise TypeError("there is no tuple, as Python's generator has")
        random.Random().setstate(found["python"])
        np.random.RandomState().set_state(found["numpy"])
        torch.Generator().set_state(found["cpu"])
    except OSError:
        raise
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
    ) as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        raise ValueError(f"{path} does not hold the states of random number generators ({why}); {EARLIER}.") from error

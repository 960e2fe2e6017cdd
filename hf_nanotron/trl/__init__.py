"""Supervised fine-tuning by TRL on any tp x cp x pp x dp: `NanotronSFTTrainer` and `NanotronSFTConfig`."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from packaging.version import Version

if TYPE_CHECKING:
    from .config import NanotronSFTConfig
    from .sft_trainer import NanotronSFTTrainer

__all__ = ["NanotronSFTConfig", "NanotronSFTTrainer"]

OLDEST, TOO_NEW = "1.16", "1.17"  # as in pyproject.toml
_HOME = {"NanotronSFTConfig": ".config", "NanotronSFTTrainer": ".sft_trainer"}


def check_trl() -> None:
    """Refuse a missing or untested TRL.

    Raises:
        ImportError: with what to install.
    """
    instead = f"install trl>={OLDEST},<{TOO_NEW}: pip install 'hf-nanotron[trl]'"
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise ImportError(f"hf_nanotron.trl needs TRL, which is not installed; {instead}.") from None
    if not Version(OLDEST) <= Version(found) < Version(TOO_NEW):
        raise ImportError(
            f"hf_nanotron.trl overrides methods of TRL's SFTTrainer and was tested with others than {found}; {instead}."
        )


def __getattr__(name: str) -> Any:
    """Import on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_trl()
    return getattr(importlib.import_module(_HOME[name], __name__), name)

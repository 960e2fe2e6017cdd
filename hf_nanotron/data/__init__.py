"""What is trained on: tokenized corpora and mixtures; which rank reads which samples; where a run is in them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inspection import inspect_tokens
    from .streaming.stream_mixture import StreamMixture
    from .streaming.token_stream import TokenStream
    from .tokenize.chat_dataset import ChatDataset
    from .tokenize.corpus import tokenize_corpus
    from .tokens.mixture import Mixture
    from .tokens.stage import Stage
    from .tokens.stages import Stages
    from .tokens.token_dataset import TokenDataset
    from .tokens.token_file import TokenFile

__all__ = [
    "ChatDataset",
    "Mixture",
    "Stage",
    "Stages",
    "StreamMixture",
    "TokenDataset",
    "TokenFile",
    "TokenStream",
    "inspect_tokens",
    "tokenize_corpus",
]

_HOME = {
    "ChatDataset": ".tokenize.chat_dataset",
    "Mixture": ".tokens.mixture",
    "Stage": ".tokens.stage",
    "Stages": ".tokens.stages",
    "StreamMixture": ".streaming.stream_mixture",
    "TokenDataset": ".tokens.token_dataset",
    "TokenFile": ".tokens.token_file",
    "TokenStream": ".streaming.token_stream",
    "inspect_tokens": ".inspection",
    "tokenize_corpus": ".tokenize.corpus",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the modules of this package are used without these, too."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)

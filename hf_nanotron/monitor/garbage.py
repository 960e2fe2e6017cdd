"""Keep Python's garbage collector from walking through a whole model while it trains."""

from __future__ import annotations

import gc
from typing import Any

from transformers import TrainerCallback


class FreezeGarbage(TrainerCallback):
    """After the first step, exclude existing objects (model, graphs, optimizer) from garbage collection.

    A collection of millions of objects would stall one rank for tenths of a second, and with it all others. The
    training loop undoes it (`gc.unfreeze`), also after a failure: frozen objects are never freed.
    """

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._froze = False

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if not self._froze:
            gc.collect()
            gc.freeze()
            self._froze = True

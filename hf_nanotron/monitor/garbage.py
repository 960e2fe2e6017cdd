"""Keep Python's garbage collector from walking through a whole model while it trains."""

from __future__ import annotations

import gc
from typing import Any

from transformers import TrainerCallback


class FreezeGarbage(TrainerCallback):
    """After the first step, exclude existing objects (model, graphs, optimizer) from garbage collection.

    A collection of millions of objects would stall one rank for tenths of a second, and with it all others. Whoever
    trains takes it back (`release`), also after a failure: frozen objects are never freed.

    `gc.unfreeze` does not know who froze what. If something was frozen before the first step (a user called
    `gc.freeze`), or the user has disabled the collector, nothing is added and nothing is taken back.
    """

    def __init__(self) -> None:
        self._looked = self._froze = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._looked = False

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if not self._looked:
            self._looked = True
            if gc.isenabled() and gc.get_freeze_count() == 0:
                gc.collect()
                gc.freeze()
                self._froze = True

    def release(self) -> None:
        if self._froze:
            gc.unfreeze()
            self._froze = False

"""Keep Python's garbage collector from walking through a whole model while it trains."""

from __future__ import annotations

import gc
from typing import Any

from transformers import TrainerCallback


class FreezeGarbage(TrainerCallback):
    """After the first step, what exists (model, graphs, optimizer) is taken out of what the collector looks at.

    A collection of millions of objects would hold one rank up for tenths of a second, and all others with it. Whoever
    trains takes it back (`gc.unfreeze`), also after a failure: what is frozen is never freed.
    """

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._froze = False

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if not self._froze:
            gc.collect()
            gc.freeze()
            self._froze = True

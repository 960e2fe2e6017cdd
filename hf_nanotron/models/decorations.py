"""What training has put on a model, and how to take it off again.

Whoever decorates a model registers how to undo it. So `copy_model` makes a plain copy without knowing any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Decorations:
    """Name -> how to undo it, called with the model, in the order in which they were put on.

    A deep copy belongs to the copied model: what is bound to objects inside the model is bound to their copies there.
    """

    def __init__(self) -> None:
        self._undo: dict[str, Callable[[Any], None]] = {}

    def add(self, name: str, undo: Callable[[Any], None]) -> None:
        self._undo.pop(name, None)
        self._undo[name] = undo

    def remove(self, name: str, model: Any) -> None:
        """Undo one of them on `model`, if it is there."""
        if (undo := self._undo.pop(name, None)) is not None:
            undo(model)

    def remove_all(self, model: Any) -> None:
        """Undo all of them on `model`, the last first."""
        for name in reversed(list(self._undo)):
            self.remove(name, model)

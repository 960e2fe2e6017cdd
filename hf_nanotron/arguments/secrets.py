"""What leaves `NanotronTrainingArguments` holds no secret: pickles (`training_args.bin`), `to_dict`, `str` and `repr`.

The object in memory keeps its tokens and passwords, and so do copies of it.
"""

from __future__ import annotations

import copy
import os
from dataclasses import asdict
from multiprocessing.context import get_spawning_popen
from typing import Any

from transformers import TrainingArguments

from ..redaction import redacted, secrets_of


class SecretlessArguments(TrainingArguments):
    """`TrainingArguments` that are written without secrets, wherever a class derived from them is pickled or printed.

    `hf_nanotron.redaction` detects secrets: by the name of a field or of a key in it, in URLs, by their shape, and as
    the value of another secret field or of a variable such as HF_TOKEN.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in cls.__dict__:  # or `@dataclass` would write one that prints every field
            cls.__repr__ = cls.__repr__  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        """The state for a pickle: secret fields are None, texts hide what is secret in them.

        A process that is being spawned gets all, through a pipe: it may be the one that pushes to the Hub.
        """
        state = dict(self.__dict__)
        if get_spawning_popen() is not None:
            return state
        known = self._secrets()
        return {name: redacted(name, value, None, known) for name, value in state.items()}

    def __copy__(self) -> Any:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = memo[id(self)] = copy.copy(self)
        for name, value in self.__dict__.items():
            new.__dict__[name] = copy.deepcopy(value, memo)
        return new

    def to_dict(self) -> dict[str, Any]:
        """As `TrainingArguments.to_dict`, which hides fields called `..._token`, without any other secret."""
        known = self._secrets()
        return {
            name: value if name.endswith("_token") else redacted(name, value, known=known)
            for name, value in super().to_dict().items()
        }

    def __str__(self) -> str:
        known = self._secrets()
        lines = [
            f"{name}={f'<{name.upper()}>' if name.endswith('_token') else redacted(name, value, known=known)},\n"
            for name, value in sorted(asdict(self).items())
        ]
        return f"{type(self).__name__}(\n{''.join(lines)})"

    def __repr__(self) -> str:
        return str(self)

    def _secrets(self) -> list[str]:
        return [*secrets_of(self.__dict__), *secrets_of(os.environ)]

"""Where the thread that trains stands: the phase of the step, the function, and whether it waits for other ranks there.

It is read off the thread's stack from outside, so that it costs the thread nothing, and works while it hangs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType

OWN = "hf_nanotron"
LIBRARIES = (OWN, "accelerate", "transformers", "torch")
# In these, `Work.wait` is for a message of another rank. Collectives are in torch's own record.
MESSAGES = (f"{OWN}.parallel.pipeline.executor", f"{OWN}.parallel.tp.transport")
# Module and function: what a rank does in it. The innermost counts.
Phases = Mapping[tuple[str, str], str]


@dataclass(frozen=True)
class Whereabouts:
    """
    Args:
        phase: of the table of phases; empty outside.
        place: the innermost function, and the file and line in this package or the user's code that led there.
        waits: whether the thread is in a collective or a message of torch.
        stamp: stays the same as long as the thread does not move.
    """

    phase: str
    place: str
    waits: bool
    stamp: int


def whereabouts(thread: int, phases: Phases) -> Whereabouts:
    """Of the thread with this identifier."""
    inner, place, phase, waits = "", "", "", False
    position = []
    for frame in _outwards(sys._current_frames().get(thread)):
        module, code = str(frame.f_globals.get("__name__")), frame.f_code
        position.append((code.co_filename, code.co_name, frame.f_lasti))
        if not inner:
            inner = code.co_name
            waits = module in MESSAGES
        waits |= not place and module.startswith("torch.distributed")
        root = module.partition(".")[0]
        if not place and (root == OWN or root not in LIBRARIES and root not in sys.stdlib_module_names):
            at = f"{code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
            place = f"{inner} ({at})" if inner == code.co_name else f"{inner}, called by {code.co_name} ({at})"
        phase = phase or phases.get((module, code.co_name), "")
    return Whereabouts(phase, place or inner, waits, hash(tuple(position)))


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back

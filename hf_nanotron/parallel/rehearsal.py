"""A job of which one rank alone runs, to find out what it does and needs. The others are imagined.

torch's fake process group hands back what a rank has sent itself. Where a rank would go by what others say, it asks
here whether there are others at all.
"""

from __future__ import annotations

import torch.distributed as dist


def is_rehearsal() -> bool:
    """Whether the other ranks of this job are imagined: its default process group is torch's fake one."""
    return dist.is_initialized() and dist.get_backend() in ("fake", "cpu:fake,meta:fake")

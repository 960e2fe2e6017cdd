"""Where this process stands on its node, as its launcher says, and which host that is.

`torchrun --virtual-local-rank` shows each process its own GPU as the only one, and tells all that their `LOCAL_RANK` is
0. Then the number on the node follows from `RANK`, which torchrun deals node by node.
"""

from __future__ import annotations

import hashlib
import os
import socket

from accelerate import PartialState


def ranks_of_node() -> int:
    """Processes of the job on this node; 1 if no launcher says."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def rank_on_node() -> int:
    """The number of this process among them, from 0."""
    local: int = PartialState().local_process_index
    sees_one = os.environ.get("CUDA_VISIBLE_DEVICES", "").isdecimal()
    return int(os.environ.get("RANK", "0")) % ranks_of_node() if local == 0 and sees_one else local


def host_number() -> int:
    """The `name_number` of this host's name."""
    return name_number(socket.gethostname())


def name_number(name: str) -> int:
    """A number of 48 bits for a name, which tensors of float64 and int64 carry to other ranks."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")

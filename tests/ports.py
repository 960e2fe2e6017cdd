"""Ports that stay ours: a port that was free once may be another process's when it is used."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def reserved_ports(count: int = 1) -> Iterator[list[int]]:
    """Ports of this host that the system gives to nobody meanwhile, except who asks for them by number.

    They are bound, but nobody listens at them: a server that sets SO_REUSEADDR can, also a second time.
    """
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            holder = stack.enter_context(socket.socket())
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", 0))
            ports.append(int(holder.getsockname()[1]))
        yield ports


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    with reserved_ports() as (port,):
        yield port

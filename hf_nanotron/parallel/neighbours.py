"""A connection to the next rank and one from the rank before, on which nothing is said but goodbye.

A process that ends has its connections closed by its host, also one that is killed; one that stands in a debugger or a
library has not. So the neighbours of a rank know at once that it is gone, and only then. A host that is gone itself
answers no longer, which takes a minute to tell from a network that is interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

CONNECT_SECONDS = 1.0  # for each address of a neighbour
ATTEMPTS = 3
PROBES = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 3}  # of the host, on a silent connection
LONGEST = 2000  # bytes of a goodbye


@dataclass(frozen=True)
class Lost:
    """A rank that is gone.

    Args:
        reason: what it said before, such as `"ValueError: ..."`; empty if it said nothing.
        is_sure: whether its process has ended; else it cannot be reached.
    """

    rank: int
    host: str
    reason: str
    is_sure: bool = True

    def __str__(self) -> str:
        where = f"rank {self.rank} (on {self.host})"
        if not self.is_sure:
            return f"{where} cannot be reached any more: its host or the network is gone"
        return f"{where} has ended: {self.reason}" if self.reason else f"{where} has died without a word (killed?)"


@dataclass
class _Line:
    """One connection: `rank` is at the other end."""

    rank: int
    connection: socket.socket
    said: bytes = b""


@dataclass
class Neighbours:
    """Of this rank, in the order of ranks, of which the last is before the first.

    Args:
        store: of the job; each rank says there where it listens.
        one_host: whether all ranks are on this host.
    """

    store: Any
    rank: int
    world_size: int
    one_host: bool
    host: str = field(default_factory=socket.gethostname)
    _lines: list[_Line] = field(default_factory=list)
    _strangers: list[socket.socket] = field(default_factory=list)
    _attempts: int = 0

    def __post_init__(self) -> None:
        self._token = secrets.token_hex(16)
        self._listener = _listener(self.one_host)
        addresses = ["127.0.0.1"] if self.one_host else own_addresses()
        told = {"hosts": addresses, "port": self._listener.getsockname()[1], "token": self._token, "name": self.host}
        self.store.set(f"door/{self.rank}", json.dumps(told))
        if hasattr(os, "register_at_fork"):  # a worker that reads data must not keep them open for us
            mine = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _forget(mine))

    @property
    def before(self) -> int:
        return (self.rank - 1) % self.world_size

    @property
    def next(self) -> int:
        return (self.rank + 1) % self.world_size

    def wait(self, seconds: float, wake: socket.socket) -> Iterator[Lost]:
        """Listen for so long, or until a neighbour is gone or `wake` can be read."""
        try:
            self._greet_next()
        except ConnectionRefusedError:  # it has ended between two looks
            self._attempts = ATTEMPTS
            yield Lost(self.next, str(self._door(self.next)["name"]), "")
        with selectors.DefaultSelector() as selector:
            for each in (wake, self._listener, *self._strangers, *(line.connection for line in self._lines)):
                selector.register(each, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in selector.select(seconds)]
        if wake in ready:
            wake.recv(64)
        if self._listener in ready:
            self._accept()
        for connection in [stranger for stranger in self._strangers if stranger in ready]:
            self._take_in(connection)
        for line in [line for line in self._lines if line.connection in ready]:
            yield from self._hear(line)

    def _greet_next(self) -> None:
        """Connect to the next rank, once it listens."""
        if self._attempts >= ATTEMPTS or not self.store.check([f"door/{self.next}"]):
            return
        connection = self._connect(self.next)
        self._attempts = ATTEMPTS if connection is not None else self._attempts + 1
        if connection is not None:
            self._lines.append(_Line(self.next, connection))

    def _door(self, rank: int) -> dict[str, Any]:
        door: dict[str, Any] = json.loads(self.store.get(f"door/{rank}"))
        return door

    def _connect(self, rank: int) -> socket.socket | None:
        """A connection to a rank; None if it cannot be reached.

        Raises:
            ConnectionRefusedError: if its host says that nobody listens.
        """
        door, refused = self._door(rank), None
        for host in door["hosts"]:
            try:
                connection = socket.create_connection((host, door["port"]), CONNECT_SECONDS)
                connection.sendall(f"{self.rank} {door['token']}\n".encode())
            except ConnectionRefusedError as error:
                refused = error
            except OSError:
                continue
            else:
                return _probed(connection)
        if refused is not None:
            raise refused
        return None

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            self._strangers.append(connection)
            if len(self._strangers) > 8:  # whoever says nothing makes room
                self._strangers.pop(0).close()

    def _take_in(self, connection: socket.socket) -> None:
        """Only the rank before has the token."""
        self._strangers.remove(connection)
        with contextlib.suppress(OSError, ValueError):
            rank, _, token = connection.recv(100).strip().partition(b" ")
            if secrets.compare_digest(token, self._token.encode()) and int(rank) in (self.before, self.next):
                self._lines.append(_Line(int(rank), _probed(connection)))
                return
        connection.close()

    def _hear(self, line: _Line) -> Iterator[Lost]:
        try:
            said = line.connection.recv(LONGEST)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if said and len(line.said) < LONGEST:
            line.said += said
            return
        self._lines.remove(line)
        line.connection.close()
        name = str(self._door(line.rank)["name"])
        if line.said:
            with contextlib.suppress(ValueError):
                reason = str(json.loads(line.said)["failure"])
                if reason:
                    yield Lost(line.rank, name, reason)
                return  # else it has done what it had to do
        try:
            connection = self._connect(line.rank)
        except ConnectionRefusedError:
            yield Lost(line.rank, name, "")
            return
        if connection is None:
            yield Lost(line.rank, name, "", is_sure=False)
        else:
            self._lines.append(_Line(line.rank, connection))

    def close(self, failure: str) -> None:
        """Say goodbye. `failure`: what has ended the run of this rank; empty if nothing has."""
        self._listener.close()
        for line in self._lines:
            with contextlib.suppress(OSError):
                line.connection.sendall(json.dumps({"failure": failure[:500]}).encode())
        self._let_go()

    def _let_go(self) -> None:
        for connection in (self._listener, *self._strangers, *(line.connection for line in self._lines)):
            connection.close()
        self._lines.clear()
        self._strangers.clear()


def _forget(neighbours: weakref.ref[Neighbours]) -> None:
    found = neighbours()
    if found is not None:
        found._let_go()


def _probed(connection: socket.socket) -> socket.socket:
    """Have the host ask from time to time whether the other end is there."""
    connection.setblocking(False)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _listener(one_host: bool) -> socket.socket:
    if one_host:
        listener = socket.create_server(("127.0.0.1", 0), backlog=8)
    else:
        listener = socket.create_server(("", 0), backlog=8)
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):
                both = socket.create_server(("", 0), family=socket.AF_INET6, backlog=8, dualstack_ipv6=True)
                listener.close()
                listener = both
    listener.setblocking(False)
    return listener


def own_addresses() -> list[str]:
    """Of this host, the one that leads outside first."""
    found: list[str] = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.255.255.255", 9))  # sends nothing: it looks for a way
        found.append(str(probe.getsockname()[0]))
    with contextlib.suppress(OSError):
        found += [str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)]
    return list(dict.fromkeys(found)) or ["127.0.0.1"]

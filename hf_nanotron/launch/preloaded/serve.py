"""The fork server: imports modules once, then makes a copy of itself for each rank that a stand-in asks for.

It has one thread of Python, never touches a device, and ends when the launcher and all ranks have. Uses what Python
brings, and imports the modules by their names.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

REQUEST_SECONDS = 30.0  # a stand-in sends all at once
DEATH_SECONDS = 30.0  # of a rank that was killed: its driver may hold it
# What torchrun, a terminal or a scheduler sends to all processes of a job is for the ranks.
LEFT_TO_RANKS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Request:
    """What a stand-in asks for.

    Args:
        program: what `python` would be given: `["-u", "train.py", "--lr", "1"]`.
        ignored: signals.
        files: descriptors that become 0, 1 and 2.
    """

    program: list[str]
    folder: str
    cores: list[int]
    ignored: list[int]
    environment: dict[str, str]
    files: list[int]


def preload(modules: Sequence[str]) -> str | None:
    """Import them; why no rank can be a copy of what came of it, or None."""
    for name in modules:
        importlib.import_module(name)
        if (threads := threading.active_count()) > 1:
            return f"importing {name} starts {threads - 1} threads, which copies of a process do not have"
    # Those objects stay: collectors of ranks need not walk through them, nor copy their pages.
    gc.collect()
    gc.freeze()
    return None


class Server:
    """Listens for stand-ins until the launcher is gone, and watches over ranks until the last has ended.

    Args:
        launcher: the reading end of a pipe whose other end the launcher holds.
        folder: of the socket; deleted at the end.
    """

    def __init__(self, listener: socket.socket, launcher: int, folder: str) -> None:
        self.listener, self.launcher, self.folder = listener, launcher, folder
        self.ranks: dict[int, socket.socket] = {}  # by process
        self.killed: set[int] = set()  # of these, those whose stand-ins are gone
        self._selector = selectors.DefaultSelector()
        self._woken, wake = os.pipe()
        self._wake = wake
        for end in (self._woken, wake):
            os.set_blocking(end, False)
        for number in LEFT_TO_RANKS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for each in (listener, launcher, self._woken):
            self._selector.register(each, selectors.EVENT_READ)

    def serve(self) -> Request | None:
        """Returns in each copy, with what it is to run; here None, at the end."""
        listens = True
        while listens or self.ranks:
            # Ends of stand-ins first: torchrun starts new ranks when it has seen the end of those before.
            for key, _ in sorted(self._selector.select(), key=lambda each: each[0].fileobj is self.listener):
                if key.fileobj is self.listener:
                    self._wait_for_killed()
                    if (request := self._make_rank()) is not None:
                        return request
                elif key.fileobj == self.launcher:
                    self._selector.unregister(self.launcher)
                    self._selector.unregister(self.listener)
                    self.listener.close()
                    listens = False
                    shutil.rmtree(self.folder, ignore_errors=True)
                    break  # a stand-in that has not been heard starts its rank itself
                elif key.fileobj == self._woken:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._woken, 4096)
                    self._reap()
                else:
                    self._kill(key.data)
        return None

    def _make_rank(self) -> Request | None:
        connection, _ = self.listener.accept()
        request, process = None, -1
        try:
            request = _hear(connection)
            process = os.fork()
        except (OSError, ValueError):  # the stand-in is gone, or there is no room for a process: it is told by the end
            connection.close()
        if request is not None and process == 0:
            self._let_go(connection)
            _be_of(request, connection)
            return request
        for number in request.files if request is not None else ():
            os.close(number)
        if process < 0:
            return None
        self.ranks[process] = connection
        self._selector.register(connection, selectors.EVENT_READ, process)
        return None

    def _reap(self) -> None:
        """Tell stand-ins whose ranks have ended. Other processes, of preloaded modules, are theirs to wait for."""
        for process in list(self.ranks):
            ended, status = os.waitpid(process, os.WNOHANG)
            if not ended:
                continue
            connection = self.ranks.pop(process)
            self.killed.discard(process)
            with contextlib.suppress(KeyError):
                self._selector.unregister(connection)
            with contextlib.suppress(OSError):
                connection.sendall(struct.pack("!i", status))
            connection.close()

    def _kill(self, process: int) -> None:
        """Its stand-in was killed, with all that torchrun would have had in the rank's group."""
        if process in self.ranks:
            self._selector.unregister(self.ranks[process])
            self.killed.add(process)
            for kill in (os.killpg, os.kill):  # the rank may not have its group yet
                with contextlib.suppress(ProcessLookupError):
                    kill(process, signal.SIGKILL)

    def _wait_for_killed(self) -> None:
        """As torchrun waits for a process that it has killed: a new rank finds ports, locks and a GPU's memory free."""
        until = time.monotonic() + DEATH_SECONDS
        while self.killed and time.monotonic() < until:
            time.sleep(0.005)
            self._reap()
        self.killed.clear()

    def _let_go(self, connection: socket.socket) -> None:
        """In a copy: of all that is the server's."""
        signal.set_wakeup_fd(-1)
        self._selector.close()
        for each in self.ranks.values():
            if each is not connection:
                each.close()
        self.ranks.clear()
        self.listener.close()
        for number in (self.launcher, self._woken, self._wake):
            os.close(number)
        for number in (*LEFT_TO_RANKS, signal.SIGCHLD):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _hear(connection: socket.socket) -> Request:
    connection.settimeout(REQUEST_SECONDS)
    head, files, _, _ = socket.recv_fds(connection, 8, 3)
    try:
        while len(head) < 8:
            head += _some(connection, 8 - len(head))
        (length,) = struct.unpack("!Q", head)
        data = b""
        while len(data) < length:
            data += _some(connection, length - len(data))
        connection.settimeout(None)
        asked: dict[str, Any] = json.loads(data)
        if len(files) != 3:
            raise ValueError("no files")
        return Request(files=files, **asked)
    except BaseException:
        for number in files:
            os.close(number)
        raise


def _some(connection: socket.socket, length: int) -> bytes:
    data = connection.recv(min(length, 1 << 20))
    if not data:
        raise ConnectionResetError("the stand-in is gone")
    return data


def _be_of(request: Request, connection: socket.socket) -> None:
    """Be a process of the stand-in's: its files, folder, cores and environment, in a session of its own."""
    os.setsid()
    with contextlib.suppress(OSError):  # it is gone, and the server is about to end this process
        connection.sendall(struct.pack("!i", os.getpid()))  # from here on signals reach this process
    connection.close()
    for number, file in enumerate(request.files):
        os.dup2(file, number)
    for file in request.files:
        if file > 2:
            os.close(file)
    os.chdir(request.folder)
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, request.cores)
    for number in request.ignored:
        signal.signal(number, signal.SIG_IGN)
    for name in set(os.environ) - set(request.environment):
        del os.environ[name]
    os.environ.update(request.environment)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()  # Python's own generator does so itself at a fork


def main(descriptors: Sequence[int], folder: str, root: str, modules: Sequence[str]) -> list[str] | None:
    """Serve; returns in each copy, with what `python` would be given.

    Args:
        descriptors: of the listening socket, and of the pipe from the launcher.
        root: the folder of this package, the last one of `sys.path` as long as modules are imported.
    """
    listener = socket.socket(fileno=descriptors[0])
    server = Server(listener, descriptors[1], folder)
    trouble = preload(modules)
    del sys.path[len(sys.path) - 1 - sys.path[::-1].index(root)]
    if trouble is not None:
        print(f"Ranks start without preloaded modules: {trouble}.", file=sys.stderr, flush=True)
        os._exit(1)  # stand-ins start their ranks themselves
    request = server.serve()
    if request is None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return request.program

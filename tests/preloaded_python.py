"""A python for programs that start one `python -m hf_nanotron.cli` after another: each is a copy of a process that has
imported all, which takes milliseconds instead of seconds. Everything else is run by the real one.

`serve` runs in a process that has imported what `preloaded.py` names; the file that `write_python` writes is started in
its place, hands its streams over, passes signals on, and ends with the same status.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
from pathlib import Path

from forked import end_as_script

CLIENT = """\
#!{python} -IS
import array, json, os, signal, socket, sys
if sys.argv[1:3] != ["-m", "hf_nanotron.cli"]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
said = json.dumps([sys.argv[2:], os.getcwd(), dict(os.environ)]).encode()
server.sendmsg([len(said).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
server.sendall(said)
answers = server.makefile()
process = int(answers.readline())
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: os.kill(process, number))
status = int(answers.readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


def write_python(path: Path, address: Path) -> None:
    path.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    path.chmod(0o755)


def serve(address: Path) -> None:
    """Until this process is killed: a child for each program, which starts the program as its own child."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        early = address.with_name("early")
        listener.bind(str(early))
        listener.listen()
        early.rename(address)  # whoever sees it can connect
        while True:
            client, _ = listener.accept()
            if os.fork() == 0:
                _attend(client)
            client.close()


def _attend(client: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, handles, _, _ = socket.recv_fds(client, 8, 3)
    said = b""
    while len(said) < int.from_bytes(size, "big"):
        said += client.recv(2**20)
    words, folder, environment = json.loads(said)
    process = os.fork()
    if process == 0:
        for handle, number in zip(handles, (0, 1, 2), strict=True):
            os.dup2(handle, number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = words
        end_as_script(lambda: runpy.run_module(words[0], run_name="__main__", alter_sys=True))
    threading.Thread(target=_end_with, args=(client, process), daemon=True).start()
    with contextlib.suppress(OSError):
        client.sendall(f"{process}\n".encode())
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        client.sendall(f"{status}\n".encode())
    os._exit(0)


def _end_with(client: socket.socket, process: int) -> None:
    """What is started in the place of python may be killed: then the program is, too."""
    with contextlib.suppress(OSError):
        client.recv(1)
    os.kill(process, signal.SIGKILL)

"""The process that torchrun takes for a rank: it has the fork server make the rank, and ends as the rank ends.

Executed with `python -I -S -c`: it imports nothing of the package, nor much of Python.
`sys.argv`: `-c`, `--ranks-from=FOLDER` (of the fork server's socket), then what `python` would be given.
"""

import json
import os
import signal
import socket
import struct
import sys

# What is not passed on: signals that cannot be caught, faults of this process, and the news of its own children.
OWN = "SIGKILL SIGSTOP SIGCHLD SIGSEGV SIGBUS SIGFPE SIGILL SIGABRT SIGTRAP SIGSYS SIGPIPE SIGTSTP SIGTTIN SIGTTOU"


def main():
    folder, program = sys.argv[1].partition("=")[2], sys.argv[2:]
    try:
        connection = connect(folder)
        send(connection, program)
        pid = receive(connection)
    except OSError:
        pid = None
    if pid is None:
        # A rank that starts slowly is better than none.
        say("The process that ranks are copied from is gone, or cannot make one: this rank starts without it.")
        os.execv(sys.executable, [sys.executable, *program])

    def pass_on(number, _):
        try:
            os.killpg(pid, number)  # torchrun signals the group of a rank
        except ProcessLookupError:
            pass

    for number in signal.valid_signals() - {getattr(signal, name) for name in OWN.split()}:
        signal.signal(number, pass_on)
    status = receive(connection)
    if status is None:
        pass_on(signal.SIGKILL, None)
        say("The process that this rank was copied from has ended (out of memory?), and the rank with it.")
        os._exit(1)
    if os.WIFSIGNALED(status):
        die_by(os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def connect(folder):
    connection = socket.socket(socket.AF_UNIX)
    # Through the folder's descriptor: the name of a socket may have 107 bytes only.
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        connection.connect(f"/proc/self/fd/{at}/socket")
    finally:
        os.close(at)
    return connection


def send(connection, program):
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # it was closed
            os.open(os.devnull, os.O_RDWR)
    request = {
        "program": program, "folder": os.getcwd(), "cores": sorted(os.sched_getaffinity(0)),
        "ignored": [int(each) for each in signal.valid_signals() if signal.getsignal(each) == signal.SIG_IGN],
        "environment": {os.fsdecode(name): os.fsdecode(value) for name, value in os.environb.items()},
    }  # fmt: skip
    data = json.dumps(request).encode()
    socket.send_fds(connection, [struct.pack("!Q", len(data))], [0, 1, 2])
    connection.sendall(data)


def receive(connection):
    """A number; None if the other end is gone."""
    data = b""
    while len(data) < 4:
        more = connection.recv(4 - len(data))
        if not more:
            return None
        data += more
    return struct.unpack("!i", data)[0]


def die_by(number):
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the rank has left its own
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)


def say(text):
    rank = os.environ.get("RANK", "?")
    print(f"[rank {rank}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

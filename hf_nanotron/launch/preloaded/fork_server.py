"""Start the fork server of this host, and say what torchrun is to start as each rank."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[3]
SERVE = """\
import sys
if not sys.flags.safe_path:
    del sys.path[0]
sys.path.append(sys.argv[4])
from hf_nanotron.launch.preloaded.serve import main
program = main((int(sys.argv[1]), int(sys.argv[2])), sys.argv[3], sys.argv[4], sys.argv[5:])
from hf_nanotron.launch.preloaded.become import become
become(program)
"""
END_SECONDS = 5.0
STAND_IN = Path(__file__).with_name("stand_in.py")


class ForkServer:
    """A process that imports `modules`, and of which ranks are copies. While entered it makes them.

    It imports while the launcher goes on. A launcher that is killed leaves ranks as torchrun would; the server ends
    with the last of them.

    Args:
        python: the interpreter that ranks are to have.
        environment: in which modules are imported; each rank then gets its own.
    """

    def __init__(self, python: str, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self.python, self.modules, self.environment = python, list(modules), dict(environment)

    def __enter__(self) -> ForkServer:
        self.folder = tempfile.mkdtemp(prefix="hf_nanotron-ranks-")  # which nobody else may enter
        at = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        reading, self._hold = os.pipe()
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(f"/proc/self/fd/{at}/socket")
                listener.listen(1024)
                ours = (listener.fileno(), reading)
                self._process = subprocess.Popen(
                    [self.python, "-u", "-c", SERVE, *map(str, ours), self.folder, str(ROOT), *self.modules],
                    stdin=subprocess.DEVNULL, env=self.environment, pass_fds=ours, start_new_session=True,
                )  # fmt: skip
        except BaseException:
            os.close(self._hold)
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        finally:
            os.close(at)
            os.close(reading)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._hold)
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a rank that cannot be killed keeps it
            self._process.wait(END_SECONDS)

    def stand_in(self, program: Sequence[str]) -> list[str]:
        """The arguments of `self.python` for a rank that is to run `python *program`."""
        # Its first argument without a dash is the program's, by which torchrun calls it in its messages.
        path = str(STAND_IN)
        code = f"exec(compile(open({path!r}).read(), {path!r}, 'exec'))"
        return ["-I", "-S", f"-c{code}", f"--ranks-from={self.folder}", *program]


def why_not_importable(module: str) -> str | None:
    """Why a module cannot be imported by this name, as far as can be said without importing it; None if it can."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        return str(error)
    return None if found is not None else f"no module of this name can be found by {sys.executable}"

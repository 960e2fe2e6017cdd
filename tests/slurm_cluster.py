"""A Slurm of Debian's packages on this machine: two nodes, daemons, keys and ports of its own, no systemd.

The cluster is kept by a process of its own, which ends it when its input does: when the tests have finished, or their
process is gone, however it ended. All its processes are known by the `SLURM_CONF` of their environment.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ports import reserved_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
NODES = ("127.0.0.1", "127.0.0.2")  # names that resolve everywhere, with or without a network
PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
PATIENCE = 900.0  # seconds; only what never comes is an error, however slow the machine

# A job that is queued again waits for cred_expire, of which 5 seconds are the least; with less it is 120.
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=5
FirstJobId={first}
NodeName={nodes[0]} NodeHostname={host} NodeAddr={nodes[0]} Port={ports[1]} CPUs=2
NodeName={nodes[1]} NodeHostname={host} NodeAddr={nodes[1]} Port={ports[2]} CPUs=2
PartitionName=main Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"Slurm is not installed (no {absent[0]}): apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "the daemons of Slurm are started by root"


class SlurmCluster:
    """Started when entered, and gone with all its processes afterwards."""

    def __enter__(self) -> SlurmCluster:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path has to be short
        self._stack = contextlib.ExitStack()
        self.keeper = subprocess.Popen(
            [sys.executable, __file__, str(self.folder)], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        at = self.folder
        at.chmod(0o755)
        (at / "state").mkdir()
        (at / "key").write_bytes(os.urandom(1024))
        (at / "key").chmod(0o600)
        # Ports of rendezvous follow from the numbers of jobs: those of two clusters are to differ.
        values = {
            "folder": at, "host": socket.gethostname().partition(".")[0], "user": getpass.getuser(), "nodes": NODES,
            "ports": self._stack.enter_context(reserved_ports(3)), "first": random.SystemRandom().randrange(1, 9_900),
        }  # fmt: skip
        (at / "slurm.conf").write_text(CONFIG.format(**values))
        self.environment = {**os.environ, "SLURM_CONF": configuration(at), "PATH": PATH}
        self.run(
            "munged", "--force", f"--socket={at}/munge", f"--key-file={at}/key", f"--pid-file={at}/munged.pid",
            f"--log-file={at}/munged.log", f"--seed-file={at}/seed",
        )  # fmt: skip
        self.run("slurmctld")
        for node in NODES:
            self.run("slurmd", "-N", node)
        self.wait(lambda: self.run("sinfo", "--noheader", "--format=%D %t").split() == ["2", "idle"])

    def run(self, *command: str) -> str:
        """The output of a command that is to succeed."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout

    def wait(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Until `condition()` holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds} s; {self.run('squeue')}\n{self.logs()}"
            time.sleep(0.2)

    def is_idle(self) -> bool:
        """Whether no job is queued or runs."""
        return not self.run("squeue", "--noheader").strip()

    def logs(self) -> str:
        """Ends of the daemons' logs."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in self.folder.glob("*.log"))

    def stop(self) -> None:
        """Let the keeper end all, and wait for it."""
        assert self.keeper.stdin is not None
        self.keeper.stdin.close()
        self.keeper.wait()
        self._stack.close()


# ---- the keeper ----


def configuration(folder: Path) -> str:
    return f"{folder}/slurm.conf"


def processes_of(folder: Path) -> list[int]:
    """The ids of all processes of a cluster: daemons, steps, and what jobs have started."""
    mark, found = f"SLURM_CONF={configuration(folder)}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def end(folder: Path) -> None:
    """End all processes of a cluster, and remove its folder."""
    for sign, seconds in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        until = time.monotonic() + seconds
        while (left := processes_of(folder)) and time.monotonic() < until:
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, sign)
            time.sleep(0.2)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end(Path(sys.argv[1]))

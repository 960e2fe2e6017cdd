"""A Slurm of Debian's packages on this machine: two nodes, daemons, keys and ports of its own, no systemd."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
NODES = ("127.0.0.1", "127.0.0.2")  # names that resolve everywhere, with or without a network
PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))

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
SchedulerParameters=bf_interval=1,sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=5
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
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        (self.folder / "key").write_bytes(os.urandom(1024))
        (self.folder / "key").chmod(0o600)
        host = socket.gethostname().partition(".")[0]
        values = {
            "folder": self.folder,
            "host": host,
            "user": getpass.getuser(),
            "nodes": NODES,
            "ports": free_ports(3),
        }
        (self.folder / "slurm.conf").write_text(CONFIG.format(**values))
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}
        try:
            at = self.folder
            self.run(
                "munged", "--force", f"--socket={at}/munge", f"--key-file={at}/key", f"--pid-file={at}/munged.pid",
                f"--log-file={at}/munged.log", f"--seed-file={at}/seed",
            )  # fmt: skip
            self.run("slurmctld")
            for node in NODES:
                self.run("slurmd", "-N", node)
            self.wait(lambda: self.run("sinfo", "--noheader", "--format=%D %t").split() == ["2", "idle"], 20)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, *command: str) -> str:
        """The output of a command that is to succeed."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def wait(self, condition: object, seconds: float) -> None:
        """Until `condition()` holds."""
        end = time.monotonic() + seconds
        while not condition():  # type: ignore[operator]
            assert time.monotonic() < end, f"not within {seconds} s; {self.run('squeue')}\n{self.logs()}"
            time.sleep(0.1)

    def is_idle(self) -> bool:
        """Whether no job is queued or runs."""
        return not self.run("squeue", "--noheader").strip()

    def logs(self) -> str:
        """Ends of the daemons' logs."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in self.folder.glob("*.log"))

    def stop(self) -> None:
        """End the jobs, then the daemons, each by its id."""
        try:
            self.run("scancel", "--signal=KILL", "--full", f"--user={getpass.getuser()}")
            self.run("scancel", f"--user={getpass.getuser()}")
            self.wait(self.is_idle, 15)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            pass  # the controller has not come up
        for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld", "munged"):
            end(self.folder / f"{name}.pid")
        shutil.rmtree(self.folder, ignore_errors=True)


def end(pid_file: Path) -> None:
    """End the process that wrote its id there."""
    try:
        process = int(pid_file.read_text())
        os.kill(process, signal.SIGTERM)
        for _ in range(100):
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return  # gone, and nobody has asked for its status
            time.sleep(0.05)
        os.kill(process, signal.SIGKILL)
    except (OSError, ValueError):
        pass


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports

"""The folder of a run in the shared memory of a host: one folder for each snapshot in it, one part for each rank.

A snapshot of step N by a branch of a run is `<branch>-N/`. A rank's part of it is `training_state/rank-00003.*`, as in
a checkpoint, and the state of its random numbers; rank 0 adds `trainer_state.json` and `values.json`. Its marker,
`part-00003.json`, is written last: without it the part is torn. Nothing in here communicates.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..directory.run_lock import RunLock
from ..directory.runs import RUN, Run
from ..files.checked import read_checked, write_checked
from ..files.disk import StrPath, checksum_of
from ..files.inside import inside
from ..files.schema import DESCRIPTION, record, require, whole

PREFIX = "hf_nanotron"  # of the folders of runs
OF = "output_dir.txt"  # in the folder of a run: whose it is, for people
PART = record({"step": whole(), "rank": whole(), "world_size": whole(1), "run": RUN})


@dataclass(frozen=True)
class Part:
    """A rank's part of a snapshot, all of which is there."""

    run: Run  # that has written it
    step: int  # optimizer steps
    rank: int  # that has written it, of
    world_size: int
    files: dict[str, dict[str, Any]] = field(compare=False)  # name -> `bytes` and `crc32`

    @property
    def snapshot(self) -> str:
        """The name of the snapshot's folder."""
        return snapshot_name(self.run, self.step)


def snapshot_name(run: Run, step: int) -> str:
    return f"{run.branch}-{step}"


def part_name(rank: int) -> str:
    """The file name of a part's marker."""
    return f"part-{rank:05d}.json"


class MemoryFolder:
    """Where the snapshots of the run in `output_dir` are on this host: a folder of this user alone, below `root`.

    Attributes:
        path: of the folder, which may not exist yet.
    """

    def __init__(self, root: StrPath, output_dir: StrPath) -> None:
        self.root, self._output_dir = Path(os.path.abspath(root)), os.path.realpath(output_dir)
        digest = sha256(self._output_dir.encode(errors="surrogateescape")).hexdigest()[:12]
        self.path = self.root / f"{PREFIX}-{os.getuid()}-{digest}"
        self._lock = RunLock()

    # ---- the folder ----

    def check(self) -> None:
        """
        Raises:
            ValueError: where `root` is no folder that can be written, or another user has made the run's folder.
        """
        if not self.root.is_dir() or not os.access(self.root, os.W_OK | os.X_OK):
            fault = "cannot be written" if self.root.is_dir() else "is not a folder of this host"
            raise ValueError(
                f"memory_snapshot_dir={os.fspath(self.root)!r} {fault}; use one that is in the memory of each host, "
                "such as /dev/shm."
            )
        try:
            status = self.path.lstat()
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise ValueError(
                f"{self.path} belongs to user {status.st_uid}, or is no folder: snapshots are not written where others "
                "can. Remove it, or use another memory_snapshot_dir."
            )

    def acquire(self) -> str | None:
        """Make the folder, and lock it for this process. Returns None, or who has it, in words."""
        with contextlib.suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        self.check()
        self.path.chmod(0o700)
        holder = self._lock.acquire(self.path)
        if holder is None:
            (self.path / OF).write_text(f"{self._output_dir}\n", errors="surrogateescape")
        return holder

    def release(self) -> None:
        self._lock.release()

    def delete(self) -> None:
        """The whole folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def nbytes(self) -> int:
        """Bytes of memory in the folder."""
        return nbytes_of(self.path)

    # ---- snapshots ----

    def snapshot(self, name: str) -> Path:
        """The folder of a snapshot."""
        return self.path / name

    def names(self) -> list[str]:
        """Everything in the folder that is one: of snapshots, torn or not, and what was made of one for a resume."""
        if not self.path.is_dir():
            return []
        return sorted(entry.name for entry in os.scandir(self.path) if entry.is_dir(follow_symlinks=False))

    def keep(self, names: Collection[str]) -> None:
        """Delete all snapshots but these. Markers go first."""
        for name in self.names():
            if name not in names:
                for marker in self.snapshot(name).glob("part-*.json"):
                    marker.unlink(missing_ok=True)
                shutil.rmtree(self.snapshot(name), ignore_errors=True)

    def parts(self) -> list[Part]:
        """The parts that are whole, by their markers; torn and damaged ones are left out."""
        found = []
        for name in self.names():
            for marker in sorted(self.snapshot(name).glob("part-*.json")):
                if not re.fullmatch(r"part-\d+\.json", marker.name):
                    continue
                with contextlib.suppress(OSError, ValueError):
                    part = read_part(marker)
                    if part.snapshot == name and part_name(part.rank) == marker.name:
                        found.append(part)
        return found


def write_part(
    directory: Path, part: tuple[Run, int, int, int], names: Iterable[str], have_own: Collection[str]
) -> None:
    """Complete a rank's part by its marker.

    Args:
        part: run, step, rank and number of ranks.
        names: files of the part, in `directory`.
        have_own: those of them with checksums of their own.
    """
    run, step, rank, world_size = part
    files = {
        name: {
            "bytes": (directory / name).stat().st_size,
            "crc32": None if name in have_own else checksum_of(directory / name),
        }
        for name in names
    }
    body = {"run": run.to_dict(), "step": step, "rank": rank, "world_size": world_size, "files": files}
    write_checked(directory / part_name(rank), body, durable=False)


def read_part(marker: Path) -> Part:
    """
    Raises:
        ValueError: for a marker that is damaged, or a file that is missing or has another length.
    """
    body = require(DESCRIPTION, require(PART, read_checked(marker), marker), marker)
    for name, entry in body["files"].items():
        path = inside(marker.parent, name, str(marker))
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise ValueError(f"{path} is missing or was cut off.")
    return Part(Run.from_dict(body["run"]), body["step"], body["rank"], body["world_size"], body["files"])


def nbytes_of(path: Path) -> int:
    """Bytes of memory that the files below a folder take. What two names have in common counts once."""
    seen: dict[tuple[int, int], int] = {}
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(folder, name))
                seen[(status.st_dev, status.st_ino)] = status.st_blocks * 512
    return sum(seen.values())

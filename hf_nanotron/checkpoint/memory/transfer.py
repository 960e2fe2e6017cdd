"""Files from the memory of one host to that of another, between two ranks, chunk by chunk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..files.disk import CHUNK_BYTES
from ..files.inside import inside


class Wire:
    """The way between this rank and another, through a process group.

    Args:
        other: its rank in the job.
        handle: of a group that both are in.
        device: of the tensors that the group sends.
    """

    def __init__(self, other: int, handle: dist.ProcessGroup | None, device: torch.device) -> None:
        self.other, self.handle, self.device = other, handle, device

    def send(self, data: bytearray | bytes) -> None:
        tensor = torch.frombuffer(data, dtype=torch.uint8) if isinstance(data, bytearray) else _tensor(data)
        dist.send(tensor.to(self.device), self.other, group=self.handle)

    def receive(self, size: int) -> memoryview:
        tensor = torch.empty(size, dtype=torch.uint8, device=self.device)
        dist.recv(tensor, self.other, group=self.handle)
        return tensor.cpu().numpy().data


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def send_files(wire: Wire, folder: Path, names: Iterable[str], note: Any = None) -> None:
    """Send files of `folder`, with a `note` (JSON) that `receive_files` returns."""
    listed = [(name, (folder / name).stat().st_size) for name in names]
    header = json.dumps({"note": note, "files": listed}).encode()
    wire.send(len(header).to_bytes(8, "little"))
    wire.send(header)
    for name, size in listed:
        with open(folder / name, "rb", buffering=0) as file:
            left = size
            while left:
                data = bytearray(min(left, CHUNK_BYTES))
                if file.readinto(data) != len(data):
                    raise ValueError(f"{folder / name} was cut off while it was sent.")
                wire.send(data)
                left -= len(data)


def receive_files(wire: Wire, folder: Path) -> tuple[Any, list[str]]:
    """What `send_files` sends, written into `folder`: the note, and the names. A file that was there is replaced.

    What cannot be written is received all the same, so that the sender is not left waiting.

    Raises:
        OSError: if a file cannot be written.
    """
    header = json.loads(bytes(wire.receive(int.from_bytes(wire.receive(8), "little"))))
    failure: OSError | None = None
    for name, size in header["files"]:
        path = inside(folder, name, "another rank")
        handle = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            failure = failure or error
        for start in range(0, size, CHUNK_BYTES):
            data = wire.receive(min(CHUNK_BYTES, size - start))
            try:
                while handle is not None and data:
                    data = data[os.write(handle, data) :]
            except OSError as error:
                failure = failure or error
        if handle is not None:
            os.close(handle)
    if failure is not None:
        raise failure
    return header["note"], [name for name, _ in header["files"]]

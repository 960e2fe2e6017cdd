"""FlashAttention-4's compiled kernels on disk, for the next process: compiling them takes eight seconds.

FlashAttention-4 keeps them if two variables of its own say so when it is imported. It writes a file in its place, which
a process that dies leaves torn, and stops the run where it cannot write or lock. So it is told to keep its kernels only
in a folder where both were tried, and torn files are deleted first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch._inductor import config as inductor_config
from torch._inductor.runtime.cache_dir_utils import cache_dir

IS_ON, PLACE = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
ROOM = 8 << 20  # bytes; all kernels of a model take less


@contextlib.contextmanager
def kept_kernels() -> Iterator[None]:
    """Around the import of FlashAttention-4. A user's own settings go before."""
    if IS_ON in os.environ or PLACE in os.environ or (folder := kernel_folder()) is None:
        yield
        return
    os.environ.update({IS_ON: "1", PLACE: str(folder)})
    try:
        yield
    finally:
        del os.environ[IS_ON], os.environ[PLACE]


def kernel_folder() -> Path | None:
    """In torch's cache folder, one for each kind of GPU; None where nothing can be kept."""
    if not torch.cuda.is_available() or inductor_config.force_disable_caches:
        return None
    try:
        folder = Path(cache_dir(), "flash_attention_4", "sm{}{}".format(*torch.cuda.get_device_capability()))
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(bytes(ROOM))
        for path in folder.rglob("*.o"):
            if not is_whole(path):
                path.unlink(missing_ok=True)
    except OSError:
        return None
    return folder


def is_whole(path: Path) -> bool:
    """Whether a 64-bit ELF object file has its last part, the table of its sections (System V ABI, chapter 4)."""
    with open(path, "rb") as file:
        header = file.read(64)
        size = os.fstat(file.fileno()).st_size
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return False
    (table,), (entry, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return bool(table) and table + entry * count <= size

"""Where FlashAttention-4 keeps its kernels, on a machine that only says it has a GPU."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import torch

from hf_nanotron.ops.kernels import kept_attention
from hf_nanotron.ops.kernels.kept_attention import IS_ON, PLACE, is_whole, kept_kernels, kernel_folder

HEADER = b"\x7fELF\x02" + bytes(35) + struct.pack("<Q", 100) + bytes(10) + struct.pack("<HH", 64, 2) + bytes(2)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(kept_attention, "cache_dir", lambda: str(tmp_path / "cache"))
    for name in (IS_ON, PLACE):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache" / "flash_attention_4" / "sm90"


def test_it_is_told_where_while_it_is_imported(home: Path) -> None:
    with kept_kernels():
        assert (os.environ[IS_ON], os.environ[PLACE]) == ("1", str(home))
    assert IS_ON not in os.environ and PLACE not in os.environ
    assert not any(home.iterdir())


@pytest.mark.parametrize("name", [IS_ON, PLACE])
def test_a_users_own_setting_stays(home: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0")
    before = dict(os.environ)
    with kept_kernels():
        assert dict(os.environ) == before
    assert dict(os.environ) == before and not home.exists()


def test_nothing_is_kept_where_nothing_can_be_written_or_there_is_no_gpu(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.parent.parent.write_text("in the way")
    assert kernel_folder() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with kept_kernels():
        assert IS_ON not in os.environ


def test_torn_files_are_deleted(home: Path) -> None:
    whole, torn, other = home / "hash" / "fwd" / "a.o", home / "hash" / "fwd" / "b.o", home / "hash" / "fwd" / "a.lock"
    whole.parent.mkdir(parents=True)
    content = HEADER + bytes(100 + 2 * 64 - len(HEADER))
    whole.write_bytes(content)
    other.touch()
    for damaged in (content[:-1], content[:70], content[:20], b"", bytes(len(content))):
        torn.write_bytes(damaged)
        assert is_whole(whole) and not is_whole(torn)
        assert kernel_folder() == home
        assert whole.exists() and other.exists() and not torn.exists()

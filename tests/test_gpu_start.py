"""What makes a start on a GPU short: copies of a preloaded process, and attention kernels from the process before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_nanotron.ops.kernels.attention import flash_attention_4
from hf_nanotron.ops.kernels.kept_attention import IS_ON, PLACE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ON_A_GPU = """\
import sys
assert "hf_nanotron.trainer" in sys.modules and "datasets" in sys.modules
import torch
print("sum", int(torch.arange(5, device="cuda").sum()), flush=True)
"""
ATTENTION = """\
import torch
from hf_nanotron.ops.attention import attention
generator = torch.Generator("cuda").manual_seed(0)
q, k, v = (torch.randn(2, 256, 4, 64, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(3))
q.requires_grad_()
attention(q, k, v, "fa4", 0.125).float().square().sum().backward()
print("sum", float(q.grad.double().abs().sum()), flush=True)
"""


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    dropped = (IS_ON, PLACE, "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {**{name: value for name, value in os.environ.items() if name not in dropped}, "PYTHONPATH": path, **more}


def test_a_copy_of_the_preloaded_process_uses_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(ON_A_GPU)
    done = subprocess.run(
        [sys.executable, "-m", "hf_nanotron.cli", "torchrun", "--standalone", "--nproc-per-node", "1", "main.py"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "sum 10" in done.stdout, done.stderr
    assert "without preloaded" not in done.stderr


def test_the_next_process_takes_the_attention_kernels(tmp_path: Path) -> None:
    """Of which a torn one is compiled again."""
    if flash_attention_4()[0] is None or torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip(f"FlashAttention-4 does not run here: {flash_attention_4()[1] or 'no Hopper GPU'}")

    def run() -> tuple[str, dict[Path, int]]:
        done = subprocess.run(
            [sys.executable, "-c", ATTENTION], cwd=tmp_path, env=environment(TORCHINDUCTOR_CACHE_DIR=str(tmp_path)),
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout, {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.o")}

    said, kept = run()
    assert len(kept) >= 2  # of the forward and of the backward
    assert run() == (said, kept)
    torn = sorted(kept)[0]
    torn.write_bytes(torn.read_bytes()[:-100])
    again, now = run()
    assert again == said and now.keys() == kept.keys() and now[torn] > kept[torn]

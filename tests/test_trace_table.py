"""The table of a profile: a trace by hand, and operators' own times as `torch.profiler` itself sums them."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hf_nanotron.monitor.trace_table import kind_of, own_times, sweep, table_of, text_of

MS = 1000.0  # traces count microseconds


def event(name: str, cat: str, start: float, end: float, tid: Any = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "ts": start * MS, "dur": (end - start) * MS, "tid": tid, "args": args}


def kernel(name: str, launched: float, start: float, end: float, number: int, stream: int = 7) -> list[dict[str, Any]]:
    launch = event("cudaLaunchKernel", "cuda_runtime", launched, launched, correlation=number)
    return [launch, event(name, "kernel", start, end, stream, correlation=number)]


def test_a_step_on_a_gpu() -> None:
    """Milliseconds of a step of 100: the host is ahead of the device, and two streams overlap."""
    events = [
        {"ph": "M", "name": "process_name"},
        event("ProfilerStep#1", "user_annotation", 0, 60),
        event("forward stage=0 micro_batch=0", "user_annotation", 0, 10),
        event("backward stage=0 micro_batch=0", "user_annotation", 10, 30),
        event("Optimizer.step#AdamW.step", "user_annotation", 40, 50),
        *kernel("sm90_xmma_gemm_bf16bf16", 1, 5, 25, 1),
        *kernel("flash_fwd_kernel", 2, 25, 35, 2),
        *kernel("nvjet_hsh_128x256", 11, 35, 60, 3),
        *kernel("ncclDevKernel_ReduceScatter_Sum_bf16", 12, 50, 70, 4, stream=20),  # 10 beside the product
        *kernel("triton_poi_fused_mul_add", 41, 75, 90, 5),
        *kernel("ncclDevKernel_AllGather", 42, 90, 98, 6, stream=20),
        event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 98, 100, 7, correlation=7),
    ]
    table = table_of(events)
    assert table["device"] == "cuda" and table["steps"] == 1 and table["seconds"] == pytest.approx(0.1)
    wanted = {
        "matmul": 45, "attention": 10, "optimizer": 15, "memory_bound": 0, "copies": 2, "communication": 18, "idle": 10,
    }  # fmt: skip
    assert {part: 1e3 * seconds for part, seconds in table["parts"].items()} == pytest.approx(wanted)
    communication = {name: 1e3 * seconds for name, seconds in table["communication"].items()}
    assert communication == pytest.approx({"total": 28, "exposed": 18, "overlapped": 10})
    phases = {phase: 1e3 * seconds for phase, seconds in table["phases"].items()}
    assert phases == pytest.approx({"forward": 30, "backward": 35, "optimizer": 23, "other": 2})
    assert table["kernels"][0] == {
        "name": "nvjet_hsh_128x256",
        "part": "matmul",
        "seconds": pytest.approx(0.025),
        "calls": 1.0,
    }
    text = text_of(table)
    assert "matrix products                          45.00   45.0 %" in text
    with pytest.raises(ValueError, match="no profiled step"):
        table_of([])


def test_a_stage_of_a_pipeline_on_the_host() -> None:
    """Messages are noted in the thread that computes; collectives in threads of their own, with their copies."""
    events = [
        event("ProfilerStep#1", "user_annotation", 0, 100),
        event("gloo:recv", "user_annotation", 0, 20),
        event("forward stage=1 micro_batch=0", "user_annotation", 0, 50),
        event("aten::mm", "cpu_op", 20, 50),
        event("gloo:send", "user_annotation", 52, 80),
        event("weight_gradients stage=1 micro_batch=0", "user_annotation", 60, 70),
        event("aten::mm", "cpu_op", 60, 70),
        event("gloo:all_reduce", "user_annotation", 80, 90, tid=2),
        event("aten::copy_", "cpu_op", 80, 90, tid=2),
    ]
    table = table_of(events)
    parts = {part: 1e3 * seconds for part, seconds in table["parts"].items() if seconds}
    assert parts == pytest.approx({"matmul": 40, "communication": 48, "idle": 12})
    phases = {phase: 1e3 * seconds for phase, seconds in table["phases"].items()}
    assert phases == pytest.approx({"forward": 50, "backward": 10, "optimizer": 0, "other": 28})


def test_each_moment_counts_once() -> None:
    found = sweep([(0, 10, "communication", "forward"), (2, 4, "matmul", "forward"), (3, 6, "matmul", "backward")])
    assert found == {("communication", "forward"): 6, ("matmul", "backward"): 3, ("matmul", "forward"): 1}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("gloo:all_gather", "communication"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90>", "attention"),
        ("_ZN3cudnn8sdpa_sm90_flash_fprop", "attention"),
        ("hf_nanotron::attention_backward", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_TNT", "matmul"),
        ("ampere_bf16_s16816gemm_bf16_128x128", "matmul"),
        ("aten::addmm", "matmul"),
        ("aten::_grouped_mm", "matmul"),
        ("_product_kernel", "matmul"),
        ("aten::mul", "memory_bound"),
        ("aten::comm_copy", "memory_bound"),
        ("triton_red_fused_add_rms_norm", "memory_bound"),
        ("_quantize_kernel", "memory_bound"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_own_times_are_those_of_torch(tmp_path: Path) -> None:
    """An operator without those that it calls, as `key_averages` says it."""
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64))
    with profile(activities=[ProfilerActivity.CPU]) as found:
        layer(torch.randn(32, 64)).square().mean().backward()
    found.export_chrome_trace(str(tmp_path / "trace.json.gz"))
    events = json.loads(gzip.open(tmp_path / "trace.json.gz").read())["traceEvents"]
    ops = [each for each in events if each.get("cat") == "cpu_op"]
    own: Counter[str] = Counter()
    for tid in {each["tid"] for each in ops}:
        for name, start, end in own_times([each for each in ops if each["tid"] == tid]):
            own[name] += end - start  # type: ignore[assignment]
    wanted = {average.key: average.self_cpu_time_total for average in found.key_averages()}
    for name in ("aten::addmm", "aten::mm", "aten::silu", "aten::linear", "aten::sum"):
        assert own[name] == pytest.approx(wanted[name], rel=0.02, abs=2.0), name

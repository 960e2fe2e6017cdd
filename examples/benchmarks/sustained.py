"""What matrix products reach for seconds on end, where the power limit of a GPU holds its clock down.

    python sustained.py --seconds 2 --product 16384x14336x4096 --product 32768x8192x2048 --out sustained.jsonl

Each product is tokens x out x in, of a linear layer in bf16 on random numbers: its forward, its input gradient, and its
weight gradient added to fp32. The device idles before each; then the product runs without a pause. Printed are the rate
of the first window, which a benchmark of a few repetitions sees, and of the last four, which a training step sees;
beside them what `nvidia-smi` reads in the ninth window (nothing is set). About 2 s for each.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from hf_nanotron.ops.linear import add_product

PRODUCTS = ("16384x14336x4096", "16384x4096x14336", "32768x8192x2048")  # of 8B and 1B, in NOTEBOOK.md
WINDOW = 0.1  # seconds, about
READ_IN, LAST = 9, 4  # the window in which the clock is read; those that count as sustained
QUERY = {"power_w": "power.draw", "clock_mhz": "clocks.sm", "limited_by_power": "clocks_throttle_reasons.sw_power_cap"}


def parse_product(text: str) -> tuple[int, int, int]:
    """`"16384x14336x4096"`: tokens, out, in.

    Raises:
        ValueError: it is not three positive integers.
    """
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"--product {text}: say tokens x out x in, such as 16384x14336x4096.")
    tokens, out, size = map(int, sizes)
    return tokens, out, size


def summary(rates: Sequence[float]) -> dict[str, float]:
    """Of the rates of all windows: the first, and the mean of the last ones, in TFLOP/s.

    Raises:
        ValueError: the last windows would hold the first.
    """
    if len(rates) <= LAST:
        raise ValueError(f"{len(rates)} windows; more than {LAST} tell the first from what lasts: more --seconds.")
    return {"first": round(rates[0] / 1e12, 1), "sustained": round(statistics.fmean(rates[-LAST:]) / 1e12, 1)}


def device_state() -> dict[str, str]:
    """Power, clock and whether power limits it, as text; empty without `nvidia-smi`."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY.values())}", "--format=csv,noheader,nounits"]
    try:  # by its own name: CUDA_VISIBLE_DEVICES numbers devices anew
        answer = subprocess.run([*command, f"--id=GPU-{device.uuid}"], capture_output=True, text=True)
    except FileNotFoundError:
        return {}
    return dict(zip(QUERY, (value.strip() for value in answer.stdout.split(",")), strict=False))


def windows(call: Callable[[], Any], flops: float, seconds: float) -> tuple[list[float], dict[str, str]]:
    """FLOP/s of each window, and the state of the device in one of them."""
    call()
    torch.cuda.synchronize()
    time.sleep(0.5)
    repeats = max(1, round(WINDOW * 700e12 / flops))
    rates: list[float] = []
    state: dict[str, str] = {}
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        stop.record()
        if len(rates) == READ_IN:
            state = device_state()
        stop.synchronize()
        rates.append(flops * repeats / start.elapsed_time(stop) * 1e3)
    return rates, state


def measure(tokens: int, out: int, size: int, seconds: float) -> list[dict[str, Any]]:
    """One line for each of the three products of a linear layer."""
    x = torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(out, size, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(tokens, out, device="cuda", dtype=torch.bfloat16)
    total = torch.zeros(out, size, device="cuda")
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: F.linear(x, weight),
        "input gradient": lambda: grad @ weight,
        "weight gradient": lambda: add_product(total, grad, x, overwrite=False),
    }
    lines = []
    for kind, call in calls.items():
        rates, state = windows(call, 2.0 * tokens * out * size, seconds)
        lines.append({"product": f"{tokens}x{out}x{size}", "kind": kind, **summary(rates), **state})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--product", action="append", help="tokens x out x in")
    parser.add_argument("--seconds", type=float, default=1.6, help="of each product")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    cli = parser.parse_args()
    try:
        products = [parse_product(text) for text in cli.product or PRODUCTS]
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.exit(1, "sustained.py measures a GPU, and there is none.\n")
    for product in products:
        for line in measure(*product, cli.seconds):
            text = json.dumps({**line, "device": torch.cuda.get_device_name(), "torch": torch.__version__})
            print(text, flush=True)
            if cli.out is not None:
                with cli.out.open("a") as file:
                    file.write(text + "\n")


if __name__ == "__main__":
    main()

"""The least time that a step can take on a device: its FLOPs over measured rates, its optimizer's bytes over bandwidth.

    python floor.py --shape 1b --sequence-length 4096 --micro-batch 8 --micro-batches 4

Two floors. `square`: every product at the rate of an 8,192 cubed bf16 matmul, attention at the best measured rate.
`shape`: each of the model's own products (forward, input gradient, weight gradient added to fp32) at its own rate.
Nothing else is in them: norms, activations, softmax, copies, gaps and communication are what a trainer may still save.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from figures import attention_flops, matmul_weights, shapes_of
from shapes import SHAPES, make_config
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_nanotron.monitor.flops import IN_LAYERS, flops_per_token, head_dims, peak_flops
from hf_nanotron.ops.linear import add_product

SQUARE = 8192
# Bytes of optimizer traffic for a parameter: read the fp32 gradient; read and write the fp32 master and two moments;
# write the weight in bf16. A norm that is read apart from that is not a must.
OPTIMIZER_BYTES = {"float32": 4 + 8 + 16 + 2, "bfloat16": 4 + 8 + 8 + 2}


@dataclass(frozen=True)
class Work:
    """What one device has to do in one step.

    Attributes:
        matmul_flops: of all products, forwards and backwards.
        attention_flops: causal, counted once.
        optimizer_bytes: read and written by the optimizer.
    """

    matmul_flops: float
    attention_flops: float
    optimizer_bytes: float


@dataclass(frozen=True)
class Rates:
    """What a device reaches: FLOP/s of products and of attention, forwards and backwards, and bytes/s of a copy."""

    matmul: float
    attention: float
    bandwidth: float


def work_of(
    shapes: Mapping[str, tuple[int, ...]],
    config: Any,
    sequence_length: int,
    tokens: float,
    optimizer_bytes: int = OPTIMIZER_BYTES["float32"],
    shards: int = 1,
) -> Work:
    """The work of a device in a step.

    Args:
        tokens: those of the step over the number of devices, however the devices share the work.
        optimizer_bytes: for each parameter.
        shards: over how many devices the optimizer's state is spread.
    """
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    return Work(
        matmul_flops=6.0 * matmul_weights(shapes, config) * tokens,
        attention_flops=attention_flops(config, sequence_length) * tokens,
        optimizer_bytes=parameters * optimizer_bytes / shards,
    )


def floor_seconds(work: Work, rates: Rates) -> float:
    """Seconds of a step in which nothing but the work is done, one thing after the other."""
    return (
        work.matmul_flops / rates.matmul
        + work.attention_flops / rates.attention
        + work.optimizer_bytes / rates.bandwidth
    )


def mean_rate(products: Mapping[str, tuple[float, float]]) -> float:
    """FLOP/s of products done one after the other, of name -> (FLOPs, FLOP/s): the harmonic mean by FLOPs."""
    if not products:
        raise ValueError("no product was measured, so there is no rate of them")
    return sum(flops for flops, _ in products.values()) / sum(flops / rate for flops, rate in products.values())


def linears(shapes: Mapping[str, tuple[int, ...]], config: Any) -> dict[tuple[int, int], int]:
    """(out, in) -> how many linear layers of a dense model have that shape, the head among them."""
    text = config.get_text_config()
    found: dict[tuple[int, int], int] = {(text.vocab_size, text.hidden_size): 1}
    for name, shape in shapes.items():
        if IN_LAYERS.search(name) and len(shape) == 2:
            key = (shape[0], shape[1])
            found[key] = found.get(key, 0) + 1
    return found


def timed(call: Callable[[], Any], repeats: int = 10) -> float:
    """Median seconds of a call on the GPU's own clock, after three that are left out."""
    for _ in range(3):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)) / 1e3


def square_rate() -> float:
    """FLOP/s of an 8,192 cubed bf16 product of random numbers."""
    a, b = (torch.randn(SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * SQUARE**3 / timed(lambda: torch.mm(a, b, out=out))


def copy_bandwidth() -> float:
    """Bytes/s read and written by a copy of 2 GiB."""
    source = torch.empty(2**31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2.0 * source.numel() / timed(lambda: target.copy_(source))


def product_rates(
    shapes: Mapping[str, tuple[int, ...]], config: Any, tokens: int, deadline: float
) -> dict[str, tuple[float, float]]:
    """(FLOPs of one token, FLOP/s) of each product of the linear layers, for a micro-batch of `tokens` tokens.

    The head is measured with 8,192 tokens at most: it goes through them in chunks.
    """
    rates: dict[str, tuple[float, float]] = {}
    for (out, size), count in linears(shapes, config).items():
        if time.perf_counter() > deadline:
            raise TimeoutError("the products took longer than there was time for")
        rows = min(tokens, 8192) if out > 2**16 else tokens
        x = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(out, size, device="cuda", dtype=torch.bfloat16)
        grad = torch.randn(rows, out, device="cuda", dtype=torch.bfloat16)
        total = torch.zeros(out, size, device="cuda", dtype=torch.float32)
        calls: dict[str, Callable[[], Any]] = {
            "forward": lambda x=x, weight=weight: F.linear(x, weight),
            "input gradient": lambda grad=grad, weight=weight: grad @ weight,
            "weight gradient": lambda grad=grad, x=x, total=total: add_product(total, grad, x, overwrite=False),
        }
        for kind, call in calls.items():
            flops = 2.0 * out * size
            rates[f"{kind} {out} x {size}"] = (count * flops, flops * rows / timed(call, 5))
        del x, weight, grad, total, calls
    return rates


def attention_rates(config: Any, sequence_length: int, batch: int, fa4: bool) -> dict[str, float]:
    """FLOP/s of causal attention forwards and backwards, counted once: of torch's, cuDNN first, and of FA4 if asked."""
    text = config.get_text_config()
    heads, groups, (size, values) = text.num_attention_heads, text.num_key_value_heads, head_dims(text)
    flops = 3.0 * heads * (size + values) * sequence_length * sequence_length * batch

    def inputs(swap: bool) -> list[torch.Tensor]:
        made = [
            torch.randn(batch, number, sequence_length, width, device="cuda", dtype=torch.bfloat16)
            for number, width in ((heads, size), (groups, size), (groups, values))
        ]
        return [(x.transpose(1, 2).contiguous() if swap else x).requires_grad_() for x in made]

    def both_ways(forward: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> Callable[[], Any]:
        grad = torch.randn_like(forward(*tensors))
        return lambda: torch.autograd.grad(forward(*tensors), tensors, grad)

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)

    rates = {"sdpa": flops / timed(both_ways(sdpa, inputs(swap=False)))}
    if fa4:
        from flash_attn.cute import flash_attn_func

        def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = flash_attn_func(q, k, v, causal=True)
            return out[0] if isinstance(out, tuple) else out

        rates["flash_attention_4"] = flops / timed(both_ways(flash, inputs(swap=True)))
    return rates


def measure(
    config: Any,
    sequence_length: int,
    micro_batch: int,
    micro_batches: int,
    state: str = "float32",
    shards: int = 1,
    cut: int = 1,
    fa4: bool = False,
    seconds: float = 8.0,
) -> dict[str, Any]:
    """Measure the rates on this GPU, and what they allow for a step.

    Args:
        state: dtype of the optimizer's moments.
        shards: over how many devices the optimizer's state is spread.
        cut: over how many devices one copy of the model is spread.
        fa4: measure FlashAttention 4 too; its first call compiles for a while.
        seconds: after which no further product is measured.
    """
    began = time.perf_counter()
    shapes = shapes_of(config)
    tokens = sequence_length * micro_batch
    share = tokens * micro_batches / cut
    work = work_of(shapes, config, sequence_length, share, OPTIMIZER_BYTES[state], shards)
    attention = attention_rates(config, sequence_length, micro_batch, fa4)
    rates = Rates(square_rate(), max(attention.values()), copy_bandwidth())
    result: dict[str, Any] = {
        "matmul_tflops": round(rates.matmul / 1e12, 1),
        "attention_tflops": {name: round(rate / 1e12, 1) for name, rate in attention.items()},
        "copy_tb_per_second": round(rates.bandwidth / 1e12, 2),
        **_floor("", work, rates, config, sequence_length, shapes, share),
    }
    if cut == 1 and not any(len(shape) == 3 for shape in shapes.values()):  # experts' products have other shapes
        products = product_rates(shapes, config, tokens, began + seconds)
        own = Rates(mean_rate(products), rates.attention, rates.bandwidth)
        result["products_tflops"] = {name: round(rate / 1e12, 1) for name, (_, rate) in products.items()}
        result["own_matmul_tflops"] = round(own.matmul / 1e12, 1)
        result.update(_floor("shape_", work, own, config, sequence_length, shapes, share))
    result["seconds"] = round(time.perf_counter() - began, 1)
    torch.cuda.empty_cache()
    return result


def _floor(
    prefix: str, work: Work, rates: Rates, config: Any, sequence_length: int, shapes: Any, tokens: float
) -> dict[str, Any]:
    seconds, peak = floor_seconds(work, rates), peak_flops(torch.device("cuda"))
    flops = flops_per_token(shapes, config, sequence_length)
    return {
        f"{prefix}step_ms": round(1e3 * seconds, 2),
        f"{prefix}tokens_per_second_per_device": round(tokens / seconds),
        f"{prefix}mfu": None if peak is None else round(flops * tokens / seconds / peak, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--optim-state-dtype", choices=OPTIMIZER_BYTES, default="float32")
    parser.add_argument("--shards", type=int, default=1, help="devices that share the optimizer's state")
    parser.add_argument("--fa4", action="store_true", help="also measure FlashAttention 4")
    cli = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("the floor is measured on a GPU, and there is none")
    config = make_config(cli.shape, cli.sequence_length)
    sizes = (cli.sequence_length, cli.micro_batch, cli.micro_batches)
    print(json.dumps(measure(config, *sizes, cli.optim_state_dtype, cli.shards, fa4=cli.fa4, seconds=60.0)))


if __name__ == "__main__":
    main()

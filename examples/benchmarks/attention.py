"""Speed of causal attention on one GPU, by kernel: whole rows, and rows packed with documents.

    python examples/benchmarks/attention.py

Prints one JSON object a line: forward and backward in TFLOP/s, which count what a token sees and no more (2 products of
the forward, 5 of the backward), and the seconds of the first call, in which kernels may be compiled. bf16.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from timing import measure as timed
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_nanotron.ops.attention import attention

SHAPES = ((8, 4096, 32, 8, 64), (1, 8192, 32, 8, 128), (2, 8192, 32, 8, 128))  # rows, tokens, heads, kv heads, features
MASK_LIMIT = 2**28  # elements of a mask: above, a row with it is left out


def measure(function: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median and spread (half of the range between the quartiles) in ms, and the seconds of the first call."""
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    return *timed(function, repeats), first


def report(name: str, shape: tuple[int, ...], call: Callable[[], torch.Tensor], flops: float, repeats: int) -> None:
    """Forward alone, and forward with backward, of `call`, whose output has a gradient."""
    line: dict[str, object] = {"kernel": name, "shape": shape}
    try:
        begin = time.perf_counter()
        grad = torch.randn_like(call())
        torch.cuda.synchronize()
        line["first_forward_s"] = round(time.perf_counter() - begin, 2)
        with torch.no_grad():
            forward, _, _ = measure(call, repeats)
        both, spread, first = measure(lambda: call().backward(grad), repeats)
        line |= {"ms": round(both, 3), "spread_ms": round(spread, 3), "forward_ms": round(forward, 3)}
        line |= {"tflops": round(3.5 * flops / both / 1e9, 1), "forward_tflops": round(flops / forward / 1e9, 1)}
        line["first_backward_s"] = round(first, 2)
    except Exception as error:  # a kernel that is not installed, or that this GPU lacks
        line["error"] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--document", type=int, default=1024, help="tokens of a document in packed rows")
    parser.add_argument("--repeats", type=int, default=12)
    args = parser.parse_args()
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}), flush=True)
    for shape in SHAPES:
        rows, length, heads, kv_heads, dim = shape
        q, k, v = (
            torch.randn(rows, length, n, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for n in (heads, kv_heads, kv_heads)
        )
        scale, flops = dim**-0.5, 2.0 * rows * heads * dim * length * length  # two products of half a square

        def sdpa(backend: SDPBackend, mask: torch.Tensor | None = None, q=q, k=k, v=v) -> torch.Tensor:  # type: ignore[no-untyped-def]
            with sdpa_kernel(backend):
                heads_first = [x.transpose(1, 2) for x in (q, k, v)]
                gqa = mask is None
                if mask is not None:  # as transformers does
                    heads_first[1:] = [x.repeat_interleave(q.shape[2] // k.shape[2], 1) for x in heads_first[1:]]
                found = F.scaled_dot_product_attention(*heads_first, mask, is_causal=mask is None, enable_gqa=gqa)
                return found.transpose(1, 2)

        def ours(kernel: str, bounds: torch.Tensor | None = None, q=q, k=k, v=v, scale=scale) -> torch.Tensor:  # type: ignore[no-untyped-def]
            longest = None if bounds is None else torch.tensor(args.document)
            return attention(q, k, v, kernel, scale, None, bounds, longest)

        for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
            report(f"sdpa, {name}", shape, lambda backend=backend: sdpa(backend), flops, args.repeats)
        report("fa4", shape, lambda: ours("fa4"), flops, args.repeats)

        bounds = torch.arange(0, rows * length + 1, args.document, device="cuda", dtype=torch.int32)
        seen = flops * args.document / length
        report("packed: flash", shape, lambda b=bounds: ours("flash", b), seen, args.repeats)
        report("packed: fa4", shape, lambda b=bounds: ours("fa4", b), seen, args.repeats)
        if rows * length * length <= MASK_LIMIT:
            document = torch.arange(length, device="cuda") // args.document
            mask = (document[:, None] == document[None, :]).tril()[None, None].expand(rows, 1, -1, -1).contiguous()
            report(
                "packed: sdpa, mask",
                shape,
                lambda m=mask: sdpa(SDPBackend.EFFICIENT_ATTENTION, m),
                seen,
                args.repeats,
            )


if __name__ == "__main__":
    main()

"""`hf-nanotron bench`: measure how fast this machine is, for `hf-nanotron plan`."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Measure what the seconds of a plan come from, and write it as JSON: matrix products, attention, memory, copies to the
host, and, under torchrun, collectives between the processes:

  torchrun --nproc-per-node 8 -m hf_nanotron.cli bench --rates rates.json
  hf-nanotron plan run.yaml --gpus 64 --rates rates.json

Start it on two hosts, as a run, to measure the network between them, too. It takes about a minute; let nothing else
run meanwhile. Without a GPU it measures the CPU."""


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """The parsed arguments get `run`, which takes them."""
    parser.add_argument("--rates", type=_new_file, required=True, metavar="OUT.json", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier file")
    parser.set_defaults(run=_bench, explains="the rates cannot be measured")


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file to write, such as {path / 'rates.json'}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent} to write {path.name} into")
    return path


def _bench(args: argparse.Namespace) -> None:
    from ..parallel.config import ParallelConfig
    from ..parallel.mesh import ParallelMesh
    from ..parallel.together import refuse_together
    from ..plan.default_rates import completed
    from ..plan.measure_rates import measure_rates

    mesh = ParallelMesh(ParallelConfig())
    is_first = mesh.rank == 0
    in_the_way = is_first and args.rates.exists() and not args.overwrite
    refuse_together(
        mesh, f"{args.rates} exists; add --overwrite to replace it, or name another file." if in_the_way else None
    )
    rates = measure_rates(mesh, lambda what: print(f"measuring {what}", flush=True) if is_first else None)
    mesh.close()
    if not is_first:
        return
    rates.write(args.rates)
    product = max(product.flops / product.seconds for product in rates.products)
    kernel = max(kernel.backward for kernel in rates.attention)
    print(
        f"{rates.made['device']}: products up to {product / 1e12:,.3g} TFLOP/s, attention {kernel / 1e12:,.3g}, "
        f"memory {rates.memory / 1e9:,.3g} GB/s"
    )
    for link in rates.links:
        print(
            f"{link.operation} of {link.ranks} ranks {'in a host' if link.place == 'inside' else 'of as many hosts'}: "
            f"{link.bytes_per_second / 1e9:,.3g} GB/s after {link.latency * 1e6:,.3g} us"
        )
    places = {"inside": "between GPUs of a host", "between": "between hosts"}
    if missing := [words for place, words in places.items() if place not in {link.place for link in rates.links}]:
        is_known = len(completed(rates).links) > len(rates.links)
        instead = "takes those of the GPU's data sheet" if is_known else "that needs them is refused"
        print(f"not measured: links {' and '.join(missing)}; a plan {instead}")
    print(f"wrote {args.rates}")

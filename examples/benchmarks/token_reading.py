"""Tokens a second that one core reads: our rows and those of datatrove's reader, from the same file in one run.

    python examples/benchmarks/token_reading.py
    python examples/benchmarks/token_reading.py --tokens 200000000 --sequence-length 8192

Prints one JSON object: millions of tokens a second in order and shuffled, with and without positions that restart at
documents, packed, and through a mixture of 30 sets; seconds to the first batch of ten terabytes of sparse files. Rows
are tensors, a batch at a time, as a `DataLoader`'s worker makes them: three columns or four, where datatrove's have one
or two. Kinds are timed in turns, of which the first is not counted: then the file is in memory for all of them. Where
other processes take the core, it is the speed by this process's own time that counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_nanotron.data import Mixture, TokenDataset

SETS = 30
TERABYTES, FILES = 10, 500


def write(path: Path, tokens: int, median: float = 400, sigma: float = 1.2) -> None:
    """Random ids of two bytes, in documents of log-normal lengths."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.lognormal(np.log(median), sigma, int(tokens / median)).astype(np.int64), 1)
    ends = np.cumsum(lengths)
    ends = np.append(ends[ends < tokens], tokens)
    rng.integers(1, 50_000, tokens, dtype=np.uint16).tofile(path)
    ends.astype("<u8").tofile(f"{path}.index")


def by_batches(dataset: Any, order: Sequence[int], batch: int) -> Callable[[], int]:
    """Reads all of `order`, and says how many tokens that were."""

    def read() -> int:
        rows = 0
        for first in range(0, len(order), batch):
            rows += len(dataset.__getitems__(order[first : first + batch]))
        return rows * dataset[0]["input_ids"].numel()

    return read


def one_by_one(dataset: Any, order: Sequence[int]) -> Callable[[], int]:
    """The same, of a reader that has no batches."""
    return lambda: sum(dataset[number]["input_ids"].numel() for number in order)


def anonymous_megabytes() -> int:
    """Memory of this process that is no file's."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))) // 1024


def first_batch(folder: Path, length: int, batch: int) -> float:
    """Seconds from nothing to a batch of shuffled rows with positions, of ten terabytes."""
    for number in range(FILES):
        with open(folder / f"{number:03d}.ds", "wb") as file:
            file.truncate(TERABYTES * 10**12 // FILES)
        with open(folder / f"{number:03d}.ds.index", "wb") as file:
            file.truncate(TERABYTES * 10**12 // FILES // 2 // 400 * 8)
    start = time.perf_counter()
    dataset = TokenDataset(folder, length, token_size=2, documents="mask")
    dataset.__getitems__(range(batch))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=40_000_000)
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--peer-rows", type=int, default=60, help="shuffled, with positions: datatrove's slow case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    length, batch = args.sequence_length, args.batch
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.ds"
        write(path, args.tokens)

        def ours(**options: Any) -> Callable[[], int]:
            dataset = TokenDataset(path, length, token_size=2, **options)
            return by_batches(dataset, range(len(dataset)), batch)

        sets = {f"{n}": TokenDataset(path, length, token_size=2, documents="mask", seed=n) for n in range(SETS)}
        mixture = Mixture(sets, np.random.default_rng(1).dirichlet(np.ones(SETS)), max_epochs=None)
        kinds = {
            "in order": ours(shuffle=False),
            "shuffled": ours(),
            "in order, positions": ours(shuffle=False, documents="mask"),
            "shuffled, positions": ours(documents="mask"),
            "packed, shuffled, positions": ours(documents="pack"),
            f"mixture of {SETS}, shuffled, positions": by_batches(mixture, range(args.tokens // length), batch),
        }
        try:
            from datatrove.utils.dataset import DatatroveFileDataset
        except ImportError:
            print("datatrove is not installed: its reader is not timed")
        else:
            plain, positions = (DatatroveFileDataset(str(path), length, 2, return_positions=p) for p in (False, True))
            shuffled = np.random.default_rng(0).permutation(len(plain)).tolist()
            kinds |= {
                "datatrove, in order": one_by_one(plain, range(len(plain))),
                "datatrove, shuffled": one_by_one(plain, shuffled),
                "datatrove, in order, positions": one_by_one(positions, range(len(positions))),
                "datatrove, shuffled, positions": one_by_one(positions, shuffled[: args.peer_rows]),
            }
        totals = {kind: [0, 0.0, 0.0] for kind in kinds}  # tokens, seconds of this process, seconds
        before = anonymous_megabytes()
        for turn in range(args.turns + 1):
            for kind, read in kinds.items():
                process, start = time.process_time(), time.perf_counter()
                tokens = read()
                if turn:
                    found = (tokens, time.process_time() - process, time.perf_counter() - start)
                    totals[kind] = [total + one for total, one in zip(totals[kind], found, strict=True)]
        grown = anonymous_megabytes() - before
        folder = Path(name) / "large"
        folder.mkdir()
        seconds = first_batch(folder, length, batch)
    result = {
        "million tokens/s of one core": {kind: round(n / cpu / 1e6, 2) for kind, (n, cpu, _) in totals.items()},
        "million tokens/s as it was": {kind: round(n / wall / 1e6, 2) for kind, (n, _, wall) in totals.items()},
        "seconds to the first batch of 10 TB": round(seconds, 3),
        "MB taken by reading": grown,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""`hf-nanotron data inspect`: what is in files of tokens, on the terminal, as JSON, and as a picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import explained
from .plotting import check_picture

if TYPE_CHECKING:
    from ..data.inspection import Inspection

WIDTH = 40  # characters of the longest bar
SHOWN_CHARACTERS = 1000


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """The parsed arguments get `run`, which takes them."""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="files (.ds, .bin with .idx, .npy), folders, patterns or Megatron's prefixes, local or by URL",
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="decodes documents (default: the one that the files name)")
    parser.add_argument(
        "--sequence-length", type=int, metavar="N", help="tokens of a row, to estimate what packing would waste"
    )
    parser.add_argument(
        "--sample", type=int, default=1, metavar="N", help="documents to show as text (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of documents")
    parser.add_argument(
        "--histogram", type=Path, metavar="OUT.png", help="draw the lengths (pip install hf-nanotron[plot])"
    )
    parser.add_argument("--json", action="store_true", help="print all as one JSON object")
    parser.add_argument(
        "--token-size", type=int, choices=(1, 2, 4, 8), help="bytes of an id, where the files do not say it"
    )
    parser.add_argument(
        "--eos-token-id", type=int, metavar="ID", help="ends documents, where the files do not say where they end"
    )
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    if args.histogram is not None:
        check_picture("--histogram", args.histogram)
    from ..data.inspection import inspect_tokens

    found = inspect_tokens(
        args.paths,
        tokenizer=args.tokenizer,
        sequence_length=args.sequence_length,
        samples=args.sample,
        seed=args.seed,
        token_size=args.token_size,
        eos_token_id=args.eos_token_id,
    )
    print(json.dumps(found.to_dict(), indent=1) if args.json else as_text(found))
    if args.histogram is not None:
        with explained(f"--histogram {args.histogram} cannot be drawn"):
            draw(found, args.histogram)


def as_text(found: Inspection) -> str:
    """What the terminal shows."""
    size = "mixed" if len(found.token_sizes) > 1 else f"{found.token_sizes[0]} bytes"
    lines = [
        f"files       {found.files:,}" + (f", {found.losses:,} with .loss" if found.losses else ""),
        f"tokens      {found.tokens:,} ({size} each, {found.bytes / 2**30:.2f} GiB)",
        f"tokenizer   {found.tokenizer or 'not named'}",
        f"documents   {'unknown' if found.documents is None else f'{found.documents:,}'}",
    ]
    if found.percentiles:
        p = found.percentiles
        lines += [
            f"lengths     shortest {found.shortest:,}, median {p[50]:,.0f}, mean {found.mean:,.1f}, "
            f"longest {found.longest:,} tokens",
            f"            25 % {p[25]:,.0f}, 75 % {p[75]:,.0f}, 95 % {p[95]:,.0f}, 99 % {p[99]:,.0f}",
        ]
    if (packing := found.packing) is not None:
        lines.append(
            f"packing     at {packing.sequence_length:,}: {packing.rows:,} rows, {packing.waste:.2%} empty; "
            f"{packing.longer:.2%} of the documents are longer than a row. Cut instead: {packing.cut_rows:,} rows"
        )
    if found.histogram:
        most = max(count for _, _, count in found.histogram)
        ranges = [f"{low:,}" if high - low <= 1 else f"{low:,} to {high - 1:,}" for low, high, _ in found.histogram]
        width = max(map(len, ranges))
        lines += ["", "tokens of a document"]
        for text, (_, _, count) in zip(ranges, found.histogram, strict=True):
            bar = "#" * (-(-count * WIDTH // most))
            lines.append(f"  {text:>{width}}  {count:>12,}  {bar}".rstrip())
    for sample in found.samples:
        where = f"document {sample.number:,} of {sample.file}" if sample.number >= 0 else f"tokens of {sample.file}"
        trained = "" if sample.trained is None else f", {sample.trained:.0%} trained on"
        text = " ".join(map(str, sample.ids[:64])) if sample.text is None else sample.text[:SHOWN_CHARACTERS]
        more = " ..." if sample.length > len(sample.ids) or (sample.text or "")[SHOWN_CHARACTERS:] else ""
        lines += ["", f"--- {where}: {sample.length:,} tokens{trained}", f"{text}{more}"]
    lines += [*([""] if found.notes else []), *(f"note: {note}" for note in found.notes)]
    return "\n".join(lines)


def draw(found: Inspection, path: Path) -> None:
    """The histogram as a picture, in bins of powers of two."""
    import matplotlib

    matplotlib.use("Agg")  # draws files; needs no display
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    lows = [max(low, 0.5) for low, _, _ in found.histogram]
    widths = [max(high, 1) - low for low, (_, high, _) in zip(lows, found.histogram, strict=True)]
    axes.bar(lows, [count for _, _, count in found.histogram], widths, align="edge", edgecolor="white")
    axes.set_xscale("log", base=2)
    if found.packing is not None:
        axes.axvline(found.packing.sequence_length, color="black", linestyle="--", label="sequence length")
        axes.legend()
    axes.set(xlabel="tokens of a document", ylabel="documents" + (" (of a sample)" if found.is_sample else ""))
    figure.savefig(path, dpi=150)
    plt.close(figure)

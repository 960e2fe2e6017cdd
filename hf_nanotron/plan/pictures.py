"""A picture of a plan: what each pipeline rank does during a step, and what fills its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .result import GIB, Plan, parts, usable_bytes
from .step_time import Interval
from .table import share

# Of Okabe and Ito's palette, whose colours people with any colour vision tell apart; hatches tell them apart in grey.
KINDS = {
    "forward": ("#56B4E9", ""),
    "backward": ("#E69F00", ""),
    "weight gradients": ("#009E73", ""),
    "gather": ("#CC79A7", "////"),
    "reduce": ("#D55E00", "\\\\\\\\"),
    "optimizer": ("#F0E442", "...."),
}
KIND_NAMES = {"gather": "gather weights", "reduce": "reduce gradients"}
IDLE = "#EEEEEE"
MEMORY = {
    "parameters": "#0072B2",
    "gradients": "#56B4E9",
    "masters": "#009E73",
    "moments": "#F0E442",
    "activations": "#E69F00",
    "buffers": "#CC79A7",
    "average": "#999999",
}
MOST_RANKS = 64  # rows of each panel
LEAST_NUMBERED = 0.008  # width of an interval, of the whole step, in which its micro-batch is written
WIDTH = 13.0  # inches


def draw(plan: Plan, path: Path) -> None:
    """Write a picture, as SVG, PNG or PDF by the ending of `path`.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")  # draws files; needs no display
    import matplotlib.pyplot as plt

    ranks = sorted({interval.rank for interval in plan.step.timeline})[:MOST_RANKS]
    shown = plan.ranks[:MOST_RANKS]
    heights = (1.3 + 0.32 * len(ranks), 1.3 + 0.26 * len(shown))
    # Texts stay texts, to be searched and read aloud.
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9, "hatch.linewidth": 0.4}):
        figure, panels = plt.subplots(
            2, 1, figsize=(WIDTH, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
        )
        _draw_step(panels[0][0], plan, ranks)
        _draw_memory(panels[1][0], plan)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        plt.close(figure)


def _draw_step(axes: Any, plan: Plan, ranks: list[int]) -> None:
    from matplotlib.patches import Patch

    row = {rank: index for index, rank in enumerate(ranks)}
    end = max(interval.end for interval in plan.step.timeline)
    axes.barh(list(row.values()), [end] * len(ranks), left=0, height=0.8, color=IDLE)
    used: dict[str, None] = {}
    for interval in plan.step.timeline:
        if interval.rank in row:
            used[interval.kind] = None
            _bar(axes, interval, row[interval.rank], end)
    layout = plan.layout
    schedule = f", {layout['pp_schedule']}" if "pp_schedule" in layout else ""
    count = 1 + max(interval.micro_batch for interval in plan.step.timeline)
    what = (
        "one step" if count == plan.job.micro_batches else f"{count} of a step's {plan.job.micro_batches} micro-batches"
    )
    axes.set(
        title=f"{what}: {plan.step_seconds:.3g} s, MFU {share(plan.mfu)}, bubble {plan.step.bubble:.1%}{schedule}",
        xlabel="seconds", xlim=(0, end), ylim=(len(ranks) - 0.4, -0.6),
        yticks=list(row.values()), yticklabels=[f"pp rank {rank}" for rank in ranks],
    )  # fmt: skip
    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="#333333", label=KIND_NAMES.get(kind, kind))
        for kind, (colour, hatch) in KINDS.items()
        if kind in used
    ]
    handles.append(Patch(facecolor=IDLE, edgecolor="#333333", label="idle"))
    _legend(axes, handles)


def _bar(axes: Any, interval: Interval, row: int, end: float) -> None:
    colour, hatch = KINDS[interval.kind]
    length = interval.end - interval.start
    edge = "white" if length > 0.002 * end else "none"
    axes.barh(
        row, length, left=interval.start, height=0.8, color=colour, hatch=hatch, edgecolor=edge, linewidth=0.4,
        alpha=max(0.5, 1 - 0.2 * max(0, interval.chunk)), zorder=2,
    )  # fmt: skip
    if interval.micro_batch >= 0 and length > LEAST_NUMBERED * end:
        axes.text(
            interval.start + length / 2, row, str(interval.micro_batch), ha="center", va="center", fontsize=7, zorder=4
        )


def _draw_memory(axes: Any, plan: Plan) -> None:
    shown = plan.ranks[:MOST_RANKS]
    left = [0.0] * len(shown)
    for name, colour in MEMORY.items():
        sizes = [parts(rank.memory)[name] / GIB for rank in shown]
        if any(sizes):
            axes.barh(
                range(len(shown)),
                sizes,
                left=left,
                height=0.75,
                color=colour,
                edgecolor="white",
                linewidth=0.6,
                label=name,
            )
            left = [before + size for before, size in zip(left, sizes, strict=True)]
    usable, whole = usable_bytes(plan.gpu) / GIB, plan.gpu.bytes_ / GIB
    axes.axvline(usable, color="#D55E00", linewidth=1.6, linestyle="--", label=f"may take ({usable:.0f} GiB)")
    axes.axvline(whole, color="#000000", linewidth=1.2, label=f"{plan.gpu.name} ({whole:.0f} GiB)")
    fits = "fits" if plan.fits else "does not fit"
    labels = [
        f"rank {each.role.rank}" + (f" ({each.role.count} alike)" if each.role.count > 1 else "") for each in shown
    ]
    axes.set(
        title=f"memory by rank: {plan.peak_memory_gib:.1f} GiB on the fullest, {fits}", xlabel="GiB",
        xlim=(0, 1.03 * max(whole, *left)), ylim=(len(shown) - 0.4, -0.6),
        yticks=range(len(shown)), yticklabels=labels,
    )  # fmt: skip
    _legend(axes, None)


def _legend(axes: Any, handles: Any) -> None:
    options = {"loc": "upper left", "bbox_to_anchor": (1.005, 1.0), "frameon": False, "borderaxespad": 0.0}
    axes.legend(**options) if handles is None else axes.legend(handles=handles, **options)

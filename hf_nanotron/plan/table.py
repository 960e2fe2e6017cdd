"""A plan as text: what a terminal shows."""

from __future__ import annotations

from collections.abc import Sequence

from .result import GIB, Plan, RankPlan, parts, usable_bytes
from .search import Found

ROWS = 24  # of the table of memory; a longer one has the fullest of each pipeline rank


def as_text(plan: Plan) -> str:
    """All that a plan says, without a picture."""
    sections = [_head(plan), _memory(plan), _fit(plan), _time(plan), _agreement(plan), _run(plan)]
    return "\n\n".join(section for section in sections if section)


def ranking(found: Found) -> str:
    """The best layouts of a search, fastest first."""
    best = found.best[0]
    head = ["", "tp", "cp", "pp", "dp", "ep", "zero", "copies", "micro-batch", "steps", "recompute", "schedule", "GiB",
            "s/step", "MFU", "bubble", "exposed", "why"]  # fmt: skip
    rows = []
    for number, each in enumerate(found.best, 1):
        layout = each.layout
        schedule = layout.get("pp_schedule", "")
        if layout.get("pp_virtual_stages", 1) > 1:
            schedule += f" x{layout['pp_virtual_stages']}"
        rows.append([
            str(number), *(str(layout[f"{axis}_size"]) for axis in ("tp", "cp", "pp", "dp", "ep")),
            str(layout["zero_stage"]), str(layout["dp_replicate_size"]), str(layout["per_device_train_batch_size"]),
            str(layout["gradient_accumulation_steps"]), layout.get("activation_checkpointing_policy", "none"),
            schedule or "-", f"{each.memory.total / GIB:.1f}", seconds(each.step.seconds), share(each.step.mfu),
            f"{each.step.bubble:.1%}", seconds(each.step.exposed_communication), each.why(best),
        ])  # fmt: skip
    said = (
        f"{found.looked_at:,} layouts and micro-batches, of which {found.fit:,} fit; the best {len(found.best)} by "
        "arithmetic, each with the cheapest recomputation that fits:"
    )
    faster = "".join(f"\nA faster one is not among them: {reason}" for reason in found.refused)
    return f"{said}{faster}\n\n{_columns([head, *rows], left=(0, 10, 11, 17))}"


def _head(plan: Plan) -> str:
    job, layout = plan.job, plan.layout
    sizes = " x ".join(f"{axis} {layout[f'{axis}_size']}" for axis in ("tp", "cp", "pp", "dp"))
    nodes = job.world_size // job.gpus_per_node
    hosts = f"{nodes} nodes of {job.gpus_per_node}" if nodes > 1 else "one node"
    rest = [
        f"{name} {value}" for name, value in layout.items() if name not in ("tp_size", "cp_size", "pp_size", "dp_size")
    ]
    return (
        f"{job.config.model_type} on {job.world_size} {plan.gpu.name} ({hosts}): {sizes}\n"
        f"{', '.join(rest)}\n"
        f"a step: {job.tokens_per_step:,} tokens in rows of {job.sequence_length:,}"
    )


def _memory(plan: Plan) -> str:
    used = [name for name in parts(plan.ranks[0].memory) if any(parts(rank.memory)[name] for rank in plan.ranks)]
    has_host = any(rank.memory.host for rank in plan.ranks)
    head = ["rank", "ranks alike", "pp", *used, "total", *(["host"] if has_host else [])]
    rows = []
    for rank in _shown(plan.ranks):
        sizes = parts(rank.memory)
        numbers = [*(sizes[name] for name in used), rank.memory.total, *([rank.memory.host] if has_host else [])]
        rows.append([
            str(rank.role.rank), str(rank.role.count), str(rank.role.coordinates.pp),
            *(f"{number / GIB:.2f}" for number in numbers),
        ])  # fmt: skip
    note = "" if len(rows) == len(plan.ranks) else ", the fullest of each pipeline rank"
    return f"memory by rank, GiB{note}:\n\n{_columns([head, *rows])}"


def _shown(ranks: Sequence[RankPlan]) -> Sequence[RankPlan]:
    if len(ranks) <= ROWS:
        return ranks
    fullest: dict[int, RankPlan] = {}
    for rank in ranks:
        stage = rank.role.coordinates.pp
        if stage not in fullest or rank.memory.total > fullest[stage].memory.total:
            fullest[stage] = rank
    return list(fullest.values())


def _fit(plan: Plan) -> str:
    usable, whole = usable_bytes(plan.gpu) / GIB, plan.gpu.bytes_ / GIB
    peak = plan.peak_memory_gib
    room = f"{usable:.1f} GiB of {plan.gpu.name}'s {whole:.1f} that a run may take"
    if plan.fits:
        return f"It fits: {peak:.1f} GiB on the fullest rank ({plan.fullest.role.rank}), of the {room}."
    said = f"It does not fit: {peak:.1f} GiB on the fullest rank ({plan.fullest.role.rank}), more than the {room}."
    if plan.change is None:
        return f"{said}\nNo change of a few arguments makes it fit: --search tries other layouts, or use more GPUs."
    return (
        f"{said}\nThe cheapest change that fits: {plan.change} "
        f"({plan.change.peak_memory_gib:.1f} GiB, {seconds(plan.change.step_seconds)} a step)."
    )


def _time(plan: Plan) -> str:
    step = plan.step
    rows = [[name.replace("_", " "), seconds(part), f"{part / step.seconds:.1%}"] for name, part in step.parts.items()]
    rows.append(["step", seconds(step.seconds), ""])
    waits = seconds(step.exposed_communication)
    return (
        f"time of a step, by rates {plan.rates.source}:\n\n{_columns(rows, left=(0,))}\n\n"
        f"MFU {share(step.mfu)}, bubble {step.bubble:.1%}, exposed communication {waits}; "
        f"{plan.tokens_per_second:,.0f} tokens/s, {step.tokens_per_second_per_device:,.0f} on a GPU"
        + ("" if plan.not_measured is None else f"\n{plan.not_measured}")
    )


def _agreement(plan: Plan) -> str:
    if plan.faults is None:
        return ""
    if not plan.faults:
        return "No deadlock: every group of ranks sees one sequence of collectives and sizes, and sends match receives."
    return "\n".join(["It would hang:", *(f"- {fault}" for fault in plan.faults)])


def _run(plan: Plan) -> str:
    if plan.hours is None or plan.gpu_hours is None or plan.steps is None:
        return ""
    tokens = plan.steps * plan.job.tokens_per_step
    days = f" ({plan.hours / 24:,.1f} days)" if plan.hours >= 48 else ""
    return (
        f"{plan.steps:,} steps, {tokens:,} tokens: {plan.hours:,.2f} hours{days}, {plan.gpu_hours:,.1f} GPU hours, "
        "without evaluations, saves and restarts"
    )


def seconds(value: float) -> str:
    """A time, in the unit that suits it."""
    if value >= 0.9995:
        return f"{value:.2f} s"
    return f"{value * 1e3:.1f} ms" if value >= 1e-5 else "0"


def share(value: float | None) -> str:
    """A fraction in percent, or that there is none."""
    return "unknown" if value is None else f"{value:.1%}"


def _columns(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )  # fmt: skip

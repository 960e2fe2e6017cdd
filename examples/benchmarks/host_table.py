"""What `one_host.py` reports of its results: a table for the documentation, and whether the layouts agree."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from figures import percent

Result = Mapping[str, Any]
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-3}  # of first losses, relative: fp32 on CPUs, bf16 on GPUs
TOO_FAR = "too far apart"
NUMBERS = {1: "one", 2: "two", 4: "four", 8: "eight"}


def ran(result: Result) -> bool:
    return "tokens_per_second_per_device" in result


def latest(results: Sequence[Result]) -> dict[tuple[str, str], Result]:
    """The last result of each row, by shape and name; one that ran stands against later ones that did not."""
    found: dict[tuple[str, str], Result] = {}
    for result in results:
        key = (result["shape"], result["name"])
        if ran(result) or not ran(found.get(key, {})):
            found[key] = result
    return found


def samples_per_step(result: Result) -> int:
    return int(result["micro_batch"] * result["micro_batches"] * result["dp"])


def gpus(result: Result) -> int:
    return int(result["dp"] * result["tp"] * result["pp"])


def exposed(result: Result) -> float | None:
    """The share of the traced steps in which the first rank communicated and computed nothing; None if untraced."""
    overlap = result.get("overlap") or {}
    if not overlap.get("span_ms"):
        return None
    return float(sum(kind["exposed_ms"] for kind in overlap["collectives"].values()) / overlap["span_ms"])


def idle(result: Result) -> float | None:
    """The share of the traced steps in which no kernel ran on the first rank; None if untraced."""
    overlap = result.get("overlap") or {}
    return float(overlap["idle_ms"] / overlap["span_ms"]) if overlap.get("span_ms") else None


def table(results: Sequence[Result]) -> str:
    """Results as Markdown: for each model a line on machine, versions and date, and a table of its layouts."""
    models: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    failed: list[Result] = []
    for result in latest(results).values():
        if ran(result):
            setting = (result["shape"], result["sequence_length"], samples_per_step(result), gpus(result))
            models[*setting, result["device"], result["date"]].append(result)
        else:
            failed.append(result)
    smaller = {(result["shape"], result["name"]) for result in results if "out_of_memory" in result}
    parts = []
    for (shape, length, samples, count, device, date), rows in models.items():
        versions: dict[str, str] = {}
        for row in rows:
            versions |= row["versions"]
        software = ", ".join(f"{name} {version}" for name, version in versions.items())
        steps = " or ".join(sorted({f"{row['warmup_steps']} + {row['timed_steps']}" for row in rows}))
        parts.append(
            f"`{shape}`, sequence {length:,}, {samples * length:,} tokens a step. {date}, {NUMBERS.get(count, count)} "
            f"{device} of one host, {software}. Steps: {steps} (warm-up + timed).\n\n"
            "| layout | micro-batches | tokens/s per GPU | range | MFU | peak memory | communication exposed | idle | "
            "first loss |\n|---|---|---|---|---|---|---|---|---|\n" + "\n".join(_line(row, smaller) for row in rows)
        )
    if failed:
        lines = [f"| {row['name']} | {_reason(row)} |" for row in failed]
        parts.append("\n".join(["| without figures | why |", "|---|---|", *lines]))
    return "\n\n".join(parts)


def _line(row: Result, smaller: set[tuple[str, str]]) -> str:
    low, high = row["spread"]
    mark = " (larger ones: out of memory)" if (row["shape"], row["name"]) in smaller else ""
    peak = row.get("peak_memory_gib")
    cells = [
        row["name"],
        f"{row['micro_batches']} of {row['micro_batch']}{mark}",
        f"{row['tokens_per_second_per_device']:,}",
        f"{low:,} – {high:,}",
        percent(row.get("mfu")),
        "" if peak is None else f"{peak} GiB",
        percent(exposed(row)),
        percent(idle(row)),
        f"{row['first_loss']:.5f}",
    ]
    return f"| {' | '.join(cells)} |"


def _reason(row: Result) -> str:
    text = "out of memory" if "out_of_memory" in row else str(row.get("error", "no figures"))
    return text.replace("|", "/").replace("\n", " ")[:160]


def loss_differences(results: Sequence[Result]) -> list[str]:
    """How far the layouts of a model are apart in their first and last losses, a line for each model.

    Only of rows that read the same samples: of our trainer, with as many samples a step and as many steps.
    """
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for row in latest(results).values():
        if ran(row) and row["row"].get("trainer", "nanotron") == "nanotron":
            setting = (row["shape"], row["sequence_length"], samples_per_step(row), row["steps"])
            groups[*setting, row["device"] == "cpu"].append(row)
    lines = []
    for (shape, *_, on_cpu), rows in groups.items():
        if len(rows) < 2:
            continue
        first, last = (_relative([row[key] for row in rows]) for key in ("first_loss", "last_loss"))
        limit = TOLERANCE["cpu" if on_cpu else "cuda"]
        verdict = "as they should" if first <= limit else TOO_FAR
        lines.append(
            f"losses of {len(rows)} layouts of {shape}: the last ones differ by at most {last:.1e} (relative), the "
            f"first ones by {first:.1e} (allowed: {limit:.0e}): {verdict}"
        )
    return lines


def _relative(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / max(abs(value) for value in values)

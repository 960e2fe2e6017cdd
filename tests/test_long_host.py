"""The rows of long_host.py: that they fit, and what they hand to the script that runs them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmark_scripts import scripts


@pytest.fixture(scope="module")
def bench() -> Iterator[argparse.Namespace]:
    with scripts(["long_host", "rows", "throughput"]) as modules:
        yield modules


def options(bench: argparse.Namespace, *texts: str) -> argparse.Namespace:
    cli = bench.long_host.make_parser().parse_args(texts)
    cli.shape = cli.shape or ("8b-10" if cli.gpus == 2 else "8b")
    return cli


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_rows_fit_and_are_what_they_are_called(bench: argparse.Namespace, gpus: int) -> None:
    cli = options(bench, "--gpus", str(gpus))
    for item in bench.long_host.plan(bench.long_host.chosen(cli), cli):
        assert item.fits, item.row.name
        fields = bench.rows.parse_row(item.text(1))
        assert fields["cp_size"] == item.row.cp_size and gpus % item.row.cp_size == 0
        length, _, size = item.row.name.split()[:3]
        assert item.tokens == int(length[:-1]) * (2**20 if length.endswith("M") else 2**10)
        assert item.row.cp_size == int(size) and ("packed" in item.row.name) == ("documents" in fields)
        assert item.row.peer or fields["cp_mode"] == "heads" or "gather" in item.row.name


def test_a_budget_leaves_out_and_a_second_call_goes_on(
    bench: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are in the file are not run again; those that would not end are not begun."""
    out = tmp_path / "rows.jsonl"
    cli = options(bench, "--gpus", "8", "--budget", "120", "--out", str(out))
    first = bench.long_host.ROWS[0].name
    out.write_text(json.dumps({"name": first, "tokens_per_second_per_device": 1}) + "\n")
    begun: list[str] = []
    monkeypatch.setattr(
        bench.throughput, "run_apart", lambda texts, *_: begun.append(bench.rows.parse_row(texts[0])["name"])
    )
    plans = bench.long_host.plan(bench.long_host.chosen(cli), cli)
    bench.long_host.run(plans, cli, bench.long_host.time.perf_counter())
    short = [item.row.name for item in plans if item.seconds < 99]
    assert first not in begun and set(begun) == set(short) - {first}
    problems = {row["name"]: row["error"] for row in bench.long_host.read(out)[1:]}
    assert problems["1M cp 8 heads"].startswith("not begun: it takes about")
    assert "| 1M cp 8 heads | | not begun" in bench.long_host.table(bench.long_host.read(out)[1:])


def test_the_table_of_a_dry_run(bench: argparse.Namespace) -> None:
    """A CPU has no peak, so no MFU, and no peak memory."""
    row = {"name": "32k cp 2 gather", "sequence_length": 32, "tokens_per_second_per_device": 140, "spread": [47, 234]}
    lines = bench.long_host.table([{**row, "mfu": None}, {**row, "name": "measured", "mfu": 0.4567}]).splitlines()
    assert lines[2:] == [
        "| 32k cp 2 gather | 32 | 140 | 47 – 234 |  |  |  |",
        "| measured | 32 | 140 | 47 – 234 | 45.7% |  |  |",
    ]


def test_a_row_that_is_not_there(bench: argparse.Namespace) -> None:
    with pytest.raises(ValueError, match="--only '64k': no row for 4 GPUs; there are 128k cp 4 heads"):
        bench.long_host.chosen(options(bench, "--gpus", "4", "--only", "64k"))

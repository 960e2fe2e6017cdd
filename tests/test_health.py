"""The check of devices and links before the first step: what is odd is named, and only that."""

from __future__ import annotations

import logging
from typing import Any
from unittest import mock

import pytest
import torch
from pool import WorkerPool
from tiny import checkpoint, pad_batch, random_dataset, training_arguments

from hf_nanotron.monitor import health
from hf_nanotron.monitor.health import Odd, find_odd, rounds


def figures(**changed: list[float]) -> dict[str, list[float]]:
    return {"products": [7e14] * 4, "memory": [4e12] * 4, "checksum": [1.0] * 4, **changed}


def test_what_is_odd() -> None:
    links = {("inside", 0, 1): 2e11, ("inside", 2, 3): 1.9e11, ("between", 0, 2): 4e10, ("between", 1, 3): 1e10}
    assert find_odd(figures(), {**links, ("between", 1, 3): 4e10}) == []
    assert find_odd(figures(), links) == [Odd("between", (1, 3), 1e10, 4e10)]
    (odd,) = find_odd(figures(products=[7e14, 7.1e14, 5e14, 6.9e14]), {})
    assert str(odd) == "rank 2: products at 500 TFLOP/s, the median is 700"
    (odd,) = find_odd(figures(memory=[1e12, 4e12, 4e12, 4e12]), {})
    assert str(odd) == "rank 0: copies on the device at 1e+03 GB/s, the median is 4e+03"
    (odd,) = find_odd(figures(checksum=[1.0, 1.0, 2.0, 1.0]), {})
    assert odd.ranks == (2,) and "another result" in str(odd)
    (odd,) = find_odd({name: rates[:2] for name, rates in figures(checksum=[1.0, 2.0]).items()}, {})
    assert odd.ranks == (0, 1) and "none is that of most" in str(odd)
    assert "the link of ranks 1 and 3 (between hosts): 10 GB/s, the median is 40" in str(find_odd(figures(), links)[0])


@pytest.mark.parametrize("places", [[2], [4, 4], [3, 3, 3], [8], [1, 1, 1, 1], [1], [2, 3]])
def test_every_neighbour_is_tried_once(places: list[int]) -> None:
    """Neighbours on a host and of a place on hosts, in rounds in which no rank has two partners."""
    ranks = [(float(host), float(local)) for host, count in enumerate(places) for local in range(count)]
    seen = set()
    for kind, pairs in rounds(ranks):
        members = [rank for pair in pairs for rank in pair]
        assert len(members) == len(set(members))
        for a, b in pairs:
            assert (ranks[a][0] == ranks[b][0]) == (kind == "inside")
            assert kind == "inside" or ranks[a][1] == ranks[b][1]
            assert (a, b) not in seen
            seen.add((a, b))
    linked = {rank for pair in seen for rank in pair}
    assert linked == set(range(len(ranks))) or len(ranks) == 1


def checked(directory: str, slow: int) -> tuple[list[str], list[Odd]]:
    """A run whose rank `slow` multiplies slowly: what is logged, and what is odd."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    args = NanotronTrainingArguments(**training_arguments(max_steps=1, health_check=True))
    seconds_of = health._seconds_of

    def slowed(call: Any, device: torch.device, lasting: float) -> float:
        seconds = seconds_of(call, device, lasting)
        return seconds * (1e4 if args.process_index == slow and lasting == health.SIZES["cpu"].seconds else 1.0)

    found: list[list[Odd]] = []
    whole = health.check_health

    def kept(mesh: Any) -> list[Odd]:
        found.append(whole(mesh))
        return found[-1]

    # Two processes on two cores that others use, too: memory and links vary.
    limits = {"products": 0.005, "memory": 0.0, "inside": 0.0, "between": 0.0}
    health.logger.addHandler(handler)
    with (
        mock.patch.object(health, "_seconds_of", slowed),
        mock.patch.object(health, "SLOW", limits),
        mock.patch("hf_nanotron.trainer.check_health", kept),
    ):
        trainer = NanotronTrainer(
            model=ParallelAuto.from_pretrained(directory, parallel=args.parallel),
            args=args,
            train_dataset=random_dataset(4, 8),
            data_collator=pad_batch,
        )
        trainer.train()
    health.logger.removeHandler(handler)
    return lines, found[0]


def test_the_slow_rank_is_named(pool: WorkerPool) -> None:
    first, second = pool.run(2, checked, checkpoint(), 1)
    assert [odd.ranks for odd in first[1]] == [odd.ranks for odd in second[1]] == [(1,)]
    assert first[1][0].figure == "products"
    warned = [line for line in first[0] if line.startswith("health check: rank 1: products at")]
    assert len(warned) == 1 and not second[0]


def test_one_process_has_nothing_to_compare(pool: WorkerPool) -> None:
    ((lines, odd),) = pool.run(1, checked, checkpoint(), 0)
    assert odd == [] and not any("median is" in line for line in lines)

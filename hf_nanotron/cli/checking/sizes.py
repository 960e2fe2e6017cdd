"""Layouts of a few processes that stand for a large one, and a set of layouts that meets every axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from ...parallel.config import ParallelConfig

AXES = ("tp_size", "pp_size", "cp_size", "ep_size", "dp_replicate_size")
LARGEST = 4  # of an axis that is made smaller


@dataclass(frozen=True)
class Reduced:
    """What the small model has to fit: the most of each axis, over all layouts that run.

    Attributes:
        layers: decoder layers that the stages need.
        is_spectral: whether learning rates go by a base model of half the width.
    """

    tp_size: int
    ep_size: int
    layers: int
    is_spectral: bool = False

    @classmethod
    def of(cls, layouts: list[Layout], is_spectral: bool) -> Reduced:
        configs = [layout.parallel for layout in layouts]
        layers = max(sum(c.pp_layers_per_stage or (1,) * c.num_stages) for c in configs)
        return cls(max(c.tp_size for c in configs), max(c.ep_size for c in configs), layers, is_spectral)


@dataclass(frozen=True)
class Layout:
    """How a run is spread: `processes` by the sizes of `parallel`."""

    parallel: ParallelConfig
    processes: int

    @property
    def dp_size(self) -> int:
        return self.parallel.dp_size(self.processes)

    @property
    def name(self) -> str:
        """Such as `tp 2 pp 2 (1f1b) dp 2 (zero 1)`."""
        return " ".join(_words(self.parallel, self.dp_size)) or "one process"


def _words(parallel: ParallelConfig, dp: int) -> Iterator[str]:
    if parallel.tp_size > 1:
        yield f"tp {parallel.tp_size}" + ("" if parallel.sequence_parallel else " (whole sequences)")
    if parallel.pp_size > 1:
        chunks = f" x {parallel.pp_virtual_stages}" if parallel.pp_virtual_stages > 1 else ""
        yield f"pp {parallel.pp_size}{chunks} ({parallel.pp_schedule})"
    if parallel.cp_size > 1:
        yield f"cp {parallel.cp_size} ({parallel.cp_mode})"
    if parallel.ep_size > 1:
        yield f"ep {parallel.ep_size}"
    if dp > 1:
        yield f"dp {dp}"
    if dp * parallel.cp_size > 1:
        copies = f" x {parallel.dp_replicate_size}" if parallel.dp_replicate_size > 1 else ""
        yield f"(zero {parallel.zero_stage}{copies})"


def least_processes(parallel: ParallelConfig) -> int:
    """The fewest processes that a layout takes, with at least two data-parallel ranks."""
    for dp in range(2, 2 + parallel.ep_size * parallel.dp_replicate_size * 2):
        processes = dp * parallel.model_parallel_size
        try:
            parallel.expert_copies(processes)
        except ValueError:
            continue
        return processes
    return 2 * parallel.model_parallel_size  # which its own check refuses


def reduced(parallel: ParallelConfig, most: int) -> Layout:
    """The layout with the same axes, each as small as it takes to fit into `most` processes: 2 at least."""
    sizes = {axis: getattr(parallel, axis) for axis in AXES}
    small = _with(parallel, {axis: min(size, LARGEST) if size > LARGEST else size for axis, size in sizes.items()})
    while (layout := Layout(small, least_processes(small))).processes > most:
        axis = max(AXES, key=lambda name: getattr(small, name))
        if getattr(small, axis) <= 2:
            break
        small = _with(small, {axis: 2})
    if layout.processes > most and layout.processes // 2 >= small.model_parallel_size:
        with_one_replica = Layout(small, small.model_parallel_size)
        try:
            small.expert_copies(with_one_replica.processes)
            return with_one_replica
        except ValueError:
            return layout
    return layout


def _with(parallel: ParallelConfig, sizes: dict[str, int]) -> ParallelConfig:
    """`parallel` with other sizes; stages keep whether they are even."""
    stages = sizes.get("pp_size", parallel.pp_size) * parallel.pp_virtual_stages
    layers = parallel.pp_layers_per_stage
    if layers is not None:
        least = min(layers)
        layers = tuple(1 if count == least else 2 for count in layers[:stages])
    return replace(parallel, **sizes, pp_layers_per_stage=layers)  # type: ignore[arg-type]


def one_process(parallel: ParallelConfig) -> Layout:
    """Without any axis."""
    return Layout(ParallelConfig(zero_stage=parallel.zero_stage, sequence_parallel=parallel.sequence_parallel), 1)


def covering(has_experts: bool) -> list[Layout]:
    """Layouts of two to four processes that meet each axis, each schedule, each stage of ZeRO, and pairs of axes."""
    rows: list[tuple[int, dict[str, Any]]] = [
        (2, {"zero_stage": 0}),
        (2, {"zero_stage": 3}),
        (4, {"zero_stage": 1, "dp_replicate_size": 2}),
        (2, {"tp_size": 2, "sequence_parallel": False}),
        (4, {"tp_size": 2, "zero_stage": 2}),
        (2, {"pp_size": 2, "pp_schedule": "afab"}),
        (2, {"pp_size": 2, "pp_schedule": "zb"}),
        (2, {"pp_size": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2}),
        (4, {"pp_size": 2, "zero_stage": 1}),
        (4, {"tp_size": 2, "pp_size": 2}),
        (2, {"cp_size": 2, "cp_mode": "gather"}),
        (4, {"cp_size": 2, "cp_mode": "heads", "tp_size": 2}),
    ]
    if has_experts:
        rows += [(2, {"ep_size": 2}), (4, {"ep_size": 2, "tp_size": 2, "pp_size": 2})]
    plain = ParallelConfig()
    return [Layout(replace(plain, **sizes), processes) for processes, sizes in rows]


def as_arguments(parallel: ParallelConfig) -> dict[str, Any]:
    """The fields of the training arguments that say this layout."""
    values = {entry.name: getattr(parallel, entry.name) for entry in fields(ParallelConfig)}
    layers = values["pp_layers_per_stage"]
    return {**values, "pp_layers_per_stage": None if layers is None else list(layers)}

"""ZeRO stage 3: weights, gradients, masters and optimizer state all live divided over the data-parallel ranks.

Rajbhandari et al. 2020, arXiv:1910.02054; the machinery is `fully_shard` of torch (FSDP2; Zhao et al. 2023,
arXiv:2304.11277), of which only the public interface is used, and no part of it that differs between torch 2.11 and
2.14.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..collectives import all_gather
from ..mesh import Group, ParallelMesh
from ..shard_spec import ShardSpec
from .buckets import rest_group, shard_group, spans_stages
from .segment import Segment, nothing


class _Root(nn.Module):
    """The root of the model for `fully_shard`, so that all units share its streams.

    Stages run the layers and never call the model as a module, so it cannot be the root itself, and the first unit to
    run would become the root of itself alone. Calling this once, before any unit runs, fixes that: units then run in
    any order, in training and evaluation.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, nothing: None) -> None:
        """Runs no unit. (torch 2.11 looks at a first argument on CUDA, so there is one.)"""


@dataclass(frozen=True)
class ShardSum:
    """The fp32 gradients of our shards whose sum runs over the same ranks, `[elements]`."""

    group: Group
    spans_stages: bool
    gradients: torch.Tensor


class FullyShardedWeights:
    """The `ShardedWeights` of stage 3.

    Each unit is sharded by rows (dimension 0, in chunks of `ceil(rows / ranks)`, so the last ranks may hold fewer or
    none); experts over the ranks that hold copies of them. It is gathered in the compute dtype right before its forward
    and its backward, while the previous unit computes, and freed after. After every backward its gradient is
    reduce-scattered in fp32 and added to our shard's; `finish` sums over the ranks that hold the same shard.

    The fp32 shards are the masters: an optimizer that updates `segments[i].master` (plain 1-D tensors) in place updates
    the model. The parameters in the model are fp32 `DTensor`s, so use `compute_dtype` instead of `model.dtype`.

    Args:
        model: this rank's part, with whole parameters of any floating dtype. It keeps its class and its names.
        units: modules that are gathered together. Every parameter belongs to exactly one; modules that share a
            parameter are one unit. `model` itself is none, since stages do not call it.
        specs: name -> which part of the Hub's tensor a parameter is.
        stage_of: name -> pipeline stage of a parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Sequence[nn.Module]],
        specs: dict[str, ShardSpec],
        stage_of: dict[str, int],
        mesh: ParallelMesh,
        compute_dtype: torch.dtype,
    ) -> None:
        if mesh.shard.size == 1:
            raise ValueError("fully sharded weights need at least two data-parallel ranks.")
        units = [unit for unit in units if any(True for module in unit for _ in module.parameters())]
        owned = _owned_parameters(model, units)
        stages = _stages_of_units(model, owned, stage_of)
        self.mesh, self.compute_dtype, self._units = mesh, compute_dtype, units
        self._specs = specs
        self.before_write: Callable[[], None] = nothing
        if not all(isinstance(module, FSDPModule) for unit in units for module in unit):
            names = {parameter: name for name, parameter in model.named_parameters()}
            groups = [shard_group(specs[names[parameters[0]]], mesh) for parameters in owned]
            self._shard(model, units, groups)
        elif _computing_dtype(units[0]) != compute_dtype:
            raise ValueError(
                f"the model is already fully sharded and computes in {_computing_dtype(units[0])}, not in "
                f"{compute_dtype}; load it again."
            )
        _prefetch_neighbours(model, units, stages)
        self._parameters = {name: cast(DTensor, parameter) for name, parameter in model.named_parameters()}
        self._sums: list[ShardSum] = []
        self._gradients: dict[str, DTensor] = {}
        self.segments = self._make_segments(specs)

    def _shard(self, model: nn.Module, units: Sequence[Sequence[nn.Module]], groups: Sequence[Group]) -> None:
        meshes = {group.ranks: self._device_mesh(group) for group in [self.mesh.shard, *groups]}
        # Inputs are not cast: what a stock model leaves in fp32 inside bf16 layers stays so.
        policy = MixedPrecisionPolicy(
            param_dtype=None if self.compute_dtype == torch.float32 else self.compute_dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.float().contiguous()
        for unit, group in reversed(list(zip(units, groups, strict=True))):  # what lies inside another unit first
            fully_shard(list(unit), mesh=meshes[group.ranks], mp_policy=policy, reshard_after_forward=True)
            first = cast(FSDPModule, unit[0])
            # The loss is divided by the tokens of all ranks, so gradients are sums. (gloo knows no scaled sum.)
            first.set_gradient_divide_factor(1.0)
            first.set_force_sum_reduction_for_comms(True)
            if all(isinstance(module, nn.Embedding) for module in unit):
                first.set_unshard_in_backward(False)
        root = _Root(model)
        fully_shard(root, mesh=meshes[self.mesh.shard.ranks], reshard_after_forward=True)
        root(None)

    def _device_mesh(self, group: Group) -> DeviceMesh:
        # Of experts each rank may have others: nothing is divided then, but units are alike.
        handle = group.handle or self.mesh.alone_with_handle()
        return DeviceMesh.from_group(handle, self.mesh.device.type)

    def _make_segments(self, specs: dict[str, ShardSpec]) -> list[Segment]:
        """Our rows of every trainable parameter, in the order of the model, with their place in the gradients."""
        trainable = {name: shard for name, shard in self._parameters.items() if shard.requires_grad}
        groups: dict[tuple[int, ...], Group] = {}
        members: dict[tuple[bool, tuple[int, ...]], list[str]] = {}
        for name in trainable:
            group = rest_group(specs[name], self.mesh)
            groups[group.ranks] = group
            members.setdefault((spans_stages(specs[name], self.mesh), group.ranks), []).append(name)
        gradients: dict[str, torch.Tensor] = {}
        for (spans, ranks), names in members.items():
            sizes = [_local(trainable[name]).numel() for name in names]
            total = torch.zeros(sum(sizes), device=self.mesh.device)
            self._sums.append(ShardSum(groups[ranks], spans, total))
            gradients.update(zip(names, total.split(sizes), strict=True))
        segments = []
        for name, shard in trainable.items():
            rows, gradient = _local(shard), gradients[name]
            self._gradients[name] = DTensor.from_local(
                gradient.view(rows.shape), shard.device_mesh, shard.placements, shape=shard.shape, stride=shard.stride()
            )
            if rows.numel():
                start = self._first_row(name) * rows[0].numel()
                master = nn.Parameter(rows.view(-1))
                segments.append(Segment(name, specs[name], start, start + rows.numel(), master, gradient))
        return segments

    # ---- one step ----

    def begin(self) -> None:
        """Let backwards add to zeroed gradients of ours."""
        for total in self._sums:
            total.gradients.zero_()
        for name, gradient in self._gradients.items():
            self._parameters[name].grad = gradient

    def before_backward(self, stage: int, is_last: bool) -> None:
        """Nothing: every backward reduces alike."""

    def after_backward(self, stage: int, is_last: bool) -> None:
        """Nothing."""

    def start_deferring(self, stage: int, micro_batch: int) -> None:
        """`ParallelConfig` refuses schedules that split backwards: every backward reduces here."""
        raise NotImplementedError("ZeRO-3 cannot defer weight gradients")

    def stop_deferring(self) -> None:
        """Never started."""

    def run_deferred(self, stage: int, micro_batch: int, is_last: bool) -> None:
        """Nothing was deferred."""

    def finish(self) -> None:
        """Sum over the ranks that hold the same shards; over stages at last, when every backward is done."""
        for name in self._gradients:
            self._parameters[name].grad = None  # code that zeroes or clips `grad`s of the model finds none
        works = [
            dist.all_reduce(total.gradients, group=total.group.handle, async_op=True)
            for total in sorted(self._sums, key=lambda total: total.spans_stages)
            if total.group.size > 1 and total.gradients.numel()
        ]
        for work in works:
            assert work is not None
            work.wait()

    def gather_in_backward(self, module: nn.Module | None, needed: bool) -> None:
        """Whether the backward of `module` reads its weights, and they are gathered for it. No change if other modules
        of its unit read theirs.
        """
        for unit in self._units:
            if module in unit and all(other is module or isinstance(other, nn.Embedding) for other in unit):
                cast(FSDPModule, module).set_unshard_in_backward(needed)

    def copying(self, memo: dict[int, Any]) -> AbstractContextManager[None]:
        """
        Raises:
            ValueError: always; torch's `fully_shard` cannot be copied.
        """
        raise ValueError(
            "copy.deepcopy of a model trained with zero_stage=3 is not supported: torch's fully_shard has sharded its "
            f"weights over {self.mesh.shard_size} ranks and cannot be copied. Save the model (save_pretrained) and "
            "load it again, copy it before the trainer is made, or use zero_stage 0 to 2."
        )

    def publish(self, rounded: bool = False) -> None:
        """Nothing: the masters are the model's weights."""

    def wait(self) -> None:
        """Nothing: weights are gathered when they are needed."""

    # ---- reading and writing whole parameters ----

    def whole(self, name: str) -> torch.Tensor:
        """Gather a parameter of `spec.local_shape`, in the compute dtype. All ranks of the shard group together."""
        shard = self._parameters[name]
        rows = _local(shard)
        padded = rows.new_zeros((self._chunk(name), *shard.shape[1:]), dtype=self.compute_dtype)
        padded[: len(rows)] = rows
        return all_gather(padded, self._group(name), 0)[: len(shard)]

    def write(self, name: str, value: torch.Tensor) -> None:
        """Set a parameter, and thereby its master, to `value` of `spec.local_shape`."""
        shard = self._parameters[name]
        rows, start = _local(shard), self._first_row(name)
        self.before_write()
        with torch.no_grad():
            rows.copy_(value[start : start + len(rows)])

    def take_written(self, compare: bool = False) -> None:
        """Nothing: the model's weights are the masters. (torch gives a `DTensor` no other data.)"""

    def read_from_model(self) -> None:
        """Nothing: the model's weights are the masters."""

    def bytes_held(self) -> dict[str, int]:
        parameters = sum(_local(shard).numel() * shard.element_size() for shard in self._parameters.values())
        gradients = sum(total.gradients.numel() * total.gradients.element_size() for total in self._sums)
        return {"parameters": parameters, "gradients": gradients, "masters": 0}

    def close(self) -> None:
        """Drop the gradients. `fully_shard` cannot be undone: the model stays sharded, and works so."""
        for name in self._gradients:
            self._parameters[name].grad = None
        self._sums.clear()
        self._gradients.clear()
        self.segments = []

    def _group(self, name: str) -> Group:
        """The ranks that a parameter is divided over."""
        return shard_group(self._specs[name], self.mesh)

    def _chunk(self, name: str) -> int:
        """Rows of a parameter on every rank but the last."""
        return -(-len(self._parameters[name]) // self._group(name).size)

    def _first_row(self, name: str) -> int:
        return min(self._group(name).rank * self._chunk(name), len(self._parameters[name]))


def _local(shard: DTensor) -> torch.Tensor:
    """Our rows, sharing the memory that the model gathers from."""
    with torch.no_grad():
        return shard.to_local()


def _owned_parameters(model: nn.Module, units: Sequence[Sequence[nn.Module]]) -> list[list[nn.Parameter]]:
    """The parameters of every unit, without those of units inside it. Exactly one unit may hold a parameter: torch 2.11
    would silently untie one of two units.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    seen: dict[nn.Parameter, int] = {}
    owned: list[list[nn.Parameter]] = [[] for _ in units]
    for index, unit in reversed(list(enumerate(units))):
        inner = {module for top in unit for module in top.modules()}
        for parameter in dict.fromkeys(parameter for module in unit for parameter in module.parameters()):
            other = seen.setdefault(parameter, index)
            if other == index:
                owned[index].append(parameter)
            elif not all(module in inner for module in units[other]):
                raise ValueError(
                    f"parameter {names[parameter]} is in two units; put modules that share it into one unit."
                )
    missing = [name for parameter, name in names.items() if parameter not in seen]
    if missing or any(module is model for unit in units for module in unit):
        raise ValueError(f"{type(model).__name__}: no unit gathers {missing or 'the model as a whole'}.")
    return owned


def _stages_of_units(model: nn.Module, owned: Sequence[Sequence[nn.Parameter]], stage_of: dict[str, int]) -> list[int]:
    """The pipeline stage of every unit."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [stage_of[names[parameters[0]]] for parameters in owned]


def _computing_dtype(unit: Sequence[nn.Module]) -> torch.dtype:
    """What a fully sharded unit is gathered in."""
    module = cast(FSDPModule, unit[0])
    module.unshard()
    dtype = next(p.dtype for member in unit for p in member.parameters())
    module.reshard()
    return dtype


def _prefetch_neighbours(model: nn.Module, units: Sequence[Sequence[nn.Module]], stages: Sequence[int]) -> None:
    """Gather the next unit of the stage while one computes, in forward and backward.

    By itself, `fully_shard` guesses from the order of the forwards so far: under a pipeline schedule, another stage or
    micro-batch. A unit of modules that are apart (a tied embedding and head) is gathered with its first module in the
    forward, with its last in the backward.
    """
    position = {module: index for index, module in enumerate(model.modules())}
    for stage in set(stages):
        own = [unit for unit, of in zip(units, stages, strict=True) if of == stage]
        forward = sorted(own, key=lambda unit: min(position[module] for module in unit))
        for unit, following in pairwise(forward):
            cast(FSDPModule, unit[0]).set_modules_to_forward_prefetch([cast(FSDPModule, following[0])])
        backward = sorted(own, key=lambda unit: max(position[module] for module in unit), reverse=True)
        # The last one asks for itself, which is there already: asking for nothing would mean guessing.
        for unit, following in pairwise([*backward, backward[-1]]):
            cast(FSDPModule, unit[0]).set_modules_to_backward_prefetch([cast(FSDPModule, following[0])])

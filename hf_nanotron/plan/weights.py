"""How many weights each rank of a layout holds: from the stock model on the meta device, for any sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..models.sharding.parallelize import layers_by_stage, refuse_sizes
from ..models.sharding.tensor_shards import tensor_specs
from ..models.stock.anatomy import Anatomy, dissect
from ..models.stock.foreign import why_not_causal
from ..models.stock.plan import make_plan
from ..parallel.config import ParallelConfig
from ..parallel.mesh import ParallelMesh
from ..parallel.shard_spec import ShardSpec
from ..prepare.context_attention import refusal, why_not_of_family


@dataclass(frozen=True)
class Held:
    """Elements of weights: `dense` ones, which ZeRO shards over `shard_size` ranks, and those of routed experts."""

    dense: int = 0
    experts: int = 0

    def __add__(self, other: Held) -> Held:
        return Held(self.dense + other.dense, self.experts + other.experts)


@dataclass(frozen=True)
class _Table:
    """Elements by place, for one `tp_size` and `ep_size`."""

    layers: tuple[Held, ...]
    first: Held
    last: Held
    everywhere: Held


@dataclass
class ModelWeights:
    """The weights of a stock model, by the ranks that hold them. Makes the model on the meta device, once.

    Raises:
        ValueError: for a config that is not of a causal language model.
    """

    config: PretrainedConfig
    model: PreTrainedModel = field(init=False, repr=False)
    anatomy: Anatomy = field(init=False, repr=False)
    _tables: dict[tuple[int, int, bool, bool, bool], _Table | str] = field(init=False, default_factory=dict, repr=False)
    _stages: dict[tuple[int, int, Any], tuple[range, ...] | str] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(self.config)
        if (reason := why_not_causal(self.model)) is not None:
            raise ValueError(f"{reason}; hf_nanotron only trains causal language models.")
        self.anatomy = dissect(self.model)

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is the head, too."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        return getattr(head, "weight", None) is getattr(embedding, "weight", None)

    @property
    def total(self) -> int:
        """Elements of the whole model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def why_not(self, parallel: ParallelConfig) -> str | None:
        """The sentence with which the trainer refuses these sizes for this model; None if it does not."""
        try:
            self.held(parallel, 0)
        except ValueError as error:
            return str(error)
        return None

    def stages(self, parallel: ParallelConfig) -> tuple[range, ...]:
        """The decoder layers of each stage.

        Raises:
            ValueError: if there are too many stages.
        """
        key = (parallel.pp_size, parallel.num_stages, parallel.pp_layers_per_stage)
        if key not in self._stages:
            self._stages[key] = _or_sentence(lambda: layers_by_stage(self.anatomy, parallel))
        return cast(tuple[range, ...], _or_raise(self._stages[key]))

    def held(self, parallel: ParallelConfig, pp_rank: int) -> Held:
        """Of the fullest rank of a pipeline rank.

        Raises:
            ValueError: as the trainer does, for sizes that do not fit the model.
        """
        table, stages = self._table(parallel), self.stages(parallel)
        own = range(pp_rank, len(stages), parallel.pp_size)
        held = sum((table.layers[index] for stage in own for index in stages[stage]), table.everywhere)
        if 0 in own:
            held += table.first
        if len(stages) - 1 in own and not (self.is_tied and 0 in own):
            held += table.last
        elif len(stages) - 1 in own:  # the tied weight is counted once
            held += Held(table.last.dense - self._tied_elements(parallel))
        return held

    def largest_layer(self, parallel: ParallelConfig) -> Held:
        """What ZeRO-3 gathers at a time."""
        return max(self._table(parallel).layers, key=lambda held: held.dense + held.experts, default=Held())

    def _tied_elements(self, parallel: ParallelConfig) -> int:
        whole = cast(Any, self.model.get_input_embeddings()).weight
        return -(-whole.shape[0] // parallel.tp_size) * int(whole.shape[1])

    def _table(self, parallel: ParallelConfig) -> _Table:
        key = (parallel.tp_size, parallel.ep_size, parallel.sequence_parallel and parallel.tp_size > 1)
        place = (*key, parallel.pp_size > 1, parallel.cp_size > 1)
        if place not in self._tables:
            self._tables[place] = _or_sentence(lambda: self._count(parallel))
        return cast(_Table, _or_raise(self._tables[place]))

    def specs(self, parallel: ParallelConfig) -> dict[str, ShardSpec]:
        """How every parameter of the whole model is cut, by its name.

        Raises:
            ValueError: as the trainer does, for sizes that do not fit the model.
        """
        # What is read of a mesh here: sizes, and a rank, on which no shape of the fullest rank depends.
        mesh = SimpleNamespace(
            parallel=parallel, tp_size=parallel.tp_size, ep_size=parallel.ep_size, tp_rank=0,
            coordinates=SimpleNamespace(ep=0),
        )  # fmt: skip
        refuse_sizes(self.model, parallel)
        if parallel.cp_size > 1 and (reason := why_not_of_family(self.anatomy)) is not None:
            raise ValueError(refusal(parallel.cp_size, type(self.model), reason))
        plan = make_plan(self.anatomy, parallel.tp_size, parallel.ep_size)
        return tensor_specs(self.anatomy, cast(ParallelMesh, mesh), plan)

    def _count(self, parallel: ParallelConfig) -> _Table:
        specs = self.specs(parallel)
        stacks = [name for name, _ in self.anatomy.layer_stacks()]
        numbers = dict(zip(stacks, _starts(self.anatomy), strict=True))
        count = self.config.get_text_config().num_hidden_layers
        layers, places = [Held()] * count, {"first": Held(), "last": Held(), "everywhere": Held()}
        for name, spec in specs.items():
            size = prod(spec.longest_shape)
            held = Held(experts=size) if spec.axis == "ep" and parallel.ep_size > 1 else Held(dense=size)
            stack = next((stack for stack in stacks if name.startswith(stack + ".")), None)
            if stack is not None:
                index = numbers[stack] + int(name[len(stack) + 1 :].split(".")[0])
                layers[index] += held
                continue
            place = self.anatomy.place(name)
            where = (
                "everywhere" if place in self.anatomy.everywhere else
                "last" if place in self.anatomy.last else "first"
            )  # fmt: skip
            places[where] += held
        return _Table(tuple(layers), **places)


def _starts(anatomy: Anatomy) -> Sequence[int]:
    starts, start = [], 0
    for _, layers in anatomy.layer_stacks():
        starts.append(start)
        start += len(layers)
    return starts


def _or_sentence(make: Any) -> Any:
    try:
        return make()
    except ValueError as error:
        return str(error)


def _or_raise(made: Any) -> Any:
    if isinstance(made, str):
        raise ValueError(made)
    return made

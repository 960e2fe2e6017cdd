"""Which decoder layers each pipeline stage holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

# The look-up moves a few rows where the head multiplies the whole matrix; what it costs a step is its gradient and its
# optimizer update. Counting it like the head would leave the first stage with too few layers.
EMBEDDING_COST = 0.1


def split_layers(
    layer_costs: Sequence[float],
    num_stages: int,
    first_cost: float = 0.0,
    last_cost: float = 0.0,
    layers_per_stage: Sequence[int] | None = None,
    last_cut: int | None = None,
) -> tuple[range, ...]:
    """Contiguous layers for each stage, the costliest stage as cheap as possible.

    Costs are in one unit, any (here parameters of matmuls). `first_cost` and `last_cost` are for embedding and head.
    Layers from `last_cut` on share keys and values, and stay on one stage.
    """
    num_layers = len(layer_costs)
    if last_cut is not None:
        if num_stages > last_cut + 1:
            raise ValueError(
                f"{num_stages} pipeline stages (pp_size x pp_virtual_stages): layers {last_cut} to {num_layers - 1} "
                "share keys and values and must be on one stage, so use at most "
                f"{last_cut + 1} stages."
            )
        if layers_per_stage is not None and num_layers - layers_per_stage[-1] > last_cut:
            raise ValueError(
                f"pp_layers_per_stage={list(layers_per_stage)}: layers {last_cut} to {num_layers - 1} share keys and "
                f"values, so the last stage needs at least {num_layers - last_cut} layers."
            )
        if layers_per_stage is None:
            joined = [*layer_costs[:last_cut], sum(layer_costs[last_cut:])]
            *before, last = _balanced(joined, num_stages, first_cost, last_cost)
            layers_per_stage = [*before, last + num_layers - len(joined)]
    if num_stages > num_layers:
        raise ValueError(
            f"{num_stages} pipeline stages (pp_size x pp_virtual_stages) for a model of {num_layers} decoder layers: "
            f"every stage needs at least one; use at most {num_layers} stages."
        )
    if layers_per_stage is None:
        layers_per_stage = _balanced(layer_costs, num_stages, first_cost, last_cost)
    if sum(layers_per_stage) != num_layers:
        raise ValueError(
            f"pp_layers_per_stage={list(layers_per_stage)} adds up to {sum(layers_per_stage)} layers, but the model "
            f"has {num_layers}."
        )
    ranges, start = [], 0
    for length in layers_per_stage:
        ranges.append(range(start, start + length))
        start += length
    return tuple(ranges)


def first_shared_layer(layers: Iterable[nn.Module]) -> int | None:
    """The first layer whose keys and values later layers use; None if every layer has its own."""
    attention = [getattr(layer, "self_attn", None) for layer in layers]
    if not any(getattr(module, "is_kv_shared_layer", False) for module in attention):
        return None
    return next(i for i, module in enumerate(attention) if getattr(module, "store_full_length_kv", False))


def _balanced(costs: Sequence[float], num_stages: int, first_cost: float, last_cost: float) -> list[int]:
    """Dynamic programme over (stages so far, layers so far): smallest maximum, then smallest sum of squares."""
    num_layers = len(costs)
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)

    def stage_cost(stage: int, start: int, stop: int) -> float:
        extra = first_cost * (stage == 0) + last_cost * (stage == num_stages - 1)
        return prefix[stop] - prefix[start] + extra

    # best[stop] = (largest stage, sum of squares, lengths) over the stages so far
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for stage in range(num_stages):
        reach: dict[int, tuple[float, float, list[int]]] = {}
        for stop in range(stage + 1, num_layers - (num_stages - stage - 1) + 1):
            options = []
            for start, (largest, squares, lengths) in best.items():
                if start < stop:
                    cost = stage_cost(stage, start, stop)
                    options.append((max(largest, cost), squares + cost * cost, [*lengths, stop - start]))
            reach[stop] = min(options)
        best = reach
    return best[num_layers][2]

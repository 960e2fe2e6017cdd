"""How tokens are spread over the experts: counted, reported, and evened out without a loss.

Counts are of what the routers chose, with their correction biases and groups; the load-balancing loss counts the
largest logits instead (`parallel/ep/router_loss.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...parallel.collectives import all_reduce
from ...parallel.mesh import Group
from .routers import Record, Router

# Config fields for the number of routed experts of a layer (of each layer, if it is a list). What a router can choose
# besides, without weights: LongCat's identity experts, and Zaya's skip.
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
IDENTITY_EXPERTS = "zero_expert_num"
SKIP_EXPERT = ("zaya",)

# The names of correction biases: on the router, inside it, or on the module around it. The last ones are of routers
# whose experts are not all alike, and which even out should not be.
CORRECTION_BIASES = ("e_score_correction_bias", "expert_bias")
UNLIKE_EXPERTS = ("longcat_flash", "zaya")


def num_choices(config: PreTrainedConfig) -> int:
    """How many experts a router of the model has to choose from; the most of any layer."""
    config = config.get_text_config()
    for name in NUM_EXPERTS:
        value = getattr(config, name, None)
        if value:
            most = max(value) if isinstance(value, list | tuple) else value
            return most + (getattr(config, IDENTITY_EXPERTS, None) or 0) + (_type(config) in SKIP_EXPERT)
    raise ValueError(f"the config of {config.model_type!r} has none of {', '.join(NUM_EXPERTS)}.")


def _type(config: PreTrainedConfig) -> str:
    return config.model_type.removesuffix("_text")


def chosen_experts(record: Record) -> torch.Tensor:
    """`[tokens, k]`: the experts that a router sent its tokens to.

    Routers return them beside the logits. Llama 4 does not, and takes the largest logits; Zaya's has expert 0 in the
    place of the skip.
    """
    module, logits = record.router.module, record.logits.detach()
    biases = getattr(module, "balancing_biases", None)
    if isinstance(biases, torch.Tensor):
        return torch.topk(logits.softmax(-1) + biases, module.top_k, dim=-1).indices  # type: ignore[arg-type]
    outputs = record.output if isinstance(record.output, tuple) else ()
    indices = [t for t in outputs if isinstance(t, torch.Tensor) and t.dtype in (torch.int64, torch.int32)]
    chosen = indices[-1] if indices else torch.topk(logits, module.top_k, dim=-1).indices  # type: ignore[arg-type]
    return chosen.reshape(len(logits), -1)


class RouterLoads:
    """How many tokens each expert of each layer got in the micro-batches of a step.

    `names` are the routers of the whole model, the same on every rank, so that one sum over the stages joins their
    rows.
    """

    def __init__(self, names: Sequence[str], num_experts: int, device: torch.device | str | None = None) -> None:
        self._row = {name: row for row, name in enumerate(names)}
        self.counts = torch.zeros(len(names), num_experts, dtype=torch.int64, device=device)

    def add(self, records: Sequence[Record], mask: torch.Tensor | None = None) -> None:
        """Count what the routers of a training forward chose. `mask`: 0 where a token does not count."""
        for record in records:
            chosen = chosen_experts(record)
            weights = torch.ones_like(chosen, dtype=torch.int64)
            if mask is not None:
                weights = weights * (mask.reshape(-1, 1).to(chosen.device) != 0)
            row = self.counts[self._row[record.router.name]]
            row.scatter_add_(0, chosen.flatten().long(), weights.flatten())

    def take(self, group: Group) -> dict[str, torch.Tensor]:
        """Name -> counts `[E]` of the step, summed over `group`; then counting starts anew.

        `group`: one rank for each set of tokens of a layer, so data-parallel ranks, stages, and ranks that split a
        sequence.
        """
        summed = all_reduce(self.counts, group).clone()
        self.counts.zero_()
        return {name: summed[row] for name, row in self._row.items()}


def load_report(
    counts: Mapping[str, torch.Tensor], per_layer: bool = False, per_expert: bool = False
) -> dict[str, float]:
    """Figures for a log line, from `RouterLoads.take`.

    `moe/load_max_over_mean` is the load of the busiest expert over the mean load (1 is balance, the number of experts
    the worst), in the layer where that is largest; `moe/load_max_over_mean_average` is its mean over the layers.
    `moe/idle_experts` is the fraction of experts without a token. `per_layer` adds the first for each layer,
    `per_expert` each expert's fraction of its layer's load. Layers without a token are left out.
    """
    table = torch.stack(list(counts.values())).tolist() if counts else []  # one copy from the device
    loads = {name: row for name, row in zip(counts, table, strict=True) if sum(row)}
    if not loads:
        return {}
    ratios = {name: max(row) * len(row) / sum(row) for name, row in loads.items()}
    flat = [load for row in loads.values() for load in row]
    report = {
        "moe/load_max_over_mean": max(ratios.values()),
        "moe/load_max_over_mean_average": sum(ratios.values()) / len(ratios),
        "moe/idle_experts": flat.count(0) / len(flat),
    }
    if per_layer:
        report |= {f"moe/{name}/load_max_over_mean": ratio for name, ratio in ratios.items()}
    if per_expert:
        report |= {
            f"moe/{name}/expert_{expert}": load / sum(row)
            for name, row in loads.items()
            for expert, load in enumerate(row)
        }
    return report


def correction_bias(model: PreTrainedModel, router: Router) -> torch.Tensor | None:
    """The buffer or frozen parameter that is added to a router's scores before it chooses, or None."""
    around = model.get_submodule(router.name.rpartition(".")[0])
    for owner in (*router.module.modules(), around):
        for name in CORRECTION_BIASES:
            bias = getattr(owner, name, None)
            if isinstance(bias, torch.Tensor):
                return bias
    return None


class BiasBalancer:
    """Evens out the load by the correction biases (Wang et al. 2024, arXiv:2408.15664, algorithm 1; `update_rate`
    1e-3).

    After each step, the bias of an expert with more than the mean load falls by `update_rate`, that of one with less
    rises by it. The biases choose experts but do not weigh them, so no gradient is changed.
    """

    def __init__(self, model: PreTrainedModel, routers: Sequence[Router], update_rate: float = 0.0) -> None:
        if update_rate < 0:
            raise ValueError(
                f"moe_bias_update_rate={update_rate} is below 0; use 0 to leave correction biases unchanged."
            )
        self.update_rate = update_rate
        self._biases: dict[str, torch.Tensor] = {}
        if not update_rate:
            return
        name = type(model).__name__
        if _type(model.config.get_text_config()) in UNLIKE_EXPERTS:
            raise ValueError(
                f"{name} routes to experts without computation, for which an even load is wrong; use "
                "moe_bias_update_rate=0."
            )
        for router in routers:
            bias = correction_bias(model, router)
            if bias is None:
                raise ValueError(
                    f"moe_bias_update_rate={update_rate}: {router.name} of {name} has no correction bias; use "
                    "output_router_logits=True to balance it."
                )
            if isinstance(bias, nn.Parameter):
                raise ValueError(
                    f"moe_bias_update_rate={update_rate}: the correction bias of {router.name} is a parameter of "
                    f"{name}, which bf16 rounds and ZeRO may shard; use output_router_logits=True to balance it."
                )
            if bias.dtype != torch.float32:
                raise ValueError(
                    f"the correction bias of {router.name} is {bias.dtype}, which rounds steps of {update_rate} to "
                    "zero; keep it in float32."
                )
            self._biases[router.name] = bias

    @torch.no_grad()
    def step(self, counts: Mapping[str, torch.Tensor]) -> None:
        """Move the biases, after `optimizer.step()`, by `counts` over all data-parallel ranks."""
        for name, bias in self._biases.items():
            load = counts[name][: bias.numel()].double()
            bias += self.update_rate * torch.sign(load.mean() - load).view_as(bias).to(bias)

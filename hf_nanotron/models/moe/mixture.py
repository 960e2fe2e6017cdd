"""What the routers of a mixture of experts add to a training step: their losses and the loads of the experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from ...parallel.batch import batch_shape, ones_like_tokens
from ...parallel.collectives import all_reduce, own_part
from ...parallel.ep.experts import ParallelExperts
from ...parallel.ep.router_loss import RouterSums, empty, pack, scale_gradient, sum_over_ranks, unpack
from ...parallel.mesh import ParallelMesh
from ..stock.plan import Plan
from .balance import BiasBalancer, RouterLoads, load_report, num_choices
from .routers import Record, Router, RouterLosses, RouterRecorder, find_routers, fp32_router, router_losses, sum_records

logger = logging.get_logger(__name__)


class Mixture:
    """The routers of a model, of which this rank holds some.

    Made in two halves: from the whole stock model, then `attach`ed to the part that this rank keeps.

    Attributes:
        loads: what the routers chose since `report` was last called, while `counts_loads`.
        mask: `[B, S]`, 0 for the tokens of the next forward that do not count, or None; set before each forward.
        share: what the losses of a micro-batch are multiplied by in training; 1 as in Trainer, which adds them up.
    """

    def __init__(self, model: PreTrainedModel, mesh: ParallelMesh, plan: Plan) -> None:
        whole = find_routers(model)
        self.mesh = mesh
        self.losses: RouterLosses | None = router_losses(model)
        self.loads = RouterLoads([router.name for router in whole], num_choices(model.config), mesh.device)
        inside = tuple(f"{region}." for region in plan.regions)
        # Inside a region every tensor-parallel rank sees all tokens, elsewhere perhaps a part of them.
        parted = mesh.parallel.sequence_parallel or bool(plan.spread)
        self._sees_part = mesh.tp_size > 1 and parted and not all(r.name.startswith(inside) for r in whole)
        self._loads_group = mesh.group("loads", lambda c: 0 if self._sees_part else c.tp)
        # Not in the middle of a forward.
        mesh.connect(mesh.ep, mesh.row if self._sees_part else mesh.cp, self._loads_group)
        self._has_stock_loss = hasattr(model, "router_aux_loss_coef")
        self.routers: list[Router] = []
        self.experts: list[ParallelExperts] = []
        self.counts_loads = self.reports_loss = self._is_dealt = False
        self._balancer: BiasBalancer | None = None
        self.mask: torch.Tensor | None = None
        self.share: float | torch.Tensor = 1.0

    def attach(self, model: PreTrainedModel) -> None:
        """Record what the routers that are left in `model` do."""
        self.routers = find_routers(model)
        self.experts = [module for module in model.modules() if isinstance(module, ParallelExperts)]
        self._recorder = RouterRecorder(self.routers)

    def refresh(self, model: PreTrainedModel) -> None:
        """Take over what the config says about losses now."""
        self.losses = router_losses(model)

    def adds_loss(self, inputs: dict[str, Any]) -> bool:
        """Whether a forward with `inputs` has losses over its routers."""
        return self.losses is not None and (inputs.get("labels") is not None or self.reports_loss)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Inside the block, a forward without labels has its load-balancing loss in its output, as `aux_loss`."""
        self.reports_loss = self.losses is not None and bool(self.losses.num_experts)
        try:
            yield
        finally:
            self.reports_loss = False

    @contextmanager
    def dealing(self) -> Iterator[None]:
        """Inside the block, context-parallel ranks share the tokens of every row."""
        self._is_dealt = True
        try:
            yield
        finally:
            self._is_dealt = False

    def without_stock_loss(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs` that keep the stock forward from adding the loss of this stage's layers alone."""
        return {**inputs, "output_router_logits": False} if self._has_stock_loss else inputs

    def recording(self) -> AbstractContextManager[list[Record]]:
        """What the routers return inside the block."""
        return self._recorder.recording()

    def add(
        self, records: list[Record], received: torch.Tensor | None, inputs: dict[str, Any], training: bool
    ) -> torch.Tensor | None:
        """The packed sums over the routers of all stages so far; None without losses. Counts loads while training.

        `received`: the sums of the previous stage; None on the first.
        """
        mask = self.mask if self.mask is not None else inputs.get("attention_mask")
        if self._is_parted(training):
            missing = -batch_shape(inputs)[1] % self.mesh.tp_size
            if mask is None and missing:
                mask = ones_like_tokens(inputs)
            if mask is not None:
                mask = own_part(F.pad(mask, (0, -mask.shape[1] % self.mesh.tp_size)), self.mesh.tp, 1)
        if self.counts_loads and training:
            self.loads.add(records, mask)
        if not self.adds_loss(inputs):
            return None
        assert self.losses is not None
        count = self.losses.num_experts
        sums = empty(count, self.mesh.device) if received is None else unpack(received, count)
        return pack(sum_records(sums, records, self.losses, mask))

    def loss(self, packed: torch.Tensor, training: bool) -> torch.Tensor:
        """What the last stage adds to the loss of the micro-batch."""
        assert self.losses is not None
        total = self._total(self.losses, packed, training)
        return total * self.share if training else total

    def aux_loss(self, packed: torch.Tensor, training: bool) -> torch.Tensor:
        """The load-balancing loss without its coefficient: what a stock forward without labels returns."""
        assert self.losses is not None
        return self._total(replace(self.losses, coefficient=1.0, z_coefficient=0.0), packed, training)

    def _total(self, losses: RouterLosses, packed: torch.Tensor, training: bool) -> torch.Tensor:
        mesh, parted = self.mesh, self._is_parted(training)
        deals = self._is_dealt
        group = (mesh.row if parted else mesh.cp) if deals else (mesh.tp if parted else mesh.alone)
        total = losses.total(sum_over_ranks(RouterSums(packed), group), 1.0 if parted else 1 / mesh.tp_size)
        # All context-parallel ranks compute the loss of all tokens, and the loss of a step is the sum of theirs. The
        # gradient reaches the tokens of this rank alone.
        return scale_gradient(total / mesh.cp_size, mesh.cp_size) if deals else total

    def _is_parted(self, training: bool) -> bool:
        """Whether the routers of this rank see a part of the tokens. Evaluation keeps sequences whole."""
        return self._sees_part and (training or not self.mesh.parallel.sequence_parallel)

    def configure(
        self, model: PreTrainedModel, dtype: torch.dtype, capacity_factor: float | None, update_rate: float
    ) -> None:
        """How the experts are trained, in a model that computes in `dtype`; its routers compute in fp32 all the same.

        A `capacity_factor` of None drops nothing. `update_rate` is that of `BiasBalancer`.
        """
        self.refresh(model)
        for experts in self.experts:
            experts.capacity_factor = capacity_factor
        for router in self.routers if dtype != torch.float32 else ():
            try:
                fp32_router(router)
            except ValueError as reason:
                logger.warning(f"{router.name} computes in {dtype}: {reason}")
        self._balancer = BiasBalancer(model, self.routers, update_rate)

    def agree_on_tokens(self, micro_batches: Sequence[dict[str, Any]]) -> list[int | None]:
        """The most tokens of each micro-batch that a router of any rank gets, from which capacities follow.

        The host waits for it once a step, if there is a capacity and more than one rank to agree with.
        """
        if not self.experts or self.experts[0].capacity_factor is None or self.mesh.ep.size == 1:
            return [None] * len(micro_batches)
        shapes = [batch_shape(batch) for batch in micro_batches]
        tokens = [rows * -(-length // self.mesh.tp_size) for rows, length in shapes]
        most = all_reduce(torch.tensor(tokens, device=self.mesh.device), self.mesh.ep, dist.ReduceOp.MAX)
        return list(most.tolist())

    def before_forward(self, mask: torch.Tensor | None, tokens: int | None) -> None:
        """What is known of the next micro-batch: see `mask` and `agree_on_tokens`."""
        self.mask = mask
        for experts in self.experts:
            experts.capacity_tokens = tokens

    def balance(self, is_finite: bool) -> dict[str, torch.Tensor]:
        """Counts by router of the step, over the job; moves the correction biases, unless the step is left out.

        Nothing is counted until it is asked for again. All ranks together.
        """
        counts = self.loads.take(self._loads_group)
        self.counts_loads = False
        if self._balancer is not None and is_finite:
            self._balancer.step(counts)
        return counts

    def report(self, counts: dict[str, torch.Tensor], detail: str) -> dict[str, float]:
        """Figures for a log line: of the model, or also of each of its `detail`, `"layers"` or `"experts"`."""
        report = load_report(counts, per_layer=detail != "model", per_expert=detail == "experts")
        dropped = [module.dropped for module in self.experts if module.dropped is not None]
        if dropped:  # of this rank's latest micro-batch
            pairs = sum(module.pairs for module in self.experts)
            report["moe/dropped_fraction"] = float(torch.stack(dropped).sum()) / max(1, pairs)
        return report


def make_mixture(model: PreTrainedModel, mesh: ParallelMesh, plan: Plan) -> Mixture | None:
    """The `Mixture` of a whole stock model, None for a dense one."""
    return Mixture(model, mesh, plan) if find_routers(model) else None

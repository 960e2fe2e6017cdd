"""Statistics of each weight, its gradient and the outputs of each block, every so many steps (`metrics_detail`).

They are of the whole model and the whole batch, the same on every layout: each element is counted by one rank. Costs a
pass over the weights, gradients and outputs of that step, and two small sums over the job.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..arguments.watching import DETAIL_STEPS, detail_names
from ..models.base import ParallelModel
from ..models.stand_ins import AbsentEmbedding, AbsentLayer
from ..monitor.tensor_statistics import TensorStatistics, over
from ..parallel.batch import ones_like_tokens
from ..parallel.zero.buckets import is_owner
from ..parallel.zero.segment import Segment
from ..prepare.training_state import TrainingState
from ..training_args import NanotronTrainingArguments
from .step.window import router_mask

# They print each line, which would be thousands of numbers.
PRINTING = ("PrinterCallback", "ProgressCallback", "NotebookProgressCallback")


class MetricsDetail:
    """What `metrics_detail` asks of the steps of a run. It is an observer of the forwards of `state`."""

    def __init__(self, args: NanotronTrainingArguments, state: TrainingState) -> None:
        self.args, self.model, self.weights = args, state.model, state.weights
        self._blocks: list[str] | None = None  # of all stages
        self._counted: dict[str, TensorStatistics] = {}  # of the step that runs
        self._outputs: BlockOutputs | None = None  # of the window that runs
        state.observers.append(self)

    @contextlib.contextmanager
    def over(self, step: int, micro_batches: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        self._counted = {}
        kinds = detail_names(self.args.metrics_detail)
        if kinds and not (step + 1) % (self.args.metrics_detail_steps or DETAIL_STEPS):
            self._counted = {kind: self._statistics(kind) for kind in kinds}
        if "activations" not in self._counted:
            yield
            return
        outputs = BlockOutputs(self.model, self._counted["activations"], bool(self.args.torch_compile))
        with outputs.over(micro_batches):
            self._outputs = outputs
            try:
                yield
            finally:
                self._outputs = None

    def begin_forward(self, micro_batch: int, inputs: Mapping[str, Any]) -> None:
        if self._outputs is not None:
            self._outputs.begin(micro_batch)

    def end_forward(self) -> None:
        if self._outputs is not None:
            self._outputs.end()

    def take_gradients(self) -> None:
        """They are complete: summed over micro-batches and ranks, and not clipped yet."""
        if "gradients" in self._counted:
            for segment in self._owned():
                self._counted["gradients"].add(segment.spec.name, segment.gradient)

    def end_step(self) -> dict[str, float]:
        """After the update, the figures of the step; empty unless it was one to be measured. All ranks together."""
        counted, self._counted = self._counted, {}
        if not counted:
            return {}
        if "weights" in counted:
            for segment in self._owned():
                held = segment.master if segment.weight is None else segment.weight
                counted["weights"].add(segment.spec.name, held.detach())
        return over(self.model.mesh.world, counted)

    def _statistics(self, kind: str) -> TensorStatistics:
        names = self._block_names() if kind == "activations" else list(self.model.weight_shapes)
        return TensorStatistics(names, self.model.mesh.device)

    def _owned(self) -> list[Segment]:
        return [segment for segment in self.weights.segments if is_owner(segment.spec, self.model.mesh)]

    def _block_names(self) -> list[str]:
        """Of the blocks of all stages, in model order; found once in a run."""
        if self._blocks is None:
            own, mesh = list(watched_blocks(self.model)), self.model.mesh
            told: list[list[str]] = [own] * mesh.pp_size
            if mesh.pp.size > 1:
                dist.all_gather_object(told, own, group=mesh.pp.handle)
            self._blocks = list(dict.fromkeys(name for each in told for name in each))
        return self._blocks


class BlockOutputs:
    """Counts the outputs of the blocks of this rank while the forwards of a step run."""

    def __init__(self, model: ParallelModel, statistics: TensorStatistics, compiles: bool) -> None:
        self.model, self.statistics, self.compiles = model, statistics, compiles
        self._masks: list[torch.Tensor] = []
        self._mask: torch.Tensor | None = None  # of the micro-batch whose forward runs

    @contextlib.contextmanager
    def over(self, micro_batches: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        """While a window runs. Compiled blocks run uncompiled: what happens inside of them cannot be seen."""
        mesh = self.model.mesh
        multiple = mesh.tp_size if mesh.parallel.sequence_parallel else 1
        self._masks = [counted_tokens(dict(batch), multiple) for batch in micro_batches]
        hooks = [block.register_forward_hook(self._hook(name)) for name, block in watched_blocks(self.model).items()]
        eager: Any = torch.compiler.set_stance("force_eager") if self.compiles else contextlib.nullcontext()
        try:
            with eager:
                yield
        finally:
            self._mask = None
            for hook in hooks:
                hook.remove()

    def begin(self, micro_batch: int) -> None:
        """The forward of a micro-batch comes next."""
        self._mask = self._masks[micro_batch]

    def end(self) -> None:
        """A backward comes next, which may compute a forward again."""
        self._mask = None

    def _hook(self, name: str) -> Any:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple | list) and output else output
            if self._mask is not None and isinstance(hidden, torch.Tensor):
                mask = self._mask_of(hidden)
                if mask is not None:
                    self.statistics.add_tokens(name, hidden.detach(), mask)

        return count

    def _mask_of(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Which tokens of an output this rank counts; None for an output that is not one of tokens."""
        assert self._mask is not None
        mesh, (rows, length) = self.model.mesh, self._mask.shape
        if hidden.dim() < 3 or hidden.shape[0] != rows:
            return None
        if hidden.shape[1] == length:  # the same on all tensor-parallel ranks
            return self._mask if mesh.tp_rank == 0 else torch.zeros_like(self._mask)
        if hidden.shape[1] * mesh.tp_size == length:
            return self._mask.chunk(mesh.tp_size, 1)[mesh.tp_rank]
        return None


def watched_blocks(model: ParallelModel) -> dict[str, nn.Module]:
    """The modules of this rank whose outputs are counted: embedding, blocks and decoder layers, what follows them."""
    anatomy, found = model.anatomy, dict[str, nn.Module]()
    modules = dict(model.named_modules())
    layers = [f"{stack}.{index}" for stack, layers in anatomy.layer_stacks() for index in range(len(layers))]
    blocks = dict(anatomy.blocks())
    for name in (anatomy.embedding, *layers, *anatomy.last):
        found |= {block: module for block, module in blocks.items() if block.startswith(f"{name}.")}
        if name in modules and name != anatomy.head:  # the loss is made without logits
            found[name] = modules[name]
    return {name: module for name, module in found.items() if not isinstance(module, AbsentLayer | AbsentEmbedding)}


def counted_tokens(batch: dict[str, Any], multiple: int) -> torch.Tensor:
    """`[B, S]`, 0 for tokens that fill up a row, those masked as padding, and a batch that only keeps a rank in step.

    `S` is a multiple of `multiple`, as the model sees it.
    """
    mask = router_mask(batch, multiple)
    if mask is None:
        mask = batch.get("attention_mask")
        mask = ones_like_tokens(batch) if mask is None or mask.dim() != 2 else mask
        mask = F.pad(mask, (0, -mask.shape[1] % multiple))
    return mask


def tell_callbacks(
    handler: Any, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float]
) -> TrainerControl:
    """Hand statistics of single tensors to callbacks. They are too many for the history in each checkpoint."""
    with without_printing(handler):
        told: TrainerControl = handler.call_event("on_log", args, state, control, logs=metrics)
    return told


@contextlib.contextmanager
def without_printing(handler: Any) -> Iterator[None]:
    """While it is in force, callbacks that print log lines are not called."""
    every: list[TrainerCallback] = handler.callbacks
    handler.callbacks = [each for each in every if not any(cls.__name__ in PRINTING for cls in type(each).__mro__)]
    try:
        yield
    finally:
        handler.callbacks = every

"""What a parallel model is made of, and what follows from it: its weights, its vocabulary, its loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ..checkpoint.hub.layout import HubLayout
from ..data.vocabulary import Vocabulary
from ..parallel.config import ParallelConfig
from ..parallel.dropout_streams import LayerStreams
from ..parallel.mesh import Group, ParallelMesh
from ..parallel.pipeline.executor import PipelineExecutor
from ..parallel.shard_spec import ShardSpec
from ..parallel.tp.loss import causal_lm_loss, predicted_tokens
from ..parallel.tp.vocabulary import gather_vocabulary
from ..parallel.zero.segment import WeightStore
from .cut import Cut
from .decorations import Decorations
from .head import LinearHead, Prediction, is_plain, linear_head
from .moe.mixture import Mixture
from .spectral.scales import SpectralWeights
from .stock.anatomy import Anatomy
from .stock.hooks import users_hooks
from .stock.own_forward import own_columns
from .training_loss import TrainingLoss
from .weight_roles import WeightRole


class ModelParts(PreTrainedModel):
    """What a parallel model's stages, methods and forward are written for. Made by `parallelize`.

    Attributes:
        mesh: where this rank stands.
        anatomy: names of the model's parts.
        cut: what the stock model was when it was sharded.
        shard_specs: parameter name -> which part of the Hub tensor it is, for the parameters of this rank.
        hub_shapes: shape of every tensor of the Hub checkpoint, in model order.
        hub_owners: pipeline rank that holds (and writes) each of them.
        hub_layout: which tensors of the Hub's files they are.
        roles: what each weight of the Hub checkpoint is, of the whole model.
        stage_of: parameter name -> pipeline stage, for the parameters of this rank.
        streams: seeds of dropout, or None if the model has none.
        mixture: losses over the routers and loads of the experts, or None for a dense model.
        weights: the trainer's, while one owns them.
        training_loss: how the loss is made while it trains.
        decorations: what training has put on it.
        fuses_loss: compute the loss together with the head while training, without logits, if the model allows it.
        names_attention: whether the user named its attention, which is kept then.
        adapters: linear -> scale of its adapter, of the whole model; they are no part of the Hub's model.
        spectral: the parametrization with which its weights were drawn, or None for the stock class's own.
        vocab_sizes: how many logits each tensor-parallel rank computes; one number where the head is not sharded.
        vocab_start: id of the first of ours.
        head_is_cut: whether the tensor-parallel ranks share the vocabulary.
        head_is_hooked: whether the user had hooked the head of the stock model, which a stage without it forgets.
    """

    mesh: ParallelMesh
    anatomy: Anatomy
    cut: Cut
    shard_specs: dict[str, ShardSpec]
    hub_shapes: dict[str, tuple[int, ...]]
    hub_owners: dict[str, int]
    hub_layout: HubLayout
    roles: dict[str, WeightRole]
    stage_of: dict[str, int]
    streams: LayerStreams | None
    mixture: Mixture | None
    executor: PipelineExecutor
    training_loss: TrainingLoss
    decorations: Decorations
    weights: WeightStore | None = None
    fuses_loss: bool = True
    names_attention: bool = False
    adapters: Mapping[str, float] = MappingProxyType({})
    spectral: SpectralWeights | None = None
    stock_class: type[PreTrainedModel]
    vocab_sizes: tuple[int, ...]
    vocab_start: int
    head_is_cut: bool
    head_is_hooked: bool

    @property
    def parallel(self) -> ParallelConfig:
        return self.mesh.parallel

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The ids that the whole model knows, not this rank's part of them."""
        rows = self.config.get_text_config().vocab_size
        inputs = self.hub_shapes.get(f"{self.anatomy.embedding}.weight", (rows,))[0]
        return Vocabulary(inputs, self.hub_shapes.get(f"{self.anatomy.head}.weight", (inputs,))[0])

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight of the stock model, in model order."""
        return {name: shape for name, shape in self.hub_shapes.items() if name not in self.hub_layout.buffers}

    def frozen_now(self) -> frozenset[str]:
        """Names of the frozen weights of the whole model, as far as this rank knows (`Cut.frozen`)."""
        return self.cut.frozen_now(self, self.shard_specs)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in; its parameters themselves are fp32 shards at ZeRO stage 3."""
        return super().dtype if self.weights is None else self.weights.compute_dtype

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As in any module. New weights that are still on their way are waited for."""
        if self.weights is not None:
            self.weights.wait()
        return super().named_parameters(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Under `to`, `half`, `cuda` and their like. A copy of sharded weights would part from what is trained."""
        if self.weights is None:
            self.executor.forget_layouts()
            return super()._apply(fn, recurse)
        have = torch.empty(0, dtype=self.dtype, device=self.mesh.device)
        want = fn(have)
        if (want.dtype, want.device.type) != (have.dtype, have.device.type):
            raise ValueError(
                f"a trainer owns the weights of this model ({have.dtype} on {have.device.type}), so they cannot be "
                f"moved to {want.dtype} on {want.device.type}. Save the model and load it there."
            )
        return self

    def get_parameter(self, target: str) -> nn.Parameter:
        """As in any module. A module's attribute of that name may be something else (a router's weight, in fp32)."""
        owner, _, leaf = target.rpartition(".")
        parameter = self.get_submodule(owner)._parameters.get(leaf)
        if parameter is None:
            raise AttributeError(f"{type(self).__name__} has no parameter {target!r}.")
        return parameter

    def whole_parameter(self, name: str) -> torch.Tensor:
        """This rank's tensor-parallel part of a parameter. All ranks together: ZeRO stage 3 gathers it."""
        return self.get_parameter(name).detach() if self.weights is None else self.weights.whole(name)

    def write_parameter(self, name: str, value: torch.Tensor) -> None:
        """Set this rank's tensor-parallel part of a parameter, and what a trainer holds of it in fp32."""
        if self.weights is not None:
            self.weights.write(name, value)
            for segment in self.weights.segments:
                if segment.name == name and segment.weight is not None:
                    segment.master.data.copy_(value.reshape(-1)[segment.start : segment.stop])
        else:
            with torch.no_grad():
                self.get_parameter(name).copy_(value)

    @property
    def loss_function(self) -> Any:
        """The causal-LM loss over this rank's slice of the vocabulary; logits are never joined for it.

        Another function may be assigned. It is called with whole logits, as in the stock model.
        """
        return self.__dict__.get("called_loss", self._loss)

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value

    @property
    def own_loss(self) -> Any:
        """What `loss_function` of the stock model would return."""
        return super().loss_function

    @functools.cached_property
    def own_columns(self) -> frozenset[str]:
        """Columns of a batch that the forward keeps for its loss: no stage but the last, and no layer, gets them."""
        return own_columns(self, self.stock_class)

    @functools.cached_property
    def plain_forward(self) -> bool:
        """Whether the forward returns what its loss function returns, of the logits that its head returns."""
        return is_plain(self, self.stock_class)

    @property
    def makes_logits(self) -> bool:
        """Whether whole logits are made, because the loss is not the plain one."""
        return self.training_loss.needs_logits or self.has_own_loss

    @property
    def has_own_loss(self) -> bool:
        """Whether its forward, its loss function or a hook on its head makes another loss than the plain one."""
        if self.head_is_hooked or not self.plain_forward or self.own_loss is not ForCausalLMLoss:
            return True
        return bool(users_hooks(cast(nn.Module, self.get_output_embeddings())))

    def _loss(
        self,
        logits: torch.Tensor | Prediction,
        labels: torch.Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if isinstance(logits, Prediction):
            return logits.loss
        z_loss = self.training_loss.z_loss if self.training else 0.0
        if num_items_in_batch is None and self.training:  # a mean that is zero, not nan, where nothing is predicted
            num_items_in_batch = predicted_tokens(labels, shift_labels)
        # Whoever computes a loss from whole logits may call this for a part of it.
        is_whole = logits.shape[-1] == sum(self.vocab_sizes)
        start, group = (0, self.mesh.alone) if is_whole else (self.vocab_start, self.head_group)
        asked = self.training_loss
        told = asked.note, asked.shares, asked.note_choices, asked.reweigh
        return causal_lm_loss(logits, labels, start, group, num_items_in_batch, shift_labels, z_loss, *told)

    @property
    def head_group(self) -> Group:
        """The ranks that share the vocabulary."""
        return self.mesh.tp if self.head_is_cut else self.mesh.alone

    def whole_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """`[..., V]` from this rank's slice of the vocabulary, on every tensor-parallel rank. Differentiable."""
        return gather_vocabulary(logits, self.head_group, self.vocab_sizes)

    @functools.cached_property
    def linear_head(self) -> LinearHead | None:
        """The head, if the loss is fused with it while the model trains."""
        return linear_head(self, self.stock_class)

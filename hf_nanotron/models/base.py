"""The parallel model: a `PreTrainedModel` subclass of the stock class that holds this rank's part."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..checkpoint.hub.layout import HubLayout
from ..checkpoint.hub.model import save_hub_model
from ..data.vocabulary import Vocabulary
from ..ops.fp8_linear import WeightCopies
from ..ops.linear import Linear
from ..parallel.config import ParallelConfig
from ..parallel.dropout_streams import LayerStreams
from ..parallel.mesh import Group, ParallelMesh
from ..parallel.pipeline.executor import PipelineExecutor
from ..parallel.shard_spec import ShardSpec
from ..parallel.together import refuse_together
from ..parallel.tp.loss import causal_lm_loss, chunk_size, linear_causal_lm_loss, predicted_tokens
from ..parallel.tp.vocabulary import gather_vocabulary
from ..parallel.zero.fully_sharded import FullyShardedWeights
from ..parallel.zero.segment import ShardedWeights
from ..prepare.attention import Attention
from ..prepare.checkpointing_switches import Switches
from ..prepare.neftune import EmbeddingNoise
from .calling import accepted, as_output
from .cut import Cut, change_message
from .generation import pipelined_forward, share_generators
from .head import LinearHead, Prediction, is_plain, linear_head
from .logits import MicroBatch, forward_with_logits, refuse_own_heads
from .methods import WholeModel
from .moe.mixture import Mixture
from .prompts import check_prompts, refuse_foreign_ids
from .stage import Stage
from .stock.anatomy import Anatomy
from .stock.hooks import users_hooks
from .stock.own_forward import own_columns


class ParallelModel(WholeModel, GenerationMixin):
    """What every parallel model has besides its stock class. Made by `parallelize`, never directly.

    `forward` keeps the stock signature. In evaluation mode it returns whole logits and the loss on every rank, under
    tensor and pipeline parallelism alike. While training, `logits` are this rank's slice of the vocabulary, or
    None if the loss is fused with the head, and a model of several pipeline stages is run by `NanotronTrainer` only.

    Attributes:
        mesh: where this rank stands.
        anatomy: names of the model's parts.
        cut: what the stock model was when it was cut.
        shard_specs: parameter name -> which part of the Hub tensor it is, for the parameters of this rank.
        hub_shapes: shape of every tensor of the Hub checkpoint, in model order.
        hub_owners: pipeline rank that holds (and writes) each of them.
        hub_layout: which tensors of the Hub's files they are.
        stage_of: parameter name -> pipeline stage, for the parameters of this rank.
        stages: the pipeline stages of this rank, in model order.
        streams: seeds of dropout, or None if the model has none.
        mixture: losses over the routers and loads of the experts, or None for a dense model.
        sharded: what owns weights and gradients while the model trains, of the trainer that took it last.
        fuses_loss: compute the loss together with the head while training, without logits, if the model allows it.
        names_attention: whether the user named its attention, which is kept then.
        attention: what stands for the stock attention while it trains, or None.
        fp8: the FP8 copies of its weights, or None if it computes without.
        switches: what the user has said about recomputation, while a training run goes by its arguments.
        z_loss: coefficient of `log(Z)^2` in the loss of a training model, for each predicted token.
        needs_logits: make whole logits while training, for whoever computes the loss from them; set by the trainer.
        noise: what is added to embeddings in training steps, or None.
        micro_batch: the one that a trainer runs now, where `makes_logits`.
        vocab_sizes: how many logits each tensor-parallel rank computes; one number where the head is not cut.
        vocab_start: id of the first of ours.
        head_is_cut: whether the tensor-parallel ranks share the vocabulary.
        head_is_hooked: whether the user had hooked the head before the model was cut, which a stage without it forgets.
    """

    mesh: ParallelMesh
    anatomy: Anatomy
    cut: Cut
    shard_specs: dict[str, ShardSpec]
    hub_shapes: dict[str, tuple[int, ...]]
    hub_owners: dict[str, int]
    hub_layout: HubLayout
    stage_of: dict[str, int]
    stages: list[Stage]
    streams: LayerStreams | None
    mixture: Mixture | None
    executor: PipelineExecutor
    sharded: ShardedWeights | None = None
    fuses_loss: bool = True
    names_attention: bool = False
    attention: Attention | None = None
    fp8: WeightCopies | None = None
    switches: Switches | None = None
    z_loss: float = 0.0
    needs_logits: bool = False
    noise: EmbeddingNoise | None = None
    micro_batch: MicroBatch | None = None
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

    def check_cut(self) -> None:
        """Refuse a model that was changed since it was cut in a way that its weights cannot follow. All ranks together.

        Raises:
            ValueError: on every rank, naming the first change.
        """
        refuse_together(self.mesh, change_message(self))

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in; its parameters themselves are fp32 shards at ZeRO stage 3."""
        return super().dtype if self.sharded is None else self.sharded.compute_dtype

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As in any module. New weights that are still on their way are waited for."""
        if self.sharded is not None:
            self.sharded.wait()
        return super().named_parameters(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelModel:
        """See `copying.copy_model`."""
        from ..prepare.copy_model import copy_model  # which takes off what modules above this one have put on

        return copy_model(self, memo)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ParallelModel:
        """Under `to`, `half`, `cuda` and their like. A copy of sharded weights would part from what is trained.

        Raises:
            ValueError: while the weights belong to a trainer, for another device or dtype than theirs.
        """
        if self.sharded is None:
            self.executor.forget_layouts()
            return super()._apply(fn, recurse)
        have = torch.empty(0, dtype=self.dtype, device=self.mesh.device)
        want = fn(have)
        if (want.dtype, want.device.type) != (have.dtype, have.device.type):
            raise ValueError(
                f"a trainer owns the weights of this model, as {have.dtype} on {have.device.type}: they cannot go to "
                f"{want.dtype} on {want.device.type}. Save the model and load it where you want it."
            )
        return self

    def get_parameter(self, target: str) -> nn.Parameter:
        """As in any module. A module's attribute of that name may be something else (a router's weight, in fp32).

        Raises:
            AttributeError: if there is no such parameter.
        """
        owner, _, leaf = target.rpartition(".")
        parameter = self.get_submodule(owner)._parameters.get(leaf)
        if parameter is None:
            raise AttributeError(f"{type(self).__name__} has no parameter {target!r}.")
        return parameter

    def whole_parameter(self, name: str) -> torch.Tensor:
        """This rank's tensor-parallel part of a parameter. All ranks together: ZeRO stage 3 gathers it."""
        return self.get_parameter(name).detach() if self.sharded is None else self.sharded.whole(name)

    def write_parameter(self, name: str, value: torch.Tensor) -> None:
        """Set this rank's tensor-parallel part of a parameter, and what a trainer holds of it in fp32."""
        if self.sharded is not None:
            self.sharded.write(name, value)
            for segment in self.sharded.segments:
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
        if self.needs_logits or self.head_is_hooked or not self.plain_forward:
            return True
        if self.own_loss is not ForCausalLMLoss:
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
        z_loss = self.z_loss if self.training else 0.0
        if num_items_in_batch is None and self.training:  # a mean that is zero, not nan, where nothing is predicted
            num_items_in_batch = predicted_tokens(labels, shift_labels)
        # Whoever computes a loss from whole logits may call this for a part of it.
        is_whole = logits.shape[-1] == sum(self.vocab_sizes)
        start, group = (0, self.mesh.alone) if is_whole else (self.vocab_start, self._head_group)
        return causal_lm_loss(logits, labels, start, group, num_items_in_batch, shift_labels, z_loss)

    @property
    def _head_group(self) -> Group:
        """The ranks that share the vocabulary."""
        return self.mesh.tp if self.head_is_cut else self.mesh.alone

    def whole_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """`[..., V]` from this rank's slice of the vocabulary, on every tensor-parallel rank. Differentiable."""
        return gather_vocabulary(logits, self._head_group, self.vocab_sizes)

    @functools.cached_property
    def linear_head(self) -> LinearHead | None:
        """The head, if the loss is fused with it while the model trains."""
        return linear_head(self, self.stock_class)

    def stock_forward(
        self, view: PreTrainedModel, loss_weight: torch.Tensor | None = None, **inputs: Any
    ) -> CausalLMOutputWithPast:
        """The forward that transformers (or the user) wrote, over `view`; logits are this rank's slice, or None where
        the loss of a training model is fused with the head, or whole where `makes_logits`.

        Args:
            loss_weight: what the plain loss is multiplied by.
        """
        has_labels, makes_logits = inputs.get("labels") is not None, self.makes_logits
        inputs = accepted(self.stock_class.forward, {**inputs, "return_dict": True})
        wanted = self.training and self.fuses_loss and has_labels and not makes_logits
        fuses = wanted and inputs.get("logits_to_keep", 0) == 0 and self.linear_head is not None
        if self.training and isinstance(self.sharded, FullyShardedWeights):  # a fused head has its gradients by then
            self.sharded.gather_in_backward(view.get_output_embeddings(), not fuses)
        cast(ParallelModel, view).z_loss = self.z_loss  # a change of the model's does not reach into views
        if makes_logits:
            return forward_with_logits(self, view, inputs)
        if not fuses or self.linear_head is None:
            output = as_output(self.stock_class.forward(view, **inputs), has_labels)
            refuse_own_heads(self, output)
            if has_labels and loss_weight is not None:
                output.loss = output.loss * loss_weight
            return output
        scale = self.linear_head.scale
        # The largest slice counts: ranks have sums over each chunk, so all of them need the same chunks.
        chunk = chunk_size(inputs["labels"].numel(), max(self.vocab_sizes) * self.dtype.itemsize)
        items = inputs.get("num_items_in_batch")
        if loss_weight is not None:
            items = predicted_tokens(inputs["labels"], inputs.get("shift_labels")) if items is None else items
            items = items / loss_weight  # of a fused head, the weight's gradient cannot be multiplied later

        def loss(hidden: torch.Tensor, head: Linear) -> torch.Tensor:
            return linear_causal_lm_loss(
                hidden,
                head.weight,
                head.bias,
                inputs["labels"],
                self.vocab_start,
                self._head_group,
                items,
                inputs.get("shift_labels"),
                self.z_loss,
                chunk,
                scale,
                weight_gradient=head.weight_gradient,
            )

        with self.linear_head.predicting(view, loss):
            output = as_output(self.stock_class.forward(view, **inputs), has_labels)
        if output.logits.scale != scale:
            raise ValueError(
                f"logits were multiplied by {output.logits.scale}, and by {scale} when the model was tried: its config "
                "has changed since. Make the model anew."
            )
        if output.loss is not output.logits.loss or output.loss._version:
            raise ValueError(
                f"the forward of {self.stock_class.__name__} has changed its loss, which it did not when the model was "
                "tried; set model.plain_forward = False, and it is handed whole logits."
            )
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})

    def parallel_forward(self, gather_logits: bool = True, **inputs: Any) -> Any:
        """`forward` behind the stock signature. `gather_logits=False` spares the logits when only the loss counts."""
        as_tuple = inputs.pop("return_dict", True) is False
        refuse_foreign_ids(self, inputs)
        if len(self.stages) == 1 and self.mesh.pp_size == 1:
            if self.mixture is not None:
                self.mixture.refresh(self)
            output = self.stages[0].forward(inputs, None)
        elif self.training:
            raise ValueError(
                f"pp_size={self.mesh.pp_size}: a pipeline trains through NanotronTrainer, which feeds it micro-batches;"
                " call model.eval() to evaluate or generate with it directly."
            )
        else:
            if self.mixture is not None:
                self.mixture.refresh(self)
            output = pipelined_forward(self, inputs, gather_logits)
        if not self.training and gather_logits and self.mesh.pp_size == 1 and not self.makes_logits:
            output.logits = self.whole_logits(cast(torch.Tensor, output.logits))
        return output.to_tuple() if as_tuple else output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`transformers` generation on every rank of the model at once; all ranks return the same tokens.

        Call it on every rank with the same inputs (a `streamer` may be given to one rank alone). Sampling draws from
        the random generators of the model's first rank, which the generators of its other ranks then follow. With
        `ep_size` above 1 all data-parallel ranks take part, each with prompts of its own.
        """
        spans_experts = self.mesh.ep.size > 1 and not set(self.mesh.ep.ranks) <= set(self.mesh.model.ranks)
        self.mesh.assemble("generate", group=None if spans_experts else self.mesh.model)
        if self.mesh.model.size > 1:
            kwargs["disable_compile"] = True  # a static cache would compile the forward, collectives included
        check_prompts(self, args, kwargs, spans_experts)
        if spans_experts:
            kwargs["synced_gpus"] = True  # experts of other data-parallel ranks: all go on until the last has finished
        training = self.training
        self.eval()
        share_generators(self.mesh)
        try:
            return super().generate(*args, **kwargs)
        finally:
            self.train(training)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Write a standard Hub repository, all ranks together. See `save_hub_model`."""
        known = {"max_shard_size", "push_to_hub", "is_main_process", "state_dict", "safe_serialization"}
        if kwargs.get("state_dict") is not None:
            raise ValueError(
                "save_pretrained(state_dict=...): a parallel model writes its own weights, gathered from all ranks; "
                "leave it out, or bring other weights in with load_state_dict."
            )
        if unknown := {name for name, value in kwargs.items() if value} - known:
            raise ValueError(f"save_pretrained of a parallel model does not know {sorted(unknown)}.")
        if kwargs.get("push_to_hub"):
            raise ValueError("save_pretrained(push_to_hub=True): use NanotronTrainer.push_to_hub() instead.")
        self.mesh.assemble("save_pretrained", f" to {os.fspath(save_directory)}")
        save_hub_model(self, save_directory, kwargs.get("max_shard_size") or "5GB")


@functools.cache
def parallel_class(stock: type[PreTrainedModel]) -> type[ParallelModel]:
    """The parallel subclass of a stock class, whose `forward` shows the stock signature."""

    signature = inspect.signature(stock.forward)

    @functools.wraps(stock.forward)
    def forward(self: ParallelModel, *args: Any, **kwargs: Any) -> Any:
        named = dict(signature.bind_partial(self, *args).arguments)
        named.pop("self")
        return self.parallel_forward(**named, **kwargs)

    return type(f"Parallel{stock.__name__}", (ParallelModel, stock), {"forward": forward, "stock_class": stock})

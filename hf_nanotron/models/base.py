"""The parallel model: a `PreTrainedModel` subclass of the stock class that holds this rank's part."""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any, cast

import torch
from transformers import GenerationMixin, PreTrainedModel

from ..checkpoint.hub.model import save_hub_model
from ..parallel.batch import DOMAIN
from ..parallel.together import refuse_together
from .calling import goes_on
from .copy_model import copy_model
from .generation import pipelined_forward, share_generators
from .methods import WholeModel
from .prompts import check_prompts, refuse_foreign_ids
from .stage import Stage


class ParallelModel(WholeModel, GenerationMixin):
    """What every parallel model has besides its stock class. Made by `parallelize`, never directly.

    `forward` keeps the stock signature. In evaluation mode it returns whole logits and the loss on every rank, under
    tensor and pipeline parallelism alike. While training, `logits` are this rank's slice of the vocabulary, or
    None if the loss is fused with the head, and a model of several pipeline stages is run by `NanotronTrainer` only.

    The attributes are those of `ModelParts`, and:

    Attributes:
        stages: the pipeline stages of this rank, in model order.
        layers_of_stage: decoder layers of each stage of the whole model.
    """

    stages: list[Stage]
    layers_of_stage: tuple[range, ...]

    def check_cut(self) -> None:
        """Refuse a model that was changed since it was cut in a way that its weights cannot follow. All ranks together.

        Raises:
            ValueError: on every rank, naming the first change.
        """
        refuse_together(self.mesh, self.cut.change_message(self, self.shard_specs))

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelModel:
        """See `copy_model`."""
        return copy_model(self, memo)

    def parallel_forward(self, gather_logits: bool = True, **inputs: Any) -> Any:
        """`forward` behind the stock signature. `gather_logits=False` spares the logits when only the loss counts."""
        as_tuple = inputs.pop("return_dict", True) is False
        if DOMAIN in inputs and DOMAIN not in self.own_columns:
            column = inputs.pop(DOMAIN)
            if self.training_loss.domains is not None:
                self.training_loss.domains.columns = [column]
        refuse_foreign_ids(self, inputs)
        if not goes_on(inputs, self.training):
            inputs["use_cache"] = False
        if len(self.stages) == 1 and self.mesh.pp_size == 1:
            if self.mixture is not None:
                self.mixture.refresh(self)
            output = self.stages[0].forward(inputs, None)
        elif self.training:
            raise ValueError(
                f"pp_size={self.mesh.pp_size}: a pipeline-parallel model can only be trained by NanotronTrainer; call "
                "model.eval() to evaluate or generate with it directly."
            )
        else:
            if self.mixture is not None:
                self.mixture.refresh(self)
            output = pipelined_forward(self, self.stages, inputs, gather_logits)
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
                "save_pretrained(state_dict=...): a parallel model gathers and writes its own weights; omit the "
                "argument, or load other weights first with load_state_dict."
            )
        if unknown := {name for name, value in kwargs.items() if value} - known:
            raise ValueError(f"save_pretrained of a parallel model does not support {sorted(unknown)}.")
        if kwargs.get("push_to_hub"):
            raise ValueError("save_pretrained(push_to_hub=True): use NanotronTrainer.push_to_hub() instead.")
        if self.adapters:
            raise ValueError(
                "save_pretrained of a model with adapters is not supported: stock models would be loaded without "
                "them. Use trainer.save_model(), which writes the adapters in PEFT's format."
            )
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

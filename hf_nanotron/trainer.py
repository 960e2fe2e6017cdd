"""`NanotronTrainer`: a `transformers.Trainer` whose model is spread over tensor-, pipeline- and data-parallel ranks.

The loop, the callbacks, logging, evaluation and pushing are Trainer's own. What is replaced: where a step's gradients
come from (`training_step`), which samples a rank reads, how gradients are clipped, and how checkpoints are written.
"""

from __future__ import annotations

import gc
from typing import Any, cast

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .data.loader import FillerBatch
from .data.window_check import WindowCheck
from .models.base import ParallelModel
from .models.parallelize import parallelize
from .models.selfcheck import compare, try_whole
from .models.unwrap import refuse_meta, unwrap
from .monitor.garbage import FreezeGarbage
from .monitor.throughput import Throughput
from .ops.host_copy import to_device
from .optim.build import adopt_optimizer, build_optimizer, check_elementwise, check_scheduler, optimizer_choice
from .optim.norm import global_norm
from .optim.optimizer_link import OptimizerLink
from .parallel.batch import batch_shape, ones_like_tokens
from .parallel.collectives import all_reduce
from .parallel.mesh import ParallelMesh
from .parallel.together import together
from .prepare.attention import documents_of
from .prepare.checkpointing_switches import note_switches
from .prepare.setup import check_frozen, end_run, prepare_training, start_run
from .training.accelerator import DataParallelAccelerator
from .training.checkpointing import CheckpointingTrainer
from .training.collective_calls import CollectiveTrainer
from .training.data_order import DataTrainer
from .training.flow_agreement import FlowTrainer
from .training.gradients import GradientTrainer, users_callbacks
from .training.run_report import FiguresTrainer
from .training.same_on_all_ranks import check_shared, compare_ranks, values_of
from .training.step import TrainStep, weigh
from .training.step_window import DOCUMENTS, ROUTER_MASK
from .training.trainer_methods import check_methods, is_overridden
from .training.window_agreement import AgreeingTrainer
from .training_args import NanotronTrainingArguments

logger = logging.get_logger(__name__)


class NanotronTrainer(
    CollectiveTrainer,
    FlowTrainer,
    FiguresTrainer,
    AgreeingTrainer,
    GradientTrainer,
    DataTrainer,
    CheckpointingTrainer,
):
    """Trains a causal language model on any tp x pp x dp, and leaves standard Hub checkpoints.

    Takes the arguments of `transformers.Trainer`. `model` is one of `hf_nanotron.AutoModelForCausalLM`, made with the
    same sizes, or a stock causal LM, which is cut in place.

    Raises:
        ValueError: for an argument that cannot be honoured, naming it and what to use instead.
    """

    args: NanotronTrainingArguments
    model: ParallelModel
    accelerator: DataParallelAccelerator

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: NanotronTrainingArguments | None = None,
        *positional: Any,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, NanotronTrainingArguments):
            raise ValueError(
                f"NanotronTrainer takes `args` of type NanotronTrainingArguments, not {type(args).__name__}: they hold "
                "the parallel sizes."
            )
        args.check()
        refuse_arguments(positional, kwargs)
        check_methods(self)
        if not is_overridden(self, "create_scheduler") and not any(kwargs.get("optimizers") or ()):
            check_scheduler(args)
        self._mesh: ParallelMesh | None = None
        if model is not None:
            model = self._parallel_model(model, args)
        self._window: list[tuple[dict[str, Any], torch.Tensor | int | None]] = []
        self._link: OptimizerLink | None = None
        self._stepped = -1  # the last step that was run
        if model is not None:
            check_shared(model.mesh, cast(str, args.output_dir), "output_dir", args.save_strategy != "no")
        super().__init__(model, args, *positional, **kwargs)
        self.neftune_noise_alpha = None  # Trainer's own hook would draw other noise on each rank
        compare_ranks(self.model.mesh, values_of(self))
        self._set_up_training_state()
        if self.optimizer is not None:
            self.create_optimizer()
        self._open_remote()
        together(self.mesh, "checking the frozen parameters", self._check_frozen)
        together(self.mesh, "checking the loss", self._check_loss)
        self.throughput = Throughput(self.mesh, self.model.hub_shapes, self.model.config)
        self.add_callback(self.throughput)
        self.add_callback(FreezeGarbage())
        logger.info(
            f"mesh: tp {self.mesh.tp_size} x pp {self.mesh.pp_size} x dp {self.mesh.dp_size}; stages of this rank: "
            + ", ".join(f"{s.index} (layers {s.layers.start}-{s.layers.stop - 1})" for s in self.model.stages)
        )

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Without `torch_compile_backend`: accelerate compiles nothing here, but would switch TF32 on for it."""
        return {**super()._build_accelerator_args(**kwargs), "dynamo_plugin": TorchDynamoPlugin(backend="no")}

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator = DataParallelAccelerator.adopt(self.accelerator)

    # ---- model and optimizer ----

    def _parallel_model(self, model: PreTrainedModel, args: NanotronTrainingArguments) -> ParallelModel:
        model = unwrap(model)
        if isinstance(model, ParallelModel):
            if model.parallel != args.parallel:
                raise ValueError(
                    f"the model was made for {model.parallel}, but the training arguments say {args.parallel}; pass "
                    "`parallel=args.parallel` when you make the model."
                )
        else:
            refuse_meta(model)
            self._mesh = self._mesh or ParallelMesh(args.parallel, args.ddp_timeout_delta)
            trial = try_whole(model, self._mesh)
            model = parallelize(model, self._mesh)
            model.to(self._mesh.device)  # type: ignore[arg-type]
            compare(model, trial)
        if model.streams is not None:
            model.streams.seed = args.seed
        return model

    def call_model_init(self, trial: Any = None) -> ParallelModel:
        model = self._parallel_model(cast(PreTrainedModel, super().call_model_init(trial)), self.args)
        note_switches(model)
        return model

    def _set_up_training_state(self) -> None:
        """Weights, gradients and the step, for the model at hand."""
        model = self.model
        self.mesh = model.mesh
        self._check_model()
        self._note_frozen()
        self.mesh.set_timeout(self.args.ddp_timeout_delta)
        self.window_check = WindowCheck(self.mesh, model.vocabulary)
        self.accelerator.mesh, self.accelerator.model = self.mesh, model
        # Of the parameters that a user's optimizer was made over: sharding them may make others.
        self._names = {p: name for name, p in model.named_parameters()} if self.optimizer else {}
        self.training_state = prepare_training(model, self.args)
        self.weights, self._recomputed = self.training_state.weights, self.training_state.recomputed
        self._note_weights()
        self._step = TrainStep(self.training_state)
        self._loads = {}

    def _check_frozen(self) -> None:
        check_frozen(self.training_state, self.args.save_hub_weights)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        segments, order = self.weights.segments, list(self.model.hub_shapes)
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            choice = self._optimizer_choice()
            self.optimizer = build_optimizer(segments, order, decayed, self.args.weight_decay, *choice)
        elif self._names:
            adopt_optimizer(self.optimizer, self._names, segments, order)
            self._names = {}
        self._link_optimizer()
        return self.optimizer

    def _optimizer_choice(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        if self.optimizer_cls_and_kwargs is not None:
            return self.optimizer_cls_and_kwargs
        if is_overridden(self, "get_optimizer_cls_and_kwargs"):
            choice = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            check_elementwise(choice[0], "get_optimizer_cls_and_kwargs")
            return choice
        return optimizer_choice(self.args, getattr(torch, self.args.optim_state_dtype))

    def _link_optimizer(self) -> None:
        """Let the optimizer update this rank's segments, whoever has made it, over them or over the model."""
        optimizer, segments = self.optimizer, self.weights.segments
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"create_optimizer must set self.optimizer; it is {type(optimizer).__name__}.")
        masters = {segment.master for segment in segments}
        if any(parameter not in masters for group in optimizer.param_groups for parameter in group["params"]):
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            adopt_optimizer(optimizer, names, segments, list(self.model.hub_shapes))
        if self._link is None or self._link.optimizer is not optimizer or self._link.weights is not self.weights:
            self._link = OptimizerLink(optimizer, self.weights)
        self._link.compares = self._callbacks_read_weights()
        self._link.overlap = not self._link.compares

    def get_optimizer_group(self, param: str | nn.Parameter | None = None) -> Any:
        """The parameter group that updates a parameter of the model (or one of that name); without one, the parts of
        parameters that each group updates on this rank.

        Raises:
            ValueError: without an optimizer, or for a parameter that none of its groups updates on this rank.
        """
        if param is None:
            return super().get_optimizer_group()
        if self.optimizer is None:
            raise ValueError("there is no optimizer yet: call create_optimizer() or train() before.")
        named = dict(self.model.named_parameters())
        names = [name for name, parameter in named.items() if param is parameter or param == name]
        masters = {segment.master for segment in self.weights.segments if segment.name in names}
        for group in self.optimizer.param_groups:
            if masters & set(group["params"]):
                return group
        name = param if isinstance(param, str) else "".join(names)
        if not names and name not in self.model.hub_shapes:
            raise ValueError(f"{name or 'the tensor'} is no parameter of the model.")
        raise ValueError(f"{name} is updated by other ranks, or frozen: no group has a part of it on this rank.")

    def get_num_trainable_parameters(self) -> int:
        """Trainable parameters of the whole model, not of this rank."""
        return self.model.num_parameters(only_trainable=True)

    def _callbacks_read_weights(self) -> bool:
        """Whether a callback of the user's is called between an optimizer step and the next forward."""
        events = ("on_optimizer_step", "on_step_end", "on_step_begin", "on_epoch_begin", "on_epoch_end", "on_save")
        return any(users_callbacks(self.callback_handler.callbacks, event) for event in events)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        """Optimizer and scheduler; nothing wraps the model."""
        self._window, self._stepped = [], -1  # of a run that was broken off
        if self.model is not self.training_state.model:  # `model_init` made a new one
            self._set_up_training_state()
        elif self.model.weights is not self.weights:
            raise ValueError("another trainer has taken this model since; train with that one, or make a new trainer.")
        start_run(self.training_state, self.args)
        self._take_written()
        together(self.mesh, "checking the frozen parameters", self._check_frozen)
        together(self.mesh, "checking the loss", self._check_loss)
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        self.create_optimizer()
        self._link_optimizer()  # an override may have made its own
        self.create_scheduler(num_training_steps=max_steps)
        self.model_wrapped = self.model
        if resume_from_checkpoint is not None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        self._report_memory()
        together(self.mesh, "noting which run is at hand", self._note_run)
        return self.model, train_dataloader

    # ---- one step ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Collect micro-batches until the window is full, then run the schedule over all of them.

        Returns the mean loss of the whole step, over all ranks, with the last micro-batch, and zero before.
        """
        if not self.is_in_train:
            raise ValueError(
                "training_step was called outside of train(): it collects the micro-batches of a step, and runs the "
                "pipeline over all of them. Call train(max_steps=...), or model.eval() and the model for a loss alone."
            )
        if self._stepped == self.state.global_step:
            raise ValueError(
                "training_step was called again after the last micro-batch of a step, whose gradients are reduced by "
                "then. Call super().training_step once for each batch; use gradient_accumulation_steps for more."
            )
        self._finish_background_save(wait=False)
        self._before_micro_batch(inputs)
        self._window.append((inputs, num_items_in_batch))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        has_items = isinstance(num_items_in_batch, torch.Tensor)
        if not has_items:
            self._read_verdict()  # of what is wrong with the data, rather than of this
        if not has_items and (self._needs_labels or self._counted):  # other ranks may have labels
            raise ValueError(
                f"the batches have no `labels` (they have {sorted(inputs)}); tokenise with labels, or use "
                "DataCollatorForLanguageModeling(tokenizer, mlm=False)."
            )
        self._follow_loss()
        # A stream may end inside a window; Trainer then carries micro-batches over, each with the count of its own.
        micro_batches = [{**self._prepare_inputs(b), "num_items_in_batch": count} for b, count in self._window]
        if not (self.model.makes_logits or self._is_scaled or self.model_accepts_loss_kwargs):
            fillers = [isinstance(batch, FillerBatch) for batch, _ in self._window]
            micro_batches = weigh(micro_batches, fillers, self.mesh)
        multiple = self.mesh.tp_size if self.mesh.parallel.sequence_parallel else 1
        for micro_batch, (batch, _) in zip(micro_batches, self._window, strict=True):
            if self.training_state.attention is not None:
                micro_batch[DOCUMENTS] = documents_of(batch, multiple)
            if isinstance(batch, FillerBatch):
                micro_batch[ROUTER_MASK] = torch.zeros_like(ones_like_tokens(micro_batch))
        batches = [batch for batch, _ in self._window]
        self._window = []
        self._read_verdict()
        mixture = self.model.mixture
        if mixture is not None:
            mixture.counts_loads = bool(self.args.moe_bias_update_rate) or self._logs_this_step()
        self._stepped = self.state.global_step
        self._check_slots()
        loss = self._step.run(micro_batches, self.state.global_step, self._step_loss(batches, has_items))
        self._run_gradient_hooks()
        self._norm = global_norm(self.weights.segments, self.mesh)
        is_finite = self._judge(self._norm, loss)
        tokens = sum(0 if isinstance(batch, FillerBatch) else batch_shape(batch).numel() for batch in batches)
        length = max(batch_shape(batch)[1] for batch in batches)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0 and self.mesh.device.type == "cuda":
            torch.cuda.empty_cache()
        speaks = self.mesh.is_last_stage and self.mesh.tp_rank == 0
        # One sum over the job: the loss lives on the last stage, and every rank reports it.
        signalled = float(self._signals.received is not None)
        told = to_device(torch.tensor([0.0, tokens * speaks, signalled], dtype=torch.float64), loss.device)
        told[0] = loss * speaks
        told = all_reduce(told, self.mesh.world)
        if mixture is not None and mixture.counts_loads:
            self._loads = mixture.balance(is_finite)
        self._stop_if_told(told[2])
        self.throughput.add_tokens(told[1], length)
        return self._filtered(told[0].float())

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        if self._evaluates:
            return self._items_of_batch(batch_samples[0])
        return super()._get_num_items_in_batch(batch_samples, device)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        check_methods(self)  # also those put on it since it was made
        note_switches(self.model)
        try:
            return super().train(*args, **kwargs)
        finally:
            gc.unfreeze()
            end_run(self.model)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        assert self._link is not None
        self._link.clip(NanotronTrainer._get_grad_norm(self, model), self.args.max_grad_norm)
        return self._norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor:
        if self._stepped != self.state.global_step:
            raise ValueError(
                "training_step did not call super() for the last micro-batch of this step, with which the step runs. "
                "To leave a batch out, give it labels of -100."
            )
        return self._norm

    # ---- data ----

    def get_tp_size(self) -> int:
        """Ranks that see the same batch: what Trainer divides by wherever it counts batches by the world size."""
        return self.args.parallel.model_parallel_size

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, torch.Tensor):
            return to_device(data, self.args.device)
        return super()._prepare_input(data)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "hyperparameter_search is not available: its trials run in one process, a parallel model in many. Start "
            "one job per trial."
        )


def refuse_arguments(positional: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse the Trainer arguments that cannot be honoured.

    Raises:
        ValueError: naming the argument and the reason.
    """
    if positional:
        raise ValueError("NanotronTrainer takes `model` and `args` by position and the rest by name.")
    if kwargs.get("optimizer_cls_and_kwargs") is not None:
        check_elementwise(kwargs["optimizer_cls_and_kwargs"][0], "optimizer_cls_and_kwargs")
    optimizer, scheduler = kwargs.get("optimizers") or (None, None)
    if optimizer is not None:
        check_elementwise(type(optimizer), "optimizers")
    elif scheduler is not None:
        raise ValueError(
            "optimizers=(None, scheduler): a scheduler sets the learning rate of the optimizer it was made for. Pass "
            "both, or `lr_scheduler_type` with `lr_scheduler_kwargs`."
        )

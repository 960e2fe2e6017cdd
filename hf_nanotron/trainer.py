"""`NanotronTrainer`: a `transformers.Trainer` whose model is spread over tensor-, context-, pipeline- and data-parallel
ranks.

The loop, the callbacks, logging, evaluation and pushing are Trainer's own. What is replaced: where a step's gradients
come from (`training_step`), which samples a rank reads, how gradients are clipped, and how checkpoints are written.

This is the only file that overrides Trainer. Overrides stand in the order in which Trainer calls them; what they do is
in `training/`, in classes that know nothing of a Trainer.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput
from transformers.utils import logging

from .arguments.base_order import check_base_order
from .checkpoint.directory.save import Save
from .checkpoint.directory.verify import MARKER
from .checkpoint.files.repository import AVERAGE_FOLDER, drop_average, prepare_push, unlink_link
from .checkpoint.hub.card import write_model_card
from .checkpoint.hub.model import save_hub_model
from .checkpoint.state.buffers import load_buffers
from .checkpoint.state.file import AVERAGE
from .checkpoint.state.training_state import load_training_state
from .data.dealing import FillerBatch
from .data.domain_column import domain_names
from .data.loader import DataParallelLoader
from .data.ordered import brings_order, is_run
from .data.window_check import WindowCheck
from .models.base import ParallelModel
from .models.sharding.unwrap import refuse_meta, unwrap
from .models.token_figures import TokenFigures
from .monitor.garbage import FreezeGarbage
from .monitor.health import check_health
from .monitor.memory import MemoryReport
from .monitor.run_log import RunLog
from .monitor.throughput import Throughput
from .ops.host_copy import to_device
from .optim.build import (
    adopt_optimizer,
    build_optimizer,
    check_elementwise,
    names_to_decay,
    optimizer_choice,
)
from .optim.ema import WeightAverage
from .optim.gradients import GradientHook, GradientPart, HookHandle
from .optim.norm import global_norm
from .optim.optimizer_link import OptimizerLink
from .parallel.dropout_streams import share_host_generators
from .parallel.mesh import ParallelMesh
from .parallel.run_watch import RunWatch
from .parallel.together import all_or_none, together
from .parallel.zero.segment import ShardedWeights
from .plan.make import plan_of_trainer
from .plan.result import Plan
from .prepare.checkpointing_switches import note_switches
from .prepare.mlp_chunks import refuse_hooks
from .prepare.setup import check_frozen, end_run, prepare_training, start_run
from .prepare.training_state import TrainingState
from .redaction import redacted
from .training.accelerator import DataParallelAccelerator
from .training.agreement.flow import FlowAgreement
from .training.agreement.values import check_shared, compare_ranks, values_of
from .training.agreement.windows import WindowAgreement, evaluated_tokens
from .training.batch_warmup import batch_metrics, with_batch_warmup
from .training.checkpointer import Checkpointer
from .training.collating import collator_of
from .training.constructor import check_given
from .training.data_fit import check_evaluable, fitted
from .training.data_order import CURSOR, DataOrder, DataProgress
from .training.dealt_evaluation import DealtModel
from .training.domains import DomainLog
from .training.doremi import DoReMi, check_domains, check_doremi, warn_without_doremi
from .training.evaluation import EvaluationRun, correct_speed, samples_in_words
from .training.given_models import check_parallel, frozen_beside, place_in_words, shard_stock
from .training.gradients import GradientAccess, WrittenWeights, check_model, may_write_weights, note_frozen
from .training.load_weights import load_rest, load_weights
from .training.loaders import make_loader
from .training.log_line import LogLine
from .training.lr_schedule import KEY as SCHEDULE, RunSchedule
from .training.metrics_detail import MetricsDetail, tell_callbacks
from .training.nonfinite import NonFiniteGuard
from .training.optimizer import group_of, link_optimizer, make_average, matrix_layouts
from .training.parametrization import check_parametrization, check_resumed, parametrization_state, update_rules
from .training.phases import watch_run
from .training.profiling import StepProfiler
from .training.remote import RemoteUploads
from .training.reporting import Reports
from .training.run_report import RunReport, logs_next, report_memory
from .training.same_model import check_same_model, model_state
from .training.samplers import eval_sampler
from .training.signals import StopSignals
from .training.small_files import copied_state, taking_states, write_companions, write_generators, write_trainer_state
from .training.snapshots import MemorySnapshots
from .training.step.calls import refuse_missing, refuse_stray
from .training.step.context import check_batch
from .training.step.custom_loss import LossChoice
from .training.step.forward_pass import ForwardPass
from .training.step.micro_batches import Window, make_micro_batches
from .training.step.train_step import TrainStep
from .training.trainer_methods import LIBRARIES, check_methods, is_overridden, is_subclass
from .training_args import NanotronTrainingArguments

logger = logging.get_logger(__name__)


class NanotronTrainer(Trainer):
    """Trains a causal language model on any tp x cp x pp x dp, and leaves standard Hub checkpoints.

    Takes the arguments of `transformers.Trainer`. `model` is one of `hf_nanotron.AutoModelForCausalLM`, made with the
    same sizes, or a stock causal LM, which is sharded in place.

    Args:
        teacher: a frozen model, made in the same ways, whose logits `compute_loss_func` finds in
            `outputs.teacher_logits`.
        doremi: weighs the domains of the data.

    Attributes:
        mesh: where this rank stands.
        weights: the model's, divided among the ranks.
        memory_report: bytes of this rank, once it trains.

    Raises:
        ValueError: for an argument that cannot be honoured, naming it and what to use instead.
    """

    model: ParallelModel
    accelerator: DataParallelAccelerator
    mesh: ParallelMesh
    weights: ShardedWeights
    throughput: Throughput
    memory_report: MemoryReport
    training_state: TrainingState
    _names: dict[nn.Parameter, str]
    libraries: ClassVar[tuple[str, ...]] = LIBRARIES

    # ---- construction ----

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_base_order(cls, NanotronTrainer, Trainer, "hf_nanotron.trl.NanotronSFTTrainer for TRL")

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: NanotronTrainingArguments | None = None,
        *positional: Any,
        teacher: PreTrainedModel | None = None,
        doremi: DoReMi | None = None,
        **kwargs: Any,
    ) -> None:
        args = check_given(self, args, positional, kwargs)
        self._mesh: ParallelMesh | None = None
        if model is not None:
            model = self._parallel_model(model, args)
            self._mesh = model.mesh
        self._teacher_model, self.doremi = teacher, doremi
        self._window: list[tuple[dict[str, Any], torch.Tensor | int | None]] = []
        self._stepped = -1  # the last step that was run
        self._link: OptimizerLink | None = None
        self._average: WeightAverage | None = None
        self._flow: FlowAgreement | None = None
        self._data_order, self._gradients, self._uploads = DataOrder(args), GradientAccess(), RemoteUploads(args)
        self._snapshots = MemorySnapshots(args)
        self._checkpointer = Checkpointer(args, self._uploads, self._snapshots, self._push_committed)
        self._signals, self._schedule = StopSignals(args.save_on_signal), RunSchedule(args)
        self._reports = Reports()
        if model is not None:
            check_shared(model.mesh, cast(str, args.output_dir), "output_dir", args.save_strategy != "no")
        train_dataset = kwargs["train_dataset"] = with_batch_warmup(kwargs.get("train_dataset"), args)
        hides_data = is_run(train_dataset) and args.max_steps > 0
        if hides_data:  # Trainer would ask for a length, which may take long to find
            kwargs["train_dataset"] = None
        super().__init__(model, args, *positional, **kwargs)
        if hides_data:
            self.train_dataset = train_dataset
        check_evaluable(self.eval_dataset)
        self.callback_handler.callbacks.insert(0, DataProgress(self._data_order))
        self._default_collator = self.data_collator if kwargs.get("data_collator") is None else None
        self.neftune_noise_alpha = None  # Trainer's own hook would draw other noise on each rank
        compare_ranks(self.model.mesh, values_of(self))
        self._take_up_model()
        if self.optimizer is not None:
            self.create_optimizer()
        self._uploads.open()
        all_or_none(self.mesh, "checking the frozen parameters", self._check_frozen)
        all_or_none(self.mesh, "checking the loss", self._check_loss)
        self.throughput = Throughput(self.mesh, self.model.hub_shapes, self.model.config)
        self._report = RunReport(self.throughput)
        self._log_line = LogLine((self.throughput, self._uploads))
        self.callback_handler.callbacks.insert(0, self.throughput)  # before a user's, which may evaluate or save
        self._garbage, self._profiler = FreezeGarbage(), StepProfiler(self.mesh, self.throughput)
        self._run_log = RunLog(self.mesh, self.throughput, self.model.num_parameters(), MARKER)
        for callback in (self._garbage, self._profiler, self._run_log):
            self.add_callback(callback)
        logger.info(place_in_words(self.model))

    @property  # type: ignore[override]
    def args(self) -> NanotronTrainingArguments:
        """Others may be assigned between runs. All parts of the trainer go by them."""
        return self._args

    @args.setter
    def args(self, value: NanotronTrainingArguments) -> None:
        self._args = value
        for name in ("_data_order", "_uploads", "_snapshots", "_checkpointer", "_guard", "_schedule", "_detail"):
            if (part := vars(self).get(name)) is not None:  # a subclass may assign before it calls `__init__`
                part.args = value

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's, for which the ranks of a replica are one process where data is dealt or results are joined."""
        super().create_accelerator_and_postprocess()
        self.accelerator = DataParallelAccelerator.adopt(self.accelerator)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Without `torch_compile_backend`: accelerate compiles nothing here, but would switch TF32 on for it."""
        return {**super()._build_accelerator_args(**kwargs), "dynamo_plugin": TorchDynamoPlugin(backend="no")}

    # Trainer assigns them when it is made, and reads them in each evaluation.

    @property
    def gather_function(self) -> Callable[[Any], Any]:
        """Joins evaluation results over the data-parallel ranks, in the order of one process."""
        return lambda data: self._evaluation.gather(data)

    @gather_function.setter
    def gather_function(self, value: Any) -> None:
        """Trainer assigns accelerate's gather here, which would count every batch once per tp, cp and pp rank."""

    @property
    def preprocess_logits_for_metrics(self) -> Callable[[Any, Any], Any] | None:
        """The user's function, which sees the batch of this rank alone, as in one process."""
        function = self._preprocess_logits
        return None if function is None else lambda *data: self._evaluation.preprocess(function, *data)

    @preprocess_logits_for_metrics.setter
    def preprocess_logits_for_metrics(self, value: Callable[[Any, Any], Any] | None) -> None:
        self._preprocess_logits = value

    # ---- train ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`. `resume_from_checkpoint=True` takes the newest committed checkpoint that is undamaged;
        `"auto"` does so if the run has one, and otherwise starts from the first step; `"auto:PATH"` otherwise from
        that checkpoint.

        Raises:
            ValueError: if the named checkpoint is not complete, or there is none at all.
        """
        check_methods(self)  # also those put on it since it was made
        note_switches(self.model)
        try:
            self.mesh.assemble("train", f" with resume_from_checkpoint={resume_from_checkpoint or None}")
            self._guard.begin_run()
            self._snapshots.warn_of_restarts(resume_from_checkpoint)
            with self._checkpointer.running(resume_from_checkpoint) as source:
                log = self._run_log.running(self.args.run_log)
                index = self._checkpointer.index_of(source)
                with self._watch(), self._schedule.branch(self.mesh, source, index), self._signals, log:
                    if self.args.health_check:
                        check_health(self.mesh)
                    result = super().train(source, *args, **kwargs)
                    self._uploads.wait(self._signals)
                self.weights.wait()
                return result
        finally:
            self._garbage.release()
            self.throughput.release()
            self._profiler.release()
            self._data_order.end_run()
            end_run(self.model, self.training_state)

    def plan(self, gpu: str | None = None, gpus: int | None = None, **options: Any) -> Plan:
        """What a run of this trainer's model and arguments costs, before it is started (`hf-nanotron plan`).

        In a job, all ranks call it, and rank 0 plans for them. Stock arguments and model count; a subclass's overrides
        do not.

        Args:
            gpu: kind of GPU, such as `"h100"`; that of `rates`, or else of this process, if None.
            gpus: of the job; as many as there are processes if None.
            options: `gpus_per_node` (8, or all of fewer), `rates` (a file of `hf-nanotron bench --rates`),
                `sequence_length` (tokens of a row; that of the training data if not given), `run` (False: do not
                rehearse the ranks).

        Raises:
            ValueError: for a GPU that is not in the table, and in the trainer's words for what cannot run.
        """
        return plan_of_trainer(self, NanotronTrainer, gpu, gpus, **options)

    def call_model_init(self, trial: Any = None) -> ParallelModel:
        """Shards the model that `model_init` returns."""
        model = self._parallel_model(cast(PreTrainedModel, super().call_model_init(trial)), self.args)
        note_switches(model)
        return model

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Reads this rank's part of the weights that are not in the training state."""
        index = self._checkpointer.index_of(resume_from_checkpoint)
        check = partial(check_resumed, resume_from_checkpoint, index, self.model)
        together(self.mesh, "comparing parametrizations", check)
        load_weights(resume_from_checkpoint, self.model, self.weights, index)
        check_same_model(resume_from_checkpoint, index, self.model)  # which is the same on all ranks

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        """Trainer's, from the cursor of the checkpoint on, and with flags that act on all ranks."""
        self._flow = FlowAgreement(self.model.mesh, self.callback_handler.callbacks, is_subclass(self))
        index = self._checkpointer.index_of(resume_from_checkpoint)
        self._data_order.begin_run(resume_from_checkpoint, index)
        self._domains = DomainLog(self.model, self.train_dataset, index)
        if self.doremi is not None:
            assert self._reference_pass is not None
            names, proxy = domain_names(self.train_dataset), ForwardPass(self.training_state)
            self.doremi.begin_run(names, proxy, self._reference_pass, resume_from_checkpoint, index)
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, *rest, **kwargs)

    # ---- data ----

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Sampler[int] | None] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataParallelLoader:
        """Deals batches over data-parallel ranks alone; a loader for training knows its position."""
        if not is_training:
            check_evaluable(dataset)
        if brings_order(dataset):
            dataset = fitted(dataset, self.model, self.processing_class, description)
            dataset = self._data_order.take(dataset) if is_training else dataset
        sampler = sampler_fn(dataset) if sampler_fn is not None else None  # it may read a column that goes next
        if brings_order(dataset) or isinstance(dataset, Dataset) or not hasattr(dataset, "column_names"):
            drop = partial(self._get_collator_with_removed_columns, description=description)
            is_default = self.data_collator is self._default_collator
            collate = collator_of(dataset, self.data_collator, is_default, drop)
        else:
            dataset, collate = self._remove_unused_columns(dataset, description=description), self.data_collator
        step_batches = self._data_order.step_batches if is_training else None
        loader = make_loader(
            self.args, self.model.mesh, dataset, sampler, collate, batch_size, is_training, step_batches
        )
        if dataloader_key is not None and self.args.dataloader_persistent_workers:
            self._eval_dataloaders = {**getattr(self, "_eval_dataloaders", {}), dataloader_key: loader}
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """By `data_seed` alone, at any sizes; groups by length as the run began."""
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        return self._data_order.train_sampler(
            dataset, lambda: self.get_total_train_batch_size(self.args), self.processing_class
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        """By `data_seed` alone, at any sizes."""
        return eval_sampler(self.args, eval_dataset, self.processing_class)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Trainer's; of a resumed run, with the epochs and steps that its remaining samples take."""
        self._data_order.compare(self.model.mesh, dataloader)
        if (values := self._data_order.plan_run(dataloader, self._train_batch_size)) is not None:
            return values
        epochs, *counts, batch, rounds, max_steps = super().set_initial_training_values(args, dataloader)
        sizes = self._train_batch_size, batch
        epochs, max_steps = self._data_order.plan(dataloader, self.train_dataset, *sizes, epochs, max_steps)
        return epochs, *counts, batch, rounds, max_steps

    def get_total_train_batch_size(self, args: Any) -> int:
        """The same at every data-parallel size that `max_dp_size` allows."""
        return self._train_batch_size * self._data_order.step_batches

    def get_tp_size(self) -> int:
        """Ranks that see the same batch: what Trainer divides by wherever it counts batches by the world size."""
        return self.args.parallel.model_parallel_size

    # ---- state, model and optimizer of a run ----

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """Trainer's, for the best checkpoint of this run alone, and with the progress that the cursor says."""
        epoch, rounds = super()._init_training_state(max_steps, *args)
        self._checkpointer.take_up(self.state, max_steps)
        return self._data_order.progress(epoch, rounds, self.state)

    def _load_callback_state(self) -> None:
        """Trainer's, with an error that says what to do."""
        with taking_states():
            super()._load_callback_state()

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        """Optimizer and scheduler over this rank's parts of the weights; nothing wraps the model."""
        self._window, self._stepped = [], -1  # of a run that was broken off
        if self.model is not self.training_state.model:  # `model_init` made a new one
            self._take_up_model()
        elif self.model.weights is not self.weights:
            raise ValueError("another trainer has taken this model since; train with that one, or make a new trainer.")
        start_run(self.training_state, self.args)
        self._written.take()
        all_or_none(self.mesh, "checking the frozen parameters", self._check_frozen)
        all_or_none(self.mesh, "checking the loss", self._check_loss)
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        self.create_optimizer()
        link = self._link_optimizer()  # an override may have made its own
        self._average = link.average = make_average(self.args, self.weights, self.mesh.device)
        self.create_scheduler(num_training_steps=max_steps)
        self.model_wrapped = self.accelerator.prepare_model(self.model, evaluation_mode=True)  # evaluations need not
        if resume_from_checkpoint is not None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        assert self.optimizer is not None
        data = self.train_dataset, self._average, (self._teacher_pass, self._reference_pass)
        self.memory_report = report_memory(self.args, self.training_state, self.optimizer, *data)
        self._checkpointer.reserve(self.model, self.weights, self.optimizer, self._average, not self.trains_adapters)
        together(self.mesh, "noting which run is at hand", self._checkpointer.note_run)
        together(self.mesh, "opening the reports", self._open_reports)
        return self.model, train_dataloader

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Over this rank's parts of the weights; one that the user has made over the model is given them."""
        segments, order = self.weights.segments, list(self.model.hub_shapes)
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            choice = self._optimizer_choice()
            matrices, rules = matrix_layouts(self.model), update_rules(self.model, choice[0])
            self.optimizer = build_optimizer(
                segments, order, decayed, self.args.weight_decay, *choice, rules=rules, matrices=matrices
            )
        elif self._names:
            adopt_optimizer(self.optimizer, self._names, segments, order)
            self._names = {}
        self._link_optimizer()
        return self.optimizer

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Trainer's, without those of `no_weight_decay`."""
        names = super().get_decay_parameter_names(model)
        return names_to_decay(names, self.args.no_weight_decay or [], self.model.hub_shapes)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Reads this rank's part of the training state."""
        if checkpoint is not None:
            assert self.optimizer is not None
            self.weights.wait()
            index = self._checkpointer.index_of(checkpoint)
            state = self.optimizer, self.lr_scheduler, self._average, index
            extra = load_training_state(checkpoint, self.mesh, self.weights.segments, *state)
            if self.doremi is None and self.mesh.rank == 0:
                warn_without_doremi(extra, os.fspath(checkpoint))
            if self._has_own_schedule:
                saved, warns = extra.get(SCHEDULE), self.mesh.rank == 0
                self._schedule.resume(saved, self.lr_scheduler, os.fspath(checkpoint), warns)
            load_buffers(checkpoint, self.model, index)
            self.weights.publish()
            self._guard.refuse_to_resume(checkpoint, self.optimizer)

    # ---- an epoch ----

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Trainer's, when ranks agree on flags, weights, hooks and loss; of a resumed epoch, what is left of it."""
        assert self._flow is not None
        loader, checkpoint = kwargs["train_dataloader"], kwargs["resume_from_checkpoint"]
        self._flow.begin_epoch(self.control, self.state.global_step)
        self._windows.begin_epoch(loader)
        self._checkpointer.hold()
        self._written.take()  # what callbacks wrote when the run or the epoch began
        with self._guard.filtering(), self._gradients.watching(self.mesh, self.callback_handler.callbacks):
            rest = self._data_order.begin_epoch(
                loader, kwargs["epoch"], kwargs["steps_in_epoch"], self.state, checkpoint
            )
            if rest is not None:  # for Trainer a short epoch from its first batch on: it has nothing to skip
                kwargs.update(epochs_trained=-1, steps_in_epoch=rest.rounds, num_update_steps_per_epoch=rest.steps)
                if rest.is_resumed and not rest.samples:
                    self._load_rng_state(checkpoint)
            all_or_none(self.mesh, "checking the loss", self._check_loss)  # which callbacks may have changed
            compare_ranks(self.mesh, self._loss_choice.whose)
            stops = self.control.should_training_stop
            super()._run_epoch(**kwargs)  # type: ignore[no-untyped-call]
            if rest is not None and rest.samples and loader.rounds == 0:
                self.control.should_training_stop = stops  # nothing was left of a stream: on to the next epoch

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's; then the ranks of a replica go on from the state of its first: they must draw the same crops."""
        super()._load_rng_state(checkpoint)
        share_host_generators(self.model.mesh.model)

    # ---- a window ----

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's; ranks tell each other where reading fails."""
        window = super().get_batch_samples(
            self._windows.until_failure(self.throughput.reading(epoch_iterator)), *args, **kwargs
        )
        if (checkpoint := self._data_order.rng_to_restore()) is not None:
            self._load_rng_state(checkpoint)
        return window

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """Predicted tokens of a window over all data-parallel ranks, in the sum that compares what they have read."""
        if self._evaluation.is_predicting:
            return evaluated_tokens(batch_samples[0])
        step, across_devices = self.state.global_step + 1, self.args.average_tokens_across_devices
        return self._windows.count_tokens(batch_samples, step, device, across_devices)

    # ---- a step ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Collect micro-batches until the window is full, then run the schedule over all of them.

        Returns the mean loss of the whole step, over all ranks, with the last micro-batch, and zero before.
        """
        refuse_stray(self.is_in_train, self._stepped == self.state.global_step)
        self._windows.before_micro_batch(inputs, self.state.global_step + 1)
        if self.args.include_num_input_tokens_seen != "no":  # Trainer communicates after each micro-batch
            self._windows.read_verdict()
        self._window.append((inputs, num_items_in_batch))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        window, self._window = self._window, []
        return self._run_step(window)

    def _run_step(self, window: Window) -> torch.Tensor:
        """A whole step but for the optimizer's part: micro-batches, schedule, hooks, norm, verdict, report."""
        assert self._link is not None
        step, mixture, batches = self.state.global_step, self.model.mixture, [batch for batch, _ in window]
        has_items = self._windows.has_items(window, lambda: self._loss_choice.needs_labels)
        loss_choice = self._follow_loss()
        micro_batches = make_micro_batches(
            window, self._prepare_inputs, self.training_state, loss_choice.is_mean_of_means
        )
        self._windows.read_verdict()
        if mixture is not None:
            mixture.counts_loads = bool(self.args.moe_bias_update_rate) or logs_next(self.args, self.state)
        self._stepped = step
        self._written.check_slots()
        domains, own_loss = self._domains.totals.sums_of(micro_batches), loss_choice.of_step(batches, has_items)
        if self.doremi is not None and domains is not None:
            self.doremi.weigh(micro_batches, domains)
        teacher = self._teacher_pass if own_loss is not None and own_loss.of_outputs is not None else None
        figures = self._new_figures(len(batches))
        if mixture is not None:
            mixture.share = self._share_of_routers(batches)
        loss = self._step.run(micro_batches, step, own_loss, domains, teacher, figures)
        self._gradients.run_hooks(self._link)
        self._detail.take_gradients()
        self._norm = global_norm(self.weights.segments, self.mesh)
        self._link.number = step + 1
        predicts = bool(self._windows.counted) or not has_items or not loss_choice.needs_labels
        is_finite = self._guard.judge(step + 1, self._norm, loss, self._link, predicts)
        self._empty_cache()
        is_told = self._signals.received is not None
        mean_loss, told = self._report.sum_step(self.mesh, loss, batches, is_told, figures)
        if figures is not None:
            self._note_figures(figures, "train")
        self._domains.end_step(domains, own_loss is None, mean_loss, self._guard.filters)
        if mixture is not None and mixture.counts_loads:
            self._report.loads = mixture.balance(is_finite)
        self._checkpointer.stop_if_told(told, self._signals.received, self.control)
        return self._guard.filtered(mean_loss, self._tr_loss)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Loss of one batch, as `Trainer.compute_loss` in one process; a step sums those of all ranks.

        While a model trains, it is called for a subclass that overrides it, and for a model with hooks.
        """
        loss, outputs = self._loss_choice.of_batch(model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _prepare_input(self, data: Any) -> Any:
        """Trainer's, without waiting for the copy to the device."""
        if isinstance(data, torch.Tensor):
            return to_device(data, self.args.device)
        return super()._prepare_input(data)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None for a batch that only keeps this rank in step."""
        return 0 if isinstance(inputs, FillerBatch) else super().floating_point_ops(inputs)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Trainer's; a batch that only keeps this rank in step has no tokens."""
        if self.args.include_num_input_tokens_seen == "no":
            return
        if isinstance(inputs, FillerBatch):
            inputs = {name: value[:0] for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        super()._track_num_input_tokens(inputs)  # type: ignore[no-untyped-call]

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """By the norm over the whole model."""
        assert self._link is not None
        self._link.clip(NanotronTrainer._get_grad_norm(self, model), self.args.max_grad_norm)
        return self._norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor:
        """Over the whole model, before clipping."""
        refuse_missing(self._stepped == self.state.global_step)
        return self._norm

    # ---- log, evaluate, save ----

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Trainer's, by the flags of all ranks, and not after a step whose gradient ends the run."""
        assert self._flow is not None
        if detail := self._detail.end_step():
            self.weights.wait()
            self.control = tell_callbacks(self.callback_handler, self.args, self.state, self.control, detail)
        for _ in self._flow.turns(lambda: self.control, self.state.global_step):
            control = self.control
            if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
                self._guard.check()
            if control.should_log and self.state.global_step > self._globalstep_last_logged:
                self._log_line.exchange(self.args, self.mesh, tr_loss, self.current_flos)
            try:
                super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
            finally:
                self._log_line.end(self.args)
        if self._snapshots.is_due(self.state, self.control, self._data_order):
            self._take_snapshot()

    def _take_snapshot(self) -> None:
        """The state of the run, into the memory of the hosts; the training goes on while it is written."""
        step = self.state.global_step
        self._guard.check()
        self._guard.refuse_to_save(f"the memory snapshot of step {step}", step, self.optimizer)
        self.store_flos()
        self._domains.settle()
        self._data_order.share_state(self.train_dataset)
        self._snapshots.take(self._checkpointer.run, step, self._write_snapshot)
        self._hold_for_users()

    def _write_snapshot(self, save: Save) -> None:
        self._write_state(save)
        if self.mesh.rank == 0:
            holders = *self.callback_handler.callbacks, self.control
            save.files.append(write_trainer_state(copied_state(self.state), holders, save.directory))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds throughput, memory, loads of experts, domains and uploads to lines with a loss; redacts secrets."""
        self.weights.wait()  # callbacks that look at the weights find the new ones
        if "loss" in logs:
            of_ranks = self._log_line.of_ranks
            self._log_line.end(self.args)
            logs.update(self._report.metrics(self.model, self.args.moe_log_loads, of_ranks))
            logs.update(self._domains.metrics(lambda: self._data_order.consumed))
            logs.update(batch_metrics(self.args, self._data_order.step_samples))
            logs.update({} if self.doremi is None else self.doremi.metrics())
            self._guard.filter_logs(logs)
            logs.update(self._uploads.metrics(of_ranks))
        correct_speed(logs, self._evaluation.rounds)
        for name in [name for name, value in logs.items() if isinstance(value, str)]:
            logs[name] = redacted(name, logs[name])  # log lines become part of every checkpoint
        super().log(logs, start_time)

    def store_flos(self) -> None:
        """Trainer sums over all ranks; those that see the same batch count once."""
        of_all = self._log_line.take_flos()
        self.current_flos = (self.current_flos if of_all is None else of_all) / self.get_tp_size()  # type: ignore[assignment]
        super().store_flos()
        self.args.counts_alone = False

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; flags that were set meanwhile act on all ranks."""
        metrics = super()._evaluate(*args, **kwargs)
        if self._flow is not None:
            self._flow.agree(self.control)
        return metrics

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """Whether to save under `save_strategy="best"`: also when told to stop."""
        return super()._determine_best_metric(*args, **kwargs) or self._checkpointer.was_told_to_stop

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes `checkpoint-N/` by all ranks, and commits it; with `async_save` the training goes on meanwhile."""
        args, step, checkpointer = self.args, self.state.global_step, self._checkpointer
        self._guard.refuse_to_save(f"checkpoint-{step}", step, None if args.save_only_model else self.optimizer)
        together(self.mesh, "the save before", lambda: checkpointer.finish_before(step))
        self.store_flos()
        self._domains.settle()
        folder = Path(self._get_output_dir(trial=trial))
        save = checkpointer.begin(folder, step)
        if save is None:
            return
        is_last = self.control.should_training_stop or step >= self.state.max_steps
        with_weights = args.save_hub_weights == "always" or is_last
        if with_weights and (is_overridden(self, "save_model") or is_overridden(self, "_save")):
            self.save_model(str(save.directory), _internal_call=True)  # as Trainer does
        else:
            self._write_model(save, with_weights)
        checkpointer.note_best(self.state, folder)
        self._data_order.share_state(self.train_dataset)
        together(self.mesh, f"saving {save.directory}", lambda: self._write_own_files(save))
        checkpointer.finish_save(save, self.state.best_model_checkpoint)
        self._hold_for_users()

    def _hold_for_users(self) -> None:
        """Before code that may write to the weights, if there is any."""
        if self._link is None or self._link.compares or is_subclass(self):
            self._checkpointer.hold_weights(self.weights)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes a Hub repository, all ranks together (see `save_hub_model`)."""
        directory = Path(output_dir or cast(str, self.args.output_dir))
        what = f"the model in {output_dir or self.args.output_dir}"
        self._guard.refuse_to_save(what, self.state.global_step)
        check_shared(self.mesh, directory, "output_dir")
        save_hub_model(self.model, directory)
        if self._average is not None:
            with self._checkpointer.averaged(self._average):
                save_hub_model(self.model, directory / AVERAGE_FOLDER)
        elif self.mesh.rank == 0:
            drop_average(directory)
        self._write_companions(directory)

    # ---- the end ----

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, after the last save; it would delete the last checkpoint if another is the best."""
        self._guard.check()
        steps = self.state.global_step - self._initial_global_step  # Trainer divides by all of them
        self._total_loss_scalar += self._guard.missing(self._total_loss_scalar + self._tr_loss.item(), steps)
        together(self.mesh, "the last save", self._checkpointer.finish)
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # to which `rotate` has kept
        try:
            return super()._finalize_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            self.args.save_total_limit = limit

    def _load_best_model(self) -> None:
        """Reads this rank's part of the weights."""
        best = self.state.best_model_checkpoint
        assert best is not None
        logger.info(f"Loading best model from {best} (score: {self.state.best_metric}).")
        self._checkpointer.finish()
        self.weights.wait()
        self._load_from_checkpoint(best)
        load_rest(best, self.model, self.weights, self._average, self._checkpointer.index_of(best))

    # ---- evaluation and prediction ----

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, on every rank."""
        self.mesh.assemble("evaluate", samples_in_words(self.eval_dataset if eval_dataset is None else eval_dataset))
        with self._watch():
            return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Trainer's, on every rank; its speed is that of all ranks."""
        self.mesh.assemble("predict", samples_in_words(test_dataset))
        with self._watch():
            output = super().predict(test_dataset, *args, **kwargs)
        correct_speed(output.metrics or {}, self._evaluation.rounds)
        return output

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's, over batches that all ranks have compared; with the losses of domains.

        Raises:
            ValueError: on every rank, for data that differs between them, or ids that the model does not know.
        """
        has_own_loss = self._loss_choice.is_own
        evaluation = self._evaluation.over(dataloader, description, has_own_loss)
        averaged = self._checkpointer.averaged(self._average if self.args.ema_evaluate else None)
        with averaged, self._guard.evaluating(), evaluation as announced:
            output = super().evaluation_loop(
                announced, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            output = self._evaluation.with_losses_of_domains(output, metric_key_prefix)
            return self._evaluation.with_samples_of_all(output)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Trainer's; for the plain loss alone, no rank makes whole logits."""
        self._evaluation.compare_by_hand(inputs)
        with self._evaluation.summing_figures(self._new_figures(1), inputs) as figures:
            result = self._predict_batch(model, inputs, prediction_loss_only, ignore_keys)
        if figures is not None:
            self._note_figures(figures, "eval")
        return result

    def _predict_batch(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None
    ) -> tuple[Any, Any, Any]:
        if self.mesh.cp_size > 1:
            model = cast(nn.Module, DealtModel(self.training_state))
        loss_choice = self._loss_choice
        domains = contextlib.nullcontext() if loss_choice.is_own else self._evaluation.summing_domains(inputs)
        if prediction_loss_only and "labels" in inputs and not loss_choice.is_own:
            with torch.no_grad(), domains:
                loss = model(**self._prepare_inputs(inputs), gather_logits=False).loss
            return loss.detach(), None, None
        with domains, self._evaluation.predicting(self.model if loss_choice.is_overridden else None):
            return super().prediction_step(model, {**inputs, "use_cache": False}, prediction_loss_only, ignore_keys)

    # ---- called by users ----

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Trainer's, on every rank."""
        self.mesh.assemble("save_model", f" to {output_dir or self.args.output_dir or '.'}")
        super().save_model(output_dir, *args, **kwargs)
        self.throughput.pause()

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, on every rank."""
        self.mesh.assemble("push_to_hub")
        return super().push_to_hub(*args, **kwargs)

    def create_model_card(self, language: str | None = None, **fields: Any) -> None:  # type: ignore[override]
        """As `Trainer.create_model_card`, with the batch and parallel sizes of this run; on rank 0."""
        if self.is_world_process_zero():
            path = Path(cast(str, self.args.output_dir), "README.md")
            unlink_link(path)
            write_model_card(self, self.mesh, path, language=language, **fields)

    def get_num_trainable_parameters(self) -> int:
        """Trainable parameters of the whole model, not of this rank."""
        return self.model.num_parameters(only_trainable=True)

    def get_optimizer_group(self, param: str | nn.Parameter | None = None) -> Any:
        """The parameter group that updates a parameter of the model (or one of that name); without one, the parts of
        parameters that each group updates on this rank.

        Raises:
            ValueError: without an optimizer, or for a parameter that none of its groups updates on this rank.
        """
        if param is None:
            return super().get_optimizer_group()
        return group_of(param, self.optimizer, self.model, self.weights)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: trials run in one process."""
        raise ValueError(
            "hyperparameter_search is not supported: its trials run in one process, and a parallel model runs in many. "
            "Start one job per trial."
        )

    # ---- what Trainer does not have ----

    def add_gradient_hook(self, name: str, hook: GradientHook) -> HookHandle:
        """Have `hook(gradient, part)` called in each optimizer step, before the gradient is measured and clipped.

        It stands for `weight.register_hook`, on any topology; add it on every rank. Each rank calls it for what it
        holds of the weights: `gradient` is a flat fp32 tensor `[elements]`, summed over micro-batches and ranks, and
        `part` says which elements they are (`GradientPart`; `part.of(whole)` takes the same ones out of a tensor of the
        whole weight's shape, such as a mask). The hook may change `gradient` in place, or return another of its shape.
        Several ranks may hold copies of the same elements, and are to change them alike. Weight decay goes by the
        weights, not by their gradients, as in torch.

        Args:
            name: of a weight in the stock model, or a pattern of names with `*`.

        Returns:
            A handle; `remove()` takes the hook away.

        Raises:
            ValueError: for a name or pattern that no trainable weight has.
        """
        return self._gradients.add_hook(self.model, name, hook)

    def gradients(self) -> Iterator[tuple[str, GradientPart, torch.Tensor]]:
        """What this rank holds of the step's gradients, in `on_pre_optimizer_step`: (name, part, gradient).

        As there in stock training they are summed over micro-batches and ranks, and clipped; changes in place take
        effect on the update. Each gradient is a flat fp32 tensor `[elements]`, and `part` says which elements of the
        weight they are (see `add_gradient_hook`). The parameters' own `grad` is None.

        Raises:
            ValueError: where there are no gradients: before a step's backwards, and after its update.
        """
        return self._gradients.read(self._link)

    def data_cursor(self) -> dict[str, Any] | None:
        """Where the last optimizer step ended: for a checkpoint, equal on all ranks. None without a loader of ours.

        Outside of a save, the `state` of a `TokenStream` is that of the lanes that this rank reads.
        """
        return self._data_order.cursor(self.control, self.train_dataset)

    @property
    def stopped_by_signal(self) -> bool:
        """Whether a signal ended `train` before its last step (`save_on_signal`): there is more to train."""
        return self._checkpointer.was_told_to_stop and self.state.global_step < self.state.max_steps

    def extra_state(self) -> dict[str, Any]:
        """What the training state of a checkpoint holds besides, the same on every rank."""
        average = {} if self._average is None else {AVERAGE: self._average.state()}
        weights = {} if self.doremi is None else self.doremi.state()
        schedule = self._schedule.state(self.state.max_steps) if self._has_own_schedule else {}
        own = {**average, **weights, **schedule, **parametrization_state(self.model), **model_state(self.model)}
        return {CURSOR: self.data_cursor(), **self._domains.state(), **own}

    # ---- for trainers that derive from this one, and report and train more ----

    def _new_figures(self, micro_batches: int) -> TokenFigures | None:
        """What is to be summed up over the tokens of so many micro-batches; None for nothing."""
        return None

    def _note_figures(self, figures: TokenFigures, mode: str) -> None:
        """Take the sums of all ranks over a window (`mode` "train") or a batch of an evaluation ("eval")."""

    def _write_model(self, save: Save, with_weights: bool) -> None:
        """The Hub's files of a checkpoint, by all ranks together."""
        self._checkpointer.write_model(save, self.model, with_weights)
        if with_weights and self._average is not None:
            with self._checkpointer.averaged(self._average):
                self._checkpointer.write_model(save, self.model, with_weights, AVERAGE_FOLDER)

    @property
    def trains_adapters(self) -> bool:
        """Whether adapters of the model are trained, and saved in place of it."""
        return False

    def _share_of_routers(self, batches: list[dict[str, Any]]) -> float | torch.Tensor:
        """What the losses over routers of each of these micro-batches are multiplied by. All ranks together."""
        return 1.0

    # ---- parts of the overrides ----

    @property
    def _loss_choice(self) -> LossChoice:
        """Whose loss is trained now."""
        is_overridden = "compute_loss" in vars(self) or type(self).compute_loss is not NanotronTrainer.compute_loss
        asked = self.compute_loss_func, self.label_smoother, self.model_accepts_loss_kwargs, self.loss_is_scaled_for_ga
        whose = type(self).__name__
        return LossChoice(self.model, self.args, self.compute_loss, is_overridden, whose, *asked, self._teacher_pass)

    def _watch(self) -> RunWatch:
        """While it is entered, a rank that is gone ends the others, and a stall is told."""
        return watch_run(self.mesh, self.args, lambda: self.state.global_step)

    def _open_reports(self) -> None:
        callbacks = self.callback_handler.callbacks
        self._reports.begin(callbacks, self.args, self.state, self.model, self._checkpointer.run)

    def _check_frozen(self) -> None:
        # Of adapters all is in the training state, and the base in no checkpoint.
        check_frozen(self.training_state, "always" if self.trains_adapters else self.args.save_hub_weights)

    def _check_loss(self) -> None:
        """See `LossChoice.check`; and hooks that would not be called."""
        refuse_hooks(self.model)
        loss_choice = self._loss_choice
        self._checked_loss = loss_choice.whose
        loss_choice.check()
        if self._reference_pass is not None:
            check_doremi(self.model, self._reference_pass.model, loss_choice.is_own, loss_choice.is_mean_of_means)

    def _follow_loss(self) -> LossChoice:
        """Before a step, on the host alone: a callback may have changed the loss in the middle of an epoch."""
        loss_choice = self._loss_choice
        if loss_choice.whose != self._checked_loss:
            self._check_loss()
        return loss_choice

    def _examine(self, window: list[Any]) -> None:
        """Raises for a window that this rank has read and that cannot be trained on, and for a save that has failed."""
        self._checkpointer.finish(wait=False)
        self._domains.totals.only_named = self._loss_choice.is_own
        self._domains.totals.check(window)
        if self.doremi is not None:
            check_domains(window)
        for batch in window:
            check_batch(self.mesh, batch)

    def _empty_cache(self) -> None:
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0 and self.mesh.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def _has_own_schedule(self) -> bool:
        """Whether learning rates are those of the arguments."""
        return self._created_lr_scheduler and not is_overridden(self, "create_scheduler")

    def _optimizer_choice(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        if self.optimizer_cls_and_kwargs is not None:
            return self.optimizer_cls_and_kwargs
        if is_overridden(self, "get_optimizer_cls_and_kwargs"):
            choice = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            check_elementwise(choice[0], "get_optimizer_cls_and_kwargs")
            return choice
        return optimizer_choice(self.args, getattr(torch, self.args.optim_state_dtype))

    def _link_optimizer(self) -> OptimizerLink:
        """See `link_optimizer`. New weights are compared if a callback is called before the next forward."""
        compares, host = may_write_weights(self.callback_handler.callbacks), self.training_state.host
        self._link = link_optimizer(self._link, self.optimizer, self.model, self.weights, host, compares)
        self._link.before_write = self._checkpointer.hold
        return self._link

    def _write_own_files(self, save: Save) -> None:
        """What this rank can do alone: the small files, and its part of the training state, still in its place."""
        if not self.args.save_only_model:
            self._write_state(save)
        if self.mesh.rank == 0:
            self._write_companions(save.directory)
            write_trainer_state(self.state, (*self.callback_handler.callbacks, self.control), save.directory)

    def _write_state(self, save: Save) -> None:
        """This rank's part of the training state, still in its place, and its random numbers."""
        assert self.optimizer is not None
        self.weights.take_written(compare=self._link is not None and self._link.compares)
        self._checkpointer.add_training_state(
            save, self.model, self.weights, self.optimizer, self.lr_scheduler, self._average, self.extra_state()
        )
        save.files += write_generators(self._save_rng_state, save.directory, self.mesh)

    def _write_companions(self, directory: Path) -> None:
        """Tokenizer and arguments, by rank 0."""
        if self.args.should_save:
            args = copy.copy(self.args)
            args.logging_nan_inf_filter = self._guard.asked_to_filter
            args.gradient_accumulation_steps = self._data_order.users_accumulation
            write_companions(args, self.processing_class or getattr(self.data_collator, "tokenizer", None), directory)

    def _push_committed(self, directory: Path) -> None:
        """With `push_to_hub`."""
        if self.args.push_to_hub:
            if self.is_world_process_zero():
                is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
                is_pushed = self.args.hub_strategy != "end" and (self.args.hub_always_push or not is_busy)
                prepare_push(directory, Path(cast(str, self.args.output_dir)), is_pushed)
            self._push_from_checkpoint(str(directory))

    def _parallel_model(self, model: PreTrainedModel, args: NanotronTrainingArguments) -> ParallelModel:
        model = unwrap(model)
        if isinstance(model, ParallelModel):
            check_parallel(model, args, self.trains_adapters)
        else:
            refuse_meta(model)
            self._mesh = self._mesh or ParallelMesh(args.parallel, args.ddp_timeout_delta)
            model = shard_stock(model, self._mesh)
        if model.streams is not None:
            model.streams.seed = args.seed
        return model

    def _beside(self, model: PreTrainedModel | None, what: str) -> ForwardPass | None:
        """A frozen model that sees the windows which the model at hand trains on."""
        if model is None:
            return None
        frozen = self._parallel_model(model, self.args)
        return frozen_beside(frozen, self.model, self.args, self.processing_class, what)

    def _take_up_model(self) -> None:
        """Prepare, train, watch and evaluate the model at hand: `model_init` makes a new one for each run."""
        model, mesh = self.model, self.model.mesh
        check_model(model)
        check_parametrization(model, self.args, self.optimizer is not None)
        note_frozen(model)
        mesh.set_timeout(self.args.ddp_timeout_delta)
        self.mesh = self.accelerator.mesh = self._checkpointer.mesh = self._uploads.mesh = mesh
        self._snapshots.mesh, self._snapshots.model = mesh, model
        self.accelerator.model = model
        self.window_check = WindowCheck(mesh, model.vocabulary)
        # Of the parameters that a user's optimizer was made over: sharding them may make others.
        self._names = {p: name for name, p in model.named_parameters()} if self.optimizer else {}
        self.training_state = prepare_training(model, self.args)
        self.weights, self._average = self.training_state.weights, None
        self.weights.before_write = self._checkpointer.hold
        self._snapshots.weights = self.weights
        self._step = TrainStep(self.training_state)
        self._teacher_pass = self._beside(self._teacher_model, "teacher")
        self._reference_pass = self._beside(None if self.doremi is None else self.doremi.reference, "reference")
        self._detail = MetricsDetail(self.args, self.training_state)
        self._written = WrittenWeights(model, self.weights)
        self._guard = NonFiniteGuard(self.args, model, self.weights, self._checkpointer.where_to_resume)
        self._domains = DomainLog(model, self.train_dataset)
        self._windows = WindowAgreement(self.window_check, self._guard, self._examine)
        self._evaluation = EvaluationRun(self.window_check, self.accelerator, model)

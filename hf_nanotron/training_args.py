"""`NanotronTrainingArguments`: `transformers.TrainingArguments` with the sizes of a parallel run."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Self

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from transformers import TrainingArguments
from transformers.training_args import ParallelMode
from transformers.utils import logging as hub_logging

from .arguments.base_order import check_base_order, check_defaults
from .arguments.fp8 import check_fp8
from .arguments.launch import check_launch
from .arguments.mlp_chunks import check_mlp_chunks
from .arguments.muon import MUON_CHOICES, check_muon, without_muon
from .arguments.optimizer import check_optimizer
from .arguments.parametrization import check_parametrization
from .arguments.policy import REFUSED, check_policy
from .arguments.recompute import check_recomputation, layer_numbers
from .arguments.rules import as_mapping
from .arguments.saving import check_saving
from .arguments.schedules import check_schedules
from .arguments.secrets import SecretlessArguments
from .arguments.sizes import layer_counts, parallel_sizes
from .arguments.snapshots import SHARED_MEMORY, check_snapshots
from .arguments.values import check_values, set_plain_values
from .arguments.watching import check_watching
from .models.spectral.sizes import Spectral
from .parallel.config import ParallelConfig, refuse_removed
from .parallel.meeting import meet, meets, open_group, take, wait_as_spare
from .parallel.own_device import own_device, why_unfit
from .parallel.roll_call import attend
from .parallel.seats import seats_for, tell, training_size

logger = logging.getLogger(__name__)

DEFAULT_BUCKET_MB = 25  # of torch's DistributedDataParallel, which `ddp_bucket_cap_mb` is documented against


CHOICES = {
    "save_hub_weights": ("always", "last"),
    "optim_state_dtype": ("float32", "bfloat16"),
    "moe_log_loads": ("model", "layers", "experts"),
    "attention": ("auto", "stock"),
    **MUON_CHOICES,
    "parametrization": ("standard", "spectral"),
}


def _option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of the arguments, with its sentence for `--help` and what HfArgumentParser is given besides."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(repr=False)
class NanotronTrainingArguments(SecretlessArguments):
    """`transformers.TrainingArguments` plus the options of a parallel run; see `ParallelConfig` for its sizes.

    Every inherited field either does what transformers documents or is refused at construction, before any process
    group exists; the table is in `hf_nanotron.arguments.policy`. `gradient_accumulation_steps` is also the number of
    pipeline micro-batches, and `bf16` means bfloat16 compute with fp32 master weights.

    Raises:
        ValueError: for a refused value, for sizes that do not divide the number of processes, or for too few
            micro-batches; the same message on every rank.
    """

    tp_size: int = _option(1, "Ranks that shard every layer (tensor parallelism).")
    pp_size: int = _option(1, "Ranks that share the stack of layers (pipeline parallelism).")
    cp_size: int = _option(1, "Ranks that share the tokens of every row (context parallelism).")
    cp_mode: str = _option(
        "auto",
        "How attention sees the tokens of all cp ranks: each gathers keys and values (gather), gets all tokens of some "
        "heads (heads), or for each micro-batch what sends and copies less (auto).",
    )
    cp_kv_heads_per_gather: int | None = _option(
        None,
        "Key-value heads of a rank that cp_mode gather gathers at once: fewer overlap better and take less memory. If "
        "unset, a quarter of them or more.",
    )
    ep_size: int = _option(1, "Ranks that share the experts (expert parallelism).")
    dp_replicate_size: int = _option(1, "Copies of the ZeRO shards among the data-parallel ranks (hybrid sharding).")
    max_dp_size: int | None = _option(
        None,
        "Most data-parallel ranks that train. Further processes of the job are spares, which take the place of others "
        "when torchrun starts them anew. With fewer, gradient_accumulation_steps grows, so that a step has the same "
        "samples. If unset, all processes train.",
    )
    zero_stage: int = _option(
        1,
        "What data-parallel ranks shard: 0 nothing, 1 optimizer state and fp32 master weights, 2 also gradients, 3 "
        "also parameters.",
    )
    # transformers has an enumeration of names, which lacks "muon".
    optim: str = _option(
        TrainingArguments.optim, "The optimizer: a name that transformers knows and that can be sharded, or muon."
    )
    optim_state_dtype: str = _option(
        "float32", "Dtype of AdamW's moments: float32, or bfloat16 with stochastic rounding."
    )
    optim_offload: float = _option(
        0.0,
        "Fraction of the fp32 master weights and of the optimizer's state (1 is all) that is in pinned host memory "
        "between steps; the GPU still updates them, part by part.",
    )
    muon_scale: str = _option(
        "match_rms_adamw",
        "With optim muon, what multiplies the learning rate of a matrix: 0.2 sqrt(max(out, in)), so that AdamW's rate "
        "and decay serve (match_rms_adamw), sqrt(max(1, out / in)) (original) or sqrt(out / in) (spectral).",
    )
    muon_learning_rate: float | None = _option(
        None,
        "Learning rate of the matrices with optim muon, which follows the same schedule. If unset, learning_rate; "
        "original and spectral scales need their own.",
    )
    muon_momentum: float = _option(0.95, "Momentum of the matrices with optim muon.")
    muon_nesterov: bool = _option(True, "Nesterov momentum with optim muon.")
    muon_ns_steps: int = _option(5, "Newton-Schulz steps with optim muon.")
    muon_dtype: str = _option(
        "bfloat16", "Dtype in which optim muon gathers matrices and computes Newton-Schulz: bfloat16 or float32."
    )
    parametrization: str = _option(
        "standard",
        "How initial weights and learning rates depend on the width of the model: as the model's class and "
        "learning_rate say (standard), or so that what is best for a small base model is best for a wide one "
        "(spectral, which needs base_hidden_size).",
    )
    base_hidden_size: int | None = _option(
        None, "Hidden size of the base model of parametrization spectral, in which both parametrizations are the same."
    )
    base_sizes: dict[str, Any] | str | None = _option(
        None,
        "Other sizes of the base model by the names of its config, as a mapping or JSON. Those not named are in "
        "proportion to the hidden size; heads keep theirs.",
    )
    skip_nonfinite_steps: bool = _option(
        False, "Skip an optimizer step whose gradient is NaN or infinite; by default it ends the run."
    )
    max_skipped_steps: int = _option(
        20, "Consecutive steps that skip_nonfinite_steps, or batches without a label, may skip; one more ends the run."
    )
    save_hub_weights: str = _option(
        "always",
        "Which checkpoints contain Hub weights in addition to the training state: always (all of them), or last (only "
        "the final one).",
    )
    async_save: bool = _option(
        False,
        "Copy a checkpoint to host memory while the next step computes, and write it to disk in a background thread.",
    )
    save_on_signal: float = _option(
        0.0,
        "On SIGTERM or SIGUSR1, save a checkpoint and stop the run; the value is the grace period in seconds. 0 does "
        "not handle signals.",
    )
    memory_snapshot_steps: int | None = _option(
        None,
        "Optimizer steps from one snapshot of the training state in the memory of its hosts to the next. A restart "
        "with resume_from_checkpoint auto goes on from there before it looks at the disk. If unset, none.",
    )
    memory_snapshot_dir: str = _option(
        SHARED_MEMORY, "With memory_snapshot_steps, a folder in the memory of each host (tmpfs) for the snapshots."
    )
    overwrite_output_dir: bool | None = _option(
        None,
        "Whether a run may save where another run has checkpoints (in output_dir or remote_checkpoints), overwriting "
        "those of the same step. False refuses; if unset, a warning is logged.",
        nargs="?",
        const=True,
    )
    remote_checkpoints: str | None = _option(
        None,
        "URL such as s3://bucket/run. Each committed checkpoint is uploaded there in the background, and "
        "resume_from_checkpoint=True also looks there.",
    )
    remote_keep_local: int = _option(
        1, "With remote_checkpoints, the number of uploaded checkpoints to keep in output_dir."
    )
    remote_pending_limit: int | None = _option(
        None,
        "Maximum number of checkpoints waiting in output_dir for upload while the store is failing or slow. Beyond it "
        "the oldest are deleted, never the newest or the best. If unset, remote_min_free_gb is the only limit.",
    )
    remote_min_free_gb: float | None = _option(
        None,
        "GiB to keep free on output_dir's disk while checkpoints wait for upload. Below it the oldest waiting ones are "
        "deleted, never the newest or the best. If unset, room for one more checkpoint is kept.",
    )
    remote_retry_seconds: float = _option(
        2.0, "Seconds before a failed operation on remote_checkpoints is retried; doubles with each attempt."
    )
    remote_retry_max_seconds: float = _option(
        60.0, "Maximum seconds between two attempts at an operation on remote_checkpoints."
    )
    remote_start_timeout: float = _option(
        300.0,
        "Seconds to keep trying to reach remote_checkpoints, and to download from it, when a run starts. Wrong "
        "credentials or a missing bucket fail at once.",
    )
    remote_wait_timeout: float = _option(
        1800.0,
        "Seconds to wait for uploads at the end of train. Checkpoints not uploaded by then are listed and stay in "
        "output_dir.",
    )
    accept_changed_data: bool = _option(
        False,
        "Resume although files of a data set have changed since the checkpoint, behind the same number of its rows. By "
        "default that is refused, naming a file.",
    )
    no_weight_decay: list[str] | None = _option(
        None,
        "Weights without weight decay besides biases and norms: regular expressions, found anywhere in their names, "
        "such as embed_tokens, or A_log and \\.D$ of Mamba.",
    )
    moe_capacity_factor: float | None = _option(
        None,
        "Capacity of each expert during training, as a multiple of an even load; tokens beyond it are dropped for that "
        "expert. If unset, no token is dropped.",
    )
    moe_bias_update_rate: float = _option(
        0.0,
        "Step size of the routers' correction biases, which move against the load after each optimizer step "
        "(auxiliary-loss-free balancing). 0 keeps them fixed.",
    )
    moe_log_loads: str = _option(
        "model", "Which expert loads to log: of the whole model (model), per layer (layers), or per expert (experts)."
    )
    z_loss_coefficient: float = _option(
        0.0, "Coefficient of log(Z)^2 in the loss of each predicted token (z-loss over the vocabulary)."
    )
    ema_decay: float | None = _option(
        None,
        "Keep an exponential moving average of the weights with this decay per optimizer step, such as 0.999; saved "
        "as Hub weights in the folder ema of each checkpoint. If unset, no average.",
    )
    ema_start_step: int = _option(
        0, "Optimizer steps before the first update of the average, which follows the weights until then."
    )
    ema_evaluate: bool = _option(False, "Evaluate and predict with the average instead of the weights.")
    batch_size_warmup_tokens: int | None = _option(
        None,
        "Tokens of the run over which the global batch grows from batch_size_warmup_start samples to the full one. If "
        "unset, it is full from the first step on.",
    )
    batch_size_warmup_start: int | None = _option(
        None, "Samples of the first optimizer step, with batch_size_warmup_tokens."
    )
    batch_size_warmup_increment: int | None = _option(
        None, "Samples by which the batch grows each time; batch_size_warmup_start if unset."
    )
    wsd_decay_steps: int | None = _option(
        None,
        "With lr_scheduler_type='warmup_stable_decay' and resume_from_checkpoint: decay the learning rate from the "
        "checkpoint of a stable run over so many steps, then end.",
    )
    attention: str = _option(
        "auto", "Attention during training: the fastest kernel that fits (auto), or the model's own (stock)."
    )
    fp8: str | None = _option(
        None,
        "FP8 matmuls in the linear layers of decoder layers during training, with one scale per tensor (tensorwise, "
        "faster) or one per row and column (rowwise). Needs bf16=True, and 1 byte more for each of their weights. If "
        "unset, no FP8.",
    )
    fp8_skip_layers: list[int] | None = _option(
        None, "Decoder layers that stay in bf16 when fp8 is set, such as 0 -1.", nargs="+"
    )
    sequence_parallel: bool = _option(True, "Shard activations along the sequence between tensor-parallel modules.")
    tp_overlap: bool | None = _option(
        None,
        "Overlap tensor-parallel communication with matmuls (needs sequence_parallel). If unset, on GPUs only.",
        nargs="?",
        const=True,
    )
    pp_schedule: str = _option("1f1b", "Pipeline schedule: afab, 1f1b, interleaved_1f1b or zb (zero bubble).")
    pp_virtual_stages: int = _option(1, "Stages per pipeline rank; more than one needs interleaved_1f1b or zb.")
    activation_checkpointing_policy: str = _option(
        "full",
        "What activation_checkpointing recomputes in the backward: the whole layer (full), everything except the "
        "outputs of matmuls and attention (selective), or except the output of attention (all_but_attention, for long "
        "sequences).",
    )
    activation_checkpointing_layers: list[int] | str | None = _option(
        None,
        "Decoder layers to which activation_checkpointing applies, numbered from 0 over the whole model, as a list or "
        "as 0,2,4. If unset, all layers.",
        nargs="+",
    )
    activation_offload: float = _option(
        0.0,
        "Fraction of the layers with activation_checkpointing (1 is all) that keep their input, and what else they "
        "keep, in pinned host memory between forward and backward; copies overlap with computation.",
    )
    mlp_chunk_tokens: int | None = _option(
        None,
        "Compute gated MLPs over blocks of so many tokens, forward and backward, so that only one block's activations "
        "are in memory. If unset, over all tokens at once.",
    )
    metrics_detail: list[str] | str | None = _option(
        None,
        "Which statistics of the single tensors to log: weights, gradients, activations, as a list or as "
        "weights,gradients. If unset, none.",
        nargs="+",
    )
    metrics_detail_steps: int | None = _option(
        None, "Optimizer steps from one log of metrics_detail to the next. If unset, 100."
    )
    profile_steps: str | None = _option(
        None,
        "Optimizer steps to profile, such as 10-12 or 3,10-12, counted from 1 over the whole training. Traces and a "
        "table of where the time goes are written to _profile in output_dir. If unset, none.",
    )
    profile_ranks: list[int] | str | None = _option(
        None, "Ranks that profile_steps profiles, as a list, as 0,3 or all. If unset, rank 0.", nargs="+"
    )
    run_log: bool = _option(
        True, "Write what log lines say to _metrics.jsonl in output_dir, which hf-nanotron top and plot read."
    )
    health_check: bool = _option(
        False,
        "Before the first step, compare the speed of all devices and links, and name what is slower than the others or "
        "computes other numbers.",
    )
    stall_warning: float = _option(
        60.0,
        "Seconds without progress after which rank 0 says where every rank is and which one the others wait for; 0 for "
        "never.",
    )
    stall_timeout: float | None = _option(
        None,
        "Seconds without progress of any rank, while some wait for others, after which the run ends on all ranks. If "
        "unset, ddp_timeout.",
    )
    torch_compile: bool | None = _option(  # type: ignore[assignment]
        None,
        "Compile decoder layers for training. If unset, on CUDA with bf16, where it is faster.",
        nargs="?",
        const=True,
    )
    # HfArgumentParser takes `str` out of this union; with nargs the shell can say "3 5" as well as "3,5".
    pp_layers_per_stage: list[int] | str | None = _option(
        None,
        "Decoder layers of each stage, in model order, as a list or as 3,5. If unset, balanced by cost.",
        nargs="+",
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        told = cls, NanotronTrainingArguments, TrainingArguments, "hf_nanotron.trl.NanotronSFTConfig for TRL"
        check_base_order(*told)
        check_defaults(*told)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        refuse_removed(kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.pp_layers_per_stage = layer_counts(self.pp_layers_per_stage)
        self.activation_checkpointing_layers = layer_numbers(self.activation_checkpointing_layers)
        self.check()
        check_launch(os.environ)
        self._take_seat()
        expected_world_size = _world_size()
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            if getattr(self, name) is not None:
                # torch still defaults to the reentrant implementation once any other keyword is given.
                setattr(self, name, {**as_mapping(getattr(self, name)), "use_reentrant": False})
        if not (self.use_cpu or self.bf16 or torch.accelerator.is_available()):
            # Without this, accelerate runs every process of a torchrun job on its own, each with a world size of 1.
            # With bf16, transformers asks for use_cpu=True itself.
            logger.info("No accelerator is available: running on the CPU (use_cpu=True).")
            self.use_cpu = True

        # Hidden from transformers, which would switch TF32 on, and accelerate, which would whatever `tf32` says.
        chosen, backend, mode = self.torch_compile, self.torch_compile_backend, self.torch_compile_mode
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        muon = without_muon(self)
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.optim = muon or self.optim
        if chosen is None:
            chosen = self.bf16 and self.device.type == "cuda"
        self.torch_compile = chosen or backend is not None or mode is not None
        self.torch_compile_backend, self.torch_compile_mode = backend, mode
        if self.process_index > 0:
            hub_logging.disable_progress_bar()  # one bar a job: also of transformers' own loading
        # The trainer casts by itself; accelerate must not autocast, nor convert outputs to fp32.
        self.mixed_precision = "no"
        if self.world_size != expected_world_size:
            raise ValueError(
                f"WORLD_SIZE={expected_world_size}, but accelerate runs {self.world_size} processes on {self.device}: "
                "start the script with torchrun, which sets LOCAL_RANK, or pass use_cpu=True."
            )

    @classmethod
    def of_job(cls, world_size: int, **arguments: Any) -> Self:
        """The arguments of a job of `world_size` processes, checked as on its ranks, in a process that is none of them.

        For what plans or launches a job; a trainer takes arguments that are made on its ranks.

        Raises:
            ValueError: as on the ranks.
        """
        refuse_removed(arguments)
        # Those that only the devices of the ranks can honour, or that one process has no use for.
        sizes = {entry.name: entry.default for entry in fields(ParallelConfig)}
        elsewhere = {**sizes, "use_cpu": False, "tf32": None, "profile_ranks": None, "max_dp_size": None}
        args = cls(**{**{name: value for name, value in arguments.items() if name not in elsewhere}, "use_cpu": True})
        for name, default in elsewhere.items():
            setattr(args, name, arguments.get(name, default))
        args.pp_layers_per_stage = layer_counts(args.pp_layers_per_stage)
        args.check(world_size)
        return args

    def check(self, world_size: int | None = None) -> None:
        """Check all fields. Runs at construction; call it again after assigning to fields.

        Args:
            world_size: processes of the job; those of this one if None.

        Raises:
            ValueError: as at construction.
        """
        if dist.is_initialized():
            attend()  # other ranks notice if this one is refused, and ends
        set_plain_values(self, NanotronTrainingArguments)
        check_values(self, NanotronTrainingArguments, REFUSED)
        processes = _world_size() if world_size is None else world_size
        is_here, world_size = world_size is None, self.processes_that_train(processes)
        if is_here and world_size != processes and not meets(os.environ, True):
            raise ValueError(
                f"max_dp_size={self.max_dp_size} leaves {processes - world_size} of {processes} processes without a "
                "place: only a job of torchrun has spares, and only where NanotronTrainingArguments open the process "
                f"group. Start {world_size} processes, or make the arguments before the group is opened."
            )
        check_policy(self)
        check_recomputation(self)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, choices))}.")
        check_saving(self)
        if self.stall_timeout is not None and self.stall_timeout > self.ddp_timeout:
            raise ValueError(
                f"stall_timeout={self.stall_timeout:g} is above ddp_timeout={self.ddp_timeout}, after which a "
                "collective ends the run in any case; make ddp_timeout longer, or leave stall_timeout unset."
            )
        check_optimizer(self)
        if self.moe_capacity_factor is not None and not self.moe_capacity_factor > 0:
            raise ValueError(
                f"moe_capacity_factor={self.moe_capacity_factor!r} must be above 0 (1.0 is the capacity for an even "
                "load), or None."
            )
        if self.cp_size > 1 and self.attention == "stock":
            raise ValueError(
                f"attention='stock' with cp_size={self.cp_size}: the model's own attention would see the tokens of one "
                "rank alone; use attention='auto', or cp_size=1."
            )
        check_muon(self)
        check_watching(self, world_size)
        check_snapshots(self)
        check_fp8(self)
        check_mlp_chunks(self)
        check_schedules(self)
        check_parametrization(self)
        _ = self.spectral
        self.parallel.expert_copies(world_size)
        self.parallel.check_micro_batches(self.gradient_accumulation_steps)

    @property
    def parallel(self) -> ParallelConfig:
        """The sizes of the run, for models and meshes."""
        return parallel_sizes(vars(self))

    @property
    def parallel_mode(self) -> ParallelMode:
        """transformers', by which Trainer decides whether to exchange figures; not while it is given those of all."""
        return ParallelMode.NOT_PARALLEL if self.counts_alone else super().parallel_mode

    @property
    def counts_alone(self) -> bool:
        """Whether Trainer makes a log line of figures that the ranks have exchanged already."""
        return "_counts_alone" in vars(self)

    @counts_alone.setter
    def counts_alone(self, value: bool) -> None:
        if value:
            vars(self)["_counts_alone"] = True
        else:
            vars(self).pop("_counts_alone", None)

    @property
    def spectral(self) -> Spectral | None:
        """The base of `parametrization="spectral"`, for `AutoModelForCausalLM.from_config`; None for the standard."""
        if self.parametrization != "spectral":
            return None
        assert self.base_hidden_size is not None
        try:
            sizes = as_mapping(self.base_sizes)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"base_sizes={self.base_sizes!r} is neither a mapping, nor JSON text, nor a JSON file: {error}."
            ) from error
        return Spectral(self.base_hidden_size, sizes)

    @property
    def dp_size(self) -> int:
        """Data-parallel size: the number of model replicas, each with its own samples."""
        return self.parallel.dp_size(self.world_size)

    @property
    def full_dp_size(self) -> int:
        """The data-parallel size at which `gradient_accumulation_steps` is what the arguments say."""
        return self.max_dp_size or self.dp_size

    def processes_that_train(self, processes: int) -> int:
        """Of so many that torchrun starts, and that are all well.

        Raises:
            ValueError: if they are too few, or `max_dp_size` is not a positive number.
        """
        if self.max_dp_size is None:
            return processes
        if self.max_dp_size < 1:
            raise ValueError(f"max_dp_size={self.max_dp_size} must be at least 1, or None.")
        if not self.average_tokens_across_devices:
            raise ValueError(
                f"max_dp_size={self.max_dp_size} with average_tokens_across_devices=False: the loss of a step would "
                "depend on how many ranks its samples are dealt to; use average_tokens_across_devices=True."
            )
        return training_size(self.parallel, self.max_dp_size, processes)

    def _take_seat(self) -> None:
        """Under torchrun, which may have started the job before: find the other processes, and who of them trains.

        A spare does not come back from here.
        """
        takes = self.max_dp_size is not None
        if not meets(os.environ, takes):
            return
        device = None if self.use_cpu or not torch.accelerator.is_available() else own_device()
        meeting = meet(os.environ, self.ddp_timeout_delta, why_unfit(device) if takes and device else None)
        seats = seats_for(self.parallel, self.max_dp_size, meeting.processes)
        if self.max_dp_size is not None and meeting.number == 0:
            tell(self.parallel, self.max_dp_size, meeting.processes, seats)
        number = take(seats, meeting, os.environ)
        if number is None:
            wait_as_spare(meeting, self.save_on_signal)
        if device is not None:
            torch.accelerator.set_device_index(device)
        backend = self.ddp_backend or ("gloo" if device is None else dist.get_default_backend_for_device(device))
        open_group(meeting, number, len(seats), backend, self.ddp_timeout_delta)

    @property
    def gradient_bucket_bytes(self) -> int:
        """Size of a bucket of the data-parallel gradient reduction, from `ddp_bucket_cap_mb`."""
        return (self.ddp_bucket_cap_mb or DEFAULT_BUCKET_MB) * 2**20

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: one, where transformers would wrap the model in `nn.DataParallel` over all it sees."""
        return min(1, int(super().n_gpu))

    @cached_property
    def _setup_devices(self) -> torch.device:
        backend = self.ddp_backend
        launched = "LOCAL_RANK" in os.environ or _world_size() > 1
        if not launched:
            # A backend without a process group makes accelerate ask the group for its size.
            self.ddp_backend = None
        elif self.use_cpu and not dist.is_initialized():
            # transformers gives the timeout to process groups on accelerators only; it re-uses this group.
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState(cpu=True, backend=backend, timeout=self.ddp_timeout_delta)
        try:
            return super()._setup_devices
        finally:
            self.ddp_backend = backend
            if dist.is_initialized() and dist.get_world_size() > 1:
                attend()  # so that the end of this process is noticed


def _world_size() -> int:
    """Processes of this job, known before its process group is."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))

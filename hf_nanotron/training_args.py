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

from .arguments.launch import check_launch
from .arguments.policy import REFUSED, as_mapping, check_policy
from .arguments.recompute import check_recomputation, layer_numbers
from .arguments.secrets import SecretlessArguments
from .arguments.values import check_values, set_plain_values
from .ops.fp8 import RECIPES
from .parallel.config import ParallelConfig, refuse_removed
from .parallel.roll_call import attend

logger = logging.getLogger(__name__)

DEFAULT_BUCKET_MB = 25  # of torch's DistributedDataParallel, which `ddp_bucket_cap_mb` is documented against


@dataclass(repr=False)
class NanotronTrainingArguments(SecretlessArguments):
    """`transformers.TrainingArguments` plus the sizes of a parallel run; see `ParallelConfig` for their meaning.

    Every inherited field either does what transformers documents or raises here, at construction, before any process
    group exists: `hf_nanotron.arguments.policy` holds the table. `gradient_accumulation_steps` is also the number
    of micro-batches of the pipeline, and `bf16` means bfloat16 compute with fp32 master weights.

    Raises:
        ValueError: for a refused value, for sizes that do not divide the number of processes, or for too few
            micro-batches; the same message on every rank.
    """

    tp_size: int = field(default=1, metadata={"help": "Ranks that share every layer (tensor parallelism)."})
    pp_size: int = field(default=1, metadata={"help": "Ranks that share the stack of layers (pipeline parallelism)."})
    cp_size: int = field(default=1, metadata={"help": "Ranks that share a sequence (context parallelism)."})
    ep_size: int = field(default=1, metadata={"help": "Ranks that share the experts (expert parallelism)."})
    dp_replicate_size: int = field(
        default=1, metadata={"help": "Copies of the ZeRO shards among the data-parallel ranks (hybrid sharding)."}
    )
    zero_stage: int = field(
        default=1,
        metadata={
            "help": "What data-parallel ranks shard: 0 nothing, 1 optimizer state and fp32 masters, 2 also gradients, "
            "3 also parameters."
        },
    )
    optim_state_dtype: str = field(
        default="float32", metadata={"help": "Of AdamW's two moments: float32, or bfloat16 with stochastic rounding."}
    )
    skip_nonfinite_steps: bool = field(
        default=False,
        metadata={"help": "Leave out a step whose gradient is not finite; otherwise it ends the run."},
    )
    max_skipped_steps: int = field(
        default=20,
        metadata={"help": "Steps in a row that skip_nonfinite_steps may leave out; one more ends the run."},
    )
    save_hub_weights: str = field(
        default="always",
        metadata={
            "help": "Which checkpoints hold the Hub's weights beside the training state: always (each), or last (the "
            "one at the end alone)."
        },
    )
    async_save: bool = field(
        default=False,
        metadata={
            "help": "Hold training only while a checkpoint is copied to the host's memory, and write it meanwhile."
        },
    )
    save_on_signal: float = field(
        default=0.0,
        metadata={
            "help": "Seconds of grace in which SIGTERM and SIGUSR1 save a checkpoint and stop the run; 0 leaves "
            "signals alone."
        },
    )
    overwrite_output_dir: bool | None = field(
        default=None,
        metadata={
            "help": "Whether a run may save where another run has checkpoints (output_dir, remote_checkpoints), "
            "which it overwrites where it saves the same steps. False refuses it; unset, there is a warning.",
            "nargs": "?",
            "const": True,
        },
    )
    remote_checkpoints: str | None = field(
        default=None,
        metadata={
            "help": "URL such as s3://bucket/run: each committed checkpoint is uploaded there in the background, and "
            "resume_from_checkpoint=True looks there too."
        },
    )
    remote_keep_local: int = field(
        default=1, metadata={"help": "Uploaded checkpoints that stay in output_dir, with remote_checkpoints."}
    )
    remote_pending_limit: int | None = field(
        default=None,
        metadata={
            "help": "Checkpoints that may wait in output_dir for their upload while the store fails or is slow. Beyond "
            "it the oldest are deleted, never the newest or the best. Unset, as many as remote_min_free_gb allows."
        },
    )
    remote_min_free_gb: float | None = field(
        default=None,
        metadata={
            "help": "GiB that stay free on output_dir's disk while checkpoints wait for their upload: below it the "
            "oldest waiting ones are deleted, never the newest or the best. Unset, room for one more checkpoint."
        },
    )
    remote_retry_seconds: float = field(
        default=2.0,
        metadata={"help": "Seconds before what failed at remote_checkpoints is tried again; doubled each time."},
    )
    remote_retry_max_seconds: float = field(
        default=60.0, metadata={"help": "Longest pause between two attempts at remote_checkpoints, in seconds."}
    )
    remote_start_timeout: float = field(
        default=300.0,
        metadata={
            "help": "Seconds for which the start of a run tries to reach remote_checkpoints, and to download from "
            "there, if it fails. Wrong credentials or a missing bucket are refused at once."
        },
    )
    remote_wait_timeout: float = field(
        default=1800.0,
        metadata={
            "help": "Seconds for which the end of train waits for uploads. What is missing then is named, and stays in "
            "output_dir."
        },
    )
    moe_capacity_factor: float | None = field(
        default=None,
        metadata={
            "help": "Rows for each expert while training, in multiples of an even load; tokens beyond them are dropped "
            "for that expert. Unset, none is dropped."
        },
    )
    moe_bias_update_rate: float = field(
        default=0.0,
        metadata={
            "help": "How far the routers' correction biases move against the load after each step (loss-free "
            "balancing); 0 leaves them."
        },
    )
    moe_log_loads: str = field(
        default="model",
        metadata={"help": "Loads of the experts in log lines: of the model as a whole, of its layers, or all experts."},
    )
    z_loss_coefficient: float = field(
        default=0.0, metadata={"help": "Of log(Z)^2 in the loss of each predicted token (z-loss over the vocabulary)."}
    )
    attention: str = field(
        default="auto",
        metadata={"help": "While training: the fastest kernel that fits (auto), or the model's own attention (stock)."},
    )
    fp8: str | None = field(
        default=None,
        metadata={
            "help": "FP8 products in the linear layers of decoder layers while training, with a scale of each tensor "
            "(tensorwise, the faster) or of each row and column (rowwise); needs bf16=True, and 1 byte more for each "
            "of their weights. Unset, none."
        },
    )
    fp8_skip_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Decoder layers that stay in bf16 under fp8, such as 0 -1.", "nargs": "+"},
    )
    sequence_parallel: bool = field(
        default=True,
        metadata={"help": "Split activations along the sequence between tensor-parallel modules."},
    )
    tp_overlap: bool | None = field(
        default=None,
        metadata={
            "help": "Let tensor-parallel communication travel beside matrix products (needs sequence_parallel); unset, "
            "on GPUs.",
            "nargs": "?",
            "const": True,
        },
    )
    pp_schedule: str = field(
        default="1f1b", metadata={"help": "Pipeline schedule: afab, 1f1b, interleaved_1f1b or zb (zero bubble)."}
    )
    pp_virtual_stages: int = field(
        default=1, metadata={"help": "Stages per pipeline rank; more than one needs interleaved_1f1b or zb."}
    )
    activation_checkpointing_policy: str = field(
        default="full",
        metadata={
            "help": "What activation_checkpointing recomputes in the backward: full (all of a layer), or selective "
            "(all but matrix products and attention, whose outputs are kept)."
        },
    )
    activation_checkpointing_layers: list[int] | str | None = field(
        default=None,
        metadata={
            "help": "Decoder layers that activation_checkpointing applies to, by their numbers in the whole model from "
            "0 on, as a list or as 0,2,4; all if unset.",
            "nargs": "+",
        },
    )
    torch_compile: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Compile decoder layers for training. Unset: on CUDA with bf16, where it is faster.",
            "nargs": "?",
            "const": True,
        },
    )
    # HfArgumentParser takes `str` out of this union; with nargs the shell can say "3 5" as well as "3,5".
    pp_layers_per_stage: list[int] | str | None = field(
        default=None,
        metadata={
            "help": "Decoder layers of each stage, in model order, as a list or as 3,5; balanced by cost if unset.",
            "nargs": "+",
        },
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        refuse_removed(kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.pp_layers_per_stage = _layer_counts(self.pp_layers_per_stage)
        self.activation_checkpointing_layers = layer_numbers(self.activation_checkpointing_layers)
        self.check()
        check_launch(os.environ)
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
        super().__post_init__()
        if chosen is None:
            chosen = self.bf16 and self.device.type == "cuda"
        self.torch_compile = chosen or backend is not None or mode is not None
        self.torch_compile_backend, self.torch_compile_mode = backend, mode
        # The trainer casts by itself; accelerate must not autocast, nor convert outputs to fp32.
        self.mixed_precision = "no"
        if self.world_size != expected_world_size:
            raise ValueError(
                f"{expected_world_size} processes were announced (WORLD_SIZE), but accelerate runs {self.world_size} "
                f"on {self.device}: start the script with torchrun, which sets LOCAL_RANK, or pass use_cpu=True."
            )

    def check(self) -> None:
        """Refuse what no run could honour. Runs at construction; call it again after assigning to fields.

        Raises:
            ValueError: as at construction.
        """
        if dist.is_initialized():
            attend()  # other ranks notice if this one is refused, and ends
        set_plain_values(self, NanotronTrainingArguments)
        check_values(self, NanotronTrainingArguments, REFUSED)
        check_policy(self)
        check_recomputation(self)
        if self.save_hub_weights not in ("always", "last"):
            raise ValueError(f"save_hub_weights={self.save_hub_weights!r} is not one of 'always', 'last'.")
        if self.save_hub_weights == "last" and self.save_only_model:
            raise ValueError(
                "save_hub_weights='last' with save_only_model=True: checkpoints before the last would hold nothing; "
                "use save_hub_weights='always'."
            )
        if not isinstance(self.save_on_signal, int | float) or self.save_on_signal < 0:
            raise ValueError(f"save_on_signal={self.save_on_signal!r} must be a number of seconds, at least 0.")
        if self.remote_retry_max_seconds < self.remote_retry_seconds:
            raise ValueError(
                f"remote_retry_max_seconds={self.remote_retry_max_seconds:g} is below remote_retry_seconds="
                f"{self.remote_retry_seconds:g}; it is the longest pause between attempts, and that the first one."
            )
        if self.optim_state_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"optim_state_dtype={self.optim_state_dtype!r} is not one of 'float32', 'bfloat16'.")
        if self.optim_state_dtype == "bfloat16" and not str(getattr(self.optim, "value", self.optim)).startswith(
            "adamw"
        ):
            raise ValueError(
                f"optim_state_dtype='bfloat16' with optim={str(getattr(self.optim, 'value', self.optim))!r}: only "
                "AdamW's moments can be bfloat16; use optim='adamw_torch_fused', or optim_state_dtype='float32'."
            )
        if self.moe_capacity_factor is not None and not self.moe_capacity_factor > 0:
            raise ValueError(
                f"moe_capacity_factor={self.moe_capacity_factor!r} must be above 0 (1.0 is room for an even load), or "
                "None."
            )
        if self.moe_log_loads not in ("model", "layers", "experts"):
            raise ValueError(f"moe_log_loads={self.moe_log_loads!r} is not one of 'model', 'layers', 'experts'.")
        if self.attention not in ("auto", "stock"):
            raise ValueError(f"attention={self.attention!r} is not one of 'auto', 'stock'.")
        for name in ("moe_bias_update_rate", "z_loss_coefficient"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 0.")
        self._check_fp8()
        self.parallel.expert_copies(_world_size())
        self.parallel.check_micro_batches(self.gradient_accumulation_steps)

    def _check_fp8(self) -> None:
        """
        Raises:
            ValueError: for a recipe that does not exist, or that the other arguments rule out.
        """
        if self.fp8 not in (None, *RECIPES):
            raise ValueError(f"fp8={self.fp8!r} is not one of {', '.join(map(repr, RECIPES))}, None.")
        if self.fp8 is not None and not self.bf16:
            raise ValueError(f"fp8={self.fp8!r} without bf16: what is not FP8 computes in bfloat16; add bf16=True.")
        if self.fp8 is not None and self.zero_stage == 3:
            raise ValueError(
                f"fp8={self.fp8!r} with zero_stage=3: weights are gathered twice for every micro-batch there, and "
                "would be turned into FP8 each time; use zero_stage=2."
            )
        if self.fp8_skip_layers is not None:
            if self.fp8 is None:
                raise ValueError("fp8_skip_layers without fp8: all layers are in bf16; set fp8='tensorwise'.")
            if not isinstance(self.fp8_skip_layers, list) or any(type(i) is not int for i in self.fp8_skip_layers):
                raise ValueError(
                    f"fp8_skip_layers={self.fp8_skip_layers!r} must be a list of integers, such as [0, -1]."
                )

    @property
    def parallel(self) -> ParallelConfig:
        """The sizes of the run, as models and meshes take them."""
        sizes = {entry.name: getattr(self, entry.name) for entry in fields(ParallelConfig)}
        layers = _layer_counts(self.pp_layers_per_stage)
        return ParallelConfig(**{**sizes, "pp_layers_per_stage": None if layers is None else tuple(layers)})

    @property
    def dp_size(self) -> int:
        """Data-parallel size: the replicas of the model, which read different samples."""
        return self.parallel.dp_size(self.world_size)

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


def _layer_counts(value: Any) -> list[int] | None:
    """`pp_layers_per_stage` from a list, or from text like "3,5", "3 5" or "[3, 5]"."""
    if not value:
        return None
    text = value if isinstance(value, str) else ",".join(map(str, value))
    try:
        return [int(count) for count in text.strip("[]() ").replace(",", " ").split()] or None
    except ValueError:
        raise ValueError(
            f"pp_layers_per_stage={value!r} must be a list of integers, or text like '3,5': the decoder layers of "
            "each stage."
        ) from None

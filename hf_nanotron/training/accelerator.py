"""The trainer's `accelerator`: what it deals or joins over processes goes over data-parallel ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import recursively_apply

from ..models.base import ParallelModel
from ..parallel.collectives import all_gather, all_reduce
from ..parallel.mesh import ParallelMesh

# What each public name of accelerate's class is here. Those that are about data or results:
OVER_DATA_PARALLEL_RANKS = frozenset(
    "prepare prepare_data_loader split_between_processes gather gather_for_metrics reduce data_parallel_rank "
    "data_parallel_shard_rank tensor_parallel_rank context_parallel_rank pipeline_parallel_rank".split()
)
# What takes a model that every rank holds whole: refused for the trainer's, done for any other module.
REFUSED = {
    "prepare_model": "it is sharded already, and accelerate would wrap it as if it was replicated on every rank; "
    "use it as it is",
    "save_model": "each rank holds only its shard; use trainer.save_model(), on every rank",
    "get_state_dict": "each rank holds only its shard; use trainer.save_model(), on every rank",
    "clip_grad_norm_": "its gradients are sharded, so the norm on one rank would be wrong; set max_grad_norm",
    "clip_grad_value_": "its gradients are sharded and not in `grad`; set max_grad_norm",
    "save_state": "accelerate saves a whole model; use the trainer's checkpoints (save_strategy)",
    "load_state": "accelerate loads a whole model; use train(resume_from_checkpoint=...)",
    "prepare_scheduler": "accelerate steps it once for each process; hand it to the trainer as it is, in "
    "optimizers=(optimizer, scheduler)",
}
# What is right as it is: about all processes, or about this one alone.
AS_IT_IS = frozenset(
    "num_processes process_index local_process_index is_main_process is_local_main_process is_last_process "
    "on_main_process on_local_main_process on_last_process on_process on_local_process main_process_first "
    "local_main_process_first wait_for_everyone set_trigger check_trigger print save should_save_model "
    "pad_across_processes device distributed_type multi_device use_distributed verify_device_map unwrap_model "
    "skip_first_batches no_sync accumulate sync_gradients gradient_accumulation_steps join_uneven_inputs "
    "trigger_sync_in_backward backward prepare_optimizer optimizer_step_was_skipped unscale_gradients autocast "
    "mixed_precision free_memory clear profile register_for_checkpointing register_load_state_pre_hook "
    "register_save_state_pre_hook save_iteration project_dir logging_dir init_trackers get_tracker log end_training "
    "split_batches dispatch_batches even_batches use_seedable_sampler use_stateful_dataloader non_blocking".split()
)
# Of other ways to train in parallel, which the training arguments refuse.
UNUSED = frozenset(
    "deepspeed_plugin deepspeed_ulysses_dl_adapter is_fsdp2 is_composable_parallelism_enabled parallelism_config "
    "torch_device_mesh maybe_context_parallel lomo_backward fp8_backend".split()
)


class DataParallelAccelerator(Accelerator):
    """An `Accelerator` for which the ranks of one replica are one process where data is dealt or results are joined.

    `process_index`, `num_processes`, `is_main_process` and barriers are about all processes, as everywhere.

    Attributes:
        mesh: where this rank stands; None before there is a model.
        model: what the trainer trains.
    """

    mesh: ParallelMesh | None = None
    model: ParallelModel | None = None

    @staticmethod
    def adopt(accelerator: Accelerator) -> DataParallelAccelerator:
        """The same object, as one of this class."""
        accelerator.__class__ = DataParallelAccelerator
        assert isinstance(accelerator, DataParallelAccelerator)
        return accelerator

    @property
    def tensor_parallel_rank(self) -> int:
        return self.mesh.tp_rank if self.mesh is not None else 0

    @property
    def context_parallel_rank(self) -> int:
        return self.mesh.cp_rank if self.mesh is not None else 0

    @property
    def pipeline_parallel_rank(self) -> int:
        return self.mesh.pp_rank if self.mesh is not None else 0

    @property
    def data_parallel_rank(self) -> int:
        return self.mesh.dp_rank if self.mesh is not None else self.process_index

    @property
    def data_parallel_shard_rank(self) -> int:
        return self.mesh.coordinates.shard if self.mesh is not None else 0

    # ---- data in ----

    def prepare_data_loader(
        self, data_loader: Any, device_placement: bool | None = None, slice_fn_for_dispatch: Any = None
    ) -> Any:
        """accelerate's, for data-parallel ranks. Batches stay on the host: the trainer copies them without waiting."""
        if getattr(data_loader, "_is_accelerate_prepared", False) or self.mesh is None:
            return super().prepare_data_loader(data_loader, device_placement, slice_fn_for_dispatch)
        prepared = prepare_data_loader(
            data_loader,
            self.device,
            num_processes=self.mesh.dp_size,
            process_index=self.mesh.dp_rank,
            split_batches=self.split_batches,
            put_on_device=bool(device_placement),
            rng_types=list(self.rng_types),
            dispatch_batches=False,
            even_batches=self.even_batches,
            use_seedable_sampler=self.use_seedable_sampler,
            data_seed=self.dataloader_config.data_seed,
            non_blocking=self.non_blocking,
            use_stateful_dataloader=self.use_stateful_dataloader,
        )
        self._dataloaders.append(prepared)
        return prepared

    @contextlib.contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        mesh = self.mesh
        size, rank = (self.num_processes, self.process_index) if mesh is None else (mesh.dp_size, mesh.dp_rank)
        # All that accelerate's function reads of its object.
        dealt = SimpleNamespace(num_processes=size, process_index=rank, device=self.device)
        with PartialState.split_between_processes(cast(PartialState, dealt), inputs, apply_padding) as part:
            yield part

    # ---- results out ----

    def gather(self, tensor: Any) -> Any:
        if self.mesh is None or self.mesh.dp_size == 1:
            return tensor
        return recursively_apply(self._gather_one, tensor, error_on_other_type=True)

    def _gather_one(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self.mesh is not None
        return all_gather(tensor[None] if tensor.dim() == 0 else tensor, self.mesh.dp, 0)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        try:
            recursively_apply(lambda tensor: tensor, input_data, error_on_other_type=True)
        except TypeError:
            use_gather_object = True
        if not use_gather_object:
            return super().gather_for_metrics(input_data)
        data = self._gather_objects(input_data)
        state = self.gradient_state
        return data[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else data

    def _gather_objects(self, items: Any) -> list[Any]:
        if self.mesh is None or self.mesh.dp_size == 1:
            return items
        parts: list[Any] = [None] * self.mesh.dp_size
        dist.all_gather_object(parts, items, group=self.mesh.dp.handle)
        return [item for part in parts for item in part]

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        if self.mesh is None or self.mesh.dp_size == 1:
            return tensor
        if reduction not in ("sum", "mean", "max", "none"):
            raise ValueError(f"reduction={reduction!r} is not one of 'sum', 'mean', 'max', 'none'.")
        return recursively_apply(lambda one: self._reduce_one(one, reduction), tensor, error_on_other_type=True)

    def _reduce_one(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert self.mesh is not None
        if reduction == "none":
            return tensor
        operation = dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM
        total = all_reduce(tensor, self.mesh.dp, operation)
        return total / self.mesh.dp_size if reduction == "mean" else total

    # ---- what is meant for a model that every rank holds whole ----

    def prepare_model(self, model: Any, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
        if isinstance(model, ParallelModel):
            if not evaluation_mode:
                raise _refusal("prepare_model")
            if model not in self._models:
                self._models.append(model)
            return model
        return super().prepare_model(model, device_placement, evaluation_mode)

    def prepare_scheduler(self, scheduler: Any) -> Any:
        if self.mesh is not None and self.mesh.model.size > 1:
            raise ValueError(f"accelerator.prepare() of a scheduler: {REFUSED['prepare_scheduler']}.")
        return super().prepare_scheduler(scheduler)

    def save_model(self, model: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(model, ParallelModel):
            raise _refusal("save_model")
        super().save_model(model, *args, **kwargs)

    def get_state_dict(self, model: Any, unwrap: bool = True) -> Any:
        if isinstance(model, ParallelModel):
            raise _refusal("get_state_dict")
        return super().get_state_dict(model, unwrap)

    def save_state(self, *args: Any, **kwargs: Any) -> Any:
        raise _refusal("save_state")

    def load_state(self, *args: Any, **kwargs: Any) -> None:
        raise _refusal("load_state")

    def clip_grad_norm_(self, parameters: Any, *args: Any, **kwargs: Any) -> Any:
        return super().clip_grad_norm_(self._not_of_the_model(parameters, "clip_grad_norm_"), *args, **kwargs)

    def clip_grad_value_(self, parameters: Any, *args: Any, **kwargs: Any) -> None:
        super().clip_grad_value_(self._not_of_the_model(parameters, "clip_grad_value_"), *args, **kwargs)

    def _not_of_the_model(self, parameters: Any, name: str) -> list[torch.Tensor]:
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        own = {id(parameter) for parameter in self.model.parameters()} if self.model is not None else set()
        if any(id(parameter) in own for parameter in given):
            raise _refusal(name)
        return given


def _refusal(name: str) -> ValueError:
    return ValueError(f"accelerator.{name}() cannot take the trainer's model: {REFUSED[name]}.")

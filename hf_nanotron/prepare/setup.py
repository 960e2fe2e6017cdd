"""Make a parallel model ready to train by the training arguments."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from transformers.utils import logging

from ..arguments.recompute import RecomputationArguments, layer_numbers, recomputes
from ..arguments.rules import as_mapping
from ..models.base import ParallelModel
from ..models.stock.mixer_kernels import kernels_of
from ..optim.offload import StateOnHost
from ..parallel.together import all_or_none
from .attention import choose_attention
from .checkpointing_switches import restore_switches
from .compile import compile_layers, restore_layers
from .context_attention import choose_context_attention, let_parts_see_rows
from .fp8 import use_fp8
from .mlp_chunks import chunk_mlps, restore_mlps
from .neftune import set_noise
from .offload import offload_layers, restore_offloaded
from .recompute import chosen_layers, recompute_selectively, recompute_wholly, restore_recomputed
from .shard_weights import refuse_frozen, shard_weights
from .training_state import TrainingState

logger = logging.get_logger(__name__)


class PreparationArguments(RecomputationArguments, Protocol):
    """What is read of the training arguments here."""

    attention: str
    bf16: bool
    fp8: str | None
    fp8_skip_layers: list[int] | None
    mlp_chunk_tokens: int | None
    moe_bias_update_rate: float
    moe_capacity_factor: float | None
    neftune_noise_alpha: float | None
    optim_offload: float
    seed: int
    torch_compile: bool | None
    torch_compile_backend: str | None
    torch_compile_mode: str | None
    z_loss_coefficient: float

    @property
    def gradient_bucket_bytes(self) -> int: ...


def prepare_training(model: ParallelModel, args: PreparationArguments) -> TrainingState:
    """Shard the weights of `model`, and have it compute as `args` say. All ranks together.

    A model that another trainer has prepared is taken from it.
    """
    mesh, dtype = model.mesh, torch.bfloat16 if args.bf16 else model.dtype
    if dtype == torch.float16:
        raise ValueError(
            "the weights of the model are float16, which would be trained in float16 and needs loss scaling, which is "
            "not implemented. Use bf16=True, or load the model with dtype=torch.float32 (in YAML: model.dtype)."
        )
    trainable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    refuse_frozen(model, trainable)
    fp8 = all_or_none(mesh, "setting up FP8", lambda: use_fp8(model, args.fp8, args.fp8_skip_layers))
    state = TrainingState(model, shard_weights(model, dtype, args.gradient_bucket_bytes), fp8)
    if args.optim_offload:
        segments, fraction = state.weights.segments, args.optim_offload
        state.host = all_or_none(
            mesh, "offloading the optimizer's state", lambda: StateOnHost(segments, mesh.device, fraction)
        )
    for restore in (restore_offloaded, restore_layers, restore_recomputed, restore_mlps):
        restore(model)  # as an earlier trainer may have left it
    if args.mlp_chunk_tokens is not None:
        rows = args.mlp_chunk_tokens
        all_or_none(mesh, "dividing the MLPs into blocks of tokens", lambda: chunk_mlps(model, rows))
    let_parts_see_rows(model)  # before it is decided what is compiled and recomputed in one piece
    _choose_recomputation(state, args)
    if args.torch_compile:
        backend = args.torch_compile_backend or "inductor"
        compile_layers(model, backend, args.torch_compile_mode, state.recomputed)
    if args.activation_offload:
        state.offload = offload_layers(
            model,
            state.recomputed,
            args.activation_offload,
            args.activation_checkpointing_policy,
            state.recompute_options,
        )
    if mesh.cp_size > 1:
        choose = functools.partial(choose_context_attention, model, dtype, mesh.device)
        state.attention, chosen = all_or_none(mesh, "sharing rows among ranks (cp_size)", choose)
    else:
        state.attention, chosen = choose_attention(model.anatomy, dtype, mesh.device, args.attention)
    logger.info("; ".join((chosen, *kernels_of(model.anatomy))))
    model.training_loss.z_loss = args.z_loss_coefficient
    all_or_none(mesh, "setting up the experts", lambda: _configure_experts(model, dtype, args))
    return state


def _choose_recomputation(state: TrainingState, args: PreparationArguments) -> None:
    options = dict(as_mapping(args.activation_checkpointing_kwargs))
    every = options.pop("every_n_layers", None) or 1
    options.pop("offload", None)
    state.recompute_options = options
    if recomputes(args):
        state.recomputed = chosen_layers(state.model, layer_numbers(args.activation_checkpointing_layers), every)
    policy = args.activation_checkpointing_policy
    if policy == "all_but_attention" and state.model.config.get_text_config()._attn_implementation == "eager":
        logger.warning(
            "activation_checkpointing_policy='all_but_attention' with attn_implementation='eager': plain operators "
            "compute the attention, of which nothing is kept, so its layers recompute as with 'full'. Use 'sdpa' or "
            "another attention with a kernel of its own, or activation_checkpointing_policy='selective'."
        )
    if policy != "full":
        recompute_selectively(state.model, state.recomputed, options, policy)


def _configure_experts(model: ParallelModel, dtype: torch.dtype, args: PreparationArguments) -> None:
    if model.mixture is not None:
        model.mixture.configure(model, dtype, args.moe_capacity_factor, args.moe_bias_update_rate)
        return
    for name, off in (("moe_capacity_factor", None), ("moe_bias_update_rate", 0.0)):
        if getattr(args, name) != off:
            raise ValueError(f"{name}={getattr(args, name)}: {type(model).__name__} has no experts.")


def start_run(state: TrainingState, args: PreparationArguments) -> None:
    """What holds for one call of `train`, whose `Trainer` has turned its own switch of recomputation on."""
    if args.activation_checkpointing_policy != "full" or state.offload is not None:
        state.model.activation_checkpointing_disable()
    elif state.recomputed:
        recompute_wholly(state.model, state.recomputed, state.recompute_options)
    state.noise = set_noise(state.model, args.neftune_noise_alpha, args.seed)


def end_run(model: ParallelModel, state: TrainingState) -> None:
    """Take back what holds for a run alone. `note_switches` was called when it began."""
    if state.offload is not None:
        state.offload.release()
    set_noise(model, None, 0)
    restore_switches(model)


def check_frozen(state: TrainingState, save_hub_weights: str) -> None:
    """Refuse frozen parameters that no checkpoint would have."""
    named: dict[str, Any] = dict(state.model.named_parameters())
    trainable = {name for name, parameter in named.items() if parameter.requires_grad}
    if save_hub_weights == "last" and (frozen := sorted(named.keys() - trainable)):
        raise ValueError(
            f"save_hub_weights='last' with {len(frozen)} frozen parameters ({frozen[0]}, ...): frozen parameters are "
            "stored in the Hub files only, so a checkpoint without those files could not be resumed; use "
            "save_hub_weights='always'."
        )

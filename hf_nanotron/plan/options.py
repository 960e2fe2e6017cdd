"""What a job's training arguments mean for the time of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..arguments.recompute import layer_numbers
from .job import Job

POLICIES = ("full", "selective", "all_but_attention")


@dataclass(frozen=True)
class Options:
    """How layers compute.

    Args:
        item: bytes of an element of the compute dtype.
        compiled: whether layers are compiled.
        fp8: whether linears of layers compute in FP8.
        fp8_skipped: layers that do not, counted from 0.
        policy: what layers recompute; `"none"` for nothing.
        recomputed: layers that do, counted from 0; None for all.
        offload: fraction of the recomputed layers that keep what they keep on the host.
        mlp_chunks: whether MLPs take blocks of tokens.
        optimizer: `optim`.
        moment: bytes of an element of its moments.
        state_offload: fraction of the optimizer's state that is on the host.
        capacity: whether experts have a capacity, and the host waits for no numbers of rows.
    """

    item: int
    compiled: bool
    fp8: bool
    fp8_skipped: frozenset[int]
    policy: str
    recomputed: frozenset[int] | None
    offload: float
    mlp_chunks: bool
    optimizer: str
    moment: int
    state_offload: float
    capacity: bool

    def policy_of(self, layer: int) -> str:
        """What one layer recomputes."""
        return self.policy if self.recomputed is None or layer in self.recomputed else "none"

    def fp8_of(self, layer: int) -> bool:
        """Whether the linears of a layer compute in FP8."""
        return self.fp8 and layer not in self.fp8_skipped


def options_of(job: Job, layers: int) -> Options:
    """The options of a job whose model has so many layers.

    Raises:
        ValueError: for an unknown policy.
    """
    said: Mapping[str, Any] = job.arguments
    half = bool(said.get("bf16") or said.get("fp16"))
    checkpointing = said.get("activation_checkpointing") or said.get("gradient_checkpointing")
    policy = str(said.get("activation_checkpointing_policy") or "full") if checkpointing else "none"
    if policy not in (*POLICIES, "none"):
        raise ValueError(f"activation_checkpointing_policy={policy!r} is not one of {', '.join(map(repr, POLICIES))}.")
    numbers = layer_numbers(said.get("activation_checkpointing_layers"))
    compiled = said.get("torch_compile")
    return Options(
        item=2 if half else 4,
        compiled=half if compiled is None else bool(compiled),
        fp8=said.get("fp8") is not None,
        fp8_skipped=frozenset(index % layers for index in said.get("fp8_skip_layers") or ()),
        policy=policy,
        recomputed=None if numbers is None else frozenset(numbers),
        offload=float(said.get("activation_offload") or 0.0),
        mlp_chunks=said.get("mlp_chunk_tokens") is not None,
        optimizer=str(getattr(said.get("optim"), "value", said.get("optim")) or "adamw_torch_fused"),
        moment=2 if said.get("optim_state_dtype") == "bfloat16" else 4,
        state_offload=float(said.get("optim_offload") or 0.0),
        capacity=said.get("moe_capacity_factor") is not None,
    )

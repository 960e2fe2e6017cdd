"""The sizes of a parallel run, as the user states them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Self

import torch

CP_MODES = ("auto", "gather", "heads")
SCHEDULES = ("afab", "1f1b", "interleaved_1f1b", "zb")

# Options of earlier versions, and what to do instead.
REMOVED = {
    "ep_parts": "ep_parts was removed: splitting experts into parts was never faster than sending each token once to "
    "each rank, which is now the only way. Delete the setting; it needs no replacement.",
}


def refuse_removed(options: Collection[str]) -> None:
    if found := [sentence for option, sentence in REMOVED.items() if option in options]:
        raise ValueError(" ".join(found))


@dataclass(frozen=True)
class ParallelConfig:
    """How one model is spread over the ranks of a job. Immutable; built by `NanotronTrainingArguments.parallel`.

    The data-parallel size is not a field: it is the world size divided by `tp_size * pp_size * cp_size`.

    Args:
        tp_size: ranks that share every layer (tensor parallelism).
        pp_size: ranks that share the stack of layers (pipeline parallelism).
        cp_size: ranks that share every row of a batch, each with a part of its tokens (context parallelism). For
            weights they are data-parallel ranks: `zero_stage` shards over them, too.
        cp_mode: how attention sees all tokens: `"gather"` (each rank gathers the keys and values of all, for the
            queries of its own tokens), `"heads"` (each rank gets all tokens of some of the heads; Jacobs et al. 2023,
            arXiv:2309.14509), or `"auto"` (for each micro-batch that of both which sends and copies less, see
            `parallel/cp/choice.py`).
        cp_kv_heads_per_gather: key-value heads of a rank that `cp_mode="gather"` gathers at once, while those before
            attend: fewer overlap better and take less memory, more fill a GPU better. `None` is a quarter of them, or
            more where kernels would have too little to do or little is sent.
        ep_size: ranks over which the experts of a mixture-of-experts model are distributed. They are neighbours among
            the data-, context- and tensor-parallel ranks of a pipeline stage, whose number it divides.
        dp_replicate_size: groups of data-parallel ranks that each hold all ZeRO shards (shard inside a node, replicate
            across nodes: hybrid sharding, Zhao et al. 2023, arXiv:2304.11277). Divides the data-parallel size times
            `cp_size`.
        zero_stage: what data-parallel ranks shard (Rajbhandari et al. 2020, arXiv:1910.02054): 0 nothing; 1 the fp32
            masters and the optimizer state; 2 also the gradients; 3 also the parameters.
        sequence_parallel: between attention and MLP, shard activations along the sequence over the tensor-parallel
            ranks (Korthikanti et al. 2022, arXiv:2205.05198) instead of replicating them. No effect at `tp_size=1`.
        tp_overlap: overlap tensor-parallel communication with matmuls. Needs `sequence_parallel`; `None` means on GPUs,
            where possible.
        pp_schedule: `"afab"` (all forwards, then all backwards), `"1f1b"` or `"interleaved_1f1b"`
            (Narayanan et al. 2021, arXiv:2104.04473), or `"zb"`: one of the latter two with weight gradients computed
            where a rank would otherwise wait (zero bubble; Qi et al. 2023, arXiv:2401.10241).
        pp_virtual_stages: stages per pipeline rank; more than one needs `"interleaved_1f1b"` or `"zb"`.
        pp_layers_per_stage: decoder layers of each of the `pp_size * pp_virtual_stages` stages, in model order;
            `None` balances the stages by cost.

    Raises:
        ValueError: for an invalid value or combination, with what would work.
    """

    tp_size: int = 1
    pp_size: int = 1
    cp_size: int = 1
    cp_mode: str = "auto"
    cp_kv_heads_per_gather: int | None = None
    ep_size: int = 1
    dp_replicate_size: int = 1
    zero_stage: int = 1
    sequence_parallel: bool = True
    tp_overlap: bool | None = None
    pp_schedule: str = "1f1b"
    pp_virtual_stages: int = 1
    pp_layers_per_stage: tuple[int, ...] | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        refuse_removed(kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("tp_size", "pp_size", "cp_size", "ep_size", "dp_replicate_size", "pp_virtual_stages"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
        self._check_context()
        self._check_sharding()
        self._check_schedule()
        self._check_layers_per_stage()

    def _check_context(self) -> None:
        if self.cp_mode not in CP_MODES:
            raise ValueError(f"cp_mode={self.cp_mode!r} is not one of {', '.join(map(repr, CP_MODES))}.")
        if (heads := self.cp_kv_heads_per_gather) is not None:
            if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
                raise ValueError(f"cp_kv_heads_per_gather={heads!r} must be an integer of at least 1, or None.")
            if self.cp_size == 1 or self.cp_mode == "heads":
                raise ValueError(
                    f"cp_kv_heads_per_gather={heads} with cp_size={self.cp_size} and cp_mode={self.cp_mode!r}: nothing "
                    "is gathered; use a cp_size of at least 2 with cp_mode='gather', or leave it unset."
                )

    def _check_sharding(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3) or isinstance(self.zero_stage, bool):
            raise ValueError(
                f"zero_stage={self.zero_stage!r} is not one of 0 (shard nothing), 1 (optimizer state), 2 (gradients as "
                "well), 3 (parameters as well)."
            )
        if self.zero_stage == 0 and self.dp_replicate_size != 1:
            raise ValueError(
                f"dp_replicate_size={self.dp_replicate_size} with zero_stage=0: without sharding every "
                "data-parallel rank is already a replica; use dp_replicate_size=1, or zero_stage=1 to 3."
            )
        if self.tp_overlap and not (self.sequence_parallel and self.tp_size > 1):
            raise ValueError(
                f"tp_overlap=True with tp_size={self.tp_size} and sequence_parallel={self.sequence_parallel}: there is "
                "no tensor-parallel communication to overlap with matmuls; use sequence_parallel=True and a tp_size of "
                "at least 2, or leave tp_overlap unset."
            )

    def _check_schedule(self) -> None:
        if self.pp_schedule not in SCHEDULES:
            raise ValueError(f"pp_schedule={self.pp_schedule!r} is not one of {', '.join(map(repr, SCHEDULES))}.")
        interleaved = self.pp_schedule == "interleaved_1f1b"
        if self.pp_virtual_stages > 1 and not (interleaved or self.splits_backward):
            raise ValueError(
                f"pp_virtual_stages={self.pp_virtual_stages} needs pp_schedule='interleaved_1f1b' or 'zb', "
                f"not {self.pp_schedule!r}."
            )
        if self.splits_backward and self.pp_size < 2:
            raise ValueError(
                f"pp_schedule={self.pp_schedule!r} with pp_size={self.pp_size}: with one pipeline rank there is no "
                "bubble to fill; use pp_schedule='1f1b'."
            )
        if self.splits_backward and self.zero_stage == 3:
            raise ValueError(
                f"pp_schedule={self.pp_schedule!r} with zero_stage=3: ZeRO-3 reduces weight gradients in each "
                "layer's backward, so they cannot be deferred; use zero_stage=0, 1 or 2, or pp_schedule='1f1b'."
            )
        if interleaved and (self.pp_virtual_stages < 2 or self.pp_size < 2):
            raise ValueError(
                f"pp_schedule='interleaved_1f1b' with pp_size={self.pp_size} and "
                f"pp_virtual_stages={self.pp_virtual_stages}: both must be at least 2; otherwise use "
                "pp_schedule='1f1b'."
            )

    def _check_layers_per_stage(self) -> None:
        if self.pp_layers_per_stage is not None:
            layers = tuple(self.pp_layers_per_stage)
            object.__setattr__(self, "pp_layers_per_stage", layers)
            if len(layers) != self.num_stages or any(not isinstance(n, int) or n < 1 for n in layers):
                raise ValueError(
                    f"pp_layers_per_stage={list(layers)} must have a positive number of layers for each of the "
                    f"{self.num_stages} stages (pp_size={self.pp_size} x pp_virtual_stages={self.pp_virtual_stages})."
                )

    @property
    def num_stages(self) -> int:
        """Pipeline stages in the whole model."""
        return self.pp_size * self.pp_virtual_stages

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients are computed by actions of their own, after the backward."""
        return self.pp_schedule == "zb"

    @property
    def model_parallel_size(self) -> int:
        """Ranks that together hold one replica of the model and read the same samples."""
        return self.tp_size * self.pp_size * self.cp_size

    def overlaps_tp(self, device: torch.device) -> bool:
        """Whether tensor-parallel communication overlaps with matmuls on `device`."""
        if self.tp_overlap is None:
            return device.type == "cuda" and self.sequence_parallel and self.tp_size > 1
        return self.tp_overlap

    def dp_size(self, world_size: int) -> int:
        """Data-parallel size for `world_size` processes.

        Raises:
            ValueError: if the model-parallel sizes do not divide `world_size`, or `dp_replicate_size` does not divide
                the result.
        """
        if world_size % self.model_parallel_size:
            works = [n for n in range(1, world_size + 1) if world_size % n == 0]
            raise ValueError(
                f"tp_size={self.tp_size} x pp_size={self.pp_size} x cp_size={self.cp_size} = "
                f"{self.model_parallel_size} does not divide the world size {world_size}: their product must be one "
                f"of {works}, or start {self.model_parallel_size} processes (or a multiple) with torchrun."
            )
        dp_size = world_size // self.model_parallel_size
        copies = dp_size * self.cp_size
        if copies % self.dp_replicate_size:
            size = f"{dp_size} x cp_size={self.cp_size}" if self.cp_size > 1 else dp_size
            raise ValueError(
                f"dp_replicate_size={self.dp_replicate_size} does not divide the data-parallel size {size} (world "
                f"size {world_size} / {self.model_parallel_size} ranks per model replica); it must be one of "
                f"{[n for n in range(1, copies + 1) if copies % n == 0]}."
            )
        return dp_size

    def weight_copies(self, world_size: int) -> int:
        """Data- and context-parallel ranks that hold the same weights, and sum their gradients."""
        return self.dp_size(world_size) * self.cp_size

    def shard_size(self, world_size: int) -> int:
        """Ranks, of `weight_copies`, that share one set of ZeRO shards; 1 if nothing is sharded."""
        return self.weight_copies(world_size) // self.dp_replicate_size if self.zero_stage else 1

    def expert_copies(self, world_size: int) -> int:
        """Copies of the experts that share one set of their ZeRO shards; 1 if nothing is sharded."""
        ranks = self.weight_copies(world_size) * self.tp_size
        block = self.shard_size(world_size) * self.tp_size if self.zero_stage else ranks
        if block % self.ep_size:
            works = [n for n in range(1, block + 1) if block % n == 0]
            what = f"the data-parallel size {self.dp_size(world_size)} x tp_size={self.tp_size}"
            if self.cp_size > 1:
                what = what.replace(" x tp", f" x cp_size={self.cp_size} x tp")
            if self.dp_replicate_size > 1:
                what += f" / dp_replicate_size={self.dp_replicate_size}"
            raise ValueError(f"ep_size={self.ep_size} does not divide {what} = {block}; it must be one of {works}.")
        return block // self.ep_size if self.zero_stage else 1

    def check_micro_batches(self, gradient_accumulation_steps: int) -> None:
        """Check that there are enough micro-batches for the schedule."""
        if self.pp_size > 1 and self.pp_schedule != "afab" and gradient_accumulation_steps < self.pp_size:
            raise ValueError(
                f"gradient_accumulation_steps={gradient_accumulation_steps} is the number of micro-batches of the "
                f"pipeline, and pp_schedule={self.pp_schedule!r} with pp_size={self.pp_size} needs at least "
                f"{self.pp_size}. Raise gradient_accumulation_steps to {self.pp_size} or more (a multiple of "
                f"{self.pp_size} idles least), or use pp_schedule='afab'."
            )

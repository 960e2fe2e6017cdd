"""Torch's context parallelism as accelerate offers it: the arguments of transformers' own Trainer.

Stock model with SDPA, weights in fp32 sharded by `fully_shard` over the ranks that share a sample, bf16 parameters and
gradients, fused AdamW. All is transformers' and accelerate's; it has no documents, and SDPA is its only attention.

Fields of a row: `cp_size`, `cp_comm_strategy` (`allgather`, accelerate's default, or `alltoall`, a ring),
`activation_checkpointing` (of whole layers, by FSDP), and any of `TrainingArguments`.
"""

from typing import Any

from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import TorchContextParallelConfig


def arguments(row: dict[str, Any]) -> dict[str, Any]:
    """The row's fields as `TrainingArguments` takes them.

    Raises:
        ValueError: no `cp_size`, or one of 1, for which accelerate would divide nothing.
    """
    row = dict(row)
    size, strategy = row.pop("cp_size", 1), row.pop("cp_comm_strategy", "allgather")
    if size < 2:
        raise ValueError(f"trainer=accelerate_cp with cp_size={size}: it divides samples over 2 ranks at least.")
    handler = TorchContextParallelConfig(cp_comm_strategy=strategy)
    return {
        "optim": "adamw_torch_fused",
        "parallelism_config": ParallelismConfig(cp_size=size, cp_handler=handler),
        "fsdp": True,
        "fsdp_config": {"activation_checkpointing": row.pop("activation_checkpointing", False)},
        **row,
    }

"""What the fork server of `pool.py` imports, so that workers need not: each of them is a copy of it."""

from __future__ import annotations

import gc
import importlib
import importlib.util

NAMES = ["torch", "torch.distributed", "accelerate", "datasets", "transformers.trainer", "hf_nanotron.trainer"]
NAMES += ["functorch.compile", "torch._inductor.compile_fx"]  # what the first compilation imports
NAMES += ["pytest", "tiny", "transformers.models.auto.modeling_auto"]
NAMES += ["hf_nanotron.trl.sft_trainer"] if importlib.util.find_spec("trl") else []  # an extra
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "mixtral", "qwen3_moe", "deepseek_v3")
NAMES += [f"transformers.models.{family}.modeling_{family}" for family in FAMILIES]

for name in NAMES:
    importlib.import_module(name)

# A collection walks through 400,000 objects of torch and transformers, 0.23 s each; a job makes three of them. Those
# objects never go, so the collector of a worker need not see them.
gc.collect()
gc.freeze()

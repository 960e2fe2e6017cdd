"""LoRA as PEFT has it: which linears a `LoraConfig` means, fresh adapters, and PEFT's files.

PEFT itself finds the linears, on a copy of the model without weights. The base of the model is frozen.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from ..checkpoint.files.repository import unlink_links
from ..checkpoint.files.safetensors_file import Entry, write_safetensors
from ..checkpoint.state.index import StateIndex
from ..checkpoint.state.training_state import saved_extra
from ..models.adapters import Adapter, attach, gather, weights_of
from ..models.base import ParallelModel
from ..parallel.together import together
from ..training_args import NanotronTrainingArguments

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTERS = "adapters"  # their key in the `extra` of a training state
PREFIX = "base_model.model."  # of PEFT's names

# Fields of LoraConfig that are honoured; of others, the defaults alone.
HONOURED = frozenset(
    (
        "r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "rank_pattern", "alpha_pattern",
        "layers_to_transform", "layers_pattern", "init_lora_weights", "task_type", "peft_type", "auto_mapping",
        "peft_version", "base_model_name_or_path", "revision",
    )
)  # fmt: skip
INITIAL = (True, False, "gaussian")
TASKS = (None, "CAUSAL_LM")


def check_lora(config: Any, args: NanotronTrainingArguments) -> None:
    """Refuse what cannot be trained on linears that are cut.

    Raises:
        ImportError: without PEFT.
        ValueError: naming the field, its value, and what to use instead.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise ImportError("peft_config needs PEFT, which is not installed: pip install 'hf-nanotron[peft]'.") from None
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"peft_config={type(config).__name__} is refused: adapters of linears that are cut over ranks are those of "
            "LoRA; use peft.LoraConfig."
        )
    for entry in fields(config):
        default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
        value = getattr(config, entry.name)
        if entry.name not in HONOURED and value != default:
            raise ValueError(
                f"peft_config: {entry.name}={value!r} is refused: it is not written for linears that are cut over "
                f"ranks; use {entry.name}={default!r}."
            )
    if config.task_type not in TASKS:
        raise ValueError(
            f"peft_config: task_type={config.task_type!r} is refused: a causal language model is trained; use "
            "task_type='CAUSAL_LM'."
        )
    if config.init_lora_weights not in INITIAL:
        raise ValueError(
            f"peft_config: init_lora_weights={config.init_lora_weights!r} is refused: it reads whole weights, and a "
            f"rank has its part; use one of {', '.join(map(repr, INITIAL))}."
        )
    refused = {
        "fp8": (None, "FP8 products do not see the adapters"),
        "mlp_chunk_tokens": (None, "blocks of tokens go through the MLP's weights without the adapters"),
        "ema_decay": (None, "the average is saved as a whole model"),
        "parametrization": ("standard", "its rules are for fresh weights"),
    }
    for name, (allowed, reason) in refused.items():
        if getattr(args, name) != allowed:
            raise ValueError(
                f"{name}={getattr(args, name)!r} with peft_config is refused: {reason}; use {name}={allowed!r}."
            )
    if args.optim == "muon":
        raise ValueError("optim='muon' with peft_config is refused: it is for matrices of full rank; use AdamW.")


def add_adapters(model: ParallelModel, config: Any, seed: int) -> Any:
    """Fresh adapters on `model`, as PEFT draws them after `set_seed(seed)`; returns the config that PEFT has completed.

    All ranks together.
    """
    if model.mesh.tp_size > 1 and model.parallel.overlaps_tp(model.mesh.device):
        raise ValueError(
            "tp_overlap with peft_config is refused: products that overlap with communication do not see the "
            "adapters; use tp_overlap=False."
        )
    targets, complete = _targets(model, config)
    set_seed(seed)
    adapters = [_drawn(*target, complete.init_lora_weights) for target in targets]
    together(model.mesh, "adding the adapters", lambda: attach(model, adapters))
    return complete


def _targets(model: ParallelModel, config: Any) -> tuple[list[tuple[str, int, int, int, float]], Any]:
    """Name, input and output features, rank and scaling of each linear that PEFT adapts, in its order."""
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Linear as LoraLinear

    with torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(model.config)
        skeleton.name_or_path = model.config.name_or_path
        adapted = get_peft_model(skeleton, copy.deepcopy(config))
    found: list[tuple[str, int, int, int, float]] = []
    for name, module in adapted.base_model.model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if not isinstance(module, LoraLinear) or not isinstance(module.get_base_layer(), nn.Linear):
            raise ValueError(
                f"peft_config: {name!r} is no linear ({_kind(module)}), whose adapters are not supported; "
                "name the linears alone in target_modules."
            )
        layer: Any = module
        found.append((name, layer.in_features, layer.out_features, layer.r["default"], layer.scaling["default"]))
    return found, adapted.peft_config["default"]


def _kind(module: Any) -> str:
    """The class of what PEFT has put an adapter on."""
    return type(module.get_base_layer()).__name__


def _drawn(name: str, inputs: int, outputs: int, rank: int, scaling: float, initial: bool | str) -> Adapter:
    """With the random numbers that PEFT takes: the layers' own, and then those of its way to begin."""
    a = nn.Linear(inputs, rank, bias=False, device="cpu", dtype=torch.float32).weight.detach()
    b = nn.Linear(rank, outputs, bias=False, device="cpu", dtype=torch.float32).weight.detach()
    if initial == "gaussian":
        nn.init.normal_(a, std=1 / rank)
    elif initial:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return Adapter(name, a, b.zero_() if initial else b, scaling)


def adapter_names(model: ParallelModel) -> list[str]:
    """The weights of the adapters of the whole model."""
    return [name for linear in model.adapters for name in weights_of(linear)]


def refuse_base(model: ParallelModel, directory: Path) -> None:
    """Raise ValueError for the folder of the base model.

    With an `adapter_config.json` in it, transformers would load the adapters whenever it loads the base.
    """
    base = Path(str(model.config.name_or_path or ""))
    if model.config.name_or_path and base.is_dir() and base.resolve() == directory.resolve():
        raise ValueError(
            f"{directory} is the folder of the base model, which adapters would become a part of; use another "
            "output_dir."
        )


def save_adapters(model: ParallelModel, config: Any, directory: Path) -> list[Path]:
    """Write PEFT's two files; returns them on rank 0, which writes. All ranks together."""
    mesh, names = model.mesh, adapter_names(model)
    refuse_base(model, directory)
    own: Any = gather(model, names)
    parts = [own]
    if mesh.world.size > 1:
        parts = [None] * mesh.world_size if mesh.rank == 0 else []
        dist.gather_object(own, parts if mesh.rank == 0 else None, dst=0, group=mesh.world.handle)
    paths = [directory / CONFIG, directory / WEIGHTS]

    def write() -> None:
        if mesh.rank != 0:
            return
        directory.mkdir(parents=True, exist_ok=True)
        unlink_links(directory)
        whole = {name: tensor for part in parts for name, tensor in part.items()}
        entries = [Entry(_peft_name(name), whole[name].dtype, tuple(whole[name].shape)) for name in names]
        write_safetensors(paths[1], entries, iter([whole[name] for name in names]))
        saved = copy.deepcopy(config)
        saved.inference_mode = True
        saved.save_pretrained(str(directory))

    together(mesh, f"saving the adapters in {directory}", write)
    return paths if mesh.rank == 0 else []


def refuse_adapters_of(checkpoint: str) -> None:
    """Raise ValueError for a checkpoint of a run with adapters, for a run without."""
    if (Path(checkpoint) / CONFIG).is_file():
        raise ValueError(f"{checkpoint} is of a run with adapters: resume it with the peft_config of that run.")


def refuse_folder_of_adapters(output_dir: str) -> None:
    """Raise ValueError for an `output_dir` in which transformers would load adapters in place of a saved model."""
    if (Path(output_dir) / CONFIG).is_file():
        raise ValueError(
            f"output_dir={output_dir!r} holds adapters ({CONFIG}), which transformers would load in place of a model "
            "that is saved there; use another output_dir, or move the two adapter files."
        )


def compare_adapters(model: ParallelModel, checkpoint: str, index: StateIndex) -> None:
    """Raise ValueError for a checkpoint whose adapters, by its `index`, are on other linears or have other scales."""
    saved = saved_extra(index).get(ADAPTERS)
    if saved is None:
        raise ValueError(f"{checkpoint} is of a run without adapters: resume it without peft_config.")
    for name in sorted(saved.keys() | model.adapters.keys()):
        there, here = saved.get(name), model.adapters.get(name)
        if there != here:
            raise ValueError(
                f"{checkpoint} is of another peft_config: the adapter of {name} has the scale {there} there and "
                f"{here} here (None: no adapter). Resume with the target_modules, lora_alpha and r of the run."
            )


def load_adapters(model: ParallelModel, directory: Path) -> None:
    """Read the parts of this rank of what `save_adapters`, or PEFT, has written.

    Raises:
        ValueError: naming the first weight that is missing, or of another shape.
    """
    path = directory / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{directory} has no {WEIGHTS}: it is no checkpoint of adapters.")
    tensors: Mapping[str, torch.Tensor] = load_file(path)
    for name in adapter_names(model):
        given, shape = tensors.get(_peft_name(name)), model.hub_shapes[name]
        if given is None or tuple(given.shape) != shape:
            found = "is missing" if given is None else f"has shape {list(given.shape)}, not {list(shape)}"
            raise ValueError(f"{path}: {_peft_name(name)} {found}: the adapters are of another peft_config or model.")
        if name in model.shard_specs:
            model.write_parameter(name, model.shard_specs[name].slice(given).to(model.mesh.device))


def _peft_name(name: str) -> str:
    return PREFIX + name

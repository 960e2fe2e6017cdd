"""`AutoModelForCausalLM` with a `parallel` argument."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM as StockAutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..checkpoint.hub.fetch import fetch_on_each_host, seen_by_all
from ..checkpoint.hub.load import load_hub_weights
from ..parallel.config import ParallelConfig
from ..parallel.mesh import ParallelMesh
from .base import ParallelModel
from .sharding.initialize import common_seed, initialise, materialise
from .sharding.parallelize import parallelize
from .sharding.respread import Respread
from .spectral.scales import SpectralWeights, weight_scales
from .spectral.sizes import Spectral
from .stock.anatomy import dissect
from .weight_roles import weight_roles

DOWNLOAD_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


class AutoModelForCausalLM:
    """Makes this rank's part of a causal language model, from a config or from a Hub checkpoint."""

    def __init__(self) -> None:
        raise OSError("AutoModelForCausalLM cannot be instantiated; use `from_config` or `from_pretrained`.")

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig,
        parallel: ParallelConfig | None = None,
        *,
        mesh: ParallelMesh | None = None,
        parametrization: Spectral | None = None,
        **kwargs: Any,
    ) -> ParallelModel:
        """A model with fresh weights, the same on every topology.

        The weights follow from the seed that `transformers.set_seed` (or `torch.manual_seed`) set on rank 0.

        Args:
            config: any causal-LM config that declares the plans `parallel` needs.
            parallel: the sizes; every rank alone if None.
            mesh: ranks and groups of another model, to share them.
            parametrization: how initial weights and learning rates depend on the width (`args.spectral`); the stock
                class's own way if None.
            kwargs: for the stock class, such as `dtype` and `attn_implementation`.

        Raises:
            ValueError: if the sizes do not fit the model or the world size, or the base model does not fit the model.
        """
        mesh = _mesh(parallel, mesh)
        seed = common_seed(mesh)
        model, stock = _build(config, mesh, kwargs)
        respread = None
        if parametrization is not None:
            base = _base_model(stock, parametrization, kwargs)
            scales = weight_scales(stock, base, bool(model.hub_layout.tied))
            model.spectral = SpectralWeights(parametrization, scales)
            respread = Respread(base, scales, weight_roles(dissect(stock)), seed, mesh.device)
        materialise(model, mesh.device)
        initialise(model, stock, seed, respread=respread)
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        parallel: ParallelConfig | None = None,
        *,
        mesh: ParallelMesh | None = None,
        config: PreTrainedConfig | None = None,
        **kwargs: Any,
    ) -> ParallelModel:
        """A model with the weights of a Hub repository or a local directory in its format.

        All ranks of the job together: each part of a file is read by one of them (`checkpoint/hub/read_once.py`),
        and a repository is downloaded once for each host.

        Args:
            pretrained_model_name_or_path: Hub id or directory.
            parallel, mesh: as in `from_config`.
            config: instead of the repository's own.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`; `dtype` (default: that of
                the checkpoint) and `attn_implementation`; fields of the config to override.

        Raises:
            ValueError: for a missing or damaged file, for sizes that do not fit, and for unknown arguments.
        """
        mesh = _mesh(parallel, mesh)
        directory = Path(pretrained_model_name_or_path)
        _refuse_adapters(directory)
        source = {name: kwargs.pop(name) for name in DOWNLOAD_ARGUMENTS if name in kwargs}
        taken = [name for name in ("dtype", "attn_implementation") if name in kwargs]
        stock_arguments: dict[str, Any] = {name: kwargs.pop(name) for name in taken}
        is_folder = seen_by_all(mesh, directory)
        if not is_folder:
            directory = fetch_on_each_host(mesh, str(pretrained_model_name_or_path), ["*.json", "*.py"], source)
            _refuse_adapters(directory)
        if config is None:
            config, kwargs = AutoConfig.from_pretrained(directory, return_unused_kwargs=True, **kwargs)
        if kwargs:
            raise ValueError(
                f"from_pretrained got unknown arguments {sorted(kwargs)}; it accepts "
                f"{', '.join(DOWNLOAD_ARGUMENTS)}, dtype, attn_implementation and fields of the config."
            )
        if stock_arguments.get("dtype", "auto") == "auto":
            stock_arguments["dtype"] = config.dtype or torch.float32
        if not is_folder:
            patterns = ["*.safetensors", "*.json", "*.py"]
            directory = fetch_on_each_host(mesh, str(pretrained_model_name_or_path), patterns, source)
        model, stock = _build(config, mesh, stock_arguments)
        materialise(model, mesh.device)
        initialise(model, stock, seed=0, parameters=False)
        load_hub_weights(model, directory)
        if (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
        model.config.name_or_path = str(pretrained_model_name_or_path)
        return model


def _mesh(parallel: ParallelConfig | None, mesh: ParallelMesh | None) -> ParallelMesh:
    if mesh is not None and parallel is not None and mesh.parallel != parallel:
        raise ValueError("`mesh` and `parallel` have different sizes; pass only one of them.")
    return mesh or ParallelMesh(parallel or ParallelConfig())


def _refuse_adapters(directory: Path) -> None:
    """transformers would load them into the model."""
    if (directory / "adapter_config.json").is_file():
        raise ValueError(
            f"{directory} has adapters (adapter_config.json), which are not loaded into a sharded model. Merge them "
            "with PEFT (merge_and_unload) and save the result, or move the two adapter files out of the folder of the "
            "base."
        )


def _base_model(stock: PreTrainedModel, sizes: Spectral, kwargs: dict[str, Any]) -> PreTrainedModel:
    """The base model of a parametrization, on the meta device."""
    config = sizes.base_config(stock.config)
    try:
        with torch.device("meta"):
            base: PreTrainedModel = StockAutoModelForCausalLM.from_config(config, **kwargs)
            return base
    except (ValueError, RuntimeError, ZeroDivisionError, AssertionError) as error:
        raise ValueError(
            f"the base model of parametrization='spectral' (base_hidden_size={sizes.base_hidden_size}) cannot be made: "
            f"{error} Say which of its sizes are not in proportion to the hidden size with base_sizes."
        ) from error


def _build(
    config: PreTrainedConfig, mesh: ParallelMesh, kwargs: dict[str, Any]
) -> tuple[ParallelModel, PreTrainedModel]:
    """This rank's part and the whole stock model, both on the meta device."""
    with torch.device("meta"):
        stock = StockAutoModelForCausalLM.from_config(config, **kwargs)
        model = StockAutoModelForCausalLM.from_config(config, **kwargs)
    parallel = parallelize(model, mesh)
    parallel.names_attention = kwargs.get("attn_implementation") is not None
    return parallel, stock

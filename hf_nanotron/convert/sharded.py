"""Two-way converters between our training state and Hub repositories, one tensor at a time.

Both follow the `HubLayout` of the stock model, and check everything that headers and indices say before they write.
Then they stream, holding one tensor of the model towards the Hub (or the few that the Hub has in one), and the masters
of one output file on the way back. What makes the result usable (`config.json`; the checkpoint's marker) is written
last, and what a failure leaves is taken away.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, logging

from ..checkpoint.directory.commit import begin, commit as commit_checkpoint, describe
from ..checkpoint.directory.retention import checkpoints
from ..checkpoint.directory.verify import MARKER, WRITTEN
from ..checkpoint.files.model_folder import why_no_model
from ..checkpoint.hub.layout import HubLayout, HubSources, layout_of
from ..checkpoint.hub.nonfinite_tensors import warn_nonfinite
from ..checkpoint.hub.repository_weights import parse_size, plan_files, write_repository_weights
from ..checkpoint.hub.weights import HubWeights
from ..checkpoint.state.buffers import buffer_piece, read_buffer
from ..checkpoint.state.file import BUFFER, MASTER, StatePiece, clear, commit as commit_state, write_rank
from ..checkpoint.state.read import StoredState
from ..checkpoint.state.slices import Slice
from ..checkpoint.state.training_state import DIRECTORY
from ..parallel.shard_spec import ShardSpec
from .folder import (
    TEXTS,
    WEIGHTS,
    check_unchanged,
    copy_files,
    load_config,
    read_json,
    refuse_same,
    write_json,
    writing,
)

logger = logging.get_logger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of a run that has not begun. Trainer compares the intervals with its own and warns where they differ, hence null; for
# the batch size it needs a number, and warns of any that is not the run's.
FIRST_STEP = {"global_step": 0, "epoch": 0.0, "logging_steps": None, "eval_steps": None, "save_steps": None}
FIRST_STEP |= {"train_batch_size": 1}


def sharded_to_hub(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
    frozen_from: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write the Hub repository of a checkpoint from the fp32 masters of its training state, saved on any layout.

    Args:
        source: a `checkpoint-N`. It need not have weights of its own (`save_hub_weights="last"`).
        destination: folder for the repository; new or empty.
        dtype: of the weights: `"float32"` (the masters themselves), `"bfloat16"` or `"float16"` (rounded to nearest
            even, as training rounds them), or `"auto"`, the one that the checkpoint's config states.
        max_shard_size: bytes of tensors per file, or a string such as `"5GB"`; more than one file gets an index.
        frozen_from: a Hub repository for the tensors that were not trained, which a training state does not hold;
            default: `source` itself.
        overwrite: take away an earlier repository in `destination`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged, the state is not of the config's model, weights of frozen parameters are
            nowhere, a value does not fit float16, or `destination` is in use.
    """
    source, destination = Path(source), Path(destination)
    refuse_same(source, destination)
    folder = _state_folder(source)
    config = load_config(source)
    target = _target_dtype(dtype, config, source)
    layout = layout_of(config)
    limit = parse_size(max_shard_size)
    with StoredState(folder) as stored:
        frozen = _not_stored(stored, layout)
        weights = _open_frozen(frozen, layout, Path(frozen_from or source)) if frozen else None
        check_unchanged(source, (*TEXTS, *WEIGHTS) if frozen and frozen_from is None else TEXTS)
        dtypes = _dtypes(stored, layout, weights, target)
        with writing(destination, (*WEIGHTS, *TEXTS), CONFIG_NAME, overwrite):
            tensors = _weights_of(stored, layout, weights, dtypes)
            write_repository_weights(
                destination, layout.hub_shapes, layout.hub_dtypes(dtypes), tensors, limit, layout.numel
            )
            copy_files(source, destination, TEXTS)
            fields = read_json(source / CONFIG_NAME)
            fields.pop("torch_dtype", None)
            fields |= {"architectures": [layout.architecture], "dtype": str(target).removeprefix("torch.")}
            write_json(destination / CONFIG_NAME, fields)  # last: without it nothing loads what was cut short


def hub_to_sharded(
    source: str | Path,
    destination: str | Path,
    *,
    revision: str | None = None,
    max_shard_size: int | str = "1GB",
    copy_weights: bool = True,
    overwrite: bool = False,
) -> None:
    """Make a checkpoint at step 0 of a Hub repository: fp32 masters of every parameter, for a resume on any layout.

    There is no optimizer state: `values["optimizer"]` and `values["scheduler"]` are None, a run starts them afresh.

    Args:
        source: folder with `config.json` and safetensors, or a Hub id.
        destination: the checkpoint; new or empty. Called `checkpoint-0` in the `output_dir` of a run, it is the one
            that `resume_from_checkpoint=True` finds.
        revision: of a Hub id.
        max_shard_size: bytes of masters per file of the state, or a string such as `"1GB"`; so much is in memory.
        copy_weights: the checkpoint gets the repository's own weights as well; without them it looks like one saved
            with `save_hub_weights="last"`, and lacks what a run freezes.
        overwrite: take away an earlier conversion in `destination`.

    Raises:
        FileNotFoundError: if `source` is neither a folder nor on the Hub, or a file is missing.
        ValueError: if a file is damaged, a tensor is missing, quantised or of another shape than the config says, or
            `destination` is in use.
    """
    source, destination = _fetch(source, revision), Path(destination)
    refuse_same(source, destination)
    layout = layout_of(load_config(source))
    limit = parse_size(max_shard_size)
    sources = _check_weights(HubWeights(source), layout)
    shapes = {name: shape for name, shape in layout.shapes.items() if name in sources.grids}
    groups = plan_files(shapes, dict.fromkeys(shapes, 0), dict.fromkeys(shapes, torch.float32), limit).values()
    folder = destination / DIRECTORY
    owned = (*WEIGHTS, *TEXTS, DIRECTORY, TRAINER_STATE_NAME, MARKER, WRITTEN)
    with writing(destination, owned, MARKER, overwrite):
        begin(destination.resolve())  # it may be a link to a folder
        copy_files(source, destination, (*WEIGHTS, *TEXTS) if copy_weights else TEXTS)
        clear(folder)
        for number, names in enumerate(groups):
            # Opened anew for each file: what is mapped of the weights counts as our memory until they are closed.
            weights = HubWeights(source)
            write_rank(folder, number, [_piece_of(name, layout, weights, sources) for name in names])
        commit_state(folder, len(groups), {"layout": None, "optimizer": None, "scheduler": None, "extra": {}})
        shutil.copyfile(source / CONFIG_NAME, destination / CONFIG_NAME)
        write_json(destination / TRAINER_STATE_NAME, FIRST_STEP)
        describe(destination, 0)
        commit_checkpoint(destination, 1, step=0, timeout=0)


# ---- sharded -> Hub ----


def _state_folder(checkpoint: Path) -> Path:
    folder = checkpoint / DIRECTORY
    if folder.is_dir():
        return folder
    newest = next(iter(checkpoints(checkpoint)), None)
    advice = f"name one of its checkpoints, such as {newest}" if newest else "name a checkpoint-N of a run"
    raise FileNotFoundError(f"{checkpoint} has no {DIRECTORY}/; {advice}.")


def _not_stored(stored: StoredState, layout: HubLayout) -> list[str]:
    """The tensors of the model of which the state holds nothing: they were frozen."""
    shapes = stored.shapes()
    if foreign := sorted(shapes.keys() - layout.shapes.keys()):
        raise ValueError(
            f"{stored.directory} holds {', '.join(foreign[:5])}{', ...' if len(foreign) > 5 else ''} "
            f"({len(foreign)} tensors), which the {layout.architecture} of {CONFIG_NAME} does not have: they are of "
            "different models."
        )
    for name, shape in layout.shapes.items():
        if name in shapes:
            stored.check(Slice.whole(name, shape), BUFFER if name in layout.buffers else MASTER)
    return [name for name in layout.shapes if name not in shapes]


@dataclass(frozen=True)
class Frozen:
    """Weights that a training state does not hold: a Hub repository, and where the tensors of the model are there."""

    weights: HubWeights
    sources: HubSources

    def read(self, name: str, layout: HubLayout) -> torch.Tensor:
        """A whole tensor of the model, in the dtype of the files."""
        spec, is_float = ShardSpec(name, layout.shapes[name]), layout.dtypes[name].is_floating_point
        tensor = self.weights.read(spec, self.sources.grids[name], is_float)
        return tensor if name in layout.buffers else warn_nonfinite(name, tensor, str(self.weights.directory))

    def dtype(self, name: str) -> torch.dtype:
        return self.weights.dtype(self.sources.grids[name])


def _open_frozen(frozen: list[str], layout: HubLayout, folder: Path) -> Frozen:
    """The weights of a folder, which must hold what was frozen."""
    has_weights = any(path.is_file() for pattern in WEIGHTS for path in folder.glob(pattern))
    weights = HubWeights(folder) if has_weights else None
    sources = weights.sources(layout) if weights is not None else None
    missing = [name for name in frozen if sources is None or name not in sources.grids]
    if weights is None or sources is None or missing:
        raise ValueError(
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''} ({len(missing)} tensors) were not trained, "
            f"so neither the training state nor {folder} contains them. Name a Hub repository that does, such as a "
            "later checkpoint or what the run started from, as `frozen_from` (--frozen-from)."
        )
    for name in frozen:
        weights.check(name, layout.shapes[name], sources.grids[name], layout.dtypes[name].is_floating_point)
    return Frozen(weights, sources)


def _dtypes(
    stored: StoredState, layout: HubLayout, frozen: Frozen | None, target: torch.dtype
) -> dict[str, torch.dtype]:
    """Of every tensor of the model, as it is written: buffers keep their own."""
    dtypes = dict.fromkeys(layout.shapes, target)
    for name in layout.buffers:
        kinds = stored.kinds(name)
        dtypes[name] = kinds[BUFFER] if kinds or frozen is None else frozen.dtype(name)
    return dtypes


def _weights_of(
    stored: StoredState, layout: HubLayout, frozen: Frozen | None, dtypes: dict[str, torch.dtype]
) -> Iterator[torch.Tensor]:
    """The Hub's tensors, one after the other."""
    for part in layout.parts:
        whole = {name: _whole(name, stored, layout, frozen, dtypes[name]) for name in part.model}
        for name in part.hub:
            yield layout.tensors[name].made_of(whole)
        del whole  # before the next ones are made


def _whole(
    name: str, stored: StoredState, layout: HubLayout, frozen: Frozen | None, dtype: torch.dtype
) -> torch.Tensor:
    """A tensor of the model."""
    shape = layout.shapes[name]
    if not stored.kinds(name):
        assert frozen is not None
        tensor = frozen.read(name, layout).to(dtype)
    elif name in layout.buffers:
        tensor = read_buffer(stored, name, shape)
    else:
        # Converted chunk by chunk as it is read: the tensor is never there in fp32 as a whole.
        tensor = torch.empty(prod(shape), dtype=dtype)
        stored.fill(Slice.whole(name, shape), MASTER, tensor)
        tensor = warn_nonfinite(name, tensor.view(shape), str(stored.directory))
    if dtype == torch.float16 and not tensor.isfinite().all():
        raise ValueError(
            f"{name!r} has values that float16 cannot hold (beyond 65504); convert to bfloat16 or float32."
        )
    return tensor


def _target_dtype(name: str, config: PreTrainedConfig, source: Path) -> torch.dtype:
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ValueError(f"dtype={name!r} is not one of auto, {', '.join(DTYPES)}.")
    stated = config.dtype or config.get_text_config().dtype or "float32"  # what transformers assumes
    stated = str(stated).removeprefix("torch.")
    if stated not in DTYPES:
        raise ValueError(f"{source / CONFIG_NAME} states {stated}; choose a dtype out of {', '.join(DTYPES)}.")
    return DTYPES[stated]


# ---- Hub -> sharded ----


def _fetch(source: str | Path, revision: str | None) -> Path:
    """A local folder with the repository."""
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise ValueError(why_no_model(source))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise FileNotFoundError(f"{source} does not exist.")
    patterns = ["*.safetensors", SAFE_WEIGHTS_INDEX_NAME, *TEXTS, "additional_chat_templates/*"]
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except OSError as error:
        raise FileNotFoundError(f"{source} is neither a folder nor available on the Hub: {error}") from error


def _check_weights(weights: HubWeights, layout: HubLayout) -> HubSources:
    """Refuse weights that the model could not take. Reads headers alone."""
    sources = weights.sources(layout)
    for name, shape in layout.shapes.items():
        if name in sources.grids or name not in layout.buffers:
            weights.check(name, shape, sources.grids.get(name), layout.dtypes[name].is_floating_point)
    if unused := sources.unused:
        logger.warning(
            f"{weights.directory}: ignoring tensors that {layout.architecture} does not have: {', '.join(unused[:5])} "
            f"({len(unused)})."
        )
    return sources


def _piece_of(name: str, layout: HubLayout, weights: HubWeights, sources: HubSources) -> StatePiece:
    """One tensor of the state, whole, put together from the Hub tensors that are parts of it."""
    tensor = Frozen(weights, sources).read(name, layout)
    if name in layout.buffers:
        return buffer_piece(name, tensor)
    return StatePiece(ShardSpec(name, tuple(tensor.shape)), 0, tensor.numel(), {MASTER: tensor.float().reshape(-1)})

"""The model card of a parallel run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments
from transformers.modelcard import TrainingSummary

from ...parallel.mesh import ParallelMesh
from ...redaction import printable, secrets_of
from ...version import __version__


def write_model_card(trainer: Trainer, mesh: ParallelMesh, path: Path, **fields: Any) -> None:
    """Write Trainer's card with the batch sizes that this run had, its parallel sizes, and our version.

    Trainer multiplies batch sizes by the number of processes, as if each read samples of its own. `fields` are those of
    `Trainer.create_model_card`. Tags of an earlier card are kept.
    """
    tags = fields.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    if path.is_file():
        tags += [tag for tag in ModelCard.load(path).data.tags or [] if tag not in tags]
    fields = {"tasks": "text-generation", **{name: value for name, value in fields.items() if value is not None}}
    summary = TrainingSummary.from_trainer(trainer, **{**fields, "tags": tags})
    figures = summary.hyperparameters
    figures.pop("distributed_type", None)  # which says multi-GPU for CPUs, too
    totals = {
        "total_train_batch_size": trainer.get_total_train_batch_size(trainer.args),
        "total_eval_batch_size": trainer.args.eval_batch_size * mesh.dp_size,
    }
    for (name, total), of_one in zip(totals.items(), ("train_batch_size", "eval_batch_size"), strict=True):
        if total != figures[of_one]:
            figures[name] = total
        else:
            figures.pop(name, None)
    figures.update(_sizes(mesh))
    task = fields["tasks"] if isinstance(fields["tasks"], str) else fields["tasks"][0]
    text = summary.to_model_card().replace("---\n", f"---\npipeline_tag: {task}\n", 1)
    text = printable(text, secrets_of(vars(trainer.args)))
    path.write_text(f"{text.rstrip()}\n- hf-nanotron {__version__}\n", encoding="utf-8")


def add_sizes(path: Path, mesh: ParallelMesh, args: TrainingArguments) -> None:
    """Add the parallel sizes of a run and our version to a card that another library has written."""
    text = printable(path.read_text(encoding="utf-8"), secrets_of(vars(args))).rstrip()
    sizes = ", ".join(f"{name} {size}" for name, size in _sizes(mesh).items())
    line = f"Trained with hf-nanotron {__version__}" + (f" ({sizes})" if sizes else "")
    path.write_text(f"{text}\n\n{line}.\n", encoding="utf-8")


def _sizes(mesh: ParallelMesh) -> dict[str, int]:
    """The parallel sizes that are more than one."""
    names = ("tp_size", "cp_size", "pp_size", "dp_size", "ep_size")
    return {name: getattr(mesh, name) for name in names if getattr(mesh, name) > 1}

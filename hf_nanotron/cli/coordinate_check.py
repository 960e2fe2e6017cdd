"""`hf-nanotron coordinate-check`: how much a few steps change what the layers of models of several widths compute."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ..arguments.snapshots import SHARED_MEMORY
from .errors import explained
from .plotting import check_picture

DESCRIPTION = """\
Train models of several widths for a few steps, and print how much each layer's outputs have changed.

Where a learning rate carries over from a small model to a wide one, the changes are of one size at every width: the
slope, in doublings of the change for each doubling of the width, is near 0. The model is model.config of the YAML file
of a run, in other widths; its section training says the parametrization, the optimizer and the sizes. The standard
parametrization is measured beside it. Tokens are random, or with --data those of the YAML file.

A head that is not tied begins at zero: what logits owe to the initial head of the spectral parametrization fades with
the width, and would hide what is learned. --initial-head keeps its values.

Under torchrun the models are sharded as the file says (tp_size, zero_stage, ...):

  torchrun --nproc-per-node 2 -m hf_nanotron.cli coordinate-check CONFIG.yaml --widths 64 128 256 --set tp_size 2"""


def add_coordinate_arguments(parser: argparse.ArgumentParser) -> None:
    """The parsed arguments get `run`, which takes them."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="of hf-nanotron train")
    parser.add_argument(
        "--widths", type=int, nargs="+", metavar="N", help="hidden sizes (default: the base's, 2 and 4 times it)"
    )
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="models of each width (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="rows of the batch (default: %(default)s)")
    parser.add_argument(
        "--sequence-length", type=int, default=64, metavar="N", help="tokens of a row (default: %(default)s)"
    )
    parser.add_argument("--initial-head", action="store_true", help="do not begin with a head of zeros")
    parser.add_argument("--data", action="store_true", help="take the first rows of the file's training data")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write the numbers")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw them (pip install hf-nanotron[plot])")
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="override a key, as train does"
    )
    parser.set_defaults(run=_run)


@dataclass
class Measured:
    """Of one parametrization, by width: changes of each place (root mean squares), and the mean loss of the steps."""

    widths: list[int]
    changes: dict[str, list[float]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    @property
    def slopes(self) -> dict[str, float]:
        return {place: slope(self.widths, values) for place, values in self.changes.items()}


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Of log2(value) over log2(width), by least squares."""
    x, y = [math.log2(width) for width in widths], [math.log2(max(value, 1e-30)) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def _run(args: argparse.Namespace) -> None:
    for name in ("steps", "seeds", "rows"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1.")
    if args.sequence_length < 2:
        raise ValueError(f"--sequence-length {args.sequence_length} must be at least 2.")
    if args.widths is not None and (len(set(args.widths)) < 2 or min(args.widths) < 1):
        raise ValueError("--widths must be two or more different hidden sizes, such as --widths 64 128 256.")
    if args.plot is not None:
        check_picture("--plot", args.plot)
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: {args.json.absolute().parent} is not a folder.")
    overrides = [f"--{key}={value}" for key, value in args.set]
    found, is_first = measure_file(args, overrides)
    if not is_first:
        return
    print(as_text(found))
    if args.json is not None:
        record = {
            name: {"widths": m.widths, "changes": m.changes, "slopes": m.slopes, "losses": m.losses}
            for name, m in found.items()
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        with explained(f"--plot {args.plot} cannot be drawn"):
            draw(found, args.plot)


def measure_file(args: argparse.Namespace, overrides: Sequence[str]) -> tuple[dict[str, Measured], bool]:
    """What each parametrization gives, and whether this process is the first of the job."""
    from ..models.spectral.sizes import with_width
    from ..training_args import NanotronTrainingArguments
    from .model_config import make_config
    from .settings import read_settings
    from .train import load_tokenizer

    settings, tokenizer_name = read_settings(args.config, overrides)
    if settings["model"].get("config") is None:
        raise ValueError("coordinate-check needs model.config: it draws fresh weights at every width.")
    with tempfile.TemporaryDirectory() as folder:
        own = {
            "output_dir": folder, "max_steps": args.steps, "lr_scheduler_type": "constant", "warmup_steps": 0,
            "memory_snapshot_steps": None, "memory_snapshot_dir": SHARED_MEMORY,
            "save_strategy": "no", "eval_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "logging_strategy": "no", "gradient_accumulation_steps": 1, "resume_from_checkpoint": None,
            "push_to_hub": False, "remote_checkpoints": None,
        }  # fmt: skip
        with explained("training"):
            training = NanotronTrainingArguments(**{**settings["training"], **own})
        if training.pp_size > 1 or training.dp_size > 1:
            raise ValueError(
                f"coordinate-check with pp_size={training.pp_size} and {training.dp_size} replicas: every rank must "
                "have all layers and the same rows; start tp_size processes, with pp_size=1."
            )
        training.per_device_train_batch_size = args.rows
        tokenizer = load_tokenizer(tokenizer_name)
        config = make_config(settings["model"]["config"], tokenizer)
        rows = _rows(args, settings, tokenizer, training, config)
        base, text = training.spectral, config.get_text_config()
        widths = args.widths or [factor * (base.base_hidden_size if base else text.hidden_size) for factor in (1, 2, 4)]
        kept = {name: getattr(text, name) for name in (base.base_sizes if base else ()) if hasattr(text, name)}
        if changed := [name for name, size in kept.items() if base and size != base.base_sizes[name]]:
            raise ValueError(
                f"base_sizes={dict(base.base_sizes) if base else {}}: {changed[0]!r} is neither in proportion to the "
                "hidden size nor the same at every width, so its size at other widths is not known."
            )
        configs = {width: with_width(config, width, kept) for width in sorted(set(widths))}
        kinds = {"standard": None} if base is None else {"spectral": base, "standard": None}
        found = {}
        for name, sizes in kinds.items():
            training.parametrization = name
            training.base_hidden_size, training.base_sizes = (
                (None, None) if sizes is None else (sizes.base_hidden_size, dict(sizes.base_sizes))
            )
            found[name] = measure(configs, training, rows, args.seeds, args.initial_head)
        return found, training.process_index == 0


def _rows(args: argparse.Namespace, settings: Any, tokenizer: Any, training: Any, config: Any) -> list[list[int]]:
    """Token ids of the batch, the same on every rank."""
    import torch

    if not args.data:
        generator = torch.Generator().manual_seed(0)
        shape = (args.rows, args.sequence_length)
        vocabulary = config.get_text_config().vocab_size
        rows: list[list[int]] = torch.randint(0, vocabulary, shape, generator=generator).tolist()
        return rows
    from ..training.loaders import data_seed
    from .data import load_data
    from .settings import check_complete

    dataset, _ = load_data(check_complete(settings), tokenizer, data_seed(training))
    found = []
    for row in dataset:
        found.append(torch.as_tensor(row["input_ids"]).tolist()[: args.sequence_length])
        if len(found) == args.rows:
            return found
    raise ValueError(f"--data: the training data has {len(found)} rows, fewer than --rows {args.rows}.")


def measure(
    configs: dict[int, Any], training: Any, rows: list[list[int]], seeds: int, initial_head: bool = False
) -> Measured:
    """Train a model of each config `seeds` times, on one batch, as a run with these arguments would. All ranks.

    Args:
        initial_head: whether the head keeps its initial values, or begins at zero where it is not tied (Yang et al.
            2022, arXiv:2203.03466, appendix D.2).
    """
    found = Measured(list(configs))
    for config in configs.values():
        runs = [_train(config, training, rows, seed, initial_head) for seed in range(seeds)]
        for place in runs[0][0]:
            found.changes.setdefault(place, []).append(sum(changes[place] for changes, _ in runs) / seeds)
        found.losses.append(sum(loss for _, loss in runs) / seeds)
    return found


def _train(
    config: Any, training: Any, rows: list[list[int]], seed: int, initial_head: bool
) -> tuple[dict[str, float], float]:
    """The changes of what each place puts out, and the mean loss of the steps."""
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback, set_seed

    from ..models.auto import AutoModelForCausalLM
    from ..parallel.collectives import all_reduce
    from ..trainer import NanotronTrainer

    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config, parallel=training.parallel, parametrization=training.spectral)
    if not (initial_head or getattr(config.get_text_config(), "tie_word_embeddings", False)):
        for parameter in cast(torch.nn.Module, model.get_output_embeddings()).parameters():
            parameter.data.zero_()  # before the optimizer copies it
    dataset = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    trainer = NanotronTrainer(model=model, args=training, train_dataset=dataset)
    trainer.remove_callback(PrinterCallback)
    ids = torch.tensor(rows, device=model.mesh.device)
    before = _outputs(model, ids)
    loss = trainer.train().training_loss
    after = _outputs(model, ids)
    squares = torch.stack([(after[place] - before[place]).square().mean() for place in before])
    # Ranks hold equal parts of the tokens, or all of them.
    changes = (all_reduce(squares, model.mesh.world) / model.mesh.world_size).sqrt()
    model.mesh.close()
    return dict(zip(before, changes.tolist(), strict=True)), float(loss)


def _outputs(model: Any, ids: Any) -> dict[str, Any]:
    """What the embedding, each decoder layer and the head put out: this rank's part, in fp32."""
    import torch

    found: dict[str, Any] = {}

    def keep(place: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            found[place] = first.detach().float().clone()

        return hook

    places = {"embedding": model.get_input_embeddings()}
    places |= {f"layer {index}": layer for index, layer in model.anatomy.numbered_layers()}
    handles = [module.register_forward_hook(keep(place)) for place, module in places.items()]
    training, model.training = model.training, False
    model.eval()
    with torch.no_grad():
        found["logits"] = model(input_ids=ids).logits.float().clone()
    model.train(training)
    for handle in handles:
        handle.remove()
    return {place: found[place] for place in (*places, "logits")}


def as_text(found: dict[str, Measured]) -> str:
    """What the terminal shows."""
    lines = []
    for name, measured in found.items():
        lines += [f"{name}: changes (root mean square) by width", ""]
        lines.append(f"  {'':<12}" + "".join(f"{width:>10}" for width in measured.widths) + f"{'slope':>10}")
        for place, values in measured.changes.items():
            numbers = "".join(f"{value:>10.4g}" for value in values)
            lines.append(f"  {place:<12}{numbers}{measured.slopes[place]:>+10.2f}")
        lines.append(f"  {'mean loss':<12}" + "".join(f"{loss:>10.4f}" for loss in measured.losses))
        worst = max(measured.slopes, key=lambda place, m=measured: abs(m.slopes[place]))  # type: ignore[misc]
        lines += ["", f"  largest slope: {measured.slopes[worst]:+.2f} ({worst})", ""]
    return "\n".join(lines).rstrip()


def draw(found: dict[str, Measured], path: Path) -> None:
    """Changes over widths, a panel for each parametrization."""
    import matplotlib

    matplotlib.use("Agg")  # draws files; needs no display
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(found), figsize=(5 * len(found), 4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, (name, measured) in zip(panels[0], found.items(), strict=True):
        for place, values in measured.changes.items():
            axes.plot(measured.widths, values, marker="o", label=f"{place} ({measured.slopes[place]:+.2f})")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set(title=name, xlabel="hidden size", ylabel="change (root mean square)")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)

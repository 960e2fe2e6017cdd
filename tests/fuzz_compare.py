"""Whether a run of the fuzzer computed what one process did."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from fuzz_axes import Case, is_stock, layouts
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


class Failed(Exception):
    """How a case failed."""


# Relative to the reference; weights to what training has changed of them.
TOLERANCE = {"first loss": 1e-6, "loss": 2e-5, "norm": 1e-4, "weights": 1e-3, "logits": 1e-4}
LOOSE = {
    # The sign of a gradient that is zero but for rounding is anything; so is the rounding of a moment.
    "lion_32bit": {"loss": 2e-3, "norm": 1e-2, "weights": 5e-2, "logits": 5e-3},
    "bf16 moments": {"loss": 1e-3, "norm": 1e-2, "weights": 5e-2, "logits": 5e-3},
    # Orthogonal factors magnify the rounding of small singular values.
    "muon": {"loss": 2e-4, "norm": 2e-3, "weights": 2e-2, "logits": 1e-3},
    "muon original": {"loss": 2e-4, "norm": 2e-3, "weights": 2e-2, "logits": 1e-3},
    "muon spectral": {"loss": 2e-4, "norm": 2e-3, "weights": 2e-2, "logits": 1e-3},
    "user's of matrices": {"loss": 2e-4, "norm": 2e-3, "weights": 2e-2, "logits": 1e-3},
}


def figures(file: Path) -> dict[tuple[str, int], Any]:
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {(kind, step): value for kind, step, value in lines}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def is_comparable(case: Case) -> bool:
    """Masks of dropout are drawn for each rank that has a part of a tensor."""
    cut = any(layout["tp"] * layout["cp"] > 1 for _, layout in layouts(case))
    return not (case["dropout"] and cut)


def differences(case: Case, folder: Path, legs: list[str]) -> dict[str, float]:
    """
    Raises:
        Failed: for what is missing, or above the tolerance.
    """
    errors: Counter[str] = Counter()
    tolerance = {**TOLERANCE, **LOOSE.get(case["optimizer"], {})}
    wanted = figures(folder / "whole-0.jsonl")
    seen: set[tuple[str, int]] = set()
    for leg in legs:
        got = figures(folder / f"{leg}-0.jsonl")
        for file in sorted(folder.glob(f"{leg}-*.jsonl")):
            others = figures(file)
            for key in got.keys() & others.keys():
                if others[key] != got[key] and key[0] != "generated":
                    raise Failed(f"{key} is {got[key]!r} on rank 0 and {others[key]!r} in {file.name}")
        seen |= got.keys()
        for (kind, step), value in got.items():
            if is_stock(case) and kind.startswith("loss/"):  # of a domain, which stock Trainer does not know
                continue
            if (kind, step) not in wanted:
                raise Failed(f"{leg}: {kind} of step {step} is logged, and not by one process")
            expected = wanted[kind, step]
            if not is_comparable(case):
                continue
            if kind == "generated":
                if value != expected:
                    raise Failed(f"{leg}: step {step} generates {value}, not {expected}")
                continue
            name = {"grad_norm": "norm"}.get(kind, "first loss" if step == 1 and kind == "loss" else "loss")
            errors[name] = max(errors[name], abs(value - expected) / max(abs(expected), 1e-8))
    if missing := {key for key in wanted if key not in seen}:
        raise Failed(f"not logged: {sorted(missing)}")
    if is_comparable(case):
        errors["logits"] = prediction_error(folder, legs[-1], is_stock(case)) if case["prediction"] else 0.0
        errors["weights"] = weight_error(folder, folder / f"{legs[-1]}-final", folder / "whole-final")
        for saved in {file.parent for file in folder.glob("out/checkpoint-*/model*.safetensors")}:
            errors["weights"] = max(errors["weights"], weight_error(folder, saved, folder / "whole-out" / saved.name))
        if case["average"] != "no":
            average = [folder / f"{leg}-final" / "ema" for leg in (legs[-1], "whole")]
            errors["weights"] = max(errors["weights"], weight_error(folder, *average))
    check_hub_files(folder / f"{legs[-1]}-final")
    for name, error in errors.items():
        if not error <= tolerance[name]:
            raise Failed(f"{name}: {error:.1e} is above {tolerance[name]:.0e}; all: {dict(errors)}")
    return dict(errors)


def prediction_error(folder: Path, leg: str, with_routers: bool) -> float:
    """`with_routers`: stock predictions have what routers return, too."""
    got, wanted = (torch.load(folder / f"{name}.pt") for name in (leg, "whole"))
    if got["logits"].shape != wanted["logits"].shape or not torch.equal(got["labels"], wanted["labels"]):
        raise Failed(
            f"predict: {tuple(got['logits'].shape)} instead of {tuple(wanted['logits'].shape)}, or other labels"
        )
    if not with_routers and got["shapes"] != wanted["shapes"]:
        raise Failed(f"predict: shapes {got['shapes']} instead of {wanted['shapes']}")
    error = (got["logits"] - wanted["logits"]).norm() / wanted["logits"].norm()
    return max(float(error), abs(got["loss"] / wanted["loss"] - 1))


def weight_error(folder: Path, got: Path, wanted: Path) -> float:
    """The largest of all tensors, relative to the change that training has made, with a floor for rounding."""
    start, ours, theirs = weights_of(folder / "start"), weights_of(got), weights_of(wanted)
    if ours.keys() != theirs.keys():
        raise Failed(f"weights: {sorted(ours.keys() ^ theirs.keys())} are in one of both")
    worst = 0.0
    for name, tensor in theirs.items():
        if ours[name].shape != tensor.shape or ours[name].dtype != tensor.dtype:
            raise Failed(f"{name}: {ours[name].shape} {ours[name].dtype}, not {tensor.shape} {tensor.dtype}")
        whole = tensor.double()
        change = (whole - start[name].double()).norm() if name in start else whole.norm()
        floor = 1e-3 * whole.norm() + 1e-4 * whole.numel() ** 0.5
        worst = max(worst, float((ours[name].double() - whole).norm() / (change + floor)))
    return worst


def check_hub_files(folder: Path) -> None:
    """Stock transformers loads every weight."""
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    if told["missing_keys"] or told["unexpected_keys"] or told["mismatched_keys"]:
        raise Failed(f"stock transformers says of {folder.name}: {told}")
    del model

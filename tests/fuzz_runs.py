"""What a process of the fuzzer does: one leg of a run by our trainer."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset as HubDataset
from family_runs import KNOWN
from fuzz_axes import FAMILIES, SAVED, STEPS, TOKEN_DATA, Case, layouts
from test_token_stream import stream_of, write_shards
from tiny import pad_batch, training_arguments
from token_files import documents, write_ds
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening, TrainerCallback, set_seed

from hf_nanotron import (
    AutoModelForCausalLM as ParallelAuto,
    MatrixOptimizer,
    NanotronTrainer,
    NanotronTrainingArguments,
    ParallelConfig,
)
from hf_nanotron.models.spectral.sizes import Spectral

LENGTH = 16
BASE_WIDTH = 32  # of the spectral parametrization
Z_LOSS = 1e-2
EMA_DECAY = 0.7
NO_DECAY = "\\.0\\."  # in names of weights
PROMPTS = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 0, 22, 23, 24]])


# ---- model ----


def config_of(case: Case) -> Any:
    family, overrides = FAMILIES[case["family"]]
    values = {**KNOWN[family]["config"], "vocab_size": case["vocabulary"], **overrides}
    if case["family"] == "gemma4":
        values["vocab_size_per_layer_input"] = case["vocabulary"]
    if case["router_loss"]:
        values |= {"output_router_logits": True, "router_aux_loss_coef": 0.05}
    if case["dropout"]:
        values |= {"resid_pdrop": 0.1, "embd_pdrop": 0.1} if family == "gpt2" else {}
        values["attn_pdrop" if family == "gpt2" else "attention_dropout"] = 0.1
    return AutoConfig.for_model(family, **values)


def make_checkpoint(case: Case, folder: Path) -> None:
    """Weights of which none is zero or one, where a wrong gradient could hide; or those that a run draws itself."""
    if case["parametrization"] == "spectral":
        fresh(case, None, Spectral(BASE_WIDTH)).save_pretrained(str(folder / "start"))
        return
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(case), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(folder / "start")


def fresh(case: Case, parallel: ParallelConfig | None, spectral: Spectral | None) -> Any:
    set_seed(3)
    return ParallelAuto.from_config(config_of(case), parallel, parametrization=spectral, dtype=torch.float32)


def freeze(model: nn.Module, what: str) -> None:
    """Call it before the trainer is made. A rank of a pipeline has some of the layers, under their own numbers."""
    last = str(model.config.num_hidden_layers - 1)
    embedding = model.get_input_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings  # the last stage holds it as the head
    for name, parameter in model.named_parameters():
        layer = next((part for part in name.split(".") if part.isdigit()), None)
        is_head = name.startswith("lm_head")
        frozen = {
            "nothing": False,
            "embedding": (embedding is not None and parameter is embedding.weight) or (tied and is_head),
            "first layer": layer == "0",
            "norms": "norm" in name or ".ln_" in name,
            "all but the last layer": layer != last and (tied or not is_head),
        }[what]
        parameter.requires_grad_(not frozen)


# ---- data ----


class Plain(IterableDataset):
    """torch's own kind of stream."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def rows_of(case: Case, samples: int, seed: int) -> HubDataset:
    generator = torch.Generator().manual_seed(seed)
    ragged = case["data"] in ("mask", "no mask", "left", "flattened")
    found = []
    for index in range(samples):
        ids = torch.randint(3, 120, (LENGTH - (index % 5 if ragged else 0),), generator=generator)
        labels = ids.clone()
        labels[: index % 4] = -100
        row = {"input_ids": ids.tolist(), "labels": labels.tolist()}
        if case["data"] == "packed":
            cuts = [0, 3 + index % 4, 9 + index % 3, LENGTH]
            row["position_ids"] = [place for a, b in zip(cuts, cuts[1:], strict=False) for place in range(b - a)]
            for cut in cuts[:-1]:
                row["labels"][cut] = -100
        found.append(row)
    return HubDataset.from_list(found)


def masked(rows: list[dict[str, Any]], left: bool = False) -> dict[str, torch.Tensor]:
    """Rows filled up to the longest, with a mask."""
    size = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    found: dict[str, list[list[int]]] = {name: [] for name in fill}
    for row in rows:
        whole = {**row, "attention_mask": [1] * len(row["input_ids"])}
        for name, value in fill.items():
            more = [value] * (size - len(row["input_ids"]))
            found[name].append([*more, *whole[name]] if left else [*whole[name], *more])
    return {name: torch.tensor(values) for name, values in found.items()}


def masked_left(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return masked(rows, True)


def packed(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def flattened(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """All of them in one row, with the columns by which stock kernels and mixers know their borders."""
    made = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(rows)
    return dict(made)


COLLATORS = {
    "rows": pad_batch, "no mask": pad_batch, "mask": masked, "left": masked_left, "packed": packed,
    "flattened": flattened,
}  # fmt: skip


def write_data(case: Case, folder: Path) -> None:
    if case["data"] in TOKEN_DATA:
        for seed, name in enumerate(("web", "code", "held-out")):
            write_ds(folder / f"{name}.ds", documents(200 if seed < 2 else 8, seed, vocabulary=120))
    (folder / "memory").mkdir()
    if case["data"] == "stream":
        write_shards(folder)


def data_of(case: Case, folder: Path, samples: int) -> dict[str, Any]:
    """Arguments of the trainer."""
    from datasets import load_dataset

    from hf_nanotron.data import Mixture, TokenDataset

    kind = case["data"]
    if kind in TOKEN_DATA:
        keeps = {"tokens": "cross", "documents": "mask", "mixture": "pack"}[kind]
        sets = {
            name: TokenDataset(f"{folder}/{name}.ds", LENGTH, token_size=2, documents=keeps, seed=3)
            for name in ("web", "code", "held-out")
        }
        held_out = sets.pop("held-out")
        whole: Any = sets["web"]
        if kind == "mixture":
            whole = Mixture(sets, {"web": 0.7, "code": 0.3}, max_epochs=4, when_exhausted="redistribute")
        return {"train_dataset": whole, "eval_dataset": held_out}
    if kind == "stream":
        files = [f"{folder}/{number}.json" for number in range(6)]
        text = load_dataset("json", data_files=files, split="train", streaming=True)
        held_out = rows_of({**case, "data": "rows"}, 5, 9)
        return {"train_dataset": stream_of(text), "eval_dataset": held_out}
    rows: Any = rows_of(case, samples, 0)
    return {
        "train_dataset": Plain(list(rows)) if kind == "iterable" else rows,
        "eval_dataset": rows_of(case, 5, 9),
        "data_collator": COLLATORS.get(kind, pad_batch),
    }


# ---- loss and optimizer ----


def squared(outputs: Any, labels: Any, num_items_in_batch: Any = None, shift_labels: Any = None) -> torch.Tensor:
    """A loss that is another one for each token."""
    losses = F.cross_entropy(outputs.logits.flatten(0, 1).float(), shift_labels.flatten(), reduction="none")
    return (losses * (1 + 0.1 * losses)).sum() / num_items_in_batch


class Element(torch.optim.Adamax):
    elementwise = True


class Polar(MatrixOptimizer):
    """The orthogonal factor, damped so that rounding does not decide on small singular values."""

    def direction(self, matrices: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        small = matrices.float()
        rows = small @ small.mT
        mean = rows.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        damped = rows + (1e-2 * mean + 1e-20) * torch.eye(rows.shape[-1])  # an expert without tokens has zeros
        return torch.linalg.solve(damped, small).to(matrices.dtype) * mean.sqrt()


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "bf16 moments": {"optim": "adamw_torch_fused", "optim_state_dtype": "bfloat16"},
    "muon": {"optim": "muon", "muon_dtype": "float32"},
    "muon original": {"optim": "muon", "muon_dtype": "float32", "muon_scale": "original", "muon_learning_rate": 1e-2},
    "muon spectral": {"optim": "muon", "muon_dtype": "float32", "muon_scale": "spectral", "muon_learning_rate": 1e-2},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1},
    "lion_32bit": {"optim": "lion_32bit", "learning_rate": 1e-3},
    "rmsprop": {"optim": "rmsprop", "learning_rate": 1e-3},
    "user's": {},
    "user's of matrices": {},
}
CLASSES: dict[str, Any] = {
    "user's": (Element, {"lr": 5e-3, "eps": 1e-4}),
    "user's of matrices": (Polar, {"lr": 5e-3, "momentum": 0.9, "matrix_dtype": torch.float32}),
}
RATES = {
    "cosine": {"lr_scheduler_type": "cosine"},
    "warmup_stable_decay": {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 2, "decay_type": "1-sqrt", "min_lr_ratio": 0.1},
    },
    "constant_with_warmup": {"lr_scheduler_type": "constant_with_warmup"},
    "polynomial": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
}


# ---- arguments ----


def micro_batches(case: Case) -> int:
    """Of a step, over all data-parallel ranks: each leg can divide them."""
    ranks = math.lcm(*(layout["dp"] for _, layout in layouts(case)))
    most = max(layout["dp"] for _, layout in layouts(case)) if case["elastic"] else 1
    needed = max(max(layout["dp"], most) * layout["pp"] for _, layout in layouts(case))
    needed = max(4, needed * (2 if case["batch_warmup"] else 1))
    return ranks * math.ceil(needed / ranks)


def samples_of(case: Case) -> int:
    """Rows of the data: of all steps, or so many that an epoch ends within a step."""
    step = micro_batches(case) * case["rows"]
    return step + step // 2 + 1 if case["epochs"] else step * STEPS


def common_arguments(case: Case) -> dict[str, Any]:
    """What stock Trainer has, too, but for the sizes of the batch."""
    values: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": case["rows"],
        "per_device_eval_batch_size": 2,
        "adam_epsilon": 1e-4,  # what has no gradient but rounding does not move
        "max_grad_norm": case["clip"],
        "dataloader_num_workers": case["workers"],
        "optim": case["optimizer"],
        **RATES[case["rates"]],
        **OPTIMIZERS.get(case["optimizer"], {}),
    }
    if case["optimizer"].startswith("user's"):
        del values["optim"]
    if case["loss"] == "smoothing":
        values["label_smoothing_factor"] = 0.1
    if case["between"] == "evaluation":
        values |= {"eval_strategy": "steps", "eval_steps": 1}
    if case["save"] != "no":
        values |= {"save_strategy": "steps", "save_steps": SAVED, "save_only_model": case["save"] == "weights alone"}
    return values


def own_arguments(case: Case, layout: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    """Those of one leg; of one process if `layout` is None."""
    total = micro_batches(case)
    values = common_arguments(case)
    values["gradient_accumulation_steps"] = total
    if case["loss"] == "z-loss":
        values["z_loss_coefficient"] = Z_LOSS
    if case["neftune"]:
        values["neftune_noise_alpha"] = 8.0
    if case["average"] != "no":
        values |= {"ema_decay": EMA_DECAY, "ema_evaluate": case["average"] == "evaluated"}
    if case["no_weight_decay"]:
        values["no_weight_decay"] = [NO_DECAY]
    if case["parametrization"] == "spectral":
        values |= {"parametrization": "spectral", "base_hidden_size": BASE_WIDTH}
    if case["bias_update"]:
        values["moe_bias_update_rate"] = 0.01
    if case["batch_warmup"]:
        step = total * case["rows"]
        values |= {"batch_size_warmup_tokens": step * LENGTH, "batch_size_warmup_start": step // 2}
    if layout is None:
        return values
    schedule = layout["schedule"]
    values |= {
        "tp_size": layout["tp"],
        "pp_size": layout["pp"],
        "cp_size": layout["cp"],
        "ep_size": layout["ep"],
        "zero_stage": layout["zero_stage"],
        "pp_schedule": "zb" if schedule.startswith("zb") else schedule,
        "pp_virtual_stages": 2 if "interleaved" in schedule else 1,
        "gradient_accumulation_steps": total // layout["dp"],
        "sequence_parallel": case["sequence_parallel"],
        "dp_replicate_size": case["replicas"],
        "cp_mode": case["cp_mode"],
        "mlp_chunk_tokens": case["mlp_chunk_tokens"],
        "torch_compile": bool(case.get("compile")),
    }
    if case["tp_overlap"]:
        values["tp_overlap"] = True
    if case["recompute"] != "off":
        values["activation_checkpointing"] = True
        if case["recompute"] == "one layer":
            values["activation_checkpointing_layers"] = [1]
        else:
            values["activation_checkpointing_policy"] = case["recompute"]
    if case["elastic"]:
        values["max_dp_size"] = most = max(each["dp"] for _, each in layouts(case))
        values["gradient_accumulation_steps"] = total // most
    values["async_save"] = case["save"] == "async"
    if case["save"] == "last":
        values["save_hub_weights"] = "last"
    if case["save"] == "memory":
        values |= {"memory_snapshot_steps": 1, "memory_snapshot_dir": str(folder / "memory"), "save_steps": 100}
    return values


# ---- one leg ----


class Broken(Exception):
    """The end of a leg, as an error of the user's code."""


class Watch(TrainerCallback):
    """Writes each figure of the log down at once, and ends the leg in its way."""

    def __init__(self, file: Path, case: Case, end: str) -> None:
        self.file, self.case, self.end = file, case, end
        self.began = False

    def write(self, kind: str, step: int, value: Any) -> None:
        with open(self.file, "a") as file:
            file.write(json.dumps([kind, step, value]) + "\n")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name, value in (logs or {}).items():
            if name in ("loss", "grad_norm", "eval_loss", "learning_rate") or name.startswith("loss/"):
                self.write(name, state.global_step, value)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = True
        if state.global_step == STEPS - 1 and self.end == "raise":
            raise Broken
        if state.global_step == STEPS - 1 and self.end == "kill":
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == SAVED and self.end == "stop":
            control.should_save = control.should_training_stop = True
        if state.global_step in (1, STEPS - 1) and self.case["between"] == "generation":
            model.eval()
            given = {"input_ids": PROMPTS, "attention_mask": (PROMPTS != 0).long()}
            made = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
            self.write("generated", state.global_step, made.tolist())
            model.train()


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def leg(case: Case, prefix: str, layout: dict[str, Any] | None, folder: Path, name: str, watch: list[Any]) -> None:
    """Train on this rank until the leg ends; rank 0 leaves its figures, the last leg its weights."""
    torch.set_num_threads(1)
    values = own_arguments(case, layout, folder)
    last = layout is None or case["end"] == "none" or prefix == "then "
    end = "none" if last else case["end"]
    out = folder / ("whole-out" if layout is None else "out")
    args = NanotronTrainingArguments(**training_arguments(output_dir=str(out), **values))
    if case["parametrization"] == "spectral":
        model = fresh(case, args.parallel, args.spectral)
    else:
        model = ParallelAuto.from_pretrained(str(folder / "start"), parallel=args.parallel)
    freeze(model, case["frozen"])
    watch.append(Watch(folder / f"{name}-{rank()}.jsonl", case, end))
    trainer = NanotronTrainer(
        model=model,
        args=args,
        callbacks=[watch[0]],
        compute_loss_func=squared if case["loss"] == "function" else None,
        optimizer_cls_and_kwargs=CLASSES.get(case["optimizer"]),
        **data_of(case, folder, samples_of(case)),
    )
    trainer.train(resume_from_checkpoint="auto" if prefix else None)
    if not last:
        return
    if case["prediction"]:
        predict(trainer, case, folder / f"{name}.pt")
    trainer.save_model(str(folder / f"{name}-final"))
    model.mesh.close()


def predict(trainer: Any, case: Case, file: Path) -> None:
    found = trainer.predict(trainer.eval_dataset)
    several = found.predictions if isinstance(found.predictions, tuple) else (found.predictions,)
    logits = next(each for each in several if getattr(each, "ndim", 0) == 3)
    result = {
        "logits": torch.tensor(logits),
        "labels": torch.tensor(found.label_ids),
        "loss": found.metrics["test_loss"],
        "shapes": [getattr(each, "shape", None) for each in several],
    }
    if rank() == 0:
        torch.save(result, file)

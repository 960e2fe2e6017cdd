"""Two training steps of a tiny model of any family: by stock transformers, and by ranks that compare with it.

The jobs use the parts of the trainer below `Trainer` itself (`TrainStep`, `shard_weights`, `global_norm`), which keeps
a case down to a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_nanotron.models.stock.releases import RELEASE

HERE = Path(__file__).parent
ALL_FAMILIES: dict[str, dict[str, Any]] = json.loads((HERE / "families.json").read_text())


def is_known_here(entry: dict[str, Any]) -> bool:
    """Whether the installed transformers has the type (`"since"`: the first release that has it)."""
    return tuple(map(int, entry.get("since", "0.0").split("."))) <= RELEASE


FAMILIES = {name: entry for name, entry in ALL_FAMILIES.items() if is_known_here(entry)}
# Types without a declared plan, which the tables of `models/stock/families.py` cut. ("since": the release with a plan.)
ALL_UNPLANNED: dict[str, dict[str, Any]] = json.loads((HERE / "families_unplanned.json").read_text())
UNPLANNED = {name: entry for name, entry in ALL_UNPLANNED.items() if not ("since" in entry and is_known_here(entry))}
FAMILIES |= {name: entry for name, entry in ALL_UNPLANNED.items() if name not in UNPLANNED}
KNOWN = {**FAMILIES, **UNPLANNED}
STEP_LENGTH, TOKENS = 0.05, 8
# Micro-batches of each step. The second step sees what the update of the first has changed.
TWO_STEPS = (4, 4)


def tiny_model(family: str, **overrides: Any) -> PreTrainedModel:
    """A stock model, the same in every process.

    Args:
        overrides: fields of its config; `"change"` names a function of this module that sets weights.
    """
    overrides = dict(overrides)
    change, attention = overrides.pop("change", None), overrides.pop("attn_implementation", "eager")
    config = AutoConfig.for_model(family, **{**KNOWN[family]["config"], **overrides})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # nothing stays at zero or one, where a wrong gradient could hide
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        if change is not None:
            CHANGES[change](model)
    return model


def _tie_routers(model: PreTrainedModel) -> None:
    """Routers that see no difference between experts: all tokens go to the same ones, and the others stay empty."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name.endswith((".gate", ".router")) and isinstance(weight, torch.Tensor):
            weight.zero_()


CHANGES = {"tied routers": _tie_routers}


def micro_batches(
    model: PreTrainedModel,
    dp_rank: int = 0,
    dp_size: int = 1,
    numbers: tuple[int, ...] = TWO_STEPS,
    documents: tuple[int, ...] = (TOKENS,),
) -> list[list[dict[str, Any]]]:
    """For each step, this data-parallel rank's of the step's micro-batches, of which there are `numbers` in all.

    Each has one row; several `documents` in it are marked by `position_ids`.
    """
    generator = torch.Generator().manual_seed(2)
    vocabulary = model.config.get_text_config().vocab_size
    steps = []
    for number in numbers:
        batches = []
        for index in range(number):
            ids = torch.randint(3, min(vocabulary, 100), (1, sum(documents)), generator=generator)
            labels = ids.clone()
            labels[:, : 3 * index] = -100
            batches.append({"input_ids": ids, "labels": labels})
            if len(documents) > 1:
                batches[-1]["position_ids"] = torch.cat([torch.arange(length) for length in documents])[None]
        count = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
        for batch in batches:
            batch["num_items_in_batch"] = torch.tensor(count)
            if "token_type_ids" in KNOWN.get(model.config.model_type, {}).get("inputs", ()):
                batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        steps.append(batches[dp_rank::dp_size])
    return steps


def reference(
    family: str, numbers: tuple[int, ...] = TWO_STEPS, documents: tuple[int, ...] = (TOKENS,), **overrides: Any
) -> dict[str, Any]:
    """Losses, gradient norms and gradients of stock transformers in one process.

    The gradients of a step are one flat tensor, which is read much faster than one for each parameter. `"places"` has
    the shape and the first element of each.
    """
    model = tiny_model(family, **overrides).train()
    result: dict[str, Any] = {"losses": [], "norms": [], "gradients": []}
    for batches in micro_batches(model, numbers=numbers, documents=documents):
        model.zero_grad()
        loss = torch.zeros(())
        for batch in batches:
            out = model(**batch, use_cache=False).loss
            out.backward()
            loss += out.detach()
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        result["losses"].append(float(loss))
        result["norms"].append(float(torch.stack([g.norm() for g in gradients.values()]).norm()))
        result["gradients"].append(torch.cat([gradient.flatten() for gradient in gradients.values()]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= STEP_LENGTH / result["norms"][-1] * gradients[name]
    starts = accumulate((parameter.numel() for parameter in model.parameters()), initial=0)
    named = zip(model.named_parameters(), starts, strict=False)
    result["places"] = {name: (tuple(parameter.shape), start) for (name, parameter), start in named}
    return result


def whole_gradient(expected: dict[str, Any], step: int, name: str) -> torch.Tensor:
    """Of the parameter of that name in the Hub's checkpoint."""
    shape, start = expected["places"][name]
    return expected["gradients"][step][start : start + math.prod(shape)].view(shape)


def compare(
    family: str, path: str, layouts: list[dict[str, Any]], overrides: dict[str, Any], folder: str | None = None
) -> list[Any]:
    """Train under each of `layouts` and return its errors, or the sentence with which the model was refused.

    Args:
        path: file of the `reference`, or of one for each of the `"micro_batches"` that layouts ask for.
        layouts: fields of `ParallelConfig`, and `"save"`: the name under which to save the model in `folder` before it
            trains; `"micro_batches"`: of each step, if not `TWO_STEPS`; `"steps"`: how many of them to take;
            `"checkpointing"`: recompute activations; `"wrong"`: leave out the sums over tensor-parallel ranks;
            `"documents"`: tokens of each of the documents of a row.
    """
    found = torch.load(path)
    results = []
    for layout in layouts:
        numbers = layout.get("micro_batches", TWO_STEPS)
        expected = found if "losses" in found else found[layout.get("documents", numbers)]
        results.append(_errors(family, expected, {**layout, "micro_batches": numbers}, overrides, folder))
    return results


def _errors(
    family: str, expected: dict[str, Any], sizes: dict[str, Any], overrides: dict[str, Any], folder: str | None
) -> dict[str, float] | str:
    """Largest relative errors over the steps: of the loss, the gradient norm, and any parameter's gradient.

    The error of a gradient is relative to the norm of the whole parameter's gradient, plus a ten
    thousandth of the global norm: a gradient that is zero but for rounding is compared with that.
    """
    from hf_nanotron.checkpoint.hub.model import save_hub_model
    from hf_nanotron.models.sharding.parallelize import parallelize
    from hf_nanotron.optim.norm import global_norm
    from hf_nanotron.parallel.collectives import all_reduce
    from hf_nanotron.parallel.config import ParallelConfig
    from hf_nanotron.parallel.mesh import ParallelMesh
    from hf_nanotron.prepare.context_attention import choose_context_attention, let_parts_see_rows
    from hf_nanotron.prepare.shard_weights import shard_weights
    from hf_nanotron.prepare.training_state import TrainingState
    from hf_nanotron.training.step.micro_batches import make_micro_batches
    from hf_nanotron.training.step.train_step import TrainStep

    save, checkpointing, wrong = (sizes.pop(name, None) for name in ("save", "checkpointing", "wrong"))
    numbers, steps = sizes.pop("micro_batches"), sizes.pop("steps", None)
    documents = sizes.pop("documents", (TOKENS,))
    mesh = ParallelMesh(ParallelConfig(**sizes))
    try:
        try:
            stock = tiny_model(family, **overrides)
            if mesh.cp_size > 1 and stock._supports_sdpa:  # whose attention stands for it alone
                stock.set_attn_implementation("sdpa")
            model = parallelize(stock, mesh)
            attention = choose_context_attention(model, torch.float32, mesh.device)[0] if mesh.cp_size > 1 else None
        except ValueError as error:
            dist.barrier()  # every rank refuses, and none closes its groups while another still opens them
            return str(error)
        if save is not None and folder is not None:
            save_hub_model(model, Path(folder) / save)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if wrong:
            model.shard_specs = {
                name: dataclasses.replace(spec, partial_grad=False) for name, spec in model.shard_specs.items()
            }
        weights = shard_weights(model, torch.float32, 1 << 16)
        state = TrainingState(model, weights, attention=attention)
        let_parts_see_rows(model)
        step = TrainStep(state)
        errors = {"loss": 0.0, "norm": 0.0, "gradient": 0.0}
        every = micro_batches(model, mesh.dp_rank, mesh.dp_size, numbers, documents)[:steps]
        for index, batches in enumerate(every):
            if mesh.cp_size > 1:
                window = [(batch, batch["num_items_in_batch"]) for batch in batches]
                batches = make_micro_batches(window, lambda batch: batch, state, False)
            loss = step.run(batches, index)
            loss = loss if mesh.is_last_stage and mesh.tp_rank == 0 else torch.zeros(())
            loss = float(all_reduce(loss.detach().clone(), mesh.world))
            norm = float(global_norm(weights.segments, mesh))
            errors["loss"] = max(errors["loss"], abs(loss / expected["losses"][index] - 1))
            errors["norm"] = max(errors["norm"], abs(norm / expected["norms"][index] - 1))
            floor = 1e-4 * expected["norms"][index]
            for segment in weights.segments:
                whole = whole_gradient(expected, index, segment.spec.name)
                wanted = segment.spec.slice(whole).reshape(-1)[segment.start : segment.stop]
                error = float((segment.gradient - wanted).norm() / (whole.norm() + floor))
                errors["gradient"] = max(errors["gradient"], error)
            with torch.no_grad():
                for segment in weights.segments:
                    segment.master -= STEP_LENGTH / norm * segment.gradient
            weights.publish()
            weights.wait()
        weights.close()
        return errors
    finally:
        mesh.close()

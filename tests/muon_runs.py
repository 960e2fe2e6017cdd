"""Muon under any layout from given gradients, compared with `torch.optim.Muon` and `torch.optim.AdamW` by each rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from family_runs import tiny_model
from tiny import History, pad_batch, random_dataset, training_arguments
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

LR, MATRIX_LR, DECAY = 1e-2, 3e-2, 0.1
STEPS = 2
BATCH = 4  # samples of a step of a whole run
GRAD_SCALE = 1.7  # divides the gradients of the last step
NO_MATRICES = ("embed", "wte", "wpe", "lm_head", "norm", "ln_", "conv1d", "mlp.gate.weight", "router", "A_log", "bias")
# End of a fused weight's name -> the sizes of its layers, by the model's width 64, or how many there are by turns.
FUSED: dict[str, dict[str, tuple[int, ...] | int]] = {
    "phi3": {"qkv_proj.weight": (64, 32, 32), "gate_up_proj.weight": (128, 128)},
    "qwen3_moe": {"experts.gate_up_proj": (32, 32)},
    "gpt_oss": {"experts.gate_up_proj": 2},
    "mamba2": {"in_proj.weight": (128, 128, 8, 8, 8)},
    "gpt2": {"c_attn.weight": (64, 64, 64)},
}
OUT_DIM = {"gpt2": -1, "gpt_oss": -1}  # -2 for all others; of GPT-OSS, that of its experts
SCALES = {"match_rms_adamw": "match_rms_adamw", "original": "original", "spectral": "spectral_unclamped"}


def in_fp32(step: Callable[[], Any]) -> None:
    """torch's own code casts to bfloat16 in one place: a copy there makes it compute in fp32."""
    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
        step()


def is_matrix(name: str, weight: torch.Tensor) -> bool:
    return weight.dim() > 1 and not any(part in name for part in NO_MATRICES)


def matrices(family: str, name: str, weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of a weight that are the matrices of its layers and experts."""
    if weight.dim() == 3:
        for expert in weight:
            yield from matrices(family, name, expert)
        return
    sizes = next((sizes for end, sizes in FUSED.get(family, {}).items() if name.endswith(end)), None)
    dim = OUT_DIM.get(family, -2) if family != "gpt_oss" or "experts" in name else -2
    if isinstance(sizes, int):
        yield from (weight[:, index::sizes] for index in range(sizes))
    elif sizes is not None:
        yield from weight.split(sizes, dim)
    else:
        yield weight


def gradient(name: str, shape: torch.Size | tuple[int, ...], step: int) -> torch.Tensor:
    seed = sum(ord(letter) * (index + 1) for index, letter in enumerate(name)) + 7919 * step
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def torch_muon(family: str, scale: str, fp32: bool, overrides: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of the stock model after a few steps in one process, by name."""
    model = tiny_model(family, **overrides)
    wholes = {name: weight.detach() for name, weight in model.named_parameters()}
    views = {name: list(matrices(family, name, weight)) for name, weight in wholes.items() if is_matrix(name, weight)}
    copies = {name: [nn.Parameter(view.clone()) for view in of_weight] for name, of_weight in views.items()}
    others = {name: nn.Parameter(weight) for name, weight in wholes.items() if name not in views}
    muon = torch.optim.Muon(
        [copy for of_weight in copies.values() for copy in of_weight],
        lr=MATRIX_LR, weight_decay=DECAY, momentum=0.9, adjust_lr_fn=SCALES[scale],
    )  # fmt: skip
    groups = [
        {"params": [p for p in others.values() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in others.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=LR, foreach=False)
    for step in range(STEPS):
        for name, weight in wholes.items():
            whole = gradient(name, weight.shape, step)
            if step == STEPS - 1:
                whole = whole / GRAD_SCALE
            if name in others:
                others[name].grad = whole
            else:
                for copy, part in zip(copies[name], matrices(family, name, whole), strict=True):
                    copy.grad = part.contiguous()
        in_fp32(muon.step) if fp32 else muon.step()
        adamw.step()
    with torch.no_grad():
        for name, of_weight in views.items():
            for view, copy in zip(of_weight, copies[name], strict=True):
                view.copy_(copy)
    return wholes


def differences(
    family: str, layouts: list[dict[str, Any]], scale: str, fp32: bool, overrides: dict[str, Any]
) -> list[dict[str, float]]:
    """For each layout, the weights of this rank that are not those of torch, to the last bit, and how far off."""
    from hf_nanotron.models.sharding.parallelize import parallelize
    from hf_nanotron.optim.adamw import AdamW
    from hf_nanotron.optim.build import build_optimizer
    from hf_nanotron.optim.gradients import GradientPart
    from hf_nanotron.optim.muon import Muon
    from hf_nanotron.parallel.config import ParallelConfig
    from hf_nanotron.parallel.mesh import ParallelMesh
    from hf_nanotron.prepare.shard_weights import shard_weights
    from hf_nanotron.training.optimizer import link_optimizer, matrix_layouts

    if dist.get_rank() == 0:
        AdamW([nn.Parameter(torch.zeros(1))])  # from then on, torch runs the hooks on steps in this class's step, too
    expected, found = torch_muon(family, scale, fp32, overrides), []
    for layout in layouts:
        mesh = ParallelMesh(ParallelConfig(**layout))
        model = parallelize(tiny_model(family, **overrides), mesh)
        weights = shard_weights(model, torch.float32, 1 << 16)
        arguments = {
            "lr": LR, "matrix_lr": MATRIX_LR, "momentum": 0.9, "scale": scale, "batch_elements": 1 << 14,
            "matrix_dtype": torch.float32 if fp32 else torch.bfloat16,
        }  # fmt: skip
        decayed = {segment.name for segment in weights.segments if len(segment.spec.global_shape) > 1}
        order, layouts_of = list(model.hub_shapes), matrix_layouts(model)
        optimizer = build_optimizer(weights.segments, order, decayed, DECAY, Muon, arguments, matrices=layouts_of)
        link = link_optimizer(None, optimizer, model, weights, None, False)
        for step in range(STEPS + 1):
            link.skips_next = step == 1  # as if its gradient were not finite
            for segment in weights.segments:
                name, part = segment.spec.name, GradientPart(segment.spec, segment.start, segment.stop)
                segment.gradient.copy_(part.of(gradient(name, segment.spec.global_shape, min(step, STEPS - 1))))
            if step == STEPS:
                optimizer.grad_scale = torch.tensor(GRAD_SCALE)
            optimizer.step()
        weights.wait()
        errors = {}
        for segment in weights.segments:
            part = GradientPart(segment.spec, segment.start, segment.stop).of(expected[segment.spec.name])
            if not torch.equal(segment.master.detach(), part):
                errors[segment.spec.name] = float((segment.master.detach() - part).abs().max())
        found.append(errors)
        link.close()
        weights.close()
        mesh.close()
    return found


# ---- whole runs --------------------------------------------------------------------------------------------------


class TorchMuon(torch.optim.Optimizer):
    """`torch.optim.Muon` in fp32 for the first group and `torch.optim.AdamW` for the others, for a stock `Trainer`."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, **muon: Any) -> None:
        super().__init__(groups, {"lr": lr})
        self.muon = torch.optim.Muon(self.param_groups[:1], lr=lr, momentum=0.95, **muon)
        self.adamw = torch.optim.AdamW(self.param_groups[1:], lr=lr)

    def step(self, closure: Any = None) -> None:
        inner = (*self.muon.param_groups, *self.adamw.param_groups)
        for group, own in zip(inner, self.param_groups, strict=True):
            group["lr"] = own["lr"]  # accelerate has replaced the groups that a scheduler changes
        in_fp32(self.muon.step)
        self.adamw.step()


def stock_losses(directory: str, dataset: Any, **overrides: Any) -> History:
    """Of stock `Trainer` in one process, with `TorchMuon`."""
    args = TrainingArguments(**training_arguments(**overrides))
    model = AutoModelForCausalLM.from_pretrained(directory)
    named = dict(model.named_parameters())
    matrices = [weight for name, weight in named.items() if is_matrix(name, weight)]
    others = [weight for name, weight in named.items() if not is_matrix(name, weight)]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": [weight for weight in others if weight.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [weight for weight in others if weight.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = TorchMuon(groups, args.learning_rate, adjust_lr_fn="match_rms_adamw")
    history = History()
    Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=pad_batch,
        callbacks=[history],
        optimizers=(optimizer, None),
    ).train()
    return history


def run(
    directory: str, output: str, sizes: dict[str, Any], dp: int, resume_from: str | None, overrides: dict[str, Any]
) -> list[float]:
    """Losses of a run with Muon under a layout."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    more = {"output_dir": output, "optim": "muon", "muon_dtype": "float32", **sizes, **overrides}
    args = NanotronTrainingArguments(**training_arguments(gradient_accumulation_steps=BATCH // dp, **more))
    history = History()
    model = ParallelAuto.from_pretrained(directory, parallel=args.parallel)
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=random_dataset(96), data_collator=pad_batch, callbacks=[history]
    )
    trainer.train(resume_from_checkpoint=resume_from)
    model.mesh.close()
    return history.losses

"""The spectral parametrization: initial weights, rates, folded multipliers, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import WorkerPool
from tiny import message, random_dataset, tiny_config, training_arguments
from torch import nn
from transformers import AutoModelForCausalLM as StockAuto

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments, ParallelConfig
from hf_nanotron.models.spectral.scales import weight_scales
from hf_nanotron.models.spectral.sizes import Spectral, with_width
from hf_nanotron.models.stock.anatomy import dissect
from hf_nanotron.models.weight_roles import weight_roles

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 8},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {},
    "gpt2": {"n_head": 4, "tie_word_embeddings": True},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
}


def config_of(family: str, width: int = 32, **overrides: Any) -> Any:
    config = tiny_config(family, num_hidden_layers=2, **{**SIZES[family], **overrides})
    return config if width == 32 else with_width(config, width)


def fresh(config: Any, base: Spectral | None, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, parametrization=base, dtype=torch.float32, **kwargs)


# ---- initial weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba2"])
def test_at_the_base_nothing_changes(family: str) -> None:
    standard, spectral = (fresh(config_of(family), base) for base in (None, Spectral(32)))
    for (name, ours), theirs in zip(spectral.named_parameters(), standard.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert all(scale.rule == type(scale.rule)() for scale in spectral.spectral.scales.values())


# Name (in layer 0) -> the spread and the rate at four times the width of the base, and the factor of epsilon.
EXPECTED: dict[str, dict[str, tuple[float | None, float, float | None]]] = {
    "llama": {
        "model.embed_tokens.weight": (1.0, 1.0, 1 / 4),
        "lm_head.weight": (1 / 4, 1 / 4, 1.0),
        "model.layers.0.self_attn.q_proj.weight": (1 / 2, 1 / 4, 1 / 4),
        "model.layers.0.mlp.down_proj.weight": (1 / 2, 1 / 4, 1 / 4),
        "model.norm.weight": (1.0, 1.0, 1 / 4),
    },
    "mixtral": {
        "model.layers.0.mlp.gate.weight": (1 / 4, 1 / 4, 1.0),
        "model.layers.0.mlp.experts.gate_up_proj": (1 / 2, 1 / 4, 1 / 4),
    },
    "mamba2": {
        "backbone.layers.0.mixer.in_proj.weight": (None, 1 / 4, 1 / 4),
        "backbone.layers.0.mixer.out_proj.weight": (1 / 2, 1 / 4, 1 / 4),
        "backbone.layers.0.mixer.conv1d.weight": (1.0, 1.0, None),
    },
}


@pytest.mark.parametrize("family", EXPECTED)
def test_spreads_and_rates_of_a_wide_model(family: str) -> None:
    """Also where the stock class itself divides by the root of the inputs (`out_proj` of Mamba-2)."""
    base, wide = fresh(config_of(family), None), fresh(config_of(family, 128), Spectral(32))
    for name, (spread, rate, eps) in EXPECTED[family].items():
        scale = wide.spectral.scales[name]
        if spread is not None:
            ours, theirs = (model.get_parameter(name).detach().std() for model in (wide, base))
            assert float(ours / theirs) == pytest.approx(spread, rel=0.1) or float(theirs) == 0, name
        assert scale.rate == rate and eps in (None, scale.eps), name


def test_layers_in_one_weight_have_spreads_of_their_own() -> None:
    """The two maps of Mamba-2's state keep their outputs, so they shrink as a head does."""
    base, wide = fresh(config_of("mamba2"), None), fresh(config_of("mamba2", 128), Spectral(32))
    name = "backbone.layers.0.mixer.in_proj.weight"
    spreads = [
        float(w.get_parameter(name)[start:stop].std())
        for w, role in ((base, base.roles[name]), (wide, wide.roles[name]))
        for ((start, stop),) in role.parts[:3]
    ]
    ratios = [spreads[index + 3] / spreads[index] for index in range(3)]
    assert ratios == pytest.approx([1 / 2, 1 / 2, 1 / 4], rel=0.1)


def save_fresh(folder: str, sizes: dict[str, Any]) -> None:
    model = fresh(config_of("mixtral", 64), Spectral(32), parallel=ParallelConfig(**sizes))
    model.save_pretrained(folder)
    rates = {name: model.spectral.scales[model.shard_specs[name].name] for name, _ in model.named_parameters()}
    assert {scale.rate for scale in rates.values()} == {1.0, 0.5}  # of the whole fan-in, not of a shard's
    model.mesh.close()


def test_initial_weights_do_not_depend_on_the_layout(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(1, save_fresh, str(tmp_path / "one"), {})
    pool.run(2, save_fresh, str(tmp_path / "two"), {"tp_size": 2})
    one, two = (StockAuto.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=0, atol=0)


# ---- folded multipliers ----------------------------------------------------------------------------------------


def unfolded(config: Any, base_config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A stock model in which multipliers are code, with weights as `Respread` draws them without multipliers."""
    torch.manual_seed(0)
    model, base = (
        StockAuto.from_config(c, dtype=torch.float64, attn_implementation="eager") for c in (config, base_config)
    )
    scales = weight_scales(model, base, config.tie_word_embeddings)
    factor = base_config.hidden_size / config.hidden_size
    for module in model.modules():
        if hasattr(module, "scaling"):
            small = next(m for m in base.modules() if type(m) is type(module))
            module.scaling = small.scaling * small.head_dim / module.head_dim
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale.fill_(base.get_input_embeddings().scalar_embed_scale)
    if config.tie_word_embeddings:
        model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * factor, *args[1:]))
    return model, scales


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"head_dim": 32, "attention_bias": True}),
        ("qwen3", {"head_dim": 32}),
        ("gemma", {"head_dim": 32}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_folded_multipliers_train_the_same_function(family: str, overrides: dict[str, Any]) -> None:
    """Heads that grow with attention 1/d, tied weights with a head of 1/width, and embeddings times the root of it.

    The stock model with folded weights against one whose forward multiplies, under torch's AdamW, with decay.
    """
    base_config = config_of(family, **({"head_dim": 8} | {k: v for k, v in overrides.items() if k != "head_dim"}))
    config = config_of(family, **overrides)
    config.hidden_size, config.intermediate_size = 64, 96
    reference, scales = unfolded(config, base_config)
    folded = StockAuto.from_config(config, dtype=torch.float64, attn_implementation="eager")
    folded.load_state_dict(reference.state_dict())
    assert any(scale.multiplier != 1 for scale in scales.values())
    zero_centred = {"model.norm.weight"} if family == "gemma" else set()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in folded.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
            reference.get_parameter(name).add_(noise)
            c = scales[name].multiplier
            parameter.copy_(
                c * (1 + reference.get_parameter(name)) - 1
                if name in zero_centred
                else c * reference.get_parameter(name)
            )

    def optimizer_of(model: nn.Module, is_folded: bool) -> torch.optim.Optimizer:
        groups = []
        for name, p in model.named_parameters():
            scale, decay = scales[name], 0.1 if p.dim() > 1 else 0.0
            c = 1.0 if is_folded else scale.multiplier
            groups.append(
                {
                    "params": [p],
                    "lr": 1e-2 * scale.rate / c,
                    "eps": 1e-3 * scale.eps * c,
                    "weight_decay": decay / (scale.rate / c),
                }
            )
        return torch.optim.AdamW(groups)

    ids = torch.randint(3, 100, (4, 16), generator=generator)
    losses: list[list[float]] = [[], []]
    for model, history, is_folded in ((reference, losses[0], False), (folded, losses[1], True)):
        optimizer = optimizer_of(model, is_folded)
        for _ in range(6):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0][-1] < losses[0][0]


def test_norms_around_zero_take_multipliers() -> None:
    """Gemma's norms multiply by one plus their weight: with tied weights the last is that much below one."""
    model = fresh(config_of("gemma", 128), Spectral(32))
    scale = model.spectral.scales["model.norm.weight"]
    assert scale.multiplier == pytest.approx(1 / 4 * 4**0.5) and scale.rate == pytest.approx(scale.multiplier)
    assert torch.equal(model.model.norm.weight, torch.full((128,), scale.multiplier - 1))
    assert model.spectral.scales["model.embed_tokens.weight"].multiplier == pytest.approx(1 / 2)


# ---- runs ------------------------------------------------------------------------------------------------------


def arguments(folder: Path, **overrides: Any) -> NanotronTrainingArguments:
    fields = {
        "parametrization": "spectral",
        "base_hidden_size": 32,
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        **overrides,
    }
    return NanotronTrainingArguments(**training_arguments(output_dir=str(folder), **fields))


def trainer_of(args: NanotronTrainingArguments, base: Spectral | None = None) -> NanotronTrainer:
    model = fresh(config_of("llama", 64), base or args.spectral, parallel=args.parallel)
    return NanotronTrainer(model=model, args=args, train_dataset=random_dataset(16))


def test_a_run_has_the_rates_of_its_weights(tmp_path: Path) -> None:
    """Against torch's AdamW in one process, with a group for each weight; the saved model is a stock one."""
    args = arguments(tmp_path, weight_decay=0.1, adam_epsilon=1e-4, lr_scheduler_type="constant")
    trainer = trainer_of(args)
    reference = StockAuto.from_config(config_of("llama", 64), dtype=torch.float32)
    reference.load_state_dict(trainer.model.state_dict())
    groups = []
    for name, p in reference.named_parameters():
        role = weight_roles(dissect(reference))[name]
        ratio = 1 / 2 if role.kind in ("matrix", "head") else 1.0
        eps = 1.0 if role.kind == "head" else 1 / 2
        decay = 0.1 / ratio if p.dim() > 1 else 0.0
        groups.append({"params": [p], "lr": args.learning_rate * ratio, "eps": 1e-4 * eps, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=(args.adam_beta1, args.adam_beta2))
    batches: list[Any] = []
    step = trainer.training_step

    def keep(model: Any, inputs: Any, *rest: Any) -> Any:
        batches.append(copy.deepcopy(inputs))
        return step(model, inputs, *rest)

    trainer.training_step = keep  # type: ignore[method-assign]
    trainer.train()
    count = args.gradient_accumulation_steps
    for first in range(0, len(batches), count):
        window = batches[first : first + count]
        tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in window)
        for batch in window:
            reference(**batch, num_items_in_batch=tokens).loss.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    trainer.save_model()
    saved = StockAuto.from_pretrained(tmp_path)
    for (name, ours), theirs in zip(saved.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6, msg=name)


def test_a_resume_keeps_the_parametrization(tmp_path: Path) -> None:
    trainer_of(arguments(tmp_path)).train()
    again = trainer_of(arguments(tmp_path, max_steps=4))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4
    assert again.optimizer is not None
    rates = {group["initial_lr"] for group in again.optimizer.param_groups if group["params"]}
    assert len(rates) == 2
    others = ({"base_hidden_size": 16}, {"parametrization": "standard", "base_hidden_size": None})
    for fields in others:
        other = trainer_of(arguments(tmp_path, max_steps=4, **fields))
        said = message(lambda other=other: other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")))  # type: ignore[misc]
        assert "was trained with parametrization='spectral' of base_hidden_size=32, but this run has" in said


def test_muon_needs_the_initial_values_alone(tmp_path: Path) -> None:
    """Its matrices have one rate at every width; the head, which AdamW updates, has its own."""
    muon = {"optim": "muon", "muon_scale": "spectral", "muon_learning_rate": 0.02}
    trainer = trainer_of(arguments(tmp_path, **muon))
    optimizer = trainer.create_optimizer()
    names = {segment.master: segment.name for segment in trainer.weights.segments}
    rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates["lm_head.weight"] == rates["model.embed_tokens.weight"] / 2
    kinds = {names[p]: group["kind"] for group in optimizer.param_groups for p in group["params"]}
    matrices = {rates[name] for name, kind in kinds.items() if kind == "matrix"}
    assert len(matrices) == 1 and kinds["model.layers.0.self_attn.q_proj.weight"] == "matrix"


def test_lion_has_rates_and_no_epsilon(tmp_path: Path) -> None:
    rates = {"lr_scheduler_type": "constant", "warmup_steps": 0, "learning_rate": 5e-3, "weight_decay": 0.1}
    trainer = trainer_of(arguments(tmp_path, optim="lion_32bit", max_steps=1, **rates))
    before = {segment.name: segment.master.detach().clone() for segment in trainer.weights.segments}
    trainer.train()
    for segment in trainer.weights.segments:  # every element moves by the rate of its weight
        rate = 5e-3 if "embed_tokens" in segment.name or "norm" in segment.name else 2.5e-3
        decay = 0.0 if "norm" in segment.name else 0.1 * 5e-3  # the same part of every weight
        moved = (segment.master.detach() - before[segment.name] * (1 - decay)).abs()
        moved = moved[moved > 1e-6]  # ids that no row has
        assert len(moved) > 0, segment.name
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=0)


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"base_hidden_size": None}, "needs base_hidden_size"),
        ({"parametrization": "standard"}, "needs parametrization='spectral'"),
        ({"optim": "sgd"}, "does not depend on the gradient's"),
        ({"optim": "muon"}, "use muon_scale='spectral'"),
        ({"base_sizes": {"head_dim": 0}}, "must be a whole number, at least 1"),
        ({"base_sizes": {"hidden_size": 32}}, "is the hidden size, which base_hidden_size="),
        ({"base_sizes": "{"}, "neither a mapping"),
        ({"parametrization": "mup"}, "not one of"),
    ],
)
def test_arguments_are_refused(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    assert says in message(lambda: arguments(tmp_path, **fields))


@pytest.mark.parametrize(
    ("family", "base", "says"),
    [
        ("llama", Spectral(128), "above the model's hidden_size=64"),
        ("llama", Spectral(24), "say what it is at hidden_size=24"),
        ("llama", Spectral(32, {"heads": 2}), "no field of a 'llama' config"),
        ("llama", Spectral(32, {"num_hidden_layers": 1}), "has other weights"),
        ("phi3", Spectral(32, {"num_attention_heads": 8}), "no layer of queries alone"),
    ],
)
def test_bases_are_refused(family: str, base: Spectral, says: str) -> None:
    assert says in message(lambda: fresh(config_of(family, 64), base))


def test_other_weights_and_optimizers_are_refused(tmp_path: Path) -> None:
    """A model that was made without the base, and an optimizer that the user has made over the model."""
    args = arguments(tmp_path)
    stock = StockAuto.from_config(config_of("llama", 64))
    assert "Pretrained weights are trained with" in message(lambda: NanotronTrainer(model=stock, args=args))
    assert "of base_hidden_size=16" in message(lambda: trainer_of(args, Spectral(16)))
    model = fresh(config_of("llama", 64), args.spectral)
    optimizer = torch.optim.AdamW(model.parameters())
    given = (optimizer, None)
    assert "follows from the base" in message(lambda: NanotronTrainer(model=model, args=args, optimizers=given))
    choice = (torch.optim.RMSprop, {"lr": 1e-3})
    other = NanotronTrainer(model=model, args=args, optimizer_cls_and_kwargs=choice)
    assert "with RMSprop" in message(other.create_optimizer)

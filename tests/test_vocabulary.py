"""A vocabulary that the tensor-parallel ranks do not divide: its slices, how logits are joined, and what is saved.

Such vocabularies also have rows in `test_parity.py`, and are those of `test_generation.py` and `test_evaluation.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_runs import compare, reference
from pool import WorkerPool
from safetensors.torch import load_file
from tiny import History, pad_batch, random_dataset, tiny_config, train_stock, training_arguments
from transformers import AutoModelForCausalLM

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.convert.sharded import sharded_to_hub
from hf_nanotron.parallel.config import ParallelConfig
from hf_nanotron.parallel.mesh import ParallelMesh
from hf_nanotron.parallel.tp.vocabulary import TILE, gather_vocabulary, vocabulary_parts


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("size", [8, 9, 17, 65, 120, 121, 131, 513, 32_001, 50_257, 128_258, 151_669])
def test_slices(size: int, tp_size: int) -> None:
    parts = vocabulary_parts(size, tp_size)
    stops = [stop for ((_, stop),) in parts]
    assert [start for ((start, _),) in parts] == [0, *stops[:-1]] and stops[-1] == size
    lengths = [stop - start for ((start, stop),) in parts]
    assert min(lengths) > 0 and lengths[0] == max(lengths)
    if size % tp_size == 0:
        assert len(set(lengths)) == 1
    elif size >= TILE * tp_size:
        assert all(length % TILE == 0 for length in lengths[:-1]) and max(lengths) < size / tp_size + 2 * TILE
        assert max(lengths[:-1]) - min(lengths[:-1]) <= TILE


def test_fewer_ids_than_ranks() -> None:
    with pytest.raises(ValueError, match="a vocabulary of 3 cannot be sharded over 4 ranks"):
        vocabulary_parts(3, 4)


def join(size: int, dtype: torch.dtype) -> None:
    """Logits and their gradient are those of a whole vocabulary."""
    mesh = ParallelMesh(ParallelConfig(tp_size=3))
    sizes = tuple(stop - start for ((start, stop),) in vocabulary_parts(size, 3))
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn((2, 5, size), generator=generator).to(dtype)
    factor = torch.randn((2, 5, size), generator=generator).to(dtype)
    own = whole.split(sizes, -1)[mesh.tp_rank].requires_grad_()
    joined = gather_vocabulary(own, mesh.tp, sizes)
    assert torch.equal(joined, whole)
    (joined * factor).sum().backward()
    assert torch.equal(own.grad, factor.split(sizes, -1)[mesh.tp_rank])
    with torch.no_grad():
        assert torch.equal(gather_vocabulary(own, mesh.tp, sizes), whole)
    mesh.close()


def joins() -> None:
    for size in (9, 10, 131):
        for dtype in (torch.float32, torch.bfloat16):
            join(size, dtype)


def test_logits_are_joined(pool: WorkerPool) -> None:
    pool.run(3, joins)


# ---- saved on one topology, resumed on others ----

SIZE = 131
LEGS: list[tuple[int, dict[str, Any]]] = [  # ranks, sizes; two steps each
    (2, {"tp_size": 2}),
    (3, {"tp_size": 3, "sequence_parallel": False}),
    (4, {"tp_size": 2, "pp_size": 2}),
    (1, {}),
    (4, {"tp_size": 2, "zero_stage": 3}),
]
STEPS = 2 * len(LEGS)


def train_leg(start: str, output: str, leg: int) -> list[float]:
    """Losses of two steps, the first of which goes on from the leg before."""
    world, sizes = LEGS[leg]
    dp = world // sizes.get("tp_size", 1) // sizes.get("pp_size", 1)
    fields = {"output_dir": output, "save_strategy": "steps", "save_steps": 2, "max_steps": 2 * leg + 2}
    schedule = {"lr_scheduler_type": "constant", "warmup_steps": 0}  # which do not know how many steps there will be
    args = NanotronTrainingArguments(
        **training_arguments(**fields, **schedule, gradient_accumulation_steps=4 // dp, **sizes)
    )
    history = History()
    model = ParallelAuto.from_pretrained(start, parallel=args.parallel)
    data = random_dataset(64, vocabulary=SIZE)
    trainer = NanotronTrainer(model=model, args=args, train_dataset=data, data_collator=pad_batch, callbacks=[history])
    trainer.train(resume_from_checkpoint=leg > 0)
    model.mesh.close()
    return history.losses


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.full_matrix), True], ids=["untied", "tied"])
def test_what_is_saved_is_the_whole_vocabulary(pool: WorkerPool, tmp_path: Path, tied: bool) -> None:
    """A run that goes from one size to the next computes what stock Trainer does, and saves what stock reads."""
    config = tiny_config(
        vocab_size=SIZE,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "start")
    losses: list[float] = []
    for leg, (world, _) in enumerate(LEGS):
        results = pool.run(world, train_leg, str(tmp_path / "start"), str(tmp_path / "out"), leg)
        assert all(result == results[0] for result in results)
        losses += results[0]
        saved = tensors(tmp_path / "out" / f"checkpoint-{2 * leg + 2}")
        shapes = {name: tuple(tensor.shape) for name, tensor in saved.items() if SIZE in tensor.shape}
        assert shapes == dict.fromkeys(["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])], (SIZE, 48))
    expected = train_stock(
        str(tmp_path / "start"),
        random_dataset(64, vocabulary=SIZE),
        **{"max_steps": STEPS, "gradient_accumulation_steps": 4, "lr_scheduler_type": "constant", "warmup_steps": 0},
    )
    assert losses == pytest.approx(expected.losses, rel=2e-5) and len(losses) == STEPS
    last = tmp_path / "out" / f"checkpoint-{STEPS}"
    model: Any = expected.model  # type: ignore[attr-defined]
    for name, parameter in AutoModelForCausalLM.from_pretrained(last).named_parameters():
        stock = model.get_parameter(name)
        assert (parameter - stock).norm() < 1e-4 * stock.norm(), name
    sharded_to_hub(last, tmp_path / "converted")
    converted, written = tensors(tmp_path / "converted"), tensors(last)
    assert converted.keys() == written.keys() and all(torch.equal(converted[name], written[name]) for name in written)


# ---- other families ----

# A soft-cap, whose loss is not fused; an embedding that scales; a head with a bias; scaled logits; experts.
FAMILIES = ["gemma2", "gemma3_text", "phi", "granite", "qwen3_moe"]
LAYOUTS: list[dict[str, Any]] = [
    {"tp_size": 2, "pp_size": 2, "sequence_parallel": True},
    {"tp_size": 4, "sequence_parallel": False},
]


# Logits that are scaled are no other than logits with a soft-cap where the vocabulary is in slices.
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.full_matrix] * (name == "granite")) for name in FAMILIES]
)
def test_families(pool: WorkerPool, tmp_path: Path, family: str) -> None:
    torch.save(reference(family, vocab_size=107), tmp_path / "reference.pt")
    for rank in pool.run(4, compare, family, str(tmp_path / "reference.pt"), LAYOUTS, {"vocab_size": 107}):
        for errors in rank:
            assert errors["loss"] < 1e-6 and errors["norm"] < 1e-5 and errors["gradient"] < 1e-4, errors

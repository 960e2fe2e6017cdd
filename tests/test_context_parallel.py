"""Context parallelism: losses and gradient norms of stock `transformers.Trainer` in one process, whole and packed rows.

Tolerances are those of `test_parity.py`: 1e-6 for the first loss, 2e-5 for every loss, 1e-4 for every gradient norm.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset
from family_runs import KNOWN, compare as compare_family, reference as family_reference, tiny_model
from pool import JobError, WorkerPool
from test_parity import HEADER as COLUMNS, TOLERANCE, checkpoint, llama_for, relative
from tiny import History, message, tiny_config, train_parallel, train_stock, training_arguments
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, ParallelConfig
from hf_nanotron.models.calling import CONTEXT
from hf_nanotron.monitor.flops import active_weights
from hf_nanotron.parallel.cp.plan import make_context_plan
from hf_nanotron.parallel.mesh import Group
from hf_nanotron.parallel.together import all_or_none
from hf_nanotron.prepare import context_attention
from hf_nanotron.prepare.attention import Attention
from hf_nanotron.prepare.context_attention import choose_context_attention
from hf_nanotron.training.step import custom_loss
from hf_nanotron.training.step.context import deal

TITLE = "context parallelism: relative error against stock Trainer in one process, four steps in fp32"
HEADER = COLUMNS
ROWS: list[str] = []  # conftest.py prints them when all tests have run
LENGTH = 22  # which is filled up on every layout
DOCUMENTS = ([22], [1, 13, 8], [5, 17], [3, 3, 3, 3, 10])


def samples(kind: str, samples: int = 48, vocabulary: int = 120) -> Dataset:
    """Rows, some of whose labels are ignored.

    `kind`: `"whole"` rows of one document, rows `"packed"` with several that `position_ids` mark (`"bounded"`: their
    bounds, too), or rows of different lengths, `"padded"` on the right and with an `attention_mask`.
    """
    generator = torch.Generator().manual_seed(5)
    rows = []
    for index in range(samples):
        ids = torch.randint(3, vocabulary, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[: index % 4] = -100
        row = {"input_ids": ids.tolist(), "labels": labels.tolist()}
        if kind == "padded":
            hidden = index % 7
            row["labels"][LENGTH - hidden :] = [-100] * hidden
            row["attention_mask"] = [1] * (LENGTH - hidden) + [0] * hidden
        if kind in ("packed", "bounded"):
            documents = DOCUMENTS[index % len(DOCUMENTS)]
            row["position_ids"] = [place for length in documents for place in range(length)]
        rows.append(row)
    return Dataset.from_list(rows)


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def collate_with_bounds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """And the bounds of documents, as transformers' `DataCollatorWithFlattening` gives them."""
    batch = collate(rows)
    starts = (batch["position_ids"].flatten() == 0).nonzero().flatten()
    bounds = torch.cat([starts, torch.tensor([batch["position_ids"].numel()])]).to(torch.int32)
    longest = int(bounds.diff().max())
    return {**batch, **{f"cu_seq_lens_{x}": bounds for x in "qk"}, **{f"max_length_{x}": longest for x in "qk"}}


COLLATE = {"bounded": collate_with_bounds}


@functools.cache
def reference(directory: str, kind: str, global_batch: int, rows: int) -> History:
    sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": global_batch}
    return train_stock(directory, samples(kind), collate=COLLATE.get(kind, collate), **sizes)


def train(directory: str, kind: str, sizes: dict[str, Any]) -> History:
    return train_parallel(directory, samples(kind), collate=COLLATE.get(kind, collate), **sizes)


def compare(
    pool: WorkerPool,
    directory: str,
    kind: str,
    layout: tuple[int, int, int, int],
    accumulation: int = 2,
    rows: int = 1,
    name: str = "llama",
    **options: Any,
) -> None:
    """`layout`: pp, dp, cp, tp."""
    pp, dp, cp, tp = layout
    sizes = {"pp_size": pp, "cp_size": cp, "tp_size": tp, **options, "per_device_train_batch_size": rows}
    accumulation = max(accumulation, pp)
    histories = pool.run(
        pp * dp * cp * tp, train, directory, kind, {**sizes, "gradient_accumulation_steps": accumulation}
    )
    expected, got = reference(directory, kind, dp * accumulation, rows), histories[0]
    assert len(got.losses) == len(expected.losses) == 4
    assert all(h.losses == got.losses and h.norms == got.norms for h in histories), "ranks report different figures"
    error = {
        "first loss": relative(got.losses[:1], expected.losses[:1]),
        "loss": relative(got.losses, expected.losses),
        "norm": relative(got.norms, expected.norms),
    }
    label = f"{name} pp {pp} dp {dp} cp {cp} tp {tp} {kind} " + " ".join(f"{k}={v}" for k, v in options.items())
    ROWS.append(f"{label:86s} " + " ".join(f"{error[each]:10.1e}" for each in TOLERANCE))
    assert all(error[each] <= TOLERANCE[each] for each in TOLERANCE), f"{label}: {error}"


def llama(pp: int, cp: int, tp: int, mode: str, **overrides: Any) -> str:
    """Heads that `mode` can deal, and few key-value heads: one on each rank, or fewer."""
    if mode == "heads":
        heads = next(heads for heads in (8, 6, 5, 7) if heads % (cp * tp) == 0)
        kv_heads = {8: 2, 6: 2 if tp == 2 else 3}.get(heads, 1)
        overrides = {
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "hidden_size": 8 * heads,
            **overrides,
        }
    return llama_for(tp, pp, **overrides)


Layout = tuple[int, int, int, int]  # pp, dp, cp, tp
SIZES = range(1, 9)
LAYOUTS: list[Layout] = [
    (pp, dp, cp, tp)
    for pp, dp, cp, tp in itertools.product(SIZES, repeat=4)
    if cp > 1 and pp * dp * cp * tp <= 8 and tp in (1, 2, 3, 4)
]
# What each of them meets in turn. An option that its sizes do not allow is passed over.
ZERO = [{"zero_stage": stage} for stage in range(4)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"gradient_checkpointing": True},
    {"sequence_parallel": False},
    {"dp_replicate_size": 2, "cp_kv_heads_per_gather": 1},
    {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    {"gradient_checkpointing": True, "activation_checkpointing_policy": "selective"},
    {"gradient_checkpointing": True, "activation_checkpointing_policy": "all_but_attention", "mlp_chunk_tokens": 8},
]
SCHEDULES: list[dict[str, Any]] = [
    {},
    {"pp_schedule": "zb"},
    {"pp_schedule": "afab"},
    {"pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2},
]


def options_of(layout: Layout, kind: str, mode: str) -> dict[str, Any]:
    """ZeRO stage, schedule and one more option of a row of the table, by turns."""
    pp, dp, cp, tp = layout
    turn = LAYOUTS.index(layout) + 2 * (kind == "packed") + (mode == "heads")
    found = {**ZERO[turn % 4], **OPTIONS[turn % 7], **(SCHEDULES[turn // 2 % 4] if pp > 1 else {})}
    if found.get("pp_schedule") == "zb":
        found.pop("mlp_chunk_tokens", None)  # refused with it
        found["zero_stage"] = min(found["zero_stage"], 2)
    if found.get("dp_replicate_size") and (dp * cp % 2 or not found["zero_stage"]):
        del found["dp_replicate_size"]
    if mode == "heads":
        found.pop("cp_kv_heads_per_gather", None)
    if tp == 1:
        found.pop("sequence_parallel", None)
    return found


CHOSEN: set[tuple[Layout, str, str]] = {
    ((1, 1, 2, 1), "packed", "gather"),
    ((1, 1, 4, 1), "whole", "heads"),
    ((2, 1, 2, 2), "packed", "gather"),
}


@pytest.mark.parametrize("mode", ["gather", "heads"])
@pytest.mark.parametrize("kind", ["whole", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda sizes: "pp{} dp{} cp{} tp{}".format(*sizes))
def test_layouts(pool: WorkerPool, pytestconfig: pytest.Config, layout: Layout, kind: str, mode: str) -> None:
    """Every (pp, dp, cp, tp) with a product of at most 8; ZeRO stages, schedules and other options take turns."""
    if (layout, kind, mode) not in CHOSEN and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    pp, _, cp, tp = layout
    if mode == "heads" and all(heads % (cp * tp) for heads in (8, 6, 5, 7)):
        pytest.skip("no tiny model has so many heads")
    options = options_of(layout, kind, mode)
    stages = pp * options.get("pp_virtual_stages", 1)
    interleaved = stages > pp
    directory = llama(stages, cp, tp, mode)
    compare(
        pool, directory, kind, layout, pp + 1 if interleaved else 2, 1 + (kind == "packed"), cp_mode=mode, **options
    )


def test_noise_on_embeddings(pool: WorkerPool) -> None:
    """NEFTune's is drawn for whole rows: it is that of one process."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "neftune_noise_alpha": 5.0}
    directory = llama_for(1, 1)
    expected = pool.run(1, train, directory, "packed", sizes)[0]
    for got in pool.run(2, train, directory, "packed", {**sizes, "cp_size": 2}):
        assert relative(got.losses, expected.losses) <= TOLERANCE["loss"]
    assert relative(expected.losses, reference(directory, "packed", 2, 2).losses) > 100 * TOLERANCE["loss"]


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotary_embeddings_that_go_by_the_length(
    pool: WorkerPool, pytestconfig: pytest.Config, tmp_path: Path, rope_type: str
) -> None:
    """They see the largest position of all ranks."""
    if rope_type == "dynamic" and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    parameters: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    if rope_type == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0]}
        parameters |= {"original_max_position_embeddings": 14}  # some packed rows have longer documents, some not
    fields = {"max_position_embeddings": 28 if rope_type == "longrope" else 14, "rope_parameters": parameters}
    AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2, **fields)).save_pretrained(tmp_path)
    compare(pool, str(tmp_path), "packed", (1, 1, 2, 1), name=f"llama {rope_type}")


def test_right_padding(pool: WorkerPool) -> None:
    """With experts, whose losses over routers do not count padding."""
    directory = checkpoint("mixtral", num_hidden_layers=2, output_router_logits=True, num_local_experts=4)
    compare(pool, directory, "padded", (1, 1, 2, 1), rows=3, name="mixtral")


def in_eight_bits(directory: str, runs: list[dict[str, Any]]) -> list[History]:
    rest = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "bf16": True}
    return [train(directory, "packed", {**rest, **sizes}) for sizes in runs]


def test_fp8(pool: WorkerPool, pytestconfig: pytest.Config) -> None:
    """As one process, as far as bf16 and scales of each rank's own tokens allow, while the weights are the same."""
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    directory = llama_for(1, 1, hidden_size=64, num_attention_heads=4, intermediate_size=96)
    recipes = ("tensorwise", "rowwise")
    expected = pool.run(1, in_eight_bits, directory, [{"fp8": recipe} for recipe in recipes])[0]
    modes: list[dict[str, Any]] = [
        {"cp_mode": "gather"},
        {"cp_mode": "heads", "torch_compile": True, "torch_compile_backend": "aot_eager"},
    ]
    runs = [{"fp8": recipe, "cp_size": 2, **mode} for recipe in recipes for mode in modes]
    for plain, *histories in pool.run(2, in_eight_bits, directory, [{"cp_size": 2}, *runs]):
        for run, got in zip(runs, histories, strict=True):
            one = expected[recipes.index(run["fp8"])]
            # The first step has a learning rate of 0. Losses of one step and the next are 3 % apart.
            assert relative(got.losses[:2], one.losses[:2]) <= 3e-3 and relative(got.norms[:2], one.norms[:2]) <= 1e-2
            assert relative(got.losses, one.losses) <= 1e-2 and got.losses != plain.losses, run


def dropout_run() -> tuple[int, int, list[list[float]], list[list[float]]]:
    """The parts whose dropout this rank draws, and losses and norms with and without recomputation."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    histories = []
    for recomputes in (False, True):
        options = {"cp_size": 2, "gradient_checkpointing": recomputes, "max_steps": 2}
        args = NanotronTrainingArguments(**training_arguments(**options))
        fields = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.0, "attn_implementation": "sdpa"}
        config = tiny_model("gpt2", **fields).config
        torch.manual_seed(0)
        model = ParallelAuto.from_config(config, args.parallel)
        assert model.streams is not None
        history = History()
        rows = {"train_dataset": samples("packed"), "data_collator": collate, "callbacks": [history]}
        NanotronTrainer(model=model, args=args, **rows).train()
        histories.append(history)
    parts = model.streams.part, model.streams.part_before
    return *parts, [history.losses for history in histories], [history.norms for history in histories]


def test_dropout_is_drawn_for_the_tokens_of_a_rank(pool: WorkerPool) -> None:
    """From a stream of its own on each rank, and the same again where activations are recomputed."""
    results = pool.run(2, dropout_run)
    assert [result[:2] for result in results] == [(0, 0), (1, 1)]
    for _, _, (losses, again), (norms, norms_again) in results:
        assert relative(again, losses) <= 1e-6 and relative(norms_again, norms) <= 1e-6


def test_blocks_that_see_whole_rows(pool: WorkerPool, tmp_path: Path) -> None:
    """Short convolutions, inside of the regions of tensor parallelism, and recomputed."""
    path, documents = tmp_path / "reference.pt", (9, 1, 12)
    torch.save({documents: family_reference("lfm2", (2,), documents)}, path)
    layouts = [
        {"cp_size": 2, "documents": documents, "micro_batches": (2,), **sizes}
        for sizes in (
            {"tp_size": 2},
            {"tp_size": 2, "sequence_parallel": False, "cp_mode": "heads"},
            {"pp_size": 2, "checkpointing": True},
        )
    ]
    for rank in pool.run(4, compare_family, "lfm2", str(path), layouts, {}):
        for errors in rank:
            assert errors["loss"] <= 1e-6 and errors["norm"] <= 1e-5 and errors["gradient"] <= 2e-5, errors


def divided_run(family: str, path: str, layouts: list[dict[str, Any]]) -> tuple[list[dict[str, float]], list[int]]:
    """Errors, and how often a block was called by heads and how often with whole rows."""
    from hf_nanotron.parallel.cp import mixer_heads, whole_region

    calls = [0, 0]

    def counting(index: int, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[index] += 1
            return function(*args, **kwargs)

        return call

    enter = counting(1, whole_region.WholeRowRegion.enter)
    with (
        mock.patch.object(mixer_heads, "to_heads", counting(0, mixer_heads.to_heads)),
        mock.patch.object(whole_region.WholeRowRegion, "enter", lambda *args: enter(*args)),
    ):
        return compare_family(family, path, layouts, {}), calls


BY_HEADS = ("qwen3_next", "nemotron_h", "qwen3_5_text", "olmo_hybrid", "kimi_linear", "lara_mini")


@pytest.mark.parametrize("family", [name for name in BY_HEADS if name in KNOWN])
def test_blocks_with_a_state_for_each_head(
    pool: WorkerPool, pytestconfig: pytest.Config, tmp_path: Path, family: str
) -> None:
    """Mamba-2 and delta rules, divided by heads; recomputed, and inside of the regions of tensor parallelism."""
    if family not in BY_HEADS[:2] and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    path, documents = tmp_path / "reference.pt", (9, 1, 12)
    torch.save({documents: family_reference(family, (2,), documents)}, path)
    layouts = [
        {"cp_size": 2, "documents": documents, "micro_batches": (2,), **sizes}
        for sizes in ({"pp_size": 2, "checkpointing": True}, {"tp_size": 2})
    ]
    for errors, (by_heads, whole) in pool.run(4, divided_run, family, str(path), layouts):
        assert by_heads > 0 and whole == 0
        for error in errors:
            assert error["loss"] <= 1e-6 and error["norm"] <= 1e-5 and error["gradient"] <= 1e-4, error


def test_heads_that_ranks_do_not_divide(pool: WorkerPool, tmp_path: Path) -> None:
    """Every rank computes the whole block: the tiny model has one group."""
    path, documents = tmp_path / "reference.pt", (9, 1, 12)
    torch.save({documents: family_reference("bamba", (2,), documents)}, path)
    layouts = [{"cp_size": 2, "documents": documents, "micro_batches": (2,)}]
    for (error,), (by_heads, whole) in pool.run(2, divided_run, "bamba", str(path), layouts):
        assert by_heads == 0 and whole > 0
        assert error["loss"] <= 1e-6 and error["norm"] <= 1e-5 and error["gradient"] <= 2e-5, error


def compiled_by_heads() -> list[tuple[list[float], list[float]]]:
    """Losses and norms of a model with delta rules, eager and compiled."""
    from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

    found = []
    for compiles in (False, True):
        options = {"cp_size": 2, "max_steps": 2, "torch_compile": compiles}
        if compiles:
            options["torch_compile_backend"] = "aot_eager"
        args = NanotronTrainingArguments(**training_arguments(**options))
        torch.manual_seed(0)
        model = ParallelAuto.from_config(tiny_model("qwen3_next", attn_implementation="sdpa").config, args.parallel)
        history = History()
        data = samples("packed").remove_columns("position_ids")
        NanotronTrainer(model=model, args=args, train_dataset=data, data_collator=collate, callbacks=[history]).train()
        found.append((history.losses, history.norms))
    return found


def test_blocks_by_heads_are_compiled(pool: WorkerPool, pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    for (losses, norms), (compiled_losses, compiled_norms) in pool.run(2, compiled_by_heads):
        assert relative(compiled_losses, losses) <= 1e-6 and relative(compiled_norms, norms) <= 1e-5


def test_bounds_reach_blocks_that_see_whole_rows(pool: WorkerPool, tmp_path: Path) -> None:
    """A delta rule gets the bounds of documents that the batch has, which it needs a package for."""
    if "lara_mini" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such family with a delta rule")
    tiny_model("lara_mini", attn_implementation="sdpa").save_pretrained(tmp_path)
    sentence = "can't keep packed sequences apart"
    with pytest.raises(ValueError, match=sentence):
        reference(str(tmp_path), "bounded", 2, 1)
    with pytest.raises(JobError, match=sentence):
        pool.run(2, train, str(tmp_path), "bounded", {"cp_size": 2})


def test_documents_that_see_each_other_cannot_pass(pool: WorkerPool) -> None:
    """Packed rows whose attention forgets where documents begin miss the tolerance by far."""
    directory = llama_for(1, 1)
    got = pool.run(2, train_without_bounds, directory)[0]
    expected = reference(directory, "packed", 2, 1)
    assert relative(got.losses[:1], expected.losses[:1]) > 100 * TOLERANCE["first loss"]
    assert relative(got.norms, expected.norms) > 10 * TOLERANCE["norm"]


def train_without_bounds(directory: str) -> History:
    from hf_nanotron.training.step import context

    def bounds_of_rows(mesh: Any, rows: int, length: int, bounds: Any, *rest: Any) -> Any:
        filled = context.row_length(mesh, length)
        return make_context_plan(mesh, rows, length, torch.arange(rows + 1) * filled, *rest)

    with mock.patch.object(context, "make_context_plan", bounds_of_rows):
        return train(directory, "packed", {"cp_size": 2, "gradient_accumulation_steps": 2})


def mesh_of(rank: int) -> Any:
    """What dealing a batch reads of a mesh of two ranks."""
    sizes = {"cp_size": 2, "tp_size": 1, "parallel": ParallelConfig(cp_size=2)}
    return SimpleNamespace(cp_rank=rank, cp=Group((0, 1), rank, None), device=torch.device("cpu"), **sizes)


def test_what_a_batch_says_is_dealt_as_it_is() -> None:
    """Labels that are shifted already, positions that do not begin at 0 (or of one row for all), columns by token."""
    ids = torch.arange(1, 1 + 2 * LENGTH).view(2, LENGTH)
    batch = {
        "input_ids": ids,
        "labels": ids,
        "shift_labels": ids.masked_fill(ids % 3 == 0, -100),
        "position_ids": torch.arange(7, 7 + LENGTH)[None],
        "domain": ids % 5,
    }
    ranks = [deal(batch, mesh_of(rank), Attention("torch", True, (None,))) for rank in (0, 1)]
    places = torch.cat([rank["input_ids"] for rank in ranks], 1).sort().indices[:, -LENGTH:]  # ids ascend, 0 fills up
    for name, value in batch.items():
        joined = torch.cat([rank[name] for rank in ranks], 1)
        assert torch.equal(joined.gather(1, places), value.expand(2, LENGTH)), name


def test_positions_are_where_the_batch_is() -> None:
    """In evaluation the batch has been brought to the device before."""
    dealt = deal(
        {"input_ids": torch.zeros(2, LENGTH, dtype=torch.int64, device="meta")},
        mesh_of(1),
        Attention("torch", True, (None,)),
    )
    assert {name: value.device.type for name, value in dealt.items() if name != CONTEXT} == dict.fromkeys(
        ("input_ids", "position_ids", "counted_tokens"), "meta"
    )


def test_what_is_slow_or_seen_in_part_is_said() -> None:
    """Heads that no kernel takes, and hooks that see the tokens of one rank."""
    model = ParallelAuto.from_config(tiny_config(head_dim=12), parallel=ParallelConfig())
    with mock.patch.object(context_attention.logger, "warning") as warning:
        for dtype in (torch.float32, torch.bfloat16):
            with mock.patch("torch.cuda.get_device_capability", lambda device: (9, 0)):
                choose_context_attention(model, dtype, torch.device("cuda"))
        assert all("attention heads of 12 features" in call.args[0] for call in warning.call_args_list)
        assert warning.call_count == 2
        choose_context_attention(model, torch.float32, torch.device("cpu"))
        assert warning.call_count == 2
    cut = SimpleNamespace(
        mesh=SimpleNamespace(tp_size=1, cp_size=2), anatomy=model.anatomy, named_modules=model.named_modules
    )
    with mock.patch.object(custom_loss.logger, "warning") as warning:
        custom_loss.LossChoice._warn_of_parts(SimpleNamespace(model=cut))  # type: ignore[arg-type]
        assert not warning.called
        model.get_submodule("model.layers.2").register_forward_hook(lambda *_: None)
        custom_loss.LossChoice._warn_of_parts(SimpleNamespace(model=cut))  # type: ignore[arg-type]
    assert "is hooked to model.layers.2 of a model whose rows 2 ranks share" in warning.call_args.args[0]
    model.mesh.close()


def test_layers_whose_heads_differ(tmp_path: Path) -> None:
    """Gemma 4's config refuses to tell one size for all of them."""
    tiny_model("gemma4_text", attn_implementation="sdpa").save_pretrained(tmp_path)
    model = ParallelAuto.from_pretrained(tmp_path, parallel=ParallelConfig())
    config = model.config.get_text_config()
    assert config.is_heterogeneous and len({layer.head_dim for layer in config.per_layer_config}) == 2
    attention, _ = choose_context_attention(model, torch.float32, torch.device("cpu"))
    weights = sum(active_weights(name, shape, config) for name, shape in model.hub_shapes.items())
    widths = [2 * layer.num_attention_heads * layer.head_dim for layer in config.per_layer_config]
    assert attention.other_work == round(weights * len(widths) / sum(widths))
    cut = SimpleNamespace(config=config, mesh=SimpleNamespace(tp_size=1, cp_size=3))
    assert "that cp_size divides" in str(context_attention._why_not_by_heads(cut))  # type: ignore[arg-type]
    model.mesh.close()


# ---- refusals ----


def refusals() -> dict[str, str]:
    """What is said of each that context parallelism cannot have."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    told = {}

    def attempt(name: str, model: Any = None, data: Any = collate, trainer: Any = None, **options: Any) -> None:
        def run() -> None:
            args = NanotronTrainingArguments(**training_arguments(**{"cp_size": 2, **options}))
            config = tiny_config() if model is None else model
            made = ParallelAuto.from_config(config, parallel=args.parallel, **(trainer or {}).pop("of_model", {}))
            rows = {"train_dataset": samples("padded"), "data_collator": data}
            NanotronTrainer(model=made, args=args, **rows, **(trainer or {})).train()

        told[name] = message(run)

    attempt("stock attention", attention="stock")
    attempt("convolutions", tiny_model("zaya", attn_implementation="sdpa").config)
    attempt("dropout", tiny_config(attention_dropout=0.1))
    attempt("not causal", tiny_config(is_causal=False))
    attempt("heads", tiny_config(num_attention_heads=3, num_key_value_heads=3, hidden_size=24), cp_mode="heads")
    attempt("named attention", trainer={"of_model": {"attn_implementation": "eager"}})
    attempt("own loss", trainer={"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.sum()})
    attempt("label smoothing", label_smoothing_factor=0.1)
    attempt("left padding", data=left_padded)
    attempt("positions of three axes", data=with_three_axes)
    attempt("another column", data=lambda rows: {**collate(rows), "token_type_ids": collate(rows)["input_ids"]})
    return told


def left_padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: value.flip(1) for name, value in collate(rows).items()}


def with_three_axes(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = collate(rows)
    return {**batch, "position_ids": torch.arange(LENGTH).expand(3, len(rows), LENGTH)}


REFUSALS = {
    "stock attention": "attention='stock' with cp_size=2: the model's own attention would see the tokens of one rank",
    "convolutions": "cp_size=2 is not supported for ZayaForCausalLM: convolutions in its attention mix neighbouring",
    "dropout": "attention_dropout above 0",
    "not causal": "cp_size=2 is not supported for LlamaForCausalLM: its config has is_causal=False; use cp_size=1.",
    "heads": "cp_mode='heads' needs attention heads (3 / tp_size=1) that cp_size divides, or cp_mode='gather'",
    "named attention": "attn_implementation was given",
    "own loss": "cp_size=2 with compute_loss_func: a rank has its tokens' logits alone",
    "label smoothing": "cp_size=2 with label_smoothing_factor: a rank has its tokens' logits alone",
    "left padding": "cp_size=2: a batch with attention_mask, input_ids, labels needs an attention mask, which",
    "positions of three axes": "cp_size=2: the batches have position_ids [3, 1, 22] for tokens [1, 22], which",
    "another column": "cp_size=2: the batches have token_type_ids",
}


def refused_on_one_stage() -> str:
    """What is in the way may be in the blocks of one stage alone."""
    parallel = ParallelConfig(pp_size=2)
    model = ParallelAuto.from_config(tiny_config(), parallel=parallel)
    reason = "a block of it" if model.mesh.is_first_stage else None
    with mock.patch.object(context_attention, "why_not", lambda _: reason):
        choose = functools.partial(choose_context_attention, model, torch.float32, torch.device("cpu"))
        return message(lambda: all_or_none(model.mesh, "choosing", choose))


def test_no_stage_waits_for_one_that_is_refused(pool: WorkerPool) -> None:
    assert len(said := set(pool.run(2, refused_on_one_stage))) == 1 and "a block of it" in said.pop()


def test_what_cannot_work_is_refused_on_every_rank(pool: WorkerPool) -> None:
    for told in pool.run(2, refusals):
        for name, sentence in REFUSALS.items():
            assert sentence in told[name], told[name]

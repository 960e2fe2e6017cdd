"""Attention that is one operator, and packed documents: the losses and gradients of stock eager attention.

Here the kernel is the one that runs anywhere (`by_document`); `test_gpu_attention.py` has the others. All go through
the same operator, the same registration with transformers and the same training step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_runs import KNOWN, tiny_model
from pool import WorkerPool
from torch.nn import functional as F
from transformers import AutoConfig

from hf_nanotron.models.stock.anatomy import dissect
from hf_nanotron.models.stock.families import FAST_ATTENTION, NO_DOCUMENTS
from hf_nanotron.ops.attention import Case, attention, pick
from hf_nanotron.ops.kernels import attention as attention_kernels
from hf_nanotron.ops.kernels.attention import KERNELS, Problem, Saved
from hf_nanotron.prepare.attention import (
    Attention,
    Documents,
    choose_attention,
    document_inputs,
    documents_of,
    why_stock,
)

LOSS, GRADIENT = 1e-6, 1e-5
CPU = torch.device("cpu")
LENGTH = 12
ROWS = [[5, 7], [9, 3]]  # documents of the rows of a batch
DEFAULT = ("llama", "qwen2", "mistral", "gemma3_text", "gpt2", "deepseek_v3", "mixtral", "opt")


def bounds_of(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([0, *(length for row in rows for length in row)]).cumsum(0).to(torch.int32)


def positions_of(rows: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def ids_of(rows: int, seed: int = 3, vocabulary: int = 100) -> torch.Tensor:
    return torch.randint(3, vocabulary, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


# ---- the operator ----


def masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor | None, window: int | None, scale: float
) -> torch.Tensor:
    """torch's operator with a whole mask."""
    batch, length = q.shape[:2]
    place = torch.arange(length)
    distance = place[:, None] - place[None, :]
    seen = ((distance >= 0) & (distance < (window or length))).expand(batch, 1, length, length)
    if bounds is not None:
        document = torch.bucketize(torch.arange(batch * length), bounds[1:].long(), right=True).view(batch, length)
        seen = seen & (document[:, None, :, None] == document[:, None, None, :])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("value_dim", [8, 6])
@pytest.mark.parametrize("block", [4, 256, None])
def test_operator(
    packed: bool, window: int | None, value_dim: int, block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradients, with fewer key-value heads than heads, from views that are not contiguous.

    `block`: queries at once of `by_document`; None: torch's kernel on a CPU, which has no windows.
    """
    kernel = "by_document" if block is not None or window is not None else "cpu_flash"
    monkeypatch.setattr("hf_nanotron.ops.kernels.attention.QUERIES_AT_ONCE", block or 256)
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, 8), (2, 8), (2, value_dim))
    leaves = [torch.randn(2, h, LENGTH, d, generator=generator, requires_grad=True) for h, d in sizes]
    inputs = [x.transpose(1, 2) for x in leaves]
    bounds = bounds_of(ROWS) if packed else None
    weight = torch.randn(2, LENGTH, 4, value_dim, generator=generator)
    expected = masked(*inputs, bounds, window, 0.3)
    gradients = torch.autograd.grad((expected * weight).sum(), leaves)
    longest = torch.tensor(9) if packed else None
    found = attention(*inputs, kernel, 0.3, window, bounds, longest)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad((found * weight).sum(), leaves), gradients, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < GRADIENT


class FakeFlashAttention4:
    """Its two functions, with the arguments that ours are to give them, on top of `by_document`."""

    @staticmethod
    def _problem(q: torch.Tensor, k: torch.Tensor, options: dict[str, Any]) -> Problem:
        bounds, window = options.get("cu_seqlens_q"), options.get("window_size_left")
        assert options["causal"] and (bounds is None) == (q.dim() == 4) and options.get("window_size_right", 0) == 0
        keys = options.get("cu_seqlens_k")
        longest = [x.shape[1] if each is None else int(each.diff().max()) for x, each in ((q, bounds), (k, keys))]
        assert options.get("max_seqlen_q", longest[0]) == longest[0]
        assert options.get("max_seqlen_k", longest[1]) == longest[1]
        window = None if window is None else window + 1
        return Problem(bounds, longest[0], options["softmax_scale"], window, keys, longest[1])

    def _flash_attn_fwd(self, q: Any, k: Any, v: Any, return_lse: bool, **options: Any) -> Any:
        problem, rows = self._problem(q, k, options), q.shape[0]
        q, k, v = (x if x.dim() == 4 else x[None] for x in (q, k, v))
        output, sums = KERNELS["by_document"].forward(q, k, v, problem)
        if problem.bounds is None:
            return output, sums.unflatten(1, (rows, -1)).transpose(0, 1)
        return output[0], sums

    def _flash_attn_bwd(
        self, q: Any, k: Any, v: Any, out: Any, dout: Any, lse: Any, *, deterministic: bool, dq: Any, dk: Any, dv: Any,
        **options: Any,
    ) -> Any:  # fmt: skip
        problem = self._problem(q, k, options)
        lse = lse.transpose(0, 1).flatten(1) if problem.bounds is None else lse
        dout, q, k, v, out = (x if x.dim() == 4 else x[None] for x in (dout, q, k, v, out))
        found = KERNELS["by_document"].backward(dout, Saved(q, k, v, out, lse), problem)
        return [memory.copy_(x.view(memory.shape)) for memory, x in zip((dq, dk, dv), found, strict=True)]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_flash_attention_4_is_called_right(monkeypatch: pytest.MonkeyPatch, packed: bool, window: int | None) -> None:
    monkeypatch.setattr(attention_kernels, "flash_attention_4", lambda: (FakeFlashAttention4(), ""))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, LENGTH, h, 8, generator=generator, requires_grad=True) for h in (4, 2, 2)]
    rest = (0.3, window, bounds_of(ROWS), torch.tensor(9)) if packed else (0.3, window)
    expected, found = (attention(*inputs, kernel, *rest) for kernel in ("by_document", "fa4"))
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, generator=generator)
    gradients = (torch.autograd.grad((output * weight).sum(), inputs) for output in (found, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("whole", [False, True])
def test_flash_attention_4_is_called_right_with_more_keys(monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    monkeypatch.setattr(attention_kernels, "flash_attention_4", lambda: (FakeFlashAttention4(), ""))
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 5, 6], [0, 9, 12, 14]))
    q, k, v, grad = (torch.randn(1, n, h, 8, generator=generator) for n, h in ((6, 4), (14, 2), (14, 2), (6, 4)))
    problem = Problem(None, 6, 0.3, 4, None, 14) if whole else Problem(queries, 5, 0.3, 4, keys, 9)
    results = []
    for name in ("by_document", "fa4"):
        output, sums = KERNELS[name].forward(q, k, v, problem)
        results.append((output, *KERNELS[name].backward(grad, Saved(q, k, v, output, sums), problem)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("case", "kernel"),
    [
        (Case(True, torch.bfloat16, 128, False, None), "fa4"),
        (Case(True, torch.bfloat16, 128, True, 8), "fa4"),
        (Case(True, torch.bfloat16, 192, False, None), None),  # torch's own operator
        (Case(True, torch.bfloat16, 192, True, None), "flash"),
        (Case(True, torch.bfloat16, 192, False, 8), "flash"),
        (Case(True, torch.bfloat16, 36, True, None), "by_document"),
        (Case(True, torch.float32, 64, True, None), "by_document"),
        (Case(True, torch.float32, 64, False, None), None),
        (Case(False, torch.bfloat16, 64, True, None), "cpu_flash"),
        (Case(False, torch.bfloat16, 64, True, 8), "by_document"),
    ],
)
def test_kernels(case: Case, kernel: str | None) -> None:
    assert pick(("fa4", "flash"), case) == kernel
    without = "flash" if case.packed else None
    assert pick(("flash",), case) == (without if kernel == "fa4" else kernel)


# ---- what a batch needs ----


def batch_of(**more: Any) -> dict[str, Any]:
    ids = ids_of(2)
    return {"input_ids": ids, "labels": ids.clone(), **more}


def padded_on_the_right() -> dict[str, Any]:
    batch = batch_of(attention_mask=torch.ones(2, LENGTH, dtype=torch.long))
    batch["attention_mask"][0, 9:] = 0
    batch["labels"][0, 9:] = -100
    return batch


def test_documents() -> None:
    plain = documents_of(batch_of())
    assert plain is not None and not plain.packed and plain.longest == LENGTH
    assert documents_of(batch_of(position_ids=torch.arange(LENGTH)[None])) is not None  # one row of positions for all
    found = documents_of(batch_of(position_ids=positions_of(ROWS)))
    assert found is not None and found.packed and found.longest == 9
    assert found.bounds.dtype == torch.int32 and torch.equal(found.bounds, bounds_of(ROWS))
    filled = documents_of(batch_of(position_ids=positions_of(ROWS)), multiple=8)
    assert filled is not None and torch.equal(filled.bounds, bounds_of([[5, 7, 4], [9, 3, 4]]))
    whole = documents_of(batch_of(), multiple=8)
    assert whole is not None and torch.equal(whole.bounds, bounds_of([[16], [16]]))
    # As in transformers: an attention mask, also one of ones, says that positions mean no documents.
    masked = documents_of(batch_of(position_ids=positions_of(ROWS), attention_mask=torch.ones(2, LENGTH)))
    assert masked is not None and not masked.packed
    right = documents_of(padded_on_the_right())
    assert right is not None and not right.packed


def test_batches_that_need_a_mask() -> None:
    left, hole, predicted = padded_on_the_right(), padded_on_the_right(), padded_on_the_right()
    left["attention_mask"] = left["attention_mask"].flip(1)
    hole["attention_mask"][0, 3] = 0
    predicted["labels"][0, 10] = 5
    others = (
        batch_of(attention_mask=torch.ones(2, 1, LENGTH, LENGTH)),
        batch_of(token_type_ids=torch.zeros(2, LENGTH)),  # may let images see themselves
        batch_of(cu_seq_lens_q=bounds_of(ROWS)),  # without positions: stock's own attention leaves it alone
        batch_of(position_ids=positions_of(ROWS)[None].expand(3, 2, LENGTH)),
    )
    for batch in (left, hole, predicted, *others):
        assert documents_of(batch) is None


# ---- families ----


def batches_of(family: str) -> dict[str, dict[str, Any]]:
    packed = batch_of(position_ids=positions_of(ROWS))
    batches = {"plain": batch_of(), "padded": padded_on_the_right(), "packed": packed}
    for batch in batches.values():
        vocabulary = AutoConfig.for_model(family, **KNOWN[family]["config"]).get_text_config().vocab_size
        batch["input_ids"] = batch["input_ids"] % min(vocabulary, 100)
        batch["labels"] = torch.where(batch["labels"] < 0, batch["labels"], batch["input_ids"])
    return batches


def with_window(family: str) -> dict[str, Any]:
    """Fields of a config that give some layers a window of 4 tokens; none if the family knows no windows."""
    config = AutoConfig.for_model(family, **KNOWN[family]["config"]).get_text_config()
    if not hasattr(config, "sliding_window"):
        return {}
    fields: dict[str, Any] = {"sliding_window": 4}
    fields |= {"use_sliding_window": True} if hasattr(config, "use_sliding_window") else {}
    fields |= {"max_window_layers": 1} if hasattr(config, "max_window_layers") else {}
    kinds = getattr(config, "layer_types", None)
    if kinds and set(kinds) <= {"sliding_attention", "full_attention"}:
        fields["layer_types"] = (["sliding_attention", "full_attention"] * len(kinds))[: len(kinds)]
    return fields


def run(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    loss = loss.detach()
    zero = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    return float(loss), {name: zero[name] if p.grad is None else p.grad for name, p in model.named_parameters()}


def fast_families() -> list[str]:
    kinds = {
        family: AutoConfig.for_model(family, **case["config"]).get_text_config().model_type
        for family, case in KNOWN.items()
    }
    return [
        family
        for family, kind in kinds.items()
        if kind in FAST_ATTENTION and not KNOWN[family].get("inputs") and family != "gemma3n"  # its images need timm
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "any_family" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--full-matrix")
        metafunc.parametrize("any_family", fast_families() if everything else DEFAULT)


def test_families(any_family: str) -> None:
    """Without any mask made by transformers, in rows that are whole, padded and packed."""
    window = with_window(any_family)
    for overrides in [{}] + [window] * bool(window):
        ours = tiny_model(any_family, attn_implementation=None, **overrides).train()
        assert why_stock(dissect(ours)) is None
        for name, batch in batches_of(any_family).items():
            documents = documents_of(batch)
            assert documents is not None and documents.packed == (name == "packed")
            if documents.packed and ours.config.get_text_config().model_type in NO_DOCUMENTS:
                continue
            loss, gradients = run(tiny_model(any_family, **overrides).train(), batch)
            ours.zero_grad()
            told = document_inputs(documents, CPU) if documents.packed else {}
            with Attention("torch", True).training(ours.config, documents.packed):
                our_loss, our_gradients = run(ours, {**batch, **told})
            assert abs(our_loss / loss - 1) < LOSS
            norm = torch.stack([g.norm() for g in gradients.values()]).norm()
            for parameter, gradient in gradients.items():
                error = float((our_gradients[parameter] - gradient).norm() / (gradient.norm() + 1e-4 * norm))
                # Gemma 4 scales its heads by one, and its gradients by rounding errors of large scores.
                assert error < GRADIENT * (5 if any_family.startswith("gemma4") else 1), (name, parameter)
        assert ours.config.get_text_config()._attn_implementation == "sdpa"
        assert "hf_nanotron" not in ours.config.to_json_string()


def test_documents_do_not_see_each_other() -> None:
    """A packed row is as good as its documents alone."""
    model = tiny_model("llama", attn_implementation=None).train()
    ids = ids_of(1)
    parts = [ids[:, :5], ids[:, 5:]]
    alone = sum(model(input_ids=part, labels=part, num_items_in_batch=1).loss for part in parts)
    labels = ids.clone()
    labels[:, 5] = -100
    documents = Documents(bounds_of([[5, 7]]), 7, True)
    with Attention("torch", True).training(model.config, True):
        inputs = {"input_ids": ids, "labels": labels, "position_ids": positions_of([[5, 7]])}
        packed = model(**inputs, num_items_in_batch=1, use_cache=False, **document_inputs(documents, CPU)).loss
    assert abs(float((packed / alone).detach()) - 1) < LOSS


# ---- the choice ----


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_nanotron.prepare import attention as module

    def choose(family: str, asked: str = "auto", dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Any:
        model = tiny_model(family, attn_implementation=overrides.pop("attn_implementation", None), **overrides)
        return choose_attention(dissect(model), dtype, torch.device("cuda"), asked)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(module, "flash_attention_4", lambda: (None, "no module"))
    found, sentence = choose("llama")
    assert found == Attention("torch", True) and "pip install hf-nanotron[flash]" in sentence
    monkeypatch.setattr(module, "flash_attention_4", lambda: (object(), ""))
    assert choose("llama")[0] == Attention("fa4", True)
    assert choose("nemotron")[0] == Attention("fa4", False)
    refused = (
        (choose("llama", "stock"), ""),
        (choose("llama", dtype=torch.float32), "float32"),
        (choose("llama", attention_dropout=0.1), "attention_dropout"),
        (choose("llama", attn_implementation="eager"), "sdpa"),
        (choose("llama", is_causal=False), "its config has is_causal=False"),
        (choose("gemma2"), "sdpa"),  # soft-caps: stock attends eagerly
        (choose("qwen3_next"), "not tested"),
    )
    for (found, sentence), reason in refused:
        assert found is None and sentence.startswith("attention: the model's own") and reason in sentence
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert choose("llama")[0] == Attention("torch", True)


def test_peculiar_attention_is_refused() -> None:
    model = tiny_model("llama", attn_implementation=None, attention_dropout=0.5).train()
    with Attention("torch", True).training(model.config, False), pytest.raises(ValueError, match="dropout"):
        model(**batch_of())
    model = tiny_model("llama", attn_implementation=None).train()
    with Attention("torch", True).training(model.config, True), pytest.raises(ValueError, match="document boundaries"):
        model(**batch_of())


# ---- a training step on ranks ----

PACKINGS = ([[5, 7]], [[12]], [[1, 1, 4, 6]], [[3, 9]], [[2, 2, 2, 2, 4]], [[11, 1]])


def steps(kind: str, dp_rank: int = 0, dp_size: int = 1) -> list[list[dict[str, Any]]]:
    """Micro-batches of three steps of two."""
    batches = []
    for index, rows in enumerate(PACKINGS):
        ids = ids_of(1, seed=index)
        batch: dict[str, Any] = {"input_ids": ids, "labels": ids.clone()}
        if kind.startswith("packed"):
            batch["position_ids"] = positions_of(rows)
        elif kind != "plain":
            batch["attention_mask"] = torch.ones_like(ids)
            batch["attention_mask"][:, 12 - index :] = 0
            batch["labels"][:, 12 - index :] = -100
            if kind == "padded left":
                batch = {name: x.flip(1) for name, x in batch.items()}
                batch["labels"][:, : index + 1] = -100  # also what the last token of the padding would predict
        if kind == "packed, ragged" and index % 2:
            batch = {name: x[:, :11] for name, x in batch.items()}
        batches.append(batch)
    pairs = [batches[i : i + 2] for i in range(0, len(batches), 2)]
    for pair in pairs:
        count = torch.tensor(sum(int((b["labels"][:, 1:] != -100).sum()) for b in pair))
        for batch in pair:
            batch["num_items_in_batch"] = count
    return pairs


def expected_steps(family: str, kind: str) -> list[Any]:
    model, found = tiny_model(family).train(), []
    for pair in steps(kind):
        model.zero_grad()
        loss = sum(run(model, batch)[0] for batch in pair)
        found.append((loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    return found


@pytest.mark.parametrize(
    ("family", "kind", "sizes", "more"),
    [
        ("llama", "packed, ragged", {"tp_size": 2, "pp_size": 2}, {"checkpointing": True}),
        ("llama", "packed", {}, {"compiled": "inductor"}),
        ("mistral", "packed", {}, {"compiled": "aot_eager"}),
        ("qwen3", "padded", {"pp_size": 2}, {}),
        ("qwen3", "padded left", {}, {}),
        ("qwen3", "plain", {}, {"compiled": "aot_eager", "checkpointing": True}),
        ("qwen3_moe", "padded", {"tp_size": 2, "ep_size": 2}, {}),
    ],
)
def test_steps(
    pool: WorkerPool,
    tmp_path: Path,
    pytestconfig: pytest.Config,
    family: str,
    kind: str,
    sizes: dict[str, Any],
    more: dict[str, Any],
) -> None:
    if more.get("compiled") == "inductor" and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    path = str(tmp_path / "expected")
    torch.save(expected_steps(family, kind), path)
    world = sizes.get("tp_size", 1) * sizes.get("pp_size", 1)
    names = {"padded left": "sdpa", "padded": "hf_nanotron_torch", "plain": "hf_nanotron_torch"}
    for loss, gradient, anew, used in pool.run(world, take_steps, family, kind, path, sizes, more):
        assert loss < LOSS and gradient < GRADIENT and anew == 0
        assert used == names.get(kind, "hf_nanotron_torch_packed")


def take_steps(family: str, kind: str, path: str, sizes: dict[str, Any], more: dict[str, Any]) -> Any:
    """Errors of losses and gradients, graphs captured after the first step, and the attention in the last."""
    from torch._dynamo.utils import counters

    from hf_nanotron.models.sharding.parallelize import parallelize
    from hf_nanotron.parallel.collectives import all_reduce
    from hf_nanotron.parallel.config import ParallelConfig
    from hf_nanotron.parallel.mesh import ParallelMesh
    from hf_nanotron.prepare.compile import compile_layers
    from hf_nanotron.prepare.shard_weights import shard_weights
    from hf_nanotron.prepare.training_state import TrainingState
    from hf_nanotron.training.step.train_step import TrainStep

    torch._dynamo.reset()
    counters.clear()
    mesh = ParallelMesh(ParallelConfig(**sizes))
    model = parallelize(tiny_model(family, attn_implementation=None), mesh)
    if more.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = shard_weights(model, torch.float32, 1 << 16)
    if more.get("compiled"):
        compile_layers(model, more["compiled"], None)
    used: list[str] = []
    config = model.config.get_text_config()
    for layer in model.anatomy.decoder_layers():  # outside of what is compiled
        layer.register_forward_pre_hook(lambda *_: used.append(config._attn_implementation))
    step = TrainStep(TrainingState(model, weights, attention=Attention("torch", True)))
    losses, gradients, graphs = [0.0], [0.0], 0
    for index, (batches, (expected_loss, expected)) in enumerate(zip(steps(kind), torch.load(path), strict=True)):
        loss = step.run(batches, index)
        loss = loss if mesh.is_last_stage and mesh.tp_rank == 0 else torch.zeros(())
        losses.append(abs(float(all_reduce(loss.detach().clone(), mesh.world)) / expected_loss - 1))
        norm = torch.stack([g.norm() for g in expected.values()]).norm()
        for segment in weights.segments:
            whole = expected[segment.spec.name]
            wanted = segment.spec.slice(whole).reshape(-1)[segment.start : segment.stop]
            gradients.append(float((segment.gradient - wanted).norm() / (whole.norm() + 1e-4 * norm)))
        if index == 0:
            graphs = counters["stats"]["unique_graphs"]
    anew = counters["stats"]["unique_graphs"] - graphs + sum(counters["graph_break"].values())
    assert config._attn_implementation == "sdpa"
    mesh.close()
    return max(losses), max(gradients), anew, used[-1]


# ---- the trainer ----


def test_trainer(pool: WorkerPool) -> None:
    """Samples joined by the collator of transformers, with and without ours: the same losses, norms and weights."""
    ((stock, none), (ours, used)) = pool.run(1, train_twice)[0]
    assert none == {"sdpa"} and used == {"hf_nanotron_torch_packed"}
    for expected, found in zip(stock, ours, strict=True):
        assert abs(found / expected - 1) < GRADIENT


def train_twice() -> list[Any]:
    """For stock attention and ours: losses and norms, and the names of the attention that ran."""
    from tiny import History, random_dataset, tiny_config, training_arguments
    from transformers import DataCollatorWithFlattening, set_seed

    from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments

    results = []
    for chosen in (None, Attention("torch", True)):
        set_seed(1)
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
        history, used, config = History(), set(), model.config
        for _, block in model.anatomy.blocks():
            block.register_forward_pre_hook(lambda *_, used=used, config=config: used.add(config._attn_implementation))
        trainer = NanotronTrainer(
            model=model,
            args=NanotronTrainingArguments(**training_arguments(per_device_train_batch_size=3, max_steps=3)),
            train_dataset=random_dataset(9, ragged=True),
            data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True),
            callbacks=[history],
        )
        assert trainer.training_state.attention is None  # on a CPU
        trainer.training_state.attention = chosen
        trainer.train()
        results.append(([*history.losses, *history.norms], used))
        model.mesh.close()
    return results

"""Losses over routers, their loads and their precision, against stock models, plain autograd and other references."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from family_runs import FAMILIES as CONFIGS
from pool import WorkerPool
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from hf_nanotron.models.moe.balance import (
    UNLIKE_EXPERTS,
    BiasBalancer,
    RouterLoads,
    chosen_experts,
    correction_bias,
    load_report,
    num_choices,
)
from hf_nanotron.models.moe.routers import (
    Record,
    RouterLosses,
    RouterRecorder,
    find_routers,
    fp32_router,
    router_losses,
    sum_records,
)
from hf_nanotron.parallel.collectives import copy_to, reduce_from, split_sequence
from hf_nanotron.parallel.ep.router_loss import (
    RouterSums,
    add,
    auxiliary_loss,
    empty,
    pack,
    scale_gradient,
    sum_over_ranks,
    sum_over_tokens,
    unpack,
    z_loss,
)
from hf_nanotron.parallel.mesh import Group

AUXILIARY = """
    deepseek_v4 ernie4_5_moe flex_olmo flint gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared jamba
    laguna lara_mini mellum minimax minimax_m2 minimax_m3_vl_text mixtral olmoe phimoe qwen2_moe qwen3_5_moe
    qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp qwen4_exp_text
""".split()
BIASED = """
    afmoe axk1 axk2 bailing_hybrid beam deepseek_v3 deepseek_v32 deepseek_v4 dots1 dots3_note dots3_note_text
    ernie4_5_moe exaone_moe glm4_moe glm4_moe_lite glm_moe_dsa hy_v3 hy_v4 inkling2_loop_text inkling2_text inkling_text
    kimi_linear kolibri1 laguna lfm2_moe longcat_flash mimo_v2_flash minimax_m2 minimax_m3_vl_text nemotron_h sarvam_mla
    sarvam_moe solar_open
""".split()
# Others with routers.
BIASED_BY_PARAMETERS = ("afmoe", "ernie4_5_moe", "laguna")  # frozen ones, which are rounded and divided like weights
UNBIASED = "aria_text cohere2_moe deepseek_v2 gemma4 gemma4_text hunyuan_v1_moe llama4 llama4_text zaya".split()
ROUTED = sorted({*AUXILIARY, *BIASED, *UNBIASED} & CONFIGS.keys())


@cache
def _prototype(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **CONFIGS[family]["config"])
    config.get_text_config().initializer_range = 0.2  # experts that differ in load
    if family == "phimoe":
        config.router_jitter_noise = 0.0
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for router in find_routers(model):  # some families start their routers with zeros
            for parameter in router.module.parameters():
                if parameter.dim() > 1 and parameter.requires_grad:
                    parameter.normal_(std=0.5)
        for name, table in model.named_buffers():
            if name.endswith("tid2eid"):
                # One expert for all tokens, as such tables start, has all of their weight: its gradient is rounding.
                tokens, choices = table.shape
                table.copy_((torch.arange(tokens)[:, None] + torch.arange(choices)) % config.num_local_experts)
    return model


def _model(family: str) -> PreTrainedModel:
    return copy.deepcopy(_prototype(family)).train()


def _batch(seed: int = 0, padded: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 100, (2, 12), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if padded:
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, 9:] = 0
        batch["labels"][0, 9:] = -100
    return batch


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _assert_close(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float, floor: float = 1e-7
) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).norm() / gradient.norm().clamp(min=floor)
        assert error < tolerance, (name, float(error))


def _our_loss(model: Any, batch: dict[str, torch.Tensor], losses: RouterLosses) -> tuple[torch.Tensor, RouterSums]:
    """The stock loss without the stock auxiliary loss, and our sums."""
    recorder = RouterRecorder(find_routers(model))
    with recorder.recording() as records:
        output = model(**batch, output_router_logits=False, use_cache=False)
    sums = sum_records(empty(losses.num_experts), records, losses, batch.get("attention_mask"))
    recorder.remove()
    return output.loss, sums


# ---- Against stock models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in ROUTED if f in AUXILIARY])
def test_auxiliary_loss_is_that_of_the_stock_model(family: str) -> None:
    """Value and every gradient, with a padding mask, and a coefficient at which the loss matters."""
    theirs, ours = _model(family), _model(family)
    theirs.router_aux_loss_coef = ours.router_aux_loss_coef = 1.0  # type: ignore[assignment]
    batch = _batch(padded=True)
    torch.manual_seed(1)
    output = theirs(**batch, output_router_logits=True, use_cache=False)
    output.loss.backward()
    losses = router_losses(ours, output_router_logits=True)
    assert losses is not None and losses.coefficient == 1.0
    torch.manual_seed(1)
    loss, sums = _our_loss(ours, batch, losses)
    torch.testing.assert_close(auxiliary_loss(sums), output.aux_loss, rtol=1e-6, atol=0)
    assert (auxiliary_loss(sums) - losses.top_k).abs() > 1e-3  # not the value of uniform routing
    (loss + losses.total(sums)).backward()
    _assert_close(_gradients(ours), _gradients(theirs), 1e-5)
    # The loss reaches the routers: without it their gradients are others.
    bare = _model(family)
    torch.manual_seed(1)
    bare(**batch, output_router_logits=False, use_cache=False).loss.backward()
    router = next(r for r in find_routers(bare))
    name = next(f"{router.name}.{n}" for n, p in router.module.named_parameters() if p.requires_grad)
    whole, part = _gradients(theirs)[name], _gradients(bare).get(name, torch.zeros(()))
    assert (whole - part).norm() > 1e-2 * whole.norm()


def test_auxiliary_loss_without_a_mask_and_from_the_config() -> None:
    theirs, ours = _model("mixtral"), _model("mixtral")
    theirs.config.output_router_logits = ours.config.output_router_logits = True
    batch = _batch()
    expected = theirs(**batch)
    losses = router_losses(ours)
    assert losses == RouterLosses(8, 2, 0.001, 0.0)
    loss, sums = _our_loss(ours, batch, losses)
    torch.testing.assert_close(loss + losses.total(sums), expected.loss, rtol=1e-6, atol=0)
    assert int(sums.tokens) == 4 * 24 and int(sums.counts.sum()) == 2 * 4 * 24


def test_losses_are_on_where_stock_has_them() -> None:
    """No family but those has a load-balancing loss, whatever its config says."""
    for family in ROUTED:
        model = _prototype(family)
        with_flag = router_losses(model, output_router_logits=True)
        assert (with_flag is not None) == (family in AUXILIARY), family
        assert router_losses(model) is None, family  # off by default
    config = AutoConfig.for_model("deepseek_v3", **CONFIGS["deepseek_v3"]["config"], router_z_loss_coef=0.01)
    assert router_losses(AutoModelForCausalLM.from_config(config)) == RouterLosses(0, 0, 0.0, 0.01)


# ---- The sums ---------------------------------------------------------------------------------------------------


def _reference(logits: list[torch.Tensor], mask: torch.Tensor | None, top_k: int) -> torch.Tensor:
    """Both losses of several layers in plain autograd, by functions of transformers."""
    auxiliary = load_balancing_loss_func(tuple(logits), logits[0].shape[-1], top_k, mask)
    rows = torch.cat(logits)
    if mask is not None:
        rows = rows[mask.flatten().bool().repeat(len(logits))]
    return auxiliary + 0.3 * router_z_loss_func(rows.unsqueeze(0))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_stages_that_pass_the_sums_on(stages: int, masked: bool) -> None:
    """Each stage sees its layers and the received tensor alone; gradients are handed over as the pipeline does."""
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(24, 8, generator=generator, dtype=torch.float64) * 2 for _ in range(4)]
    mask = (torch.arange(24).view(2, 12) % 5 > 0).long() if masked else None
    theirs = [layer.clone().requires_grad_() for layer in logits]
    expected = _reference(theirs, mask, 2)
    expected.backward()

    ours = [layer.float().requires_grad_() for layer in logits]
    sent, received = [], []
    boundary = pack(empty(8))
    for stage in range(stages):
        sums = unpack(boundary, 8)
        for layer in ours[stage * 4 // stages : (stage + 1) * 4 // stages]:
            sums = add(sums, sum_over_tokens(layer, 8, 2, mask))
        sent.append(pack(sums))
        boundary = sent[-1].detach().requires_grad_()
        received.append(boundary)
    last = RouterSums(sent[-1])
    loss = auxiliary_loss(last) + 0.3 * z_loss(last)
    loss.backward()
    for stage in reversed(range(stages - 1)):
        gradient = received[stage].grad
        assert gradient is not None and gradient[:8].count_nonzero() == 0 and gradient[-1] == 0  # counts and tokens
        sent[stage].backward(gradient)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-6, atol=0)
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.grad is not None and reference.grad is not None
        error = (mine.grad - reference.grad).norm() / reference.grad.norm()
        assert error < 1e-6, error


def test_z_loss_alone_and_nothing_to_sum() -> None:
    logits = torch.randn(10, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sums = sum_over_tokens(logits, 0, 0)
    assert sums.packed.shape == (2,)
    z_loss(sums).backward()
    twin = logits.detach().clone().requires_grad_()
    (twin.logsumexp(-1) ** 2).mean().backward()
    torch.testing.assert_close(logits.grad, twin.grad, rtol=1e-5, atol=1e-8)
    nothing = sum_over_tokens(logits, 6, 2, torch.zeros(10))
    assert auxiliary_loss(nothing) == 0 and z_loss(nothing) == 0


def test_bad_input() -> None:
    logits = torch.randn(10, 6)
    with pytest.raises(ValueError, match=r"\[tokens, 8\], got \(10, 6\)"):
        sum_over_tokens(logits, 8, 2)
    with pytest.raises(ValueError, match="router saw 10 tokens"):
        sum_over_tokens(logits, 6, 2, torch.ones(2, 6))
    with pytest.raises(ValueError, match="6 and of 8 experts"):
        add(empty(6), empty(8))
    with pytest.raises(ValueError, match=r"shape \(18,\)"):
        unpack(torch.zeros(14), 8)
    doge = CONFIGS["doge"]["config"] | {"is_moe": True, "num_experts": 16}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("doge", **doge))
    with pytest.raises(ValueError, match="product keys"):
        router_losses(model, output_router_logits=True)


# ---- Over ranks -------------------------------------------------------------------------------------------------


def _regions_on_ranks(split: bool) -> dict[str, Any]:
    """Two routers on this rank's tokens, or on all tokens inside a tensor-parallel region."""
    import torch.distributed as dist

    group = Group((0, 1), dist.get_rank(), dist.group.WORLD)
    hidden, weights, mask = _routers_and_tokens()
    weights = [w.requires_grad_() for w in weights]
    hidden.requires_grad_()
    if split:
        inside, local_mask = split_sequence(hidden, group), mask.chunk(2, 1)[group.rank]
    else:
        inside, local_mask = copy_to(hidden, group), mask
    sums = empty(8)
    for weight in weights:
        sums = add(sums, sum_over_tokens(inside.flatten(0, 1) @ weight, 8, 2, local_mask))
    if split:
        sums = sum_over_ranks(sums, group)
    loss = auxiliary_loss(sums) + 0.3 * z_loss(sums)
    scale_gradient(loss, 1.0 if split else 0.5).backward()
    # The project's rule: gradients of replicated parameters in a region, or on split tokens, are parts.
    summed = [reduce_from(w.grad, group) for w in weights]  # type: ignore[arg-type]
    return {"loss": loss.item(), "weights": summed, "hidden": hidden.grad}


def _routers_and_tokens() -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(2, 12, 16, generator=generator)
    weights = [torch.randn(16, 8, generator=generator) for _ in range(2)]
    mask = torch.ones(2, 12)
    mask[1, 7:] = 0  # ranks have different numbers of tokens
    return hidden, weights, mask


@pytest.mark.parametrize("split", [False, True], ids=["replicated", "split"])
def test_tokens_on_two_ranks(pool: WorkerPool, split: bool) -> None:
    hidden, weights, mask = _routers_and_tokens()
    weights = [w.requires_grad_() for w in weights]
    hidden.requires_grad_()
    expected = _reference([hidden.flatten(0, 1) @ w for w in weights], mask, 2)
    expected.backward()
    for result in pool.run(2, _regions_on_ranks, split):
        assert result["loss"] == pytest.approx(expected.item(), rel=1e-6)
        for ours, theirs in zip(result["weights"], weights, strict=True):
            torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(result["hidden"], hidden.grad, rtol=1e-4, atol=1e-7)


def _loads_on_ranks() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    import torch.distributed as dist

    group = Group((0, 1), dist.get_rank(), dist.group.WORLD)
    loads = RouterLoads(("first", "second"), 4)
    loads.counts[dist.get_rank()] += torch.tensor([dist.get_rank(), 1, 2, 3])  # each rank has a layer of its own
    return loads.take(group), loads.take(group)


def test_loads_of_stages_are_joined(pool: WorkerPool) -> None:
    for first, second in pool.run(2, _loads_on_ranks):
        assert {name: counts.tolist() for name, counts in first.items()} == {
            "first": [0, 1, 2, 3],
            "second": [1, 1, 2, 3],
        }
        assert all(counts.sum() == 0 for counts in second.values())


# ---- Activation checkpointing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v4", "qwen3_next"])
def test_activation_checkpointing_changes_nothing(family: str) -> None:
    """Loss, gradients and counts, over two micro-batches whose backwards come after both forwards, as in a pipeline."""
    results = []
    for checkpointed in (False, True):
        model = _model(family)
        model.router_aux_loss_coef = 1.0  # type: ignore[assignment]
        model.config.get_text_config().router_z_loss_coef = 0.1
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        routers, losses = find_routers(model), router_losses(model, output_router_logits=True)
        assert losses is not None and losses.z_coefficient == 0.1
        recorder = RouterRecorder(routers)
        loads = RouterLoads([r.name for r in routers], num_choices(model.config))
        waiting = []
        for seed in (0, 1):
            batch = _batch(seed, padded=True)
            with recorder.recording() as records:
                loss = model(**batch, use_cache=False).loss
            loads.add(records, batch["attention_mask"])
            sums = sum_records(empty(losses.num_experts), records, losses, batch["attention_mask"])
            waiting.append(loss + losses.total(sums))
        assert len(records) == len(routers)
        for total in reversed(waiting):
            total.backward()
        assert len(records) == len(routers)
        results.append((torch.stack(waiting).detach(), _gradients(model), loads.counts))
    (plain, gradients, counts), (again, recomputed, counts_again) = results
    torch.testing.assert_close(again, plain, rtol=1e-6, atol=0)
    _assert_close(recomputed, gradients, 1e-6)
    assert torch.equal(counts, counts_again) and int(counts.sum()) == counts.shape[0] * 2 * (2 * 24 - 6)


def test_reentrant_checkpointing_is_refused() -> None:
    model = _model("mixtral")
    model.activation_checkpointing_enable({"use_reentrant": True})
    losses = router_losses(model, output_router_logits=True)
    assert losses is not None
    with pytest.raises(ValueError, match="use_reentrant=False"):
        _our_loss(model, _batch(), losses)


# ---- Loads and correction biases --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ROUTED)
def test_loads_and_biases_of_every_family(family: str) -> None:
    """A pushed bias draws every token; counts come out right; where there is no bias, none is found."""
    model = _model(family)
    routers = find_routers(model)
    recorder = RouterRecorder(routers)
    loads = RouterLoads([r.name for r in routers], num_choices(model.config))
    biases = [correction_bias(model, router) for router in routers]
    assert all((bias is not None) == (family in BIASED) for bias in biases)
    for bias in biases:
        if bias is not None:
            assert not bias.requires_grad
            with torch.no_grad():
                bias.view(-1)[1] = 100.0
    with recorder.recording() as records, torch.no_grad():
        model(input_ids=_batch()["input_ids"], use_cache=False)
    loads.add(records)
    visits = Counter(record.router.name for record in records)  # layers that run in loops have several
    assert list(visits) == [router.name for router in routers] and visits
    first = {record.router.name: record for record in reversed(records)}
    for (name, times), counts in zip(visits.items(), loads.counts, strict=True):
        record = first[name]
        assert int(counts.sum()) == 24 * times * chosen_experts(record).shape[1]
        assert record.logits.dim() == 2 and record.logits.shape[1] <= num_choices(model.config)
        assert family not in BIASED or int(counts[1]) == 24 * times
    if family in BIASED and family not in (*UNLIKE_EXPERTS, *BIASED_BY_PARAMETERS):
        before = [bias.clone() for bias in biases if bias is not None]
        counts = {r.name: torch.arange(num_choices(model.config)) for r in routers}
        BiasBalancer(model, routers, 0.5).step(counts)
        for old, bias in zip(before, biases, strict=True):
            assert torch.equal((bias - old).flatten(), torch.tensor([0.5] * 4 + [-0.5] * 4))
    else:
        with pytest.raises(ValueError, match="moe_bias_update_rate=0|no correction bias|is a parameter of"):
            BiasBalancer(model, routers, 0.5)


def test_what_llama4_and_zaya_choose() -> None:
    """Both return something else than indices: the experts that get tokens tell."""
    for family, choices in (("llama4_text", 8), ("zaya", 9)):
        model = _model(family)
        routers = find_routers(model)
        assert num_choices(model.config) == choices
        if family == "zaya":
            for router in routers:
                router.module.balancing_biases[-1] = 100.0  # type: ignore[index]
        recorder = RouterRecorder(routers)
        with recorder.recording() as records, torch.no_grad():
            model(**_batch(), use_cache=False)
        for record in records:
            if family == "zaya":  # all tokens skip
                assert chosen_experts(record).unique().tolist() == [8]
            else:
                assert torch.equal(chosen_experts(record)[:, 0], record.output[0].argmax(-1))


def test_load_report() -> None:
    counts = {"a": torch.tensor([6, 2, 0, 0]), "b": torch.tensor([1, 1, 1, 1]), "c": torch.tensor([0, 0, 0, 0])}
    assert load_report(counts) == {
        "moe/load_max_over_mean": 3.0, "moe/load_max_over_mean_average": 2.0, "moe/idle_experts": 0.25,
    }  # fmt: skip
    detailed = load_report(counts, per_layer=True, per_expert=True)
    assert detailed["moe/b/load_max_over_mean"] == 1.0 and detailed["moe/a/expert_0"] == 0.75 and len(detailed) == 13
    assert load_report({}) == {}


def test_bias_balancing_evens_out_a_skewed_router() -> None:
    """A router whose logits favour two experts, with tokens drawn anew in every step."""
    model = _model("deepseek_v3")
    routers = find_routers(model)[:1]
    module = routers[0].module
    assert isinstance(module.weight, torch.Tensor)
    skew = torch.zeros(8)
    skew[:2] = 1.0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        module.weight.mul_(0.1)
        module.weight[:, 0] = skew
    module.num_group, module.topk_group = 1, 1  # type: ignore[assignment]

    def ratio_after(rate: float, steps: int) -> tuple[float, float]:
        balancer = BiasBalancer(model, routers, rate)
        ratios = []
        for _ in range(steps):
            loads = RouterLoads([routers[0].name], 8)
            for _ in range(2):
                hidden = torch.randn(512, 64, generator=generator)
                hidden[:, 0] = 3.0
                loads.add([Record(routers[0], module(hidden))])
            counts = loads.take(Group((0,), 0, None))
            ratios.append(load_report(counts)["moe/load_max_over_mean"])
            balancer.step(counts)
        return ratios[0], sum(ratios[-10:]) / 10

    before, unchanged = ratio_after(0.0, 10)
    assert before > 2.5 and unchanged > 2.5
    before, after = ratio_after(0.004, 150)
    assert before > 2.5 and after < 1.25
    assert ratio_after(0.0, 10)[0] < 1.25  # rate 0 leaves what was found


def test_bad_bias_updates() -> None:
    model = _model("deepseek_v3")
    with pytest.raises(ValueError, match="below 0"):
        BiasBalancer(model, find_routers(model), -0.1)
    for router in find_routers(model):
        router.module.to(torch.bfloat16)
    with pytest.raises(ValueError, match="to zero"):
        BiasBalancer(model, find_routers(model), 0.001)


# ---- Routers in fp32 --------------------------------------------------------------------------------------------

SEVERAL_LAYERS = ("zaya",)
FP32_LAYERS = ("inkling2_loop_text",)  # whose stock code cannot compute in bfloat16 (see `test_families.py`)
FP32_ROUTERS = ("inkling2_loop_text", "inkling2_text")  # their stock routers need fp32 weights


def _records_in_bf16(family: str, prepare: Callable[[Any], None]) -> list[Record]:
    model = _model(family).eval()
    for tensor in (*model.parameters(), *(model.buffers() if family == "minimax" else ())):
        tensor.data = tensor.data.bfloat16()  # buffers stay fp32, but for MiniMax, whose attention needs them in bf16
    for router in find_routers(model):
        prepare(router)
    recorder = RouterRecorder(find_routers(model))
    with recorder.recording() as records, torch.no_grad():
        model(input_ids=_batch()["input_ids"], use_cache=False)
    return records


@pytest.mark.parametrize("family", [f for f in ROUTED if f not in (*SEVERAL_LAYERS, *FP32_LAYERS)])
def test_fp32_routers(family: str) -> None:
    """fp32 logits in a bfloat16 model, the other outputs as they were; in fp32 nothing changes."""
    model, twin = _model(family), _model(family)
    names, identities = list(twin.state_dict()), [id(p) for p in twin.parameters()]
    for router in find_routers(twin):
        fp32_router(router)
        fp32_router(router)  # twice is once
    assert list(twin.state_dict()) == names and [id(p) for p in twin.parameters()] == identities
    assert [r.name for r in find_routers(twin)] == [r.name for r in find_routers(model)]
    for each in (model, twin):
        torch.manual_seed(0)
        each(**_batch(), use_cache=False).loss.backward()
    for name, gradient in _gradients(model).items():
        assert torch.equal(_gradients(twin)[name], gradient), name

    ours = _records_in_bf16(family, fp32_router)
    assert all(record.logits.dtype == torch.float32 for record in ours)
    if family in FP32_ROUTERS:
        with pytest.raises(RuntimeError, match="dtype"):  # its stock router needs fp32 weights
            _records_in_bf16(family, lambda router: None)
        return
    for mine, stock in zip(ours, _records_in_bf16(family, lambda router: None), strict=True):
        for position, (a, b) in enumerate(zip(mine.output, stock.output, strict=True)):
            assert position == mine.router.index or a.dtype == b.dtype or family == "hunyuan_v1_moe", position


@pytest.mark.parametrize("family", [f for f in ROUTED if f not in SEVERAL_LAYERS])
def test_fp32_routers_lose_nothing(family: str) -> None:
    """On the same bfloat16 input and weights, logits are those of the stock router in fp32.

    Those of the stock router in bfloat16 are, too, in the `exact` families alone.
    """
    exact = """
        axk1 axk2 bailing_hybrid beam deepseek_v2 deepseek_v3 deepseek_v32 dots1 dots3_note dots3_note_text ernie4_5_moe
        exaone_moe flint glm4_moe glm4_moe_lite glm_moe_dsa hy_v3 hy_v4 inkling2_loop_text inkling2_text inkling_text
        kimi_linear kolibri1 lara_mini longcat_flash mimo_v2_flash nemotron_h sarvam_mla sarvam_moe solar_open
    """.split()
    inputs: list[Any] = []
    model = _model(family).eval()
    find_routers(model)[0].module.register_forward_pre_hook(lambda module, args: inputs.extend(args))
    with torch.no_grad():
        model(input_ids=_batch()["input_ids"], use_cache=False)
    hidden, *biases = inputs

    def logits(dtype: torch.dtype, in_fp32: bool) -> torch.Tensor:
        router = find_routers(_model(family).eval())[0]
        for parameter in router.module.parameters():
            parameter.data = parameter.data.bfloat16().to(dtype)
        if in_fp32:
            fp32_router(router)
        return Record(router, router.module(hidden.bfloat16().to(dtype), *biases)).logits.detach().double()

    expected = logits(torch.float32, False)
    stock_dtype = torch.float32 if family in FP32_ROUTERS else torch.bfloat16  # what its stock router needs
    ours, theirs = (
        ((logits(dtype, in_fp32) - expected).norm() / expected.norm()).item()
        for dtype, in_fp32 in ((torch.bfloat16, True), (stock_dtype, False))
    )
    gemma = family.startswith("gemma4")  # scales its input in bfloat16 before the product
    assert ours < (0.7 * theirs if gemma else 1e-6)
    assert (theirs < 1e-6) == (family in exact)


def test_fp32_router_refuses() -> None:
    with pytest.raises(ValueError, match="linear layers"):
        fp32_router(find_routers(_model("zaya"))[0])
    router = find_routers(_model("phimoe"))[0]
    router.module.input_jitter_noise = 0.1  # type: ignore[assignment]
    with pytest.raises(ValueError, match="input_jitter_noise"):
        fp32_router(router)

"""Our AdamW and Lion against torch, the papers, and themselves on parts of a matrix."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_nanotron.optim.adamw import AdamW, mix, random_bits, round_stochastically, stream_keys
from hf_nanotron.optim.lion import Lion


def random_parameters(sizes: tuple[int, ...] = (1000, 7, 1, 0), seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]


def set_gradients(parameters: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def two_groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """With different learning rates and decays."""
    return [
        {"params": parameters[::2], "lr": 3e-2, "weight_decay": 0.1},
        {"params": parameters[1::2], "lr": 1e-3, "weight_decay": 0.0, "betas": (0.8, 0.95)},
    ]


# ---- AdamW with fp32 moments -----------------------------------------------------------------------------------


def test_adamw_is_that_of_torch() -> None:
    ours, theirs = random_parameters(), random_parameters()
    optimizer = AdamW(two_groups(ours), betas=(0.9, 0.99), eps=1e-6)
    reference = torch.optim.AdamW(two_groups(theirs), betas=(0.9, 0.99), eps=1e-6, foreach=False)
    for step in range(20):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        if step == 3:  # one that has no gradient now and then has its own count of steps
            ours[1].grad = theirs[1].grad = None
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] *= 0.95
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0.0)
    for mine, other in zip(ours, theirs, strict=True):
        state, expected = optimizer.state[mine], reference.state[other]
        assert list(state) == list(expected)
        torch.testing.assert_close(state, expected, rtol=1e-7, atol=0.0)
        assert state["step"].dtype == torch.float32 and state["step"].shape == ()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_grad_scale_divides_gradients(state_dtype: torch.dtype) -> None:
    plain, scaled = random_parameters(), random_parameters()
    first, second = (AdamW(p, lr=1e-2, state_dtype=state_dtype) for p in (plain, scaled))
    for step in range(3):
        set_gradients(plain, step)
        set_gradients(scaled, step, scale=64.0)
        second.grad_scale = torch.tensor(64.0)
        first.step()
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))


def test_found_inf_skips_the_step() -> None:
    parameters = random_parameters()
    optimizer = AdamW(parameters, lr=1e-2)
    set_gradients(parameters, 0)
    optimizer.step()
    before = copy.deepcopy((parameters, optimizer.state_dict()["state"]))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    torch.testing.assert_close((parameters, optimizer.state_dict()["state"]), before, rtol=0.0, atol=0.0)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert optimizer.state[parameters[0]]["step"] == 2


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_rounded_values_are_written_with_the_step(state_dtype: torch.dtype) -> None:
    parameters = random_parameters()
    rounded = {p: torch.full_like(p, 9.0, dtype=torch.bfloat16) for p in parameters[:2]}
    optimizer = AdamW(parameters, lr=1e-2, state_dtype=state_dtype, rounded=rounded)
    set_gradients(parameters, 0)
    parameters[1].grad = None
    optimizer.step()
    assert torch.equal(rounded[parameters[0]], parameters[0].bfloat16())
    assert (rounded[parameters[1]] == 9.0).all()  # not updated, so not written
    with torch.no_grad():
        parameters[0] += 1.0
    before = rounded[parameters[0]].clone()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(rounded[parameters[0]], before)
    assert not copy.deepcopy(optimizer).rounded  # a copy of the optimizer is not that of this model


def test_grad_scaler_uses_both() -> None:
    """torch's own gradient scaler sets the two attributes, and deletes them after the step."""
    parameters = random_parameters((5,))
    optimizer = AdamW(parameters, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, steps in ((1.0, 1), (math.inf, 1), (1.0, 2)):
        scaler.scale((parameters[0] * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert optimizer.state[parameters[0]]["step"] == steps
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize(
    "arguments",
    [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1e-8}, {"weight_decay": -0.1}, {"state_dtype": torch.float16}],
)
def test_values_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        AdamW(random_parameters(), **arguments)
    if "eps" not in arguments and "state_dtype" not in arguments:
        with pytest.raises(ValueError, match=next(iter(arguments))):
            Lion(random_parameters(), **arguments)


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_there_is_no(option: str) -> None:
    with pytest.raises(TypeError, match=option):
        AdamW(random_parameters(), **{option: True})


@pytest.mark.parametrize("tensor", [torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, 2).t()])
def test_parameters_are_contiguous_and_fp32(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="contiguous fp32"):
        AdamW([nn.Parameter(tensor)])


# ---- bfloat16 moments ------------------------------------------------------------------------------------------


def test_hash_is_a_good_source_of_bits() -> None:
    """Every bit is fair, and bits of neighbouring elements, steps, streams and seeds are independent."""
    count = 1 << 16
    assert mix(torch.arange(count, dtype=torch.int32)).unique().numel() == count

    def draw(seed: int = 0, stream: int = 0, step: float = 1.0, first: int = 0) -> torch.Tensor:
        bits = random_bits(stream_keys(seed, stream), torch.tensor(step), first, count)
        return ((bits[:, None] >> torch.arange(32)) & 1).double() * 2 - 1  # [count, 32]: -1 or 1

    bits = draw()
    tolerance = 5 / math.sqrt(count)
    assert bits.mean(0).abs().max() < tolerance
    others = [draw(seed=1), draw(stream=1), draw(step=2.0), draw(first=1), draw(first=1 << 32)]
    for other in (bits, *others):
        correlation = bits.t() @ other / count
        if other is bits:
            correlation -= torch.eye(32)
        assert correlation.abs().max() < tolerance
    assert torch.equal(draw(first=(1 << 32) - 3)[3:], draw(first=1 << 32)[:-3])  # the number of an element is all


def test_stochastic_rounding_is_unbiased() -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32)  # each value once
    for number in (1.2345, -1.2345, 3e-30, 0.0, 1.0, -math.inf):
        value = torch.full((1 << 16,), number)
        rounded = round_stochastically(value, bits)
        assert torch.equal(rounded, rounded.bfloat16().float())
        torch.testing.assert_close(rounded.double().mean(), value.double()[0], rtol=1e-9, atol=0.0)
    nan = torch.full((1,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    assert round_stochastically(nan, bits[-1:]).isnan()


def test_second_moment_converges_where_nearest_rounding_stalls() -> None:
    """Under gradients of magnitude 1 and beta2 = 0.999, the second moment goes to 1."""
    steps, beta2 = 4000, 0.999
    parameter = nn.Parameter(torch.zeros(2048))
    optimizer = AdamW([parameter], lr=0.0, betas=(0.9, beta2), weight_decay=0.0, state_dtype=torch.bfloat16)
    gradients = [torch.ones(2048), -torch.ones(2048)]
    nearest = torch.zeros((), dtype=torch.bfloat16)
    for step in range(steps):
        parameter.grad = gradients[step % 2]
        optimizer.step()
        nearest = (nearest.float() * beta2 + (1 - beta2)).bfloat16()
    state = optimizer.state[parameter]
    exact = 1 - beta2**steps
    assert state["exp_avg_sq"].dtype == torch.bfloat16
    assert state["exp_avg_sq"].double().mean().item() == pytest.approx(exact, rel=0.01)
    assert state["exp_avg"].double().mean().item() == pytest.approx(-(1 - 0.9) / (1 + 0.9), rel=0.01)
    # From 1/4 on, half a unit in the last place is 2^-10, and a step would add 0.00075.
    assert nearest == 0.25


def regression_loss(state_dtype: torch.dtype) -> float:
    """Of a linear model with noisy targets, trained with small batches."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 32, generator=generator)
    targets = inputs @ torch.randn(32, generator=generator) + 0.5 * torch.randn(512, generator=generator)
    weight = nn.Parameter(torch.zeros(32))
    optimizer = AdamW([weight], lr=0.1, weight_decay=0.0, state_dtype=state_dtype)
    for step in range(300):
        rows = torch.randint(0, 512, (64,), generator=generator)
        optimizer.zero_grad()
        (inputs[rows] @ weight - targets[rows]).square().mean().backward()
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        optimizer.step()
    return (inputs @ weight - targets).square().mean().item()


def test_training_with_bfloat16_moments() -> None:
    expected = regression_loss(torch.float32)
    assert 0.1 < expected < 0.3  # the noise: it has converged
    assert regression_loss(torch.bfloat16) == pytest.approx(expected, rel=0.01)


def test_generators_do_not_move_and_seeds_matter() -> None:
    before = torch.get_rng_state()
    results = []
    for seed in (0, 0, 1):
        parameters = random_parameters()
        optimizer = AdamW(parameters, lr=1e-2, state_dtype=torch.bfloat16, seed=seed)
        set_gradients(parameters, 0)
        optimizer.step()
        results.append(optimizer.state[parameters[0]]["exp_avg_sq"])
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_streams_make_parts_draw_as_the_whole() -> None:
    """Two parts of one parameter, at other places in another optimizer, with the bits of the whole."""
    whole = random_parameters((1000,))
    parts = [nn.Parameter(whole[0].detach()[600:].clone()), nn.Parameter(whole[0].detach()[:600].clone())]
    first = AdamW(whole, lr=1e-2, state_dtype=torch.bfloat16)
    second = AdamW(parts, lr=1e-2, state_dtype=torch.bfloat16, streams={parts[0]: (0, 600), parts[1]: (0, 0)})
    for step in range(3):
        set_gradients(whole, step)
        assert whole[0].grad is not None
        parts[0].grad, parts[1].grad = whole[0].grad[600:], whole[0].grad[:600]
        first.step()
        second.step()
    assert torch.equal(whole[0], torch.cat((parts[1], parts[0])))


# ---- state -----------------------------------------------------------------------------------------------------


def make_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return AdamW(two_groups(parameters))


def make_adamw_bfloat16(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return AdamW(two_groups(parameters), state_dtype=torch.bfloat16, seed=11)


def make_lion(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return Lion(two_groups(parameters))


@pytest.mark.parametrize("make", [make_adamw, make_adamw_bfloat16, make_lion])
def test_resumed_run_is_bit_equal(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
    parameters = random_parameters()
    optimizer = make(parameters)
    for step in range(5):
        set_gradients(parameters, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    second = make(resumed)
    second.load_state_dict(torch.load(file, weights_only=True))
    third = copy.deepcopy(second)
    copies = [parameter for group in third.param_groups for parameter in group["params"]]
    for step in range(5, 10):
        for tensors in (parameters, resumed):
            set_gradients(tensors, step)
        for ours, theirs in zip(copies, (p for g in second.param_groups for p in g["params"]), strict=True):
            ours.grad = theirs.grad
        for each in (optimizer, second, third):
            each.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, resumed, strict=True))
    for other in (second, third):
        saved, restored = optimizer.state_dict()["state"], other.state_dict()["state"]
        for index, state in saved.items():
            for name, value in state.items():
                assert value.dtype == restored[index][name].dtype
                assert torch.equal(value, restored[index][name])


def test_state_of_torch_is_taken() -> None:
    """A checkpoint of `torch.optim.AdamW` continues with bfloat16 moments: rounded once."""
    parameters = random_parameters()
    reference = torch.optim.AdamW(parameters, lr=1e-2)
    set_gradients(parameters, 0)
    reference.step()
    optimizer = AdamW(parameters, state_dtype=torch.bfloat16)
    optimizer.load_state_dict(reference.state_dict())
    state = optimizer.state[parameters[0]]
    assert torch.equal(state["exp_avg"], reference.state[parameters[0]]["exp_avg"].bfloat16())
    assert optimizer.param_groups[0]["lr"] == 1e-2
    optimizer.step()
    assert state["step"] == 2 and state["exp_avg"].dtype == torch.bfloat16


# ---- Lion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_state_of_another_computation_is_refused(option: str) -> None:
    """A resumed run would take it over without a word: both are called AdamW."""
    parameters = random_parameters((4,))
    theirs = torch.optim.AdamW(parameters, **{option: True})
    set_gradients(parameters, 0)
    theirs.step()
    with pytest.raises(ValueError, match=f"{option}=True, which this one does not support"):
        AdamW(parameters).load_state_dict(theirs.state_dict())


def test_lion_is_that_of_the_paper() -> None:
    """Algorithm 2 of arXiv:2302.06675, in float64, element by element."""
    lr, beta1, beta2, decay = 1e-2, 0.9, 0.99, 0.1
    parameters = random_parameters((50, 1))
    optimizer = Lion(parameters, lr=lr, betas=(beta1, beta2), weight_decay=decay)
    weights = [parameter.double().tolist() for parameter in parameters]
    momenta = [[0.0] * len(weight) for weight in weights]
    for step in range(20):
        set_gradients(parameters, step)
        if step == 0:
            parameters[0].grad[0] = 0.0  # type: ignore[index]  # the sign of zero is zero
        for weight, momentum, parameter in zip(weights, momenta, parameters, strict=True):
            assert parameter.grad is not None
            for i, gradient in enumerate(parameter.grad.double().tolist()):
                interpolated = beta1 * momentum[i] + (1 - beta1) * gradient
                sign = (interpolated > 0) - (interpolated < 0)
                weight[i] -= lr * (sign + decay * weight[i])
                momentum[i] = beta2 * momentum[i] + (1 - beta2) * gradient
        optimizer.step()
    for weight, momentum, parameter in zip(weights, momenta, parameters, strict=True):
        torch.testing.assert_close(parameter.double(), torch.tensor(weight).double(), rtol=0.0, atol=1e-6)
        state = optimizer.state[parameter]
        assert list(state) == ["exp_avg"]
        torch.testing.assert_close(state["exp_avg"].double(), torch.tensor(momentum).double(), rtol=1e-5, atol=1e-7)


# ---- parts of a matrix -----------------------------------------------------------------------------------------

ELEMENTWISE: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (AdamW, {"weight_decay": 0.1}),
    (Lion, {"weight_decay": 0.1}),
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.AdamW, {"weight_decay": 0.1, "fused": True}),
    (torch.optim.Adagrad, {"lr_decay": 0.1}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
]


@pytest.mark.parametrize(("optimizer_class", "arguments"), ELEMENTWISE)
def test_parts_are_updated_as_the_whole(
    optimizer_class: type[torch.optim.Optimizer], arguments: dict[str, Any]
) -> None:
    """Segments of a flattened matrix, cut anywhere, get bit for bit the update of the matrix."""
    generator = torch.Generator().manual_seed(0)
    matrix = nn.Parameter(torch.randn(40, 25, generator=generator))
    bounds = [0, 13, 14, 500, 1000]
    segments = [
        nn.Parameter(matrix.detach().flatten()[start:stop].clone())
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]
    whole = optimizer_class([matrix], lr=1e-2, **arguments)  # type: ignore[call-arg]
    parts = optimizer_class(segments, lr=1e-2, **arguments)  # type: ignore[call-arg]
    for _ in range(5):
        matrix.grad = torch.randn(40, 25, generator=generator)
        for segment, start, stop in zip(segments, bounds, bounds[1:], strict=False):
            segment.grad = matrix.grad.flatten()[start:stop].clone()
        whole.step()
        parts.step()
    assert torch.equal(matrix.flatten(), torch.cat(segments))

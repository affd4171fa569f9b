"""NeumannOptimizer against a transcription of the paper's formulas, and its edges."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neumann_runs import (
    SHORT,
    assert_same,
    compare,
    counters,
    joined,
    oracle,
    problem,
    run,
    set_gradients,
    state_of,
)

from aadl_hvd import AndersonConfig, AndersonOptimizer, NeumannOptimizer

# Formulas


def test_defaults_are_the_papers():
    """Every default has an effect in this many steps; none may be another's."""
    opt, parameters = compare(72, steps_per_epoch=2)
    assert counters(opt, parameters[0]) == (72, 62, 61, 80)
    settings = opt.defaults | {"steps_per_epoch": None, "lr": None}
    assert settings == {
        "lr": None,
        "steps_per_epoch": None,
        "alpha": 1e-7,
        "beta": 1e-5,
        "gamma": 0.99,
        "mu_min": 0.5,
        "mu_max": 0.9,
        "warmup_epochs": 5,
        "reset_epochs": 10,
        "variables": "parameters",
        "weight_decay": 0.0,
    }


@settings(max_examples=80)
@given(
    alpha=st.sampled_from([0.0, 1e-7, 0.3]),
    beta=st.sampled_from([0.0, 1e-6, 1e-4]),
    gamma=st.floats(0.0, 0.99),
    mu_min=st.floats(0.0, 0.6),
    mu_max=st.floats(0.6, 1.0),
    warmup_epochs=st.floats(0.0, 1.5),
    reset_epochs=st.floats(0.01, 2.0),
    steps_per_epoch=st.integers(1, 5),
    variables=st.sampled_from(["parameters", "tensors"]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    lr=st.floats(1e-3, 0.1),
    seed=st.integers(0, 3),
)
def test_formulas(lr, seed, **settings):
    # The repulsion magnifies rounding where delta is small.
    compare(14, lr, rtol=1e-6, seed=seed, **settings)


def test_regularizer_has_both_signs():
    """Far from v it pulls back to it; near, it pushes away."""
    for alpha, beta, sign in ((0.5, 0.0, 1), (0.0, 0.5, -1)):
        p = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        opt = NeumannOptimizer([p], 0.1, **SHORT, alpha=alpha, beta=beta, gamma=1.0)
        run(opt, [p], [np.ones(2)] * 3)  # warm-up and a reset
        delta, m = p.detach() - opt.state[p]["v"], opt.state[p]["m"].clone()
        run(opt, [p], [np.zeros(2)])
        pull = (opt.state[p]["m"] - 2 / 3 * m) / -0.1
        norm = delta.norm()
        size = alpha * norm**2 if sign > 0 else -beta * 2 / norm**2
        torch.testing.assert_close(pull, size * delta / norm)
        assert float(pull @ delta) * sign > 0


def test_norm_is_that_of_all_parameters_together():
    """Split into tensors and groups, the same vector takes the same steps."""
    found = []
    for cuts in ([], [5], [2, 3, 9]):
        vector = torch.arange(1.0, 13.0, dtype=torch.float64)
        parts = [torch.nn.Parameter(part.clone()) for part in vector.tensor_split(cuts)]
        groups = [{"params": [part]} for part in parts]
        opt = NeumannOptimizer(groups, 0.1, **SHORT, alpha=0.1, beta=1e-3)
        gradients = np.random.default_rng(3).normal(size=(12, 12))
        run(opt, parts, gradients)
        found.append(joined(parts))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-11)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-11)


def test_norm_is_accumulated_in_float64():
    """In float32 the sum of these squares is infinite, and with it the pull."""
    p = torch.nn.Parameter(torch.zeros(4))
    opt = NeumannOptimizer([p], 1.0, **SHORT, alpha=1e-30, beta=0.0, gamma=1.0, mu_min=0.0)
    run(opt, [p], [np.zeros(4)] * 3)
    with torch.no_grad():
        p.fill_(1e20)
    opt.param_groups[0]["mu_max"] = 0.0
    run(opt, [p], [np.zeros(4)])
    # |delta| = 2e20, so the pull is 1e-30 * 4e40 / 2
    np.testing.assert_allclose(p.detach().double().numpy(), 1e20 - 2e10, rtol=1e-7)
    assert p.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_state_has_the_parameters_dtype(dtype):
    tolerance = {torch.float32: 2e-4, torch.float64: 1e-9, torch.bfloat16: 0.5}[dtype]
    opt, parameters = compare(10, 0.02, tolerance, dtype, **SHORT)
    for p in parameters:
        assert opt.state[p]["m"].dtype == opt.state[p]["v"].dtype == p.dtype == dtype
        assert opt.state[p]["m"].shape == opt.state[p]["v"].shape == p.shape
    loaded = NeumannOptimizer(parameters, 0.02, **SHORT)
    loaded.load_state_dict(opt.state_dict())
    assert_same(loaded.state_dict(), opt.state_dict())


def test_dtypes_may_be_mixed():
    found = []
    for dtypes in ((torch.float64,) * 4, (torch.float64, torch.float32) * 2):
        parameters, gradients = problem(12)
        for p, dtype in zip(parameters, dtypes, strict=True):
            p.data = p.data.to(dtype)
        opt = NeumannOptimizer(parameters, 0.05, **SHORT)
        run(opt, parameters, gradients)
        found.append(joined(parameters))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert not np.array_equal(*found)


# t, K, mu


@pytest.mark.parametrize(
    "settings, warmup, resets",
    [
        ({"steps_per_epoch": 3, "warmup_epochs": 2, "reset_epochs": 1}, 6, [1, 4, 10, 22]),
        ({"steps_per_epoch": 4, "warmup_epochs": 0, "reset_epochs": 1.25}, 0, [1, 6, 16, 36]),
        ({"steps_per_epoch": 1, "warmup_epochs": 1.6, "reset_epochs": 1}, 2, [1, 2, 4, 8, 16, 32]),
        # shorter than a step
        ({"steps_per_epoch": 1, "warmup_epochs": 0.4, "reset_epochs": 0.1}, 0, [1, 2, 4, 8, 16]),
    ],
)
def test_when_resets_are_and_k_doubles(settings, warmup, resets):
    parameters, gradients = problem(30)
    opt = NeumannOptimizer(parameters, 0.01, **settings)
    first = resets[1] - resets[0]
    found, periods = [], []
    for k, flat in enumerate(gradients, start=1):
        run(opt, parameters, [flat])
        step, t, reset_at, period = counters(opt, parameters[0])
        assert (step, t) == (k, max(0, k - warmup))
        assert all(counters(opt, p) == (step, t, reset_at, period) for p in parameters)
        # At a reset, and only there, m is -lr g.
        alike = np.allclose(state_of(opt, parameters, "m"), -0.01 * flat, rtol=1e-12, atol=0)
        assert alike == (t > 0 and reset_at == t)
        if alike:
            found.append(t)
            periods.append(period)
    expected = [t for t in resets if t <= 30 - warmup]
    assert found == expected
    assert periods == [first * 2**j for j in range(len(expected))]


def test_mu_goes_on_through_resets_and_is_held():
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = NeumannOptimizer([p], 1.0, **SHORT, alpha=0.0, beta=0.0)
    found = []
    for k in range(1, 19):
        before = p.item()
        run(opt, [p], [np.ones(1)])
        if k > 2:  # w' - w = mu m - lr g
            found.append((p.item() - before + 1.0) / opt.state[p]["m"].item())
    expected = [min(1 - 1 / (1 + t), 0.9) for t in range(1, 17)]
    assert expected[0] == 0.5
    assert expected[-1] == 0.9
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_steps_per_epoch_may_change_under_way():
    """As when ranks join or leave: K in force and t stay, no second warm-up begins."""
    parameters, gradients = problem(12)
    opt = NeumannOptimizer(parameters, 0.01, **SHORT)
    run(opt, parameters, gradients[:4])
    assert counters(opt, parameters[0]) == (4, 2, 1, 2)
    opt.param_groups[0]["steps_per_epoch"] = 100
    run(opt, parameters, gradients[4:])
    assert counters(opt, parameters[0]) == (12, 10, 7, 8)


# Warm-up


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_warmup_is_plain_sgd_bit_for_bit(weight_decay):
    steps = 6
    parameters, gradients = problem(steps + 1)
    others = copy.deepcopy(parameters)
    opt = NeumannOptimizer(
        parameters, 0.1, 2, warmup_epochs=3, reset_epochs=1, weight_decay=weight_decay
    )
    sgd = torch.optim.SGD(others, 0.1, weight_decay=weight_decay)
    average = joined(parameters)
    for flat in gradients[:steps]:
        run(opt, parameters, [flat])
        run(sgd, others, [flat])
        assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))
        average = joined(parameters) + 0.99 * (average - joined(parameters))
        assert not state_of(opt, parameters, "m").any()
        np.testing.assert_allclose(state_of(opt, parameters, "v"), average, rtol=1e-12)
        assert all(map(torch.equal, opt.evaluated_parameters(), parameters))
    run(opt, parameters, gradients[steps:])
    run(sgd, others, gradients[steps:])
    assert not torch.equal(parameters[0], others[0]), "one step too long"
    assert state_of(opt, parameters, "m").any()


# Learning rates, groups, gradients


def test_schedule_of_the_learning_rate():
    parameters, gradients = problem(16)
    weights = [p.detach().numpy().copy() for p in parameters]
    opt = NeumannOptimizer(parameters, 0.1, **SHORT)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 3, 0.5)
    for flat in gradients:
        run(opt, parameters, [flat])
        schedule.step()
    settings = dict(SHORT)
    expected = oracle(weights, gradients, lambda k: 0.1 * 0.5 ** ((k - 1) // 3), **settings)
    np.testing.assert_allclose(joined(parameters), expected[-1][0], rtol=1e-9)
    np.testing.assert_allclose(state_of(opt, parameters, "m"), expected[-1][2], rtol=1e-9)


def test_learning_rate_as_a_tensor():
    found = []
    for lr in (0.05, torch.tensor(0.05, dtype=torch.float64)):
        parameters, gradients = problem(8)
        opt = NeumannOptimizer(parameters, lr, **SHORT)
        run(opt, parameters, gradients)
        found.append(joined(parameters))
    np.testing.assert_array_equal(*found)


def test_groups_have_settings_of_their_own():
    """Everything that is per group, in one vector formula with a setting for every entry."""
    a, b = (torch.nn.Parameter(torch.full((3,), x, dtype=torch.float64)) for x in (1.0, -2.0))
    own = {"lr": (0.1, 0.02), "weight_decay": (0.0, 0.3), "alpha": (0.1, 0.7)}
    own |= {"beta": (1e-4, 1e-3), "gamma": (0.9, 0.5), "mu_min": (0.0, 0.7), "mu_max": (0.55, 0.8)}
    groups = [
        {"params": [p]} | {name: pair[i] for name, pair in own.items()}
        for i, p in enumerate((a, b))
    ]
    opt = NeumannOptimizer(groups, steps_per_epoch=2, warmup_epochs=1, reset_epochs=2)
    gradients = np.random.default_rng(5).normal(size=(9, 6))
    lr, decay, alpha, beta, gamma, low, high = (np.repeat(pair, 3) for pair in own.values())
    w = joined([a, b])
    v, m = w.copy(), np.zeros(6)
    for k, g in enumerate(gradients, start=1):
        d, t = g + decay * w, k - 2
        mu = np.clip(1 - 1 / (1 + t), low, high) if t > 0 else 0.0
        if t in (1, 5):
            m = -lr * d
        elif t > 0:
            delta = w - v
            norm = np.linalg.norm(delta)
            d = d + (alpha * norm**2 - 6 * beta / norm**2) * delta / norm
            m = mu * m - lr * d
        w = w + mu * m - lr * d
        v = w + gamma * (v - w)
    run(opt, [a, b], gradients)
    np.testing.assert_allclose(joined([a, b]), w, rtol=1e-9)
    np.testing.assert_allclose(state_of(opt, [a, b], "v"), v, rtol=1e-9)
    np.testing.assert_allclose(joined(opt.evaluated_parameters()), w - mu * m, rtol=1e-9)


def test_group_that_joins_late():
    """It takes the optimizer's t and K, with m = 0 and v = w."""
    parameters, gradients = problem(10)
    opt = NeumannOptimizer(parameters, 0.05, **SHORT, beta=1e-3)
    run(opt, parameters, gradients[:5])
    late = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt.add_param_group({"params": [late], "lr": 0.5})
    assert opt.param_groups[1]["steps_per_epoch"] == 2
    with torch.no_grad():
        late.fill_(7.0)  # as a checkpoint of the model loaded after the construction
    run(opt, [*parameters, late], [np.append(gradients[5], [1.0, 1.0])])
    assert counters(opt, late) == counters(opt, parameters[0]) == (6, 4, 3, 4)
    mu = 1 - 1 / 5
    np.testing.assert_allclose(opt.state[late]["m"], -0.5)
    np.testing.assert_allclose(late.detach(), 7.0 - 0.5 * mu - 0.5)
    np.testing.assert_allclose(opt.state[late]["v"], 7.0 - 0.01 * (0.5 * mu + 0.5))


def test_weights_loaded_after_the_construction_are_where_v_begins():
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = NeumannOptimizer([p], 0.1, **SHORT)
    with torch.no_grad():
        p.fill_(100.0)
    run(opt, [p], [np.zeros(3)])
    assert torch.equal(opt.state[p]["v"], p)


def test_parameter_without_a_gradient_is_left_alone_and_not_counted():
    first, gradients = problem(9)
    second = copy.deepcopy(first)
    unused = torch.nn.Parameter(torch.full((50,), 3.0, dtype=torch.float64))
    frozen = torch.nn.Parameter(torch.ones(5, dtype=torch.float64), requires_grad=False)
    settings = SHORT | {"weight_decay": 0.1, "beta": 1e-4}
    opt = NeumannOptimizer([*first, unused, frozen], 0.05, **settings)
    run(opt, first, gradients)
    run(NeumannOptimizer(second, 0.05, **settings), second, gradients)
    assert all(map(torch.equal, first, second))
    assert torch.equal(unused, torch.full_like(unused, 3.0))
    assert torch.equal(opt.evaluated_parameters()[-2], unused)
    assert frozen not in opt.state
    # One that had gradients and has none now keeps its state, and loses nothing by it.
    before = first[0].detach().clone(), opt.state[first[0]]["m"].clone()
    set_gradients(first, gradients[0])
    first[0].grad = None
    opt.step()
    assert torch.equal(first[0], before[0])
    assert torch.equal(opt.state[first[0]]["m"], before[1])
    assert counters(opt, first[0])[0] == 9
    run(opt, first, gradients[1:2])
    assert counters(opt, first[0]) == counters(opt, first[1]) == (11, 9, 7, 8)


def test_step_without_any_gradient_does_nothing():
    parameters, _ = problem(1)
    opt = NeumannOptimizer(parameters, 0.1, **SHORT, weight_decay=0.5)
    before = joined(parameters)
    opt.step()
    np.testing.assert_array_equal(joined(parameters), before)
    assert counters(opt, parameters[0]) == (0, 0, 0, 0)


def test_gradients_are_only_read():
    parameters, gradients = problem(6)
    opt = NeumannOptimizer(parameters, 0.1, **SHORT, weight_decay=0.5)
    for flat in gradients:
        run(opt, parameters, [flat])
        np.testing.assert_array_equal(joined([p.grad for p in parameters]), flat)


def test_closure():
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = NeumannOptimizer([p], 0.25, **SHORT)

    def closure():
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(opt.step(closure)) == 2.0
    assert torch.equal(p.detach(), torch.full((2,), 0.5, dtype=torch.float64))


# delta = 0 and next to it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e-44, 1e-300, 1e-14])
def test_vanishing_delta(dtype, offset):
    """No repulsion where it would not be a number, or infinite."""
    p = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    opt = NeumannOptimizer([p], 0.1, **SHORT)
    run(opt, [p], [np.zeros(3)] * 3)
    assert torch.equal(opt.state[p]["v"], p)
    with torch.no_grad():
        p.fill_(offset)
    run(opt, [p], [np.ones(3)])
    assert p.isfinite().all()
    assert opt.state[p]["m"].isfinite().all()
    factor = 3e-5 / max(3 * offset**2, 1e-320) / max(math.sqrt(3) * offset, 1e-320)
    if not factor < torch.finfo(dtype).max:
        np.testing.assert_allclose(p.detach(), -0.1 * 2 / 3 - 0.1, rtol=1e-6)
    else:
        assert p[0] > 1e10, "the formula's repulsion"


def test_past_weights_follow_an_accelerated_point():
    """delta = w - v is the same before and after the weights are replaced; a look changes none."""
    p = torch.nn.Parameter(torch.arange(4.0))
    base = NeumannOptimizer([p], lr=0.1, steps_per_epoch=5, warmup_epochs=0)
    opt = AndersonOptimizer(base, anderson=AndersonConfig(enabled=True))
    for _ in range(3):
        p.grad = p.detach() + 1.0
        opt.step()
    problem = opt.anderson_engine.problem
    v, w = opt.state[p]["v"].clone(), p.detach().clone()
    with problem.followed(), torch.no_grad():
        p.add_(torch.tensor([1.0, -2.0, 0.0, 0.5]))
    torch.testing.assert_close(opt.state[p]["v"] - v, p.detach() - w)
    assert not torch.equal(v, opt.state[p]["v"])

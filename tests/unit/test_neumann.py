"""NeumannOptimizer against a transcription of the paper's formulas, and its edges."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aadl_hvd import (
    AndersonConfig,
    AndersonOptimizer,
    ConfigError,
    NeumannOptimizer,
    UnsupportedError,
)

SHAPES = [(3, 2), (4,), (2, 1, 2), ()]
COUNTERS = ("step", "t", "reset_at", "period")
# Resets at t = 1, 3, 7, 15, warm-up of 2 steps.
SHORT = {"steps_per_epoch": 2, "warmup_epochs": 1, "reset_epochs": 1}


def oracle(weights, gradients, lr, *, steps_per_epoch, variables="parameters", **settings):
    """The formulas for one vector w in float64; lr(step), resets by their closed form.

    Returns w, v, m, and w - mu m after every step.
    """
    o = {"alpha": 1e-7, "beta": 1e-5, "gamma": 0.99, "mu_min": 0.5, "mu_max": 0.9}
    o |= {"warmup_epochs": 5, "reset_epochs": 10, "weight_decay": 0.0} | settings
    sizes = [w.size for w in weights]
    w = np.concatenate([w.reshape(-1) for w in weights]).astype(np.float64)
    beta = o["beta"] * (w.size if variables == "parameters" else len(sizes))
    warmup = round(o["warmup_epochs"] * steps_per_epoch)
    first = max(1, round(o["reset_epochs"] * steps_per_epoch))
    resets = {1 + first * (2**j - 1) for j in range(20)}
    v, m, found = w.copy(), np.zeros_like(w), []
    for k, g in enumerate(gradients, start=1):
        g, eta, t, mu = g + o["weight_decay"] * w, lr(k), k - warmup, 0.0
        if t < 1:
            w = w - eta * g
        else:
            mu = min(max(1 - 1 / (1 + t), o["mu_min"]), o["mu_max"])
            if t in resets:
                m, d = -eta * g, g
            else:
                delta = w - v
                norm = np.linalg.norm(delta)
                d = g
                if norm > 0:
                    d = g + (o["alpha"] * norm**2 - beta / norm**2) * delta / norm
                m = mu * m - eta * d
            w = w + mu * m - eta * d
        v = w + o["gamma"] * (v - w)
        found.append((w, v, m, w - mu * m))
    return found


def problem(steps, dtype=torch.float64, seed=0):
    """Parameters and, for every step, one flat gradient."""
    generator = np.random.default_rng(seed)
    weights = [generator.normal(size=shape) for shape in SHAPES]
    n = sum(w.size for w in weights)
    return (
        [torch.nn.Parameter(torch.tensor(w, dtype=dtype)) for w in weights],
        list(generator.normal(size=(steps, n))),
    )


def set_gradients(parameters, flat):
    offset = 0
    for p in parameters:
        part = torch.as_tensor(flat[offset : offset + p.numel()])
        p.grad = part.reshape(p.shape).to(p.dtype)
        offset += p.numel()


def run(opt, parameters, gradients):
    for flat in gradients:
        set_gradients(parameters, flat)
        opt.step()


def joined(tensors):
    return np.concatenate([t.detach().double().numpy().reshape(-1) for t in tensors])


def state_of(opt, parameters, name):
    return joined([opt.state[p][name] for p in parameters])


def counters(opt, p):
    return tuple(opt.state[p][name] for name in COUNTERS)


def assert_same(found, expected):
    """State dicts, bit for bit."""
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for key, entry in expected["state"].items():
        assert entry.keys() == found["state"][key].keys()
        for name, value in entry.items():
            other = found["state"][key][name]
            assert torch.equal(other, value) if torch.is_tensor(value) else other == value


def compare(steps, lr=0.05, rtol=1e-9, dtype=torch.float64, seed=0, **settings):
    parameters, gradients = problem(steps, dtype, seed)
    weights = [p.detach().double().numpy().copy() for p in parameters]
    opt = NeumannOptimizer(parameters, lr, **settings)
    for k, expected in enumerate(oracle(weights, gradients, lambda _: lr, **settings)):
        run(opt, parameters, gradients[k : k + 1])
        found = joined(parameters), *(state_of(opt, parameters, name) for name in "vm")
        for a, b in zip((*found, joined(opt.evaluated_parameters())), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol, err_msg=f"step {k + 1}")
    return opt, parameters


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


# Evaluation


def trained(steps=9):
    parameters, gradients = problem(steps, torch.float32)
    opt = NeumannOptimizer(parameters, 0.5, **SHORT)
    run(opt, parameters, gradients)
    return opt, parameters, gradients


def test_evaluation_weights_and_the_way_back():
    opt, parameters, gradients = trained()
    before, state = copy.deepcopy(parameters), copy.deepcopy(opt.state_dict())
    mu = 1 - 1 / (1 + 7)
    with opt.evaluation_weights():
        for p, w in zip(parameters, before, strict=True):
            expected = w - mu * opt.state[p]["m"]
            torch.testing.assert_close(p, expected)
            assert not torch.equal(p, w)
        inside = copy.deepcopy(parameters)
    assert all(map(torch.equal, parameters, before))
    assert all(map(torch.equal, opt.evaluated_parameters(), inside))
    assert_same(opt.state_dict(), state)
    assert "_evaluating" not in vars(opt)
    # Adding mu m again would not bring w back.
    again = [e + mu * opt.state[p]["m"] for e, p in zip(inside, parameters, strict=True)]
    assert not all(map(torch.equal, again, before)), "this test cannot fail"
    run(opt, parameters, gradients[:1])


def test_evaluation_weights_after_an_exception():
    opt, parameters, gradients = trained()
    before = copy.deepcopy(parameters)
    with pytest.raises(KeyError), opt.evaluation_weights():
        with torch.no_grad():
            parameters[1].fill_(math.nan)  # whatever is done to them inside
        raise KeyError
    assert all(map(torch.equal, parameters, before))
    run(opt, parameters, gradients[:1])


def test_no_step_inside_evaluation():
    opt, parameters, gradients = trained()
    before = copy.deepcopy(parameters)
    with opt.evaluation_weights():
        inside = copy.deepcopy(parameters)
        with pytest.raises(UnsupportedError, match=r"step\(\) inside evaluation_weights"):
            run(opt, parameters, gradients[:1])
        with pytest.raises(UnsupportedError, match="inside"), opt.evaluation_weights():
            pass
        with pytest.raises(UnsupportedError, match="inside"):
            opt.evaluated_parameters()
        assert all(map(torch.equal, parameters, inside))
        assert opt.state[parameters[0]]["step"] == 9
    assert all(map(torch.equal, parameters, before))


def test_evaluation_before_the_first_step():
    parameters, _ = problem(1)
    opt = NeumannOptimizer(parameters, 0.1, **SHORT)
    before = copy.deepcopy(parameters)
    with opt.evaluation_weights():
        assert all(map(torch.equal, parameters, before))
    copies = opt.evaluated_parameters()
    assert all(map(torch.equal, copies, before))
    assert all(c.data_ptr() != p.data_ptr() for c, p in zip(copies, parameters, strict=True))
    assert not any(c.requires_grad for c in copies)


# State


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resume_bitwise(at, dtype):
    """In the warm-up, at its end, at a reset, between resets."""
    parameters, gradients = problem(18, dtype)
    others = copy.deepcopy(parameters)
    opt = NeumannOptimizer(parameters, 0.05, **SHORT)
    run(opt, parameters, gradients)
    first = NeumannOptimizer(others, 0.05, **SHORT)
    run(first, others, gradients[:at])
    file = io.BytesIO()
    torch.save((first.state_dict(), others), file)
    file.seek(0)
    saved, others = torch.load(file, weights_only=False)
    # Settings that differ are those of the checkpoint, as in torch.
    second = NeumannOptimizer(others, 1.0, 7)
    second.load_state_dict(saved)
    run(second, others, gradients[at:])
    assert all(map(torch.equal, others, parameters))
    assert_same(second.state_dict(), opt.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copied):
    opt, parameters, gradients = trained()
    twin, others = copied((opt, parameters))
    run(opt, parameters, gradients)
    assert twin.state[others[0]]["step"] == 9
    run(twin, others, gradients)
    assert all(map(torch.equal, others, parameters))
    assert_same(twin.state_dict(), opt.state_dict())
    assert NeumannOptimizer(twin.param_groups).state[others[0]]["step"] == 18


def test_state_and_settings_survive_being_made_anew_of_the_groups_alone():
    """As hvd.DistributedOptimizer does, with a class made at run time."""
    opt, parameters, gradients = trained()
    state = copy.deepcopy(opt.state_dict())
    cls = type("NeumannOptimizer", (NeumannOptimizer,), {})
    other = cls(opt.param_groups)
    assert_same(other.state_dict(), state)
    run(other, parameters, gradients)
    assert counters(other, parameters[0])[0] == 18
    other.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert other.param_groups[1]["steps_per_epoch"] == 2
    assert other.param_groups[1]["lr"] == 0.5
    loaded = NeumannOptimizer(parameters, 1.0, 3)
    loaded.load_state_dict(state)  # makes new groups, and these know their state as well
    assert_same(cls(loaded.param_groups).state_dict(), state)
    # With a plain list of the groups the settings travel all the same.
    assert cls(list(opt.param_groups)).param_groups[0]["steps_per_epoch"] == 2
    # Whoever says more than that begins anew.
    fresh = NeumannOptimizer(opt.param_groups, 0.1, 5)
    assert counters(fresh, parameters[0]) == (0, 0, 0, 0)


def test_state_is_there_before_the_first_step():
    """Horovod steps on zero gradients to make it, where there is none."""
    parameters, _ = problem(1)
    opt = NeumannOptimizer(parameters, 0.1, **SHORT)
    found = opt.state_dict()["state"]
    assert len(found) == len(parameters)
    assert {name for entry in found.values() for name in entry} == {"m", "v", *COUNTERS}


# As the base of Anderson acceleration


def quadratic(anderson=None, lr=0.05, steps=60):
    """Full-batch least squares; the loss and the optimizer."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(12, generator=generator, dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    opt = NeumannOptimizer([p], lr, **SHORT, beta=0.0)
    if anderson is not None:
        opt = AndersonOptimizer(opt, anderson=anderson)
    best = (torch.linalg.lstsq(a, y[:, None]).solution[:, 0], a)
    for _ in range(steps):
        opt.zero_grad()
        (a @ p - y).square().mean().backward()
        opt.step()
    return opt, p, float((best[1] @ (p.detach() - best[0])).square().mean())


@pytest.mark.parametrize("residual", ["gradient", "step"])
def test_never_accelerated_is_itself_bit_for_bit(residual):
    config = AndersonConfig(frequency=10**9, residual=residual)
    opt, p, _ = quadratic(config)
    plain, q, _ = quadratic()
    assert torch.equal(p, q)
    assert isinstance(opt, NeumannOptimizer)
    assert torch.equal(opt.state[p]["m"], plain.state[q]["m"])
    assert opt.anderson.stats.stored == 60


def test_acceleration_gains_and_evaluation_goes_on():
    opt, p, loss = quadratic(AndersonConfig(history_depth=6))
    _, _, plain = quadratic()
    assert opt.anderson.stats.accelerated > 10
    assert loss < plain / 100
    before = p.detach().clone()
    with opt.evaluation_weights():
        assert not torch.equal(p, before) or not opt.state[p]["m"].any()
        with pytest.raises(UnsupportedError, match="inside evaluation_weights"):
            opt.step()
    assert torch.equal(p, before)
    opt.step()


def test_a_rejected_step_takes_the_counters_back():
    """The paper's safeguard restores the base optimizer's state."""
    config = AndersonConfig(safeguard="residual", residual="step", relaxation=1.0, frequency=1)
    opt, p, _ = quadratic(config)
    stats = opt.anderson.stats
    assert stats.rejected["residual"] > 0, stats
    assert opt.state[p]["step"] < 60
    plain = NeumannOptimizer([p], 0.05, **SHORT)
    plain.load_state_dict(opt.state_dict())  # t and m go together
    assert counters(plain, p) == counters(opt, p)


# What is refused


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"lr": None}, r"lr=None\. Must be a finite number >= 0"),
        ({"lr": -0.1}, "lr=-0.1"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": torch.ones(2)}, "lr=tensor"),
        ({"steps_per_epoch": None}, r"steps_per_epoch=None\. Must be an integer >= 1"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0"),
        ({"steps_per_epoch": 2.0}, "steps_per_epoch=2.0"),
        ({"steps_per_epoch": True}, "steps_per_epoch=True"),
        ({"alpha": -1e-7}, "alpha=-1e-07"),
        ({"beta": math.inf}, "beta=inf"),
        ({"gamma": 1.01}, r"gamma=1\.01\. Must be a finite number >= 0 and <= 1"),
        ({"mu_min": -0.1}, "mu_min=-0.1"),
        ({"mu_max": 0.4}, r"mu_max=0\.4\. Must be a finite number >= 0\.5 and <= 1"),
        ({"mu_max": 1.1}, "mu_max=1.1"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1"),
        ({"reset_epochs": 0}, r"reset_epochs=0\. Must be a finite number > 0"),
        ({"variables": "scalars"}, "variables='scalars'.*parameters.*tensors"),
        ({"weight_decay": "1"}, "weight_decay='1'"),
    ],
)
def test_settings_that_are_refused(wrong, match):
    parameters, _ = problem(1)
    settings = {"lr": 0.1, "steps_per_epoch": 2} | wrong
    with pytest.raises(ConfigError, match=match):
        NeumannOptimizer(parameters, **settings)
    # In a group as well; the optimizer stays what it was.
    opt = NeumannOptimizer(parameters[:2], 0.1, 2)
    with pytest.raises(ConfigError, match=match):
        opt.add_param_group({"params": parameters[2:]} | wrong)
    assert len(opt.param_groups) == 1
    assert len(opt.state) == 2


@pytest.mark.parametrize(
    "name, value",
    [("steps_per_epoch", 3), ("warmup_epochs", 1), ("reset_epochs", 1), ("variables", "tensors")],
)
def test_groups_share_what_is_of_the_whole(name, value):
    parameters, _ = problem(1)
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], name: value}]
    with pytest.raises(ConfigError, match=rf"{name}={value!r} of parameter group 1.*first group"):
        NeumannOptimizer(groups, 0.1, 2)


def test_extreme_settings_that_are_allowed():
    parameters, gradients = problem(3)
    settings = {"alpha": 0, "beta": 0, "gamma": 1, "mu_min": 0, "mu_max": 0, "warmup_epochs": 0}
    opt = NeumannOptimizer(parameters, 0, np.int64(1), **settings)
    before = joined(parameters)
    run(opt, parameters, gradients)
    np.testing.assert_array_equal(joined(parameters), before)


def test_kinds_of_tensors_that_are_refused():
    with pytest.raises(UnsupportedError, match="complex64"):
        NeumannOptimizer([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))], 0.1, 2)
    table = torch.nn.Embedding(4, 2, sparse=True)
    opt = NeumannOptimizer(table.parameters(), 0.1, 2)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedError, match="sparse"):
        opt.step()

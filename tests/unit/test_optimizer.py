"""AndersonOptimizer, in one process, as a user of torch.optim uses an optimizer."""

import copy
import pickle
import warnings

import pytest
import torch
from problems import TEXTBOOK

from aadl_hvd import (
    AndersonConfig,
    AndersonOptimizer,
    CheckpointError,
    ConfigError,
    UnsupportedError,
)

NEVER = AndersonConfig(frequency=10**9)
OFTEN = AndersonConfig(**TEXTBOOK, frequency=3, history_depth=4, safeguard="none", relaxation=0.3)
STEPS = 9

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.02, foreach=True, amsgrad=True),
    "tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.02)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "ASGD": lambda p: torch.optim.ASGD(p, t0=2),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


def network(dtype=torch.float32):
    torch.manual_seed(7)
    layers = torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    return torch.nn.Sequential(*layers).to(dtype)


def data(steps, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps, 6, 3, generator=generator).to(dtype)
    return list(zip(x, torch.randn(steps, 6, 2, generator=generator).to(dtype), strict=True))


def train(model, opt, batches):
    for x, y in batches:
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        opt.step()


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def assert_same_state(found, expected):
    assert found["state"].keys() == expected["state"].keys()
    for key, entry in expected["state"].items():
        for name, value in entry.items():
            other = found["state"][key][name]
            same = torch.equal(other, value) if torch.is_tensor(value) else other == value
            assert same, (key, name)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("residual", ["gradient", "step"])
def test_never_accelerated_is_the_base_optimizer_bit_for_bit(name, residual):
    first, second = network(), network()
    base = OPTIMIZERS[name](first.parameters())
    opt = OPTIMIZERS[name](second.parameters())
    cls = type(opt)
    opt = AndersonOptimizer(opt, anderson=AndersonConfig(frequency=10**9, residual=residual))
    assert isinstance(opt, cls)
    train(first, base, data(STEPS))
    train(second, opt, data(STEPS))
    assert torch.equal(flat(first), flat(second))
    assert_same_state(opt.state_dict(), base.state_dict())
    assert opt.anderson.stats.stored == STEPS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_plain_torch_and_back(name):
    first = network()
    opt = AndersonOptimizer(OPTIMIZERS[name](first.parameters()), anderson=OFTEN)
    train(first, opt, data(STEPS))
    counters = opt.anderson.stats.counters()
    assert counters["accelerated"] == 3
    saved = copy.deepcopy(opt.state_dict())
    base = OPTIMIZERS[name](first.parameters())
    base.load_state_dict(saved)
    assert_same_state(base.state_dict(), saved)
    second = AndersonOptimizer(OPTIMIZERS[name](first.parameters()), anderson=OFTEN)
    second.load_state_dict(base.state_dict())  # plain torch's: no counters in it
    assert second.anderson.stats.steps == 0
    second.load_state_dict(saved)
    assert second.anderson.stats.counters() == counters
    assert_same_state(second.state_dict(), saved)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_are_accelerated_too(name, copied):
    """AADL's patched `step` is lost in a deepcopy."""
    model = network()
    opt = AndersonOptimizer(OPTIMIZERS[name](model.parameters()), anderson=OFTEN)
    train(model, opt, data(STEPS))
    other, twin = copied((model, opt))
    assert type(twin).__mro__[-3:] == type(opt).__mro__[-3:]
    assert twin.anderson.config == OFTEN
    assert twin.anderson.stats.counters() == opt.anderson.stats.counters()
    assert twin.param_groups[0]["params"][0] is next(other.parameters())
    assert_same_state(twin.state_dict(), opt.state_dict())
    before = flat(model).clone()
    train(other, twin, data(STEPS))
    assert twin.anderson.stats.accelerated == 6
    assert opt.anderson.stats.accelerated == 3
    assert torch.equal(flat(model), before), "the copy trains the original"
    # The history begins anew, in the copy as in the original after reset().
    opt.anderson.reset()
    opt.anderson._calls = 0
    train(model, opt, data(STEPS))
    assert torch.equal(flat(model), flat(other))


def test_parameter_without_a_gradient_stays():
    """Weight decay is no gradient: torch leaves such a parameter alone."""
    model = network(torch.float64)
    unused = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    base = torch.optim.SGD([*model.parameters(), unused], lr=0.1, weight_decay=0.1)
    opt = AndersonOptimizer(base, anderson=OFTEN)
    train(model, opt, data(STEPS, torch.float64))
    assert opt.anderson.stats.accelerated == 3
    assert torch.equal(unused, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs(line_search):
    model = network(torch.float64)
    opt = torch.optim.LBFGS(model.parameters(), max_iter=2, line_search_fn=line_search)
    with pytest.raises(UnsupportedError, match="LBFGS"):
        AndersonOptimizer(opt)
    opt = AndersonOptimizer(opt, anderson=AndersonConfig(frequency=3, residual="step"))
    (x, y) = data(1, torch.float64)[0]

    def closure():
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    losses = [float(opt.step(closure).detach()) for _ in range(STEPS)]
    stats = opt.anderson.stats
    assert stats.accelerated + sum(stats.rejected.values()) == 3
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("before", [True, False])
def test_schedulers_without_a_warning(before):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = network()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        opt = AndersonOptimizer(inner, anderson=OFTEN)
        schedule = torch.optim.lr_scheduler.StepLR(inner if before else opt, 2, 0.5)
        for batch in data(6):
            train(model, opt, [batch])
            schedule.step()
        assert opt.param_groups[0]["lr"] == 0.1 / 8
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        for batch in data(2):
            train(model, opt, [batch])
            schedule.step()
        assert opt.param_groups[0]["lr"] == 0.1 / 16


def test_grad_scaler_unscales_before_a_fused_step():
    weights = []
    for scale in (1.0, 1024.0):
        model = network(torch.float64)
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
        opt = AndersonOptimizer(opt, anderson=OFTEN)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for k, (x, y) in enumerate(data(STEPS + 1, torch.float64)):
            opt.zero_grad()
            bad = float("inf") if k == 4 else 1.0
            scaler.scale((model(x) - y).square().mean() * bad).backward()
            scaler.step(opt)
            scaler.update()
        assert opt.anderson.stats.steps == STEPS
        weights.append(flat(model))
    torch.testing.assert_close(*weights, rtol=1e-10, atol=1e-10)


def test_channels_last_weights():
    weights = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3).double().to(memory_format=layout)
        opt = AndersonOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), anderson=OFTEN)
        for k in range(STEPS):
            x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(k)).double()
            opt.zero_grad()
            model(x.to(memory_format=layout)).square().mean().backward()
            opt.step()
        assert model.weight.is_contiguous(memory_format=layout)
        weights.append(flat(model))
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-9)


def test_bfloat16_parameters():
    model = network(torch.bfloat16)
    opt = AndersonOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), anderson=OFTEN)
    train(model, opt, data(STEPS, torch.bfloat16))
    assert opt.anderson.stats.accelerated == 3
    assert flat(model).dtype == torch.bfloat16


def test_hooks_fire_once_around_the_accelerated_step():
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    inner.register_step_pre_hook(lambda *_: seen.append(flat(model)))
    opt = AndersonOptimizer(inner, anderson=OFTEN)
    opt.register_step_post_hook(lambda *_: seen.append(flat(model)))
    for batch in data(6):
        before = flat(model)
        train(model, opt, [batch])
        assert len(seen) == 2
        assert torch.equal(seen[0], before)
        assert torch.equal(seen[1], flat(model))
        seen.clear()


def test_add_param_group_and_state_are_shared_with_the_given_optimizer():
    model = network()
    inner = torch.optim.Adam(model[0].parameters(), lr=0.03)
    train(model, inner, data(2))
    opt = AndersonOptimizer(inner, anderson=OFTEN)
    opt.add_param_group({"params": list(model[2].parameters())})
    assert opt.param_groups[1]["lr"] == 0.03
    train(model, opt, data(STEPS))
    assert int(opt.state[model[0].weight]["step"]) == 2 + STEPS
    assert len(inner.param_groups) == 2
    assert opt.anderson.stats.accelerated == 3


def test_loss_safeguard():
    model = network()
    settings = AndersonConfig(**TEXTBOOK, frequency=3, safeguard="loss")
    opt = AndersonOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), anderson=settings)
    with pytest.raises(UnsupportedError, match="closure"):
        opt.step()
    (x, y) = data(1)[0]

    def closure():
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = [opt.step(closure).item() for _ in range(12)]
    assert losses == sorted(losses, reverse=True)
    assert opt.anderson.stats.accelerated + opt.anderson.stats.rejected["loss"] == 4


def test_what_is_refused():
    model = network()
    opt = AndersonOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UnsupportedError, match="accelerated already"):
        AndersonOptimizer(opt)
    with pytest.raises(UnsupportedError, match=r"torch\.optim\.Optimizer"):
        AndersonOptimizer(model)
    with pytest.raises(ConfigError, match="AndersonConfig"):
        AndersonOptimizer(torch.optim.SGD(model.parameters()), anderson=3)
    with pytest.raises(TypeError):
        AndersonOptimizer(torch.optim.SGD(model.parameters()), NEVER)
    with pytest.raises(UnsupportedError, match="constructed"):
        type(opt)(model.parameters(), lr=0.1)
    state = opt.state_dict()
    state["anderson"]["format"] = 99
    with pytest.raises(CheckpointError, match="format"):
        opt.load_state_dict(state)
    complex_weight = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(UnsupportedError, match="complex64"):
        AndersonOptimizer(torch.optim.SGD([complex_weight], lr=0.1))

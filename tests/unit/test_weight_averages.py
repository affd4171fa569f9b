"""Running averages for evaluation: against formulas, and put in and taken out without a trace."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import PLAIN, TEXTBOOK, Problem, flat

from aadl_hvd import AndersonConfig, AndersonOptimizer, ConfigError, UnsupportedError
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core.averages import WeightAverages

DOUBLE = torch.float64
CPU = torch.device("cpu")


def averages(decays, every=1, rows=3):
    return WeightAverages(decays, every, rows, DOUBLE, CPU)


def feed(average, iterates, residuals=None, gains=None):
    residuals = np.zeros_like(iterates) if residuals is None else residuals
    found = []
    for w, r in zip(torch.from_numpy(iterates), torch.from_numpy(residuals), strict=True):
        part = average.partial_gains(w, r).numpy()
        found.append(part)
        average.push(w, r, part)
    return np.array(found)


@settings(max_examples=40, deadline=None)
@given(
    decay=st.floats(0.05, 0.999),
    every=st.integers(1, 5),
    count=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_exponential_average(decay, every, count, seed):
    """The plain mean at first, then the decay of as many steps as lie between two iterates."""
    iterates = np.random.default_rng(seed).standard_normal((count, 3))
    average = averages((decay,), every)
    feed(average, iterates)
    expected = np.zeros(3)
    for k, w in enumerate(iterates, start=1):
        weight = max(1 - decay**every, 1 / k)
        expected = (1 - weight) * expected + weight * w
    np.testing.assert_allclose(average.mean(decay), expected, rtol=1e-12, atol=1e-12)


def test_gains_are_exact_on_a_quadratic():
    """f(w) - f(avg w), whatever the iterates; smoothed with the weight of the steps between."""
    random = np.random.default_rng(3)
    A = random.standard_normal((3, 3))
    A = A @ A.T
    b = random.standard_normal(3)
    iterates = random.standard_normal((25, 3))
    decays, every = (0.7, 0.95), 2
    average = averages(decays, every)
    parts = feed(average, iterates, b - iterates @ A)

    def f(w):
        return 0.5 * w @ A @ w - b @ w

    for position, decay in enumerate(decays):
        smoothed, weight = 0.0, 0.0
        for k in range(1, len(iterates)):
            before = averages(decays, every)
            feed(before, iterates[:k])
            gain = f(iterates[k]) - f(before.mean(decay).numpy())
            assert parts[k, position] == pytest.approx(gain, rel=1e-9)
            smoothed = 0.95**every * smoothed + (1 - 0.95**every) * gain
            weight = 0.95**every * weight + (1 - 0.95**every)
        assert average.gains[decay] == pytest.approx(smoothed / weight, rel=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_out(bad):
    average = averages((0.5, 0.9))
    iterates = np.ones((5, 3))
    feed(average, iterates)
    spoilt = iterates[:1].copy()
    spoilt[0, 1] = bad
    feed(average, spoilt, np.ones((1, 3)))
    feed(average, iterates[:1], np.full((1, 3), bad))
    assert average.count == 5
    for decay in average.decays:
        np.testing.assert_array_equal(average.mean(decay), np.ones(3))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("p", [1, 3])
def test_average_of_the_path(ranks, layout, p):
    """What is put in is the mean of the weights that accelerated steps began with."""
    problem = Problem(PLAIN)
    config = AndersonConfig(
        **TEXTBOOK | {"averages": (0.8, 0.95)}, frequency=p, history_depth=3, layout=layout
    )

    def program(comm):
        path, opt = problem.run(config, 14, None if ranks == 1 else comm)
        before = copy.deepcopy(opt.state_dict()["state"])
        found = {}
        for decay in config.averages:
            with opt.averaged_weights(which=decay) as name:
                assert name == decay
                found[decay] = flat(opt)
        assert np.array_equal(flat(opt), path[-1]), "weights were not put back"
        assert str(opt.state_dict()["state"]) == str(before)
        return path, found, opt.anderson.average_gains

    results = run_ranks(ranks, program)
    path, found, gains = results[0]
    seen = path[p - 1 : -1 : p]
    for decay in config.averages:
        expected = averages((decay,), p, problem.n)
        feed(expected, seen)
        np.testing.assert_allclose(found[decay], expected.mean(decay), rtol=1e-9, atol=1e-12)
        assert np.isfinite(gains[decay])
    for _, other, other_gains in results[1:]:
        assert all(np.array_equal(other[decay], found[decay]) for decay in found)
        assert other_gains == gains


class Noisy:
    """SGD around the minimum of a quadratic: its average is far better than its last iterate."""

    def __init__(self, noise, start=0.0, averages=(0.9, 0.98), lr=0.3, **more):
        self.random = np.random.default_rng(0)
        self.noise = noise
        self.p = torch.nn.Parameter(torch.full((50,), start, dtype=DOUBLE))
        settings = AndersonConfig(averages=averages, noise_gate=1e9, **more)
        self.opt = AndersonOptimizer(torch.optim.SGD([self.p], lr=lr), anderson=settings)

    def loss(self):
        return 0.5 * float(self.p.detach() @ self.p.detach())

    def run(self, steps):
        for _ in range(steps):
            noise = self.noise * torch.from_numpy(self.random.standard_normal(50))
            self.p.grad = self.p.detach() + noise
            self.opt.step()
        return self


def test_gradients_choose_the_average_in_noise_and_the_last_iterate_without():
    noisy = Noisy(1.0).run(200)
    last = noisy.loss()
    with noisy.opt.averaged_weights() as name:
        assert name == 0.98
        assert noisy.loss() < 0.2 * last
    calm = Noisy(0.0, start=5.0, lr=0.02, frequency=10**6).run(60)  # plain SGD
    with calm.opt.averaged_weights() as name:
        assert name is None
        assert calm.loss() == pytest.approx(0.5 * 50 * (5 * 0.98**60) ** 2)


@pytest.mark.parametrize("noise", [0.0, 0.05, 1.0])
def test_the_loss_never_chooses_worse_than_the_last_iterate(noise):
    problem = Noisy(noise, start=3.0, lr=0.05).run(70)
    last = problem.loss()
    with problem.opt.averaged_weights(problem.loss) as name:
        chosen = problem.loss()
    candidates = {None: last}
    for decay in (0.9, 0.98):
        with problem.opt.averaged_weights(which=decay):
            candidates[decay] = problem.loss()
    assert candidates[name] == chosen == min(candidates.values())
    assert problem.loss() == last


def test_a_loss_that_is_no_number_is_not_chosen():
    problem = Noisy(1.0).run(50)
    losses = iter([5.0, float("nan"), 7.0])
    with problem.opt.averaged_weights(lambda: next(losses)) as name:
        assert name is None


def test_before_the_first_accelerated_step_there_is_the_last_iterate_only():
    problem = Noisy(1.0, frequency=5).run(3)
    for arguments in ({}, {"which": 0.9}, {"loss": problem.loss}):
        with problem.opt.averaged_weights(**arguments) as name:
            assert name is None


def test_weights_come_back_after_an_error():
    problem = Noisy(1.0).run(30)
    here = problem.p.detach().clone()
    with pytest.raises(KeyError), problem.opt.averaged_weights(which=0.98):
        assert not torch.equal(problem.p.detach(), here)
        raise KeyError
    assert torch.equal(problem.p.detach(), here)
    problem.run(1)  # and steps may be taken again


def test_no_step_at_averaged_weights():
    problem = Noisy(1.0).run(30)
    with problem.opt.averaged_weights(), pytest.raises(UnsupportedError, match="averaged_weights"):
        problem.run(1)


@pytest.mark.parametrize("bad", [0.5, 10, "last", True])
def test_unknown_average(bad):
    problem = Noisy(1.0).run(3)
    with (
        pytest.raises(ConfigError, match=r"Invalid which=.*averages=\(0.9, 0.98\)"),
        problem.opt.averaged_weights(which=bad),
    ):
        pass


def test_batch_norm_belongs_to_the_weights_in_place():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Dropout(0.5), torch.nn.Linear(5, 1)
    )
    batches = [torch.randn(16, 3) for _ in range(4)]
    opt = AndersonOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.3),
        anderson=AndersonConfig(noise_gate=1e9, averages=(0.9,)),
    )
    for step in range(30):
        opt.zero_grad()
        model(batches[step % 4]).square().mean().backward()
        opt.step()
    model.eval()
    norm = model[1]
    before = copy.deepcopy(model.state_dict())
    with opt.averaged_weights(which=0.9, model=model, batches=iter(batches)):
        assert not model.training
        with torch.no_grad():
            inputs = [model[0](x) for x in batches]
        mean = torch.stack([x.mean(0) for x in inputs]).mean(0)
        variance = torch.stack([x.var(0) for x in inputs]).mean(0)
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, variance)
        assert norm.momentum == 0.1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(ConfigError, match="batches"), opt.averaged_weights(model=model, batches=[]):
        pass

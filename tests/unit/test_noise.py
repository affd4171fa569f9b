"""The variance of the mean gradient against its definition, and what the gate makes of it."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import PLAIN, TEXTBOOK, Problem, flat
from sklearn.datasets import load_digits

from aadl_hvd import AndersonConfig, AndersonOptimizer
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core import noise
from aadl_hvd.core.accelerator import Accelerator
from aadl_hvd.core.noise import (
    GradientSamples,
    NoiseMeter,
    stands_out,
    variance_from_history,
)
from aadl_hvd.stats import Stats

DOUBLE = torch.float64


def riders_of(meter):
    return meter.payload(meter.measured().numpy())


def network():
    torch.manual_seed(3)
    layers = torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)
    return torch.nn.Sequential(*layers).double()


class Regression:
    """A tanh network on 400 samples, each with a label of its own, in mini-batches of 8."""

    BATCH = 8

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(400, 4, generator=generator, dtype=DOUBLE)
        self.y = torch.sin(self.x.sum(dim=1, keepdim=True))
        self.y += 0.5 * torch.randn(400, 1, generator=generator, dtype=DOUBLE)

    def loss(self, model, chosen):
        return (model(self.x[chosen]) - self.y[chosen]).square().mean()

    def draw(self, generator, count=BATCH):
        return torch.randint(len(self.x), (count,), generator=generator)

    def true_variance(self, model, batch):
        """Of the mean gradient over `batch` draws with replacement, at the weights in place."""
        gradients = []
        for i in range(len(self.x)):
            grads = torch.autograd.grad(self.loss(model, [i]), model.parameters())
            gradients.append(torch.cat([g.reshape(-1) for g in grads]))
        return float(torch.stack(gradients).var(dim=0, correction=0).sum()) / batch


def measured(steps, samples, draws, scaled=lambda p, k: None, factor=1.0, model=None, rate=1e-4):
    """Mean of sigma^2 over steps of a slow trajectory; `draws` -> list of losses, one a sample.

    What GradientSamples sees of S ranks with one sample each, or of one rank with S samples.
    """
    model = network() if model is None else model
    parameters = list(model.parameters())
    one_rank = samples > 1
    ranks = 1 if one_rank else len(draws(model, 0))
    takers = [GradientSamples(parameters, samples, factor) for _ in range(ranks)]
    meters, found = [NoiseMeter() for _ in takers], []
    for k in range(steps):
        losses = draws(model, k)
        if one_rank:
            for p in parameters:
                p.grad = None
            for loss in losses:
                loss.backward()
                for p in parameters:
                    takers[0].take(p)
        else:
            own = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses]
            for taker, gradients in zip(takers, own, strict=True):
                for p, gradient in zip(parameters, gradients, strict=True):
                    p.grad = gradient
                    taker.take(p)
            for i, p in enumerate(parameters):
                p.grad = factor * sum(gradients[i] for gradients in own) / ranks
            for taker in takers:
                taker.take_mean()
        for p in parameters:
            scaled(p, k)
        sums = np.zeros(NoiseMeter.PAYLOAD)
        for taker, meter in zip(takers, meters, strict=True):
            meter.note(taker.deviations(), k)
            sums = sums + riders_of(meter)
        if (both := NoiseMeter.variance(sums, ranks)) is not None:
            found.append(both[0])
        with torch.no_grad():
            for p in parameters:
                p -= rate * p.grad
    return np.mean(found), len(found), model


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_variance_over_ranks_is_the_true_one(ranks):
    problem, generator = Regression(), torch.Generator().manual_seed(0)

    def draws(model, k):
        return [problem.loss(model, problem.draw(generator)) for _ in range(ranks)]

    found, count, model = measured(400, 1, draws)
    assert count == 399  # all but the first
    assert found == pytest.approx(problem.true_variance(model, ranks * problem.BATCH), rel=0.2)


@pytest.mark.parametrize("passes", [2, 3])
def test_variance_over_micro_batches_is_the_true_one(passes):
    """Of their sum, which is what the optimizer is given."""
    problem, generator = Regression(), torch.Generator().manual_seed(0)

    def draws(model, k):
        return [problem.loss(model, problem.draw(generator)) for _ in range(passes)]

    found, _, model = measured(400, passes, draws, factor=passes)
    expected = passes**2 * problem.true_variance(model, passes * problem.BATCH)
    assert found == pytest.approx(expected, rel=0.2)


def test_sum_over_ranks():
    problem, generator = Regression(), torch.Generator().manual_seed(0)

    def draws(model, k):
        return [problem.loss(model, problem.draw(generator)) for _ in range(3)]

    found, _, model = measured(400, 1, draws, factor=3.0)
    assert found == pytest.approx(9 * problem.true_variance(model, 24), rel=0.2)


@pytest.mark.parametrize("samples", [1, 3])
def test_a_fixed_partition_has_no_noise(samples):
    """However much the parts differ; and at moving weights only what moves."""
    problem = Regression()
    parts = torch.arange(400).chunk(3)

    def draws(model, k):
        return [problem.loss(model, part) for part in parts]

    found, count, model = measured(5, samples, draws, rate=0.0)
    assert count == 4
    assert found < 1e-25
    noisy = problem.true_variance(model, 400)
    found, _, _ = measured(20, samples, draws, rate=1e-2)
    assert 0.0 < found < noisy / 10


def test_rescaling_between_reduction_and_step():
    """Clipped or unscaled gradients have noise of their own size, whatever the factor."""
    problem = Regression()
    factors = np.random.default_rng(0).uniform(0.1, 10.0, 300)
    results = []
    for scale in (lambda k: 1.0, lambda k: 0.01, lambda k: factors[k]):
        generator = torch.Generator().manual_seed(0)

        def draws(model, k, generator=generator):
            return [problem.loss(model, problem.draw(generator)) for _ in range(2)]

        def scaled(p, k, scale=scale):
            p.grad *= scale(k)

        results.append(measured(300, 1, draws, scaled, rate=0.0)[0])
    plain, small, changing = results
    assert small == pytest.approx(1e-4 * plain, rel=1e-9)
    # Both steps in the units of their own: the mean of both squares is what is measured.
    assert changing == pytest.approx(np.mean(factors**2) * plain, rel=0.2)


def _unscaled(grads):
    factor = torch.tensor(0.5)
    torch._amp_foreach_non_finite_check_and_unscale_(grads, torch.zeros(1), factor)


CHANGES = {
    "nothing": lambda p: None,
    "in place": lambda p: p[1].grad.mul_(3.0),
    "clipped by value": lambda p: torch.nn.utils.clip_grad_value_(p, 0.5),
    "clipped by norm": lambda p: torch.nn.utils.clip_grad_norm_(p, 0.5),
    "another tensor": lambda p: setattr(p[1], "grad", p[1].grad * 3.0),
    "no gradient any more": lambda p: setattr(p[1], "grad", None),
    "by GradScaler": lambda p: _unscaled([q.grad for q in p if q.grad is not None]),
    "through .data": lambda p: [q.grad.data.mul_(0.5) for q in p if q.grad is not None],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("without", ["all", "no gradient", "zeros"])
def test_gradients_changed_after_the_mean(change, without):
    """Whatever torch counts of it: the factor by which own gradients are taken, and f . f."""
    random = torch.Generator().manual_seed(0)
    sizes = (90, 5, 40, 30, 20, 10)
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    own = [torch.randn(n, generator=random) for n in sizes]
    mean = [torch.randn(n, generator=random) for n in sizes]
    if without == "zeros":
        own[0].zero_()
        mean[0].zero_()
    first = 1 if without == "no gradient" else 0
    taker = GradientSamples(parameters)
    for p, g in zip(parameters[first:], own[first:], strict=True):
        p.grad = g.clone()
        taker.take(p)
    for p, g in zip(parameters[first:], mean[first:], strict=True):
        p.grad = g.clone()
    taker.take_mean()
    CHANGES[change](parameters)
    final = torch.cat([torch.zeros(n) if p.grad is None else p.grad
                       for n, p in zip(sizes, parameters, strict=True)])  # fmt: skip
    none = [torch.zeros(sizes[0])] * first
    before, sample = torch.cat(none + mean[first:]), torch.cat(none + own[first:])
    factor = (final @ before) / (before @ before)
    found = taker.deviations()
    torch.testing.assert_close(found.values[0], factor * (sample - before))
    torch.testing.assert_close(found.squared, final @ final)


@given(
    scale=st.floats(1e-6, 1e6),
    samples=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_gate_does_not_depend_on_the_units_of_the_loss(scale, samples, seed):
    """Loss times s: sigma^2 and the squared norm times s^2."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((2, 4, 5))
    both = []
    for unit in (1.0, scale):
        meters, sums = [NoiseMeter() for _ in range(4)], np.zeros(4)
        parameters = [torch.nn.Parameter(torch.zeros(5, dtype=DOUBLE))]
        for k in range(2):
            mean = unit * values[k].mean(axis=0) * samples
            for meter, own in zip(meters, values[k], strict=True):
                taker = GradientSamples(parameters, 1, samples)
                parameters[0].grad = torch.from_numpy(unit * own)
                taker.take(parameters[0])
                parameters[0].grad = torch.from_numpy(mean)
                taker.take_mean()
                meter.note(taker.deviations(), k)
                sums = sums + (riders_of(meter) if k else 0.0)
        both.append(NoiseMeter.variance(sums, 4))
    (variance, squared), (other, other_squared) = both
    assert other == pytest.approx(scale**2 * variance, rel=1e-9)
    assert other_squared == pytest.approx(scale**2 * squared, rel=1e-9)
    for gate in (0.0, 0.1, 1.0, 10.0):
        assert stands_out(squared, variance, gate) == stands_out(other_squared, other, gate)


def test_one_lucky_measurement_opens_no_gate():
    """sigma^2 is at least its share of late; a share that stays low opens the gate in the end."""
    meter = NoiseMeter()
    for _ in range(20):
        assert meter.steadied(0.5, 1.0) == 0.5
    meter.clear()  # of one rank alone, perhaps: must change nothing
    assert meter.steadied(1e-3, 1.0) == pytest.approx(0.9 * 0.5 + 0.1 * 1e-3)
    assert meter.steadied(0.7, 1.0) == 0.7  # never less than measured
    opened = [stands_out(1.0, meter.steadied(1e-3, 1.0), 10.0) for _ in range(60)]
    assert not opened[5] and opened[-1]
    assert opened == sorted(opened)


def test_the_gate_goes_by_steadied_noise(monkeypatch):
    """One measurement in seven is low by luck: none of them opens the gate."""
    shares = itertools.cycle([0.5] * 6 + [1e-3])
    monkeypatch.setattr(NoiseMeter, "variance", staticmethod(lambda *_: (next(shares), 1.0)))
    problem = Problem(PLAIN)
    config = AndersonConfig(frequency=1, residual="step", averages=())
    _, opt = problem.run(config, 40)
    assert opt.anderson.stats.rejected["noise"] > 30
    assert opt.anderson.stats.accelerated == 0


@pytest.mark.parametrize(
    ("variance", "squared"),
    [(math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0), (1.0, math.inf), (1.0, math.nan)],
)
def test_steadied_noise_forgets_bad_numbers(variance, squared):
    meter, other = NoiseMeter(), NoiseMeter()
    for _ in range(10):
        meter.steadied(0.5, 1.0), other.steadied(0.5, 1.0)
    meter.steadied(variance, squared)
    assert meter.steadied(1e-4, 1.0) == other.steadied(1e-4, 1.0) == pytest.approx(0.45, rel=1e-3)
    assert NoiseMeter().steadied(1e-4, 1.0) == 1e-4  # full batches need not wait
    many = NoiseMeter()
    many.steadied(50.0, 1.0)  # no more than all of it
    assert many.steadied(0.0, 1.0) == pytest.approx(0.9)


def test_full_batch_of_unlike_ranks_stays_open():
    """Each rank has classes of its own, so that Hessians differ; but a full batch has no noise.

    A high measurement now and then must not keep columns out for dozens of attempts.
    """
    x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    x, ranks = x.float() / 16, 4
    parts = torch.argsort(y, stable=True)[: len(y) // ranks * ranks].chunk(ranks)

    def program(comm):
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((10, 64), (10,))]
        base = torch.optim.SGD(parameters, lr=0.5, momentum=0.9, nesterov=True)
        opt = AndersonOptimizer(base)
        opt.anderson = Accelerator(opt.anderson.config, comm)
        problem = opt._anderson_problem
        problem.sample_gradients(1, 1.0)
        for _ in range(200):
            opt.zero_grad()
            mine = parts[comm.rank]
            logits = torch.nn.functional.linear(x[mine], *parameters)
            torch.nn.functional.cross_entropy(logits, y[mine]).backward()
            measuring = opt.anderson.measures_noise
            for p in parameters:
                if measuring:
                    problem.samples.take(p)
                p.grad.copy_(comm.sum_tensor(p.grad.flatten()).view_as(p.grad) / comm.size)
            if measuring:
                problem.samples.take_mean()
            opt.step()
        return opt.anderson.stats

    stats = run_ranks(ranks, program)[0]
    assert stats.rejected["noise"] <= 20, stats
    assert stats.accelerated >= 40, stats


def test_random_coordinates_are_unbiased(monkeypatch):
    """Mean over draws of the coordinates: that of all; and drawn alike on every rank."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((40, 25), (7,), (2, 150))]
    deviation = [torch.randn(p.shape) * (1 + i) for i, p in enumerate(parameters)]
    squares = []
    monkeypatch.setattr(noise, "COORDINATES", 200)
    for seed in range(60):
        monkeypatch.setattr(noise, "_SEED", seed)
        taker, again = (GradientSamples(parameters, 1, 1.0) for _ in range(2))
        assert 150 < taker._own.shape[1] <= 200
        for each in (taker, again):
            for p, d in zip(parameters, deviation, strict=True):
                p.grad = 3.0 + d
                each.take(p)
            for p in parameters:
                p.grad = torch.full_like(p, 3.0)
            each.take_mean()
        found, same = taker.deviations(), again.deviations()
        assert torch.equal(found.values, same.values)
        assert float(found.squared) == pytest.approx(9 * 1307, rel=1e-5)
        squares.append(float(found.values.square().sum()))
    true = sum(float(d.square().sum()) for d in deviation)
    assert np.mean(squares) == pytest.approx(true, rel=0.03)
    assert np.std(squares) > 1e-3 * true, "all of them were looked at"


def test_parameters_without_gradient_count_as_zero():
    """A layer used in every other step; one never used."""
    p, q, never = (torch.nn.Parameter(torch.zeros(3, dtype=DOUBLE)) for _ in range(3))
    taker = GradientSamples([p, q, never])

    def deviations(own_q):
        p.grad = torch.ones(3, dtype=DOUBLE)
        q.grad = None if own_q is None else torch.full((3,), own_q, dtype=DOUBLE)
        for x in (p, q):
            if x.grad is not None:
                taker.take(x)
                x.grad = x.grad / 2
        taker.take_mean()
        return taker.deviations()

    np.testing.assert_allclose(deviations(4.0).values[0], [0.5] * 3 + [2.0] * 3 + [0.0] * 3)
    np.testing.assert_allclose(deviations(None).values[0], [0.5] * 3 + [0.0] * 6)


def test_missing_samples_are_noticed():
    p, q = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    taker = GradientSamples([p, q])
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    assert taker.deviations() is None
    taker.take(p)
    taker.take_mean()
    assert taker.deviations() is None, "that of q is missing"
    taker.take(p)
    taker.take(q)
    assert taker.deviations() is None, "the mean is missing"
    taker.take(p)
    taker.take(q)
    taker.take_mean()
    assert taker.deviations() is not None
    twice = GradientSamples([p], samples=2)
    twice.take(p)
    assert twice.deviations() is None
    for _ in range(3):
        twice.take(p)
    assert twice.deviations() is None, "more than were announced"


def test_a_step_left_out_by_grad_scaler_spoils_nothing():
    p = torch.nn.Parameter(torch.zeros(3))
    taker = GradientSamples([p])
    for value in (math.inf, 1.0):  # the first is reduced, but no step follows
        p.grad = torch.full((3,), value)
        taker.take(p)
        taker.take_mean()
    assert float(taker.deviations().values.abs().sum()) == 0.0


def test_sparse_gradients():
    values = []
    for sparse in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Embedding(10, 3, sparse=sparse)
        taker = GradientSamples([layer.weight])
        layer(torch.tensor([1, 4, 4])).square().sum().backward()
        taker.take(layer.weight)
        layer.weight.grad = layer.weight.grad * 0.5
        taker.take_mean()
        values.append(taker.deviations().values)
    assert values[0].abs().sum() > 0
    assert torch.equal(*values)


def test_only_successive_steps_are_compared():
    meter = NoiseMeter()
    p = torch.nn.Parameter(torch.zeros(2))

    def note(call):
        taker = GradientSamples([p])
        p.grad = torch.randn(2)
        taker.take(p)
        p.grad = torch.randn(2)
        taker.take_mean()
        meter.note(taker.deviations(), call)
        return riders_of(meter).any()

    assert [note(call) for call in (1, 2, 4, 5, 6)] == [False, True, False, True, True]
    meter.clear()
    assert [note(call) for call in (7, 8)] == [False, True]
    meter.note(None, 9)
    assert not riders_of(meter).any()
    assert [note(call) for call in (10, 11)] == [False, True]


def test_all_ranks_must_have_measured():
    assert NoiseMeter.variance(np.array([0.0, 1.0, 1.0, 5.0]), 1) is None, "one sample"
    assert NoiseMeter.variance(np.array([4.0, 2.0, 2.0, 6.0]), 2) == (1.0, 3.0)
    assert NoiseMeter.variance(np.array([4.0, 2.0, 2.0, 6.0]), 3) is None, "a rank is missing"
    assert NoiseMeter.variance(np.zeros(4), 3) is None


def test_what_stands_out():
    assert not stands_out(11.0, 1.0, 10.0)
    assert stands_out(11.001, 1.0, 10.0)
    assert stands_out(1e-300, 0.0, 10.0)
    assert not stands_out(0.0, 0.0, 10.0)
    for bad in (math.nan, math.inf):
        assert not stands_out(bad, bad, 10.0)
        assert not stands_out(1.0, bad, 10.0)


# One rank without micro-batches


def gram_of(residuals):
    R = np.diff(np.array(residuals), axis=0)
    return R @ R.T


def test_fallback_finds_the_noise_of_a_slow_iteration():
    random = np.random.default_rng(0)
    n, sigma2 = 50, 4.0
    found = []
    for _ in range(100):
        w, r = 10.0, []
        for _ in range(12):
            r.append(np.full(n, w) + random.standard_normal(n) * np.sqrt(sigma2 / n))
            w *= 0.999
        found.append(variance_from_history(gram_of(r)))
    assert np.mean(found) == pytest.approx(sigma2, rel=0.2)


@pytest.mark.parametrize("factors", [(-0.95,), (-0.8, 0.9), (0.99,), (-0.99, -0.5, 0.3, 0.95)])
def test_fallback_sees_no_noise_in_swinging_iterations(factors):
    random = np.random.default_rng(1)
    start = random.standard_normal(len(factors))
    r = [start * np.array(factors) ** k for k in range(12)]
    gram = gram_of(r)
    assert variance_from_history(gram) <= 0.02 * np.median(np.diag(gram))


def test_fallback_needs_three_columns():
    assert variance_from_history(np.eye(2)) is None
    assert variance_from_history(np.eye(3)) == 0.0


def test_fallback_through_the_optimizer():
    """Known noise on a quadratic that hardly moves: the gate closes; without noise it is open."""
    for size, closed in ((0.0, False), (1.0, True)):
        problem = Problem(PLAIN, noise=size)
        config = AndersonConfig(safeguard="none", frequency=2, history_depth=10)
        _, opt = problem.run(config, 60)
        stats = opt.anderson.stats
        assert stats.rejected["noise"] > 25 if closed else stats.accelerated > 25
        if closed:
            assert stats.batch_factor > 1.0


# The optimizer


@pytest.fixture
def digits():
    data = load_digits()
    return torch.tensor(data.data / 16.0), torch.tensor(data.target)


def train_on_digits(digits, steps, batch, passes, **settings):
    images, labels = digits
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10)
    ).double()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = AndersonOptimizer(
        base, backward_passes_per_step=passes, anderson=AndersonConfig(**settings)
    )
    generator = torch.Generator().manual_seed(1)
    fixed = torch.randperm(len(labels), generator=generator).chunk(passes)
    for _ in range(steps):
        opt.zero_grad()
        for part in fixed:
            if batch is not None:
                part = torch.randint(len(labels), (batch,), generator=generator)
            loss = torch.nn.functional.cross_entropy(model(images[part]), labels[part])
            (loss / passes).backward()
        opt.step()
    return opt, model


@pytest.mark.parametrize("passes", [1, 2])
def test_gate_on_digits(digits, passes):
    """Open on full batches, whatever the partition; shut on small ones."""
    full, _ = train_on_digits(digits, 60, None, passes, safeguard="none")
    stats = full.anderson.stats
    assert stats.rejected["noise"] <= 1  # too few columns to estimate by
    assert stats.accelerated >= 29
    assert stats.batch_factor < 0.5
    noisy, _ = train_on_digits(digits, 60, 8, passes)
    stats = noisy.anderson.stats
    assert stats.rejected["noise"] >= 28
    assert stats.batch_factor > 1.0


def test_no_gate_measures_nothing(digits):
    opt, _ = train_on_digits(digits, 10, 8, 2, noise_gate=None)
    assert opt._anderson_problem.samples is None
    assert math.isnan(opt.anderson.stats.batch_factor)
    assert opt.anderson.stats.rejected["noise"] == 0


def test_rejected_as_noise_is_the_base_optimizer_s_step(digits):
    _, model = train_on_digits(digits, 20, 8, 2, noise_gate=1e9)
    _, plain = train_on_digits(digits, 20, 8, 2, frequency=10**9)
    assert torch.equal(
        torch.cat([*map(torch.flatten, model.parameters())]),
        torch.cat([*map(torch.flatten, plain.parameters())]),
    )


@pytest.mark.parametrize("frequency", [1, 2, 5])
def test_samples_are_taken_only_where_they_are_needed(digits, frequency, monkeypatch):
    """In accelerated steps and those before; multiplied out in accelerated ones."""
    steps, taken, products = [], [], []
    take, measure = GradientSamples.take, NoiseMeter.measured
    monkeypatch.setattr(
        GradientSamples, "take", lambda self, p: (taken.append(len(steps) + 1), take(self, p))[1]
    )
    monkeypatch.setattr(
        NoiseMeter, "measured", lambda self: (products.append(len(steps) + 1), measure(self))[1]
    )
    step = Accelerator.step
    monkeypatch.setattr(Accelerator, "step", lambda self, p: (step(self, p), steps.append(1))[0])
    train_on_digits(digits, 20, 8, 2, frequency=frequency)
    needed = [k for k in range(1, 21) if k % frequency == 0 or (k + 1) % frequency == 0]
    assert sorted(set(taken)) == needed
    assert len(taken) == len(needed) * 2 * 4  # micro-batches times parameters
    assert products == [k for k in range(1, 21) if k % frequency == 0]


def test_frozen_and_added_parameters(digits):
    """Samples are of the parameters there are; measuring goes on two steps later."""
    images, labels = digits
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10)
    ).double()
    model[0].weight.requires_grad_(False)
    opt = AndersonOptimizer(
        torch.optim.SGD([model[2].weight, *model[0].parameters()], lr=0.1),
        backward_passes_per_step=2,
        anderson=AndersonConfig(),
    )
    measured, original = [], NoiseMeter.variance

    def run(steps):
        for k in range(steps):
            opt.zero_grad()
            for j in range(2):
                part = slice(8 * (2 * k + j), 8 * (2 * k + j + 1))
                torch.nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            opt.step()

    NoiseMeter.variance = staticmethod(lambda *a: measured.append(original(*a)) or measured[-1])
    try:
        run(6)
        assert None not in measured and len(measured) == 3
        assert opt._anderson_problem.samples._own.shape[1] == 16 + 160
        opt.add_param_group({"params": [model[2].bias]})
        model[0].weight.requires_grad_(True)
        run(4)
        assert opt._anderson_problem.samples._own.shape[1] == 16 + 160 + 10 + 1024
        model[0].weight.requires_grad_(False)
        run(4)
        assert sum(found is not None for found in measured) >= len(measured) - 2
        assert measured[-1] is not None
    finally:
        NoiseMeter.variance = staticmethod(original)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_measure_too(digits, copied):
    opt, model = train_on_digits(digits, 6, 8, 2)
    twin, other = copied((opt, model))
    images, labels = digits
    before = twin.anderson.stats.noise_variance
    assert math.isnan(before)
    for k in range(2):
        twin.zero_grad()
        for j in range(2):
            part = slice(8 * (2 * k + j), 8 * (2 * k + j + 1))
            torch.nn.functional.cross_entropy(other(images[part]), labels[part]).backward()
        twin.step()
    # By gradients: from residuals alone it takes three columns, which are not there yet.
    assert math.isfinite(twin.anderson.stats.noise_variance)


def test_batch_factor_is_its_formula():
    stats = Stats()
    assert math.isnan(stats.batch_factor)
    measurements = [(2.0, 30.0), (4.0, 10.0), (1.0, 100.0)]
    variance = signal = None
    for sigma2, squared in measurements:
        stats.note_noise(sigma2, squared, 7.0)
        variance = sigma2 if variance is None else 0.9 * variance + 0.1 * sigma2
        signal = squared - sigma2 if signal is None else 0.9 * signal + 0.1 * (squared - sigma2)
    assert stats.noise_variance == pytest.approx(variance)
    assert stats.signal == pytest.approx(signal)
    assert stats.batch_factor == pytest.approx(7.0 * variance / signal)
    stats.note_noise(math.nan, math.inf, 7.0)
    assert stats.batch_factor == pytest.approx(7.0 * variance / signal)
    lost = Stats()
    lost.note_noise(5.0, 1.0, 7.0)
    assert lost.batch_factor == math.inf


@pytest.mark.parametrize("safeguard", ["none", "descent"])
def test_columns_of_noise_are_left_out(safeguard):
    """Columns below 2 c sigma^2 are not used: as if only the others had been stored."""
    problem = Problem(PLAIN)
    config = AndersonConfig(**{**TEXTBOOK, "noise_gate": 1.0}, frequency=2, history_depth=6)
    opt = problem.optimizer(config)
    accelerator = opt.anderson
    gram = np.diag([1.0, 5.0, 3.0, 9.0])
    sums = np.array([2.0 * 2 * 2 * 0.5 * 2, 2.0, 2.0, 2 * 50.0])  # sigma^2 = 2 of two samples
    accelerator._comm = type("Two", (), {"size": 2})()
    variance, squared = NoiseMeter.variance(sums, 2)
    assert variance == 2.0 and squared == 50.0
    assert accelerator._clear_of_noise(sums, gram, 50.0) == [1, 3]
    assert accelerator._clear_of_noise(sums, gram, 4.0) == []  # 4 - 2 is no more than 2
    assert accelerator._clear_of_noise(sums, gram, 4.1) == [1, 3]


def test_simulated_ranks_decide_alike():
    """Deviations are one rank's own, the decision everybody's."""

    def program(comm):
        p = torch.nn.Parameter(torch.zeros(6, dtype=DOUBLE))
        opt = AndersonOptimizer(torch.optim.SGD([p], lr=0.1))
        opt.anderson = Accelerator(AndersonConfig(safeguard="none"), comm)
        opt._anderson_problem.sample_gradients(1, 1.0)
        generator = torch.Generator().manual_seed(comm.rank)
        target, path = torch.arange(6.0, dtype=DOUBLE), []
        for k in range(24):
            size = 0.0 if k < 12 else 30.0
            own = (p.detach() - target) * torch.linspace(0.2, 2.0, 6, dtype=DOUBLE)
            own = own + size * torch.randn(6, generator=generator, dtype=DOUBLE)
            p.grad = own
            opt._anderson_problem.samples.take(p)
            p.grad = torch.from_numpy(comm.allreduce(own.numpy().copy()) / comm.size)
            opt._anderson_problem.samples.take_mean()
            opt.step()
            path.append(flat(opt))
        return np.array(path), opt.anderson.stats.counters()

    results = run_ranks(3, program)
    for path, counters in results[1:]:
        assert np.array_equal(path, results[0][0])
        assert counters == results[0][1]
    assert results[0][1]["accelerated"] >= 3
    assert results[0][1]["rejected"]["noise"] >= 5

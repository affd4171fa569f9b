"""The variance of the mean gradient against its definition."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from noise_problem import DOUBLE, Regression, measured, payload_of
from problems import PLAIN, Problem
from sklearn.datasets import load_digits

from aadl_hvd import AndersonConfig, AndersonOptimizer
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core.accelerator import Accelerator
from aadl_hvd.core.noise import NoiseMeter, stands_out
from aadl_hvd.optim import coordinates
from aadl_hvd.optim.gradient_samples import GradientSamples


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
        meters, sums = [NoiseMeter() for _ in range(4)], np.zeros(5)
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
                sums = sums + (payload_of(meter) if k else 0.0)
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
        opt.anderson = opt.anderson_engine.accelerator = Accelerator(opt.anderson.config, comm)
        opt.anderson_engine.problem.sample_gradients(1, 1.0)

        def reduce():
            for p in parameters:
                p.grad.copy_(comm.sum_tensor(p.grad.flatten()).view_as(p.grad) / comm.size)

        opt.anderson_engine.reduce = reduce  # the engine takes samples before and after it
        for _ in range(200):
            opt.zero_grad()
            mine = parts[comm.rank]
            logits = torch.nn.functional.linear(x[mine], *parameters)
            torch.nn.functional.cross_entropy(logits, y[mine]).backward()
            opt.step()
        return opt.anderson.stats

    stats = run_ranks(ranks, program)[0]
    assert stats.noise_variance > 0.0, "nothing was measured"
    assert stats.rejected["noise"] <= 20, stats
    assert stats.accelerated >= 40, stats


def test_the_coordinates_of_all_ranks_stand_for_all(monkeypatch):
    """Mean over the ranks' draws: that of all coordinates."""
    torch.manual_seed(0)
    shapes = (40, 25), (7,), (2, 150), (11, 9), (300,)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    deviation = [torch.randn(p.shape) * (1 + i) for i, p in enumerate(parameters)]
    mean = [torch.randn(p.shape) / (1 + i) for i, p in enumerate(parameters)]
    monkeypatch.setattr(coordinates, "NUMBERS", 200)
    monkeypatch.setattr(coordinates, "TENSORS", 3)
    found, ranks = [], 200
    for rank in range(ranks):
        taker, again = (GradientSamples(parameters, 1, 1.0, rank, ranks) for _ in range(2))
        assert not taker.complete and len(taker.parameters) <= 3
        for each in (taker, again):
            for p, f, d in zip(parameters, mean, deviation, strict=True):
                p.grad = f + d
                each.take(p)
            for p, f in zip(parameters, mean, strict=True):
                p.grad = f.clone()
            each.take_mean()
        one, same = taker.deviations(), again.deviations()
        assert torch.equal(one.values, same.values)
        found.append((float(one.values.square().sum()), float(one.squared)))
    true = [sum(float(d.square().sum()) for d in of) for of in (deviation, mean)]
    np.testing.assert_allclose(np.mean(found, axis=0), true, rtol=0.05)
    assert (np.std(found, axis=0) > 1e-3 * np.array(true)).all(), "all of them were looked at"


@pytest.mark.parametrize("ranks", [2, 4])
def test_noise_of_a_table_of_which_few_rows_have_gradients(ranks):
    """Most of the numbers are in rows without a gradient; layers differ in noise by 100."""
    random = torch.Generator().manual_seed(0)
    shapes = [(3000, 64), *[(40, 40)] * 20]
    scales = [3.0, *np.logspace(-1.0, 1.0, 20)]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    takers = [GradientSamples(parameters, 1, 1.0, rank, ranks) for rank in range(ranks)]
    meters, signal = [NoiseMeter() for _ in takers], [0.5 * scale for scale in scales]
    shares = []
    for k in range(12):
        own = [[scale * torch.randn(shape, generator=random) + there
                for scale, there, shape in zip(scales, signal, shapes, strict=True)]
               for _ in takers]  # fmt: skip
        used = torch.zeros(3000, 1)
        used[torch.randint(3000, (30,), generator=random)] = 1.0
        for gradients in own:
            gradients[0] *= used
        for taker, gradients in zip(takers, own, strict=True):
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
                taker.take(p)
        for p, gradients in zip(parameters, zip(*own, strict=True), strict=True):
            p.grad = torch.stack(gradients).mean(dim=0)
        sums, square = np.zeros(NoiseMeter.PAYLOAD), sum(p.grad.square().sum() for p in parameters)
        for taker, meter in zip(takers, meters, strict=True):
            taker.take_mean()
            # Each rank has another part of the rows.
            found = dataclasses.replace(taker.deviations(), rows=square / ranks)
            meter.note(found, k)
            sums += payload_of(meter)
        if k:
            variance, squared = NoiseMeter.variance(sums, ranks)
            assert squared == pytest.approx(float(square), rel=1e-5)
            shares.append(variance / squared)
    true = (1.0 / ranks) / (1.0 / ranks + 0.25)  # in every tensor
    assert min(shares) > true / 1.25 and max(shares) < 1.25 * true, (shares, true)


def test_gradients_that_are_zero():
    """They say nothing, but are numbers: other ranks' coordinates may have gradients."""
    p = torch.nn.Parameter(torch.zeros(3))
    taker = GradientSamples([p])
    p.grad = torch.full((3,), 2.0)
    taker.take(p)
    p.grad = torch.zeros(3)
    taker.take_mean()
    found = taker.deviations()
    assert found.values.tolist() == [[2.0] * 3]
    assert float(found.squared) == 0.0


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


def test_all_at_once_as_one_after_the_other():
    """Bit for bit, over steps in which gradients come and go, are left out, or are clipped."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((40, 9), (7,), (2, 3, 4, 5))]
    one, all_of_them = (GradientSamples(parameters, 1, 2.0) for _ in range(2))
    for step in range(8):
        for i, p in enumerate(parameters):
            p.grad = None if step % 4 == i else torch.randn(p.shape)
            if step % 2 and p.dim() == 4 and p.grad is not None:
                p.grad = p.grad.contiguous(memory_format=torch.channels_last)
            if p.grad is not None:
                one.take(p)
        all_of_them.take_all()
        for p in parameters:
            p.grad = None if p.grad is None else p.grad / 3.0
        one.take_mean()
        all_of_them.take_mean()
        if step == 5:  # as GradScaler does
            continue
        if step > 5:
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        found, right = all_of_them.deviations(), one.deviations()
        assert torch.equal(found.values, right.values)
        assert torch.equal(found.squared, right.squared)
        assert right.values.any()
    all_of_them.take_all()
    all_of_them.take_all()
    all_of_them.take_mean()
    assert all_of_them.deviations() is None, "more than were announced"


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
    taker.take(q)
    taker.take_mean()
    assert taker.deviations() is None, "that of p is missing"
    q.grad = None
    taker.take(p)
    taker.take_mean()
    assert not taker.deviations().values.any(), "that of q is from the step before"
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
        return payload_of(meter).any()

    assert [note(call) for call in (1, 2, 4, 5, 6)] == [False, True, False, True, True]
    meter.clear()
    assert [note(call) for call in (7, 8)] == [False, True]
    meter.note(None, 9)
    assert not payload_of(meter).any()
    assert [note(call) for call in (10, 11)] == [False, True]


def test_all_ranks_must_have_measured():
    assert NoiseMeter.variance(np.array([0.0, 1.0, 1.0, 5.0, 0.0]), 1) is None, "one sample"
    sums = np.array([4.0, 2.0, 2.0, 6.0, 0.0])
    assert NoiseMeter.variance(sums, 2) == (1.0, 3.0)
    assert NoiseMeter.variance(sums, 3) is None, "a rank is missing"
    assert NoiseMeter.variance(np.zeros(5), 3) is None


def test_noise_of_a_sample_is_measured_against_its_own_square():
    """And scaled to the square that is known exactly."""
    assert NoiseMeter.variance(np.array([4.0, 2.0, 2.0, 6.0, 12.0]), 2) == (4.0, 12.0)
    no_gradient = np.array([0.0, 2.0, 2.0, 0.0, 12.0])  # where it was looked for
    assert NoiseMeter.variance(no_gradient, 2) is None
    assert NoiseMeter.variance(np.array([0.0, 2.0, 2.0, 0.0, 0.0]), 2) == (0.0, 0.0)


def test_what_stands_out():
    assert not stands_out(11.0, 1.0, 10.0)
    assert stands_out(11.001, 1.0, 10.0)
    assert stands_out(1e-300, 0.0, 10.0)
    assert not stands_out(0.0, 0.0, 10.0)
    for bad in (math.nan, math.inf):
        assert not stands_out(bad, bad, 10.0)
        assert not stands_out(1.0, bad, 10.0)

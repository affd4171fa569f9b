"""What the gate makes of the noise: without micro-batches, and in the optimizer."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from noise_problem import DOUBLE
from problems import PLAIN, TEXTBOOK, Problem, flat
from sklearn.datasets import load_digits

from aadl_hvd import AndersonConfig, AndersonOptimizer
from aadl_hvd.comm.base import ShardGroup
from aadl_hvd.comm.local import LocalCommunicator
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core.accelerator import Accelerator
from aadl_hvd.core.acceptance import Acceptance, Rejected
from aadl_hvd.core.collectives import Collectives
from aadl_hvd.core.noise import NoiseMeter, stands_out, variance_from_history
from aadl_hvd.optim.gradient_samples import GradientSamples
from aadl_hvd.stats import Rejection, Stats

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


@pytest.mark.parametrize("growth", [1.2, 1.6])
def test_fallback_keeps_up_with_noise_that_grows(growth):
    """As where a high rate makes the iteration unstable: a median alone is too old."""
    random = np.random.default_rng(2)
    for _ in range(100):
        r = [growth**k * random.standard_normal(50) for k in range(16)]
        assert not stands_out(r[-1] @ r[-1], variance_from_history(gram_of(r)), gate=10.0)


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
        config = AndersonConfig(method="residual", safeguard="none", frequency=2, history_depth=10)
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
    assert stats.rejected["noise"] <= 3  # too few columns, and guesses that have to be confirmed
    assert stats.accelerated >= 26
    assert stats.batch_factor < 0.5
    noisy, _ = train_on_digits(digits, 60, 8, passes, method="residual")
    stats = noisy.anderson.stats
    assert stats.rejected["noise"] >= 28
    assert stats.batch_factor > 1.0


def test_no_gate_measures_nothing(digits):
    opt, _ = train_on_digits(digits, 10, 8, 2, noise_gate=None)
    assert opt.anderson_engine.problem.samples is None
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
    take, measure = GradientSamples.take, NoiseMeter.pending
    monkeypatch.setattr(
        GradientSamples, "take", lambda self, p: (taken.append(len(steps) + 1), take(self, p))[1]
    )
    monkeypatch.setattr(
        NoiseMeter, "pending", lambda self: (products.append(len(steps) + 1), measure(self))[1]
    )
    step = Accelerator.step
    monkeypatch.setattr(Accelerator, "step", lambda self, p: (step(self, p), steps.append(1))[0])
    train_on_digits(digits, 20, 8, 2, method="residual", frequency=frequency)
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
        assert opt.anderson_engine.problem.samples._rows.shape[1] == 16 + 160
        opt.add_param_group({"params": [model[2].bias]})
        model[0].weight.requires_grad_(True)
        run(4)
        assert opt.anderson_engine.problem.samples._rows.shape[1] == 16 + 160 + 10 + 1024
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
    config = AndersonConfig(**{**TEXTBOOK, "noise_gate": 1.0}, safeguard=safeguard)
    collectives = Collectives(LocalCommunicator(), ShardGroup(LocalCommunicator()), Stats())
    acceptance = Acceptance(config, collectives, Stats())
    gram, b = np.diag([1.0, 5.0, 3.0, 9.0]), np.ones(4)
    sums = np.array([2.0 * 2 * 2 * 0.5 * 2, 2.0, 2.0, 2 * 50.0, 0.0])  # sigma^2 = 2 of two samples
    acceptance.noise.unpack(sums, 2)
    assert acceptance.noise.measurement == (2.0, 50.0)
    acceptance.begin()
    assert acceptance.columns((gram, b, 50.0)) == [1, 3]
    with pytest.raises(Rejected) as rejected:
        acceptance.columns((gram, b, 4.0))  # 4 - 2 is no more than 2
    assert rejected.value.cause is Rejection.NOISE
    assert acceptance.columns((gram, b, 4.1)) == [1, 3]


def test_simulated_ranks_decide_alike():
    """Deviations are one rank's own, the decision everybody's."""

    def program(comm):
        p = torch.nn.Parameter(torch.zeros(6, dtype=DOUBLE))
        opt = AndersonOptimizer(torch.optim.SGD([p], lr=0.1))
        opt.anderson = opt.anderson_engine.accelerator = Accelerator(
            AndersonConfig(safeguard="none"), comm
        )
        opt.anderson_engine.problem.sample_gradients(1, 1.0)
        generator = torch.Generator().manual_seed(comm.rank)
        target, path = torch.arange(6.0, dtype=DOUBLE), []

        def reduce():
            p.grad = torch.from_numpy(comm.allreduce(p.grad.numpy().copy()) / comm.size)

        opt.anderson_engine.reduce = reduce  # the engine takes samples before and after it
        for k in range(24):
            size = 0.0 if k < 12 else 30.0
            own = (p.detach() - target) * torch.linspace(0.2, 2.0, 6, dtype=DOUBLE)
            own = own + size * torch.randn(6, generator=generator, dtype=DOUBLE)
            p.grad = own
            opt.step()
            path.append(flat(opt))
        return np.array(path), opt.anderson.stats.counters()

    results = run_ranks(3, program)
    for path, counters in results[1:]:
        assert np.array_equal(path, results[0][0])
        assert counters == results[0][1]
    assert results[0][1]["accelerated"] >= 3
    assert results[0][1]["rejected"]["noise"] >= 5

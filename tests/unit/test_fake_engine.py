"""The seam for libraries that reduce gradients: a new engine needs nothing but `optim.engine`.

The engine here sums gradients over simulated ranks. It is all that a second library would add,
beside its communicator: core, checkpoint and the public methods are used as they are.
"""

import copy

import pytest
import torch
from problems import TEXTBOOK

from aadl_hvd import AndersonConfig, AndersonOptimizer, UnsupportedError
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.optim.accelerated import AcceleratedOptimizer
from aadl_hvd.optim.engine import Engine

STEPS, BATCH = 18, 12
BASES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02),
}
SETTINGS = {
    "rows": {},
    "columns": {"layout": "columns"},
    "step": {"residual": "step", "safeguard": "residual"},
    "loss": {"safeguard": "loss"},
}


class FakeEngine(Engine):
    """Averages gradients in the step, as a library without hooks would."""

    def reduce(self):
        comm = self.accelerator.comm
        for p in self.problem.tensors:
            total = comm.sum_tensor(p.grad.reshape(-1).clone())
            p.grad.copy_((total / comm.size).view_as(p))


class FakeOptimizer(AcceleratedOptimizer):
    def __new__(cls, optimizer, comm, config):
        return cls.accelerate(optimizer, FakeEngine(), config, comm)


def config(**settings):
    fixed = {"frequency": 3, "history_depth": 4, "relaxation": 0.5, "regularization": 1e-6}
    return AndersonConfig(**(TEXTBOOK | fixed | settings))


def initial():
    torch.manual_seed(5)
    layers = torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    return torch.nn.Sequential(*layers).double()


INITIAL = initial()  # made once: ranks are threads, and share the state of the generator


def network():
    return copy.deepcopy(INITIAL)


def data():
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(BATCH, 3, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(BATCH, 2, generator=generator, dtype=torch.float64)


def train(model, opt, x, y, steps=STEPS, closure=False):
    for _ in range(steps):

        def loss():
            opt.zero_grad()
            found = (model(x) - y).square().mean()
            found.backward()
            return found

        opt.step(loss) if closure else (loss(), opt.step())


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def trained(comm, base, settings, steps=STEPS):
    """One rank: its share of the batch."""
    model, (x, y) = network(), data()
    opt = FakeOptimizer(base(model.parameters()), comm, settings)
    closure = settings.safeguard == "loss"
    train(model, opt, x[comm.rank :: comm.size], y[comm.rank :: comm.size], steps, closure)
    return model, opt


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_ranks_get_what_one_process_gets_from_all_data(ranks, base, settings):
    settings = config(**SETTINGS[settings])
    model = network()
    alone = AndersonOptimizer(BASES[base](model.parameters()), anderson=settings)
    train(model, alone, *data(), closure=settings.safeguard == "loss")
    found = run_ranks(ranks, lambda comm: trained(comm, BASES[base], settings))
    stats = alone.anderson.stats
    assert stats.accelerated > 0
    for other, opt in found:
        assert torch.equal(flat(other), flat(found[0][0])), "replicas differ"
        assert opt.anderson.stats.accelerated == stats.accelerated
        assert opt.anderson.stats.rejected == stats.rejected
        torch.testing.assert_close(flat(other), flat(model), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("ranks", [2, 3])
def test_noise_is_measured_from_the_ranks(ranks):
    """What each rank's gradient differs from the mean by, in steps that ask for it."""
    gradients = []
    for first in range(ranks):
        model, (x, y) = network(), data()
        (model(x[first::ranks]) - y[first::ranks]).square().mean().backward()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    expected = torch.stack(gradients) - torch.stack(gradients).mean(0)

    def rank(comm):
        model, (x, y) = network(), data()
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        opt = FakeOptimizer(base, comm, config(frequency=1, noise_gate=1.0))
        problem, found = opt.anderson_engine.problem, []
        measured = problem.deviations
        problem.deviations = lambda: found.append(measured()) or found[-1]
        train(model, opt, x[comm.rank :: comm.size], y[comm.rank :: comm.size], steps=1)
        return found

    for own, found in zip(expected, run_ranks(ranks, rank), strict=True):
        torch.testing.assert_close(found[0].values, own[None], rtol=1e-12, atol=1e-14)


def test_a_checkpoint_goes_from_two_ranks_to_one_process():
    def rank(comm):
        model, opt = trained(comm, BASES["Adam"], config(), steps=10)
        return model, copy.deepcopy(opt.consolidate_state_dict(to=1))

    (_, nothing), (model, state) = run_ranks(2, rank)
    assert nothing is None
    alone = AndersonOptimizer(BASES["Adam"](model.parameters()), anderson=config())
    alone.load_state_dict(state)
    train(model, alone, *data(), steps=STEPS - 10)
    straight = network()
    opt = AndersonOptimizer(BASES["Adam"](straight.parameters()), anderson=config())
    train(straight, opt, *data())
    assert alone.anderson.stats.accelerated == opt.anderson.stats.accelerated > 0
    torch.testing.assert_close(flat(model), flat(straight), rtol=1e-9, atol=1e-10)


def test_a_distributed_optimizer_is_not_copied():
    def rank(comm):
        _, opt = trained(comm, BASES["SGD"], config(), steps=1)
        with pytest.raises(UnsupportedError, match="copy or pickle"):
            copy.deepcopy(opt)
        return isinstance(opt, FakeOptimizer), isinstance(opt, torch.optim.SGD)

    assert run_ranks(2, rank) == [(True, True)] * 2

"""The diagonal M: momentum, Adam and its kin, schedules; against the oracle."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from problems import TEXTBOOK, Group, Problem, counts, flat
from reference import anderson
from sklearn.datasets import load_digits

from aadl_hvd import AndersonConfig, AndersonOptimizer
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core.accelerator import Accelerator
from aadl_hvd.optim.problem import OptimizerFixedPoint

M, P, STEPS = 4, 3, 18
SETTINGS = TEXTBOOK | {"history_depth": M, "frequency": P, "safeguard": "none"}
SHAPES = ((3, 4), (4,), (2, 3))


@dataclasses.dataclass
class Adam:
    """Textbook Adam, dense, on groups with settings of their own; state: (m, v, largest v, k)."""

    problem: Problem
    rates: np.ndarray
    decays: np.ndarray
    betas: tuple = (0.9, 0.99)
    eps: float = 1e-3
    decoupled: bool = False
    amsgrad: bool = False

    def start(self):
        return (np.zeros(self.problem.n),) * 3

    def step(self, k, w, state, factor=lambda k: 1.0):
        m, v, largest = state
        b1, b2 = self.betas
        rates = factor(k) * self.rates
        g = self.problem.gradient(k, w)
        if self.decoupled:
            w = w - rates * self.decays * w
        else:
            g = g + self.decays * w
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        largest = np.maximum(largest, v)
        self.state = m, v, largest
        return w - rates * m / (1 - b1 ** (k + 1)) / self.denominator(k), self.state

    def denominator(self, k):
        """After step k."""
        _, v, largest = self.state
        return np.sqrt((largest if self.amsgrad else v) / (1 - self.betas[1] ** (k + 1))) + self.eps

    def residual(self, k, w):
        scale = self.denominator(k) if self.decoupled else 1.0
        return -(self.problem.gradient(k, w) + self.decays * scale * w)

    def scaling(self, k, factor=lambda k: 1.0):
        return factor(k) * self.rates / self.denominator(k)


ADAMS = {
    "Adam": (torch.optim.Adam, {}),
    "Adam fused": (torch.optim.Adam, {"fused": True}),
    "AMSGrad": (torch.optim.Adam, {"amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True, "amsgrad": True}),
}
RATES, DECAYS = (0.05, 0.02, 0.1), (0.0, 0.1, 0.3)


def adam(problem, name, comm=None, **more):
    cls, settings = ADAMS[name]
    groups = [
        {"params": [p], "lr": rate, "weight_decay": decay}
        for (p,), rate, decay in zip(problem.parameters(), RATES, DECAYS, strict=True)
    ]
    base = cls(groups, betas=(0.9, 0.99), eps=1e-3, **settings)
    opt = AndersonOptimizer(base, anderson=AndersonConfig(**SETTINGS | more))
    if comm is not None:
        opt.anderson = opt.anderson_engine.accelerator = Accelerator(opt.anderson.config, comm)
    sizes = [int(np.prod(shape)) for shape in SHAPES]
    return opt, Adam(
        problem,
        np.repeat(RATES, sizes),
        np.repeat(DECAYS, sizes),
        decoupled=cls is torch.optim.AdamW,
        amsgrad=settings.get("amsgrad", False),
    )


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("name", ADAMS)
def test_adam_is_the_textbook_s(name, schedule, layout):
    problem = Problem(tuple(Group((shape,), lr=1.0) for shape in SHAPES), noise=1.0)
    factor = (lambda k: 0.9**k + 0.1 * (k % 2)) if schedule else (lambda k: 1.0)
    _, formulas = adam(problem, name)
    expected = anderson(
        lambda k, w, state: formulas.step(k, w, state, factor),
        problem.start,
        STEPS,
        m=M,
        p=P,
        mixing=0.5,
        residual=formulas.residual,
        scaling=lambda k: formulas.scaling(k, factor),
        state=formulas.start(),
    )
    assert expected.counts["accelerated"] == STEPS // P
    for ranks in (1, 3):

        def program(comm, ranks=ranks):
            opt, _ = adam(problem, name, None if ranks == 1 else comm, layout=layout, mixing=0.5)
            path = [flat(opt)]
            for k in range(STEPS):
                for group, rate in zip(opt.param_groups, RATES, strict=True):
                    group["lr"] = rate * factor(k)
                problem.set_gradient(opt, problem.gradient(k, path[-1]))
                opt.step()
                path.append(flat(opt))
            return np.array(path), counts(opt), sum(opt.anderson.stats.resets.values())

        for path, count, resets in run_ranks(ranks, program):
            np.testing.assert_allclose(path, expected.path, rtol=1e-7, atol=1e-8)
            assert count == expected.counts
            assert resets == 0


MOMENTA = (
    Group(((4, 3), (5,)), lr=0.05, momentum=0.8, weight_decay=0.01, nesterov=True),
    Group(((3,),), lr=0.1, momentum=0.5),
    Group(((2, 2),), lr=0.2),
)


@pytest.mark.parametrize("mixing", [1.0, 3.0])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_groups_with_momenta_of_their_own(layout, mixing):
    """lr / (1 - momentum), group by group, on any rows."""
    problem = Problem(MOMENTA, noise=0.3)
    expected = anderson(
        problem.sgd,
        problem.start,
        STEPS,
        m=M,
        p=P,
        mixing=mixing,
        residual=problem.residual,
        scaling=problem.scaling,
        state=np.zeros(problem.n),
    )
    config = AndersonConfig(**SETTINGS | {"mixing": mixing}, layout=layout)
    for ranks in (1, 2, 3):
        for path, opt in run_ranks(ranks, lambda comm: problem.run(config, STEPS, comm)):
            np.testing.assert_allclose(path, expected.path, rtol=1e-8, atol=1e-9)
            assert counts(opt) == expected.counts


def test_decoupled_decay_rests_where_adamw_rests():
    """There r is exactly zero: w = w - lr wd w - lr m / (sqrt(v) + eps) with m = g."""
    decay, eps = 0.25, 0.0
    w = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    # With one step of Adam sqrt(v) = |g|: g = -wd w (|g| + eps) needs |wd w| = 1.
    w = torch.sign(w) / decay
    p = torch.nn.Parameter(w.clone())
    base = torch.optim.AdamW([p], lr=0.125, weight_decay=decay, eps=eps, betas=(0.5, 0.5))
    opt = AndersonOptimizer(base, anderson=AndersonConfig(**SETTINGS | {"frequency": 10}))
    problem, rows = opt.anderson_engine.problem, torch.empty(3, dtype=torch.float64)
    residuals = []
    read = problem.read_residual
    problem.read_residual = lambda *a: residuals.append(read(*a).clone()) or residuals[-1]
    for size in (1.0, 2.0):
        for _ in range(3):
            p.grad = -torch.sign(w) * 2.0
            opt.step()
        if size == 1.0:
            assert torch.equal(p.detach(), w), "not the rest point"
            assert all(torch.equal(r, torch.zeros_like(rows)) for r in residuals)
            with torch.no_grad():
                p.mul_(1.5)
    assert (residuals[-1] != 0).all()


def test_descent_rejection_drops_the_older_half():
    """Column by column against the oracle, and through many rejections in a row."""
    found = set()
    for seed in range(4):
        problem = Problem((*MOMENTA[2:], Group(((9,),), lr=0.3)), seed=seed)
        config = AndersonConfig(**TEXTBOOK, history_depth=7, frequency=4, safeguard="descent")
        expected = anderson(
            problem.sgd,
            problem.start,
            48,
            m=7,
            p=4,
            residual=problem.residual,
            scaling=problem.scaling,
            state=np.zeros(problem.n),
            safeguard="descent",
        )
        for layout in ("rows", "columns"):
            for ranks in (1, 3):
                config = dataclasses.replace(config, layout=layout)
                run = functools.partial(problem.run, config, 48)
                for path, opt in run_ranks(ranks, run):
                    np.testing.assert_allclose(path, expected.path, rtol=1e-7, atol=1e-8)
                    assert counts(opt) == expected.counts
        found |= set(expected.counts)
    assert {"descent", "accelerated"} <= found


# Schedules

SCHEDULES = {
    "warm-up from 0": lambda opt: torch.optim.lr_scheduler.LambdaLR(
        opt, lambda k: min(1.0, k / 20)
    ),
    "StepLR": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 40, 0.1),
    "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 120),
}
BASES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=1e-2),
}


def digits_losses(name, schedule, accelerated, steps=120):
    """Training loss on 400 digits, full batch, in two groups of parameters."""
    data = load_digits()
    x, y = torch.tensor(data.data[:400] / 16.0).float(), torch.tensor(data.target[:400])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.Tanh(), torch.nn.Linear(24, 10))
    groups = [{"params": list(layer.parameters())} for layer in (model[0], model[2])]
    opt = BASES[name](groups)
    if accelerated:
        # The gate is open: one rank goes by a guess, and this is about schedules.
        opt = AndersonOptimizer(opt, anderson=AndersonConfig(noise_gate=None))
    scheduler = SCHEDULES[schedule](opt)
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        # A loss that ends well above zero, with curvature at the end.
        loss = loss + 2e-3 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        losses.append(loss.item())
        opt.step()
        scheduler.step()
    return np.array(losses), opt


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", BASES)
def test_schedules_reset_nothing_and_make_no_spike(name, schedule):
    plain, _ = digits_losses(name, schedule, False)
    losses, opt = digits_losses(name, schedule, True)
    stats = opt.anderson.stats
    assert sum(stats.resets.values()) == 0
    assert stats.accelerated > 15
    assert losses.mean() < plain.mean()
    assert losses[-1] < 1.001 * plain[-1]
    # Where the plain run does not rise neither does this one, nor where StepLR lowers the rate.
    rises = np.diff(losses) / losses[:-1]
    plain_rises = np.diff(plain) / plain[:-1]
    assert rises.max() < max(0.05, 2 * plain_rises.max())
    for decay in (40, 80) if schedule == "StepLR" else ():
        assert rises[decay - 1 : decay + 6].max() < 0.01


SCALED = {
    "NAdam": (torch.optim.NAdam, {"lr": 0.01}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01}),
    "RAdam later": (torch.optim.RAdam, {"lr": 0.01, "betas": (0.9, 0.6)}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "centered": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 0.7}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.0, "amsgrad": True}),
}


@pytest.mark.parametrize("name", SCALED)
def test_the_scaling_of_torch_s_optimizers(name):
    """A small change of the gradient, as a step of the optimizer shows it, is M times it.

    Momentum: what one gradient does in this step is a known part of what it does in the end.
    Terms that the gradient changes through the denominator are kept small by many equal steps
    before.
    """
    cls, settings = SCALED[name]
    p = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    g = torch.linspace(0.1, 3.0, 6, dtype=torch.float64)
    opt = cls([p], **settings)
    view = OptimizerFixedPoint(opt, "gradient")
    before = None
    for _ in range(300):
        p.grad = g.clone()
        before = p.detach().clone()
        opt.step()
    hash(view.signature)
    state = {k: v.clone() for k, v in opt.state[p].items() if isinstance(v, torch.Tensor)}
    scaling = view.scaling(0, 6)
    assert scaling.shape == (6,)
    torch.testing.assert_close(scaling[2:5], view.scaling(2, 5))
    for key, value in state.items():
        assert torch.equal(value, opt.state[p][key]), f"{key} was changed by looking at it"
    # After so many equal gradients a step is what it leads to in the end; RMSprop's momentum
    # has reached its limit, too.
    torch.testing.assert_close(before - p.detach(), scaling * g, rtol=2e-2, atol=0.0)


def test_unknown_noise_shuts_the_gate():
    """One rank without micro-batches: a guess needs three columns, and is confirmed twice."""
    p = torch.nn.Parameter(torch.ones(5))
    opt = AndersonOptimizer(
        torch.optim.SGD([p], lr=0.01), anderson=AndersonConfig(frequency=1, averages=())
    )
    for k in range(6):
        p.grad = p.detach() * torch.arange(1.0, 6.0)
        opt.step()
        assert opt.anderson.stats.accelerated == (k == 5)

"""A weight decay that a schedule changes, with the residual-norm method."""

import copy

import pytest
import torch

from aadl_hvd import AndersonConfig, AndersonOptimizer

N = 12
CURVATURE = torch.logspace(-2, 0, N, dtype=torch.float64)
MINIMUM = torch.linspace(-1, 1, N, dtype=torch.float64)
CONFIG = AndersonConfig(method="residual", noise_gate=None, history_depth=5)
BASES = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.5, weight_decay=0.01),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.02, weight_decay=0.01),
}


class Run:
    """A quadratic whose weight decay is multiplied by `factor` after each step."""

    def __init__(self, base, factor):
        self.p = torch.nn.Parameter(torch.zeros(N, dtype=torch.float64))
        self.opt = AndersonOptimizer(BASES[base]([self.p]), anderson=CONFIG)
        self.factor, self.residuals = factor, []
        problem = self.opt.anderson_engine.problem
        read = problem.read_residual

        def spy(lo, hi, w, out, decays):
            before = w.clone()
            r = read(lo, hi, w, out, decays)
            self.residuals.append((before, r.clone(), decays))
            return r

        problem.read_residual = spy

    def step(self):
        self.p.grad = CURVATURE * (self.p.detach() - MINIMUM)
        self.opt.step()
        self.opt.param_groups[0]["weight_decay"] *= self.factor

    @property
    def decay(self):
        return self.opt.param_groups[0]["weight_decay"]


@pytest.mark.parametrize("base", BASES)
def test_history_restarts_only_where_the_decay_has_gone_far(base):
    """At 1 % a step 10 % are reached after 11 steps: one restart each time."""
    run, constant = Run(base, 0.99), Run(base, 1.0)
    for _ in range(66):
        run.step()
        constant.step()
    assert constant.opt.anderson.stats.resets["changed"] == 0
    assert run.opt.anderson.stats.resets["changed"] == 5
    found, wanted = (r.opt.anderson.stats.accelerated for r in (run, constant))
    assert found > 0.5 * wanted > 5


def test_residuals_of_one_history_have_one_decay():
    run = Run("SGD", 0.99)
    for _ in range(8):
        run.step()
    assert run.decay != 0.01
    for w, r, decays in run.residuals:
        assert decays == (0.01,)
        torch.testing.assert_close(r, -(CURVATURE * (w - MINIMUM) + 0.01 * w), rtol=0, atol=1e-15)


@pytest.mark.parametrize("decay", [0.0, 0.02, -0.01])
def test_another_decay_is_another_problem(decay):
    run = Run("SGD", 1.0)
    for _ in range(6):
        run.step()
    run.opt.param_groups[0]["weight_decay"] = decay
    run.step()
    assert run.opt.anderson.stats.resets["changed"] == 1
    assert run.residuals[-1][2] == (decay,)


@pytest.mark.parametrize("base", BASES)
def test_a_resumed_run_goes_on_with_the_decays_of_its_history(base):
    run, other = Run(base, 0.99), Run(base, 0.99)
    for _ in range(7):
        run.step()
    weights = run.p.detach().clone()
    state = copy.deepcopy(run.opt.state_dict() | run.opt.sharded_state_dict())
    with torch.no_grad():
        other.p.copy_(weights)
    other.opt.load_state_dict(state)
    for _ in range(20):
        run.step()
        other.step()
    assert torch.equal(run.p, other.p)
    assert other.residuals[0][2] == (0.01,), "the decay of now: the next difference would be wrong"

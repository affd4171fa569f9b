"""The gradient that becomes a residual is the one the base optimizer is given, whatever it does."""

import pytest
import torch
from problems import TEXTBOOK

from aadl_hvd import AndersonConfig, AndersonOptimizer

STEPS = 12


def trained(make, **settings):
    """Weights after an accelerated run on a quadratic; make(parameters) -> optimizer."""
    torch.manual_seed(0)
    A = torch.randn(20, 6, dtype=torch.float64)
    y = torch.randn(20, dtype=torch.float64)
    w = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    opt = AndersonOptimizer(
        make([w]), anderson=AndersonConfig(**TEXTBOOK, frequency=3, history_depth=4, **settings)
    )
    for _ in range(STEPS):
        opt.zero_grad()
        (A @ w - y).square().mean().backward()
        opt.step()
    assert opt.anderson.stats.accelerated > 0
    return w.detach()


class GradientEater(torch.optim.SGD):
    """Uses p.grad as scratch space, as many published optimizers do."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.fill_(7.0)
        return loss


@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_foreach_nesterov_adds_the_momentum_to_the_gradients_in_place(kind):
    """Without weight decay; foreach is torch's default on GPUs."""
    settings = {"lr": 0.05, "momentum": 0.8, "nesterov": True}
    found = trained(lambda p: torch.optim.SGD(p, **settings, **{kind: True}))
    expected = trained(lambda p: torch.optim.SGD(p, **settings, foreach=False))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_optimizer_that_overwrites_gradients():
    plain = trained(lambda p: torch.optim.SGD(p, lr=0.05))
    torch.testing.assert_close(trained(lambda p: GradientEater(p, lr=0.05)), plain)


def test_optimizer_that_overwrites_gradients_with_a_closure():
    paths = []
    for cls in (torch.optim.SGD, GradientEater):
        torch.manual_seed(0)
        w = torch.nn.Parameter(torch.randn(5))
        config = AndersonConfig(**TEXTBOOK, frequency=2)
        opt = AndersonOptimizer(cls([w], lr=0.2), anderson=config)
        target = torch.arange(5.0)
        scale = torch.linspace(0.5, 2.0, 5)

        def closure(opt=opt, w=w, target=target, scale=scale):
            opt.zero_grad()
            loss = (scale * (w - target).square()).sum()
            loss.backward()
            return loss

        for _ in range(8):
            opt.step(closure)
        assert opt.anderson.stats.accelerated == 4
        paths.append(w.detach())
    assert torch.equal(*paths)

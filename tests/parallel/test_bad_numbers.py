"""NaN, Inf and overflow on one rank alone: the base step on all, and then it goes on as before."""

import math

import horovod.torch as hvd
import pytest
import torch
from training import assert_replicas_equal, assert_same_bits, flat, full_batch, loss_of

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer

P = 4
LAST = hvd.rank() == hvd.size() - 1

SETTINGS = {
    "default": {},
    "columns": {"layout": "columns"},
    "bfloat16": {"history_dtype": "bfloat16"},
    "moving average": {"average_window": 3, "average_threshold": 1e-9},
    "paper's": {"residual": "step", "safeguard": "residual", "noise_gate": None},
}


def least_squares():
    torch.manual_seed(7)
    return torch.nn.Linear(3, 2)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.02)


def backward(model, opt, factor=1.0):
    """The loss of this rank's full batch; its gradient is multiplied by `factor`."""
    opt.zero_grad()
    loss = loss_of(model, *full_batch(1)[0])
    (loss * factor).backward()
    return loss.detach()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
def test_bad_gradient_on_one_rank(settings, bad):
    """In plain steps, in accelerated ones and before them; losses are observed, bad ones, too."""
    config = AndersonConfig(frequency=P, history_depth=4, averages=(0.9, 0.8), **SETTINGS[settings])
    model, other = least_squares(), least_squares()
    opt = DistributedAndersonOptimizer(sgd(model), model.named_parameters(), anderson=config)
    names = [(f"other.{name}", p) for name, p in other.named_parameters()]
    horovods = hvd.DistributedOptimizer(sgd(other), names)
    spoilt = (2 * P + 2, 4 * P - 1, 5 * P)
    for k in range(1, 10 * P):
        good = flat(model).clone()
        factor = bad if LAST and k in spoilt else 1.0
        loss = backward(model, opt, factor)
        if k in spoilt:
            other.load_state_dict(model.state_dict())
            backward(other, horovods, factor)
            horovods.step()
        if settings == "default":
            opt.observe(loss * factor)
        before = opt.anderson.stats.accelerated
        opt.step()
        if k in spoilt:
            assert opt.anderson.stats.accelerated == before
            # The base optimizer's step, bit for bit, NaN included.
            assert_same_bits(flat(model).view(torch.int32), flat(other).view(torch.int32))
            torch.nn.utils.vector_to_parameters(good, model.parameters())
        if k == max(spoilt):
            middle = opt.anderson.stats.accelerated
    stats = opt.anderson.stats
    if not math.isfinite(bad):  # a huge number is one, until something of it overflows
        assert stats.resets["nonfinite"] == stats.rejected["nonfinite"] == 3, stats
    assert stats.accelerated > middle > 0, stats
    if settings == "moving average":
        assert stats.averaged > 0
    if config.noise_gate is not None:
        assert math.isfinite(stats.batch_factor)
    assert flat(model).isfinite().all()
    for kind in config.averages:
        with opt.averaged_weights(which=kind) as chosen:
            assert chosen == kind
            assert flat(model).isfinite().all()
    assert_replicas_equal(model)


@pytest.mark.parametrize("at", [2 * P, 2 * P - 1])
def test_bad_samples_of_a_good_gradient(at):
    """A rank's own gradient is NaN, the reduced one was mended: noise is unknown, for a while."""
    model = least_squares()
    opt = DistributedAndersonOptimizer(
        sgd(model), model.named_parameters(), anderson=AndersonConfig(frequency=P)
    )
    for k in range(1, 6 * P):
        backward(model, opt, math.nan if LAST and k == at else 1.0)
        opt.synchronize()
        for p in model.parameters():
            p.grad.nan_to_num_()
        with opt.skip_synchronize():
            opt.step()
        if k == 2 * P:
            assert opt.anderson.stats.accelerated == 0
            assert opt.anderson.stats.rejected["noise"] >= 1
    stats = opt.anderson.stats
    assert stats.accelerated > 0 and math.isfinite(stats.batch_factor), stats
    assert_replicas_equal(model)

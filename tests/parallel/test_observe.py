"""`opt.observe(loss)` on real ranks: bad points go back everywhere, and nobody ever hangs."""

import copy
import math

import horovod.torch as hvd
import pytest
import torch
from problems import TEXTBOOK
from training import (
    assert_replicas_equal,
    assert_same_bits,
    batches,
    flat,
    loss_of,
    network,
    round_gradients,
    unless_brief,
)

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer, UnsupportedError

P = 3
SETTINGS = TEXTBOOK | {"history_depth": 4, "frequency": P, "safeguard": "none"}
GOOD, BAD = 1.0, 1e6
LAST = hvd.rank() == hvd.size() - 1

OPTIMIZERS = {
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
}


# Ways to make a step. Each takes (model, optimizer, x, y); the loss has been observed.


def pending(model, opt, x, y):
    """Reductions are under way when step() is called."""
    loss_of(model, x, y).backward()
    opt.step()


def synchronized(model, opt, x, y):
    loss_of(model, x, y).backward()
    opt.synchronize()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    with opt.skip_synchronize():
        opt.step()


def closure(model, opt, x, y):
    calls = []

    def evaluate():
        opt.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        # Horovod's own would update with gradients that are not reduced yet.
        if not hasattr(opt, "anderson"):
            opt.synchronize()
        calls.append(loss.item())
        return loss

    if hasattr(opt, "anderson"):
        assert opt.step(evaluate).item() == calls[0]
        assert len(calls) == 1
    else:
        evaluate()
        with opt.skip_synchronize():
            opt.step()


def scaler(model, opt, x, y):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(model, x, y)).backward()
    opt.synchronize()
    scaler.unscale_(opt)
    with opt.skip_synchronize():
        scaler.step(opt)
    scaler.update()


def two_passes(model, opt, x, y):
    for part in (slice(0, 3), slice(3, 6)):
        loss_of(model, x[part], y[part]).backward()
    opt.step()


WAYS = [pending, synchronized, closure, scaler, two_passes]


@pytest.mark.parametrize("name", unless_brief("Nesterov", "Adam", "AdamW fused"))
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_bad_loss_puts_the_base_step_back_bit_for_bit(way, name):
    """As if Horovod's own optimizer had been used, and the step that shows it were not there."""
    expected, model = network(), network()
    more = {"backward_passes_per_step": 2} if way is two_passes else {}
    make = OPTIMIZERS[name]
    base = hvd.DistributedOptimizer(
        make(expected.parameters()), expected.named_parameters(), **more
    )
    opt = DistributedAndersonOptimizer(
        make(model.parameters()),
        model.named_parameters(),
        anderson=AndersonConfig(**SETTINGS),
        **more,
    )
    for each in (expected, model):
        round_gradients(each)
    for k, (x, y) in enumerate(batches(P + 2)):
        # Bad in the mean over ranks, and better than before on all but the last.
        bad = BAD if LAST else GOOD - 0.5
        opt.observe(torch.tensor(bad if k == P else GOOD))
        opt.zero_grad()
        way(model, opt, x, y)
        assert not opt._handles
        if k == P - 1:
            assert opt.anderson.stats.accelerated == 1
        if k != P:
            base.zero_grad()
            way(expected, base, x, y)
        if k == P - 1:
            assert not torch.equal(flat(model), flat(expected))
        else:
            assert_same_bits(list(model.parameters()), list(expected.parameters()), f"weights {k}")
            assert_same_bits(opt.state_dict()["state"], base.state_dict()["state"], f"state {k}")
    assert opt.anderson.stats.rejected["loss"] == 1
    assert opt.anderson.stats.stored == P + 1
    assert_replicas_equal(model)


def watched(loss, steps=4 * P, event=None, layout="rows"):
    """Trains with `loss(k, on_trial)` observed, None for not observed; an event before a step."""
    model = network()
    opt = DistributedAndersonOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model.named_parameters(),
        anderson=AndersonConfig(**SETTINGS, layout=layout),
    )
    for k, (x, y) in enumerate(batches(steps)):
        if event is not None:
            event(k, opt)
        opt.zero_grad()
        if (observed := loss(k, k > 0 and k % P == 0)) is not None:
            opt.observe(observed)
        loss_of(model, x, y).backward()
        opt.step()
    assert_replicas_equal(model)
    stats = opt.anderson.stats
    everybody = hvd.allgather_object((dict(stats.rejected), dict(stats.bytes)))
    assert everybody.count(everybody[0]) == hvd.size()
    return stats


SILENT = {
    "one rank only": lambda k, on_trial: not LAST,
    "stops": lambda k, on_trial: LAST and on_trial,
    "never again": lambda k, on_trial: LAST and k >= P,
    "starts late": lambda k, on_trial: LAST and not on_trial,
    "nobody": lambda k, on_trial: True,
}


@pytest.mark.skipif(hvd.size() == 1, reason="needs two ranks")
@pytest.mark.parametrize("layout", unless_brief("rows", "columns"))
@pytest.mark.parametrize("who", SILENT)
def test_ranks_that_do_not_observe_hang_nobody(who, layout):
    """And nobody is judged without all losses."""

    def loss(k, on_trial):
        return None if SILENT[who](k, on_trial) else BAD if on_trial else GOOD

    stats = watched(loss, layout=layout)
    assert stats.rejected["loss"] == stats.rejected["backoff"] == 0
    assert stats.accelerated == 4
    # Four numbers after each point on trial; there is no such message without one.
    trials = {"stops": 3, "never again": 1 if P - 1 < P else 0}.get(who, 0)
    if who == "stops":
        assert stats.bytes["safeguard"] == trials * 4 * 8
    if who in ("nobody", "one rank only", "starts late"):
        assert stats.bytes["safeguard"] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_on_one_rank_rejects_on_all(bad):
    stats = watched(lambda k, on_trial: bad if LAST and on_trial and k == P else GOOD)
    assert stats.rejected["loss"] == 1
    assert stats.bytes["safeguard"] >= 4 * 8


def test_nan_before_a_point_judges_nothing():
    stats = watched(lambda k, on_trial: math.nan if LAST and not on_trial else BAD)
    assert stats.rejected["loss"] == 0
    assert stats.accelerated == 4


@pytest.mark.skipif(hvd.size() == 1, reason="needs two ranks")
@pytest.mark.parametrize("when", range(P, 2 * P))
def test_one_rank_loads_a_checkpoint_in_between(when):
    """It has lost the way back: the point stays everywhere."""

    def load(k, opt):
        if k == when and LAST:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))

    model_stats = watched(
        lambda k, on_trial: BAD if k == P and when == P else GOOD, steps=6 * P, event=load
    )
    assert model_stats.rejected["loss"] == 0
    assert model_stats.accelerated >= 3


def test_adasum_refuses():
    """It has moved the weights in the backward pass: there is no step to leave out."""
    model = network()
    opt = DistributedAndersonOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        op=hvd.Adasum,
        anderson=AndersonConfig(residual="step"),
    )
    if hvd.size() == 1:
        opt.observe(1.0)
        return
    with pytest.raises(UnsupportedError, match="Adasum"):
        opt.observe(1.0)

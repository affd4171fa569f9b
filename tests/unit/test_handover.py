"""Which method is at work in which step."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import PLAIN, Problem

from aadl_hvd import AndersonConfig, AndersonOptimizer
from aadl_hvd.core.handover import Handover
from aadl_hvd.stats import Rejection

NOISY, CALM = (1.0, 1.0), (0.01, 1.0)  # sigma^2 of a step, ||g||^2; the gate asks for a factor 11


def refused(handover, calls, count=Handover.PATIENCE):
    changed = [handover.attempted(Rejection.NOISE, False, calls) for _ in range(count)]
    assert changed == [False] * (count - 1) + [True]
    return handover


def test_a_gate_that_stays_shut_hands_over():
    handover = Handover(AndersonConfig())
    for _ in range(3):  # a point in between: it does not stay shut
        for cause in [Rejection.NOISE] * (Handover.PATIENCE - 1):
            assert not handover.attempted(cause, False, 20)
        assert not handover.attempted(None, True, 20)
    refused(handover, 40)
    assert handover.subspace
    # Steps 41 to 50 are the first block.
    plans = [handover.schedule(k) for k in range(41, 51)]
    assert all(plan.store for plan in plans)
    assert [plan.accelerate for plan in plans] == [False] * 9 + [True]


def test_other_causes_do_not_hand_over():
    handover = Handover(AndersonConfig())
    for cause in (Rejection.DESCENT, Rejection.BACKOFF, Rejection.LOSS) * 20:
        assert not handover.attempted(cause, False, 10)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "residual"},
        {"noise_gate": None},
        {"layout": "columns"},
        {"residual": "step"},
        {"safeguard": "residual"},
        {"average_window": 3},
    ],
    ids=str,
)
def test_settings_that_never_hand_over(settings):
    config = AndersonConfig(**settings)
    assert not config.hands_over
    handover = Handover(config)
    for k in range(100):
        assert not handover.attempted(Rejection.NOISE, False, k)


def test_the_gate_is_tried_again_later_and_later():
    handover = Handover(AndersonConfig())
    refused(handover, 0)
    calls, waits = 0, []
    for _ in range(6):
        begun = calls
        while True:
            calls += 10
            assert not handover.block_ended(calls, 10, True, *NOISY)
            calls += 10
            if handover.block_ended(calls, 10, False, *CALM):
                break
        waits.append(calls - begun)
        refused(handover, calls)
    assert waits == [40, 80, 140, 260, 260, 260]  # 32, 64, 128, 256, 256, 256, in whole pairs


def test_sleep_and_awakening():
    """16 blocks without a jump; then one block in 16, until a jump."""
    config = AndersonConfig(method="subspace", averages=())
    handover, calls, looked = Handover(config), 0, []
    for _ in range(1000):
        calls += 1
        plan = handover.schedule(calls)
        if plan is not None and plan.accelerate:
            looked.append(calls)
            handover.block_ended(calls, 10, False, *NOISY)
    assert looked[:16] == [*range(10, 170, 10)]
    assert {b - a for a, b in itertools.pairwise(looked[16:])} == {160}
    assert handover.asleep
    assert handover.schedule(calls + 1) is None
    handover.block_ended(calls, 10, True, *NOISY)
    assert not handover.asleep
    assert handover.schedule(calls + 1).store


def test_averages_take_in_a_step_of_each_block_asleep():
    handover = Handover(AndersonConfig(method="subspace", averages=(0.9,)))
    for k in range(17):
        handover.block_ended(10 * k, 10, False, *NOISY)
    plans = {k: handover.schedule(k) for k in range(161, 161 + 150)}
    pushed = {k: plan.push for k, plan in plans.items() if plan is not None and plan.push}
    assert len(pushed) == 15
    assert set(pushed.values()) == {10}
    assert not any(plan.store or plan.accelerate for plan in plans.values() if plan is not None)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([None, *Rejection]), st.booleans(), st.integers(0, 300), st.booleans()
        ),
        max_size=60,
    ),
    st.integers(0, 59),
)
def test_a_state_that_is_loaded_goes_on_alike(events, at):
    """Whatever has happened: the same steps, the same decisions, from another number on, too."""

    def play(handover, calls, events):
        found = []
        for cause, accelerated, wanted, calm in events:
            calls += 7
            if handover.subspace:
                seen = CALM if calm else NOISY
                found.append(handover.block_ended(calls, wanted, accelerated, *seen))
            else:
                found.append(handover.attempted(cause, accelerated, calls))
            plans = [handover.schedule(k) for k in range(calls + 1, calls + 40)]
            found.append([plan and (plan.store, plan.accelerate) for plan in plans])
        return found

    config = AndersonConfig(averages=(), frequency=1)
    whole, again = Handover(config), Handover(config)
    play(whole, 0, events[:at])
    calls = 7 * len(events[:at])
    again.load_state(whole.state(calls), calls)
    assert play(again, calls, events[at:]) == play(whole, calls, events[at:])


def test_memory_is_that_of_one_method():
    """History before the hand-over, blocks after it; never both."""
    problem = Problem(PLAIN, noise=50.0)
    _, opt = problem.run(AndersonConfig(noise_gate=1e30, averages=()), 10)
    n, real = problem.n, 8
    assert opt.anderson.history_bytes == (2 * 15 + 4) * n * real
    problem.run(opt.anderson.config, 60, opt=opt, first=10)
    assert opt.anderson.stats.method == "subspace"
    assert opt.anderson.history_bytes == (2 * 10 + 11) * n * real


def test_scale_free_bases_do_not_end_above_themselves():
    """The loss times 50,000: a step of Muon does not depend on it."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(400, 16, generator=g)
    y = (x @ torch.randn(16, 10, generator=g)).argmax(1)

    def trained(make, accelerated):
        torch.manual_seed(0)
        layers = torch.nn.Linear(16, 32, bias=False), torch.nn.Linear(32, 10, bias=False)
        model = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1])
        opt = make(model.parameters())
        opt = AndersonOptimizer(opt) if accelerated else opt
        for _ in range(100):
            opt.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            (5e4 * loss).backward()
            opt.step()
        return loss.item()

    for make in (
        lambda p: torch.optim.Muon(p, lr=5e-3, weight_decay=0.0),
        lambda p: torch.optim.Adafactor(p, lr=1e-2),
    ):
        assert trained(make, True) < 1.02 * trained(make, False)

"""`opt.observe(loss)`: what a bad loss puts back, and what it must not do."""

import copy
import math
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import SEVERAL, TEXTBOOK, Problem, counts, flat, parameters_of

from aadl_hvd import AndersonConfig, AndersonOptimizer, ConfigError, UnsupportedError
from aadl_hvd.comm.simulated import SimulatedCommunicator, run_ranks
from aadl_hvd.core.accelerator import Accelerator

P = 3
SETTINGS = TEXTBOOK | {"history_depth": 4, "frequency": P, "safeguard": "none"}
GOOD, BAD = 1.0, 1e9

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.07, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, amsgrad=True, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def gradients(k, parameters):
    """The same on every rank; another one in each step."""
    generator = torch.Generator().manual_seed(k)
    for i, p in enumerate(parameters):
        scale = torch.linspace(0.3, 2.0, p.numel(), dtype=p.dtype).reshape(p.shape)
        noise = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = scale * (p.detach() - i) + 0.3 * noise


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(99)
    shapes = (3, 4), (5,)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def built(name, comm=None, dtype=torch.float32, **more):
    opt = AndersonOptimizer(
        OPTIMIZERS[name](parameters(dtype)), anderson=AndersonConfig(**SETTINGS | more)
    )
    if comm is not None:
        opt.anderson = opt.anderson_engine.accelerator = Accelerator(opt.anderson.config, comm)
    return opt


def step(opt, k, loss=None):
    gradients(k, parameters_of(opt))
    if loss is not None:
        opt.observe(loss)
    opt.step()


def contents(opt):
    """Weights and state, copied."""
    weights = [p.detach().clone() for p in parameters_of(opt)]
    state = opt.state_dict()["state"]
    return weights, copy.deepcopy(state)


def plain_step(name, opt, k):
    """What the base optimizer alone makes of it: weights and state."""
    twins = [torch.nn.Parameter(p.detach().clone()) for p in parameters_of(opt)]
    base = OPTIMIZERS[name](twins)
    base.load_state_dict(copy.deepcopy(opt.state_dict()))
    gradients(k, twins)
    base.step()
    return contents(base)


def same(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True)), "weights"
    assert found[1].keys() == expected[1].keys()
    for key, entry in expected[1].items():
        for name, value in entry.items():
            other = found[1][key][name]
            equal = torch.equal(other, value) if torch.is_tensor(value) else other == value
            assert equal, (key, name)


def moved(found, other):
    return not all(torch.equal(a, b) for a, b in zip(found[0], other[0], strict=True))


CASES = [(name, {}) for name in OPTIMIZERS]
CASES += [("Nesterov", {"residual": "step"}), ("Adam", {"residual": "step", "layout": "columns"})]
CASES += [("Adam", {"average_window": 2, "average_threshold": 1e9})]  # there, but never used
CASES += [("Nesterov", {"safeguard": "descent"}), ("Nesterov", {"method": "residual"})]


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bad_loss_puts_the_base_step_back_bit_for_bit(case, dtype, schedule):
    """Weights and state; and the step that shows it does nothing but that."""
    name, more = case
    for ranks in (1, 3):

        def program(comm, ranks=ranks):
            opt = built(name, None if ranks == 1 else comm, dtype, **more)
            stats = opt.anderson.stats
            for k in range(5):
                step(opt, k, GOOD)
            expected = plain_step(name, opt, 5)
            before = stats.accelerated
            step(opt, 5, GOOD)
            assert stats.accelerated == before + 1, "nothing was tried out"
            assert moved(contents(opt), expected)
            if schedule:  # as a scheduler does between two steps
                for group in opt.param_groups:
                    group["lr"] *= 0.3
            stored = stats.stored
            step(opt, 6, BAD)
            same(contents(opt), expected)
            assert stats.rejected["loss"] == 1
            assert (stats.steps, stats.stored) == (7, stored)
            expected = plain_step(name, opt, 7)
            step(opt, 7, GOOD)  # and on it goes
            same(contents(opt), expected)
            assert stats.stored == stored + 1
            return flat(opt)

        paths = run_ranks(ranks, program)
        assert all(np.array_equal(path, paths[0]) for path in paths)


def test_as_good_a_loss_changes_nothing():
    """As if nothing had been observed, bit for bit."""
    watched, unwatched = built("Nesterov"), built("Nesterov")
    for k in range(20):
        step(watched, k, 1.0 / (k + 1))
        step(unwatched, k)
    same(contents(watched), contents(unwatched))
    assert watched.anderson.stats.counters() == unwatched.anderson.stats.counters()
    assert watched.anderson.stats.accelerated == 6


def test_several_calls_count_as_their_mean():
    """Micro-batches: 0 and 2 are 1; tensors, floats and numbers with a graph."""
    opt = built("SGD")
    for k in range(7):
        for loss in (0.0, torch.tensor(2.0, requires_grad=True)):
            opt.observe(loss)
        step(opt, k, 1.0)
    assert opt.anderson.stats.rejected["loss"] == 0
    opt.observe(torch.tensor(2.0, requires_grad=True))
    assert not opt.anderson._acceptance.losses._given[0].requires_grad, "holds on to the graph"
    for last, rejected in ((1.0, 0), (1.1, 1)):
        opt = built("SGD")
        for k in range(3):
            step(opt, k, 1.0)
        opt.observe(1.0)
        opt.observe(1.0)
        step(opt, 3, last)
        assert opt.anderson.stats.rejected["loss"] == rejected


def test_not_observing_costs_no_collective():
    """And observing one small one a step after each accepted point."""
    calls = Counter()

    class Counting(SimulatedCommunicator):
        def _exchange(self, item):
            calls[self.rank] += 1
            return super()._exchange(item)

    def program(comm, watched):
        opt = built("SGD", Counting(comm._world, comm.rank))
        made = []
        for k in range(12):
            before = calls[comm.rank]
            step(opt, k, GOOD if watched else None)
            made.append(calls[comm.rank] - before)
        return made

    unwatched = run_ranks(2, lambda comm: program(comm, False))
    watched = run_ranks(2, lambda comm: program(comm, True))
    accelerated = [k for k in range(12) if (k + 1) % P == 0]
    # The very first step finds out whether all ranks have loaded the same history, or none.
    assert [k for k, n in enumerate(unwatched[0]) if n] == [0, *accelerated]
    for k in range(12):
        extra = 1 if k - 1 in accelerated else 0
        assert watched[0][k] == unwatched[0][k] + extra, k


def pauses(frequency, trials, good_at=None, **more):
    """How many attempts were left out after each rejection, where every point is bad.

    But for trial number `good_at`, which is good.
    """
    problem = Problem(SEVERAL)
    config = AndersonConfig(**SETTINGS | {"frequency": frequency} | more)
    opt = problem.optimizer(config)
    stats, found, tried, left_out = opt.anderson.stats, [], 0, 0
    for k in range(10_000):
        on_trial = stats.accelerated > tried
        if on_trial:
            found.append(stats.rejected["backoff"] - left_out)
            tried, left_out = stats.accelerated, stats.rejected["backoff"]
        problem.set_gradient(opt, problem.gradient(k, flat(opt)))
        opt.observe(BAD if on_trial and tried != good_at else GOOD)
        rejected = stats.rejected["loss"]
        opt.step()
        assert stats.rejected["loss"] - rejected == (on_trial and tried != good_at)
        if tried == trials:
            return found[1:]
    raise AssertionError("acceleration never came back")


@pytest.mark.parametrize("frequency", [1, 2])
def test_pause_doubles_and_is_bounded(frequency):
    found = pauses(frequency, 9)
    first, longest = found[0], max(found)
    assert 1 <= first <= 8
    assert longest <= 64
    assert found == [min(first * 2**i, longest) for i in range(8)]
    assert found[-1] == found[-2] == longest > first


def test_a_good_point_ends_the_doubling():
    found = pauses(2, 6, good_at=4)
    first = found[0]
    # Rejected: 1, 2, 3; accepted: 4; rejected: 5.
    assert found == [first, 2 * first, 4 * first, 0, first]


@pytest.mark.parametrize("rise", [0.0, 0.1])
def test_noisy_losses_are_given_the_benefit_of_the_doubt(rise):
    """A rise well within the losses' own spread says nothing; in smooth losses it does."""
    rejected = []
    for noise in (0.5, 0.0):
        opt = built("SGD", frequency=2)
        stats, judged, random = opt.anderson.stats, 0, np.random.default_rng(0)
        for k in range(600):
            loss = 10.0 - 0.01 * k + noise * random.standard_normal()
            on_trial = opt.anderson._acceptance.losses.verdict_due
            judged += on_trial
            step(opt, k, loss + rise * on_trial)
        rejected.append(stats.rejected["loss"] / judged)
    noisy, smooth = rejected
    # Of normal differences 2.3 % are above two deviations; these are estimated ones.
    assert noisy <= 0.07
    assert smooth == (rise > 0.0)


def test_spread_is_that_of_the_mean_over_ranks():
    """A rise of 2.4 in the mean of 8 losses of deviation 1, whose differences have 0.5."""

    def program(comm):
        opt = built("SGD", comm, frequency=2)
        random = np.random.default_rng(comm.rank)
        for k in range(41):
            before = opt.anderson.stats.rejected["loss"]
            step(opt, k, 100.0 + random.standard_normal() + (2.4 if k == 40 else 0.0))
        return before, opt.anderson.stats.rejected["loss"]

    results = run_ranks(8, program)
    assert len(set(results)) == 1
    before, after = results[0]
    assert before <= 1
    assert after == before + 1


def test_a_rejected_point_s_loss_is_no_spread():
    """Nothing is learnt of the losses' noise from the way up to a bad point, nor back."""
    opt = built("SGD", frequency=1)
    for k in range(60):
        on_trial = opt.anderson._acceptance.losses.verdict_due
        step(opt, k, BAD if on_trial else GOOD)
        assert max(opt.anderson._acceptance.losses._variances, default=0.0) == 0.0
    assert opt.anderson.stats.rejected["loss"] > 2


@given(
    scale=st.sampled_from([1e-4, 0.5, 3.0, 1e5]),
    shift=st.sampled_from([0.0, -7.0, 100.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25)
def test_decisions_do_not_depend_on_the_units_of_the_loss(scale, shift, seed):
    random = np.random.default_rng(seed)
    losses = random.integers(0, 64, 30) / 8 * (1 + 3 * (np.arange(30) % 3 == 0))
    found = []
    for unit, zero in ((1.0, 0.0), (scale, shift * scale)):
        opt = built("SGD", frequency=2)
        for k, loss in enumerate(losses):
            step(opt, k, zero + unit * loss)
        found.append(counts(opt))
    assert found[0] == found[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_on_one_rank_is_a_bad_loss_on_all(bad):
    def program(comm):
        opt = built("Nesterov", comm)
        for k in range(P - 1):
            step(opt, k, GOOD)
        expected = plain_step("Nesterov", opt, P - 1)
        step(opt, P - 1, GOOD)
        step(opt, P, bad if comm.rank == 1 else GOOD)
        same(contents(opt), expected)
        for k in range(P + 1, 40):
            step(opt, k, GOOD)
        return opt.anderson.stats.counters()

    results = run_ranks(3, program)
    assert results[0]["rejected"]["loss"] == 1
    assert results[0]["accelerated"] > 3
    assert results.count(results[0]) == 3


def test_a_point_from_a_nan_loss_is_not_judged():
    def program(comm):
        opt = built("SGD", comm)
        for k in range(P):
            step(opt, k, math.nan if comm.rank == 1 and k == P - 1 else GOOD)
        step(opt, P, BAD)
        return opt.anderson.stats.rejected["loss"], opt.anderson.stats.accelerated

    assert run_ranks(2, program) == [(0, 1)] * 2


@pytest.mark.parametrize("who", ["one only", "one stops", "one starts", "now and then"])
def test_ranks_that_do_not_observe_hang_nobody(who):
    """And without all losses nobody is judged: the bad ones below have no consequence."""

    def program(comm):
        opt = built("SGD", comm)
        for k in range(6 * P):
            on_trial = k % P == 0 and k > 0
            special = comm.rank == 1
            silent = {
                "one only": not special,
                "one stops": special and on_trial,
                "one starts": special and not on_trial,
                "now and then": special and k % P in (0, P - 1) and k % 2 == 0,
            }[who]
            step(opt, k, None if silent else BAD if on_trial else GOOD)
        return flat(opt), opt.anderson.stats.counters()

    results = run_ranks(3, program)
    for path, counters in results:
        assert np.array_equal(path, results[0][0])
        assert counters == results[0][1]
    if who != "now and then":
        assert results[0][1]["rejected"]["loss"] == 0
        assert results[0][1]["accelerated"] == 6


@pytest.mark.parametrize("when", range(2 * P))
def test_one_rank_loads_a_checkpoint_in_between(when):
    """It has lost the way back: the point stays, everywhere, and training goes on together."""

    def program(comm):
        opt = built("SGD", comm)
        for k in range(8 * P):
            if k == 2 * P + when and comm.rank == 1:
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            step(opt, k, BAD if k % P == 0 and k == 2 * P + when else GOOD)
        return flat(opt), {**opt.anderson.stats.rejected}, opt.anderson.stats.accelerated

    results = run_ranks(3, program)
    for path, rejected, accelerated in results:
        assert np.array_equal(path, results[0][0])
        assert (rejected, accelerated) == results[0][1:]
    assert results[0][1]["loss"] == 0
    assert results[0][2] >= 4


def test_reset_and_changed_parameters_in_between():
    """What a trial was about is gone: nothing is put back."""
    for event in ("reset", "frozen", "added"):
        opt = built("SGD")
        for k in range(P):
            step(opt, k, GOOD)
        extra = torch.nn.Parameter(torch.ones(3))
        if event == "reset":
            opt.anderson.reset()
        elif event == "frozen":
            parameters_of(opt)[1].requires_grad_(False)
        else:
            opt.add_param_group({"params": [extra]})
        before = contents(opt)
        step(opt, P, BAD)
        assert opt.anderson.stats.rejected["loss"] == 0, event
        assert moved(contents(opt), before), event


def test_closure_is_called_once_and_its_loss_returned():
    opt = built("Nesterov")
    calls = []

    def closure(k):
        opt.zero_grad()
        gradients(k, parameters_of(opt))
        assert torch.is_grad_enabled()
        calls.append(k)
        return torch.tensor(float(k))

    for k in range(P - 1):
        opt.observe(GOOD)
        opt.step(lambda k=k: closure(k))
    expected = plain_step("Nesterov", opt, P - 1)
    opt.observe(GOOD)
    opt.step(lambda: closure(P - 1))
    opt.observe(BAD)
    assert float(opt.step(lambda: closure(P))) == P
    assert calls == list(range(P + 1))
    same(contents(opt), expected)


def test_step_that_goes_back_leaves_nothing_behind():
    """With safeguard="residual", too: the older trial of the same step is over."""
    opt = built("SGD", safeguard="residual", frequency=2)
    rejected = opt.anderson.stats.rejected
    for k in range(60):
        on_trial = opt.anderson._acceptance.losses.verdict_due
        before = dict(rejected)
        step(opt, k, BAD if on_trial else GOOD)
        if on_trial:
            assert rejected["loss"] == before["loss"] + 1
            assert opt.anderson._acceptance.trial is None
        assert rejected["residual"] == 0
    assert rejected["loss"] > 1


def test_grad_scaler_and_schedulers_see_an_ordinary_step():
    opt = built("SGD")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
        expected = None
        for k in range(P + 1):
            if k == P - 1:
                expected = plain_step("SGD", opt, k)
            gradients(k, parameters_of(opt))
            for p in parameters_of(opt):
                p.grad *= 8.0
            opt.observe(BAD if k == P else GOOD)
            scaler.scale(torch.tensor(1.0))
            scaler.step(opt)
            scaler.update()
            schedule.step()
    same(contents(opt), expected)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9 ** (P + 1))


@pytest.mark.parametrize("bad", [torch.ones(2), torch.ones(0), None, "1.0"], ids=repr)
def test_a_loss_is_one_number(bad):
    opt = built("SGD")
    with pytest.raises(ConfigError, match="Invalid loss="):
        opt.observe(bad)
    opt.observe(torch.ones(1, 1))
    opt.observe(np.float32(2.0))
    step(opt, 0)


def test_not_while_a_step_runs():
    """In a closure it would be taken for the loss of the step to come."""
    opt = built("SGD")

    def closure():
        gradients(0, parameters_of(opt))
        opt.observe(1.0)
        return 1.0

    with pytest.raises(UnsupportedError, match="step"):
        opt.step(closure)
    opt.observe(1.0)
    step(opt, 1)

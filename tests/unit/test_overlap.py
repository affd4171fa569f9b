"""overlap=True: a jump is gathered while the next step runs, and added after its base step."""

import copy
import functools
import itertools

import numpy as np
import pytest
import torch
from problems import PLAIN, Group, Problem, flat, parameters_of

from aadl_hvd import AndersonConfig
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core.handover import Handover
from aadl_hvd.core.methods.reference import subspace
from aadl_hvd.core.shard import WeightShard

SETTINGS = {"method": "subspace", "averages": ()}
OVERLAP = AndersonConfig(**SETTINGS, overlap=True)
SHAPES = ((3, 4), (4,), (2, 1, 3), ())
SLOW = (Group(shapes=SHAPES, lr=0.02),)
MOMENTUM = (Group(shapes=SHAPES, lr=0.01, momentum=0.9, nesterov=True),)
PROBLEMS = {"one rate": SLOW, "momentum": MOMENTUM}
SIZES = (1, 2, 3)
ROUNDING = 1e-14  # between NumPy and torch


class Run:
    """Steps on one rank, with all that the plain function needs to know of them."""

    def __init__(self, problem, comm=None, config=OVERLAP, groups=1, observe=True):
        self.problem, self.observe, self.k = problem, observe, 0
        self.opt = problem.optimizer(config, comm, shard_groups=groups)
        self.v = np.zeros(problem.n)
        self.w, self.g, self.moved, self.jumped_in = [], [], [], []

    def train(self, until, loss=lambda k: 100.0):
        while self.k < until:
            w, k, stats = flat(self.opt), self.k, self.opt.anderson.stats
            self.problem.set_gradient(self.opt, self.problem.gradient(k, w))
            if self.observe:
                self.opt.observe(loss(k))
            base, self.v = self.problem.sgd(k, w, self.v)
            before = stats.jumps
            self.opt.step()
            self.k += 1
            self.w.append(w)
            self.g.append(self.problem.gradient(k, w))
            moved = flat(self.opt) - base  # beyond the base step
            self.moved.append(np.where(np.abs(moved) < ROUNDING, 0.0, moved))
            if stats.jumps > before:
                self.jumped_in.append(self.k)
        return self

    def late(self, after=0):
        """Trains to the first step after `after` whose jump has yet to be added."""
        self.train(after)
        while not self.opt.anderson._handover.late:
            self.train(self.k + 1)
        return self

    @property
    def stats(self):
        return self.opt.anderson.stats

    def state(self):
        """What a run goes on from, copied."""
        return copy.deepcopy(self.opt.state_dict() | self.opt.sharded_state_dict())

    def resumed(self, other, state):
        """Goes on from another run."""
        with torch.no_grad():
            for own, p in zip(parameters_of(self.opt), parameters_of(other.opt), strict=True):
                own.copy_(p)
        self.opt.load_state_dict(copy.deepcopy(state))
        self.v, self.k = other.v.copy(), other.k
        return self


def equal(runs):
    """Whether all ranks have had the same weights, to the last bit."""
    return all(np.array_equal(run.w, runs[0].w) for run in runs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", list(PROBLEMS))
def test_the_jump_of_the_plain_function_one_step_later(name, size):
    """After the next base step, whose gradient is that of the weights without it."""
    problem = Problem(PROBLEMS[name], noise=0.02)
    runs = run_ranks(size, lambda comm: Run(problem, comm).train(200))
    assert equal(runs), "replicas differ"
    run, mu = runs[0], problem.groups[0].momentum
    scaling, blocks, begin, full = torch.from_numpy(problem.scaling(0)), [], 0, 0
    added = [k + 1 for k in run.jumped_in]
    for k in range(1, 201):
        if k not in added:
            assert not run.moved[k - 1].any(), f"step {k} is the base step alone"
        if k == begin + 10:
            w, g = (np.array(x[begin:k]) for x in (run.w, run.g))
            half = 0.5 * (g[::2].mean(axis=0) - g[1::2].mean(axis=0))
            blocks.append(tuple(map(torch.from_numpy, (w.mean(axis=0), g.mean(axis=0), half))))
            begin = k + 1 if k in run.jumped_in else k
        if k in added and k < 200:
            expected = subspace(blocks[-11:], scaling, 10, mu).numpy()
            jump = run.moved[k - 1]
            share = jump @ expected / (expected @ expected)  # of trust
            assert 0.0 < share < 1.0 + 1e-6
            np.testing.assert_allclose(jump, share * expected, atol=1e-7 * np.abs(expected).max())
            full += share > 1.0 - 1e-6
    assert full > 3, "hardly a jump was made at full trust"
    assert run.stats.accelerated == sum(k < 200 for k in run.jumped_in)


def test_node_groups_jump_alike():
    problem = Problem(SLOW, noise=0.02)
    alone = Run(problem).train(120)
    runs = run_ranks(4, lambda comm: Run(problem, comm, groups=2).train(120))
    assert equal(runs)
    assert runs[0].jumped_in == alone.jumped_in
    np.testing.assert_allclose(runs[0].w, alone.w, atol=1e-9)


def test_the_jump_is_judged_by_the_block_after_it():
    """Down a steep line: <d, g> is that of d itself, and trust stays whole."""
    run = Run(Problem(SLOW, noise=0.0), observe=False).late(40)
    method = run.opt.anderson._subspace
    assert method.trust.judges
    run.train(run.k + 1)
    jump = run.moved[-1]
    run.train(run.k + 10)
    seen = method.blocks.start.numpy() - method._acceptance.base_rows().numpy()
    if not method.trust.judges:  # else the next jump was made at once
        np.testing.assert_allclose(seen, jump, atol=1e-12)
    assert method.trust.scale == 1.0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("observe", [False, True])
def test_a_checkpoint_between_the_two_steps(size, observe):
    """On as many ranks bit for bit, from a shard or from the full state."""
    problem = Problem(MOMENTUM, noise=0.02)
    make = functools.partial(Run, problem, observe=observe)

    def program(comm):
        run = make(comm).late(60)
        shard, at = run.state(), run.k
        full = comm.allgather_object(run.opt.consolidate_state_dict())[0]
        assert shard["anderson"]["history"]["subspace"]["jump"] is not None
        others = [make(comm).resumed(run, state) for state in (shard, full)]
        run.train(at + 60)
        for other in others:
            other.train(at + 60)
            assert np.array_equal(flat(other.opt), flat(run.opt))
            assert other.stats.counters() == run.stats.counters()
        return run, full, at

    runs = run_ranks(size, program)
    run, full, at = runs[0]
    assert run.moved[at].any(), "the jump was added"
    # And on other numbers of ranks: each begins anew from the weights of that step.
    start = run.w[at]

    def elsewhere(comm):
        other = make(comm)
        lo = 0
        with torch.no_grad():
            for p in parameters_of(other.opt):
                p.copy_(torch.from_numpy(start[lo : lo + p.numel()]).reshape(p.shape))
                lo += p.numel()
        other.opt.load_state_dict(copy.deepcopy(full))
        other.k = at
        return other.train(at + 9)

    for others in (run_ranks(other, elsewhere) for other in SIZES if other != size):
        assert equal(others)
        np.testing.assert_allclose(others[0].w, run.w[at : at + 9], atol=1e-9)


def test_a_state_of_one_rank_alone_does_not_part_the_ranks():
    """Loaded between the two steps: the jump was decided before, and every rank adds it."""
    problem = Problem(SLOW, noise=0.02)

    def program(comm):
        run = Run(problem, comm).late(40)
        if comm.rank == 1:
            run.opt.load_state_dict(run.state())
        return run.train(120)

    runs = run_ranks(3, program)
    assert equal(runs)
    assert runs[0].stats.resets["desynchronized"] == 1


@pytest.mark.parametrize("size", SIZES)
def test_reset_between_the_two_steps(size):
    """The history is forgotten, and the jump that was made of it is added."""
    problem = Problem(SLOW, noise=0.02)

    def program(comm):
        run = Run(problem, comm).late(40)
        run.opt.anderson.reset()
        at = run.k
        state = run.state()
        again = Run(problem, comm).resumed(run, state)
        run.train(at + 60)
        again.train(at + 60)
        assert np.array_equal(flat(run.opt), flat(again.opt))
        return run, at

    runs = run_ranks(size, program)
    assert equal([run for run, _ in runs])
    run, at = runs[0]
    assert run.moved[at].any() and not np.any(run.moved[at + 1 : at + 20])
    assert len(run.jumped_in) > 2, "later jumps"


@pytest.mark.parametrize("size", SIZES)
def test_parameters_that_change_between_the_two_steps(size):
    """The jump is that of other parameters: it is never added, and nobody waits for it."""
    problem = Problem(SLOW, noise=0.02)

    def program(comm):
        run = Run(problem, comm).late(40)
        first, at, jumps = parameters_of(run.opt)[0], run.k, run.stats.jumps
        first.requires_grad_(False)
        run.train(at + 1)
        assert not run.moved[-1].any()
        assert run.stats.accelerated == jumps - 1
        first.requires_grad_(True)
        return run.train(at + 60)

    runs = run_ranks(size, program)
    assert equal(runs)
    assert runs[0].stats.resets["changed"] == 2 and runs[0].stats.jumps > 3


@pytest.mark.parametrize("size", SIZES)
def test_a_group_that_comes_to_rest_between_the_two_steps(size):
    """As many numbers as before, but another history: the jump is dropped all the same."""
    both = Group(shapes=((5,), (2, 3)), lr=0.02), Group(shapes=((4, 2),), lr=0.02)
    problem = Problem(both, noise=0.02)

    def program(comm):
        run = Run(problem, comm).late(40)
        run.opt.param_groups[1]["lr"] = 0.0
        run.train(run.k + 1)
        first = problem.rates.size - 8
        assert not run.moved[-1][:first].any()
        assert run.stats.resets["changed"] == 1
        return run.train(run.k + 20)

    assert equal(run_ranks(size, program))


def test_other_weights_for_a_while():
    """`averaged_weights` between the two steps changes nothing."""
    config = AndersonConfig(**SETTINGS | {"averages": (0.9,)}, overlap=True)
    problem = Problem(SLOW, noise=0.02)

    def program(comm):
        plain, run = (Run(problem, comm, config).late(40) for _ in range(2))
        with run.opt.averaged_weights(which=0.9):
            assert not np.array_equal(flat(run.opt), flat(plain.opt))
        return [plain.train(90), run.train(90)]

    for runs in run_ranks(2, program):
        assert equal(runs)
        assert runs[0].stats.jumps > 2


def test_a_rejected_jump_ends_at_the_base_step_before_it():
    """The losses of the step after the addition judge it: back to the base step of the addition."""
    run = Run(Problem(SLOW, noise=0.02)).late(40)
    at = run.k
    run.train(at + 1)
    base = flat(run.opt) - run.moved[-1]
    run.train(at + 2, loss=lambda k: 1e6)
    np.testing.assert_allclose(flat(run.opt), base, atol=1e-13)
    assert run.stats.rejected["loss"] == 1
    assert run.opt.anderson._subspace.trust.scale == 0.25


@pytest.mark.parametrize("size", SIZES)
def test_a_gradient_that_is_not_finite_in_the_second_step(size):
    """As in any other step: weights go bad, and when they are good again all goes on."""
    problem = Problem(SLOW, noise=0.02)

    def program(comm):
        run = Run(problem, comm, observe=False).late(40)
        kept = [p.detach().clone() for p in parameters_of(run.opt)]
        problem.set_gradient(run.opt, np.full(problem.n, np.nan))
        run.opt.step()
        assert np.isnan(flat(run.opt)).all()
        with torch.no_grad():
            for p, good in zip(parameters_of(run.opt), kept, strict=True):
                p.copy_(good)
        run.opt.state.clear()
        return run.train(120)

    runs = run_ranks(size, program)
    assert equal(runs)
    assert np.isfinite(runs[0].w[-1]).all() and runs[0].stats.jumps > 2


@pytest.mark.parametrize(
    "settings", [{"safeguard": "loss"}, {"method": "residual", "noise_gate": None}], ids=str
)
def test_where_nothing_is_delayed(settings):
    """Bit for bit as without."""
    problem = Problem(PLAIN if "method" in settings else SLOW, noise=0.02)
    paths = []
    for overlap in (False, True):
        config = AndersonConfig(**SETTINGS | settings, overlap=overlap)
        path, opt = problem.run(config, 60)
        assert opt.anderson.stats.accelerated > 2
        paths.append(path)
    assert np.array_equal(*paths)


def test_a_delayed_jump_that_goes_on_without_overlap():
    """A checkpoint moves between the settings: the jump is added, later ones are not late."""
    problem = Problem(SLOW, noise=0.02)
    run = Run(problem).late(40)
    for settings in ({}, {"safeguard": "loss"}):
        other = Run(problem, config=AndersonConfig(**SETTINGS | settings)).resumed(run, run.state())
        if settings:
            problem.run(other.opt.anderson.config, 1, opt=other.opt, first=other.k)
            continue
        other.train(run.k + 40)
        assert other.moved[0].any()
        assert [k for k in other.jumped_in if not other.moved[k - 1 - run.k].any()] == []
        assert len(other.jumped_in) > 1


def test_the_block_begins_after_the_jump():
    handover = Handover(OVERLAP)
    plans = [handover.schedule(k) for k in range(1, 11)]
    assert [plan.accelerate for plan in plans] == [False] * 9 + [True]
    handover.block_ended(10, 10, True, 1.0, 1.0, late=True)
    add = handover.schedule(11)
    assert (add.add, add.store, add.accelerate) == (True, False, False)
    state = handover.state(10)
    for continues, first in ((True, 12), (False, 11)):
        again = Handover(OVERLAP)
        again.load_state(state, 10, continues)
        assert again.late == continues
        again.late = False
        stored = [k for k in range(11, 40) if (plan := again.schedule(k)) and plan.store]
        ends = [k for k in range(11, 40) if (plan := again.schedule(k)) and plan.accelerate]
        assert (stored[0], ends[0]) == (first, first + 9)


def test_rows_that_change_after_they_were_sent():
    """What travels is a copy: the block's memory is used again."""
    problem = Problem(SLOW, noise=0.02)
    run = Run(problem).late(40)
    method = run.opt.anderson._subspace
    rows, gathering = method._late
    assert rows.data_ptr() not in [vector.data_ptr() for vector in method.blocks._each]
    assert torch.equal(gathering.wait().reshape(-1)[: problem.n], rows)


def test_a_long_vector_is_added_by_chunks(monkeypatch):
    from aadl_hvd.core import chunking

    problem = Problem(SLOW, noise=0.02)
    whole = Run(problem).train(80)
    monkeypatch.setattr(chunking, "CHUNK", 5)
    parts, add = [], WeightShard.add

    def noted(self, *args):
        parts.append(self.sharding.n)
        add(self, *args)

    monkeypatch.setattr(WeightShard, "add", noted)
    np.testing.assert_allclose(Run(problem).train(80).w, whole.w, atol=1e-12)
    assert len(parts) > 2 and {*itertools.chain(parts)} == {problem.n}

"""Replicas that differ: the checksum sees any bit, ranks are named, weights made equal again."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import PLAIN, TEXTBOOK, Group, Problem, flat, parameters_of

from aadl_hvd import AndersonConfig, ReplicaMismatchError
from aadl_hvd.comm.base import ShardGroup
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core import captures, reduction, replicas
from aadl_hvd.core.collectives import Collectives
from aadl_hvd.optim.problem import OptimizerFixedPoint
from aadl_hvd.stats import Stats

CPU = torch.device("cpu")
MOMENTUM = (Group(((4, 3), (5,)), lr=0.05, momentum=0.8),)


def checksum(vector):
    def read(lo, hi, out):
        return out.copy_(vector[lo:hi])

    dtype = torch.float64 if vector.dtype == torch.float64 else torch.float32
    return int(replicas.checksum(read, len(vector), dtype, CPU))


BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


@pytest.fixture(params=[8, 2**17])
def chunk(request, monkeypatch):
    monkeypatch.setattr(replicas, "CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_single_bit_counts(data):
    dtype = data.draw(st.sampled_from(list(BITS)))
    n = data.draw(st.integers(1, 41))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    vector = torch.randn(n, dtype=torch.float64).to(dtype)
    other = vector.clone()
    where = data.draw(st.integers(0, n - 1))
    bit = data.draw(st.integers(0, torch.finfo(dtype).bits - 1))
    bits = other.view(BITS[dtype])
    bits[where] ^= torch.tensor(1, dtype=bits.dtype) << bit
    assert 0 <= checksum(vector) < 2**36
    assert checksum(vector) == checksum(vector.clone())
    if not (vector[where].isnan() or other[where].isnan()):  # widening may quiet a NaN
        assert checksum(vector) != checksum(other)


def test_chunks_do_not_commute(monkeypatch):
    monkeypatch.setattr(replicas, "CHUNK", 4)
    vector = torch.arange(12.0)
    assert checksum(vector) != checksum(vector[[4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11]])
    assert checksum(torch.zeros(0)) == 0


@given(
    st.lists(st.integers(0, 2**36 - 6), min_size=1, max_size=6, unique=True),
    st.integers(1, 2**15),
    st.data(),
)
def test_sums_tell_equal_from_different(numbers, times, data):
    """Also 2^16 ranks of which one differs by 1."""
    number = numbers[0]
    same = reduction.compared(number) * (2 * times)
    assert reduction.equal(same, 2 * times)
    off = number + data.draw(st.sampled_from([-1, 1, 2**18]))
    if 0 <= off < 2**36:
        one_off = reduction.compared(number) * (2 * times - 1) + reduction.compared(off)
        assert not reduction.equal(one_off, 2 * times)
    if len(numbers) > 1:
        assert not reduction.equal(sum(map(reduction.compared, numbers)), len(numbers))


def test_who_differs():
    assert replicas.outliers([7, 7, 5, 7]) == (0, [2])
    assert replicas.outliers([5, 7, 7]) == (1, [0])
    assert replicas.outliers([5, 7]) == (0, [1])  # no telling who is right
    assert replicas.outliers([1, 2, 3]) == (0, [1, 2])


def flip(opt, bit=20):
    """A low bit of the last weight, not so low that steps round it off."""
    weight = parameters_of(opt)[-1].data.view(-1)[-1:]
    weight.view(torch.int64).bitwise_xor_(torch.tensor(1) << bit)


def config(**more):
    return AndersonConfig(**TEXTBOOK | {"history_depth": 4, "frequency": 3} | more)


@pytest.mark.parametrize("shard_groups", [1, 3])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_flipped_bit_is_an_error_within_an_interval(layout, shard_groups):
    if layout == "columns" and shard_groups > 1:
        return
    problem = Problem(PLAIN)

    def program(comm):
        opt = problem.optimizer(config(layout=layout), comm, shard_groups=shard_groups)
        problem.run(config(), 7, opt=opt)
        if comm.rank == 2:
            flip(opt)
        with pytest.raises(ReplicaMismatchError, match=r"rank 2 differ from those of rank 0"):
            problem.run(config(), 2, opt=opt, first=7)
        return opt.anderson.stats.steps

    assert run_ranks(3, program) == [9, 9, 9]


@pytest.mark.parametrize("residual", ["gradient", "step"])
def test_resync_makes_weights_and_state_equal(residual):
    problem = Problem(MOMENTUM)
    settings = config(on_desync="resync", residual=residual, safeguard="none")

    def program(comm):
        opt = problem.optimizer(settings, comm)
        problem.run(settings, 7, opt=opt)
        before = flat(opt)
        if comm.rank == 0:
            flip(opt, 51)
            for p in parameters_of(opt):
                opt.state[p]["momentum_buffer"].add_(1.0)
        path, _ = problem.run(settings, 20, opt=opt, first=7)
        momentum = [opt.state[p]["momentum_buffer"].clone() for p in parameters_of(opt)]
        return before, path, momentum, opt.anderson.stats

    with pytest.warns(UserWarning, match="rank 0 differ from those of rank 1"):
        results = run_ranks(3, program)
    before, path, momentum, stats = results[1]
    for rank, (start, other, buffers, counters) in enumerate(results):
        assert np.array_equal(start, before)
        assert np.array_equal(other[2:], path[2:]), rank
        assert all(map(torch.equal, buffers, momentum))
        assert counters.resets["desynchronized"] == 1
        assert counters.accelerated == stats.accelerated > 4
    assert not np.array_equal(results[0][1][1], path[1])


def test_a_resync_within_a_step_changes_the_scaling():
    """M is made once in a step. After a resync the moments are another rank's."""
    problem = Problem(PLAIN)

    def program(comm):
        ps = [p for group in problem.parameters() for p in group]
        adam = torch.optim.Adam(ps, lr=0.1)
        fixed_point = OptimizerFixedPoint(adam, "gradient")
        fixed_point.base_step = adam.step
        for p in ps:
            p.grad = torch.full_like(p, 2.0 if comm.rank == 1 else 1.0)
        collectives = Collectives(comm, ShardGroup(comm), Stats())
        compared = replicas.Replicas(config(on_desync="resync"), collectives)
        with torch.no_grad():
            assert compared.compare(fixed_point)
            fixed_point.advance()
            before = fixed_point.scaling(0, problem.n)
            payload = compared.of(fixed_point, captures.none())
            reduction.reduce_payloads((payload,), collectives, Stats())
            assert not compared.equal
            compared.settle(fixed_point, step=1)
            return before, fixed_point.scaling(0, problem.n)

    with pytest.warns(UserWarning, match="rank 1 differ from those of rank 0"):
        (expected, own), *others = run_ranks(3, program)
    assert torch.equal(own, expected)
    assert not torch.equal(others[0][0], expected)
    for _, now in others:
        assert torch.equal(now, expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("were_equal", [True, False])
def test_a_warning_that_is_an_error_leaves_all_ranks_alike(were_equal):
    """As with python -W error, in a script that goes on all the same."""
    problem = Problem(MOMENTUM)
    settings = config(on_desync="resync", safeguard="none")

    def program(comm):
        opt = problem.optimizer(settings, comm)
        if were_equal:
            problem.run(settings, 7, opt=opt)
        if comm.rank == 1:
            flip(opt)
        with pytest.raises(UserWarning, match="rank 1 differ from those of rank 0"):
            problem.run(settings, 9, opt=opt, first=7)
        same = opt.anderson.compare_replicas(opt.anderson_engine.problem)
        stats = opt.anderson.stats
        if were_equal:
            accelerated = stats.accelerated
            problem.run(settings, 20, opt=opt, first=stats.steps)
            assert stats.accelerated > accelerated + 4
        return same, opt.anderson.columns, stats.resets["desynchronized"]

    for same, columns, resets in run_ranks(3, program):
        assert same == were_equal and resets == 1
        assert (columns > 0) == were_equal  # stored since


def test_ranks_that_were_never_equal_are_not_accelerated_but_go_on():
    """Horovod trains them, and so does this class; it says so once."""
    problem = Problem(PLAIN)
    settings = config(safeguard="none")

    def program(comm):
        opt = problem.optimizer(settings, comm)
        if comm.rank == 1:
            flip(opt)
        assert not opt.anderson.compare_replicas(opt.anderson_engine.problem)
        problem.run(settings, 9, opt=opt)
        assert opt.anderson.stats.accelerated == 0
        start = problem.optimizer(settings)
        for p, q in zip(parameters_of(opt), parameters_of(start), strict=True):
            p.data.copy_(q.data)  # as hvd.broadcast_parameters
        problem.run(settings, 9, opt=opt, first=9)
        assert opt.anderson.stats.accelerated == 3

    with pytest.warns(UserWarning, match=r"never equal.*broadcast_parameters") as said:
        run_ranks(2, program)
    assert len(said) == 2  # once a rank

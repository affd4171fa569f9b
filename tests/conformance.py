"""What every communicator must do. Each function is called on all ranks of `comm` at once."""

import contextlib

import numpy as np
import pytest
import torch

from aadl_hvd import CommunicationError

DTYPES = (torch.float32, torch.float64)


def same_on_all(comm, value):
    """Fails unless all ranks hold the same bits."""
    array = value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    mine = (array.dtype.str, array.shape, array.tobytes())
    gathered = comm.allgather_object(mine)
    assert len(gathered) == comm.size
    assert all(other == mine for other in gathered), "ranks hold different bits"


def numbers(rank, k=5):
    """Not exactly representable, of many magnitudes: sums of them depend on their order."""
    return np.random.default_rng(rank).standard_normal(k) * 10.0 ** (np.arange(k) % 8 - 3)


def everybodys(comm, k=5):
    return [numbers(rank, k) for rank in range(comm.size)]


def check_ranks(comm):
    assert 0 <= comm.rank < comm.size
    assert comm.allgather_object(comm.rank) == list(range(comm.size))


def check_allgather_object(comm):
    """Objects of different sizes, in the order of the ranks."""
    item = {"rank": comm.rank, "data": [comm.rank] * (1 + 100 * comm.rank), "none": None}
    gathered = comm.allgather_object(item)
    for rank, found in enumerate(gathered):
        assert found == {"rank": rank, "data": [rank] * (1 + 100 * rank), "none": None}


def check_sum(comm):
    for k in (1, 2, 7, 440):
        values = numbers(comm.rank, k)
        before = values.copy()
        for result in (comm.allreduce(values), comm.allreduce(values, "sum")):
            assert result.dtype == np.float64
            assert result.shape == (k,)
            np.testing.assert_allclose(result, np.sum(everybodys(comm, k), axis=0), rtol=1e-12)
            same_on_all(comm, result)
        assert np.array_equal(values, before), "the argument was changed"


def check_max(comm):
    for k in (1, 6):
        values = -(numbers(comm.rank, k) ** 2) - 1.0  # all negative: 0 must not creep in
        result = comm.allreduce(values, "max")
        expected = np.max([-(x**2) - 1.0 for x in everybodys(comm, k)], axis=0)
        assert np.array_equal(result, expected)
        same_on_all(comm, result)
    mixed = np.array([-np.inf, np.inf if comm.rank == comm.size - 1 else 1.0])
    assert np.array_equal(comm.allreduce(mixed, "max"), [-np.inf, np.inf])


def check_nan(comm):
    """NaN on one rank, whichever, is NaN on all; other numbers of a sum are untouched."""
    for bad in range(comm.size):
        values = np.array([1.0, np.nan if comm.rank == bad else 2.0, 3.0])
        total = comm.allreduce(values)
        assert np.isnan(total[1])
        np.testing.assert_allclose(total[[0, 2]], [comm.size, 3 * comm.size])
        assert np.isnan(comm.allreduce(values, "max")[1])
        values[1] = np.inf if comm.rank == bad else -1.0
        assert comm.allreduce(values)[1] == np.inf
        assert comm.allreduce(values, "max")[1] == np.inf
    values = np.array([np.inf if comm.rank == 0 else -np.inf])
    with np.errstate(invalid="ignore"):
        assert comm.size == 1 or np.isnan(comm.allreduce(values)[0])


def check_empty(comm):
    empty = np.zeros(0)
    assert comm.allreduce(empty, "max").shape == (0,)
    assert comm.allreduce(empty).shape == (0,)
    assert comm.broadcast(empty).shape == (0,)
    for dtype in DTYPES:
        for result in (
            comm.allgather(torch.zeros(0, dtype=dtype)),
            comm.sum_tensor(torch.zeros(0, dtype=dtype)),
        ):
            assert result.shape == (0,)
            assert result.dtype == dtype


def check_broadcast(comm):
    """From rank 0 of this group, whatever it is in the world."""
    for k in (1, 3, 50):
        values = numbers(comm.rank, k)
        before = values.copy()
        result = comm.broadcast(values)
        assert result.dtype == np.float64
        assert np.array_equal(result, numbers(0, k))
        assert np.array_equal(values, before), "the argument was changed"
        same_on_all(comm, result)


def check_allgather(comm):
    for dtype in DTYPES:
        for k in (1, 3, 1000):
            block = torch.from_numpy(numbers(comm.rank, k)).to(dtype)
            expected = torch.cat([torch.from_numpy(x).to(dtype) for x in everybodys(comm, k)])
            result = comm.allgather(block)
            assert result.dtype == dtype
            assert torch.equal(result, expected)


def check_gather_by_pieces(comm):
    """Puts together what `allgather` does, whatever the length of a piece."""
    for dtype in DTYPES:
        for k, piece in ((1, 2**20), (5, 2**20), (1000, 7 * comm.size), (3, 1), (0, 2**20)):
            block = torch.from_numpy(numbers(comm.rank, k)).to(dtype)
            whole = torch.full((comm.size, k), torch.nan, dtype=dtype)
            through = getattr(comm, "host", None) or comm
            through.piece, before = piece, getattr(through, "piece", None)
            for first, rows in comm.gather_by_pieces(block):
                assert rows.dtype == dtype
                whole[:, first : first + rows.shape[1]] = rows
            through.piece = before
            expected = [torch.from_numpy(x).to(dtype) for x in everybodys(comm, k)]
            assert torch.equal(whole, torch.stack(expected))


def check_gather_later(comm):
    """As `allgather`, whatever the ranks do together before they wait, and how often."""
    for dtype in DTYPES:
        for k in (1, 1000, 0):
            block = torch.from_numpy(numbers(comm.rank, k)).to(dtype)
            gathering = comm.gather_later(block)
            check_sum(comm)
            other = comm.allgather(torch.full((3,), float(comm.rank)))
            assert torch.equal(other, torch.arange(float(comm.size)).repeat_interleave(3))
            check_broadcast(comm)
            expected = [torch.from_numpy(x).to(dtype) for x in everybodys(comm, k)]
            for _ in range(2):
                found = gathering.wait()
                assert found.dtype == dtype
                assert torch.equal(found, torch.stack(expected))
    with pytest.raises(CommunicationError, match="bfloat16"):
        comm.gather_later(torch.zeros(3, dtype=torch.bfloat16))


def check_gathering_that_nobody_waits_for(comm):
    """It is in the way of none that is started later. Some ranks may wait for it all the same."""
    for k in range(4):
        gathering = comm.gather_later(torch.full((5,), comm.rank + 0.5))
        if comm.rank == k % comm.size:
            gathering.wait()
    found = comm.gather_later(torch.full((2,), comm.rank + 0.25)).wait()
    assert torch.equal(found[:, 0], torch.arange(comm.size) + 0.25)
    assert comm.allreduce(np.ones(1))[0] == comm.size


def check_gathering_left_by_one(comm):
    """In the midst: the others get all of theirs, and all go on together."""
    through = getattr(comm, "host", None) or comm
    through.piece, before = 4 * comm.size, getattr(through, "piece", None)
    got = 0
    with contextlib.closing(comm.gather_by_pieces(torch.full((50,), comm.rank + 0.5))) as pieces:
        for _, rows in pieces:
            assert torch.equal(rows[:, 0], torch.arange(comm.size) + 0.5)
            got += rows.shape[1]
            if comm.rank == comm.size - 1:
                break
    through.piece = before
    assert got == 50 or comm.rank == comm.size - 1
    assert comm.allreduce(np.ones(1))[0] == comm.size


def check_allgather_of_a_view(comm):
    """Neither a view with strides nor a tensor that requires grad is in the way."""
    block = torch.arange(6.0)[::2] + 10 * comm.rank
    block.requires_grad_(True)
    result = comm.allgather(block)
    assert not result.requires_grad
    expected = torch.cat([torch.arange(6.0)[::2] + 10 * rank for rank in range(comm.size)])
    assert torch.equal(result, expected)


def check_sum_tensor(comm):
    for dtype, near in zip(DTYPES, (1e-5, 1e-13), strict=True):
        for k in (1, 4, 1000):
            small = np.random.default_rng(comm.rank).standard_normal(k)
            result = comm.sum_tensor(torch.from_numpy(small.copy()).to(dtype))
            expected = sum(
                np.random.default_rng(rank).standard_normal(k) for rank in range(comm.size)
            )
            assert result.dtype == dtype
            np.testing.assert_allclose(result, expected, rtol=near, atol=near)
            same_on_all(comm, result)


def check_send(comm):
    """From any rank to any other, and to no third one."""
    for source in range(comm.size):
        for to in range(comm.size):
            for k in (0, 1, 100_000):
                data = torch.arange(k, dtype=torch.int64).to(torch.uint8) + source
                result = comm.send(data if comm.rank == source else None, source, to)
                if comm.rank == to:
                    assert torch.equal(result, data)
                else:
                    assert result is None
    for wrong in (torch.zeros(3), None):
        if comm.rank == 0:
            with pytest.raises(CommunicationError, match="uint8"):
                comm.send(wrong, 0, comm.size - 1)
    check_ranks(comm)


def check_refusals(comm):
    """Refused on every rank before anything is sent: nobody is left waiting."""
    for bad in (torch.bfloat16, torch.float16, torch.int64):
        for operation in (comm.allgather, comm.sum_tensor):
            with pytest.raises(CommunicationError, match=str(bad)):
                operation(torch.zeros(3).to(bad))
    for operation in (comm.allgather, comm.sum_tensor):
        with pytest.raises(CommunicationError, match=r"\(2, 2\)"):
            operation(torch.zeros(2, 2))
    for operation in (comm.allreduce, comm.broadcast):
        for values in (np.zeros(3, dtype=np.float32), np.zeros((2, 2)), np.arange(3), 1.0):
            with pytest.raises(CommunicationError, match="float64 vector"):
                operation(values)
    with pytest.raises(CommunicationError, match="op='min'"):
        comm.allreduce(np.zeros(1), "min")
    check_ranks(comm)  # and all are still in step


def check_many_in_a_row(comm):
    """Nothing of one call leaks into the next, whatever their order and lengths."""
    for i in range(20):
        k = 1 + i % 3
        assert comm.allreduce(np.full(k, float(i)))[0] == i * comm.size
        assert comm.allreduce(np.full(k, i + comm.rank * 1.0), "max")[0] == i + comm.size - 1
        assert comm.broadcast(np.full(k, i + comm.rank * 1.0))[0] == i
        gathered = comm.allgather(torch.full((k,), float(i + comm.rank)))
        assert gathered[-1] == i + comm.size - 1


def check_all_to_all(comm):
    """Bytes of any length to some of the ranks, itself included, and none to others."""

    def data(source, to):
        generator = np.random.default_rng([source, to])
        return torch.from_numpy(generator.integers(256, size=1 + 70 * source + to, dtype=np.uint8))

    for hops in (0, 1, 2):  # to a rank further on; in the last round to two, but not from rank 0
        sources = range(hops == 2, comm.size)
        targets = {rank: {(rank + h) % comm.size for h in {hops, 0}} for rank in sources}
        outgoing = {to: data(comm.rank, to) for to in targets.get(comm.rank, ())}
        arrived = comm.all_to_all(outgoing)
        assert arrived.keys() == {rank for rank in sources if comm.rank in targets[rank]}
        for source, found in arrived.items():
            assert torch.equal(found, data(source, comm.rank))
    assert comm.all_to_all({}) == {}
    nothing = torch.empty(0, dtype=torch.uint8)
    assert comm.all_to_all({comm.size - 1: nothing}) == {}


def check_all_to_all_in_several_messages(comm):
    """Longer ones than the transport can take at once."""
    everything = {to: torch.arange(10 * to + comm.rank).byte() for to in range(comm.size)}
    for source, found in comm.all_to_all(everything, most=3).items():
        assert torch.equal(found, torch.arange(10 * comm.rank + source).byte())


def check_copy(comm):
    """deepcopy of what holds a communicator shares it."""
    import copy

    gathering = comm.gather_later(torch.zeros(1))
    for shared in (comm, gathering):
        assert copy.deepcopy({"shared": shared})["shared"] is shared
    gathering.wait()


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]

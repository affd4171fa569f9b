"""The conformance suite on real ranks: Horovod with and without mpi4py, MPI, and a part of them."""

import time

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from conformance import CHECKS
from problems import TEXTBOOK

from aadl_hvd import AndersonConfig, CommunicationError, DistributedAndersonOptimizer
from aadl_hvd.comm import departures
from aadl_hvd.comm.horovod import LENGTH, HorovodCommunicator, horovod_communicator
from aadl_hvd.comm.local import LocalCommunicator
from aadl_hvd.comm.mpi import MpiCommunicator

ON_MPI = hvd.mpi_enabled()


def members(group, all_but_rank_0):
    """Global ranks of a group, and its process set."""
    if group == "world":
        return list(range(hvd.size())), hvd.global_process_set
    return list(range(1, hvd.size())), all_but_rank_0


@pytest.fixture(scope="module", params=["world", "all but rank 0"])
def group(request, all_but_rank_0):
    return members(request.param, all_but_rank_0)


@pytest.fixture(scope="module", params=["horovod alone", "horovod with mpi4py", "mpi4py alone"])
def comm(request, group):
    """This rank's communicator; None where it is not in the group."""
    ranks, process_set = group
    if request.param != "horovod alone" and not ON_MPI:
        pytest.skip("Horovod does not run on MPI here")
    inside = hvd.rank() in ranks
    host = None
    if request.param != "horovod alone":
        assert MpiCommunicator.world_rank() == hvd.rank()
        host = MpiCommunicator(ranks) if inside else None
    if request.param == "mpi4py alone":
        return host
    return HorovodCommunicator(process_set, host) if inside else None


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check, comm):
    if comm is not None:
        check(comm)


def test_rank_and_size_within_the_group(comm, group):
    ranks, _ = group
    if hvd.rank() in ranks:
        assert comm.size == len(ranks)
        assert comm.rank == ranks.index(hvd.rank())
        # By the group's rank, and not by the world's.
        assert comm.allgather_object(hvd.rank()) == ranks
        assert comm.broadcast(np.array([float(hvd.rank())]))[0] == ranks[0]
    else:
        assert comm is None


def test_small_vectors_go_through_mpi_where_horovod_does():
    comm = horovod_communicator(hvd.global_process_set)
    assert isinstance(comm, HorovodCommunicator)
    assert isinstance(comm.host, MpiCommunicator) == ON_MPI


def test_outside_its_process_set_a_rank_is_alone(all_but_rank_0):
    comm = horovod_communicator(all_but_rank_0)
    alone = hvd.rank() == 0 or hvd.size() == 2
    assert isinstance(comm, LocalCommunicator if alone else HorovodCommunicator)
    assert comm.size == (1 if alone else hvd.size() - 1)


def test_groups_of_different_ranks_one_after_the_other(all_but_rank_0):
    """Ranks outside a group have built fewer communicators: the next one must work all the same."""
    for process_set in (all_but_rank_0, hvd.global_process_set, all_but_rank_0):
        comm = horovod_communicator(process_set)
        without = HorovodCommunicator(process_set) if process_set.included() else comm
        for either in (comm, without):
            assert either.allreduce(np.ones(1))[0] == either.size
            assert either.allgather(torch.ones(2)).numel() == 2 * either.size


def test_two_communicators_do_not_meet():
    """Their collectives have names of their own, with the same lengths too."""
    first, second = (HorovodCommunicator(hvd.global_process_set) for _ in range(2))
    assert first.allreduce(np.array([1.0]))[0] == hvd.size()
    assert second.allreduce(np.array([2.0]))[0] == 2 * hvd.size()
    assert first.allgather(torch.full((1,), 3.0))[-1] == 3.0


LAST = hvd.rank() == hvd.size() - 1
DIFFERENT = {
    "length": lambda comm: comm.allreduce(np.ones(5 if LAST else 4)),
    # With three ranks one of them sends as much as all do in the mean.
    "three lengths": lambda comm: comm.allreduce(np.ones(2 + comm.rank)),
    "long and short": lambda comm: comm.allreduce(np.ones(5 if LAST else 2000)),
    "sum and broadcast": lambda comm: (comm.broadcast if LAST else comm.allreduce)(np.ones(4)),
    # A maximum of three numbers and whether there is a NaN: these four, of each rank.
    "sum and maximum": lambda comm: (
        comm.allreduce(np.ones(3), "max") if LAST else comm.allreduce(np.ones(4 * comm.size))
    ),
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_different_operations_through_horovod(difference):
    """An error on every rank, after which all may go on."""
    comm = HorovodCommunicator(hvd.global_process_set)
    for _ in range(2):
        with pytest.raises(CommunicationError, match="Ranks are in different operations") as error:
            DIFFERENT[difference](comm)
        assert "All ranks must call step()" in str(error.value)
        assert comm.allreduce(np.ones(4))[0] == hvd.size()


def test_lengths_about_that_of_a_message():
    comm = HorovodCommunicator(hvd.global_process_set)
    for k in (0, LENGTH - 4, LENGTH - 3, LENGTH - 2, LENGTH, 3 * LENGTH):
        values = np.arange(k) + 0.25
        assert np.array_equal(comm.allreduce(values), hvd.size() * values)
        assert np.array_equal(comm.allreduce(values + comm.rank, "max"), values + comm.size - 1)
        assert np.array_equal(comm.broadcast(values + comm.rank), values)


def test_training_on_a_part_of_the_ranks(all_but_rank_0):
    """The part shares a history and has its own weights; rank 0 trains by itself."""
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = DistributedAndersonOptimizer(
        opt,
        named_parameters=model.named_parameters(),
        process_set=all_but_rank_0,
        anderson=AndersonConfig(**TEXTBOOK, frequency=2, history_depth=3),
    )
    for k in range(8):
        opt.zero_grad()
        torch.manual_seed(100 * k + hvd.rank())
        model(torch.randn(5, 3)).square().mean().backward()
        opt.step()
    assert opt.anderson.stats.accelerated > 0
    weights = hvd.allgather_object(model.weight.detach().numpy().tobytes())
    assert len(set(weights[1:])) == 1
    assert weights[0] != weights[1]
    rows = -(-8 // max(1, hvd.size() - 1)) if hvd.rank() else 8
    assert opt.anderson.history_bytes <= 4 * rows * (2 * 3 + 4)


@pytest.mark.parametrize("kind", ["length", "dtype"])
def test_blocks_that_differ_are_refused_on_all_ranks(kind):
    comm = horovod_communicator(hvd.global_process_set)
    if comm.host is None:
        pytest.skip("Horovod does not run on MPI here")
    last = hvd.rank() == hvd.size() - 1
    block = torch.zeros(7 + (kind == "length" and last))
    block = block.double() if kind == "dtype" and last else block
    with pytest.raises(CommunicationError, match="bytes on rank"):
        list(comm.gather_by_pieces(block))
    assert comm.allreduce(np.ones(1))[0] == hvd.size()


@pytest.mark.skipif(not ON_MPI, reason="Horovod does not run on MPI here")
def test_a_message_may_come_after_the_notice_that_a_rank_has_left(monkeypatch):
    """A rank whose program ends is done, but its messages may still be on their way."""
    monkeypatch.setattr(departures, "LATE", 60.0)
    comm = MpiCommunicator(list(range(hvd.size())))
    if comm.rank == comm.size - 1:
        comm._departures.leave(None)
        time.sleep(0.2)
    assert comm.allreduce(np.ones(1)) == [comm.size]


@pytest.mark.skipif(not ON_MPI or hvd.size() != 3, reason="needs Horovod on MPI and three ranks")
def test_a_notice_is_not_forgotten_when_another_message_comes(monkeypatch):
    """Rank 0 waits for rank 1, which is late, and then for rank 2, which has left."""
    monkeypatch.setattr(departures, "LATE", 1.0)
    comm = MpiCommunicator([0, 1, 2])
    if comm.rank == 2:
        comm._departures.leave(None)
    else:
        time.sleep(0.3 * comm.rank)
        with pytest.raises(CommunicationError, match="has left") as found:
            comm.allreduce(np.ones(1))
        comm._departures.leave(found.value)  # rank 1 waits for rank 0
    hvd.barrier()


@pytest.mark.skipif(not ON_MPI, reason="Horovod does not run on MPI here")
def test_no_rank_is_done_before_all_have_begun():
    """Else it might exit, and end the operation of the others."""
    comm = MpiCommunicator(list(range(hvd.size())))
    operations = [
        lambda: comm.broadcast(np.zeros(3)),
        lambda: comm.allreduce(np.zeros(3)),
        lambda: comm.allreduce(np.zeros(3), "max"),
        lambda: list(comm.gather_by_pieces(torch.zeros(3))),
    ]
    for operation in operations:
        hvd.barrier()
        if comm.rank == comm.size - 1:
            time.sleep(0.2)
        begun = time.monotonic()  # of one clock: the ranks share a host
        operation()
        done = time.monotonic()
        assert min(comm.allgather_object(done)) >= max(comm.allgather_object(begun))

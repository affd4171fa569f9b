"""The conformance suite on torch.distributed: all ranks, and a part of them."""

import datetime

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conformance import CHECKS

from aadl_hvd import ConfigError
from aadl_hvd.comm.local import LocalCommunicator
from aadl_hvd.comm.torch_distributed import TorchCommunicator, torch_communicator

RANK, SIZE = dist.get_rank(), dist.get_world_size()


@pytest.fixture(scope="module", params=["world", "all but rank 0"])
def group(request):
    """A process group; None where it leaves this rank out."""
    if request.param == "world":
        return dist.group.WORLD
    found = dist.new_group(list(range(1, SIZE)))  # not a default: all ranks of the world call it
    return found if RANK else None


@pytest.fixture(scope="module")
def comm(group):
    return None if group is None else TorchCommunicator(group)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check, comm):
    if comm is not None:
        check(comm)


def test_ranks_are_those_of_the_group(comm, group):
    if comm is None:
        return
    ranks = dist.get_process_group_ranks(group)
    assert comm.rank == ranks.index(RANK) and comm.size == len(ranks)
    assert comm.allgather_object(RANK) == ranks
    assert comm.broadcast(np.array([float(RANK)]))[0] == ranks[0]


def test_groups_that_are_made_afterwards():
    """Those of the user: torch numbers groups on each rank, and the numbers must stay in step."""
    part = dist.new_group(list(range(1, SIZE)))
    if RANK:
        torch_communicator(part).allreduce(np.ones(1))
    after = TorchCommunicator(dist.new_group())
    assert after.allreduce(np.ones(1))[0] == SIZE


def test_new_groups_wait_as_long_as_the_one_they_are_made_beside():
    limit = datetime.timedelta(seconds=47)
    comm = TorchCommunicator(dist.new_group(timeout=limit))
    (group,) = comm.parts([list(range(SIZE))])
    assert group._get_backend(torch.device("cpu")).options._timeout == limit


def test_two_communicators_do_not_meet():
    first, second = (TorchCommunicator(dist.group.WORLD) for _ in range(2))
    assert first.allreduce(np.array([1.0]))[0] == SIZE
    assert second.allreduce(np.array([2.0]))[0] == 2 * SIZE


def test_a_group_of_one_rank_sends_nothing():
    alone = [dist.new_group([rank]) for rank in range(SIZE)][RANK]
    assert isinstance(torch_communicator(alone), LocalCommunicator)


def test_a_mesh_of_one_dimension():
    mesh = dist.init_device_mesh("cpu", (SIZE,))
    assert torch_communicator(mesh).size == SIZE


@pytest.mark.parametrize("wrong", ["world", 3, dist.GroupMember.NON_GROUP_MEMBER])
def test_what_is_no_group(wrong):
    with pytest.raises(ConfigError, match=r"process_group=.*Must be a process group"):
        torch_communicator(wrong)


def test_a_mesh_of_two_dimensions():
    mesh = dist.init_device_mesh("cpu", (1, SIZE), mesh_dim_names=("replicate", "shard"))
    with pytest.raises(ConfigError, match=r"of 2 dimensions\. Must have one"):
        torch_communicator(mesh)

"""Which ranks share a node, from what the launcher says of each."""

import platform
import threading

import pytest

pytest.importorskip("horovod.torch", reason="needs Horovod")

from aadl_hvd.comm import horovod_groups
from aadl_hvd.comm.simulated import run_ranks

# By rank: its node's place among the nodes. The last two: one machine under two names.
CASES = {
    "AABB": [[0, 1], [2, 3]],
    "ABAB": [[0, 2], [1, 3]],
    "ABBA": [[0, 3], [1, 2]],
    "ABBCCA": [[0, 5], [1, 2], [3, 4]],
    "aabb": [[0, 1], [2, 3]],
    "abab": [[0, 2], [1, 3]],
}


@pytest.mark.parametrize("nodes", CASES)
def test_any_order_of_ranks(nodes, monkeypatch):
    here = threading.local()
    monkeypatch.setattr(horovod_groups, "is_homogeneous", lambda: True)
    monkeypatch.setattr(platform, "node", lambda: "one" if nodes.islower() else here.node)
    for name in ("rank", "local_size", "cross_rank"):
        monkeypatch.setattr(horovod_groups.hvd, name, lambda name=name: getattr(here, name))

    def program(comm):
        before = nodes[: comm.rank]
        here.rank, here.node = comm.rank, nodes[comm.rank]
        here.local_size = nodes.count(here.node)
        # As Horovod numbers them: ranks with this local rank, in the order of ranks.
        local = [nodes[:rank].count(nodes[rank]) for rank in range(len(nodes))]
        here.cross_rank = local[: comm.rank].count(before.count(here.node))
        return horovod_groups._groups_of_nodes(comm)

    assert run_ranks(len(nodes), program) == [CASES[nodes]] * len(nodes)

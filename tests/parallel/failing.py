"""Not collected by itself: proves that the harness sees a failure of a single rank."""

import horovod.torch as hvd
import torch


def test_fails_on_the_last_rank_alone():
    assert hvd.rank() != hvd.size() - 1, "only on the last rank"


def test_next_collective():
    hvd.allreduce(torch.ones(1), name="next")

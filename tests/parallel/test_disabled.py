"""AndersonConfig(enabled=False) on real ranks, and AndersonOptimizer, which is not for ranks.

That weights and state are Horovod's, bit for bit: test_dropin.py and test_dropin_arguments.py.
"""

import copy

import horovod.torch as hvd
import pytest
import torch
from training import assert_replicas_equal, batches, flat, network, train

from aadl_hvd import (
    AndersonConfig,
    AndersonOptimizer,
    DistributedAndersonOptimizer,
    ReplicaMismatchError,
    UnsupportedError,
)

OFF = AndersonConfig(enabled=False)
ON = AndersonConfig(frequency=2, noise_gate=None)
LAST = hvd.rank() == hvd.size() - 1
COLLECTIVES = (
    "allreduce",
    "broadcast",
    "allgather",
    "gather_by_pieces",
    "sum_tensor",
    "all_to_all",
)
pytestmark = pytest.mark.timeout(60)


def wrapped(model, config):
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return DistributedAndersonOptimizer(opt, model.named_parameters(), anderson=config)


def test_no_collectives_of_ours_in_a_step(monkeypatch):
    model = network()
    opt = wrapped(model, OFF)

    def entered(*args, **kwargs):
        raise AssertionError("a collective")

    with monkeypatch.context() as patch:
        for name in (*COLLECTIVES, "allgather_object", "send"):
            patch.setattr(opt.anderson.comm, name, entered)
        for x, y in batches(5):
            opt.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            if LAST:  # ignored, also where one rank alone calls it
                opt.observe(loss)
            opt.step()
    assert opt.anderson.stats.steps == 5 and opt.anderson.stats.stored == 0
    assert opt.anderson.history_bytes == 0
    assert_replicas_equal(model)
    before = flat(model)
    for loss in (None, lambda: float(hvd.rank())):
        with opt.averaged_weights(loss) as chosen:
            assert chosen is None and torch.equal(flat(model), before)


def test_all_ranks_must_agree_on_it():
    if hvd.size() == 1:
        pytest.skip("needs two ranks")
    with pytest.raises(ReplicaMismatchError, match="enabled="):
        wrapped(network(), OFF if LAST else ON)


@pytest.mark.parametrize("kind", ["consolidated", "sharded"])
def test_saved_and_loaded_both_ways(kind):
    model = network()
    ends = {}
    for name, config in (("off", OFF), ("on", ON)):
        opt = wrapped(copy.deepcopy(model), config)
        replica = [p for group in opt.param_groups for p in group["params"]]
        data = batches(8)
        for x, _ in data:
            opt.zero_grad()
            sum((p * x.mean()).square().sum() for p in replica).backward()
            opt.step()
        state = opt.consolidate_state_dict() if kind == "consolidated" else None
        state = hvd.broadcast_object(state, root_rank=0, name="state")
        if kind == "sharded":
            state = copy.deepcopy(opt.state_dict() | opt.sharded_state_dict())
        ends[name] = state
    for name, config in (("on", OFF), ("off", ON), ("off", OFF)):
        again = network()
        opt = wrapped(again, config)
        if name == "on":
            with pytest.warns(UserWarning, match="enabled=False keeps none"):
                opt.load_state_dict(copy.deepcopy(ends[name]))
        else:
            opt.load_state_dict(copy.deepcopy(ends[name]))
        train(again, opt, batches(8))
        assert opt.anderson.stats.steps == 16
        more = opt.anderson.stats.stored - ends[name]["anderson"]["counters"]["stored"]
        assert more == (8 if config is ON else 0)
        assert_replicas_equal(again)


def test_an_optimizer_for_one_process():
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    if hvd.size() == 1:
        AndersonOptimizer(opt)
        return
    with pytest.raises(
        UnsupportedError, match=rf"one of {hvd.size()} processes of Horovod"
    ) as found:
        AndersonOptimizer(opt)
    assert "Use DistributedAndersonOptimizer(" in str(found.value)
    AndersonOptimizer(opt, independent=True)

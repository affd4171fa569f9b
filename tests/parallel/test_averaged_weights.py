"""Averaged weights on real ranks: the same on all of them, chosen together, gone afterwards."""

import copy
import math

import horovod.torch as hvd
import pytest
import torch
from training import assert_replicas_equal, batches, flat, loss_of, network, train

from aadl_hvd import (
    AndersonConfig,
    ConfigError,
    DistributedAndersonOptimizer,
    ReplicaMismatchError,
    UnsupportedError,
)


def trained(model, steps=13, **settings):
    opt = DistributedAndersonOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        anderson=AndersonConfig(frequency=2, history_depth=4, averages=(0.5, 0.8), **settings),
    )
    train(model, opt, batches(steps))
    return opt


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("which", [0.5, 0.8])
def test_replicas_hold_the_same_average(layout, which):
    model = network()
    opt = trained(model, layout=layout)
    before = copy.deepcopy(model)
    with opt.averaged_weights(which=which) as name:
        assert name == which
        assert_replicas_equal(model)
        assert not torch.equal(flat(model), flat(before))
    assert torch.equal(flat(model), flat(before))


def test_the_mean_over_ranks_decides():
    """Each rank would choose another; what counts is the same for all."""
    model = network()
    opt = trained(model)
    # Candidates are asked for in the order: last iterate, 0.5, 0.8.
    mine = iter([4.0, 1.0, 3.0] if hvd.rank() == 0 else [4.0, 9.0, 3.0])
    with opt.averaged_weights(lambda: next(mine)) as name:
        assert name == 0.8
        assert_replicas_equal(model)
    nan = iter([4.0, 1.0, float("nan") if hvd.rank() == 0 else 0.0])
    with opt.averaged_weights(lambda: next(nan)) as name:
        assert name == 0.5
    names = hvd.allgather_object(name)
    assert names == [name] * hvd.size()


def test_a_rank_that_has_loaded_a_checkpoint_leaves_all_with_the_last_iterate():
    """The usual Horovod resume loads on rank 0 alone; nobody may wait for it."""
    model = network()
    opt = trained(model)
    # Gains that would have all ranks but one choose an average.
    opt.anderson._averages._gains[:] = 1.0
    assert all(gain > 0 for gain in opt.anderson.average_gains.values())
    if hvd.rank() == 0:
        opt.load_state_dict(opt.state_dict())
        assert all(math.isnan(gain) for gain in opt.anderson.average_gains.values())
    before = flat(model).clone()
    for arguments in ({}, {"which": 0.5}, {"loss": lambda: 1.0}):
        with opt.averaged_weights(**arguments) as name:
            assert name is None
            assert torch.equal(flat(model), before)
    x, y = batches(1)[0]
    for _ in range(8):  # and it comes back
        opt.zero_grad()
        loss_of(model, x, y).backward()
        opt.step()
    with opt.averaged_weights(which=0.5) as name:
        assert name == 0.5
        assert_replicas_equal(model)


def test_batch_norm_is_that_of_all_ranks_together():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    opt = DistributedAndersonOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        anderson=AndersonConfig(averages=(0.5,), frequency=1),
    )
    data = [x for x, _ in batches(4, size=12)]
    for x in data:
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
    before = copy.deepcopy(model.state_dict())
    with opt.averaged_weights(which=0.5, model=model, batches=data):
        with torch.no_grad():
            inside = torch.stack([model[0](x) for x in data])
        means = hvd.allgather(inside.mean(1), name="means")
        variances = hvd.allgather(inside.var(1), name="variances")
        own = [inside.mean(1).mean(0), inside.var(1).mean(0)]
        seconds = hvd.allreduce(own[1] + own[0] ** 2, name="seconds")
        torch.testing.assert_close(model[1].running_mean, means.mean(0))
        torch.testing.assert_close(model[1].running_var, seconds - means.mean(0) ** 2)
        assert not torch.allclose(model[1].running_var, variances.mean(0)), "ranks do not differ"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_one_rank_refuses_is_an_error_on_all():
    model = network()
    opt = trained(model)
    first = hvd.rank() == 0
    before = flat(model).clone()
    batches = [] if first else [torch.ones(2, 3)]
    error = ConfigError if first else ReplicaMismatchError
    with (
        pytest.raises(error, match=r"batches|refused"),
        opt.averaged_weights(model=model, batches=batches),
    ):
        pass
    with (
        pytest.raises(ReplicaMismatchError, match="model"),
        opt.averaged_weights(model=model if first else None, batches=[torch.ones(2, 3)]),
    ):
        pass
    with (
        pytest.raises(ConfigError if first else ReplicaMismatchError, match=r"which|refused"),
        opt.averaged_weights(which=99 if first else 0.8),
    ):
        pass
    for which in ((0.5 if first else 0.8), (None if first else "auto")):
        with (
            pytest.raises(ReplicaMismatchError, match="which"),
            opt.averaged_weights(which=which),
        ):
            pass
    loss = (lambda: 1.0) if first else None
    with pytest.raises(ReplicaMismatchError, match="loss"), opt.averaged_weights(loss):
        pass
    assert torch.equal(flat(model), before)


def test_no_block_inside_a_block():
    model = network()
    opt = trained(model)
    with opt.averaged_weights():
        with pytest.raises(UnsupportedError, match="inside"), opt.averaged_weights():
            pass
        with pytest.raises(UnsupportedError, match="step"):
            opt.step()

"""Replicas that differ, on real ranks: an error that names the rank, or equal weights again."""

import horovod.torch as hvd
import pytest
import torch
from training import assert_replicas_equal, assert_same_bits, flat, full_batch, network, train

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer, ReplicaMismatchError

pytestmark = pytest.mark.timeout(60)
LAST = hvd.rank() == hvd.size() - 1
DATA = full_batch(30)


@pytest.fixture
def made():
    def make(**settings):
        model = network()
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        config = AndersonConfig(frequency=3, **settings)
        return model, DistributedAndersonOptimizer(opt, anderson=config)

    if hvd.size() == 1:
        pytest.skip("needs two ranks")
    return make


def flip(model):
    weight = model[2].weight.data
    weight.view(torch.int32)[1, 2] ^= 1 << 12


def test_one_flipped_bit_is_an_error_on_every_rank_within_an_interval(made):
    model, opt = made()
    train(model, opt, DATA[:4])
    if LAST:
        flip(model)
    other = rf"rank {hvd.size() - 1} differ from those of rank 0 in step 6"
    with pytest.raises(ReplicaMismatchError, match=other):
        train(model, opt, DATA[:2])
    train(*made(), DATA[:4])  # ranks still talk


def test_flipped_before_the_first_step(made):
    model, opt = made()
    if LAST:
        flip(model)
    with pytest.raises(ReplicaMismatchError, match="were equal before"):
        train(model, opt, DATA[:3])


def test_resync(made):
    model, opt = made(on_desync="resync")
    train(model, opt, DATA[:4])
    if LAST:
        flip(model)
        for p in model.parameters():
            opt.state[p]["momentum_buffer"].mul_(2.0)
    with pytest.warns(UserWarning, match=f"rank {hvd.size() - 1} differ"):
        train(model, opt, DATA[:2])
    assert_replicas_equal(model)
    state = [entry["momentum_buffer"] for entry in opt.state.values()]
    assert_same_bits(state, hvd.broadcast_object(state, root_rank=0))
    before = opt.anderson.stats.accelerated
    train(model, opt, DATA)
    assert_replicas_equal(model)
    assert opt.anderson.stats.accelerated > before
    assert opt.anderson.stats.resets["desynchronized"] == 1


@pytest.mark.usefixtures("made")
def test_never_equal_as_without_a_broadcast():
    model = network()
    with torch.no_grad():
        model[0].weight += hvd.rank()
    opt = DistributedAndersonOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), anderson=AndersonConfig(frequency=3)
    )
    with pytest.warns(UserWarning, match=r"never equal.*broadcast_parameters"):
        train(model, opt, DATA[:9])
    assert opt.anderson.stats.accelerated == 0
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    train(model, opt, DATA)
    assert opt.anderson.stats.accelerated > 0
    assert_replicas_equal(model)
    assert torch.isfinite(flat(model)).all()


def test_a_checkpoint_of_rank_0_alone(made):
    """Where no state was loaded, its broadcast decays the weights that were broadcast before it."""
    model, opt = made()
    opt.param_groups[0]["weight_decay"] = 0.1
    if hvd.rank() == 0:
        for p in model.parameters():
            opt.state[p]["momentum_buffer"] = torch.ones_like(p)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(opt, root_rank=0)
    start = flat(network())
    assert torch.equal(flat(model), start) == (hvd.rank() == 0)
    train(model, opt, DATA[:3])
    assert_replicas_equal(model)
    train(model, opt, DATA[:6])
    assert opt.anderson.stats.resets["desynchronized"] == 1
    assert opt.anderson.stats.accelerated > 0
    if LAST:
        flip(model)
    with pytest.raises(ReplicaMismatchError, match="were equal before"):
        train(model, opt, DATA[:3])

"""NeumannOptimizer on real ranks: under Horovod's optimizer and under the accelerated one."""

import copy

import horovod.torch as hvd
import pytest
import torch
from training import (
    assert_replicas_equal,
    assert_same_bits,
    batches,
    compare_with_hand_made,
    compare_with_horovod,
    flat,
    full_batch,
    loss_of,
    network,
    round_gradients,
    train,
    unless_brief,
)

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer, NeumannOptimizer

COUNTERS = ("step", "t", "reset_at", "period")
# Warm-up of 2 steps, then resets at t = 1, 3, 7, 15.
SHORT = {"steps_per_epoch": 2, "warmup_epochs": 1, "reset_epochs": 1}


def neumann(model, lr=0.1, **settings):
    return NeumannOptimizer(model.parameters(), lr, **SHORT | settings)


def two_groups(model):
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.2, "weight_decay": 0.01},
        {"params": list(model[2].parameters()), "alpha": 0.01},
    ]
    return NeumannOptimizer(groups, 0.1, **SHORT)


MAKERS = {"one group": neumann, "two groups": two_groups}


def exact_network():
    model = network()
    round_gradients(model)
    return model


def distributed(opt, model):
    return hvd.DistributedOptimizer(opt, named_parameters=model.named_parameters())


def counters(opt):
    return {tuple(entry[name] for name in COUNTERS) for entry in opt.state.values()}


def state_of(opt):
    return opt.state_dict()["state"], opt.state_dict()["param_groups"]


@pytest.mark.parametrize("make", MAKERS)
def test_under_horovod_it_is_one_process_with_mean_gradients(make):
    """Bit for bit: weights, m, v, t and K; and on all ranks the same."""
    first, second = exact_network(), exact_network()
    opt = distributed(MAKERS[make](first), first)
    assert isinstance(opt, NeumannOptimizer)
    alone = MAKERS[make](second)
    for x, y in batches(14):
        opt.zero_grad()
        loss_of(first, x, y).backward()
        opt.step()
        alone.zero_grad()
        loss_of(second, x, y).backward()
        for p in second.parameters():
            p.grad = hvd.allreduce(p.grad, name="by.hand")
        alone.step()
        assert_same_bits(flat(first), flat(second))
    assert_same_bits(state_of(opt), state_of(alone))
    assert counters(opt) == {(14, 12, 7, 8)}
    assert_replicas_equal(first)
    everybody = hvd.allgather_object(opt.state_dict())
    for other in everybody:
        assert_same_bits(other, everybody[0])


def test_evaluation_weights_are_the_same_on_all_ranks():
    model = exact_network()
    opt = distributed(neumann(model), model)
    train(model, opt, batches(6))
    before = flat(model).clone()
    with opt.evaluation_weights():
        assert not torch.equal(flat(model), before)
        assert_replicas_equal(model)
    assert torch.equal(flat(model), before)
    train(model, opt, batches(2))
    assert_replicas_equal(model)


def test_an_optimizer_that_has_stepped_keeps_its_state_when_it_is_wrapped():
    found = []
    for wrapped_from in (0, 5):
        model = exact_network()
        same = [batches(1)[0]] * 9
        same = hvd.broadcast_object(same, 0)  # the same data: mean gradients are the gradients
        opt = neumann(model)
        train(model, opt, same[:wrapped_from])
        opt = distributed(opt, model)
        train(model, opt, same[wrapped_from:])
        assert counters(opt) == {(9, 7, 7, 8)}
        found.append((flat(model), opt.state_dict()))
    assert_same_bits(found[1], found[0])


@pytest.mark.parametrize("wrap", [distributed, lambda opt, model: opt], ids=["wrapped", "plain"])
def test_broadcast_at_the_start(wrap):
    """Each rank has weights of its own before; weight decay must not move rank 0's."""
    torch.manual_seed(hvd.rank())
    model = torch.nn.Linear(3, 2)
    opt = wrap(neumann(model, weight_decay=0.5, lr=0.1 * (1 + hvd.rank())), model)
    start = hvd.broadcast_object(flat(model).clone(), 0)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(opt, root_rank=0)
    assert torch.equal(flat(model), start)
    assert counters(opt) == {(0, 0, 0, 0)}
    assert opt.param_groups[0]["lr"] == 0.1
    assert opt.param_groups[0]["steps_per_epoch"] == 2


@pytest.mark.parametrize("at", unless_brief(5, 1, 2, 3))
def test_checkpoint_loaded_on_rank_0_alone_and_broadcast(at):
    """As Horovod's examples resume; then as if nothing had happened, bit for bit."""
    data = batches(12)
    first = exact_network()
    opt = distributed(neumann(first, weight_decay=0.1), first)
    train(first, opt, data[:at])
    saved = copy.deepcopy((first.state_dict(), opt.state_dict()))
    train(first, opt, data[at:])

    torch.manual_seed(hvd.rank())
    second = exact_network()
    for p in second.parameters():
        torch.nn.init.normal_(p)
    other = distributed(neumann(second, lr=0.9), second)
    if hvd.rank() == 0:
        second.load_state_dict(saved[0])
        other.load_state_dict(saved[1])
    hvd.broadcast_parameters(second.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(other, root_rank=0)
    assert counters(other) == {tuple(saved[1]["state"][0][name] for name in COUNTERS)}
    train(second, other, data[at:])
    assert_same_bits(flat(second), flat(first))
    assert_same_bits(state_of(other), state_of(opt))
    assert_replicas_equal(second)


def test_checkpoint_loaded_before_the_wrapping_on_rank_0_alone():
    model = exact_network()
    opt = distributed(neumann(model), model)
    train(model, opt, batches(5))
    saved = opt.state_dict()
    inner = neumann(model, lr=0.9)
    if hvd.rank() == 0:
        inner.load_state_dict(saved)
    other = distributed(inner, model)
    hvd.broadcast_optimizer_state(other, root_rank=0)
    assert_same_bits(state_of(other), state_of(opt))


def test_group_added_under_horovod_takes_the_constructors_settings():
    model = exact_network()
    opt = NeumannOptimizer(model[0].parameters(), 0.3, **SHORT, gamma=0.5)
    opt = hvd.DistributedOptimizer(opt, named_parameters=model[0].named_parameters())
    opt.add_param_group({"params": list(model[2].parameters())})
    assert opt.param_groups[1]["lr"] == 0.3
    assert opt.param_groups[1]["gamma"] == 0.5
    assert opt.param_groups[1]["steps_per_epoch"] == 2


@pytest.mark.skipif(hvd.size() != 2 or not hvd.mpi_enabled(), reason="Adasum: MPI, 2^k ranks")
def test_adasum():
    """Horovod steps tensor by tensor there; t and K still count steps."""
    model = network()
    opt = hvd.DistributedOptimizer(
        neumann(model), named_parameters=model.named_parameters(), op=hvd.Adasum
    )
    train(model, opt, batches(9))
    assert counters(opt) == {(9, 7, 7, 8)}
    assert flat(model).isfinite().all()
    assert_replicas_equal(model)


# As the base of Anderson acceleration


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("residual", unless_brief("gradient", "step"))
def test_never_accelerated_it_is_as_under_horovod(make, residual):
    opt = compare_with_horovod(
        network,
        MAKERS[make],
        lambda model, opt: train(model, opt, batches(9)),
        config=AndersonConfig(frequency=10**9, residual=residual),
    )
    assert counters(opt) == {(9, 7, 7, 8)}


@pytest.mark.parametrize(
    "settings",
    unless_brief(
        {"relaxation": 0.3},
        {"residual": "step", "safeguard": "residual", "relaxation": 0.5},
        {"average_window": 3, "layout": "columns", "safeguard": "none", "relaxation": 0.3},
    ),
)
@pytest.mark.parametrize("make", MAKERS)
def test_accelerated(make, settings):
    """Against one process, gradients reduced by hand; replicas bit for bit."""
    opt, model = compare_with_hand_made(
        lambda: network(torch.float64),
        MAKERS[make],
        lambda model, opt: train(model, opt, full_batch(16, torch.float64)),
        # The gate would see another noise with ranks than without.
        AndersonConfig(frequency=3, history_depth=4, noise_gate=None, mixing=1.0, **settings),
        tolerance=1e-6,
    )
    assert isinstance(opt, NeumannOptimizer)
    assert_replicas_equal(model)
    numbers = counters(opt)
    assert len(numbers) == 1
    assert all(other == numbers for other in hvd.allgather_object(numbers))
    with opt.evaluation_weights():
        assert_replicas_equal(model)
    train(model, opt, full_batch(2, torch.float64))
    assert_replicas_equal(model)


def test_broadcast_of_the_accelerated_one():
    model = exact_network()
    opt = neumann(model, weight_decay=0.1)
    opt = DistributedAndersonOptimizer(opt, named_parameters=model.named_parameters())
    train(model, opt, full_batch(5))
    saved = copy.deepcopy(opt.state_dict())
    if hvd.rank() == 0:
        opt.load_state_dict(saved)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(opt, root_rank=0)
    assert_same_bits(opt.state_dict()["state"], saved["state"])
    train(model, opt, full_batch(5))
    assert counters(opt) == {(10, 8, 7, 8)}
    assert_replicas_equal(model)

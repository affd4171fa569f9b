"""With acceleration: the same as one process on all data, and the same bits on all ranks."""

import copy
import datetime

import pytest
import torch
import torch.distributed as dist
from training import assert_same_on_all, mine, network, sgd, train, weights, wrapped

from aadl_hvd import (
    AndersonConfig,
    AndersonOptimizer,
    CommunicationError,
    ConfigError,
    DistributedAndersonOptimizer,
    ReplicaMismatchError,
    UnsupportedError,
    checkpoint,
)

RANK, SIZE = dist.get_rank(), dist.get_world_size()
STEPS = {"subspace": 160, "overlap": 160}  # blocks have ten steps
CASES = {
    "residual": {"method": "residual", "noise_gate": None, "history_depth": 4, "averages": ()},
    "columns": {"method": "residual", "noise_gate": None, "history_depth": 4, "layout": "columns"},
    "subspace": {"method": "subspace"},
    "overlap": {"method": "subspace", "overlap": True},
    "default": {},
    "bfloat16": {"method": "residual", "noise_gate": None, "history_dtype": "bfloat16"},
    "residual's norm": {"safeguard": "residual", "noise_gate": None, "method": "residual"},
    "moving average": {"average_window": 3, "noise_gate": None, "method": "residual"},
}


def optimizer(model, config=None, **arguments):
    anderson = AndersonConfig(**CASES["residual"] if config is None else config)
    return DistributedAndersonOptimizer(sgd(model), anderson=anderson, **arguments)


@pytest.mark.parametrize("observe", [False, True], ids=["", "observe"])
@pytest.mark.parametrize("name", CASES)
def test_as_one_process_with_all_data(name, observe):
    model, whole, steps = wrapped(), network(), STEPS.get(name, 40)
    opt = optimizer(model, CASES[name])
    found = train(model, opt, steps, observe=observe)
    assert_same_on_all(found)
    config = AndersonConfig(**CASES[name] | {"layout": "rows"})
    alone = AndersonOptimizer(sgd(whole), anderson=config, independent=True)
    expected = train(whole, alone, steps, part=slice(None), observe=observe)
    stats = opt.anderson.stats
    assert stats.accelerated == alone.anderson.stats.accelerated
    assert stats.accelerated > 0 or name == "default"
    # bfloat16 rounds stored columns, so that a last bit of a weight may become a larger one.
    near = 1e-3 if name == "bfloat16" else 1e-7
    torch.testing.assert_close(found, expected, rtol=near, atol=near)
    plain = network()
    base = train(plain, sgd(plain), steps, part=slice(None))
    assert name == "default" or not torch.allclose(found[-1], base[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("loop", [{"passes": 3}, {"clip": 0.05}])
def test_accumulated_and_clipped_gradients(loop):
    model, whole = wrapped(), network()
    opt = optimizer(model)
    found = train(model, opt, 20, **loop)
    alone = AndersonOptimizer(sgd(whole), anderson=opt.anderson.config, independent=True)
    expected = train(whole, alone, 20, part=slice(None), clip=loop.get("clip"))
    assert opt.anderson.stats.accelerated == alone.anderson.stats.accelerated > 0
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_each_rank_holds_its_part_of_the_history():
    model = wrapped()
    opt = optimizer(model)
    train(model, opt, 12)
    n, m = weights(model).numel(), opt.anderson.config.history_depth
    assert opt.anderson.history_bytes <= 8 * -(-n // SIZE) * (2 * m + 4)


def test_a_part_of_the_ranks():
    """Rank 0 trains by itself, the others together."""
    rest = dist.new_group(list(range(1, SIZE)))
    alone = [dist.new_group([rank]) for rank in range(SIZE)][RANK]
    group = rest if RANK else alone
    model = wrapped(process_group=group)
    opt = optimizer(model, process_group=group)
    train(model, opt, 12)
    assert opt.anderson.comm.size == (SIZE - 1 if RANK else 1)
    assert opt.anderson.stats.accelerated > 0
    assert_same_on_all(weights(model), group)


@pytest.mark.parametrize("kind", ["group", "mesh", "node"])
def test_groups_that_share_a_history(kind, monkeypatch):
    """Halves of the ranks, or ranks by themselves; the weights are those of one group."""
    share = SIZE // 2 if SIZE % 2 == 0 else 1
    if kind == "group":
        sets = [list(range(lo, lo + share)) for lo in range(0, SIZE, share)]
        wanted = [dist.new_group(ranks) for ranks in sets][RANK // share]
    elif kind == "mesh":
        names = ("replicate", "shard")
        mesh = dist.init_device_mesh("cpu", (SIZE // share, share), mesh_dim_names=names)
        wanted = mesh["shard"]
    else:
        wanted = "node"
        monkeypatch.setattr("platform.node", lambda: f"host{RANK // share}")
    model, other = wrapped(), wrapped()
    opt = optimizer(model, CASES["residual"] | {"shard_group": wanted})
    assert (opt.anderson.group.count, opt.anderson.group.comm.size) == (SIZE // share, share)
    found = train(model, opt, 20)
    assert_same_on_all(found)
    assert opt.anderson.stats.accelerated > 0
    expected = train(other, optimizer(other), 20)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["residual", "subspace", "overlap"])
@pytest.mark.parametrize("kind", ["shard", "whole"])
def test_a_checkpoint_goes_on_bit_for_bit(name, kind, tmp_path):
    model = wrapped()
    opt = optimizer(model, CASES[name])
    steps = STEPS.get(name, 34) // 2
    train(model, opt, steps)
    while name == "overlap" and not opt.anderson._handover.late:  # a jump is on its way
        train(model, opt, 1, first=steps)
        steps += 1
    kept = {k: v.clone() for k, v in model.module.state_dict().items()}
    # Copied: torch loads the tensors themselves, and both optimizers would go on in them.
    state, full = copy.deepcopy((opt.state_dict(), opt.consolidate_state_dict()))
    path = tmp_path / f"{RANK}.pt"
    checkpoint.save(path, opt.sharded_state_dict())
    box = [full]
    dist.broadcast_object_list(box, src=0)
    again = wrapped()
    # DDP orders its buckets anew in its first backward pass, and three ranks then add up a sum in
    # another order.
    train(again, sgd(again), 1)
    again.module.load_state_dict(kept)
    other = optimizer(again, CASES[name])
    other.load_state_dict(state | checkpoint.load(path) if kind == "shard" else box[0])
    expected = train(model, opt, steps, first=steps)
    assert torch.equal(train(again, other, steps, first=steps), expected)
    assert other.anderson.stats.accelerated > 0


def test_one_process_takes_the_history_of_all():
    model, whole = wrapped(), network()
    opt = optimizer(model)
    train(model, opt, 17)
    box = [opt.consolidate_state_dict()]
    dist.broadcast_object_list(box, src=0)
    alone = AndersonOptimizer(sgd(whole), anderson=opt.anderson.config, independent=True)
    whole.load_state_dict(model.module.state_dict())
    alone.load_state_dict(copy.deepcopy(box[0]))
    assert alone.anderson.columns == opt.anderson.columns > 0
    expected = train(model, opt, 10, first=17)
    found = train(whole, alone, 10, part=slice(None), first=17)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_averaged_weights():
    model = wrapped()
    opt = optimizer(model, {"averages": (0.9,)})
    path = train(model, opt, 20)
    with opt.averaged_weights(which=0.9) as name:
        assert name == 0.9
        averaged = weights(model)
    assert not torch.equal(averaged, path[-1]) and torch.equal(weights(model), path[-1])
    assert_same_on_all(averaged)


def test_weights_that_one_rank_changes():
    model = wrapped()
    opt = optimizer(model)
    train(model, opt, 8)
    if RANK == SIZE - 1:
        next(model.parameters()).data.add_(1e-3)
    with pytest.raises(ReplicaMismatchError, match=f"Weights of rank {SIZE - 1} differ"):
        train(model, opt, 8)


def test_a_model_without_ddp():
    """Each rank would go its own way; the first step says so, on every rank."""
    model = network()
    opt = optimizer(model)
    with pytest.raises(ReplicaMismatchError, match=r"Gradients differ.*DistributedDataParallel"):
        train(model, opt, 1)


def test_gradients_that_a_user_has_averaged():
    """They need not come from DistributedDataParallel."""
    model = network()
    opt = optimizer(model)

    def average(*_):
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= SIZE

    opt.register_step_pre_hook(average)
    found = train(model, opt, 20)
    assert opt.anderson.stats.accelerated > 0
    expected = train(other := wrapped(), optimizer(other), 20)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_settings_that_differ():
    model = wrapped()
    config = AndersonConfig(history_depth=4 + (RANK == SIZE - 1))
    with pytest.raises(ReplicaMismatchError, match=r"history_depth=4.*history_depth=5"):
        DistributedAndersonOptimizer(sgd(model), anderson=config)


def test_refused_on_one_rank():
    model = wrapped()
    last = RANK == SIZE - 1
    base = "no optimizer" if last else sgd(model)
    match = "Invalid optimizer of type str" if last else f"Rank {SIZE - 1} refused"
    with pytest.raises((UnsupportedError, ReplicaMismatchError), match=match):
        DistributedAndersonOptimizer(base)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"backward_passes_per_step": 2}, ConfigError, r"backward_passes_per_step=2 with torch"),
        ({"op": 1}, ConfigError, r"Invalid op=1 with torch"),
        ({"anderson": 3}, ConfigError, r"Invalid anderson=3"),
        ({"process_group": 3}, ConfigError, r"Invalid process_group=3"),
    ],
)
def test_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        DistributedAndersonOptimizer(sgd(network()), **arguments)


def test_optimizers_that_differ_between_ranks():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = network()
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(UnsupportedError, match="ZeroRedundancyOptimizer"):
        DistributedAndersonOptimizer(zero)
    with pytest.raises(UnsupportedError, match="LBFGS"):
        DistributedAndersonOptimizer(torch.optim.LBFGS(model.parameters()))


def test_methods_of_horovod():
    opt = optimizer(wrapped())
    for call in (opt.synchronize, opt.skip_synchronize):
        with pytest.raises(UnsupportedError, match="leave the call out"):
            call()
    with pytest.raises(UnsupportedError, match="leave the call out"):
        opt.set_backward_passes_per_step(2)


def test_the_arguments_of_both_worlds_in_one_line():
    model = wrapped()
    DistributedAndersonOptimizer(sgd(model), named_parameters=model.named_parameters())


def test_a_rank_that_leaves_the_others_waiting():
    """A step that only some ranks take ends with an error, and not with a hang."""
    ranks = list(range(SIZE))
    group = dist.new_group(ranks, timeout=datetime.timedelta(seconds=2))
    model = network()
    opt = optimizer(model, process_group=group)
    if RANK == 0:
        with pytest.raises(CommunicationError, match=r"Look for a call that only some ranks make"):
            train(model, opt, 1, part=mine())
    dist.barrier()

"""FSDP2: a rank's shard of the parameters is its part of the history, and nothing large travels."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from training import assert_same_on_all, data, mine, network, sgd, train, wrapped

from aadl_hvd import (
    AndersonConfig,
    AndersonOptimizer,
    CheckpointError,
    ConfigError,
    DistributedAndersonOptimizer,
    ReplicaMismatchError,
    UnsupportedError,
    checkpoint,
)

RANK, SIZE = dist.get_rank(), dist.get_world_size()
CASES = {
    "residual": {"method": "residual", "noise_gate": None, "history_depth": 4},
    "subspace": {"method": "subspace"},
}
STEPS = {"residual": 20, "subspace": 100}
BOTH = [(method, name) for method in CASES for name in ("SGD, decay", "AdamW")]
ONE = [("residual", name) for name in ("SGD", "Adam", "RMSprop", "Adagrad")]
OPTIMIZERS = {
    "SGD": sgd,
    "SGD, decay": lambda model: sgd(model, weight_decay=0.01, nesterov=True),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.01),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
    "RMSprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.003, momentum=0.5),
    "Adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1),
}


class Directions(torch.nn.Module):
    """A layer of which only the direction of each matrix counts, as before a normalization."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first = torch.nn.Parameter(torch.randn(5, 6).double())
        self.second = torch.nn.Parameter(torch.randn(3, 5).double())

    def forward(self, x):
        first, second = (w / w.norm() for w in (self.first, self.second))
        return 3.0 * torch.tanh(3.0 * x @ first.T) @ second.T


def sharded(model=None, **options):
    """Each layer by itself; rows 7 and 3 are shared out unevenly."""
    model = network() if model is None else model
    for layer in model.children():
        if [*layer.parameters()]:
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def optimizer(model, config, base=sgd, **arguments):
    anderson = AndersonConfig(**config)
    return DistributedAndersonOptimizer(base(model), anderson=anderson, **arguments)


def whole(model):
    return torch.cat([p.full_tensor().detach().reshape(-1) for p in model.parameters()])


def steps(model, opt, count, first=0, part=None):
    """As `train`, but for the path: the weights would have to be gathered."""
    for k in range(first, first + count):
        x, y = data(k, part or mine())
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        opt.step()
    return whole(model)


@pytest.mark.parametrize(("method", "name"), BOTH + ONE)
def test_as_one_process_with_all_data(method, name):
    make, config, count = OPTIMIZERS[name], CASES[method], STEPS[method]
    model, other = sharded(), network()
    opt = optimizer(model, config, make)
    found = steps(model, opt, count)
    anderson = AndersonConfig(**config)
    alone = AndersonOptimizer(make(other), anderson=anderson, independent=True)
    expected = train(other, alone, count, part=slice(None))[-1]
    assert opt.anderson.stats.accelerated == alone.anderson.stats.accelerated > 0
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert_same_on_all(found)
    # A rank holds what belongs to its rows. Adam's second moments are part of the scaling.
    part = sum(p.to_local().numel() for p in model.parameters()) / expected.numel()
    assert opt.anderson.history_bytes <= part * alone.anderson.history_bytes + 1


def test_parameters_whose_scale_does_not_matter():
    """They are told by sums over all ranks, and by their whole size, on all ranks alike."""
    model, other = sharded(Directions()), Directions()
    base = lambda m: sgd(m, lr=0.03)  # noqa: E731
    opt = optimizer(model, CASES["subspace"], base)
    found = steps(model, opt, 120)
    config = AndersonConfig(**CASES["subspace"])
    alone = AndersonOptimizer(base(other), anderson=config, independent=True)
    expected = train(other, alone, 120, part=slice(None))[-1]
    assert opt.anderson.stats.accelerated == alone.anderson.stats.accelerated >= 4
    here, there = (o.anderson._subspace.invariance.state() for o in (opt, alone))
    assert here.looks == there.looks and max(there.largest) < 1.0
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(SIZE != 4, reason="two copies of two shards need 4 ranks")
@pytest.mark.parametrize("method", CASES)
def test_copies_of_shards(method):
    """HSDP: ranks with the same shard share the work, and stay equal bit for bit."""
    names = ("replicate", "shard")
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    model, other = sharded(mesh=mesh), network()
    opt = optimizer(model, CASES[method])
    found = steps(model, opt, STEPS[method])
    assert (opt.anderson.group.count, opt.anderson.group.index) == (2, RANK // 2)
    config = AndersonConfig(**CASES[method])
    alone = AndersonOptimizer(sgd(other), anderson=config, independent=True)
    expected = train(other, alone, STEPS[method], part=slice(None))[-1]
    assert opt.anderson.stats.accelerated == alone.anderson.stats.accelerated > 0
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    for p in model.parameters():
        assert_same_on_all(p.to_local().detach(), mesh["replicate"].get_group())


@pytest.mark.skipif(SIZE != 4, reason="two copies of two shards need 4 ranks")
def test_copies_of_shards_that_one_rank_changes():
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = sharded(mesh=mesh)
    opt = optimizer(model, CASES["residual"])
    steps(model, opt, 8)
    if RANK == SIZE - 1:
        next(model.parameters()).to_local().data.add_(1e-6)
    with pytest.raises(ReplicaMismatchError, match="Copies of the sharded weights"):
        steps(model, opt, 4)


def test_nothing_large_travels(monkeypatch):
    model = sharded()
    opt = optimizer(model, CASES["residual"])

    def refuse(*_):
        raise AssertionError("a large message")

    for name in ("allgather", "sum_tensor", "gather_by_pieces"):
        monkeypatch.setattr(type(opt.anderson.comm), name, refuse)
    steps(model, opt, 20)
    assert opt.anderson.stats.accelerated > 0


@pytest.mark.parametrize("off", [{"enabled": False}, {"warmup_steps": 100}])
def test_without_acceleration_the_bits_of_plain_fsdp(off):
    plain, model = sharded(), sharded()
    expected = steps(plain, sgd(plain), 8)
    assert torch.equal(steps(model, optimizer(model, off), 8), expected)


def test_fewer_rows_than_ranks():
    """A rank without any rows of its own takes part in all sums."""
    model = sharded(torch.nn.Sequential(torch.nn.Linear(6, 1)).double())
    opt = optimizer(model, CASES["residual"])
    for k in range(20):
        x, y = data(k, mine())
        opt.zero_grad()
        (model(x) - y[:, :1]).square().mean().backward()
        opt.step()
    assert opt.anderson.stats.accelerated > 0
    assert_same_on_all(whole(model))


def test_clipped_accumulated_and_mixed_precision():
    """As in plain FSDP2, step by step; with acceleration the loss falls."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    losses, ends = [], []
    for config in ({"warmup_steps": 1000}, None, {"method": "residual", "noise_gate": None}):
        model = sharded(network(torch.float32), mp_policy=policy)
        opt = sgd(model) if config is None else optimizer(model, config)
        for k in range(20):
            x, y = data(k, mine(), torch.float32)
            opt.zero_grad()
            for i in range(2):
                model.set_requires_gradient_sync(i == 1)
                loss = (model(x[i::2]) - y[i::2]).square().mean()
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
        losses.append(loss.item())
        ends.append(whole(model))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[1], ends[2])
    assert opt.anderson.stats.accelerated > 0 and losses[2] < 1.05 * losses[1]


def everywhere(path):
    """The path of rank 0."""
    box = [path]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def save(folder, model, opt, group=None):
    states = dict(zip(("model", "base"), get_state_dict(model, opt), strict=True))
    dcp.save(states, checkpoint_id=folder / "base", process_group=group)
    opt.save_history(folder / "history")


def loaded(folder, model, config, group=None, history=True):
    """An optimizer that goes on from what `save` wrote."""
    base = sgd(model)
    # Before the wrapping: torch takes a step of its own in a new optimizer, to make its state.
    states = dict(zip(("model", "base"), get_state_dict(model, base), strict=True))
    dcp.load(states, checkpoint_id=folder / "base", process_group=group)
    of_model, of_base = states["model"], states["base"]
    set_state_dict(model, base, model_state_dict=of_model, optim_state_dict=of_base)
    anderson = AndersonConfig(**config)
    opt = DistributedAndersonOptimizer(base, anderson=anderson, process_group=group)
    if history:
        opt.load_history(folder / "history")
    return opt


@pytest.mark.parametrize("method", CASES)
def test_a_checkpoint_goes_on_bit_for_bit(method, tmp_path):
    """Model and base by torch.distributed.checkpoint; so the history, or by a file of each rank."""
    folder, half = everywhere(tmp_path), STEPS[method] // 2 + 3
    model = sharded()
    opt = optimizer(model, CASES[method])
    steps(model, opt, half)
    save(folder, model, opt)
    checkpoint.save(folder / f"{RANK}.pt", opt.sharded_state_dict())
    expected = steps(model, opt, half, first=half)
    for by_dcp in (False, True):
        again = sharded()
        other = loaded(folder, again, CASES[method], history=by_dcp)
        if not by_dcp:
            other.load_state_dict(checkpoint.load(folder / f"{RANK}.pt"))
        assert torch.equal(steps(again, other, half, first=half), expected)
        assert other.anderson.stats.resets["desynchronized"] == 0
        assert other.anderson.stats.accelerated == opt.anderson.stats.accelerated


@pytest.mark.skipif(SIZE != 4, reason="two copies of two shards need 4 ranks")
@pytest.mark.parametrize("method", CASES)
def test_copies_of_shards_and_other_numbers_of_ranks(method, tmp_path):
    """2 ranks, then 3, then 4 that hold two copies, then 2: the history goes on in the middle."""
    folder, count = everywhere(tmp_path), {"residual": 9, "subspace": 27}[method]
    two, three = (DeviceMesh("cpu", [*range(ranks)]) for ranks in (2, 3))
    copies = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for life, mesh in enumerate((two, three, copies, two)):
        if mesh.get_coordinate() is not None:
            group = None if mesh is copies else mesh.get_group()
            model = sharded(mesh=mesh)
            if life == 0:
                opt = optimizer(model, CASES[method], process_group=group)
            else:
                opt = loaded(folder / f"{life - 1}", model, CASES[method], group)
            size = min(mesh.size(), SIZE)
            found = steps(model, opt, count, life * count, mine(RANK, size))
            save(folder / f"{life}", model, opt, group)
            assert not sum(opt.anderson.stats.resets.values())
        dist.barrier()
    other, config = network(), AndersonConfig(**CASES[method])
    alone = AndersonOptimizer(sgd(other), anderson=config, independent=True)
    expected = train(other, alone, 4 * count, part=slice(None))[-1]
    if RANK < 2:
        assert opt.anderson.stats.accelerated == alone.anderson.stats.accelerated > 3
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_histories_that_are_not_loaded(tmp_path):
    """Errors come up on all ranks, and the optimizer stays as it was."""
    model, folder = sharded(), everywhere(tmp_path) / "history"
    opt = optimizer(model, CASES["residual"])
    steps(model, opt, 8)
    opt.save_history(folder)
    with pytest.raises(CheckpointError, match="Must be one that save_history has written"):
        opt.load_history(folder / "absent")
    other = optimizer(sharded(Directions()), CASES["residual"])
    with pytest.raises(CheckpointError, match="with 4 parameters"):
        other.load_history(folder)
    if RANK == 0:
        largest = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:100])
    dist.barrier()
    with pytest.raises(CheckpointError, match="could not be read from it"):
        opt.load_history(folder)
    assert opt.anderson.columns == 4
    replicated = optimizer(wrapped(), {})
    for call in (replicated.save_history, replicated.load_history):
        with pytest.raises(UnsupportedError, match="fully_shard has not sharded"):
            call(folder)
    shards = [None] * SIZE
    dist.all_gather_object(shards, opt.sharded_state_dict())
    with pytest.raises(CheckpointError, match="save_history and load_history"):
        checkpoint.merge_shards(shards)


def test_a_history_of_another_rank_is_left_out(tmp_path):
    folder, model = everywhere(tmp_path), sharded()
    opt = optimizer(model, CASES["residual"])
    steps(model, opt, 20)
    checkpoint.save(folder / f"{RANK}.pt", opt.sharded_state_dict())
    dist.barrier()
    wrong = checkpoint.load(folder / f"{(RANK + 1) % SIZE}.pt")
    with pytest.warns(UserWarning, match="not this rank's"):
        opt.load_state_dict(wrong)
    found = steps(model, opt, 20, first=20)
    assert torch.isfinite(found).all()


def test_averaged_weights():
    model = sharded()
    opt = optimizer(model, {"averages": (0.9,)})
    before = steps(model, opt, 20)
    x, y = data(0)

    def loss(net=model):
        with torch.no_grad():
            return (net(x) - y).square().mean()

    outside = loss()  # after which the outermost module holds on to what it has gathered
    with opt.averaged_weights(which=0.9, model=model):
        averaged, inside = whole(model), loss()
    assert not torch.equal(averaged, before) and torch.equal(whole(model), before)
    assert torch.equal(loss(), outside) and not torch.equal(inside, outside)
    other = network()
    alone = AndersonOptimizer(
        sgd(other), anderson=AndersonConfig(averages=(0.9,)), independent=True
    )
    train(other, alone, 20, part=slice(None))
    with alone.averaged_weights(which=0.9):
        expected = torch.cat([p.detach().reshape(-1) for p in other.parameters()])
        torch.testing.assert_close(inside, loss(other), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(averaged, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(UnsupportedError, match="Must be the model"):
        opt.averaged_weights(which=0.9).__enter__()


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"layout": "columns"}, r"layout='columns' with parameters that fully_shard"),
        ({"shard_group": "node"}, r"shard_group='node' with parameters that fully_shard"),
        ({"safeguard": "residual"}, r"safeguard='residual' with parameters that fully_shard"),
    ],
)
def test_settings_that_are_refused(config, match):
    with pytest.raises(ConfigError, match=match):
        optimizer(sharded(), config)


def test_what_is_refused():
    linear = torch.nn.Linear(8, 8).double()
    mesh = dist.init_device_mesh("cpu", (SIZE,))
    linear.weight = torch.nn.Parameter(distribute_tensor(linear.weight, mesh, [Replicate()]))
    linear.bias = None
    with pytest.raises(UnsupportedError, match="tensor parallelism is not supported"):
        optimizer(linear, {})
    with pytest.raises(UnsupportedError, match="sharded_state_dict"):
        optimizer(sharded(), {}).consolidate_state_dict()
    alone = [dist.new_group([rank]) for rank in range(SIZE)][RANK]
    with pytest.raises(ConfigError, match=f"sharded over {SIZE}: process_group=mesh"):
        optimizer(sharded(), {}, process_group=alone)


def test_parameters_that_are_sharded_later():
    model = network()
    opt = optimizer(model, {})
    sharded(model)
    opt.param_groups[0]["params"] = [*model.parameters()]
    with pytest.raises(UnsupportedError, match="Must be made after fully_shard"):
        steps(model, opt, 1)


def test_histories_of_ddp_and_of_fsdp():
    """Each is of no use to the other."""
    model, replicated = sharded(), wrapped()
    opt, other = (optimizer(m, CASES["residual"]) for m in (model, replicated))
    steps(model, opt, 8)
    train(replicated, other, 8)
    states = [copy.deepcopy(o.sharded_state_dict()) for o in (opt, other)]
    for target, state in ((other, states[0]), (opt, states[1])):
        with pytest.warns(UserWarning, match="leaves out the history"):
            target.load_state_dict(state)


def test_a_copy_of_the_state_loads_into_plain_fsdp():
    model = sharded()
    opt = optimizer(model, CASES["residual"])
    steps(model, opt, 6)
    plain = sharded()
    base = sgd(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert [*base.state_dict()["state"]] == [*opt.state_dict()["state"]]

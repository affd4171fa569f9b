"""FSDP2 with parameters that it leaves alone: ranks have them whole, and average the gradients."""

import copy

import pytest
import torch
import torch.distributed as dist
from test_fsdp import CASES, OPTIMIZERS, STEPS, everywhere, loaded, optimizer, save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training import assert_same_on_all, data, mine, network, sgd, train

from aadl_hvd import (
    AndersonConfig,
    AndersonOptimizer,
    ReplicaMismatchError,
    UnsupportedError,
    kernels,
)

RANK, SIZE = dist.get_rank(), dist.get_world_size()


def mixed(mesh=None):
    """The bias of the first layer and all of the last one stay whole, in two ways."""
    model = network()
    options = {} if mesh is None else {"mesh": mesh}
    fully_shard(model[0], ignored_params={model[0].bias}, **options)
    return model


def whole(model):
    found = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in found])


def replicated(model):
    return [p for p in model.parameters() if not isinstance(p, DTensor)]


def steps(model, opt, count, first=0, group=None, average=True):
    size = dist.get_world_size(group)
    for k in range(first, first + count):
        x, y = data(k, mine(RANK, size))
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        for p in replicated(model) if average else ():
            dist.all_reduce(p.grad, group=group)
            p.grad /= size
        opt.step()
    return whole(model)


def alone(method, count, make=sgd, **settings):
    model, config = network(), AndersonConfig(**CASES[method] | settings)
    opt = AndersonOptimizer(make(model), anderson=config, independent=True)
    return opt, train(model, opt, count, part=slice(None))[-1]


@pytest.mark.parametrize("name", ["SGD, decay", "AdamW"])
@pytest.mark.parametrize("method", CASES)
def test_as_one_process_with_all_data(method, name):
    model, make = mixed(), OPTIMIZERS[name]
    assert len(replicated(model)) == 3
    opt = optimizer(model, CASES[method], make)
    found = steps(model, opt, STEPS[method])
    other, expected = alone(method, STEPS[method], make)
    assert opt.anderson.stats.accelerated == other.anderson.stats.accelerated > 0
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    for p in replicated(model):
        assert_same_on_all(p.detach())
    assert sum(p.numel() for p in opt.anderson_engine.problem.tensors) < found.numel()


@pytest.mark.skipif(SIZE != 4, reason="two copies of two shards need 4 ranks")
@pytest.mark.parametrize("method", CASES)
def test_copies_of_shards_beside_whole_parameters(method, tmp_path):
    """HSDP, then 2 ranks go on with the history."""
    folder, half = everywhere(tmp_path), STEPS[method] // 2 + 3
    two = DeviceMesh("cpu", [0, 1])
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = mixed(mesh)
    opt = optimizer(model, CASES[method])
    steps(model, opt, half)
    for p in replicated(model):
        assert_same_on_all(p.detach())
    save(folder, model, opt)
    if RANK < 2:
        group = two.get_group()
        model = mixed(two)
        opt = loaded(folder, model, CASES[method], group)
        found = steps(model, opt, half, half, group)
        other, expected = alone(method, 2 * half)
        assert opt.anderson.stats.accelerated == other.anderson.stats.accelerated > 3
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


class Scale(torch.nn.Module):
    """One number, which fully_shard cannot shard."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return x * self.factor


@pytest.mark.parametrize("method", CASES)
def test_back_to_a_history_with_a_parameter_of_one_number(method, tmp_path):
    """In an optimizer that has gone on since: it takes the history in at once."""
    folder, half = everywhere(tmp_path), STEPS[method] // 2 + 3
    model = mixed().append(Scale())
    opt = optimizer(model, CASES[method])
    steps(model, opt, half)
    weights = [p.detach().clone() for p in model.parameters()]
    base = copy.deepcopy({k: v for k, v in opt.state_dict().items() if k != "anderson"})
    opt.save_history(folder / "history")
    found = steps(model, opt, half, half)
    accelerated = opt.anderson.stats.accelerated
    with torch.no_grad():
        for p, old in zip(model.parameters(), weights, strict=True):
            p.copy_(old)
    opt.load_state_dict(base)
    opt.load_history(folder / "history")
    again = steps(model, opt, half, half)
    assert opt.anderson.stats.accelerated == accelerated > 2
    assert torch.equal(again, found)


def test_a_parameter_of_one_number_does_not_turn_kernels_off(monkeypatch):
    """It has no stride on the first rank, and is a vector without numbers on the others."""
    monkeypatch.setattr(kernels, "usable", lambda *_: True)
    opt = optimizer(mixed().append(Scale()), CASES["residual"])
    replicas = opt.anderson._replicas
    assert replicas.agree(opt.anderson_engine.problem, 0)
    assert replicas.use_kernels


@pytest.mark.parametrize("method", CASES)
def test_a_whole_layer_is_frozen(method, tmp_path):
    """The first rank alone has fewer rows then: all begin anew, and stay at one moment."""
    folder = everywhere(tmp_path)
    model = mixed()
    opt = optimizer(model, CASES[method])
    steps(model, opt, STEPS[method] // 2)
    model[-1].weight.requires_grad_(False)
    for k in range(3):
        for _ in range(4):
            opt.zero_grad()
            (model(torch.ones(2, 6, dtype=torch.float64)) ** 2).mean().backward()
            opt.step()
        opt.save_history(folder / f"{k}")
    resets = opt.anderson.stats.resets
    assert resets["changed"] == 1 and resets["desynchronized"] == 0


def test_averaged_weights():
    model, averages = mixed(), (0.9,)
    opt = optimizer(model, CASES["residual"] | {"averages": averages})
    before = steps(model, opt, 20)
    other, _ = alone("residual", 20, averages=averages)
    with opt.averaged_weights(which=0.9, model=model), other.averaged_weights(which=0.9):
        ps = other.param_groups[0]["params"]
        expected = torch.cat([p.detach().reshape(-1) for p in ps])
        torch.testing.assert_close(whole(model), expected, rtol=1e-9, atol=1e-9)
        for p in replicated(model):
            assert_same_on_all(p.detach())
    assert torch.equal(whole(model), before)


def test_gradients_that_nobody_averages():
    model = mixed()
    opt = optimizer(model, CASES["residual"])
    with pytest.raises(ReplicaMismatchError, match="that fully_shard has not sharded"):
        steps(model, opt, 1, average=False)


def test_a_whole_parameter_that_one_rank_changes():
    model = mixed()
    opt = optimizer(model, CASES["residual"])
    steps(model, opt, 8)
    if RANK == SIZE - 1:
        replicated(model)[-1].data.add_(1e-6)
    with pytest.raises(ReplicaMismatchError, match="weights that fully_shard has not sharded"):
        steps(model, opt, 4)


def test_nothing_sharded_is_trained_any_more():
    model = mixed()
    opt = optimizer(model, CASES["residual"])
    steps(model, opt, 2)
    model[0].weight.requires_grad_(False)
    with pytest.raises(UnsupportedError, match="keep a sharded parameter"):
        opt.step()

"""Two processes of torch.distributed on Gloo: what parts replicas without a word elsewhere.

All in one launch. Each function of `CHECKS` runs in both processes.
"""

import datetime
import os

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from aadl_hvd import (
    AndersonConfig,
    AndersonOptimizer,
    DistributedAndersonOptimizer,
    NeumannOptimizer,
    UnsupportedError,
)

STEPS = 12


def network():
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    return torch.nn.Sequential(*layers)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model, opt, observe=False):
    """On this process's own data; the weights it ends with."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(32, 6, generator=generator)
    y = torch.randint(0, 3, (32,), generator=generator)
    for _ in range(STEPS):
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        if observe:
            opt.observe(loss)
        opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def replicas_equal(weights):
    both = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(both, weights)
    return torch.equal(*both)


def refused(match):
    return pytest.raises(UnsupportedError, match=match)


def check_replicas():
    model = DistributedDataParallel(network())
    instead = r"DistributedAndersonOptimizer.*DistributedDataParallel.*independent=True"
    with refused(rf"one of 2 processes of torch\.distributed.*{instead}"):
        AndersonOptimizer(sgd(model))
    plain = DistributedDataParallel(network())
    expected = train(plain, sgd(plain))
    disabled = AndersonOptimizer(sgd(model), anderson=AndersonConfig(enabled=False))
    weights = train(model, disabled, observe=True)
    assert torch.equal(weights, expected) and replicas_equal(weights)


def check_models_of_their_own():
    """Nobody waits for anybody, and each goes its own way."""
    model = network()
    opt = AndersonOptimizer(sgd(model), anderson=AndersonConfig(noise_gate=None), independent=True)
    weights = train(model, opt, observe=True)
    assert opt.anderson.stats.accelerated > 0
    assert not replicas_equal(weights)


def check_neumann():
    """Its steps are functions of weights and gradients, which are the same on all."""
    model = DistributedDataParallel(network())
    settings = {"lr": 0.1, "steps_per_epoch": 1, "warmup_epochs": 2}
    weights = train(model, NeumannOptimizer(model.parameters(), **settings))
    assert replicas_equal(weights)


def check_sharded_parameters():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with refused("DTensor.*whole parameters"):
        AndersonOptimizer(sgd(model), independent=True)
    with refused("DTensor.*whole parameters"):
        NeumannOptimizer(model.parameters(), lr=0.1, steps_per_epoch=1)


def check_torchrun_in_place_of_horovodrun():
    """Horovod takes each process for a job of its own."""
    import horovod.torch as hvd

    hvd.init()
    assert hvd.size() == 1
    model = DistributedDataParallel(network())
    with refused("torchrun"):
        DistributedAndersonOptimizer(sgd(model), model.named_parameters())


CHECKS = (
    check_replicas,
    check_models_of_their_own,
    check_neumann,
    check_sharded_parameters,
    check_torchrun_in_place_of_horovodrun,
)


def run(rank, folder):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    early = [AndersonOptimizer(sgd(network())) for _ in range(2)]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    with refused(r"torch\.distributed"):
        early[0].step()
    with refused(r"torch\.distributed"):
        early[1].observe(1.0)
    for check in CHECKS:
        check()
        dist.barrier()
    dist.destroy_process_group()


@pytest.mark.ranks
@pytest.mark.timeout(180)
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(run, (str(tmp_path),), nprocs=2)

"""Without acceleration the weights are those of plain DDP, bit for bit."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from training import assert_same_on_all, data, mine, network, sgd, train, weights, wrapped

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer

STEPS = 8
OFF = {
    "disabled": AndersonConfig(enabled=False),
    "warming up": AndersonConfig(warmup_steps=100),
    "within a block": AndersonConfig(method="subspace"),
}
OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "Nesterov": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.01),
    "AdamW, fused": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.5),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1),
}
MODELS = {
    "plain": {},
    "views of buckets": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "small buckets": {"bucket_cap_mb": 1e-4},
}


class Unused(torch.nn.Module):
    """Of its two layers only one has a gradient, in every second step the other one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 3) for _ in range(2)).double()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.layers[self.calls % 2](x)


def pair(make, model, config, **options):
    """Plain DDP, and DDP with our optimizer: two models and two optimizers."""
    plain, ours = wrapped(model, **options), wrapped(model, **options)
    opt = DistributedAndersonOptimizer(make(ours.parameters()), anderson=config)
    return plain, make(plain.parameters()), ours, opt


@pytest.mark.parametrize("config", OFF)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, config):
    plain, base, ours, opt = pair(OPTIMIZERS[name], network(), OFF[config])
    expected = train(plain, base, STEPS)
    found = train(ours, opt, STEPS, observe=True)
    assert torch.equal(found, expected)
    assert isinstance(opt, type(base)) and isinstance(opt, DistributedAndersonOptimizer)
    state, of_base = opt.state_dict(), base.state_dict()
    assert str(state["state"]) == str(of_base["state"])
    assert opt.anderson.stats.accelerated == 0


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model = Unused() if name == "unused parameters" else network()
    plain, base, ours, opt = pair(OPTIMIZERS["SGD"], model, OFF["warming up"], **MODELS[name])
    assert torch.equal(train(ours, opt, STEPS), train(plain, base, STEPS))


@pytest.mark.parametrize("loop", [{"passes": 3}, {"clip": 0.1}, {"passes": 2, "clip": 0.1}])
def test_loops(loop):
    plain, base, ours, opt = pair(OPTIMIZERS["Nesterov"], network(), OFF["within a block"])
    assert torch.equal(train(ours, opt, STEPS, **loop), train(plain, base, STEPS, **loop))


def test_a_communication_hook_is_kept():
    plain, base, ours, opt = pair(OPTIMIZERS["SGD"], network(), OFF["warming up"])
    for model in (plain, ours):
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    expected = train(plain, base, STEPS)
    assert torch.equal(train(ours, opt, STEPS), expected)
    uncompressed = wrapped()
    assert not torch.equal(train(uncompressed, sgd(uncompressed, momentum=0.0), STEPS), expected)


def test_gradscaler_with_a_step_that_it_leaves_out():
    results = []
    for ours in (False, True):
        model = wrapped(network(torch.float32))
        opt = sgd(model)
        opt = DistributedAndersonOptimizer(opt, anderson=OFF["warming up"]) if ours else opt
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for k in range(STEPS):
            x, y = data(k, mine(), torch.float32)
            opt.zero_grad()
            loss = (model(x) - y).square().mean()
            # On one rank alone: the mean of the gradients carries it to all.
            bad = k == 3 and dist.get_rank() == dist.get_world_size() - 1
            scaler.scale(loss * (torch.inf if bad else 1.0)).backward()
            scaler.step(opt)
            scaler.update()
        assert scaler.get_scale() == 2.0**7
        results.append(weights(model))
    assert torch.equal(*results)


def test_a_closure():
    results = []
    for ours in (False, True):
        model = wrapped()
        opt = sgd(model)
        opt = DistributedAndersonOptimizer(opt, anderson=OFF["warming up"]) if ours else opt

        def closure(model=model, opt=opt):
            opt.zero_grad()
            x, y = data(0, mine())
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        losses = [opt.step(closure).item() for _ in range(STEPS)]
        results.append(torch.cat([weights(model), torch.tensor(losses, dtype=torch.float64)]))
    assert torch.equal(*results)


def test_schedulers_made_before_go_on_working():
    model = wrapped()
    base = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(base, step_size=1, gamma=0.5)
    opt = DistributedAndersonOptimizer(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, 1)
        scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.05
    assert_same_on_all(weights(model))

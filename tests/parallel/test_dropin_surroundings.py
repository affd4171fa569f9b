"""What stands around an optimizer, acceleration firing: schedulers, broadcasts, hooks, models."""

import copy
import dataclasses
import warnings

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from accelerated import (
    ALWAYS,
    DOUBLE,
    OPTIMIZERS,
    SETTINGS,
    STEPS,
    built,
    double_network,
    plain,
    wrapped,
)
from problems import TEXTBOOK
from training import (
    HandMade,
    assert_replicas_equal,
    assert_same_bits,
    compare_with_hand_made,
    flat,
    full_batch,
    loss_of,
    network,
    train,
    unless_brief,
)

from aadl_hvd import AndersonConfig, AndersonOptimizer, DistributedAndersonOptimizer

SCHEDULERS = {
    "StepLR": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 3, 0.7),
    "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 50),
    "plateau": lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=1),
    "OneCycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=60),
    "warm-up": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda k: min(1.0, k / 4)),
    "sequential": lambda opt: torch.optim.lr_scheduler.SequentialLR(
        opt,
        [
            torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=4),
            torch.optim.lr_scheduler.ExponentialLR(opt, 0.95),
        ],
        milestones=[4],
    ),
}


@pytest.mark.parametrize("scheduler", unless_brief(*SCHEDULERS))
@pytest.mark.parametrize("before", [True, False])
def test_schedulers(scheduler, before):
    """Made before or after the wrapping: the rates of plain torch, no warning, no reset."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates = []
        for accelerated in (False, True):
            model = network()
            opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            if accelerated and not before:
                opt = wrapped(model, opt)
            schedule = SCHEDULERS[scheduler](opt)
            if accelerated and before:
                opt = wrapped(model, opt)
            found = []
            for k, batch in enumerate(full_batch(STEPS)):
                train(model, opt, [batch])
                if scheduler == "plateau":
                    schedule.step(float(k))
                else:
                    schedule.step()
                found.append([(g["lr"], g["momentum"]) for g in opt.param_groups])
            rates.append(found)
    assert rates[0] == rates[1]
    assert len({group[0] for group in map(tuple, rates[0])}) > 2
    assert opt.anderson.stats.accelerated >= 2
    assert not any(opt.anderson.stats.resets.values())
    assert_replicas_equal(model)


@pytest.mark.parametrize("name", unless_brief("AdamW fused", "SGD", "Nesterov"))
def test_broadcast_of_parameters_and_state(name):
    """A fresh optimizer: Horovod's step on zero gradients is not one of ours."""
    model = double_network()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(hvd.rank())
    opt = wrapped(model, built(name, model.parameters()), safeguard="none", relaxation=0.3)
    if name == "Nesterov":  # not with weight decay: Horovod's zero-gradient step moves it
        opt.param_groups[0]["lr"] *= 1 + hvd.rank()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(opt, root_rank=0)
    stats = opt.anderson.stats
    assert (stats.steps, stats.stored, opt.anderson.columns) == (0, 0, 0)
    assert opt.param_groups[0]["lr"] == OPTIMIZERS[name][1]["lr"]
    # A copy that took the same zero-gradient step, by hand.
    second = network(DOUBLE)
    expected = HandMade(built(name, second.parameters()), opt.anderson.config)
    for p in second.parameters():
        p.grad = torch.zeros_like(p)
    if name != "SGD":
        type(expected.inner).__mro__[1].step(expected.inner)
        for model_, opt_ in ((model, opt), (second, expected)):
            plain(model_, opt_)
        torch.testing.assert_close(flat(model), flat(second), rtol=1e-8, atol=1e-8)
    else:
        plain(model, opt)
    assert stats.accelerated >= 2
    assert stats.stored == STEPS
    assert_replicas_equal(model)


def test_optimizer_that_has_state_keeps_it():
    """Horovod drops it: Adam would begin anew, at another rate."""

    def optimizer(model):
        opt = torch.optim.Adam(model.parameters(), lr=0.02)
        train(model, opt, same_on_all_ranks(4))
        return opt

    opt, model = compare_with_hand_made(double_network, optimizer, plain, ALWAYS, accelerated=2)
    assert int(opt.state[model[0].weight]["step"]) == 4 + STEPS
    assert_replicas_equal(model)


def same_on_all_ranks(steps):
    generator = torch.Generator().manual_seed(9)
    return [
        (
            torch.randn(5, 3, generator=generator).to(DOUBLE),
            torch.randn(5, 2, generator=generator).to(DOUBLE),
        )
        for _ in range(steps)
    ]


def test_defaults_are_kept_for_groups_that_join_later():
    model = network()
    opt = torch.optim.SGD(model[0].parameters(), lr=0.3, momentum=0.7, weight_decay=0.1)
    opt = DistributedAndersonOptimizer(opt, model[0].named_parameters())
    opt.add_param_group({"params": list(model[2].parameters())})
    found = {k: opt.param_groups[1][k] for k in ("lr", "momentum", "weight_decay")}
    assert found == {"lr": 0.3, "momentum": 0.7, "weight_decay": 0.1}


@pytest.mark.parametrize("adasum", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_step_hooks(when, adasum):
    """The outermost "pre" comes before anything moves, "post" after the accelerated update."""
    if adasum and (hvd.size() != 2 or not hvd.mpi_enabled()):
        pytest.skip("Adasum: MPI, 2^k ranks")
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    register = [
        lambda opt: opt.register_step_pre_hook(lambda *_: seen.append(("pre", flat(model)))),
        lambda opt: opt.register_step_post_hook(lambda *_: seen.append(("post", flat(model)))),
    ]
    if when == "before":
        for hook in register:
            hook(opt)
    opt = wrapped(
        model,
        opt,
        {"op": hvd.Adasum} if adasum else {},
        residual="step" if adasum else "gradient",
        safeguard="none",
    )
    if when == "after":
        for hook in register:
            hook(opt)
    everywhere = []
    torch_hooks = torch.optim.Optimizer.__module__
    module = __import__(torch_hooks, fromlist=["x"])
    handles = [
        module.register_optimizer_step_pre_hook(lambda *_: everywhere.append("pre")),
        module.register_optimizer_step_post_hook(lambda *_: everywhere.append("post")),
    ]
    try:
        for batch in full_batch(6):
            opt.zero_grad()
            loss_of(model, *batch).backward()
            # Adasum steps in the backward pass, once for each of the 4 parameters.
            assert [name for name, _ in seen] == ["pre", "post"] * 4 * adasum
            seen.clear()
            before = flat(model).clone()
            opt.step()
            names = ["pre", "post"] if adasum else ["pre", "pre", "post", "post"]
            assert [name for name, _ in seen] == names
            assert adasum or torch.equal(seen[0][1], before)
            assert torch.equal(seen[-1][1], flat(model))
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    assert opt.anderson.stats.accelerated == 2
    assert everywhere == (["pre", "post"] * 5 if adasum else ["pre", "pre", "post", "post"]) * 6


class Momentumless(torch.optim.Optimizer):
    """A user's own: no learning rate in its groups, arguments without defaults."""

    def __init__(self, params, rate, *, clip):
        super().__init__(params, {"rate": rate})
        self.clip = clip
        self.zeroed = 0

    def zero_grad(self, set_to_none=True):
        self.zeroed += 1
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.clamp_(-self.clip, self.clip).mul_(group["rate"])
                    p.sub_(p.grad)
                    p.grad.fill_(float("nan"))
        return loss


class WithExtras(torch.optim.SGD):
    """A subclass whose constructor has defaults of its own."""

    def __init__(self, params, lr=0.5, trust=1.0):
        super().__init__(params, lr=lr)
        self.trust = trust

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] *= self.trust
        return super().step(closure)


@pytest.mark.parametrize("kind", ["own", "subclass"])
@pytest.mark.parametrize("residual", ["gradient", "step"])
def test_optimizers_of_the_user_s_own(kind, residual):
    def optimizer(model):
        if kind == "own":
            return Momentumless(model.parameters(), 0.1, clip=0.4)
        return WithExtras(model.parameters(), lr=0.1, trust=0.99)

    opt, model = compare_with_hand_made(
        double_network,
        optimizer,
        plain,
        dataclasses.replace(ALWAYS, residual=residual),
        accelerated=2,
    )
    assert isinstance(opt, Momentumless if kind == "own" else WithExtras)
    if kind == "own":
        assert (opt.clip, opt.zeroed) == (0.4, STEPS)
    else:
        assert opt.trust == 0.99
        assert opt.param_groups[0]["lr"] == pytest.approx(0.1 * 0.99**STEPS)
    assert_replicas_equal(model)


def test_tied_weights_several_groups_frozen_and_compiled():
    def model():
        torch.manual_seed(2)
        net = torch.nn.Sequential(
            torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)
        ).to(DOUBLE)
        net[2].weight = net[0].weight
        net[3].bias.requires_grad_(False)
        return net

    def optimizer(model):
        return torch.optim.AdamW(
            [
                {"params": [model[0].weight], "lr": 0.03, "weight_decay": 0.1},
                {"params": [model[0].bias, model[2].bias, model[3].bias]},
                {"params": [model[3].weight], "lr": torch.tensor(0.01)},
            ],
            lr=0.02,
        )

    def run(model, opt):
        plain(torch.compile(model, backend="eager"), opt)

    opt, net = compare_with_hand_made(model, optimizer, run, ALWAYS, accelerated=2)
    assert torch.equal(net[3].bias, model()[3].bias)
    assert opt.anderson._history.sharding.n == 9 + 3 + 3 + 6
    assert_replicas_equal(net)


@pytest.mark.parametrize("sparse_as_dense", [False, True])
def test_sparse_embeddings(sparse_as_dense):
    def model():
        torch.manual_seed(3)
        net = torch.nn.Sequential(torch.nn.Embedding(7, 3, sparse=True), torch.nn.Linear(3, 1))
        return net.to(DOUBLE)

    def run(model, opt):
        index = torch.tensor([hvd.rank(), hvd.rank() + 3, 2, 2])
        for _ in range(STEPS):
            opt.zero_grad()
            (model(index) - 1.0).square().mean().backward()
            opt.step()

    _, net = compare_with_hand_made(
        model,
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        run,
        AndersonConfig(**SETTINGS),
        arguments=lambda model: {"sparse_as_dense": sparse_as_dense},
    )
    assert_replicas_equal(net)


def test_half_precision_parameters():
    """float16 and float32 together; the history is in float32."""
    model = network()
    model[0].half()

    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return self.net[2](self.net[1](self.net[0](x.half())).float())

    net = Mixed()
    opt = wrapped(net, torch.optim.SGD(net.parameters(), lr=0.1))
    losses = train(net, opt, full_batch(12))
    assert opt.anderson.stats.accelerated >= 1
    total = hvd.allreduce(torch.tensor([losses[0], losses[-1]]), name="losses")
    assert total[1] < 0.95 * total[0]
    assert model[0].weight.dtype == torch.float16
    assert_replicas_equal(net)


def test_two_optimizers_in_turns():
    """As in a GAN: the generator's backward pass goes through the discriminator."""
    weights = []
    for distributed in (True, False):
        torch.manual_seed(0)
        generator, critic = models = [torch.nn.Linear(2, 2).to(DOUBLE) for _ in range(2)]
        optimizers = []
        for number, model in enumerate(models):
            inner = torch.optim.SGD(model.parameters(), lr=0.05)
            names = [(f"{number}.{name}", p) for name, p in model.named_parameters()]
            optimizers.append(
                DistributedAndersonOptimizer(inner, names, anderson=ALWAYS)
                if distributed
                else HandMade(inner, ALWAYS)
            )
        generator_opt, critic_opt = optimizers
        noise = torch.Generator().manual_seed(hvd.rank())
        for _ in range(STEPS):
            z, real = torch.randn(2, 8, 2, generator=noise).to(DOUBLE)
            critic_opt.zero_grad()
            score = critic(generator(z).detach()).square().mean()
            (score + (critic(real) - 1.0).square().mean()).backward()
            critic_opt.step()
            generator_opt.zero_grad()
            critic.requires_grad_(False)
            (critic(generator(z)) - 1.0).square().mean().backward()
            critic.requires_grad_(True)
            generator_opt.step()
        for opt in optimizers:
            assert opt.anderson.stats.accelerated == STEPS // 3
            assert not any(opt.anderson.stats.resets.values())
        weights.append(torch.cat([flat(model) for model in models]))
        assert_replicas_equal(*models)
    torch.testing.assert_close(*weights, rtol=1e-8, atol=1e-8)


def test_subset_of_ranks(all_but_rank_0):
    """Ranks of the set share gradients and history; rank 0 trains by itself, at its own pace."""
    opt, model = compare_with_hand_made(
        double_network,
        lambda model: built("Nesterov", model.parameters()),
        lambda model, opt: plain(model, opt, STEPS + 4 * (hvd.rank() == 0)),
        ALWAYS,
        arguments=lambda model: {"process_set": all_but_rank_0},
        accelerated=2,
    )
    assert_replicas_equal(model, ranks=range(1, hvd.size()))
    others = hvd.allgather_object(flat(model))
    assert not torch.equal(others[0], others[-1])
    # And then all of them together: nothing of the set's may stand in the way.
    model = double_network()
    opt = wrapped(model, built("SGD", model.parameters()), safeguard="none", relaxation=0.3)
    plain(model, opt)
    assert opt.anderson.stats.accelerated >= 2
    assert_replicas_equal(model)


@pytest.mark.skipif(hvd.size() != 2 or not hvd.mpi_enabled(), reason="Adasum: MPI, 2^k ranks")
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_adasum(layout, passes):
    """The accelerated point is the textbook's, of steps that Horovod's Adasum takes."""
    settings = {"lr": 0.05, "momentum": 0.5}
    model, expected = double_network(), double_network()
    base = hvd.DistributedOptimizer(
        torch.optim.SGD(expected.parameters(), **settings),
        expected.named_parameters(),
        op=hvd.Adasum,
        backward_passes_per_step=passes,
    )
    pairs = []
    data = full_batch(passes, DOUBLE)
    for _ in range(5):
        w = flat(expected).clone()
        train(expected, base, data, passes)
        pairs.append((w.numpy(), (flat(expected) - w).numpy()))
    opt = DistributedAndersonOptimizer(
        torch.optim.SGD(model.parameters(), **settings),
        model.named_parameters(),
        op=hvd.Adasum,
        backward_passes_per_step=passes,
        anderson=AndersonConfig(
            **TEXTBOOK,
            frequency=5,
            history_depth=4,
            residual="step",
            safeguard="none",
            layout=layout,
        ),
    )
    train(model, opt, data * 5, passes)
    w, r = (np.array(values).T for values in zip(*pairs, strict=True))
    W, R = np.diff(w), np.diff(r)
    gamma = np.linalg.lstsq(R, r[:, -1], rcond=None)[0]
    point = w[:, -1] - W @ gamma + r[:, -1] - R @ gamma
    np.testing.assert_allclose(flat(model).numpy(), point, rtol=1e-6, atol=1e-8)
    train(model, opt, data * 5, passes)
    assert opt.anderson.stats.accelerated == 2
    assert_replicas_equal(model)


def test_adasum_s_default_is_the_residual_of_the_step():
    if hvd.size() != 2 or not hvd.mpi_enabled():
        pytest.skip("Adasum: MPI, 2^k ranks")
    model = network()
    with pytest.warns(UserWarning, match="residual='step'"):
        opt = DistributedAndersonOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), op=hvd.Adasum
        )
    assert opt.anderson.config.residual == "step"
    losses = train(model, opt, full_batch(30))
    assert losses[-1] < losses[0]
    assert opt.anderson.stats.accelerated > 0
    assert_replicas_equal(model)


def test_state_dict_and_counters():
    """Into plain torch, and back; on every rank; the counters go on."""
    model = network()
    opt = wrapped(model, torch.optim.Adam(model.parameters(), lr=0.02))
    train(model, opt, full_batch(STEPS))
    saved = copy.deepcopy(opt.state_dict())
    counters = opt.anderson.stats.counters()
    assert counters["accelerated"] > 0
    torch_opt = torch.optim.Adam(model.parameters(), lr=1.0)
    torch_opt.load_state_dict(saved)
    assert torch_opt.param_groups[0]["lr"] == 0.02
    assert_same_bits(torch_opt.state_dict()["state"], saved["state"])

    second = network()
    second.load_state_dict(model.state_dict())
    opt = wrapped(second, torch.optim.Adam(second.parameters(), lr=1.0), safeguard="none")
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.02
    assert opt.anderson.stats.counters() == counters
    assert_same_bits(opt.state_dict()["state"], saved["state"])
    train(second, opt, full_batch(STEPS))
    assert opt.anderson.stats.steps == 2 * STEPS
    assert opt.anderson.stats.accelerated > counters["accelerated"]
    assert_replicas_equal(second)


def test_scheduler_goes_on_after_load_state_dict():
    """load_state_dict replaces the groups; a scheduler made before must see the new ones."""
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(inner, 1, 0.5)
    opt = wrapped(model, inner)
    train(model, opt, full_batch(1))
    opt.load_state_dict(opt.state_dict())
    schedule.step()
    assert opt.param_groups[0]["lr"] == 0.05


def test_single_process_optimizer_under_horovod():
    """Different parameters on every rank, as in model parallelism: nobody waits for anybody."""
    torch.manual_seed(hvd.rank())
    model = torch.nn.Linear(2 + hvd.rank(), 1)
    opt = AndersonOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05),
        anderson=AndersonConfig(**SETTINGS),
        independent=True,
    )
    for _ in range(6 + hvd.rank()):
        opt.zero_grad()
        (model(torch.ones(3, 2 + hvd.rank())) - 1.0).square().mean().backward()
        opt.step()
    assert opt.anderson.stats.steps == 6 + hvd.rank()

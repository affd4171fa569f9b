"""With acceleration never firing, weights and state are bitwise those of Horovod's optimizer.

Horovod's arguments are in test_dropin_arguments.py; here are optimizers, models and loops.
"""

import warnings

import horovod.torch as hvd
import pytest
import torch
from training import (
    NEVER,
    assert_replicas_equal,
    assert_same_bits,
    batches,
    compare_with_horovod,
    flat,
    loss_of,
    network,
    round_gradients,
    train,
    unless_brief,
)

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "Nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Nesterov foreach": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True},
    ),
    "SGD fused": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "SGD maximize": (torch.optim.SGD, {"lr": 0.01, "maximize": True, "weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "Adam amsgrad foreach": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "foreach": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "AdamW foreach": (torch.optim.AdamW, {"lr": 0.01, "foreach": True}),
    "AdamW fused": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "Adagrad fused": (torch.optim.Adagrad, {"lr": 0.1, "fused": True}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 0.5}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.1, "t0": 2}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "SGD differentiable": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "differentiable": True}),
    "Adam differentiable": (torch.optim.Adam, {"lr": 0.01, "differentiable": True}),
}
CONFIGS = {
    "step": AndersonConfig(frequency=10**9, residual="step"),
    "columns": AndersonConfig(frequency=10**9, layout="columns"),
    "not yet": AndersonConfig(frequency=1, warmup_steps=10**9),
    "off": AndersonConfig(enabled=False),
    "residual": AndersonConfig(frequency=10**9, safeguard="residual", store_every=2),
}
SOME = ("momentum", "Nesterov foreach", "Adam amsgrad foreach", "AdamW fused", "Adagrad")
STEPS = 3


def built(name, parameters):
    cls, settings = OPTIMIZERS[name]
    return cls(parameters, **settings)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name):
    opt = compare_with_horovod(
        network,
        lambda model: built(name, model.parameters()),
        lambda model, opt: train(model, opt, batches(STEPS)),
    )
    assert isinstance(opt, OPTIMIZERS[name][0])
    assert opt.anderson.stats.stored == STEPS


@pytest.mark.parametrize("config", unless_brief(*CONFIGS))
def test_every_way_not_to_accelerate(config):
    for name in unless_brief(*SOME):
        compare_with_horovod(
            network,
            lambda model, name=name: built(name, model.parameters()),
            lambda model, opt: train(model, opt, batches(STEPS)),
            config=CONFIGS[config],
        )


def positional(model, opt, wrap, more):
    """All of Horovod's arguments in its order, without their names."""
    arguments = (model.named_parameters(), hvd.Compression.fp16, 2, hvd.Average, 1.0, 0, 1, True)
    return wrap(opt, *arguments, hvd.global_process_set, **more)


def exact_network():
    """With three ranks Horovod alone differs from itself in the last bit without the rounding."""
    model = network()
    round_gradients(model)
    return model


def test_positional_arguments():
    found = []
    for wrap, more in (
        (hvd.DistributedOptimizer, {}),
        (DistributedAndersonOptimizer, {"anderson": NEVER}),
    ):
        model = exact_network()
        opt = positional(model, torch.optim.SGD(model.parameters(), lr=0.1), wrap, more)
        train(model, opt, batches(6), passes=2)
        found.append(flat(model))
        names = ("backward_passes_per_step", "op", "_groups", "sparse_as_dense", "process_set")
        found.append([getattr(opt, name) for name in (*names, "_compression")])
    assert torch.equal(found[0], found[2])
    assert found[1] == found[3]


def test_under_horovod_s_own_name(monkeypatch):
    """One line on top of a script, or of Horovod's own tests, in place of many changed ones."""
    model = network()
    monkeypatch.setattr(hvd, "DistributedOptimizer", DistributedAndersonOptimizer)
    opt = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters()
    )
    hvd.broadcast_optimizer_state(opt, root_rank=0)
    assert opt.anderson.stats.steps == 0
    train(model, opt, batches(STEPS))
    assert opt.anderson.stats.stored == STEPS
    assert_replicas_equal(model)


def test_without_named_parameters_and_with_defaults_alone():
    models = [exact_network(), exact_network()]
    train(
        models[0],
        hvd.DistributedOptimizer(torch.optim.SGD(models[0].parameters(), lr=0.1)),
        batches(1),
    )
    train(
        models[1],
        DistributedAndersonOptimizer(torch.optim.SGD(models[1].parameters(), lr=0.1)),
        batches(1),
    )
    assert torch.equal(*map(flat, models))


class Sparse(torch.nn.Module):
    """Embeddings with sparse gradients, of other rows on every rank, and a dense layer."""

    def __init__(self, dense=True):
        super().__init__()
        torch.manual_seed(3)
        self.table = torch.nn.Embedding(7, 3, sparse=True)
        if dense:
            self.head = torch.nn.Linear(3, 1)

    def forward(self, x):
        x = self.table(x)
        return self.head(x) if hasattr(self, "head") else x


def train_sparse(model, opt):
    for step in range(STEPS):
        opt.zero_grad()
        index = torch.tensor([hvd.rank(), (hvd.rank() + step) % 7, 2, 2])
        model(index).square().sum().backward()
        opt.step()


@pytest.mark.parametrize("sparse_as_dense", [False, True])
@pytest.mark.parametrize("kind", ["SGD", "momentum", "Adagrad", "SparseAdam"])
def test_sparse_embeddings(kind, sparse_as_dense):
    def optimizer(model):
        if kind == "SparseAdam":
            return torch.optim.SparseAdam(model.parameters(), lr=0.05)
        cls = torch.optim.Adagrad if kind == "Adagrad" else torch.optim.SGD
        return cls(model.parameters(), lr=0.1, **({"momentum": 0.9} if kind == "momentum" else {}))

    opt = compare_with_horovod(
        lambda: Sparse(dense=kind != "SparseAdam"),
        optimizer,
        train_sparse,
        arguments=lambda model: {"sparse_as_dense": sparse_as_dense},
    )
    assert opt.anderson.stats.stored == STEPS


def test_channels_last_images_and_batch_norm():
    def model():
        torch.manual_seed(5)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, padding=1),
            torch.nn.BatchNorm2d(4),
            torch.nn.ReLU(),
            torch.nn.Conv2d(4, 5, 3),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        )
        return net

    def run(model, opt):
        generator = torch.Generator().manual_seed(hvd.rank())
        for _ in range(3):
            opt.zero_grad()
            x = torch.randn(4, 3, 6, 6, generator=generator)
            model(x.to(memory_format=torch.channels_last)).square().mean().backward()
            opt.step()

    compare_with_horovod(
        model, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), run
    )


def clipped(model, opt):
    norms = []
    for x, y in batches(STEPS):
        opt.zero_grad()
        loss_of(model, x, y).backward()
        opt.synchronize()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05))
        with opt.skip_synchronize():
            opt.step()
    return norms


def scheduled(make):
    def run(model, opt):
        scheduler = make(opt)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for x, y in batches(STEPS):
                train(model, opt, [(x, y)])
                if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(1.0)
                else:
                    scheduler.step()
        return opt.param_groups[0]["lr"]

    return run


def scaled(model, opt):
    """AMP as in Horovod's documentation; the gradients overflow on rank 0 in the second step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step, (x, y) in enumerate(batches(STEPS)):
        opt.zero_grad()
        loss = loss_of(model, x, y) * (float("inf") if step == 1 and hvd.rank() == 0 else 1.0)
        scaler.scale(loss).backward()
        opt.synchronize()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        with opt.skip_synchronize():
            scaler.step(opt)
        scaler.update()
    return scaler.get_scale()


def partly_used(model, opt):
    """The last layer is used by rank 0 only, the first layer's weight is frozen on the way."""
    for step, (x, y) in enumerate(batches(STEPS)):
        opt.zero_grad()
        if step == 1:
            model[0].weight.requires_grad_(False)
        out = model(x) if hvd.rank() == 0 else model[:2](x)[:, :2]
        (out - y).square().mean().backward()
        opt.step()


def broadcast_first(model, opt):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(hvd.rank())
    opt.param_groups[0]["lr"] *= 1 + hvd.rank()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(opt, root_rank=0)
    if not opt.state:  # Horovod sends nothing of an optimizer without state
        opt.param_groups[0]["lr"] = 0.1
    train(model, opt, batches(STEPS))


def forced_synchronize(model, opt):
    for x, y in batches(STEPS):
        opt.zero_grad()
        loss_of(model, x, y).backward()
        opt.synchronize()
        with pytest.warns(UserWarning, match="skip_synchronize"):
            opt.step()


def changing_passes(model, opt):
    data = batches(6)
    train(model, opt, data[:2])
    opt.set_backward_passes_per_step(2)
    train(model, opt, data[2:], passes=2)


LOOPS = {
    "clipping": clipped,
    "StepLR": scheduled(lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)),
    "cosine": scheduled(lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5)),
    "plateau": scheduled(
        lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5)
    ),
    "OneCycle": scheduled(
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(
            opt, 0.1, total_steps=10, cycle_momentum=isinstance(opt, torch.optim.Adam)
        )
    ),
    "GradScaler": scaled,
    "partly used": partly_used,
    "broadcast": broadcast_first,
    "synchronize without skip": forced_synchronize,
    "set_backward_passes_per_step": changing_passes,
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", unless_brief("momentum", "SGD", "AdamW fused"))
def test_loops(loop, name):
    opt = compare_with_horovod(network, lambda model: built(name, model.parameters()), LOOPS[loop])
    stored = {"GradScaler": STEPS - 1, "set_backward_passes_per_step": 4}.get(loop, STEPS)
    assert opt.anderson.stats.stored == stored
    if loop == "partly used":
        assert opt.anderson.stats.resets["changed"] == 1


@pytest.mark.parametrize("name", ["momentum", "AdamW", "NAdam", "Adagrad", "SparseAdam"])
def test_broadcast_before_the_wrapping(name):
    """As in Horovod's first example: its step on gradients of zeros leaves no state behind."""

    def optimizer(model):
        if name == "SparseAdam":
            opt = torch.optim.SparseAdam(model.parameters(), lr=0.05)
        else:
            cls, settings = OPTIMIZERS[name]
            opt = cls(model.parameters(), **settings | {"weight_decay": 0.1})
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(opt, root_rank=0)
        assert opt.state
        return opt

    if name == "SparseAdam":
        compare_with_horovod(lambda: Sparse(dense=False), optimizer, train_sparse)
    else:
        compare_with_horovod(network, optimizer, lambda m, opt: train(m, opt, batches(STEPS)))


@pytest.mark.parametrize("name", ["momentum", "Adam"])
def test_checkpoint_loaded_by_rank_0_before_the_wrapping(name):
    """Its state goes to all ranks and stays; Horovod's own forgets it."""
    model = exact_network()
    opt = built(name, model.parameters())
    generator = torch.Generator().manual_seed(3)
    train(model, opt, [(torch.randn(5, 3, generator=generator), torch.ones(5, 2))])
    saved = opt.state_dict()
    model = exact_network()
    opt = built(name, model.parameters())
    if hvd.rank() == 0:
        opt.load_state_dict(saved)
    hvd.broadcast_optimizer_state(opt, root_rank=0)
    opt = DistributedAndersonOptimizer(opt, model.named_parameters(), anderson=NEVER)
    assert_same_bits(opt.state_dict()["state"], saved["state"])


def test_compiled_step():
    """Horovod's is traced, and Adam with it, which then rounds otherwise; ours stays as it is."""
    torch.compiler.reset()
    found = []
    for compiled in (False, True):
        model = exact_network()
        config = AndersonConfig(frequency=2, noise_gate=None, safeguard="none", relaxation=0.2)
        opt = DistributedAndersonOptimizer(built("Adam", model.parameters()), anderson=config)
        step = torch.compile(lambda opt=opt: opt.step(), backend="eager") if compiled else opt.step
        for x, y in batches(4):
            opt.zero_grad()
            loss_of(model, x, y).backward()
            step()
        assert opt.anderson.stats.accelerated == 2
        found.append(flat(model))
    assert torch.equal(*found)


def test_state_of_rank_0_sent_as_an_object():
    """As in the documentation of hvd.broadcast_object; counters and schedule are the same after."""
    model = exact_network()
    opt = DistributedAndersonOptimizer(built("Adam", model.parameters()), anderson=NEVER)
    train(model, opt, batches(STEPS))
    saved = opt.state_dict() if hvd.rank() == 0 else {}
    saved = hvd.broadcast_object(saved, root_rank=0)
    second = exact_network()
    second.load_state_dict(model.state_dict())
    config = AndersonConfig(frequency=2, noise_gate=None, safeguard="none", relaxation=0.2)
    opt = DistributedAndersonOptimizer(built("Adam", second.parameters()), anderson=config)
    opt.load_state_dict(saved)
    assert_same_bits(opt.state_dict()["state"], saved["state"])
    train(second, opt, batches(6))
    assert opt.anderson.stats.steps == STEPS + 6
    assert opt.anderson.stats.accelerated == 3
    assert_replicas_equal(second)


def test_tied_weights():
    def model():
        net = network()
        net[0].weight = torch.nn.Parameter(torch.randn(2, 3))
        net[0].bias = torch.nn.Parameter(torch.randn(2))
        net[2].weight = torch.nn.Parameter(torch.randn(2, 2))
        net.add_module("3", torch.nn.Tanh())
        net.add_module("4", torch.nn.Linear(2, 2))
        net[4].weight = net[2].weight
        return net

    opt = compare_with_horovod(
        model,
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
        lambda m, opt: train(m, opt, batches(STEPS)),
    )
    assert opt.anderson.stats.stored == STEPS


def test_several_groups_and_a_frozen_parameter():
    def optimizer(model):
        model[0].bias.requires_grad_(False)
        return torch.optim.AdamW(
            [
                {"params": [model[0].weight], "lr": 0.05, "weight_decay": 0.3},
                {"params": [model[0].bias, model[2].weight]},
                {"params": [model[2].bias], "betas": (0.5, 0.9)},
            ],
            lr=0.01,
        )

    compare_with_horovod(network, optimizer, lambda m, opt: train(m, opt, batches(STEPS)))


def test_tensor_learning_rate():
    for settings in ({}, {"fused": True}):
        compare_with_horovod(
            network,
            lambda m, s=settings: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.02), **s),
            lambda m, opt: train(m, opt, batches(STEPS)),
        )


def test_zero_grad_before_step_raises_as_in_horovod():
    for wrap in (hvd.DistributedOptimizer, DistributedAndersonOptimizer):
        model = network()
        opt = wrap(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
        loss_of(model, *batches(1)[0]).backward()
        with pytest.raises(AssertionError, match="zero_grad"):
            opt.zero_grad()
        opt.step()
        opt.zero_grad()
    # What Horovod's own cannot do, and issue 3405 asks for:
    for set_to_none in (True, False):
        train(model, opt, batches(1))
        opt.zero_grad(set_to_none=set_to_none)
        assert all((p.grad is None) == set_to_none for p in model.parameters())
        assert set_to_none or not any(p.grad.any() for p in model.parameters())


def test_more_backward_passes_than_agreed_raise_as_in_horovod():
    for wrap in (hvd.DistributedOptimizer, DistributedAndersonOptimizer):
        model = network()
        opt = wrap(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
        x, y = batches(1)[0]
        loss_of(model, x, y).backward()
        with pytest.raises(AssertionError, match="backward_passes_per_step"):
            loss_of(model, x, y).backward()
        opt.synchronize()
        with opt.skip_synchronize():
            opt.step()


def test_horovod_s_own_errors_come_through():
    model = network()
    for arguments, message in (
        ({"named_parameters": [("a", model[0].weight)]}, "not named"),
        ({"named_parameters": [("a", p) for p in model.parameters()]}, "unique"),
        ({"named_parameters": list(model.parameters())}, "tuples"),
        ({"backward_passes_per_step": 0}, "backward_passes_per_step"),
        ({"gradient_predivide_factor": 2.0, "op": hvd.Sum}, "predivide"),
        ({"groups": [[1]]}, "groups"),
    ):
        for wrap in (hvd.DistributedOptimizer, DistributedAndersonOptimizer):
            with pytest.raises(ValueError, match=message):
                wrap(torch.optim.SGD(model.parameters(), lr=0.1), **arguments)


@pytest.mark.parametrize("name", ["momentum", "Adam", "AdamW fused"])
def test_state_dict_goes_to_horovod_and_back(name):
    data = batches(9)
    reference = exact_network()
    opt = hvd.DistributedOptimizer(
        built(name, reference.parameters()), reference.named_parameters()
    )
    train(reference, opt, data)

    model = exact_network()
    opt = DistributedAndersonOptimizer(
        built(name, model.parameters()), model.named_parameters(), anderson=NEVER
    )
    train(model, opt, data[:3])
    state, weights = opt.state_dict(), model.state_dict()
    # A new model each time: Horovod's hooks stay on the parameters.
    model = exact_network()
    model.load_state_dict(weights)
    opt = hvd.DistributedOptimizer(built(name, model.parameters()), model.named_parameters())
    opt.load_state_dict(state)
    train(model, opt, data[3:6])
    state, weights = opt.state_dict(), model.state_dict()
    model = exact_network()
    model.load_state_dict(weights)
    opt = DistributedAndersonOptimizer(
        built(name, model.parameters()), model.named_parameters(), anderson=NEVER
    )
    opt.load_state_dict(state)
    train(model, opt, data[6:])
    assert_same_bits(list(model.parameters()), list(reference.parameters()), "weights")
    assert_replicas_equal(model)

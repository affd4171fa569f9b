"""Mistakes of users on real ranks: an error that says what is wrong, on every rank, and no hang."""

import horovod.torch as hvd
import pytest
import torch
from horovod.common.exceptions import HorovodInternalError
from problems import TEXTBOOK
from training import (
    NEVER,
    assert_replicas_equal,
    flat,
    full_batch,
    loss_of,
    network,
    round_gradients,
    train,
)

from aadl_hvd import (
    AndersonConfig,
    AndersonOptimizer,
    ConfigError,
    DistributedAndersonOptimizer,
    ReplicaMismatchError,
    UnsupportedError,
)

LAST = hvd.rank() == hvd.size() - 1
pytestmark = pytest.mark.timeout(60)


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), lr=0.1, **settings)


def layered(width, bias=True, dtype=torch.float32):
    return torch.nn.Sequential(torch.nn.Linear(3, width, bias=bias), torch.nn.Linear(width, 2)).to(
        dtype
    )


def frozen(model):
    model[1].bias.requires_grad_(False)
    return model


def weight(dtype):
    return torch.nn.Parameter(torch.ones(3, dtype=dtype))


DIFFERENT = {
    "width": (lambda: sgd(layered(5 if LAST else 4)), {}, r"shape \(5, 3\)"),
    "number": (lambda: sgd(layered(4, bias=not LAST)), {}, "parameter 0.1"),
    "dtype": (
        lambda: sgd(layered(4, dtype=torch.float64 if LAST else torch.float32)),
        {},
        "float64",
    ),
    "frozen": (
        lambda: sgd(frozen(layered(4)) if LAST else layered(4)),
        {},
        "requires_grad=False",
    ),
    "class": (
        lambda: (torch.optim.Adam if LAST else torch.optim.SGD)(layered(4).parameters(), lr=0.1),
        {},
        "Adam",
    ),
    "settings": (
        lambda: sgd(layered(4)),
        {"history_depth": 5 if LAST else 4},
        "history_depth=5",
    ),
    # Refused where it is complex; the other ranks must not wait for it.
    "dtype and unsupported": (
        lambda: torch.optim.SGD([weight(torch.complex64 if LAST else torch.float32)], lr=0.1),
        {},
        "complex64",
    ),
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_ranks_that_differ(difference):
    make, settings, message = DIFFERENT[difference]
    with pytest.raises(ReplicaMismatchError, match=message) as found:
        DistributedAndersonOptimizer(make(), anderson=AndersonConfig(**settings))
    assert f"rank {hvd.size() - 1}" in str(found.value)
    # And nothing is left behind that would disturb the next one.
    model = network()
    opt = DistributedAndersonOptimizer(sgd(model), model.named_parameters(), anderson=NEVER)
    train(model, opt, full_batch(2))
    assert_replicas_equal(model)


OTHER_ARGUMENTS = {
    "num_groups": lambda model: {"num_groups": 2 if LAST else 0},
    "groups": lambda model: {"groups": [list(model.parameters())[: 2 if LAST else 3]]},
    "backward_passes_per_step": lambda model: {"backward_passes_per_step": 2 if LAST else 1},
    "compression": lambda model: {"compression": hvd.Compression.fp16 if LAST else None},
    "op": lambda model: {"op": hvd.Sum if LAST else hvd.Average},
    "named_parameters": lambda model: {
        "named_parameters": model.named_parameters(prefix="last" if LAST else "")
    },
}


@pytest.mark.parametrize("name", OTHER_ARGUMENTS)
def test_arguments_of_horovods_that_differ(name):
    """Horovod itself would hang, or train on with other steps on one rank."""
    model = network()
    with pytest.raises(ReplicaMismatchError, match=f"{name}=") as found:
        DistributedAndersonOptimizer(sgd(model), **OTHER_ARGUMENTS[name](model))
    assert f"rank {hvd.size() - 1}" in str(found.value)


def test_what_horovod_refuses_on_one_rank_alone():
    model = network()
    names = list(model.named_parameters())
    with pytest.raises(ReplicaMismatchError, match=r"named_parameters="):
        DistributedAndersonOptimizer(sgd(model), names[1:] if LAST else names)
    passes = 0 if LAST else 1
    with pytest.raises((ReplicaMismatchError, ValueError), match="backward_passes_per_step"):
        DistributedAndersonOptimizer(sgd(model), backward_passes_per_step=passes)


def test_wrapped_twice_and_around_horovod():
    model = network()
    opt = DistributedAndersonOptimizer(sgd(model), model.named_parameters())
    for wrap in (DistributedAndersonOptimizer, AndersonOptimizer):
        with pytest.raises(UnsupportedError, match="accelerated already"):
            wrap(opt)
        with pytest.raises(UnsupportedError, match="accelerated already"):
            wrap(AndersonOptimizer(sgd(network()), independent=True))
        with pytest.raises(UnsupportedError, match=r"hvd\.DistributedOptimizer"):
            wrap(hvd.DistributedOptimizer(sgd(network())))
    for accelerated in (opt, AndersonOptimizer(sgd(network()), independent=True)):
        with pytest.raises((UnsupportedError, TypeError)):
            hvd.DistributedOptimizer(accelerated)
    train(model, opt, full_batch(2))
    assert_replicas_equal(model)


def test_not_an_optimizer_and_not_a_config():
    model = network()
    with pytest.raises(UnsupportedError, match=r"torch\.optim\.Optimizer"):
        DistributedAndersonOptimizer(model)
    with pytest.raises(ConfigError, match="AndersonConfig"):
        DistributedAndersonOptimizer(sgd(model), anderson={"history_depth": 3})
    with pytest.raises(TypeError):
        DistributedAndersonOptimizer(sgd(model), None, None, 1, None, 1.0, 0, None, False, None, {})
    with pytest.raises(UnsupportedError, match="LBFGS"):
        DistributedAndersonOptimizer(
            torch.optim.LBFGS(model.parameters()), anderson=AndersonConfig(residual="step")
        )


def test_unsupported_optimizer_leaves_no_hooks_behind():
    """Horovod's hooks would go on reducing gradients that nobody waits for."""
    model = network()
    parameters = [*model.parameters(), weight(torch.complex64)]
    with pytest.raises(UnsupportedError, match="complex64"):
        DistributedAndersonOptimizer(torch.optim.SGD(parameters, lr=0.1))
    x, y = full_batch(1)[0]
    if LAST:  # alone: hooks would make it talk
        for _ in range(3):
            loss_of(model, x, y).backward()


def test_loss_safeguard_without_a_closure():
    model = network()
    opt = DistributedAndersonOptimizer(
        sgd(model), model.named_parameters(), anderson=AndersonConfig(safeguard="loss")
    )
    loss_of(model, *full_batch(1)[0]).backward()
    with pytest.raises(UnsupportedError, match="closure"):
        opt.step()
    opt.synchronize()  # goes on where the user mends it
    opt.zero_grad()

    def closure():
        opt.zero_grad()
        loss = loss_of(model, *full_batch(1)[0])
        loss.backward()
        return loss

    for _ in range(6):
        opt.step(closure)
    assert_replicas_equal(model)


@pytest.mark.skipif(hvd.size() != 2 or not hvd.mpi_enabled(), reason="Adasum: MPI, 2^k ranks")
def test_adasum_s_limits():
    model = network()
    for settings, name in (({"safeguard": "loss"}, "safeguard"), ({}, "residual")):
        with pytest.raises(ConfigError, match=name):
            DistributedAndersonOptimizer(
                sgd(model), op=hvd.Adasum, anderson=AndersonConfig(**settings)
            )


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_nan_on_one_rank(layout):
    """Everybody sees it, nobody hangs, the history is reset and training can go on."""
    model = network()
    opt = DistributedAndersonOptimizer(
        sgd(model),
        model.named_parameters(),
        anderson=AndersonConfig(**TEXTBOOK, frequency=2, layout=layout, safeguard="none"),
    )
    good = [p.detach().clone() for p in model.parameters()]
    data = full_batch(1)
    train(model, opt, data * 4)
    assert opt.anderson.stats.accelerated == 2
    opt.zero_grad()
    (loss_of(model, *data[0]) * (float("nan") if LAST else 1.0)).backward()
    opt.step()
    with torch.no_grad():
        for p, value in zip(model.parameters(), good, strict=True):
            p.copy_(value)
    before = opt.anderson.stats.accelerated
    train(model, opt, data * 7)
    stats = opt.anderson.stats
    assert stats.rejected["nonfinite"] == 1
    assert stats.resets["nonfinite"] == 1
    assert stats.accelerated == before + 3  # rejected at 6; then 8, 10, 12
    assert flat(model).isfinite().all()
    assert_replicas_equal(model)


def test_copies_of_a_distributed_optimizer_are_refused():
    import copy
    import pickle

    model = network()
    round_gradients(model)
    opt = DistributedAndersonOptimizer(sgd(model), model.named_parameters())
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(UnsupportedError, match="state_dict"):
            copied(opt)


@pytest.mark.parametrize("wrong", ["settings", "wrapped twice", "devices"])
def test_refused_on_one_rank_alone(wrong):
    """The others do not wait for it: they are told which rank, and why."""
    optimizer = sgd(layered(4))
    if LAST and wrong == "devices":
        parameters = optimizer.param_groups[0]["params"]
        parameters[-1] = torch.nn.Parameter(torch.empty_like(parameters[-1], device="meta"))
    anderson = None
    if LAST and wrong == "settings":
        anderson = {"frequency": 3}
    if LAST and wrong == "wrapped twice":
        optimizer = AndersonOptimizer(optimizer, independent=True)
    own = ConfigError if wrong == "settings" else UnsupportedError
    reason = {
        "settings": "Must be an AndersonConfig",
        "wrapped twice": "accelerated already",
        "devices": "several devices",
    }[wrong]
    with pytest.raises(own if LAST else ReplicaMismatchError, match=reason) as error:
        DistributedAndersonOptimizer(optimizer, anderson=anderson)
    assert LAST or f"Rank {hvd.size() - 1} refused" in str(error.value)


@pytest.mark.parametrize("compression", [AndersonConfig(), "fp16"], ids=["settings", "a name"])
def test_settings_in_the_place_of_the_compression(compression):
    """Horovod's own is content, and fails in the first backward pass."""
    model = layered(4)
    with pytest.raises(ConfigError, match=r"compression=.*anderson=AndersonConfig"):
        DistributedAndersonOptimizer(sgd(model), model.named_parameters(), compression)


@pytest.mark.parametrize("settings", [{}, {"groups": 1}])
def test_an_error_of_horovod_in_the_backward_pass_says_who_has_left(monkeypatch, settings):
    """A rank may leave, and Horovod end, before another one begins to reduce a gradient."""
    model = network()
    opt = DistributedAndersonOptimizer(sgd(model), model.named_parameters(), **settings)
    engine = opt.anderson_engine

    def ended(*_):
        raise HorovodInternalError("Horovod has been shut down")

    name = "_grouped_allreduce_grad_async" if settings else "_allreduce_grad_async"
    monkeypatch.setitem(engine.horovods, name, ended)
    monkeypatch.setattr(engine.accelerator.comm, "explain", lambda e: e.add_note("Rank 9 has left"))
    with pytest.raises(HorovodInternalError) as caught:
        model(torch.ones(2, 3)).sum().backward()
    assert caught.value.__notes__ == ["Rank 9 has left"]

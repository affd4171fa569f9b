"""A run that goes on from a checkpoint, on real ranks."""

import copy

import horovod.torch as hvd
import pytest
import torch
from training import (
    assert_replicas_equal,
    assert_same_bits,
    batches,
    flat,
    loss_of,
    network,
    round_gradients,
    unless_brief,
)

from aadl_hvd import (
    AndersonConfig,
    AndersonOptimizer,
    CheckpointError,
    ConfigError,
    DistributedAndersonOptimizer,
    checkpoint,
)
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core.accelerator import Accelerator

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
}
SETTINGS = {
    "default": {},
    "columns": {"layout": "columns", "noise_gate": None, "frequency": 3},
    "everything else": {
        **{"safeguard": "residual", "average_window": 4, "history_dtype": "bfloat16"},
        **{"noise_gate": 0.01, "averages": (0.9, 0.8)},
    },
}


def built(optimizer, settings, **arguments):
    model = network()
    # Or three ranks would not give the same bits twice; too few digits are noise to the gate.
    round_gradients(model, bits=18)
    opt = DistributedAndersonOptimizer(
        OPTIMIZERS[optimizer](model.parameters()),
        named_parameters=model.named_parameters(),
        anderson=AndersonConfig(**settings),
        **arguments,
    )
    return model, opt


DATA = batches(60)


def train(model, opt, first, last):
    """A small part of the gradient is new in every step: the noise gate opens now and then."""
    (x, y), losses = DATA[0], []
    for k in range(first, last):
        opt.zero_grad()
        loss = loss_of(model, x + 1e-3 * DATA[k][0], y)
        loss.backward()
        opt.observe(loss)
        opt.step()
        losses.append(loss.item())
    return losses


def outcome(model, opt):
    state = opt.state_dict()
    return [flat(model), state["state"], state["param_groups"], opt.anderson.stats.counters()]


@pytest.fixture
def folder(tmp_path_factory):
    """The same on all ranks."""
    path = str(tmp_path_factory.mktemp("checkpoints")) if hvd.rank() == 0 else None
    return hvd.broadcast_object(path, root_rank=0, name="folder")


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("optimizer", unless_brief("Adam", "SGD"))
def test_50_steps_are_20_and_a_file_and_30(name, optimizer, folder):
    model, opt = built(optimizer, SETTINGS[name])
    train(model, opt, 0, 20)
    last = hvd.size() - 1
    whole = opt.consolidate_state_dict(to=last)
    assert (whole is None) == (hvd.rank() != last)
    assert ("history" in opt.state_dict()["anderson"]) == (hvd.rank() == last)
    if hvd.rank() == last:
        checkpoint.save(f"{folder}/whole", {"model": model.state_dict(), "optimizer": whole})
    # And in parallel, each rank its own part.
    checkpoint.save(f"{folder}/part.{hvd.rank()}", opt.sharded_state_dict())
    if hvd.rank() == 0:
        checkpoint.save(f"{folder}/base", opt.state_dict())
    hvd.barrier()
    train(model, opt, 20, 50)
    expected = copy.deepcopy(outcome(model, opt))
    stats = opt.anderson.stats
    assert stats.accelerated + sum(stats.rejected.values()) >= 15, stats
    assert stats.accelerated >= 2, stats

    merged = checkpoint.merge_shards(
        checkpoint.load(f"{folder}/part.{rank}") for rank in range(hvd.size())
    )
    base = checkpoint.load(f"{folder}/base")
    own = checkpoint.load(f"{folder}/part.{hvd.rank()}")
    saved = checkpoint.load(f"{folder}/whole")
    for state in (saved["optimizer"], base | own, base | merged):
        model, opt = built(optimizer, SETTINGS[name])
        model.load_state_dict(saved["model"])
        opt.load_state_dict(copy.deepcopy(state))  # torch keeps its tensors as they are
        train(model, opt, 20, 50)
        assert_same_bits(outcome(model, opt), expected)
    assert_replicas_equal(model)
    hvd.barrier()


def simulated(size, settings):
    """A run of 20 steps on simulated ranks that all see the same gradient."""
    start = network()

    def program(comm):
        model = copy.deepcopy(start)
        config = AndersonConfig(noise_gate=None, **settings)
        opt = OPTIMIZERS["SGD"](model.parameters())
        opt = AndersonOptimizer(opt, anderson=config, independent=True)
        opt.anderson = Accelerator(config, comm)
        generator = torch.Generator().manual_seed(3)
        for _ in range(23):
            opt.zero_grad()
            for p in model.parameters():
                p.grad = 0.1 * p.detach() + torch.randn(p.shape, generator=generator)
            if opt.anderson.stats.steps == 20:
                saved = copy.deepcopy((model.state_dict(), opt.consolidate_state_dict()))
            opt.step()
        return saved, flat(model)

    return run_ranks(size, program)[0]


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_from_another_number_of_ranks(size, layout, folder):
    settings = {"frequency": 3, "safeguard": "none", "relaxation": 0.3, "regularization": 1e-3}
    (weights, state), expected = simulated(size, settings)
    if hvd.rank() == 0:
        checkpoint.save(f"{folder}/state", state)
    hvd.barrier()
    model, opt = built("SGD", settings | {"noise_gate": None, "layout": layout})
    model.load_state_dict(weights)
    opt.load_state_dict(checkpoint.load(f"{folder}/state"))
    found = opt.consolidate_state_dict(0)
    if hvd.rank() == 0:
        there, here = (s["anderson"]["history"] for s in (state, found))
        for name in there.keys() - {"sharding", "ranks", "own", "gram"}:
            assert_same_bits(here[name], there[name], name)
        for name in ("matrix", "fresh", "carried", "drift"):
            assert_same_bits(here["gram"][name], there["gram"][name], name)
    generator = torch.Generator().manual_seed(3)
    for k in range(23):
        gradients = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
        if k < 20:
            continue
        opt.zero_grad()
        sum(
            (0.05 * p.square() + p * g).sum()
            for p, g in zip(model.parameters(), gradients, strict=True)
        ).backward()
        opt.step()
    torch.testing.assert_close(flat(model), expected, rtol=1e-4, atol=1e-5)
    assert opt.anderson.stats.accelerated == state["anderson"]["counters"]["accelerated"] + 1
    assert_replicas_equal(model)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("who", ["first", "last", "all but one"])
@pytest.mark.parametrize("fresh", [False, True])
def test_history_loaded_on_some_ranks_only(who, fresh):
    """As Horovod's own examples resume. Nobody waits, the history is reset everywhere."""
    loads = {
        "first": hvd.rank() == 0,
        "last": hvd.rank() == hvd.size() - 1,
        "all but one": hvd.rank() > 0,
    }[who]
    settings = {"safeguard": "residual", "average_window": 3, "noise_gate": None}
    model, opt = built("SGD", settings)
    train(model, opt, 0, 19)
    state = copy.deepcopy(hvd.broadcast_object(opt.consolidate_state_dict(0), 0, name="state"))
    if fresh:
        model, opt = built("SGD", settings)
    else:
        train(model, opt, 19, 22)
    if loads:
        opt.load_state_dict(copy.deepcopy(state))  # torch keeps its tensors as they are
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(opt, root_rank=0)
    before = opt.anderson.stats.resets["desynchronized"]
    train(model, opt, 22, 50)
    stats = opt.anderson.stats
    assert stats.resets["desynchronized"] == before + (hvd.size() > 1)
    assert stats.accelerated + sum(stats.rejected.values()) >= 10
    assert_replicas_equal(model)


def test_errors_on_every_rank(folder):
    model, opt = built("SGD", {})
    train(model, opt, 0, 10)
    with pytest.raises(ConfigError, match="Invalid to="):
        opt.consolidate_state_dict(hvd.size())
    if hvd.size() > 1:
        with pytest.raises(ConfigError, match="by rank"):
            opt.consolidate_state_dict(hvd.rank())
        part = hvd.broadcast_object(opt.sharded_state_dict(), 0, name="part")
        if hvd.rank():
            with pytest.raises(CheckpointError, match=f"rank 0 of {hvd.size()}, rows 0 to"):
                opt.load_state_dict(part)
        broken = opt.anderson.part
        if hvd.rank() == hvd.size() - 1:
            opt.anderson.part = lambda problem: 1 / 0
        with pytest.raises(CheckpointError, match=r"Rank \d could not.*ZeroDivisionError"):
            opt.consolidate_state_dict(0)
        opt.anderson.part = broken
    train(model, opt, 10, 20)
    assert_replicas_equal(model)


@pytest.mark.parametrize("what", ["shape", "missing", "rate"])
def test_a_state_that_does_not_fit_a_fresh_optimizer(what):
    """There is no state to compare it with; the class is Horovod's to look at."""
    model, opt = built("Adam", {})
    train(model, opt, 0, 3)
    state = copy.deepcopy(opt.state_dict())
    if what == "shape":
        state["state"][0]["exp_avg"] = torch.zeros(7)
    elif what == "missing":
        del state["state"][0]["exp_avg_sq"]
    else:
        state["param_groups"][0]["lr"] = float("nan")
    model, opt = built("Adam", {})
    with pytest.raises(CheckpointError, match="param_groups" if what == "rate" else "exp_avg"):
        opt.load_state_dict(state)
    assert not opt.state
    train(model, opt, 0, 3)
    assert_replicas_equal(model)


def test_process_set(all_but_rank_0, folder):
    """Its ranks are numbered from 0; a rank outside trains, and saves, by itself."""
    model, opt = built("SGD", {}, process_set=all_but_rank_0)
    train(model, opt, 0, 20)
    whole = opt.consolidate_state_dict(0)
    holds = hvd.rank() < 2
    assert (whole is not None) == holds
    saved = {"model": model.state_dict(), "optimizer": copy.deepcopy(whole)}
    everybody = hvd.allgather_object(saved)
    train(model, opt, 20, 40)
    expected = copy.deepcopy(outcome(model, opt))
    saved = everybody[min(hvd.rank(), 1)]
    model, opt = built("SGD", {}, process_set=all_but_rank_0)
    model.load_state_dict(everybody[hvd.rank()]["model"])
    opt.load_state_dict(saved["optimizer"])
    train(model, opt, 20, 40)
    assert_same_bits(outcome(model, opt), expected)

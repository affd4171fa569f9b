"""NeumannOptimizer's evaluation weights, resume and copies, under Anderson, and what is refused."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from neumann_runs import COUNTERS, SHORT, assert_same, counters, joined, problem, run

from aadl_hvd import (
    AndersonConfig,
    AndersonOptimizer,
    ConfigError,
    NeumannOptimizer,
    UnsupportedError,
)

# Evaluation


def trained(steps=9):
    parameters, gradients = problem(steps, torch.float32)
    opt = NeumannOptimizer(parameters, 0.5, **SHORT)
    run(opt, parameters, gradients)
    return opt, parameters, gradients


def test_evaluation_weights_and_the_way_back():
    opt, parameters, gradients = trained()
    before, state = copy.deepcopy(parameters), copy.deepcopy(opt.state_dict())
    mu = 1 - 1 / (1 + 7)
    with opt.evaluation_weights():
        for p, w in zip(parameters, before, strict=True):
            expected = w - mu * opt.state[p]["m"]
            torch.testing.assert_close(p, expected)
            assert not torch.equal(p, w)
        inside = copy.deepcopy(parameters)
    assert all(map(torch.equal, parameters, before))
    assert all(map(torch.equal, opt.evaluated_parameters(), inside))
    assert_same(opt.state_dict(), state)
    assert "_evaluating" not in vars(opt)
    # Adding mu m again would not bring w back.
    again = [e + mu * opt.state[p]["m"] for e, p in zip(inside, parameters, strict=True)]
    assert not all(map(torch.equal, again, before)), "this test cannot fail"
    run(opt, parameters, gradients[:1])


def test_evaluation_weights_after_an_exception():
    opt, parameters, gradients = trained()
    before = copy.deepcopy(parameters)
    with pytest.raises(KeyError), opt.evaluation_weights():
        with torch.no_grad():
            parameters[1].fill_(math.nan)  # whatever is done to them inside
        raise KeyError
    assert all(map(torch.equal, parameters, before))
    run(opt, parameters, gradients[:1])


def test_no_step_inside_evaluation():
    opt, parameters, gradients = trained()
    before = copy.deepcopy(parameters)
    with opt.evaluation_weights():
        inside = copy.deepcopy(parameters)
        with pytest.raises(UnsupportedError, match=r"step\(\) inside evaluation_weights"):
            run(opt, parameters, gradients[:1])
        with pytest.raises(UnsupportedError, match="inside"), opt.evaluation_weights():
            pass
        with pytest.raises(UnsupportedError, match="inside"):
            opt.evaluated_parameters()
        assert all(map(torch.equal, parameters, inside))
        assert opt.state[parameters[0]]["step"] == 9
    assert all(map(torch.equal, parameters, before))


def test_evaluation_before_the_first_step():
    parameters, _ = problem(1)
    opt = NeumannOptimizer(parameters, 0.1, **SHORT)
    before = copy.deepcopy(parameters)
    with opt.evaluation_weights():
        assert all(map(torch.equal, parameters, before))
    copies = opt.evaluated_parameters()
    assert all(map(torch.equal, copies, before))
    assert all(c.data_ptr() != p.data_ptr() for c, p in zip(copies, parameters, strict=True))
    assert not any(c.requires_grad for c in copies)


# State


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resume_bitwise(at, dtype):
    """In the warm-up, at its end, at a reset, between resets."""
    parameters, gradients = problem(18, dtype)
    others = copy.deepcopy(parameters)
    opt = NeumannOptimizer(parameters, 0.05, **SHORT)
    run(opt, parameters, gradients)
    first = NeumannOptimizer(others, 0.05, **SHORT)
    run(first, others, gradients[:at])
    file = io.BytesIO()
    torch.save((first.state_dict(), others), file)
    file.seek(0)
    saved, others = torch.load(file, weights_only=False)
    # Settings that differ are those of the checkpoint, as in torch.
    second = NeumannOptimizer(others, 1.0, 7)
    second.load_state_dict(saved)
    run(second, others, gradients[at:])
    assert all(map(torch.equal, others, parameters))
    assert_same(second.state_dict(), opt.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copied):
    opt, parameters, gradients = trained()
    twin, others = copied((opt, parameters))
    run(opt, parameters, gradients)
    assert twin.state[others[0]]["step"] == 9
    run(twin, others, gradients)
    assert all(map(torch.equal, others, parameters))
    assert_same(twin.state_dict(), opt.state_dict())
    assert NeumannOptimizer(twin.param_groups).state[others[0]]["step"] == 18


def test_state_and_settings_survive_being_made_anew_of_the_groups_alone():
    """As hvd.DistributedOptimizer does, with a class made at run time."""
    opt, parameters, gradients = trained()
    state = copy.deepcopy(opt.state_dict())
    cls = type("NeumannOptimizer", (NeumannOptimizer,), {})
    other = cls(opt.param_groups)
    assert_same(other.state_dict(), state)
    run(other, parameters, gradients)
    assert counters(other, parameters[0])[0] == 18
    other.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert other.param_groups[1]["steps_per_epoch"] == 2
    assert other.param_groups[1]["lr"] == 0.5
    loaded = NeumannOptimizer(parameters, 1.0, 3)
    loaded.load_state_dict(state)  # makes new groups, and these know their state as well
    assert_same(cls(loaded.param_groups).state_dict(), state)
    # With a plain list of the groups the settings travel all the same.
    assert cls(list(opt.param_groups)).param_groups[0]["steps_per_epoch"] == 2
    # Whoever says more than that begins anew.
    fresh = NeumannOptimizer(opt.param_groups, 0.1, 5)
    assert counters(fresh, parameters[0]) == (0, 0, 0, 0)


def test_state_is_there_before_the_first_step():
    """Horovod steps on zero gradients to make it, where there is none."""
    parameters, _ = problem(1)
    opt = NeumannOptimizer(parameters, 0.1, **SHORT)
    found = opt.state_dict()["state"]
    assert len(found) == len(parameters)
    assert {name for entry in found.values() for name in entry} == {"m", "v", *COUNTERS}


# As the base of Anderson acceleration


def quadratic(anderson=None, lr=0.05, steps=60):
    """Full-batch least squares; the loss and the optimizer."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(12, generator=generator, dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    opt = NeumannOptimizer([p], lr, **SHORT, beta=0.0)
    if anderson is not None:
        opt = AndersonOptimizer(opt, anderson=anderson)
    best = (torch.linalg.lstsq(a, y[:, None]).solution[:, 0], a)
    for _ in range(steps):
        opt.zero_grad()
        (a @ p - y).square().mean().backward()
        opt.step()
    return opt, p, float((best[1] @ (p.detach() - best[0])).square().mean())


@pytest.mark.parametrize("residual", ["gradient", "step"])
def test_never_accelerated_is_itself_bit_for_bit(residual):
    config = AndersonConfig(frequency=10**9, residual=residual)
    opt, p, _ = quadratic(config)
    plain, q, _ = quadratic()
    assert torch.equal(p, q)
    assert isinstance(opt, NeumannOptimizer)
    assert torch.equal(opt.state[p]["m"], plain.state[q]["m"])
    assert opt.anderson.stats.stored == 60


def test_acceleration_gains_and_evaluation_goes_on():
    opt, p, loss = quadratic(AndersonConfig(history_depth=6))
    _, _, plain = quadratic()
    assert opt.anderson.stats.accelerated > 10
    assert loss < plain / 100
    before = p.detach().clone()
    with opt.evaluation_weights():
        assert not torch.equal(p, before) or not opt.state[p]["m"].any()
        with pytest.raises(UnsupportedError, match="inside evaluation_weights"):
            opt.step()
    assert torch.equal(p, before)
    opt.step()


def test_a_rejected_step_takes_the_counters_back():
    """The paper's safeguard restores the base optimizer's state."""
    config = AndersonConfig(safeguard="residual", residual="step", relaxation=1.0, frequency=1)
    opt, p, _ = quadratic(config)
    stats = opt.anderson.stats
    assert stats.rejected["residual"] > 0, stats
    assert opt.state[p]["step"] < 60
    plain = NeumannOptimizer([p], 0.05, **SHORT)
    plain.load_state_dict(opt.state_dict())  # t and m go together
    assert counters(plain, p) == counters(opt, p)


# What is refused


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"lr": None}, r"lr=None\. Must be a finite number >= 0"),
        ({"lr": -0.1}, "lr=-0.1"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": torch.ones(2)}, "lr=tensor"),
        ({"steps_per_epoch": None}, r"steps_per_epoch=None\. Must be an integer >= 1"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0"),
        ({"steps_per_epoch": 2.0}, "steps_per_epoch=2.0"),
        ({"steps_per_epoch": True}, "steps_per_epoch=True"),
        ({"alpha": -1e-7}, "alpha=-1e-07"),
        ({"beta": math.inf}, "beta=inf"),
        ({"gamma": 1.01}, r"gamma=1\.01\. Must be a finite number >= 0 and <= 1"),
        ({"mu_min": -0.1}, "mu_min=-0.1"),
        ({"mu_max": 0.4}, r"mu_max=0\.4\. Must be a finite number >= 0\.5 and <= 1"),
        ({"mu_max": 1.1}, "mu_max=1.1"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1"),
        ({"reset_epochs": 0}, r"reset_epochs=0\. Must be a finite number > 0"),
        ({"variables": "scalars"}, "variables='scalars'.*parameters.*tensors"),
        ({"weight_decay": "1"}, "weight_decay='1'"),
    ],
)
def test_settings_that_are_refused(wrong, match):
    parameters, _ = problem(1)
    settings = {"lr": 0.1, "steps_per_epoch": 2} | wrong
    with pytest.raises(ConfigError, match=match):
        NeumannOptimizer(parameters, **settings)
    # In a group as well; the optimizer stays what it was.
    opt = NeumannOptimizer(parameters[:2], 0.1, 2)
    with pytest.raises(ConfigError, match=match):
        opt.add_param_group({"params": parameters[2:]} | wrong)
    assert len(opt.param_groups) == 1
    assert len(opt.state) == 2


@pytest.mark.parametrize(
    "name, value",
    [("steps_per_epoch", 3), ("warmup_epochs", 1), ("reset_epochs", 1), ("variables", "tensors")],
)
def test_groups_share_what_is_of_the_whole(name, value):
    parameters, _ = problem(1)
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], name: value}]
    with pytest.raises(ConfigError, match=rf"{name}={value!r} of parameter group 1.*first group"):
        NeumannOptimizer(groups, 0.1, 2)


def test_extreme_settings_that_are_allowed():
    parameters, gradients = problem(3)
    settings = {"alpha": 0, "beta": 0, "gamma": 1, "mu_min": 0, "mu_max": 0, "warmup_epochs": 0}
    opt = NeumannOptimizer(parameters, 0, np.int64(1), **settings)
    before = joined(parameters)
    run(opt, parameters, gradients)
    np.testing.assert_array_equal(joined(parameters), before)


def test_kinds_of_tensors_that_are_refused():
    with pytest.raises(UnsupportedError, match="complex64"):
        NeumannOptimizer([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))], 0.1, 2)
    table = torch.nn.Embedding(4, 2, sparse=True)
    opt = NeumannOptimizer(table.parameters(), 0.1, 2)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedError, match="sparse"):
        opt.step()

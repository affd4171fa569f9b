"""The mini-batch benchmark: its problems, its runs, its numbers, and the command."""

import contextlib
import dataclasses
import json
import math
import os
import random
import re

import numpy as np
import pytest
import torch
from torch import nn

import benchmarks.minibatch.__main__ as minibatch
from aadl_hvd import AndersonConfig
from benchmarks.minibatch import problems, run, table
from benchmarks.minibatch.averages import DECAYS, NAMES, QUARTER, Averages
from benchmarks.minibatch.bases import (
    CASES,
    DECOUPLED_DECAY,
    MOMENTA,
    WARM_UP,
    Base,
    Case,
    chosen,
    grid,
)
from benchmarks.minibatch.problems import MAKERS, Problem, make, squares
from benchmarks.minibatch.results import APART, Runs
from benchmarks.minibatch.run import least, steps_to, train
from models.errors import UserError

NESTEROV = Base("sgd", 0.1)


def weights_of(model):
    return torch.cat([w.detach().flatten() for w in model.parameters()])


# Problems


@pytest.mark.parametrize("name", MAKERS)
def test_each_problem_trains(name):
    problem = make(name, 0, steps=12)
    before = problem.evaluate(problem.make_model(), True)
    found, model = train(problem, Base("sgd", 0.05, 0.0))
    assert len(found["curve"]) == 2 and found["steps"] == 12  # at steps 10 and 12
    assert found["curve"][-1] < before["f"]
    assert found["curve"][-1] == problem.evaluate(model, True)["f"]
    batch = re.search(r"-(\d+)$", name)
    assert len(problem.batch_of(3)[0]) == (int(batch[1]) if batch else 1497)


def test_sizes_of_the_made_data():
    train_part, validation = make("mnist1d_mlp-64", 3).train, make("mnist1d_mlp-64", 3).validation
    assert train_part[0].shape == (4000, 40) and validation[0].shape == (1000, 40)
    inputs, targets = make("text-32", 0).train
    assert inputs.shape == targets.shape and torch.equal(inputs[:, 1:], targets[:, :-1])


def test_making_data_leaves_other_generators_alone():
    problems._mnist1d_samples.cache_clear()
    random.seed(5), np.random.seed(5)
    expected = random.random(), np.random.random()
    random.seed(5), np.random.seed(5)
    make("mnist1d_mlp-64", 0)
    assert (random.random(), np.random.random()) == expected


def test_transformer_does_not_see_what_it_predicts():
    problem = make("text-32", 0)
    model, codes = problem.make_model(), problem.train[0][:1].clone()
    before = model(codes)
    codes[0, 20] = (codes[0, 20] + 1) % 5
    changed = (model(codes) - before).abs().amax(-1)[0]
    assert changed[:20].max() == 0 and changed[20:].min() > 0


@pytest.mark.parametrize("name", ["digits_mlp-100", "digits_conv_bn-100"])
def test_f_is_loss_and_decay_of_every_weight(name):
    problem = make(name, 1)
    model = problem.make_model()
    found = problem.evaluate(model, True)
    total = sum(float((w.detach().double() ** 2).sum()) for w in model.parameters())
    assert found["f"] - found["loss"] == pytest.approx(0.5 * 1e-4 * total, rel=1e-9)
    assert problem.evaluate(model, False)["f"] == found["loss"]


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_f_is_what_the_base_descends(kind):
    base = Base(kind, 1e-2, 0.0)
    problem = make("digits_mlp-full", 0, steps=1)
    problem = dataclasses.replace(problem, weight_decay=0.5)
    start = problem.make_model()
    loss = problem.loss(start, 0)
    problem.objective(start, loss, base.coupled).backward()
    gradient = torch.cat([w.grad.flatten() for w in start.parameters()])
    step = weights_of(start) - weights_of(train(problem, base)[1])
    if kind == "sgd":
        torch.testing.assert_close(step, 1e-2 * gradient, rtol=1e-3, atol=1e-7)
    else:  # the first step is lr in every weight, and the decay acts beside it
        own = step - 1e-2 * DECOUPLED_DECAY * weights_of(start)
        clear = gradient.abs() > 1e-5
        torch.testing.assert_close(own[clear], 1e-2 * gradient[clear].sign(), rtol=2e-2, atol=0)


def test_batches_leave_out_the_last_partial_one():
    numbers = torch.arange(1497)
    problem = dataclasses.replace(make("digits_mlp-500", 4), train=(numbers, numbers))
    first, second, third = (problem.batch_of(step)[0].tolist() for step in range(3))
    assert len(first) == len(second) == len(third) == 500
    assert not set(first) & set(second)
    assert set(third) & set(first + second)  # another epoch, in another order
    assert third != first and problem.batch_of(0)[0].tolist() == first
    other = dataclasses.replace(problem, seed=5)
    assert other.batch_of(0)[0].tolist() != first


def test_batch_norm_is_measured_with_statistics_of_all_data():
    problem = make("digits_conv_bn-100", 0, steps=12)
    model = train(problem, NESTEROV)[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = problem.evaluate(model, True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    with torch.no_grad():
        by_hand = problem.losses(model(problem.train[0]), problem.train[1]).mean().item()
    assert found["loss"] == pytest.approx(by_hand, rel=1e-3)  # n against n - 1 in the variance
    inputs = torch.flip(problem.train[0], [0]), torch.flip(problem.train[1], [0])
    assert dataclasses.replace(problem, train=inputs).evaluate(model, True)[
        "validation_loss"
    ] == pytest.approx(found["validation_loss"], rel=1e-4)


# Bases and cases


def test_grid_counts_and_contents():
    assert len(grid(NESTEROV)) == 16 and NESTEROV in grid(NESTEROV)
    assert len(grid(NESTEROV, "both")) == 32 and grid(NESTEROV, "none") == []
    assert {base.momentum for base in grid(NESTEROV)} == set(MOMENTA)
    assert all(base.schedule == "cosine" for base in grid(NESTEROV, "cosine"))
    plain = Base("sgd", 0.5, 0.0)
    assert len(grid(plain)) == 20 and plain in grid(plain)
    assert Base("sgd", 0.1, 0.95) in grid(plain)  # 4 * 0.5 * (1 - 0.95)
    assert len({base.name for base in grid(plain, "both")}) == 40


def test_schedule_free_is_16_runs_more():
    for base, rates in (
        (NESTEROV, {1, 2, 4, 8}),  # 10 to 80 times the rate with momentum 0.9
        (Base("sgd", 0.5, 0.0), {0.5, 1, 2, 4}),
        (Base("adam", 2e-3), {0.002, 0.004, 0.008, 0.016}),
    ):
        free = [tried for tried in grid(base, "all") if tried.free]
        assert len(free) == 16 and len(grid(base, "all")) == len(grid(base, "both")) + 16
        assert {tried.lr for tried in free} == rates
        assert {tried.momentum for tried in free} == set(MOMENTA)
    assert Base("sgd", 1, 0.9, "free").name == "sgd1m0.9-free"


def test_bases_are_what_their_names_say():
    model = make("digits_mlp-100", 0).make_model()
    (sgd,), (nesterov,), (adam,), (adamw,) = (
        base.make(model, 1e-4).param_groups
        for base in (Base("sgd", 0.5, 0.0), NESTEROV, Base("adam", 1e-3, 0.95), Base("adamw", 1e-3))
    )
    assert (sgd["momentum"], sgd["nesterov"], sgd["weight_decay"]) == (0, False, 1e-4)
    assert (nesterov["momentum"], nesterov["nesterov"], nesterov["lr"]) == (0.9, True, 0.1)
    assert (adam["betas"], adam["weight_decay"]) == ((0.95, 0.999), 1e-4)
    assert adamw["weight_decay"] == DECOUPLED_DECAY
    names = [
        base.name for base in (Base("sgd", 0.5, 0.0), NESTEROV, Base("adam", 0.1, 0.9, "cosine"))
    ]
    assert names == ["sgd0.5", "nesterov0.1m0.9", "adam0.1m0.9-cosine"]


def test_cosine_goes_from_the_rate_to_nearly_0():
    base = Base("adam", 0.1, schedule="cosine")
    rates = [base.rate(step, 100) for step in range(100)]
    assert rates[0] == 0.1 and rates[50] == pytest.approx(0.05) and 0 < rates[-1] < 1e-4
    assert rates == sorted(rates, reverse=True)
    problem = make("digits_mlp-500", 0, steps=20)
    constant = train(problem, Base("adam", 0.1))[0]
    assert train(problem, base)[0]["curve"] != constant["curve"]


def test_cases_are_chosen_by_name_group_and_problem():
    assert len(chosen([])) == len(CASES)
    assert [case.name for case in chosen(["digits_mlp-100-nesterov0.1m0.9"])] == [
        "digits_mlp-100-nesterov0.1m0.9"
    ]
    assert {case.problem for case in chosen(["mnist1d_conv"])} == {
        "mnist1d_conv-100",
        "mnist1d_conv-500",
        "mnist1d_conv-2000",
    }
    assert {case.group for case in chosen(["easy", "text"])} == {"easy", "text"}
    assert all(case.problem in MAKERS for case in CASES.values())
    with pytest.raises(UserError, match="digits_ml"):
        chosen(["digits_ml"])


# Schedule-Free and averages


def by_hand(problem, base, decay, *, adam):
    """x of Schedule-Free, after every step."""
    model = problem.make_model()
    z, v = [w.detach().clone() for w in model.parameters()], None
    x, total, beta = [part.clone() for part in z], 0.0, base.momentum
    v = [torch.zeros_like(part) for part in z]
    for step in range(problem.steps):
        rate = base.lr * min(1, (step + 1) / (WARM_UP * problem.steps))
        y = [(1 - beta) * one + beta * mean for one, mean in zip(z, x, strict=True)]
        with torch.no_grad():
            for w, values in zip(model.parameters(), y, strict=True):
                w.copy_(values)
        gradients = torch.autograd.grad(problem.loss(model, step), list(model.parameters()))
        total += rate**2
        for i, gradient in enumerate(gradients):
            g = gradient + decay * y[i]
            if adam:
                v[i] = 0.999 * v[i] + 0.001 * g**2
                g = g / ((v[i] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            z[i] = z[i] - rate * g
            x[i] = x[i] + rate**2 / total * (z[i] - x[i])
    return torch.cat([part.flatten() for part in x])


@pytest.mark.parametrize("base", [Base("sgd", 1.0, 0.9, "free"), Base("adam", 4e-3, 0.95, "free")])
def test_schedule_free_descends_f_and_is_evaluated_at_its_average(base):
    problem = dataclasses.replace(make("digits_mlp-500", 0, steps=25), weight_decay=1e-2)
    found, model = train(problem, base)
    expected = by_hand(problem, base, 1e-2, adam=base.kind == "adam")
    torch.testing.assert_close(weights_of(model), expected, rtol=1e-3, atol=1e-4)
    without = by_hand(problem, base, 0.0, adam=base.kind == "adam")
    assert (expected - without).norm() > 50 * (weights_of(model) - expected).norm()
    assert found["curve"][-1] == problem.evaluate(model, True)["f"]
    assert found["curve"][-1] < found["curve"][0] and found["averages"] == {}


def test_schedule_free_adamw_has_the_decay_of_adamw():
    model = make("digits_mlp-100", 0).make_model()
    (group,) = Base("adamw", 1e-3, 0.95, "free").make(model, 1e-4).param_groups
    assert (group["weight_decay"], group["betas"]) == (DECOUPLED_DECAY, (0.95, 0.999))


def test_warm_up_takes_a_twentieth_of_the_steps():
    rates = [Base("sgd", 2.0, 0.9, "free").rate(step, 400) for step in range(400)]
    assert rates[:2] == [0.1, 0.2] and rates[18] < 2 and set(rates[19:]) == {2.0}


def test_averages_are_those_computed_by_hand():
    steps = 60
    problem = make("digits_mlp-500", 0, steps=steps)
    model = problem.make_model()
    averages = Averages(model, steps)
    weights = []
    for _ in range(steps):
        with torch.no_grad():
            for w in model.parameters():
                w.add_(torch.randn_like(w))
        averages.take()
        weights.append(weights_of(model).double())
    last = weights_of(model)
    expected = {QUARTER: torch.stack(weights[45:]).mean(0)}
    for name, decay in DECAYS.items():
        first = round(1 / (1 - decay))
        mean = torch.stack(weights[:first]).mean(0)
        for one in weights[first:]:
            mean = decay * mean + (1 - decay) * one
        expected[name] = mean
    for name in NAMES:
        with averages.lent(name):
            torch.testing.assert_close(
                weights_of(model).double(), expected[name], rtol=1e-4, atol=1e-4
            )
            assert not torch.equal(weights_of(model), last)
        assert torch.equal(weights_of(model), last)


def test_averages_are_evaluated_beside_a_training(monkeypatch):
    problem = make("digits_conv_bn-100", 0, steps=30)
    lent = []
    own = Averages.lent
    monkeypatch.setattr(Averages, "lent", lambda self, name: lent.append(name) or own(self, name))
    found, model = train(problem, NESTEROV)
    assert sorted(lent) == sorted(NAMES * 3)  # at steps 10, 20 and 30
    for name in NAMES:
        assert found["averages"][name]["f"] > 0
        assert found["averages"][name]["f"] != found["result"]["f"]
    monkeypatch.setattr(Averages, "take", lambda self: None)
    alone, other = train(problem, NESTEROV)
    assert alone["curve"] == found["curve"]
    assert torch.equal(weights_of(model), weights_of(other))
    assert train(problem, Base("sgd", 0.1, schedule="cosine"))[0]["averages"] == {}


# Runs


def test_equal_seeds_give_equal_bits_and_the_control_does_not():
    problem = make("digits_mlp-100", 0, steps=40)
    (one, first), (two, second) = (train(problem, NESTEROV) for _ in range(2))
    assert one["curve"] == two["curve"] and torch.equal(weights_of(first), weights_of(second))
    start, near = weights_of(problem.make_model()), weights_of(problem.make_model(APART))
    assert (near - start).norm() / start.norm() == pytest.approx(APART, rel=1e-2)
    control, model = train(problem, NESTEROV, apart=APART)
    assert not torch.equal(weights_of(model), weights_of(first))
    assert control["curve"][-1] == pytest.approx(one["curve"][-1], rel=1e-2)
    assert train(make("digits_mlp-100", 1, steps=40), NESTEROV)[0]["curve"] != one["curve"]


def test_result_is_the_mean_of_the_last_five_evaluations():
    problem = make("digits_mlp-500", 0, steps=75)
    found, _ = train(problem, NESTEROV)
    assert len(found["curve"]) == 8
    assert found["result"]["f"] == pytest.approx(sum(found["curve"][-5:]) / 5)
    without, _ = train(problem, NESTEROV, curve=False)
    assert without["curve"] is None and without["result"] == found["result"]
    assert without["averages"] == found["averages"]


def test_acceleration_acts_and_can_be_switched_off():
    problem = make("digits_mlp-full", 0, steps=40)
    base = train(problem, NESTEROV)[0]
    ours = train(problem, NESTEROV, AndersonConfig())[0]
    assert base["stats"] is None and "40 steps" in ours["stats"]
    assert ours["curve"] != base["curve"]
    off = train(problem, NESTEROV, AndersonConfig(enabled=False))[0]
    assert off["curve"] == base["curve"]


@pytest.mark.parametrize("observe", [True, False])
def test_losses_are_told_on_request(monkeypatch, observe):
    told = []
    monkeypatch.setattr(run.AndersonOptimizer, "observe", lambda self, loss: told.append(loss))
    train(make("digits_mlp-500", 0, steps=3), NESTEROV, AndersonConfig(), observe=observe)
    assert len(told) == 3 * observe


def test_run_that_diverges_is_infinite():
    found, _ = train(make("digits_mlp-100", 0, steps=200), Base("sgd", 1e30, 0.0))
    assert found["result"]["f"] == math.inf and found["result"]["validation_accuracy"] == 0
    assert found["steps"] < 200
    assert all(result["f"] == math.inf for result in found["averages"].values())


def test_steps_to_a_level():
    found = {"curve": [3.0, 1.0, 2.0, 0.5], "steps": 35}
    assert [steps_to(found, level) for level in (3.0, 1.5, 0.9)] == [10, 20, 35]
    assert steps_to(found, 0.1) == math.inf


def test_least_f_of_ridge_regression():
    random_numbers = np.random.default_rng(0)
    x, y = random_numbers.standard_normal((50, 4)), random_numbers.standard_normal((50, 1))
    data = torch.from_numpy(x).float(), torch.from_numpy(y).float()
    ridge = Problem(
        name="ridge", seed=0, train=data, validation=data, batch=50, weight_decay=0.3,
        build=lambda: nn.Linear(4, 1, bias=False),
        losses=lambda outputs, targets: (outputs - targets).square(),
    )  # fmt: skip
    found = least(ridge, True, [ridge.make_model()], 100)
    x, y = (part.double().numpy() for part in data)
    w = np.linalg.solve(2 / 50 * x.T @ x + 0.3 * np.eye(4), 2 / 50 * x.T @ y)
    assert found == pytest.approx(((x @ w - y) ** 2).mean() + 0.15 * (w**2).sum(), rel=1e-9)


def test_least_f_is_below_the_base_and_leaves_its_model():
    problem = make("digits_conv_bn-100", 0, steps=20)
    found, model = train(problem, NESTEROV)
    before = squares(model.parameters()).item()
    assert least(problem, True, [model], 5) < found["curve"][-1]
    assert squares(model.parameters()).item() == before


# The table


def made_up(f, *, loss=1.0, validation=1.0, accuracy=0.9, curve=(9.0,)):
    result = {"f": f, "loss": loss, "validation_loss": validation, "validation_accuracy": accuracy}
    steps = 10 * len(curve or ())
    return {"result": result, "curve": curve and list(curve), "steps": steps, "seconds": 1.0}


def test_ratios_of_made_up_results():
    base = [made_up(1.0, curve=(2.0, 1.5, 1.0)), made_up(4.0, loss=2.0, curve=(5.0, 4.5, 4.0))]
    ours = [
        made_up(0.5, loss=0.5, validation=2.0, accuracy=0.92, curve=(1.0, 0.7, 0.5)),
        made_up(8.0, loss=16.0, validation=8.0, accuracy=0.93, curve=(9.0, 9.0, 8.0)),
    ]
    best = [made_up(0.25), made_up(4.0)]
    row = table.summarise(ours, base, best, floors=[0.25, 3.0])
    assert row["f"] == 4.25
    assert row["f_ratio"] == pytest.approx(1.0)  # sqrt(0.5 * 2)
    assert row["f_of_means"] == pytest.approx(4.25 / 2.5)
    assert row["f_worst"] == 2.0
    assert row["f_over_best"] == pytest.approx(2.0)  # sqrt(2 * 2)
    assert row["gap_ratio"] == pytest.approx(math.sqrt(5 / 3))  # 0.25 / 0.75, 5 / 1
    assert row["loss_ratio"] == pytest.approx(2.0)  # sqrt(0.5 * 8)
    assert row["validation_ratio"] == pytest.approx(4.0)  # sqrt(2 * 8)
    assert row["accuracy_points"] == pytest.approx(2.5)
    assert row["steps"] == math.inf  # 10 and never
    assert row["gap_worst"] == pytest.approx(5)
    assert row["gap_over_best"] == math.inf  # the best of seed 0 is the least f
    assert row["optimum"] == 1.625
    own = table.summarise(base, base)
    assert (own["f_ratio"], own["steps"], own["gap_ratio"], own["f_over_best"]) == (
        1.0, 30, None, None,
    )  # fmt: skip
    text = table.markdown([{"row": "ours", **row}, {"row": "base", **own}])
    assert "never" in text and "+2.50" in text and "gap / base" in text
    assert "gap / base" not in table.markdown([{"row": "base", **own}])


def test_what_diverged_is_told_from_what_did_not():
    lost, kept = made_up(math.inf), made_up(2.0)
    assert table.summarise([lost, kept], [kept, kept])["f_ratio"] == math.inf
    assert table.summarise([kept, kept], [lost, kept])["f_ratio"] == 0.0
    assert table.summarise([lost, kept], [lost, kept])["f_ratio"] == 1.0
    assert "∞" in table.markdown([{"row": "", **table.summarise([lost], [kept])}])


def test_best_base_is_the_one_with_the_lowest_mean():
    bases = [table.Recipe(base) for base in grid(NESTEROV)[:3]]
    results = [[1.0, 3.0], [0.1, math.inf], [1.5, 2.0]]
    runs = [[made_up(f) for f in some] for some in results]
    assert table.ordered(bases, runs) == [bases[2], bases[0], bases[1]]


def fake_training(monkeypatch):
    def fake(problem, base, config=None, *, observe, apart, curve):
        f = base.lr * (2.0 if base.momentum > 0.95 else 1.0) * (0.5 if config else 1.0)
        run = made_up(f * (0.8 if base.free else 1.0) + apart)
        low = made_up(0.75 * f)["result"]
        averages = {name: low if name == QUARTER else run["result"] for name in NAMES}
        return run | {"averages": averages if base.averaged else {}}, None

    monkeypatch.setattr("benchmarks.minibatch.results.train", fake)


def test_rows_of_a_case(monkeypatch):
    fake_training(monkeypatch)
    runs = Runs({"default": AndersonConfig()}, steps=None)
    case = Case("digits_mlp-500", Base("adam", 0.1, 0.97), "made up")
    rows = table.measure(case, runs, table.Plan(seeds=2, schedules="all"))
    assert [row["row"] for row in rows] == [
        "untuned: adam0.1m0.97",
        "untuned, 1e-05 apart",
        "untuned, default",
        "untuned, default at quarter",
        "best of 48: adam0.1m0.9 at quarter",
        "best of 48, 1e-05 apart",
        "best of 48, default",
        "last weights: adam0.1m0.9",
        "last weights, default",
        "average: adam0.1m0.9 at quarter",
        "Schedule-Free: adam0.1m0.9-free",
    ]
    over_base = {row["row"].split(":")[0]: row["f_ratio"] for row in rows}
    over_best = {row["row"].split(":")[0]: row["f_over_best"] for row in rows}
    assert over_base["best of 48"] == over_best["best of 48"] == 1
    assert over_best["untuned"] == pytest.approx(2 / 0.75)
    assert over_best["untuned, default at quarter"] == pytest.approx(1)
    assert over_best["last weights"] == pytest.approx(1 / 0.75)
    assert over_best["Schedule-Free"] == pytest.approx(0.8 / 0.75)
    assert (
        over_best["best of 48, default"] == over_base["last weights, default"] == pytest.approx(0.5)
    )
    assert over_base["untuned, 1e-05 apart"] == pytest.approx(1 + APART / 0.2)
    text = table.tuned({"made up": rows})
    cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert cells == [
        "made up", "adam0.1m0.9 at quarter", "48", "2.67", "1.33", "1.00", "1.07", "1.33", "0.67",
        "0.67", "", "", "1.00",
    ]  # fmt: skip
    assert runs.made == 2 * (48 + 2 + 2)  # the untuned base is one of the grid


def test_grid_is_screened_with_one_seed(monkeypatch):
    fake_training(monkeypatch)
    runs = Runs({}, steps=None)
    case = Case("digits_mlp-500", NESTEROV, "made up")
    whole = Runs({}, steps=None)
    rows = table.measure(case, runs, table.Plan(seeds=5, schedules="all", screen=4))
    assert rows == table.measure(case, whole, table.Plan(seeds=5, schedules="all"))
    assert whole.made == 5 * 48 + 5  # and the control: the untuned base is the best
    # All with seed 0. Then 4 at last weights, the best average of the same, and 4 Schedule-Free.
    assert runs.made == 48 + 4 * (4 + 4) + 5


def test_least_f_may_be_an_evaluation():
    rows = [[made_up(3.0, curve=(2.0, math.inf)), made_up(0.5, curve=None)], [made_up(1.0)] * 2]
    assert table.least_of_all([2.5, 0.1], rows) == [1.0, 0.1]


def test_least_f_belongs_to_data_and_network(monkeypatch, tmp_path):
    runs, found = Runs({}, steps=10), []
    monkeypatch.setattr(
        "benchmarks.minibatch.results.least", lambda problem, *_: found.append(problem.name) or 1.0
    )
    assert runs.floors("digits_mlp-500", NESTEROV, 2, 5) == [1.0, 1.0]
    assert runs.floors("digits_mlp-100", NESTEROV, 2, 5) == [1.0, 1.0]
    runs.write(tmp_path / "results.json", {})
    again = Runs({}, steps=10)
    again.take_bases(tmp_path / "results.json")
    assert again.floors("digits_mlp-32", NESTEROV, 2, 5) == [1.0, 1.0]
    assert found == ["digits_mlp-500"] * 2
    assert runs.floors("digits_mlp-100", Base("adamw", 1e-3), 2, 5) is None
    assert runs.floors("digits_mlp-100", NESTEROV, 2, 0) is None


# The command


def test_quick_run_and_its_file(tmp_path, capsys):
    words = ["digits_mlp-500-sgd0.5", "--quick", "--output", str(tmp_path)]
    assert minibatch.main([*words, "--configs", "default", "mixing=0,frequency=5"]) == 0
    assert "untuned, mixing=0,frequency=5" in capsys.readouterr().out
    content = json.loads((tmp_path / "results.json").read_text())
    assert len(content["runs"]) == 4 and list(content["tables"]) == [words[0]]
    assert content["tables"][words[0]][0]["f_ratio"] == 1
    assert f"## {words[0]}, 1 seeds" in (tmp_path / "table.md").read_text()
    assert minibatch.main([*words, "--configs", "--reuse"]) == 0
    assert "0 runs" in capsys.readouterr().out
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["runs"] == [run for run in content["runs"] if run["config"] == "base"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "no case named 'nothing'"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--screen", "-1"], "--screen is -1"),
        (["--configs", "mixing"], "must be like"),
        (["--configs", "mixing=-1"], "Invalid mixing"),
        (["--configs", "no_such=1"], "no_such"),
        (["--configs", "base"], "always there"),
    ],
)
def test_wrong_words(capsys, tmp_path, words, message):
    assert minibatch.main([*words, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_reused_file_must_be_ours(tmp_path, capsys):
    (tmp_path / "results.json").write_text("[]")
    words = ["digits_mlp-500-sgd0.5", "--quick", "--reuse", "--output", str(tmp_path)]
    assert minibatch.main(words) == 2
    assert "no results" in capsys.readouterr().err


def test_a_list_that_is_not_read_to_its_end():
    """As by `head`: what is left of it, also in Python's buffer, makes no error."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as out, contextlib.redirect_stdout(out):
        assert minibatch.main(["--list"]) == 0

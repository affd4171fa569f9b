"""Both layouts on any number of ranks are the textbook's Anderson acceleration, to rounding."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from problems import PLAIN, SEVERAL, TEXTBOOK, Group, Problem, counts
from reference import anderson

from aadl_hvd import AndersonConfig
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core.methods import residual as residual_method

RANKS = [1, 2, 3, 4]
STEPS = 20
MOMENTUM = (Group(((4, 3), (5,)), lr=0.05, momentum=0.8, weight_decay=0.01, nesterov=True),)

# Every case: groups, settings of AndersonConfig.
CASES = {
    "p = q = 1": (PLAIN, {"history_depth": 4, "frequency": 1}),
    "p > q": (PLAIN, {"history_depth": 4, "frequency": 3}),
    "p is a multiple of q": (PLAIN, {"history_depth": 3, "frequency": 4, "store_every": 2}),
    "p is no multiple of q": (PLAIN, {"history_depth": 3, "frequency": 3, "store_every": 2}),
    "p < q": (PLAIN, {"history_depth": 5, "frequency": 2, "store_every": 5}),
    "the ring turns over between two solves": (PLAIN, {"history_depth": 2, "frequency": 7}),
    "m = 1": (PLAIN, {"history_depth": 1, "frequency": 2}),
    "m is more than is ever stored": (
        PLAIN,
        {"history_depth": 19, "frequency": 4, "store_every": 2},
    ),
    "relaxation": (PLAIN, {"history_depth": 4, "frequency": 2, "relaxation": 0.3}),
    "mixing": (PLAIN, {"history_depth": 4, "frequency": 2, "mixing": 0.4}),
    "no residual term": (PLAIN, {"history_depth": 4, "frequency": 2, "mixing": 0.0}),
    "warm-up": (PLAIN, {"history_depth": 4, "frequency": 3, "warmup_steps": 5}),
    "groups": (SEVERAL, {"history_depth": 4, "frequency": 2, "relaxation": 0.7, "mixing": 0.6}),
    "groups, step": (SEVERAL, {"history_depth": 4, "frequency": 2, "residual": "step"}),
    "descent": (SEVERAL, {"history_depth": 6, "frequency": 2, "safeguard": "descent"}),
    "residual": (SEVERAL, {"history_depth": 3, "frequency": 2, "safeguard": "residual"}),
    "residual and momentum": (
        MOMENTUM,
        {"history_depth": 3, "frequency": 2, "safeguard": "residual"},
    ),
    "loss": (SEVERAL, {"history_depth": 3, "frequency": 2, "safeguard": "loss"}),
    "momentum": (MOMENTUM, {"history_depth": 4, "frequency": 3, "safeguard": "descent"}),
    "average": (
        PLAIN,
        {"history_depth": 4, "frequency": 3, "average_window": 3, "average_threshold": 0.5},
    ),
    "average and residual": (
        PLAIN,
        {
            "history_depth": 4,
            "frequency": 3,
            "average_window": 2,
            "average_threshold": 0.4,
            "safeguard": "residual",
        },
    ),
    "n < P": ((Group(((2,), ()), lr=0.2),), {"history_depth": 2, "frequency": 2}),
    "n = 1": ((Group(((),), lr=0.2),), {"history_depth": 1, "frequency": 2}),
}
# Noise as large as the gradient tests the algebra best, but leaves nothing to accept or reject.
NOISE = {"loss": 0.02, "momentum": 0.02}
# Cases in which something must happen, or nothing would be compared.
MUST_HAPPEN = {
    "descent": {"descent", "accelerated"},
    "residual": {"residual", "accelerated"},
    "residual and momentum": {"residual", "accelerated"},
    "loss": {"loss", "accelerated"},
    "average": {"averaged", "accelerated"},
    "average and residual": {"averaged", "residual", "accelerated"},
}


def settings(options, **more):
    return AndersonConfig(**(TEXTBOOK | {"safeguard": "none"} | options | more))


def textbook(problem, config, steps=STEPS):
    gradient = config.residual == "gradient"
    return anderson(
        problem.sgd,
        problem.start,
        steps,
        m=config.history_depth,
        p=config.frequency,
        q=config.store_every,
        beta=config.relaxation,
        mixing=config.mixing,
        warmup=config.warmup_steps,
        residual=problem.residual if gradient else None,
        scaling=problem.scaling if gradient else None,
        state=np.zeros(problem.n),
        safeguard=config.safeguard,
        window=config.average_window,
        threshold=config.average_threshold,
        loss=problem.loss,
    )


def on_ranks(problem, config, ranks, steps=STEPS, dtype=torch.float64, shard_groups=1):
    """Path and counts of every rank; with one rank as a user of AndersonOptimizer gets them."""

    def program(comm):
        opt = problem.optimizer(config, None if ranks == 1 else comm, dtype, shard_groups)
        path, opt = problem.run(config, steps, opt=opt)
        return path, counts(opt), opt.anderson

    results = run_ranks(ranks, program)
    for path, count, _ in results[1:]:
        assert np.array_equal(path, results[0][0]), "replicas differ"
        assert count == results[0][1]
    return results[0]


def distance(a, b):
    """Largest difference, relative to the largest number."""
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("name", CASES)
def test_layouts_are_the_textbook_s(name):
    groups, options = CASES[name]
    problem = Problem(groups, noise=NOISE.get(name, 1.0))
    expected = textbook(problem, settings(options))
    assert MUST_HAPPEN.get(name, {"accelerated"}) <= set(expected.counts)
    for layout in ("rows", "columns"):
        for ranks in RANKS:
            path, count, _ = on_ranks(problem, settings(options, layout=layout), ranks)
            assert distance(path, expected.path) < 1e-11, (layout, ranks)
            assert count == expected.counts, (layout, ranks)


@pytest.mark.parametrize("name", CASES)
def test_shard_groups_are_the_textbook_s(name):
    """Several whole histories, the sums over rows shared by all ranks; the same bits everywhere."""
    groups, options = CASES[name]
    problem = Problem(groups, noise=NOISE.get(name, 1.0))
    expected = textbook(problem, settings(options))
    for ranks, shard_groups in ((2, 2), (4, 2), (3, 3), (6, 2), (6, 3)):
        path, count, result = on_ranks(problem, settings(options), ranks, shard_groups=shard_groups)
        assert distance(path, expected.path) < 1e-11, (ranks, shard_groups)
        assert count == expected.counts, (ranks, shard_groups)
        rows = -(-problem.n * shard_groups // ranks)
        window = result.config.average_window or 0
        assert result.history_bytes <= 8 * rows * (2 * result.config.history_depth + 4 + window)


@pytest.mark.parametrize("name", ["p > q", "groups", "descent", "average", "n < P"])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_float32_to_its_rounding(name, layout):
    groups, options = CASES[name]
    problem = Problem(groups, noise=NOISE.get(name, 1.0))
    expected = textbook(problem, settings(options))
    for ranks in (1, 2, 3):
        config = settings(options, layout=layout)
        path, count, result = on_ranks(problem, config, ranks, dtype=torch.float32)
        assert distance(path, expected.path) < 2e-5
        assert count == expected.counts
        # Weights, differences and the last pair really are float32.
        numbers = problem.n / ranks if layout == "rows" else problem.n
        assert result.history_bytes <= 4 * (numbers + 1) * (
            2 * config.history_depth + 4 + (config.average_window or 0)
        )


MOMENTA = (
    Group(((4, 3), (5,)), lr=0.05, momentum=0.8, weight_decay=0.01, nesterov=True),
    Group(((3,),), lr=0.1, momentum=0.5),
    Group(((2, 2),), lr=0.2),  # no momentum: reads as zeros
)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["step", "gradient"])
def test_residual_is_what_it_is_called(kind):
    """Both residuals of one step of SGD with momentum, against formulas; any rows of them."""
    from aadl_hvd.optim.problem import OptimizerFixedPoint

    problem = Problem(MOMENTA)
    opt = torch.optim.SGD(
        [
            {
                "params": tensors,
                "lr": g.lr,
                "momentum": g.momentum,
                "weight_decay": g.weight_decay,
                "nesterov": g.nesterov,
            }
            for tensors, g in zip(problem.parameters(), problem.groups, strict=True)
        ]
    )
    view = OptimizerFixedPoint(opt, kind)
    view.base_step = opt.step
    w, v = problem.start, np.zeros(problem.n)
    for k in range(3):
        gradient = problem.gradient(k, w)
        problem.set_gradient(opt, gradient)
        hash(view.signature)
        flat, memory = torch.empty(2, view.n, dtype=torch.float64)
        before = view.read_before(0, view.n, flat, memory)
        view.advance()
        after, next_v = problem.sgd(k, w, v)
        if kind == "step":
            expected = after - w
        else:
            expected = -problem.scaling(k) * (gradient + problem.decays * w)
        for lo in range(0, view.n, 5):
            for hi in (lo, min(lo + 1, view.n), min(lo + 9, view.n), view.n):
                out = torch.full((hi - lo,), torch.nan, dtype=torch.float64)
                r = view.read_residual(lo, hi, before[lo:hi], out, view.decays)
                r = r * view.scaling(lo, hi)
                np.testing.assert_allclose(r, expected[lo:hi], rtol=1e-12, atol=1e-13)
        w, v = after, next_v


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_replicas_bitwise_equal_after_100_steps(layout, dtype):
    problem = Problem(SEVERAL, noise=0.1)
    config = AndersonConfig(**TEXTBOOK, layout=layout, average_window=4)
    splits = [(2, 1), (3, 1), (4, 1)] + [(2, 2), (4, 2), (4, 4)] * (layout == "rows")
    for ranks, shard_groups in splits:
        # on_ranks compares the bits of all weights of all steps.
        _, count, _ = on_ranks(problem, config, ranks, 100, dtype, shard_groups)
        assert count["accelerated"] > 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_narrow_history_is_close(dtype):
    """Columns rounded to fewer digits: near the textbook's path, in no more than their bytes."""
    problem = Problem(PLAIN)
    options = {"history_depth": 3, "frequency": 3}
    expected = textbook(problem, settings(options))
    wide = on_ranks(problem, settings(options), 2)[2].history_bytes
    near = {"bfloat16": 2e-2, "float32": 1e-6}[dtype]
    for layout in ("rows", "columns"):
        config = settings(options, layout=layout, history_dtype=dtype)
        path, count, result = on_ranks(problem, config, 2)
        assert near / 1e3 < distance(path, expected.path) < near
        assert count == expected.counts
        if layout == "rows":  # 12 rows: 2 m columns, and the last pair in float64 as ever
            saved = 2 * 3 * 12 * (8 - torch.finfo(getattr(torch, dtype)).bits // 8)
            assert result.history_bytes == wide - saved


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_reset_begins_anew(layout):
    """Pairs, Gram matrix and the window of the moving average are forgotten."""
    problem = Problem(PLAIN)
    options = {"average_window": 3, "average_threshold": 0.1, "history_depth": 3, "frequency": 3}
    config = settings(options, layout=layout)

    def program(comm):
        first, opt = problem.run(config, 9, comm)
        opt.anderson.reset()
        last, _ = problem.run(config, 9, opt=opt, first=9)
        return first[-1], last, opt.anderson.stats.resets["requested"]

    for start, path, resets in run_ranks(2, program):
        expected = anderson(
            lambda k, w, _: problem.sgd(k + 9, w, 0.0),
            start,
            9,
            m=3,
            p=3,
            window=3,
            threshold=0.1,
        )
        assert expected.counts["averaged"] > 0
        assert distance(path, expected.path) < 1e-11
        assert resets == 1


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_all_ranks_use_the_coefficients_of_one(layout, monkeypatch):
    """They are replicated, but processors may differ in their last bits: rank 0's count."""
    problem = Problem(PLAIN)
    config = settings({"history_depth": 4, "frequency": 2}, layout=layout)
    expected, _, result = on_ranks(problem, config, 3)
    here = threading.local()

    class Elsewhere(residual_method.Factorization):
        def solve(self, b):
            return super().solve(b) * (1 + 1e-12 * here.rank)

    monkeypatch.setattr(residual_method, "Factorization", Elsewhere)

    def program(comm):
        here.rank = comm.rank
        path, opt = problem.run(config, STEPS, comm)
        return path, opt.anderson.stats.promised_reduction

    for path, reduction in run_ranks(3, program):
        assert np.array_equal(path, expected)
        assert reduction == result.stats.promised_reduction


@pytest.mark.parametrize("maximize", [False, True])
def test_gradient_residual_is_the_step_of_plain_sgd(maximize):
    """Sign of the gradient and of weight decay: both kinds must give the same path.

    At one learning rate for all, or they measure r in different norms.
    """
    groups = tuple(dataclasses.replace(group, lr=0.2) for group in SEVERAL)
    paths = []
    for residual in ("gradient", "step"):
        problem = Problem(groups, noise=0.1)
        config = settings({"history_depth": 3, "frequency": 2, "residual": residual})
        opt = problem.optimizer(config)
        for group in opt.param_groups:
            group["maximize"] = maximize
        if maximize:
            descent = problem.gradient
            problem.gradient = lambda k, w, descent=descent: -descent(k, w)
        paths.append(problem.run(config, 12, opt=opt)[0])
        assert counts(opt)["accelerated"] == 6
    assert distance(*paths) < 1e-11

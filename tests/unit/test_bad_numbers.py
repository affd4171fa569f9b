"""NaN, Inf, zeros, repetitions, changing learning rates and parameters: counted and survived."""

import numpy as np
import pytest
import torch
from problems import SEVERAL, TEXTBOOK, Group, Problem, counts, flat, parameters_of
from reference import anderson

from aadl_hvd import AndersonConfig
from aadl_hvd.comm.simulated import run_ranks

P, M = 3, 4
SETTINGS = TEXTBOOK | {"history_depth": M, "frequency": P, "safeguard": "none"}
ON = [(1, "rows"), (3, "rows"), (3, "columns")]


def on_ranks(ranks, program):
    """program(comm or None) on all ranks; compares all that they return."""
    results = run_ranks(ranks, lambda comm: program(None if ranks == 1 else comm))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
    return results[0]


def resets(opt):
    return {name: count for name, count in opt.anderson.stats.resets.items() if count}


def write(opt, values):
    lo = 0
    with torch.no_grad():
        for p in parameters_of(opt):
            p.copy_(torch.from_numpy(values[lo : lo + p.numel()]).reshape(p.shape))
            lo += p.numel()


def textbook(problem, start, steps, first=0, **options):
    return anderson(
        lambda k, w, v: problem.sgd(k + first, w, v),
        start,
        steps,
        m=M,
        p=P,
        residual=lambda k, w: problem.residual(k + first, w),
        scaling=lambda k: problem.scaling(k + first),
        state=np.zeros(problem.n),
        **options,
    ).path


@pytest.mark.parametrize(("ranks", "layout"), ON)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["one gradient", "all gradients", "one weight"])
@pytest.mark.parametrize("at", [9, 10])  # the bad step is number at + 1 (9: not accelerated)
def test_bad_number_and_recovery(ranks, layout, bad, where, at):
    """Base step, history reset, counted; then as if training had begun there."""
    problem = Problem(SEVERAL)
    config = AndersonConfig(**SETTINGS, layout=layout)
    found = at + P - at % P if at % P else at + P  # number of the AA step that meets it

    def program(comm):
        path, opt = problem.run(config, at, comm)
        gradient = problem.gradient(at, path[-1])
        if where == "one weight":
            spoilt = path[-1].copy()
            spoilt[12] = bad  # without weight decay: w is bad and r is not
            write(opt, spoilt)
        elif where == "one gradient":
            gradient[problem.n - 2] = bad
        else:
            gradient[:] = bad
        problem.set_gradient(opt, gradient)
        opt.step()
        assert not np.isfinite(flat(opt)).all(), "the base step is the base optimizer's affair"
        write(opt, path[-1])  # what a training loop does about it
        before = counts(opt)
        rest, _ = problem.run(config, found - at - 1, opt=opt, first=at + 1)
        middle, reset = counts(opt), resets(opt)
        last, _ = problem.run(config, 12, opt=opt, first=found)
        return path, rest, last, before, middle, reset, counts(opt), resets(opt)

    path, rest, last, _, middle, reset, end, reset_end = on_ranks(ranks, program)
    np.testing.assert_allclose(path, textbook(problem, problem.start, at), rtol=1e-9)
    # Base steps alone until the attempt that meets the bad pair, that one included.
    w = path[-1]
    for k, found_w in enumerate(rest[1:], start=at + 1):
        w, _ = problem.sgd(k, w, 0.0)
        np.testing.assert_allclose(found_w, w, rtol=1e-9)
    accelerated = (at // P) - (0 if at >= P else at // P)
    assert middle["nonfinite"] == 1
    assert middle["accelerated"] == accelerated
    assert reset == {"nonfinite": 1} == reset_end
    np.testing.assert_allclose(
        last, textbook(problem, rest[-1], 12, first=found), rtol=1e-8, atol=1e-9
    )
    assert end["accelerated"] == accelerated + 12 // P
    assert end["nonfinite"] == 1


@pytest.mark.parametrize(("ranks", "layout"), ON)
def test_bad_number_in_the_accelerated_step_itself(ranks, layout):
    problem = Problem(SEVERAL)
    config = AndersonConfig(**SETTINGS, layout=layout)

    def program(comm):
        path, opt = problem.run(config, 8, comm)
        gradient = problem.gradient(8, path[-1])
        gradient[0] = np.nan
        problem.set_gradient(opt, gradient)
        opt.step()
        now = flat(opt)
        return np.nan_to_num(now), int(np.isnan(now).sum()), counts(opt), resets(opt), path

    now, bad, count, reset, path = on_ranks(ranks, program)
    base, _ = problem.sgd(8, path[-1], 0.0)
    assert bad == 1  # one coordinate alone: the combination of columns was not taken
    np.testing.assert_allclose(now[1:], base[1:])
    assert count["nonfinite"] == 1
    assert reset == {"nonfinite": 1}


def constant(value):
    return lambda k, w: np.full_like(w, value)


@pytest.mark.parametrize(("ranks", "layout"), ON)
@pytest.mark.parametrize("safeguard", ["none", "descent"])
@pytest.mark.parametrize("what", ["zero gradients", "equal residuals", "identical iterates"])
def test_nothing_to_solve(what, safeguard, ranks, layout):
    """Residuals that are zero or all equal: the base step stays; degenerate, at each attempt."""
    problem = Problem((Group(((4, 3), (5,)), lr=0.1),))
    problem.gradient = constant(0.0 if what == "zero gradients" else 0.5)
    config = AndersonConfig(**{**SETTINGS, "safeguard": safeguard}, layout=layout)

    def program(comm):
        opt = problem.optimizer(config, comm)
        path = [flat(opt)]
        for k in range(10):
            if what == "identical iterates":
                write(opt, problem.start)
            problem.run(config, 1, opt=opt, first=k)
            path.append(flat(opt))
        return np.array(path), counts(opt), resets(opt)

    path, count, reset = on_ranks(ranks, program)
    assert count == {"stored": 10, "degenerate": 3}
    assert reset == {}
    drift = {"zero gradients": 0.0, "identical iterates": 0.05}.get(what)
    for k in range(1, 11):
        moved = problem.start - path[k]
        np.testing.assert_allclose(moved, k * 0.05 if drift is None else drift, atol=1e-12)


def test_it_goes_on_after_zero_gradients():
    """As after frozen layers, or broadcast_optimizer_state of Horovod."""
    problem = Problem(SEVERAL, noise=0.0)
    config = AndersonConfig(**SETTINGS)
    true = problem.gradient
    problem.gradient = constant(0.0)
    _, opt = problem.run(config, 7)
    problem.gradient = true
    problem.run(config, 12, opt=opt, first=7)
    assert counts(opt)["accelerated"] >= 3
    assert np.isfinite(flat(opt)).all()


@pytest.mark.parametrize("residual", ["gradient", "step"])
@pytest.mark.parametrize(("ranks", "layout"), ON)
def test_learning_rate_changes(residual, ranks, layout):
    """Residuals stored at one rate stay true at another: as if R had been rescaled by hand."""
    problem = Problem(SEVERAL)
    config = AndersonConfig(**SETTINGS, residual=residual, layout=layout)

    def factor(k):
        return 1.0 if k < 7 else 0.25 if k < 13 else 0.6 + 0.02 * k

    largest = problem.rates.max()
    expected = anderson(
        lambda k, w, v: problem.sgd(k, w, v, factor),
        problem.start,
        20,
        m=M,
        p=P,
        residual=problem.residual if residual == "gradient" else None,
        scaling=(lambda k: problem.scaling(k, factor)) if residual == "gradient" else None,
        state=np.zeros(problem.n),
        rate=lambda k: factor(k) * largest,
    )

    def program(comm):
        path, opt = problem.run(config, 20, comm, factor=factor)
        return path, counts(opt), resets(opt)

    path, count, reset = on_ranks(ranks, program)
    np.testing.assert_allclose(path, expected.path, rtol=1e-8, atol=1e-10)
    assert count == expected.counts
    assert reset == {}


@pytest.mark.parametrize("residual", ["gradient", "step"])
@pytest.mark.parametrize("safeguard", ["none", "descent", "residual"])
@pytest.mark.parametrize("steps", [1, 4])
def test_learning_rate_zero(residual, safeguard, steps):
    """Weights stay, nothing is stored, the history survives; an attempt is a degenerate one."""
    problem = Problem(SEVERAL, noise=0.0)
    config = AndersonConfig(**{**SETTINGS, "safeguard": safeguard}, residual=residual)
    _, opt = problem.run(config, 8)
    stored, columns = opt.anderson.stats.stored, opt.anderson.columns
    path, _ = problem.run(config, steps, opt=opt, first=8, factor=lambda k: 0.0)
    assert np.array_equal(path[-1], path[0]), "moved at learning rate 0"
    assert (opt.anderson.stats.stored, opt.anderson.columns) == (stored, columns)
    attempts = (8 + steps) // P - 8 // P
    assert counts(opt).get("degenerate", 0) == attempts
    path, _ = problem.run(config, 9, opt=opt, first=8 + steps, factor=lambda k: 1.0)
    assert np.isfinite(path).all()
    assert resets(opt) == {}
    assert opt.anderson.stats.stored > stored


@pytest.mark.parametrize("groups", [SEVERAL, SEVERAL[:1]], ids=["several", "one"])
def test_warm_up_from_learning_rate_zero(groups):
    """The usual LambdaLR: the first step has rate 0, and is no reason to reset."""
    problem = Problem(groups, noise=0.0)
    opt = problem.optimizer(AndersonConfig(**TEXTBOOK, frequency=3))
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: min(1.0, k / 6))
    for k in range(15):
        problem.set_gradient(opt, problem.gradient(k, flat(opt)))
        opt.step()
        schedule.step()
        assert np.array_equal(flat(opt), problem.start) == (k == 0)
    assert resets(opt) == {}
    assert counts(opt) == {"stored": 14, "accelerated": 5}


def test_ratio_of_learning_rates_changes():
    """What r = G(w) - w measured with other ratios is worth nothing any more."""
    problem = Problem(SEVERAL)
    config = AndersonConfig(**SETTINGS, residual="step")
    path, opt = problem.run(config, 9)
    assert opt.anderson.columns == M
    opt.param_groups[1]["lr"] *= 0.5
    problem.groups = tuple(
        Group(g.shapes, group["lr"], g.weight_decay)
        for g, group in zip(problem.groups, opt.param_groups, strict=True)
    )
    problem.rates = problem._per_number("lr")
    last, _ = problem.run(config, 9, opt=opt, first=9)
    assert resets(opt) == {"changed": 1}
    largest = problem.rates.max()
    expected = anderson(
        lambda k, w, v: problem.sgd(k + 9, w, v),
        path[-1],
        9,
        m=M,
        p=P,
        rate=lambda k: largest,
        state=np.zeros(problem.n),
    )
    np.testing.assert_allclose(last, expected.path, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("ranks", "layout"), ON)
def test_ratio_of_learning_rates_changes_in_every_step(ranks, layout):
    """Gradients do not depend on it: no reset, and M is that of the step."""
    problem = Problem(SEVERAL)
    config = AndersonConfig(**SETTINGS, layout=layout)
    owner = np.repeat(np.arange(3), [g.n for g in SEVERAL])

    def factors(k):
        return np.array([1.0 + 0.1 * k, 0.9**k, 1.0 + 0.5 * np.sin(k)])

    expected = anderson(
        lambda k, w, v: problem.sgd(k, w, v, lambda k: factors(k)[owner]),
        problem.start,
        20,
        m=M,
        p=P,
        residual=problem.residual,
        scaling=lambda k: problem.scaling(k, lambda k: factors(k)[owner]),
        state=np.zeros(problem.n),
    )

    def program(comm):
        opt = problem.optimizer(config, comm)
        path = [flat(opt)]
        for k in range(20):
            for group, settings, factor in zip(opt.param_groups, SEVERAL, factors(k), strict=True):
                group["lr"] = settings.lr * factor
            path.append(problem.run(config, 1, opt=opt, first=k)[0][-1])
        return np.array(path), counts(opt), resets(opt)

    path, count, reset = on_ranks(ranks, program)
    np.testing.assert_allclose(path, expected.path, rtol=1e-8, atol=1e-10)
    assert count == expected.counts
    assert reset == {}


def test_a_schedule_s_last_bit_is_no_change():
    problem = Problem(SEVERAL)
    config = AndersonConfig(**SETTINGS, residual="step")
    _, opt = problem.run(config, 6)
    for k in range(6, 20):
        for group in opt.param_groups:
            group["lr"] *= 0.1 / 0.3 * (1 + 1e-15 * k)
        problem.run(config, 1, opt=opt, first=k)
    assert resets(opt) == {}


@pytest.mark.parametrize(("ranks", "layout"), ON)
def test_frozen_parameter_thaws(ranks, layout):
    """Left alone while frozen; then n changes, and the history begins anew with all of them."""
    problem = Problem(SEVERAL)
    config = AndersonConfig(**SETTINGS, layout=layout)
    frozen = slice(5, 11)  # the second tensor, (2, 3)

    def program(comm):
        opt = problem.optimizer(config, comm)
        p = parameters_of(opt)[1]
        p.requires_grad_(False)
        path = [flat(opt)]
        for k in range(9):
            problem.set_gradient(opt, problem.gradient(k, flat(opt)))
            p.grad = None
            opt.step()
            path.append(flat(opt))
        small = opt.anderson.history_bytes
        p.requires_grad_(True)
        last, _ = problem.run(config, 9, opt=opt, first=9)
        grown = opt.anderson.history_bytes > small
        return np.array(path), last, counts(opt), resets(opt), grown

    path, last, count, reset, grown = on_ranks(ranks, program)
    assert (path[:, frozen] == problem.start[frozen]).all()
    free = np.delete(np.arange(problem.n), np.arange(problem.n)[frozen])

    def step(k, w, v):
        whole = problem.start.copy()
        whole[free] = w
        return problem.sgd(k, whole, 0.0)[0][free], v

    def residual(k, w):
        whole = problem.start.copy()
        whole[free] = w
        return problem.residual(k, whole)[free]

    expected = anderson(
        step,
        problem.start[free],
        9,
        m=M,
        p=P,
        residual=residual,
        scaling=lambda k: problem.scaling(k)[free],
    ).path
    np.testing.assert_allclose(path[:, free], expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(last, textbook(problem, path[-1], 9, first=9), rtol=1e-8, atol=1e-10)
    assert reset == {"changed": 1}
    assert count["stored"] == 18
    assert grown


@pytest.mark.parametrize("safeguard", ["none", "descent", "residual", "loss"])
@pytest.mark.parametrize("events", ["clean", "nan", "zero", "reset"])
def test_every_acceleration_step_is_counted_once(safeguard, events):
    """An acceleration step: one with k mod p = 0 and a difference in the history."""
    problem = Problem(SEVERAL, noise=0.3)
    config = AndersonConfig(**{**SETTINGS, "safeguard": safeguard})
    opt = problem.optimizer(config)
    stats, true = opt.anderson.stats, problem.gradient
    attempts = pairs = 0  # pairs stored since the last reset
    for k in range(1, 41):
        bad = {"nan": np.nan, "zero": 0.0}.get(events)
        problem.gradient = true if bad is None or k % 7 else constant(bad)
        if events == "reset" and k % 10 == 0:
            opt.anderson.reset()
            pairs = 0
        weights = flat(opt)
        stored, went_back = stats.stored, stats.rejected["residual"]
        forgot = stats.resets["nonfinite"]
        problem.run(config, 1, opt=opt, first=k - 1)
        went_back = stats.rejected["residual"] > went_back
        assert stats.stored - stored == (0 if went_back else 1)
        # The step's own pair comes first, so one from before is enough.
        attempts += k % P == 0 and not went_back and pairs >= 1
        pairs = 0 if stats.resets["nonfinite"] > forgot else pairs + (not went_back)
        if not np.isfinite(flat(opt)).all():
            write(opt, weights)
    assert stats.steps == 40
    direct = sum(n for cause, n in stats.rejected.items() if cause != "residual")
    assert stats.accelerated + direct == attempts
    assert stats.rejected["residual"] <= stats.accelerated
    assert (stats.rejected["residual"] == 0) == (safeguard != "residual")
    if events == "reset":
        assert resets(opt) == {"requested": 4}
    if events == "nan":
        assert stats.rejected["nonfinite"] == stats.resets["nonfinite"] > 0
    text = str(stats)
    assert f"{stats.accelerated} accelerated" in text
    assert all(f"{cause} {n}" in text for cause, n in stats.rejected.items() if n)


def test_counters_go_through_a_checkpoint():
    from aadl_hvd.stats import Stats

    problem = Problem(SEVERAL)
    _, opt = problem.run(AndersonConfig(), 20)
    opt.anderson.reset()
    copy = Stats()
    copy.load_counters(opt.anderson.stats.counters())
    assert copy.counters() == opt.anderson.stats.counters()
    assert copy.resets["requested"] == 1


def test_nothing_else_is_touched():
    """TF32 settings, autocast and grad mode of the training loop are as they were."""
    problem = Problem(SEVERAL)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            path, _ = problem.run(AndersonConfig(**SETTINGS), 12, dtype=torch.float32)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.is_grad_enabled()
    finally:
        torch.set_float32_matmul_precision("highest")
    expected = textbook(problem, problem.start, 12)
    assert np.abs(path - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_averages_do_not_begin_with_a_bad_weight(ranks, bad):
    """In the first step that they see, where there is nothing yet to compare it with."""
    problem = Problem(SEVERAL)
    config = AndersonConfig(**SETTINGS | {"averages": (0.9, 0.6)})

    def program(comm):
        path, opt = problem.run(config, P - 1, comm)
        spoilt = path[-1].copy()
        spoilt[12] = bad  # without weight decay: w is bad and r is not
        write(opt, spoilt)
        problem.set_gradient(opt, problem.gradient(P - 1, path[-1]))
        opt.step()
        write(opt, path[-1])
        problem.run(config, 12, opt=opt, first=P)
        means = []
        for kind in config.averages:
            with opt.averaged_weights(which=kind) as chosen:
                assert chosen == kind
                means.append(flat(opt))
        return tuple(means)

    for mean in on_ranks(ranks, program):
        assert np.isfinite(mean).all()


def test_losses_that_overflow():
    """A diverging run: it ends as the base optimizer's would, not by an error of our own."""
    problem = Problem(SEVERAL)
    opt = problem.optimizer(AndersonConfig(**SETTINGS))
    for k in range(20):
        problem.set_gradient(opt, problem.gradient(k, flat(opt)))
        opt.observe((-1.0) ** k * 10.0 ** (15 * k))
        opt.step()
    assert counts(opt)["accelerated"] > 0

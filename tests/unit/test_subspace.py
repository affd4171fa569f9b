"""The subspace method against its plain function, closed forms, and the truth of a quadratic."""

import functools
import io
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import PLAIN, Group, Problem, flat
from torch.utils._python_dispatch import TorchDispatchMode

from aadl_hvd import AndersonConfig
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core.blocks import Blocks
from aadl_hvd.core.curvature import find_jump
from aadl_hvd.core.methods.reference import subspace
from aadl_hvd.core.sharding import Sharding

SUBSPACE = AndersonConfig(method="subspace", averages=())
SLOW = (Group(shapes=((3, 4), (4,), (2, 1, 3), ()), lr=0.02),)
MOMENTUM = (Group(shapes=((3, 4), (4,), (2, 1, 3), ()), lr=0.01, momentum=0.9, nesterov=True),)
GROUPS = (
    Group(shapes=((5,), (2, 3)), lr=0.01, weight_decay=0.02, momentum=0.5),
    Group(shapes=((4, 2),), lr=0.02),
    Group(shapes=((1,), (3,)), lr=0.0, weight_decay=0.1),
)
PROBLEMS = {"one rate": SLOW, "momentum": MOMENTUM, "groups, one at rest": GROUPS}


class Watched:
    """A run of the method on one rank, with the iterates and gradients that it has seen."""

    def __init__(self, problem, steps, comm=None, observe=True, config=SUBSPACE, groups=1):
        self.problem, self.opt = problem, problem.optimizer(config, comm, shard_groups=groups)
        self.w, self.g, self.loss_g, self.ends, self.jumps = [], [], [], [], []
        v = np.zeros(problem.n)
        for k in range(steps):
            w = flat(self.opt)
            problem.set_gradient(self.opt, problem.gradient(k, w))
            if observe:
                self.opt.observe(100.0)  # noise is a small share of it: phi lets all through
            before = self.opt.anderson.stats.jumps
            base, v = problem.sgd(k, w, v)
            self.opt.step()
            self.w.append(w)
            self.g.append(-problem.residual(k, w) * (problem.rates > 0.0))
            self.loss_g.append(problem.gradient(k, w) * (problem.rates > 0.0))
            if self.opt.anderson.stats.jumps > before:
                self.ends.append(k + 1)
                self.jumps.append(flat(self.opt) - base)

    def block(self, end, length):
        """Mean iterate, mean gradient and noise of the `length` steps up to `end`."""
        w, g = np.array(self.w[end - length : end]), np.array(self.g[end - length : end])
        noisy = np.array(self.loss_g[end - length : end])  # weight decay has no noise
        half = 0.5 * (noisy[::2].mean(axis=0) - noisy[1::2].mean(axis=0))
        means = w.mean(axis=0), g.mean(axis=0), half
        return tuple(map(torch.from_numpy, means))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", list(PROBLEMS))
def test_jumps_are_those_of_the_plain_function(name, size):
    """All vectors in blocks of rows on `size` ranks, against dense float64."""
    problem = Problem(PROBLEMS[name], noise=0.02)
    program = functools.partial(Watched, problem, 200)
    runs = run_ranks(size, program)
    assert all(np.array_equal(run.w, runs[0].w) for run in runs), "replicas differ"
    run, mu = runs[0], max(group.momentum for group in problem.groups)
    assert len(run.jumps) > 5
    full = 0
    scaling = torch.from_numpy(np.where(problem.rates > 0.0, problem.scaling(0), 1.0))
    for end, jump in zip(run.ends, run.jumps, strict=True):
        blocks = [run.block(last, 10) for last in range(10, end + 1, 10)][-11:]
        expected = subspace(blocks, scaling, 10, mu).numpy()
        assert not expected[problem.rates == 0.0].any()
        # Trust may have been lowered: by a power of 4, raised by powers of 2.
        share = jump @ expected / (expected @ expected)
        assert 0.0 < share < 1.0 + 1e-6
        np.testing.assert_allclose(jump, share * expected, atol=1e-7 * np.abs(expected).max())
        full += share > 1.0 - 1e-6
    assert full > 3, "hardly a jump was made at full trust"


def test_node_groups_jump_alike():
    """Two groups of two ranks, each with all rows, against one rank."""
    problem = Problem(SLOW, noise=0.02)
    alone = Watched(problem, 120)
    runs = run_ranks(4, lambda comm: Watched(problem, 120, comm, groups=2))
    assert all(np.array_equal(run.w, runs[0].w) for run in runs)
    assert runs[0].ends == alone.ends
    np.testing.assert_allclose(runs[0].w, alone.w, atol=1e-9)


def random_span(n, k, seed, noise):
    """dW, the Hessian, the noise of three blocks: a random quadratic with gradient noise."""
    random = np.random.default_rng(seed)
    hessian = np.diag(np.geomspace(0.05, 5.0, n))
    w = random.standard_normal((n, k))
    return w, hessian, noise * random.standard_normal((n, 3)), random


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.integers(0, 10**6), st.floats(0.1, 10.0))
def test_without_noise_the_curvature_is_the_projected_hessian(k, seed, mean):
    """Then the jump is half a Newton step in the span, less L steps of the base: a closed form."""
    n, steps, prior = 12, 10, 10.0
    w, hessian, _, random = random_span(n, k, seed, 0.0)
    gradient = mean * random.standard_normal(n)
    noise = 1e-12 * np.ones((k, 3))
    slow = 1e-3 * hessian  # the base optimizer is slow everywhere, M = 1
    found = find_jump(w.T @ w, w.T @ slow @ w, w.T @ gradient, noise, steps, prior, np.inf)
    basis = np.linalg.qr(w)[0]
    h, axes = np.linalg.eigh(basis.T @ slow @ basis)
    c = axes.T @ basis.T @ gradient
    factor = np.clip(0.5 / h - steps, 0.0, 19.0 * steps)
    expected = -basis @ axes @ (factor * c)
    np.testing.assert_allclose(w @ found.coefficients, expected, rtol=1e-5, atol=1e-8)
    d = w @ found.coefficients
    assert found.slope == pytest.approx(d @ gradient, rel=1e-6)
    assert found.gain == pytest.approx(-d @ gradient - 0.5 * d @ slow @ d, rel=1e-5)
    assert found.gain >= 0.0


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 6), st.integers(0, 10**6), st.sampled_from([1e-6, 1e-3, 1e3, 1e6]))
def test_the_jump_does_not_depend_on_the_scale_of_the_loss(k, seed, scale):
    """Loss times c, rate over c: gradients and curvature times c, M over c; the same jump."""
    w, hessian, deviations, random = random_span(12, k, seed, 0.01)
    gradient = random.standard_normal(12)
    arguments = w.T @ w, w.T @ hessian @ w, w.T @ gradient, w.T @ deviations
    a, b, g, d = arguments
    one = find_jump(a, 1e-3 * b, g, d, 10, 10.0, 0.5)
    other = find_jump(scale * a, scale * 1e-3 * b, scale * g, scale * d, 10, 10.0, 0.5)
    np.testing.assert_allclose(other.coefficients, one.coefficients, rtol=1e-6, atol=1e-12)


def test_noise_shrinks_the_curvature_to_the_prior():
    """In pure noise the prior is all there is, and at the prior the base needs no help."""
    w, hessian, deviations, random = random_span(50, 5, 1, 1e6)
    gradient = random.standard_normal(50)
    found = find_jump(
        w.T @ w, w.T @ (1e-3 * hessian) @ w, w.T @ gradient, w.T @ deviations, 10, 10.0, 0.5
    )
    assert not found.coefficients.any()


def test_the_promised_gain_is_right_in_the_mean_under_known_noise():
    """Curvature from noisy gradients: the jump's true gain, against the one that is promised."""
    n, k, sigma = 40, 4, 5e-6
    random = np.random.default_rng(3)
    hessian = 1e-3 * np.diag(np.geomspace(0.5, 5.0, n))
    w = random.standard_normal((n, k)) * np.array([0.1, 0.3, 1.0, 3.0])
    gradient = hessian @ (w @ np.ones(k))
    ratios = []
    for _ in range(200):
        dg = hessian @ w + np.diff(sigma * random.standard_normal((n, k + 1)), axis=1)
        deviations = sigma * random.standard_normal((n, 3))
        found = find_jump(w.T @ w, w.T @ dg, w.T @ gradient, w.T @ deviations, 10, 10.0, np.inf)
        d = w @ found.coefficients
        ratios.append((-d @ gradient - 0.5 * d @ hessian @ d) / found.gain)
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.05)
    assert min(ratios) > 0.5


@pytest.mark.parametrize("observe", [True, False])
def test_a_quadratic_with_noise_gets_nearer_than_the_base(observe):
    """Slow directions and a little noise; without observe, psi is the gate."""
    problem = Problem(SLOW, noise=0.003, condition=30.0)
    base = Watched(problem, 400, config=AndersonConfig(enabled=False))
    ours = Watched(problem, 400, observe=observe)
    solution = np.linalg.solve(problem.A, problem.b + problem.noise.mean(axis=0))

    def excess(run):
        e = np.mean(run.w[-20:], axis=0) - solution
        return e @ problem.A @ e

    assert ours.opt.anderson.stats.jumps > 10
    assert excess(ours) < 0.2 * excess(base)


def test_at_the_noise_floor_nothing_is_done():
    """The block means go nowhere under noise, no loss is observed: psi shuts, the method sleeps."""
    problem = Problem(PLAIN, noise=3.0)
    base = Watched(problem, 400, config=AndersonConfig(enabled=False))
    ours = Watched(problem, 400, observe=False)
    stats = ours.opt.anderson.stats
    assert stats.jumps == 0
    assert stats.walk > 1.5
    assert stats.asleep
    assert 14 <= stats.rejected["noise"] <= 20  # 16 blocks, then one in 16
    assert np.array_equal(ours.w, base.w)


@pytest.mark.parametrize("look", ["state_dict", "averaged_weights"])
def test_a_look_while_parameters_are_frozen(look):
    """Frozen and trained again between two steps of a block, with a look at the rest in between."""

    def run(frozen):
        problem = Problem(SLOW, noise=0.02)
        opt = problem.optimizer(AndersonConfig(method="subspace", averages=(0.9,)))
        first = opt.param_groups[0]["params"][0]
        for k in range(90):
            problem.set_gradient(opt, problem.gradient(k, flat(opt)))
            opt.step()
            if frozen and k == 45:
                first.requires_grad_(False)
                if look == "state_dict":
                    opt.state_dict()
                else:
                    with opt.averaged_weights():
                        pass
                first.requires_grad_(True)
        return flat(opt), opt.anderson.stats

    (w, stats), (expected, others) = run(True), run(False)
    assert np.array_equal(w, expected)
    assert stats.resets == others.resets and stats.jumps == others.jumps > 3


def test_weight_decay_may_change_in_every_step():
    """The jump is that of the decay at the block's end; nothing is reset."""
    problem = Problem(SLOW, noise=0.02)
    opt = problem.optimizer(SUBSPACE)
    w, g, jumps = [], [], 0
    for k in range(120):
        decay = 1e-3 * (1.0 + np.sin(0.1 * k))
        opt.param_groups[0]["weight_decay"] = decay
        w.append(flat(opt))
        g.append(problem.gradient(k, w[-1]))
        problem.set_gradient(opt, g[-1])
        before = opt.anderson.stats.jumps
        opt.step()
        if opt.anderson.stats.jumps == before:
            continue
        jumps += 1
        blocks = []
        for last in range(10, k + 2, 10):
            part, mean = np.array(g[last - 10 : last]), np.mean(w[last - 10 : last], axis=0)
            half = 0.5 * (part[::2].mean(axis=0) - part[1::2].mean(axis=0))
            blocks.append((mean, part.mean(axis=0) + decay * mean, half))
        blocks = [tuple(map(torch.from_numpy, block)) for block in blocks[-11:]]
        expected = subspace(blocks, problem.scaling(0)[0], 10, 0.0, farthest=0.3).numpy()
        base = w[-1] - problem.rates * (g[-1] + decay * w[-1])
        jump = flat(opt) - base
        share = jump @ expected / (expected @ expected)
        assert 0.0 < share < 1.0 + 1e-6
        np.testing.assert_allclose(jump, share * expected, atol=1e-7 * np.abs(expected).max())
    assert jumps > 5
    assert not any(opt.anderson.stats.resets.values())


def test_torch_reads_the_state_without_more_types():
    """Plain torch.save and torch.load: no NumPy number may be in it."""
    opt = Watched(Problem(SLOW, noise=0.02), 45).opt
    state = opt.state_dict() | opt.sharded_state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    found = torch.load(file)["anderson"]
    assert found["measured"]["walk"] == opt.anderson.stats.walk
    assert found["history"]["subspace"]["trust"]["psi"] is not None


def test_a_jump_that_the_closure_rejects_was_none():
    """safeguard="loss": trust falls, and no jump is counted."""
    problem = Problem(SLOW, noise=0.0)
    opt = problem.optimizer(AndersonConfig(method="subspace", averages=(), safeguard="loss"))
    losses = itertools.count()
    for k in range(60):

        def closure(k=k):
            problem.set_gradient(opt, problem.gradient(k, flat(opt)))
            return float(next(losses))  # it rises, whatever is done

        opt.step(closure)
    stats = opt.anderson.stats
    assert stats.rejected["loss"] > 2
    assert stats.jumps == stats.accelerated == 0
    assert stats.promised_gain == pytest.approx(0.0, abs=1e-12)


def test_far_apart_block_means_do_not_open_psi():
    """Asleep means lie 16 blocks apart: a random walk still scores about 1, and not 1/16."""
    random = np.random.default_rng(0)
    shares = []
    for gap in (1, 16):
        p = torch.nn.Parameter(torch.zeros(200, dtype=torch.float64))
        blocks = Blocks(Sharding("rows", 200, 10, 1, 0), p.dtype, p.dtype, p.device)
        blocks.staging_buffer()
        w, found = np.zeros(200), []
        for _ in range(40):
            for step in range(10 * gap):
                g = random.standard_normal(200)
                if step >= 10 * (gap - 1):
                    blocks.note(torch.from_numpy(w.copy()), torch.from_numpy(-g))
                w = w - g
            numbers = blocks.finish(0.0, gap)
            k = blocks.columns
            if k > 2:
                unjudged = torch.zeros(1, dtype=torch.float64)
                sums = blocks.end_block(numbers, lambda zero=unjudged: zero, 1.0, 0.0)
                table, (metric, *_) = blocks.arrange(sums[3:].numpy())
                found.append(blocks.elapsed * 100 * metric / table[:, :k].sum())
            blocks.drop_block()
        shares.append(np.mean(found))
    assert shares[0] == pytest.approx(1.0, abs=0.4)
    assert shares[1] == pytest.approx(1.0, abs=0.4)


def test_a_nan_of_before_a_reset_does_not_come_back():
    """A slot for a noise that was NaN is not used again before the third block."""
    blocks = Blocks(
        Sharding("rows", 6, 10, 1, 0), torch.float32, torch.float32, torch.device("cpu")
    )
    unjudged = torch.zeros(1, dtype=torch.float64)

    def block(g):
        for _ in range(10):
            w, r = blocks.staging_buffer()
            blocks.note(w.normal_(), r.copy_(g + 0.1 * torch.randn(6)))
        sums = blocks.end_block(blocks.finish(0.0), lambda: unjudged, 0.1, 0.0)
        table, squares = blocks.arrange(sums[3:].numpy())
        blocks.drop_block()
        return np.isfinite(table).all() and np.isfinite(squares).all()

    torch.manual_seed(0)
    assert [block(g) for g in (1.0, 1.0, float("nan"))] == [True, True, False]
    blocks.clear()
    assert all(block(1.0) for _ in range(4))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_backup_takes_what_the_history_takes(dtype):
    problem = Problem(PLAIN)
    opt = problem.optimizer(AndersonConfig(method="subspace", history_dtype=dtype, averages=()))
    for k in range(25):
        problem.set_gradient(opt, problem.gradient(k, flat(opt)))
        opt.step()
    copied = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and not function.is_view:
                copied.append(found.numel() * found.element_size())
            return found

    with Copies():
        opt.anderson.backup()
    n = sum(map(int, opt.anderson_engine.problem.sizes))
    assert opt.anderson.history_bytes <= sum(copied) <= opt.anderson.history_bytes + 8 * n + 1000


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_gains_of_averages_count_weight_decay(decay):
    """By the trapezoidal rule they are exact on a quadratic, its decay included."""
    group = Group(shapes=((3, 4), (7,)), lr=0.05, weight_decay=decay)
    problem = Problem((group,), noise=0.0)
    opt = problem.optimizer(AndersonConfig(method="subspace", averages=(0.9,), frequency=1))
    for k in range(10):  # one block
        w, mean = flat(opt), None
        if opt.anderson._averages.count:
            mean = opt.anderson._averages.mean(0.9).numpy().copy()
        problem.set_gradient(opt, problem.gradient(k, w))
        opt.step()

    def f(x):
        return problem.loss(0, x) + 0.5 * decay * x @ x

    # At the block's end the average has taken the step's own iterate in.
    mean = opt.anderson._averages.mean(0.9).numpy()
    assert opt.anderson.average_gains[0.9] == pytest.approx(f(w) - f(mean), rel=1e-9)

"""What theory promises of Anderson acceleration, of the library as its users have it (P = 1)."""

import numpy as np
import pytest
import torch
from problems import PLAIN, SEVERAL, TEXTBOOK, Group, Problem, counts, flat
from reference import anderson, krylov_minimal_residual

from aadl_hvd import AndersonConfig


def linear(n, seed=0, symmetric=True):
    """w <- w - (A w - b), A with eigenvalues in the right half-plane, no noise."""
    problem = Problem((Group(((n,),), lr=1.0),), noise=0.0, seed=seed)
    if not symmetric:
        random = np.random.default_rng(seed + 1)
        skew = random.standard_normal((n, n)) / n
        problem.A = problem.A + skew - skew.T
    return problem


FULL = TEXTBOOK | {"frequency": 1, "store_every": 1, "history_depth": 30, "safeguard": "none"}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("residual", ["step", "gradient"])
def test_full_depth_is_gmres(seed, symmetric, residual):
    """Walker and Ni 2011, Theorem 2.2: x_(k+1) of AA is G of x_k of GMRES.

    Steps here count base steps: path[k] is what k calls of step() have led to; the first of them
    is plain (x_1 = G(x_0)), as in the theorem.
    """
    n, steps = 12, 9
    problem = linear(n, seed, symmetric)
    path, opt = problem.run(AndersonConfig(**FULL, residual=residual), steps + 1)
    gmres = krylov_minimal_residual(problem.A, problem.b, problem.start, steps)
    images = gmres - (gmres @ problem.A.T - problem.b)
    # The Gram matrix of R is ill conditioned near convergence: from 1e-16 to 1e-10 in nine steps.
    for k in range(steps + 1):
        size = np.abs(images[k]).max()
        assert np.abs(path[k + 1] - images[k]).max() < 1e-8 * size, k
    assert counts(opt)["accelerated"] == steps


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("symmetric", [True, False])
def test_n_plus_one_steps_solve_an_affine_map(n, symmetric):
    """w_(n+1) = w*: step 1 is plain, step k + 1 uses k differences, n of them span everything."""
    problem = linear(n, seed=4, symmetric=symmetric)
    solution = np.linalg.solve(problem.A, problem.b)
    path, _ = problem.run(AndersonConfig(**FULL), n + 1)
    error = np.linalg.norm(path - solution, axis=1) / np.linalg.norm(solution)
    assert error[n + 1] < 1e-9
    assert error[n] > 1e-4, "n steps are not enough, or the test shows nothing"


def test_a_quadratic_is_solved_by_the_default():
    problem = Problem(PLAIN, noise=0.0)
    solution = np.linalg.solve(problem.A, problem.b)
    path, opt = problem.run(AndersonConfig(), 60)
    plain = problem.start
    for k in range(60):
        plain, _ = problem.sgd(k, plain, 0.0)
    assert np.linalg.norm(path[-1] - solution) < 1e-3 * np.linalg.norm(plain - solution)
    assert counts(opt)["accelerated"] > 10


SCALES = [1e-5, 1e5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("units", ["objective", "weights"])
@pytest.mark.parametrize("residual", ["gradient", "step"])
def test_scale_does_not_matter(units, scale, ridge, dtype, residual):
    """Loss times s and lr divided by s; or weights in other units, lr times their square."""
    groups = (Group(((3, 4),), lr=0.3), Group(((5,),), lr=0.2))
    base = Problem(groups, noise=0.5)
    factor = 1 / scale if units == "objective" else scale**2
    scaled = Problem(tuple(Group(g.shapes, g.lr * factor) for g in groups), noise=0.5)
    slope = scale if units == "objective" else 1 / scale
    # With w = s u the gradient in u-units: A / s^2, b / s; start s u.
    curvature = scale if units == "objective" else 1 / scale**2
    scaled.A, scaled.b, scaled.noise = base.A * curvature, base.b * slope, base.noise * slope
    unit = 1.0 if units == "objective" else scale
    scaled.start = base.start * unit
    config = AndersonConfig(
        **TEXTBOOK,
        history_depth=4,
        frequency=2,
        regularization=ridge,
        residual=residual,
        safeguard="descent",
    )
    expected, first = base.run(config, 16, dtype=dtype)
    found, second = scaled.run(config, 16, dtype=dtype)
    near = 1e-10 if dtype == torch.float64 else 1e-4
    assert np.abs(found / unit - expected).max() < near * np.abs(expected).max()
    assert counts(first) == counts(second)
    assert counts(first)["accelerated"] > 2
    assert second.anderson.stats.rank == first.anderson.stats.rank
    assert second.anderson.stats.condition == pytest.approx(
        first.anderson.stats.condition, rel=1e-7 if dtype == torch.float64 else 1e-2
    )


def test_promised_reduction_is_the_true_one():
    problem = Problem(SEVERAL)
    options = TEXTBOOK | {"history_depth": 6, "frequency": 2, "safeguard": "none"}
    expected = anderson(
        problem.sgd,
        problem.start,
        16,
        m=6,
        p=2,
        residual=problem.residual,
        scaling=problem.scaling,
        state=np.zeros(problem.n),
    )
    opt, found = None, []
    for k in range(16):
        config = AndersonConfig(**options)
        _, opt = problem.run(config, 1, opt=opt, first=k)
        found.append(opt.anderson.stats.promised_reduction)
    accelerated = found[1::2]  # p = 2: steps 2, 4, ...
    np.testing.assert_allclose(accelerated, expected.reductions, rtol=1e-9)
    assert found[2::2] == accelerated[:-1]
    # And it is kept: on an affine map the next residual is r - R g, if the step goes to its point.
    assert 0.1 < min(found[1:]) < max(found[1:]) < 1.0


def prescribed(R, r, first, dtype, lr=0.5):
    """One accelerated step with the given columns R: returns w+ and w, W of that step.

    Residuals r_0 = first, r_j = r_(j-1) + R[:, j], are given by hand as gradients.
    """
    n, h = R.shape
    problem = Problem((Group(((n,),), lr=lr),))
    config = AndersonConfig(**TEXTBOOK, history_depth=h, frequency=h + 1, safeguard="none")
    opt = problem.optimizer(config, dtype=dtype)
    path = [flat(opt)]
    residuals = np.cumsum(np.column_stack([first, R]), axis=1).T
    assert np.allclose(residuals[-1], r)
    for residual in residuals:
        problem.set_gradient(opt, -residual / lr)
        opt.step()
        path.append(flat(opt))
    assert counts(opt)["accelerated"] == 1
    path = np.array(path)
    return path[-1], path[-2], np.diff(path[:-1], axis=0).T, opt


def ill_conditioned(condition, seed=0, n=40, h=6):
    random = np.random.default_rng(seed)
    U = np.linalg.qr(random.standard_normal((n, h)))[0]
    V = np.linalg.qr(random.standard_normal((h, h)))[0]
    R = (U * np.geomspace(1.0, 1.0 / condition, h)) @ V.T
    r = R @ random.standard_normal(h) + 0.1 * random.standard_normal(n) / np.sqrt(n)
    return R, r, r - R.sum(axis=1)


def error_of_step(condition, dtype, seed=0):
    """||w+ - w+ of QR in float64||, relative to ||w+ - w||, on the very columns that are stored."""
    R, r, first = ill_conditioned(condition, seed)
    found, w, W, _ = prescribed(R, r, first, dtype)
    gradients = np.cumsum(np.column_stack([first, R]), axis=1)
    rounded = torch.tensor(-gradients / 0.5).to(dtype).double().numpy() * -0.5
    if dtype == torch.float32:
        scaled = torch.tensor(rounded / 0.5).to(dtype)
        columns = (scaled[:, 1:] - scaled[:, :-1]).double().numpy() * 0.5
    else:
        columns = np.diff(rounded, axis=1)
    last = rounded[:, -1]
    Q, T = np.linalg.qr(columns)
    g = np.linalg.solve(T, Q.T @ last)
    expected = w - W @ g + (last - columns @ g)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected - w)


# Measured, median of seeds, relative error of the step:
#   float64, condition of R 1e3: 1e-11    1e5: 1e-7    5e5: 5e-6
#   float32, condition of R 1e2: 8e-5     1e3: 5e-3    2e3: 7e-2
# that is, condition^2 times the rounding.
@pytest.mark.parametrize(
    ("dtype", "condition", "most"),
    [(torch.float64, 1e3, 1e-10), (torch.float64, 1e5, 1e-6), (torch.float32, 1e3, 5e-2)],
    ids=str,
)
def test_the_step_against_qr(dtype, condition, most):
    errors = [error_of_step(condition, dtype, seed) for seed in range(25)]
    assert np.median(errors) < most


def test_a_direction_that_is_truncated():
    """Beyond condition 1e6 (float32: 3e3) a direction is dropped; the step stays finite."""
    for dtype, condition in ((torch.float64, 1e7), (torch.float32, 1e4)):
        assert 0.1 < error_of_step(condition, dtype) < 2.0
        for seed in range(8):  # left in, rounding makes the direction's eigenvalue + or - noise
            R, r, first = ill_conditioned(condition, seed)
            *_, opt = prescribed(R, r, first, dtype)
            limit = 1e12 if dtype == torch.float64 else 1 / torch.finfo(dtype).eps
            assert opt.anderson.stats.rank < R.shape[1]
            assert opt.anderson.stats.condition <= limit


def test_ridge():
    """argmin ||r - R g||^2 + ridge * sum_j ||R_j||^2 g_j^2."""
    ridge = 0.05
    R, r, first = ill_conditioned(30.0)
    n, h = R.shape
    problem = Problem((Group(((n,),), lr=0.5),))
    config = AndersonConfig(
        **TEXTBOOK,
        history_depth=h,
        frequency=h + 1,
        safeguard="none",
        regularization=ridge,
    )
    opt = problem.optimizer(config)
    path = [flat(opt)]
    for residual in np.cumsum(np.column_stack([first, R]), axis=1).T:
        problem.set_gradient(opt, -residual / 0.5)
        opt.step()
        path.append(flat(opt))
    W = np.diff(path[:-1], axis=0).T
    stacked = np.vstack([R, np.sqrt(ridge) * np.diag(np.linalg.norm(R, axis=0))])
    g = np.linalg.lstsq(stacked, np.concatenate([r, np.zeros(h)]))[0]
    expected = path[-2] - W @ g + (r - R @ g)
    np.testing.assert_allclose(path[-1], expected, rtol=1e-9, atol=1e-9)
    plain = np.linalg.lstsq(R, r)[0]
    assert np.linalg.norm(g) < 0.9 * np.linalg.norm(plain), "a ridge too small to tell"

"""The small least-squares problem, against numpy.linalg.lstsq on the columns themselves."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from aadl_hvd.core.solve import MAX_CONDITION, Factorization, promised_reduction, solve


@st.composite
def systems(draw, spread=2.0):
    """R [n, h] with condition up to 10^spread times that of a random matrix, and r [n]."""
    h = draw(st.integers(1, 8))
    n = h + draw(st.integers(1, 20))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    R = random.standard_normal((n, h)) @ np.diag(10.0 ** random.uniform(-spread, spread, h))
    return R, random.standard_normal(n) + R @ random.standard_normal(h)


def of(R, r, **options):
    return solve(R.T @ R, R.T @ r, float(r @ r), **options)


def left(R, r, gamma):
    return np.linalg.norm(r - R @ gamma)


@given(systems())
def test_least_squares(system):
    R, r = system
    expected = np.linalg.lstsq(R, r)[0]
    found = of(R, r)
    condition = np.linalg.cond(R / np.linalg.norm(R, axis=0))
    assume(condition < 1e4)
    assert found.rank == R.shape[1]
    assert found.condition == pytest.approx(condition**2, rel=1e-6)
    np.testing.assert_allclose(
        R @ found.gamma, R @ expected, atol=1e-13 * condition**2 * np.linalg.norm(r)
    )
    # The sum of squares loses half of the digits where almost nothing is left.
    true = left(R, r, expected) / np.linalg.norm(r)
    assert found.reduction == pytest.approx(true, rel=1e-6, abs=1e-6)


@given(systems(), st.data())
def test_order_and_units_of_columns_do_not_matter(system, data):
    R, r = system
    assume(np.linalg.cond(R / np.linalg.norm(R, axis=0)) < 1e3)
    h = R.shape[1]
    order = np.array(data.draw(st.permutations(range(h))))
    units = 10.0 ** np.array(data.draw(st.lists(st.floats(-6, 6), min_size=h, max_size=h)))
    base = of(R, r)
    other = of((R * units)[:, order], r)
    back = np.empty(h)
    back[order] = other.gamma
    np.testing.assert_allclose(back * units, base.gamma, rtol=1e-7, atol=1e-9)
    assert other.rank == base.rank
    assert other.reduction == pytest.approx(base.reduction, abs=1e-7)


@given(systems(spread=1.0), st.sampled_from([1e-10, 1e-5, 1e5, 1e10]), st.sampled_from([0, 1e-2]))
def test_scale_of_the_problem_does_not_matter(system, scale, ridge):
    R, r = system
    base, other = (of(R * s, r * s, regularization=ridge) for s in (1.0, scale))
    assume(base.condition < 1e8)
    np.testing.assert_allclose(other.gamma, base.gamma, rtol=1e-6, atol=1e-8)
    assert (other.rank, other.reduction) == (base.rank, pytest.approx(base.reduction, abs=1e-7))


@given(systems(spread=1.0), st.data())
def test_zero_and_duplicate_columns_add_nothing(system, data):
    R, r = system
    h = R.shape[1]
    assume(np.linalg.cond(R / np.linalg.norm(R, axis=0)) < 1e3)
    twin = data.draw(st.integers(0, h - 1))
    at = data.draw(st.integers(0, h))
    base = of(R, r)
    with_zero = of(np.insert(R, at, 0.0, axis=1), r)
    assert with_zero.gamma[at] == 0.0
    assert with_zero.rank == h
    np.testing.assert_allclose(np.delete(with_zero.gamma, at), base.gamma, rtol=1e-8, atol=1e-9)
    doubled = np.column_stack([R, -3.0 * R[:, twin]])
    with_twin = of(doubled, r)
    assert with_twin.rank == h
    assert np.linalg.norm(with_twin.gamma) <= 1e4 * np.linalg.norm(base.gamma) + 1e-9
    np.testing.assert_allclose(
        doubled @ with_twin.gamma, R @ base.gamma, atol=1e-7 * np.linalg.norm(r)
    )


@given(systems(), st.lists(st.floats(1e-8, 1e4), min_size=2, max_size=2))
def test_regularization_shrinks(system, ridges):
    """Ridge on unit columns: larger means a shorter gamma in their units, and more left of r."""
    R, r = system
    norms = np.linalg.norm(R, axis=0)
    small, large = (of(R, r, regularization=ridge) for ridge in sorted(ridges))
    for solution, ridge in zip((small, large), sorted(ridges), strict=True):
        unit = R / norms
        expected = np.linalg.solve(unit.T @ unit + ridge * np.eye(len(norms)), unit.T @ r)
        assume(np.linalg.cond(unit.T @ unit + ridge * np.eye(len(norms))) < 1e9)
        np.testing.assert_allclose(solution.gamma * norms, expected, rtol=1e-5, atol=1e-6)
    assert np.linalg.norm(large.gamma * norms) <= np.linalg.norm(small.gamma * norms) * (1 + 1e-9)
    assert left(R, r, large.gamma) >= left(R, r, small.gamma) * (1 - 1e-9)
    assert large.reduction <= 1.0


@given(
    st.integers(1, 6),
    st.integers(0, 2**32),
    st.lists(st.sampled_from([0.0, 1e-300, 1e-160, 1e-30, 1.0, 1e30, 1e150]), min_size=6),
    st.sampled_from([0.0, 1e-6, 10.0]),
    st.sampled_from([0.0, 1.2e-7]),
)
def test_never_nan(h, seed, sizes, ridge, precision):
    """Whatever a finite Gram matrix is like: rounded, indefinite, of rank 0, huge or tiny."""
    random = np.random.default_rng(seed)
    R = random.standard_normal((h, h))[:, : max(1, h - 2)] @ random.standard_normal(
        (max(1, h - 2), h)
    )
    R = R * np.array(sizes[:h])
    gram = R.T @ R
    gram = gram * (1 + 1e-7 * random.standard_normal((h, h)))  # not even symmetric
    r = random.standard_normal(h)
    found = solve(gram, R.T @ r, float(r @ r), ridge, precision)
    assert np.isfinite(found.gamma).all()
    assert np.isfinite(found.condition)
    assert 0 <= found.rank <= h
    assert 0.0 <= found.reduction <= 1.0


def test_nearly_dependent_columns_are_truncated():
    random = np.random.default_rng(0)
    R = random.standard_normal((50, 3))
    r = random.standard_normal(50)
    for size, rank in ((1e-3, 4), (1e-8, 3)):  # condition of the Gram matrix about size^-2
        near = np.column_stack([R, R[:, 0] + size * random.standard_normal(50)])
        found = of(near, r)
        assert found.rank == rank
        assert found.condition <= MAX_CONDITION
        assert np.abs(found.gamma).max() < 10 / (1 if rank == 3 else size)
    # Entries known to seven digits: the same column that counted above is noise here.
    near = np.column_stack([R, R[:, 0] + 1e-4 * random.standard_normal(50)])
    assert of(near, r).rank == 4
    assert of(near, r, precision=1.2e-7).rank == 3


def test_rank_zero():
    found = solve(np.zeros((3, 3)), np.zeros(3), 1.0)
    assert (found.rank, found.condition, found.reduction) == (0, 1.0, 1.0)
    assert not found.gamma.any()


def test_promised_reduction_of_any_gamma():
    random = np.random.default_rng(1)
    R, r = random.standard_normal((9, 3)), random.standard_normal(9)
    for gamma in (np.zeros(3), 0.1 * random.standard_normal(3)):
        true = left(R, r, gamma) / np.linalg.norm(r)
        found = promised_reduction(R.T @ R, R.T @ r, float(r @ r), gamma)
        assert found == pytest.approx(min(true, 1.0), rel=1e-12)
    assert promised_reduction(R.T @ R, np.zeros(3), 0.0, np.zeros(3)) == 1.0


def test_one_factorization_for_several_right_hand_sides():
    random = np.random.default_rng(2)
    R = random.standard_normal((9, 4))
    factor = Factorization(R.T @ R)
    for _ in range(3):
        r = random.standard_normal(9)
        np.testing.assert_allclose(
            factor.solve(R.T @ r), np.linalg.lstsq(R, r)[0], rtol=1e-9, atol=1e-12
        )

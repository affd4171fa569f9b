"""Each fast method against its plain function, which docs/algorithm.md shows."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aadl_hvd.comm.base import ShardGroup
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.config import AndersonConfig
from aadl_hvd.core.acceptance import Acceptance
from aadl_hvd.core.collectives import Collectives
from aadl_hvd.core.methods.reference import residual_norm, subspace
from aadl_hvd.core.methods.residual import ResidualNorm
from aadl_hvd.core.reduction import reduce_payloads
from aadl_hvd.core.shard import WeightShard, sharding_of
from aadl_hvd.stats import Stats

PAGE = Path(__file__).parents[2] / "docs" / "algorithm.md"
BLOCK = r"^<!-- code: (\w+) -->\n+```python\n(.*?)```\n+<!-- end -->$"
N, DEPTH = 37, 5
TOLERANCE = 1e-9
SIZES, LAYOUTS = (1, 2, 3), ("rows", "columns")

on_ranks = pytest.mark.parametrize("size", SIZES)
in_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def vectors(count, seed=0):
    """[count, N] float64."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, N, generator=random, dtype=torch.float64)


def random_pairs(count, seed=0):
    """(w, r) of `count` steps."""
    both = vectors(2 * count, seed)
    return list(zip(both[:count], both[count:], strict=True))


def fast(pairs, size, layout, scaling=1.0, rates=None, every=1, other=None, **settings):
    """w+ [N] as the method proposes it on `size` ranks, and the slope u . r.

    `rates`: the scaling at each store, if it is not `scaling`. `every`: stores between reductions.
    `other`: (w, r) of the acceleration step, if it is not the last pair.
    """
    config = AndersonConfig(history_depth=DEPTH, layout=layout, noise_gate=None, **settings)
    by_row = isinstance(scaling, torch.Tensor)
    rates = rates or [None if by_row else scaling] * len(pairs)

    def program(comm):
        stats, group = Stats(), ShardGroup(comm)
        collectives = Collectives(comm, group, stats)
        sharding = sharding_of(config, group, N)
        shard = WeightShard(sharding, torch.float64, torch.device("cpu"), collectives, stats)
        acceptance = Acceptance(config, collectives, stats)
        method = ResidualNorm(config, shard, collectives, stats, acceptance)
        part = slice(*shard.rows)
        for i, ((w, r), rate) in enumerate(zip(pairs, rates, strict=True), start=1):
            method.note(w[part], r[part], SimpleNamespace(uniform_scaling=rate, scale_free=False))
            if i % every == 0 and i < len(pairs):
                reduce_payloads([method.gram.of(r[part], True)], collectives, stats)
        w, r = (vector[part] for vector in other or pairs[-1])
        reduce_payloads([method.gram.of(r, other is None)], collectives, stats)
        columns = list(range(method.history.columns))
        assert len(columns) == min(len(pairs) - 1, DEPTH)
        update, slope = method.update(columns, w, r, scaling[part] if by_row else scaling)
        return shard.complete(w, update, config.relaxation).clone(), slope

    found = run_ranks(size, program)
    rows, slopes = zip(*found, strict=True)
    assert len(set(slopes)) == 1
    if layout == "rows":
        return torch.cat(rows), slopes[0]
    assert all(torch.equal(own, rows[0]) for own in rows)
    return rows[0], slopes[0]


def assert_close(found, expected):
    """Up to TOLERANCE of the largest number."""
    bound = TOLERANCE * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0.0, atol=bound)


def compare(pairs, size, layout, **options):
    """`fast` with these options against `residual_norm` of the last m + 1 pairs."""
    point, slope = fast(pairs, size, layout, **options)
    w, r = options.get("other") or pairs[-1]
    plain = {"scaling", "mixing", "relaxation", "regularization"} & options.keys()
    arguments = {"mixing": AndersonConfig().mixing} | {name: options[name] for name in plain}
    expected = residual_norm(pairs[-DEPTH - 1 :], w, r, **arguments)
    assert_close(point - w, expected - w)
    update = (expected - w) / options.get("relaxation", 1.0)
    bound = TOLERANCE * float(update.norm() * r.norm())
    assert slope == pytest.approx(float(update @ r), abs=bound)


def test_the_page_shows_the_functions():
    shown = re.findall(BLOCK, PAGE.read_text(), re.DOTALL | re.MULTILINE)
    sources = {f.__name__: inspect.getsource(f) for f in (residual_norm, subspace)}
    assert shown == list(sources.items())
    assert all(len(source.splitlines()) <= 60 for source in sources.values())


def test_the_function_finds_the_root_of_a_linear_problem():
    """G(w) = w - A w + b: with as many columns as unknowns, the point is the fixed point."""
    n = 4
    matrix = torch.eye(n, dtype=torch.float64) + 0.1 * vectors(n)[:, :n]
    solution = vectors(1, seed=1)[0, :n]
    points = vectors(n + 1, seed=2)[:, :n]
    pairs = [(w, matrix @ (solution - w)) for w in points]
    assert_close(residual_norm(pairs, *pairs[-1]), solution)


@on_ranks
@in_layouts
@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize("count", [2, 4, DEPTH + 1, 2 * DEPTH + 3])
def test_fast_and_plain_agree(size, layout, count, every):
    compare(random_pairs(count), size, layout, every=every, mixing=1.0)


CASES = {
    "mixing": {"mixing": 3.0},
    "no mixing": {"mixing": 0.0},
    "relaxation": {"mixing": 1.0, "relaxation": 0.5},
    "regularization": {"mixing": 1.0, "regularization": 0.1},
    "scaling": {"mixing": 3.0, "relaxation": 0.5, "scaling": 0.05},
    "scaling by row": {"mixing": 3.0, "relaxation": 0.5, "scaling": vectors(1, seed=7)[0].abs()},
    "the rate changes": {"scaling": 0.05, "rates": [0.2, 0.1, 0.1, 0.05, 0.0, 0.05, 0.05, 0.1]},
    "only then by row": {"scaling": vectors(1, seed=8)[0].abs(), "rates": [0.1] * 4 + [None] * 4},
    "not at a stored pair": {"mixing": 1.0, "other": random_pairs(1, seed=9)[0]},
}


@on_ranks
@in_layouts
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_fast_and_plain_agree_with_options(size, layout, options):
    compare(random_pairs(8), size, layout, **options)


@on_ranks
@in_layouts
@pytest.mark.parametrize("distance", [1e-2, 1e-8, 0.0])
def test_fast_and_plain_agree_with_a_nearly_dependent_column(size, layout, distance):
    """Its direction is kept, dropped, or 0."""
    pairs = random_pairs(5)
    (_, before), (_, last) = pairs[-2:]
    new_w, noise = vectors(2, seed=3)
    pairs.append((new_w, 2.0 * last - before + distance * noise))
    compare(pairs, size, layout, mixing=1.0, relaxation=0.5)


@on_ranks
@in_layouts
def test_fast_and_plain_agree_with_a_zero_column(size, layout):
    pairs = random_pairs(5)
    pairs.append((vectors(1, seed=4)[0], pairs[-1][1]))
    compare(pairs, size, layout, mixing=1.0)


@given(
    seed=st.integers(0, 2**31 - 1),
    count=st.integers(2, 2 * DEPTH),
    factor=st.sampled_from([1e-5, 1e5]),
    size=st.sampled_from(SIZES),
    layout=st.sampled_from(LAYOUTS),
)
def test_the_update_scales_with_the_problem(seed, count, factor, size, layout):
    pairs = random_pairs(count, seed)
    scaled = [(factor * w, factor * r) for w, r in pairs]
    (w, r), (scaled_w, scaled_r) = pairs[-1], scaled[-1]
    plain = residual_norm(pairs[-DEPTH - 1 :], w, r, mixing=3.0) - w
    plain_scaled = residual_norm(scaled[-DEPTH - 1 :], scaled_w, scaled_r, mixing=3.0) - scaled_w
    assert_close(plain_scaled, factor * plain)
    point, _ = fast(scaled, size, layout, mixing=3.0)
    assert_close(point - scaled_w, factor * plain)

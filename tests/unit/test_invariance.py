"""Tensors whose scale does not matter: sums against numpy, what is told, what becomes of jumps."""

import numpy as np
import pytest
import torch
from problems import parameters_of

from aadl_hvd import AndersonConfig, AndersonOptimizer
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core.accelerator import Accelerator
from aadl_hvd.core.chunking import CHUNK_WIDE
from aadl_hvd.core.invariance import SUMS, ScaleInvariance
from aadl_hvd.core.sharding import Sharding

SIZES = [7, 1, 0, 12, 3]


def vectors(seed=0, n=23):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((3, n)))


@pytest.mark.parametrize(("size", "groups"), [(1, 1), (3, 1), (5, 1), (2, 2), (30, 1)])
def test_sums_over_all_ranks_are_those_of_whole_tensors(size, groups):
    w, g, d = vectors()
    found = np.zeros(len(SIZES) * SUMS)
    for rank in range(size):
        for group in range(groups):
            own = Sharding("rows", w.numel(), 4, size, rank, groups, group)
            rows = slice(*own.rows)
            found += ScaleInvariance(own).sums(SIZES, w[rows], g[rows], d[rows]).numpy()
    expected = [
        [a @ a, a @ b, b @ b, a @ c]
        for a, b, c in zip(*(v.split(SIZES) for v in (w, g, d)), strict=True)
    ]
    np.testing.assert_allclose(found.reshape(SUMS, -1).T, np.array(expected), rtol=1e-12)


def test_sums_of_several_chunks():
    sizes = [CHUNK_WIDE - 1, 5, 2 * CHUNK_WIDE]
    w, g, d = vectors(n=sum(sizes))
    found = ScaleInvariance(Sharding("rows", w.numel(), 4, 1, 0)).sums(sizes, w, g, d)
    expected = [float(a @ b) for a, b in zip(w.split(sizes), g.split(sizes), strict=True)]
    np.testing.assert_allclose(found.reshape(SUMS, -1)[1], expected, rtol=1e-9, atol=1e-9)


def orthogonal(g, w):
    return g - w * (g @ w) / (w @ w)


@pytest.mark.parametrize("n", [9, 1000, 300_000])
def test_a_random_gradient_is_told_from_an_orthogonal_one(n):
    """Large ones rounded to bfloat16, as in mixed precision; many tensors of each kind."""
    random = torch.Generator().manual_seed(n)
    for kind in ("random", "orthogonal"):
        for _ in range(50 if n < 10_000 else 5):
            told = ScaleInvariance(Sharding("rows", n, 4, 1, 0))
            for _ in range(told.LOOKS):
                w, g, d = (torch.randn(n, generator=random) for _ in range(3))
                if kind == "orthogonal":
                    g = orthogonal(g.double(), w.double())
                    g = g.to(torch.bfloat16 if n > 100 else torch.float32).float()
                d += 3.0 * w
                changes = told.look([n], told.sums([n], w, g, d).numpy())
                if not told.looks:
                    break
            assert changes == (kind == "orthogonal")


def test_only_what_points_outward_is_taken_off():
    told = ScaleInvariance(Sharding("rows", 12, 4, 1, 0))
    w, g, d = vectors(1, 12)
    sizes = [6, 6]
    for part in (slice(0, 6), slice(6, 12)):
        g[part] = orthogonal(g[part], w[part])
    d[:6] += 3.0 * w[:6]
    d[6:] -= 3.0 * w[6:]
    before = d.clone()
    changes = [told.look(sizes, told.sums(sizes, w, g, d).numpy()) for _ in range(told.LOOKS)]
    assert changes == [False] * (told.LOOKS - 1) + [True]
    told.correct(sizes, w, d)
    torch.testing.assert_close(d[:6], orthogonal(before[:6], w[:6]))
    assert torch.equal(d[6:], before[6:])
    again = ScaleInvariance(Sharding("rows", 12, 4, 1, 0))
    again.load_state(told.state())
    assert again.look(sizes, again.sums(sizes, w, before, before).numpy()) is False
    assert again.state().looks == (told.LOOKS + 1, told.LOOKS + 1)
    again.load_state(told.state())
    assert again.look(sizes, again.sums(sizes, w, g, before).numpy()) is True


def test_a_step_without_a_gradient_says_nothing():
    """As of a layer that is left out now and then, or at a learning rate of 0."""
    told = ScaleInvariance(Sharding("rows", 12, 4, 1, 0))
    w, g, d = vectors(1, 12)
    sizes = [6, 6]
    g[:6], g[6:], d = orthogonal(g[:6], w[:6]), orthogonal(g[6:], w[6:]), d + 3.0 * w
    for look in range(2 * told.LOOKS):
        present = g.clone()
        present[:6] *= look % 2
        changes = told.look(sizes, told.sums(sizes, w, present, d).numpy())
        assert changes == (look >= told.LOOKS - 1)
    before = d.clone()
    told.correct(sizes, w, d)
    torch.testing.assert_close(d[:6], orthogonal(before[:6], w[:6]))
    assert told.looks


def train(comm, steps=150):
    """The loss depends on the direction of one tensor, and on another one in the ordinary way."""
    random = np.random.default_rng(3)
    curves = torch.from_numpy(np.geomspace(0.02, 1.0, 16))
    tensors = [torch.nn.Parameter(torch.from_numpy(random.standard_normal(16))) for _ in range(2)]
    config = AndersonConfig(method="subspace", averages=())
    opt = AndersonOptimizer(torch.optim.SGD(tensors, lr=0.05), anderson=config, independent=True)
    opt.anderson = opt.anderson_engine.accelerator = Accelerator(config, comm)
    grown = []
    for _ in range(steps):
        target = torch.from_numpy(random.standard_normal(16)) * 1e-3
        opt.zero_grad()
        u = tensors[0] / tensors[0].norm()
        loss = sum(0.5 * (curves * (x - 1.0 - target).square()).sum() for x in (u, tensors[1]))
        loss.backward()
        before, jumps = [t.detach().clone() for t in tensors], opt.anderson.stats.jumps
        base = [t.detach() - 0.05 * t.grad for t in tensors]
        opt.step()
        if opt.anderson.stats.jumps > jumps:
            jump = [t.detach() - b for t, b in zip(tensors, base, strict=True)]
            grown.append([float(w @ d / (w @ w)) for w, d in zip(before, jump, strict=True)])
    return np.array(grown), [t.detach().numpy() for t in parameters_of(opt)]


@pytest.mark.parametrize("size", [1, 3])
def test_jumps_do_not_lengthen_a_tensor_whose_scale_does_not_matter(size, monkeypatch):
    runs = run_ranks(size, train)
    assert all(np.array_equal(a, b) for _, w in runs for a, b in zip(w, runs[0][1], strict=True))
    looks, grown = ScaleInvariance.LOOKS, runs[0][0]
    assert len(grown) > looks + 3
    assert np.all(grown[looks - 1 :, 0] < 1e-9)
    assert np.any(grown[looks - 1 :, 1] > 1e-4), "the other tensor may grow"
    monkeypatch.setattr(ScaleInvariance, "LOOKS", 10**9)
    others, _ = run_ranks(size, train)[0]
    assert np.any(others[looks - 1 :, 0] > 1e-4), "the problem shows nothing"

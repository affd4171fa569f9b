"""The kernels for a GPU against float64: on a GPU where there is one, else by Triton's interpreter.

And acceleration as a whole with them in place of torch's operations.
"""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aadl_hvd import AndersonConfig, AndersonOptimizer, kernels
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core import replicas
from aadl_hvd.core.accelerator import Accelerator
from tests.unit.test_gpu_paths import CPU, on_two_ranks

pytest.importorskip("triton", reason="Triton, which has no wheel for this platform")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
EPS = {torch.float32: 1e-5, torch.float64: 1e-13}
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float64),
    (torch.float64, torch.bfloat16),
]


@pytest.fixture
def instead(monkeypatch):
    """Has the library use them, GPU or not."""
    monkeypatch.setattr(kernels, "usable", lambda device, *_: device.type == DEVICE.type)


def drawn(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def close(found, wanted, tolerance):
    """By the norm of what is summed up, not of the sum, which may be near 0."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= tolerance * (wanted.norm() + 1.0), (found, wanted)


@pytest.mark.parametrize(("work", "stored"), DTYPES)
@settings(max_examples=10)
@given(
    m=st.integers(1, 70),
    rows=st.integers(0, 700),
    count=st.integers(0, 9),
    lo=st.integers(0, 50),
    seed=st.integers(0, 99),
)
def test_inner(work, stored, m, rows, count, lo, seed):
    columns, v = drawn(seed, m, rows, dtype=stored), drawn(seed + 1, rows, dtype=work)
    indices = [int(i) for i in np.random.default_rng(seed).integers(m, size=count)]
    summed = slice(min(lo, rows), max(rows - lo // 2, min(lo, rows)))
    table, square = kernels.inner(columns, indices, v, summed)
    columns, v = columns.double()[:, summed], v.double()[summed]
    tolerance = EPS[work] * math.sqrt(rows + 1)
    close(table, torch.stack([*(columns[i] for i in indices), v]) @ columns.T, tolerance)
    close(square, v @ v, tolerance)
    assert table.dtype == square.dtype == torch.float64


@pytest.mark.parametrize(("work", "stored"), DTYPES)
@settings(max_examples=10)
@given(
    m=st.integers(1, 30),
    rows=st.integers(0, 2500),
    lo=st.integers(0, 50),
    with_r=st.booleans(),
    weighted=st.booleans(),
    started=st.booleans(),
    seed=st.integers(0, 99),
)
def test_update(work, stored, m, rows, lo, with_r, weighted, started, seed):
    y, columns = drawn(seed, 2, m, rows, dtype=stored)
    r, weight, w = drawn(seed + 1, 3, rows, dtype=work)
    in_y, in_r = drawn(seed + 2, 2, m, dtype=work)
    f, beta = 0.3, 0.7
    counted = slice(min(lo, rows), rows)
    out = torch.full_like(r, math.nan)
    slope = kernels.update(
        *(r, in_y, y, torch.tensor([f, beta], dtype=work, device=DEVICE), counted, out),
        in_r=in_r if with_r else None,
        columns=columns if with_r else None,
        weight=weight if weighted else None,
        start=w if started else None,
    )
    wanted = f * r.double() - (in_r.double() @ columns.double() if with_r else 0.0)
    wanted = wanted * (weight.double() if weighted else 1.0) - in_y.double() @ y.double()
    tolerance = EPS[work] * m
    close(slope, wanted[counted] @ r.double()[counted], tolerance * (rows + 1))
    close(out, w.double() + beta * wanted if started else wanted, tolerance)


def test_inner_of_no_columns():
    """As of a rank beyond the columns there are."""
    v = drawn(0, 50)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        table, square = kernels.inner(drawn(1, 0, 50), [], v, slice(0, 50))
    finally:
        torch.use_deterministic_algorithms(False)
    assert table.shape == (1, 0)
    close(square, v @ v, 1e-13)


@pytest.mark.parametrize("work", EPS)
@settings(max_examples=10)
@given(
    count=st.integers(1, 5),
    rows=st.integers(0, 900),
    lo=st.integers(0, 50),
    seed=st.integers(0, 99),
)
def test_averages(work, count, rows, lo, seed):
    w, r = drawn(seed, 2, rows, dtype=work)
    averages = [drawn(seed + 1 + i, 2, rows, dtype=work) for i in range(count)]
    weights = [0.25 / (i + 1) for i in range(count)]
    counted = slice(min(lo, rows), rows)
    means, pair = torch.stack(averages).double(), torch.stack([w, r]).double()
    products = [((b + pair[1]) * (a - pair[0]))[counted].sum() for a, b in means]
    found = kernels.gains(w, r, averages, counted)
    close(found, torch.stack(products), EPS[work] * (rows + 1))
    kernels.add_to_means(w, r, averages, weights)
    for mean, after, weight in zip(means, averages, weights, strict=True):
        close(after, mean + weight * (pair - mean), EPS[work])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_bit_changes_the_checksum(dtype):
    """And two blocks that change places do."""
    size = kernels.WORDS
    first, second = drawn(0, 2 * size + 3, dtype=dtype), drawn(1, 7, dtype=dtype)
    single = drawn(2, dtype=torch.float16)  # of another dtype
    checksum = kernels.Checksum([1, first.numel(), second.numel()], DEVICE)

    def number(of=first):
        return int(checksum.of([single, of, second], replicas.PRIME))

    seen = [number()]
    assert 0 <= seen[0] < 2**36
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    single.view(torch.int16).bitwise_xor_(1)
    seen.append(number())
    single.view(torch.int16).bitwise_xor_(1)
    for tensor, place, bit in ((first, 0, 0), (first, 2 * size + 2, 3), (second, 6, 14)):
        tensor.view(bits)[place] ^= 1 << bit
        seen.append(number())
        tensor.view(bits)[place] ^= 1 << bit
        assert number() == seen[0]
    swapped = torch.cat([first[size : 2 * size], first[:size], first[2 * size :]])
    seen.append(number(swapped))
    assert len(set(seen)) == len(seen)
    # One with gaps is read in its own order, as a copy.
    assert number(torch.stack([first, first], 1)[:, 1]) == seen[0]


SETTINGS = {
    "default": {},
    "bfloat16": {"history_dtype": "bfloat16"},
    "columns": {"layout": "columns"},
    "step": {"residual": "step", "safeguard": "none", "noise_gate": None},
    "averages": {"averages": (0.5, 0.9, 0.99)},
}


@pytest.mark.usefixtures("instead")
@pytest.mark.parametrize("name", SETTINGS)
def test_acceleration_is_the_same(name, monkeypatch):
    """In float64, on two ranks, with weights in channels_last, noise and averages."""
    config = AndersonConfig(**SETTINGS[name])
    by_kernels = on_two_ranks(DEVICE, config, observe=True, dtype=torch.float64, pretend=False)
    monkeypatch.setattr(kernels, "usable", lambda device, *_: False)
    plain = on_two_ranks(CPU, config, observe=True, dtype=torch.float64)
    assert by_kernels.accelerated == plain.accelerated > 0
    torch.testing.assert_close(by_kernels.weights, plain.weights, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("instead")
@pytest.mark.parametrize("able", [2, 1])
def test_all_ranks_use_them_or_none(able, monkeypatch):
    """Ranks of two groups would differ in the last bit; checksums always."""
    answers = iter([*[True] * able, *[False] * (2 - able), *[True] * 1000])
    monkeypatch.setattr(kernels, "usable", lambda device, *_: next(answers))
    used = []
    inner = kernels.inner
    monkeypatch.setattr(kernels, "inner", lambda *a: used.append(1) or inner(*a))
    config = AndersonConfig(noise_gate=None)
    assert on_two_ranks(DEVICE, config, pretend=False).accelerated
    assert bool(used) == (able == 2)


@pytest.mark.usefixtures("instead")
@pytest.mark.parametrize("alike", [True, False])
def test_not_where_weights_lie_otherwise_on_a_rank(alike):
    """Their checksums would differ, though they do not."""

    def train(comm):
        weight = drawn(0, 3, 4, 5, 6)
        if comm.rank == 1 and not alike:
            weight = weight.to(memory_format=torch.channels_last)
        weight = torch.nn.Parameter(weight)
        config = AndersonConfig(frequency=2, history_depth=3, noise_gate=None)
        opt = AndersonOptimizer(torch.optim.SGD([weight], lr=0.1), anderson=config)
        opt.anderson = opt.anderson_engine.accelerator = Accelerator(config, comm)
        for _ in range(6):
            weight.grad = weight.detach() * torch.linspace(0.1, 1.0, 6, device=DEVICE)
            opt.step()
        assert not opt.anderson.stats.resets["desynchronized"]
        return opt.anderson._replicas.use_kernels, opt.anderson.stats.accelerated > 0

    assert run_ranks(2, train) == [(alike, True)] * 2


@pytest.mark.parametrize("wrong", [False, True])
def test_where_triton_does_not_work_it_is_said_once(monkeypatch, wrong):
    def broken(*arguments):
        if wrong:
            return False
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(kernels, "_tried", broken)
    kernels.usable.cache_clear()
    said = "wrong results" if wrong else "no C compiler"
    try:
        with pytest.warns(UserWarning, match=f"Triton does not work here .*{said}"):
            assert not kernels.usable(torch.device("cuda", 0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not kernels.usable(torch.device("cuda", 0))
    finally:
        kernels.usable.cache_clear()


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("work", "stored"), DTYPES)
def test_they_are_tried_out(work, stored, default):
    """Whatever the default dtype is."""
    torch.set_default_dtype(default)
    try:
        assert kernels._tried(DEVICE, work, stored)
    finally:
        torch.set_default_dtype(torch.float32)
    assert not kernels.usable(CPU)
    assert kernels.usable(DEVICE) == (DEVICE.type == "cuda")

"""The ring buffer against a plain list of columns; its Gram matrix; its memory."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from aadl_hvd.comm.base import ShardGroup
from aadl_hvd.comm.local import LocalCommunicator
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core import chunking
from aadl_hvd.core import gram as gram_module
from aadl_hvd.core.chunking import chunked_dot
from aadl_hvd.core.collectives import Collectives
from aadl_hvd.core.gram import Gram
from aadl_hvd.core.history import History
from aadl_hvd.core.products import Products
from aadl_hvd.core.reduction import reduce_payloads
from aadl_hvd.core.sharding import Sharding
from aadl_hvd.stats import Stats


class ListOfColumns:
    """What History must hold: (slot, column of W, column of R), from the oldest to the newest."""

    def __init__(self, depth):
        self.depth, self.columns = depth, []
        self.clear()

    def push(self, w, r):
        if self.last is not None:
            column = self.pushed % self.depth, w - self.last[0], r - self.last[1]
            self.columns = [*self.columns, column][-self.depth :]
            self.pushed += 1
        self.last = w, r

    def keep(self, columns):
        self.columns = self.columns[max(0, len(self.columns) - columns) :]

    def clear(self):
        self.columns, self.last, self.pushed = [], None, 0


class Assembly:
    """A history, products with it and its Gram matrix, brought up to date by a reduction."""

    def __init__(self, sharding, comm, dtype=torch.float64, work_dtype=torch.float64):
        self.held = History(sharding, dtype, work_dtype, torch.device("cpu"))
        self.products, self.stats = Products(self.held), Stats()
        self._collectives = Collectives(comm, ShardGroup(comm), self.stats)
        self.gram = Gram(self.products, self._collectives)

    def push(self, w, r, weight=0.0):
        new = self.held.push(w, r, weight)
        if new is not None:
            self.gram.stored(*new)
        return new

    def system(self, r, values=(), newest=False):
        """The system to solve, and the sums of other numbers that travel with it."""
        others = Numbers(values)
        payloads = [self.gram.of(r, newest), others]
        reduce_payloads(payloads, self._collectives, self.stats)
        return self.gram.system, others.sums


class Numbers:
    """A payload of numbers that are known at once."""

    part = "gram"

    def __init__(self, values):
        self._values = np.array(values, dtype=np.float64)

    def pending(self):
        return []

    def pack(self, numbers):
        return self._values

    def unpack(self, sums, size):
        self.sums = sums


def stored_column(held, slot):
    """This rank's rows of a column of R."""
    return held.r[held.index(slot)].to(held.work_dtype).numpy()


WEIGHTS = 0.05, 0.05, 0.0, 1.0
# One run: pushes, and now and then an assembly of the Gram matrix or a new start.
EVENTS = st.lists(
    st.sampled_from(["push", "push", "push", "push", "solve", "newest", "clear", 0, 1, 3]),
    max_size=25,
)  # a number: how many columns to keep; "newest": a solve for what was pushed last


@pytest.fixture(params=[2, 2**18], ids=["chunks of 2", "one chunk"], autouse=True)
def chunk(request, monkeypatch):
    monkeypatch.setattr(chunking, "CHUNK", request.param)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@given(events=EVENTS, n=st.integers(1, 9), depth=st.integers(1, 5), size=st.integers(1, 4))
def test_ring_and_gram_against_lists(layout, events, n, depth, size):
    random = np.random.default_rng(0)
    vectors = [(random.standard_normal(n), random.standard_normal(n)) for _ in events]

    def program(comm):
        sharding = Sharding(layout, n, depth, comm.size, comm.rank)
        part = slice(*sharding.rows)
        assembly = Assembly(sharding, comm)
        held, products, gram = assembly.held, assembly.products, assembly.gram
        plain = ListOfColumns(depth)
        for event, (w, r) in zip(events, vectors, strict=True):
            if event == "push":
                weight = WEIGHTS[plain.pushed % len(WEIGHTS)]  # of now, whatever comes later
                new = assembly.push(torch.from_numpy(w[part]), torch.from_numpy(r[part]), weight)
                plain.push(w, r)
                assert (new is None) == (plain.pushed == 0)
                if new is not None:
                    assert new[0] == (plain.pushed - 1) % depth
            elif event == "clear":
                held.clear()
                gram.clear()
                plain.clear()
            elif isinstance(event, int):
                held.keep(event)
                plain.keep(event)
            live = [slot for slot, _, _ in plain.columns]
            h = len(live)
            assert held.columns == h
            assert held.live == live
            if h == 0:
                continue
            for slot, _, column in plain.columns:
                index = held.index(slot)
                assert (index is None) == (slot not in sharding.slots)
                if index is not None:
                    np.testing.assert_array_equal(stored_column(held, slot), column[part])
            W = np.column_stack([column for _, column, _ in plain.columns])
            R = np.column_stack([column for _, _, column in plain.columns])
            if event in ("solve", "newest"):
                if event == "newest":
                    r = plain.last[1]
                payload = np.array([1.0, comm.rank, w[0]])
                own = torch.from_numpy(r[part])
                system, sums = assembly.system(own, payload, event == "newest")
                ranks = comm.size * (comm.size - 1) / 2
                np.testing.assert_allclose(sums, [comm.size, ranks, comm.size * w[0]])
                G, b, rr = system
                np.testing.assert_allclose(G, R.T @ R, atol=1e-12)
                np.testing.assert_allclose(b, R.T @ r, atol=1e-12)
                assert rr == pytest.approx(r @ r)
                np.testing.assert_allclose(
                    gram.project(torch.from_numpy(w[part]))[live], R.T @ w, atol=1e-12
                )
            # What the parts of an update add up to.
            gamma = np.zeros(depth)
            gamma[live] = random_gamma = np.arange(1.0, h + 1)
            for weight in (1.0, 0.05, 0.0, np.linspace(0.0, 2.0, n)):
                expected = -W @ random_gamma + weight * (r - R @ random_gamma)
                own = weight if isinstance(weight, float) else torch.from_numpy(weight[part])
                given_r, given_gamma = torch.from_numpy(r[part]), torch.from_numpy(gamma)
                mine, slope = products.update(given_r, given_gamma, own)
                whole = np.zeros(n)
                whole[part] = mine.numpy()
                np.testing.assert_allclose(comm.allreduce(whole), expected, atol=1e-11)
                total = comm.allreduce(slope.reshape(1).numpy())[0]
                assert total == pytest.approx(expected @ r, abs=1e-10)
                if layout == "rows":
                    start = torch.from_numpy(w[part])
                    point, again = products.update(given_r, given_gamma, own, None, start, 0.7)
                    assert torch.equal(again, slope)
                    np.testing.assert_allclose(point, w[part] + 0.7 * mine.numpy(), atol=1e-11)

    run_ranks(size, program)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bytes(dtype):
    n, depth = 10, 4
    width = torch.finfo(dtype).bits // 8
    for layout, size in (("rows", 3), ("columns", 3)):
        for rank in range(size):
            sharding = Sharding(layout, n, depth, size, rank)
            held = History(sharding, dtype, torch.float32, torch.device("cpu"))
            assert held.nbytes == 0, "allocated before the first pair"
            lo, hi = sharding.rows
            held.push(torch.ones(hi - lo), torch.ones(hi - lo))
            rows = {"rows": [4, 4, 2], "columns": [10, 10, 10]}[layout][rank]
            slots = {"rows": [4, 4, 4], "columns": [2, 1, 1]}[layout][rank]
            assert held.nbytes == 2 * slots * rows * width + 4 * rows * 4


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_the_gram_matrix_is_of_the_columns_as_stored(layout):
    """Narrow columns are rounded; the product must be of what the update will use."""
    n, depth = 50, 3
    pairs = [(torch.randn(n), torch.randn(n)) for _ in range(4)]
    r = torch.randn(n)

    def program(comm):
        sharding = Sharding(layout, n, depth, comm.size, comm.rank)
        part = slice(*sharding.rows)
        assembly = Assembly(sharding, comm, torch.bfloat16, torch.float32)
        held = assembly.held
        for w_k, r_k in pairs:
            assembly.push(w_k[part], r_k[part])
        (G, b, _), _ = assembly.system(r[part])
        R = np.zeros((n, depth))
        for slot in sharding.slots:
            R[part, slot] = stored_column(held, slot)
        R = comm.allreduce(R.reshape(-1)).reshape(n, depth)
        differences = [pairs[j + 1][1] - pairs[j][1] for j in range(depth)]
        assert np.array_equal(R.T, torch.stack(differences).bfloat16().double().numpy())
        np.testing.assert_allclose(G, R.T @ R, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(b, R.T @ r.double().numpy(), rtol=1e-4, atol=1e-5)

    run_ranks(2, program)


class Counting(LocalCommunicator):
    """Counts what goes over all ranks, of which there is one."""

    def __init__(self):
        super().__init__()
        self.sent = ()

    def _allreduce_sum(self, values):
        self.sent += (values.nbytes,)
        return values


def residuals_that_fall(falls, n=400):
    """Near one direction: columns and residuals are anything but orthogonal."""
    random = torch.Generator().manual_seed(0)
    common = torch.randn(n, generator=random)
    sizes = torch.tensor(falls).cumprod(0).clip(min=1e-12)  # squares are far from 0
    return [size * (common + torch.randn(n, generator=random)) for size in sizes]


def attempts(layout, residuals, every=1, dtype=torch.float32, depth=6):
    """Each of R^T R, R^T r and r^T r, what they are exactly, and the number of messages."""
    n, comm = len(residuals[0]), Counting()
    sharding = Sharding(layout, n, depth, 1, 0)
    assembly = Assembly(sharding, comm, dtype, torch.float32)
    for i, r in enumerate(residuals):
        assembly.push(torch.zeros(n), r)
        if i % every or not assembly.held.columns:
            continue
        before = len(comm.sent)
        system, _ = assembly.system(r, newest=True)
        R = torch.stack([b - a for a, b in itertools.pairwise(residuals[: i + 1])][-depth:])
        yield system, (R.to(dtype).double() @ r.double()).numpy(), len(comm.sent) - before
    assert assembly.stats.bytes["gram"] == sum(comm.sent)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@given(
    falls=st.lists(st.sampled_from([1.0, 0.9, 0.3, 1e-2, 1e-5]), min_size=8, max_size=16),
    every=st.integers(1, 3),
)
def test_the_product_with_r_is_carried_forward_until_rounding_would_show(layout, falls, every):
    for (G, b, rr), exact, _ in attempts(layout, residuals_that_fall(falls), every):
        bound = np.sqrt(G.diagonal() * rr) * torch.finfo(torch.float32).eps
        assert (np.abs(b - exact) <= 2 * gram_module.DRIFT * bound).all()


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_how_often_the_product_with_r_is_multiplied_out(layout, monkeypatch):
    carried = []
    inner = Products.inner

    def counting(self, slots, vector, only=None):
        carried.append(only is not None)
        return inner(self, slots, vector, only)

    monkeypatch.setattr(Products, "inner", counting)

    def messages(falls, **options):
        carried.clear()
        return [sent for *_, sent in attempts(layout, residuals_that_fall(falls), **options)]

    # Differences are as long as residuals: some, then all is multiplied out, in the one pass.
    assert messages([1.0] * 24) == [1] * 23
    assert 17 <= sum(carried) <= 21
    assert messages([0.9] * 12, every=2) == [1] * 5
    assert any(carried) and not carried[0], "at first all columns are new"
    # The residual falls to a thousandth at once.
    assert messages([1.0] * 6 + [1e-3] + [1.0] * 3) == [1] * 5 + [2] + [1] * 3
    assert sum(carried) == 8
    assert messages([1e-3, 1.0] * 8, every=6) == [1, 1]
    assert sum(carried) == 0, "all columns are new"
    assert messages([1e-3, 1.0] * 6, dtype=torch.bfloat16) == [1] * 11
    assert sum(carried) == 0, "r is not the sum of rounded columns"


def test_columns_that_were_rounded_carry_nothing():
    """Not into a history that rounds them no more either: r is not their sum."""
    for dtype, known in ((torch.float32, True), (torch.bfloat16, False)):
        sharding = Sharding("rows", 50, 3, 1, 0)
        assembly = Assembly(sharding, LocalCommunicator(), dtype, torch.float32)
        random = torch.Generator().manual_seed(0)
        for _ in range(4):
            r = torch.randn(50, generator=random)
            assembly.push(torch.zeros(50), r)
            assembly.system(r, newest=True)
        assert (assembly.gram.state().carried is not None) == known


@pytest.mark.parametrize("carry", [0.0, np.inf])
def test_two_groups_share_the_sums(carry, monkeypatch):
    """Each holds a whole history and adds up a part of its rows; slopes and R^T r, too."""
    monkeypatch.setattr(gram_module, "DRIFT", carry)
    n, depth = 23, 3
    pairs = [(np.random.randn(n), np.random.randn(n)) for _ in range(8)]

    def program(comm):
        group = comm.shard_group(2)
        sharding = Sharding("rows", n, depth, group.comm.size, group.comm.rank, 2, group.index)
        part = slice(*sharding.rows)
        assembly = Assembly(sharding, comm)
        held, products = assembly.held, assembly.products
        for i, (w, r) in enumerate(pairs):
            own_w, own_r = (torch.from_numpy(x[part]) for x in (w, r))
            assembly.push(own_w, own_r)
            (G, b, _), _ = assembly.system(own_r, newest=True)
            W, R = (
                np.array([y[j] - x[j] for x, y in itertools.pairwise(pairs[: i + 1])][-depth:])
                for j in (0, 1)
            )
            if not i:
                continue
            np.testing.assert_allclose(G, R @ R.T, atol=1e-12)
            np.testing.assert_allclose(b, R @ r, atol=1e-12)
            gamma = np.zeros(depth)
            gamma[held.live] = np.arange(1.0, len(R) + 1)
            mine, slope = products.update(own_r, torch.from_numpy(gamma), 0.5)
            u = -gamma[held.live] @ W + 0.5 * (r - gamma[held.live] @ R)
            np.testing.assert_allclose(mine, u[part], atol=1e-12)
            assert comm.allreduce(slope.reshape(1).numpy())[0] == pytest.approx(u @ r)

    run_ranks(4, program)


def test_dot_adds_up_in_float64(monkeypatch):
    """Equal terms, the worst case for a float32 sum: only within a chunk is it one."""
    monkeypatch.setattr(chunking, "CHUNK", 64)
    a = torch.full((100_000,), 0.1)
    expected = float(a[0]) ** 2 * 100_000
    assert float(chunked_dot(a, a)) == pytest.approx(expected, rel=1e-6)
    in_float32 = torch.zeros(())
    for piece in a.split(64):
        in_float32 += torch.dot(piece, piece)
    assert float(in_float32) != pytest.approx(expected, rel=1e-6)
    assert float(chunked_dot(a[:0], a[:0])) == 0.0


def test_length_of_the_message():
    """The documented (m + 1) m + 9 numbers, whatever is stored, and what rides along."""

    comm = Counting()
    assembly = Assembly(Sharding("rows", 6, 4, 1, 0), comm)
    for _ in range(3):
        assembly.push(torch.randn(6).double(), torch.randn(6).double())
        assembly.system(torch.randn(6).double(), np.zeros(7))
    assert comm.sent == (8 * (29 + 7),) * 3
    assert assembly.stats.bytes["gram"] == sum(comm.sent)


@pytest.mark.parametrize(
    ("slots", "copies"), [([2], 0), ([1, 2, 3], 0), ([4, 0], 1), ([], 0)], ids=str
)
@pytest.mark.parametrize("anew", [False, True], ids=["carried", "anew"])
def test_new_columns_are_multiplied_in_one_product(slots, copies, anew):
    """A product for each new column reads R from the cache or from memory as many times."""
    sharding = Sharding("rows", 6, 5, 1, 0)
    held = History(sharding, torch.float32, torch.float32, torch.device("cpu"))
    held.r.copy_(torch.randn(5, 6, generator=torch.Generator().manual_seed(0)))
    v, called = held.r[3] - held.r[1], []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Counting():
        table, square = Products(held).inner(slots, v, None if anew else slots)
    chunks = len(list(chunking.chunks(v)))
    left = [*slots, *(["v"] if anew else [])]
    assert called.count("mm") == (chunks if left else 0)
    assert not {"mv", "addmv"} & set(called)
    copied = chunks if copies or (anew and slots) else 0
    assert called.count("stack") + called.count("cat") == copied
    exact = torch.stack([*held.r[slots], v]).double() @ held.r.double().T
    known = exact[-1] if anew else exact[-1, slots]
    assert torch.allclose(table[:-1], exact[:-1], rtol=1e-5, atol=1e-6)
    assert torch.allclose(table[-1] if anew else table[-1, slots], known, rtol=1e-5, atol=1e-6)
    assert float(square) == pytest.approx(float(v.double() @ v.double()), rel=1e-5)

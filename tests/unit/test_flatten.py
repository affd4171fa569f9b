"""Any range of the flat vector, of tensors of any layout, against torch.cat."""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from aadl_hvd import AndersonConfig, AndersonOptimizer
from aadl_hvd.optim.flat_parameters import FlatGradients, FlatParameters
from aadl_hvd.optim.flatten import FlatLayout
from aadl_hvd.optim.problem import OptimizerFixedPoint


def plain(shape):
    return torch.randn(shape)


def transposed(shape):
    return torch.randn(shape[::-1]).permute(tuple(reversed(range(len(shape)))))


def strided(shape):
    return torch.randn([2 * size for size in shape])[tuple(slice(None, None, 2) for _ in shape)]


def channels_last(shape):
    x = torch.randn(shape)
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


KINDS = {"plain": plain, "transposed": transposed, "strided": strided, "channels": channels_last}
SHAPES = st.sampled_from([(), (1,), (4,), (0,), (3, 0), (2, 3), (2, 3, 2, 2), (1, 5)])
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
LISTS = st.lists(st.tuples(SHAPES, st.sampled_from(sorted(KINDS)), DTYPES), max_size=6)


def tensors_of(spec):
    return [KINDS[kind](shape).to(dtype) for shape, kind, dtype in spec]


def joined(tensors):
    pieces = [t.contiguous().reshape(-1).double() for t in tensors]
    return torch.cat([*pieces, torch.zeros(0, dtype=torch.float64)])


@given(LISTS, st.data())
def test_read_any_range(spec, data):
    tensors = tensors_of(spec)
    layout = FlatLayout([t.shape for t in tensors])
    expected = joined(tensors)
    assert layout.n == expected.numel()
    gone = data.draw(st.sets(st.integers(0, len(tensors) - 1))) if tensors else set()
    for index in gone:  # None reads as zeros
        expected[layout.offsets[index] : layout.offsets[index + 1]] = 0.0
    given_tensors = [None if i in gone else t for i, t in enumerate(tensors)]
    lo = data.draw(st.integers(0, layout.n))
    hi = data.draw(st.integers(lo, layout.n))
    out = torch.full((hi - lo,), torch.nan, dtype=torch.float64)
    assert layout.read(given_tensors, lo, hi, out) is out
    assert torch.equal(out, expected[lo:hi])


@given(LISTS, st.integers(0, 3), st.booleans())
def test_write(spec, padding, with_none):
    tensors = tensors_of(spec)
    layout = FlatLayout([t.shape for t in tensors])
    strides = [t.stride() for t in tensors]
    flat = torch.arange(layout.n + padding, dtype=torch.float64)
    if with_none and tensors:
        before = joined(tensors[:1])
        layout.write([None, *tensors[1:]], flat)
        assert torch.equal(joined(tensors[:1]), before)
        tensors, first = tensors[1:], layout.offsets[1]
    else:
        layout.write(tensors, flat)
        first = 0
    rounded = [
        flat[lo : lo + t.numel()].to(t.dtype).double()
        for lo, t in zip(layout.offsets[len(spec) - len(tensors) :], tensors, strict=False)
    ]
    assert torch.equal(joined(tensors), torch.cat([*rounded, flat[:0]]))
    assert first == 0 or len(tensors) == len(spec) - 1
    assert [t.stride() for t in tensors] == strides[len(spec) - len(tensors) :]


@given(LISTS, st.data())
def test_segments_cover_the_range_in_order(spec, data):
    layout = FlatLayout([t.shape for t in tensors_of(spec)])
    lo = data.draw(st.integers(0, layout.n))
    hi = data.draw(st.integers(lo, layout.n))
    at = lo
    for index, first, last in layout.segments(lo, hi):
        assert first == at < last <= layout.offsets[index + 1]
        assert layout.offsets[index] <= first
        at = last
    assert at == hi


def test_sparse_gradients():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [10.0, 20.0]])
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[0, 3, 0]]), values, (5, 2), check_invariants=True
    )  # uncoalesced
    layout = FlatLayout([sparse.shape, torch.Size([2])])
    tail = torch.tensor([7.0, 8.0])
    expected = torch.cat([sparse.to_dense().reshape(-1), tail])
    assert expected[0] == 11.0
    for lo, hi in ((0, 12), (0, 10), (1, 8), (6, 11), (3, 3)):
        out = torch.full((hi - lo,), torch.nan)
        assert torch.equal(layout.read([sparse, tail], lo, hi, out), expected[lo:hi])


def test_channels_last_weight_and_plain_gradient_line_up():
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    gradient = weight.contiguous()
    layout = FlatLayout([weight.shape])
    for lo, hi in ((0, 96), (5, 60)):
        a, b = torch.empty(hi - lo), torch.empty(hi - lo)
        assert torch.equal(layout.read([weight], lo, hi, a), layout.read([gradient], lo, hi, b))
    flat = torch.randn(96)
    layout.write([weight], flat)
    assert torch.equal(weight.contiguous().reshape(-1), flat)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_replaced_storage_is_read_anew():
    p = torch.nn.Parameter(torch.zeros(3))
    layout = FlatLayout([p.shape])
    p.data = torch.arange(3.0)
    with torch.no_grad():
        assert torch.equal(layout.read([p], 0, 3, torch.empty(3)), torch.arange(3.0))
    assert layout.offsets == [0, 3]


@given(LISTS, st.data())
def test_write_any_range(spec, data):
    """Rows outside of it, and tensors that are None, keep their bits."""
    tensors = tensors_of(spec)
    layout = FlatLayout([t.shape for t in tensors])
    gone = data.draw(st.sets(st.integers(0, len(tensors) - 1))) if tensors else set()
    lo = data.draw(st.integers(0, layout.n))
    hi = data.draw(st.integers(lo, layout.n))
    beyond = 2 if hi == layout.n else 0  # as blocks of equal length are padded
    flat = torch.randn(hi - lo + beyond, dtype=torch.float64)
    expected = joined(tensors)
    for index, first, last in layout.segments(lo, hi):
        if index not in gone:
            expected[first:last] = flat[first - lo : last - lo].to(tensors[index].dtype).double()
    given_tensors = [None if i in gone else t for i, t in enumerate(tensors)]
    strides = [t.stride() for t in tensors]
    layout.write(given_tensors, flat, lo)
    assert torch.equal(joined(tensors), expected)
    assert [t.stride() for t in tensors] == strides


def _transposed(p):
    p.data = p.data.t()


def _replaced(p):
    p.data = p.data + 1.0


def _cut(p):
    p.data = p.data[:2]


def _narrowed(p):
    p.data = p.data.to(torch.bfloat16)


@pytest.mark.parametrize("change", [_transposed, _replaced, _cut, _narrowed])
def test_weights_are_read_where_they_are_now(change):
    """Small weights are read through views. Another memory behind a parameter must be noticed."""
    weights = [torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(3))]
    problem = OptimizerFixedPoint(torch.optim.SGD(weights, lr=0.1), "gradient")

    def read():
        before = problem.signature
        out = torch.full((problem.n,), torch.nan)
        problem.read_before(0, problem.n, out, torch.empty_like(out))
        expected = torch.cat([p.detach().float().reshape(-1) for p in weights])
        assert torch.equal(out, expected)
        return before

    first, *_ = [read() for _ in range(3)]
    change(weights[0])
    others = [read() for _ in range(3)]
    assert (others[0] == first) == (change in (_transposed, _replaced))
    with torch.no_grad():
        weights[1].add_(1.0)  # in place
    read()
    written = torch.arange(float(problem.n))
    _replaced(weights[1])  # and nobody has looked since
    with torch.no_grad():
        problem.write(written)
    assert torch.equal(torch.cat([p.detach().float().reshape(-1) for p in weights]), written)


def _others(p):
    p.grad = torch.randn(p.shape)


def _missing(p):
    p.grad = None


def _elsewhere(p):
    p.grad.data = torch.randn(p.shape)


def _strided(p):
    p.grad = torch.randn(p.shape[::-1]).t()


@pytest.mark.parametrize("change", [_others, _missing, _elsewhere, _strided])
def test_gradients_are_read_where_they_are_now(change):
    """Whether they are the same tensors as in the step before or not."""
    weights = [torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(4, 3))]
    gradients = FlatGradients(weights, FlatLayout([p.shape for p in weights]))

    def read():
        out, absent = gradients.read(0, 28, torch.full((28,), torch.nan))
        known = [torch.zeros(p.shape) if p.grad is None else p.grad for p in weights]
        assert torch.equal(out, torch.cat([g.reshape(-1) for g in known]))
        assert absent == {i for i, p in enumerate(weights) if p.grad is None}

    for p in weights:
        _others(p)
    for _ in range(4):
        read()
        weights[0].grad.add_(1.0)  # in place
    change(weights[1])
    for _ in range(4):
        read()


def test_a_short_look_sees_what_a_training_may_do():
    """Within a block nobody compares all parameters in all respects."""
    weights = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
    more = torch.nn.Parameter(torch.randn(2))
    optimizer = torch.optim.SGD(weights, lr=0.1)
    problem = OptimizerFixedPoint(optimizer, "gradient")

    def rate(value):
        optimizer.param_groups[0]["lr"] = value

    changes = [
        lambda: _replaced(weights[2]),
        lambda: optimizer.add_param_group({"params": [more]}),
        lambda: optimizer.param_groups[1]["params"].pop(),
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
    ]
    assert not problem.unchanged(None, 0, problem.n), "nobody has asked for the signature"
    for change in changes:
        signature = problem.signature
        for rows in ((0, problem.n), (20, 40)):
            assert problem.unchanged(signature, *rows)
        with torch.no_grad():
            weights[0].add_(1.0)
        rate(2.0 * optimizer.param_groups[0]["lr"])  # the residual does not depend on it
        assert problem.unchanged(signature, 0, problem.n)
        change()
        assert not problem.unchanged(signature, 0, problem.n)
    signature = problem.signature
    _replaced(weights[0])
    assert problem.unchanged(signature, 40, 48), "rows of another rank"
    assert not problem.unchanged(signature, 10, 20), "rows of this rank"


class Counter(TorchDispatchMode):
    """Counts the operations of torch that are started."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_only_the_tensors_that_meet_the_rows_are_looked_at(make):
    """At many ranks one or two of all: what is read is the same as of all rows."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(5, 2)) for _ in range(200)]
    optimizer = make(weights, lr=0.1, weight_decay=0.1)
    for p in weights:
        p.grad = torch.randn(p.shape)
    optimizer.step()
    weights[0].grad = weights[61].grad = None
    problem = OptimizerFixedPoint(optimizer, "gradient")

    def read(lo, hi):
        w, r = torch.empty(hi - lo), torch.empty(hi - lo)
        assert problem.signature
        with torch.no_grad():
            problem.read_before(lo, hi, w, r)
            problem.keep_gradient()
            problem.read_residual(lo, hi, w, r, problem.decays)
        found = problem.scaling(lo, hi), problem.decay(lo, hi)
        return w, r, *(torch.as_tensor(x).expand(hi - lo) for x in found)

    everywhere = read(0, problem.n)
    for lo, hi in ((0, 7), (603, 609), (603, 628), (1993, 2000)):
        with Counter() as counter:
            found = read(lo, hi)
        assert counter.count < 150, "with AdamW all steps and moments were read"
        w, r, scaling, decay = (x[lo:hi] for x in everywhere)
        torch.testing.assert_close(found[2], scaling)
        torch.testing.assert_close(found[3], decay)
        assert torch.equal(found[0], w)
        torch.testing.assert_close(found[1], r)
        assert found[1].any() == ((lo, hi) != (0, 7))


def test_other_memory_than_plain_tensors():
    """A class of one's own may say nothing of its memory; so may other devices and layouts."""

    class Own(torch.nn.Parameter):
        pass

    def flat(*tensors):
        return FlatParameters([*tensors], FlatLayout([p.shape for p in tensors]))

    plain = torch.nn.Parameter(torch.ones(3))
    assert flat(plain).in_place()
    assert flat(plain, torch.nn.Parameter(torch.ones(0))).in_place()
    sparse = torch.nn.Parameter(torch.eye(3).to_sparse())
    meta = torch.nn.Parameter(torch.ones(3, device="meta"))
    for other in (Own(torch.ones(3)), sparse, meta):
        assert not flat(plain, other).in_place()
    bits = torch.zeros(8)
    p = torch.nn.Parameter(bits[:4])
    same = flat(p)
    p.data = bits.view(torch.bfloat16)[:4]
    assert not same.in_place()


def test_views_of_large_weights_are_not_kept():
    """They would keep a storage alive that `model.half()` has replaced."""
    p = torch.nn.Parameter(torch.ones(2**20 + 1))
    flat = FlatParameters([p], FlatLayout([p.shape]))
    with torch.no_grad():
        flat.write(torch.zeros(2**20 + 1))
    assert not p.detach().any() and flat._views == []


JOINED = [
    lambda: torch.randn(3),
    lambda: torch.randn(2, 3),
    lambda: torch.randn(()),
    lambda: torch.randn(6)[::2],
    lambda: torch.randn(1).expand(4),
    lambda: torch.randn(4, 3).t(),
    lambda: torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last),
    lambda: torch.randn(0),
    lambda: torch.randn(0, 3),
    lambda: torch.randn(5).to(torch.bfloat16),
    lambda: torch.randn(3, 2).to(torch.float16),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(tensors=st.lists(st.sampled_from(JOINED), min_size=1, max_size=5))
def test_join_is_read(dtype, tensors):
    tensors = [make() for make in tensors]
    layout = FlatLayout([t.shape for t in tensors])
    out = torch.full((layout.n,), torch.nan, dtype=dtype)
    assert layout.join(tensors, out)
    assert torch.equal(out, layout.read(tensors, 0, layout.n, torch.empty_like(out)))


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("second", [
    torch.ones(5).to_sparse(), torch.ones(3), torch.ones(5, 2), torch.ones(5, 1).to_sparse(),
])  # fmt: skip
def test_what_is_not_joined(second):
    """The rows have their size afterwards."""
    layout = FlatLayout([torch.Size([4]), torch.Size([5, 1][: second.dim()])])
    out = torch.zeros(9)
    assert not layout.join([torch.ones(4), second], out)
    assert not layout.join([torch.ones(4)], out)
    assert out.shape == (9,)
    assert not FlatLayout([torch.Size([2**20 + 1])]).join([out], torch.empty(2**20 + 1))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_old_gradients_are_free_after_a_step(make):
    """Where they stayed the same tensors for some steps, too. They are as large as the model."""
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 4), (3,), (2, 3))]
    config = AndersonConfig(method="subspace")
    opt = AndersonOptimizer(make(weights, lr=0.1), anderson=config, independent=True)
    arrays = [np.ones(p.shape, dtype=np.float32) for p in weights]
    for p, array in zip(weights, arrays, strict=True):
        p.grad = torch.from_numpy(array)  # its storage keeps the array alive
    for _ in range(25):
        opt.step()
    watched = [weakref.ref(array) for array in arrays]
    del arrays, array
    opt.zero_grad()
    assert not any(array() is not None for array in watched)
    for p in weights:
        p.grad = torch.ones_like(p)
    opt.step()


@given(LISTS, st.sampled_from([torch.float32, torch.float64]))
def test_adds_in_the_dtype_of_what_is_added(spec, dtype):
    """One call for all tensors where that has the same bits, else through a copy of each chunk."""
    tensors = tensors_of(spec)
    flat = FlatParameters(tensors, FlatLayout([t.shape for t in tensors]))
    added = torch.randn(sum(t.numel() for t in tensors), dtype=dtype)
    pieces = added.split([t.numel() for t in tensors])
    expected = [
        (t.to(dtype) + piece.view(t.shape)).to(t.dtype)
        for t, piece in zip(tensors, pieces, strict=True)
    ]
    flat.add(added)
    for t, own in zip(tensors, expected, strict=True):
        assert torch.equal(t, own)

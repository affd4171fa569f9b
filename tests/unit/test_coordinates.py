"""Chosen coordinates, against a read of one tensor after the other."""

import pytest
import torch

from aadl_hvd.optim import coordinates
from aadl_hvd.optim.coordinates import Coordinates

SHAPES = (7,), (3, 4, 2, 2), (), (40, 25), (5, 1, 3, 3), (0,), (2, 150), (11,)


def one_by_one(tensors, chosen, dtype):
    """All of the flat vector in the order of memory, and of it what is chosen."""
    rows = []
    for shape, tensor in zip(SHAPES, tensors, strict=True):
        if tensor is None:
            rows.append(torch.zeros(torch.Size(shape).numel()))
            continue
        dense = tensor.to_dense()
        if dense.dim() == 4 and dense.is_contiguous(memory_format=torch.channels_last):
            dense = dense.permute(0, 2, 3, 1)
        rows.append(dense.reshape(-1))
    return torch.cat([row.to(dtype) for row in rows])[chosen]


def random(shape, kind):
    """A tensor of this shape, and how it lies in memory."""
    tensor = torch.randn(shape, dtype=torch.float64)
    if kind == "channels_last" and tensor.dim() == 4:
        return tensor.float().contiguous(memory_format=torch.channels_last)
    if kind == "transposed" and tensor.dim() == 2:
        return torch.randn(*reversed(shape)).T
    if kind == "sparse" and tensor.dim() == 2:
        return tensor.float().to_sparse()
    if kind == "mixed":
        return tensor.to((torch.float64, torch.float32, torch.bfloat16)[tensor.numel() % 3])
    if kind == "none":
        return None if tensor.numel() % 2 else tensor.float()
    return tensor.to(getattr(torch, kind) if kind in KINDS[:3] else torch.float32)


KINDS = "float32", "float64", "bfloat16", "mixed", "channels_last", "transposed", "sparse", "none"


@pytest.mark.parametrize("whole", [0, 30, 400, 2**18])  # numbers that are copied at most
@pytest.mark.parametrize("count", [1, 200, None])
def test_same_bits_as_one_tensor_after_the_other(monkeypatch, whole, count):
    """Whatever lies in the buffer, and whatever the gradients become from one step to the next."""
    torch.manual_seed(0)
    monkeypatch.setattr(coordinates, "_WHOLE", whole)
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    n = sum(sizes)
    chosen = torch.arange(n) if count is None else torch.randint(n, (count,)).unique()
    for dtype in (torch.float32, torch.float64):
        found = Coordinates(sizes, chosen, torch.device("cpu"))
        out = torch.full((len(chosen),), torch.nan, dtype=dtype)
        for kind in (*KINDS, *KINDS[::-1]):
            tensors = [random(shape, kind) for shape in SHAPES]
            right = one_by_one(tensors, chosen, dtype)
            met = [tensors[i] for i in found.met]
            assert torch.equal(found.read(met, out), right), kind
            for i, (tensor, part) in enumerate(zip(met, found.parts, strict=True)):
                one = torch.full((part.stop - part.start,), torch.nan, dtype=dtype)
                assert torch.equal(found.read_one(i, tensor, one), right[part]), kind
        assert not found.read([None] * len(found.met), out).any()


def test_a_gradient_that_is_given_another_shape():
    """As after `p.data = ...`: the view that it was copied into does not fit any more."""
    found = Coordinates([6], torch.tensor([1, 4]), torch.device("cpu"))
    out = torch.empty(2)
    for shape in ((6,), (2, 3), (3, 2), (6,)):
        assert found.read([torch.arange(6.0).view(shape)], out).tolist() == [1.0, 4.0]
    with pytest.raises(RuntimeError):
        found.read([torch.zeros(7)], out)


def test_few_calls(monkeypatch):
    """Of a network's tensors, most of them small. To copy the large ones would take longer."""
    sizes = [64] * 100 + [2**14] * 3 + [64] * 100
    chosen = torch.randint(sum(sizes), (2**12,)).unique()
    found = Coordinates(sizes, chosen, torch.device("cpu"))
    tensors = [torch.randn(sizes[i]) for i in found.met]
    out = torch.empty(len(chosen))
    found.read(tensors, out)
    with torch.profiler.profile() as profile:
        found.read(tensors, out)
    called = [event.name for event in profile.events() if event.cpu_parent is None]
    assert len(called) <= 12, called
    assert found._buffer.numel() <= 200 * 64
    monkeypatch.setattr(coordinates, "_WHOLE", 1000)
    found = Coordinates(sizes, chosen, torch.device("cpu"))
    found.read(tensors, out)
    assert 900 < found._buffer.numel() <= 1000, "memory is not bounded"

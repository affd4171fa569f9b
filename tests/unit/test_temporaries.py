"""With many rows: what a step of the residual-norm method takes in memory for a moment."""

import contextlib
import functools
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aadl_hvd import AndersonConfig, AndersonOptimizer
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core import chunking, replicas
from aadl_hvd.core.accelerator import Accelerator
from aadl_hvd.core.history import History
from aadl_hvd.core.shard import WeightShard
from aadl_hvd.core.state import AcceleratorState
from aadl_hvd.optim import diagonals, flatten
from aadl_hvd.optim.problem import OptimizerFixedPoint

ROOT = Path(__file__).parents[2]


class Allocations(TorchDispatchMode):
    """Counts new tensors of at least so many numbers that are alive at the same time."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.most, self.paused = numbers, 0, False
        self.alive, self.found = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tensors_in([args, kwargs])}
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            new = storage.data_ptr() not in given and not self.paused
            if new and storage.nbytes() >= self.numbers * tensor.element_size():
                self.alive.append(weakref.ref(tensor))
                self.found.append((function.overloadpacket.__name__, tuple(tensor.shape)))
        self.alive = [reference for reference in self.alive if reference() is not None]
        self.most = max(self.most, len(self.alive))
        return result

    @contextlib.contextmanager
    def pause(self):
        """What is allocated within is not the algorithm's."""
        self.paused = True
        yield
        self.paused = False


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list | tuple):
        return [tensor for item in items for tensor in tensors_in(item)]
    return []


def pausing(method, here):
    """The method, within which this thread counts nothing."""

    @functools.wraps(method)
    def paused(*arguments, **more):
        with getattr(here, "pause", contextlib.nullcontext)():
            return method(*arguments, **more)

    return paused


N = 512
BASES = {
    "SGD": (0, lambda p: torch.optim.SGD(p, lr=0.3)),
    "Nesterov, decay": (
        0,
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, nesterov=True, weight_decay=0.01),
    ),
    # M, and mixing times M; in AdamW's residual M, and D.
    "Adam": (2, lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01)),
    "AdamW": (2, lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.01)),
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("averages", [(), (0.9, 0.99)], ids=["no averages", "averages"])
@pytest.mark.parametrize(("p", "q"), [(2, 1), (5, 5)])
@pytest.mark.parametrize("base", BASES)
def test_no_vector_beside_history_pair_and_averages(base, p, q, averages, ranks, monkeypatch):
    """In all steps from the first one on; apart from the base step and from gathering."""
    monkeypatch.setattr(diagonals, "FEW", 0)
    for module in (chunking, replicas):
        monkeypatch.setattr(module, "CHUNK", 64)
    allowed, make = BASES[base]
    config = AndersonConfig(
        **{"method": "residual", "history_depth": 4, "frequency": p, "store_every": q},
        **{"averages": averages, "noise_gate": None, "safeguard": "none"},
    )
    generator = torch.Generator().manual_seed(0)
    curvature = torch.rand(N, generator=generator) + 0.1
    here = threading.local()
    # What is kept; the base optimizer's own; what all ranks have of the point for a moment.
    for owner, name in (
        (AcceleratorState, "_set_up"),
        (History, "_allocate"),
        (OptimizerFixedPoint, "advance"),
        (WeightShard, "publish"),
    ):
        monkeypatch.setattr(owner, name, pausing(getattr(owner, name), here))

    def program(comm):
        weights = [torch.nn.Parameter(torch.ones(N // 2)) for _ in "ab"]
        opt = AndersonOptimizer(make(weights), anderson=config, independent=True)
        opt.anderson = opt.anderson_engine.accelerator = Accelerator(config, comm)
        allocations = Allocations(N // ranks)
        here.pause = allocations.pause
        for _ in range(30):
            for w, own in zip(weights, curvature.split(N // 2), strict=True):
                w.grad = w.detach() * own
            with allocations:
                opt.step()
        assert opt.anderson.stats.accelerated > 4
        assert allocations.most <= allowed, allocations.found

    run_ranks(ranks, program)


def test_a_history_that_is_made_anew_leaves_nothing_behind(monkeypatch):
    """Views that r is read through would keep all columns alive."""
    monkeypatch.setattr(flatten, "FEW", 0)
    weights = [torch.nn.Parameter(torch.ones(5)) for _ in "ab"]
    config = AndersonConfig(method="residual", noise_gate=None, history_depth=3)
    opt = AndersonOptimizer(torch.optim.SGD(weights, lr=0.1), anderson=config)

    def step():
        for w in weights:
            w.grad = w.detach().clone()
        opt.step()

    for _ in range(4):
        step()
    kept = opt.anderson_engine.problem._layout._views.values()
    views = [weakref.ref(view) for each in kept for view in each]
    for w in weights:
        w.data = w.data.double()
        w.grad = None
    step()
    assert views and not any(view() is not None for view in views)


GROWTH = """
import resource
import torch
from aadl_hvd.core.averages import WeightAverages

n = 2**22
averages = WeightAverages((0.9, 0.99, 0.997), 2, n, torch.float32, torch.device("cpu"))
w, r = torch.ones(2, n)
averages.take(w, r)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
averages.partial_gains(w, r)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 4 / n)
"""


def test_chunks_of_averages_leave_no_gaps_in_memory():
    """What is kept from each chunk must not lie between memory that comes and goes: 3 n/P."""
    run = [sys.executable, "-c", GROWTH]
    found = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(found.stdout) < 0.5

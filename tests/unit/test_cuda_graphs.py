"""cuda_graphs=True on the pretended GPU: fewer launches, and the same bits in all that may change.

A pretended graph works on the memory that its operations were captured on. So a piece that is run
again though something it depends on has changed gives other bits here, as on a GPU.
"""

import copy
import warnings

import pytest
import torch

from aadl_hvd import AndersonConfig, AndersonOptimizer
from aadl_hvd.core import captures
from aadl_hvd.core.invariance import ScaleInvariance
from aadl_hvd.core.sharding import Sharding
from benchmarks.pretend_gpu import GPU, PretendGpu, PretendGraph

SHAPES = ((6, 5), (7,), (3, 2, 2))
STEPS = 240  # the sums over ten columns are captured at 180
CHANGE = 195
# The last step with a new graph, where nothing is forgotten: of the sums.
LAST = 175
SUBSPACE = {"method": "subspace"}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.5, foreach=True)


def decayed(parameters):
    return torch.optim.SGD(parameters, lr=0.05, weight_decay=1e-3, foreach=True)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, foreach=True)


class Run:
    """A quadratic with noise; new gradient tensors in every step."""

    def __init__(self, gpu, graphs, make=sgd, **settings):
        self.gpu, generator = gpu, torch.Generator().manual_seed(0)
        self.made = []
        self.generator, self.launches, self.graphs = generator, [], []
        values = [torch.randn(shape, generator=generator) for shape in SHAPES]
        self.weights = [torch.nn.Parameter(value.to(GPU)) for value in values]
        self.curvature = [torch.logspace(-2, 0, w.numel()).view(w.shape).to(GPU) for w in values]
        config = AndersonConfig(**SUBSPACE | settings, cuda_graphs=graphs)
        self.opt = AndersonOptimizer(make(self.weights), anderson=config)

    @property
    def captured(self):
        """The last step with a new graph."""
        return max(self.made, default=-1)

    def step(self):
        before = PretendGraph.made
        with torch.no_grad():
            for w, curvature in zip(self.weights, self.curvature, strict=True):
                noise = torch.randn(w.shape, generator=self.generator).to(GPU)
                w.grad = curvature * w + 1e-3 * noise if w.requires_grad else None
        launches, kernels = self.gpu.launches, len(self.gpu.kernels)
        self.opt.step()
        self.launches.append(self.gpu.launches - launches)
        self.graphs.append(self.gpu.kernels[kernels:].count("graph"))
        if PretendGraph.made > before:
            self.made.append(len(self.graphs) - 1)

    @property
    def flat(self):
        return torch.cat([w.detach().reshape(-1) for w in self.weights]).cpu()

    @property
    def captures(self):
        return self.opt.anderson._shard.captures


def nothing(run, step):
    pass


def schedule(run, step):
    run.opt.param_groups[0]["lr"] *= 0.999


def reset(run, step):
    if step == CHANGE:
        run.opt.anderson.reset()


def freeze(run, step):
    if step == CHANGE:
        run.weights[1].requires_grad_(False)


def new_memory(run, step):
    if step in (190, CHANGE, 202):
        run.kept = [w.data for w in run.weights]  # so that nothing new lies where they lay
        for w in run.weights:
            w.data = w.data.clone()


def hand_over(run, step):
    """The other method begins, and the subspace method comes back: memory is freed in between."""
    if step == CHANGE:
        run.opt.anderson._subspace.release()


CASES = {
    "nothing changes": (nothing, {}),
    "schedule of rates": (schedule, {}),
    "reset": (reset, {}),
    "frozen parameter": (freeze, {}),
    "new memory of weights": (new_memory, {}),
    "freed history": (hand_over, {}),
    "overlap": (nothing, {"overlap": True}),
    "bfloat16": (nothing, {"history_dtype": torch.bfloat16}),
    "weight decay": (nothing, {"make": decayed}),
    "AdamW": (schedule, {"make": adamw}),
    "residual-norm": (schedule, {"method": "residual"}),
}


@pytest.fixture(autouse=True)
def early(monkeypatch):
    """Pieces are captured at the second call: the runs are shorter."""
    monkeypatch.setattr(captures.Captures, "WARM", 1)


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits(name):
    change, settings = CASES[name]
    with PretendGpu() as gpu:
        with_graphs, without = (Run(gpu, graphs, **settings) for graphs in (True, False))
        for step in range(STEPS):
            for run in (with_graphs, without):
                change(run, step)
                run.step()
            assert torch.equal(with_graphs.flat, without.flat), step
        assert not any(without.graphs)
        assert sum(with_graphs.graphs[-30:]) >= 10, "pieces are replayed to the end"
        if change in (nothing, schedule):
            of_a_block = 2 if name == "residual-norm" else 4
            assert max(with_graphs.graphs[-11:]) >= of_a_block, "those of a block's end as well"
            assert with_graphs.captured <= LAST, "no new graphs, step by step"
        assert sum(with_graphs.launches[-60:]) < sum(without.launches[-60:])
        assert with_graphs.opt.anderson.stats.accelerated == without.opt.anderson.stats.accelerated
        assert without.opt.anderson.stats.accelerated > 5


def test_launches_of_a_block():
    with PretendGpu() as gpu:
        with_graphs, without = (Run(gpu, graphs) for graphs in (True, False))
        for run in (with_graphs, without):
            for _ in range(STEPS):
                run.step()
        assert max(with_graphs.launches[-10:]) <= 40 < max(without.launches[-10:])
        assert sum(with_graphs.launches[-10:]) < 0.7 * sum(without.launches[-10:])


def test_the_state_is_the_same():
    with PretendGpu() as gpu:
        states = []
        for graphs in (True, False):
            run = Run(gpu, graphs)
            for _ in range(135):
                run.step()
            states.append(copy.deepcopy(run.opt.sharded_state_dict()))
            del states[-1]["anderson"]["config"]["cuda_graphs"]
        assert repr(states[0]) == repr(states[1])


def test_falls_back_for_good_with_one_warning(monkeypatch):
    def refuse(self, *_):
        raise RuntimeError("no graphs today")

    monkeypatch.setattr(PretendGraph, "note", refuse)
    monkeypatch.setattr(captures.Captures, "failed", False)  # and so again after this test
    with PretendGpu() as gpu:
        with_graphs, without = (Run(gpu, graphs) for graphs in (True, False))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(60):
                with_graphs.step()
                without.step()
        assert [str(x.message) for x in seen if "cuda_graphs" in str(x.message)] == [
            "cuda_graphs=True: a CUDA graph could not be captured (no graphs today). Steps go on "
            "without graphs. After a failed capture torch's random numbers and memory on this GPU "
            "may be unusable: begin again with cuda_graphs=False."
        ]
        assert torch.equal(with_graphs.flat, without.flat)
        assert not any(with_graphs.graphs) and not with_graphs.captures.used
        assert not Run(gpu, True).captures.used, "tried again"


def test_without_averages_no_empty_graph_is_captured():
    """torch warns of graphs that have no work in them."""
    with PretendGpu() as gpu:
        run = Run(gpu, True, averages=())
        for _ in range(60):
            run.step()
        names = {key[0] for key in run.captures._known}
    assert names and not names & {"gains", "take"}


def test_memory_is_freed_with_the_history():
    with PretendGpu() as gpu:
        run = Run(gpu, True)
        for _ in range(60):
            run.step()
        assert run.captures._known
        run.opt.anderson._subspace.release()
        assert not run.captures._known


def test_few_pieces_are_remembered():
    with PretendGpu():
        runs, x = captures.Captures(True, GPU, 4), torch.zeros(4, device=GPU)
        for key in range(100):
            runs.run(lambda: x.add_(1.0), key)
        assert len(runs._known) == runs.MOST
        assert x.tolist() == [100.0] * 4


def test_a_processor_and_many_rows_capture_nothing():
    for device, rows in ((torch.device("cpu"), 4), (GPU, captures.CHUNK_GPU + 1)):
        assert not captures.Captures(True, device, rows).used
    x = torch.nn.Parameter(torch.ones(3))
    opt = AndersonOptimizer(torch.optim.SGD([x], lr=0.1), anderson=AndersonConfig(cuda_graphs=True))
    x.grad = torch.ones(3)
    opt.step()
    assert x.tolist() == pytest.approx([0.9] * 3)


def test_a_tensor_that_moves_gets_memory_that_stays():
    with PretendGpu():
        runs, still = captures.Captures(True, GPU, 4), torch.ones(4, device=GPU)
        assert runs.steady("still", still) is runs.steady("still", still) is still
        kept = [torch.full((4,), float(i), device=GPU) for i in range(4)]
        found = [runs.steady("moves", tensor) for tensor in kept]
        assert found[0] is kept[0], "it may never move"
        assert found[1] is not kept[1]
        assert len({captures.where(tensor) for tensor in found[1:]}) == 1
        assert found[-1].tolist() == [3.0] * 4
        assert kept[0].tolist() == [0.0] * 4, "memory of others is never written"
        assert runs.steady("moves", torch.zeros(2, device=GPU)).shape == (2,)


def test_sums_of_other_tensors_are_another_piece():
    """The lengths of the segments lie on the device: a graph must not read those of before."""
    with PretendGpu():
        runs = captures.Captures(True, GPU, 4)
        looked = ScaleInvariance(Sharding("rows", 4, 1, 1, 0))
        w = torch.arange(4.0, device=GPU)
        for sizes in ([1, 3], [1, 3], [1, 3], [3, 1], [1, 3], [3, 1], [1, 3], [1, 3]):
            key = looked.layout(sizes), captures.where(w)
            found = runs.run(lambda sizes=sizes: looked.sums(sizes, w, w, w), key)
            first = sum(x * x for x in range(sizes[0]))
            assert found.tolist() == [first, 14 - first] * 4, sizes

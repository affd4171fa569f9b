"""What the library does where parameters are on a GPU, on a pretended one.

When the host synchronizes with the GPU: that drains the GPU's queue. Where it is not needed, the
host loses what it gains by being ahead. Also: the GPU's way computes what the processor computes.
"""

import contextlib
import dataclasses
import math

import pytest
import torch

from aadl_hvd import AndersonConfig, AndersonOptimizer
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core import chunking, gram, products
from aadl_hvd.core.accelerator import Accelerator
from benchmarks.pretend_gpu import GPU, PretendGpu

CPU = torch.device("cpu")
SHAPES = ((30, 10), (40,), (4, 3, 3, 3), ())
P, STEPS = 4, 13
SETTINGS = {
    "default": {},
    "bare": {"noise_gate": None, "averages": ()},
    "bfloat16": {"history_dtype": "bfloat16"},
    "columns": {"layout": "columns"},
    "columns, bfloat16": {"layout": "columns", "history_dtype": "bfloat16"},
    "step": {"residual": "step", "safeguard": "none", "noise_gate": None},
    "moving average": {"average_window": 2},
    "safeguard": {"safeguard": "residual"},
}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(chunking, "CHUNK_GPU", 128)
    monkeypatch.setattr(chunking, "CHUNK_WIDE", 64)


def sgd(parameters):
    # On a GPU foreach is torch's own choice.
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.5, weight_decay=0.01, foreach=True)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05, foreach=True)


@dataclasses.dataclass
class Run:
    """Weights at the end; by step the operations that synchronize, and all kernels."""

    weights: torch.Tensor
    synchronizations: list
    kernels: list
    accelerated: int = 0


def train(
    device,
    config=None,
    comm=None,
    make=sgd,
    observe=False,
    dtype=torch.float32,
    passes=1,
    p=P,
    pretend=True,
):
    """A quadratic, one of its weights in channels_last; config None: the base optimizer alone."""
    gpu = PretendGpu() if device.type == "cuda" and pretend else None
    generator = torch.Generator().manual_seed(0)
    run = Run(torch.empty(0), [], [])
    with gpu or contextlib.nullcontext():
        values = [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]
        values[2] = values[2].to(memory_format=torch.channels_last)
        weights = [torch.nn.Parameter(value.to(device)) for value in values]
        diagonal = [0.1 + torch.rand(shape, generator=generator, dtype=dtype) for shape in SHAPES]
        diagonal = [part.to(device) for part in diagonal]
        opt = make(weights)
        problem, means = None, []
        if config is not None:
            config = dataclasses.replace(config, history_depth=3, frequency=p)
            opt = AndersonOptimizer(opt, backward_passes_per_step=passes, anderson=config)
            problem = opt.anderson_engine.problem
            if comm is not None:
                opt.anderson = opt.anderson_engine.accelerator = Accelerator(config, comm)
                if config.noise_gate is not None:
                    problem.sample_gradients(1, 1.0)

                def reduce():
                    for w, mean in means:
                        w.grad = mean

                opt.anderson_engine.reduce = reduce  # samples are taken before and after it
        for _ in range(STEPS):
            sampled = comm is not None and config.noise_gate is not None
            sampled = sampled and opt.anderson.measures_noise
            means.clear()
            with torch.no_grad():
                for w, part in zip(weights, diagonal, strict=True):
                    gradient = part * w
                    w.grad = gradient
                    if sampled:  # this rank's own is off by a little that stays
                        w.grad = gradient + 0.01 * (comm.rank - 0.5)
                        means.append((w, gradient))
                losses = [(w.square() * d).sum() for w, d in zip(weights, diagonal, strict=True)]
            if observe:
                opt.observe(0.5 * torch.stack(losses).sum())
            if gpu is not None:
                gpu.synchronizations.clear()
                gpu.kernels.clear()
            opt.step()
            if gpu is not None:
                run.synchronizations.append(list(gpu.synchronizations))
                run.kernels.append(list(gpu.kernels))
        run.weights = torch.cat([w.detach().reshape(-1) for w in weights]).cpu()
    run.accelerated = opt.anderson.stats.accelerated if config is not None else 0
    return run


def on_two_ranks(device, config, **kwargs):
    return run_ranks(2, lambda comm: train(device, config, comm, **kwargs))[1]


def last_acceleration(run):
    """Synchronizations of the last acceleration step, of the next step, and of those around."""
    accelerated = STEPS - 1 - (STEPS % P) if STEPS % P else STEPS - 1
    assert run.accelerated == STEPS // P, "an acceleration step was cut short"
    after = run.synchronizations[accelerated + 1]
    return (
        run.synchronizations[accelerated],
        after,
        [
            len(synchronizations)
            for synchronizations in run.synchronizations[accelerated - P + 2 : accelerated]
        ],
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_computes_what_the_processor_computes(name):
    """In float64, where the order of sums is no matter."""
    observe = name != "safeguard"
    config = AndersonConfig(**SETTINGS[name])
    here = on_two_ranks(CPU, config, observe=observe, dtype=torch.float64)
    there = on_two_ranks(GPU, config, observe=observe, dtype=torch.float64)
    assert there.accelerated == here.accelerated > 0
    torch.testing.assert_close(there.weights, here.weights, rtol=1e-6, atol=1e-9)


@pytest.fixture
def slowly(monkeypatch):
    """As if residuals fell slowly: R^T r is carried forward."""
    monkeypatch.setattr(gram, "DRIFT", math.inf)


@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize(
    ("name", "most"),
    [
        # Asked for: all that is summed up over the ranks at once, then the slope.
        ("default", 2),
        ("bare", 2),
        ("bfloat16", 2),
        ("columns", 2),
        ("columns, bfloat16", 2),
        ("step", 2),
        ("safeguard", 2),
    ],
)
def test_synchronizations_of_an_acceleration_step_alone(name, most):
    run = on_two_ranks(GPU, AndersonConfig(**SETTINGS[name]))
    accelerated, after, others = last_acceleration(run)
    assert len(accelerated) == most, accelerated
    assert set(accelerated) <= {"_to_copy", "_local_scalar_dense"}, "not by an index or a copy"
    assert len(after) == (name == "safeguard"), "the verdict"
    assert not any(others)


@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.RAdam])
def test_steps_counted_on_the_device_are_left_there(make):
    """One for each parameter: asked for one by one they would be a synchronization for each."""
    run = on_two_ranks(
        GPU, AndersonConfig(), make=lambda p: make(p, lr=0.05, foreach=True, capturable=True)
    )
    assert run.accelerated
    assert max(map(len, run.synchronizations)) == 2


@pytest.mark.usefixtures("slowly")
def test_synchronizations_for_observed_losses():
    """In the acceleration step with all else; and in the verdict, once."""
    accelerated, after, others = last_acceleration(
        on_two_ranks(GPU, AndersonConfig(), observe=True)
    )
    assert (len(accelerated), len(after), any(others)) == (2, 1, False)
    # p = 2: the step before an acceleration step is the verdict on the last one.
    run = on_two_ranks(GPU, AndersonConfig(), observe=True, p=2)
    assert [len(synchronizations) for synchronizations in run.synchronizations[-5:]] == [
        1,
        2,
        1,
        2,
        1,
    ]


@pytest.mark.usefixtures("slowly")
def test_synchronizations_for_a_moving_average():
    accelerated, after, others = last_acceleration(
        on_two_ranks(GPU, AndersonConfig(**SETTINGS["moving average"]))
    )
    assert (len(accelerated), len(after), others) == (3, 1, [1, 1])


@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("passes", [1, 2])
def test_an_ordinary_step_is_the_base_optimizers(make, passes):
    """Neither a synchronization nor a kernel beyond those of the base optimizer."""
    config = AndersonConfig(store_every=P)
    base = train(GPU, make=make)
    run = train(GPU, config, make=make, passes=passes)
    accelerated = STEPS - 2
    for step in range(accelerated - P + 1, accelerated):
        assert run.synchronizations[step] == base.synchronizations[step] == []
        assert run.kernels[step] == base.kernels[step]
    assert len(run.kernels[accelerated]) > len(base.kernels[accelerated])
    most = 2 if make is sgd else 3  # Adam: whether what Y holds must be completed
    assert 0 < len(run.synchronizations[accelerated]) <= most


def test_widened_columns_stay_short(monkeypatch):
    """A history in bfloat16 on a GPU takes 4 m bytes for each row that is widened."""
    widened, lengths = products._widened, []

    def spy(columns, memory):
        if memory is not None:
            lengths.append(memory.shape[1])
        return widened(columns, memory)

    monkeypatch.setattr(products, "_widened", spy)
    on_two_ranks(GPU, AndersonConfig(history_dtype="bfloat16"))
    assert set(lengths) == {64}
    lengths.clear()
    on_two_ranks(GPU, AndersonConfig())
    assert not lengths


# The pretended GPU itself


def test_what_counts_as_a_synchronization():
    with PretendGpu() as gpu:
        x = torch.arange(4.0).to(GPU)

        def synchronizations(work):
            gpu.synchronizations.clear()
            work()
            return gpu.synchronizations

        assert x.device == (x + 1).device == x[1:].device == GPU
        for work in (
            lambda: x.add_(1.0),
            lambda: x * torch.tensor(2.0),
            lambda: torch.zeros(3, device=GPU),
            lambda: torch.ones(3).to(GPU, non_blocking=True),
            lambda: x[2:].copy_(x[:2]),
            lambda: torch.ones(3).sum().item(),
            lambda: x[torch.zeros(2, dtype=torch.int64, device=GPU)],
        ):
            assert not synchronizations(work)
        for work in (
            lambda: float(x.sum()),
            lambda: x.tolist(),
            lambda: x.cpu(),
            lambda: torch.ones(3).to(GPU),
            lambda: x.copy_(torch.ones(4)),
            lambda: x[[0, 1]],
            lambda: x[x > 0],
            lambda: bool(x.any()),
        ):
            assert len(synchronizations(work)) == 1


def test_two_devices_do_not_mix():
    with PretendGpu():
        x = torch.ones(4, device=GPU)
        for work in (
            lambda: x + torch.ones(4),
            lambda: torch.stack([x, torch.ones(4)]),
            lambda: torch.cat([x, torch.ones(1)]),
            lambda: torch.dot(x, torch.ones(4)),
        ):
            with pytest.raises(AssertionError, match="two devices"):
                work()

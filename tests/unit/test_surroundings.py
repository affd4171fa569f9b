"""What a training script may have switched on, or do wrong, around an accelerated step."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from problems import TEXTBOOK

from aadl_hvd import AndersonConfig, AndersonOptimizer, ConfigError
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core.accelerator import Accelerator

SCRIPT = """
import torch
{setting}
from aadl_hvd import AndersonConfig, AndersonOptimizer, ConfigError
matmul = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
before = [m.fp32_precision for m in matmul]
p = torch.nn.Parameter(torch.randn(10))
opt = torch.optim.SGD([p], lr=0.1)
opt = AndersonOptimizer(opt, anderson=AndersonConfig(noise_gate=None))
for _ in range(6):
    p.grad = p.detach() * torch.arange(1.0, 11.0)
    opt.step()
assert opt.anderson.stats.accelerated > 0, opt.anderson.stats
assert [m.fp32_precision for m in matmul] == before
"""


@pytest.mark.parametrize(
    "setting",
    [
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.set_float32_matmul_precision('medium')",
    ],
)
def test_reduced_precision_of_matrix_products(setting):
    """In either spelling: torch raises where code reads the one after the other was set."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has only the old switches")
    script = SCRIPT.format(setting=setting)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"history_dtype": "bfloat16", "safeguard": "loss"},
        {"residual": "step", "average_window": 2},
        {"layout": "columns", "noise_gate": None},
    ],
)
def test_another_default_device(settings):
    """As torch.set_default_device("cuda") with a model on the processor; meta holds no numbers."""
    path = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        start = torch.randn(300)
        weight = torch.nn.Parameter(start.clone())
        diagonal = torch.linspace(0.1, 1.0, 300)
        with torch.device(device):
            opt = AndersonOptimizer(
                torch.optim.SGD([weight], lr=0.3),
                backward_passes_per_step=2,
                anderson=AndersonConfig(frequency=2, store_every=1, history_depth=3, **settings),
            )

            def closure(opt=opt, weight=weight, diagonal=diagonal):
                opt.zero_grad()
                for _ in range(2):
                    loss = 0.5 * (weight.square() * diagonal).sum()
                    loss.backward()
                return loss.detach()

            for step in range(12):
                opt.step(closure)
                if step == 8:  # and where all is loaded
                    opt.load_state_dict(opt.state_dict() | opt.sharded_state_dict())
            with opt.averaged_weights():
                averaged = weight.detach().clone()
        path.append((weight.detach(), averaged, opt.anderson.stats.accelerated))
    assert all(torch.equal(a, b) for a, b in zip(*(p[:2] for p in path), strict=True))
    assert path[0][2] == path[1][2] > 0


def test_products_are_exact_where_bfloat16_products_are_allowed():
    torch.manual_seed(0)
    start = torch.randn(300)

    def weights():
        p = torch.nn.Parameter(start.clone())
        opt = AndersonOptimizer(torch.optim.SGD([p], lr=0.1))
        for _ in range(8):
            p.grad = p.detach() * torch.linspace(0.1, 3.0, 300)
            opt.step()
        return p.detach()

    expected = weights()
    precision = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert torch.equal(weights(), expected)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = precision


def test_closure_without_a_loss_is_an_error_where_the_loss_is_needed():
    model = torch.nn.Linear(3, 2)
    config = AndersonConfig(safeguard="loss", frequency=1, noise_gate=None)
    opt = AndersonOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), anderson=config)

    def closure():
        opt.zero_grad()
        model(torch.ones(3)).square().sum().backward()

    with pytest.raises(ConfigError, match=r"Invalid loss=None: .* `return loss`"):
        for _ in range(4):
            opt.step(closure)


def test_closure_that_raises_leaves_nothing_behind():
    p = torch.nn.Parameter(torch.ones(4))
    opt = AndersonOptimizer(torch.optim.SGD([p], lr=0.1), anderson=AndersonConfig(**TEXTBOOK))

    def broken():
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        opt.step(broken)
    problem = opt.anderson_engine.problem
    assert problem._due is None and problem._gradient is None and problem._deviations is None
    for _ in range(4):
        p.grad = p.detach() * torch.arange(1.0, 5.0)
        opt.step()
    assert opt.anderson.stats.accelerated > 0


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("size", [1, 2])
def test_between_steps_the_algorithm_does_not_keep_the_model_alive(size, layout):
    """One who keeps the statistics of a training, and so its algorithm, can free its weights."""

    def program(comm):
        weight = torch.nn.Parameter(torch.ones(40))
        config = AndersonConfig(noise_gate=None, frequency=2, store_every=1, layout=layout)
        opt = AndersonOptimizer(torch.optim.SGD([weight], lr=0.1), anderson=config)
        opt.anderson = opt.anderson_engine.accelerator = Accelerator(config, comm)
        for _ in range(8):
            weight.grad = weight.detach() * torch.linspace(0.1, 1.0, 40)
            opt.step()
        assert opt.anderson.compare_replicas(opt.anderson_engine.problem)
        return opt.anderson, weakref.ref(weight)

    results = run_ranks(size, program)
    gc.collect()
    for accelerator, alive in results:
        assert accelerator.stats.accelerated > 0
        assert alive() is None


def test_a_rejected_point_is_not_averaged():
    """After a rejection the window's newest iterate is the base step that training goes on from."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6))
    opt = AndersonOptimizer(
        torch.optim.SGD([p], lr=0.3),
        anderson=AndersonConfig(
            **TEXTBOOK,
            frequency=1,
            safeguard="residual",
            average_window=3,
            average_threshold=1e9,
        ),
    )
    average = opt.anderson._moving_average
    rejected = 0
    for _ in range(40):
        p.grad = torch.randn(6) + p.detach() * torch.linspace(0.5, 3.0, 6)
        opt.step()
        average = opt.anderson._moving_average
        newest = average._iterates[(average._pushed - 1) % 3]
        assert torch.equal(newest, p.detach())
        rejected = opt.anderson.stats.rejected["residual"]
    assert rejected > 2


def test_closure_sees_the_autocast_that_step_was_called_in():
    p = torch.nn.Parameter(torch.ones(4))
    opt = AndersonOptimizer(
        torch.optim.SGD([p], lr=0.1),
        anderson=AndersonConfig(**TEXTBOOK, safeguard="loss", frequency=1),
    )
    seen = []

    def closure():
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        opt.zero_grad()
        loss = (p.square() * torch.arange(1.0, 5.0)).sum()
        loss.backward()
        return loss

    for enabled in (True, False):
        seen.clear()
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            for _ in range(3):
                opt.step(closure)
        assert len(seen) > 3  # two more for each accelerated step
        assert {was for was, _ in seen} == {enabled}
        assert not enabled or {dtype for _, dtype in seen} == {torch.float16}

"""The scripts in examples/: with Horovod's own class and with ours, no other word of them changed.

With acceleration off both end with the same weights, bit for bit; with it on, ours ends well.
"""

import functools
import runpy
from pathlib import Path

import horovod.torch as hvd
import pytest
import torch
from launching import documented
from training import BRIEF, assert_replicas_equal, assert_same_bits, round_gradients, unless_brief

import aadl_hvd
from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer

EXAMPLES = Path(__file__).parents[2] / "examples"
OFF = AndersonConfig(enabled=False)
SHUT = AndersonConfig(noise_gate=1e30, method="residual")  # tries, and finds nothing but noise
IMAGES = (
    *("--model", "shufflenet_v2_x0_5", "--size", "32", "--random-images", "64"),
    *("--batch-size", "8", "--epochs", "2", "--warmup-epochs", "1"),
)


def as_written(example, command=0):
    """An example and its arguments, as one of the commands in its docstring has them."""
    words = documented(example)[command]
    program = words.index(f"examples/{example}.py")
    return example, *words[program + 1 :]


RUNS = {
    "amp": as_written("digits_amp"),
    "schedule, cosine": as_written("digits_schedule"),
    "schedule, plateau": as_written("digits_schedule", 1),
    "benchmark": (
        *("synthetic_benchmark", "--model", "shufflenet_v2_x0_5", "--size", "32"),
        *("--batch-size", "4", "--warmup-batches", "2", "--batches", "2", "--iterations", "2"),
    ),
    "digits": ("digits", "--epochs", "2"),
    "digits, fp16": ("digits", "--epochs", "1", "--fp16-allreduce"),
    "digits, mixed": ("digits", "--epochs", "1", "--mixed-precision"),
    "digits, predivided": ("digits", "--epochs", "1", "--gradient-predivide-factor", "2"),
    "images": ("images", *IMAGES),
    "images, accumulated": (
        *("images", *IMAGES, "--batches-per-allreduce", "2", "--fp16-allreduce"),
        *("--clip", "1.0"),
    ),
}
LONG = pytest.mark.long
ONE_OF_EACH = "amp", "schedule, plateau", "benchmark", "digits", "images, accumulated"
# Gradients reach 140 there: float16 adds up six of them exactly where they are multiples of 1/2.
BITS = {"images": 1}


@pytest.fixture
def run(monkeypatch):
    """run(script, *arguments, wrap=...): its model, what it printed, and its optimizer."""

    def run(script, *arguments, wrap, **settings):
        made = []

        def wrapped(optimizer, *args, **kwargs):
            if hvd.size() > 2:  # where Horovod alone differs from itself in the last bit
                groups = optimizer.param_groups
                parameters = torch.nn.ParameterList(p for g in groups for p in g["params"])
                round_gradients(parameters, BITS.get(script, 6))
            made.append(wrap(optimizer, *args, **kwargs, **settings))
            return made[-1]

        functools.update_wrapper(wrapped, wrap)
        monkeypatch.setattr(aadl_hvd, "DistributedAndersonOptimizer", wrapped)
        program = runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="example")
        model, found = program["main"](["--no-cuda", *arguments])
        assert len(made) == 1
        return model, found, made[0]

    return run


@pytest.fixture
def folder(tmp_path):
    """The same on every rank."""
    return Path(hvd.broadcast_object(str(tmp_path), root_rank=0, name="folder"))


def test_every_example_is_run():
    # In tests/elastic and tests/torchrun.
    elsewhere = {"digits_elastic", "digits_ddp", "digits_ddp_short", "digits_fsdp"}
    elsewhere |= {"digits_lightning", "digits_accelerate"}
    found = {path.stem for path in EXAMPLES.glob("*.py")}
    assert found == {script for script, *_ in RUNS.values()} | elsewhere


@pytest.mark.parametrize(
    "name",
    ["digits", "images, accumulated"]
    if BRIEF
    else [name if name in ONE_OF_EACH else pytest.param(name, marks=LONG) for name in RUNS],
)
@pytest.mark.parametrize(
    "config",
    [SHUT, pytest.param(OFF, marks=LONG)],
    ids=lambda c: f"gate {c.noise_gate:g}",
)
def test_same_weights_with_acceleration_off(run, name, config):
    script, *arguments = RUNS[name]
    torch.manual_seed(hvd.rank())  # for those that set no seed
    expected, numbers, _ = run(script, *arguments, wrap=hvd.DistributedOptimizer)
    torch.manual_seed(hvd.rank())
    model, found, opt = run(script, *arguments, wrap=DistributedAndersonOptimizer, anderson=config)
    assert_same_bits(model.state_dict(), expected.state_dict(), "weights and statistics")
    assert found == numbers
    assert opt.anderson.stats.accelerated == 0
    assert opt.anderson.stats.steps > 0
    assert (opt.anderson.stats.rejected["noise"] > 0) == (config is SHUT)
    assert_replicas_equal(model)


def test_amp_clips_the_mean_of_gradients_that_are_no_longer_scaled(run, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def record(parameters, limit):
        norms.append(float(clip(parameters, limit)))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    run("digits_amp", "--epochs", "1", wrap=DistributedAndersonOptimizer)
    assert len(norms) >= 4 and max(norms) < 100.0, "65536 times as large"
    assert hvd.allgather_object(norms) == [norms] * hvd.size(), "a rank's own gradient"


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_schedules_set_the_same_rate_on_all_ranks(run, schedule):
    arguments = ("--schedule", schedule, "--epochs", "4", "--lr", "0.2")
    _, found, _ = run("digits_schedule", *arguments, wrap=DistributedAndersonOptimizer)
    assert hvd.allgather_object(found) == [found] * hvd.size()
    rate, best = 0.2 * hvd.size(), float("inf")
    if schedule == "cosine":
        assert found[0][1] == pytest.approx(rate) and found[-1][1] < 1e-6 * rate
        return
    for loss, after in found:
        rate, best = (rate, loss) if loss < 0.8 * best else (rate / 2, best)
        assert after == pytest.approx(rate)


@pytest.mark.parametrize(
    "wrap", unless_brief(DistributedAndersonOptimizer, hvd.DistributedOptimizer)
)
def test_resumed(run, folder, wrap):
    """Rank 0 loads its checkpoint, Horovod sends it round: as if there had been no stop.

    Without weight decay, see below; and batch-norm statistics are those of rank 0 from then on.
    """
    settings = {} if wrap is hvd.DistributedOptimizer else {"anderson": OFF}
    script, *arguments = (*RUNS["images"], "--wd", "0")
    through, numbers, _ = run(script, *arguments, "--epochs", "3", wrap=wrap, **settings)
    checkpoints = folder / wrap.__name__
    checkpoints.mkdir(exist_ok=True)
    arguments += ["--checkpoints", str(checkpoints)]
    _, first, _ = run(script, *arguments, wrap=wrap, **settings)
    hvd.barrier()  # the file is written
    model, second, _ = run(script, *arguments, "--epochs", "3", wrap=wrap, **settings)
    assert first == numbers[:2]
    assert [loss for loss, *_ in second] == [numbers[2][0]]
    assert_same_bits(list(model.parameters()), list(through.parameters()), "weights")


def test_resumed_with_acceleration_on(run, folder):
    """No rank waits for rank 0, which alone has loaded anything, and all end with its weights.

    Horovod's step on zero gradients decays weights, after they were sent round, where no state was
    loaded: the ranks' weights differ until the first attempt.
    """
    on = AndersonConfig(noise_gate=None, relaxation=0.2)
    script, *arguments = (*RUNS["images"], "--wd", "0.01", "--checkpoints", str(folder))
    wrap = DistributedAndersonOptimizer
    _, _, before = run(script, *arguments, "--epochs", "1", wrap=wrap, anderson=on)
    hvd.barrier()
    model, found, opt = run(script, *arguments, "--epochs", "3", wrap=wrap, anderson=on)
    assert len(found) == 2
    loaded = before.anderson.stats.accelerated if hvd.rank() == 0 else 0
    assert opt.anderson.stats.accelerated > loaded
    assert opt.anderson.stats.resets["desynchronized"] == 1
    assert_replicas_equal(model)


SETTINGS = {
    "default": None,
    "every point taken": AndersonConfig(noise_gate=None, safeguard="none", relaxation=0.1),
}


@LONG
@pytest.mark.parametrize("settings", SETTINGS)
def test_digits_end_well_with_acceleration_on(run, settings):
    arguments = ("digits", "--epochs", "4" if BRIEF else "8")
    if SETTINGS[settings] is None:
        _, expected, _ = run(*arguments, wrap=hvd.DistributedOptimizer)
    wrap, anderson = DistributedAndersonOptimizer, SETTINGS[settings]
    model, found, opt = run(*arguments, wrap=wrap, anderson=anderson)
    stats = opt.anderson.stats
    if anderson is None:
        assert found[-1][0] < 1.5 * expected[-1][0] + 0.1
        assert found[-1][1] > expected[-1][1] - 0.1
    else:  # against the noise, which the gate is there for
        assert min(found)[0] < found[0][0]
    attempts = stats.accelerated + sum(stats.rejected.values())
    assert attempts >= stats.steps // 2 - 1
    if anderson is not None:
        assert stats.accelerated == attempts
    assert_replicas_equal(model)

"""The count of launches: whole cycles, of points that were accepted, on a pretended GPU."""

import json

import pytest
import torch

from aadl_hvd.optim.problem import OptimizerFixedPoint
from benchmarks import launches
from benchmarks.pretend_gpu import PretendGpu
from benchmarks.workload import shapes_of

WORDS = ["--parameters", "2000", "--ranks", "8", "--warm", "25", "--cycles", "2"]


def test_a_short_run(tmp_path, capsys):
    out, cases = tmp_path / "launches.json", ["subspace", "subspace, overlap=True"]
    assert launches.main([*WORDS, "--cases", *cases, f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert (found["tensors"], found["ranks"], found["device"]) == (161, 8, "pretended")
    assert "launches of a cycle" in capsys.readouterr().out
    at_once, late = found["runs"]
    assert (at_once["steps"], late["steps"]) == (10, 11)
    for run in found["runs"]:
        assert 0 < run["least"] < run["most"] < run["launches"] < 400
    # The jump's memory, its copy, and the addition; one step more reads nothing.
    assert abs(late["launches"] - at_once["launches"]) < 20


def test_a_cycle_without_an_accepted_point_is_none(tmp_path, capsys, monkeypatch):
    steps, _ = launches.CASES["residual-norm"]
    never = launches.Setting({"method": "residual", "warmup_steps": 1000})
    monkeypatch.setitem(launches.CASES, "residual-norm", (steps, never))
    words = [*WORDS, "--cases", "residual-norm", f"--out={tmp_path / 'x.json'}"]
    assert launches.main(words) == 2
    assert "0 accelerated points" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--ranks", "0"], ["--warm", "-1"], ["--parameters", "x"]])
def test_bad_arguments(words, capsys, tmp_path):
    assert launches.main([*words, f"--out={tmp_path / 'x.json'}"]) == 2
    assert words[0] in capsys.readouterr().err


def test_samples_of_the_gradient_start_little():
    """Of ResNet50's 161 tensors, in a step: in the backward pass, of the mean, before the step."""
    shapes, started = shapes_of("400000"), []
    for sampled in (True, False):
        with PretendGpu() as gpu, torch.no_grad():
            weights = [torch.nn.Parameter(torch.ones(shape, device="cuda")) for shape in shapes]
            problem = OptimizerFixedPoint(torch.optim.SGD(weights, lr=0.1), "gradient")
            problem.sample_gradients(1, 1.0)
            w, r = (torch.empty(1000, device="cuda") for _ in range(2))
            problem.read_before(0, 1000, w, r)
            for p in weights:
                p.grad = torch.ones_like(p)
            taker, gpu.launches = problem.samples, 0
            if sampled:
                for p in weights:
                    taker.take(p)
                taker.take_mean()
            else:
                problem.samples = None
            problem.keep_gradient()
            started.append(gpu.launches)
            assert (problem.deviations() is not None) == sampled
    with_samples, without = started
    assert 0 < with_samples - without <= 16

"""The benchmark of host time: what it calls a step, and what it counts."""

import json

import pytest
import torch

from benchmarks import host


def test_a_short_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(host, "WARM", 40)
    out = tmp_path / "host.json"
    words = ["--parameters", "resnet18", "--steps", "40", "--bases", "SGD", "--ranks", "1", "64"]
    assert host.main([*words, "--settings", "off", "subspace", f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert found["tensors"] == 62 and found["numbers"] == {"1": 16, "64": 66}
    assert "beyond it, us" in capsys.readouterr().out
    runs = {(run["case"], run["ranks"]): run["kinds"] for run in found["runs"]}
    for ranks in (1, 64):
        assert {*runs["off", ranks]} == {"other"}
        assert runs["off", ranks]["other"]["calls"] == 0
        kinds = runs["subspace", ranks]
        assert kinds["accelerated"]["steps"] == 4, "one jump in each block"
        assert kinds["other"]["steps"] == 36
        assert kinds["accelerated"]["calls"] > kinds["other"]["calls"] > 0
        times = kinds["other"]["beyond"]
        assert times["first_quartile"] <= times["median"] <= times["third_quartile"]


@pytest.mark.parametrize("ranks", [1, 1536])
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize(("name", "limits"), [
    ("subspace", {"other": 60, "accelerated": 260}),
    ("residual-norm", {"stored": 100, "rejected": 200, "accelerated": 200}),
])  # fmt: skip
def test_a_step_starts_few_operations(base, ranks, name, limits):
    """No vector of 161 is looked at by itself: not for samples, and not for second moments."""
    shapes = host.with_few_numbers([torch.Size([2])] * 161, ranks)
    plain, ours = (host.Run(base, s, shapes, ranks) for s in (None, host.SETTINGS[name]))
    plain.step()  # the first one makes the state of AdamW
    for _ in range(60):
        ours.step()
    calls, kernels = host._calls(plain, ours, 20)
    assert 0 < kernels < max(calls.values()), "views and memory are no kernels"
    assert {"stored", "other"} & {*calls}
    for kind, found in calls.items():
        assert found <= limits[kind], kind


def test_no_tensor_has_a_kernel_of_its_own():
    """Gradients that are no vectors have a view each, which no kernel makes."""
    shapes = host.with_few_numbers([torch.Size([2, 2]), torch.Size([2])] * 80, 1)
    plain, ours = (host.Run("SGD", s, shapes, 1) for s in (None, host.SETTINGS["subspace"]))
    for _ in range(40):
        ours.step()
    calls, kernels = host._calls(plain, ours, 20)
    assert kernels < 30 and calls["other"] < 80 + 20


@pytest.mark.parametrize("new", [True, False])
def test_gradients_are_new_in_each_step(new):
    run = host.Run("SGD", None, [torch.Size([3, 2]), torch.Size([4])], 1, new_gradients=new)
    before = [p.grad for p in run.parameters]
    run.step()
    for p, old in zip(run.parameters, before, strict=True):
        assert (p.grad is old) == (not new)
        assert p.grad.any()


@pytest.mark.parametrize("words", [["--steps", "0"], ["--ranks", "0"], ["--parameters", "x"]])
def test_bad_arguments(words, capsys, tmp_path):
    assert host.main([*words, f"--out={tmp_path / 'x.json'}"]) == 2
    assert words[0] in capsys.readouterr().err

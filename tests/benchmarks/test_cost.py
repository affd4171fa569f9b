"""The benchmarks of the cost run on real ranks and write what they say; no timing is asserted."""

import functools
import json

import pytest
import torch

from aadl_hvd import AndersonConfig
from benchmarks import memory, report
from benchmarks.cost import __main__ as cost
from benchmarks.cost import overhead
from benchmarks.cost.measure import Quadratic, Setting, in_one_process, measure
from benchmarks.simulate import __main__ as simulate
from benchmarks.workload import CYCLE_PARTS, Workload, shapes_of
from models.errors import UserError


def test_overhead(tmp_path, capsys):
    out = tmp_path / "found" / "overhead.json"
    words = ["--parameters=5000", "--depth=3", "--turns=2", f"--out={out}"]
    assert cost.main(["overhead", *words]) == 0
    found = json.loads(out.read_text())
    assert {"processor", "cores", "torch"} <= set(found["machine"])
    by_ranks = {P: [run for run in found["runs"] if run["ranks"] == P] for P in (1, 2)}
    for ranks, runs in by_ranks.items():
        names = [run["name"] for run in runs]
        dense = [overhead.DENSE] if ranks == 1 else []
        assert names == [*(setting.name for setting in overhead.settings(3, ranks)), *dense]
        for run in runs:
            assert run["n"] == 5000
            floor = 2 * 3 * 5000 / ranks * 4 / run["copy_bytes_per_s"]
            assert run["floor_s"] == pytest.approx(floor)
            if run["name"] == overhead.DENSE:
                continue
            assert run["accelerated"] == run["cycles"] == 2, "acceleration steps were cut short"
            assert set(run["parts_s"]) == set(CYCLE_PARTS)
            for part in run["parts_s"].values():
                assert 0 <= part["first_quartile"] <= part["median"] <= part["third_quartile"]
            # One small allreduce of the Gram matrix, one number for the slope.
            assert run["sent_bytes"]["gram"] > 0 and run["sent_bytes"]["update"] == 8
    assert out.with_suffix(".png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "p = q = 1" in printed and "QR" in printed


def test_scaling(tmp_path, capsys):
    out = tmp_path / "scaling.json"
    words = ["--numbers=4000", "--share=1000", "--depth=3", "--turns=2", "--ranks", "1", "2"]
    assert cost.main(["scaling", *words, f"--out={out}"]) == 0
    runs = json.loads(out.read_text())["runs"]
    sizes = {(run["kind"], run["layout"], run["ranks"]): run["n"] for run in runs}
    assert len(sizes) == 8
    assert sizes["strong", "rows", 2] == 4000
    assert sizes["weak", "columns", 2] == 2000
    assert out.with_suffix(".png").stat().st_size > 0
    assert "weak, rows, 2 ranks" in capsys.readouterr().out


def test_step_time(tmp_path, capsys):
    out = tmp_path / "step_time.json"
    assert cost.main(["step-time", "--problem=quadratic", "--turns=2", f"--out={out}"]) == 0
    runs = json.loads(out.read_text())["runs"]
    assert [(run["name"], run["ranks"], run["cycles"]) for run in runs] == [
        ("p = 5", 2, 4),
        ("p = 2", 2, 10),
    ]
    for run in runs:
        assert run["own_step_s"]["median"] > 0 and run["step_over_own"]["median"] > 0
    assert out.with_suffix(".png").stat().st_size > 0
    assert "quartiles" in capsys.readouterr().out


def test_cycles_and_stores_are_told_apart():
    """q = 1: a cycle of p = 2 stores twice, and has one acceleration step and one between."""
    config = AndersonConfig(
        history_depth=3, frequency=2, store_every=1, safeguard="none", noise_gate=None
    )
    make = functools.partial(Quadratic, [torch.Size([50, 3]), torch.Size([7])])
    found = measure(Setting("x", config, cycles=3), make, 2, in_one_process())
    assert (found["cycles"], found["accelerated"]) == (6, 6)
    assert found["between_over_own"]["median"] > 0
    assert found["history_bytes"] == 4 * 157 * (2 * 3 + 4 + 2 * len(config.averages))
    every = AndersonConfig(
        history_depth=3, frequency=1, store_every=1, safeguard="none", noise_gate=None
    )
    assert measure(Setting("x", every), make, 2, in_one_process())["between_over_own"] is None


def test_memory_follows_the_formula(tmp_path, capsys):
    """Large enough that Python's own ups and downs do not matter."""
    out = tmp_path / "memory.json"
    words = ["--parameters=2000000", "--depth=10", "--ranks", "1", "--repeats=1", f"--out={out}"]
    assert memory.main(words) == 0
    runs = json.loads(out.read_text())["runs"]
    ratios = {run["variant"]: run["extra_bytes"]["median"] / run["formula"] for run in runs}
    assert list(ratios) == [*memory.VARIANTS, memory.DENSE]
    assert 0.9 < ratios["rows"] < 1.6
    assert ratios["rows, bfloat16"] < ratios["rows"] - 0.2
    assert ratios[memory.DENSE] > 2.0
    assert "peak beyond" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 0


@pytest.mark.parametrize(
    ("program", "words", "named"),
    [
        (cost, ["overhead", "--parameters=resnet51"], "resnet51"),
        (cost, ["overhead", "--turns=0"], "--turns"),
        (cost, ["scaling", "--share=0"], "--share"),
        (cost, ["scaling", "--ranks", "2", "0"], "--ranks"),
        (cost, ["step-time", "--problem=nothing"], "--problem"),
        (cost, ["step-time", "--turns=-1"], "--turns"),
        (memory, ["--parameters=0"], "--parameters"),
        (memory, ["--ranks", "0"], "--ranks"),
        (memory, ["--repeats=0"], "--repeats"),
    ],
)
def test_wrong_options(program, words, named, tmp_path, capsys):
    assert program.main([*words, f"--out={tmp_path / 'x.json'}"]) == 2
    assert named in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_results_that_could_not_be_written_are_not_measured(tmp_path, capsys):
    (tmp_path / "file").touch()
    out = f"--out={tmp_path / 'file' / 'x.json'}"
    for words in (["overhead"], ["scaling"], ["step-time"]):
        assert cost.main([*words, out]) == 2
        assert "--out" in capsys.readouterr().err
    assert simulate.main([out, "--machine=summit"]) == 2
    assert "--out" in capsys.readouterr().err


def test_workload_is_resnet50_with_its_gradient():
    shapes = shapes_of("resnet50")
    assert sum(shape.numel() for shape in shapes) == 25_557_032
    workload = Workload([torch.Size([3, 2]), torch.Size([])])
    assert workload.n == 7
    workload.backward()
    for parameter in workload.parameters:
        ratio = parameter.grad / parameter.detach()
        assert ((ratio > 0.009) & (ratio < 1.01)).all()
    with pytest.raises(UserError, match="--parameters"):
        shapes_of("nothing")


def test_tables_and_quartiles():
    assert report.spread([3.0]) == {"median": 3.0, "first_quartile": 3.0, "third_quartile": 3.0}
    assert report.spread([1.0, 2.0, 3.0, 4.0, 5.0])["third_quartile"] == 4.0
    lines = report.table(["a", "bb"], [["x", "1"], ["long", "222"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "| ---- | --: |"

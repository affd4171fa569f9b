"""The benchmarks of the cost run on real ranks and write what they say; no timing is asserted."""

import json

import pytest
import torch

from benchmarks import memory, overhead, report, scaling
from benchmarks.simulate import __main__ as simulate
from benchmarks.workload import Workload, shapes_of
from models.errors import UserError


def test_overhead(tmp_path, capsys):
    out = tmp_path / "found" / "overhead.json"
    words = ["--parameters=5000", "--depth=3", "--events=2", f"--out={out}"]
    assert overhead.main(words) == 0
    found = json.loads(out.read_text())
    assert [run["ranks"] for run in found["runs"]] == [1, 2]
    assert {"processor", "cores", "torch"} <= set(found["machine"])
    for run in found["runs"]:
        assert run["n"] == 5000
        assert run["floor_s"] == pytest.approx(
            2 * 3 * 5000 / run["ranks"] * 4 / run["copy_bytes_per_s"]
        )
        assert list(run["variants"]) == [v.name for v in overhead.variants(3, run["ranks"])]
        for name, variant in run["variants"].items():
            assert variant["accelerated"] == 2, f"{name}: events were cut short"
            assert set(variant["parts_s"]) == set(overhead.EVENT_PARTS)
            for part in variant["parts_s"].values():
                assert 0 <= part["first_quartile"] <= part["median"] <= part["third_quartile"]
        assert ("dense" in run) == (run["ranks"] == 1)
    assert out.with_suffix(".png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "p = q = 1" in printed
    assert "QR" in printed


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


def test_scaling(tmp_path, capsys):
    out = tmp_path / "scaling.json"
    words = ["--numbers=4000", "--share=1000", "--depth=3", "--events=2", "--ranks", "1", "2"]
    assert scaling.main([*words, f"--out={out}"]) == 0
    runs = json.loads(out.read_text())["runs"]
    sizes = {(run["kind"], run["layout"], run["ranks"]): run["n"] for run in runs}
    assert len(sizes) == 8
    assert sizes["strong", "rows", 2] == 4000
    assert sizes["weak", "columns", 2] == 2000
    assert out.with_suffix(".png").stat().st_size > 0
    assert "weak, rows, 2 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "words", "named"),
    [
        (overhead, ["--parameters=resnet51"], "resnet51"),
        (overhead, ["--events=0"], "--events"),
        (memory, ["--parameters=0"], "--parameters"),
        (memory, ["--ranks", "0"], "--ranks"),
        (memory, ["--repeats=0"], "--repeats"),
        (scaling, ["--share=0"], "--share"),
        (scaling, ["--ranks", "2", "0"], "--ranks"),
    ],
)
def test_wrong_options(program, words, named, tmp_path, capsys):
    assert program.main([*words, f"--out={tmp_path / 'x.json'}"]) == 2
    assert named in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_results_that_could_not_be_written_are_not_measured(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert overhead.main([f"--out={tmp_path / 'file' / 'x.json'}"]) == 2
    assert "--out" in capsys.readouterr().err
    assert simulate.main([f"--out={tmp_path / 'file'}", "--machine=summit"]) == 2
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

"""The GPU benchmark from end to end, on the processor; no timing is asserted."""

import importlib.util
import json
import time
import types
import warnings
from unittest import mock

import pytest
import torch

from aadl_hvd import AndersonConfig
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import one_rank, parts, session, step
from benchmarks.pretend_gpu import PretendGpu
from benchmarks.simulate.model import history_bytes
from benchmarks.workload import Clock, gpu_synchronizations

SMALL = ["--device=cpu", "--parameters=3000", "--depth=3", "--cycles=1", "--ranks", "1", "4"]


def test_parts(tmp_path, capsys):
    words = ["--no-steps", "--dtypes", "float32", "bfloat16", f"--out={tmp_path}/gpu-DEVICE.json"]
    assert gpu.main([*SMALL, *words]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-cpu.json", "gpu-cpu.png"}
    found = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert found["device"]["name"] == "cpu" and "torch" in found["machine"]
    runs = {(run["ranks"], run["history_dtype"]): run for run in found["parts"]}
    assert list(runs) == [(P, dtype) for P in (1, 4) for dtype in ("float32", "bfloat16")]
    for (P, dtype), run in runs.items():
        itemsize = 4 if dtype == "float32" else 2
        assert run["rows"] == 3000 // P
        assert run["formula_bytes"] == 2 * 3 * run["rows"] * itemsize < run["bytes"]
        assert run["floor_s"]["write"] == pytest.approx(8 * 3000 / run["bandwidth"])
        # The verdict on the loss, nothing, and the acceleration step.
        first, *between, last = run["synchronizations_by_step"]
        assert (first, between) == (1, [0, 0, 0]) and last > 0
        assert run["peak_bytes"] is None  # nobody counts them here
        seconds = parts.seconds_of(run)
        assert set(seconds) == set(parts.PARTS) > set(run["floor_s"])
        assert min(seconds[part] for part in run["floor_s"]) > 0
    printed = capsys.readouterr().out
    assert "4, bfloat16" in printed and "peak over 2 m n/P" in printed


class PretendEvent:
    """torch.cuda.Event, for a GPU that has always finished."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_parts_on_a_pretended_gpu(tmp_path, monkeypatch, capsys):
    """What is done on a GPU alone: the measuring, and the library's own GPU paths."""
    peaks = iter(range(1000, 2000, 100))
    figures = {"name": "NVIDIA H100 80GB HBM3", "total_memory": 80 * 2**30}
    figures |= {"multi_processor_count": 132, "major": 9, "minor": 0}
    words = [*SMALL[1:], "--no-steps", "--dtypes=bfloat16", f"--out={tmp_path}/gpu-DEVICE.json"]
    answers = {
        "Event": PretendEvent,
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "memory_allocated": lambda: 900,
        "max_memory_allocated": lambda: next(peaks),
        "reset_peak_memory_stats": lambda: None,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: warnings.warn("a prototype feature", stacklevel=1),
        "get_device_properties": lambda device: types.SimpleNamespace(**figures),
    }
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    with PretendGpu(), mock.patch.multiple(torch.cuda, **answers):
        assert gpu.main(words) == 0
    found = json.loads((tmp_path / "gpu-nvidia-h100-80gb-hbm3.json").read_text())
    assert found["device"]["capability"] == "9.0"
    assert [run["peak_bytes"] for run in found["parts"]] == [100, 200]
    for run in found["parts"]:
        assert min(parts.seconds_of(run)[part] for part in run["floor_s"]) > 0
        assert run["synchronizations"] == {}, "torch was asked, and warned of none"
    assert "NVIDIA H100" in capsys.readouterr().out


def test_steps(tmp_path, capsys):
    words = ["--model=resnet8", "--batch=2", "--image-size=32", "--dtypes=float32"]
    assert gpu.main([*SMALL, *words, f"--out={tmp_path}/x.json"]) == 0
    steps = json.loads((tmp_path / "x.json").read_text())["steps"]
    alone, dali, horovod = steps.values()
    if importlib.util.find_spec("nvidia.dali") is None:
        assert "not installed" in dali
        dali = alone
    for run in (alone, dali, horovod):
        assert run["accelerated"] == run["cycles"] == 1, "an acceleration step was cut short"
        assert run["history_bytes"] == run["formula_bytes"] > 2 * 3 * run["n"] * 4
        assert run["own_step_s"]["median"] > 0 and run["step_over_own"]["median"] > 0
    assert "through Horovod, one rank" in capsys.readouterr().out


def test_what_cannot_be_run_is_said():
    text = step.steps_table({"through Horovod": "Horovod is built without NCCL"})
    assert "not run: Horovod is built without NCCL" in text


def test_floor_by_hand():
    found = parts.floor_bytes(100, 10, 3, 2, averages=4)
    assert found == {
        "store": 10 * (24 + 4),
        "gram": 10 * (6 + 4),
        "update": 10 * (6 + 8),
        "write": 800,
        "averages": 10 * 4 * 18,
    }


@pytest.mark.parametrize(("p", "q", "layout"), [(5, 5, "rows"), (2, 1, "rows"), (5, 5, "columns")])
def test_one_rank_of_many_does_all_of_its_work(p, q, layout):
    shapes = [torch.Size([300, 10]), torch.Size([40]), torch.Size([7, 3, 3])]
    config = AndersonConfig(history_depth=4, frequency=p, store_every=q, layout=layout)
    # Raises where an acceleration step is rejected.
    found = one_rank.share(shapes, config, 6, 2, torch.device("cpu"))
    n = found["parameters"]
    assert n == 3103 and found["rows"] == (-(-n // 6) if layout == "rows" else n)
    averages = len(config.averages)
    assert found["bytes"] == history_bytes(n, 4, 6, layout=layout, averages=averages)
    for part in ("read", "store", "gram", "update", "write", "average", "noise", "backward"):
        assert found["launches"][part] > 0
        assert found["seconds"][part]["median"] > 0
    # All that is summed up over the ranks, the slope, the loss after it.
    assert found["synchronizations"] == {"gram": 1, "update": 1, "safeguard": 1}
    if layout == "rows":
        assert found["launches"]["store"] == 3 * p // q
    again = one_rank.share(shapes, config, 6, 1, torch.device("cpu"))
    # New columns are copied where the ring of columns begins anew between them.
    assert abs(again["launches"].pop("gram") - found["launches"].pop("gram")) <= 1
    assert again["launches"] == found["launches"]


def _share(shapes):
    config = AndersonConfig(history_depth=3, frequency=2, noise_gate=None, averages=())
    return one_rank.share(shapes, config, 2, 1, torch.device("cpu"))["launches"]


def test_kernels_are_counted_in_chunks_of_a_gpu():
    """300,000 numbers are three chunks of a processor, and one of a GPU, in every part."""
    few, many = _share([torch.Size([1000])]), _share([torch.Size([300_000])])
    assert few == many
    assert few["replicas"] > 0


def test_nothing_is_sampled_without_a_gate():
    assert not {"backward", "sample", "noise", "average"} & set(_share([torch.Size([100])] * 3))


def test_kernels_of_a_list():
    launches = one_rank.foreach_launches
    assert launches(1, 1000) == launches(64, 1000) == 1 and launches(65, 1000) == 2
    assert launches(1, 65536 * 320 + 1) == 2


def test_clock_on_the_processor():
    clock = Clock(torch.device("cpu"))
    start = clock.mark()
    assert 0.0 < clock.time(lambda: torch.ones(1000).sum()) <= clock.seconds(start, clock.mark())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path, capsys):
    assert gpu.main([f"--out={tmp_path / 'x.json'}"]) == 2
    said = capsys.readouterr().err
    assert "there is no GPU" in said and "--device=cpu" in said
    assert not any(tmp_path.iterdir())
    with gpu_synchronizations(lambda: "step") as found:
        torch.ones(1).item()
    assert found == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_synchronizations_are_counted():
    x = torch.ones(3, device="cuda")
    with gpu_synchronizations(lambda: "step") as found:
        x.add_(1.0)
        assert found == {}
        x.sum().item()
        x.cpu()
    assert found == {"step": 2}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--device=tpu"], "--device"),
        (["--parameters=nothing"], "--parameters"),
        (["--model=nothing"], "--model"),
        (["--cycles=0"], "--cycles"),
        (["--image-size=8"], "--image-size"),
    ],
)
def test_wrong_options(words, named, tmp_path, capsys):
    assert gpu.main([*SMALL, *words, f"--out={tmp_path / 'x.json'}"]) == 2
    assert named in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_session_goes_on_after_what_fails(tmp_path, monkeypatch, capfd):
    jobs = (
        session.Job("lasting", ("-c", "import time; time.sleep(60)"), 0.5),
        session.Job("failing", ("-c", "raise SystemExit(3)"), 30),
        session.Job("good", ("-c", "print('{device}', '{cycles}')"), 30),
    )
    monkeypatch.setattr(session, "JOBS", jobs)
    assert session.main(["--trial", f"--out={tmp_path}/new"]) == 1
    printed = capfd.readouterr().out
    assert "== lasting: ended after 0 s" in printed or "== lasting: ended after 1 s" in printed
    assert "== failing: exit code 3" in printed and "cpu 1" in printed
    assert printed.endswith("1 of 3 ended well: good\n")
    assert session.main(["--trial", "--seconds=0", f"--out={tmp_path}"]) == 1
    assert "not begun" in capfd.readouterr().out


@pytest.mark.parametrize("method", ["residual", "subspace"])
def test_steps_alone(method, tmp_path):
    out = tmp_path / "steps.json"
    words = ["--no-parts", f"--method={method}", "--model=resnet8", "--image-size=32", "--batch=4"]
    assert gpu.main([*SMALL, *words, f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert found["parts"] == [] and found["step_of"]["method"] == method
    run = found["steps"]["torch alone"]
    assert (run["p"], run["cycles"]) == (5 if method == "residual" else 10, 1)


def test_a_session_has_commands_that_exist():
    """Every word of every job is filled in, and every file of a job is there."""
    values = dict.fromkeys(("out", "device", "cycles", "network", "pixels"), "x")
    for job in session.JOBS:
        words = [word.format_map(values) for word in job.words]
        assert not any("{" in word for word in words)
        for word in words:
            assert not word.startswith("tests/") or (session.ROOT / word).exists()
    assert sum(job.seconds for job in session.JOBS) <= 600

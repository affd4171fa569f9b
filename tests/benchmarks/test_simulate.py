"""The cost model: formulas, what is measured here, and the benchmark from end to end."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aadl_hvd import AndersonConfig
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core.accelerator import Accelerator
from aadl_hvd.optim.problem import OptimizerFixedPoint
from benchmarks.simulate import __main__ as simulate
from benchmarks.simulate import model, predictions, work
from benchmarks.simulate.machines import Machine, read_machine
from benchmarks.workload import copy_bandwidth, shapes_of
from models.errors import UserError

TOML = """
description = "a machine of the tests"
[node]
gpus = 6
cores = 42
[scheduler]
kind = "lsf"
launcher = "jsrun"
[environment]
X = { value = "1", reason = "other tables mean nothing here" }
[performance]
gpu = "V100 16 GB"
gpu_memory_bytes = 16e9
memory_bandwidth = 900e9
intranode_bandwidth = 50e9
intranode_latency = 2e-6
injection_bandwidth = 23e9
network_latency = 2e-6
"""
SUMMIT = Machine(
    name="summit",
    gpus_per_node=6,
    gpu="V100",
    gpu_memory_bytes=16e9,
    memory_bandwidth=900e9,
    intranode_bandwidth=50e9,
    intranode_latency=2e-6,
    injection_bandwidth=23e9,
    network_latency=2e-6,
)
RESNET50 = 25_557_032
COLLECTIVES = (
    model.ring_allgather,
    model.doubling_allgather,
    model.tree_broadcast,
)


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "machine.toml"
    path.write_text(TOML)
    return path


# Formulas


def test_by_hand():
    found = [f(16, 8, 1.0, 0.5) for f in COLLECTIVES]
    assert found == [7 + 7, 3 + 7, 3 * (1 + 8)]
    assert [model.lg(P) for P in (1, 2, 3, 4, 1024, 1536)] == [0, 1, 2, 2, 10, 11]


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_one_rank_says_nothing(collective):
    assert collective(1000, 1, 1.0, 1.0) == 0.0


@pytest.mark.parametrize("collective", COLLECTIVES)
@given(
    n=st.integers(0, 10**9),
    more=st.integers(0, 10**9),
    ranks=st.integers(1, 30000),
    further=st.integers(0, 30000),
)
def test_more_is_never_cheaper(collective, n, more, ranks, further):
    a, b = 2e-6, 1e-9
    assert collective(n + more, ranks, a, b) >= collective(n, ranks, a, b)
    assert collective(n, ranks + further, a, b) >= collective(n, ranks, a, b)


@given(n=st.integers(0, 10**9), ranks=st.integers(1, 30000))
def test_both_allgathers_move_the_same_bytes(n, ranks):
    b = 1e-9
    assert model.ring_allgather(n, ranks, 0.0, b) == model.doubling_allgather(n, ranks, 0.0, b)
    # Nothing shorter than n (P-1)/P bytes can bring n bytes to every rank.
    assert model.tree_broadcast(n, ranks, 0.0, b) >= model.ring_allgather(n, ranks, 0.0, b)


def test_published_figures():
    """102 MB at 23 GB/s a node take 4.4 ms; 1,840 bytes some tens of microseconds."""
    network = model.Network(SUMMIT, 1536)
    assert network.nodes == 256
    without = dataclasses.replace(SUMMIT, network_latency=0.0, intranode_latency=0.0)
    assert model.Network(without, 1536).allgather(4 * RESNET50) == pytest.approx(4.44e-3, rel=0.01)
    assert network.allgather(4 * RESNET50) == pytest.approx(4.44e-3 + 1535 * 2e-6, rel=0.01)
    assert 10e-6 < network.reduce_and_broadcast(1840) < 60e-6
    assert network.allgather_two_level(4 * RESNET50) < network.allgather(4 * RESNET50)


def test_within_a_node_the_network_does_not_count():
    slow = dataclasses.replace(SUMMIT, injection_bandwidth=1.0, network_latency=1.0)
    for P in (2, 6):
        inside, outside = model.Network(slow, P), model.Network(SUMMIT, P)
        for name in ("tree", "allgather", "allgather_two_level"):
            assert getattr(inside, name)(1e6) == getattr(outside, name)(1e6)
    assert model.Network(slow, 7).allgather(1e6) > 1.0
    assert model.Network(SUMMIT, 6).allgather(6e6) == pytest.approx(5 * 2e-6 + 5e6 / 50e9)


def test_messages():
    assert model.gram_message(20, 4) == 8 * (21 * 20 + 20 + 4)
    network = model.Network(SUMMIT, 1536)
    found = model.talk(network, RESNET50, 20, 4)
    assert set(found) == set(predictions.MESSAGES)
    assert found["large message"] == network.allgather(4 * RESNET50)
    assert 0 < found["tiny messages"] < 1e-3
    alone = model.talk(model.Network(SUMMIT, 1), RESNET50, 20, 4)
    assert set(alone.values()) == {0.0}


def test_offloaded():
    found = model.offloaded(100, 5, stack_and_solve=3e9, bandwidth=1e9, link=200.0)
    assert found == {"transfer": 4.0, "least squares": 3.0, "transfer of all": 10.0}


# Bytes and work


def _bytes_on_ranks(n, m, ranks, config):
    def program(comm):
        w = torch.nn.Parameter(torch.ones(n, dtype=torch.float32))
        problem = OptimizerFixedPoint(torch.optim.SGD([w], lr=0.1), config.residual)
        accelerator = Accelerator(config, comm)
        for _ in range(2):
            w.grad = w.detach().clone()
            problem.base_step = problem.keep_gradient
            accelerator.step(problem)
        return accelerator.history_bytes

    return max(run_ranks(ranks, program))


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize(("dtype", "itemsize"), [(None, 4), ("bfloat16", 2), ("float64", 8)])
@pytest.mark.parametrize("averages", [(), (0.9, 0.99)])
def test_bytes_are_those_of_the_library(layout, dtype, itemsize, averages):
    for n, m, ranks in ((1000, 5, 3), (997, 4, 4), (6, 3, 4)):
        config = AndersonConfig(
            history_depth=m, layout=layout, history_dtype=dtype, averages=averages
        )
        found = model.history_bytes(
            n, m, ranks, layout=layout, itemsize=itemsize, averages=len(averages)
        )
        assert found == _bytes_on_ranks(n, m, ranks, config)


def test_bytes_of_a_row_are_measured():
    config = AndersonConfig(history_depth=3, frequency=2, safeguard="none", noise_gate=None)
    found = work.moved(600_000, config, 2)
    assert found["rows"] == [100_000, 25_000] and found["solve_s"] > 0
    assert set(found["bytes_per_row"]) == set(model.ROW_PARTS)
    assert min(found["bytes_per_row"].values()) >= 0


def test_the_slope_over_rows_is_what_counts(monkeypatch):
    """A part of 1 ms and 3 ns a row, at a bandwidth of 2 GB/s: 6 bytes a row."""

    def measured(setting, make, turns, engine):
        rows = make().n
        median = 1e-3 + 3e-9 * rows
        seconds = {part: {"median": median} for part in (*model.ROW_PARTS, "solve")}
        return {"accelerated": turns, "cycles": turns, "parts_s": seconds}

    monkeypatch.setattr(work, "measure", measured)
    monkeypatch.setattr(work, "copy_bandwidth", lambda **_: {"median": 2e9})
    found = work.moved(240_000, AndersonConfig(), 3)
    assert found["bytes_per_row"] == pytest.approx(dict.fromkeys(model.ROW_PARTS, 6.0))
    assert found["solve_s"] == pytest.approx(1e-3 + 3e-9 * 40_000)


def test_a_rejected_acceleration_step_is_an_error(monkeypatch):
    found = {"accelerated": 1, "cycles": 2}
    monkeypatch.setattr(work, "measure", lambda *_: found)
    with pytest.raises(RuntimeError, match="1 of 2"):
        work.moved(24_000, AndersonConfig(), 2)


def test_bandwidth_and_least_squares_are_measured():
    assert copy_bandwidth(1000, 2)["median"] > 0
    assert work.least_squares(200, 3, 1)["median"] > 0


def _gpu_file(path, **changes):
    runs = [
        {
            "ranks": ranks,
            "history_dtype": dtype,
            "launches": {"gram": count, "noise": 2 * count},
            "synchronizations": {"gram": 1, "update": 1},
            "seconds": {"gram": {"median": count * 1e-5}, "noise": {"median": count * 5e-5}},
        }
        | changes
        for ranks, dtype, count in (
            (1, "float32", 7),
            (6, "float32", 10),
            (96, "float32", 5),
            (96, "bfloat16", 6),
        )
    ]
    path.write_text(json.dumps({"parts": runs}))
    return path


def test_kernels_are_read(tmp_path):
    """One rank has no gate; time is taken where kernels are all there is."""
    path = _gpu_file(tmp_path / "gpu.json")
    found = work.read_kernels(path)
    assert (found.source, found.synchronizations) == ("gpu.json", 2)
    assert found.seconds == pytest.approx(2e-5)
    assert [found.of(P)["gram"] for P in (2, 6, 95, 96, 1536)] == [10, 10, 10, 5, 5]
    assert work.read_kernels(path, 1e-6).seconds == 1e-6


@pytest.mark.parametrize("changes", [{"ranks": 1}, {"history_dtype": "bfloat16"}, {"seconds": 3}])
def test_another_file_is_no_gpu_file(tmp_path, changes):
    with pytest.raises(UserError, match="--gpu"):
        work.read_kernels(_gpu_file(tmp_path / "gpu.json", **changes))
    with pytest.raises(UserError, match="--gpu"):
        work.read_kernels(tmp_path / "nothing.json")


def test_shapes():
    assert sum(shape.numel() for shape in shapes_of("resnet50")) == RESNET50
    assert sum(shape.numel() for shape in shapes_of("12345")) == 12345


def _measured(stores=1):
    counted = {"read": 10, "gram": 20, "noise": 60, "backward": 40, "write": 4}
    return predictions.Measured(
        n=RESNET50,
        m=20,
        averages=4,
        p=5,
        stores=stores,
        bytes_per_row=dict.fromkeys(model.ROW_PARTS, 90.0),
        solve_s=10e-3,
        kernels=work.Kernels("x.json", 1e-5, {6: counted}, 3),
    )


def test_what_is_scaled_and_what_is_not():
    found = predictions.predict(SUMMIT, 96, _measured())
    row = 90 / 900e9 * 266_220
    assert found.seconds["store"] == pytest.approx(2 * row + 10e-5)  # read, and stored
    assert found.seconds["gram"] == pytest.approx(row + 20e-5)
    assert found.seconds["solve"] == 10e-3  # on the host, as measured
    assert found.seconds["write"] == pytest.approx(8 * RESNET50 / 900e9 + 4e-5)  # at any P
    assert found.seconds["rest"] == pytest.approx(4 * RESNET50 / 900e9)
    assert found.seconds["noise gate"] == pytest.approx(100e-5)
    assert (found.kernels, found.in_backward) == (134, 40)
    switchable = found.seconds["noise gate"] + found.seconds["averages"]
    assert found.total - found.bare == pytest.approx(switchable)
    assert found.share(0.1) == pytest.approx(found.total / 0.5)
    twice = predictions.predict(SUMMIT, 96, _measured(stores=2))
    assert twice.kernels == 144


def test_a_history_shared_by_the_ranks_of_a_node():
    found = predictions.predict(SUMMIT, 96, _measured())
    node = predictions.predict(SUMMIT, 96, _measured(), node=True)
    assert node.seconds["large message"] < found.seconds["large message"]
    for part in ("gram", "tiny messages"):  # of all ranks
        assert node.seconds[part] == found.seconds[part]
    row = 90 / 900e9 * 4_259_506  # of the node's
    assert node.seconds["update"] == pytest.approx(row)
    assert node.bytes == model.history_bytes(RESNET50, 20, 6, averages=4) > 10 * found.bytes
    same = predictions.predict(SUMMIT, 6, _measured(), node=True)
    assert same == predictions.predict(SUMMIT, 6, _measured())


def test_steps():
    rates = {"float32": 367.0, "mixed": 1200.0}
    steps = predictions.steps_of(SUMMIT, 64, rates)
    assert steps.seconds["float32"] == pytest.approx(0.1744, rel=1e-3)
    assert steps.source == "published"
    other = dataclasses.replace(SUMMIT, gpu="another", memory_bandwidth=1800e9)
    assumed = predictions.steps_of(other, 64, rates)
    assert assumed.seconds["mixed"] == pytest.approx(steps.seconds["mixed"] / 2)
    assert "assumed" in assumed.source


def test_where_something_breaks():
    ranks = predictions.memory_break_even(SUMMIT, RESNET50, 20, 4, 0.1)
    fits = model.history_bytes(RESNET50, 20, ranks, averages=4)
    below = model.history_bytes(RESNET50, 20, ranks - 1, averages=4)
    assert fits <= 1.6e9 < below
    ranks = predictions.latency_break_even(SUMMIT, RESNET50)
    assert ranks == pytest.approx(4 * RESNET50 / 23e9 / 2e-6, abs=2)


# Machine files


def test_machine_file(toml):
    machine = read_machine(str(toml))
    assert machine == dataclasses.replace(SUMMIT, name="machine", gpu="V100 16 GB")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("[performance]", "[other]", "other"),
        ("gpus = 6", "", "gpus"),
        ("gpus = 6", "gpus = 6.5", "gpus"),
        ("memory_bandwidth = 900e9", "memory_bandwidth = -1.0", "memory_bandwidth"),
        ("network_latency = 2e-6", 'network_latency = "short"', "network_latency"),
        ("network_latency = 2e-6", "network_latency = nan", "network_latency"),
        ("[node]", "[node", "TOML"),
    ],
)
def test_wrong_machine_file(toml, old, new, named, capsys):
    toml.write_text(TOML.replace(old, new))
    with pytest.raises(UserError, match=named):
        read_machine(str(toml))
    assert simulate.main(["--machine", str(toml), "--no-validate"]) == 2
    assert named in capsys.readouterr().err


# The command


@pytest.mark.parametrize(
    "arguments",
    [
        ["--machine", "nowhere"],
        ["--machine", "nowhere.toml"],
        ["--ranks", "8", "1"],
        ["--parameters", "3"],
        ["--gpu", "nowhere.json"],
        ["--history-depth", "1"],
        ["--batch", "0"],
        ["--turns", "0"],
        ["--images-per-second", "0", "1"],
        ["--images-per-second", "inf", "1"],
        ["--kernel-microseconds", "-1"],
        ["--kernel-microseconds", "inf"],
        ["--validate-ranks", "1"],
    ],
)
def test_bad_arguments(arguments, tmp_path, capsys):
    assert simulate.main([*arguments, f"--out={tmp_path / 'x.json'}"]) == 2
    assert arguments[0] in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_small_run(toml, tmp_path, capfd):
    out = tmp_path / "found" / "simulate.json"
    sizes = ["--ranks", "3", "6", "1536", "--parameters=60000", "--history-depth=3", "--turns=2"]
    assert simulate.main(["--machine", str(toml), *sizes, f"--out={out}"]) == 0
    printed = capfd.readouterr().out
    found = json.loads(out.read_text())
    assert out.with_suffix(".png").stat().st_size > 1000
    assert found["parameters"] == 60000 and found["machine"]["cores"] > 0
    predicted = found["machines"]["machine"]["predicted"]
    assert set(predicted) == {"rows", "rows in a node", "p = 2, q = 1"}
    for kind in predicted.values():
        assert [x["ranks"] for x in kind] == [3, 6, 1536]
        assert all(x["total"] > x["bare"] > 0 for x in kind)
    assert predicted["rows"][2]["bytes"] == model.history_bytes(60000, 3, 1536, averages=4)
    run = found["validation"]
    assert run["ranks"] == 2
    assert set(run["measured"]) == set(run["predicted"]) == {*model.ROW_PARTS, "write"}
    assert min(run["measured"].values()) > 0
    for text in ("At 1536 GPUs", "assumed", "measured", "Memory: history", "Beyond"):
        assert text in printed

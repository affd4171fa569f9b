"""The cost model: formulas, what they are fed with, and the program from end to end."""

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
from benchmarks.cost import overhead
from benchmarks.simulate import __main__ as simulate
from benchmarks.simulate import methods, model, predictions, sources
from benchmarks.simulate.machines import Machine, read_machine
from benchmarks.tables import RESULTS
from benchmarks.workload import shapes_of
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


def _overhead_file(path, ranks=(1, 2), dense=True):
    """One rank: 1 ms a part at 2 GB/s; two: 2 ms at 1 GB/s. 100,000 numbers."""
    parts = (*model.ROW_PARTS, "write", "replicas", "solve")
    runs = [
        {
            "name": overhead.AVERAGED,
            "ranks": P,
            "n": 100_000,
            "m": 20,
            "averages": 4,
            "copy_bytes_per_s": 2e9 / P,
            "parts_s": {part: {"median": P * 1e-3} for part in parts},
        }
        for P in ranks
    ]
    if dense:
        bandwidth = {"ranks": 1, "copy_bytes_per_s": 2e9}
        runs.append({"name": overhead.DENSE, "stack_s": 1.0, "qr_s": 2.0, **bandwidth})
    path.write_text(json.dumps({"runs": runs}))
    return path


def test_timers_are_read(tmp_path):
    found = sources.read_timers(_overhead_file(tmp_path / "x.json"))
    assert (found.source, found.n, found.m, found.averages) == ("x.json", 100_000, 20, 4)
    assert found.bytes_per_row == pytest.approx(dict.fromkeys(model.ROW_PARTS, 20.0))
    assert (found.solve_s, found.dense_bytes) == (1e-3, 6e9)
    # Half of the rows at half of the bandwidth; what is written stays n numbers.
    rows = dict.fromkeys(model.ROW_PARTS, 1e-3)
    assert found.predicted == pytest.approx(rows | {"write": 8 * 100_000 / 1e9})
    assert found.measured == dict.fromkeys((*model.ROW_PARTS, "write"), 2e-3)


@pytest.mark.parametrize("changes", [{"ranks": (1,)}, {"ranks": (2, 4)}, {"dense": False}])
def test_another_file_has_no_timers(tmp_path, changes):
    with pytest.raises(UserError, match="--overhead"):
        sources.read_timers(_overhead_file(tmp_path / "x.json", **changes))
    with pytest.raises(UserError, match="--overhead"):
        sources.read_timers(tmp_path / "nothing.json")


def test_the_sweep_writes_what_is_read():
    """The run by its name, with averages and without a moving average."""
    for ranks in (1, 2):
        (chosen,) = (x for x in overhead.settings(20, ranks) if x.name == overhead.AVERAGED)
        assert chosen.config.averages and chosen.config.average_window is None
        assert chosen.config.frequency == chosen.config.store_every == 5


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
    found = sources.read_kernels(path)
    assert (found.source, found.synchronizations) == ("gpu.json", 2)
    assert found.seconds == pytest.approx(2e-5)
    assert [found.of(P)["gram"] for P in (2, 6, 95, 96, 1536)] == [10, 10, 10, 5, 5]
    assert sources.read_kernels(path, 1e-6).seconds == 1e-6


@pytest.mark.parametrize("changes", [{"ranks": 1}, {"history_dtype": "bfloat16"}, {"seconds": 3}])
def test_another_file_is_no_gpu_file(tmp_path, changes):
    with pytest.raises(UserError, match="--gpu"):
        sources.read_kernels(_gpu_file(tmp_path / "gpu.json", **changes))
    with pytest.raises(UserError, match="--gpu"):
        sources.read_kernels(tmp_path / "nothing.json")


def test_shapes():
    assert sum(shape.numel() for shape in shapes_of("resnet50")) == RESNET50
    assert sum(shape.numel() for shape in shapes_of("12345")) == 12345


COUNTED = {"read": 10, "gram": 20, "noise": 60, "backward": 40, "write": 4}
KERNELS = sources.Kernels("x.json", 1e-5, {6: COUNTED}, 3)
TIMERS = sources.Timers(
    source="y.json",
    n=RESNET50,
    m=20,
    averages=4,
    bytes_per_row=dict.fromkeys(model.ROW_PARTS, 90.0),
    solve_s=10e-3,
    dense_bytes=1e9,
    predicted={},
    measured={},
)


def _predict(ranks, p=5, q=5, **how):
    return predictions.predict(SUMMIT, ranks, TIMERS, KERNELS, n=RESNET50, p=p, q=q, **how)


def test_what_is_scaled_and_what_is_not():
    found = _predict(96)
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


def test_every_store_is_counted():
    once, twice = _predict(96), _predict(96, p=2, q=1)
    assert twice.seconds["store"] == pytest.approx(2 * once.seconds["store"])
    assert twice.kernels == once.kernels + 10
    others = set(once.seconds) - {"store"}
    assert all(twice.seconds[name] == once.seconds[name] for name in others)
    assert KERNELS.of(96) == COUNTED, "changed by a prediction"


def test_a_history_shared_by_the_ranks_of_a_node():
    found, node = _predict(96), _predict(96, node=True)
    assert node.seconds["large message"] < found.seconds["large message"]
    for part in ("gram", "tiny messages"):  # of all ranks
        assert node.seconds[part] == found.seconds[part]
    assert node.seconds["update"] == pytest.approx(90 / 900e9 * 4_259_506)  # of the node's
    assert node.bytes == model.history_bytes(RESNET50, 20, 6, averages=4) > 10 * found.bytes
    assert _predict(6, node=True) == _predict(6)


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
    assert simulate.main(["--machine", str(toml), f"--out={toml.parent / 'x.json'}"]) == 2
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
        ["--overhead", "nowhere.json"],
        ["--batch", "0"],
        ["--images-per-second", "0", "1"],
        ["--images-per-second", "inf", "1"],
        ["--kernel-microseconds", "-1"],
        ["--kernel-microseconds", "inf"],
    ],
)
def test_bad_arguments(arguments, tmp_path, capsys):
    assert simulate.main([*arguments, f"--out={tmp_path / 'x.json'}"]) == 2
    assert arguments[0] in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_run(toml, tmp_path, capsys):
    out = tmp_path / "found" / "simulate.json"
    words = ["--machine", str(toml), "--ranks", "3", "6", "1536", "--parameters=60000"]
    assert simulate.main([*words, f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert out.with_suffix(".png").stat().st_size > 1000
    assert found["parameters"] == 60000 and found["timers"]["source"] == "overhead.json"
    predicted = found["machines"]["machine"]["predicted"]
    assert set(predicted) == {"rows", "rows in a node", "p = 2, q = 1"}
    for kind in predicted.values():
        assert [x["ranks"] for x in kind] == [3, 6, 1536]
        assert all(x["total"] > x["bare"] > 0 for x in kind)
    assert predicted["rows"][2]["bytes"] == model.history_bytes(60000, 20, 1536, averages=4)
    for text in ("At 1536 GPUs", "Measured", "predicted", "Memory: history", "Beyond"):
        assert text in printed


def test_both_methods_by_what_they_start(tmp_path):
    """A cycle's cost is its launches, its messages and its bytes; halving any lowers the share."""
    timers, kernels = (
        sources.read_timers(RESULTS / "overhead.json"),
        sources.read_kernels(simulate.GPU),
    )
    launches = methods.read_launches(RESULTS / "launches.json")

    def costs(kernels, n=RESNET50):
        own = methods.costs(SUMMIT, n, (timers, kernels, launches))
        return {(one.method, one.node): one for one in own}

    found = costs(kernels)
    assert {one.steps for one in found.values()} == {2, 5, 10, 11}
    for (method, node), one in found.items():
        assert one.seconds["host"] == pytest.approx(kernels.seconds * launches.a_cycle[method])
        late = "overlap=True" in method
        assert (one.seconds["large message"] == one.seconds["negotiation"] == 0.0) == late
        assert one.share(0.1, 2.0) - one.share(0.1) == pytest.approx(
            one.seconds["host"] / (0.1 * one.steps)
        )
        if not node and not late:
            assert one.share(1.0) > found[method, True].share(1.0), "a node has fewer hops"
    faster = costs(dataclasses.replace(kernels, seconds=0.5 * kernels.seconds))
    smaller = costs(kernels, RESNET50 // 2)
    for key, one in found.items():
        assert faster[key].share(0.1) < one.share(0.1) > smaller[key].share(0.1)
    steps = predictions.steps_of(SUMMIT, 64, {"float32": 367.0, "mixed": 1200.0})
    own = {"summit": (SUMMIT, steps, list(found.values()))}
    late, node = (found["subspace, overlap=True", node] for node in (False, True))
    assert methods.verdicts(own) == [
        "V100, at most 0.5 % of a float32 step: met by subspace, overlap=True (all) "
        f"{100 * late.share(steps.seconds['float32']):.2f} %, subspace, overlap=True (a node) "
        f"{100 * node.share(steps.seconds['float32']):.2f} %."
    ]
    pretended = [
        dataclasses.replace(found["subspace, cuda_graphs=True", False], seconds={"host": 0.0})
    ]
    assert "missed by all" in methods.verdicts({"summit": (SUMMIT, steps, pretended)})[0]
    slow = [dataclasses.replace(found["subspace", False], seconds={"host": 1.0})]
    assert "missed by all" in methods.verdicts({"summit": (SUMMIT, steps, slow)})[0]
    free = [dataclasses.replace(found["subspace", False], seconds={"host": 1e-3})]
    assert "met by subspace (all)" in methods.verdicts({"summit": (SUMMIT, steps, free)})[0]
    lacking = tmp_path / "lacking.json"
    lacking.write_text(json.dumps({"tensors": 161, "ranks": 1536, "runs": []}))
    with pytest.raises(UserError, match="--launches"):
        methods.read_launches(lacking)


def test_the_predictions_are_those_of_the_results(tmp_path):
    """benchmarks/results/simulate.json is what the other results give today."""
    out = tmp_path / "simulate.json"
    assert simulate.main([f"--out={out}"]) == 0
    found, kept = (json.loads(path.read_text()) for path in (out, RESULTS / "simulate.json"))
    for key in ("date", "machine"):
        found.pop(key), kept.pop(key)
    assert found == kept, "python -m benchmarks.simulate"

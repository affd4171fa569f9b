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
from benchmarks.simulate import model, predictions, validate, words, work
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
    model.recursive_doubling,
    model.rabenseifner,
    model.ring_allreduce,
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
    assert found == [3 * (1 + 8), 6 + 14, 14 + 14, 7 + 7, 3 + 7, 3 * (1 + 8)]
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
def test_a_ring_moves_what_rabenseifner_moves(n, ranks):
    b = 1e-9
    assert model.ring_allreduce(n, ranks, 0.0, b) == pytest.approx(
        model.rabenseifner(n, ranks, 0.0, b), rel=1e-12
    )
    assert model.ring_allgather(n, ranks, 0.0, b) == model.doubling_allgather(n, ranks, 0.0, b)
    # Nothing shorter than n (P-1)/P bytes can bring n bytes to every rank.
    assert model.recursive_doubling(n, ranks, 0.0, b) >= model.ring_allgather(n, ranks, 0.0, b)


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
        for name in ("tree", "allgather", "allgather_two_level", "allreduce"):
            assert getattr(inside, name)(1e6) == getattr(outside, name)(1e6)
    assert model.Network(slow, 7).allgather(1e6) > 1.0
    assert model.Network(SUMMIT, 6).allgather(6e6) == pytest.approx(5 * 2e-6 + 5e6 / 50e9)


def test_messages():
    assert model.gram_message(20, 4) == 8 * (21 * 20 + 20 + 4)
    network = model.Network(SUMMIT, 1536)
    rows = model.talk(network, RESNET50, 20, 4, "rows")
    columns = model.talk(network, RESNET50, 20, 4, "columns")
    assert rows["large"] == network.allgather(4 * RESNET50)
    assert columns["large"] == network.allreduce(4 * RESNET50)
    assert rows["tiny"] == columns["tiny"] < 1e-3
    alone = model.talk(model.Network(SUMMIT, 1), RESNET50, 20, 4, "rows")
    assert set(alone.values()) == {0.0}


def test_offloaded():
    found = model.offloaded(100, 5, stack_and_solve=3e9, bandwidth=1e9, link=200.0)
    assert found == {"transfer": 4.0, "least squares": 3.0, "transfer of all": 10.0}


def test_kernels_of_a_list():
    assert model.foreach_launches(1, 1000) == 1
    assert model.foreach_launches(64, 1000) == 1 and model.foreach_launches(65, 1000) == 2
    assert model.foreach_launches(1, 65536 * 320 + 1) == 2


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
@pytest.mark.parametrize("averages", [(), (0.9, 0.99, 100)])
def test_bytes_are_those_of_the_library(layout, dtype, itemsize, averages):
    for n, m, ranks in ((1000, 5, 3), (997, 4, 4), (6, 3, 4)):
        config = AndersonConfig(
            history_depth=m, layout=layout, history_dtype=dtype, averages=averages
        )
        windows = sum(kind >= 2 for kind in averages)
        assert model.history_bytes(
            n,
            m,
            ranks,
            layout=layout,
            itemsize=itemsize,
            averages=len(averages) - windows,
            windows=windows,
        ) == _bytes_on_ranks(n, m, ranks, config)


@pytest.mark.parametrize(("p", "q", "layout"), [(5, 5, "rows"), (2, 1, "rows"), (5, 5, "columns")])
def test_one_rank_of_many_does_all_of_its_work(p, q, layout):
    shapes = [torch.Size([300, 10]), torch.Size([40]), torch.Size([7, 3, 3])]
    config = AndersonConfig(history_depth=4, frequency=p, store_every=q, layout=layout)
    found = work.share(shapes, config, 6, cycles=2)  # raises where an event is rejected
    n = found["parameters"]
    assert n == 3103 and found["rows"] == (-(-n // 6) if layout == "rows" else n)
    assert found["bytes"] == model.history_bytes(n, 4, 6, layout=layout, averages=4)
    for part in ("read", "store", "gram", "update", "write", "average", "noise", "backward"):
        assert found["launches"][part] > 0
        assert found["seconds"][part]["median"] > 0
    # All that is summed up over the ranks, the slope, the loss after it.
    assert found["synchronisations"] == {"gram": 1, "update": 1, "safeguard": 1}
    if layout == "rows":
        assert found["launches"]["store"] == 3 * p // q
    again = work.share(shapes, config, 6, cycles=1)
    assert again["launches"] == found["launches"]


def test_kernels_are_counted_in_chunks_of_a_gpu():
    """300,000 numbers are three chunks of a processor, and one of a GPU, in every part."""
    config = AndersonConfig(history_depth=3, frequency=2, noise_gate=None, averages=())
    found = [work.share([torch.Size([n])], config, 2, cycles=1) for n in (1000, 300_000)]
    assert found[0]["launches"] == found[1]["launches"]
    assert found[0]["launches"]["replicas"] > 0


def test_nothing_is_sampled_without_a_gate():
    shapes = [torch.Size([100])] * 3
    config = AndersonConfig(history_depth=3, frequency=2, noise_gate=None, averages=())
    found = work.share(shapes, config, 2, cycles=1)
    assert not {"backward", "sample", "noise", "average"} & set(found["launches"])


def test_bandwidth_and_least_squares_are_measured():
    assert copy_bandwidth(1000, 2)["median"] > 0
    assert work.least_squares(200, 3, 1)["median"] > 0


def test_shapes():
    assert sum(shape.numel() for shape in shapes_of("resnet50")) == RESNET50
    assert sum(shape.numel() for shape in shapes_of("12345")) == 12345


def _measured(ranks, rows, milliseconds):
    seconds = dict.fromkeys(("read", "gram", "solve", "write", "noise"), milliseconds * 1e-3)
    return {
        "parameters": RESNET50,
        "ranks": ranks,
        "layout": "rows",
        "p": 5,
        "q": 5,
        "rows": rows,
        "bytes": 100,
        "bandwidth": 9e9,
        "seconds": {part: {"median": value} for part, value in seconds.items()},
        "launches": {"read": 10, "gram": 20, "noise": 100},
        "synchronisations": {"gram": 1},
    }


def test_what_is_scaled_and_what_is_not():
    many, floor = _measured(96, 266220, 10.0), _measured(28000, 900, 1.0)
    setting = {"m": 20, "averages": 4, "launch": 1e-5}
    found = predictions.predict(SUMMIT, many, floor, **setting)
    assert found.seconds["store"] == pytest.approx(9e-3 / 100 + 10e-5)
    assert found.seconds["gram"] == pytest.approx(9e-3 / 100 + 20e-5 + model.SYNCHRONISATION)
    assert found.seconds["solve"] == 10e-3  # on the host, as measured
    assert found.seconds["write"] == pytest.approx(10e-3 / 100)  # n numbers at any P
    assert found.launches == 130 and found.synchronisations == 1
    assert found.total - found.bare == pytest.approx(found.seconds["noise gate"])
    assert found.share(0.1) == pytest.approx(found.total / 0.5)
    group = _measured(6, 4259506, 30.0) | {"bytes": 1600}
    node = predictions.predict_in_node(SUMMIT, many, group, floor, **setting)
    assert node.seconds["large message"] < found.seconds["large message"]
    for part in ("gram", "tiny messages"):  # of all ranks
        assert node.seconds[part] == found.seconds[part]
    assert node.seconds["store"] == pytest.approx(29e-3 / 100 + 10e-5)  # of the node's
    assert (node.ranks, node.bytes) == (96, 1600)


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


def test_predicted_here_is_positive():
    calibration = {"copy": 5e9, "tiny": 4e-6, "negotiation": 1e-3, "large": 0.03}
    here = validate.here(calibration)
    assert here.machine.intranode_latency == 2e-6
    found = validate.predict(here, 2, 3000, 3, 1)
    assert set(found) == set(validate.PARTS) and min(found.values()) > 0
    assert found["gather"] > here.negotiation
    assert words.validation_table(found, found).count("1.00") == len(found) + 1


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
        ["--history-depth", "1"],
        ["--batch", "0"],
        ["--cycles", "0"],
        ["--images-per-second", "0", "1"],
        ["--images-per-second", "inf", "1"],
        ["--launch-microseconds", "-1"],
        ["--validate-ranks", "1"],
        ["--validate-parameters", "5000"],
        ["--validate-parameters", "inf", "inf"],
    ],
)
def test_bad_arguments(arguments, capsys):
    assert simulate.main(arguments) == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_small_run(toml, tmp_path, capfd):
    out = tmp_path / "found"
    sizes = ["--ranks", "3", "6", "1536", "--parameters=60000", "--history-depth=3", "--cycles=2"]
    real = ["--validate-ranks", "2", "--validate-parameters", "20000"]
    assert simulate.main(["--machine", str(toml), *sizes, *real, f"--out={out}"]) == 0
    printed = capfd.readouterr().out
    found = json.loads((out / "simulate.json").read_text())
    assert (out / "simulate.png").stat().st_size > 1000
    assert found["parameters"] == 60000 and found["machine"]["cores"] > 0
    predicted = found["machines"]["machine"]["predicted"]
    assert set(predicted) == {"rows", "rows in a node", "columns", "p = 2, q = 1"}
    for kind in predicted.values():
        assert [x["ranks"] for x in kind] == [3, 6, 1536]
        assert all(x["total"] > x["bare"] > 0 for x in kind)
    assert predicted["rows"][2]["bytes"] == model.history_bytes(60000, 3, 1536, averages=4)
    run = found["validation"]["ranks"]["2"]
    assert set(run["measured"]) == set(run["predicted"]) == set(validate.PARTS)
    for text in ("At 1536 GPUs", "assumed", "measured", "rows in a node", "Beyond"):
        assert text in printed

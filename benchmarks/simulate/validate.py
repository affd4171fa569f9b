"""The model against real ranks of this machine: `python -m benchmarks.simulate` starts this."""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aadl_hvd import AndersonConfig
from benchmarks import command
from benchmarks.simulate import model
from benchmarks.simulate.machines import Machine
from benchmarks.simulate.model import Network
from benchmarks.simulate.predictions import as_work
from benchmarks.simulate.work import NETWORK, floor_ranks, share
from benchmarks.workload import EVENT_PARTS, copy_bandwidth, shapes_of

CALIBRATION = 2**23  # numbers in the allgather that bandwidth is taken from
REPEATS = 15
MESSAGES = "tiny messages"  # waiting for the other ranks to come is measured, not predicted
PARTS = (*EVENT_PARTS, MESSAGES)


@dataclasses.dataclass(frozen=True)
class Here:
    """This machine as two ranks see it, all figures measured.

    Attributes:
        machine: bandwidths and latencies; one node.
        negotiation: seconds of the smallest gathering: through Horovod it is negotiated.
    """

    machine: Machine
    negotiation: float


def settings(m: int) -> AndersonConfig:
    """An event of p = q = 5, with fewer plain steps in between: they cost acceleration nothing."""
    return AndersonConfig(history_depth=m, frequency=2, store_every=2)


def on_real_ranks(ranks: int, parameters: int | None, m: int, cycles: int) -> dict[str, Any]:
    """Runs events on real ranks.

    Args:
        ranks: P.
        parameters: n; None: ResNet50's.
        m: history depth.
        cycles: events to time.

    Returns:
        Medians over accepted events of each part's seconds on rank 0, and the calibration.

    Raises:
        RanksFailed: see there.
    """
    words = [f"--history-depth={m}", f"--cycles={cycles}", f"--parameters={parameters or NETWORK}"]
    found: dict[str, Any] = command.collect("benchmarks.simulate.validate", *words, ranks=ranks)
    return found


def here(calibration: dict[str, float]) -> Here:
    """This machine from what two ranks measured, see `_calibrate`."""
    latency = calibration["tiny"] / 2  # to rank 0 and back
    large = 4 * CALIBRATION / 2  # bytes that two ranks exchange of an allgather
    bandwidth = large / max(calibration["large"] - calibration["negotiation"], 1e-9)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    machine = Machine(
        name="here",
        gpus_per_node=2,
        gpu="cores",
        gpu_memory_bytes=memory,
        memory_bandwidth=calibration["copy"],
        intranode_bandwidth=bandwidth,
        intranode_latency=latency,
        injection_bandwidth=bandwidth,
        network_latency=latency,
    )
    return Here(machine, calibration["negotiation"])


def predict(
    found: Here, ranks: int, parameters: int | None, m: int, cycles: int
) -> dict[str, float]:
    """Seconds of an event's parts on real ranks of this machine, from one rank's share.

    Ranks beyond the cores are not accounted for: the machine was measured with two.
    """
    shapes = shapes_of(str(parameters or NETWORK))
    own = share(shapes, settings(m), ranks, cycles)
    floor = share(shapes, settings(m), floor_ranks(own["parameters"]), cycles)
    work = as_work(own, floor)
    slower = own["bandwidth"] / found.machine.memory_bandwidth
    machine = dataclasses.replace(found.machine, gpus_per_node=ranks)
    network = Network(machine, ranks)
    averages = len(settings(m).averages)
    tiny = network.reduce_and_broadcast(model.gram_message(m, averages))
    tiny += network.tree(model.FLOAT64 * m) + network.reduce_and_broadcast(model.FLOAT64)
    seconds = {}
    for part in EVENT_PARTS:
        # The host's own time is here what it was; streaming shares the memory with other ranks.
        fixed = 0.0 if part in model.WHOLE_PARTS else min(work.fixed[part], work.seconds[part])
        seconds[part] = fixed + (work.seconds[part] - fixed) * slower
    seconds["gather"] += found.negotiation + network.allgather(4.0 * own["parameters"])
    return {**seconds, MESSAGES: tiny}


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    from aadl_hvd import DistributedAndersonOptimizer

    calibration = _calibrate()
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.rand(shape)) for shape in shapes_of(options.parameters)]
    curvatures = torch.linspace(0.01, 1.0, len(parameters)).tolist()
    config = settings(options.history_depth)
    optimizer = DistributedAndersonOptimizer(
        torch.optim.SGD(parameters, lr=0.1),
        [(f"p{i}", p) for i, p in enumerate(parameters)],
        anderson=config,
    )
    stats = optimizer.anderson.stats
    talked = _time_messages(optimizer.anderson.comm)
    full = config.frequency * (options.history_depth + 1)
    events: list[dict[str, float]] = []
    steps = full + config.frequency * options.cycles
    while optimizer.anderson.stats.steps < steps:
        before, accelerated = stats.seconds | talked, stats.accelerated
        for _ in range(config.frequency):
            optimizer.zero_grad()
            loss = sum(  # a gradient without the memory of a graph over all parameters
                (_Quadratic.apply(p, c) for p, c in zip(parameters, curvatures, strict=True)),
                start=torch.zeros(()),
            )
            loss.backward()
            optimizer.step()
        if stats.steps > full and stats.accelerated > accelerated:
            event = {key: value - before[key] for key, value in (stats.seconds | talked).items()}
            for part in talked.keys() - {MESSAGES}:
                event[MESSAGES] += event[part]
                event[part.removeprefix("message of ")] -= event[part]
            events.append({part: event[part] for part in PARTS})
    again = _calibrate()  # what else the machine does may have changed
    calibration = {key: (value + again[key]) / 2 for key, value in calibration.items()}
    if not events:  # then on no rank
        raise RuntimeError(f"no event was accepted: {stats}")
    medians = {part: statistics.median(event[part] for event in events) for part in PARTS}
    return {"seconds": medians, "events": len(events), "calibration": calibration}


def _time_messages(comm: Any) -> dict[str, float]:
    """Has tiny messages timed, by the part that they are sent in."""
    talked = {MESSAGES: 0.0, **{f"message of {part}": 0.0 for part in ("gram", "solve", "update")}}

    def timed(part: Callable[[Any], str], method: Any) -> Any:
        def call(values: Any, *arguments: Any) -> Any:
            started = time.perf_counter()
            result = method(values, *arguments)
            talked[f"message of {part(values)}"] += time.perf_counter() - started
            return result

        return call

    comm.allreduce = timed(lambda values: "update" if values.size == 1 else "gram", comm.allreduce)
    comm.broadcast = timed(lambda values: "solve", comm.broadcast)
    return talked


class _Quadratic(torch.autograd.Function):
    """curvature / 2 |p|^2, of which only the gradient is needed."""

    @staticmethod
    def forward(ctx: Any, p: torch.Tensor, curvature: float) -> torch.Tensor:
        ctx.save_for_backward(p)
        ctx.curvature = curvature
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.saved_tensors[0] * ctx.curvature, None


def _calibrate() -> dict[str, float]:
    """Medians on this rank while all ranks do the same: bytes/s of a copy, seconds of messages."""
    import horovod.torch as hvd
    import numpy as np

    from aadl_hvd.comm.horovod import horovod_communicator
    from benchmarks.latency import times

    comm = horovod_communicator(hvd.global_process_set)

    def median(operation: Any, repeats: int = REPEATS) -> float:
        return statistics.median(times(operation, repeats, lambda: comm.allreduce(np.zeros(1))))

    hvd.barrier()
    copy = copy_bandwidth()["median"]
    block = torch.ones(CALIBRATION // comm.size)

    def gather(own: torch.Tensor) -> None:
        for _ in comm.gather_by_pieces(own):  # as a step does
            pass

    return {
        "copy": copy,
        "tiny": median(lambda: comm.allreduce(np.zeros(1)), 200),
        "negotiation": median(lambda: gather(torch.ones(1)), 50),
        "large": median(lambda: gather(block)),
    }


def _main() -> None:
    """Run by `on_real_ranks` alone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parameters", required=True)
    parser.add_argument("--history-depth", type=int, required=True)
    parser.add_argument("--cycles", type=int, required=True)
    parser.add_argument("--on-rank", type=Path, required=True)
    options = parser.parse_args()
    command.on_rank(options.on_rank, lambda: _measure(options))


if __name__ == "__main__":
    _main()

"""Both methods in one table: the share of a step, from what a step starts on its host.

Launches are counted by `benchmarks.launches` on one simulated rank of many, in cycles that end with
an accepted point. Each takes as long as a launch took on an H100's host, with the Python around it.
Messages are formulas.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import table
from benchmarks.simulate import model
from benchmarks.simulate.machines import Machine
from benchmarks.simulate.model import FLOAT64, Network
from benchmarks.simulate.predictions import Steps
from benchmarks.simulate.sources import Kernels, Timers
from models.errors import UserError

AT = 1536  # ranks
BLOCK = 10  # L, steps in a block of the subspace method without momentum
JUMP = 12  # numbers in the broadcast of a jump
SUMS = 253  # numbers of the subspace method in the reduction at a block's end, 260 with the others
# Of the subspace method, bytes of a row in float32: a step reads w, the gradient, where the block
# began and two sums, and writes w, r and the sums; the end of a block reads the columns of dW
# twice, those of dG, and 14 vectors, and writes 10.
IN_STEP, IN_JUMP = 4 * 10, 4 * (3 * 10 + 24)
SLOWER = 2.0  # a host so many times as slow as that of the H100, as a V100's may be: assumed
TARGETS = {"V100": ("float32", 0.005), "H100": ("mixed", 0.02)}
GRAPHS = "cuda_graphs=True"  # how long a GPU's host takes to start a graph has not been measured
# What is in the table: case of `benchmarks.launches`, steps between two large messages.
METHODS = {
    "residual-norm, p = q = 5": 5,
    "residual-norm": 2,
    "subspace": BLOCK,
    "subspace, overlap=True": BLOCK + 1,
    f"subspace, {GRAPHS}": BLOCK,
    f"subspace, overlap=True, {GRAPHS}": BLOCK + 1,
}


@dataclasses.dataclass(frozen=True)
class Launches:
    """Kernels that a step starts beyond the base optimizer's, on one rank of AT.

    Attributes:
        source: the file that it was read from.
        tensors: parameters of the network.
        a_cycle: of a cycle, by case of `benchmarks.launches`.
    """

    source: str
    tensors: int
    a_cycle: dict[str, float]


def read_launches(path: Path) -> Launches:
    """Reads what `python -m benchmarks.launches` wrote.

    Raises:
        UserError: it cannot be read, is not for AT ranks, or lacks a method.
    """
    try:
        found = json.loads(path.read_text())
        if found["ranks"] != AT:
            raise ValueError(f"it has {found['ranks']} ranks")
        counted = {run["case"]: run["launches"] for run in found["runs"]}
        return Launches(path.name, found["tensors"], {name: counted[name] for name in METHODS})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--launches is {path}, must be a file that `python -m benchmarks.launches` wrote, "
            f"with {AT} ranks and the cases {', '.join(METHODS)}: {error}"
        ) from None


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of one cycle: the steps from one large message to the next.

    Attributes:
        method: one of METHODS.
        node: whether the ranks of a node share the history, not all.
        steps: of the cycle.
        seconds: by part: "host", "device", "tiny messages", and what training waits for of
            "negotiation" and "large message": nothing where the next step goes on meanwhile.
        launches: kernels that are started.
    """

    method: str
    node: bool
    steps: int
    seconds: dict[str, float]
    launches: float

    def share(self, step: float, host: float = 1.0) -> float:
        """Share of `step` seconds, on a host so many times as slow."""
        more = (host - 1.0) * self.seconds["host"]
        return (sum(self.seconds.values()) + more) / (self.steps * step)


def cost(
    machine: Machine,
    method: str,
    node: bool,
    n: int,
    sources: tuple[Timers, Kernels, Launches],
) -> Cost:
    """Predicts a cycle of a method on AT ranks of a machine.

    Args:
        machine: its figures.
        method: one of METHODS.
        node: the ranks of a node share the history.
        n: number of parameters.
        sources: what was measured.
    """
    timers, kernels, launches = sources
    steps, averages = METHODS[method], timers.averages
    group, everybody = (
        Network(machine, min(machine.gpus_per_node, AT) if node else AT),
        Network(machine, AT),
    )
    rows, bandwidth = -(-n // group.ranks), machine.memory_bandwidth
    count, late = launches.a_cycle[method], "overlap=True" in method
    whole = sum(model.WHOLE_PARTS.values()) * n / bandwidth
    if method.startswith("subspace"):
        streamed = rows * (steps * IN_STEP + IN_JUMP) / bandwidth
        tiny = [FLOAT64 * (SUMS + 7 + averages), FLOAT64 * JUMP, FLOAT64 * model.OBSERVED]
    else:
        streamed = rows * sum(timers.bytes_per_row.values()) / bandwidth
        numbers = timers.m, 1, model.OBSERVED
        tiny = [model.gram_message(timers.m, averages), *(FLOAT64 * k for k in numbers)]
    seconds = {
        "host": kernels.seconds * count,
        "device": streamed + whole,
        "tiny messages": sum(map(everybody.reduce_and_broadcast, tiny)),
        "negotiation": 0.0 if late else group.negotiation(),
        "large message": 0.0 if late else group.allgather(4 * n),
    }
    return Cost(method, node, steps, seconds, count)


def costs(machine: Machine, n: int, sources: tuple[Timers, Kernels, Launches]) -> list[Cost]:
    """All methods, with a history that all ranks share, and the ranks of a node."""
    return [cost(machine, name, node, n, sources) for name in METHODS for node in (False, True)]


def methods_table(found: Mapping[str, tuple[Machine, Steps, list[Cost]]]) -> str:
    """Share of a step in %, by machine, method and group."""
    head = ["GPU", "method", "history of", "steps", "launches", "ms of the host", "large message"]
    head += ["all, ms", "% of a float32 step", "of a mixed one", "host half as fast: float32"]
    head += ["mixed"]
    rows = []
    for machine, steps, own in found.values():
        for one in own:
            cells: list[Any] = [machine.gpu, one.method, "a node" if one.node else "all ranks"]
            cells += [one.steps, f"{one.launches:.0f}"]
            total = sum(one.seconds.values())
            parts = one.seconds["host"], one.seconds["large message"], total
            cells += [f"{1e3 * value:.1f}" for value in parts]
            kinds = steps.seconds["float32"], steps.seconds["mixed"]
            for slower in (1.0, SLOWER):
                cells += [f"{100 * one.share(step, slower):.2f}" for step in kinds]
            rows.append([*map(str, cells)])
    return table(head, rows)


def verdicts(found: Mapping[str, tuple[Machine, Steps, list[Cost]]]) -> list[str]:
    """Whether TARGETS are met, one line for each machine that has one."""
    lines = []
    for machine, steps, own in found.values():
        for gpu, (kind, target) in TARGETS.items():
            if gpu not in machine.gpu:
                continue
            counted = [one for one in own if GRAPHS not in one.method]  # nobody has timed graphs
            shares = [(one, one.share(steps.seconds[kind])) for one in counted]
            named = ", ".join(
                f"{one.method} ({'a node' if one.node else 'all'}) {100 * share:.2f} %"
                for one, share in shares
                if share <= target
            )
            lines.append(
                f"{machine.gpu}, at most {100 * target:g} % of a {kind} step: "
                f"{'met by ' + named if named else 'missed by all'}."
            )
    return lines

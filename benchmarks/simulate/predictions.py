"""Predicts seconds, shares of a step, and bytes from measurements and a machine's figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.simulate import model
from benchmarks.simulate.machines import Machine
from benchmarks.simulate.model import Network
from benchmarks.simulate.sources import Kernels, Timers

# Columns of the tables, and the parts of an acceleration step that each adds up: the library's
# timers, and those that benchmarks.gpu has beside them.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "store": ("read", "residual", "store"),
    "gram": ("gram",),
    "solve": ("solve",),
    "update": ("update",),
    "write": ("write",),
    "rest": ("other", "replicas", "safeguard", "gather"),
    "noise gate": ("noise", "sample", "backward"),
    "averages": ("average",),
}
MESSAGES = ("tiny messages", "negotiation", "large message")
SWITCHABLE = ("noise gate", "averages")
# An assumption where no throughput was published: ResNet50 is bound by memory bandwidth.
V100_BANDWIDTH = 900e9


@dataclasses.dataclass(frozen=True)
class Steps:
    """Seconds of a training step without acceleration, by precision.

    Attributes:
        seconds: "float32" and "mixed".
        source: "published", or how they were assumed.
    """

    seconds: dict[str, float]
    source: str


def steps_of(machine: Machine, batch: int, rates: dict[str, float]) -> Steps:
    """Step times from images per second of a V100; other GPUs by the ratio of bandwidths.

    Args:
        machine: whose GPU it is.
        batch: images per GPU.
        rates: images per second of a V100, by precision.
    """
    ratio = machine.memory_bandwidth / V100_BANDWIDTH
    published = "V100" in machine.gpu
    factor = 1.0 if published else ratio
    source = "published" if published else f"assumed: {ratio:.2f} times a V100's, as its bandwidth"
    return Steps({name: batch / (rate * factor) for name, rate in rates.items()}, source)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The cost of one acceleration step, and of the stores since the last, on one machine.

    Attributes:
        ranks: P.
        p: acceleration's frequency.
        seconds: seconds by column of the tables.
        bytes: bytes of history and averages on a GPU.
        kernels: number of kernels.
        in_backward: number of these in backward passes, where a host that is ahead hides them.
    """

    ranks: int
    p: int
    seconds: dict[str, float]
    bytes: int
    kernels: int
    in_backward: int

    @property
    def total(self) -> float:
        """Seconds of the acceleration step."""
        return sum(self.seconds.values())

    @property
    def bare(self) -> float:
        """The same without noise gate and averages."""
        return sum(v for k, v in self.seconds.items() if k not in SWITCHABLE)

    def share(self, step: float, bare: bool = False) -> float:
        """Cost over that of the p steps it belongs to; each takes `step` seconds."""
        return (self.bare if bare else self.total) / (self.p * step)

    def as_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {**dataclasses.asdict(self), "total": self.total, "bare": self.bare}


def predict(
    machine: Machine,
    ranks: int,
    timers: Timers,
    kernels: Kernels,
    *,
    n: int,
    p: int,
    q: int,
    node: bool = False,
) -> Prediction:
    """Predicts the cost for one rank of P on a machine.

    Streaming scales with memory bandwidth. Every kernel adds the host's time for it. Nothing
    overlaps.

    Args:
        machine: its figures.
        ranks: P.
        timers: the work on a row.
        kernels: the kernels of a step.
        n: number of parameters.
        p: acceleration's frequency.
        q: a pair is stored every q steps, q <= p.
        node: the ranks of a node share the history (`shard_group="node"`), not all P. The weights
            are gathered within the node. The Gram matrix is summed up by all P, each over n/P rows.
    """
    m, averages = timers.m, timers.averages
    group = min(machine.gpus_per_node, ranks) if node else ranks
    bandwidth = machine.memory_bandwidth
    own, all_ranks = (
        model.streaming(timers.bytes_per_row, -(-n // P), n, bandwidth) for P in (group, ranks)
    )
    parts = own | {"gram": all_ranks["gram"], "solve": timers.solve_s}
    counts = kernels.of(ranks)
    for part, count in counts.items():
        parts[part] = parts.get(part, 0.0) + count * kernels.seconds
    for part in GROUPS["store"]:  # the sources have p = q
        parts[part] = parts.get(part, 0.0) * (p // q)
        counts[part] = counts.get(part, 0) * (p // q)
    messages = model.talk(Network(machine, group), n, m, averages)
    messages["tiny messages"] = model.talk(Network(machine, ranks), n, m, averages)["tiny messages"]
    return Prediction(
        ranks=ranks,
        p=p,
        seconds={
            name: sum(parts.get(part, 0.0) for part in members) for name, members in GROUPS.items()
        }
        | messages,
        bytes=model.history_bytes(n, m, group, averages=averages),
        kernels=sum(counts.values()),
        in_backward=counts.get("backward", 0),
    )


def memory_break_even(machine: Machine, n: int, m: int, averages: int, share: float) -> int:
    """The smallest P at which history and averages take at most a share of a GPU's memory."""
    ranks = 1
    while model.history_bytes(n, m, ranks, averages=averages) > share * machine.gpu_memory_bytes:
        ranks += 1
    return ranks


def latency_break_even(machine: Machine, n: int) -> int:
    """P from which the latency of a ring costs more than its bytes: (P-1) a > 4 n b."""
    across = Network(machine, 2 * machine.gpus_per_node)
    return 1 + int(4 * n * across.per_byte / across.latency)

"""From what was measured here and a machine's figures to seconds, shares of a step, and bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.simulate import model
from benchmarks.simulate.machines import Machine
from benchmarks.simulate.model import Network, Work

# Columns of the tables, and the parts of an event that each adds up.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "store": ("read", "residual", "store"),
    "gram": ("gram",),
    "solve": ("solve",),
    "update": ("update",),
    "write": ("write",),
    "rest": ("other", "replicas", "safeguard", "gather"),
    "noise gate": ("noise", "sample", "backward"),
    "averages": ("average",),
    "tiny messages": ("tiny",),
    "negotiation": ("negotiation",),
    "large message": ("large",),
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
    """The cost of one accelerated step, and of the stores since the last, on one machine.

    Attributes:
        variant: "rows", "columns", "rows in a node" or "offload".
        ranks: P.
        p: acceleration's frequency.
        seconds: by the columns of the tables.
        bytes: of history and averages on a GPU.
        launches: kernels, counted.
        in_backward: those of them in backward passes, where a host that is ahead hides them.
        synchronisations: waits, counted.
        host_time: seconds if host work took what it takes here, in place of launches and waits.
    """

    variant: str
    ranks: int
    p: int
    seconds: dict[str, float]
    bytes: int
    launches: int
    in_backward: int
    synchronisations: int
    host_time: float

    @property
    def total(self) -> float:
        """Seconds of the event."""
        return sum(self.seconds.values())

    @property
    def bare(self) -> float:
        """The same without noise gate and averages."""
        return sum(v for k, v in self.seconds.items() if k not in SWITCHABLE)

    def share(self, step: float, bare: bool = False) -> float:
        """Cost over that of the p steps it belongs to, which take `step` seconds each."""
        return (self.bare if bare else self.total) / (self.p * step)

    def as_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {**dataclasses.asdict(self), "total": self.total, "bare": self.bare}


def as_work(measured: Mapping[str, Any], floor: Mapping[str, Any]) -> Work:
    """A measured share; `floor` is the same for next to no rows."""
    seconds, fixed = (
        {part: value["median"] for part, value in found["seconds"].items()}
        for found in (measured, floor)
    )
    return Work(seconds, fixed, measured["launches"], measured["synchronisations"])


def predict(
    machine: Machine,
    measured: Mapping[str, Any],
    floor: Mapping[str, Any],
    *,
    m: int,
    averages: int,
    launch: float = model.LAUNCH,
) -> Prediction:
    """One rank of P on a machine, its history shared by all P.

    Args:
        machine: its figures.
        measured: `work.share` of this P.
        floor: `work.share` of next to no rows.
        m: history depth.
        averages: number of running averages.
        launch: seconds of a kernel's launch.
    """
    network = Network(machine, measured["ranks"])
    messages = model.talk(network, measured["parameters"], m, averages, measured["layout"])
    return _prediction(
        measured["layout"], machine, measured, floor, messages, launch, measured["ranks"]
    )


def predict_in_node(
    machine: Machine,
    measured: Mapping[str, Any],
    group: Mapping[str, Any],
    floor: Mapping[str, Any],
    *,
    m: int,
    averages: int,
    launch: float = model.LAUNCH,
) -> Prediction:
    """One rank of P, its history shared by the ranks of its node (`shard_group="node"`).

    The weights are gathered within the node. All P sum up the Gram matrix, each over a piece of
    its rows, as long as if all P shared one history.

    Args:
        machine: its figures.
        measured: `work.share` of P ranks.
        group: `work.share` of as many ranks as a node has.
        floor: `work.share` of next to no rows.
        m: history depth.
        averages: number of running averages.
        launch: seconds of a kernel's launch.
    """
    n, ranks = measured["parameters"], measured["ranks"]
    node = model.talk(Network(machine, group["ranks"]), n, m, averages, "rows")
    world = model.talk(Network(machine, ranks), n, m, averages, "rows")
    shared = {
        kind: {**group[kind], **{k: v for k, v in measured[kind].items() if k == "gram"}}
        for kind in ("seconds", "launches", "synchronisations")
    }
    return _prediction(
        "rows in a node",
        machine,
        {**group, **shared},
        floor,
        node | {"tiny": world["tiny"]},
        launch,
        ranks,
    )


def _prediction(
    variant: str,
    machine: Machine,
    measured: Mapping[str, Any],
    floor: Mapping[str, Any],
    messages: dict[str, float],
    launch: float,
    ranks: int,
) -> Prediction:
    work = as_work(measured, floor)
    ratio = measured["bandwidth"] / machine.memory_bandwidth
    parts = model.on_gpu(work, ratio, launch) | messages
    seconds = {
        group: sum(parts.get(part, 0.0) for part in members) for group, members in GROUPS.items()
    }
    streaming = model.on_gpu(dataclasses.replace(work, launches={}, synchronisations={}), ratio)
    slow = sum(streaming.values()) + sum(messages.values())
    slow += sum(
        v for k, v in work.fixed.items() if k not in (*model.HOST_PARTS, *model.WHOLE_PARTS)
    )
    return Prediction(
        variant=variant,
        ranks=ranks,
        p=measured["p"],
        seconds=seconds,
        bytes=measured["bytes"],
        launches=sum(work.launches.values()),
        in_backward=work.launches.get("backward", 0),
        synchronisations=sum(work.synchronisations.values()),
        host_time=slow,
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

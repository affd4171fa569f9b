"""The cost model: pure functions of message lengths, ranks and a machine's figures.

Collectives are those of Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication
Operations in MPICH", 2005: a message of n bytes costs a + n b, a the latency in seconds and b the
seconds per byte; lg P is rounded up where P is no power of two. Local additions are left out.
"""

from __future__ import annotations

import dataclasses
import math

from benchmarks.simulate.machines import Machine

LAUNCH = 5e-6  # seconds to start a kernel from torch; assumed
SYNCHRONISATION = 10e-6  # seconds that the host loses when it waits for a number; assumed
CYCLE = 1e-3  # seconds between two negotiations of Horovod, as the machine files set it
FLOAT64 = 8
# What rides along in the allreduce of the Gram matrix: noise 4, loss 3, checksum of the weights 4,
# r^T r and four tokens 5.
PAYLOAD = 20
OBSERVED = 4  # numbers in the verdict on an observed loss


def lg(ranks: int) -> int:
    """Rounds of an exchange among P ranks, log2 P rounded up."""
    return (ranks - 1).bit_length()


def recursive_doubling(n: float, ranks: int, a: float, b: float) -> float:
    """Allreduce of n bytes, for short messages: lg P a + n lg P b (section 4.4)."""
    return lg(ranks) * (a + n * b)


def rabenseifner(n: float, ranks: int, a: float, b: float) -> float:
    """Allreduce of n bytes, for long ones: 2 lg P a + 2 n (P-1)/P b (section 4.4)."""
    return 2 * lg(ranks) * a + 2 * n * (ranks - 1) / ranks * b


def ring_allreduce(n: float, ranks: int, a: float, b: float) -> float:
    """Allreduce of n bytes round a ring: 2 (P-1) a + 2 n (P-1)/P b (sections 4.1 and 4.3)."""
    return 2 * ring_allgather(n, ranks, a, b)


def ring_allgather(n: float, ranks: int, a: float, b: float) -> float:
    """Allgather of n bytes in all, round a ring: (P-1) a + n (P-1)/P b (section 4.1)."""
    return (ranks - 1) * a + n * (ranks - 1) / ranks * b


def doubling_allgather(n: float, ranks: int, a: float, b: float) -> float:
    """Allgather of n bytes in all, recursive doubling or Bruck: lg P a + n (P-1)/P b (4.1)."""
    return lg(ranks) * a + n * (ranks - 1) / ranks * b


def tree_broadcast(n: float, ranks: int, a: float, b: float) -> float:
    """Broadcast (or reduction to one rank) of n bytes, short: lg P a + n lg P b (section 4.2)."""
    return lg(ranks) * (a + n * b)


@dataclasses.dataclass(frozen=True)
class Network:
    """P ranks on the nodes of a machine, filled one after the other: two levels.

    GPUs of a node share its injection bandwidth. A ring enters and leaves every node once, so each
    node injects what a single rank would.

    Attributes:
        machine: its figures.
        ranks: P.
    """

    machine: Machine
    ranks: int

    @property
    def nodes(self) -> int:
        """Nodes that P ranks take."""
        return math.ceil(self.ranks / self.machine.gpus_per_node)

    @property
    def on_node(self) -> int:
        """Ranks of a node."""
        return min(self.ranks, self.machine.gpus_per_node)

    @property
    def latency(self) -> float:
        """Of the slowest hop of a ring, s: all hops of a round wait for it."""
        inside, outside = self.machine.intranode_latency, self.machine.network_latency
        return max(inside, outside) if self.nodes > 1 else inside

    @property
    def per_byte(self) -> float:
        """Seconds per byte of the slowest link of a ring."""
        inside = 1.0 / self.machine.intranode_bandwidth
        return max(inside, 1.0 / self.machine.injection_bandwidth) if self.nodes > 1 else inside

    def tree(self, n: float) -> float:
        """Seconds to bring n bytes from one rank to all, or to reduce them on it: node by node."""
        machine = self.machine
        across = tree_broadcast(
            n, self.nodes, machine.network_latency, 1.0 / machine.injection_bandwidth
        )
        return across + tree_broadcast(
            n, self.on_node, machine.intranode_latency, 1.0 / machine.intranode_bandwidth
        )

    def reduce_and_broadcast(self, n: float) -> float:
        """Seconds of the tiny reduction as the library does it: to rank 0 and back."""
        return 2 * self.tree(n)

    def allgather(self, n: float) -> float:
        """Seconds of an allgather of n bytes in all round one ring, as NCCL does it."""
        return ring_allgather(n, self.ranks, self.latency, self.per_byte)

    def allgather_two_level(self, n: float) -> float:
        """The same, by recursive doubling across nodes and round a ring within.

        Rank j of every node gathers with the j-th ranks of the others: g gathers of n/g bytes at a
        time, which share the node's injection bandwidth.
        """
        machine = self.machine
        across = doubling_allgather(
            n, self.nodes, machine.network_latency, 1.0 / machine.injection_bandwidth
        )
        return across + ring_allgather(
            n, self.on_node, machine.intranode_latency, 1.0 / machine.intranode_bandwidth
        )

    def allreduce(self, n: float) -> float:
        """Seconds of an allreduce of n bytes, the cheaper one of ring and Rabenseifner."""
        arguments = n, self.ranks, self.latency, self.per_byte
        return min(ring_allreduce(*arguments), rabenseifner(*arguments))

    def negotiation(self) -> float:
        """Seconds until Horovod starts a large message: its cycle, two reductions of a few bits."""
        return CYCLE + 2 * self.reduce_and_broadcast(FLOAT64)


def gram_message(m: int, averages: int) -> int:
    """Bytes of the allreduce of an accelerated step."""
    return FLOAT64 * ((m + 1) * m + PAYLOAD + averages)


def talk(
    network: Network, n: int, m: int, averages: int, layout: str, itemsize: int = 4
) -> dict[str, float]:
    """Seconds of an accelerated step's messages, by part; nothing overlaps.

    Args:
        network: the ranks that share the history.
        n: number of parameters.
        m: history depth.
        averages: number of running averages.
        layout: "rows" or "columns".
        itemsize: bytes of a parameter.

    Returns:
        "tiny": Gram matrix, coefficients, slope, verdict on the loss. "large": the new weights.
        "negotiation": until Horovod starts the latter.
    """
    if network.ranks == 1:
        return {"tiny": 0.0, "large": 0.0, "negotiation": 0.0}
    tiny = sum(
        network.reduce_and_broadcast(k)
        for k in (gram_message(m, averages), FLOAT64, FLOAT64 * OBSERVED)
    )
    large = network.allgather if layout == "rows" else network.allreduce
    return {
        "tiny": tiny + network.tree(FLOAT64 * m),
        "large": large(itemsize * n),
        "negotiation": network.negotiation(),
    }


def history_bytes(
    n: int,
    m: int,
    ranks: int,
    *,
    layout: str = "rows",
    itemsize: int = 4,
    work: int = 4,
    averages: int = 0,
    windows: int = 0,
) -> int:
    """Bytes of history and averages on the rank that holds most.

    Args:
        n: number of parameters.
        m: history depth.
        ranks: P.
        layout: "rows": 2 m n/P numbers of the history; "columns": 2 n ceil(m/P).
        itemsize: bytes of a number of the history.
        work: bytes of a number of pairs (4 n/P) and averages.
        averages: exponential ones, 2 n/P numbers each.
        windows: 4 n/P numbers each.
    """
    rows = -(-n // ranks) if layout == "rows" else n
    columns = m if layout == "rows" else -(-m // ranks)
    return rows * (2 * columns * itemsize + (4 + 2 * averages + 4 * windows) * work)


def foreach_launches(tensors: int, numbers: int) -> int:
    """Kernels of one torch._foreach_copy_ on a GPU.

    Pieces of 65,536 numbers, 320 of them in a launch, of at most 64 tensors (two lists), as in
    torch's MultiTensorApply.cuh; a launch ends at the limit that is met first.
    """
    return math.ceil(tensors / 64) + numbers // (65536 * 320)


@dataclasses.dataclass(frozen=True)
class Work:
    """A rank's own work for one accelerated step and the stores since the last, part by part.

    Attributes:
        seconds: measured here, by part.
        fixed: what of it does not depend on the number of rows: measured on next to none.
        launches: kernels a GPU would start, counted.
        synchronisations: times the host would wait for a GPU, counted.
    """

    seconds: dict[str, float]
    fixed: dict[str, float]
    launches: dict[str, int]
    synchronisations: dict[str, int]


# On the host, whatever holds the weights.
HOST_PARTS = ("solve",)
# Passes over all n weights, whatever P: they have no row-free remainder to take off.
WHOLE_PARTS = ("write", "replicas")


def on_gpu(work: Work, ratio: float, launch: float = LAUNCH) -> dict[str, float]:
    """Seconds of a rank's own work on a GPU, by part.

    What was measured here beyond the row-free remainder is streaming, and is scaled by the ratio of
    memory bandwidths; the remainder is the host's and is replaced by counted launches and waits.
    The small solve stays on the host as measured.

    Args:
        work: measured here.
        ratio: memory bandwidth here over that of the GPU.
        launch: seconds of a launch.
    """
    found = {}
    for part, seconds in work.seconds.items():
        if part in HOST_PARTS:
            found[part] = seconds
            continue
        fixed = 0.0 if part in WHOLE_PARTS else work.fixed.get(part, 0.0)
        streaming = max(seconds - fixed, 0.0) * ratio
        host = launch * work.launches.get(part, 0)
        host += SYNCHRONISATION * work.synchronisations.get(part, 0)
        found[part] = streaming + host
    return found


def offloaded(
    n: int, m: int, *, stack_and_solve: float, bandwidth: float, link: float, itemsize: int = 4
) -> dict[str, float]:
    """Seconds of one event where every rank keeps all of the history on its host, as AADL does.

    Args:
        n: number of parameters.
        m: history depth.
        stack_and_solve: bytes that could be copied while columns are stacked and solved by QR.
        bandwidth: what a rank has of its host's memory bandwidth, bytes/s.
        link: bytes per second between GPU and host.
        itemsize: bytes of a parameter.

    Returns:
        "transfer": the new iterate to the host and the result back. "least squares": on the host,
        by every rank. "transfer of all": of m iterates, where they cross the link at every event.
    """
    return {
        "transfer": 2 * n * itemsize / link,
        "least squares": stack_and_solve / bandwidth,
        "transfer of all": m * n * itemsize / link,
    }

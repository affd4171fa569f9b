"""The cost model: pure functions of message lengths, ranks and a machine's figures.

Collectives are those of Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication
Operations in MPICH", 2005. A message of n bytes costs a + n b seconds: a is the latency in seconds,
b the seconds per byte. lg P is rounded up if P is no power of two. Local additions are left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from benchmarks.simulate.machines import Machine

CYCLE = 1e-3  # seconds between two negotiations of Horovod, as the machine files set it
FLOAT64 = 8
# Numbers sent along in the allreduce of the Gram matrix: noise 5, loss 3, checksum of the
# weights 4, r^T r 1, and 8 that say whether ranks have stored the same.
PAYLOAD = 21
OBSERVED = 4  # numbers in the verdict on an observed loss


def lg(ranks: int) -> int:
    """Rounds of an exchange among P ranks, log2 P rounded up."""
    return (ranks - 1).bit_length()


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
    """P ranks on the nodes of a machine, which are filled one after the other: two levels.

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
        """Seconds of latency of the slowest hop of a ring: all hops of a round wait for it."""
        inside, outside = self.machine.intranode_latency, self.machine.network_latency
        return max(inside, outside) if self.nodes > 1 else inside

    @property
    def per_byte(self) -> float:
        """Seconds per byte of the slowest link of a ring."""
        inside = 1.0 / self.machine.intranode_bandwidth
        return max(inside, 1.0 / self.machine.injection_bandwidth) if self.nodes > 1 else inside

    def tree(self, n: float) -> float:
        """Seconds to send n bytes from one rank to all, or to reduce them on it: node by node."""
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

    def negotiation(self) -> float:
        """Seconds until Horovod starts a large message: its cycle, two reductions of a few bits."""
        return CYCLE + 2 * self.reduce_and_broadcast(FLOAT64)


def gram_message(m: int, averages: int) -> int:
    """Bytes of the allreduce of an acceleration step."""
    return FLOAT64 * ((m + 1) * m + PAYLOAD + averages)


def talk(network: Network, n: int, m: int, averages: int, itemsize: int = 4) -> dict[str, float]:
    """Seconds of an acceleration step's messages, in rows; nothing overlaps.

    Args:
        network: the ranks that share the history.
        n: number of parameters.
        m: history depth.
        averages: number of running averages.
        itemsize: bytes of a parameter.

    Returns:
        "tiny messages": Gram matrix, coefficients, slope, verdict on the loss. "large message":
        the new weights. "negotiation": until Horovod starts the latter.
    """
    if network.ranks == 1:
        return {"tiny messages": 0.0, "negotiation": 0.0, "large message": 0.0}
    tiny = sum(
        network.reduce_and_broadcast(k)
        for k in (gram_message(m, averages), FLOAT64 * m, FLOAT64, FLOAT64 * OBSERVED)
    )
    return {
        "tiny messages": tiny,
        "negotiation": network.negotiation(),
        "large message": network.allgather(itemsize * n),
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
) -> int:
    """Bytes of history and averages on the rank that holds most.

    Args:
        n: number of parameters.
        m: history depth.
        ranks: P.
        layout: "rows": 2 m n/P numbers of the history; "columns": 2 n ceil(m/P).
        itemsize: bytes of a number of the history.
        work: bytes of a number of pairs (4 n/P) and averages.
        averages: number of averages, of 2 n/P numbers each.
    """
    rows = -(-n // ranks) if layout == "rows" else n
    columns = m if layout == "rows" else -(-m // ranks)
    return rows * (2 * columns * itemsize + (4 + 2 * averages) * work)


# Passes over this rank's rows.
ROW_PARTS = ("read", "store", "gram", "update", "average")
# Passes over all n weights, for any P: bytes for each, float32. "write" copies the point into the
# tensors, "replicas" is a checksum.
WHOLE_PARTS = {"write": 8, "replicas": 4}


def streaming(
    bytes_per_row: Mapping[str, float], rows: int, n: int, bandwidth: float
) -> dict[str, float]:
    """Seconds that a rank's own passes over memory take, by part.

    Args:
        bytes_per_row: bytes per row of each of ROW_PARTS.
        rows: rows of the rank.
        n: number of parameters.
        bandwidth: bytes/s, read and written.
    """
    whole = {part: size * n / bandwidth for part, size in WHOLE_PARTS.items()}
    return {part: bytes_per_row[part] * rows / bandwidth for part in ROW_PARTS} | whole


def offloaded(
    n: int, m: int, *, stack_and_solve: float, bandwidth: float, link: float, itemsize: int = 4
) -> dict[str, float]:
    """Seconds of an acceleration step as AADL does it, with all of the history on every host.

    Args:
        n: number of parameters.
        m: history depth.
        stack_and_solve: bytes that could be copied while columns are stacked and solved by QR.
        bandwidth: a rank's share of its host's memory bandwidth, bytes/s.
        link: bytes per second between GPU and host.
        itemsize: bytes of a parameter.

    Returns:
        "transfer": the new iterate to the host and the result back. "least squares": on the host,
        by every rank. "transfer of all": of m iterates, where they cross the link each time.
    """
    return {
        "transfer": 2 * n * itemsize / link,
        "least squares": stack_and_solve / bandwidth,
        "transfer of all": m * n * itemsize / link,
    }

"""Every collective operation that a step can enter, in one place.

No other module of `core` calls a communicator in a step. Which operations a step enters depends on
its number and on earlier results that are the same on all ranks, so no rank waits for another in
vain. `LISTED` says which kind of operation each method is and when a step enters it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from aadl_hvd.comm.base import Communicator, Gathering, ShardGroup
from aadl_hvd.core.solve import Vector
from aadl_hvd.stats import Stats

_Method = TypeVar("_Method", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Collective:
    """One entry of the list.

    Attributes:
        kind: "allreduce", "maximum", "broadcast", "gather", "sum" (of large tensors) or "object".
        numbers: how many float64 numbers a rank sends, or what else.
        when: the steps that enter it.
    """

    kind: str
    numbers: str
    when: str


LISTED: dict[str, Collective] = {}


def _listed(kind: str, numbers: str, when: str) -> Callable[[_Method], _Method]:
    def add(method: _Method) -> _Method:
        LISTED[method.__name__] = Collective(kind, numbers, when)
        return method

    return add


class Collectives:
    """The collective operations of one rank.

    Args:
        comm: the ranks that train together.
        group: those of them that share one history.
        stats: counts the bytes that this rank sends, by part of the step.
    """

    def __init__(self, comm: Communicator, group: ShardGroup, stats: Stats) -> None:
        self._comm, self._group, self._stats = comm, group, stats

    @property
    def size(self) -> int:
        """How many ranks train together."""
        return self._comm.size

    @property
    def rank(self) -> int:
        """This rank among them."""
        return self._comm.rank

    @property
    def copies(self) -> int:
        """How many groups of ranks hold a whole history each."""
        return self._group.count

    @property
    def copy(self) -> int:
        """The number of this rank's group."""
        return self._group.index

    # Before the base step

    @_listed("allreduce", "9", "the first step; the first after `load_state_dict` in it")
    def agree(self, values: Vector) -> Vector:
        """Whether all ranks have loaded the same history, and can use the same kernels."""
        return self._comm.allreduce(values)

    @_listed("allreduce", "4", "after an accelerated step whose loss was observed")
    def loss_verdict(self, values: Vector) -> Vector:
        """The losses at an accelerated point, one step later."""
        return self._sum("safeguard", values)

    # After the base step

    @_listed("allreduce", "2", "safeguard='residual': after every acceleration step")
    def residual_verdict(self, values: Vector) -> Vector:
        """The norm of the residual at an accelerated point, one step later."""
        return self._sum("safeguard", values)

    @_listed(
        "allreduce", "(m + 1) m + 21 + averages", "acceleration steps of the residual-norm method"
    )
    def reduction(self, message: Vector) -> Vector:
        """The payloads of an acceleration step."""
        return self._sum("gram", message)

    @_listed("allreduce", "260 + averages", "the end of every block of the subspace method")
    def block(self, message: Vector) -> Vector:
        """The payloads at the end of a block."""
        return self._sum("gram", message)

    @_listed("broadcast", "12", "the end of a block that solves")
    def jump(self, message: Vector) -> Vector:
        """The coefficients of rank 0, and what they promise."""
        self._stats.bytes["solve"] += message.nbytes
        return self._comm.broadcast(message)

    @_listed("allreduce", "4 times the tensors", "a jump, while any may be scale-invariant")
    def growth(self, values: Vector) -> Vector:
        """Which tensors' scale does not matter, and how far the jump goes along them."""
        return self._sum("solve", values)

    @_listed("allreduce", "m", "an acceleration step in which R^T r is computed anew")
    def product(self, values: Vector) -> Vector:
        """R^T r, where it cannot be carried forward."""
        return self._sum("gram", values)

    @_listed("broadcast", "m", "an acceleration step that solves")
    def coefficients(self, gamma: Vector) -> Vector:
        """The coefficients of rank 0: processors may differ, and weights must not."""
        self._stats.bytes["solve"] += gamma.nbytes
        return self._comm.broadcast(gamma)

    @_listed("allreduce", "1", "an acceleration step that solves")
    def slope(self, values: Vector) -> Vector:
        """<w+ - w, r>."""
        return self._sum("update", values)

    @_listed("allreduce", "1", "safeguard='loss': twice in an accelerated step")
    def closure_loss(self, values: Vector) -> Vector:
        """The loss that the closure returned."""
        return self._sum("safeguard", values)

    @_listed("sum", "n", "layout='columns': an accelerated step")
    def update(self, terms: Tensor) -> Tensor:
        """The update of the column layout, a sum of terms over the group's ranks."""
        self._stats.bytes["gather"] += terms.numel() * terms.element_size()
        return self._group.comm.sum_tensor(terms)

    @_listed("gather", "n/P", "layout='rows': wherever weights are published")
    @contextlib.contextmanager
    def weights(self, block: Tensor) -> Iterator[Iterator[tuple[int, Tensor]]]:
        """The blocks of all ranks of the group, piece by piece: the one large message."""
        self._stats.bytes["gather"] += block.numel() * block.element_size()
        with contextlib.closing(self._group.comm.gather_by_pieces(block)) as pieces:
            yield pieces

    @_listed("gather", "n/P", "overlap=True: a jump, which the next step adds")
    def jump_later(self, block: Tensor) -> Gathering:
        """The jump's blocks of all ranks of the group: the one large message, started only."""
        self._stats.bytes["gather"] += block.numel() * block.element_size()
        return self._group.comm.gather_later(block)

    @_listed("maximum", "3", "average_window: every step after the warm-up")
    def average_spread(self, values: Vector) -> Vector:
        """The two sides of the paper's Eq. 16, and whether a rank's window is not full yet."""
        self._stats.bytes["average"] += values.nbytes
        return self._comm.allreduce(values, "max")

    # Where ranks hold different weights

    @_listed("object", "-", "an acceleration step that finds different weights")
    def all_objects(self, item: Any) -> list[Any]:
        """An object of every rank, by rank."""
        return self._comm.allgather_object(item)

    @_listed("sum", "n, and the base optimizer's state", "ranks get the weights of another")
    def from_one_rank(self, tensor: Tensor) -> Tensor:
        """A sum in which all ranks but one contribute zeros."""
        return self._comm.sum_tensor(tensor)

    # Outside of steps

    def mean(self, values: Vector) -> Vector:
        """Mean of a small vector over all ranks."""
        return np.asarray(self._comm.allreduce(values) / self._comm.size)

    def _sum(self, part: str, values: Vector) -> Vector:
        self._stats.bytes[part] += values.nbytes
        return self._comm.allreduce(values)

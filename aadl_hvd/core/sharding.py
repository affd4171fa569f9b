"""Who holds which part of the history: pure arithmetic, no tensors, no communication.

    rows (default)                       columns
            slot 0 1 2 3 ... m-1                 slot 0  1  2  3  ...
    rank 0 [ block of rows 0        ]            rank 0  1  2  0  ...   (P = 3)
    rank 1 [ block of rows 1        ]            each rank: all n rows of its own slots
    rank 2 [ block of rows 2 (short)]

A slot is a place in the ring buffer of m columns. Several groups of ranks may each hold the whole
history; then they share the work of sums over rows, each taking a piece of every block.
"""

from __future__ import annotations

import dataclasses
import functools

from aadl_hvd.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The part of an n x m history that one rank of the P in its group holds.

    Args:
        layout: "rows" or "columns".
        n: length of the flat vector, at least 0.
        depth: m, number of slots, at least 1.
        size: P, number of ranks that share the history, at least 1.
        rank: this rank in its group, 0 <= rank < size.
        groups: number of groups, each with a history of its own, at least 1; 1 for "columns",
            whose updates are sums that groups might round differently.
        group: this rank's, 0 <= group < groups.

    Raises:
        ConfigError: an argument is out of its range.
    """

    layout: str
    n: int
    depth: int
    size: int
    rank: int
    groups: int = 1
    group: int = 0

    def __post_init__(self) -> None:
        if self.layout not in ("rows", "columns"):
            raise ConfigError(f"Invalid layout={self.layout!r}. Must be 'rows' or 'columns'.")
        if self.n < 0 or self.depth < 1 or self.size < 1 or not 0 <= self.rank < self.size:
            raise ConfigError(
                f"Invalid sharding n={self.n}, depth={self.depth}, size={self.size}, "
                f"rank={self.rank}. Must satisfy n >= 0, depth >= 1, 0 <= rank < size."
            )
        most = 1 if self.layout == "columns" else self.groups
        if not 0 <= self.group < self.groups <= most:
            raise ConfigError(
                f"Invalid sharding group={self.group}, groups={self.groups}, "
                f"layout={self.layout!r}. Must satisfy 0 <= group < groups, and groups=1 for "
                "layout='columns'."
            )

    @functools.cached_property
    def block(self) -> int:
        """Rows in a full block. All blocks travel at this length, the last ones padded."""
        return -(-self.n // self.size) if self.layout == "rows" else self.n

    @functools.cached_property
    def rows(self) -> tuple[int, int]:
        """Half-open range [lo, hi) of the rows of the flat vector that this rank works on."""
        if self.layout == "columns":
            return 0, self.n
        lo = min(self.rank * self.block, self.n)
        return lo, min(lo + self.block, self.n)

    @functools.cached_property
    def slots(self) -> tuple[int, ...]:
        """Slots of the ring buffer of which this rank holds its rows."""
        if self.layout == "rows":
            return tuple(range(self.depth))
        return tuple(range(self.rank, self.depth, self.size))

    @functools.cached_property
    def summed(self) -> slice:
        """Of `rows`, counted from 0, those over which this rank's products enter sums over ranks.

        All of them, where there is one group; else its share of them.
        """
        lo, hi = self.rows
        piece = -(-(hi - lo) // self.groups)
        first = min(self.group * piece, hi - lo)
        return slice(first, min(first + piece, hi - lo))

    @functools.cached_property
    def counted(self) -> slice:
        """As `summed`, for what every rank of the column layout can compute: r, ||r||."""
        return self.summed if self.counts_replicated else slice(0, 0)

    @property
    def counts_replicated(self) -> bool:
        """Whether this rank contributes what every rank of its group holds to a sum over it."""
        return self.layout == "rows" or self.rank == 0

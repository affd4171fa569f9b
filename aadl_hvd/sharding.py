"""Who holds which part of the history: pure arithmetic, no tensors, no communication.

    rows (default)                       columns
            slot 0 1 2 3 ... m-1                 slot 0  1  2  3  ...
    rank 0 [ block of rows 0        ]            rank 0  1  2  0  ...   (P = 3)
    rank 1 [ block of rows 1        ]            each rank: all n rows of its own slots
    rank 2 [ block of rows 2 (short)]

A slot is a place in the ring buffer of m columns.
"""

from __future__ import annotations

import dataclasses

from aadl_hvd.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The part of an n x m history that one rank of P holds.

    Args:
        layout: "rows" or "columns".
        n: length of the flat vector, at least 0.
        depth: m, number of slots, at least 1.
        size: P, number of ranks that share the history, at least 1.
        rank: this rank, 0 <= rank < size.

    Raises:
        ConfigError: an argument is out of its range.
    """

    layout: str
    n: int
    depth: int
    size: int
    rank: int

    def __post_init__(self) -> None:
        if self.layout not in ("rows", "columns"):
            raise ConfigError(f"Invalid layout={self.layout!r}. Must be 'rows' or 'columns'.")
        if self.n < 0 or self.depth < 1 or self.size < 1 or not 0 <= self.rank < self.size:
            raise ConfigError(
                f"Invalid sharding n={self.n}, depth={self.depth}, size={self.size}, "
                f"rank={self.rank}. Must satisfy n >= 0, depth >= 1, 0 <= rank < size."
            )

    @property
    def block(self) -> int:
        """Rows in a full block. All blocks travel at this length, the last ones padded."""
        return -(-self.n // self.size) if self.layout == "rows" else self.n

    @property
    def rows(self) -> tuple[int, int]:
        """Half-open range [lo, hi) of the rows of the flat vector that this rank works on."""
        if self.layout == "columns":
            return 0, self.n
        lo = min(self.rank * self.block, self.n)
        return lo, min(lo + self.block, self.n)

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots of the ring buffer of which this rank holds its rows."""
        if self.layout == "rows":
            return tuple(range(self.depth))
        return tuple(range(self.rank, self.depth, self.size))

    @property
    def counts_replicated(self) -> bool:
        """Whether this rank contributes what every rank can compute (r, ||r||) to a sum."""
        return self.layout == "rows" or self.rank == 0

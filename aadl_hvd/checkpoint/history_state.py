"""The history of the residual-norm method in a checkpoint: stored pairs and their products."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import torch
from torch import Tensor

from aadl_hvd.checkpoint.state import (
    CELLS,
    COLUMNS,
    OWN,
    ROWS,
    SHARED,
    State,
    agree,
    check_optional,
)
from aadl_hvd.schema import anything, integer, listed, number, optional, tensor

_DOUBLE = (torch.float64,)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ColumnsState(State):
    """The stored pairs: see `core.history.History`.

    Attributes:
        stored: pairs stored since the last reset.
        count: h, columns in use.
        last: 0 or 1: which buffer holds the last pair. Products of unaligned vectors differ.
        index: the columns that this shard holds, counted from the oldest in use.
        pair: the last (w, r), [2, rows]; None where nothing is stored.
        y: [held, rows], as stored.
        r: [held, rows], as stored.
        weights: c_j, [held] float64.
    """

    stored: Annotated[int, SHARED, integer()]
    count: Annotated[int, SHARED, integer()]
    last: Annotated[int, SHARED, integer(0, 1)]
    index: Annotated[tuple[int, ...], OWN, listed(integer())]
    pair: Annotated[Tensor | None, ROWS, anything]
    y: Annotated[Tensor, CELLS, anything]
    r: Annotated[Tensor, CELLS, anything]
    weights: Annotated[Tensor, COLUMNS, anything]

    def check(self, rows: int) -> None:
        """Raises a CheckpointError where no run could go on from this."""
        h, held, index = self.count, len(self.index), self.index
        agree("columns: stored, count", h < self.stored or h == self.stored == 0)
        agree("columns: index", [*index] == sorted({*index}) and all(i < h for i in index))
        check_optional(self.pair, "columns.pair", bool(self.stored), tensor(2, rows))
        tensor(held, rows)(self.y, "history['columns']['y']")
        tensor(held, rows)(self.r, "history['columns']['r']")
        check = tensor(held, dtypes=_DOUBLE, finite=True)
        check(self.weights, "history['columns']['weights']")
        agree("columns: y, r", self.y.dtype == self.r.dtype)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class GramState(State):
    """R^T R of the columns in use and what is missing in it: see `core.gram.Gram`.

    Attributes:
        matrix: R^T R [h, h] float64, from the oldest column.
        fresh: columns whose rows have yet to be computed, in the order in which they were stored.
        carried: R^T r [h] float64; None if it is not known.
        drift: what rounding has added to `carried`.
        products: [held, fresh] float64; None with the row layout.
    """

    matrix: Annotated[Tensor, SHARED, anything]
    fresh: Annotated[tuple[int, ...], SHARED, listed(integer())]
    carried: Annotated[Tensor | None, SHARED, anything]
    drift: Annotated[float, SHARED, number(0.0)]
    products: Annotated[Tensor | None, COLUMNS, anything]

    def check(self, columns: ColumnsState) -> None:
        """Raises a CheckpointError where no run could go on from this."""
        h, fresh, held = columns.count, self.fresh, len(columns.index)
        agree("gram: fresh", len({*fresh}) == len(fresh) and all(i < h for i in fresh))
        where = "history['gram']"
        tensor(h, h, dtypes=_DOUBLE, finite=True)(self.matrix, f"{where}['matrix']")
        check = optional(tensor(h, dtypes=_DOUBLE, finite=True))
        check(self.carried, f"{where}['carried']")
        check = optional(tensor(held, len(fresh), dtypes=_DOUBLE))
        check(self.products, f"{where}['products']")
        symmetric = torch.equal(self.matrix, self.matrix.T)
        agree("gram: matrix", symmetric and bool((self.matrix.diagonal() >= 0.0).all()))

    def fit(self, dropped: int, products: Tensor | None) -> GramState:
        """Without the oldest columns, and with the products of the columns that are held."""
        return GramState(
            matrix=self.matrix[dropped:, dropped:].clone(),
            fresh=tuple(i - dropped for i in self.fresh if i >= dropped),
            carried=None if self.carried is None else self.carried[dropped:].clone(),
            drift=self.drift,
            products=products,
        )

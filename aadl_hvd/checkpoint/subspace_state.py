"""The subspace method in a checkpoint: its blocks, its trust, and which method is at work."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from torch import Tensor

from aadl_hvd.checkpoint.state import OWN, ROWS, SHARED, Nested, State, agree, check_optional
from aadl_hvd.schema import anything, instance, integer, listed, number, optional, tensor


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BlocksState(State):
    """Block means and their differences: see `core.blocks.Blocks`.

    Attributes:
        stored: blocks stored since the last reset.
        steps: steps noted in the block that runs.
        gaps: of the last blocks: how many have gone by since the one before.
        columns: dW and dG, [2, columns in use, rows], as stored.
        vectors: start, sums, last means and noises, [vectors, rows]; None where nothing is stored.
    """

    stored: Annotated[int, SHARED, integer()]
    steps: Annotated[int, SHARED, integer()]
    gaps: Annotated[tuple[int, ...], SHARED, listed(integer(1))]
    columns: Annotated[Tensor | None, ROWS, anything]
    vectors: Annotated[Tensor | None, ROWS, anything]

    def check(self, rows: int) -> None:
        """Raises a CheckpointError where no run could go on from this."""
        used = bool(self.stored or self.steps)
        check_optional(self.columns, "blocks.columns", used, tensor(2, None, rows))
        check_optional(self.vectors, "blocks.vectors", used, tensor(9, rows))
        if self.columns is not None:
            agree("blocks: stored, columns", self.columns.shape[1] <= max(self.stored - 1, 0))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TrustState(State):
    """How far jumps may go: see `core.trust.Trust`."""

    scale: Annotated[float, SHARED, number(0.0, 1.0)]
    phi: Annotated[float | None, SHARED, optional(number(0.0))]
    psi: Annotated[float | None, SHARED, optional(number(0.0))]
    slope: Annotated[float | None, SHARED, optional(number())]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class InvarianceState(State):
    """Tensors whose scale does not matter: see `core.invariance.ScaleInvariance`.

    Attributes:
        looks: how many jumps were looked at, for each tensor.
        largest: cos(w, g)^2 over what is allowed, the largest of all looks, for each tensor.
    """

    looks: Annotated[tuple[int, ...], SHARED, listed(integer())]
    largest: Annotated[tuple[float, ...], SHARED, listed(number(0.0))]

    def check(self, rows: int) -> None:
        """Raises a CheckpointError where no run could go on from this."""
        agree("invariance: looks, largest", len(self.looks) == len(self.largest))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class HandoverState(State):
    """Which method is at work: see `core.handover.Handover`.

    Attributes:
        subspace: whether the subspace method is.
        refused: attempts of the residual-norm method in a row that its noise gate refused.
        wait: steps for which the residual-norm method is left alone after it was refused.
        left: steps of these that are left.
        since: steps since the residual-norm method began.
        into: steps since the block that runs began; below 0: before it begins.
        length: L of the block that runs.
        idle: blocks in a row without a jump.
        late: whether the next step adds the jump of the last one.
    """

    subspace: Annotated[bool, SHARED, instance(bool)]
    refused: Annotated[int, SHARED, integer()]
    wait: Annotated[int, SHARED, integer()]
    left: Annotated[int, SHARED, integer(-(2**62))]
    since: Annotated[int, SHARED, integer(-(2**62))]
    into: Annotated[int, SHARED, integer(-(2**62))]
    length: Annotated[int, SHARED, integer(2)]
    idle: Annotated[int, SHARED, integer()]
    late: Annotated[bool, SHARED, instance(bool)]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class OwnBlockState(State):
    """What one rank alone knows of the block that runs.

    Attributes:
        dot: its part of the sum of <w - start, g>, over its own rows.
        rows: half-open range of these rows.
        losses: its losses, one for each step.
    """

    dot: Annotated[float, OWN, number(finite=False)]
    rows: Annotated[tuple[int, int], OWN, listed(integer(), 2)]
    losses: Annotated[tuple[float, ...], OWN, listed(number(finite=False))]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SubspaceState(State):
    """The subspace method: see `core.methods.subspace.Subspace`.

    Attributes:
        blocks: block means and their differences.
        trust: how far jumps may go.
        invariance: the tensors whose scale does not matter.
        base: the base step before the last jump, [rows]; None where the next block judges none, or
            the jump has yet to be added.
        jump: the jump that the next step adds, [rows]; None where there is none to add.
    """

    blocks: Annotated[BlocksState, SHARED, Nested(BlocksState)]
    trust: Annotated[TrustState, SHARED, Nested(TrustState)]
    invariance: Annotated[InvarianceState, SHARED, Nested(InvarianceState)]
    base: Annotated[Tensor | None, ROWS, anything]
    jump: Annotated[Tensor | None, ROWS, anything]

    def check(self, rows: int, late: bool) -> None:
        """Raises a CheckpointError where no run could go on; late: see `HandoverState`."""
        self.blocks.check(rows)
        self.invariance.check(rows)
        judged = self.trust.slope is not None and not (late and self.base is None)
        check_optional(self.base, "subspace.base", judged, tensor(rows))
        added = late and self.jump is not None  # none is left where the parameters have changed
        check_optional(self.jump, "subspace.jump", added, tensor(rows))

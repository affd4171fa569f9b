"""The diagonals M and D over the flat vector: how rates and weight decays act on its rows.

M makes of a gradient the step that the optimizer makes of it in the long run, see `scaling`. D w is
what weight decay adds to a gradient.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from aadl_hvd.optim.flatten import FEW, FlatLayout
from aadl_hvd.optim.scaling import (
    Group,
    decay_of,
    learning_rate,
    long_run_rate,
    of_second_moment,
    preconditioned,
    preconditioner_of,
    second_moments,
)

# What `decay_of` returns: sign, weight decay, whether it is decoupled.
_Kind = tuple[float, float, bool]
# Rows, what they have in common, and the parameters that meet them: (index, first row, last row).
_Run = tuple[slice, _Kind, list[tuple[int, int, int]]]
_AT_REST = 0.0, 0.0, False  # parameters that do not move


class Diagonals:
    """Of one list of parameters. Rates and decays may change from step to step.

    Args:
        optimizer: its state is read.
        layout: of the parameters.
        parameters: those that are trained.
        group_of: the parameter group of each.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        layout: FlatLayout,
        parameters: list[Tensor],
        group_of: list[Group],
    ) -> None:
        self._optimizer, self._layout = optimizer, layout
        self._parameters, self._group_of = parameters, group_of
        self._groups = list({id(group): group for group in group_of}.values())
        double = any(p.dtype == torch.float64 for p in parameters)
        self._dtype = torch.float64 if double else torch.float32
        self._runs: tuple[Any, list[_Run]] | None = None
        self._absent: set[int] = set()  # in the last step
        self._moments: Tensor | None = None  # memory to read them into
        self._held: dict[tuple[int, int], Tensor] | None = None

    @property
    def uniform_scaling(self) -> float | None:
        """M where it is one number that costs nothing to know, else None."""
        rates = {long_run_rate(group) for group in self._optimizer.param_groups}
        if len(rates) == 1 and not preconditioned(self._optimizer):
            return rates.pop()
        return None

    def hold(self, held: bool) -> None:
        """Whether from now on nothing changes that M depends on. Then it is made once."""
        self._held = {} if held else None

    def forget_views(self) -> None:
        """Lets go of memory that is kept."""
        self._moments, self._held = None, None

    def scaling(self, lo: int, hi: int) -> Tensor:
        """Rows [lo, hi) of M, [hi - lo]; not to be changed."""
        if self._held is None or hi - lo > FEW:
            return self._scaling(lo, hi)
        found = self._held.get((lo, hi))
        if found is None:
            found = self._held[lo, hi] = self._scaling(lo, hi)
        return found

    def _scaling(self, lo: int, hi: int) -> Tensor:
        rates = {id(group): long_run_rate(group) for group in self._groups}
        diagonal, segments = self._empty(hi - lo), self._layout.segments(lo, hi)
        met = [index for index, _, _ in segments]
        moments = second_moments(
            self._optimizer, [self._parameters[index] for index in met], self._groups
        )
        if moments is None:
            for index, first, last in segments:
                rows = diagonal[first - lo : last - lo]
                rows.fill_(rates[id(self._group_of[index])])
                if (preconditioner := self._preconditioner(index, first, last)) is not None:
                    rows.mul_(preconditioner)
            return diagonal
        # All parameters at once: with many small ones calls are all there is.
        v, steps = moments
        into, few = diagonal, hi - lo <= FEW
        if few:
            if self._moments is None or len(self._moments) != hi - lo:
                self._moments = self._empty(hi - lo)
            into = self._moments
        if not (hi - lo == self._layout.n and self._layout.join(v, into)):
            all_v: list[Tensor | None] = [None] * len(self._parameters)
            for index, own in zip(met, v, strict=True):
                all_v[index] = own
            self._layout.read(all_v, lo, hi, into, again=few)
        step_of = dict(zip(met, steps, strict=True))

        def kind_of(segment: tuple[int, int, int]) -> tuple[int, float]:
            return id(self._group_of[segment[0]]), step_of[segment[0]]

        alike = len(self._groups) == 1 and len(set(steps)) == 1
        for _, run in [(None, segments)] if alike else itertools.groupby(segments, kind_of):
            (index, first, last), *others = run
            part = slice(first - lo, (others[-1][2] if others else last) - lo)
            group = self._group_of[index]
            t = torch.tensor(step_of[index], dtype=torch.float64, device="cpu")
            inverse = of_second_moment(group, t, into[part], out=into[part])
            torch.mul(inverse, rates[id(group)], out=diagonal[part])
        return diagonal

    def decay(self, lo: int, hi: int) -> float | Tensor:
        """D: one number, or rows [lo, hi) of it, [hi - lo].

        It is 0 on parameters that do not move: at rate 0, or without a gradient in the last step.
        """
        return self._decay(self._runs_of(self._absent, lo, hi), lo, hi)

    def _decay(self, runs: list[_Run], lo: int, hi: int) -> float | Tensor:
        if not any(weight_decay for _, (_, weight_decay, _), _ in runs):
            return 0.0
        if len(runs) == 1 and runs[0][0] == slice(0, hi - lo) and not runs[0][1][2]:
            return runs[0][1][1]
        diagonal = self._empty(hi - lo).zero_()
        scaling = None
        for rows, (_, weight_decay, decoupled), segments in runs:
            diagonal[rows] = weight_decay
            if not (weight_decay and decoupled):
                continue
            # 1 / preconditioner is the rate over M, which is made for all parameters at once.
            scaling = self.scaling(lo, hi) if scaling is None else scaling
            for _, run in itertools.groupby(
                segments, lambda segment: id(self._group_of[segment[0]])
            ):
                (index, first, last), *others = run
                part = slice(first - lo, (others[-1][2] if others else last) - lo)
                rate = long_run_rate(self._group_of[index])
                diagonal[part].div_(scaling[part]).mul_(rate)
        return diagonal

    def residual(
        self,
        gradient: Tensor,
        absent: set[int],
        lo: int,
        hi: int,
        w: Tensor,
        decays: tuple[float, ...] | None,
    ) -> Tensor:
        """Makes the residual -(g + D w) of rows [lo, hi) of a gradient, in place.

        Args:
            gradient: g, [hi - lo]; it is overwritten.
            absent: indices of the parameters that meet these rows and have no gradient.
            lo: first row.
            hi: row after the last.
            w: the iterate, [hi - lo].
            decays: the weight decay of each of the optimizer's groups in D; None for -g.
        """
        self._absent, decay = absent, None
        runs = self._runs_of(absent, lo, hi, decays)
        for rows, (sign, weight_decay, decoupled), _ in runs:
            # With few rows calls are all there is: no view of what is whole already.
            own = gradient if rows == slice(0, hi - lo) else gradient[rows]
            if not sign:
                own.zero_()
                continue
            own.mul_(-sign)
            if decays is None or not weight_decay:
                continue
            if not decoupled:
                own.sub_(w[rows], alpha=weight_decay)
                continue
            decay = self._decay(runs, lo, hi) if decay is None else decay
            assert isinstance(decay, Tensor)
            own.addcmul_(w[rows], decay[rows], value=-1.0)
        return gradient

    def _runs_of(
        self, absent: set[int], lo: int, hi: int, decays: tuple[float, ...] | None = None
    ) -> list[_Run]:
        """Runs of rows whose gradient and weight decay enter the residual alike.

        Decays are those given, by group, or else those of now.
        Parameters without a gradient are in none: optimizers leave them alone, and their weight
        decay too.
        """
        kinds = {
            id(group): decay_of(self._optimizer, group) if learning_rate(group) else _AT_REST
            for group in self._groups
        }
        if decays is not None:
            for group, weight_decay in zip(self._optimizer.param_groups, decays, strict=True):
                sign, _, decoupled = kinds.get(id(group), _AT_REST)
                if sign:
                    kinds[id(group)] = sign, weight_decay, decoupled
        now = lo, hi, absent, kinds
        if self._runs is None or self._runs[0] != now:

            def kind_of(segment: tuple[int, int, int]) -> _Kind | None:
                index = segment[0]
                return None if index in absent else kinds[id(self._group_of[index])]

            runs: list[_Run] = []
            for kind, run in itertools.groupby(self._layout.segments(lo, hi), kind_of):
                segments = list(run)
                if kind is not None:
                    runs.append((slice(segments[0][1] - lo, segments[-1][2] - lo), kind, segments))
            self._runs = now, runs
        return self._runs[1]

    def _preconditioner(self, index: int, first: int, last: int) -> Tensor | None:
        """`preconditioner_of` rows [first, last) of the flat vector, which lie in one parameter."""
        state = self._optimizer.state.get(self._parameters[index], {})
        start = self._layout.offsets[index]
        rows = slice(first - start, last - start)
        group = self._group_of[index]
        return preconditioner_of(self._optimizer, group, state, rows, self._dtype)

    def _empty(self, rows: int) -> Tensor:
        device = self._parameters[0].device if self._parameters else torch.device("cpu")
        return torch.empty(rows, dtype=self._dtype, device=device)

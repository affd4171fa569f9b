"""Samples of the gradient: what this rank contributes to the mean, on some coordinates.

`core.noise` makes the noise of the mean gradient of their deviations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from aadl_hvd.core.fixed_point import Deviations
from aadl_hvd.optim import coordinates


class GradientSamples:
    """Samples of the gradient of one step, and how they deviate from the mean.

    In each step: `take` for each parameter after each backward pass, or `take_all` after the only
    one; `take_mean` after the reduction over ranks; and `deviations` when the gradients are final.
    They are called under `torch.no_grad`.

    On a GPU that is one start for each parameter that is looked at and backward pass, and some
    eight more.

    Args:
        parameters: whose gradients are sampled, in the order of the flat vector.
        samples: number of gradients that this rank contributes to the mean: 1, or its number of
            micro-batches.
        factor: the mean of all samples times `factor` is the gradient that the optimizer gets.
        rank: which of the draws of coordinates this is, see `coordinates.draw`.
        ranks: how many draws there are.

    Attributes:
        samples, factor: see the arguments.
        parameters: those that are looked at.
        complete: whether all coordinates are looked at.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        samples: int = 1,
        factor: float = 1.0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.samples, self.factor = samples, factor
        sizes = [p.numel() for p in parameters]
        self._pieces = coordinates.draw(sizes, rank, ranks)
        self.parameters = [parameters[piece.index] for piece in self._pieces]
        self._ids = [*map(id, self.parameters)]
        self._index = {key: i for i, key in enumerate(self._ids)}
        counts = [piece.count for piece in self._pieces]
        self.complete = sum(counts) == sum(sizes)
        double = any(p.dtype == torch.float64 for p in parameters)
        device = parameters[0].device if parameters else torch.device("cpu")
        # This rank's own, the mean, and what the optimizer gets. Views are made once.
        self._rows = torch.zeros(
            (samples + 2, sum(counts)),
            dtype=torch.float64 if double else torch.float32,  # whatever torch's default is
            device=device,
        )
        self._first, self._mean, self._final = self._rows[0], self._rows[-2], self._rows[-1]
        self._all_own, self._both = self._rows[:samples], self._rows[samples:]
        self._own = [row.split_with_sizes(counts) for row in self._all_own]
        self._zero = torch.zeros(1, dtype=self._rows.dtype, device=device)
        # What is added to <mean, mean> and <final, mean>, so that they have a ratio.
        self._tiny = torch.zeros((2, 2), dtype=self._rows.dtype, device=device)
        self._tiny[0] += torch.finfo(self._rows.dtype).tiny
        # Square roots of how many coordinates each stands for; None: all are looked at.
        self._roots: Tensor | None = None
        if not self.complete:
            roots = np.repeat(np.sqrt([piece.weight for piece in self._pieces]), counts)
            self._roots = torch.from_numpy(roots).to(device, self._rows.dtype)
        self._taken: dict[int, int] = {}
        self._written: set[int] = set()  # parameters whose parts of `_own` are not zero
        self._reduced = False
        self._hooks: list[RemovableHandle] = []

    def take_by_hooks(self, wanted: Callable[[], bool]) -> None:
        """Makes hooks that call `take` after every backward pass, if `wanted()` is true then."""

        def take(p: Tensor) -> None:
            if wanted():
                self.take(p)

        for p in self.parameters:
            hook = p.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
            self._hooks.append(hook)

    def remove_hooks(self) -> None:
        """Ends `take_by_hooks`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def take(self, p: Tensor) -> None:
        """Reads this rank's gradient of a parameter, as accumulated so far, before the mean."""
        key = id(p)
        index = self._index.get(key)
        if index is None:
            return
        if self._reduced:  # the step before was left out, as GradScaler does
            self._taken, self._reduced = {}, False
        passes = self._taken.get(key, 0)
        if passes < self.samples:
            out = self._own[passes][index]
            if p.grad is None:
                out.zero_()
            else:
                out.copy_(self._pieces[index].of(p.grad))
                self._written.add(key)
        self._taken[key] = passes + 1

    def take_all(self) -> None:
        """As `take` for each parameter that has a gradient, by one call. For one sample."""
        if self._reduced:
            self._taken, self._reduced = {}, False
        taken = self._taken
        for key, gradient in zip(self._ids, self._read(self._first), strict=True):
            if gradient is not None:
                taken[key] = taken.get(key, 0) + 1
                self._written.add(key)

    def take_mean(self) -> None:
        """Reads the mean: the gradients after their reduction, before anything is done to them."""
        if self._taken:
            self._read(self._mean)
            self._reduced = True

    def deviations(self, rows: Tensor | None = None) -> Deviations | None:
        """How each sample deviates from the gradient that the optimizer gets. Ends the step.

        To be called when gradients are final. If they have been clipped or unscaled since the mean
        was read, the deviations are scaled in the same way.

        Args:
            rows: this rank's rows of that gradient, if it has read them.

        Returns:
            None if samples are missing.
        """
        taken, self._taken = self._taken, {}
        reduced, self._reduced = self._reduced, False
        if not taken:  # a step without samples
            return None
        if not reduced and self.samples == 1:
            return None
        own, mean, both = self._all_own, self._mean, self._both
        whole = {key for key, passes in taken.items() if passes == self.samples}
        if any(p.grad is not None and id(p) not in whole for p in self.parameters):
            return None
        for key in self._written - whole:  # from an earlier step
            for parts in self._own:
                parts[self._index[key]].zero_()
        self._written &= whole
        if self.samples > 1:  # micro-batches: their sum is the mean, no reduction is needed
            mean.copy_(own[-1])
        self._read(self._final)
        if self._roots is not None:
            self._rows.mul_(self._roots)
        products = torch.addmm(self._tiny, both, both.T)
        square, product, _, squared = products.view(-1).unbind()
        # The factor that gradients were multiplied by since the mean was read; 1 where all are 0.
        changed = product / square
        if self.samples > 1:  # differences of accumulated sums are the samples
            own = torch.diff(own, dim=0, prepend=torch.zeros_like(own[:1]))
        values = torch.sub(own if self.factor == 1.0 else own * self.factor, mean).mul_(changed)
        known = None if rows is None or self.complete else torch.dot(rows, rows)
        return Deviations(values, squared, known)

    def _read(self, out: Tensor) -> list[Tensor | None]:
        """Reads the coordinates of all gradients, zeros where there is none; returns these."""
        gradients = [p.grad for p in self.parameters]
        numbers = [
            self._zero.expand(piece.count) if gradient is None else piece.of(gradient)
            for piece, gradient in zip(self._pieces, gradients, strict=True)
        ]
        if any(part.dtype == out.dtype for part in numbers):
            torch.cat(numbers, out=out)
        elif numbers:  # with `out=` a GPU would convert one after the other
            out.copy_(torch.cat(numbers))
        return gradients

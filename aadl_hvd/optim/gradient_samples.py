"""Samples of the gradient: what this rank contributes to the mean, on a few pieces of it.

`core.noise` makes the noise of the mean gradient of their deviations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from aadl_hvd.core.fixed_point import Deviations

# The most coordinates and pieces that are looked at. Deviations of all coordinates would take n
# numbers, and every piece is read several times in a step, by an operation of its own.
COORDINATES = 2**16
PIECES = 8
LOOKED_AT = 4  # tensors that are looked at, where all have been multiplied alike
_SEED = 20211014  # any number that is the same on every rank


class GradientSamples:
    """Samples of the gradient of one step, and how they deviate from the mean.

    In each step: `take` for each parameter after each backward pass, `take_mean` after the
    reduction over ranks, and `deviations` when the gradients are final.

    With many parameters a few are looked at, drawn with a probability in proportion to their size,
    and of a large one a piece. Each coordinate counts for as many as it stands for, so that sums of
    squares are unbiased over draws.

    Args:
        parameters: whose gradients are sampled, in the order of the flat vector.
        samples: number of gradients that this rank contributes to the mean: 1, or its number of
            micro-batches.
        factor: the mean of all samples times `factor` is the gradient that the optimizer gets.

    Attributes:
        samples, factor: see the arguments.
        parameters: those that are looked at.
    """

    def __init__(self, parameters: Sequence[Tensor], samples: int = 1, factor: float = 1.0) -> None:
        self.samples, self.factor = samples, factor
        self._chosen: dict[int, tuple[slice, slice]] = {}
        weights, end = [], 0
        for index, piece, weight in _pieces([p.numel() for p in parameters]):
            start, end = end, end + piece.stop - piece.start
            self._chosen[id(parameters[index])] = slice(start, end), piece
            weights.append(torch.full((end - start,), weight**0.5, device="cpu"))
        self.parameters = [p for p in parameters if id(p) in self._chosen]
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else None
        device = parameters[0].device if parameters else torch.device("cpu")
        # Square roots of how many coordinates each stands for; None: all are looked at.
        self._root: Tensor | None = None
        if any(bool((weight != 1.0).any()) for weight in weights):
            self._root = torch.cat(weights).to(device, dtype or torch.float32)
        self._own = torch.zeros((samples, end), dtype=dtype, device=device)
        self._mean = torch.zeros_like(self._own[0])
        # Made once, because `take` runs for every parameter.
        self._to = {
            key: [row[where] for row in self._own] for key, (where, _) in self._chosen.items()
        }
        self._taken: dict[int, int] = {}
        self._reduced = False
        self._at_mean: list[_Mark] = []
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
        if id(p) not in self._chosen:
            return
        if self._reduced:  # the step before was left out, as GradScaler does
            self._taken, self._reduced = {}, False
        passes = self._taken.get(id(p), 0)
        if passes < self.samples:
            self._read(p, self._to[id(p)][passes])
        self._taken[id(p)] = passes + 1

    def take_mean(self) -> None:
        """Reads the mean: the gradients after their reduction, before anything is done to them."""
        if self._taken:
            self._read_all(self._mean)
            self._at_mean = [_mark(p.grad) for p in self.parameters]
            self._reduced = True

    def deviations(self) -> Deviations | None:
        """How each sample deviates from the gradient that the optimizer gets. Ends the step.

        To be called when gradients are final. If they have been clipped or unscaled since the mean
        was read, the deviations are scaled in the same way.

        Returns:
            None if samples are missing.
        """
        taken, self._taken = self._taken, {}
        reduced, self._reduced = self._reduced, False
        if not taken:  # a step without samples
            return None
        if self.samples > 1:  # micro-batches: their sum is the mean, no reduction is needed
            self._mean.copy_(self._own[-1])
            reduced = True
        complete = all(
            taken.get(id(p), 0) == self.samples for p in self.parameters if p.grad is not None
        )
        if not reduced or not complete:
            return None
        changed, squared = self._final()
        own = self._own
        if self.samples > 1:  # differences of accumulated sums are the samples
            own = torch.diff(own, dim=0, prepend=torch.zeros_like(own[:1]))
        values = torch.sub(own * self.factor, self._mean).mul_(changed)
        if self._root is not None:
            values.mul_(self._root)
        self._own.zero_()  # a parameter may get no gradient in the next step
        return Deviations(values, squared)

    def _final(self) -> tuple[Tensor, Tensor]:
        """The factor that gradients were multiplied by since the mean was read; their f . f now."""
        mean = self._mean
        present = [p for p in self.parameters if p.grad is not None]
        if not self._untouched() or not present:  # each may have got a factor of its own
            final = self._read_all(torch.empty_like(mean))
            return (final @ mean) / (mean @ mean), self._squared(final)
        # Either nothing has changed, or something that torch does not count has changed all of them
        # alike: GradScaler, or an access through .data. So it is enough to look at some of them,
        # which saves a kernel for each of the others.
        largest = sorted(present, key=self._samples_of)[-LOOKED_AT:]
        before = torch.cat([mean[self._chosen[id(p)][0]] for p in largest])
        now = torch.cat([self._read(p, mean.new_empty(self._samples_of(p))) for p in largest])
        norm = before @ before
        changed = torch.where(norm > 0.0, (now @ before) / norm, 1.0)
        return changed, changed**2 * self._squared(mean)

    def _squared(self, gradient: Tensor) -> Tensor:
        """The square of the norm of a whole gradient, from what was read of it; []."""
        if self._root is not None:
            gradient = gradient * self._root
        return gradient @ gradient

    def _untouched(self) -> bool:
        """Whether no gradient was replaced or changed in place, as far as torch counts changes."""
        known, self._at_mean = self._at_mean, []
        return len(known) == len(self.parameters) and all(
            _is_marked(p.grad, mark) for p, mark in zip(self.parameters, known, strict=True)
        )

    def _samples_of(self, p: Tensor) -> int:
        where: slice = self._chosen[id(p)][0]
        return int(where.stop - where.start)

    def _read_all(self, out: Tensor) -> Tensor:
        for p in self.parameters:
            self._read(p, out[self._chosen[id(p)][0]])
        return out

    def _read(self, p: Tensor, out: Tensor) -> Tensor:
        gradient = p.grad
        if gradient is None:
            return out.zero_()
        return out.copy_(_in_memory(gradient.detach()).reshape(-1)[self._chosen[id(p)][1]])


def _pieces(sizes: Sequence[int]) -> list[tuple[int, slice, float]]:
    """What is looked at: (parameter, its coordinates, how many of all each of them stands for).

    The same on every rank.
    """
    n = sum(sizes)
    if n <= COORDINATES and sum(size > 0 for size in sizes) <= PIECES:
        return [(i, slice(0, size), 1.0) for i, size in enumerate(sizes) if size]
    random = np.random.default_rng(_SEED)
    # At equal distances from a random start: sizes are hit in proportion, and all parts of the net.
    points = (random.random() + np.arange(PIECES)) * (n / PIECES)
    hit = np.searchsorted(np.cumsum(sizes), points, side="right")
    found = []
    for index, times in zip(*np.unique(hit, return_counts=True), strict=True):
        size = sizes[int(index)]
        length = min(size, int(times) * COORDINATES // PIECES)
        start = int(random.integers(size - length + 1))
        weight = int(times) * n / PIECES / length
        found.append((int(index), slice(start, start + length), weight))
    return found


def _in_memory(gradient: Tensor) -> Tensor:
    """A view in the order of the memory, so that nothing has to be copied."""
    if gradient.layout is not torch.strided:
        return gradient.to_dense()
    if gradient.dim() == 4 and gradient.is_contiguous(memory_format=torch.channels_last):
        return gradient.permute(0, 2, 3, 1)
    return gradient


# A gradient, and how often it has been changed in place; None: there is no gradient.
_Mark = tuple["weakref.ref[Tensor]", int] | None


def _mark(gradient: Tensor | None) -> _Mark:
    return None if gradient is None else (weakref.ref(gradient), gradient._version)


def _is_marked(gradient: Tensor | None, mark: _Mark) -> bool:
    if gradient is None or mark is None:
        return gradient is None and mark is None
    return mark[0]() is gradient and mark[1] == gradient._version

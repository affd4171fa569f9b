"""Samples of the gradient: what this rank contributes to the mean, on random coordinates.

`core.noise` makes the noise of the mean gradient of their deviations.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from aadl_hvd.core.fixed_point import Deviations
from aadl_hvd.optim.coordinates import Coordinates

# The most coordinates that are looked at. Deviations of all of them from step to step would take n
# numbers. They are drawn at random: a regular stride can match the widths of layers, and misjudges.
COORDINATES = 2**16
LOOKED_AT = 4  # tensors that are looked at, where all have been multiplied alike
_SEED = 20211014  # any number that is the same on every rank


class GradientSamples:
    """Samples of the gradient of one step, and how they deviate from the mean.

    In each step: `take` for each parameter after each backward pass, or `take_all` after the only
    one; `take_mean` after the reduction over ranks; and `deviations` when the gradients are final.
    They are called under `torch.no_grad`.

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
        n = sum(p.numel() for p in parameters)
        generator = torch.Generator("cpu").manual_seed(_SEED)
        if n <= COORDINATES:
            chosen = torch.arange(n, device="cpu")
        else:
            # With replacement, since a permutation of n would cost n. Duplicates are dropped.
            drawn = torch.randint(n, (COORDINATES,), generator=generator, device="cpu")
            chosen = torch.unique(drawn)
        self._scale = n / max(len(chosen), 1)
        device = parameters[0].device if parameters else torch.device("cpu")
        self._coordinates = Coordinates([p.numel() for p in parameters], chosen, device)
        self.parameters = [parameters[i] for i in self._coordinates.met]
        self._ids = [*map(id, self.parameters)]
        self._index = {key: i for i, key in enumerate(self._ids)}
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else None
        self._own = torch.zeros((samples, len(chosen)), dtype=dtype, device=device)
        self._mean = torch.zeros_like(self._own[0])
        # Made once, because `take` runs for every parameter.
        parts = self._coordinates.parts
        self._to = [[row[part] for row in self._own] for part in parts]
        self._of_mean = [self._mean[part] for part in parts]
        self._by_samples = sorted(range(len(parts)), key=lambda i: parts[i].stop - parts[i].start)
        self._taken: dict[int, int] = {}
        self._reduced = False
        self._at_mean: _Marks | None = None
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
        if self._reduced:
            self._forget_left_out()
        passes = self._taken.get(key, 0)
        if passes < self.samples:
            self._coordinates.read_one(index, p.grad, self._to[index][passes])
        self._taken[key] = passes + 1

    def take_all(self) -> None:
        """As `take` for each parameter that has a gradient, with few calls. For one sample."""
        if self._reduced:
            self._forget_left_out()
        gradients, taken = self._gradients(), self._taken
        self._coordinates.read(gradients, self._own[0])
        for key, gradient in zip(self._ids, gradients, strict=True):
            if gradient is not None:
                taken[key] = taken.get(key, 0) + 1

    def take_mean(self) -> None:
        """Reads the mean: the gradients after their reduction, before anything is done to them."""
        if self._taken:
            gradients = self._gradients()
            self._coordinates.read(gradients, self._mean)
            self._at_mean = _marks(gradients)
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
        gradients = self._gradients()
        complete = all(
            gradient is None or taken.get(key) == self.samples
            for key, gradient in zip(self._ids, gradients, strict=True)
        )
        if not reduced or not complete:
            self._own.zero_()
            return None
        changed, squared = self._final(gradients)
        own = self._own
        if self.samples > 1:  # differences of accumulated sums are the samples
            own = torch.diff(own, dim=0, prepend=torch.zeros_like(own[:1]))
        values = torch.sub(own * self.factor, self._mean).mul_(changed * self._scale**0.5)
        self._own.zero_()  # a parameter may get no gradient in the next step
        return Deviations(values, squared * self._scale)

    def _final(self, gradients: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        """The factor that gradients were multiplied by since the mean was read; their f . f now."""
        mean, at_mean = self._mean, self._at_mean
        self._at_mean = None
        by_samples = (i for i in reversed(self._by_samples) if gradients[i] is not None)
        largest = [*itertools.islice(by_samples, LOOKED_AT)]
        if at_mean is None or not largest or not _are_marked(gradients, at_mean):
            # Each may have got a factor of its own.
            final = self._coordinates.read(gradients, torch.empty_like(mean))
            return (final @ mean) / (mean @ mean), final @ final
        # Either nothing has changed, or something that torch does not count has changed all of them
        # alike: GradScaler, or an access through .data. So it is enough to look at some of them,
        # which saves a kernel for each of the others.
        before = [self._of_mean[i] for i in largest]
        now = mean.new_empty(sum(map(len, before)))
        for i, part in zip(largest, now.split_with_sizes([*map(len, before)]), strict=True):
            self._coordinates.read_one(i, gradients[i], part)
        then = torch.cat(before)
        norm = then @ then
        changed = torch.where(norm > 0.0, (now @ then) / norm, 1.0)
        return changed, changed**2 * (mean @ mean)

    def _forget_left_out(self) -> None:
        """Forgets a step that was left out after its reduction, as GradScaler does."""
        self._taken, self._reduced = {}, False
        self._own.zero_()

    def _gradients(self) -> list[Tensor | None]:
        return [p.grad for p in self.parameters]


# Gradients, and how often each has been changed in place. torch gives a tensor one weak reference,
# so that the same one stands for the same tensor. A gradient that is None has neither.
_Marks = tuple[list["weakref.ref[Tensor] | None"], list[int]]


def _marks(gradients: list[Tensor | None]) -> _Marks:
    references = [None if gradient is None else weakref.ref(gradient) for gradient in gradients]
    return references, [0 if gradient is None else gradient._version for gradient in gradients]


def _are_marked(gradients: list[Tensor | None], marks: _Marks) -> bool:
    """Whether no gradient was replaced or changed in place, as far as torch counts changes."""
    (references, versions), (now, versions_now) = marks, _marks(gradients)
    return versions == versions_now and all(map(operator.is_, references, now))

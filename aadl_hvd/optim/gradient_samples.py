"""Samples of the gradient: what this rank contributes to the mean, on random coordinates.

`core.noise` makes the noise of the mean gradient of their deviations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from aadl_hvd import kernels
from aadl_hvd.core.fixed_point import Deviations

# The most coordinates that are looked at. Deviations of all of them from step to step would take n
# numbers. They are drawn at random: a regular stride can match the widths of layers, and misjudges.
COORDINATES = 2**16
LOOKED_AT = 4  # tensors that are looked at, where all have been multiplied alike
_SEED = 20211014  # any number that is the same on every rank


class GradientSamples:
    """Samples of the gradient of one step, and how they deviate from the mean.

    In each step: `take` for each parameter after each backward pass, `take_mean` after the
    reduction over ranks, and `deviations` when the gradients are final.

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
        self._chosen: dict[int, tuple[slice, Tensor | None]] = {}
        ends = np.cumsum([p.numel() for p in parameters])
        bounds = np.searchsorted(chosen.numpy(), [0, *ends])
        for i, p in enumerate(parameters):
            lo, hi = int(bounds[i]), int(bounds[i + 1])
            if lo < hi:
                own = chosen[lo:hi] - (int(ends[i]) - p.numel())
                everything = hi - lo == p.numel()
                self._chosen[id(p)] = slice(lo, hi), None if everything else own.to(p.device)
        self.parameters = [p for p in parameters if id(p) in self._chosen]
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else None
        device = parameters[0].device if parameters else torch.device("cpu")
        self._gather: kernels.Gather | None = None
        if kernels.usable(device) and self.parameters:
            counts, firsts = np.diff(bounds), ends - [p.numel() for p in parameters]
            offsets = chosen - torch.from_numpy(np.repeat(firsts, counts))
            counts = counts[counts > 0]
            tensors = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
            self._gather = kernels.Gather(tensors, offsets, device)
        self._own = torch.zeros((samples, len(chosen)), dtype=dtype, device=device)
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
        values = torch.sub(own * self.factor, self._mean).mul_(changed * self._scale**0.5)
        self._own.zero_()  # a parameter may get no gradient in the next step
        return Deviations(values, squared * self._scale)

    def _final(self) -> tuple[Tensor, Tensor]:
        """The factor that gradients were multiplied by since the mean was read; their f . f now."""
        mean = self._mean
        present = [p for p in self.parameters if p.grad is not None]
        if not self._untouched() or not present:  # each may have got a factor of its own
            final = self._read_all(torch.empty_like(mean))
            return (final @ mean) / (mean @ mean), final @ final
        # Either nothing has changed, or something that torch does not count has changed all of them
        # alike: GradScaler, or an access through .data. So it is enough to look at some of them,
        # which saves a kernel for each of the others.
        largest = sorted(present, key=self._samples_of)[-LOOKED_AT:]
        before = torch.cat([mean[self._chosen[id(p)][0]] for p in largest])
        now = torch.cat([self._read(p, mean.new_empty(self._samples_of(p))) for p in largest])
        norm = before @ before
        changed = torch.where(norm > 0.0, (now @ before) / norm, 1.0)
        return changed, changed**2 * (mean @ mean)

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
        gradients = [p.grad for p in self.parameters]
        if self._gather is not None and self._gather.read(gradients, out):
            return out
        for p in self.parameters:
            self._read(p, out[self._chosen[id(p)][0]])
        return out

    def _read(self, p: Tensor, out: Tensor) -> Tensor:
        gradient = p.grad
        if gradient is None:
            return out.zero_()
        values, chosen = _in_memory(gradient.detach()), self._chosen[id(p)][1]
        if chosen is None:
            return out.copy_(values.reshape(-1))
        if values.dtype != out.dtype:
            return out.copy_(values.reshape(-1)[chosen])
        # One kernel instead of two or more. Each function is the faster one on its device.
        if values.device.type == "cpu":
            return torch.index_select(values.reshape(-1), 0, chosen, out=out)
        return torch.take(values, chosen, out=out)


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

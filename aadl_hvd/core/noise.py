"""How noisy the mean gradient is, and whether a residual stands out of it.

Of S samples of one gradient (ranks, or micro-batches of one rank), d_i = g_i - mean(g) is what each
deviates by. The variance of their mean is measured from how the deviations change between two
successive steps:

    sigma^2 = (1/S) mean_i ||d_i(k) - d_i(k-1)||^2 / (2 (1 - 1/S))

On a fixed partition of a full batch d_i is large but stays, and is no noise. It does not stay
exactly: samples differ in their Hessians, too, and d_i changes by (H_i - H) dw. Noise is new at
every attempt; that change is much the same as at the one before. What repeats is taken off.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadl_hvd import kernels
from aadl_hvd.core.solve import Matrix, Vector
from aadl_hvd.schema import entries, integer, listed, number, optional, sequence, tensor

# Coordinates looked at: holding deviations of all of them from step to step would cost n numbers.
# Drawn at random: a regular stride falls in step with the layers' widths and misjudges.
COORDINATES = 2**16
LOOKED_AT = 4  # tensors
_SEED = 20211014  # any; the same on every rank


@dataclasses.dataclass
class Deviations:
    """What the samples of one step deviate by from their mean.

    Attributes:
        values: [samples, coordinates], scaled so that a squared norm estimates that of all n.
        squared: square of the mean's norm, estimated likewise; [].
    """

    values: Tensor
    squared: Tensor


class GradientSamples:
    """Samples of the gradient of one step, on random coordinates, and what they deviate by.

    Args:
        parameters: of which the gradients are, in the order of the flat vector.
        samples: gradients that this rank contributes to the mean: 1, or its micro-batches.
        factor: what a sample is multiplied by to be an estimate of the whole: the mean of all
            samples times `factor` is the gradient that the optimizer gets.
    """

    def __init__(self, parameters: Sequence[Tensor], samples: int = 1, factor: float = 1.0) -> None:
        self.samples, self.factor = samples, factor
        n = sum(p.numel() for p in parameters)
        generator = torch.Generator("cpu").manual_seed(_SEED)
        if n <= COORDINATES:
            chosen = torch.arange(n, device="cpu")
        else:
            # With replacement, for a permutation of n would cost n; what is drawn twice goes.
            drawn = torch.randint(n, (COORDINATES,), generator=generator, device="cpu")
            chosen = torch.unique(drawn)
        self._scale = n / max(len(chosen), 1)
        self._places: dict[int, tuple[slice, Tensor | None]] = {}
        ends = np.cumsum([p.numel() for p in parameters])
        bounds = np.searchsorted(chosen.numpy(), [0, *ends])
        for i, p in enumerate(parameters):
            lo, hi = int(bounds[i]), int(bounds[i + 1])
            if lo < hi:
                own = chosen[lo:hi] - (int(ends[i]) - p.numel())
                everything = hi - lo == p.numel()
                self._places[id(p)] = slice(lo, hi), None if everything else own.to(p.device)
        self._parameters = [p for p in parameters if id(p) in self._places]
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else None
        device = parameters[0].device if parameters else torch.device("cpu")
        self._at_once: kernels.Places | None = None
        if kernels.usable(device) and self._parameters:
            counts, firsts = np.diff(bounds), ends - [p.numel() for p in parameters]
            offsets = chosen - torch.from_numpy(np.repeat(firsts, counts))
            counts = counts[counts > 0]
            tensors = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
            self._at_once = kernels.Places(tensors, offsets, device)
        self._own = torch.zeros((samples, len(chosen)), dtype=dtype, device=device)
        self._mean = torch.zeros_like(self._own[0])
        # Made once: a hook runs for every parameter.
        self._to = {
            key: [row[where] for row in self._own] for key, (where, _) in self._places.items()
        }
        self._taken: dict[int, int] = {}
        self._reduced = False
        self._at_mean: list[_Mark] = []

    def take(self, p: Tensor) -> None:
        """Notes this rank's gradient of a parameter, as accumulated so far, before the mean."""
        if id(p) not in self._places:
            return
        if self._reduced:  # that step was never made: GradScaler leaves out some
            self._taken, self._reduced = {}, False
        passes = self._taken.get(id(p), 0)
        if passes < self.samples:
            self._read(p, self._to[id(p)][passes])
        self._taken[id(p)] = passes + 1

    def take_mean(self) -> None:
        """Notes the mean, once gradients are reduced and before anything is done to them."""
        if self._taken:
            self._read_all(self._mean)
            self._at_mean = [_mark(p.grad) for p in self._parameters]
            self._reduced = True

    def deviations(self) -> Deviations | None:
        """What each sample deviates by from the gradient the optimizer gets. Ends the step.

        To be called when gradients are final; they may have been clipped or unscaled since the
        mean was taken, and deviations then are as well.

        Returns:
            None if samples are missing.
        """
        taken, self._taken = self._taken, {}
        reduced, self._reduced = self._reduced, False
        if not taken:  # an ordinary step: nothing is to be done
            return None
        if self.samples > 1:  # micro-batches: what they have added up to needs no reduction
            self._mean.copy_(self._own[-1])
            reduced = True
        complete = all(
            taken.get(id(p), 0) == self.samples for p in self._parameters if p.grad is not None
        )
        if not reduced or not complete:
            return None
        changed, squared = self._final()
        own = self._own
        if self.samples > 1:  # accumulated sums become samples by differences
            own = torch.diff(own, dim=0, prepend=torch.zeros_like(own[:1]))
        values = torch.sub(own * self.factor, self._mean).mul_(changed * self._scale**0.5)
        self._own.zero_()  # a parameter may get no gradient next time
        return Deviations(values, squared * self._scale)

    def _final(self) -> tuple[Tensor, Tensor]:
        """What gradients have been multiplied by since the mean was taken; f . f of them, now."""
        mean = self._mean
        present = [p for p in self._parameters if p.grad is not None]
        if not self._untouched() or not present:  # each by itself, perhaps
            final = self._read_all(torch.empty_like(mean))
            return (final @ mean) / (mean @ mean), final @ final
        # They are what they were, or changed where torch does not count, by GradScaler or through
        # .data: then all alike, and a look at some does in place of a kernel for each.
        largest = sorted(present, key=self._samples_of)[-LOOKED_AT:]
        before = torch.cat([mean[self._places[id(p)][0]] for p in largest])
        now = torch.cat([self._read(p, mean.new_empty(self._samples_of(p))) for p in largest])
        norm = before @ before
        changed = torch.where(norm > 0.0, (now @ before) / norm, 1.0)
        return changed, changed**2 * (mean @ mean)

    def _untouched(self) -> bool:
        """Whether no gradient was replaced or changed in place, as far as torch keeps count."""
        known, self._at_mean = self._at_mean, []
        return len(known) == len(self._parameters) and all(
            _is_marked(p.grad, mark) for p, mark in zip(self._parameters, known, strict=True)
        )

    def _samples_of(self, p: Tensor) -> int:
        where: slice = self._places[id(p)][0]
        return int(where.stop - where.start)

    def _read_all(self, out: Tensor) -> Tensor:
        gradients = [p.grad for p in self._parameters]
        if self._at_once is not None and self._at_once.read(gradients, out):
            return out
        for p in self._parameters:
            self._read(p, out[self._places[id(p)][0]])
        return out

    def _read(self, p: Tensor, out: Tensor) -> Tensor:
        gradient = p.grad
        if gradient is None:
            return out.zero_()
        values, chosen = _in_memory(gradient.detach()), self._places[id(p)][1]
        if chosen is None:
            return out.copy_(values.reshape(-1))
        if values.dtype != out.dtype:
            return out.copy_(values.reshape(-1)[chosen])
        # One kernel, where an index and a copy are two and more; each is the faster one there.
        if values.device.type == "cpu":
            return torch.index_select(values.reshape(-1), 0, chosen, out=out)
        return torch.take(values, chosen, out=out)


def _in_memory(gradient: Tensor) -> Tensor:
    """A view of which the order is that of the memory, so that nothing has to be copied."""
    if gradient.layout is not torch.strided:
        return gradient.to_dense()
    if gradient.dim() == 4 and gradient.is_contiguous(memory_format=torch.channels_last):
        return gradient.permute(0, 2, 3, 1)
    return gradient


# A gradient and how often it has been changed in place; None: there is none.
_Mark = tuple["weakref.ref[Tensor]", int] | None


def _mark(gradient: Tensor | None) -> _Mark:
    return None if gradient is None else (weakref.ref(gradient), gradient._version)


def _is_marked(gradient: Tensor | None, mark: _Mark) -> bool:
    if gradient is None or mark is None:
        return gradient is None and mark is None
    return mark[0]() is gradient and mark[1] == gradient._version


class NoiseMeter:
    """Turns deviations of successive steps into numbers to be summed, and these into sigma^2."""

    PAYLOAD = 4
    # Squared cosine from which two changes are taken to be alike. Independent noise has 1 over its
    # effective dimension on average, measured 0.05 to 0.1; full batches have 0.4 to 0.8.
    ALIKE = 0.6
    MEMORY = 0.9  # of the share of noise, per attempt
    # What `share` and `part` return; a share may be below 0 by rounding.
    SHARE = number(-1.0, 1.0)
    PART = entries(
        {
            "call": integer(-1),
            "now": optional(sequence(tensor(None, None), tensor())),
            "changes": listed(sequence(integer(), tensor(None, None)), most=2),
        }
    )

    def __init__(self) -> None:
        self._share: float | None = None
        self._now: Deviations | None = None
        self._last: Deviations | None = None
        self._changes: deque[tuple[int, Tensor]] = deque(maxlen=2)
        self._call = -1

    def note(self, deviations: Deviations | None, call: int) -> None:
        """Takes in the deviations of a step; `call` is its number."""
        successive = self._call == call - 1
        self._last = self._now if successive else None
        self._now, self._call = deviations, call

    def measured(self) -> Tensor:
        """What `payload` is to be given, on the device: [2] float64, [0] if this rank cannot say."""
        deviations, last = self._now, self._last
        if deviations is None or last is None or last.values.shape != deviations.values.shape:
            return torch.empty(0, device="cpu")
        change = deviations.values - last.values
        # Steps that two changes have in common would make their noise alike, too.
        apart = [earlier for call, earlier in self._changes if call <= self._call - 2]
        before = apart[-1] if apart else None
        self._changes.append((self._call, change))
        squares = change.square().sum(dim=1, dtype=torch.float64)
        if before is not None and before.shape == change.shape:
            alike = (change * before).sum(dim=1, dtype=torch.float64).square()
            alike /= squares * before.square().sum(dim=1, dtype=torch.float64)
            squares = torch.where(alike > self.ALIKE, squares * (1.0 - alike), squares)
        return torch.stack([squares.sum(), deviations.squared.double()])

    def payload(self, measured: Vector) -> Vector:
        """[4] numbers on the last step to be summed over ranks; zeros if this rank cannot say."""
        if self._now is None or not len(measured):
            return np.zeros(self.PAYLOAD)
        changed, squared = measured
        samples = len(self._now.values)
        return np.array([changed, samples, samples**2, squared], dtype=np.float64)

    @staticmethod
    def variance(sums: Vector, size: int) -> tuple[float, float] | None:
        """sigma^2 of the mean gradient, and the square of the gradient's norm.

        Args:
            sums: of `payload` over ranks, [4].
            size: number of ranks.

        Returns:
            None where a rank could not say or there is one sample only.
        """
        changed, samples, squares, squared = (float(x) for x in sums)
        if samples < 2 or squares * size != samples**2:
            return None
        return changed / samples**2 / (2.0 * (1.0 - 1.0 / samples)), squared / size

    def steadied(self, variance: float, squared: float) -> float:
        """sigma^2, at least what its share of ||r||^2 has been of late.

        One measurement of few samples can miss by a factor, and in thousands of attempts some do.
        The share is the same on every rank, and no reset on one of them touches it.
        """
        if math.isfinite(variance) and 0.0 < squared < math.inf:
            share = min(variance / squared, 1.0)
            last = share if self._share is None else self._share
            self._share = self.MEMORY * last + (1.0 - self.MEMORY) * share
        return max(variance, (self._share or 0.0) * squared)

    @property
    def share(self) -> float | None:
        """Share of noise in ||r||^2 of late, the same on every rank; None: not known."""
        return self._share

    def part(self) -> dict[str, Any]:
        """What this rank's own gradients deviated by, copied to the host."""
        now = None if self._now is None else (self._now.values.cpu(), self._now.squared.cpu())
        changes = [(call, change.cpu()) for call, change in self._changes]
        return {"call": self._call, "now": now, "changes": changes}

    def take(self, share: float | None, part: dict[str, Any] | None, device: torch.device) -> None:
        """Takes in `share`, and what `part` returned on this rank where that is known."""
        self.clear()
        self._share = share
        if part is None:
            return
        self._call = part["call"]
        if part["now"] is not None:
            self._now = Deviations(*(tensor.to(device) for tensor in part["now"]))
        self._changes.extend((call, change.to(device)) for call, change in part["changes"])

    def clear(self) -> None:
        """Forgets all steps."""
        self._now = self._last = None
        self._changes = deque(maxlen=2)


def variance_from_history(gram: Matrix) -> float | None:
    """sigma^2 where there is one sample: from the residuals alone, roughly.

    Noise that is new in every residual makes successive differences dr_j = r_j - r_(j-1)
    anticorrelated: E <dr_j, dr_(j+1)> = -sigma^2, and E <dr_j, dr_(j+2)> = 0. An iteration that
    swings does the former, too, but then the latter is positive; their sum does not see it.
    Medians, because accelerated steps are outliers.

    Args:
        gram: R^T R [h, h], columns from the oldest to the newest, of residuals stored in every
            step.

    Returns:
        None with fewer than 3 columns.
    """
    if len(gram) < 3:
        return None
    next_one, one_after = np.diag(gram, 1), np.diag(gram, 2)
    return max(0.0, -float(np.median(next_one)) - float(np.median(one_after)))


def stands_out(squared: float, variance: float, gate: float) -> bool:
    """Whether a squared norm is that of more than noise; NaN is not."""
    return squared - variance > gate * variance

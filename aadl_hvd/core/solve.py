"""The small least-squares problem, a pure function of the Gram matrix.

    gamma = argmin || r - R gamma ||,  given  G = R^T R  [h, h],  b = R^T r  [h],  rr = r^T r

Solved through the eigen-decomposition of G scaled to unit diagonal, with small eigenvalues
dropped, so that nearly dependent columns neither fail nor blow up.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
# R^T R [h, h], R^T r [h] and r^T r, for the h columns in use from the oldest to the newest.
System = tuple[Matrix, Vector, float]

MAX_CONDITION = 1e12


@dataclasses.dataclass(frozen=True)
class Solution:
    """Coefficients and what is known of their quality.

    Attributes:
        gamma: [h] float64.
        rank: number of eigen-directions kept, 0 <= rank <= h.
        condition: ratio of the largest to the smallest eigenvalue kept (of the scaled Gram
            matrix, ridge included; the square of R's condition); 1.0 where rank is 0.
        reduction: ||r - R gamma|| / ||r||, what AA promises; in [0, 1].
    """

    gamma: Vector
    rank: int
    condition: float
    reduction: float


class Factorization:
    """Truncated eigen-decomposition of a Gram matrix, for one or several right-hand sides.

    Args:
        gram: [h, h] symmetric positive semi-definite, float64, finite.
        regularization: ridge relative to the diagonal of `gram`: that number is added to the
            diagonal after the scaling to unit diagonal.
        precision: relative accuracy of the entries of `gram`; eigenvalues below it are noise.
    """

    def __init__(self, gram: Matrix, regularization: float = 0.0, precision: float = 0.0) -> None:
        diagonal = np.diag(gram)
        # A zero column adds nothing: scale 0 takes it out.
        self._scale = np.divide(
            1.0, np.sqrt(diagonal), out=np.zeros_like(diagonal), where=diagonal > 0.0
        )
        scaled = self._scale[:, None] * gram * self._scale  # their product could overflow
        values, vectors = np.linalg.eigh((scaled + scaled.T) / 2)
        values = values + regularization
        largest = float(values[-1]) if values.size else 0.0
        kept = values > max(1.0 / MAX_CONDITION, precision) * largest
        if largest <= 0.0:
            kept[:] = False
        self._values, self._vectors = values[kept], vectors[:, kept]
        self.rank = int(kept.sum())
        self.condition = largest / float(self._values[0]) if self.rank else 1.0

    def solve(self, b: Vector) -> Vector:
        """G^+ b, ridge included, [h] -> [h]."""
        projected = self._vectors.T @ (self._scale * b)
        return self._scale * (self._vectors @ (projected / self._values))


def solve(
    gram: Matrix, b: Vector, rr: float, regularization: float = 0.0, precision: float = 0.0
) -> Solution:
    """Minimises ||r - R gamma||^2, plus the ridge, over gamma.

    Args:
        gram: R^T R, [h, h] float64.
        b: R^T r, [h] float64.
        rr: r^T r.
        regularization: see `Factorization`.
        precision: see `Factorization`.

    Returns:
        The coefficients; zeros with rank 0 where `gram` is zero.
    """
    factor = Factorization(gram, regularization, precision)
    gamma = factor.solve(b)
    return Solution(gamma, factor.rank, factor.condition, promised_reduction(gram, b, rr, gamma))


def promised_reduction(gram: Matrix, b: Vector, rr: float, gamma: Vector) -> float:
    """||r - R gamma|| / ||r|| from the Gram matrix alone; 1.0 where r is zero."""
    if rr <= 0.0:
        return 1.0
    squared = rr - 2.0 * float(gamma @ b) + float(gamma @ gram @ gamma)
    return math.sqrt(min(max(squared / rr, 0.0), 1.0))

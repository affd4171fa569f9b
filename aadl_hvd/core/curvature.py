"""Curvature in the span of recent progress, and the jump that follows from it: small, on the host.

`methods.reference.subspace` is the same in plain float64, with the vectors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from aadl_hvd.core.solve import Matrix, Vector

DROPPED = 1e-6  # of the largest eigenvalue of A; below it rounding decides in float32
LONGEST = 19.0  # a jump goes no farther than the base optimizer does in so many blocks


class Jump(NamedTuple):
    """A step in the span of the columns.

    Attributes:
        coefficients: of the columns of dW, [k]; zeros where nothing is to be gained.
        slope: <d, g>, what the loss falls by along the jump to first order; at most 0.
        gain: what the loss falls by according to the curvature found; at least 0.
    """

    coefficients: Vector
    slope: float
    gain: float


def find_jump(
    a: Matrix, b: Matrix, gradient: Vector, noise: Matrix, steps: int, prior: float, farthest: float
) -> Jump:
    """Half a Newton step in the span, less what the base optimizer does by itself in a block.

    Args:
        a: A = dW^T M^-1 dW, [k, k].
        b: B = dW^T dG, [k, k].
        gradient: dW^T g of the last block's mean gradient, [k].
        noise: dW^T of the noise of some blocks' mean gradients, [k, blocks].
        steps: L, steps in a block.
        prior: h0, the curvature that is assumed where noise hides it, in units of 1/M.
        farthest: the longest jump in the metric M^-1, as a share of the way that the columns have
            gone in all.

    Returns:
        The jump at full trust.
    """
    k = len(a)
    nothing = Jump(np.zeros(k), 0.0, 0.0)
    squares, vectors = np.linalg.eigh(a)
    kept = squares > max(DROPPED * squares[-1], 0.0)
    squares, vectors = squares[kept], vectors[:, kept]
    if not len(squares):
        return nothing
    basis = vectors / np.sqrt(squares)  # orthonormal in the metric M^-1
    deviations = basis.T @ noise
    own = (deviations**2).mean(axis=1)
    variance = 0.5 * own + 0.5 * own.mean()  # of the gradient along each direction
    # Curvature ji is seen twice: along direction i and along j. Each counts by its precision, the
    # square of the way gone over the noise, and a prior keeps what nothing is known of at h0.
    seen = basis.T @ b @ basis
    floor = 1e-200 * float(squares[-1]) + np.finfo(float).tiny  # no weight overflows
    weight = squares[None, :] / np.maximum(variance, floor)[:, None]
    unit = np.eye(len(squares))
    assumed = (1.0 + unit) / prior**2
    total = weight + weight.T + assumed
    curvature = (seen * weight + (seen * weight).T + assumed * prior * unit) / total
    h, axes = np.linalg.eigh(curvature)
    slopes = axes.T @ (basis.T @ gradient)
    curved = h > 0.0
    newton = 0.5 / np.where(curved, h, 1.0)
    z = np.where(
        curved, -np.minimum(np.maximum(newton - steps, 0.0), LONGEST * steps) * slopes, 0.0
    )
    length = math.sqrt(float(z @ z))
    travelled = math.sqrt(max(float(a.sum()), 0.0))
    if not math.isfinite(length) or length == 0.0 or travelled == 0.0:
        return nothing
    z *= min(1.0, farthest * travelled / length)
    slope = float(slopes @ z)
    return Jump(basis @ (axes @ z), slope, -slope - 0.5 * float(h @ z**2))

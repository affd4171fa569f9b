"""Each method as one plain function in float64, for reading: no ranks, no buffers, no chunks.

docs/algorithm.md shows these functions, and the fast methods are tested against them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def residual_norm(
    pairs: Sequence[tuple[Tensor, Tensor]],
    w: Tensor,
    r: Tensor,
    scaling: float | Tensor = 1.0,
    mixing: float = 1.0,
    relaxation: float = 1.0,
    regularization: float = 0.0,
) -> Tensor:
    """The accelerated point w+ of Anderson acceleration, type II (paper, Eq. 2 to 6).

    Args:
        pairs: (w_j, r_j) of the last m + 1 stored steps, from the oldest to the newest, [n] each.
        w: iterate, [n].
        r: its residual, [n]: G(w) - w, or minus the gradient.
        scaling: M, the diagonal that makes a step of a residual; [n] or a number.
        mixing: weight of the residual term; 1 is the paper's.
        relaxation: beta.
        regularization: ridge, relative to the diagonal of R^T R.

    Returns:
        w+ [n] float64.
    """
    w, r = w.double(), r.double()
    # Columns of W and R: differences of successive iterates and residuals (Eq. 2 and 3).
    differences = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(pairs)]
    W = torch.stack([dw.double() for dw, _ in differences], dim=1)
    R = torch.stack([dr.double() for _, dr in differences], dim=1)
    # gamma = argmin || r - R gamma || (Eq. 5), by the eigenvalues of R^T R scaled to a unit
    # diagonal. Small ones are dropped: columns that others make up add nothing.
    scale = 1.0 / R.norm(dim=0)
    scale[~scale.isfinite()] = 0.0
    values, vectors = torch.linalg.eigh((R * scale).T @ (R * scale))
    values = values + regularization
    kept = values > 1e-12 * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    gamma = scale * (vectors @ ((vectors.T @ (scale * (R.T @ r))) / values))
    # Eq. 4 and 6, with M and the mixing parameter.
    point: Tensor = w + relaxation * (-(W @ gamma) + mixing * scaling * (r - R @ gamma))
    return point

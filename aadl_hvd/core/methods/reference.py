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


def subspace(
    blocks: Sequence[tuple[Tensor, Tensor, Tensor]],
    scaling: float | Tensor,
    steps: int,
    momentum: float,
    share: float = 1.0,
    farthest: float = 0.5,
) -> Tensor:
    """The jump d of the subspace method: half a Newton step in the span, in the energy norm.

    Args:
        blocks: of the last m + 1 blocks, from the oldest: mean iterate, mean gradient, and half the
            difference between the mean gradients of its even and its odd steps, [n] each.
        scaling: M, the diagonal that makes a step of a gradient; [n] or a number.
        steps: L, steps in a block.
        momentum: mu of the base optimizer.
        share: of the jump, by trust and noise.
        farthest: the longest jump, as a share of the way from the oldest to the newest block mean.

    Returns:
        d [n] float64; the weights become w + d after the block's last base step.
    """
    pairs = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(blocks)]
    W = torch.stack([dw.double() for dw, _ in pairs], dim=1)
    G = torch.stack([dg.double() for _, dg in pairs], dim=1)
    D = torch.stack([noise.double() for _, _, noise in blocks[-3:]], dim=1)
    g = blocks[-1][1].double()
    M = torch.as_tensor(scaling, dtype=torch.float64).expand(len(g)).unsqueeze(1)
    # A basis of the span, orthonormal in the metric M^-1.
    A = W.T @ (W / M)
    a, V = torch.linalg.eigh(A)
    kept = a > 1e-6 * a[-1]
    a, Q = a[kept], V[:, kept] / a[kept].sqrt()
    # The curvature H in the span. Entry ji is seen along direction i and along direction j; each
    # counts by its precision. A prior of mean h0 and variance h0^2 (off the diagonal, 0 and h0^2)
    # stands for what noise hides. h0 is near the largest curvature at which the base is stable.
    h0 = 1.0 / (1.0 - momentum)
    N = (Q.T @ (W.T @ D)).square().mean(dim=1)
    precision = a[None, :] / (0.5 * N + 0.5 * N.mean())[:, None]
    I = torch.eye(len(a), dtype=torch.float64)  # noqa: E741
    prior = (1.0 + I) / h0**2
    seen = (Q.T @ (W.T @ G) @ Q) * precision
    H = (seen + seen.T + prior * h0 * I) / (precision + precision.T + prior)
    # Half a Newton step where the curvature is positive, less what the base does in a block.
    h, E = torch.linalg.eigh(H)
    c = E.T @ (Q.T @ (W.T @ g))
    z = -((0.5 / h - steps).clamp(0.0, 19.0 * steps) * c).where(h > 0.0, 0.0)
    length, way = float(z.norm()), float(A.sum().sqrt())
    share = min(share, farthest * way / length) if length else 0.0
    jump: Tensor = W @ (Q @ (E @ (share * z)))
    return jump

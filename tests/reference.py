"""The oracle: dense, float64, textbook Anderson acceleration, written from the formulas alone.

Equations and Algorithm 1 are those of Lupo Pasini, Yin, Reshniak, Stoyanov, "Stable Anderson
Acceleration for Deep Learning" (arXiv 2110.14813); Theorem 2.2 is Walker and Ni, SIAM J. Numer.
Anal. 49 (2011) 1715. Nothing here knows of torch, ranks, Gram matrices or ring buffers.
"""

import dataclasses
from collections import Counter

import numpy as np


@dataclasses.dataclass
class Run:
    """path[k] is the iterate after k steps; counts: what happened, as in `aadl_hvd.Stats`."""

    path: np.ndarray
    counts: Counter
    reductions: list  # ||r - R gamma|| / ||r|| of each acceleration step


def anderson(
    step,
    w,
    steps,
    *,
    m,
    p=1,
    q=1,
    beta=1.0,
    mixing=1.0,
    warmup=0,
    residual=None,
    state=None,
    scaling=None,
    rate=lambda k: 1.0,
    safeguard="none",
    window=None,
    threshold=0.1,
    loss=None,
):
    """Accelerates w <- G(w).

    Args:
        step: (k, w, state) -> (G(w), next state), k = 0, 1, ...; state is the base optimizer's.
        residual: (k, w) -> r; None: (G(w) - w) / rate(k) (Eq. 1).
        scaling: (k) -> diagonal of M, that makes a step of r; None: rate(k).
        m, p, q: depth; AA where k mod p = 0; (w, r) of the same step stored where k mod q = 0,
            before AA; k = 1 is the first step after `warmup` plain ones.
        beta, mixing: w+ = w + beta [-W g + mixing M (r - R g)], Eq. 4 and 6 where mixing = 1.
        rate: see above.
        safeguard: "none"; "descent": only if <w+ - w, r> > 0, else the older half of the columns
            goes; "residual": Algorithm 1, lines 19
            to 24, one step later: if the norm of r has not fallen, back to the base step, and the
            step that showed it is lost; "loss": only if loss(w+) <= loss(G(w)).
        window, threshold: t of Eq. 11 and epsilon of Eq. 16; None: no moving average.
    """
    w = np.asarray(w, dtype=np.float64)
    path, counts, reductions = [w], Counter(), []
    columns_w, columns_r, recent = [], [], []
    last = trial = None
    for index in range(steps):
        k = index + 1 - warmup
        image, next_state = step(index, w, state)
        r = (image - w) / rate(index) if residual is None else residual(index, w)
        mix = rate(index) if scaling is None else scaling(index)
        new = image
        if trial is not None:
            norm, back, back_state = trial
            trial = None
            if not np.linalg.norm(r) < norm:
                counts["residual"] += 1
                w, state = back, back_state
                if recent:
                    recent[-1] = back  # line 23: w^(k+1) is the base step, the point never was
                path.append(w)
                continue
        if k >= 1 and k % q == 0:
            if last is not None:  # Eq. 2 and 3
                columns_w = [*columns_w, w - last[0]][-m:]
                columns_r = [*columns_r, r - last[1]][-m:]
            last = (w, r)
            counts["stored"] += 1
        if k >= 1 and k % p == 0 and columns_w:
            W, R = np.column_stack(columns_w), np.column_stack(columns_r)
            g = np.linalg.lstsq(R, r)[0]  # Eq. 5
            left = r - R @ g
            reductions.append(np.linalg.norm(left) / np.linalg.norm(r))
            point = w + beta * (-W @ g + mixing * mix * left)
            if safeguard == "descent" and not (point - w) @ r > 0:
                counts["descent"] += 1
                kept = len(columns_w) // 2
                columns_w, columns_r = (
                    columns_w[-kept:] * (kept > 0),
                    columns_r[-kept:] * (kept > 0),
                )
            elif safeguard == "loss" and not loss(index, point) <= loss(index, image):
                counts["loss"] += 1
            else:
                counts["accelerated"] += 1
                new = point
                if safeguard == "residual":
                    trial = (np.linalg.norm(r), image, next_state)
        if window is not None and k >= 1:
            recent = [*recent, new][-window:]
            spread = np.sqrt(np.var(recent, axis=0)).max()  # Eq. 15
            if len(recent) == window and spread >= threshold * np.abs(mix * r).max():  # Eq. 16
                counts["averaged"] += 1
                new = recent[-1] = np.mean(recent, axis=0)  # Eq. 11
        w, state = new, next_state
        path.append(w)
    return Run(np.array(path), counts, reductions)


def krylov_minimal_residual(A, b, x, steps):
    """Iterates x_k of GMRES for A x = b: argmin ||b - A x|| over x_0 + Krylov space k.

    By least squares over an orthonormal basis of the space: for small dense A only.
    """
    r, basis, path = b - A @ x, np.zeros((len(b), 0)), [x]
    new = r
    for _ in range(steps):
        for _ in range(2):  # twice is enough
            new = new - basis @ (basis.T @ new)
        basis = np.column_stack([basis, new / np.linalg.norm(new)])
        y = np.linalg.lstsq(A @ basis, r)[0]
        path.append(x + basis @ y)
        new = A @ basis[:, -1]
    return np.array(path)

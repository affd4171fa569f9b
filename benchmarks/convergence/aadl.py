"""A dense reference for comparison: does to an optimizer what the published AADL code does.

It knows iterates alone, and takes each for the image of the one before under the optimizer's map.
That holds until the first acceleration. From then on a column of R may be the difference of two
points that no step connects.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def extrapolate(X: Tensor, relaxation: float) -> Tensor:
    """Returns Anderson's point from iterates alone.

    With r_k = x_{k+1} - x_k, columns of W the differences of x and of R those of r,

        gamma = argmin || r - R gamma ||  (by QR),   x - W gamma + relaxation (r - R gamma)

    where x is the last iterate but one and r its residual. Unlike in Eq. 6 of arXiv 2110.14813,
    relaxation damps the residual alone, and not the whole step.

    Args:
        X: iterates [n, h], oldest first; h at least 3.
        relaxation: beta.

    Returns:
        [n].
    """
    steps = X[:, 1:] - X[:, :-1]
    W, R, r = steps[:, :-1], steps[:, 1:] - steps[:, :-1], steps[:, -1]
    Q, triangle = torch.linalg.qr(R)
    gamma = torch.linalg.solve_triangular(triangle, (Q.T @ r)[:, None], upper=True)[:, 0]
    return X[:, -2] - W @ gamma + relaxation * (r - R @ gamma)


class Aadl:
    """Accelerates any optimizer from outside; call `after_step` after each of its steps.

    As in the published code, there is no safeguard. Each parameter group is accelerated separately,
    and each rank computes everything itself. The accelerated point replaces the last iterate in the
    history. The count of steps starts anew at every acceleration and must exceed `wait`, whose
    published default is 1. So with frequency 1 every second step is accelerated.

    One fault is not imitated. In versions of the published code the weights and the newest entry of
    the history share memory after an acceleration, so that the next step overwrites that entry.

    Args:
        optimizer: a torch optimizer, distributed or not.
        history_depth: number of iterates that are kept.
        frequency: accelerate every so many steps.
        store_every: store an iterate every so many steps.
        relaxation: beta.
        wait: see above.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        history_depth: int,
        frequency: int,
        store_every: int,
        relaxation: float,
        wait: int = 1,
    ) -> None:
        self._groups = [group["params"] for group in optimizer.param_groups]
        self._frequency, self._store_every = frequency, store_every
        self._relaxation, self._wait = relaxation, wait
        self._histories: list[deque[Tensor]] = [deque(maxlen=history_depth) for _ in self._groups]
        self._since_store = self._since_acceleration = 0
        self.accelerated = 0

    @torch.no_grad()
    def after_step(self) -> None:
        """Stores the iterate and accelerates, each when it is due."""
        self._since_store += 1
        if self._since_store >= self._store_every:
            self._since_store = 0
            for group, history in zip(self._groups, self._histories, strict=True):
                history.append(parameters_to_vector(group))
        self._since_acceleration += 1
        count = self._since_acceleration
        if count <= self._wait or count % self._frequency:
            return
        self._since_acceleration = 0
        for group, history in zip(self._groups, self._histories, strict=True):
            if len(history) < 3:
                continue
            history[-1] = extrapolate(torch.stack(list(history), dim=1), self._relaxation)
            # A copy: parameters become views of the vector, and the next step is in place.
            vector_to_parameters(history[-1].clone(), group)
            self.accelerated += 1

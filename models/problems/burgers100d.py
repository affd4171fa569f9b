"""A physics-informed network (PINN) for the paper's Burgers equation in 99 dimensions and time.

arXiv 2110.14813, Eq. 18 and 22: u_t + u Σ_a u_{x_a} - ν Δu = f on (-1, 1)^99 x (0, 1], u = 0 on the
boundary, f such that u = exp(-t) Π_a (x_a - 1)(x_a + 1). The paper gives no ν here, so the value of
its other problem is used, 0.01/π.

The mean of log|x² - 1| is 2 log 2 - 2. So at a random point u is about -exp(-61), 1e-27. In effect
the network learns to be 0, and an error relative to u says nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from aadl_hvd import AndersonConfig
from models.problems.base import Problem, make_optimizer, seeded

VISCOSITY = 0.01 / math.pi
SPACE = 99
DATA_POINTS, COLLOCATION_POINTS = 400, 4000
TRAINING_PART = 0.8
# Points in one pass. Each has three matrices of 50 x 50. With few points at a time they stay in the
# cache, which makes a step 1.6 times as fast as with all points at once.
CHUNK = 200


class LaplacianMLP(nn.Module):
    """A tanh network that computes its derivatives by t and along (1, ..., 1), and its Laplacian.

    With z = W a + b in every layer, derivatives by x as rows of J and Laplacians as Δ,

        J_z = J_a W^T,  Δz = W Δa,    J_a = σ'(z) J_z,  Δa = σ''(z) |J_z|² + σ'(z) Δz

    where |J_z|² sums over the rows, the directions in space. Only that sum is needed, and rotating
    the directions does not change it. So 50 directions are enough in place of 99: with
    W_1 = L Q^T (Q orthonormal, L 50 x 50) the first layer's J_z is L^T.

    Args:
        widths: units of each layer, input (space and, last, time) and output included.
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        layers = [nn.Linear(inner, outer) for inner, outer in itertools.pairwise(widths)]
        for layer in layers:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)

    def forward(self, points: Tensor) -> Tensor:
        """u [N] at points [N, d], the last column being t."""
        values = points
        for i, layer in enumerate(self.layers):
            values = layer(values)
            if i + 1 < len(self.layers):
                values = torch.tanh(values)
        return values.squeeze(1)

    def derivatives(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(u, Σ_a u_{x_a}, u_t, Δu), each [N], at points [N, d], the last column being t."""
        first: Any = self.layers[0]
        others: Any = self.layers[1:]
        in_space = first.weight[:, :-1]
        z = first(points)
        # Value, derivative along (1, ..., 1), derivative by t, Laplacian: [4, N, units].
        summed = in_space.sum(dim=1).expand_as(z)
        jet = torch.stack([z, summed, first.weight[:, -1].expand_as(z), torch.zeros_like(z)])
        rotated = torch.linalg.qr(in_space.T)[1]  # autograd needs both factors
        jacobian = rotated.expand(len(points), -1, -1)
        for i, layer in enumerate(others):
            z, summed, by_t, laplacian = jet
            value = torch.tanh(z)
            slope = 1 - value * value
            squares = jacobian.square().sum(dim=1)
            laplacian = slope * (laplacian - 2 * value * squares)
            jet = torch.stack([value, slope * summed, slope * by_t, laplacian]) @ layer.weight.T
            jet = torch.cat([jet[:1] + layer.bias, jet[1:]])
            if i + 1 < len(others):
                jacobian = (jacobian * slope[:, None, :]) @ layer.weight.T
        value, summed, by_t, laplacian = jet.squeeze(2)
        return value, summed, by_t, laplacian


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient is already known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        return (None, None, *(outer[0] * gradient for gradient in ctx.gradients))


class Burgers100d(Problem):
    """The paper's PINN: 4 hidden layers of 50 units, Adam 0.05 times 0.5 every 1,000 steps.

    The loss is MSE_u + MSE_f (Eq. 19 to 21) over 320 initial and boundary points and 3,200
    collocation points; a quarter as many are for validation. Half of the 400 lie at t = 0, half
    on one of the 198 faces. Points are uniform and fixed for the whole training. The paper names no
    activation here; tanh is used.

    Args:
        collocation: points inside, training and validation together; the paper's 4,000.
        steps: steps of Adam.
        seed: see `Problem`.
        rank: see `Problem`.
        ranks: see `Problem`.
    """

    paper: ClassVar[AndersonConfig] = AndersonConfig.paper("burgers100d")

    def __init__(
        self,
        *,
        collocation: int = COLLOCATION_POINTS,
        steps: int = 200,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(seed=seed, rank=rank, ranks=ranks)
        if round(TRAINING_PART * collocation) < ranks:
            raise ValueError(f"Invalid collocation={collocation!r}. Must give each rank a point.")
        self.steps = steps
        random = np.random.default_rng(seed)
        x, t = _uniform(random, DATA_POINTS)
        half = DATA_POINTS // 2
        t[:half] = 0.0
        faces = random.integers(SPACE, size=DATA_POINTS - half)
        x[np.arange(half, DATA_POINTS), faces] = random.choice([-1.0, 1.0], DATA_POINTS - half)
        order = random.permutation(DATA_POINTS)
        data = _tensors(x[order], t[order], exact_solution(x[order], t[order]))
        x, t = _uniform(random, collocation)
        inner = _tensors(x, t, forcing(x, t))
        a, b = round(TRAINING_PART * DATA_POINTS), round(TRAINING_PART * collocation)
        self._train = _cut(data, slice(a)), _cut(inner, slice(b))
        self._validation = _cut(data, slice(a, None)), _cut(inner, slice(b, None))
        self._counts = a, b
        self._own = _cut(data, self.share(a)), _cut(inner, self.share(b))

    def make_model(self) -> LaplacianMLP:
        with seeded(self.seed):
            return LaplacianMLP([SPACE + 1] + [50] * 4 + [1])

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer("adam", model, self.learning_rate(0))

    def learning_rate(self, step: int) -> float:
        return 0.05 * 0.5 ** (step // 1000)

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """As in `Problem`. If gradients are enabled, its gradient is computed here, too."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients: list[Tensor] = []
        total = torch.zeros(())
        for data, inner in _chunks(*self._own):
            of_data, of_inner = _squares(model, data, inner)
            loss = self.mean(of_data, self._counts[0]) + self.mean(of_inner, self._counts[1])
            total += loss.detach()
            if torch.is_grad_enabled():
                found = torch.autograd.grad(loss, parameters)
                gradients = (
                    [a + b for a, b in zip(gradients, found, strict=True)]
                    if gradients
                    else list(found)
                )
        if not gradients:
            return total
        return _WithGradient.apply(total, gradients, *parameters)

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Losses, and "error": the root mean square of u_NN - u on the validation set's points."""
        found = {}
        with torch.no_grad():
            for name, parts in (("training", self._train), ("validation", self._validation)):
                squares = zip(*(_squares(model, *chunk) for chunk in _chunks(*parts)), strict=True)
                found[f"{name}_loss"] = sum(
                    torch.cat(pieces).double().mean().item() for pieces in squares
                )
            points = self._validation[1][0]
            exact = torch.from_numpy(
                exact_solution(points[:, :-1].double().numpy(), points[:, -1].double().numpy())
            )
            found["error"] = (model(points) - exact).square().mean().sqrt().item()
        return found


def exact_solution(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Eq. 22 of the paper: u [N] at x [N, d - 1] in [-1, 1] and t [N], float64."""
    return np.exp(-t) * np.prod(x * x - 1, axis=1)


def forcing(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """f [N] = u_t + u Σ_a u_{x_a} - ν Δu of `exact_solution`, float64.

    u_{x_a} and u_{x_a x_a} are 2 x_a and 2 times the product of the other factors. That product is
    the cumulative product from the left times the one from the right. A division of the whole
    product by one factor would fail on the boundary, where the factor is 0.
    """
    factors = x * x - 1
    ones = np.ones((len(x), 1))
    left = np.cumprod(np.concatenate([ones, factors[:, :-1]], axis=1), axis=1)
    right = np.cumprod(np.concatenate([ones, factors[:, :0:-1]], axis=1), axis=1)[:, ::-1]
    others = np.exp(-t)[:, None] * left * right
    u = exact_solution(x, t)
    gradient_sum = (2 * x * others).sum(axis=1)
    laplacian = 2 * others.sum(axis=1)
    return -u + u * gradient_sum - VISCOSITY * laplacian


Points = tuple[Tensor, Tensor]


def _squares(model: Any, data: Points, inner: Points) -> tuple[Tensor, Tensor]:
    """Squared errors of Eq. 20 and of Eq. 21, one per point."""
    u, gradient_sum, by_t, laplacian = model.derivatives(inner[0])
    residual = by_t + u * gradient_sum - VISCOSITY * laplacian - inner[1]
    return (model(data[0]) - data[1]).square(), residual.square()


def _uniform(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    return random.uniform(-1, 1, (count, SPACE)), random.uniform(0, 1, count)


def _tensors(x: np.ndarray, t: np.ndarray, values: np.ndarray) -> Points:
    points = np.concatenate([x, t[:, None]], axis=1)
    return torch.from_numpy(points).float(), torch.from_numpy(values).float()


def _chunks(data: Points, inner: Points) -> Iterator[tuple[Points, Points]]:
    """Yields the same points in chunks of at most `CHUNK`."""
    count = -(-max(len(data[0]), len(inner[0])) // CHUNK)
    for i in range(count):
        yield _cut(data, slice(i, None, count)), _cut(inner, slice(i, None, count))


def _cut(points: Points, part: slice) -> Points:
    return points[0][part], points[1][part]

"""A physics-informed network (PINN) for Burgers' equation in one space dimension and time.

The "2d" problem of arXiv 2110.14813, section "Numerical results": u_t + u u_x = ν u_xx on
(-1, 1) x (0, 1], u(x, 0) = -sin(πx), u(±1, t) = 0, ν = 0.01/π.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from aadl_hvd import AndersonConfig
from models.problems.base import Problem, make_optimizer, seeded

VISCOSITY = 0.01 / math.pi
DATA_POINTS, COLLOCATION_POINTS = 400, 4000
TRAINING_PART = 0.8
ACTIVATIONS = ("tanh", "relu")


class TaylorMLP(nn.Module):
    """A fully connected network that computes its derivatives.

    Derivatives are propagated forwards with the values (Taylor mode), layer by layer. With
    z = W a + b and derivatives by x and t as indices,

        z_x = W a_x,    a'_x = σ'(z) z_x,    a'_xx = σ''(z) z_x² + σ'(z) z_xx.

    One backward pass through this costs as much as through a network four times as wide. Nested
    reverse mode takes a pass for every derivative, and then one through all of them.

    Args:
        widths: units of each layer, input and output included. Weights have Glorot's
            initialisation, usual for PINNs (the paper names none). With others the values of x and
            t can vanish over eight layers of 20.
        activation: "tanh" or "relu", whose second derivative is taken as 0.
    """

    def __init__(self, widths: list[int], activation: str = "tanh") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"Invalid activation={activation!r}. Must be one of {ACTIVATIONS}.")
        self.activation = activation
        layers = [nn.Linear(inner, outer) for inner, outer in itertools.pairwise(widths)]
        for layer in layers:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)

    def forward(self, points: Tensor) -> Tensor:
        """u [N] at points [N, 2], whose columns are x and t."""
        values = points
        for i, layer in enumerate(self.layers):
            values = layer(values)
            if i + 1 < len(self.layers):
                values = torch.tanh(values) if self.activation == "tanh" else torch.relu(values)
        return values.squeeze(1)

    def derivatives(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(u, u_x, u_t, u_xx), each [N], at points [N, 2], whose columns are x and t."""
        count = len(points)
        first: Any = self.layers[0]
        others: Any = self.layers[1:]
        # The derivatives of the first layer are its weights, at every point.
        along_x = first.weight[:, 0].expand(count, -1)
        along_t = first.weight[:, 1].expand(count, -1)
        jet = torch.stack([first(points), along_x, along_t, torch.zeros_like(along_x)])
        activate: Any = _TanhJet.apply if self.activation == "tanh" else _relu_jet
        for layer in others:
            jet = activate(jet) @ layer.weight.T
            jet = torch.cat([jet[:1] + layer.bias, jet[1:]])
        value, by_x, by_t, by_xx = jet.squeeze(2)
        return value, by_x, by_t, by_xx


class _TanhJet(torch.autograd.Function):
    """tanh of (z, z_x, z_t, z_xx), stacked as [4, N, units].

    Its derivative is written out because autograd would keep and pass ten intermediate arrays.
    """

    @staticmethod
    def forward(ctx: Any, jet: Tensor) -> Tensor:
        z, by_x, by_t, by_xx = jet
        value = torch.tanh(z)
        slope = 1 - value * value
        out = torch.empty_like(jet)
        out[0] = value
        torch.mul(by_x, slope, out=out[1])
        torch.mul(by_t, slope, out=out[2])
        # σ'' = -2 σ σ'
        torch.mul(slope, by_xx - 2 * value * by_x * by_x, out=out[3])
        ctx.save_for_backward(jet, value, slope)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        jet, value, slope = ctx.saved_tensors
        _, by_x, by_t, by_xx = jet
        g, g_x, g_t, g_xx = gradients[0]
        # σ''' = σ' (6 σ² - 2)
        bend = -2 * value
        found = torch.empty_like(jet)
        inner = by_x * g_x + by_t * g_t + by_xx * g_xx
        square = by_x * by_x * g_xx
        torch.mul(slope, g + bend * inner + (6 * value * value - 2) * square, out=found[0])
        torch.mul(slope, g_x + 2 * bend * by_x * g_xx, out=found[1])
        torch.mul(slope, g_t, out=found[2])
        torch.mul(slope, g_xx, out=found[3])
        return found


def _relu_jet(jet: Tensor) -> Tensor:
    return jet * (jet[0] > 0)


class Burgers2d(Problem):
    """The paper's PINN: 8 hidden layers of 20 units, Adam 0.01 times 0.2 every 500 steps.

    The loss is MSE_u + MSE_f (Eq. 19 to 21) over 320 initial and boundary points and 3,200
    collocation points; 80 and 800 are for validation. Half of the 400 lie at t = 0, a quarter on
    either boundary (the paper does not divide them).

    The paper prints ReLU. Its second derivative is 0 wherever it is defined, so the network cannot
    see the viscous term; tanh is the default here.

    Args:
        activation: "tanh" or "relu".
        resample: draw the training points anew every so many steps, as the paper's "when a new
            data batch is selected" suggests; None: keep them.
        steps: steps of Adam.
        seed: see `Problem`.
        rank: see `Problem`.
        ranks: see `Problem`.
    """

    paper: ClassVar[AndersonConfig] = AndersonConfig.paper("burgers2d")

    def __init__(
        self,
        *,
        activation: str = "tanh",
        resample: int | None = None,
        steps: int = 2000,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(seed=seed, rank=rank, ranks=ranks)
        if resample is not None and resample < 1:
            raise ValueError(f"Invalid resample={resample!r}. Must be at least 1, or None.")
        self.activation, self.resample, self.steps = activation, resample, steps
        self.full_batch = resample is None
        (data, inner), self._validation = self._draw(0)
        self._train = (data, inner)
        self._batch, self._number = self._own(data, inner), 0

    def make_model(self) -> TaylorMLP:
        with seeded(self.seed):
            return TaylorMLP([2] + [20] * 8 + [1], self.activation)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer("adam", model, self.learning_rate(0))

    def learning_rate(self, step: int) -> float:
        return 0.01 * 0.2 ** (step // 500)

    def loss(self, model: nn.Module, step: int) -> Tensor:
        number = step // self.resample if self.resample else 0
        if number != self._number:
            self._batch, self._number = self._own(*self._draw(number)[0]), number
        (points, values), inner = self._batch
        data_part, inner_part = _squares(model, points, values, inner)
        # The counts of all ranks; both are the same for every batch.
        counts = len(self._train[0][0]), len(self._train[1])
        return self.mean(data_part, counts[0]) + self.mean(inner_part, counts[1])

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Losses on the first batch's points, and the error against the exact solution.

        "error" is the relative L2 error on 201 x 51 points of [-1, 1] x [0, 1].
        """
        found = {}
        with torch.no_grad():
            for name, (data, inner) in (
                ("training", self._train),
                ("validation", self._validation),
            ):
                of_data, of_inner = _squares(model, data[0], data[1], inner)
                loss = of_data.double().mean() + of_inner.double().mean()
                found[f"{name}_loss"] = loss.item()
            points, exact = _grid()
            found["error"] = ((model(points) - exact).norm() / exact.norm()).item()
        return found

    def _own(self, data: tuple[Tensor, Tensor], inner: Tensor) -> Any:
        part = self.share(len(inner))
        of_data = self.share(len(data[0]))
        return tuple(items[of_data] for items in data), inner[part]

    def _draw(self, number: int) -> Any:
        """Draws a batch: for training and for validation, each ((points, u), inner points)."""
        random = np.random.default_rng([self.seed, number])
        x, t = random.uniform(-1, 1, DATA_POINTS), random.uniform(0, 1, DATA_POINTS)
        half = DATA_POINTS // 2
        t[:half] = 0.0
        x[half:] = np.where(np.arange(DATA_POINTS - half) % 2, 1.0, -1.0)
        u = np.where(t == 0.0, -np.sin(np.pi * x), 0.0)
        order = random.permutation(DATA_POINTS)
        points = torch.from_numpy(np.stack([x, t], axis=1)[order]).float()
        values = torch.from_numpy(u[order]).float()
        inner = torch.from_numpy(
            np.stack(
                [
                    random.uniform(-1, 1, COLLOCATION_POINTS),
                    random.uniform(0, 1, COLLOCATION_POINTS),
                ],
                axis=1,
            )
        ).float()
        a, b = round(TRAINING_PART * DATA_POINTS), round(TRAINING_PART * COLLOCATION_POINTS)
        return (
            ((points[:a], values[:a]), inner[:b]),
            ((points[a:], values[a:]), inner[b:]),
        )


def _squares(model: Any, points: Tensor, values: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors of Eq. 20 and of Eq. 21, one per point."""
    u, by_x, by_t, by_xx = model.derivatives(inner)
    residual = by_t + u * by_x - VISCOSITY * by_xx
    return (model(points) - values).square(), residual.square()


def exact_solution(x: Any, t: Any, nodes: int = 100) -> np.ndarray:
    """Exact solution by Cole-Hopf's transformation and Gauss-Hermite quadrature, float64.

    With y = x - 2 sqrt(νt) η and f(y) = exp(-cos(πy) / (2πν)),

        u = -∫ sin(πy) f(y) exp(-η²) dη / ∫ f(y) exp(-η²) dη

    (C. Basdevant et al., Computers & Fluids 14, 1986, 23-41). f spans 43 decades, and its peaks
    must be hit: 32 nodes are wrong by 4e-3, 50 by 2e-7, 100 by less than 1e-10.

    Args:
        x: in [-1, 1], any shape.
        t: in [0, 1], a shape that broadcasts with x's.
        nodes: nodes of the quadrature, at least 50.

    Returns:
        u, of the broadcast shape of x and t.
    """
    if nodes < 50:
        raise ValueError(f"Invalid nodes={nodes!r}. Must be at least 50.")
    eta, weights = np.polynomial.hermite.hermgauss(nodes)
    x, t = np.broadcast_arrays(np.asarray(x, np.float64), np.asarray(t, np.float64))
    y = x[..., None] - 2 * np.sqrt(VISCOSITY * t[..., None]) * eta
    exponent = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY)
    # The largest exponent is subtracted, so that exp cannot overflow.
    f = weights * np.exp(exponent - exponent.max(axis=-1, keepdims=True))
    return -(np.sin(np.pi * y) * f).sum(axis=-1) / f.sum(axis=-1)


@functools.cache
def _grid() -> tuple[Tensor, Tensor]:
    x, t = np.meshgrid(np.linspace(-1, 1, 201), np.linspace(0, 1, 51))
    points = torch.from_numpy(np.stack([x.ravel(), t.ravel()], axis=1)).float()
    return points, torch.from_numpy(exact_solution(x, t).ravel()).float()

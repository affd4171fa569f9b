"""Small problems, each as torch parameters under an optimizer and as formulas in numpy."""

import dataclasses

import numpy as np
import torch

from aadl_hvd import AndersonOptimizer
from aadl_hvd.core.accelerator import Accelerator


@dataclasses.dataclass(frozen=True)
class Group:
    """A parameter group of torch.optim.SGD."""

    shapes: tuple
    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False

    @property
    def n(self):
        return sum(int(np.prod(shape)) for shape in self.shapes)


# Textbook Anderson acceleration, whatever the noise, and nothing kept beside it.
TEXTBOOK = {"noise_gate": None, "mixing": 1.0, "averages": ()}
PLAIN = (Group(shapes=((3, 4), (4,), (2, 1, 3), ()), lr=0.3),)  # n = 23, a prime
SEVERAL = (
    Group(shapes=((5,), (2, 3)), lr=0.1, weight_decay=0.02),
    Group(shapes=((4, 2),), lr=0.4),
    Group(shapes=((1,), (3,)), lr=0.25, weight_decay=0.1),
)  # n = 23


class Problem:
    """Gradient A w - b_k: A symmetric positive definite, b_k drawn anew for every step.

    The targets b_k keep the columns of R well conditioned, so that a solution by way of the Gram
    matrix and the textbook's agree to rounding; with noise = 0 it is an ordinary quadratic.
    """

    def __init__(self, groups=PLAIN, *, noise=1.0, seed=0, condition=10.0, scale=1.0):
        random = np.random.default_rng(seed)
        self.groups = groups
        self.n = sum(group.n for group in groups)
        Q = np.linalg.qr(random.standard_normal((self.n, self.n)))[0]
        self.A = scale * (Q * np.geomspace(1.0 / condition, 1.0, self.n)) @ Q.T
        self.b = scale * random.standard_normal(self.n)
        self.noise = scale * noise * random.standard_normal((200, self.n))
        self.start = random.standard_normal(self.n)
        self.rates = self._per_number("lr")
        self.decays = self._per_number("weight_decay")

    def _per_number(self, name):
        return np.concatenate([np.full(g.n, getattr(g, name)) for g in self.groups])

    # As formulas

    def gradient(self, k, w):
        return self.A @ w - self.b - self.noise[k % len(self.noise)]

    def loss(self, k, w):
        return 0.5 * w @ self.A @ w - (self.b + self.noise[k % len(self.noise)]) @ w

    def residual(self, k, w):
        """r = -(g + weight_decay w)."""
        return -(self.gradient(k, w) + self.decays * w)

    def scaling(self, k, factor=lambda k: 1.0):
        """Diagonal of M: lr / (1 - momentum)."""
        return factor(k) * self.rates / (1.0 - self._per_number("momentum"))

    def sgd(self, k, w, v, factor=lambda k: 1.0):
        """torch.optim.SGD; v, the momentum, begins as zeros."""
        momentum, nesterov = self._per_number("momentum"), self._per_number("nesterov")
        d = self.gradient(k, w) + self.decays * w
        v = momentum * v + d
        direction = np.where(nesterov, d + momentum * v, v)
        return w - factor(k) * self.rates * direction, v

    # As torch parameters

    def parameters(self, dtype=torch.float64):
        """[[tensor]] by group, at the start."""
        lo, groups = 0, []
        for group in self.groups:
            tensors = []
            for shape in group.shapes:
                hi = lo + int(np.prod(shape))
                values = torch.tensor(self.start[lo:hi], dtype=dtype).reshape(shape)
                tensors.append(torch.nn.Parameter(values))
                lo = hi
            groups.append(tensors)
        return groups

    def optimizer(self, config, comm=None, dtype=torch.float64, shard_groups=1):
        """SGD accelerated on `comm`; None: in one process, whatever others there are."""
        groups = [
            {
                "params": tensors,
                "lr": group.lr,
                "weight_decay": group.weight_decay,
                "momentum": group.momentum,
                "nesterov": group.nesterov,
            }
            for tensors, group in zip(self.parameters(dtype), self.groups, strict=True)
        ]
        opt = AndersonOptimizer(torch.optim.SGD(groups, lr=1.0), anderson=config, independent=True)
        if comm is not None:
            group = comm.shard_group(shard_groups) if shard_groups > 1 else None
            opt.anderson = Accelerator(config, comm, group)
        return opt

    def set_gradient(self, opt, gradient):
        """Flat numpy vector -> p.grad."""
        lo = 0
        for p in parameters_of(opt):
            piece = torch.from_numpy(np.array(gradient[lo : lo + p.numel()]))
            p.grad = piece.to(p.dtype).reshape(p.shape)
            lo += p.numel()

    def run(self, config, steps, comm=None, dtype=torch.float64, factor=None, opt=None, first=0):
        """[steps + 1, n] iterates, and the optimizer; factor(k) multiplies the learning rates."""
        opt = self.optimizer(config, comm, dtype) if opt is None else opt
        path = [flat(opt)]
        for k in range(first, first + steps):
            if factor is not None:
                for group, settings in zip(opt.param_groups, self.groups, strict=True):
                    group["lr"] = settings.lr * factor(k)

            def closure(k=k):
                self.set_gradient(opt, self.gradient(k, flat(opt)))
                return float(self.loss(k, flat(opt)))

            if config.safeguard == "loss":
                opt.step(closure)
            else:
                closure()
                opt.step()
            path.append(flat(opt))
        return np.array(path), opt


def parameters_of(opt):
    return [p for group in opt.param_groups for p in group["params"]]


def flat(opt):
    """The weights as one float64 numpy vector."""
    pieces = [p.detach().reshape(-1).double() for p in parameters_of(opt)]
    return torch.cat(pieces).numpy().copy()


def counts(opt):
    """What `reference.Run.counts` counts."""
    stats = opt.anderson.stats
    found = {name: getattr(stats, name) for name in ("stored", "accelerated", "averaged")}
    return {name: value for name, value in (found | stats.rejected).items() if value}

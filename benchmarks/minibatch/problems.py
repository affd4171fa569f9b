"""The problems: data, network, weight decay and batches, by name and seed; without downloads.

The objective that is minimised is f = loss + (weight decay / 2) ||w||^2 if the base optimizer adds
the decay to the gradient. If it does not (AdamW), f is the loss.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
import re
from collections.abc import Callable, Iterable
from functools import partial
from importlib import resources

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.minibatch import networks
from models.errors import UserError
from models.problems.base import mlp, seeded
from models.problems.digits_mlp import TRAIN_IMAGES, split_digits

Data = tuple[Tensor, Tensor]
CONTEXT = 32  # characters that the transformer sees
BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Loss of each item [N], or of each character [N, CONTEXT], as one vector."""
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A training problem.

    Small batches are drawn without replacement, in a new order each epoch. Items that do not fill
    a last batch are left out of that epoch.

    Attributes:
        name: name in tables.
        seed: seed of the weights, the batches and, for the digits, the split into training and
            validation data.
        train: inputs and targets [N, ...].
        validation: inputs and targets [M, ...].
        build: makes the network from torch's generator.
        batch: items of a batch; at most N.
        steps: steps of a whole training.
        weight_decay: decay of every parameter, if the base optimizer couples it.
        losses: maps outputs and targets to the losses of the items.
    """

    name: str
    seed: int
    train: Data
    validation: Data
    build: Callable[[], nn.Module]
    batch: int
    steps: int = 400
    weight_decay: float = 1e-4
    losses: Callable[[Tensor, Tensor], Tensor] = cross_entropy

    def make_model(self, apart: float = 0.0) -> nn.Module:
        """Makes a model with weights from the seed.

        Args:
            apart: moves them in a random direction, by this fraction of their norm.
        """
        with seeded(self.seed), torch.no_grad():
            model = self.build()
            if apart:
                torch.manual_seed(self.seed + 1_000_003)
                weights = list(model.parameters())
                moves = [torch.randn_like(w) for w in weights]
                length = apart * squares(weights).sqrt() / squares(moves).sqrt()
                for w, move in zip(weights, moves, strict=True):
                    w.add_(length.to(w.dtype) * move)
        return model

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """Loss of the batch of step 0, 1, ..., a scalar."""
        inputs, targets = self.batch_of(step)
        return self.losses(model(inputs), targets).mean()

    def batch_of(self, step: int) -> Data:
        """Inputs and targets of step 0, 1, ..."""
        count = len(self.train[0])
        if self.batch == count:
            return self.train
        epoch, position = divmod(step, count // self.batch)
        chosen = _order(self.seed, epoch, count)[position * self.batch :][: self.batch]
        return self.train[0][chosen], self.train[1][chosen]

    def objective(self, model: nn.Module, loss: Tensor, coupled: bool) -> Tensor:
        """Returns f: `loss`, plus the decay of all weights if it is coupled."""
        decay = self.weight_decay if coupled else 0.0
        return loss + 0.5 * decay * squares(model.parameters())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, coupled: bool) -> dict[str, float]:
        """Measures a model on all data and leaves it as it is.

        Batch norm gets the statistics of the whole training set under the present weights.

        Returns:
            "f", "loss" (training), "validation_loss", "validation_accuracy" (0 to 1).
        """
        measured = _with_statistics(model, self.train[0])
        loss = self.losses(measured(self.train[0]), self.train[1]).double().mean()
        outputs, targets = measured(self.validation[0]), self.validation[1]
        return {
            "f": self.objective(model, loss, coupled).item(),
            "loss": loss.item(),
            "validation_loss": self.losses(outputs, targets).double().mean().item(),
            "validation_accuracy": (outputs.argmax(-1) == targets).double().mean().item(),
        }


def squares(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of all entries of tensors, in float64."""
    return torch.stack([t.double().square().sum() for t in tensors]).sum()


@functools.lru_cache(maxsize=64)
def _order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(count))


def _with_statistics(model: nn.Module, inputs: Tensor) -> nn.Module:
    if not any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        return model
    measured = copy.deepcopy(model)
    for module in measured.modules():
        if isinstance(module, BATCH_NORMS):
            module.reset_running_stats()
            module.momentum = None  # the mean of all batches; here there is one
    measured.train()(inputs)
    return measured.eval()


def digits_mlp(seed: int, *, batch: int = TRAIN_IMAGES, steps: int = 400, relu: bool = False,
               name: str = "") -> Problem:  # fmt: skip
    """64-64-64-10 with tanh, or 64-48-48-10 with ReLU; 1,497 training images."""
    train, validation = split_digits(seed)
    widths = [64, 48, 48, 10] if relu else [64, 64, 64, 10]
    build = partial(mlp, widths, nn.ReLU if relu else nn.Tanh)
    return Problem(name=name, seed=seed, train=train, validation=validation, build=build,
                   batch=batch, steps=steps)  # fmt: skip


def digits_conv(seed: int, *, batch_norm: bool, name: str = "") -> Problem:
    """Three convolutions on 8 x 8 images, batch 100, 800 steps."""
    train, validation = ((x.reshape(-1, 1, 8, 8), y) for x, y in split_digits(seed))
    build = partial(networks.conv2d, batch_norm)
    return Problem(name=name, seed=seed, train=train, validation=validation, build=build,
                   batch=100, steps=800)  # fmt: skip


def mnist1d(seed: int, *, net: str, batch: int, name: str = "") -> Problem:
    """40 numbers in, 10 classes, 4,000 training and 1,000 validation samples.

    Args:
        seed: see `Problem`; the samples are always the same.
        net: "mlp" (40-100-100-10, ReLU), "conv" or "conv_bn" (with batch norm).
        batch: items of a batch.
        name: see `Problem`.
    """
    train, validation = _mnist1d_samples()
    build: Callable[[], nn.Module] = partial(networks.conv1d, net == "conv_bn")
    if net == "mlp":
        build = partial(mlp, [40, 100, 100, 10], nn.ReLU)
    else:
        train, validation = ((x.unsqueeze(1), y) for x, y in (train, validation))
    return Problem(name=name, seed=seed, train=train, validation=validation, build=build,
                   batch=batch)  # fmt: skip


@functools.cache
def _mnist1d_samples() -> tuple[Data, Data]:
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError:
        raise UserError("the problems mnist1d need a package: pip install mnist1d") from None
    states = random.getstate(), np.random.get_state()
    try:
        made = make_dataset(get_dataset_args())  # sets the seeds of both generators
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    parts = ((made["x"], made["y"]), (made["x_test"], made["y_test"]))
    first, second = ((torch.from_numpy(x).float(), torch.from_numpy(y).long()) for x, y in parts)
    return first, second


def text(seed: int, *, batch: int = 32, name: str = "") -> Problem:
    """Predicts the next character of scikit-learn's data set descriptions: one layer of width 48.

    Every tenth window of `CONTEXT` characters is for validation.
    """
    train, validation, size = _text_windows()
    build = partial(networks.Transformer, size, width=48, heads=4, context=CONTEXT)
    return Problem(name=name, seed=seed, train=train, validation=validation, build=build,
                   batch=batch, steps=300)  # fmt: skip


@functools.cache
def _text_windows() -> tuple[Data, Data, int]:
    folder = resources.files("sklearn.datasets.descr")
    names = ("breast_cancer", "digits", "iris", "lfw", "twenty_newsgroups")
    written = "\n".join(folder.joinpath(f"{name}.rst").read_text("utf-8") for name in names)
    written = re.sub(r"[ \-=*]{3,}", " ", written)  # rules and columns of tables
    alphabet = sorted(set(written))
    codes = torch.tensor([alphabet.index(c) for c in written])
    count = (len(codes) - 1) // CONTEXT
    inputs, targets = (codes[i : i + count * CONTEXT].reshape(count, CONTEXT) for i in (0, 1))
    held = torch.arange(count) % 10 == 9
    return (inputs[~held], targets[~held]), (inputs[held], targets[held]), len(alphabet)


MAKERS: dict[str, Callable[..., Problem]] = {
    "digits_mlp-full": digits_mlp,
    "digits_mlp-500": partial(digits_mlp, batch=500),
    "digits_mlp-100": partial(digits_mlp, batch=100),
    "digits_mlp-32": partial(digits_mlp, batch=32, steps=800),
    "digits_relu-64": partial(digits_mlp, batch=64, relu=True),
    "digits_conv-100": partial(digits_conv, batch_norm=False),
    "digits_conv_bn-100": partial(digits_conv, batch_norm=True),
    **{
        f"mnist1d_{net}-{batch}": partial(mnist1d, net=net, batch=batch)
        for net, batches in (
            ("mlp", (64, 250, 1000, 2000)),
            ("conv", (100, 500, 2000)),
            ("conv_bn", (100, 500, 2000)),
        )
        for batch in batches
    },
    "text-32": text,
    "text-200": partial(text, batch=200),
}
"""Constructors by name, called with a seed; the number in the name is the batch."""


def make(name: str, seed: int, steps: int | None = None) -> Problem:
    """Makes a problem.

    Args:
        name: one of `MAKERS`.
        seed: see `Problem`.
        steps: number of steps; None: the problem's own.
    """
    problem = MAKERS[name](seed, name=name)
    return problem if steps is None else dataclasses.replace(problem, steps=steps)

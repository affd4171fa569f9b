"""Base classes of training problems, and how ranks share their data."""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from aadl_hvd import AndersonConfig, NeumannOptimizer

OPTIMIZERS = ("sgd", "nesterov", "adam", "neumann")

# The paper's algorithm on problems that are not in the paper: its residual, safeguard and moving
# average. History depth and frequencies are in the middle of the paper's values.
NOT_IN_PAPER = dataclasses.replace(
    AndersonConfig.paper("burgers2d"), history_depth=10, frequency=5, store_every=1
)


class Problem(abc.ABC):
    """A training problem as one rank of several sees it.

    A global batch of B items is split in order over P ranks into shares of B // P or B // P + 1
    items. A rank's loss is the *sum* over its share divided by B / P. So the mean over ranks is
    exactly the mean of the global batch, even if P does not divide B. Only items that do not fill
    the last small batch of an epoch are dropped.

    Everything follows from (seed, rank, ranks) alone. The global batches follow from the seed: they
    are the same on any number of ranks.

    Args:
        seed: seed of the weights, of the split into training and validation data, and of the
            batches.
        rank: this rank.
        ranks: number of ranks.

    Attributes:
        name: name in tables; `build` sets it.
        steps: steps of the base optimizer in a whole training.
        full_batch: each step sees the whole training set.
        paper: settings of the paper's algorithm here, moving average included.
    """

    name: str = ""
    steps: int = 400
    full_batch: bool = True
    paper: ClassVar[AndersonConfig] = NOT_IN_PAPER

    def __init__(self, *, seed: int = 0, rank: int = 0, ranks: int = 1) -> None:
        if not 0 <= rank < ranks:
            raise ValueError(f"Invalid rank={rank!r}. Must be >= 0 and < ranks={ranks!r}.")
        self.seed, self.rank, self.ranks = seed, rank, ranks

    @abc.abstractmethod
    def make_model(self) -> nn.Module:
        """Makes a model whose weights depend on the seed alone: they are equal on all ranks."""

    @abc.abstractmethod
    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The plain base optimizer of the problem."""

    def learning_rate(self, step: int) -> float | None:
        """Learning rate of step 0, 1, ...; None: that of `make_optimizer` stays."""
        return None

    @abc.abstractmethod
    def loss(self, model: nn.Module, step: int) -> Tensor:
        """This rank's loss in step 0, 1, ..., a scalar; the mean over ranks is the global loss."""

    @abc.abstractmethod
    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Measures a model on all data, and changes nothing.

        Returns:
            "training_loss" over the whole training set, usually "validation_loss", and further
            metrics of the problem.
        """

    def share(self, count: int) -> slice:
        """This rank's part of `count` items."""
        return slice(count * self.rank // self.ranks, count * (self.rank + 1) // self.ranks)

    def mean(self, losses: Tensor, count: int) -> Tensor:
        """This rank's loss, from the losses of its items; `count` is the items of all ranks."""
        return losses.sum() * (self.ranks / count)


class Supervised(Problem):
    """A problem with inputs and targets, all of them in memory on every rank.

    Small batches are drawn without replacement, in a new order each epoch. Items that do not fill
    a last batch are left out of that epoch.

    Args:
        train: inputs and targets [N, ...].
        validation: inputs and targets, or None.
        batch: items in a global batch; None: all, in a fixed partition.
        seed: see `Problem`.
        rank: see `Problem`.
        ranks: see `Problem`.
    """

    def __init__(
        self,
        train: tuple[Tensor, Tensor],
        validation: tuple[Tensor, Tensor] | None,
        *,
        batch: int | None = None,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(seed=seed, rank=rank, ranks=ranks)
        self.train, self.validation = train, validation
        self.full_batch = batch is None
        self.batch = len(train[0]) if batch is None else batch
        if not ranks <= self.batch <= len(train[0]):
            raise ValueError(
                f"Invalid batch={batch!r}. Must be at least one item a rank and at most all "
                f"{len(train[0])}."
            )
        part = self.share(len(train[0]))
        self._own = tuple(items[part] for items in train)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    @abc.abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each item."""

    def loss(self, model: nn.Module, step: int) -> Tensor:
        inputs, targets = self._batch(step)
        return self.mean(self.losses(model(inputs), targets), self.batch)

    def metrics(self, model: nn.Module) -> dict[str, float]:
        found = {}
        with torch.no_grad():
            for name, data in (("training", self.train), ("validation", self.validation)):
                if data is None:
                    continue
                outputs = model(data[0])
                found[f"{name}_loss"] = self.losses(outputs, data[1]).double().mean().item()
                if name == "validation" and data[1].dtype == torch.long:
                    right = outputs.argmax(1) == data[1]
                    found["validation_accuracy"] = right.double().mean().item()
        return found

    def _batch(self, step: int) -> tuple[Tensor, ...]:
        if self.full_batch:
            return self._own
        count = len(self.train[0])
        epoch, position = divmod(step, count // self.batch)
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(count)
            self._epoch, self._order = epoch, torch.from_numpy(order)
        part = self.share(self.batch)
        first = position * self.batch
        own = self._order[first + part.start : first + part.stop]
        return tuple(items[own] for items in self.train)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's generator within the context, and restores it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def mlp(widths: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """Fully connected layers with torch's own initialisation; no activation after the last."""
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(widths):
        layers += [nn.Linear(inner, outer), activation()]
    return nn.Sequential(*layers[:-1])


def make_optimizer(
    kind: str,
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    steps_per_epoch: int = 1,
) -> torch.optim.Optimizer:
    """A base optimizer by name: one of `OPTIMIZERS`.

    "nesterov" has momentum 0.9. Only "neumann" uses `steps_per_epoch`.
    """
    parameters = model.parameters()
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay)
    if kind == "nesterov":
        return torch.optim.SGD(
            parameters, lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
        )
    if kind == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay)
    if kind == "neumann":
        return NeumannOptimizer(parameters, lr, steps_per_epoch, weight_decay=weight_decay)
    raise ValueError(f"Invalid kind={kind!r}. Must be one of {OPTIMIZERS}.")

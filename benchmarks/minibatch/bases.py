"""Base optimizers, the grid of their tuning, and the cases: a problem with a base."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import nn

from models.errors import UserError

RATES = (1, 2, 4, 8)
MOMENTA = (0.9, 0.95, 0.97, 0.99)
DECOUPLED_DECAY = 0.01  # AdamW's usual one


@dataclasses.dataclass(frozen=True)
class Base:
    """A base optimizer.

    Attributes:
        kind: "sgd" (Nesterov's where there is momentum), "adam" or "adamw".
        lr: learning rate at first.
        momentum: momentum of SGD, or beta1 of Adam; in [0, 1).
        cosine: the rate falls to 0 by half a cosine. False: it is constant.
    """

    kind: str
    lr: float
    momentum: float = 0.9
    cosine: bool = False

    @property
    def name(self) -> str:
        """A name such as sgd0.5, nesterov0.1m0.9, adam0.002m0.9-cosine."""
        kind = "nesterov" if self.kind == "sgd" and self.momentum else self.kind
        momentum = f"m{self.momentum:g}" if self.momentum else ""
        return f"{kind}{self.lr:g}{momentum}{'-cosine' * self.cosine}"

    @property
    def coupled(self) -> bool:
        """Whether the weight decay is part of the gradient."""
        return self.kind != "adamw"

    def make(self, model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
        """Makes the optimizer; AdamW takes `DECOUPLED_DECAY` in place of `weight_decay`."""
        weights, betas = model.parameters(), (self.momentum, 0.999)
        if self.kind == "sgd":
            return torch.optim.SGD(
                weights,
                lr=self.lr,
                momentum=self.momentum,
                nesterov=self.momentum > 0,
                weight_decay=weight_decay,
            )
        if self.kind == "adam":
            return torch.optim.Adam(weights, lr=self.lr, betas=betas, weight_decay=weight_decay)
        if self.kind == "adamw":
            return torch.optim.AdamW(weights, lr=self.lr, betas=betas, weight_decay=DECOUPLED_DECAY)
        raise ValueError(f"Invalid kind={self.kind!r}. Must be 'sgd', 'adam' or 'adamw'.")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step 0, 1, ... of `steps`."""
        return self.lr * (0.5 + 0.5 * math.cos(math.pi * step / steps) if self.cosine else 1.0)


def grid(base: Base, schedules: str = "constant") -> list[Base]:
    """Returns the bases that a tuning tries: rates x1 to x8, momentum 0.9 to 0.99.

    Plain SGD is tried without momentum, and with momentum at rates scaled by 1 - momentum. Their
    steps have the same length.

    Args:
        base: the untuned base; it is in the grid if its momentum and schedule are.
        schedules: "none" (nothing is tried), "constant", "cosine" or "both".
    """
    if schedules == "none":
        return []
    curves = {"constant": (False,), "cosine": (True,), "both": (False, True)}[schedules]
    plain = base.kind == "sgd" and not base.momentum
    return [
        Base(base.kind, float(f"{rate * base.lr * (1 - m if plain else 1):.6g}"), m, cosine)
        for cosine in curves
        for m in ((0.0, *MOMENTA) if plain else MOMENTA)
        for rate in RATES
    ]


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem with an untuned base.

    Attributes:
        problem: one of `problems.MAKERS`.
        base: untuned.
        group: "easy", "hard", "full", "mnist1d", "conv" or "text".
        seeds: default number of seeds; 30 if the base itself is chaotic.
    """

    problem: str
    base: Base
    group: str
    seeds: int = 5

    @property
    def name(self) -> str:
        """Problem and base."""
        return f"{self.problem}-{self.base.name}"


def _nesterov(lr: float, momentum: float = 0.9, *, cosine: bool = False) -> Base:
    return Base("sgd", lr, momentum, cosine)


_DIGITS = Base("sgd", 0.5, 0.0), _nesterov(0.1), Base("adam", 2e-3)
_SUITE = [
    *(
        Case(f"digits_mlp-{batch}", base, "full" if batch == "full" else "easy", 8)
        for batch in ("full", 500, 100)
        for base in _DIGITS
    ),
    Case("digits_mlp-100", _nesterov(0.1, 0.97), "hard", 12),
    Case("digits_mlp-100", _nesterov(0.04, 0.98), "hard", 12),
    Case("digits_mlp-100", _nesterov(0.4), "hard", 30),
    Case("digits_mlp-100", Base("adam", 1.6e-2), "hard", 30),
    Case("digits_relu-64", _nesterov(0.2), "hard", 30),
    Case("digits_mlp-32", _nesterov(0.2), "hard", 30),
    Case("digits_conv-100", _nesterov(0.01), "conv"),
    Case("digits_conv_bn-100", _nesterov(0.01), "conv"),
    Case("digits_conv_bn-100", Base("adam", 1e-3), "conv"),
    Case("mnist1d_mlp-64", _nesterov(0.05), "mnist1d"),
    Case("mnist1d_mlp-250", Base("adam", 1e-3), "mnist1d"),
    Case("mnist1d_mlp-1000", _nesterov(0.05), "mnist1d"),
    Case("mnist1d_mlp-1000", _nesterov(0.05, cosine=True), "mnist1d"),
    Case("mnist1d_mlp-2000", Base("sgd", 0.2, 0.0), "mnist1d"),
    Case("mnist1d_mlp-2000", Base("adam", 1e-3, cosine=True), "mnist1d"),
    *(
        Case(f"mnist1d_{net}-{batch}", base, "mnist1d")
        for net in ("conv", "conv_bn")
        for batch, base in (
            (100, _nesterov(0.05)),
            (500, Base("adam", 2e-3)),
            (500, _nesterov(0.05, cosine=True)),
            (2000, _nesterov(0.05)),
        )
    ),
    Case("text-32", Base("adam", 2e-3), "text"),
    Case("text-32", _nesterov(0.1), "text"),
    Case("text-200", Base("adamw", 2e-3, cosine=True), "text"),
]
CASES = {case.name: case for case in _SUITE}


def chosen(words: Sequence[str]) -> list[Case]:
    """Finds cases by name, group, problem or family of problems; all if there are no words.

    Raises:
        UserError: a word is none of these.
    """
    found: set[str] = set()
    for word in words:
        meant = {word} if word in CASES else {n for n, case in CASES.items() if _in(word, case)}
        if not meant:
            groups = ", ".join(dict.fromkeys(case.group for case in CASES.values()))
            raise UserError(f"no case named {word!r}: choose a group ({groups}) or from --list")
        found |= meant
    return [case for name, case in CASES.items() if not words or name in found]


def _in(word: str, case: Case) -> bool:
    return word == case.group or case.name.startswith(f"{word}-")

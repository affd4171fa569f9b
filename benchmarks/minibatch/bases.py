"""Base optimizers, the grid of their tuning, and the cases: a problem with a base."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from models.errors import UserError

RATES = (1, 2, 4, 8)
MOMENTA = (0.9, 0.95, 0.97, 0.99)
DECOUPLED_DECAY = 0.01  # AdamW's usual one
FREE = "free"  # Schedule-Free
WARM_UP = 0.05  # of the steps, with Schedule-Free
SCHEDULES: dict[str, tuple[str, ...]] = {
    "none": (),
    "constant": ("constant",),
    "cosine": ("cosine",),
    "both": ("constant", "cosine"),
    "all": ("constant", "cosine", FREE),
}
"""Schedules that a tuning tries, by the word of the command line."""


@dataclasses.dataclass(frozen=True)
class Base:
    """A base optimizer.

    With schedule "free" it is the Schedule-Free form of the same optimizer (Defazio et al. 2024,
    arXiv 2405.15682; package schedulefree): gradients are taken at y, between the iterate z and
    its average x, and x is what is evaluated. Its momentum is the weight of x in y. The rate rises
    over the first `WARM_UP` of the steps, as in the paper's experiments. The weight decay acts at
    y. Where it is coupled it is part of the gradient, so that the objective is the same.

    Attributes:
        kind: "sgd" (Nesterov's where there is momentum), "adam" or "adamw".
        lr: learning rate at first; with "free" after the warm-up.
        momentum: momentum of SGD, or beta1 of Adam; in [0, 1), in (0, 1) with "free".
        schedule: "constant"; "cosine": the rate falls to 0 by half a cosine; or "free".
    """

    kind: str
    lr: float
    momentum: float = 0.9
    schedule: str = "constant"

    @property
    def name(self) -> str:
        """A name such as sgd0.5, nesterov0.1m0.9, adam0.002m0.9-cosine, sgd1m0.9-free."""
        nesterov = self.kind == "sgd" and self.momentum and not self.free
        momentum = f"m{self.momentum:g}" if self.momentum else ""
        schedule = "" if self.schedule == "constant" else f"-{self.schedule}"
        return f"{'nesterov' if nesterov else self.kind}{self.lr:g}{momentum}{schedule}"

    @property
    def coupled(self) -> bool:
        """Whether the weight decay is part of the gradient."""
        return self.kind != "adamw"

    @property
    def free(self) -> bool:
        """Whether it is Schedule-Free."""
        return self.schedule == FREE

    @property
    def averaged(self) -> bool:
        """Whether running averages are evaluated beside it. Where the rate ends at 0 all agree."""
        return self.schedule == "constant"

    def make(self, model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
        """Makes the optimizer; AdamW takes `DECOUPLED_DECAY` in place of `weight_decay`.

        Raises:
            UserError: the package schedulefree is needed and not there.
        """
        if self.kind not in ("sgd", "adam", "adamw"):
            raise ValueError(f"Invalid kind={self.kind!r}. Must be 'sgd', 'adam' or 'adamw'.")
        decay = weight_decay if self.coupled else DECOUPLED_DECAY
        if self.free:
            return self._make_free(model, decay)
        weights, betas = model.parameters(), (self.momentum, 0.999)
        if self.kind == "sgd":
            return torch.optim.SGD(
                weights,
                lr=self.lr,
                momentum=self.momentum,
                nesterov=self.momentum > 0,
                weight_decay=decay,
            )
        adam = torch.optim.Adam if self.kind == "adam" else torch.optim.AdamW
        return adam(weights, lr=self.lr, betas=betas, weight_decay=decay)

    def _make_free(self, model: nn.Module, decay: float) -> torch.optim.Optimizer:
        try:
            import schedulefree
        except ImportError:
            raise UserError("Schedule-Free needs a package: pip install schedulefree") from None
        weights, betas = model.parameters(), (self.momentum, 0.999)
        made: torch.optim.Optimizer
        if self.kind == "sgd":
            return schedulefree.SGDScheduleFree(  # type: ignore[no-any-return]
                weights, lr=self.lr, momentum=self.momentum, weight_decay=decay
            )
        own = 0.0 if self.coupled else decay  # the package's own decay is decoupled
        made = schedulefree.AdamWScheduleFree(weights, lr=self.lr, betas=betas, weight_decay=own)
        if self.coupled:
            made.register_step_pre_hook(lambda optimizer, *_: _couple(optimizer, decay))
        return made

    def place(self, optimizer: Any, *, training: bool) -> None:
        """Puts weights to train on or to evaluate in place: y or x of Schedule-Free.

        Other optimizers have the same weights for both.
        """
        if self.free:
            optimizer.train() if training else optimizer.eval()

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step 0, 1, ... of `steps`."""
        if self.free:
            return self.lr * min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
        cosine = self.schedule == "cosine"
        return self.lr * (0.5 + 0.5 * math.cos(math.pi * step / steps) if cosine else 1.0)


@torch.no_grad()
def _couple(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Adds the decay of the weights in place to their gradients."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None:
                weight.grad.add_(weight, alpha=decay)


def grid(base: Base, schedules: str = "constant") -> list[Base]:
    """Returns the bases that a tuning tries: rates x1 to x8, momentum 0.9 to 0.99.

    Plain SGD is tried without momentum, and with momentum at rates scaled by 1 - momentum. Their
    steps have the same length. Schedule-Free SGD has no momentum that would make steps longer. So
    its rates are those of plain SGD: 1/(1 - momentum) times as large as with momentum, 10 to 80
    times for 0.9. The authors recommend 10 to 50 times, and 1 to 10 times for Adam.

    Args:
        base: the untuned base; it is in the grid if its momentum and schedule are.
        schedules: one of `SCHEDULES`.
    """
    return [
        Base(base.kind, float(f"{rate * base.lr * _scale(base, m, schedule):.6g}"), m, schedule)
        for schedule in SCHEDULES[schedules]
        for m in ((0.0, *MOMENTA) if _plain(base) and schedule != FREE else MOMENTA)
        for rate in RATES
    ]


def _plain(base: Base) -> bool:
    return base.kind == "sgd" and not base.momentum


def _scale(base: Base, momentum: float, schedule: str) -> float:
    """What makes steps as long as the base's."""
    if base.kind == "sgd" and schedule == FREE:
        return 1.0 / (1.0 - base.momentum)
    return 1.0 - momentum if _plain(base) else 1.0


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


def _nesterov(lr: float, momentum: float = 0.9, schedule: str = "constant") -> Base:
    return Base("sgd", lr, momentum, schedule)


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
    Case("mnist1d_mlp-1000", _nesterov(0.05, schedule="cosine"), "mnist1d"),
    Case("mnist1d_mlp-2000", Base("sgd", 0.2, 0.0), "mnist1d"),
    Case("mnist1d_mlp-2000", Base("adam", 1e-3, schedule="cosine"), "mnist1d"),
    *(
        Case(f"mnist1d_{net}-{batch}", base, "mnist1d")
        for net in ("conv", "conv_bn")
        for batch, base in (
            (100, _nesterov(0.05)),
            (500, Base("adam", 2e-3)),
            (500, _nesterov(0.05, schedule="cosine")),
            (2000, _nesterov(0.05)),
        )
    ),
    Case("text-32", Base("adam", 2e-3), "text"),
    Case("text-32", _nesterov(0.1), "text"),
    Case("text-200", Base("adamw", 2e-3, schedule="cosine"), "text"),
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

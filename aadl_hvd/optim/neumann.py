"""The Neumann optimizer: implicit inversion of mini-batch Hessians at the cost of momentum SGD."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from aadl_hvd.errors import AndersonError, ConfigError, UnsupportedError
from aadl_hvd.optim.job import check_whole

VARIABLES: Final = ("parameters", "tensors")
# Groups cannot differ in these: the norms, t and K are those of all groups together.
_SHARED: Final = ("steps_per_epoch", "warmup_epochs", "reset_epochs", "variables")

# The work of one call of `step` in one group: the group, parameters, gradients, m, v.
_Work = tuple[dict[str, Any], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


class NeumannOptimizer(torch.optim.Optimizer):
    """Krishnan, Xiao, Saurous, "Neumann Optimizer" (arXiv 1712.03298), Algorithm 2.

    With the mini-batch's gradient g at the stored weights w, their moving average v, delta = w - v:

        t = 1 (mod K):  d = g                                                           (a reset)
                        m <- -lr d
        otherwise:      d = g + (alpha |delta|^2 - beta / |delta|^2) delta / |delta|
                        m <- mu(t) m - lr d
        always:         w <- w + mu(t) m - lr d
                        v <- w + gamma (v - w)
        to evaluate:    w - mu(t) m          (`evaluation_weights`, `evaluated_parameters`)

    Where the source leaves a choice:

    - |delta| is the norm over all parameters of the optimizer together: the source's w is one
      vector. It is accumulated in float64. (Only with `hvd.Adasum`, which updates tensor by tensor,
      it is the norm of each tensor.)
    - The regularizer is left out if delta is 0, or so small that the regularizer would overflow.
    - t counts the steps after the warm-up, from 1. Resets do not change it. So mu(t) =
      1 - 1/(1 + t), clipped to [mu_min, mu_max], rises once ("during training") and stays.
    - K counts the steps since the last reset: resets are at t = 1, 1 + K, 1 + K + 2K, ... for the
      first K. It doubles at each reset but the first.
    - In the warm-up w <- w - lr g, m is 0, and v already follows w. So delta is not the difference
      of two successive iterates when the repulsion begins.
    - weight_decay is part of the objective: weight_decay w is added to g, in the warm-up too.
    - lr is that of the present step, as a schedule has set it. The terms of earlier steps in m keep
      theirs.
    - Groups have their own lr, weight_decay, alpha, beta, gamma, mu_min and mu_max. |delta|, the
      number of variables, t and K are those of all groups.
    - A parameter without a gradient does not move. It is not counted in |delta| or in the number of
      variables. When it first has a gradient it begins with m = 0 and v = w.

    The state exists from the construction on. It has `m` and `v` in the parameter's dtype, and the
    integers `step`, `t`, `reset_at` and `period`, the same for all parameters. So
    `hvd.broadcast_optimizer_state` need not make it by a step on zero gradients, which would also
    apply the weight decay. The state survives `hvd.DistributedOptimizer(optimizer)`, which makes a
    new optimizer of the groups.

    Memory: m and v, and one more copy of the weights during a step and during evaluation.

    Args:
        params: parameters or groups of them, as for all torch optimizers.
        lr: at least 0. Required, here or in every group.
        steps_per_epoch: calls of `step` in one epoch, on one rank; at least 1. Required.
        alpha: weight of the cubic regularizer; at least 0.
        beta: weight of the repulsion, per variable; at least 0.
        gamma: decay of the moving average; in [0, 1].
        mu_min: lower bound of mu(t); in [0, 1].
        mu_max: upper bound of mu(t); in [mu_min, 1].
        warmup_epochs: epochs of plain SGD before t = 1; at least 0. As steps: rounded. With 0 the
            repulsion begins at a tiny |delta|, and its first push may be larger than the weights.
        reset_epochs: the first K, in epochs; greater than 0. As steps: rounded, and at least 1.
        variables: what is counted as a variable, for the factor of beta: "parameters" (scalars) or
            "tensors" (what TensorFlow, the source's framework, calls variables).
        weight_decay: at least 0.

    Raises:
        ConfigError: a value is not allowed, or groups differ where they cannot; the message names
            parameter, value and range.
        UnsupportedError: complex parameters; sharded ones (FSDP), since a process knows only a part
            of their norm; sparse gradients; `step` in `evaluation_weights`.
    """

    _evaluating = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        steps_per_epoch: int | None = None,
        *,
        alpha: float = 1e-7,
        beta: float = 1e-5,
        gamma: float = 0.99,
        mu_min: float = 0.5,
        mu_max: float = 0.9,
        warmup_epochs: float = 5,
        reset_epochs: float = 10,
        variables: str = "parameters",
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "steps_per_epoch": steps_per_epoch,
            "alpha": alpha,
            "beta": beta,
            "gamma": gamma,
            "mu_min": mu_min,
            "mu_max": mu_max,
            "warmup_epochs": warmup_epochs,
            "reset_epochs": reset_epochs,
            "variables": variables,
            "weight_decay": weight_decay,
        }
        # Horovod passes the groups of another optimizer and nothing else.
        alone = lr is None and steps_per_epoch is None
        before = params if isinstance(params, _Groups) and alone else None
        if before is not None:
            defaults = {name: before.defaults[name] for name in defaults}
        super().__init__(params, defaults)
        if before is not None:
            self.state.update(before.state)
        self.param_groups = _Groups(self.param_groups, self)
        self._allocate()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; settings that the group does not have are those of the constructor."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except AndersonError:
            self.param_groups.pop()
            raise
        if isinstance(self.param_groups, _Groups):  # else not yet constructed
            self._allocate()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what the closure returned, if one is given."""
        self._refuse_while_evaluating("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._update()
        return loss

    def evaluated_parameters(self) -> list[Tensor]:
        """Copies of the weights to evaluate, w - mu m, in the order of the parameter groups."""
        self._refuse_while_evaluating("evaluated_parameters()")
        with torch.no_grad():
            return [p.sub(m, alpha=mu) if mu else p.clone() for p, m, mu in self._to_evaluate()]

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Context in which the parameters are w - mu m. On leaving w is restored bit for bit.

        Buffers, such as the statistics of batch normalization, stay those of w.
        """
        self._refuse_while_evaluating("evaluation_weights()")
        moved = [(p, m, mu, p.detach().clone()) for p, m, mu in self._to_evaluate() if mu]
        self._evaluating = True
        try:
            with torch.no_grad():
                for p, m, mu, _ in moved:
                    p.sub_(m, alpha=mu)
            yield
        finally:
            with torch.no_grad():
                for p, _, _, w in moved:
                    p.copy_(w)
            del self._evaluating  # back to the class's: nothing is kept outside of the state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.param_groups = _Groups(self.param_groups, self)

    def _update(self) -> None:
        work = self._work()
        if not work:
            return
        clock = self._clock().tick(self.param_groups[0])
        if clock.is_plain or clock.is_reset:
            for group, weights, gradients, iterates, averages in work:
                rate, decay = float(group["lr"]), float(group["weight_decay"])
                directions = gradients
                if decay:
                    directions = _added(gradients, weights, decay)
                if clock.is_reset:
                    torch._foreach_zero_(iterates)
                    torch._foreach_add_(iterates, directions, alpha=-rate)
                    torch._foreach_add_(weights, iterates, alpha=clock.mu(group))
                torch._foreach_add_(weights, directions, alpha=-rate)
                torch._foreach_lerp_(averages, weights, 1 - group["gamma"])
        else:
            self._regularized(work, clock)
        for _, weights, *_ in work:
            for p in weights:
                self.state[p].update(clock._asdict())

    def _regularized(self, work: list[_Work], clock: _Clock) -> None:
        """Takes a step with d = g + ..., where |delta| is the norm over all groups."""
        deltas = [torch._foreach_sub(weights, averages) for _, weights, _, _, averages in work]
        everything = [delta for part in deltas for delta in part]
        squared = _squared_norm(everything)
        largest = min(torch.finfo(delta.dtype).max for delta in everything)
        tensors = self.param_groups[0]["variables"] == "tensors"
        count = len(everything) if tensors else sum(delta.numel() for delta in everything)
        for (group, weights, gradients, iterates, averages), directions in zip(
            work, deltas, strict=True
        ):
            rate, decay, mu = float(group["lr"]), float(group["weight_decay"]), clock.mu(group)
            factor = _regularizer(group["alpha"], group["beta"] * count, squared, largest)
            torch._foreach_mul_(directions, factor)
            torch._foreach_add_(directions, gradients)
            if decay:
                torch._foreach_add_(directions, weights, alpha=decay)
            torch._foreach_mul_(iterates, mu)
            torch._foreach_add_(iterates, directions, alpha=-rate)
            torch._foreach_add_(weights, iterates, alpha=mu)
            torch._foreach_add_(weights, directions, alpha=-rate)
            torch._foreach_lerp_(averages, weights, 1 - group["gamma"])

    def _work(self) -> list[_Work]:
        work: list[_Work] = []
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            gradients = [cast(Tensor, p.grad) for p in weights]
            if any(gradient.is_sparse for gradient in gradients):
                raise UnsupportedError(
                    "Invalid gradient: it is sparse. NeumannOptimizer moves all weights in every "
                    "step; give such parameters to another optimizer, or make them dense."
                )
            for p in weights:
                if not self.state.get(p, {}).get("step"):
                    # Here and not at construction: weights are often loaded after that.
                    self.state[p] = _fresh(p)
            states = [self.state[p] for p in weights]
            if weights:
                iterates, averages = [s["m"] for s in states], [s["v"] for s in states]
                work.append((group, weights, gradients, iterates, averages))
        return work

    def past_weights(self) -> list[tuple[Tensor, Tensor]]:
        """Returns each parameter with v, the moving average of its past values, if there is one.

        Acceleration moves v along with the weights, so that delta = w - v does not change.
        """
        states = [(p, self.state.get(p, {})) for g in self.param_groups for p in g["params"]]
        return [(p, state["v"]) for p, state in states if "v" in state]

    def _clock(self) -> _Clock:
        """The optimizer's counters: those of the parameter that was updated last."""
        states = [self.state[p] for g in self.param_groups for p in g["params"] if p in self.state]
        latest = max(states, key=lambda state: int(state["step"]), default=None)
        return _Clock() if latest is None else _Clock(*(latest[name] for name in _Clock._fields))

    def _to_evaluate(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Yields parameter, m and mu; mu is 0 if there is nothing to subtract."""
        clock = self._clock()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p, {})
                mu = clock.mu(group) if clock.t and state.get("step") else 0.0
                yield p, state.get("m", p), mu

    def _allocate(self) -> None:
        """Makes the state before the first step, alike on all ranks, for Horovod to broadcast."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and p not in self.state:
                    self.state[p] = _fresh(p)

    def _refuse_while_evaluating(self, what: str) -> None:
        if self._evaluating:
            raise UnsupportedError(
                f"Invalid {what} inside evaluation_weights(): the parameters are not the weights "
                "that are trained. Leave the context first."
            )

    def _check(self, group: dict[str, Any]) -> None:
        rate = group["lr"]
        if isinstance(rate, Tensor) and rate.numel() == 1:
            rate = rate.item()
        _check_real("lr", rate, 0.0, math.inf)
        steps = group["steps_per_epoch"]
        if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 1:
            raise ConfigError(
                f"Invalid steps_per_epoch={steps!r}. Must be an integer >= 1: the number of calls "
                "of step() in one epoch. It has no default."
            )
        for name in ("alpha", "beta", "warmup_epochs", "weight_decay"):
            _check_real(name, group[name], 0.0, math.inf)
        for name in ("gamma", "mu_min"):
            _check_real(name, group[name], 0.0, 1.0)
        _check_real("mu_max", group["mu_max"], group["mu_min"], 1.0)
        _check_real("reset_epochs", group["reset_epochs"], 0.0, math.inf, low_open=True)
        if group["variables"] not in VARIABLES:
            raise ConfigError(
                f"Invalid variables={group['variables']!r}. Must be one of {VARIABLES}."
            )
        for name in _SHARED:
            first = self.param_groups[0][name]
            if group[name] != first:
                raise ConfigError(
                    f"Invalid {name}={group[name]!r} of parameter group "
                    f"{len(self.param_groups) - 1}. Must be {first!r}, as in the first group: "
                    "all groups share it."
                )
        for p in group["params"]:
            check_whole(p)
            if not p.is_floating_point():
                raise UnsupportedError(
                    f"Invalid parameter of dtype {p.dtype}. Must be real and floating-point; view "
                    "complex ones with torch.view_as_real."
                )


class _Clock(NamedTuple):
    """Counters of an optimizer, kept in the state of each of its parameters."""

    step: int = 0  # all steps
    t: int = 0  # those after the warm-up
    reset_at: int = 0  # t of the last reset
    period: int = 0  # K; 0: not begun

    def tick(self, shared: dict[str, Any]) -> _Clock:
        step, t, per_epoch = self.step + 1, self.t, shared["steps_per_epoch"]
        if not t and step <= round(shared["warmup_epochs"] * per_epoch):
            return self._replace(step=step)
        t += 1
        if t - self.reset_at < self.period:
            return self._replace(step=step, t=t)
        first = max(1, round(shared["reset_epochs"] * per_epoch))
        return _Clock(step, t, reset_at=t, period=2 * self.period or first)

    @property
    def is_plain(self) -> bool:
        return self.t == 0

    @property
    def is_reset(self) -> bool:
        return self.t > 0 and self.t == self.reset_at

    def mu(self, group: dict[str, Any]) -> float:
        return float(min(max(1 - 1 / (1 + self.t), group["mu_min"]), group["mu_max"]))


class _Groups(list[dict[str, Any]]):
    """Parameter groups that keep the state and defaults of their optimizer.

    `hvd.DistributedOptimizer` passes only the groups to the optimizer it makes.
    """

    def __init__(self, groups: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> None:
        super().__init__(groups)
        self.state = optimizer.state
        self.defaults = optimizer.defaults


def _fresh(p: Tensor) -> dict[str, Any]:
    w = p.detach()
    return {"m": torch.zeros_like(w), "v": w.clone(), **_Clock()._asdict()}


def _added(gradients: list[Tensor], weights: list[Tensor], decay: float) -> list[Tensor]:
    return list(torch._foreach_add(gradients, weights, alpha=decay))


def _squared_norm(tensors: list[Tensor]) -> float:
    """The squared norm of all tensors together, in float64."""
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float64)
    return float(torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum())


def _regularizer(alpha: float, beta: float, squared: float, largest: float) -> float:
    """The factor of delta; 0 if its magnitude would exceed `largest`."""
    cubed = squared * math.sqrt(squared)
    if cubed == 0.0:
        return 0.0
    factor = (alpha * squared - beta / squared) / math.sqrt(squared)
    return 0.0 if abs(factor) > largest else factor


def _check_real(name: str, value: Any, low: float, high: float, *, low_open: bool = False) -> None:
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool)
    ok = ok and math.isfinite(value) and low <= value <= high
    if not ok or (low_open and value == low):
        lower = f"> {low:g}" if low_open else f">= {low:g}"
        upper = "" if math.isinf(high) else f" and <= {high:g}"
        raise ConfigError(f"Invalid {name}={value!r}. Must be a finite number {lower}{upper}.")

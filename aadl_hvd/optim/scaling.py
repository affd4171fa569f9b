"""The diagonal M: the step that a torch optimizer makes of a gradient in the long run.

    M = lr / (1 - momentum) * preconditioner

The first factor is the sum of all steps that a single gradient of 1 leads to,
with Nesterov's momentum as without. The preconditioner is
what Adam and its kin, RMSprop, Adagrad and Adadelta multiply a gradient by, coordinate by
coordinate, for example 1 / (sqrt(v) + eps). For other optimizers it is 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadl_hvd.optim.shards import local

# One of optimizer.param_groups; what optimizer.state has of a parameter.
Group = dict[str, Any]
State = dict[str, Any]

# The optimizers with a preconditioner. AdamW is a subclass of Adam.
_PRECONDITIONED = (
    torch.optim.Adam,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
)


_SCALE_FREE = {"muon", "lion", "adafactor", "signsgd", "signum", "lars", "lamb"}


def preconditioned(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer has a preconditioner."""
    return isinstance(optimizer, _PRECONDITIONED)


def scale_free(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's step does not depend on the size of the gradient.

    M is not known for these: a gradient that is twice as large makes the same step. Those of other
    libraries are told by the name of their class.
    """
    if isinstance(optimizer, (torch.optim.Adafactor, torch.optim.Rprop, torch.optim.Muon)):
        return True
    return not _SCALE_FREE.isdisjoint(cls.__name__.lower() for cls in type(optimizer).__mro__)


def learning_rate(group: Group) -> float:
    """The learning rate of a parameter group; 1 if it has none."""
    return float(group.get("lr", 1.0))


def long_run_rate(group: Group) -> float:
    """lr (1 - dampening) / (1 - momentum): the sum of all steps that a gradient of 1 leads to."""
    momentum = group.get("momentum", 0.0)
    if isinstance(momentum, np.number) or (isinstance(momentum, Tensor) and momentum.numel() == 1):
        momentum = float(momentum)
    if not isinstance(momentum, int | float) or not 0.0 < momentum < 1.0:
        return learning_rate(group)
    return learning_rate(group) * (1.0 - float(group.get("dampening", 0.0))) / (1.0 - momentum)


def momentum_of(group: Group) -> float:
    """mu: `momentum`, or the first of `betas`, as in Adam; 0 for none, below 1."""
    first = group["betas"][0] if "betas" in group else group.get("momentum", 0.0)
    if isinstance(first, np.number) or (isinstance(first, Tensor) and first.numel() == 1):
        first = float(first)
    if not isinstance(first, int | float) or not 0.0 < first < 1.0:
        return 0.0
    return float(first)


def decay_of(optimizer: torch.optim.Optimizer, group: Group) -> tuple[float, float, bool]:
    """How gradient and weights of a group enter the residual -(sign * g + decay * w).

    Returns:
        The sign of the gradient, -1 for `maximize`; the weight decay; and whether the decay is
        decoupled from the preconditioner, as in AdamW.
    """
    sign = -1.0 if group.get("maximize", False) else 1.0
    decoupled = isinstance(optimizer, torch.optim.AdamW) or bool(
        group.get("decoupled_weight_decay", False)
    )
    return sign, float(group.get("weight_decay", 0.0)), decoupled


def preconditioner_of(
    optimizer: torch.optim.Optimizer, group: Group, state: State, rows: slice, dtype: torch.dtype
) -> Tensor | None:
    """What the optimizer multiplies some rows of a gradient by, beside its rate.

    Args:
        optimizer: any.
        group: the parameter's group.
        state: the optimizer's state of the parameter; it is read, and never changed.
        rows: of the flat parameter.
        dtype: of the result.

    Returns:
        [rows] on the parameter's device; None stands for ones.
    """

    def read(name: str) -> Tensor:  # may be the optimizer's own memory: not to be changed in place
        piece: Tensor = local(state[name]).reshape(-1)[rows]
        return piece.to(dtype)

    found: Tensor
    if not state or not preconditioned(optimizer):
        return None
    if isinstance(optimizer, torch.optim.Adagrad):
        decay = 1.0 + (_steps(state) - 1.0) * float(group["lr_decay"])
        found = 1.0 / (decay * (read("sum").sqrt() + group["eps"]))
    elif isinstance(optimizer, torch.optim.RMSprop):
        v = read("square_avg")
        v = v - read("grad_avg").square() if group["centered"] else v
        found = 1.0 / (v.clamp_min(0.0).sqrt_() + group["eps"])
    elif isinstance(optimizer, torch.optim.Adadelta):
        moved, seen = read("acc_delta") + group["eps"], read("square_avg") + group["eps"]
        found = (moved / seen).sqrt_()
    elif isinstance(optimizer, torch.optim.Adamax):
        found = 1.0 / read("exp_inf")  # it includes eps
    else:
        v = read("max_exp_avg_sq" if group.get("amsgrad", False) else "exp_avg_sq")
        found = of_second_moment(group, _steps(state), v)
        if isinstance(optimizer, torch.optim.RAdam):  # does not divide in its first steps
            factor = _rectification(group["betas"][1], _steps(state)).to(found)
            found = torch.where(factor > 0.0, factor * found, 1.0)
    return found


def of_second_moment(
    group: Group, steps: float | Tensor, v: Tensor, out: Tensor | None = None
) -> Tensor:
    """1 / (sqrt(v / (1 - beta^t)) + eps), as in Adam.

    Args:
        group: with "betas" and "eps".
        steps: t.
        v: [rows]; it is not changed, unless it is `out`.
        out: memory for the result, [rows]; None: new memory. No more is taken.
    """
    v = torch.div(v, 1.0 - group["betas"][1] ** steps, out=out)
    return v.sqrt_().add_(group["eps"]).reciprocal_()


def second_moments(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], groups: list[Group]
) -> tuple[list[Tensor], list[float]] | None:
    """v and t of some parameters, where Adam's or AdamW's preconditioner is all there is to M.

    Returns:
        None if it is another optimizer, a parameter has no state yet, or a state is on a device
        that would have to be waited for.
    """
    if not isinstance(optimizer, torch.optim.Adam) or any(g.get("amsgrad", False) for g in groups):
        return None
    states = [*map(optimizer.state.get, parameters)]
    if not all(states):
        return None
    steps = [state["step"] for state in states if state]
    v = [state["exp_avg_sq"] for state in states if state]
    if {*map(type, v)} - {Tensor}:  # sharded
        v = [*map(local, v)]
    if not {*map(type, steps)} - {Tensor}:
        if any(step.device.type != "cpu" for step in steps):
            return None
        if not any(map(Tensor.dim, steps)):
            return v, torch.stack(steps).tolist() if steps else []  # one call
    elif any(isinstance(step, Tensor) and step.device.type != "cpu" for step in steps):
        return None
    return v, [float(step) for step in steps]


def _steps(state: State) -> Any:
    """Number of steps taken: a float, or a tensor if the optimizer keeps it on the device."""
    step = state["step"]
    return step.double() if isinstance(step, Tensor) else float(step)


def _rectification(beta: float, steps: float | Tensor) -> Tensor:
    """r_t of RAdam (Liu et al. 2020, Algorithm 2), []; 0 as long as RAdam does not divide."""
    longest = 2.0 / (1.0 - beta) - 1.0
    length = longest - 2.0 * steps * beta**steps / (1.0 - beta**steps)
    if not isinstance(length, Tensor):
        length = torch.tensor(length, dtype=torch.float64, device="cpu")
    length = length.double()
    ratio = (length - 4.0) * (length - 2.0) * longest
    ratio = ratio / ((longest - 4.0) * (longest - 2.0) * length)
    return torch.where(length > 5.0, ratio.clamp_min(0.0).sqrt(), 0.0)

"""A torch optimizer seen as a fixed-point iteration w <- G(w), with three notions of residual.

    step       r = G(w) - w                            paper, Eq. 1
    gradient   r = -lr (g + weight_decay w)            what SGD without momentum would do (Eq. 9)
    state      the same as "step" for x = (w, lr v), v the momentum buffers of torch.optim.SGD

With momentum the map is G(w, v): a residual of w alone ("step") is not a function of w.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from aadl_hvd.errors import UnsupportedError
from aadl_hvd.flatten import FlatLayout

# Rows of the flat gradient, and the parameters that have none.
_Gradient = tuple[Tensor, set[int]]


class OptimizerFixedPoint:
    """Implements `accelerator.FixedPoint` on a `torch.optim.Optimizer`.

    Args:
        optimizer: whose parameter groups and state are read and written.
        residual: "step", "gradient" or "state".
        weights_before: where a parameter's value before the step is kept (Adasum changes
            parameters during the backward pass); None: in the parameter itself.

    Raises:
        UnsupportedError: parameters or optimizer cannot be accelerated in this way.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        residual: str,
        weights_before: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._residual = residual
        self._weights_before = weights_before or (lambda parameter: parameter)
        self.base_step: Callable[[], Any]
        self.evaluate: Callable[[], float]
        self._last_rates: tuple[float, ...] = ()
        self._due: tuple[int, int, Tensor] | None = None
        self._gradient: _Gradient | None = None
        self._check()
        self._refresh()

    # What is accelerated

    @property
    def signature(self) -> Hashable:
        self._refresh()
        parameters = tuple((id(p), p.shape, p.dtype, p.device) for p in self._parameters)
        decays = tuple(group.get("weight_decay", 0) for group in self._groups)
        rates = tuple(_learning_rate(group) for group in self._groups)
        if self._residual != "state":
            if not any(rates):  # as at the start of a warm-up: what they were, or will be
                initial = (float(group.get("initial_lr", 1.0)) for group in self._groups)
                rates = self._last_rates or tuple(initial)
            self._last_rates = rates
            # Only ratios matter; rounded, so that a schedule's last bit does not count.
            largest = max(rates, default=1.0) or 1.0
            rates = tuple(float(f"{rate / largest:.6g}") for rate in rates)
        return parameters, decays, rates

    @property
    def n(self) -> int:
        return self._layout.n

    @property
    def dtype(self) -> torch.dtype:
        dtypes = (p.dtype for p in self._parameters)
        return functools.reduce(torch.promote_types, dtypes, torch.float16)

    @property
    def device(self) -> torch.device:
        return self._parameters[0].device if self._parameters else torch.device("cpu")

    @property
    def residual_scale(self) -> float:
        if self._residual == "state":
            return 1.0
        return max((abs(_learning_rate(group)) for group in self._groups), default=0.0)

    def read_before(self, lo: int, hi: int, out: Tensor) -> Tensor:
        if self._residual == "gradient":
            self._due = lo, hi, torch.empty_like(out)
        self._gradient = None
        parameters = [self._weights_before(p) for p in self._parameters]
        return self._read(parameters, lo, hi, out)

    def keep_gradient(self) -> None:
        """To be called when the gradients are final and the optimizer has not yet used them.

        Some overwrite them: torch.optim.SGD with Nesterov momentum and foreach, its default on
        GPUs, adds the momentum to them. Costs nothing in a step that does not need a residual.
        """
        if self._due is not None:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self._gradient = self._read_gradient(*self._due)

    def forget_gradient(self) -> None:
        """Ends a step, also one that raised before its residual was read."""
        self._due = self._gradient = None

    def read(self, lo: int, hi: int, out: Tensor) -> Tensor:
        return self._read(self._parameters, lo, hi, out)

    def read_residual(self, lo: int, hi: int, w: Tensor, out: Tensor) -> Tensor:
        gradient, self._gradient, self._due = self._gradient, None, None
        if self.residual_scale == 0.0:  # every learning rate is 0: nothing to divide by or to gain
            return out.zero_()
        if self._residual == "gradient":
            return self._scaled(gradient or self._read_gradient(lo, hi, out), lo, hi, w)
        return self.read(lo, hi, out).sub_(w).div_(self.residual_scale)

    def write(self, flat: Tensor) -> None:
        if self._residual != "state":
            return self._layout.write(self._parameters, flat)
        # At rate 0 the state says nothing of the momentum: it stays what it is.
        pairs = list(zip(self._momenta(), self._rates, strict=True))
        momenta = [momentum if rate else None for momentum, rate in pairs]
        self._layout.write([*self._parameters, *momenta], flat)
        for momentum, rate in pairs:
            if momentum is not None and rate:
                momentum.div_(rate)

    # What it does

    def advance(self) -> Any:
        return self.base_step()

    def snapshot(self) -> Callable[[], None]:
        state = self._optimizer.state
        saved = {key: {k: _copied(v) for k, v in entry.items()} for key, entry in state.items()}

        def restore() -> None:
            for key in list(state):
                if key not in saved:
                    del state[key]
            for key, entry in saved.items():
                state[key].clear()
                state[key].update(entry)

        return restore

    def loss(self) -> float:
        return self.evaluate()

    # How

    def _refresh(self) -> None:
        self._groups = self._optimizer.param_groups
        pairs = [(p, group) for group in self._groups for p in group["params"] if p.requires_grad]
        self._parameters: list[Tensor] = [p for p, _ in pairs]
        self._group_of = [group for _, group in pairs]
        self._rates = [_learning_rate(group) for group in self._group_of]
        shapes = [p.shape for p in self._parameters]
        # The momentum of a parameter that has none yet reads as zeros.
        self._layout = FlatLayout(shapes * 2 if self._residual == "state" else shapes)
        if len({p.device for p in self._parameters}) > 1:
            devices = sorted({str(p.device) for p in self._parameters})
            raise UnsupportedError(
                f"Invalid parameters on several devices {devices}. All trainable parameters of "
                "one optimizer must be on one device."
            )

    def _check(self) -> None:
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad and not p.is_floating_point():
                    raise UnsupportedError(
                        f"Invalid parameter of dtype {p.dtype}. Trainable parameters must be real "
                        "floating-point tensors; view complex ones with torch.view_as_real."
                    )
        if isinstance(self._optimizer, torch.optim.LBFGS) and self._residual != "step":
            raise UnsupportedError(
                f"Invalid residual={self._residual!r} for LBFGS, which evaluates several "
                "gradients in one step. Must be 'step'."
            )
        if self._residual == "state" and not isinstance(self._optimizer, torch.optim.SGD):
            raise UnsupportedError(
                f"Invalid residual='state' for {type(self._optimizer).__name__}. It knows the "
                "momentum buffers of torch.optim.SGD only; use 'gradient'."
            )

    def _momenta(self) -> list[Tensor | None]:
        state = self._optimizer.state
        return [state[p].get("momentum_buffer") if p in state else None for p in self._parameters]

    def _read(self, parameters: Sequence[Tensor], lo: int, hi: int, out: Tensor) -> Tensor:
        if self._residual != "state":
            return self._layout.read(parameters, lo, hi, out)
        self._layout.read([*parameters, *self._momenta()], lo, hi, out)
        count = len(parameters)
        for index, first, last in self._layout.segments(lo, hi):
            if index >= count:
                out[first - lo : last - lo].mul_(self._rates[index - count])
        return out

    def _read_gradient(self, lo: int, hi: int, out: Tensor) -> _Gradient:
        gradients = [p.grad for p in self._parameters]
        absent = {index for index, gradient in enumerate(gradients) if gradient is None}
        return self._layout.read(gradients, lo, hi, out), absent

    def _scaled(self, found: _Gradient, lo: int, hi: int, w: Tensor) -> Tensor:
        """The residual, in place of the gradient."""
        gradient, absent = found
        largest = self.residual_scale
        for index, first, last in self._layout.segments(lo, hi):
            if index in absent:
                continue  # no optimizer touches it, weight decay or not
            group, rows = self._group_of[index], slice(first - lo, last - lo)
            sign = -1.0 if group.get("maximize", False) else 1.0
            weight_decay = float(group.get("weight_decay", 0.0))
            if weight_decay:
                gradient[rows].add_(w[rows], alpha=sign * weight_decay)
            gradient[rows].mul_(-sign * self._rates[index] / largest)
        return gradient


def _learning_rate(group: dict[str, Any]) -> float:
    return float(group.get("lr", 1.0))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)

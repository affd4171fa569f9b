"""A torch optimizer seen as a fixed-point iteration w <- G(w), with two notions of residual.

    step       r = G(w) - w                      paper, Eq. 1
    gradient   r = -(g + weight_decay w)         mixed in by M: what the optimizer makes of r

With momentum the map is G(w, v): a residual of w alone ("step") is not a function of w.

M is diagonal: lr / (1 - momentum), the step that a constant gradient leads to in the end, divided
by sqrt(v) + eps where the optimizer divides by it (Adam and its kin, RMSprop, Adagrad). So
"gradient" columns do not depend on the learning rate at all. What decoupled weight decay (AdamW)
adds to r is weight_decay w (sqrt(v) + eps): r is zero where that optimizer rests.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadl_hvd.core.noise import Deviations, GradientSamples
from aadl_hvd.errors import UnsupportedError
from aadl_hvd.optim.flatten import FlatLayout
from aadl_hvd.optim.job import check_whole

# The base optimizer's state by the parameters' places: {"entries"}.
Undo = dict[str, Any]
# Rows of the flat gradient, and the parameters that have none.
_Gradient = tuple[Tensor, set[int]]


class OptimizerFixedPoint:
    """Implements `accelerator.FixedPoint` on a `torch.optim.Optimizer`.

    Args:
        optimizer: whose parameter groups and state are read and written.
        residual: "step" or "gradient".
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
        self.skip_step: Callable[[], Any]
        self.evaluate: Callable[[], float]
        self.samples: GradientSamples | None = None
        self._sampling: tuple[int, float, Callable[[], bool] | None] | None = None
        self._hooks: list[Any] = []
        self._last_rates: tuple[float, ...] = ()
        self._due: tuple[int, int, Tensor] | None = None
        self._gradient: _Gradient | None = None
        self._layout = FlatLayout([])
        self._deviations: Deviations | None = None
        self._check()
        self._refresh()

    def sample_gradients(
        self, samples: int, factor: float, wanted: Callable[[], bool] | None = None
    ) -> None:
        """Has the noise of the gradient measured.

        Args:
            samples: see `GradientSamples`.
            factor: see `GradientSamples`.
            wanted: makes hooks that take a sample after every backward pass in which it says so;
                None: samples are handed in by others.
        """
        self._sampling = samples, factor, wanted
        self._make_samples()

    def sample_no_gradients(self) -> None:
        """Ends what `sample_gradients` began."""
        self._sampling = self.samples = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # What is accelerated

    @property
    def signature(self) -> Hashable:
        self._refresh()
        parameters = tuple((id(p), p.shape, p.dtype, p.device) for p in self._parameters)
        decays = tuple(group.get("weight_decay", 0) for group in self._groups)
        rates = tuple(_learning_rate(group) for group in self._groups)
        if not any(rates):  # as at the start of a warm-up: what they were, or will be
            initial = (float(group.get("initial_lr", 1.0)) for group in self._groups)
            rates = self._last_rates or tuple(initial)
        self._last_rates = rates
        if self._residual == "gradient":
            rates = tuple(map(bool, rates))  # what moves at all
        else:
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
    def tensors(self) -> list[Tensor]:
        return [*self._parameters]

    @property
    def moves(self) -> bool:
        return any(_learning_rate(group) for group in self._groups)

    @property
    def uniform_scaling(self) -> float | None:
        if self._residual == "step":
            return max((abs(rate) for rate in self._rates), default=0.0)
        rates = {_long_run_rate(group) for group in self._groups}
        if len(rates) == 1 and not isinstance(self._optimizer, _DIVIDING):
            return rates.pop()
        return None

    def scaling(self, lo: int, hi: int) -> float | Tensor:
        if (uniform := self.uniform_scaling) is not None:
            return uniform
        rates = {id(group): _long_run_rate(group) for group in self._groups}
        scaling = torch.empty(hi - lo, dtype=self._work_dtype, device=self.device)
        for index, first, last in self._layout.segments(lo, hi):
            rows = scaling[first - lo : last - lo]
            rows.fill_(rates[id(self._group_of[index])])
            if (preconditioner := self._preconditioner(index, first, last)) is not None:
                rows.mul_(preconditioner)
        return scaling

    def deviations(self) -> Deviations | None:
        found, self._deviations = self._deviations, None
        return found

    def read_before(self, lo: int, hi: int, out: Tensor, residual: Tensor) -> Tensor:
        if self._residual == "gradient":
            self._due = lo, hi, residual
        self._gradient = None
        parameters = [self._weights_before(p) for p in self._parameters]
        return self._layout.read(parameters, lo, hi, out)

    def keep_gradient(self) -> None:
        """To be called when the gradients are final and the optimizer has not yet used them.

        Some overwrite them: torch.optim.SGD with Nesterov momentum and foreach, its default on
        GPUs, adds the momentum to them. Costs nothing in a step that does not need a residual.
        """
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if self._due is not None:
                self._gradient = self._read_gradient(*self._due)
            if self.samples is not None:
                self._deviations = self.samples.deviations()

    def forget_gradient(self) -> None:
        """Ends a step, also one that raised before its residual was read."""
        self._due = self._gradient = self._deviations = None

    def read(self, lo: int, hi: int, out: Tensor) -> Tensor:
        return self._layout.read(self._parameters, lo, hi, out)

    def read_residual(self, lo: int, hi: int, w: Tensor, out: Tensor) -> Tensor:
        gradient, self._gradient, self._due = self._gradient, None, None
        if not self.moves:  # every learning rate is 0: nothing to divide by or to gain
            return out.zero_()
        if self._residual == "gradient":
            return self._with_decay(gradient or self._read_gradient(lo, hi, out), lo, hi, w)
        scale = self.scaling(lo, hi)  # residuals are proportional to it, and outlive it
        return self.read(lo, hi, out).sub_(w).div_(scale)

    def write(self, flat: Tensor, lo: int = 0) -> None:
        self._layout.write(self._parameters, flat, lo)

    # What it does

    def advance(self) -> Any:
        return self.base_step()

    def hold(self) -> Callable[[], None]:
        """Copies the weights; the result puts them back."""
        tensors: list[Tensor] = list(self._parameters)
        saved = [tensor.detach().clone() for tensor in tensors]

        def restore() -> None:
            with torch.no_grad():
                torch._foreach_copy_(tensors, saved)

        return restore

    def skip(self) -> Any:
        return self.skip_step()

    def snapshot(self) -> Undo:
        entries = {key: {k: _copied(v) for k, v in e.items()} for key, e in self._entries()}
        return {"entries": entries}

    def restore(self, undo: Undo) -> None:
        state, keys = self._optimizer.state, self._keys()
        for key, p in keys.items():
            if key not in undo["entries"]:
                state.pop(p, None)
        for key, saved in undo["entries"].items():
            entry = state[keys[key]]
            # Some of it may lie on the host (step), and what is restored may come from a file.
            saved = {k: _placed(v, entry.get(k), keys[key]) for k, v in saved.items()}
            entry.clear()
            entry.update(saved)

    @property
    def last_rates(self) -> tuple[float, ...]:
        """Learning rates when they were not all 0 last: what `signature` goes by where they are."""
        return self._last_rates

    @last_rates.setter
    def last_rates(self, rates: tuple[float, ...]) -> None:
        self._last_rates = rates

    @property
    def settings(self) -> list[list[float]]:
        """What stored pairs depend on beside the parameters, in plain types."""
        signature: Any = self.signature
        _, decays, rates = signature
        return [[float(value) for value in values] for values in (decays, rates)]

    @property
    def config_lines(self) -> list[str]:
        plain = int, float, bool, str, tuple, type(None)
        lines = []
        for i, group in enumerate(self._optimizer.param_groups):
            lines += [f"group {i}: {k}={v}" for k, v in group.items() if isinstance(v, plain)]
            trained = [p.requires_grad for p in group["params"]]
            lines += [f"parameter {i}.{j}: requires_grad={x}" for j, x in enumerate(trained)]
        return lines

    def state_tensors(self) -> list[Tensor]:
        entries = [self._optimizer.state.get(p, {}) for p in self._parameters]
        found = (entry[key] for entry in entries for key in sorted(entry))
        return [value for value in found if isinstance(value, Tensor)]

    def loss(self) -> float:
        return self.evaluate()

    # How

    def _keys(self) -> dict[int, Tensor]:
        """The parameters by their place among all groups', as in a state_dict."""
        groups = self._optimizer.param_groups
        return dict(enumerate(p for group in groups for p in group["params"]))

    def _entries(self) -> list[tuple[int, dict[str, Any]]]:
        state = self._optimizer.state
        return [(key, state[p]) for key, p in self._keys().items() if p in state]

    def _refresh(self) -> None:
        self._groups = self._optimizer.param_groups
        before = [id(p) for p in getattr(self, "_parameters", [])]
        pairs = [(p, group) for group in self._groups for p in group["params"] if p.requires_grad]
        self._parameters: list[Tensor] = [p for p, _ in pairs]
        self._group_of = [group for _, group in pairs]
        self._rates = [_learning_rate(group) for group in self._group_of]
        shapes = tuple(p.shape for p in self._parameters)
        if self._layout.shapes != shapes:
            self._layout = FlatLayout(shapes)
        if len({p.device for p in self._parameters}) > 1:
            devices = sorted({str(p.device) for p in self._parameters})
            raise UnsupportedError(
                f"Invalid parameters on several devices {devices}. All trainable parameters of "
                "one optimizer must be on one device."
            )
        if [id(p) for p in self._parameters] != before:
            self._make_samples()

    def _make_samples(self) -> None:
        if self._sampling is None:
            return
        samples, factor, wanted = self._sampling
        self.samples = taker = GradientSamples(self._parameters, samples, factor)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if wanted is None:
            return

        def take(p: Tensor) -> None:
            if wanted():
                taker.take(p)

        for p in self._parameters:
            self._hooks.append(p.register_post_accumulate_grad_hook(take))  # type: ignore[no-untyped-call]

    def _check(self) -> None:
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                check_whole(p)
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

    def _read_gradient(self, lo: int, hi: int, out: Tensor) -> _Gradient:
        gradients = [p.grad for p in self._parameters]
        absent = {index for index, gradient in enumerate(gradients) if gradient is None}
        return self._layout.read(gradients, lo, hi, out), absent

    def _with_decay(self, found: _Gradient, lo: int, hi: int, w: Tensor) -> Tensor:
        """The residual, in place of the gradient."""
        gradient, absent = found

        def kind_of(segment: tuple[int, int, int]) -> tuple[float, float, bool] | None:
            return None if segment[0] in absent else self._decay_of(segment[0])

        for kind, run in itertools.groupby(self._layout.segments(lo, hi), kind_of):
            if kind is None:  # no optimizer touches it, weight decay or not
                continue
            parts = list(run)
            follow, weight_decay, decoupled = kind
            rows = slice(parts[0][1] - lo, parts[-1][2] - lo)
            if not follow:
                gradient[rows].zero_()
                continue
            gradient[rows].mul_(-follow)
            if weight_decay and not decoupled:
                gradient[rows].sub_(w[rows], alpha=weight_decay)
            elif weight_decay:
                for index, first, last in parts:
                    if (preconditioner := self._preconditioner(index, first, last)) is not None:
                        own = slice(first - lo, last - lo)
                        gradient[own].sub_(w[own] / preconditioner, alpha=weight_decay)
        return gradient

    def _decay_of(self, index: int) -> tuple[float, float, bool]:
        """The sign of a parameter's gradient, 0 at rate 0; its weight decay; if it is decoupled."""
        if not self._rates[index]:
            return 0.0, 0.0, False  # nobody is going to follow it
        group = self._group_of[index]
        sign = -1.0 if group.get("maximize", False) else 1.0
        return sign, float(group.get("weight_decay", 0.0)), self._decoupled(group)

    def _decoupled(self, group: dict[str, Any]) -> bool:
        return isinstance(self._optimizer, torch.optim.AdamW) or bool(
            group.get("decoupled_weight_decay", False)
        )

    def _preconditioner(self, index: int, first: int, last: int) -> Tensor | None:
        """What the optimizer multiplies rows of a gradient by, beside its rate; None: by nothing.

        `rows` are the optimizer's own memory: nothing here may be done in place on them.
        """
        optimizer, group = self._optimizer, self._group_of[index]
        state = optimizer.state.get(self._parameters[index], {})
        start = self._layout.offsets[index]

        def rows(name: str) -> Tensor:
            piece: Tensor = state[name].reshape(-1)[first - start : last - start]
            return piece.to(self._work_dtype)

        preconditioner: Tensor
        if not state or not isinstance(optimizer, _DIVIDING):
            return None
        if isinstance(optimizer, torch.optim.Adagrad):
            decay = 1.0 + (_steps(state) - 1.0) * float(group["lr_decay"])
            preconditioner = 1.0 / (decay * (rows("sum").sqrt() + group["eps"]))
        elif isinstance(optimizer, torch.optim.RMSprop):
            v = rows("square_avg")
            v = v - rows("grad_avg").square() if group["centered"] else v
            preconditioner = 1.0 / (v.clamp_min(0.0).sqrt_() + group["eps"])
        elif isinstance(optimizer, torch.optim.Adadelta):
            moved, seen = rows("acc_delta") + group["eps"], rows("square_avg") + group["eps"]
            preconditioner = (moved / seen).sqrt_()
        elif isinstance(optimizer, torch.optim.Adamax):
            preconditioner = 1.0 / rows("exp_inf")  # eps is in it
        else:
            beta, steps = group["betas"][1], _steps(state)
            v = rows("max_exp_avg_sq" if group.get("amsgrad", False) else "exp_avg_sq")
            v = v / (1.0 - beta**steps)
            preconditioner = 1.0 / (v.sqrt_() + group["eps"])
            if isinstance(optimizer, torch.optim.RAdam):  # divides by nothing in its first steps
                factor = _rectification(beta, steps).to(preconditioner)
                preconditioner = torch.where(factor > 0.0, factor * preconditioner, 1.0)
        return preconditioner

    @property
    def _work_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


# They divide a gradient, coordinate by coordinate, by what it used to be. AdamW is an Adam.
_DIVIDING = (
    torch.optim.Adam,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
)


def _steps(state: dict[str, Any]) -> Any:
    """Steps taken, as a number or, where the optimizer keeps it on the device, a tensor there."""
    step = state["step"]
    return step.double() if isinstance(step, Tensor) else float(step)


def _rectification(beta: float, steps: float | Tensor) -> Tensor:
    """r_t of RAdam (Liu et al. 2020, Algorithm 2), []; 0 where it does not divide yet."""
    longest = 2.0 / (1.0 - beta) - 1.0
    length = longest - 2.0 * steps * beta**steps / (1.0 - beta**steps)
    if not isinstance(length, Tensor):
        length = torch.tensor(length, dtype=torch.float64, device="cpu")
    length = length.double()
    ratio = (length - 4.0) * (length - 2.0) * longest
    ratio = ratio / ((longest - 4.0) * (longest - 2.0) * length)
    return torch.where(length > 5.0, ratio.clamp_min(0.0).sqrt(), 0.0)


def _long_run_rate(group: dict[str, Any]) -> float:
    """The length of all steps together that a gradient of 1, once, leads to."""
    momentum = group.get("momentum", 0.0)
    if isinstance(momentum, np.number) or (isinstance(momentum, Tensor) and momentum.numel() == 1):
        momentum = float(momentum)
    if not isinstance(momentum, int | float) or not 0.0 < momentum < 1.0:
        return _learning_rate(group)
    return _learning_rate(group) * (1.0 - float(group.get("dampening", 0.0))) / (1.0 - momentum)


def _learning_rate(group: dict[str, Any]) -> float:
    return float(group.get("lr", 1.0))


def _placed(value: Any, present: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(present.device if isinstance(present, Tensor) else parameter.device)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)

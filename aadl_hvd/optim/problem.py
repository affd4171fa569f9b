"""A torch optimizer as a fixed-point iteration w <- G(w), with one of two residuals.

    step       r = G(w) - w                      the paper's Eq. 1
    gradient   r = -(g + weight_decay w)         M r is the step that the optimizer makes of it

With momentum the map is G(w, v), and the residual "step" is not a function of w alone. The residual
"gradient" is, and its columns do not depend on the learning rate. `scaling` has the diagonal M.

Decoupled weight decay (AdamW) adds weight_decay w / preconditioner to r. So r is zero where that
optimizer comes to rest.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from aadl_hvd.core.fixed_point import Deviations
from aadl_hvd.core.numerics import plain_numerics
from aadl_hvd.errors import UnsupportedError
from aadl_hvd.optim.checks import check_parameters
from aadl_hvd.optim.diagonals import Diagonals
from aadl_hvd.optim.flat_parameters import FlatGradients, FlatParameters
from aadl_hvd.optim.flatten import FlatLayout
from aadl_hvd.optim.gradient_samples import GradientSamples
from aadl_hvd.optim.scaling import learning_rate, momentum_of, scale_free
from aadl_hvd.optim.shards import Parts, coordinate_in_mesh, is_dtensor, local
from aadl_hvd.optim.snapshots import Undo, restore, snapshot

# Rows of the flat gradient, and the indices of the parameters there that have no gradient.
_Gradient = tuple[Tensor, set[int]]
_Wanted = Callable[[], bool] | None


class OptimizerFixedPoint:
    """Implements the protocol `FixedPoint` for a `torch.optim.Optimizer`.

    Args:
        optimizer: its parameter groups and its state are read and written.
        residual: "step" or "gradient".
        weights_before: returns a parameter's value before the step. Needed where the parameter
            itself changes earlier, as in the backward pass with Adasum. None: the parameter.
        sharded: whether FSDP2 has sharded parameters: the iteration is that of this rank's parts,
            and sums over ranks are sums over the whole. Parameters that it has not sharded are
            replicated: see `Parts`.

    Attributes:
        base_step: one step of the optimizer; to be set before `advance` is called.
        skip_step: ends a step without moving; to be set before `skip` is called.
        evaluate: the loss of this rank at the current weights; to be set before `loss` is called.
        samples: samples of the gradient; None: the noise is not measured.
        last_rates: the last rates that were not all 0. `signature` uses them while all are 0.

    Raises:
        UnsupportedError: parameters or optimizer cannot be accelerated in this way.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        residual: str,
        weights_before: Callable[[Tensor], Tensor] | None = None,
        sharded: bool = False,
    ) -> None:
        self._optimizer, self._sharded, self._parts = optimizer, sharded, Parts()
        self._residual = residual
        self._weights_before = weights_before
        self.base_step: Callable[[], Any]
        self.skip_step: Callable[[], Any]
        self.evaluate: Callable[[], float]
        self.samples: GradientSamples | None = None
        self._sampling: tuple[int, float, int, int, _Wanted] | None = None
        self.last_rates: tuple[float, ...] = ()
        self._due: tuple[int, int, Tensor] | None = None
        self._gradient: _Gradient | None = None
        self._layout = FlatLayout([])
        self._parameters: list[Tensor] = []
        self._tensors: list[Tensor] = []  # the same; where they are sharded, their parts here
        self._group_of: list[dict[str, Any]] = []
        self._seen: Any = None
        # Groups and all their parameters, trained or not.
        self._listed: list[tuple[dict[str, Any], list[Tensor]]] = []
        self._last_signature: tuple[Hashable, tuple[float, ...]] = (), ()
        self._flat = FlatParameters([], self._layout)
        self._gradients = FlatGradients([], self._layout)
        self._stays = False  # whether they were found where they were
        self._described: Hashable = ()
        self._widest = torch.float16
        self._diagonals = Diagonals(optimizer, self._layout, [], [])
        self._deviations: Deviations | None = None
        check_parameters(optimizer, residual, sharded)
        self._refresh()

    def sample_gradients(
        self, samples: int, factor: float, rank: int = 0, ranks: int = 1, wanted: _Wanted = None
    ) -> None:
        """Starts to sample gradients, so that their noise can be measured.

        Args:
            samples: see `GradientSamples`.
            factor: see `GradientSamples`.
            rank: see `GradientSamples`.
            ranks: see `GradientSamples`.
            wanted: hooks take a sample after every backward pass in which it returns True. None:
                no hooks, the caller takes the samples.
        """
        self._sampling = samples, factor, rank, ranks, wanted
        self._make_samples()

    def sample_no_gradients(self) -> None:
        """Ends what `sample_gradients` began."""
        if self.samples is not None:
            self.samples.remove_hooks()
        self._sampling = self.samples = None

    @property
    def signature(self) -> Hashable:
        self._refresh()
        self._last_signature = self._described, self._rates()
        return self._last_signature

    def unchanged(self, signature: Hashable, lo: int, hi: int) -> bool:
        if signature != self._last_signature:  # another caller has looked at other parameters
            return False
        groups, known = self._optimizer.param_groups, self._listed
        if self._weights_before is not None or not _same(groups, [group for group, _ in known]):
            return False
        if not all(_same(group["params"], parameters) for group, parameters in known):
            return False
        self._stays = self._flat.stay(lo, hi)
        return self._stays and self._rates() == self._last_signature[1]

    def _rates(self) -> tuple[float, ...]:
        rates = tuple(learning_rate(group) for group in self._groups)
        if not any(rates):  # as at the start of a warm-up: take earlier rates, or later ones
            initial = (float(group.get("initial_lr", 1.0)) for group in self._groups)
            rates = self.last_rates or tuple(initial)
        self.last_rates = rates
        if self._residual == "gradient":
            rates = tuple(map(bool, rates))  # whether a group moves
        else:
            # Only ratios matter. They are rounded, so that a schedule's last bit does not count.
            largest = max(rates, default=1.0) or 1.0
            rates = tuple(float(f"{rate / largest:.6g}") for rate in rates)
        return rates

    @property
    def decays(self) -> tuple[float, ...]:
        return tuple(float(group.get("weight_decay", 0)) for group in self._groups)

    @property
    def scale_free(self) -> bool:
        return scale_free(self._optimizer)

    @property
    def n(self) -> int:
        return self._layout.n

    @property
    def dtype(self) -> torch.dtype:
        return self._widest

    @property
    def device(self) -> torch.device:
        return self._parameters[0].device if self._parameters else torch.device("cpu")

    @property
    def tensors(self) -> list[Tensor]:
        return [*self._tensors]

    @property
    def sharded(self) -> bool:
        return self._sharded

    @property
    def replicated(self) -> list[Tensor]:
        return [p for p in self._parameters if not is_dtensor(p)] if self._sharded else []

    @property
    def leads(self) -> bool:
        return not any(coordinate_in_mesh(self._parameters))

    @property
    def sizes(self) -> list[int]:
        return [p.numel() for p in self._parameters]

    @property
    def momentum(self) -> float:
        return max((momentum_of(group) for group in self._groups), default=0.0)

    @property
    def moves(self) -> bool:
        return any(learning_rate(group) for group in self._groups)

    @property
    def uniform_scaling(self) -> float | None:
        if self._residual == "step":
            return max((abs(learning_rate(group)) for group in self._group_of), default=0.0)
        return self._diagonals.uniform_scaling

    def scaling(self, lo: int, hi: int) -> float | Tensor:
        if (uniform := self.uniform_scaling) is not None:
            return uniform
        return self._diagonals.scaling(lo, hi)

    def decay(self, lo: int, hi: int) -> float | Tensor:
        return self._diagonals.decay(lo, hi)

    def deviations(self) -> Deviations | None:
        found, self._deviations = self._deviations, None
        return found

    def read_before(self, lo: int, hi: int, out: Tensor, residual: Tensor) -> Tensor:
        if self._residual == "gradient":
            self._due = lo, hi, residual
        self._gradient = None
        if self._weights_before is not None:
            before = [self._weights_before(p) for p in self._parameters]
            return self._layout.read(before, lo, hi, out, again=True)
        return self._flat.read(lo, hi, out, again=True, in_place=self._stays)

    def forget_buffers(self) -> None:
        for views in (self._layout, self._flat, self._diagonals):
            views.forget_views()

    def keep_gradient(self) -> None:
        """To be called when the gradients are final, before the optimizer uses them.

        Some optimizers overwrite gradients: torch.optim.SGD with Nesterov momentum and foreach,
        its default on GPUs, adds the momentum to them. A call costs nothing in a step that needs no
        residual.
        """
        if self._due is None and self.samples is None:
            return
        with plain_numerics(self.device):
            if self._due is not None:
                self._gradient = self._gradients.read(*self._due)
            if self.samples is not None:
                rows = None if self._gradient is None else self._gradient[0]
                self._deviations = self.samples.deviations(rows)

    def forget_gradient(self) -> None:
        """Ends a step, even if it raised an error before its residual was read."""
        self._due = self._gradient = self._deviations = None
        self._diagonals.hold(False)

    def read(self, lo: int, hi: int, out: Tensor) -> Tensor:
        return self._flat.read(lo, hi, out)

    def read_residual(
        self, lo: int, hi: int, w: Tensor, out: Tensor, decays: tuple[float, ...] | None
    ) -> Tensor:
        gradient, self._gradient, self._due = self._gradient, None, None
        if not self.moves:  # every learning rate is 0: M would be a divisor of 0
            return out.zero_()
        if self._residual == "gradient":
            found = gradient or self._gradients.read(lo, hi, out)
            return self._diagonals.residual(*found, lo, hi, w, decays)
        # The learning rate may change while the residual is stored, so it is divided out.
        scale = self.scaling(lo, hi)
        return self.read(lo, hi, out).sub_(w).div_(scale)

    def add(self, flat: Tensor) -> None:
        self._flat.add(flat)

    def write(self, flat: Tensor, lo: int = 0) -> None:
        self._flat.write(flat, lo)

    def advance(self) -> Any:
        self._diagonals.hold(False)
        result = self.base_step()
        self._diagonals.hold(True)  # until `forget_gradient`
        return result

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        remembered: Any = getattr(self._optimizer, "past_weights", list)()
        before = [p.detach().clone() for p, _ in remembered]
        yield
        with torch.no_grad():
            for (p, past), old in zip(remembered, before, strict=True):
                past.add_(p - old)

    def copy_weights(self) -> Callable[[], None]:
        """Copies the weights. Calling the result puts them back."""
        tensors = [*map(local, self._parameters)]
        saved = [tensor.detach().clone() for tensor in tensors]

        def restore() -> None:
            with torch.no_grad():
                torch._foreach_copy_(tensors, saved)

        return restore

    def skip(self) -> Any:
        return self.skip_step()

    def snapshot(self) -> Undo:
        return snapshot(self._optimizer)

    def restore(self, undo: Undo) -> None:
        self._diagonals.hold(False)
        restore(self._optimizer, undo)

    @property
    def settings(self) -> list[list[float]]:
        """What stored pairs depend on besides the parameters: weight decays and rates by group."""
        signature: Any = self.signature
        _, rates = signature
        return [[float(value) for value in values] for values in (self.decays, rates)]

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
        self._diagonals.hold(False)  # the caller may write to them
        entries = [self._optimizer.state.get(p, {}) for p in self._parameters]
        found = (entry[key] for entry in entries for key in sorted(entry))
        return [local(value) for value in found if isinstance(value, Tensor)]

    def loss(self) -> float:
        return self.evaluate()

    def _refresh(self) -> None:
        self._groups = self._optimizer.param_groups
        self._listed = [(group, [*group["params"]]) for group in self._groups]
        ps: list[Tensor] = []
        group_of: list[dict[str, Any]] = []
        for group in self._groups:
            own = [p for p in group["params"] if p.requires_grad]
            ps += own
            group_of += itertools.repeat(group, len(own))
        with torch.no_grad():
            sharded = any(map(is_dtensor, ps)) if self._sharded else False
            tensors = self._parts.of(ps) if sharded else ps
        changed = not _same(ps, self._parameters) or not _same(tensors, self._tensors)
        if changed and any(map(is_dtensor, ps)) != self._sharded:
            raise UnsupportedError(
                "Invalid parameters: fully_shard has sharded some since this optimizer was made, "
                "or none of those that are trained is sharded any more. Must be made after "
                "fully_shard, and keep a sharded parameter that is trained."
            )
        if changed or not _same(group_of, self._group_of):
            self._parameters, self._tensors, self._group_of = ps, tensors, group_of
            self._flat, self._seen = FlatParameters([], self._layout), None
        # What lies in the same memory as before is as before. To compare all takes thrice as long.
        # `model.half()` keeps the parameters and changes their dtypes.
        self._stays = self._flat.in_place()
        if self._stays:
            return
        seen = [t.shape for t in tensors], [t.dtype for t in tensors], [t.device for t in tensors]
        if changed or seen != self._seen:
            shapes, dtypes, devices = seen
            if len(set(devices)) > 1:
                raise UnsupportedError(
                    f"Invalid parameters on several devices {sorted(map(str, set(devices)))}. All "
                    "trainable parameters of one optimizer must be on one device."
                )
            self._described = tuple(zip(map(id, ps), shapes, dtypes, devices, strict=True))
            self._widest = functools.reduce(torch.promote_types, dtypes, torch.float16)
            if self._layout.shapes != tuple(shapes):
                self._layout = FlatLayout(shapes)
            self._diagonals = Diagonals(self._optimizer, self._layout, ps, group_of)
            self._gradients = FlatGradients(ps, self._layout)
        self._flat, self._seen = FlatParameters(tensors, self._layout), seen
        if changed:
            self._make_samples()

    def _make_samples(self) -> None:
        """Makes the samples anew, for the parameters there are now."""
        if self._sampling is None:
            return
        samples, factor, rank, ranks, wanted = self._sampling
        if self.samples is not None:
            self.samples.remove_hooks()
        self.samples = GradientSamples(self._parameters, samples, factor, rank, ranks)
        if wanted is not None:
            self.samples.take_by_hooks(wanted)


def _same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))

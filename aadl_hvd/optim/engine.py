"""The seam between an accelerated optimizer and what reduces gradients over ranks.

`AcceleratedOptimizer` asks its engine for a step of the base optimizer, for a step without an
update, and for the value of a closure. The engine sees to it that gradients are reduced before the
base optimizer uses them. Nothing else in `optim` or in `core` knows of the library that reduces.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from aadl_hvd.comm.base import Communicator, ShardGroup
from aadl_hvd.config import AndersonConfig
from aadl_hvd.core.accelerator import Accelerator
from aadl_hvd.errors import ConfigError
from aadl_hvd.optim.gradient_samples import GradientSamples
from aadl_hvd.optim.problem import OptimizerFixedPoint

Closure = Callable[[], float | Tensor]


class Engine:
    """What an accelerated optimizer needs of whatever reduces gradients.

    One engine serves one optimizer. The class itself is the engine of one process: it reduces
    nothing. An engine of several ranks overrides `reduce`. One whose library reduces in the
    backward pass, or has a step of its own, overrides the methods below it, too.

    Args:
        passes: micro-batches whose gradients a step adds up.
        summed: whether the optimizer gets the sum over ranks of the gradients, and not the mean.

    Attributes:
        optimizer: the accelerated optimizer.
        given: the optimizer that the user gave. It shares state and groups with `optimizer`.
        base: `optimizer` with the methods of the given optimizer's class.
        problem: `optimizer` as a fixed-point problem.
        accelerator: the algorithm.
        averaging: whether the model holds averaged weights at the moment.
    """

    optimizer: torch.optim.Optimizer
    given: torch.optim.Optimizer
    base: Any
    problem: OptimizerFixedPoint
    accelerator: Accelerator

    # A parameter's value before the step, where it is not in the parameter any more.
    weights_before: Callable[[Tensor], Tensor] | None = None
    # Whether FSDP2 has sharded the parameters.
    sharded = False
    # Whether the optimizer gets a reduced gradient, of which noise can be measured.
    reduces_gradients = True

    def __init__(self, passes: int = 1, summed: bool = False) -> None:
        self.passes, self.summed = passes, summed
        self.averaging = False

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        given: torch.optim.Optimizer,
        config: AndersonConfig,
        comm: Communicator,
        group: ShardGroup,
    ) -> None:
        """Begins to serve an optimizer. Not collective.

        Args:
            optimizer: the accelerated optimizer, with all that `given` has.
            given: the optimizer that the user gave.
            config: settings of the acceleration.
            comm: the ranks that train together.
            group: those of them that share one history with this rank.

        Raises:
            UnsupportedError: the parameters or the optimizer cannot be accelerated.
        """
        self.optimizer, self.given = optimizer, given
        self.base = super(type(optimizer), optimizer)
        self.problem = OptimizerFixedPoint(
            optimizer, config.residual, self.weights_before, self.sharded
        )
        self.accelerator = Accelerator(config, comm, group)
        self._sample_gradients()

    def connect(self, comm: Communicator, group: ShardGroup, calls: int) -> None:
        """Goes on with other ranks, see `Accelerator.connect`. Not collective."""
        self.accelerator.connect(comm, group, calls)
        self.problem.forget_buffers()
        self._sample_gradients()

    # What engines override

    def reduce(self) -> None:
        """Makes the gradients of all ranks their mean (their sum, with `summed`). Collective."""

    def check_step(self) -> None:
        """Raises an error, before anything is done, where a step is not allowed here."""

    def check_observe(self) -> None:
        """Raises an error where a loss cannot be taken note of."""
        self.check_step()

    def check_zero_grad(self) -> None:
        """Raises an error where gradients cannot be cleared."""

    def base_step(self, closure: Closure | None) -> Any:
        """Reduces the gradients and makes one step of the base optimizer. Collective.

        Returns:
            What the base optimizer's `step` returns.
        """
        if closure is None:
            self._reduce()
        return self.base.step(closure)  # which evaluates the closure by `evaluate`

    def evaluate(self, closure: Closure) -> float | Tensor:
        """The value of a closure, with its gradients reduced. Collective."""
        loss = closure()
        self._reduce()
        return loss

    def skip_step(self, closure: Closure | None) -> float | Tensor | None:
        """Ends a step in which the base optimizer does not move. Collective.

        Returns:
            The value of the closure, None without one.
        """
        if closure is None:
            self._reduce()
            return None
        with torch.enable_grad():
            return self.evaluate(closure)

    def load_base(self, state_dict: dict[str, Any]) -> None:
        """Loads the base optimizer's state, as torch does. Not collective."""
        self.base.load_state_dict(state_dict)

    # What `AcceleratedOptimizer` calls

    def step(self, closure: Closure | None) -> Any:
        """One step, accelerated or not; returns what the base optimizer's step returns."""
        problem = self.problem
        problem.base_step = lambda: self.base_step(closure)
        problem.skip_step = lambda: self.skip_step(closure)
        if closure is not None:
            kind = problem.device.type
            enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

            def evaluate() -> float:
                # The algorithm's own numerics are plain; the closure's are what the user chose.
                with torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled):
                    return number(self.evaluate(closure))

            problem.evaluate = evaluate
        try:
            return self.accelerator.step(problem)
        finally:  # they hold on to the closure and its graph, and must not outlive the step
            vars(problem).pop("base_step")
            vars(problem).pop("skip_step")
            vars(problem).pop("evaluate", None)
            problem.forget_gradient()

    def before_base_step(self) -> None:
        """The base optimizer is about to move; gradients are final, except with a closure."""
        if "base_step" not in vars(self.problem):
            # Not in a step of ours. hvd.broadcast_optimizer_state steps on zero gradients where
            # there is no state: weight decay moves the weights of those ranks alone.
            self.accelerator.stepped_apart = True

    # The noise of the gradients

    def note_own_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Notes this rank's own gradients of some parameters, which are about to be reduced."""
        if (samples := self._wanted_samples()) is not None:
            with torch.no_grad():
                for p in parameters:
                    samples.take(p)

    def note_mean_gradients(self) -> None:
        """Notes the reduced gradients, before anything else is done to them."""
        if self.accelerator.measures_noise and self.problem.samples is not None:
            with torch.no_grad():
                self.problem.samples.take_mean()

    def _reduce(self) -> None:
        if self.accelerator.comm.size == 1:
            return self.reduce()
        if (samples := self._wanted_samples()) is not None:
            with torch.no_grad():
                samples.take_all()
        self.reduce()
        return self.note_mean_gradients()

    def _wanted_samples(self) -> GradientSamples | None:
        """What takes this rank's own gradients in the present step, before their reduction."""
        samples = self.problem.samples
        # Where a rank's micro-batches are the samples, hooks take them.
        if samples is None or samples.samples > 1 or not self.accelerator.measures_noise:
            return None
        return samples

    def _sample_gradients(self) -> None:
        """Has the noise measured from the ranks, or from one rank's micro-batches."""
        problem, config = self.problem, self.accelerator.config
        comm, passes = self.accelerator.comm, self.passes
        problem.sample_no_gradients()
        if not config.enabled or config.noise_gate is None or not self.reduces_gradients:
            return
        if comm.size > 1:
            factor = comm.size if self.summed else 1
            problem.sample_gradients(1, factor, comm.rank, comm.size)
        elif passes > 1:
            # A strong reference would keep the optimizer alive as long as the model.
            here = weakref.ref(self)
            problem.sample_gradients(passes, passes, wanted=lambda: _measures_noise(here()))


def _measures_noise(engine: Engine | None) -> bool:
    return engine is not None and engine.accelerator.measures_noise


def number(loss: float | Tensor | None) -> float:
    """A loss as a Python number.

    Raises:
        ConfigError: it is None, as from a closure without `return`.
    """
    if loss is None:
        raise ConfigError(
            "Invalid loss=None: the closure returned nothing. Must be a number or a tensor of one "
            "element: end the closure with `return loss`."
        )
    return float(loss.detach() if isinstance(loss, Tensor) else loss)

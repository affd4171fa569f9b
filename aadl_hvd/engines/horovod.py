"""`DistributedAndersonOptimizer`: Horovod's distributed optimizer with Anderson acceleration.

Horovod's optimizer is a class made at run time whose methods call `super(self.__class__, self)`: it
cannot be subclassed. So an instance of it is made, of a stand-in, and then becomes one of a class
that has Horovod's methods below ours; see `aadl_hvd.optim.classes`. Importing this module does not
import Horovod.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from aadl_hvd.comm.base import Communicator, ShardGroup
from aadl_hvd.comm.local import LocalCommunicator, PendingCommunicator
from aadl_hvd.config import AndersonConfig
from aadl_hvd.engines.rank_checks import accepted_by_all, by_index, compare_ranks
from aadl_hvd.errors import ConfigError, UnsupportedError
from aadl_hvd.optim import job
from aadl_hvd.optim.accelerated import AcceleratedOptimizer, check_optimizer, checked_config
from aadl_hvd.optim.classes import accelerated_class, attributes_of
from aadl_hvd.optim.problem import OptimizerFixedPoint

if TYPE_CHECKING:
    from horovod.torch import ProcessSet
    from horovod.torch.compression import Compressor

    from aadl_hvd.engines.horovod_engine import HorovodEngine


class DistributedAndersonOptimizer(AcceleratedOptimizer):
    """A drop-in swap for `horovod.torch.DistributedOptimizer` with Anderson acceleration.

    The ranks of the process set share the history: each holds n/P rows of it (or, with
    `layout="columns"`, m/P columns; with `shard_group="node"` the ranks of a node share one).
    Collective over the process set: configuration and parameter shapes are compared across ranks
    here.

    Step hooks fire as Horovod's do, twice a step: around all of it, and around the base
    optimizer's step, when gradients are reduced. So a pre-hook that clips gradients clips what the
    base optimizer uses, and residuals are made of that. The outer post-hook sees the accelerated
    weights. (`AndersonOptimizer` fires them once, around all of it, as torch does.)

    Differences from Horovod's own, all of them repairs: `zero_grad` takes `set_to_none`; state
    (but for what `hvd.broadcast_optimizer_state` made up for a fresh optimizer), defaults and hooks
    of the given optimizer are kept, as are schedulers made before; reductions that are under way
    end before a step pre-hook fires, and are not changed by it halfway; parameters that join later
    (`add_param_group`, unfreezing) are reduced; with a closure, gradients are reduced after it and
    before the update.

    The result is an instance of the given optimizer's class, with Horovod's methods and the
    attribute `anderson`, see `AndersonOptimizer`.

    Args:
        optimizer: any `torch.optim.Optimizer` that Horovod takes.
        named_parameters: as in Horovod.
        compression: as in Horovod; None: `hvd.Compression.none`.
        backward_passes_per_step: as in Horovod.
        op: `hvd.Average`, `hvd.Sum` or `hvd.Adasum`; None: Average.
        gradient_predivide_factor: as in Horovod.
        num_groups: as in Horovod (deprecated there).
        groups: as in Horovod.
        sparse_as_dense: as in Horovod.
        process_set: as in Horovod; None: the global one.
        anderson: settings; None: `AndersonConfig()`, with `residual="step"` for Adasum, where no
            reduced gradient exists.

    Raises:
        HorovodMissingError: Horovod is not installed, was built without torch, or fails to load.
        ConfigError: `hvd.init()` has not been called; `anderson` is not an `AndersonConfig`, or
            does not go with Adasum; `compression` compresses nothing.
        UnsupportedError: as for `AndersonOptimizer`.
        ReplicaMismatchError: on every rank, if ranks differ in parameters or settings.
        HistoryMemoryError: on every rank, if the history of any does not fit into free memory.
    """

    anderson_engine: HorovodEngine

    def __new__(  # noqa: D102  (the class has the docstring)
        cls,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        compression: Compressor | type[Compressor] | None = None,
        backward_passes_per_step: int = 1,
        op: int | None = None,
        gradient_predivide_factor: float = 1.0,
        num_groups: int = 0,
        groups: int | list[list[Tensor]] | None = None,
        sparse_as_dense: bool = False,
        process_set: ProcessSet | None = None,
        *,
        anderson: AndersonConfig | None = None,
    ) -> Self:
        try:
            import horovod.torch as hvd
            from horovod.torch.optimizer import DistributedOptimizer  # whatever hvd's stands for
        except Exception as error:
            raise job.horovod_missing(error) from error
        job.check_started(hvd)

        from aadl_hvd.comm.horovod import horovod_communicator, shard_group
        from aadl_hvd.engines.horovod_engine import HorovodEngine, with_hooks_on_reduced

        op = hvd.Average if op is None else op
        process_set = hvd.global_process_set if process_set is None else process_set
        adasum = op == hvd.Adasum and hvd.size() > 1
        elastic = os.environ.get("HOROVOD_ELASTIC") == "1"
        # A rank that joins an elastic job is alone here: the others are about to meet it in sync().
        comm: Communicator = LocalCommunicator() if elastic else horovod_communicator(process_set)
        config = accepted_by_all(comm, lambda: _accept(optimizer, anderson, compression, adasum))
        if elastic:
            _check_elastic(config, process_set)
        if named_parameters is not None:
            named_parameters = list(named_parameters)
        arguments = {
            "compression": getattr(compression, "__name__", type(compression).__name__),
            "backward_passes_per_step": backward_passes_per_step,
            "op": op,
            "gradient_predivide_factor": gradient_predivide_factor,
            "num_groups": num_groups,
            "groups": by_index(groups, optimizer),
            "sparse_as_dense": sparse_as_dense,
            "named_parameters": by_index(named_parameters, optimizer),
        }
        compare_ranks(comm, optimizer, config, arguments)
        # Raises, before Horovod has hooks in place.
        accepted_by_all(comm, lambda: OptimizerFixedPoint(optimizer, config.residual))
        group = shard_group(comm, process_set, config.shard_group)
        if all(comm.allgather_object(_only_initialised(optimizer))):
            _start_anew(optimizer)
        if elastic:
            comm = PendingCommunicator()
            group = ShardGroup(comm)
            # It registers itself, for those who use Horovod's own TorchState.
            importlib.import_module("aadl_hvd.engines.horovod_elastic")

        make = functools.partial(
            DistributedOptimizer,
            _stand_in(optimizer),
            named_parameters=named_parameters,
            compression=hvd.Compression.none if compression is None else compression,
            backward_passes_per_step=backward_passes_per_step,
            op=op,
            gradient_predivide_factor=gradient_predivide_factor,
            num_groups=num_groups,
            groups=groups,
            sparse_as_dense=sparse_as_dense,
            process_set=process_set,
        )
        # What Horovod refuses, too: named parameters that are not all there, for one.
        distributed: Any = make() if elastic else accepted_by_all(comm, make)
        horovods = {
            name: value
            for name, value in vars(type(distributed)).items()
            if name not in ("__dict__", "__weakref__")
        }
        distributed.__class__ = accelerated_class(
            cls,
            type(optimizer),
            below=horovods,
            hook_base=True,
            wrap_step=None if adasum else with_hooks_on_reduced,
        )
        # When Horovod sets up its reductions at all: the condition in its __init__.
        alone = hvd.size() == 1 and not elastic
        engine = HorovodEngine(
            distributed,
            horovods,
            process_set,
            arguments,
            passes=backward_passes_per_step,
            summed=op == hvd.Sum,
            reduces=adasum or (process_set.included() and not alone),
        )
        made: Self = distributed._attach(engine, optimizer, config, comm, group)
        if not elastic:
            made.anderson.check_memory(engine.problem)
            made.anderson.compare_replicas(engine.problem)  # if equal now, they must stay it
        return made

    def synchronize(self) -> None:
        """As in Horovod; parameters that joined after the construction are reduced, too."""
        self.anderson_engine.synchronize()

    def skip_synchronize(self) -> AbstractContextManager[None]:
        """As in Horovod: within, `step` does not reduce, for it follows `synchronize`."""
        skipping: AbstractContextManager[None] = self._horovods("skip_synchronize")
        return skipping

    def set_backward_passes_per_step(self, passes: int) -> None:
        """As in Horovod."""
        self._horovods("set_backward_passes_per_step", passes)

    def zero_grad(self, set_to_none: bool | None = None, **more: object) -> None:
        """As in torch; not between backward() and step() or synchronize().

        Args:
            set_to_none: None: as the given optimizer's class has it.
            more: what else the given optimizer's class takes.
        """
        self.anderson_engine.check_zero_grad()
        super().zero_grad(set_to_none, **more)

    # Horovod's hooks on parameters call these.

    def _allreduce_grad_async(self, p: Tensor) -> object:
        return self.anderson_engine.reduce_async(p)

    def _grouped_allreduce_grad_async(self, ps: Sequence[Tensor]) -> object:
        return self.anderson_engine.reduce_group_async(ps)

    def _horovods(self, method: str, *args: object) -> Any:
        return self.anderson_engine.horovods[method](self, *args)


def _accept(
    optimizer: torch.optim.Optimizer,
    anderson: AndersonConfig | None,
    compression: Any,
    adasum: bool,
) -> AndersonConfig:
    """The settings, if they and the optimizer can be distributed."""
    config = checked_config(anderson)
    if compression is not None and not hasattr(compression, "compress"):
        raise ConfigError(
            f"Invalid compression={compression!r}. Must be hvd.Compression.none or .fp16, or have "
            "their methods; an AndersonConfig goes by keyword: anderson=AndersonConfig(...)."
        )
    if adasum:
        config = _adasum_config(config, explicit=anderson is not None)
    check_optimizer(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(
            "Invalid optimizer LBFGS. It decides from the loss of one rank how often it calls the "
            "closure; ranks would wait for each other for ever. AndersonOptimizer takes it."
        )
    return config


def _adasum_config(config: AndersonConfig, explicit: bool) -> AndersonConfig:
    if config.safeguard == "loss":
        raise ConfigError(
            "Invalid safeguard='loss' with op=Adasum, which updates the weights in the backward "
            "pass of the closure. Must be 'descent', 'residual' or 'none'."
        )
    if config.residual == "step":
        return config
    if explicit:
        raise ConfigError(
            f"Invalid residual={config.residual!r} with op=Adasum, which combines the updates of "
            "the ranks and not their gradients. Must be 'step'."
        )
    warnings.warn("op=Adasum: Anderson acceleration uses residual='step'.", stacklevel=6)
    return dataclasses.replace(config, residual="step")


def _check_elastic(config: AndersonConfig, process_set: Any) -> None:
    """Process sets end with the ranks they were made for."""
    if process_set.process_set_id != 0:
        raise UnsupportedError(
            f"Invalid process_set={process_set} in an elastic job. Must be the global one."
        )
    if not isinstance(config.shard_group, str):
        raise ConfigError(
            f"Invalid shard_group={config.shard_group} in an elastic job. Must be 'world' or "
            "'node'."
        )


def _only_initialised(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all that ever stepped this optimizer is `hvd.broadcast_optimizer_state`.

    Called before the wrapping, it takes a step on gradients of zeros where there is no state, and
    leaves the gradients. One rank cannot know: where another loaded a checkpoint, state is real.
    """
    trainable = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    steps = [float(state.get("step", 1)) for state in optimizer.state.values()]
    return bool(steps) and max(steps) <= 1 and all(_is_zero(p.grad) for p in trainable)


def _is_zero(gradient: Tensor | None) -> bool:
    if gradient is None:
        return False
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return not values.any()


def _start_anew(optimizer: torch.optim.Optimizer) -> None:
    """The state of an optimizer that has not stepped, which is what Horovod's own starts from."""
    try:
        fresh = type(optimizer)(optimizer.param_groups)  # type: ignore[call-arg]
    except TypeError:  # a class that asks for more than parameters, which Horovod cannot wrap
        return
    optimizer.state.clear()
    optimizer.state.update(fresh.state)


def _stand_in(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What Horovod is given in the optimizer's place.

    It calls the class of what it is given, with the parameter groups and nothing else: a class
    that needs more arguments would fail, and one with defaults forget what it was told.
    """

    class StandIn(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            vars(self).update(attributes_of(optimizer))
            if self.defaults.get("differentiable"):  # there is no graph through a reduction
                self.defaults = self.defaults | {"differentiable": False}

    return StandIn(None)

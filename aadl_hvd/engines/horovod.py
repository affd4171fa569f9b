"""Anderson acceleration of Horovod's distributed optimizer.

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
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from aadl_hvd.comm.base import Communicator, ShardGroup
from aadl_hvd.comm.local import LocalCommunicator, PendingCommunicator
from aadl_hvd.config import AndersonConfig
from aadl_hvd.engines.rank_checks import (
    accepted_by_all,
    by_index,
    check_distributable,
    compare_ranks,
)
from aadl_hvd.errors import ConfigError, UnsupportedError
from aadl_hvd.optim import job
from aadl_hvd.optim.accelerated import AcceleratedOptimizer
from aadl_hvd.optim.checks import check_optimizer, checked_config
from aadl_hvd.optim.classes import accelerated_class, attributes_of
from aadl_hvd.optim.problem import OptimizerFixedPoint

if TYPE_CHECKING:
    from horovod.torch import ProcessSet
    from horovod.torch.compression import Compressor

_Public = TypeVar("_Public", bound=AcceleratedOptimizer)


def accelerate(
    public: type[_Public],
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None,
    compression: Compressor | type[Compressor] | None,
    backward_passes_per_step: int,
    op: int | None,
    gradient_predivide_factor: float,
    num_groups: int,
    groups: int | list[list[Tensor]] | None,
    sparse_as_dense: bool,
    process_set: ProcessSet | None,
    anderson: AndersonConfig | None,
) -> _Public:
    """An accelerated optimizer whose gradients Horovod reduces. Collective over the process set.

    The class `public` has the methods that come first, see `accelerated_class`. The other
    arguments are those of `DistributedAndersonOptimizer`, and so are the errors.
    """
    try:
        import horovod.torch as hvd
        from horovod.torch.optimizer import DistributedOptimizer  # whatever hvd's stands for
    except Exception as error:
        raise job.horovod_missing(error) from error
    job.check_started(hvd)

    from aadl_hvd.comm.horovod import horovod_communicator
    from aadl_hvd.comm.horovod_groups import shard_group
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
        public,
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
    made: _Public = distributed._attach(engine, optimizer, config, comm, group)
    if not elastic:
        made.anderson.check_memory(engine.problem)
        made.anderson.compare_replicas(engine.problem)  # if equal now, they must stay it
    return made


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
    if not isinstance(config.shard_group, str) and not hasattr(config.shard_group, "included"):
        raise ConfigError(
            f"Invalid shard_group={config.shard_group!r} with Horovod. Must be 'world', 'node' or "
            "a process set."
        )
    if adasum:
        config = _adasum_config(config, explicit=anderson is not None)
    check_optimizer(optimizer)
    check_distributable(optimizer)
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
    warnings.warn("op=Adasum: Anderson acceleration uses residual='step'.", stacklevel=7)
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

"""Optimizers for users: `AndersonOptimizer`, `DistributedAndersonOptimizer`.

Horovod's optimizer is a class made at run time whose methods call `super(self.__class__, self)`:
it cannot be subclassed. So here, too, a class is made at run time, directly below the user's
optimizer class: Horovod's methods with these laid over them.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import inspect
import itertools
import logging
import math
import os
import sys
import warnings
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from aadl_hvd import checkpoint
from aadl_hvd.checkpoint import base_state
from aadl_hvd.comm.base import Communicator, ShardGroup
from aadl_hvd.comm.local import LocalCommunicator, PendingCommunicator
from aadl_hvd.config import AndersonConfig
from aadl_hvd.core import replicas
from aadl_hvd.core.accelerator import Accelerator
from aadl_hvd.errors import AndersonError, ConfigError, ReplicaMismatchError, UnsupportedError
from aadl_hvd.optim import job
from aadl_hvd.optim.batch_norm import kept_batch_norm, recalibrate_batch_norm
from aadl_hvd.optim.problem import OptimizerFixedPoint
from aadl_hvd.stats import Reset

Closure = Callable[[], Any]
_Accepted = TypeVar("_Accepted")
_P = ParamSpec("_P")

_log = logging.getLogger("aadl_hvd")
_HOROVOD_MODULE = "horovod.torch.optimizer"


def _class_of_what_it_returns(construct: Callable[_P, Any]) -> Callable[_P, Any]:
    """A function as a class that isinstance and issubclass take: of all that it has returned."""

    def new(cls: Any, *args: _P.args, **kwargs: _P.kwargs) -> Any:
        made = construct(*args, **kwargs)
        cls.register(type(made))
        return made

    namespace = {
        "__new__": new,
        "__doc__": construct.__doc__,
        "__module__": construct.__module__,
        "__signature__": inspect.signature(construct),
    }
    return abc.ABCMeta(construct.__name__, (), namespace)


@_class_of_what_it_returns
def AndersonOptimizer(
    optimizer: torch.optim.Optimizer,
    *,
    backward_passes_per_step: int = 1,
    anderson: AndersonConfig | None = None,
    independent: bool = False,
) -> Any:
    """Adds Anderson acceleration to a torch optimizer, in one process.

    Needs neither Horovod nor MPI. In a job of several processes it is an error, unless every
    process trains a model of its own: replicas of one model would drift apart, for what one
    process decides from its losses and the noise of its gradients does not reach the others.
    The job is looked at here and at the first `observe` or `step`.

    The result is an instance of the given optimizer's class and
    shares its parameter groups and its state, so learning-rate schedulers made before go on
    working. Its attribute `anderson` is the `Accelerator`: `.stats`, `.history_bytes`,
    `.config`, `.reset()`.

    Memory: 2 m n numbers of history, 2 n for the last pair, 2 n for each of `averages`.

    Args:
        optimizer: any `torch.optim.Optimizer`. Use the result in its place from now on.
        backward_passes_per_step: micro-batches whose gradients are summed in every step. With 2 or
            more the noise of the gradient is measured from their differences; with 1 it is
            estimated from successive residuals, which is rougher.
        anderson: settings; None: `AndersonConfig()`.
        independent: True where each process of the job trains a model of its own.

    Raises:
        ConfigError: `anderson` is not an `AndersonConfig`.
        UnsupportedError: Horovod, torch.distributed or MPI runs more processes than this one, and
            `independent` is not set; the optimizer is accelerated or distributed already, or its
            parameters cannot be accelerated.
        HistoryMemoryError: the history does not fit into free memory.
    """
    config = _checked_config(anderson)
    _check_optimizer(optimizer)
    must_be_alone = config.enabled and not independent
    if must_be_alone:
        job.check_alone()
    inner = type(optimizer)
    methods = _methods(inner, {"__module__": inner.__module__}) | {"__reduce_ex__": _reduce}
    cls: Any = type(inner.__name__, (_keeping_gradient(inner),), methods)
    accelerated = cls.__new__(cls)
    vars(accelerated).update(_attributes(optimizer))
    if backward_passes_per_step < 1:
        raise ConfigError(
            f"Invalid backward_passes_per_step={backward_passes_per_step!r}. Must be at least 1."
        )
    if not isinstance(config.shard_group, str):
        raise ConfigError(
            f"Invalid shard_group={config.shard_group!r} in one process. Must be 'world'."
        )
    comm = LocalCommunicator()
    group = ShardGroup(comm)
    made = _attach(accelerated, optimizer, config, comm, group, backward_passes_per_step)
    made._anderson_independent, made._anderson_look_again = independent, must_be_alone
    made.anderson.check_memory(made._anderson_problem)
    return made


@_class_of_what_it_returns
def DistributedAndersonOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: Any = None,
    backward_passes_per_step: int = 1,
    op: Any = None,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | list[list[Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: Any = None,
    *,
    anderson: AndersonConfig | None = None,
) -> Any:
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

    Returns:
        An instance of the given optimizer's class, with Horovod's methods and the attribute
        `anderson`, see `AndersonOptimizer`.

    Raises:
        HorovodMissingError: Horovod is not installed, was built without torch, or fails to load.
        ConfigError: `hvd.init()` has not been called; `anderson` is not an `AndersonConfig`, or
            does not go with Adasum; `compression` compresses nothing.
        UnsupportedError: as for `AndersonOptimizer`.
        ReplicaMismatchError: on every rank, if ranks differ in parameters or settings.
        HistoryMemoryError: on every rank, if the history of any does not fit into free memory.
    """
    try:
        import horovod.torch as hvd
        from horovod.torch.optimizer import DistributedOptimizer  # whatever hvd's name stands for
    except Exception as error:
        raise job.horovod_missing(error) from error
    job.check_started(hvd)

    from aadl_hvd.comm.horovod import horovod_communicator, shard_group

    op = hvd.Average if op is None else op
    process_set = hvd.global_process_set if process_set is None else process_set
    adasum = op == hvd.Adasum and hvd.size() > 1
    elastic = os.environ.get("HOROVOD_ELASTIC") == "1"
    # A rank that joins an elastic job is alone here: the others are about to meet it in sync().
    comm: Communicator = LocalCommunicator() if elastic else horovod_communicator(process_set)
    config = _accepted_by_all(comm, lambda: _accept(optimizer, anderson, compression, adasum))
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
        "groups": _by_place(groups, optimizer),
        "sparse_as_dense": sparse_as_dense,
        "named_parameters": _by_place(named_parameters, optimizer),
    }
    _compare_ranks(comm, optimizer, config, arguments)
    # Raises, before Horovod has hooks in place.
    _accepted_by_all(comm, lambda: OptimizerFixedPoint(optimizer, config.residual))
    group = shard_group(comm, process_set, config.shard_group)
    if all(comm.allgather_object(_only_initialised(optimizer))):
        _start_anew(optimizer)
    if elastic:
        comm = PendingCommunicator()
        group = ShardGroup(comm)
        # It registers itself, for those who use Horovod's own TorchState; it is a layer above.
        importlib.import_module("aadl_hvd.elastic")

    inner = type(optimizer)
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
    distributed: Any = make() if elastic else _accepted_by_all(comm, make)
    horovods = {
        name: value
        for name, value in vars(type(distributed)).items()
        if name not in ("__dict__", "__weakref__")
    }
    namespace = _methods(inner, horovods) | _distributed_methods(inner, horovods)
    if not adasum:
        namespace["step"] = _with_hooks_on_reduced(namespace["step"])
    keeping = _keeping_gradient(inner, hooked=True)
    distributed.__class__ = type(inner.__name__, (keeping,), namespace)
    # When Horovod sets up its reductions at all: the condition in its __init__.
    alone = hvd.size() == 1 and not elastic
    distributed._anderson_reduces = adasum or (process_set.included() and not alone)
    summed = op == hvd.Sum
    made = _attach(distributed, optimizer, config, comm, group, backward_passes_per_step, summed)
    made._anderson_arguments = arguments
    if not elastic:
        made.anderson.check_memory(made._anderson_problem)
        made.anderson.compare_replicas(made._anderson_problem)  # if equal now, they must stay it
    return made


def meet(optimizer: Any) -> tuple[Communicator, ShardGroup]:
    """The ranks of an elastic job as they are now, for `connect`. Collective over all of them.

    Args:
        optimizer: what `DistributedAndersonOptimizer` returned.

    Raises:
        ReplicaMismatchError: on every rank, if ranks differ in parameters or settings.
    """
    from aadl_hvd.comm.horovod import horovod_communicator, shard_group

    comm = horovod_communicator(optimizer.process_set)
    config = optimizer.anderson.config
    _compare_ranks(comm, optimizer, config, optimizer._anderson_arguments)
    try:
        return comm, shard_group(comm, optimizer.process_set, config.shard_group)
    except ConfigError as error:  # on every rank; nodes come and go, and training must go on
        if comm.rank == 0:
            _log.warning("elastic: all ranks share one history for now. %s", error)
        return comm, ShardGroup(comm)


def connect(optimizer: Any, comm: Communicator, group: ShardGroup, calls: int) -> None:
    """Goes on with the ranks that `meet` returned; see `Accelerator.connect`. Not collective."""
    optimizer.anderson.connect(comm, group, calls)
    _measure_noise(optimizer)


# Holds hooks of all optimizers: torch.optim.optimizer.register_optimizer_step_pre_hook.
_TORCH_OPTIMIZER_MODULE: Any = sys.modules[torch.optim.Optimizer.__module__]
# Of what torch lays around the method `step` of every optimizer class, to fire hooks.
_HOOKED = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__


def _attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All of an optimizer's attributes, to be shared with the accelerated one."""
    # An instance attribute `step` is a scheduler's wrapper, bound to the optimizer given.
    attributes = {k: v for k, v in vars(optimizer).items() if k != "step"}
    # GradScaler must unscale gradients before they become residuals, use_kernels kernels or not.
    return attributes | {"_step_supports_amp_scaling": False}


def _stand_in(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What Horovod is given in the optimizer's place.

    It calls the class of what it is given, with the parameter groups and nothing else: a class
    that needs more arguments would fail, and one with defaults forget what it was told.
    """

    class StandIn(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            vars(self).update(_attributes(optimizer))
            if self.defaults.get("differentiable"):  # there is no graph through a reduction
                self.defaults = self.defaults | {"differentiable": False}

    return StandIn(None)


def _methods(inner: Any, below: dict[str, Any]) -> dict[str, Any]:
    """The methods of an accelerated class: those in `below`, with acceleration laid over them."""

    def base(name: str) -> Any:
        return below.get(name, getattr(inner, name))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def step(self: Any, closure: Closure | None = None) -> Any:
        """One step of the base optimizer, accelerated on every p-th."""
        _look_again(self)
        config = self.anderson.config
        if closure is None and config.enabled and config.safeguard == "loss":
            raise UnsupportedError(
                "Invalid step(closure=None) with safeguard='loss'. Must be given a closure that "
                "clears the gradients, computes the loss, calls backward() and returns the loss; "
                "or choose safeguard='descent', which needs none."
            )
        if self._averaged:
            raise UnsupportedError(
                "Invalid step() inside averaged_weights(): training goes on from the weights "
                "themselves. Leave the block first."
            )
        self._accelerated._opt_called = True  # for schedulers made before the wrapping
        problem = self._anderson_problem
        problem.base_step = lambda: self._base_step(closure)
        problem.skip_step = lambda: self._skip_step(closure)
        if closure is not None:
            kind = problem.device.type
            enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

            def evaluate() -> float:
                # The algorithm's own numerics are plain; the closure's are what the user chose.
                with torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled):
                    return _number(self._evaluate(closure))

            problem.evaluate = evaluate
        try:
            return self.anderson.step(problem)
        finally:  # neither outlives the step: they hold on to the closure and its graph
            vars(problem).pop("base_step")
            vars(problem).pop("skip_step")
            vars(problem).pop("evaluate", None)
            problem.forget_gradient()

    @contextlib.contextmanager
    def averaged_weights(
        self: Any,
        loss: Closure | None = None,
        *,
        which: float | str | None = "auto",
        model: torch.nn.Module | None = None,
        batches: Iterable[Any] = (),
        forward: Callable[[Any], Any] | None = None,
    ) -> Iterator[float | None]:
        """Within, the model holds averaged weights, for evaluation, saving or export.

        Afterwards weights and batch-norm statistics are what they were, bit for bit. Collective;
        no step may be taken inside. Which of `AndersonConfig.averages` it is:

        - with `loss`: the one, the last iterate included, with the lowest mean over ranks; so it
          is never worse than the last iterate on the data that `loss` sees.
        - without: the one that promises the largest gain by the trapezoidal rule over gradients
          measured in training (residual="gradient" only), the last iterate if none does.

        `loss` evaluates this rank's loss at the weights in place, on the same few batches each
        time. `which` names an average, or None for the last iterate, in place of a choice. With
        `model` and `batches` batch-norm statistics are measured at the weights chosen (and at
        those compared), by `forward(batch)` or `model(batch)`, and averaged over ranks.

        Yields the average's name in `AndersonConfig.averages`, or None for the last iterate.
        """
        accelerator: Accelerator = self.anderson
        problem = self._anderson_problem
        names = accelerator.config.averages
        batches = list(batches)
        refusal: AndersonError | None = None
        if not (which is None or which == "auto" or which in names):
            refusal = ConfigError(
                f"Invalid which={which!r}. Must be 'auto', None, or one of averages={names!r}."
            )
        elif model is not None and not batches:
            refusal = ConfigError("Invalid batches=[]. Must hold at least one with model=...")
        elif self._averaged:
            refusal = UnsupportedError(
                "Invalid averaged_weights() inside averaged_weights(). Leave the outer block first."
            )
        # What one rank refuses is an error on all of them, and all must ask for the same.
        asked = [None, "auto", *names].index(which) if refusal is None else -1
        asked = 4 * asked + 2 * (loss is None) + (model is None)
        own = np.array([refusal is not None, asked, asked**2], np.float64)
        refused, mean, square = accelerator.mean_over_ranks(own)
        if refusal is not None:
            raise refusal
        if refused or square != mean**2:
            raise ReplicaMismatchError(
                f"Another rank refused averaged_weights(), or asked for something else than "
                f"which={which!r}, loss {'not ' * (loss is None)}given, model "
                f"{'not ' * (model is None)}given. All must ask for the same."
            )
        hash(problem.signature)  # up to date with the parameter groups
        if not accelerator.agreed:  # averages may have been loaded
            accelerator.agree(problem)
        restore = problem.hold()

        def put_in(kind: float | None) -> bool:
            if kind is None:
                restore()
            elif not accelerator.put_average(problem, kind):
                return False
            if model is not None:
                recalibrate_batch_norm(model, batches, mean_over_ranks, forward)
            return True

        def mean_over_ranks(values: Tensor) -> Tensor:
            return accelerator.comm.sum_tensor(values) / accelerator.comm.size

        def mean_loss() -> float:
            assert loss is not None
            return float(accelerator.mean_over_ranks(np.array([_number(loss())]))[0])

        with contextlib.ExitStack() as undo:
            if model is not None:
                undo.enter_context(kept_batch_norm(model))
            undo.callback(restore)
            self._averaged = True
            undo.callback(setattr, self, "_averaged", False)
            chosen: float | None = None
            if which != "auto":
                chosen = which  # type: ignore[assignment]
            elif loss is not None:
                losses = {kind: mean_loss() for kind in (None, *names) if put_in(kind)}
                chosen = min(losses, key=lambda kind: (not losses[kind] < math.inf, losses[kind]))
            else:
                chosen = accelerator.best_average()
            if not put_in(chosen):
                chosen = None
                put_in(None)
            yield chosen

    def _base_step(self: Any, closure: Closure | None) -> Any:
        return super(type(self), self).step(closure)

    def _evaluate(self: Any, closure: Closure) -> Any:
        """The closure's value, its gradients as the base optimizer is to use them."""
        return closure()

    def _skip_step(self: Any, closure: Closure | None) -> Any:
        """What a step without an update leaves to be done."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def observe(self: Any, loss: float | Tensor) -> None:
        """Says this rank's loss at the present weights, before `step`: an optional line.

        It judges the accelerated step before: if the mean over ranks is higher than it was, by
        more than the losses' own spread, weights and momentum go back to the base optimizer's
        step on all ranks, this step does nothing else, and acceleration pauses for a while. All
        ranks should call it; a step in which one does not is not judged.

        `loss` is that of the ordinary forward pass, a float or a tensor []; of several calls
        before one step the mean counts.
        """
        _look_again(self)
        self.anderson.observe(loss)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(
            f"Invalid use of the class of an accelerated {inner.__name__}: it cannot be "
            "constructed, nor wrapped by hvd.DistributedOptimizer. Pass the plain torch optimizer "
            "to DistributedAndersonOptimizer."
        )

    def state_dict(self: Any) -> dict[str, Any]:
        """The base optimizer's state, with counters and settings under "anderson".

        Not collective. Loads into plain torch as well. The history is not part of it, but for the
        rank that `consolidate_state_dict` has just given it: after loading it rebuilds itself in
        m stores. Hooks see all of it. Where one returns another state in its place, "anderson" is
        put into that; one that puts a state inside another dict has to keep the entry itself.
        """

        def add(_: Any, state: dict[str, Any]) -> None:
            if "anderson" not in state:
                state["anderson"] = anderson_state(self)
                if self.anderson.consolidated is not None:
                    state["anderson"]["history"] = self.anderson.consolidated

        handle = self.register_state_dict_post_hook(add, prepend=True)
        try:
            state: dict[str, Any] = inner.state_dict(self)
        finally:
            handle.remove()
        # Not into what a hook has laid around a state; that has it.
        plain = isinstance(state, dict) and {"state", "param_groups"} <= state.keys()
        if plain or not self._optimizer_state_dict_post_hooks:
            add(self, state)
        return state

    def consolidate_state_dict(self: Any, to: int = 0) -> dict[str, Any] | None:
        """`state_dict` with the whole history, on rank `to`; None on the others. Collective.

        Loads into any number of ranks, any layout and depth. The ranks' parts travel through host
        memory, one rank's at a time: rank `to` needs memory for the whole, 2 m n numbers and what
        else there is (2 n for the last pair, 2 n or 4 n for each average), the others for one
        tensor of their own. Until the next step, load, reset or new parameter group
        `state_dict` on rank `to` holds it, too. Hooks of `state_dict` fire on rank `to` alone,
        when nobody waits for it any more: they may raise, and must not be collective.

        `to` is a rank of the process set.

        Raises:
            ConfigError: there is no such rank, or ranks asked for different ones; on every rank.
            CheckpointError: on every rank, if any could not hand out or take in a part.
        """
        accelerator: Accelerator = self.anderson
        comm = accelerator.comm
        # Small and first: a rank that calls this alone is found out in a second (MPI).
        asked = comm.allreduce(replicas.payload(zlib.crc32(repr(to).encode())))
        if not replicas.equal(asked, comm.size):
            everybody = comm.allgather_object(to)
            raise ConfigError(f"Invalid to={everybody}, by rank. Must be the same on all.")
        if isinstance(to, bool) or not isinstance(to, int) or not 0 <= to < comm.size:
            raise ConfigError(f"Invalid to={to!r}. Must be a rank, 0 to {comm.size - 1}.")
        problem = self._anderson_problem
        accelerator.agree(problem)
        needed = accelerator.group.index == 0
        history = checkpoint.consolidate(comm, lambda: accelerator.part(problem), to, needed)
        accelerator.consolidated = history
        return None if history is None else self.state_dict()

    def sharded_state_dict(self: Any) -> dict[str, Any]:
        """This rank's part of the history, copied to host memory; the base's state is not in it.

        Not collective. For one file a rank, written in parallel, and for a rank that may outlive
        others: 2 m n/P numbers, 2 n/P for the last pair, 2 n/P or 4 n/P for each average; where a
        step is on trial that may have to be undone, the base optimizer's state, too (with
        `safeguard="residual"`).
        No hooks of `state_dict` fire: they are about the base's state.

        Returns:
            {"anderson": ...}: plain dicts, lists, numbers and tensors, see `aadl_hvd.checkpoint`.
            `load_state_dict` takes it on the same rank of as many, alone, after the base
            optimizer's state, or with it, `{**state, **part}`;
            `aadl_hvd.checkpoint.merge_shards` makes the whole of all ranks' parts.
        """
        state = anderson_state(self)
        state["history"] = self.anderson.part(self._anderson_problem)
        return {"anderson": state}

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class, with a history or without, or of plain torch.

        Settings are not taken from it: those given at construction hold. A history is fitted to
        them, to the number of ranks and to the layout: with a smaller `history_depth` the newest
        columns are kept. Where that is impossible (another `residual`, other trained parameters,
        other ratios of the rates where the residual depends on them) it is left out with a
        warning, and rebuilds itself in m stores. What else does not fit raises an error, and
        everything stays as it was.

        Not collective: Horovod's usual resume, in which rank 0 alone loads and broadcasts
        afterwards, must not wait for anybody. So the history, and the number of the step that
        says when to store and accelerate, come into force only when a collective that all ranks
        enter anyhow has shown that all have loaded the same: the first `step` of an optimizer has
        a tiny one for this. If all ranks load, each its own part or all the whole, that step goes
        on bit for bit as the run that was saved, on as many ranks (on other numbers, to rounding).
        If only some have, the history is reset on all of them. In the middle of a run the next
        accelerated step finds out, or `anderson.agree(...)`.

        In the middle of a run the history and its averages are copied to host memory meanwhile, so
        that they can be put back.

        Hooks fire as in torch, pre-hooks before anything is examined, so that they may adapt it;
        what they raise comes through, and everything is put back then, too. None fire for a part
        of the history alone, {"anderson": ...}.

        With `enabled=False` a history is left out with a warning. What such an optimizer has saved
        holds none: one that is enabled loads it and begins its history as a new one does.

        Raises:
            CheckpointError: damaged, from a newer version, of another model, or a part that is
                not this rank's: says what differs. The base optimizer's state is examined, too: a
                tensor that holds NaN, of which nothing good can come, is damage.
        """
        accelerator: Accelerator = self.anderson
        problem = self._anderson_problem
        self._anderson_attended = False  # Horovod's method forgets all reductions
        hooked = isinstance(state_dict, dict) and state_dict.keys() != {"anderson"}
        part, left_out = None, ""
        with _all_or_nothing(self):
            if hooked:
                state_dict = _adapted(self, state_dict)
            groups, state = self.param_groups, self.state
            with checkpoint.readable("state_dict"):
                hash(problem.signature)  # up to date with the parameter groups
                saved: Any = state_dict.get("anderson")
                if "anderson" in state_dict:
                    part, left_out = checkpoint.examined(
                        saved,
                        checkpoint.described(self),
                        accelerator.config.to_dict(),
                        accelerator.share(problem.n),
                        accelerator.comm.size,
                        accelerator.comm.rank,
                    )
                whole = saved is None or not {"state", "param_groups"}.isdisjoint(state_dict)
                if whole:
                    _load_base(self, state_dict, base("load_state_dict"))
            if hooked:
                for hook in [*self._optimizer_load_state_dict_post_hooks.values()]:
                    hook(self)
            with checkpoint.readable("state_dict"):
                if whole:
                    base_state.check_loaded(self, groups, state)
                    self._accelerated.param_groups = self.param_groups
                    self._accelerated.state = self.state
                if part is not None:
                    problem.last_rates = tuple(saved["last_rates"])
                    if problem.settings == saved["settings"]:
                        _check_undo(self, part["undo"])
                    else:
                        part, left_out = None, "learning rates or weight decays are others"
                accelerator.reset(Reset.LOADED)
                if part is not None:
                    accelerator.load(problem, part, checkpoint.fingerprint_of(saved["history"]))
                if saved is not None:
                    accelerator.stats.load_counters(saved["counters"])
                    accelerator.stats.load_measured(saved.get("measured", {}))
                if left_out:
                    rebuilt = ", which rebuilds itself" if accelerator.config.enabled else ""
                    warnings.warn(
                        f"load_state_dict leaves out the history{rebuilt}: {left_out}.",
                        stacklevel=2,
                    )

    def add_param_group(self: Any, param_group: dict[str, Any]) -> None:
        """As in torch; the history is reset in the next step."""
        base("add_param_group")(self, param_group)
        self.anderson.consolidated = None

    def __repr__(self: Any) -> str:
        return f"{inner.__repr__(self)}\n{self.anderson.config}"

    own = (
        __init__,
        step,
        observe,
        averaged_weights,
        _base_step,
        _skip_step,
        _evaluate,
        state_dict,
        consolidate_state_dict,
        sharded_state_dict,
        load_state_dict,
        add_param_group,
        __repr__,
    )
    return {**below, **{f.__name__: f for f in own}}


@contextlib.contextmanager
def _all_or_nothing(optimizer: Any) -> Iterator[None]:
    """What a load has changed is put back, bit for bit, where it raises."""
    problem = optimizer._anderson_problem
    attributes = [(o, dict(vars(o))) for o in (optimizer, optimizer._accelerated)]
    groups = [(group, dict(group)) for group in optimizer.param_groups]
    rates, put_back = problem.last_rates, optimizer.anderson.hold()
    try:
        yield
    except BaseException:
        for owner, before in attributes:
            vars(owner).clear()
            vars(owner).update(before)
        for group, settings in groups:
            group.clear()
            group.update(settings)
        problem.last_rates = rates
        hash(problem.signature)  # up to date with the parameter groups
        put_back()
        raise


def _adapted(optimizer: Any, state_dict: dict[str, Any]) -> Any:
    """What the pre-hooks of `load_state_dict` make of a state, as in torch."""
    state_dict = state_dict.copy()
    for hook in [*optimizer._optimizer_load_state_dict_pre_hooks.values()]:
        result = hook(optimizer, state_dict)
        if result is not None:
            state_dict = result
    return state_dict


def _load_base(optimizer: Any, state_dict: dict[str, Any], load: Callable[..., None]) -> None:
    """Loads the base optimizer's state, as torch does; no hooks fire."""
    base_state.check_base(state_dict)
    names = "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"
    hooks = {name: getattr(optimizer, name) for name in names}
    vars(optimizer).update({name: OrderedDict() for name in names})
    try:
        load(optimizer, state_dict)
    finally:
        vars(optimizer).update(hooks)


def _check_undo(optimizer: Any, undo: dict[str, Any]) -> None:
    if "residual" in undo:
        entries = undo["residual"]["undo"]["entries"]
        what = "history['undo']['residual']"
        base_state.check_entries(entries, optimizer, what, True, optimizer.state)


def anderson_state(optimizer: Any) -> dict[str, Any]:
    """What a state_dict holds beside the base optimizer's, without the history."""
    problem = optimizer._anderson_problem
    return {
        "format": checkpoint.FORMAT,
        "config": optimizer.anderson.config.to_dict(),
        "counters": optimizer.anderson.stats.counters(),
        "measured": optimizer.anderson.stats.measured(),
        "parameters": checkpoint.described(optimizer),
        "settings": problem.settings,
        "last_rates": list(problem.last_rates),
    }


def _distributed_methods(inner: Any, horovods: dict[str, Any]) -> dict[str, Any]:
    """What Horovod's own methods need on top; `horovods` holds these."""
    from horovod.common.exceptions import HorovodInternalError

    adasum = "_starting_models" in horovods["__init__"].__code__.co_names

    def _base_step(self: Any, closure: Closure | None) -> Any:
        _register_new_parameters(self)
        if closure is None or adasum or not self._should_synchronize:
            result = horovods["step"](self, closure)
        else:  # Horovod would reduce first and evaluate then, and update with unreduced gradients
            result = super(type(self), self).step(closure)
        self._synchronized = False  # `_evaluate` may have been there
        return result

    def _evaluate(self: Any, closure: Closure) -> Any:
        if adasum or not self._should_synchronize:
            return closure()
        return _synchronized(self, closure)

    def _skip_step(self: Any, closure: Closure | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = _synchronized(self, closure)
        elif self._should_synchronize and not self._synchronized:
            self.synchronize()  # reductions are under way and must come to their end
        self._synchronized = False
        return loss

    def observe(self: Any, loss: float | Tensor) -> None:
        """As in `AndersonOptimizer`, but not with op=Adasum."""
        if adasum:
            raise UnsupportedError(
                "Invalid observe() with op=Adasum, which has moved the weights in the backward "
                "pass already: there is no step to leave out. Must be op=Average or Sum."
            )
        self.anderson.observe(loss)

    def zero_grad(self: Any, *args: Any, **kwargs: Any) -> None:
        """As in torch; not between backward() and step() or synchronize()."""
        if self._handles:
            raise AssertionError(
                "optimizer.zero_grad() was called after loss.backward() but before "
                "optimizer.step() or optimizer.synchronize(): gradients are being reduced."
            )
        inner.zero_grad(self, *args, **kwargs)

    def synchronize(self: Any) -> None:
        """As in Horovod; parameters that joined after the construction are reduced too."""
        _register_new_parameters(self)
        comm: Communicator = self.anderson.comm
        attended, self._anderson_attended = self._anderson_attended, False
        measured = attended and _reduces_in_place(self)
        try:
            if self._anderson_reduces and not adasum:
                _begin_reductions(self)
            if not attended:
                comm.attend(_reduced(self))
            horovods["synchronize"](self)
            self._anderson_joined = False
        except HorovodInternalError as error:  # as it is: Horovod elastic waits for it
            comm.explain(error)
            raise
        if not measured:
            _take_mean(self)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        raise UnsupportedError(
            "Invalid copy or pickle of a distributed optimizer, which is tied to its parameters "
            "and to the other ranks. Use state_dict() and load_state_dict()."
        )

    def _allreduce_grad_async(self: Any, p: Tensor) -> Any:
        if not adasum:
            _take_samples(self, [p])
        return horovods["_allreduce_grad_async"](self, p)

    def _grouped_allreduce_grad_async(self: Any, ps: Sequence[Tensor]) -> Any:
        _take_samples(self, ps)
        return horovods["_grouped_allreduce_grad_async"](self, ps)

    methods = [_base_step, observe, _skip_step, _evaluate, zero_grad, synchronize, __reduce_ex__]
    methods.append(_allreduce_grad_async)
    if not adasum:
        methods.append(_grouped_allreduce_grad_async)
    return {f.__name__: f for f in methods}


def _reduce(self: Any, protocol: Any) -> Any:
    """For copy, deepcopy and pickle: the class has no name to be found by, so it is made anew."""
    counters, passes = self.anderson.stats.counters(), self._anderson_passes
    made_of = self._accelerated, self.anderson.config, counters, passes
    return _rebuilt, (*made_of, self._anderson_independent)


def _rebuilt(
    optimizer: torch.optim.Optimizer,
    config: AndersonConfig,
    counters: dict[str, Any],
    passes: int,
    independent: bool = False,  # as in pickles of version 0.1
) -> Any:
    accelerated = AndersonOptimizer(
        optimizer,
        backward_passes_per_step=passes,
        anderson=config,
        independent=independent,
    )
    accelerated.anderson.stats.load_counters(counters)
    return accelerated


def _number(loss: Any) -> float:
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def _keeping_gradient(inner: Any, hooked: bool = False) -> Any:
    """The user's optimizer class, with a look at the final gradients before it uses them.

    The accelerated class is derived from it, so that Horovod's methods, which call the class above
    theirs, pass through here after every reduction.

    Args:
        inner: the user's class.
        hooked: step hooks fire here, too, as Horovod has it: what they do to reduced gradients
            counts. Else around the accelerated step alone.
    """
    bare = _without_hooks(inner.step)

    def step(self: Any, closure: Closure | None = None) -> Any:
        keep = self._anderson_problem.keep_gradient
        if "base_step" not in vars(self._anderson_problem):
            # hvd.broadcast_optimizer_state, which steps on zero gradients where there is no state:
            # weight decay moves the weights of ranks that have loaded no checkpoint.
            self.anderson.stepped_apart = True

        def evaluate() -> Any:
            loss = self._evaluate(closure)
            keep()
            return loss

        if closure is None:
            keep()
            return bare(self)
        return bare(self, evaluate)

    namespace: dict[str, Any] = {"step": step, "__module__": inner.__module__}
    if hooked and bare is not inner.step:
        namespace["step"] = torch.optim.Optimizer.profile_hook_step(step)
    return type(inner.__name__, (inner,), namespace)


def _without_hooks(step: Any) -> Any:
    """A method `step` without what torch has laid around it, if anything."""
    return step.__wrapped__ if getattr(step, "__code__", None) is _HOOKED else step


def _with_hooks_on_reduced(step: Any) -> Any:
    """`step` with torch's hooks around it, which do not fire in the middle of a reduction.

    Most reductions are in place. What a hook does to gradients meanwhile is lost, or not, on each
    rank as time has it: with Horovod's own class ranks then drift apart.
    """
    hooked = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(hooked)
    def waiting(self: Any, *args: Any, **kwargs: Any) -> Any:
        registered = _TORCH_OPTIMIZER_MODULE._global_optimizer_pre_hooks
        # A closure has yet to make the gradients.
        closure = args[0] if args else kwargs.get("closure")
        self._anderson_attended = False
        if (registered or self._optimizer_step_pre_hooks) and self._should_synchronize:
            _end_reductions(self, begin=closure is None and not self._synchronized)
        return hooked(self, *args, **kwargs)

    waiting.hooked = True  # type: ignore[attr-defined]  # so torch has it
    return waiting


def _synchronized(optimizer: Any, closure: Closure) -> Any:
    """The closure's value, its gradients reduced (unless the closure has seen to it)."""
    if optimizer._anderson_attended:  # a hook has put the closure in; these began before it did
        optimizer.synchronize()
    optimizer._synchronized = False
    loss = closure()
    if not optimizer._synchronized:
        optimizer.synchronize()
    return loss


def _begin_reductions(optimizer: Any) -> None:
    """What Horovod's synchronize begins of itself, and then waits where nobody can look around."""
    begun: set[Tensor] = set()
    for key in optimizer._handles:
        begun.update(key if isinstance(key, tuple) else (key,))
    waiting = [p for p, (handle, _) in optimizer._handles.items() if handle is None]
    for p in [*waiting, *(optimizer._requires_update - begun)]:
        optimizer._handles[p] = optimizer._allreduce_grad_async(p)


def _end_reductions(optimizer: Any, begin: bool) -> None:
    """Waits until no reduction is under way.

    As `synchronize`, but that gradients which were sent compressed stay this rank's own, as they
    are in Horovod before the step.

    Args:
        optimizer: what `DistributedAndersonOptimizer` returned.
        begin: reductions begin here even if none has begun on this rank. Others may wait for
            them, and a hook that is collective would never meet those ranks.
    """
    begun = any(isinstance(handle, int) for handle, _ in optimizer._handles.values())
    if not (begun or (begin and optimizer._anderson_reduces)):
        return
    _register_new_parameters(optimizer)
    _begin_reductions(optimizer)  # others may wait for these
    optimizer.anderson.comm.attend(_reduced(optimizer, all_of_them=True))
    optimizer._anderson_attended = True
    if _reduces_in_place(optimizer):
        _take_mean(optimizer)


def _reduces_in_place(optimizer: Any) -> bool:
    """Whether gradients are the mean as soon as their reductions have ended."""
    from horovod.torch import Compression

    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    sparse = any(gradient is not None and gradient.is_sparse for gradient in gradients)
    return optimizer._compression is Compression.none and not sparse


def _reduced(optimizer: Any, all_of_them: bool = False) -> Callable[[], bool]:
    """Whether there is no more to attend to, to be asked again and again.

    Where the first reduction is done all ranks have come, and the rest is left to Horovod, which
    waits with fewer turns; on Gloo it is not. Where parameters have joined, other ranks may not
    know of them.
    """
    from horovod.torch import mpi_enabled, poll

    begun = [handle for handle, _ in optimizer._handles.values() if isinstance(handle, int)]
    if mpi_enabled() and not optimizer._anderson_joined and not all_of_them:
        begun = begun[:1]

    def done() -> bool:
        while begun and poll(begun[-1]):
            begun.pop()
        return not begun

    return done


def _take_samples(optimizer: Any, parameters: Sequence[Tensor]) -> None:
    """Notes this rank's own gradients, which are about to be averaged in place."""
    samples = optimizer._anderson_problem.samples
    # Micro-batches of a rank alone are taken by hooks, whether Horovod reduces or not.
    if samples is not None and samples.samples == 1 and optimizer.anderson.measures_noise:
        with torch.no_grad():
            for p in parameters:
                samples.take(p)


def _take_mean(optimizer: Any) -> None:
    """Notes the mean gradients, before anything is done to them."""
    if optimizer.anderson.measures_noise and optimizer._anderson_problem.samples is not None:
        with torch.no_grad():
            optimizer._anderson_problem.samples.take_mean()


def _register_new_parameters(optimizer: Any) -> None:
    """Lets Horovod reduce trainable parameters it does not know: its own class never does."""
    if not optimizer._anderson_reduces:
        return
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            if not p.requires_grad or p in optimizer._requires_update:
                continue
            optimizer._anderson_joined = True
            optimizer._parameter_names.setdefault(p, f"allreduce.added.{i}.{j}")
            optimizer._allreduce_delay[p] = optimizer.backward_passes_per_step
            optimizer._requires_update.add(p)
            if getattr(optimizer, "_groups", None) is not None:
                optimizer._p_to_group[p] = (p,)
                optimizer._group_counts[(p,)] = 0
            if hasattr(optimizer, "_starting_models"):
                optimizer._starting_models[p] = torch.zeros_like(p, requires_grad=False)
            with torch.enable_grad():
                accumulator = p.expand_as(p).grad_fn.next_functions[0][0]
            accumulator.register_hook(optimizer._make_hook(p))
            optimizer._grad_accs.append(accumulator)


def _attach(
    accelerated: Any,
    optimizer: torch.optim.Optimizer,
    config: AndersonConfig,
    comm: Communicator,
    group: ShardGroup,
    passes: int,
    summed: bool = False,
) -> Any:
    starting = getattr(accelerated, "_starting_models", None)

    def before(p: Tensor) -> Tensor:
        # Adasum's hooks turn a parameter into its own update while the reduction is under way.
        handle = accelerated._handles.get(p)
        return starting[p] if handle is not None and handle[0] is not None else p  # type: ignore[index]

    accelerated._accelerated = optimizer
    accelerated._averaged = accelerated._anderson_joined = accelerated._anderson_attended = False
    accelerated._anderson_passes, accelerated._anderson_summed = passes, summed
    accelerated._anderson_look_again = False
    accelerated._anderson_problem = OptimizerFixedPoint(
        accelerated, config.residual, before if starting is not None else None
    )
    accelerated.anderson = Accelerator(config, comm, group)
    _measure_noise(accelerated)
    accelerated._patch_step_function()
    return accelerated


def _look_again(accelerated: Any) -> None:
    """At the job, once: it may have been set up after the construction."""
    if accelerated._anderson_look_again:
        job.check_alone()
        accelerated._anderson_look_again = False


def _measure_noise(accelerated: Any) -> None:
    """Has gradients sampled, as the number of ranks asks for."""
    problem: OptimizerFixedPoint = accelerated._anderson_problem
    ranks, passes = accelerated.anderson.comm.size, accelerated._anderson_passes
    problem.sample_no_gradients()
    config: AndersonConfig = accelerated.anderson.config
    if not config.enabled or config.noise_gate is None or hasattr(accelerated, "_starting_models"):
        return
    if ranks > 1:
        problem.sample_gradients(1, ranks if accelerated._anderson_summed else 1)
    elif passes > 1:
        wanted = functools.partial(_measures_noise, weakref.ref(accelerated))
        problem.sample_gradients(passes, passes, wanted)


def _measures_noise(optimizer: Any) -> bool:
    accelerated = optimizer()
    return accelerated is not None and accelerated.anderson.measures_noise


def _checked_config(anderson: AndersonConfig | None) -> AndersonConfig:
    if anderson is None:
        return AndersonConfig()
    if not isinstance(anderson, AndersonConfig):
        raise ConfigError(f"Invalid anderson={anderson!r}. Must be an AndersonConfig or None.")
    return anderson


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


def _accept(
    optimizer: torch.optim.Optimizer,
    anderson: AndersonConfig | None,
    compression: Any,
    adasum: bool,
) -> AndersonConfig:
    """The settings, if they and the optimizer can be distributed."""
    config = _checked_config(anderson)
    if compression is not None and not hasattr(compression, "compress"):
        raise ConfigError(
            f"Invalid compression={compression!r}. Must be hvd.Compression.none or .fp16, or have "
            "their methods; an AndersonConfig goes by keyword: anderson=AndersonConfig(...)."
        )
    if adasum:
        config = _adasum_config(config, explicit=anderson is not None)
    _check_optimizer(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(
            "Invalid optimizer LBFGS. It decides from the loss of one rank how often it calls the "
            "closure; ranks would wait for each other for ever. AndersonOptimizer takes it."
        )
    return config


def _accepted_by_all(comm: Communicator, accept: Callable[[], _Accepted]) -> _Accepted:
    """What `accept` returns; raises on every rank if it raised on any. Collective."""
    try:
        accepted = accept()
    except Exception as error:
        comm.allgather_object(str(error) or type(error).__name__)
        raise
    for rank, refusal in enumerate(comm.allgather_object(None)):
        if refusal is not None:
            raise ReplicaMismatchError(f"Rank {rank} refused what this rank accepts: {refusal}")
    return accepted


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UnsupportedError(
            f"Invalid optimizer of type {type(optimizer).__name__}. Must be a "
            "torch.optim.Optimizer."
        )
    if isinstance(getattr(optimizer, "anderson", None), Accelerator):
        raise UnsupportedError(
            "Invalid optimizer: it is accelerated already. Pass the plain torch optimizer."
        )
    if type(optimizer).__module__ == _HOROVOD_MODULE:
        raise UnsupportedError(
            "Invalid optimizer: it is a hvd.DistributedOptimizer. Pass the plain torch optimizer "
            "to DistributedAndersonOptimizer, with the arguments you gave to Horovod."
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


def _by_place(value: Any, optimizer: torch.optim.Optimizer) -> Any:
    """An argument of Horovod's that may hold parameters, these named by their place."""
    places = {
        id(p): f"parameter {i}.{j}"
        for i, group in enumerate(optimizer.param_groups)
        for j, p in enumerate(group["params"])
    }

    def named(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [named(entry) for entry in value]
        return places.get(id(value), "a tensor") if isinstance(value, Tensor) else value

    return named(value)


def _compare_ranks(
    comm: Communicator,
    optimizer: torch.optim.Optimizer,
    config: AndersonConfig,
    arguments: dict[str, Any],
) -> None:
    """Raises on every rank if any differs: unequal ranks would hang or diverge later."""
    lines = [f"a {type(optimizer).__name__} optimizer"]
    lines += [f"{name}={value!r}" for name, value in (config.to_dict() | arguments).items()]
    lines += [
        f"parameter {i}.{j}: shape {tuple(p.shape)}, {p.dtype}, requires_grad={p.requires_grad}"
        for i, group in enumerate(optimizer.param_groups)
        for j, p in enumerate(group["params"])
    ]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    digests = comm.allgather_object(digest)
    if len(set(digests)) == 1:
        return
    everybody = comm.allgather_object(lines)
    rank = next(r for r, d in enumerate(digests) if d != digests[0])
    for here, there in itertools.zip_longest(everybody[0], everybody[rank], fillvalue="nothing"):
        if here != there:
            break
    raise ReplicaMismatchError(
        f"Ranks that share a history differ: rank 0 has {here}, rank {rank} has {there}. All must "
        "build the same model, optimizer and AndersonConfig before this call."
    )

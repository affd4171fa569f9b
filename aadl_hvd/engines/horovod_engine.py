"""Horovod as an engine: when reductions begin and end, and what is noted of the gradients.

Horovod's optimizer begins to reduce a gradient in the backward pass and waits for it in `step`. Its
private attributes are used here and nowhere else: `_handles` (reductions under way, by parameter),
`_requires_update` (parameters to reduce), `_synchronized`, `_should_synchronize`, and what
`_register_new_parameters` sets.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from horovod.common.exceptions import HorovodInternalError
from horovod.torch import Compression, mpi_enabled, poll
from torch import Tensor

from aadl_hvd.comm.base import Communicator, ShardGroup
from aadl_hvd.comm.horovod import horovod_communicator
from aadl_hvd.comm.horovod_groups import shard_group
from aadl_hvd.engines.rank_checks import compare_ranks
from aadl_hvd.errors import ConfigError, UnsupportedError
from aadl_hvd.optim.classes import TORCH_MODULE
from aadl_hvd.optim.engine import Closure, Engine

_log = logging.getLogger("aadl_hvd")


class HorovodEngine(Engine):
    """Reduces gradients as `hvd.DistributedOptimizer` does.

    Args:
        distributed: what Horovod's constructor returned. Its hooks are on the parameters, and it
            becomes the accelerated optimizer.
        horovods: the attributes of the class that Horovod made for it.
        process_set: the ranks that train together.
        arguments: of the constructor, for comparisons over ranks.
        passes: micro-batches whose gradients a step adds up.
        summed: whether `op` is `hvd.Sum`.
        reduces: whether Horovod reduces anything here.
    """

    def __init__(
        self,
        distributed: Any,
        horovods: Mapping[str, Any],
        process_set: Any,
        arguments: Mapping[str, Any],
        passes: int,
        summed: bool,
        reduces: bool,
    ) -> None:
        super().__init__(passes, summed)
        self.horovods, self.process_set = horovods, process_set
        self._distributed, self._arguments, self._reduces = distributed, arguments, reduces
        self._adasum = hasattr(distributed, "_starting_models")
        self.reduces_gradients = not self._adasum
        if self._adasum:
            self.weights_before = self._weights_before
        self._joined = False  # whether parameters have joined since all ranks met last
        self._ended = False  # whether all reductions have ended, before `synchronize`
        self._noted = False  # whether the mean has been noted then

    # The seam

    def reduce(self) -> None:
        """Ends all reductions, by the public method: users may have extended it."""
        self._distributed.synchronize()

    def check_observe(self) -> None:
        """Losses are of no use with op=Adasum."""
        if self._adasum:
            raise UnsupportedError(
                "Invalid observe() with op=Adasum, which has moved the weights in the backward "
                "pass already: there is no step to leave out. Must be op=Average or Sum."
            )

    def base_step(self, closure: Closure | None) -> Any:
        """One step of Horovod's optimizer; with a closure gradients are reduced after it."""
        distributed = self._distributed
        self._register_new_parameters()
        if closure is None or self._adasum or not distributed._should_synchronize:
            result = self.horovods["step"](distributed, closure)
        else:  # Horovod would reduce first and evaluate then, and update with unreduced gradients
            result = self.base.step(closure)
        distributed._synchronized = False  # `evaluate` may have set it
        return result

    def evaluate(self, closure: Closure) -> float | Tensor:
        """The closure's value, its gradients as the base optimizer is to use them."""
        if self._adasum or not self._distributed._should_synchronize:
            return closure()
        return self._synchronized(closure)

    def skip_step(self, closure: Closure | None) -> float | Tensor | None:
        """Reductions are under way, and must come to their end without an update."""
        distributed, loss = self._distributed, None
        if closure is not None:
            with torch.enable_grad():
                loss = self._synchronized(closure)
        elif distributed._should_synchronize and not distributed._synchronized:
            self.reduce()
        distributed._synchronized = False
        return loss

    def load_base(self, state_dict: dict[str, Any]) -> None:
        """Horovod's own method forgets all reductions."""
        self._ended = self._noted = False
        if "load_state_dict" in self.horovods:
            self.horovods["load_state_dict"](self._distributed, state_dict)
        else:  # Adasum
            super().load_base(state_dict)

    # What Horovod's own methods need on top

    def synchronize(self) -> None:
        """As Horovod's; parameters that joined after the construction are reduced, too."""
        self._register_new_parameters()
        comm = self.accelerator.comm
        ended, noted = self._ended, self._noted
        self._ended = self._noted = False
        try:
            if self._reduces and not self._adasum:
                self._begin_reductions()
            if not ended:
                comm.poll_until(self._all_reduced())
            self.horovods["synchronize"](self._distributed)
            self._joined = False
        except HorovodInternalError as error:
            self._explain(error)
            raise
        if not noted:
            self.note_mean_gradients()

    def check_zero_grad(self) -> None:
        """Raises Horovod's error where gradients are being reduced."""
        if self._distributed._handles:
            raise AssertionError(
                "optimizer.zero_grad() was called after loss.backward() but before "
                "optimizer.step() or optimizer.synchronize(): gradients are being reduced."
            )

    def reduce_async(self, p: Tensor) -> Any:
        """Begins to reduce one gradient: `_allreduce_grad_async` of Horovod's class."""
        if not self._adasum:
            self.note_own_gradients([p])
        return self._begin("_allreduce_grad_async", p)

    def reduce_group_async(self, ps: Sequence[Tensor]) -> Any:
        """Begins to reduce a group: `_grouped_allreduce_grad_async` of Horovod's class."""
        self.note_own_gradients(ps)
        return self._begin("_grouped_allreduce_grad_async", ps)

    def before_hooks(self, closure: Closure | None) -> None:
        """Step hooks are about to fire: ends reductions, which they must not change halfway.

        Most reductions are in place. What a hook does to gradients meanwhile is lost, or not, on
        each rank as time has it: with Horovod's own class ranks then drift apart.
        """
        distributed = self._distributed
        hooks = TORCH_MODULE._global_optimizer_pre_hooks or distributed._optimizer_step_pre_hooks
        self._ended = self._noted = False
        if hooks and distributed._should_synchronize:
            # A closure has yet to make the gradients.
            self._end_reductions(begin=closure is None and not distributed._synchronized)

    # Elastic jobs

    def meet(self) -> tuple[Communicator, ShardGroup]:
        """The ranks of an elastic job as they are now, for `connect`. Collective over all of them.

        Raises:
            ReplicaMismatchError: on every rank, if ranks differ in parameters or settings.
        """
        comm, config = horovod_communicator(self.process_set), self.accelerator.config
        compare_ranks(comm, self.optimizer, config, self._arguments)
        try:
            return comm, shard_group(comm, self.process_set, config.shard_group)
        except ConfigError as error:  # on every rank; nodes come and go, and training must go on
            if comm.rank == 0:
                _log.warning("elastic: all ranks share one history for now. %s", error)
            return comm, ShardGroup(comm)

    # How

    def _begin(self, method: str, what: Any) -> Any:
        try:
            return self.horovods[method](self._distributed, what)
        except HorovodInternalError as error:  # Horovod has ended, and nobody has waited yet
            self._explain(error)
            raise

    def _explain(self, error: HorovodInternalError) -> None:
        """Adds what is known of ranks that have left. The error itself stays: elastic needs it."""
        if not getattr(error, "__notes__", None):  # not twice, where calls are within each other
            self.accelerator.comm.explain(error)

    def _weights_before(self, p: Tensor) -> Tensor:
        # Adasum's hooks turn a parameter into its own update while the reduction is under way.
        handle, _ = self._distributed._handles.get(p, (None, None))
        kept: Tensor = p if handle is None else self._distributed._starting_models[p]
        return kept

    def _synchronized(self, closure: Closure) -> float | Tensor:
        """The closure's value, its gradients reduced (unless the closure has seen to it)."""
        distributed = self._distributed
        if self._ended:  # a hook has put the closure in; these began before it did
            self.reduce()
        distributed._synchronized = False
        loss = closure()
        if not distributed._synchronized:
            self.reduce()
        return loss

    def _begin_reductions(self) -> None:
        """What Horovod's synchronize begins of itself, and then waits where nobody can look on."""
        distributed = self._distributed
        begun: set[Tensor] = set()
        for key in distributed._handles:
            begun.update(key if isinstance(key, tuple) else (key,))
        waiting = [p for p, (handle, _) in distributed._handles.items() if handle is None]
        for p in [*waiting, *(distributed._requires_update - begun)]:
            distributed._handles[p] = distributed._allreduce_grad_async(p)

    def _end_reductions(self, begin: bool) -> None:
        """Waits until no reduction is under way.

        As `synchronize`, but gradients which were sent compressed stay this rank's own, as they
        are in Horovod before the step.

        Args:
            begin: reductions begin here even if none has begun on this rank. Others may wait for
                them, and a hook that is collective would never meet those ranks.
        """
        if not (self._under_way() or (begin and self._reduces)):
            return
        self._register_new_parameters()
        self._begin_reductions()  # others may wait for these
        self.accelerator.comm.poll_until(self._all_reduced(every_one=True))
        self._ended = True
        self._noted = self._reduces_in_place()
        if self._noted:
            self.note_mean_gradients()

    def _under_way(self) -> list[int]:
        """Horovod's handles of reductions that have begun."""
        handles = (handle for handle, _ in self._distributed._handles.values())
        return [handle for handle in handles if isinstance(handle, int)]

    def _reduces_in_place(self) -> bool:
        """Whether gradients are the mean as soon as their reductions have ended."""
        groups = self.optimizer.param_groups
        gradients = (p.grad for group in groups for p in group["params"])
        sparse = any(gradient is not None and gradient.is_sparse for gradient in gradients)
        return self._distributed._compression is Compression.none and not sparse

    def _all_reduced(self, every_one: bool = False) -> Callable[[], bool]:
        """A function that says whether reductions are done, to be called again and again.

        On MPI all ranks have come when the first reduction is done. The rest is left to Horovod,
        which waits with fewer turns. On Gloo, where parameters have joined that other ranks may
        not know of, and with `every_one`, all reductions count.
        """
        begun = self._under_way()
        if mpi_enabled() and not self._joined and not every_one:
            begun = begun[:1]

        def done() -> bool:
            while begun and poll(begun[-1]):
                begun.pop()
            return not begun

        return done

    def _register_new_parameters(self) -> None:
        """Lets Horovod reduce trainable parameters it does not know: its own class never does."""
        if not self._reduces:
            return
        distributed = self._distributed
        for i, group in enumerate(distributed.param_groups):
            for j, p in enumerate(group["params"]):
                if not p.requires_grad or p in distributed._requires_update:
                    continue
                self._joined = True
                distributed._parameter_names.setdefault(p, f"allreduce.added.{i}.{j}")
                distributed._allreduce_delay[p] = distributed.backward_passes_per_step
                distributed._requires_update.add(p)
                if getattr(distributed, "_groups", None) is not None:
                    distributed._p_to_group[p] = (p,)
                    distributed._group_counts[(p,)] = 0
                if self._adasum:
                    distributed._starting_models[p] = torch.zeros_like(p, requires_grad=False)
                with torch.enable_grad():
                    accumulator = p.expand_as(p).grad_fn.next_functions[0][0]
                accumulator.register_hook(distributed._make_hook(p))
                distributed._grad_accs.append(accumulator)


def with_hooks_on_reduced(step: Any) -> Any:
    """The method `step` with torch's hooks around it, which fire when reductions have ended."""
    hooked = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(hooked)
    def waiting(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.anderson_engine.before_hooks(args[0] if args else kwargs.get("closure"))
        return hooked(self, *args, **kwargs)

    waiting.hooked = True  # type: ignore[attr-defined]  # so torch has it
    return waiting

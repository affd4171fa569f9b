"""The state of an accelerated optimizer, out and in: the base optimizer's, counters, history."""

from __future__ import annotations

import contextlib
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from aadl_hvd.checkpoint import base_state, transfer
from aadl_hvd.checkpoint.format import FORMAT, readable
from aadl_hvd.checkpoint.shard_state import TrialState
from aadl_hvd.checkpoint.state_dict import Examined, examine, parameter_table
from aadl_hvd.core.reduction import compared, equal
from aadl_hvd.errors import ConfigError, UnsupportedError
from aadl_hvd.optim.engine import Engine
from aadl_hvd.stats import Reset


def anderson_state(engine: Engine) -> dict[str, Any]:
    """What a state_dict holds beside the base optimizer's, without the history."""
    accelerator, problem = engine.accelerator, engine.problem
    return {
        "format": FORMAT,
        "config": accelerator.config.to_dict(),
        "counters": accelerator.stats.counters(),
        "measured": accelerator.stats.measured(),
        "parameters": parameter_table(engine.optimizer),
        "settings": problem.settings,
        "last_rates": list(problem.last_rates),
    }


def state_dict(engine: Engine) -> dict[str, Any]:
    """See `AcceleratedOptimizer.state_dict`."""
    optimizer: Any = engine.optimizer

    def add(_: Any, state: dict[str, Any]) -> None:
        if "anderson" not in state:
            state["anderson"] = anderson_state(engine)
            if (full := engine.accelerator.full_state) is not None:
                state["anderson"]["history"] = full.to_dict()

    handle = optimizer.register_state_dict_post_hook(add, prepend=True)
    try:
        state: dict[str, Any] = engine.base.state_dict()
    finally:
        handle.remove()
    # Not into what a hook has put around a state; that has it.
    plain = isinstance(state, dict) and {"state", "param_groups"} <= state.keys()
    if plain or not optimizer._optimizer_state_dict_post_hooks:
        add(optimizer, state)
    return state


def consolidate(engine: Engine, to: int) -> bool:
    """Brings the full state to rank `to`; True there, False elsewhere. Collective."""
    accelerator = engine.accelerator
    comm = accelerator.comm
    # Small and first: a rank that calls this alone is found out in a second (MPI).
    asked = comm.allreduce(compared(zlib.crc32(repr(to).encode())))
    if not equal(asked, comm.size):
        everybody = comm.allgather_object(to)
        raise ConfigError(f"Invalid to={everybody}, by rank. Must be the same on all.")
    if isinstance(to, bool) or not isinstance(to, int) or not 0 <= to < comm.size:
        raise ConfigError(f"Invalid to={to!r}. Must be a rank, 0 to {comm.size - 1}.")
    problem = engine.problem
    if problem.sharded:
        raise UnsupportedError(
            "Invalid consolidate_state_dict() with parameters that fully_shard has sharded. Must "
            "be save_history(), for any number of ranks, or sharded_state_dict(), one file a rank."
        )
    accelerator.agree(problem)
    needed = accelerator.group.index == 0
    full = transfer.consolidate(comm, lambda: accelerator.shard_state(problem), to, needed)
    accelerator.full_state = full
    return full is not None


def load(engine: Engine, state_dict: dict[str, Any]) -> None:
    """See `AcceleratedOptimizer.load_state_dict`."""
    accelerator, problem, optimizer = engine.accelerator, engine.problem, engine.optimizer
    hooked = isinstance(state_dict, dict) and state_dict.keys() != {"anderson"}
    found = Examined()
    with _all_or_nothing(engine):
        if hooked:
            state_dict = _adapted(optimizer, state_dict)
        groups, state = optimizer.param_groups, optimizer.state
        with readable("state_dict"):
            hash(problem.signature)  # up to date with the parameter groups
            saved: Any = state_dict.get("anderson")
            if "anderson" in state_dict:
                found = examine(
                    saved,
                    parameter_table(optimizer),
                    accelerator.config.to_dict(),
                    accelerator.share(problem.n),
                    accelerator.comm.size,
                    accelerator.comm.rank,
                    problem.sharded,
                )
            with_base = saved is None or not {"state", "param_groups"}.isdisjoint(state_dict)
            if with_base:
                _load_base(engine, state_dict)
        if hooked:
            for hook in [*vars(optimizer)["_optimizer_load_state_dict_post_hooks"].values()]:
                hook(optimizer)
        with readable("state_dict"):
            if with_base:
                base_state.check_loaded(optimizer, groups, state)
                engine.given.param_groups = optimizer.param_groups
                engine.given.state = optimizer.state
            shard, left_out = found.shard, found.left_out
            if shard is not None:
                problem.last_rates = tuple(saved["last_rates"])
                if problem.settings == saved["settings"]:
                    _check_undo(engine, shard.trial)
                else:
                    shard, left_out = None, "learning rates or weight decays are others"
            accelerator.reset(Reset.LOADED)
            if shard is not None:
                accelerator.load_state(problem, shard, found.fingerprint)
            if saved is not None:
                accelerator.stats.load_counters(saved["counters"])
                accelerator.stats.load_measured(saved["measured"])
            if left_out:
                rebuilt = ", which rebuilds itself" if accelerator.config.enabled else ""
                warnings.warn(
                    f"load_state_dict leaves out the history{rebuilt}: {left_out}.", stacklevel=3
                )


@contextlib.contextmanager
def _all_or_nothing(engine: Engine) -> Iterator[None]:
    """What a load has changed is put back, bit for bit, where it raises."""
    problem = engine.problem
    attributes = [(o, dict(vars(o))) for o in (engine.optimizer, engine.given)]
    groups = [(group, dict(group)) for group in engine.optimizer.param_groups]
    rates, put_back = problem.last_rates, engine.accelerator.backup()
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


def _load_base(engine: Engine, state_dict: dict[str, Any]) -> None:
    """Loads the base optimizer's state, as torch does; no hooks fire."""
    base_state.check_base(state_dict)
    attributes = vars(engine.optimizer)
    names = "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"
    hooks = {name: attributes[name] for name in names}
    attributes.update({name: OrderedDict() for name in names})
    try:
        engine.load_base(state_dict)
    finally:
        attributes.update(hooks)


def _check_undo(engine: Engine, trial: TrialState | None) -> None:
    if trial is not None and trial.residual is not None:
        entries = trial.residual.undo["entries"]
        what = "history['trial']['residual']"
        base_state.check_entries(entries, engine.optimizer, what, True, engine.optimizer.state)

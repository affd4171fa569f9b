"""Checks that a base optimizer can go on from a saved state: shapes, settings, no NaN.

torch loads nearly anything, and then fails in the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadl_hvd.errors import CheckpointError
from aadl_hvd.schema import anything, entries, instance, listed, number, refuse

# Entries of a parameter's state that have its shape, once there is a state, by optimizer class.
_SHAPED: dict[Any, tuple[str, ...]] = {
    torch.optim.SGD: (),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.NAdam: ("exp_avg", "exp_avg_sq"),
    torch.optim.RAdam: ("exp_avg", "exp_avg_sq"),
    torch.optim.SparseAdam: ("exp_avg", "exp_avg_sq"),
    torch.optim.Adamax: ("exp_avg", "exp_inf"),
    torch.optim.Adagrad: ("sum",),
    torch.optim.RMSprop: ("square_avg",),
    torch.optim.Adadelta: ("square_avg", "acc_delta"),
    torch.optim.ASGD: ("ax",),
    torch.optim.Rprop: ("prev", "step_size"),
}
# Entries that are tensors of one number; "step" for the classes that are not listed.
_SINGLE: dict[Any, tuple[str, ...]] = {
    torch.optim.NAdam: ("step", "mu_product"),
    torch.optim.ASGD: ("step", "eta", "mu"),
    **dict.fromkeys((torch.optim.SGD, torch.optim.SparseAdam), ()),
}
if hasattr(torch.optim, "Muon"):  # not in every version
    _SHAPED[torch.optim.Muon], _SINGLE[torch.optim.Muon] = ("momentum_buffer",), ()
if hasattr(torch.optim, "Adafactor"):
    _SHAPED[torch.optim.Adafactor] = ()
# Entries that exist if a flag among the settings is set.
_SWITCHED = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg"}
# Settings for which torch's constructors refuse some numbers; all others must only be finite.
_NOT_NEGATIVE = {
    *("lr", "momentum", "weight_decay", "eps", "alpha", "betas", "rho", "lr_decay"),
    *("momentum_decay", "etas", "step_sizes"),
}
_BELOW_ONE = {"betas", "rho"}
_LARGEST_SETTING = torch.finfo(torch.float32).max


def check_base(state_dict: Mapping[str, Any]) -> None:
    """Raises a CheckpointError if torch would load something else than was saved, or fail."""
    entries({"state": instance(dict), "param_groups": listed(instance(dict))})(
        state_dict, "state_dict"
    )
    groups = state_dict["param_groups"]
    for i, group in enumerate(groups):
        entries({"params": listed(anything)})(group, f"state_dict['param_groups'][{i}]")
    keys = [key for group in groups for key in group["params"]]
    named = all(type(key) is str for key in keys) and len({*keys}) == len(keys)
    counted = all(type(k) is int or isinstance(k, np.integer) for k in keys)
    if not named and not (counted and keys == [*range(len(keys))]):
        refuse(keys, "params in state_dict['param_groups']", "the parameters' places in order")


def check_loaded(
    optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], state: Mapping[Any, Any]
) -> None:
    """Raises a CheckpointError if a base optimizer could not go on with what it has loaded.

    Flags that are not in the saved state, as of another version of torch, keep their values.

    Args:
        optimizer: the optimizer after torch has loaded the state.
        groups: its parameter groups before loading.
        state: its state before loading.
    """
    for i, (group, before) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        place = f"state_dict['param_groups'][{i}]"
        for name, here in before.items():
            if name in group and name != "params":
                _check_setting(group[name], here, name, f"{place}[{name!r}]")
            elif here is None or isinstance(here, bool):
                group[name] = here
            elif name in optimizer.defaults and name not in group:  # not a scheduler's
                raise CheckpointError(f"Invalid {place}: it is damaged, it lacks {name!r}.")
    needs_all = isinstance(optimizer, torch.optim.Adagrad)  # it makes no state in a step
    found = {
        i: optimizer.state.get(p)
        for i, (p, _) in enumerate(_with_groups(optimizer))
        if p in optimizer.state or needs_all
    }
    check_entries(found, optimizer, "state_dict['state']", like=state)


def check_entries(
    found: Mapping[int, Any],
    optimizer: torch.optim.Optimizer,
    name: str,
    whole: bool = True,
    like: Mapping[Any, Any] | None = None,
) -> None:
    """Raises a CheckpointError if a parameter's state is not what its optimizer needs.

    The entries that classes of torch.optim need are known. With other classes a tensor must have
    the shape of the one that it replaces. No entry may hold NaN.

    Args:
        found: states, by the parameters' places.
        optimizer: the optimizer that is to go on from them.
        name: their name in messages.
        whole: nothing may be missing.
        like: the state, by parameter, that these replace.
    """
    pairs = _with_groups(optimizer)
    for place, entry in found.items():
        what = f"{name}[{place}]"
        if not 0 <= place < len(pairs):
            raise CheckpointError(f"Invalid {what}: there are {len(pairs)} parameters.")
        needed, shapes = _needs(optimizer, *pairs[place], (like or {}).get(pairs[place][0]))
        if not isinstance(entry, dict):
            refuse(entry, what, "a dict")
        # An empty state is filled at the first step, except Adagrad's.
        begun = whole and (entry or isinstance(optimizer, torch.optim.Adagrad))
        if absent := sorted(needed - entry.keys()) if begun else []:
            raise CheckpointError(f"Invalid {what}: it is damaged, it lacks {absent}.")
        for key, value in entry.items():
            if value is not None or key in needed:
                _check_value(value, shapes.get(key), f"{what}[{key!r}]")


def _needs(
    optimizer: torch.optim.Optimizer, p: Tensor, group: Mapping[str, Any], like: Any
) -> tuple[set[str], dict[str, torch.Size]]:
    """Returns the entries that a parameter's state must have, and the known shapes of entries."""
    engine = getattr(optimizer, "anderson_engine", None)  # an accelerated one is of a derived class
    cls: Any = type(optimizer if engine is None else engine.given)
    if cls not in _SHAPED:  # nor are classes derived from these, which may keep anything
        known = like.items() if isinstance(like, dict) else ()
        return set(), {k: v.shape for k, v in known if isinstance(v, Tensor) and v.numel() > 1}
    needed = dict.fromkeys(_SHAPED[cls], p.shape)
    needed |= {key: p.shape for flag, key in _SWITCHED.items() if group.get(flag)}
    needed |= dict.fromkeys(_SINGLE.get(cls, ("step",)), torch.Size(()))
    if cls is torch.optim.RMSprop and group["momentum"] > 0:
        needed["momentum_buffer"] = p.shape
    if cls is getattr(torch.optim, "Adafactor", None):
        if p.dim() > 1:
            needed["row_var"] = torch.Size([*p.shape[:-1], 1])
            needed["col_var"] = torch.Size([*p.shape[:-2], 1, p.shape[-1]])
        else:
            needed["variance"] = p.shape
    possible = dict.fromkeys(("momentum_buffer", *_SWITCHED.values()), p.shape)
    return {*needed}, possible | needed


def _check_value(value: Any, shape: torch.Size | None, name: str) -> None:
    if isinstance(value, Tensor):
        ok = value.layout == torch.strided and value.device.type != "meta"
        wanted = "dense, without NaN"
        if shape is not None:
            single = shape.numel() == value.numel() == 1  # [] and [1] both occur
            ok = ok and value.is_floating_point() and (single or value.shape == shape)
            wanted += f", floating, of shape {[*shape]}"
        # Of a DTensor this rank's part: to look at all of it would be collective.
        own = value.to_local() if hasattr(value, "to_local") else value
        ok = ok and not own.isnan().any()
    else:
        ok, wanted = shape is None and value == value, "a tensor, or a number"
    if not ok:
        refuse(value, name, wanted)


def _with_groups(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    return [(p, group) for group in optimizer.param_groups for p in group["params"]]


def _check_setting(found: Any, here: Any, name: str, place: str) -> None:
    """Checks that a number replaces a number. Flags and texts may change.

    NumPy's numbers are taken, and tensors of one number if torch can take a step with them.
    """
    found, here = (x.item() if isinstance(x, np.generic) else x for x in (found, here))
    if isinstance(here, list | tuple):
        listed(anything, len(here))(found, place)
        for i, (item, own) in enumerate(zip(found, here, strict=True)):
            _check_setting(item, own, name, f"{place}[{i}]")
    elif here is None or isinstance(here, bool | str):
        instance(type(None), bool, int, float, str)(found, place)
    elif isinstance(here, int | float) or _is_single(here):
        scalar = isinstance(found, Tensor) and found.dim() == 0
        if _is_single(found) and (scalar or name == "lr" or isinstance(here, Tensor)):
            found = found.item()
        if not isinstance(here, int | float):
            here = here.item()
        low = 0.0 if name in _NOT_NEGATIVE and here >= 0.0 else -_LARGEST_SETTING
        high = 1.0 if name in _BELOW_ONE else _LARGEST_SETTING
        if isinstance(found, bool) or found != here:
            number(low, high)(found, place)


def _is_single(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, np.ndarray) and value.ndim == 0

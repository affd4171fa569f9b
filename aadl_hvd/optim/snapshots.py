"""Copies of an optimizer's state, to go back to."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

# {"entries": {index of the parameter: its state}}
Undo = dict[str, Any]


def snapshot(optimizer: torch.optim.Optimizer) -> Undo:
    """A copy of an optimizer's state: plain types and tensors."""
    state, keys = optimizer.state, _keys(optimizer)
    entries = {
        key: {k: _copied(v) for k, v in state[p].items()} for key, p in keys.items() if p in state
    }
    return {"entries": entries}


def restore(optimizer: torch.optim.Optimizer, undo: Undo) -> None:
    """Puts back the state that `snapshot` returned. The snapshot is used up."""
    state, keys = optimizer.state, _keys(optimizer)
    for key, p in keys.items():
        if key not in undo["entries"]:
            state.pop(p, None)
    for key, saved in undo["entries"].items():
        entry = state[keys[key]]
        # Parts of it may be on the host (step), and `undo` may come from a file.
        saved = {k: _placed(v, entry.get(k), keys[key]) for k, v in saved.items()}
        entry.clear()
        entry.update(saved)


def _keys(optimizer: torch.optim.Optimizer) -> dict[int, Tensor]:
    """The parameters by their index among those of all groups, as in a state_dict."""
    return dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))


def _placed(value: Any, present: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(present.device if isinstance(present, Tensor) else parameter.device)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)

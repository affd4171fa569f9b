"""The entry "anderson" of a state_dict: what of it an optimizer can go on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aadl_hvd.checkpoint.format import check_format, readable
from aadl_hvd.checkpoint.shard_state import ShardState
from aadl_hvd.core.sharding import Sharding
from aadl_hvd.errors import CheckpointError
from aadl_hvd.schema import anything, entries, instance, integer, listed, number, sequence
from aadl_hvd.stats import Stats

# `ShardState` checks the entry "history".
_ENTRY = entries(
    {
        "counters": anything,
        "measured": anything,
        "config": instance(dict),
        "parameters": listed(sequence(listed(integer()), instance(str), instance(bool))),
        "settings": listed(listed(number())),
        "last_rates": listed(number()),
    }
)
# What decides how and when a step is judged after the fact.
_TRIED_WITH = "frequency", "store_every", "warmup_steps", "safeguard"


@dataclasses.dataclass(frozen=True)
class Examined:
    """What of an entry "anderson" a rank can go on from.

    Attributes:
        shard: the shard to go on from; None if there is none.
        fingerprint: of the history as it was saved; 0 if there is none.
        left_out: why a history that was saved is of no use here; "" otherwise.
    """

    shard: ShardState | None = None
    fingerprint: int = 0
    left_out: str = ""


def examine(
    anderson: Any,
    parameters: list[list[Any]],
    config: Mapping[str, Any],
    sharding: Sharding,
    ranks: int,
    rank: int,
    sharded: bool = False,
) -> Examined:
    """Checks a state_dict's entry "anderson" and fits its history to a rank; changes nothing.

    Args:
        anderson: the entry.
        parameters: `parameter_table` of the optimizer that loads it.
        config: `AndersonConfig.to_dict()` of that optimizer.
        sharding: which rows and columns this rank needs.
        ranks: how many ranks train together.
        rank: this one among them.
        sharded: whether the parameters are sharded: then a history is of use only to the rank that
            saved it, among as many.

    Raises:
        CheckpointError: damaged, from another version, or of another model: says what differs.
    """
    what = "state_dict['anderson']"
    with readable(what):
        entries({"format": anything})(anderson, what)
        check_format(what, anderson["format"])
        _ENTRY(anderson, what)
        rehearsal = Stats()
        rehearsal.load_counters(anderson["counters"])
        rehearsal.load_measured(anderson["measured"])
        history = anderson.get("history")
        compare_parameters(anderson["parameters"], parameters, dtypes=history is not None)
        if history is None:
            return Examined()
        if not config["enabled"]:  # no use is made of it, so its insides do not matter
            return Examined(left_out="" if _stores_nothing(history) else "enabled=False keeps none")
        found = ShardState.from_dict(_in_host_memory(history), "history")
        before = anderson["config"]
        if before["residual"] != config["residual"]:
            why = f"residual={config['residual']!r}, and was {before['residual']!r}"
            return Examined(left_out=why)
        if [p[2] for p in anderson["parameters"]] != [p[2] for p in parameters]:
            return Examined(left_out="other parameters are trained (requires_grad)")
        if sharded and (
            (found.ranks, found.sharding.n) != (ranks, sharding.n)
            or found.sharding.size > 1
            or found.own.keys() != {str(rank)}
        ):
            why = "parameters are sharded, and it is not this rank's of as many; see save_history"
            return Examined(left_out=why)
        if found.sharding.size == 1 < found.ranks and found.sharding.n != sharding.n:
            return Examined(left_out="parameters were sharded, and it is that of one rank's part")
        shard = found.fit(sharding, ranks, rank)
        if any(before[name] != config[name] for name in _TRIED_WITH):
            losses = dataclasses.replace(shard.losses, verdict_due=False)
            shard = dataclasses.replace(shard, losses=losses, trial=None, own={})
        return Examined(shard, found.fingerprint())


def parameter_table(optimizer: torch.optim.Optimizer) -> list[list[Any]]:
    """[shape, dtype, requires_grad] of all parameters of an optimizer, in plain types."""
    return [
        [list(p.shape), str(p.dtype).removeprefix("torch."), p.requires_grad]
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def compare_parameters(saved: list[list[Any]], here: list[list[Any]], dtypes: bool) -> None:
    """Raises a CheckpointError where shapes differ, or, on request, dtypes: says which."""
    if len(saved) != len(here):
        raise CheckpointError(
            f"Invalid state_dict of an optimizer with {len(saved)} parameters. Must have "
            f"{len(here)}, as this one."
        )
    different = []
    for i, ((shape, dtype, _), (own_shape, own_dtype, _)) in enumerate(
        zip(saved, here, strict=True)
    ):
        if shape != own_shape:
            different.append(f"parameter {i} had shape {tuple(shape)}, has {tuple(own_shape)}")
        if dtypes and dtype != own_dtype:
            different.append(f"parameter {i} was {dtype}, is {own_dtype}")
    if different:
        more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
        raise CheckpointError(
            f"Invalid state_dict of another model: {'; '.join(different[:5])}{more}."
        )


def _stores_nothing(history: Any) -> bool:
    """Whether a history is that of a run that has stored nothing; False if it is damaged."""
    columns = history.get("columns") if isinstance(history, dict) else None
    stored = columns.get("stored") if isinstance(columns, dict) else None
    return isinstance(stored, int) and stored == 0 and history.get("subspace", 0) is None


def _in_host_memory(value: Any) -> Any:
    """What torch.load may have put on a GPU; what is in host memory is not copied."""
    if isinstance(value, dict):
        return {key: _in_host_memory(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_in_host_memory, value))
    return value.cpu() if isinstance(value, Tensor) else value

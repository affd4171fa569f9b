"""What acceleration goes on from, out of the parts of an accelerator and back into them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aadl_hvd.core.acceptance import Acceptance, Trial
from aadl_hvd.core.averages import MovingAverage, WeightAverages
from aadl_hvd.core.methods.base import Method
from aadl_hvd.core.shard import WeightShard
from aadl_hvd.stats import Stats


class Persistence:
    """Reads and writes the state of the other modules of one rank.

    Args:
        shard: this rank's rows.
        method: with its history.
        acceptance: with noise, losses, pauses and trials.
        averages: for evaluation.
        moving_average: the paper's; None where it is off.
        ranks: how many ranks train together, and this one among them.
    """

    def __init__(
        self,
        shard: WeightShard,
        method: Method,
        acceptance: Acceptance,
        averages: WeightAverages,
        moving_average: MovingAverage | None,
        ranks: tuple[int, int],
    ) -> None:
        self._shard, self._method, self._acceptance = shard, method, acceptance
        self._averages, self._moving_average = averages, moving_average
        self._size, self._rank = ranks

    def shard_state(self, calls: int) -> dict[str, Any]:
        """This rank's shard of the state, in host memory. Not collective.

        Args:
            calls: number of the last step.
        """
        history, gram, averages = self._method.history, self._method.gram, self._averages
        acceptance, losses = self._acceptance, self._acceptance.losses
        sharding = self._shard.sharding
        columns = history.part() | {"products": gram.products()}
        names = [f"average {kind}" for kind in averages.kinds]
        rows = dict(zip(names, averages.shard_state(), strict=False))
        if (pair := columns.pop("pair")) is not None:
            rows["pair"] = pair
        pushed = None
        if self._moving_average is not None:
            pushed, rows["iterates"] = self._moving_average.shard_state()
        undo: dict[str, Any] = {}
        if (trial := acceptance.trial) is not None:
            rows["base"] = trial.base_rows.cpu().clone()
            undo["residual"] = {"norm": trial.norm, "undo": _on_host(trial.undo)}
        if losses.trial is not None:
            rows["base"] = losses.trial.cpu().clone()
            undo["loss"] = {}
        own = {"noise": acceptance.noise.part_of_rank(), "losses": losses.part_of_rank()}
        return {
            "sharding": {
                "layout": sharding.layout,
                "n": sharding.n,
                "size": sharding.size,
                "rank": sharding.rank,
                "rows": [*sharding.rows],
            },
            "replicated": {
                "calls": calls,
                "stored": history.stored,
                "columns": history.columns,
                "last": history.last,
                "gram": gram.state(),
                "averages": averages.state(),
                "pushed": pushed,
                "noise": acceptance.noise.share,
                "losses": losses.state(),
                "backoff": acceptance.backoff.state(),
            },
            "rows": rows,
            "columns": columns,
            "undo": undo,
            "ranks": self._size,
            "own": {str(self._rank): own},
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any], continues: bool) -> int:
        """Takes in what `shard_state` returned, for this rank's rows and columns.

        Args:
            state: of the same sharding.
            continues: as if the run had not been interrupted; else the count of steps goes on as
                it is, and nothing is on trial.

        Returns:
            The number of the last step of the run that was saved.
        """
        same, rows, columns = state["replicated"], state["rows"], state["columns"]
        own = state["own"].get(str(self._rank)) if continues else None
        history, acceptance = self._method.history, self._acceptance
        pair = {"pair": rows.get("pair")}
        history.take(columns | pair, same["stored"], same["columns"], same["last"])
        history.generation = 0  # the same on all ranks
        self._method.gram.take(same["gram"], columns["products"])
        averages = same["averages"]
        known = [f"average {kind}" for kind in averages["kinds"] if averages["count"]]
        self._averages.load_state(averages, [rows[name] for name in known])
        if self._moving_average is not None:
            self._moving_average.clear()
            if "iterates" in rows:
                self._moving_average.load_state(same["pushed"], rows["iterates"])
        acceptance.noise.load_state(same["noise"], own and own["noise"], self._shard.device)
        acceptance.backoff.load_state(same["backoff"])
        acceptance.trial = None
        if not continues:
            acceptance.losses.drop_trial()
            return int(same["calls"])
        acceptance.losses.load_state(same["losses"], own and own["losses"])
        if "base" in rows:
            base_rows = acceptance.base_rows().copy_(rows["base"])
            if (trial := state["undo"].get("residual")) is not None:
                acceptance.trial = Trial(base_rows, trial["undo"], trial["norm"])
            if "loss" in state["undo"]:
                acceptance.losses.start_trial(base_rows)
        return int(same["calls"])

    @torch.no_grad()
    def backup(self, *others: object) -> Callable[[], None]:
        """Copies all that a reset and a load change, to host memory; the result puts it back.

        Args:
            others: objects beside these modules whose attributes are put back as well.
        """
        acceptance, method = self._acceptance, self._method
        owners: Sequence[Any] = [
            *(*others, method.history, method.gram, acceptance),
            *(acceptance.noise, acceptance.losses, acceptance.backoff),
            *(self._averages, *self._averages.parts),
            *([] if self._moving_average is None else [self._moving_average]),
        ]
        kept = []
        for owner in owners:
            attributes = dict(vars(owner))
            tensors = [value for value in attributes.values() if isinstance(value, Tensor)]
            kept.append((owner, attributes, [(t, t.to("cpu", copy=True)) for t in tensors]))

        def put_back() -> None:
            for owner, attributes, tensors in kept:
                vars(owner).clear()
                vars(owner).update(attributes)
                with torch.no_grad():
                    for tensor, contents in tensors:
                        tensor.copy_(contents)

        return put_back


def put_back_counters(stats: Stats) -> Callable[[], None]:
    """Copies the counters that are counted in place; the result puts them back."""
    rejected, resets = dict(stats.rejected), dict(stats.resets)

    def put_back() -> None:
        stats.rejected, stats.resets = rejected, resets

    return put_back


def _on_host(value: Any) -> Any:
    """A copy in host memory of nested dicts of tensors and plain types."""
    if isinstance(value, dict):
        return {key: _on_host(entry) for key, entry in value.items()}
    return value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)

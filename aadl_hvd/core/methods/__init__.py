"""Methods: what turns the history of an iteration into a proposed point.

`AndersonConfig.method` names one. Each is a class here, and one plain function in `reference`.
"""

from __future__ import annotations

from collections.abc import Callable

from aadl_hvd.config import AndersonConfig
from aadl_hvd.core.collectives import Collectives
from aadl_hvd.core.methods.base import Method
from aadl_hvd.core.methods.residual import ResidualNorm
from aadl_hvd.core.shard import WeightShard
from aadl_hvd.stats import Stats

_METHODS: dict[str, Callable[[AndersonConfig, WeightShard, Collectives, Stats], Method]] = {
    "residual": ResidualNorm,
}


def make_method(
    config: AndersonConfig, shard: WeightShard, collectives: Collectives, stats: Stats
) -> Method:
    """The method that `config.method` names, with an empty history."""
    return _METHODS[config.method](config, shard, collectives, stats)

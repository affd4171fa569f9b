"""Which columns of a history fall to a rank, and their products."""

from __future__ import annotations

import torch
from torch import Tensor

from aadl_hvd.core.sharding import Sharding

_CHUNK = 2**16  # rows that are multiplied at a time


def columns_of(stored: int, count: int, sharding: Sharding) -> list[int]:
    """Of `count` columns in use, counted from the oldest, those that fall to a rank."""
    h = min(count, sharding.depth)
    slots = [(stored - 1 - h + i) % sharding.depth for i in range(h)]
    return [count - h + i for i, slot in enumerate(slots) if slot in sharding.slots]


def products_of(r: Tensor, held: list[int], fresh: list[int]) -> Tensor:
    """R_held^T R_fresh [held, fresh] float64, where the columns were not held whole before."""
    products = torch.zeros((len(held), len(fresh)), dtype=torch.float64, device="cpu")
    for k, new in enumerate(fresh):
        for row, place in enumerate(held):
            for lo in range(0, r.shape[1], _CHUNK):
                here = slice(lo, lo + _CHUNK)
                products[row, k] += torch.dot(r[place, here].double(), r[new, here].double())
    return products

"""The one small allreduce of an acceleration step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def numbers_of(tensors: Sequence[Tensor]) -> list[NDArray[np.float64]]:
    """Each tensor's numbers as a float64 vector on the host; one wait for each device."""
    places: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(place)
    found: dict[int, NDArray[np.float64]] = {}
    for own in places.values():
        joined = torch.cat([tensors[place].detach().reshape(-1).double() for place in own])
        ends = np.cumsum([tensors[place].numel() for place in own])
        found |= zip(own, np.split(joined.cpu().numpy(), ends[:-1]), strict=True)
    return [found[place] for place in range(len(tensors))]

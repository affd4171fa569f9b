"""The numerics of the algorithm's own arithmetic, whatever the user's training loop has set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def plain_numerics(device: torch.device) -> Iterator[None]:
    """Within the block there is no autograd graph, no autocast and no TF32."""
    with no_graph(device), _full_precision(device):
        yield


@contextlib.contextmanager
def no_graph(device: torch.device) -> Iterator[None]:
    """Within the block there is no autograd graph and no autocast: enough to copy and to add."""
    with torch.no_grad():
        if not torch.is_autocast_enabled(device.type):  # to enter it takes longer than to ask
            yield
            return
        with torch.autocast(device.type, enabled=False):
            yield


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products are computed in float32. Only the switch of this device is touched."""
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul: Any = getattr(backend, "matmul", None)
    # Old versions of torch have only the old switch. New versions refuse to read the old switch
    # once the new one was set.
    switch: tuple[str, Any, tuple[Any, ...]] = ("fp32_precision", "ieee", ("tf32", "bf16"))
    if not hasattr(matmul, switch[0]):
        matmul, switch = torch.backends.cuda.matmul, ("allow_tf32", False, (True,))
    name, full, reduced = switch
    before = getattr(matmul, name)
    if before not in reduced:
        yield
        return
    setattr(matmul, name, full)
    try:
        yield
    finally:
        setattr(matmul, name, before)

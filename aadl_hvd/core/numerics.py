"""The numerics of the algorithm's own arithmetic, whatever the user's training loop has set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch


def plain_numerics(device: torch.device) -> AbstractContextManager[None]:
    """Within the block there is no autograd graph, no autocast and no TF32."""
    # Steps enter this often. A generator takes longer than to ask whether there is work for one.
    matmul, name, full, reduced = _precision_switch(device)
    if getattr(matmul, name) not in reduced:
        return no_graph(device)
    return _full_precision(device, matmul, name, full)


def no_graph(device: torch.device) -> AbstractContextManager[None]:
    """Within the block there is no autograd graph and no autocast: enough to copy and to add."""
    if torch.is_autocast_enabled(device.type):
        return _no_autocast(device)
    return torch.no_grad()


@contextlib.contextmanager
def _no_autocast(device: torch.device) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def _full_precision(device: torch.device, matmul: Any, name: str, full: Any) -> Iterator[None]:
    """Float32 products are computed in float32. Only the switch of this device is touched."""
    before = getattr(matmul, name)
    setattr(matmul, name, full)
    try:
        with no_graph(device):
            yield
    finally:
        setattr(matmul, name, before)


def _precision_switch(device: torch.device) -> tuple[Any, str, Any, tuple[Any, ...]]:
    """The owner of the switch, its name, its value for float32, and those for less."""
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul: Any = getattr(backend, "matmul", None)
    # Old versions of torch have only the old switch. New versions refuse to read the old switch
    # once the new one was set.
    if hasattr(matmul, "fp32_precision"):
        return matmul, "fp32_precision", "ieee", ("tf32", "bf16")
    return torch.backends.cuda.matmul, "allow_tf32", False, (True,)

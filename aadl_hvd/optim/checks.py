"""What an accelerated optimizer is made of, before it is made. Nothing here is collective."""

from __future__ import annotations

import torch

from aadl_hvd.config import AndersonConfig
from aadl_hvd.core.accelerator import Accelerator
from aadl_hvd.errors import ConfigError, UnsupportedError
from aadl_hvd.optim import job


def checked_config(anderson: AndersonConfig | None) -> AndersonConfig:
    """The settings given, or the default ones."""
    if anderson is None:
        return AndersonConfig()
    if not isinstance(anderson, AndersonConfig):
        raise ConfigError(f"Invalid anderson={anderson!r}. Must be an AndersonConfig or None.")
    return anderson


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raises an UnsupportedError where it is no plain torch optimizer."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UnsupportedError(
            f"Invalid optimizer of type {type(optimizer).__name__}. Must be a "
            "torch.optim.Optimizer."
        )
    if isinstance(getattr(optimizer, "anderson", None), Accelerator):
        raise UnsupportedError(
            "Invalid optimizer: it is accelerated already. Pass the plain torch optimizer."
        )
    job.check_not_distributed(optimizer)


def check_parameters(optimizer: torch.optim.Optimizer, residual: str, sharded: bool) -> None:
    """Raises an UnsupportedError where its parameters cannot be accelerated in this way.

    Args:
        optimizer: a plain torch optimizer.
        residual: "step" or "gradient".
        sharded: whether FSDP2 has sharded parameters.
    """
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if not sharded:
            job.check_whole(p)
        if p.requires_grad and not p.is_floating_point():
            raise UnsupportedError(
                f"Invalid parameter of dtype {p.dtype}. Trainable parameters must be real "
                "floating-point tensors; view complex ones with torch.view_as_real."
            )
    if isinstance(optimizer, torch.optim.LBFGS) and residual != "step":
        raise UnsupportedError(
            f"Invalid residual={residual!r} for LBFGS, which evaluates several gradients in one "
            "step. Must be 'step'."
        )

"""What mypy knows of the public classes. mypy checks this file; test_public_classes.py runs it.

A comment `type: ignore[...]` stands where mypy must find an error: it reports those that it does
not need.
"""

# mypy: warn-unused-ignores, disallow-untyped-defs
from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, assert_type

import torch

from aadl_hvd import AndersonOptimizer, DistributedAndersonOptimizer


def in_one_process(model: torch.nn.Module, loss: torch.Tensor) -> AndersonOptimizer:
    """Constructs, trains, evaluates."""
    opt = AndersonOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    assert_type(opt, AndersonOptimizer)
    torch.optim.lr_scheduler.StepLR(opt, 2)  # it is a torch optimizer
    opt.observe(loss.detach())
    assert_type(opt.step(lambda: loss), torch.Tensor)
    assert_type(opt.step(lambda: 1.5), float)
    opt.step()
    opt.zero_grad(set_to_none=True)
    assert_type(opt.anderson.stats.steps, int)
    assert_type(opt.state_dict(), dict[str, Any])
    assert_type(opt.consolidate_state_dict(to=0), dict[str, Any] | None)
    with opt.averaged_weights(lambda: 1.0) as name:
        assert_type(name, float | None)
    return opt


def narrowed(other: torch.optim.Optimizer) -> int:
    """`isinstance` tells mypy as much as the constructor."""
    if isinstance(other, AndersonOptimizer):
        return other.anderson.columns
    return -1


def on_several_ranks(opt: DistributedAndersonOptimizer) -> None:
    """Horovod's methods are there, too."""
    opt.synchronize()
    assert_type(opt.skip_synchronize(), AbstractContextManager[None])
    opt.set_backward_passes_per_step(2)
    assert_type(opt.horovod_engine.process_set, Any)


def wrong(model: torch.nn.Module, opt: AndersonOptimizer) -> None:
    """Mistakes that mypy finds."""
    AndersonOptimizer(model)  # type: ignore[arg-type]
    opt.observe("high")  # type: ignore[arg-type]
    opt.no_such_method()  # type: ignore[attr-defined]
    opt.synchronize()  # type: ignore[attr-defined]

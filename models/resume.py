"""Checkpoints of the training program: what they hold, and how all ranks write and load them."""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models import checkpoint
from models.data import ImageList, Loader
from models.dist import fail_together, gather, on_rank0
from models.engine import Trainer
from models.errors import UserError
from models.horovod import hvd
from models.output import BEST, LAST
from models.settings import Settings


def identity_of(settings: Settings, images: ImageList) -> dict[str, Any]:
    config = settings.anderson_config()
    anderson: Any = settings.anderson if config is None else config.to_dict()
    if config is not None:
        del anderson["enabled"]  # not a setting here: --anderson off is Horovod's own optimizer
    return {
        "model": settings.model,
        "width": settings.width,
        "channels": settings.channels,
        "classes": list(images.classes),
        "optimizer": settings.optimizer,
        "accumulate": settings.accumulate,
        "anderson": anderson,
    }


def state_of(
    identity: dict[str, Any],
    epoch: int,
    best: float,
    trainer: Trainer,
    loader: Loader,
) -> dict[str, Any]:
    """Returns the content of a checkpoint. Collective, since every rank has its own part."""
    own = {
        "data": loader.state_dict(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if trainer.device.type == "cuda" else None,
        "python": random.getstate(),
    }
    return {
        "identity": identity,
        "epoch": epoch,
        "best": best,
        "step": trainer.step,
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "ranks": gather(own),
    }


def save(path: Path, state: dict[str, Any], trainer: Trainer, say: Callable[[str], None]) -> bool:
    """Writes a checkpoint, and beside it each rank's part of the history. Collective.

    The parts are written first and have the step in their names. So the old checkpoint finds its
    own parts if the new one is not written. A mark tells them from the parts of another run.

    Returns:
        Whether the checkpoint was written.

    Raises:
        UserError: On all ranks, if any rank's state could not be read back. Unlike a full disk,
            this would happen at each checkpoint, and the training would be lost.
    """
    own, problem, refused, mark = None, None, None, ""
    if hasattr(trainer.optimizer, "anderson"):
        mark = on_rank0(lambda: uuid.uuid4().hex)
        own = checkpoint.part_of(path, trainer.step, hvd.rank())
        try:
            checkpoint.save_part(own, {"of": mark, **trainer.optimizer.sharded_state_dict()})
        except OSError as error:
            problem = f"rank {hvd.rank()}: {error}"
        except UserError as error:
            refused = str(error)
    fail_together(refused)
    problems = [text for text in gather(problem) if text is not None]
    if problems:
        say(f"warning: this checkpoint is without the history: {problems[0]}")
    state["history"] = mark if own is not None and not problems else False
    kept = keep(path, state, say)
    if kept:
        checkpoint.remove_parts(path, hvd.rank(), but=own if state["history"] else None)
    elif own is not None:
        own.unlink(missing_ok=True)
    return kept


def keep(path: Path, state: dict[str, Any], say: Callable[[str], None]) -> bool:
    """Writes a checkpoint on rank 0. Collective.

    If it cannot be written, as on a full disk, an earlier one stays and training goes on.

    Returns:
        Whether it was written.

    Raises:
        UserError: On all ranks, if it could not be read back.
    """

    def write() -> bool:
        try:
            checkpoint.save(path, state)
        except OSError as error:
            say(f"warning: no checkpoint was written to {path}: {error}. An earlier one is kept.")
            return False
        return True

    return on_rank0(write)


def _load_history(path: Path, state: dict[str, Any], optimizer: Any) -> None:
    """Loads this rank's part of the history, unless any rank cannot load its own. Collective."""
    own = checkpoint.part_of(path, state["step"], hvd.rank())
    problem = None
    try:
        part = checkpoint.load_part(own)
        with checkpoint.fitting(own):
            if state["history"] not in (True, part.get("of")):  # True: written without a mark
                raise UserError("it belongs to another checkpoint")
            if not part["anderson"]["history"]:
                raise UserError("it holds no history")
            optimizer.load_state_dict({"anderson": part["anderson"]})
    except UserError as error:
        problem = str(error)
    problems = [text for text in gather(problem) if text is not None]
    if not problems:
        return
    if hvd.rank() == 0:
        print(f"warning: the history has to rebuild itself: {problems[0]}", flush=True)
    optimizer.load_state_dict(state["optimizer"])  # again: drops the history loaded here


def resume(
    settings: Settings,
    folder: Path,
    trainer: Trainer,
    loader: Loader,
    identity: dict[str, Any],
) -> tuple[int, float]:
    """Restores everything on every rank from what rank 0 reads. Collective.

    Returns:
        Epochs done, and best top-1 accuracy, 0 to 1.

    Raises:
        UserError: On all ranks, if the checkpoint does not fit on any of them.
    """
    if settings.resume is None:
        return 0, 0.0
    auto = settings.resume == "auto"
    path = folder / LAST if auto else Path(settings.resume)
    state = on_rank0(
        # A broken link is a checkpoint that cannot be read, not a missing one.
        lambda: (
            None if auto and not os.path.lexists(path) else checkpoint.load(path, expected=identity)
        )
    )
    if state is None:
        return 0, 0.0
    ranks = state["ranks"]
    if len(ranks) != hvd.size():
        raise UserError(f"{path} was written by {len(ranks)} ranks, this run has {hvd.size()}")
    problem = None
    try:
        with checkpoint.fitting(path):
            _restore(state, trainer, loader)
    except UserError as error:
        problem = str(error)
    fail_together(problem)
    if state.get("history"):
        _load_history(path, state, trainer.optimizer)
    best = state["best"]
    if os.path.realpath(path.parent) == os.path.realpath(folder):
        # best.pt may be newer than last.pt, and a worse one must not replace it.
        best = max(best, on_rank0(lambda: _best_of(folder / BEST, identity)))
    return state["epoch"], best


def _best_of(path: Path, identity: dict[str, Any]) -> float:
    try:
        best: float = checkpoint.load(path, expected=identity)["best"]
    except UserError:  # it is not there, or of another training
        return 0.0
    return best


def _restore(state: dict[str, Any], trainer: Trainer, loader: Loader) -> None:
    """Restores everything but the history. Not collective: it may fail on one rank alone."""
    own, epoch, step = state["ranks"][hvd.rank()], state["epoch"], state["step"]
    loader.load_state_dict(own["data"])
    done = epoch * trainer.schedule.steps_per_epoch + loader.batch // trainer.accumulate
    if (loader.epoch, step) != (epoch, done):
        raise UserError(
            f"it is damaged, epoch {epoch} and step {step} contradict the data loader's epoch "
            f"{loader.epoch} and batch {loader.batch}, which is step {done}"
        )
    trainer.model.load_state_dict(state["model"])
    groups = [dict(group) for group in trainer.optimizer.param_groups]
    trainer.optimizer.load_state_dict(state["optimizer"])
    _check_optimizer(trainer.optimizer, groups)
    if state["scaler"]:  # empty where the checkpoint was written without fp16
        trainer.scaler.load_state_dict(state["scaler"])
    trainer.step = step
    torch.set_rng_state(own["torch"])
    if own["cuda"] is not None and trainer.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"])
    random.setstate(own["python"])


def _check_optimizer(optimizer: Any, before: list[dict[str, Any]]) -> None:
    """Finds wrong values that torch loads unchecked, and on which the first step would fail."""
    for group, known in zip(optimizer.param_groups, before, strict=True):
        for name, value in known.items():
            if isinstance(value, (bool, float)) and not isinstance(group[name], (int, float)):
                raise UserError(f"the optimizer's {name} was {group[name]!r}, is {value!r}")
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            shape = getattr(value, "shape", ())  # numbers have none
            if not isinstance(value, (torch.Tensor, int, float, type(None))) or (
                len(shape) and shape != parameter.shape
            ):
                found = f"a {type(value).__name__} of shape {tuple(shape)}"
                raise UserError(
                    f"the optimizer's {name} of a parameter of shape {tuple(parameter.shape)} "
                    f"is {found}"
                )

"""Trains a residual network on a folder of images: ``python -m models.train --help``.

On one rank as it stands; on several under horovodrun, mpirun, srun or jsrun.

A signal (SIGTERM, SIGUSR1 or SIGUSR2) to any rank makes all of them write a checkpoint after the
interval of `--log-every` steps and leave with exit code 75; `--resume auto` goes on from there.
"""

from __future__ import annotations

import io
import os
import random
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from aadl_hvd import average_batch_norm
from models import checkpoint, networks
from models.data import (
    ImageList,
    Loader,
    LoaderOptions,
    check_folder,
    find_corrupt,
    list_images,
    open_loader,
)
from models.dist import fail_together, gather, on_rank0, start
from models.engine import Interval, Trainer, Validation, mean_over_ranks
from models.errors import UserError
from models.metrics import MetricsLog
from models.preemption import EXIT_CODE, StopRequest
from models.progress import Progress
from models.report import plot_training, summary_text, write_summary
from models.schedule import Schedule
from models.settings import Settings, parse

LAST, BEST = "last.pt", "best.pt"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        arguments: The command line without the program's name; None takes this process's.

    Returns:
        Exit code, the same on all ranks: 0; 2 for wrong input; 75 when it was asked to stop and
        left a checkpoint to go on from.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(arguments):
        parse(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files may be no text: no message may fail for that.
            stream.reconfigure(errors="backslashreplace")
    start()
    try:
        if run(on_rank0(lambda: parse(arguments))):
            return 0
        hvd.barrier()  # launchers end all ranks as soon as the first one fails
        return EXIT_CODE
    except UserError as error:
        # Every rank comes here with the same message; one prints it, and none leaves before it
        # has, for the same reason.
        if hvd.rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        hvd.barrier()
        return 2
    finally:
        hvd.shutdown()


def run(settings: Settings) -> bool:
    """Trains as the settings say. Collective; Horovod has to be initialised (`models.dist.start`).

    Returns:
        Whether the training came to its end; if not, a signal stopped it and there is a checkpoint.

    Raises:
        UserError: On all ranks, for wrong input, for a training that diverged, and for a checkpoint
            that could not be read back.
    """
    started = time.perf_counter()
    stop_request = StopRequest()
    if settings.checkpoint_every:
        stop_request.listen(workers=settings.loader == "torch" and settings.workers > 0)
    device = _device(settings)
    folder = Path(settings.out)
    on_rank0(lambda: _make_folder(folder))
    train_images, val_images = on_rank0(lambda: _list(settings))
    if settings.check_images:
        _check_images(settings, train_images, val_images)
    train_loader = _loader(settings, device, train_images, train=True)
    val_loader = _loader(settings, device, val_images, train=False)
    steps_per_epoch = len(train_loader) // settings.accumulate
    if not steps_per_epoch:
        raise UserError(
            f"--accumulate is {settings.accumulate}, but an epoch has {len(train_loader)} batches"
        )

    _seed(settings.seed)
    model = networks.build(
        settings.model,
        len(train_images.classes),
        channels=settings.channels,
        width=settings.width,
    ).to(device)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    trainer = Trainer(
        model=model,
        optimizer=_optimizer(settings, model),
        schedule=_schedule(settings, steps_per_epoch),
        device=device,
        label_smoothing=settings.label_smoothing,
        amp=settings.amp,
        channels_last=settings.channels_last,
        clip_norm=settings.clip_norm,
        accumulate=settings.accumulate,
        observe=settings.anderson == "default",  # the paper's method knows no such check
        keep_batches=0 if settings.recalibrate == "never" else settings.recalibrate_batches,
        stop_requested=stop_request,
    )
    _seed(settings.seed + 1 + hvd.rank())
    identity = _identity(settings, train_images)
    epoch, best, moved = _resume(settings, folder, trainer, train_loader, identity)

    chief = hvd.rank() == 0
    log = None
    if chief:
        resumed_at = trainer.step or None
        log = MetricsLog(
            folder,
            tensorboard=settings.tensorboard,
            say=lambda text: progress.say(text),  # made below
            resume_step=resumed_at,
        )
    progress = Progress(
        settings.progress if chief else "off",
        total=settings.epochs * steps_per_epoch,
        done=trainer.step,
        accelerated=settings.anderson != "off",
    )
    progress.say(_opening(settings, trainer, train_images, val_images, steps_per_epoch))
    for note in (*train_images.notes, *val_images.notes):
        progress.say(note)
    if trainer.step:
        progress.say(f"going on after step {trainer.step}")

    totals = {"seconds": 0.0, "data_seconds": 0.0, "steps": 0, "images": 0}
    interval: Interval | None = None
    validation: Validation | None = None
    averaged: tuple[str, Validation] | None = None
    stopped, kept = False, True
    try:
        while epoch < settings.epochs and not stopped:
            for interval in trainer.train_epoch(train_loader, settings.log_every):
                for name in totals:
                    totals[name] += getattr(interval, name)
                progress.update(interval, epoch + 1, _stats(trainer))
                if log is not None:
                    log.write("steps", _step_row(interval, epoch, _stats(trainer)))
                stopped = interval.stop
                if stopped and train_loader.batch:
                    break
            assert interval is not None
            amid = bool(train_loader.batch)
            epoch += not amid
            if stopped and epoch < settings.epochs:  # at once: the scheduler may not wait
                average_batch_norm(trainer.model, mean_over_ranks)
                state = _state(identity, epoch, best, moved, trainer, train_loader)
                kept = _save(folder / LAST, state, trainer, progress.say)
            if amid:
                break
            final = epoch == settings.epochs
            validating = final or epoch % settings.validate_every == 0
            every = settings.checkpoint_every
            saving = every > 0 and (final or stopped or epoch % every == 0)
            if validating or saving:
                moved = _settle_batch_norm(settings, trainer, moved)
            improved = False
            if validating:
                validation = trainer.validate(val_loader)
                improved = validation.top1 > best
                best = max(best, validation.top1)
                progress.say(
                    f"epoch {epoch}/{settings.epochs}: training loss {interval.loss:.4g}, "
                    f"validation loss {validation.loss:.4g}, top-1 {validation.top1:.2%}, "
                    f"top-5 {validation.top5:.2%}"
                )
                averaged = trainer.validate_averaged(val_loader)
                if averaged is not None:
                    progress.say(
                        f"    at averaged weights ({averaged[0]}): validation loss "
                        f"{averaged[1].loss:.4g}, top-1 {averaged[1].top1:.2%}"
                    )
                if log is not None:
                    log.write("epochs", _epoch_row(interval, epoch, validation, averaged))
            if saving:
                state = _state(identity, epoch, best, moved, trainer, train_loader)
                kept = _save(folder / LAST, state, trainer, progress.say)
                if chief and improved:  # what _save has taken is not refused here
                    _keep(folder / BEST, state | {"history": False}, progress.say)
    finally:
        progress.close()
        if log is not None:
            log.close()
        train_loader.close()
        val_loader.close()

    finished = epoch >= settings.epochs
    if not chief:
        return finished
    if not finished:
        where = f"{folder / LAST}" if kept else "the checkpoint before, if there is one"
        print(
            f"stopped by a signal after step {trainer.step}; --resume auto goes on from {where}",
            flush=True,
        )
    elif interval is None or validation is None:
        print(f"nothing left to train: {epoch} of {settings.epochs} epochs are done")
    else:
        summary = _summary(settings, trainer, totals, interval, validation, averaged, best)
        summary["total_seconds"] = time.perf_counter() - started
        print("\n" + summary_text(summary))
        try:
            write_summary(folder, summary)
            print(f"plot  {plot_training(folder)}", flush=True)
        except OSError as error:
            print(f"warning: no summary was written to {folder}: {error}", flush=True)
    return finished


def _device(settings: Settings) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.device == "cpu" or (settings.device == "auto" and not max(gather(count))):
        return torch.device("cpu")
    # A launcher shows a rank all GPUs of its machine or, as srun --gpu-bind=closest, its own alone.
    index = hvd.local_rank() % max(count, 1)
    own = None
    if count:
        own = (socket.gethostname(), str(torch.cuda.get_device_properties(index).uuid))
    everybody = gather(own)
    problem = None
    if own is None:
        problem = "torch sees no GPU here; use --device cpu"
    elif everybody.index(own) != hvd.rank():
        problem = f"local rank {hvd.local_rank()} has no GPU of its own, it sees {count}"
    fail_together(problem)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to the folder {folder}")


def _list(settings: Settings) -> tuple[ImageList, ImageList]:
    root = Path(settings.data)
    for folder in (root, root / "train", root / "val"):
        check_folder(folder)
    train = list_images(root / "train")
    return train, list_images(root / "val", train.classes)


def _check_images(settings: Settings, *parts: ImageList) -> None:
    how: Any = {"loader": settings.loader, "channels": settings.channels}
    how |= {"shard": hvd.rank(), "shards": hvd.size(), "threads": max(1, settings.workers)}
    own, problem = [], None
    try:
        own = [name for images in parts for name in find_corrupt(images, **how)]
    except UserError as error:  # DALI may be missing on one machine
        problem = str(error)
    fail_together(problem)
    corrupt = sorted(name for names in gather(own) for name in names)
    if corrupt:
        shown = "".join(f"\n  {name}" for name in corrupt[:20])
        more = f"\n  and {len(corrupt) - 20} more" if len(corrupt) > 20 else ""
        raise UserError(
            f"{len(corrupt)} corrupt images, as {settings.loader} reads them: remove or replace "
            f"them{shown}{more}"
        )


def _loader(settings: Settings, device: torch.device, images: ImageList, *, train: bool) -> Loader:
    options = LoaderOptions(
        train=train,
        rank=hvd.rank(),
        world=hvd.size(),
        batch_size=settings.batch_size,
        image_size=settings.image_size,
        resize=settings.resize_to,
        channels=settings.channels,
        augment=settings.augment,
        shuffle=settings.shuffle,
        seed=settings.seed,
        workers=settings.workers,
        device=device,
    )
    return open_loader(settings.loader, images, options)


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def _optimizer(settings: Settings, model: nn.Module) -> Any:
    common: Any = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    parameters = model.parameters()
    base: torch.optim.Optimizer
    if settings.optimizer in ("sgd", "nesterov"):
        nesterov = settings.optimizer == "nesterov"
        base = torch.optim.SGD(parameters, momentum=settings.momentum, nesterov=nesterov, **common)
    elif settings.optimizer == "rmsprop":
        base = torch.optim.RMSprop(parameters, momentum=settings.momentum, **common)
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
        base = kind(parameters, **common)
    config = settings.anderson_config()
    fp16 = settings.compression == "fp16"
    wrapping = {
        "named_parameters": model.named_parameters(),
        "compression": hvd.Compression.fp16 if fp16 else hvd.Compression.none,
        "backward_passes_per_step": settings.accumulate,
    }
    if config is None:
        return hvd.DistributedOptimizer(base, **wrapping)
    from aadl_hvd import DistributedAndersonOptimizer

    return DistributedAndersonOptimizer(base, **wrapping, anderson=config)


def _schedule(settings: Settings, steps_per_epoch: int) -> Schedule:
    return Schedule(
        peak=settings.lr,
        epochs=settings.epochs,
        steps_per_epoch=steps_per_epoch,
        warmup=settings.warmup,
        warmup_lr=settings.warmup_lr,
        warmup_epochs=settings.warmup_epochs,
        decay=settings.decay,
        milestones=settings.milestones,
        factor=settings.decay_factor,
    )


def _stats(trainer: Trainer) -> Any:
    anderson = getattr(trainer.optimizer, "anderson", None)
    return None if anderson is None else anderson.stats


def _settle_batch_norm(settings: Settings, trainer: Trainer, moved_before: int) -> int:
    """Gives all ranks the same statistics, fit for the present weights.

    Returns how often weights were accelerated or averaged so far.
    """
    stats = _stats(trainer)
    moved = 0 if stats is None else stats.accelerated + stats.averaged
    how = settings.recalibrate
    if how == "always" or (how == "auto" and moved > moved_before):
        trainer.recalibrate()
    else:
        average_batch_norm(trainer.model, mean_over_ranks)
    return moved


def _identity(settings: Settings, images: ImageList) -> dict[str, Any]:
    config = settings.anderson_config()
    return {
        "model": settings.model,
        "width": settings.width,
        "channels": settings.channels,
        "classes": list(images.classes),
        "optimizer": settings.optimizer,
        "accumulate": settings.accumulate,
        "anderson": settings.anderson if config is None else config.to_dict(),
    }


def _state(
    identity: dict[str, Any],
    epoch: int,
    best: float,
    moved: int,
    trainer: Trainer,
    loader: Loader,
) -> dict[str, Any]:
    """What a checkpoint holds; collective, since every rank has its own part."""
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
        "moved": moved,
        "step": trainer.step,
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "ranks": gather(own),
    }


def _save(path: Path, state: dict[str, Any], trainer: Trainer, say: Callable[[str], None]) -> bool:
    """Writes a checkpoint and each rank's part of the history beside it; whether. Collective.

    The parts come first and carry the step in their names: the checkpoint there is, new or old,
    always finds its own. By a mark it knows them from another run's after as many steps.

    Raises:
        UserError: On all ranks, if any has something that could not be read back. A full disk may
            have room again; this would be so at each checkpoint, and the training would be lost.
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
    kept: bool = on_rank0(lambda: _keep(path, state, say))
    if kept:
        checkpoint.remove_parts(path, hvd.rank(), but=own if state["history"] else None)
    elif own is not None:
        own.unlink(missing_ok=True)
    return kept


def _keep(path: Path, state: dict[str, Any], say: Callable[[str], None]) -> bool:
    """Writes a checkpoint; where that fails, the one before stays and training goes on."""
    try:
        checkpoint.save(path, state)
    except OSError as error:
        say(f"warning: no checkpoint was written to {path}: {error}. What was there still is.")
        return False
    return True


def _load_history(path: Path, state: dict[str, Any], optimizer: Any) -> None:
    """Loads this rank's part of a checkpoint's history; nothing if any rank cannot. Collective."""
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
    optimizer.load_state_dict(state["optimizer"])  # once more, to be rid of what came after it


def _resume(
    settings: Settings,
    folder: Path,
    trainer: Trainer,
    loader: Loader,
    identity: dict[str, Any],
) -> tuple[int, float, int]:
    """Restores everything on every rank from what rank 0 reads. Collective.

    Returns:
        Epochs done, best top-1, and what `_settle_batch_norm` returned last.

    Raises:
        UserError: On all ranks, if the checkpoint does not fit on any of them.
    """
    if settings.resume is None:
        return 0, 0.0, 0
    auto = settings.resume == "auto"
    path = folder / LAST if auto else Path(settings.resume)
    state = on_rank0(
        # A link to what is not there is a checkpoint that cannot be read, not none.
        lambda: (
            None if auto and not os.path.lexists(path) else checkpoint.load(path, expected=identity)
        )
    )
    if state is None:
        return 0, 0.0, 0
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
    return state["epoch"], state["best"], state["moved"]


def _restore(state: dict[str, Any], trainer: Trainer, loader: Loader) -> None:
    """Puts everything but the history in place. Not collective: may fail on any rank alone."""
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
    """Finds what torch takes in unseen and trips over in the first step."""
    for group, known in zip(optimizer.param_groups, before, strict=True):
        for name, value in known.items():
            if isinstance(value, (bool, float)) and not isinstance(group[name], (int, float)):
                raise UserError(f"the optimizer's {name} was {group[name]!r}, is {value!r}")
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            shape = getattr(value, "shape", ())  # of numbers: none
            if not isinstance(value, (torch.Tensor, int, float, type(None))) or (
                len(shape) and shape != parameter.shape
            ):
                found = f"a {type(value).__name__} of shape {tuple(shape)}"
                raise UserError(
                    f"the optimizer's {name} of a parameter of shape {tuple(parameter.shape)} "
                    f"is {found}"
                )


def _opening(
    settings: Settings, trainer: Trainer, train: ImageList, val: ImageList, steps_per_epoch: int
) -> str:
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    config = settings.anderson_config()
    return (
        f"{settings.model}, {count:,} parameters; {len(train):,} training and {len(val):,} "
        f"validation images of {len(train.classes)} classes, read by {settings.loader}\n"
        f"{hvd.size()} ranks on {trainer.device.type}, batch {settings.batch_size} x "
        f"{hvd.size() * settings.accumulate} = "
        f"{settings.batch_size * hvd.size() * settings.accumulate:,}, "
        f"{settings.epochs} epochs of {steps_per_epoch} steps; {settings.optimizer}, "
        + ("horovod.torch.DistributedOptimizer" if config is None else repr(config))
    )


def _step_row(interval: Interval, epoch: int, stats: Any) -> dict[str, Any]:
    row = {
        "step": interval.step,
        "epoch": epoch,
        "lr": interval.lr,
        "loss": interval.loss,
        "top1": interval.top1,
        "images_per_s": interval.images / interval.seconds,
        "seconds": interval.seconds,
        "data_seconds": interval.data_seconds,
    }
    if stats is not None:
        row |= {
            "aa_stored": stats.stored,
            "aa_accelerated": stats.accelerated,
            "aa_rejected": sum(stats.rejected.values()),
            "aa_averaged": stats.averaged,
            "aa_promised_reduction": stats.promised_reduction,
            "aa_condition": stats.condition,
            "aa_seconds": sum(stats.seconds.values()),
        }
    return row


def _epoch_row(
    interval: Interval,
    epoch: int,
    validation: Validation,
    averaged: tuple[str, Validation] | None,
) -> dict[str, Any]:
    row = {"step": interval.step, "epoch": epoch, "train_loss": interval.loss}
    row |= {f"val_{name}": value for name, value in asdict(validation).items()}
    if averaged is not None:
        row |= {"averaged_val_loss": averaged[1].loss, "averaged_val_top1": averaged[1].top1}
    return row


def _summary(
    settings: Settings,
    trainer: Trainer,
    totals: dict[str, Any],
    interval: Interval,
    validation: Validation,
    averaged: tuple[str, Validation] | None,
    best: float,
) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "model": settings.model,
        "optimizer": settings.optimizer,
        "anderson": settings.anderson,
        "loader": settings.loader,
        "ranks": hvd.size(),
        "device": trainer.device.type,
        "steps": trainer.step,
        "training_loss": interval.loss,
        "validation_loss": validation.loss,
        "validation_top1": validation.top1,
        "validation_top5": validation.top5,
        "best_validation_top1": best,
        "training_seconds": totals["seconds"],
        "waiting_for_data_seconds": totals["data_seconds"],
        "ms_per_step": 1000 * totals["seconds"] / totals["steps"],
        "images_per_second": totals["images"] / totals["seconds"],
    }
    if averaged is not None:
        summary |= {
            "averaged_weights": averaged[0],
            "averaged_validation_loss": averaged[1].loss,
            "averaged_validation_top1": averaged[1].top1,
        }
    stats = _stats(trainer)
    if stats is not None:
        seconds = sum(stats.seconds.values())
        summary["acceleration"] = {
            "stored": stats.stored,
            "accelerated": stats.accelerated,
            "averaged": stats.averaged,
            "rejected": dict(stats.rejected),
            "restarts": dict(stats.restarts),
            "history_bytes_on_rank_0": trainer.optimizer.anderson.history_bytes,
            "seconds": seconds,
            "seconds_of": dict(stats.seconds),
            "percent_of_training_time": 100 * seconds / totals["seconds"],
        }
    return summary


if __name__ == "__main__":
    sys.exit(main())

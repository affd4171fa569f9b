"""A training from its settings to its summary, on all ranks together."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aadl_hvd import AndersonError, average_batch_norm
from models import networks
from models.anderson_options import by_option
from models.command_line import to_yaml
from models.data import (
    ImageList,
    Loader,
    LoaderOptions,
    check_folder,
    find_corrupt,
    list_images,
    open_loader,
)
from models.dist import fail_together, gather, on_rank0
from models.engine import Averaged, Interval, Trainer, Validation, mean_over_ranks
from models.errors import UserError
from models.horovod import hvd
from models.metrics import MetricsLog
from models.output import BEST, LAST, SUMMARY, claim, clear, contents, write_settings
from models.plots import plot_training, training_title
from models.preemption import StopRequest
from models.progress import Progress
from models.report import (
    epoch_row,
    epoch_text,
    opening,
    step_row,
    summarize,
    summary_text,
    totals_of,
    write_summary,
)
from models.resume import identity_of, keep, resume, save, state_of
from models.schedule import Schedule
from models.settings import Settings


def run(settings: Settings) -> bool:
    """Trains as the settings say. Collective; Horovod has to be initialised (`models.dist.start`).

    Returns:
        Whether the training finished. If not, a signal stopped it and there is a checkpoint.

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
    notice = on_rank0(lambda: claim(folder, settings.resume, settings.overwrite))
    held = on_rank0(lambda: contents(folder))
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
        observe=settings.anderson == "default",  # the paper's method has no such check
        keep_batches=0 if settings.recalibrate == "never" else settings.recalibrate_batches,
        stop_requested=stop_request,
    )
    _seed(settings.seed + 1 + hvd.rank())
    identity = identity_of(settings, train_images)
    epoch, best = resume(settings, folder, trainer, train_loader, identity)
    # A run may be killed after its last checkpoint and before its summary.
    late = epoch >= settings.epochs and on_rank0(lambda: not (folder / SUMMARY).exists())

    chief = hvd.rank() == 0
    resumed_at = trainer.step
    progress = Progress(
        settings.progress,
        total=settings.epochs * steps_per_epoch,
        done=trainer.step,
        chief=chief,
    )
    counts = {"ranks": hvd.size(), "steps_per_epoch": steps_per_epoch}
    progress.say(opening(settings, trainer, train_images, val_images, **counts))
    if notice is not None:
        progress.warn(notice)
    for note in (*train_images.notes, *val_images.notes):
        progress.warn(note)
    if resumed_at:
        progress.say(f"going on after step {resumed_at}")

    totals = {"seconds": 0.0, "data_seconds": 0.0, "steps": 0, "images": 0}
    log: MetricsLog | None = None
    interval: Interval | None = None
    validation: Validation | None = None
    averaged: Averaged | None = None
    stopped, kept, anew = False, True, False
    try:
        if late:
            validation, anew = trainer.validate(val_loader), _measures_anew(settings)
        while epoch < settings.epochs and not stopped:
            for interval in trainer.train_epoch(train_loader, settings.log_every):
                if not totals["steps"]:
                    log = _open_log(settings, folder, held, resumed_at, progress.warn)
                for name in totals:
                    totals[name] += getattr(interval, name)
                progress.update(interval, epoch + 1, trainer.stats)
                if log is not None:
                    log.write("steps", step_row(interval, epoch + 1, trainer.stats))
                stopped = interval.stop
                if stopped and train_loader.batch:
                    break
            assert interval is not None
            amid = bool(train_loader.batch)
            epoch += not amid
            if stopped and epoch < settings.epochs:  # at once: the scheduler may not wait
                average_batch_norm(trainer.model, mean_over_ranks)
                state = state_of(identity, epoch, best, trainer, train_loader)
                kept = save(folder / LAST, state, trainer, progress.warn)
            if amid:
                break
            final = epoch == settings.epochs
            validating = final or epoch % settings.validate_every == 0
            every = settings.checkpoint_every
            saving = every > 0 and (final or stopped or epoch % every == 0)
            if validating or saving:
                anew = _settle_batch_norm(settings, trainer)
            improved = False
            if validating:
                validation = trainer.validate(val_loader)
                improved = every > 0 and (validation.top1 > best or not best)
                best = max(best, validation.top1)
                averaged = trainer.validate_averaged(val_loader)
                found = (interval, epoch, validation, averaged)
                progress.say(epoch_text(settings, *found, measured_anew=anew))
                if log is not None:
                    log.write("epochs", epoch_row(*found, averages=trainer.has_averages))
            if improved or saving:
                # Both hold the weights and statistics that were validated. best.pt comes first:
                # last.pt must not record a better accuracy than that of best.pt.
                state = state_of(identity, epoch, best, trainer, train_loader)
                if improved:
                    keep(folder / BEST, state | {"history": False}, progress.warn)
                if saving:
                    kept = save(folder / LAST, state, trainer, progress.warn)
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
        return finished
    if interval is None:
        print(f"nothing left to train: {epoch} of {settings.epochs} epochs are done")
    if validation is not None:
        loss = None if interval is None else interval.loss
        if late:
            print("the summary is missing: it is written now, from steps.csv and a validation")
            loss, totals = totals_of(folder)
        at_end = {
            "ranks": hvd.size(),
            "averages": trainer.has_averages and not late,
            "measured_anew": anew,
        }
        summary = summarize(settings, trainer, totals, loss, validation, averaged, best, **at_end)
        if not late:
            summary["total_seconds"] = time.perf_counter() - started
        _leave(folder, summary, training_title(settings, hvd.size()))
    return finished


def _leave(folder: Path, summary: dict[str, Any], title: str) -> None:
    """Prints and writes the summary, and draws the plot."""
    print("\n" + summary_text(summary))
    try:
        write_summary(folder, summary)
        print(f"plot  {plot_training(folder, title)}", flush=True)
    except OSError as error:
        print(f"warning: no summary was written to {folder}: {error}", flush=True)
    except ImportError as error:
        print(f"warning: no plot was drawn: {error}", flush=True)


def _open_log(
    settings: Settings,
    folder: Path,
    held: Container[Path],
    resumed_at: int,
    say: Callable[[str], None],
) -> MetricsLog | None:
    """Opens this training's files on rank 0, after its first steps. Collective.

    Old files in the folder are removed only now, so that a training that cannot begin keeps them.
    """

    def begin() -> None:
        if (removed := clear(folder, held)) and settings.overwrite:
            say(f"removed the training that {folder} held ({removed})")

    if not resumed_at:
        on_rank0(begin)
    if hvd.rank():
        return None
    write_settings(folder, to_yaml(settings), say)
    return MetricsLog(
        folder, tensorboard=settings.tensorboard, say=say, resume_step=resumed_at or None
    )


def _device(settings: Settings) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.device == "cpu" or (settings.device == "auto" and not max(gather(count))):
        return torch.device("cpu")
    # A rank sees all GPUs of its machine or, as with srun --gpu-bind=closest, its own alone.
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
    loader, problem = None, None
    try:
        loader = open_loader(settings.loader, images, options)
    except UserError as error:  # DALI may be missing on one machine
        problem = str(error)
    fail_together(problem)
    assert loader is not None
    return loader


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

    try:
        return DistributedAndersonOptimizer(base, **wrapping, anderson=config)
    except AndersonError as error:  # on all ranks, which have the same settings
        raise UserError(by_option(error)) from error


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


def _settle_batch_norm(settings: Settings, trainer: Trainer) -> bool:
    """Gives all ranks the same batch-norm statistics for the present weights. Collective.

    Returns whether they were measured anew.
    """
    if _measures_anew(settings):
        trainer.recalibrate()
        return True
    average_batch_norm(trainer.model, mean_over_ranks)
    return False


def _measures_anew(settings: Settings) -> bool:
    how = settings.recalibrate
    return how == "always" or (how == "auto" and settings.anderson != "off")

"""Training steps, validation and batch-norm statistics, on any number of ranks.

Whether a rank enters a collective must depend only on values that all ranks share: step counts,
settings, sums over ranks. If it depended on one rank's own values, ranks could deadlock.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from aadl_hvd import recalibrate_batch_norm
from models.data import Loader
from models.dist import sum_over_ranks
from models.errors import UserError
from models.horovod import hvd
from models.schedule import Schedule

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Measurements since the last report; equal on all ranks except the seconds.

    Attributes:
        step: Optimizer steps done in the whole training.
        steps: Optimizer steps in this interval.
        lr: Learning rate of the last step.
        loss: Mean over images and ranks, before each step's update, label smoothing included.
        top1: Share of images whose largest logit was right, 0 to 1.
        images: Number of images of all ranks.
        seconds: Wall-clock time, waiting for data included.
        data_seconds: The part of `seconds` spent waiting for data.
        stop: Some rank was asked to stop.
    """

    step: int
    steps: int
    lr: float
    loss: float
    top1: float
    images: int
    seconds: float
    data_seconds: float
    stop: bool


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Means over all validation images of all ranks.

    Attributes:
        loss: Cross-entropy without label smoothing.
        top1: Share of images whose largest logit was right, 0 to 1.
        top5: Share of images whose 5 largest logits include the right one, 0 to 1.
        images: Number of images.
    """

    loss: float
    top1: float
    top5: float
    images: int


Averaged = tuple[float, Validation]
"""An average's decay factor (see `AndersonConfig.averages`), and the validation at it."""


@dataclass(kw_only=True)
class Trainer:
    """The training loop: its parts, its training steps and its validations.

    Attributes:
        model: The network, on `device`.
        optimizer: From `horovod.torch.DistributedOptimizer` or an aadl_hvd optimizer.
        schedule: Learning rate by step.
        device: Device of model and batches.
        label_smoothing: Share of the target spread over all classes.
        amp: "off", "bf16" or "fp16".
        channels_last: Lay images out as NHWC, and so all activations. The weights stay
            contiguous: Horovod sends contiguous tensors only.
        clip_norm: Largest norm of the averaged gradient; None for no clipping.
        accumulate: Batches per optimizer step.
        keep_batches: Batches kept for `recalibrate` and `validate_averaged`.
        observe: Pass each batch's loss to the optimizer.
        stop_requested: Returns whether this rank was asked to stop; called once per interval.
        step: Optimizer steps done in the whole training.
    """

    model: nn.Module
    optimizer: Any
    schedule: Schedule
    device: torch.device
    label_smoothing: float = 0.0
    amp: str = "off"
    channels_last: bool = False
    clip_norm: float | None = None
    accumulate: int = 1
    keep_batches: int = 0
    observe: bool = False
    stop_requested: Callable[[], bool] = lambda: False
    step: int = 0
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        """Makes loss and loss scaler."""
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")
        self._loss = nn.CrossEntropyLoss(label_smoothing=self.label_smoothing)
        self._recent: deque[Batch] = deque(maxlen=self.keep_batches)

    def train_epoch(self, loader: Loader, log_every: int) -> Iterator[Interval]:
        """Trains on the rest of the loader's epoch. Collective.

        Args:
            loader: Gives the same number of batches on all ranks. Batches that do not fill a step
                of `accumulate` batches are left out.
            log_every: Steps in an interval; the epoch's last interval may be shorter.

        Yields:
            The measurements, at the end of each interval.

        Raises:
            UserError: On all ranks, when the loss of any rank is no longer finite.
        """
        self.model.train()
        self._recent.clear()
        steps = (len(loader) - loader.batch) // self.accumulate
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        started, waited, done = time.perf_counter(), 0.0, 0
        batches = iter(loader)
        for index in range(steps):
            group = []
            waiting = time.perf_counter()
            for _ in range(self.accumulate):
                group.append(next(batches))
            if index == steps - 1:
                for _ in batches:  # the loader's epoch ends only when all batches are drawn
                    pass
            waited += time.perf_counter() - waiting
            lr = self._take_step(group, sums)
            done += 1
            if done == log_every or index == steps - 1:
                # The request is sent with a reduction that is needed anyway. So all ranks learn of
                # it after the same step.
                measured = [*sums.tolist(), float(self.stop_requested())]
                loss, right, images, requests = sum_over_ranks(measured, "interval")
                if not math.isfinite(loss):
                    raise UserError(
                        f"the training loss is {loss} after step {self.step}: training diverged. "
                        "A lower --lr, a longer --warmup-epochs or --clip-norm may help"
                    )
                now = time.perf_counter()
                yield Interval(
                    step=self.step,
                    steps=done,
                    lr=lr,
                    loss=loss / images,
                    top1=right / images,
                    images=round(images),
                    seconds=now - started,
                    data_seconds=waited,
                    stop=requests > 0,
                )
                started, waited, done = time.perf_counter(), 0.0, 0
                sums.zero_()

    def _take_step(self, group: list[Batch], sums: torch.Tensor) -> float:
        lr = self.schedule.learning_rate(self.step)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        self.optimizer.zero_grad()
        for images, labels in group:
            if self.keep_batches:
                self._recent.append((images, labels))
            with self._autocast():
                logits = self.model(self._laid_out(images))
                loss = self._loss(logits.float(), labels)
            if self.observe:
                self.optimizer.observe(loss)
            self.scaler.scale(loss / len(group)).backward()
            right = (logits.detach().argmax(1) == labels).sum()
            count = right.new_tensor(len(labels))
            sums += torch.stack([loss.detach().double() * count, right, count])
        if self.clip_norm is not None or self.scaler.is_enabled():
            # Clipping needs the gradient averaged over ranks, without the loss scale. And an inf
            # on one rank must reach all ranks before any of them decides to skip the step.
            self.optimizer.synchronize()
            self.scaler.unscale_(self.optimizer)
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            with self.optimizer.skip_synchronize():
                self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.step += 1
        return lr

    def recalibrate(self) -> None:
        """Measures the batch-norm statistics at the present weights. Collective.

        It uses the last `keep_batches` training batches of this epoch. So no data is read, and the
        order of the data does not change.
        """
        if self._recent:
            inputs = [images for images, _ in self._recent]
            recalibrate_batch_norm(self.model, inputs, mean_over_ranks, self._forward)

    @property
    def stats(self) -> Any:
        """The optimizer's ``anderson.stats``; None without acceleration."""
        anderson = getattr(self.optimizer, "anderson", None)
        return None if anderson is None else anderson.stats

    @property
    def has_averages(self) -> bool:
        """Whether averages of the weights are kept, and batches to choose one of them."""
        anderson = getattr(self.optimizer, "anderson", None)
        return anderson is not None and bool(anderson.config.averages) and self.keep_batches > 0

    def validate_averaged(self, batches: Iterable[Batch]) -> Averaged | None:
        """Evaluates at averaged weights, chosen by the loss on the remembered batches. Collective.

        Batch-norm statistics are measured at each candidate. Weights and statistics are restored.

        Args:
            batches: See `validate`.

        Returns:
            The average's decay factor and the validation at it. None if no average is better than
            the weights themselves, or if there is none.
        """
        if not self.has_averages or not self._recent:
            return None
        inputs = [images for images, _ in self._recent]
        with self.optimizer.averaged_weights(
            self._recent_loss, model=self.model, batches=inputs, forward=self._forward
        ) as kind:  # the same on all ranks
            return None if kind is None else (kind, self.validate(batches))

    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            logits: torch.Tensor = self.model(self._laid_out(images))
        return logits

    def _recent_loss(self) -> float:
        self.model.eval()
        with torch.no_grad():
            losses = [self._loss(self._forward(x).float(), y) for x, y in self._recent]
        self.model.train()
        return torch.stack(losses).mean().item()

    def validate(self, batches: Iterable[Batch]) -> Validation:
        """Evaluates the model on this rank's batches and sums over ranks. Collective.

        Args:
            batches: Batches of any sizes, with every image once over all ranks.

        Returns:
            Means over all images, equal on all ranks.
        """
        self.model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for images, labels in batches:
                with self._autocast():
                    logits = self.model(self._laid_out(images)).float()
                sums += count_correct(logits, labels)
        self.model.train()
        loss, top1, top5, images_seen = sum_over_ranks(sums.tolist(), "validation")
        return Validation(
            loss=loss / images_seen,
            top1=top1 / images_seen,
            top5=top5 / images_seen,
            images=round(images_seen),
        )

    def _autocast(self) -> torch.autocast:
        dtype = AMP_DTYPES[self.amp]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _laid_out(self, images: torch.Tensor) -> torch.Tensor:
        if self.channels_last:
            return images.contiguous(memory_format=torch.channels_last)
        return images


def count_correct(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns sums over a batch, so that batches of different sizes can be added.

    Args:
        logits: float32 [B, classes].
        labels: int64 [B].

    Returns:
        float64 [4]: sum of cross-entropy, number right by the largest logit, number right by the
        five largest, B. With fewer than five classes, all of them count as the largest.
    """
    largest = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    return torch.stack(
        [
            loss.double(),
            largest[:, 0].sum().double(),
            largest.sum().double(),
            torch.tensor(float(len(labels)), dtype=torch.float64, device=logits.device),
        ]
    )


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Returns the mean of a tensor over all ranks. Collective."""
    return hvd.allreduce(values, name="batch_norm", op=hvd.Average)

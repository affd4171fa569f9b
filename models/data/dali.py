"""NVIDIA DALI: decoding and augmentation on the CPU, or on the GPU with ``device="mixed"``.

Other settings of the reader look right but are not. With DROP and padded batches the ranks fall out
of step after the first epoch. With FILL, or with PARTIAL without padding, images are lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from models.data.folder import ImageList
from models.data.loader import CROP_AREA, CROP_RATIO, Loader, LoaderOptions
from models.errors import UserError

try:
    from nvidia.dali import Pipeline, fn, types
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator
except ImportError as error:
    raise UserError(
        "NVIDIA DALI is not installed: `pip install nvidia-dali-cuda130`, or choose the other "
        "loader with `--loader torch`"
    ) from error

READER = "images"


class DaliLoader(Loader):
    """Batches from a DALI pipeline; see `Loader`."""

    kind = "dali"

    def __init__(self, images: ImageList, options: LoaderOptions) -> None:
        """See `Loader`; the pipeline is built at the first batch.

        Raises:
            UserError: As `Loader`; or a file's name is not UTF-8.
        """
        super().__init__(images, options)
        refused = [path for path in self.images.paths() if not can_open(path)]
        if refused:
            raise UserError(
                f"DALI cannot open files whose names are not UTF-8 ({len(refused)} of "
                f"{images.root}, such as {refused[0]!r}): rename them, or use `--loader torch`"
            )
        self._iterator: Any = None
        self._checkpoint: str | None = None

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See `Loader`."""
        if self._iterator is None:
            self._iterator = self._build()
        while True:
            batch = self._next() if self.batch < len(self) else None
            if batch is None:  # validation: the shard was short of a batch
                self._next_epoch()
                return
            self.batch += 1
            last = self.batch == len(self)
            if last:
                self._next_epoch()
            images, labels = batch[0]["images"], batch[0]["labels"].flatten().long()
            if len(images):
                yield images, labels
            if last:
                return

    def state_dict(self) -> dict[str, Any]:
        """See `Loader`; includes DALI's own checkpoint of about 0.5 kB."""
        if self._iterator is None:
            self._iterator = self._build()
        checkpoint = self._iterator.checkpoints()[0]
        if isinstance(checkpoint, bytes):
            checkpoint = checkpoint.decode("latin1")
        return super().state_dict() | {"dali": checkpoint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Loader`."""
        super().load_state_dict(state)
        if state["dali"] is None:
            raise UserError(
                "the data loader cannot go on from there: DALI's own checkpoint is None"
            )
        self._checkpoint = state["dali"]
        self._iterator = self._build()  # now, so that DALI reports a bad checkpoint at once

    def close(self) -> None:
        """See `Loader`."""
        self._iterator = None

    def _next(self) -> Any:
        try:
            return next(self._iterator, None)
        except RuntimeError as error:
            raise RuntimeError(
                f"DALI's pipeline has failed. If a file below {self.images.root} is the cause, "
                "--check-images names it before training."
            ) from error

    def _next_epoch(self) -> None:
        # Batches past the last full one must be drawn, too, since the iterator resets only at its
        # end. Some ranks have one more of them than others.
        while self._next() is not None:
            pass
        self.epoch, self.batch = self.epoch + 1, 0

    def _build(self) -> Any:
        pipeline = build_pipeline(
            self.images,
            self.options,
            gpu=self.options.device.type == "cuda",
            device_id=self.options.device.index,
            checkpoint=self._checkpoint,
        )
        try:
            pipeline.build()
        except RuntimeError as error:
            raise RuntimeError(f"DALI could not build its pipeline: {error}") from error
        return DALIGenericIterator(
            pipeline,
            ["images", "labels"],
            reader_name=READER,
            last_batch_policy=LastBatchPolicy.PARTIAL,
            auto_reset=True,
            prepare_first_batch=False,
        )


def build_pipeline(
    images: ImageList,
    options: LoaderOptions,
    *,
    gpu: bool,
    device_id: int | None,
    checkpoint: str | None = None,
) -> Pipeline:
    """Defines the graph; nothing is read or decoded before its ``build()``.

    Args:
        images: The data set, the same on every rank.
        options: How to shard, shuffle and transform it.
        gpu: Decode with nvJPEG (``device="mixed"``) and transform on the GPU.
        device_id: Index of the GPU, the local rank; None for a pipeline without one. A graph for
            the GPU can be serialised, and so checked, without a GPU.
        checkpoint: DALI's checkpoint to resume from; None begins.

    Returns:
        A pipeline with the outputs images, float32 [B, C, H, W], and labels, int32 [B, 1].
    """
    pipeline = Pipeline(
        batch_size=options.batch_size,
        num_threads=options.workers,
        device_id=device_id,
        # It depends on the rank, or all ranks would draw the same crops.
        seed=options.seed * 100_003 + options.rank,
        prefetch_queue_depth=3 if gpu else 2,
        # Always on, since it changes the order in which images come.
        enable_checkpointing=True,
        checkpoint=None if checkpoint is None else checkpoint.encode("latin1"),
    )
    reshuffle = options.train and options.shuffle == "epoch"
    with pipeline:
        files, labels = fn.readers.file(
            files=images.paths(),
            labels=list(images.labels),
            shard_id=options.rank,  # of the world, not of the node
            num_shards=options.world,
            pad_last_batch=True,
            stick_to_shard=not reshuffle,
            name=READER,
            shuffle_after_epoch=reshuffle,
            shuffle_after_epoch_seed=options.seed + 1 if reshuffle else None,
        )
        pipeline.set_outputs(_images(files, options, gpu=gpu), labels.gpu() if gpu else labels)
    return pipeline


def can_open(path: str) -> bool:
    """Whether DALI can open a file of this name: it must be UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:  # Python has surrogates in a name that is not UTF-8
        return False
    return True


class Decoder:
    """Decodes one file at a time as the loader does on the CPU, to check it. Not thread-safe.

    On the GPU the loader uses these CPU decoders for files that nvJPEG does not take.
    """

    def __init__(self, channels: int) -> None:
        """Builds no pipeline yet.

        Args:
            channels: 3 for colour, 1 for grey.
        """
        self._output_type = _output_type(channels)
        self._pipelines: dict[bool, Pipeline] = {}

    def decode(self, data: bytes) -> np.ndarray:
        """Decodes a whole file.

        Args:
            data: The file's content.

        Returns:
            uint8 [H, W, channels].

        Raises:
            RuntimeError: DALI cannot decode it.
        """
        return self._run(data, whole=True)

    def decode_last_pixel(self, data: bytes) -> None:
        """Reads a file to its end, and transforms only what the last pixel needs.

        For a JPEG this takes 40 % of the time of `decode`.

        Args:
            data: The file's content.

        Raises:
            RuntimeError: DALI cannot decode it.
        """
        self._run(data, whole=False)

    def _run(self, data: bytes, *, whole: bool) -> np.ndarray:
        # An error leaves a pipeline invalid; a new one takes 10 ms.
        pipeline = self._pipelines.pop(whole, None) or self._build(whole=whole)
        pipeline.feed_input("file", [np.frombuffer(data, np.uint8)])
        pixels = np.array(pipeline.run()[0].at(0))
        self._pipelines[whole] = pipeline
        return pixels

    def _build(self, *, whole: bool) -> Pipeline:
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
        with pipeline:
            file = fn.external_source(name="file")
            if whole:
                pixels = fn.decoders.image(file, device="cpu", output_type=self._output_type)
            else:
                pixels = fn.decoders.image_crop(
                    file,
                    device="cpu",
                    output_type=self._output_type,
                    crop=(1, 1),
                    crop_pos_x=1.0,
                    crop_pos_y=1.0,
                )
            pipeline.set_outputs(pixels)
        pipeline.build()
        return pipeline


def _output_type(channels: int) -> Any:
    return types.RGB if channels == 3 else types.GRAY


def _images(files: Any, options: LoaderOptions, *, gpu: bool) -> Any:
    decoder = {
        "device": "mixed" if gpu else "cpu",
        "output_type": _output_type(options.channels),
    }
    if gpu:
        # The size of ImageNet's largest images; it saves reallocations while training.
        decoder |= {"preallocate_width_hint": 5980, "preallocate_height_hint": 6430}
        decoder |= {"jpeg_fancy_upsampling": True}  # as on the CPU, and in torch's loader
    mirror: Any = 0
    if options.train and options.augment != "none":
        pixels = fn.decoders.image_random_crop(
            files,
            random_area=list(CROP_AREA),
            random_aspect_ratio=list(CROP_RATIO),
            num_attempts=10,
            **decoder,
        )
        pixels = fn.resize(
            pixels,
            size=(options.image_size, options.image_size),
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        if options.augment == "imagenet":
            mirror = fn.random.coin_flip(probability=0.5)
    else:
        pixels = fn.decoders.image(files, **decoder)
        pixels = fn.resize(
            pixels,
            resize_shorter=options.resize,
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
    return fn.crop_mirror_normalize(
        pixels,
        dtype=types.FLOAT,
        output_layout="CHW",
        crop=(options.image_size, options.image_size),
        mean=[255 * value for value in options.mean],
        std=[255 * value for value in options.std],
        mirror=mirror,
    )

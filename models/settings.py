"""Every setting of the training program: one dataclass behind the command line and YAML files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from aadl_hvd import AndersonConfig, ConfigError
from models import networks
from models.anderson_options import PREFIX, anderson_options, by_option
from models.data import AUGMENTATIONS, LOADERS, SHUFFLES
from models.errors import UserError
from models.options import Option, as_typed, dashed, declare, options_of, shown
from models.schedule import DECAYS, WARMUPS

OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw", "rmsprop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings, checked. `python -m models.train --help` explains each of them.

    Attributes:
        acceleration: The fields of `AndersonConfig` that were set one by one.
        origin: The YAML file that settings were read from, and the keys in it by option. Both are
            empty without a file. Settings without a key were given as options.

    Raises:
        UserError: A value is out of range or does not go with another.
    """

    data: str = declare("data", "", "folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    loader: str = declare("data", "dali", "what reads and decodes the images", LOADERS)
    batch_size: int = declare("data", 64, "images in a batch of one rank", least=1)
    image_size: int = declare("data", 224, "side in pixels of the images the network sees", least=1)
    resize: int | None = declare(
        "data",
        None,
        "length in pixels of the shorter side before the centre crop, in validation and "
        "without augmentation",
        least=1,
        none="256/224 of the image size, the default",
    )
    channels: int = declare("data", 3, "3 reads the images in colour, 1 in grey")
    augment: str = declare(
        "data",
        "imagenet",
        "none; crop: a random part, resized; imagenet: that, and mirrored half of the time",
        AUGMENTATIONS,
    )
    shuffle: str = declare(
        "data",
        "epoch",
        "epoch: all images are shuffled anew each epoch; once: one order drawn from the seed,"
        " each rank keeps its part",
        SHUFFLES,
    )
    workers: int = declare(
        "data", 4, "DALI threads, or worker processes of the torch loader, of one rank", least=0
    )
    check_images: bool = declare(
        "data",
        True,
        "decode every image before training, as the loader does, and name those that it "
        "cannot read; the ranks share the work",
    )

    model: str = declare("model", "resnet50", "the network", networks.NAMES)
    width: int = declare("model", 16, "channels of the first stage of resnet8 to resnet56", least=1)
    channels_last: bool = declare(
        "model", False, "lay images and activations out as NHWC, faster on GPUs with AMP"
    )
    amp: str = declare(
        "model", "off", "automatic mixed precision; fp16 scales the loss", ("off", "bf16", "fp16")
    )
    device: str = declare(
        "model",
        "auto",
        "auto takes the GPU of the local rank where there is one",
        ("auto", "cpu", "cuda"),
    )
    seed: int = declare("model", 0, "seed of weights, order, augmentation", least=0, most=2**31 - 2)

    optimizer: str = declare(
        "optimization",
        "nesterov",
        "the base optimizer; sgd has the momentum of --momentum, 0 for none; nesterov is SGD "
        "with Nesterov momentum",
        OPTIMIZERS,
    )
    epochs: int = declare("optimization", 90, "passes over the training images", least=1)
    lr: float = declare(
        "optimization",
        0.1,
        "learning rate after the warm-up; taken as it is, not multiplied by the number of ranks",
        least=0,
    )
    momentum: float = declare("optimization", 0.9, "momentum of sgd, nesterov, rmsprop", least=0)
    weight_decay: float = declare("optimization", 5e-5, "L2 penalty (adamw: decoupled)", least=0)
    label_smoothing: float = declare(
        "optimization", 0.0, "share of the target spread over all classes, below 1", least=0
    )
    clip_norm: float | None = declare(
        "optimization",
        None,
        "clip the norm of the averaged gradient to this",
        above=0,
        none="no clipping, the default",
    )
    accumulate: int = declare("optimization", 1, "batches whose gradients make one step", least=1)
    compression: str = declare(
        "optimization", "none", "compression of the gradients that are sent", ("none", "fp16")
    )

    warmup_epochs: float = declare(
        "schedule", 5.0, "length of the warm-up in epochs; 0 for none", least=0
    )
    warmup: str = declare(
        "schedule",
        "constant",
        "constant: --warmup-lr until the warm-up ends, as in the paper; linear: from there up"
        " to --lr",
        WARMUPS,
    )
    warmup_lr: float = declare(
        "schedule", 0.05, "learning rate at the start of the warm-up", least=0
    )
    decay: str = declare(
        "schedule",
        "step",
        "step: times --decay-factor at each milestone; cosine: down to 0 at the end; none",
        DECAYS,
    )
    milestones: tuple[float, ...] = declare(
        "schedule",
        (30.0, 60.0, 80.0),
        "numbers of epochs after which the rate is lowered",
        none="never",
    )
    decay_factor: float = declare("schedule", 0.1, "see --decay", least=0)

    anderson: str = declare(
        "Anderson acceleration",
        "default",
        "off: Horovod's own optimizer, untouched; default: this package's robust defaults; "
        "paper: the paper's settings for ResNet50",
        ("off", "default", "paper"),
    )

    validate_every: int = declare(
        "validation",
        1,
        "epochs between two validations; the last epoch is always validated",
        least=1,
    )
    recalibrate: str = declare(
        "validation",
        "auto",
        "measure the batch-norm statistics anew before a validation and a checkpoint at an "
        "epoch's end; auto: with acceleration",
        ("auto", "always", "never"),
    )
    recalibrate_batches: int = declare(
        "validation",
        10,
        "training batches of each rank for --recalibrate, the last of the epoch; kept in memory",
        least=1,
    )

    out: str = declare("output", "runs/train", "folder for checkpoints, metrics, summary and plot")
    resume: str | None = declare(
        "output",
        None,
        "checkpoint to go on from; auto: the last one in --out, if there is one",
        none="begin, the default; refused where --out holds a training",
    )
    overwrite: bool = declare(
        "output",
        False,
        "begin afresh where --out holds a training: remove its files, and only these, once "
        "the new one has trained for the first --log-every steps",
    )
    checkpoint_every: int = declare(
        "output",
        1,
        "epochs between two checkpoints, last.pt; the last epoch always makes one, and so "
        "does a signal to stop (exit code 75); best.pt is written whenever a validation is "
        "better than all before; 0 for none at all",
        least=0,
    )
    log_every: int = declare(
        "output",
        10,
        "steps between two rows of steps.csv; the loss and signals to stop are checked just as "
        "often",
        least=1,
    )
    tensorboard: bool = declare("output", True, "write the metrics for TensorBoard too")
    progress: str = declare(
        "output",
        "auto",
        "bar; lines: a line every few seconds; auto: a bar where this program or its launcher"
        " writes to a terminal, else lines",
        ("auto", "bar", "lines", "off"),
    )
    acceleration: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: tuple[str, Mapping[str, str]] = dataclasses.field(
        default=("", {}), compare=False, repr=False
    )

    def __post_init__(self) -> None:
        """Checks ranges and combinations."""
        for option in OWN_OPTIONS.values():
            option.check(getattr(self, option.name))
        for name, value in self.acceleration.items():
            OPTIONS[PREFIX + name].check(value)
        if not self.data:
            raise UserError("--data is missing: the folder that holds train/ and val/")
        if self.channels not in (1, 3):
            raise UserError(f"--channels is {self.channels}, must be 3 or 1")
        if self.label_smoothing >= 1:
            raise UserError(f"--label-smoothing is {shown(self.label_smoothing)}, must be below 1")
        if self.resize is not None and self.resize < self.image_size:
            raise UserError(
                f"--resize is {self.resize}, must be at least the image size, {self.image_size}"
            )
        if self.loader == "dali" and self.workers < 1:
            raise UserError("--workers is 0, must be at least 1 with DALI")
        if self.optimizer == "nesterov" and not self.momentum:
            raise UserError("--momentum is 0, must be positive with --optimizer nesterov")
        if self.overwrite and self.resume is not None:
            raise UserError("--resume and --overwrite exclude each other: leave one of them out")
        if self.anderson == "off" and self.acceleration:
            options = ", ".join(f"--{dashed(PREFIX + name)}" for name in self.acceleration)
            raise UserError(f"{options} given with --anderson off")
        self.anderson_config()

    @property
    def resize_to(self) -> int:
        """Length of the shorter side before the centre crop, in pixels."""
        return self.resize or round(self.image_size * 256 / 224)

    def anderson_config(self) -> AndersonConfig | None:
        """The configuration of the acceleration, single settings included; None if it is off."""
        if self.anderson == "off":
            return None
        config = AndersonConfig.paper("resnet50") if self.anderson == "paper" else AndersonConfig()
        try:
            return dataclasses.replace(config, **self.acceleration)
        except ConfigError as error:
            raise UserError(by_option(error)) from error

    def changed(self) -> dict[str, tuple[Any, Any]]:
        """The settings that differ from the defaults: by option, value and default."""
        different = {
            name: (getattr(self, name), option.default)
            for name, option in OWN_OPTIONS.items()
            if getattr(self, name) != option.default
        }
        config = self.anderson_config()
        if config is not None:
            value, default = config.to_dict(), AndersonConfig().to_dict()
            different |= {
                PREFIX + name: (value[name], default[name])
                for name in value
                if value[name] != default[name]
            }
        return different

    def as_typed(self, message: str) -> str:
        """Replaces options in a message by the keys of the YAML file."""
        return as_typed(message, *self.origin)


OWN_OPTIONS = options_of(Settings)
"""Options by name, except those for the fields of `AndersonConfig`."""

OPTIONS: dict[str, Option] = {}
"""All options by name, in the order in which --help shows them."""

for _option in OWN_OPTIONS.values():
    OPTIONS[_option.name] = _option
    if _option.name == "anderson":
        OPTIONS |= anderson_options()

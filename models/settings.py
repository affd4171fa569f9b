"""Every setting of the training program: one dataclass behind the command line and YAML files."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from aadl_hvd import AndersonConfig, ConfigError
from models import networks
from models.data import AUGMENTATIONS, LOADERS, SHUFFLES
from models.errors import UserError
from models.schedule import DECAYS, WARMUPS

OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw", "rmsprop")
ANDERSON_PREFIX = "anderson_"
NONE: Literal["none"] = "none"
"""Stands for None in options of `AndersonConfig`: there None means "not given"."""


def _option(
    group: str,
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    least: float | None = None,
    none: str | None = None,
) -> Any:
    """Declares an option.

    Args:
        group: Heading in --help.
        default: None for an option of `AndersonConfig` means what --anderson stands for.
        help: What it is.
        choices: All values it may have.
        least: Smallest value it may have.
        none: What the word "none" stands for; None: the option does not take it.
    """
    if none is not None:
        help += f"; none: {none}"
    metadata = {"group": group, "help": help, "choices": choices, "least": least, "none": none}
    return dataclasses.field(default=default, metadata=metadata)


def dashed(name: str) -> str:
    """An option's name as it is typed, without the dashes before it."""
    return name.replace("_", "-")


def shown(value: Any) -> str:
    """A setting's value as its user would type it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return " ".join(map(shown, value)) or NONE
    if isinstance(value, float):
        return f"{value:g}"
    return NONE if value is None else str(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What `python -m models.train --help` explains, option by option; checks itself.

    Attributes:
        origin: The YAML file that settings were read from, and by option the key in it; empty
            where there is none. All others are options.

    Raises:
        UserError: A value is out of range or does not go with another.
    """

    data: str = _option(
        "data",
        "",
        "folder with train/CLASS/*.jpg and val/CLASS/*.jpg",
    )
    loader: str = _option(
        "data",
        "dali",
        "what reads and decodes the images",
        LOADERS,
    )
    batch_size: int = _option(
        "data",
        64,
        "images in a batch of one rank",
        least=1,
    )
    image_size: int = _option(
        "data",
        224,
        "side in pixels of the images the network sees",
        least=1,
    )
    resize: int | None = _option(
        "data",
        None,
        "length in pixels of the shorter side before the centre crop, in validation and "
        "without augmentation",
        least=1,
        none="256/224 of the image size, the default",
    )
    channels: int = _option(
        "data",
        3,
        "3 reads the images in colour, 1 in grey",
    )
    augment: str = _option(
        "data",
        "imagenet",
        "none; crop: a random part, resized; imagenet: that, and mirrored half of the time",
        AUGMENTATIONS,
    )
    shuffle: str = _option(
        "data",
        "epoch",
        "epoch: all images are shuffled anew each epoch; once: one order drawn from the seed,"
        " each rank keeps its part",
        SHUFFLES,
    )
    workers: int = _option(
        "data",
        4,
        "DALI threads, or worker processes of the torch loader, of one rank",
        least=0,
    )
    check_images: bool = _option(
        "data",
        True,
        "decode every image before training, as the loader does, and name those that it cannot "
        "show; the ranks share the work",
    )

    model: str = _option(
        "model",
        "resnet50",
        "the network",
        networks.NAMES,
    )
    width: int = _option(
        "model",
        16,
        "channels of the first stage of resnet8 to resnet56",
        least=1,
    )
    channels_last: bool = _option(
        "model",
        False,
        "lay images and activations out as NHWC, faster on GPUs with AMP",
    )
    amp: str = _option(
        "model",
        "off",
        "automatic mixed precision; fp16 scales the loss",
        ("off", "bf16", "fp16"),
    )
    device: str = _option(
        "model",
        "auto",
        "auto takes the GPU of the local rank where there is one",
        ("auto", "cpu", "cuda"),
    )
    seed: int = _option(
        "model",
        0,
        "for weights, order and augmentation",
        least=0,
    )

    optimizer: str = _option(
        "optimization",
        "nesterov",
        "the base optimizer; sgd has the momentum of --momentum, 0 for none; nesterov is SGD "
        "with Nesterov's",
        OPTIMIZERS,
    )
    epochs: int = _option(
        "optimization",
        90,
        "passes over the training images",
        least=1,
    )
    lr: float = _option(
        "optimization",
        0.1,
        "learning rate after the warm-up; taken as it is, not multiplied by the number of ranks",
        least=0,
    )
    momentum: float = _option(
        "optimization",
        0.9,
        "of sgd, nesterov and rmsprop",
        least=0,
    )
    weight_decay: float = _option(
        "optimization",
        5e-5,
        "L2 penalty (adamw: decoupled)",
        least=0,
    )
    label_smoothing: float = _option(
        "optimization",
        0.0,
        "share of the target spread over all classes, below 1",
        least=0,
    )
    clip_norm: float | None = _option(
        "optimization",
        None,
        "clip the norm of the averaged gradient to this",
        least=0,
        none="no clipping, the default",
    )
    accumulate: int = _option(
        "optimization",
        1,
        "batches whose gradients make one step",
        least=1,
    )
    compression: str = _option(
        "optimization",
        "none",
        "of the gradients that Horovod sends",
        ("none", "fp16"),
    )

    warmup_epochs: float = _option(
        "schedule",
        5.0,
        "length of the warm-up in epochs; 0 for none",
        least=0,
    )
    warmup: str = _option(
        "schedule",
        "constant",
        "constant: --warmup-lr until the warm-up ends, as in the paper; linear: from there up"
        " to --lr",
        WARMUPS,
    )
    warmup_lr: float = _option(
        "schedule",
        0.05,
        "learning rate at the start of the warm-up",
        least=0,
    )
    decay: str = _option(
        "schedule",
        "step",
        "step: times --decay-factor at each milestone; cosine: down to 0 at the end; none",
        DECAYS,
    )
    milestones: tuple[float, ...] = _option(
        "schedule",
        (30.0, 60.0, 80.0),
        "how many epochs are done when the rate is lowered",
        none="never",
    )
    decay_factor: float = _option(
        "schedule",
        0.1,
        "see --decay",
        least=0,
    )

    anderson: str = _option(
        "Anderson acceleration",
        "default",
        "off: Horovod's own optimizer, untouched; default: this package's robust defaults; "
        "paper: the paper's settings for ResNet50",
        ("off", "default", "paper"),
    )
    anderson_history_depth: int | None = _option(
        "Anderson acceleration",
        None,
        "m: differences of iterates kept",
    )
    anderson_frequency: int | None = _option(
        "Anderson acceleration",
        None,
        "p: accelerate every p-th step",
    )
    anderson_store_every: int | None = _option(
        "Anderson acceleration",
        None,
        "q: store every q-th step",
    )
    anderson_relaxation: float | None = _option(
        "Anderson acceleration",
        None,
        "beta: how far to go towards the accelerated point, above 0 and up to 1",
    )
    anderson_damping: float | None = _option(
        "Anderson acceleration",
        None,
        "weight of the residual left over by the least squares",
    )
    anderson_warmup_steps: int | None = _option(
        "Anderson acceleration",
        None,
        "plain steps before the first is stored",
    )
    anderson_regularization: float | None = _option(
        "Anderson acceleration",
        None,
        "ridge of the least squares, relative to the Gram matrix",
    )
    anderson_average_window: int | Literal["none"] | None = _option(
        "Anderson acceleration",
        None,
        "t: iterates in the moving average",
        none="no moving average",
    )
    anderson_average_threshold: float | None = _option(
        "Anderson acceleration",
        None,
        "epsilon: relative deviation from which on the average is taken",
    )
    anderson_safeguard: str | None = _option(
        "Anderson acceleration",
        None,
        "when an accelerated point is taken",
        ("none", "descent", "residual"),
    )
    anderson_averages: tuple[float, ...] | None = _option(
        "Anderson acceleration",
        None,
        "running averages of the weights, for validation: decay factors and window lengths",
        none="no averages",
    )
    anderson_noise_gate: float | Literal["none"] | None = _option(
        "Anderson acceleration",
        None,
        "how many times its noise a residual must be",
        none="no gate",
    )
    anderson_momentum: str | None = _option(
        "Anderson acceleration",
        None,
        "what becomes of the momentum after an accelerated step",
        ("keep", "reset"),
    )
    anderson_residual: str | None = _option(
        "Anderson acceleration",
        None,
        "step: what the optimizer did; gradient: minus the gradient; state: "
        "weights and momentum together",
        ("step", "gradient", "state"),
    )
    anderson_layout: str | None = _option(
        "Anderson acceleration",
        None,
        "how the ranks share the history",
        ("rows", "columns"),
    )
    anderson_shard_group: str | None = _option(
        "Anderson acceleration",
        None,
        "the ranks that share one history",
        ("world", "node"),
    )
    anderson_history_dtype: str | None = _option(
        "Anderson acceleration",
        None,
        "of the stored history",
        ("float64", "float32", "bfloat16", "float16"),
        none="float64 if a weight is float64, else float32",
    )
    anderson_history_device: str | None = _option(
        "Anderson acceleration",
        None,
        "cpu: keep the history in the host's memory, slow",
        ("cpu",),
        none="where the weights are",
    )
    anderson_on_desync: str | None = _option(
        "Anderson acceleration",
        None,
        "when ranks no longer hold the same weights: stop, or make them equal",
        ("error", "resync"),
    )
    anderson_refine: int | None = _option(
        "Anderson acceleration",
        None,
        "steps of iterative refinement of the least squares",
    )

    validate_every: int = _option(
        "validation",
        1,
        "epochs between two validations; the last epoch is always validated",
        least=1,
    )
    recalibrate: str = _option(
        "validation",
        "auto",
        "measure the batch-norm statistics anew before a validation and a checkpoint at an "
        "epoch's end; auto: with acceleration",
        ("auto", "always", "never"),
    )
    recalibrate_batches: int = _option(
        "validation",
        10,
        "training batches of each rank it takes, the last ones of the epoch; kept in memory",
        least=1,
    )

    out: str = _option(
        "output",
        "runs/train",
        "folder for checkpoints, metrics, summary and plot",
    )
    resume: str | None = _option(
        "output",
        None,
        "checkpoint to go on from; auto: the last one in --out, if there is one",
        none="begin, the default; refused where --out holds a training",
    )
    overwrite: bool = _option(
        "output",
        False,
        "begin afresh where --out holds a training: remove its files, and only these, once the "
        "new one has trained for the first --log-every steps",
    )
    checkpoint_every: int = _option(
        "output",
        1,
        "epochs between two checkpoints, last.pt; the last epoch always makes one, and so does a "
        "signal to stop (exit code 75); best.pt is written whenever a validation is better than "
        "all before; 0 for none at all",
        least=0,
    )
    log_every: int = _option(
        "output",
        10,
        "steps between two rows of steps.csv, checks that the loss is finite and looks for a signal"
        " to stop",
        least=1,
    )
    tensorboard: bool = _option(
        "output",
        True,
        "write the metrics for TensorBoard too",
    )
    progress: str = _option(
        "output",
        "auto",
        "bar; lines: a line every few seconds; auto: a bar where this program or its launcher "
        "writes to a terminal, else lines",
        ("auto", "bar", "lines", "off"),
    )

    origin: tuple[str, Mapping[str, str]] = dataclasses.field(
        default=("", {}), compare=False, repr=False
    )

    def __post_init__(self) -> None:
        """Checks ranges and combinations."""
        for field in OPTIONS.values():
            value = getattr(self, field.name)
            choices, least = field.metadata["choices"], field.metadata["least"]
            if value is None or (value == NONE and field.metadata["none"] is not None):
                continue
            option = f"--{dashed(field.name)}"
            if choices and value not in choices:
                also = "" if field.metadata["none"] is None else ", none"
                raise UserError(f"{option} is {value!r}, must be one of {', '.join(choices)}{also}")
            if least is not None and not value >= least:
                raise UserError(f"{option} is {shown(value)}, must be at least {least:g}")
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise UserError(f"{option} is {number}, must be finite")
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
        if self.anderson == "off" and (given := self._overrides()):
            options = ", ".join(f"--{dashed(ANDERSON_PREFIX + name)}" for name in given)
            raise UserError(f"{options} given with --anderson off")
        self.anderson_config()

    @property
    def resize_to(self) -> int:
        """Length of the shorter side before the centre crop, in pixels."""
        return self.resize or round(self.image_size * 256 / 224)

    def anderson_config(self) -> AndersonConfig | None:
        """The acceleration asked for, with the single settings put in; None when off."""
        if self.anderson == "off":
            return None
        config = AndersonConfig.paper("resnet50") if self.anderson == "paper" else AndersonConfig()
        try:
            return dataclasses.replace(config, **self._overrides())
        except ConfigError as error:
            raise UserError(by_option(error)) from error

    def changed(self) -> dict[str, tuple[Any, Any]]:
        """What differs from the defaults: by option its value and its default."""
        different = {
            name: (getattr(self, name), field.default)
            for name, field in OPTIONS.items()
            if not name.startswith(ANDERSON_PREFIX) and getattr(self, name) != field.default
        }
        config = self.anderson_config()
        if config is not None:
            value, default = config.to_dict(), AndersonConfig().to_dict()
            different |= {
                ANDERSON_PREFIX + name: (value[name], default[name])
                for name in value
                if value[name] != default[name]
            }
        return different

    def as_typed(self, message: str) -> str:
        """Puts the keys of the YAML file into a message that names options."""
        return as_typed(message, *self.origin)

    def _overrides(self) -> dict[str, Any]:
        given = {}
        for name, field in OPTIONS.items():
            value = getattr(self, name)
            if name.startswith(ANDERSON_PREFIX) and value is not None:
                is_none = value == NONE and field.metadata["none"] is not None
                given[name.removeprefix(ANDERSON_PREFIX)] = None if is_none else value
        return given


OPTIONS = {field.name: field for field in dataclasses.fields(Settings) if field.metadata}
"""By name; all fields of `Settings` that a user may set."""


def by_option(error: Exception) -> str:
    """Says with the names of options what the library says with those of its parameters."""
    text = str(error)

    def option(match: re.Match[str]) -> str:
        name = ANDERSON_PREFIX + match[1]
        value = NONE if match[2] in ("()", "None") else match[2]
        return f"--{dashed(name)} {value}" if name in OPTIONS else match[0]

    parts = re.fullmatch(r"Invalid (\w+)=(.*?)( with .*?)?\. Must (.*?)\.?", text, re.DOTALL)
    if parts is None or ANDERSON_PREFIX + parts[1] not in OPTIONS:
        return re.sub(r"(\w+)=([^\s,;.]+)", option, text)
    name, value, combined, must = parts.groups()
    for old, new in (
        ("be an integer >=", "be >="),
        (">= ", "at least "),
        ("<= ", "at most "),
        ("> ", "above "),
        ("< ", "below "),
        ("None", NONE),
    ):
        must = must.replace(old, new)
    rest = re.sub(r"(\w+)=([^\s,;.]+)", option, f"{combined or ''}, must {must}")
    return f"--{dashed(ANDERSON_PREFIX + name)} is {value.removesuffix('.0')}{rest}"


def as_typed(message: str, file: str, keys: Mapping[str, str]) -> str:
    """Names what came from a YAML file as it stands there.

    Args:
        message: Names settings as options of the command line.
        file: The YAML file.
        keys: By option, the key in it.
    """
    if re.match("|".join(rf"--{dashed(name)}\b(?!-)" for name in keys) or "(?!)", message):
        message = f"{file}: {message}"
    for name, key in keys.items():
        message = re.sub(rf"--{dashed(name)}\b(?!-)", key, message)
    return message

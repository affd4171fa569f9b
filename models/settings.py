"""Every setting of the training program: one dataclass behind the command line and YAML files."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from aadl_hvd import AndersonConfig
from models import networks
from models.data import AUGMENTATIONS, LOADERS, SHUFFLES
from models.errors import UserError
from models.schedule import DECAYS, WARMUPS

OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw", "rmsprop")
ANDERSON_PREFIX = "anderson_"


def _option(
    group: str,
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    least: float | None = None,
) -> Any:
    metadata = {"group": group, "help": help, "choices": choices, "least": least}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What `python -m models.train --help` explains, option by option; checks itself.

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
        "without augmentation (default: 256/224 of the image size)",
        least=1,
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
        "clip the norm of the averaged gradient to this (default: no clipping)",
        least=0,
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
        "epochs at which the rate is lowered",
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
    anderson_average_window: int | None = _option(
        "Anderson acceleration",
        None,
        "t: iterates in the moving average",
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
        "running averages of the weights, for validation: decay factors and window lengths; none "
        "after the option for none",
    )
    anderson_noise_gate: float | None = _option(
        "Anderson acceleration",
        None,
        "how many times its noise a residual must be; 0 opens the gate",
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
    )
    anderson_history_device: str | None = _option(
        "Anderson acceleration",
        None,
        "cpu: keep the history in the host's memory, slow",
        ("cpu",),
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
        "measure the batch-norm statistics anew before a validation; auto: when weights were "
        "accelerated or averaged since the last one",
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
    )
    checkpoint_every: int = _option(
        "output",
        1,
        "epochs between two checkpoints; the last epoch always makes one, and so does a signal to"
        " stop (exit code 75); 0 for none at all",
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
        "bar; lines: a line every few seconds; auto: a bar on a terminal, else lines",
        ("auto", "bar", "lines", "off"),
    )

    def __post_init__(self) -> None:
        """Checks ranges and combinations."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            choices, least = field.metadata["choices"], field.metadata["least"]
            if value is None:
                continue
            if choices and value not in choices:
                raise UserError(
                    f"--{_dashed(field.name)} is {value!r}, must be one of {', '.join(choices)}"
                )
            if least is not None and not value >= least:
                raise UserError(f"--{_dashed(field.name)} is {value}, must be at least {least:g}")
        if not self.data:
            raise UserError("--data is missing: the folder that holds train/ and val/")
        if self.channels not in (1, 3):
            raise UserError(f"--channels is {self.channels}, must be 3 or 1")
        if self.label_smoothing >= 1:
            raise UserError(f"--label-smoothing is {self.label_smoothing}, must be below 1")
        if self.resize is not None and self.resize < self.image_size:
            raise UserError(
                f"--resize is {self.resize}, must be at least the image size, {self.image_size}"
            )
        if self.loader == "dali" and self.workers < 1:
            raise UserError("--workers is 0, must be at least 1 with DALI")
        if self.optimizer == "nesterov" and not self.momentum:
            raise UserError("--momentum is 0, must be positive with --optimizer nesterov")
        if self.anderson == "off" and (given := self._overrides()):
            options = ", ".join(f"--{_dashed(ANDERSON_PREFIX + name)}" for name in given)
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
        except ValueError as error:
            raise UserError(f"--anderson-...: {error}") from error

    def _overrides(self) -> dict[str, Any]:
        return {
            field.name.removeprefix(ANDERSON_PREFIX): getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name.startswith(ANDERSON_PREFIX) and getattr(self, field.name) is not None
        }


def parse(arguments: Sequence[str]) -> Settings:
    """Reads the command line, and the YAML file it names.

    Args:
        arguments: The command line without the program's name. ``--config FILE`` names a YAML
            file whose keys are the names of the options; what the command line says wins.

    Returns:
        The settings.

    Raises:
        UserError: An option, key or value is wrong, or the file cannot be read.
        SystemExit: After ``--help``.
    """
    parser = _build_parser()
    config = parser.parse_known_args(arguments)[0].config
    from_file = [] if config is None else _options_of_file(Path(config))
    known = vars(parser.parse_args([*from_file, *arguments]))
    known.pop("config")
    if "milestones" in known:
        known["milestones"] = tuple(known["milestones"])
    if known.get("anderson_averages") is not None:
        # Window lengths are whole numbers of steps; a command line has no such distinction.
        values = known["anderson_averages"]
        known["anderson_averages"] = tuple(int(x) if x.is_integer() else x for x in values)
    return Settings(**known)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raises instead of exiting, so that all ranks can end together."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            option = message.removeprefix(prefix).split()[0].split("=")[0]
            message = f"unknown option {option}" + _suggestion(
                option, [name for action in self._actions for name in action.option_strings]
            )
        raise UserError(message + " (see --help)")


def _build_parser() -> _Parser:
    parser = _Parser(
        prog="python -m models.train",
        description="Trains a residual network on an ImageNet-style folder of images, on one rank "
        "or, under horovodrun, mpirun, srun or jsrun, on many.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=None,
        help="YAML file with settings; its keys are the names of the options below; what the "
        "command line says wins",
    )
    hints = typing.get_type_hints(Settings)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        meta = field.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        text = meta["help"]
        if field.default not in (None, ""):
            shown = field.default
            if isinstance(shown, bool):
                shown = "yes" if shown else "no"
            elif isinstance(shown, tuple):
                shown = " ".join(f"{value:g}" for value in shown)
            text += f" (default: {shown})"
        kind = hints[field.name]
        if typing.get_origin(kind) is types.UnionType:
            kind = next(part for part in typing.get_args(kind) if part is not type(None))
        keywords: dict[str, Any] = {"help": text}
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            keywords |= {"nargs": "*", "type": float, "metavar": "X"}
        else:
            keywords |= {"type": kind, "choices": meta["choices"]}
            if not meta["choices"]:
                keywords["metavar"] = {int: "N", float: "X", str: "PATH"}[kind]
        group.add_argument(f"--{_dashed(field.name)}", **keywords)
    return parser


def _options_of_file(path: Path) -> list[str]:
    """Turns a YAML file into the options it stands for, so that both are checked alike."""
    try:
        # BaseLoader leaves all values as they are written: YAML takes `off` for false.
        content = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if content in (None, ""):
        return []
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold `option: value` lines")
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    options = []
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in fields:
            known = [_dashed(field) for field in fields]
            raise UserError(f"{path}: unknown setting {key!r}" + _suggestion(key, known))
        option = f"--{_dashed(name)}"
        if isinstance(value, list):
            options += [option, *value]
        elif isinstance(value, dict):
            raise UserError(f"{path}: {key} must be a single value")
        elif isinstance(fields[name].default, bool):
            if value.lower() not in ("true", "yes", "on", "false", "no", "off"):
                raise UserError(f"{path}: {key} is {value!r}, must be true or false")
            yes = value.lower() in ("true", "yes", "on")
            options.append(option if yes else option.replace("--", "--no-", 1))
        elif value.lower() not in ("", "null", "~"):
            options.append(f"{option}={value}")
    return options


def _suggestion(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.replace("_", "-"), known, n=1)
    return f": did you mean {close[0]!r}?" if close else ""


def _dashed(name: str) -> str:
    return name.replace("_", "-")

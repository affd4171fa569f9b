"""Command line and YAML file: precedence, types, and errors that help."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from aadl_hvd import AndersonConfig
from models.anderson_options import anderson_options, by_option
from models.command_line import parse, to_yaml
from models.errors import UserError
from models.settings import OPTIONS, OWN_OPTIONS, Settings


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def test_command_line_wins_over_file_wins_over_default(config):
    file = config("data: /images\nlr: 0.3\nepochs: 7\nmilestones: [2, 4.5]\nclip-norm: 1\n")
    settings = parse([*file, "--lr=0.7"])
    assert (settings.lr, settings.epochs) == (0.7, 7)
    assert settings.batch_size == Settings(data="x").batch_size
    assert settings.milestones == (2.0, 4.5) and settings.clip_norm == 1.0
    assert parse([*file, "--milestones"]).milestones == ()
    assert parse(["--lr=0.7", *file]).lr == 0.7, "wherever --config stands"


def test_yaml_words_mean_what_they_say(config):
    """YAML reads a bare `off` as false and `1e-3` as a string."""
    file = config(
        "data: d\nanderson: off\namp: off\nlr: 1e-3\ncheck_images: no\n"
        "tensorboard: true\nresume: null\n"
    )
    settings = parse(file)
    assert (settings.anderson, settings.amp, settings.lr) == ("off", "off", 1e-3)
    assert (settings.check_images, settings.tensorboard, settings.resume) == (False, True, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: d\nbatchsize: 3\n", "unknown setting 'batchsize': did you mean 'batch-size'"),
        ("data: d\nlr: fast\n", "yaml: lr is 'fast', must be a number"),
        ("data: d\nepochs: 1.5\n", "yaml: epochs is '1.5', must be a whole number"),
        ("data: d\nepochs: [1, 2]\n", "yaml: epochs is a list, must be a single value"),
        ("data: d\namp: fp8\n", "yaml: amp is 'fp8', must be one of off, bf16, fp16"),
        ("data: d\nbatch_size: 0\n", "yaml: batch_size is 0, must be at least 1"),
        ("data: d\nbatch_size: 4\nbatch-size: 4\n", "batch_size and batch-size are the same"),
        ("data: d\nlr: null\n", "yaml: lr is null, which it does not take: leave it out"),
        (
            "data: d\nanderson_warmup_steps: -1\n",
            "yaml: anderson_warmup_steps is -1, must be at least 0",
        ),
        ("data: d\nanderson_refine: 1\n", "unknown setting 'anderson_refine', .* Leave it out"),
        ("data: d\nmomentum: 0\n", "yaml: momentum is 0, must be positive with --optimizer"),
        (
            "data: d\nanderson: off\nanderson-mixing: 1\n",
            "yaml: anderson-mixing given with anderson off",
        ),
        ("data: d\ncheck-images: maybe\n", "yaml: check-images is 'maybe', must be yes or no"),
        ("- data\n", "must hold `option: value` lines"),
        ("data: [unclosed\n", "is no YAML"),
        ("data: d\nlr: 1\nlr: 2\n", "the key 'lr' is there more than once"),
        ("data: {a: 1}\n", "data must be a single value"),
    ],
)
def test_bad_file(config, text, message):
    with pytest.raises(UserError, match=message):
        parse(config(text))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data is missing"),
        (["--data=d", "--batchsize=3"], "unknown option --batchsize: did you mean '--batch-size'"),
        (["--data=d", "--batch-size=0"], "--batch-size is 0, must be at least 1"),
        (["--data=d", "--lr=nan"], "--lr is nan"),
        (["--data=d", "--label-smoothing=1"], "must be below 1"),
        (["--data=d", "--image-size=32", "--resize=16"], "at least the image size"),
        (["--data=d", "--momentum=0"], "must be positive with --optimizer nesterov"),
        (["--data=d", "--channels=2"], "must be 3 or 1"),
        (["--data=d", "--anderson=off", "--anderson-mixing=1"], "--anderson-mixing given with"),
        (["--data=d", "--anderson-mixing=1", "--anderson=off"], "--anderson-mixing given with"),
        (["--data=d", "--resume=auto", "--overwrite"], "--resume and --overwrite exclude"),
        (["--data=d", "--lr=inf"], "--lr is inf, must be finite"),
        (["--data=d", "--lr=-1"], "--lr is -1, must be at least 0"),
        (["--data=d", "--lr=fast"], "--lr is 'fast', must be a number"),
        (["--data=d", "--clip-norm=x"], "--clip-norm is 'x', must be a number or none"),
        (["--data=d", "--clip-norm=0"], "--clip-norm is 0, must be above 0, or none"),
        (["--data=d", f"--seed={10**20}"], f"--seed is {10**20}, must be at most 2147483646"),
        (["--data=d", "--tensorboard", "maybe"], "--tensorboard is 'maybe', must be yes or no"),
        (["--data=d", "no"], "'no' is not an option, nor the value of one"),
        (["--data=d", "--anderson-safeguard=loss"], "must be one of none, residual, descent$"),
        (["--config=/nowhere.yaml"], "cannot read /nowhere.yaml: No such file"),
    ],
)
def test_bad_command_line(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(arguments)


def test_the_papers_settings_are_shipped():
    file = Path(__file__).parents[2] / "models" / "configs" / "resnet50_1536.yaml"
    settings = parse(["--config", str(file), "--data=d"])
    assert settings.batch_size * 1536 == 49_152
    assert (settings.optimizer, settings.momentum, settings.epochs) == ("nesterov", 0.9, 90)
    assert (settings.warmup_lr, settings.warmup_epochs, settings.lr) == (0.05, 5, 1.96)
    assert (settings.milestones, settings.decay_factor) == ((30, 60, 80), 0.1)
    assert settings.anderson_config() == AndersonConfig.paper("resnet50")


def test_anderson_by_one_word_and_one_by_one():
    assert parse(["--data=d", "--anderson=off"]).anderson_config() is None
    assert parse(["--data=d"]).anderson_config() == AndersonConfig()
    paper = AndersonConfig.paper("resnet50")
    assert parse(["--data=d", "--anderson=paper"]).anderson_config() == paper
    changed = parse(["--data=d", "--anderson=paper", "--anderson-history-depth=7"])
    assert changed.anderson_config() == dataclasses.replace(paper, history_depth=7)


def test_every_field_of_the_config_is_an_option_and_every_option_a_field():
    # Whether there is any acceleration is what --anderson says.
    fields = {field.name for field in dataclasses.fields(AndersonConfig)} - {"enabled"}
    assert {name for name in OPTIONS if name not in OWN_OPTIONS} == {
        f"anderson_{name}" for name in fields
    }
    assert not any(name.startswith("anderson_") for name in OWN_OPTIONS)


def test_a_new_field_of_the_config_becomes_an_option():
    """With its type, its words, its default and its help, and nothing typed a second time."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(AndersonConfig):
        __doc__ = AndersonConfig.__doc__.replace(
            "    Args:\n",
            '    Args:\n        spin: how to turn. "left": `mixing=1` only. None for\n'
            "            no turn.\n        count: of turns.\n",
        )
        spin: Literal["left", "right"] | None = "left"
        count: int = 3

    added = anderson_options(Config)
    spin, count = added["anderson_spin"], added["anderson_count"]
    assert added.keys() - OPTIONS.keys() == {"anderson_spin", "anderson_count"}
    assert (spin.kind, spin.choices, spin.takes_none) == (str, ("left", "right"), True)
    assert spin.help == (
        "how to turn. left: --anderson-mixing 1 only. none for no turn (default: left)"
    )
    assert (count.kind, count.choices, count.takes_none) == (int, (), False)
    assert count.help == "of turns (default: 3)"


def test_options_have_the_words_types_and_defaults_of_the_fields():
    depth, gate, dtype = (
        OPTIONS[f"anderson_{name}"] for name in ("history_depth", "noise_gate", "history_dtype")
    )
    assert depth.kind is int and not depth.takes_none
    assert depth.help.startswith("m, the number of columns of W and R")
    assert depth.help.endswith("(default: 15; with --anderson paper: 20)")
    assert gate.kind is float and gate.takes_none
    assert dtype.choices == ("float64", "float32", "bfloat16") and dtype.takes_none
    assert OPTIONS["anderson_averages"].help.endswith(
        "(default: 0.95 0.99 0.997; with --anderson paper: none)"
    )
    assert "closure" not in OPTIONS["anderson_safeguard"].help, "the program has none"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--anderson-refine=1", "Leave it out"),
        ("--anderson-damping=1", "It is called mixing now"),
        ("--anderson-momentum=reset", "Leave it out: the base optimizer's momentum"),
        ("--anderson-history-device=cpu", "--anderson-history-dtype bfloat16"),
        ("--anderson-residual=state", "must be one of step, gradient"),
        ("--anderson-history-dtype=float16", "must be one of float64, float32, bfloat16, none"),
        ("--anderson-averages=8", "--anderson-averages is 8, must be decay factors, above 0 and"),
    ],
)
def test_a_dropped_option_says_what_to_use(option, message):
    with pytest.raises(UserError) as caught:
        parse(["--data=d", option])
    assert option.split("=")[0] in str(caught.value)
    assert message in str(caught.value)


def test_a_truth_value_with_a_word_as_in_yaml():
    assert parse(["--data=d"]).tensorboard
    for words in (["--tensorboard", "no"], ["--tensorboard=no"], ["--no-tensorboard"]):
        assert not parse(["--data=d", *words]).tensorboard
    for words in (["--overwrite"], ["--overwrite", "yes"]):
        assert parse(["--data=d", *words]).overwrite


def test_a_key_that_contradicts_an_option_is_named_with_its_file(config):
    file = config("data: d\noverwrite: yes\n")
    with pytest.raises(UserError) as caught:
        parse([*file, "--resume=auto"])
    assert str(caught.value) == (
        f"--resume and overwrite (in {file[1]}) exclude each other: leave one of them out"
    )


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for option in OPTIONS.values():
        assert f"--{option.name.replace('_', '-')}" in text
        assert len(option.help) > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["history-depth=0"], "history-depth is 0, must be at least 1"),
        (["frequency=0"], "frequency is 0, must be at least 1"),
        (
            ["average-window=1"],
            "average-window is 1, must be at least 2, or none, for no moving av",
        ),
        (["relaxation=2"], "relaxation is 2, must be a finite number above 0 and at most 1"),
        (["noise-gate=-1"], "noise-gate is -1, must be a finite number at least 0, or none"),
        (["averages=1.5"], "averages is 1.5, must be different decay factors, above 0 and below 1"),
        (
            ["layout=columns", "shard-group=node"],
            "shard-group is 'node' with --anderson-layout columns, whose updates",
        ),
    ],
)
def test_what_the_library_refuses_is_named_as_it_was_typed(arguments, message):
    with pytest.raises(UserError) as caught:
        parse(["--data=d", *(f"--anderson-{argument}" for argument in arguments)])
    assert str(caught.value).startswith(f"--anderson-{message}")
    assert "Invalid" not in str(caught.value) and "Must" not in str(caught.value)


def test_other_errors_of_the_library_name_options_too():
    error = MemoryError("Lower history_depth=15, or choose averages=() or average_window=None.")
    assert by_option(error) == (
        "Lower --anderson-history-depth 15, or choose --anderson-averages none or "
        "--anderson-average-window none."
    )
    assert by_option(ValueError("Invalid lr=3. Must be small.")) == "Invalid lr=3. Must be small."


@pytest.mark.parametrize("none", ["none", "null", "~", ""])
def test_none_is_taken_where_it_means_something(config, none):
    names = [name for name, option in OPTIONS.items() if option.takes_none]
    assert {"clip_norm", "resize", "resume", "anderson_noise_gate", "milestones"} <= set(names)
    text = "".join(f"{name}: {none}\n" for name in names)
    settings = parse(config(f"data: d\nanderson: paper\n{text}"))
    acceleration = settings.anderson_config()
    assert (settings.clip_norm, settings.resize, settings.resume) == (None, None, None)
    assert (acceleration.noise_gate, acceleration.average_window) == (None, None)
    assert (settings.milestones, acceleration.averages) == ((), ())
    if none == "none":
        words = [f"--{name.replace('_', '-')}=none" for name in names]
        assert parse(["--data=d", "--anderson=paper", *words]) == settings
        assert parse([*config("data: d\nclip-norm: 3\n"), "--clip-norm=none"]).clip_norm is None


def test_none_opens_the_gate_and_is_not_the_default():
    assert AndersonConfig().noise_gate is not None
    assert parse(["--data=d", "--anderson-noise-gate=none"]).anderson_config().noise_gate is None
    assert parse(["--data=d", "--anderson-safeguard=none"]).anderson_config().safeguard == "none"
    with pytest.raises(UserError, match="--anderson-history-depth is 'none', must be a whole"):
        parse(["--data=d", "--anderson-history-depth=none"])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--anderson=off", "--amp=bf16", "--no-tensorboard", "--milestones", "--resize=300"],
        ["--anderson=paper", "--anderson-noise-gate=3", "--anderson-average-window=none"],
        ["--anderson-averages=none", "--anderson-history-dtype=bfloat16", "--clip-norm=1e-5"],
    ],
)
def test_settings_come_back_from_yaml(config, arguments):
    settings = parse(["--data=/a: 'b' #\u00e9", *arguments])
    again = parse(config(to_yaml(settings)))
    assert again.anderson_config() == settings.anderson_config()
    plain = {name: getattr(settings, name) for name in OWN_OPTIONS}
    assert {name: getattr(again, name) for name in plain} == plain
    assert to_yaml(again) == to_yaml(settings)
    assert "overwrite" not in to_yaml(settings) and "resume" not in to_yaml(settings)


def test_what_differs_from_the_defaults():
    assert parse(["--data=d", "--lr=0.1"]).changed() == {"data": ("d", "")}
    changed = parse(["--data=d", "--lr=3", "--anderson-noise-gate=none"]).changed()
    assert changed["lr"] == (3.0, 0.1) and changed["anderson_noise_gate"] == (None, 10.0)

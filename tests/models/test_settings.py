"""Command line and YAML file: precedence, types, and errors that help."""

import dataclasses
from pathlib import Path

import pytest

from aadl_hvd import AndersonConfig
from models.errors import UserError
from models.settings import Settings, parse


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
        ("data: d\nlr: fast\n", "--lr: invalid float value: 'fast'"),
        ("data: d\nepochs: 1.5\n", "--epochs: invalid int value: '1.5'"),
        ("data: d\namp: fp8\n", "--amp: invalid choice: 'fp8'"),
        ("data: d\ncheck-images: maybe\n", "check-images is 'maybe', must be true or false"),
        ("- data\n", "must hold `option: value` lines"),
        ("data: [unclosed\n", "is no YAML"),
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
        (["--data=d", "--anderson=off", "--anderson-refine=1"], "--anderson-refine given with"),
        (["--data=d", "--anderson-relaxation=2"], "relaxation=2"),
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


def test_every_setting_of_anderson_has_its_option():
    options = {f.name for f in dataclasses.fields(Settings)}
    wanted = {f"anderson_{f.name}" for f in dataclasses.fields(AndersonConfig)}
    assert wanted - {"anderson_enabled"} <= options  # --anderson off is Horovod's own optimizer


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Settings):
        assert f"--{field.name.replace('_', '-')}" in text
        assert len(field.metadata["help"]) > 10

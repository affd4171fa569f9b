"""AndersonConfig: what it refuses and how it says so; the paper's settings."""

import copy
import dataclasses
import functools
import inspect
import math
import pickle
import re

import numpy as np
import pytest
import torch

from aadl_hvd import AndersonConfig, AndersonError, ConfigError

INTEGERS = {
    "history_depth": 1,
    "frequency": 1,
    "store_every": 1,
    "warmup_steps": 0,
    "average_window": 2,
}
BAD = [
    *((name, bad) for name, low in INTEGERS.items() for bad in (low - 1, -3, 2.5, 3.0, "4", True)),
    *((name, None) for name in INTEGERS if name != "average_window"),
    *(("history_depth", bad) for bad in (1001, 30_000, 10**30)),
    *(("enabled", bad) for bad in (0, 1, None, "False")),
    *((name, bad) for name in ("overlap", "cuda_graphs") for bad in (0, 1, None, "True")),
    *(("relaxation", bad) for bad in (0, 0.0, -0.1, 1.0001, math.nan, math.inf, "1", None, True)),
    *(("mixing", bad) for bad in (-1e-9, 10.0001, math.nan, math.inf, "1", None, False)),
    *(("noise_gate", bad) for bad in (-1e-9, math.nan, math.inf, "10", True, 1j)),
    *(("regularization", bad) for bad in (-1e-12, math.nan, math.inf, "0", None, 1j)),
    *(("average_threshold", bad) for bad in (0, -0.1, math.nan, math.inf, "0.1", None)),
    *(("method", bad) for bad in ("residuals", None, 1)),
    *(("safeguard", bad) for bad in ("Descent", "", None, 1, True)),
    *(("residual", bad) for bad in ("gradients", None, 0)),
    *(("averages", bad) for bad in (0.9, None, (1.0,), (0.0,), (-0.5,), (1,), (0.9, 0.9), ("5",))),
    *(("averages", bad) for bad in ((math.nan,), (math.inf,), (True,), (0.9, None))),
    *(("layout", bad) for bad in ("row", None, 2)),
    *(("shard_group", bad) for bad in ("nodes", None, 2, [0, 1])),
    *(("on_desync", bad) for bad in ("ignore", None, True)),
    *(("history_dtype", bad) for bad in ("float8", torch.int32, torch.complex64, 32, "", [])),
]
ALLOWED = {
    "method": "('auto', 'residual', 'subspace')",
    **{name: f">= {low}" for name, low in INTEGERS.items()},
    "history_depth": ">= 1 and <= 1000",
    "enabled": "True or False",
    "overlap": "True or False",
    "cuda_graphs": "True or False",
    "relaxation": "> 0 and <= 1",
    "mixing": ">= 0 and <= 10",
    "noise_gate": ">= 0, or None, for no gate",
    "regularization": ">= 0",
    "average_threshold": "> 0",
    "safeguard": "'none', 'residual', 'loss', 'descent'",
    "residual": "'step', 'gradient'",
    "averages": "decay factors, > 0 and < 1",
    "layout": "'rows', 'columns'",
    "on_desync": "'error', 'resync'",
    "shard_group": "'world', 'node'",
    "history_dtype": "float64, float32, bfloat16 (as",
}


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda x: repr(x))
def test_bad_value_is_named(name, value):
    with pytest.raises(ConfigError) as caught:
        AndersonConfig(**{name: value})
    message = str(caught.value)
    assert f"Invalid {name}={value!r}" in message
    assert ALLOWED[name] in message
    assert isinstance(caught.value, (ValueError, AndersonError))


def test_every_field_has_bad_values():
    assert {f.name for f in dataclasses.fields(AndersonConfig)} == {name for name, _ in BAD}


@pytest.mark.parametrize(
    "good",
    [
        INTEGERS,
        {"enabled": False, "history_depth": 1000},
        {"relaxation": 1.0, "mixing": 0.0, "regularization": 0.0, "average_threshold": 1e-9},
        {"relaxation": 1e-9, "mixing": 10.0, "regularization": 3.5, "average_threshold": 7},
        {"average_window": None, "history_dtype": None, "noise_gate": None},
        {"noise_gate": 0.0, "averages": (1e-9, 0.5, 0.999)},
    ],
)
def test_ends_of_ranges_are_allowed(good):
    config = AndersonConfig(**good)
    for name, value in good.items():
        assert getattr(config, name) == value


def test_a_typing_mistake_gets_a_hint():
    with pytest.raises(ConfigError, match="Did you mean 'descent'"):
        AndersonConfig(safeguard="decent")


@pytest.mark.parametrize("name", ["history_dtype", "layout", "shard_group"])
def test_arrays_are_no_choice(name):
    """They answer a comparison with many answers."""
    with pytest.raises(ConfigError, match=f"Invalid {name}="):
        AndersonConfig(**{name: np.array([1, 2])})


# What earlier versions took, and what their users need to read.
DROPPED = [
    ("damping", 1.0, "called mixing now"),
    ("refine", 1, "regularization=1e-10"),
    ("refine", 0, "Leave it out"),
    ("momentum", "reset", "the base optimizer's momentum is always kept"),
    ("momentum", "keep", "Leave it out"),
    ("history_device", "cpu", "history_dtype='bfloat16'"),
    ("history_device", None, "Leave it out"),
    ("residual", "state", "Must be 'gradient', which is right for optimizers with momentum"),
    ("history_dtype", "float16", "Must be 'bfloat16', which takes as much memory"),
    ("history_dtype", torch.float16, "Must be 'bfloat16', which takes as much memory"),
    ("averages", (0.9, 8), "8 was the length of a window: 0.7778 weights"),
    ("averages", (2,), "2 was the length of a window: 0.3333 weights"),
    ("averages", [7.0], "7 was the length of a window: 0.75 weights"),
]


@pytest.mark.parametrize(("name", "value", "advice"), DROPPED, ids=lambda x: repr(x))
def test_a_dropped_option_says_what_to_use(name, value, advice):
    for construct in (AndersonConfig, functools.partial(dataclasses.replace, AndersonConfig())):
        with pytest.raises(ConfigError) as caught:
            construct(**{name: value})
        assert f"Invalid {name}={value!r}" in str(caught.value)
        assert advice in str(caught.value)


def test_the_decay_factor_advised_for_a_window_has_its_mean_age():
    """The mean over L steps is (L - 1) / 2 steps old, an exponential average d / (1 - d)."""
    for length in (2, 8, 100):
        with pytest.raises(ConfigError) as caught:
            AndersonConfig(averages=(length,))
        decay = float(re.search(r"window: ([\d.]+) weights", str(caught.value))[1])
        assert decay / (1 - decay) == pytest.approx((length - 1) / 2, rel=0.01)
        AndersonConfig(averages=(decay,))


def test_dropped_names_are_no_part_of_the_signature():
    """`help` and an IDE show the fields alone, with their types and defaults."""
    signature = inspect.signature(AndersonConfig)
    assert list(signature.parameters) == [f.name for f in dataclasses.fields(AndersonConfig)]
    assert signature.parameters["mixing"].default == 3.0
    with pytest.raises(TypeError, match="unexpected keyword argument 'frequenzy'"):
        AndersonConfig(frequenzy=1)


def test_pickle_and_copy():
    config = AndersonConfig(frequency=3, averages=(0.5,), history_dtype="bfloat16")
    for again in (pickle.loads(pickle.dumps(config)), copy.copy(config), copy.deepcopy(config)):
        assert again == config and again is not config


def test_frozen_and_keyword_only():
    with pytest.raises(TypeError):
        AndersonConfig(5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        AndersonConfig().frequency = 2
    with pytest.raises(ConfigError, match="frequency=0"):
        dataclasses.replace(AndersonConfig(), frequency=0)
    assert hash(AndersonConfig()) == hash(AndersonConfig())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_history_dtype_as_name_or_dtype(dtype):
    name = str(dtype).removeprefix("torch.")
    assert AndersonConfig(history_dtype=name) == AndersonConfig(history_dtype=dtype)
    assert AndersonConfig(history_dtype=name).history_dtype is dtype


@pytest.mark.parametrize(
    "config",
    [
        AndersonConfig(),
        AndersonConfig(history_dtype=torch.bfloat16, average_window=3, layout="columns"),
        AndersonConfig(noise_gate=None, mixing=1.0, averages=(0.5, 0.7)),
        AndersonConfig.paper("resnet50"),
    ],
)
def test_to_dict_and_back(config):
    import json

    plain = json.loads(json.dumps(config.to_dict()))
    assert AndersonConfig(**plain) == config


# Section "Numerical results" of arXiv 2110.14813: m, p, q, beta of each problem, epsilon of all.
PAPER = {
    "admissions": (10, 1, 1, 0.1),
    "burgers2d": (5, 10, 5, 1.0),
    "burgers100d": (20, 1, 1, 1.0),
    "resnet50": (20, 5, 5, 0.5),
}


@pytest.mark.parametrize("name", PAPER)
def test_paper_s_settings(name):
    config = AndersonConfig.paper(name)
    m, p, q, beta = PAPER[name]
    assert (config.history_depth, config.frequency, config.store_every) == (m, p, q)
    assert config.relaxation == beta
    assert config.average_threshold == 0.1
    assert config.mixing == 1.0  # Eq. 4
    assert config.noise_gate is None  # the paper knows none
    assert config.regularization == 0.0
    assert (config.safeguard, config.residual) == ("residual", "step")  # Algorithm 1, Eq. 1
    assert config.average_window >= 2
    if p > 2:
        assert config.average_window < p  # "we pick t < p"
    plain = AndersonConfig.paper(name, average=False)
    assert plain == dataclasses.replace(config, average_window=None)


def test_unknown_paper_problem_names_those_there_are():
    with pytest.raises(ConfigError) as caught:
        AndersonConfig.paper("imagenet")
    assert all(name in str(caught.value) for name in ("'imagenet'", *PAPER))


def test_the_default_is_the_robust_one():
    config = AndersonConfig()
    assert (config.safeguard, config.residual, config.layout) == ("descent", "gradient", "rows")
    assert config.average_window is None


class ProcessSet:
    ranks = (0, 1)

    def included(self):
        return True


def test_shard_groups_go_with_rows_only():
    for group in ("node", ProcessSet()):
        assert AndersonConfig(shard_group=group).shard_group is group
        with pytest.raises(ConfigError, match=r"shard_group=.*layout='columns'"):
            AndersonConfig(shard_group=group, layout="columns")


def test_process_set_is_plain_in_a_dictionary():
    """It differs from rank to rank, and belongs into no checkpoint."""
    assert AndersonConfig(shard_group=ProcessSet()).to_dict()["shard_group"] == "process set"
    assert AndersonConfig(shard_group="node").to_dict()["shard_group"] == "node"


def test_numpy_numbers_become_plain_ones():
    import numpy as np

    config = AndersonConfig(
        history_depth=np.int64(5),
        mixing=np.float32(0.5),
        noise_gate=np.float64(2.0),
        averages=(np.float64(0.5), np.float32(0.25)),
    )
    assert config == AndersonConfig(history_depth=5, mixing=0.5, noise_gate=2, averages=(0.5, 0.25))
    kinds = [type(config.history_depth), type(config.mixing), type(config.noise_gate)]
    assert [*kinds, *map(type, config.averages)] == [int, float, float, float, float]

"""What `checkpoint.save` takes, `checkpoint.load` reads back; the rest is refused by name."""

import argparse
import collections
import dataclasses
import datetime
import enum
import fractions
import math
import os
import pathlib
import random
import re
import types
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aadl_hvd import AndersonConfig, AndersonOptimizer, CheckpointError, checkpoint
from aadl_hvd.checkpoint import plain
from aadl_hvd.checkpoint.shard_state import ShardState
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core.accelerator import Accelerator

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(TypedStorage|sparse tensor invariants|quantized):UserWarning"  # torch's own
)


class Kind(enum.IntEnum):
    ONE = 1


class Name(enum.StrEnum):
    A = "a"


class Colour(enum.Enum):
    RED = "red"


class Meters(float):
    """A number with an attribute."""


class Tagged(torch.Tensor):
    """A tensor with methods of its own."""


@dataclasses.dataclass
class Settings:
    """Two settings."""

    depth: int = 3


Point = collections.namedtuple("Point", "x y")

CPU = torch.device("cpu")
PARAMETER = torch.nn.Parameter(torch.ones(2, 3))
TAGGED = torch.ones(2)
TAGGED.note = [np.float32(0.5)]
with warnings.catch_warnings():  # torch warns that these may change
    warnings.simplefilter("ignore")
    SPARSE = [torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()]
    NESTED = torch.nested.nested_tensor([torch.ones(1)])
    QUANTIZED = []
    if hasattr(torch, "quantize_per_tensor"):
        QUANTIZED.append(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
LONGEST = 2**2039 - 1
LONG_DOUBLE = np.longdouble(1) / 3
FREED = torch.ones(4)
FREED.untyped_storage().resize_(0)


def read_back(state, folder):
    checkpoint.save(folder / "state.pt", state)
    return checkpoint.load(folder / "state.pt")


def assert_equal(found, given):
    """Of the plain type that is documented, and with the same content."""
    if isinstance(given, torch.Tensor):
        expected = type(given) if type(given) is torch.nn.Parameter else torch.Tensor
        assert type(found) is expected and found.dtype == given.dtype
        assert found.layout == given.layout and found.requires_grad == given.requires_grad
        given = given.detach().as_subclass(torch.Tensor) if type(given) is Tagged else given
        torch.testing.assert_close(found, given, rtol=0, atol=0, equal_nan=True)
    elif isinstance(given, np.ndarray):
        assert type(found) is torch.Tensor
        assert found.numpy().dtype == given.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found.numpy(), given, strict=given.dtype.isnative)
    elif isinstance(given, dict):
        assert type(found) is (type(given) if type(given) in KEPT else dict)
        assert len(found) == len(given)
        for (key, item), (given_key, given_item) in zip(found.items(), given.items(), strict=True):
            assert_equal(key, given_key)
            assert_equal(item, given_item)
    elif isinstance(given, list | tuple):
        base = list if isinstance(given, list) else tuple
        assert type(found) is (torch.Size if type(given) is torch.Size else base)
        assert len(found) == len(given)
        for pair in zip(found, given, strict=True):
            assert_equal(*pair)
    elif isinstance(given, set | frozenset):
        assert type(found) is set and len(found) == len(given)
        plains = {os.fspath(x) if isinstance(x, pathlib.PurePath) else x for x in given}
        assert found == plains or any(x != x for x in given)
        assert {type(x) for x in found} <= PLAIN
    else:
        given = os.fspath(given) if isinstance(given, pathlib.PurePath) else given
        assert type(found) in PLAIN
        assert found == given or (found != found and given != given)
        if isinstance(given, float):
            assert math.copysign(1, found) == math.copysign(1, given)


KEPT = dict, collections.OrderedDict, collections.Counter
PLAIN = {type(None), bool, int, float, complex, str, bytes, bytearray, tuple}
PLAIN |= {torch.dtype, torch.device, torch.layout, torch.Size}

TAKEN = {
    "numbers": [True, 7, -1, LONGEST, -LONGEST, 0.5, -0.0, math.nan, math.inf, 1j, None],
    "numpy's numbers": [
        *(np.float64(0.1), np.float32(0.1), np.float16(0.1), np.float64("nan"), np.complex64(1j)),
        *(np.int64(-3), np.uint8(3), np.uint64(2**64 - 1), np.bool_(True), np.str_("a")),
    ],
    "texts": ["", "ä\n", "\udc80", b"", b"\x00\xff", bytearray(b""), bytearray(b"x")],
    "derived": [
        Kind.ONE,
        Name.A,
        Meters(0.5),
        re.RegexFlag.I,
        pathlib.Path("a/b"),
        np.bytes_(b"a"),
    ],
    "arrays": [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        *(np.arange(6)[::-1], np.arange(6).reshape(2, 3).T, np.zeros((0, 3)), np.array(0.5)),
        *(np.array([1, 2], dtype=">i4"), np.broadcast_to(np.float16(3), (2, 2)), np.zeros(2, bool)),
        *(np.array([2**64 - 1], dtype=np.uint64), np.array([1j], dtype=np.complex64)),
    ],
    "tensors": [
        *(torch.ones(2), torch.tensor(3), torch.zeros(0, 2), torch.ones(1).expand(4)),
        *(torch.ones(3).bfloat16(), torch.ones(2, requires_grad=True), torch.arange(4)[::2]),
        *(*SPARSE, *QUANTIZED, PARAMETER, torch.tensor([1j]).conj()),
        *(torch.ones(2).as_subclass(Tagged), torch.arange(3).to(torch.uint16)),
    ],
    "containers": [
        *([], (), {}, set(), [[1], (2,)], {1, "a"}, frozenset({1}), torch.Size([2, 3])),
        *(collections.OrderedDict(b=1, a=2), collections.Counter("aab"), Point(1, np.int64(2))),
        collections.defaultdict(list, a=[np.float32(1)]),
    ],
    "keys": {
        **{3: 1, 0.5: 2, None: 3, b"": 4, (1, "a"): 5, np.int64(9): 6, Kind.ONE: 7},
        **{pathlib.Path("a"): 8, torch.float32: 9, CPU: 10, (np.float32(2), b""): 11, True: 12},
    },
    "torch's": [torch.float32, torch.bfloat16, torch.device("cuda", 1), torch.strided],
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_has_a_plain_equal_is_read_back(name, tmp_path):
    assert_equal(read_back({"x": TAKEN[name]}, tmp_path), {"x": TAKEN[name]})
    assert_equal(torch.load(tmp_path / "state.pt", weights_only=True)["x"], TAKEN[name])


REFUSED = {  # what, its place below state['x'], and what to save instead
    "namespace": (argparse.Namespace(lr=0.1), "", "vars(x)"),
    "simple namespace": ([types.SimpleNamespace()], "[0]", "vars(x)"),
    "date": ({"when": datetime.date(2026, 1, 2)}, "['when']", "x.isoformat()"),
    "time span": (datetime.timedelta(1), "", "x.total_seconds()"),
    "numpy's time span": (np.timedelta64(5, "ns"), "", "str(x)"),
    "enum": ((1, Colour.RED), "[1]", "x.value"),
    "dataclass": (Settings(), "", "dataclasses.asdict(x)"),
    "function": ({3: {"f": lambda: 1}}, "[3]['f']", "its name"),
    "class": (Settings, "", "its name"),
    "module": (torch.nn.Linear(1, 1), "", "x.state_dict()"),
    "generator": (torch.Generator(), "", "x.get_state()"),
    "numpy's generator": (np.random.default_rng(0), "", "x.bit_generator.state"),
    "python's generator": (random.Random(0), "", "x.getstate()"),
    "deque": (collections.deque([1]), "", "list(x)"),
    "range": (range(3), "", "list(x)"),
    "mapping": (types.MappingProxyType({}), "", "dict(x)"),
    "fraction": (fractions.Fraction(1, 3), "", "str(x)"),
    "long double": (LONG_DOUBLE, "", "float(x)"),
    "array of objects": (np.array([None, 1]), "", "x.tolist()"),
    "array of texts": (np.array(["a"]), "", "x.tolist()"),
    "array of dates": (np.array(["2026-01-01"], dtype="datetime64[D]"), "", "x.tolist()"),
    "array of long doubles": (np.array([LONG_DOUBLE]), "", "x.tolist()"),
    "masked array": (np.ma.masked_array([1, 2], [0, 1]), "", "numpy.asarray(x)"),
    "number too long": (LONGEST + 1, "", "hex(x)"),
    "derived number too long": (type("Long", (int,), {})(LONGEST + 1), "", "hex(x)"),
    "tensor without numbers": (torch.ones(2, device="meta"), "", "with numbers"),
    "parameter without numbers": (torch.nn.UninitializedParameter(), "", "plain tensor"),
    "freed tensor": (FREED, "", "freed"),
    "nested tensor": (NESTED, "", "x.unbind()"),
    "opaque tensor": (torch.ones(2).to_mkldnn(), "", "x.to_dense()"),
    "key of a tensor": ({torch.ones(1): 1}, "", "a number"),
    "key of a frozenset": ({frozenset({1}): 1}, "", "a number"),
    "the same key": ({pathlib.Path("a"): 1, "a": 2}, "", "another"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_rest_is_refused_by_name_and_the_last_file_stays(name, tmp_path):
    value, place, instead = REFUSED[name]
    read_back({"last": 1}, tmp_path)
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(CheckpointError) as raised:
        checkpoint.save(tmp_path / "state.pt", {"y": 1, "x": value})
    message = str(raised.value)
    assert "\n" not in message and instead in message
    if "key" in name:
        assert message.startswith("Invalid a key of state['x'], of type ")
    else:
        entry = eval("value" + place)
        assert message.startswith(f"Invalid state['x']{place}, of type ")
        assert type(entry).__qualname__ in message
    assert (tmp_path / "state.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["state.pt"]


def test_attributes_are_not_lost(tmp_path):
    """A module's state has versions in one; a derived class may have others."""
    module = torch.nn.BatchNorm1d(3)
    found = read_back({"module": module.state_dict(), "x": TAGGED}, tmp_path)
    assert found["module"]._metadata == module.state_dict()._metadata != {}
    assert found["x"].note == [0.5] and type(found["x"].note[0]) is float
    assert type(TAGGED.note[0]) is np.float32, "what was given is not changed"
    parameter = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    parameter.tag = pathlib.Path("a")
    found = read_back({"x": parameter}, tmp_path)["x"]
    assert type(found) is torch.nn.Parameter and found.tag == "a" and not found.requires_grad
    far = Meters(2)
    far.unit = "m"
    own = type("Own", (dict,), {})(a=1)
    own.note = 1
    TAGGED.hook = print
    for value, place in ((far, ""), (own, ""), (TAGGED, ".hook")):
        with pytest.raises(CheckpointError, match=re.escape(f"state['x']{place}, of type")):
            checkpoint.save(tmp_path / "state.pt", {"x": value})
    del TAGGED.hook
    own = type("Own", (dict,), {})(a=1)
    own.__dict__ = own  # as classes do whose entries are attributes
    assert read_back({"x": own}, tmp_path) == {"x": {"a": 1}}


def test_what_is_shared_stays_shared_and_no_tensor_is_copied(tmp_path):
    weight = torch.arange(6.0)
    rows = [weight]
    state = {"a": weight, "b": weight[2:], "c": rows, "d": (rows,), "e": np.arange(3.0)}
    inner = plain.plain(state, "state")
    assert inner["a"] is weight and inner["e"].data_ptr() == state["e"].ctypes.data
    assert inner["c"] is not rows
    found = read_back(state, tmp_path)
    found["a"][3] = 7.0
    assert found["b"][1] == 7.0 and weight[3] == 3.0
    assert found["c"] is found["d"][0] and found["c"][0] is found["a"]
    many = [0]
    for _ in range(60):  # 2^60 paths
        many = [many, many]
    read_back({"x": many}, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"Invalid state\['b'\].*state\['a'\] is torch.float32"
    ):
        checkpoint.save(tmp_path / "state.pt", {"a": weight, "b": weight.view(torch.int32)})


def test_what_contains_itself_or_is_too_deep_is_refused(tmp_path):
    inner, own = [1], {"list": []}
    own["list"].append(own)
    deep = 1
    for _ in range(10_000):
        deep = [deep]
    for value, why in ((own, "contains itself"), (deep, "64 levels deep")):
        with pytest.raises(CheckpointError, match=r"Invalid state\['x'\].*" + why):
            checkpoint.save(tmp_path / "state.pt", {"ok": [inner, inner], "x": value})
    assert not os.listdir(tmp_path)


def test_what_is_no_dict_or_takes_the_name_of_the_mark(tmp_path):
    for state in ([1], {"aadl_hvd_file": 2}, {"aadl_hvd_file": torch.ones(2)}):
        with pytest.raises(CheckpointError, match="Invalid state"):
            checkpoint.save(tmp_path / "state.pt", state)
    assert read_back(types.MappingProxyType({1: 2}), tmp_path) == {1: 2}
    raw = torch.load(tmp_path / "state.pt", weights_only=True)
    assert read_back(raw, tmp_path) == {1: 2}


def test_random_states_of_numpy_can_be_set_again(tmp_path):
    legacy = np.random.RandomState(3)
    legacy.normal()
    for as_tuple in (True, False):
        found = read_back({"x": legacy.get_state(legacy=as_tuple)}, tmp_path)["x"]
        again = np.random.RandomState(4)
        again.set_state(found)
        assert again.get_state()[2:] == legacy.get_state()[2:]
        assert np.array_equal(again.normal(size=700), legacy.normal(size=700))
    for name in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"):
        make = getattr(np.random, name)
        generator, other = (np.random.Generator(make(seed)) for seed in (3, 4))
        generator.integers(9, dtype=np.uint32)  # half of 64 random bits are left over
        state = {"rank": {"numpy": generator.bit_generator.state}}
        other.bit_generator.state = read_back(state, tmp_path)["rank"]["numpy"]
        assert np.array_equal(other.integers(9, size=9, dtype=np.uint32),
                              generator.integers(9, size=9, dtype=np.uint32))  # fmt: skip
        assert np.array_equal(other.normal(size=700), generator.normal(size=700)), name


def test_where_torch_reads_no_complex_numbers(tmp_path, monkeypatch):
    """As torch 2.6."""
    monkeypatch.setattr(plain, "_is_read", lambda value: value != 1j)
    for value in (1j, np.complex64(1j)):
        with pytest.raises(CheckpointError, match=re.escape("Save [x.real, x.imag] instead")):
            checkpoint.save(tmp_path / "state.pt", {"x": value})
    assert_equal(read_back({"x": np.array([1j])}, tmp_path), {"x": np.array([1j])})


def test_a_file_that_holds_more_says_in_one_line_how_to_rescue_it(tmp_path):
    path = tmp_path / "state.pt"
    torch.save({"aadl_hvd_file": 1, "lr": np.float64(0.1)}, path)  # as save did before
    with pytest.raises(CheckpointError) as raised:
        checkpoint.load(path)
    message = str(raised.value)
    assert message.startswith(f"cannot read checkpoint {path}: it holds numpy")
    assert "\n" not in message and "\x1b" not in message
    checkpoint.save(path, torch.load(path, weights_only=False))
    assert checkpoint.load(path) == {"lr": 0.1}
    torch.save({"aadl_hvd_file": 1, "n": 2**3000}, path)
    with pytest.raises(CheckpointError, match=r"state\.pt: Unsupported operand 139"):
        checkpoint.load(path)


# Arbitrary states

WIDTHS = [np.float16, np.float32, np.float64, np.int8, np.int64, np.uint16, np.uint64, np.bool_]
TEXT = st.text(st.characters(exclude_categories=()), max_size=4)
KEYS = st.one_of(
    *(TEXT, st.integers(), st.floats(allow_nan=False), st.binary(max_size=3), st.none()),
    *(st.booleans(), st.integers(0, 9).map(np.int64), st.sampled_from([Kind.ONE, Name.A, CPU])),
    st.tuples(st.integers(), st.binary(max_size=1)),
)
ARRAYS = st.tuples(st.sampled_from(WIDTHS), st.lists(st.integers(0, 3), max_size=3)).map(
    lambda pair: np.ones(pair[1], pair[0])
)
GOOD = st.one_of(
    *(st.none(), st.booleans(), st.integers(-LONGEST, LONGEST), st.floats(), TEXT),
    *(st.complex_numbers(), st.binary(max_size=4), ARRAYS, ARRAYS.map(np.transpose)),
    *(ARRAYS.map(torch.from_numpy), ARRAYS.map(np.sum), st.floats(width=32).map(np.float32)),
    st.sampled_from([x for name in ("derived", "tensors", "torch's") for x in TAKEN[name]]),
)
BAD = st.sampled_from(  # torch itself crashes where the freed one is shown
    [value for value, place, _ in REFUSED.values() if not place and value is not FREED]
)


def nested(leaves):
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.tuples(inner, inner).map(lambda pair: Point(*pair)),
            st.dictionaries(KEYS, inner, max_size=3),
            st.dictionaries(KEYS, inner, max_size=3).map(collections.OrderedDict),
            st.dictionaries(KEYS, inner, max_size=3).map(
                lambda entries: collections.defaultdict(int, entries)
            ),
            st.sets(KEYS, max_size=3),
            st.frozensets(KEYS, max_size=3),
        ),
        max_leaves=12,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


@settings(max_examples=60, deadline=None)
@given(state=st.dictionaries(st.text(max_size=3), nested(GOOD), max_size=4))
def test_any_state_of_what_is_taken_is_read_back(folder, state):
    assert_equal(read_back(state, folder), state)


@settings(max_examples=60, deadline=None)
@given(state=st.dictionaries(st.text(max_size=3), nested(GOOD | BAD), max_size=4))
def test_any_state_is_read_back_or_refused_by_name(folder, state):
    read_back({"last": 1}, folder)
    try:
        checkpoint.save(folder / "state.pt", state)
    except CheckpointError as error:
        found = re.match(r"Invalid (a key of )?(state\[.*\]), of type ([\w.]+): ", str(error))
        assert found is not None, error
        if not found[1]:
            names = {"state": state, "Kind": Kind, "Name": Name, "np": np, "inf": math.inf}
            entry = eval(
                re.sub(r"<[^>]*: ([^>]*)>", r"\1", found[2]), names, {"device": torch.device}
            )
            assert type(entry).__qualname__ == found[3].rpartition(".")[2]
        assert checkpoint.load(folder / "state.pt") == {"last": 1}
    else:
        assert_equal(checkpoint.load(folder / "state.pt"), state)


# What optimizers and schedulers put into a state


def scheduled(schedule):
    """An accelerated optimizer after three steps, and its schedule."""
    p = torch.nn.Parameter(torch.ones(3))
    opt = AndersonOptimizer(torch.optim.SGD([p], lr=0.1, momentum=0.9))
    scheduler = schedule(opt)
    for _ in range(3):
        opt.zero_grad()
        p.square().sum().backward()
        opt.step()
        scheduler.step(*([1.0] if "Plateau" in type(scheduler).__name__ else []))
    return opt, scheduler


def test_rates_of_numpys_are_read_back(tmp_path):
    """`numpy_lr_min.py`: the run's only checkpoint could not be read."""
    for rate in (lambda k: np.exp(-0.1 * k), lambda k: np.float32(0.9) ** k, lambda k: np.int64(1)):
        opt, _ = scheduled(lambda opt, rate=rate: torch.optim.lr_scheduler.LambdaLR(opt, rate))
        assert isinstance(opt.param_groups[0]["lr"], np.generic)
        for state in (opt.state_dict(), opt.consolidate_state_dict()):
            found = read_back({"optimizer": state, "epoch": np.int64(3)}, tmp_path)
            new, _ = scheduled(lambda opt: torch.optim.lr_scheduler.ConstantLR(opt))
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # as where the history were left out
                new.load_state_dict(found["optimizer"])
            group = new.param_groups[0]
            assert group["lr"] == opt.param_groups[0]["lr"] and type(group["lr"]) is float
        found = read_back(opt.sharded_state_dict(), tmp_path)
        new.load_state_dict({**opt.state_dict(), **found})


SCHEDULES = {
    "StepLR": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1),
    "MultiStepLR": lambda opt: torch.optim.lr_scheduler.MultiStepLR(opt, [1, 2]),
    "CosineAnnealingLR": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5),
    "OneCycleLR": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=9),
    "CyclicLR": lambda opt: torch.optim.lr_scheduler.CyclicLR(opt, 0.01, 0.1),
    "ReduceLROnPlateau": lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt),
    "LambdaLR": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, np.exp),
    "SequentialLR": lambda opt: torch.optim.lr_scheduler.SequentialLR(
        opt,
        [torch.optim.lr_scheduler.LinearLR(opt), torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)],
        [1],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_states_of_torchs_schedulers(name, tmp_path):
    opt, scheduler = scheduled(SCHEDULES[name])
    found = read_back({"scheduler": scheduler.state_dict(), "opt": opt.state_dict()}, tmp_path)
    new_opt, new = scheduled(SCHEDULES[name])
    new_opt.load_state_dict(found["opt"])
    new.load_state_dict(found["scheduler"])
    assert new.get_last_lr() == scheduler.get_last_lr()


FOREIGN = {
    "lr": [
        *(np.float32(0.05), np.float64(0.05), np.float16(0.05), np.int64(1), np.array(0.05)),
        *(torch.tensor(0.05), torch.tensor([0.05]), torch.tensor(1), 1),
    ],
    "momentum": [np.float32(0.5), np.int64(0), torch.tensor(0.5)],
    "weight_decay": [np.float32(0.1), np.int64(0), torch.tensor(0.1)],
    "nesterov": [np.bool_(False)],
    "params": [[np.int64(0)]],
}


@pytest.mark.parametrize("name", FOREIGN)
def test_numbers_that_torch_takes_are_no_damage(name):
    """And the steps after them are torch's."""
    for value in FOREIGN[name]:
        ends = []
        for accelerated in (False, True):
            p = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
            opt = torch.optim.SGD([p], lr=0.1, momentum=0.9)
            state = opt.state_dict()
            state["param_groups"][0][name] = value
            opt = AndersonOptimizer(opt) if accelerated else opt
            opt.load_state_dict(state)
            for _ in range(3):
                opt.zero_grad()
                p.square().sum().backward()
                opt.step()
            ends.append(p.detach().clone())
            opt.load_state_dict(opt.state_dict())  # and from there
        assert torch.equal(*ends), value
    p = torch.nn.Parameter(torch.ones(3))
    opt = AndersonOptimizer(torch.optim.SGD([p], lr=np.float32(0.1), momentum=0.9))
    for bad in ("x", np.float32("nan"), np.float32(-1), np.str_("0.1"), np.array([0.1])):
        state = opt.state_dict()
        state["param_groups"][0]["lr"] = bad
        with pytest.raises(CheckpointError, match="Invalid state_dict"):
            opt.load_state_dict(state)


def test_momentum_of_numpys_is_accelerated_as_any():
    ends = []
    for momentum in (0.5, np.float32(0.5), torch.tensor(0.5)):
        p = torch.nn.Parameter(torch.arange(1.0, 9.0))
        opt = torch.optim.SGD([p], lr=0.05, momentum=momentum)
        config = AndersonConfig(frequency=3, safeguard="none", noise_gate=None)
        opt = AndersonOptimizer(opt, anderson=config)
        for _ in range(12):
            opt.zero_grad()
            (p * torch.arange(8.0)).square().sum().backward()
            opt.step()
        assert opt.anderson.stats.accelerated
        ends.append(p.detach().clone())
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


# Between ranks


class Remembering(torch.optim.SGD):
    """Keeps in its state what torch's own do not."""

    entry = Point(np.float32(0.5), torch.ones(2))

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["entry"] = self.entry


@pytest.mark.parametrize("entry", [Remembering.entry, datetime.date(2026, 1, 1)], ids=type)
def test_what_a_step_on_trial_would_restore_travels_between_ranks(entry, monkeypatch, tmp_path):
    monkeypatch.setattr(Remembering, "entry", entry)

    def program(comm):
        p = torch.nn.Parameter(torch.arange(1.0, 9.0))
        config = AndersonConfig(frequency=3, safeguard="residual", noise_gate=None)
        opt = AndersonOptimizer(Remembering([p], lr=0.01), anderson=config)
        opt.anderson = Accelerator(config, comm)
        while not opt.sharded_state_dict()["anderson"]["history"]["trial"]:
            opt.zero_grad()
            (p * torch.arange(8.0)).square().sum().backward()
            opt.step()
        try:
            whole = opt.consolidate_state_dict()
        except CheckpointError as error:
            return str(error)
        if whole is not None:
            opt.load_state_dict(read_back(whole, tmp_path))
        return whole

    found = run_ranks(2, program)
    if isinstance(entry, datetime.date):
        assert found[0] == found[1] and "\n" not in found[0]
        assert "could not consolidate" in found[0] and "datetime.date" in found[0]
        return
    undo = found[0]["anderson"]["history"]["trial"]["residual"]["undo"]
    assert_equal(undo["entries"][0]["entry"], entry)


def test_settings_of_numpys_name_the_same_moment(tmp_path):
    """A part from a file, and another rank's from memory, are of one moment."""

    def part(averages, depth):
        p = torch.nn.Parameter(torch.arange(1.0, 9.0))
        config = AndersonConfig(frequency=3, averages=averages, history_depth=depth)
        opt = AndersonOptimizer(torch.optim.SGD([p], lr=np.float64(0.01)), anderson=config)
        for _ in range(9):
            opt.zero_grad()
            loss = (p * torch.arange(8.0)).square().sum()
            loss.backward()
            opt.observe(np.float32(loss.item()))
            opt.step()
        return opt.sharded_state_dict()["anderson"]["history"]

    found = part((np.float64(0.9),), np.int64(5))
    fingerprint = [found, read_back({"x": found}, tmp_path)["x"], part((0.9,), 5)]
    assert len({ShardState.from_dict(s, "history").fingerprint() for s in fingerprint}) == 1


def test_an_entry_called_bit_generator_makes_no_lists(tmp_path):
    state = {"bit_generator": np.random.default_rng(0).bit_generator.state, "order": np.arange(3)}
    assert torch.equal(read_back(state, tmp_path)["order"], torch.arange(3))

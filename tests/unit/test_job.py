"""One process in a job of several, and Horovod that is not there: errors that say what to do."""

import copy
import importlib.abc
import pickle
import sys
import types

import pytest
import torch

import aadl_hvd
from aadl_hvd import (
    AndersonConfig,
    AndersonError,
    AndersonOptimizer,
    ConfigError,
    DistributedAndersonOptimizer,
    HorovodMissingError,
    NeumannOptimizer,
    UnsupportedError,
)
from aadl_hvd.optim import job


def sgd():
    return torch.optim.SGD(torch.nn.Linear(3, 2).parameters(), lr=0.1)


def horovod(size, initialised=True):
    module = types.ModuleType("horovod.torch")
    module.is_initialized, module.size = lambda: initialised, lambda: size
    return module


def mpi(size, initialised=True, finalised=False):
    module = types.ModuleType("mpi4py.MPI")
    module.Is_initialized, module.Is_finalized = lambda: initialised, lambda: finalised
    module.COMM_WORLD = types.SimpleNamespace(Get_size=lambda: size)
    return module


@pytest.fixture
def alone(monkeypatch):
    """Whatever other tests have loaded into this process."""
    for name in ("horovod.torch", "horovod.tensorflow", "horovod.mxnet", "mpi4py.MPI"):
        monkeypatch.delitem(sys.modules, name, raising=False)


SEVERAL = {
    "horovod.torch": (horovod(2), "Horovod", r"\. Use DistributedAndersonOptimizer"),
    "horovod.tensorflow": (horovod(3), "Horovod", r"\. Use DistributedAndersonOptimizer"),
    "mpi4py.MPI": (mpi(4), "MPI", r"Start Horovod .*DistributedAndersonOptimizer"),
}
ONE = {
    "one": ("horovod.torch", horovod(1)),
    "not initialised": ("horovod.torch", horovod(2, initialised=False)),
    "under way to be imported": ("horovod.torch", types.ModuleType("horovod.torch")),
    "one of MPI": ("mpi4py.MPI", mpi(1)),
    "MPI not initialised": ("mpi4py.MPI", mpi(2, initialised=False)),
    "MPI at its end": ("mpi4py.MPI", mpi(2, finalised=True)),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_one_process_of_several(name, alone, monkeypatch):
    module, library, instead = SEVERAL[name]
    monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(UnsupportedError, match=instead) as found:
        AndersonOptimizer(sgd())
    assert f"processes of {library}" in str(found.value)
    assert "independent=True" in str(found.value)
    AndersonOptimizer(sgd(), independent=True)
    AndersonOptimizer(sgd(), anderson=AndersonConfig(enabled=False))


@pytest.mark.parametrize("name", ONE)
def test_one_process_alone(name, alone, monkeypatch):
    monkeypatch.setitem(sys.modules, *ONE[name])
    AndersonOptimizer(sgd()).step()


LIBRARIES = {
    # name: (processes of torch.distributed or None, the module horovod.torch or None, which it is)
    "neither": (None, None, False),
    "torch alone": (2, None, True),
    "one process of torch": (1, None, True),
    "one of torch, Horovod to come": (1, horovod(2, initialised=False), False),
    "torch, Horovod imported and not used": (2, horovod(1, initialised=False), True),
    "both": (2, horovod(2), False),
    "torch, and Horovod that knows one": (2, horovod(1), False),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_which_library_reduces(name, alone, monkeypatch):
    size, module, expected = LIBRARIES[name]
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: size is not None)
    monkeypatch.setattr(distributed, "get_world_size", lambda: size)
    if module is not None:
        monkeypatch.setitem(sys.modules, "horovod.torch", module)
    assert job.trains_with_torch_distributed() is expected


@pytest.mark.parametrize("use", ["step", "observe"])
def test_other_processes_come_after_the_construction(use, alone, monkeypatch):
    opt = AndersonOptimizer(sgd())
    free = AndersonOptimizer(sgd(), independent=True)
    monkeypatch.setitem(sys.modules, "horovod.torch", horovod(2))
    before = copy.deepcopy(opt.param_groups)
    for _ in range(2):  # as often as it is tried
        with pytest.raises(UnsupportedError, match="independent=True"):
            opt.observe(1.0) if use == "observe" else opt.step()
    after = opt.param_groups
    assert all(map(torch.equal, before[0]["params"], after[0]["params"]))
    free.observe(1.0)
    free.step()


def test_the_job_is_looked_at_once_more_and_never_again(alone, monkeypatch):
    opt = AndersonOptimizer(sgd())
    looked = []
    monkeypatch.setattr(job, "check_alone", lambda: looked.append(1))
    for _ in range(5):
        opt.observe(1.0)
        opt.step()
    assert len(looked) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_is_as_independent_as_the_original(copied, alone, monkeypatch):
    free, bound = AndersonOptimizer(sgd(), independent=True), AndersonOptimizer(sgd())
    monkeypatch.setitem(sys.modules, "horovod.torch", horovod(2))
    copied(copied(free)).step()
    with pytest.raises(UnsupportedError, match="independent=True"):
        copied(bound)


@pytest.mark.parametrize(
    "make", [AndersonOptimizer, lambda opt: NeumannOptimizer(opt.param_groups)]
)
def test_parameters_that_fsdp_has_flattened(make):
    """FSDP itself needs a GPU; this is its mark. Norms of parts would go unnoticed."""
    from torch.distributed.fsdp._common_utils import _set_fsdp_flattened

    opt = sgd()
    _set_fsdp_flattened(opt.param_groups[0]["params"][0])
    opt.param_groups[0]["steps_per_epoch"] = 1
    with pytest.raises(UnsupportedError, match="FullyShardedDataParallel"):
        make(opt)


class Broken(importlib.abc.MetaPathFinder):
    """Horovod that is installed and cannot be loaded."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "horovod":
            raise OSError("libmpi.so.40: cannot open shared object file")


def without_torch():
    """As Horovod built for another framework: it imports, and holds next to nothing."""
    package, module = types.ModuleType("horovod"), types.ModuleType("horovod.torch")
    package.__path__, module.__path__, package.torch = [], [], module
    return {"horovod": package, "horovod.torch": module}


@pytest.mark.parametrize("state", ["not installed", "built without torch", "cannot be loaded"])
@pytest.mark.parametrize("use", ["DistributedAndersonOptimizer", "aadl_hvd.elastic"])
def test_without_horovod(use, state, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "horovod"]:
        monkeypatch.delitem(sys.modules, name)
    for name in (
        "elastic",
        "comm.horovod",
        "comm.horovod_groups",
        "engines.horovod_elastic",
        "engines.horovod_engine",
    ):
        monkeypatch.delitem(sys.modules, f"aadl_hvd.{name}", raising=False)
    monkeypatch.delattr(aadl_hvd, "elastic", raising=False)
    reason = "halted|No module"
    if state == "not installed":
        monkeypatch.setitem(sys.modules, "horovod", None)
    elif state == "built without torch":
        for name, module in without_torch().items():
            monkeypatch.setitem(sys.modules, name, module)
    else:
        monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
        reason = "OSError: libmpi"
    with pytest.raises(HorovodMissingError, match=reason) as found:
        if use == "aadl_hvd.elastic":
            importlib.import_module("aadl_hvd.elastic")
        else:
            DistributedAndersonOptimizer(sgd())
    assert isinstance(found.value, ImportError) and isinstance(found.value, AndersonError)
    for words in ("launch/README.md", "make setup", "in one process", "init_process_group"):
        assert words in str(found.value)
    AndersonOptimizer(sgd()).step()


def test_before_horovod_is_initialised():
    hvd = pytest.importorskip("horovod.torch", reason="Horovod is not installed")
    assert not hvd.is_initialized(), "another test of this process has done so"
    with pytest.raises(ConfigError, match=r"Call hvd\.init\(\) first"):
        DistributedAndersonOptimizer(sgd())


def test_an_elastic_state_is_not_for_one_process():
    pytest.importorskip("horovod.torch", reason="Horovod is not installed")
    from aadl_hvd.elastic import TorchState

    with pytest.raises(UnsupportedError, match="DistributedAndersonOptimizer"):
        TorchState(optimizer=AndersonOptimizer(sgd()))

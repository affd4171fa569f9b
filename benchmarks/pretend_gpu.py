"""A GPU made of host memory: the library's GPU paths, run and watched where there is none.

Tensors say that they are on "cuda:0" and hold a tensor of the CPU that computes for them. What a
GPU would refuse, an operation on tensors of two devices, is refused here; where the host would
wait for a GPU, the operation's name is noted. torch's own set_sync_debug_mode knows the same calls.
"""

from __future__ import annotations

import contextlib
import threading
import types
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
# Results whose size only the GPU knows, and numbers that the host asks for.
ASKING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}


class OnGpu(torch.Tensor):
    """A tensor "on the GPU"; usable inside `PretendGpu` only."""

    @staticmethod
    def __new__(cls, held):  # noqa: D102  (the class has the docstring)
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",  # as far as C++ can see: it asks CUDA's driver before anything is run
        )

    def __init__(self, held):
        self.held = held

    def data_ptr(self):
        """Where it lies, on the host."""
        return self.held.data_ptr()

    @property
    def device(self):
        """As far as Python can see."""
        return GPU

    def tolist(self):
        """Its numbers; torch leaves it to subclasses."""
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents=None):
        return f"OnGpu({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside PretendGpu")


def launches_of(name, args):
    """How many kernels torch starts for an operation: one, but for lists of tensors.

    A launch takes at most 320 pieces of 65,536 numbers, of as many tensors as fit into its
    arguments, as in torch's MultiTensorApply.cuh.
    """
    if not name.startswith("_foreach"):
        return 1
    lists = [x for x in args if isinstance(x, list | tuple)]
    most = {1: 110, 2: 64, 3: 48, 4: 36}[len(lists)]
    return -(-len(lists[0]) // most) + sum(t.numel() for t in lists[0]) // (65536 * 320)


class _Driver:
    """What torch asks the driver outside operations; shared by the threads that pretend."""

    def __init__(self):
        self._lock, self._users = threading.Lock(), 0
        answers = {
            "_lazy_init": lambda: None,  # factories look for it first
            "mem_get_info": lambda device: (80 * 2**30, 80 * 2**30),
            "memory_reserved": lambda device: 0,
            "memory_allocated": lambda device=None: 0,
            "get_device_properties": lambda device: types.SimpleNamespace(uuid="pretended"),
            "CUDAGraph": PretendGraph,
            "graph": capturing,
            "Stream": lambda: None,
            "device": lambda device: contextlib.nullcontext(),
            "current_stream": lambda device: None,
            "stream": lambda stream: contextlib.nullcontext(),
        }
        self._patches = [
            mock.patch.multiple(torch.cuda, **answers),
            mock.patch("aadl_hvd.kernels.usable", lambda device, *_: False),  # not by this GPU
        ]

    def start(self):
        with self._lock:
            self._users += 1
            if self._users == 1:
                for patch in self._patches:
                    patch.start()

    def stop(self):
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for patch in self._patches:
                    patch.stop()


class PretendGraph:
    """torch.cuda.CUDAGraph: the operations of a capture, on the memory that they were started on.

    Attributes:
        started: (operation, arguments, results) in order; tensors of the CPU.
        undo: tensors that the capture wrote to, and what they held before: it does not do the work.
    """

    made = 0  # all that were ever made

    def __init__(self):
        PretendGraph.made += 1
        self.started, self.undo = [], []

    def note(self, func, args, kwargs):
        """Notes an operation, and does it, so that there are results; returns these."""
        # A number on the host is copied when it is captured; its memory is not read again.
        args, kwargs = tree_map(
            lambda x: x.tensor.clone() if isinstance(x, _OfHost) else x, (args, kwargs)
        )
        for argument, given in zip(func._schema.arguments, args, strict=False):
            self._keep(argument, given)
        for argument in func._schema.arguments:
            if argument.name in kwargs:
                self._keep(argument, kwargs[argument.name])
        found = func(*args, **kwargs)
        self.started.append((func, args, kwargs, found))
        return found

    def _keep(self, argument, given):
        if argument.alias_info is not None and argument.alias_info.is_write:
            tensors = given if isinstance(given, list | tuple) else [given]
            self.undo += [(tensor, tensor.clone()) for tensor in tensors]

    def end(self):
        """Ends the capture: memory holds what it held before."""
        for tensor, before in reversed(self.undo):
            tensor.copy_(before)
        self.undo.clear()

    def replay(self):
        """Does again what was started, on the same memory."""
        gpu = PretendGpu.current()
        gpu.kernels.append("graph")
        gpu.launches += 1
        with _disable_current_modes():
            for func, args, kwargs, found in self.started:
                if func.is_view:
                    continue  # its memory is that of what it is a view of
                again, _ = tree_flatten(func(*args, **kwargs))
                for result, memory in zip(again, tree_flatten(found)[0], strict=True):
                    if result is not memory:
                        memory.copy_(result)


class _OfHost:
    """A tensor of the host among the arguments of an operation on the GPU."""

    def __init__(self, tensor):
        self.tensor = tensor


@contextlib.contextmanager
def capturing(graph, stream=None, capture_error_mode="global"):
    """torch.cuda.graph."""
    gpu = PretendGpu.current()
    assert gpu.graph is None, "one capture at a time"
    gpu.graph = graph
    try:
        yield
    finally:
        gpu.graph = None
        with _disable_current_modes():
            graph.end()


_DRIVER = _Driver()


class PretendGpu(TorchDispatchMode):
    """Within, device "cuda" exists.

    Attributes:
        synchronizations: operations at which the host waits for the GPU, in order.
        kernels: operations on the GPU that are no mere views, in order.
        launches: how often the host starts something on the GPU for them.
        graph: the graph that is captured now, or None.
    """

    _users = threading.local()

    @classmethod
    def current(cls):
        """The one that this thread is in."""
        return cls._users.stack[-1]

    def __init__(self):
        super().__init__()
        self.synchronizations, self.kernels, self.launches = [], [], 0
        self.graph = None

    def __enter__(self):
        _DRIVER.start()
        self._users.stack = [*getattr(self._users, "stack", []), self]
        return super().__enter__()

    def __exit__(self, *exc):
        try:
            return super().__exit__(*exc)
        finally:
            self._users.stack.pop()
            _DRIVER.stop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)  # the host has memory of one kind here
        name = func.__name__.split(".")[0]
        flat, _ = tree_flatten((args, kwargs))
        mine = [x for x in flat if isinstance(x, OnGpu)]
        others = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, OnGpu)]
        to_gpu, waits = bool(mine), len(self.synchronizations)
        if kwargs.get("device") is not None:
            to_gpu = torch.device(kwargs["device"]).type in ("cuda", "meta")
            kwargs["device"] = torch.device("cpu")
        if name in ("copy_", "_to_copy", "_foreach_copy_"):
            crosses = bool(mine and others) or to_gpu != bool(mine)
            if crosses and self.graph is not None:
                raise RuntimeError("operation not permitted when stream is capturing")
            free = kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True)
            if crosses and not free:
                self.synchronizations.append(name)
        elif mine and name in ASKING:
            self.synchronizations.append(name)
        elif mine and name in ("index", "index_put_", "index_put"):
            indices = [x for x in args[1] if x is not None]
            if not all(isinstance(x, OnGpu) and x.dtype != torch.bool for x in indices):
                self.synchronizations.append(
                    name
                )  # an index is copied to the GPU, or counted there
        elif mine and others:
            numbers = all(x.dim() == 0 for x in others)
            assert numbers and torch.Tag.pointwise in func.tags, f"{func} on two devices"
        if self.graph is not None and len(self.synchronizations) > waits:
            raise RuntimeError("operation not permitted when stream is capturing")
        captured = self.graph is not None and to_gpu
        started = to_gpu and not func.is_view and name not in ("detach", "empty", "new_empty")
        if started and not captured:
            self.kernels.append(name)
            self.launches += launches_of(name, args)
        wrappers = {id(x.held): x for x in mine}
        held = tree_map(lambda x: x.held if isinstance(x, OnGpu) else x, (args, kwargs))
        if captured:
            ours = {id(x.held) for x in mine}
            held = tree_map(
                lambda x: x if not isinstance(x, torch.Tensor) or id(x) in ours else _OfHost(x),
                held,
            )
            found, shape = tree_flatten(self.graph.note(func, *held))
        else:
            found, shape = tree_flatten(func(*held[0], **held[1]))
        return tree_unflatten([self._wrapped(x, wrappers, to_gpu) for x in found], shape)

    @staticmethod
    def _wrapped(found, wrappers, to_gpu):
        if not isinstance(found, torch.Tensor):
            return found
        if id(found) in wrappers:  # in place, or out=
            return wrappers[id(found)]
        return OnGpu(found) if to_gpu else found

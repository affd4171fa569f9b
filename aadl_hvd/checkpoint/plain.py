"""What a checkpoint may hold: tensors and plain values, which torch reads without running code.

torch.save writes all that can be pickled. `torch.load(weights_only=True)` reads only a few types,
and says so when the run that wrote the file is over. So `plain` checks before a file is written. A
value with a plain equivalent is converted. Any other value is an error that names its place.

The types that torch reads differ little from 2.6 to 2.15 (torch/_weights_only_unpickler.py). Where
they differ, `_is_read` tries.
"""

from __future__ import annotations

import codecs
import collections
import dataclasses
import datetime
import enum
import functools
import io
import os
import random
import types
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from aadl_hvd.errors import CheckpointError

_DEEPEST = 64  # levels: pickle and the walk here recurse, and Python allows 1000 calls
_LONGEST_INT = 8 * 255 - 1  # bits of the longest int that torch reads
_SCALARS = frozenset({type(None), bool, float, str})  # stay as they are
# Convert an instance of a derived class to its base class.
_BASES: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    complex: complex.__complex__,
    str: str.__str__,
    bytes: lambda value: bytes(memoryview(value)),
    bytearray: lambda value: bytearray(memoryview(value)),
}
_DICTS = collections.OrderedDict, collections.Counter  # torch reads these and dict
_NUMBERS = "biufc"  # kinds of NumPy's dtypes: bool, int, unsigned, float, complex
_NAMES_OF_TORCH = torch.dtype, torch.device, torch.layout
_LAYOUTS = {
    *(torch.strided, torch.sparse_coo),
    *(torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc),
}
_OPEN = object()  # stands for the result of a value that is still being converted


def plain(value: Any, name: str) -> Any:
    """Converts a value to types that torch reads; `aadl_hvd.checkpoint.save` says the rules.

    Containers are new, tensors are not copied. Shared objects stay shared.

    Args:
        value: nested containers; it is not changed.
        name: its name in messages.

    Raises:
        CheckpointError: an entry has no plain equivalent. The message says where it is, its type,
            and what to do.
    """
    return _Walk().convert(value, name)


class _Walk:
    def __init__(self) -> None:
        # By id: the original, which must stay alive while its id is in use, and the result.
        self._done: dict[int, tuple[Any, Any]] = {}
        self._depth = 0
        self._dtypes: dict[int, tuple[torch.dtype, str]] = {}  # by address of the memory

    def convert(self, value: Any, name: str) -> Any:
        kind = type(value)
        if kind in _SCALARS or (kind is int and value.bit_length() <= _LONGEST_INT):
            return value
        if id(value) in self._done:
            result = self._done[id(value)][1]
            if result is _OPEN:
                _refuse(value, name, "a copy without that reference", "it contains itself")
            return result
        if self._depth == _DEEPEST:
            _refuse(value, name, "a flatter one", f"it is more than {_DEEPEST} levels deep")
        self._done[id(value)] = value, _OPEN
        self._depth += 1
        result = self._converted(value, name)
        self._depth -= 1
        self._done[id(value)] = value, result
        return result

    def _converted(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value, name)
        if isinstance(value, np.ndarray):
            return self.convert(_from_numpy(value, name), name)
        if isinstance(value, np.generic) and value.dtype.kind in _NUMBERS:
            item = value.item()
            if not isinstance(item, np.generic):  # the item of a long double is one
                return self.convert(item, name)
        if isinstance(value, PurePath):
            return os.fspath(value)
        if isinstance(value, _NAMES_OF_TORCH) and _is_read(value):
            return value
        if _holds_more(value):
            _refuse(value, name, "its plain value, and its attributes beside it,")
        for base, equal in _BASES.items():
            if isinstance(value, base):
                return _scalar(value, equal(value), name)
        if isinstance(value, dict):
            return self._dict(value, name)
        if isinstance(value, list | tuple):
            items = [self.convert(item, f"{name}[{i}]") for i, item in enumerate(value)]
            if isinstance(value, list):
                return items
            return torch.Size(items) if type(value) is torch.Size else tuple(items)
        if isinstance(value, set | frozenset):
            elements = {self._key(item, f"an element of {name}") for item in value}
            if len(elements) < len(value):
                _refuse(value, name, "a list", "some elements are the same plain value")
            return elements
        return _refuse(value, name)

    def _dict(self, value: dict[Any, Any], name: str) -> Any:
        kind: Any = type(value) if type(value) in _DICTS else dict
        if kind is dict and isinstance(value.get("bit_generator"), str):
            value = _with_lists(value)
        result = kind()
        for key, item in value.items():
            found = self._key(key, f"a key of {name}")
            if found in result:
                _refuse(key, f"a key of {name}", "another", "another key is the same plain value")
            result[found] = self.convert(item, f"{name}[{_cut(key)}]")
        if kind is collections.OrderedDict:  # a module's state_dict has versions in _metadata
            self._copy_attributes(value, result, name)
        return result

    def _key(self, key: Any, name: str) -> Any:
        found = self.convert(key, name)
        if not _is_key(found):
            _refuse(
                key, name, "a number, a text or a tuple of these", "it would not be found again"
            )
        return found

    def _tensor(self, value: Tensor, name: str) -> Tensor:
        result, is_parameter = value, type(value) is torch.nn.Parameter
        if not (is_parameter or type(value) is Tensor):
            result = _without_subclass(value, name)
        if instead := _instead_of_unreadable(result):
            _refuse(value, name, instead)
        if (memory := _memory(result)) is not None and memory.data_ptr():
            dtype, first = self._dtypes.setdefault(memory.data_ptr(), (result.dtype, name))
            if dtype != result.dtype:
                _refuse(value, name, "x.clone()", f"{first} is {dtype} in the same memory")
        if vars(value):
            result = result.detach().requires_grad_(result.requires_grad)
            if is_parameter:
                result = torch.nn.Parameter(result, result.requires_grad)
            self._copy_attributes(value, result, name)
        return result

    def _copy_attributes(self, value: Any, result: Any, name: str) -> None:
        for attribute, item in vars(value).items():
            setattr(result, attribute, self.convert(item, f"{name}.{attribute}"))


class _EmptyBytes:
    """b"", pickled as Python pickles bytes that are not empty: torch reads no other form."""

    def __reduce__(self) -> Any:
        return codecs.encode, ("", "latin1")


_EMPTY = _EmptyBytes()


def _scalar(value: Any, equal: Any, name: str) -> Any:
    """Returns the value to write for an instance of a derived class, or of bytes."""
    if not (equal == value or equal != equal):  # NaN
        _refuse(value, name)
    if isinstance(equal, complex) and not _is_read(1j):
        _refuse(value, name, "[x.real, x.imag]", "this version of torch cannot read it")
    if isinstance(equal, int) and equal.bit_length() > _LONGEST_INT:
        _refuse(value, name, "hex(x)", "it is longer than torch can read")
    return _EMPTY if type(equal) is bytes and not equal else equal


@functools.cache
def _is_read(value: Any) -> bool:
    """Whether this version of torch reads a small value that not all versions read."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        return bool(torch.load(buffer, weights_only=True) == value)
    except Exception:  # of many types, at saving or at loading
        return False


def _holds_more(value: Any) -> bool:
    """Whether an instance of a derived class has attributes that a plain value would lose."""
    if isinstance(value, enum.Enum) or type(value) is collections.OrderedDict:
        return False
    own = getattr(value, "__dict__", {})
    if isinstance(value, dict):  # attributes may be aliases of its entries
        return any(dict.get(value, name, _OPEN) is not item for name, item in own.items())
    return isinstance(value, (*_BASES, list, tuple, set, frozenset)) and bool(own)


def _is_key(value: Any) -> bool:
    """Whether a converted value can be a key: hashed by value, not by identity."""
    if isinstance(value, tuple):
        return all(map(_is_key, value))
    return not isinstance(value, Tensor | dict | list | set | bytearray)


def _with_lists(value: Any) -> Any:
    """Converts a random state of NumPy to lists: it cannot take numbers from torch's uint64."""
    if isinstance(value, dict):
        return {key: _with_lists(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def _from_numpy(array: np.ndarray[Any, Any], name: str) -> Tensor:
    """Returns a tensor of the same dtype and numbers, in the same memory if torch can use it."""
    if type(array) not in (np.ndarray, np.memmap):  # others hold more, such as a mask
        _refuse(array, name, "numpy.asarray(x)")
    if array.dtype.kind in _NUMBERS:
        dtype = array.dtype.newbyteorder("=")
        if array.dtype != dtype or not (array.flags.c_contiguous and array.flags.writeable):
            array = np.array(array, dtype=dtype, order="C")
        try:
            return torch.from_numpy(array)
        except TypeError:  # torch has no such dtype
            pass
    return _refuse(array, name, "x.tolist()", f"torch has no {array.dtype}")


def _without_subclass(value: Tensor, name: str) -> Tensor:
    """Returns the value as a plain Tensor, without its derived class."""
    if is_lazy(value) or type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        # It has no numbers yet, or they are in other tensors.
        local = hasattr(value, "to_local")
        _refuse(value, name, "x.full_tensor() or x.to_local()" if local else "a plain tensor")
    with torch._C.DisableTorchFunctionSubclass():
        found = value.detach().as_subclass(Tensor)
        return found.requires_grad_(value.requires_grad)


def _memory(tensor: Tensor) -> torch.UntypedStorage | None:
    try:
        return tensor.untyped_storage() if tensor.layout == torch.strided else None
    except (NotImplementedError, RuntimeError):  # some devices have none
        return None


def _instead_of_unreadable(tensor: Tensor) -> str:
    """What to save instead of a tensor that torch could not read; "" if it can."""
    if tensor.device.type == "meta":
        return "a tensor with numbers"
    if tensor.is_nested:
        return "x.unbind()"
    if tensor.layout not in _LAYOUTS:
        return "x.to_dense()"
    if any(name is not None for name in getattr(tensor, "names", ())):
        return "x.rename(None)"
    if not _is_read(tensor.dtype):
        return "one of another dtype"
    if (memory := _memory(tensor)) is not None and tensor.numel() and not tensor.is_quantized:
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        end = tensor.storage_offset() + sum((n - 1) * stride for n, stride in pairs) + 1
        if end * tensor.element_size() > memory.nbytes():
            return "a tensor whose memory has not been freed"
    return ""


# What to save instead, x being the entry.
_INSTEAD: dict[Any, str] = {
    enum.Enum: "x.value",
    (datetime.date, datetime.time): "x.isoformat()",
    datetime.timedelta: "x.total_seconds()",
    (np.datetime64, np.timedelta64): "str(x)",
    np.floating: "float(x)",
    np.complexfloating: "complex(x)",
    (torch.Generator, np.random.RandomState): "x.get_state()",
    random.Random: "x.getstate()",
    np.random.Generator: "x.bit_generator.state",
    np.random.BitGenerator: "x.state",
    Mapping: "dict(x)",
    (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType): "its name",
    (collections.deque, range): "list(x)",
}


def _instead(value: Any) -> str:
    for kinds, instead in _INSTEAD.items():
        if isinstance(value, kinds):
            return instead
    if hasattr(value, "state_dict"):
        return "x.state_dict()"
    if dataclasses.is_dataclass(value):
        return "dataclasses.asdict(x)"
    return "vars(x)" if hasattr(value, "__dict__") else "str(x)"


def _cut(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."


def _refuse(
    value: Any, name: str, instead: str = "", why: str = "a checkpoint with it cannot be read"
) -> NoReturn:
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    raise CheckpointError(
        f"Invalid {name}, of type {module}{kind.__qualname__}: {why}. "
        f"Save {instead or _instead(value)} instead, or leave it out."
    )

"""Parameters that FSDP2 (`fully_shard`) has sharded: what of them is on this rank.

Such a parameter is a DTensor. Its gradient is one, and so is most of what an optimizer keeps of it.
Others beside them may be replicated: each rank holds them whole. They count as rows of the mesh's
first rank alone, so that sums over ranks count them once. Nothing here is collective.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from aadl_hvd.errors import UnsupportedError


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of any kind."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # where there is one, it is loaded
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """The part of a DTensor on this rank, in the same memory; anything else as it is.

    To be called without a graph: autograd would make a new tensor.
    """
    return tensor.to_local() if is_dtensor(tensor) else tensor


def sharded_like(parameter: Any, vectors: Tensor) -> Any:
    """A tensor [k, *shape of the parameter] that is sharded like it, of this rank's part.

    Args:
        parameter: a DTensor, or a replicated parameter: then the result is a plain tensor.
        vectors: [k, numbers of its part here], each in its row-major order. On a processor the
            result has the same memory. A mesh of GPUs gets a copy.
    """
    if not is_dtensor(parameter):
        return vectors.reshape(len(vectors), *parameter.shape)
    module: Any = sys.modules["torch.distributed.tensor"]
    placements = [
        module.Shard(place.dim + 1) if place.is_shard() else place for place in parameter.placements
    ]
    shape = torch.Size([len(vectors), *parameter.shape])
    stride = torch.empty(shape, device="meta").stride()
    part = vectors.reshape(len(vectors), *local(parameter).shape)
    mesh = parameter.device_mesh
    return module.DTensor.from_local(
        part, mesh, placements, run_check=False, shape=shape, stride=stride
    )


def reshard(model: nn.Module) -> None:
    """Has modules of FSDP2 gather their parameters anew before they are used next.

    After a forward pass without a backward pass the outermost module keeps what it has gathered.
    """
    for module in model.modules():
        if callable(found := getattr(module, "reshard", None)):
            found()


class Parts:
    """The part of each of some parameters that counts as this rank's rows.

    The same parameters have the same parts, as objects, for as long as this is kept.
    """

    def __init__(self) -> None:
        self._nothing: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, parameters: list[Tensor]) -> list[Tensor]:
        """By parameter: its part, empty for a replicated one on all but the first ranks."""
        coordinate = coordinate_in_mesh(parameters)
        return [
            local(p) if is_dtensor(p) or not coordinate[-1] else self._empty(p) for p in parameters
        ]

    def _empty(self, p: Tensor) -> Tensor:
        shape, like = (0, *p.shape[1:]), (p.dtype, p.device)
        known, empty = self._nothing.get(id(p), (None, p))
        if known is not p or (empty.dtype, empty.device) != like or empty.shape != shape:
            stride = p.stride() or (1,)
            empty = torch.empty_strided(shape, stride, dtype=p.dtype, device=p.device)
            self._nothing[id(p)] = p, empty
        return empty


def coordinate_in_mesh(parameters: Iterable[Tensor]) -> list[int]:
    """This rank's place in the mesh of the sharded ones of some parameters."""
    sharded: Any = next(filter(is_dtensor, parameters))
    coordinate: list[int] = sharded.device_mesh.get_coordinate()
    return coordinate


def mesh_of(parameters: Iterable[Tensor]) -> Any:
    """The mesh over which parameters are sharded; None where none is.

    Returns:
        A `DeviceMesh` of one dimension, or of two (HSDP): over the first one the shards are copied.

    Raises:
        UnsupportedError: one is sharded in another way, or over another mesh.
    """
    mesh = None
    for p in filter(is_dtensor, parameters):
        tensor: Any = p
        *copied, divided = tensor.placements
        if not (divided.is_shard() and len(copied) <= 1 and all(x.is_replicate() for x in copied)):
            raise UnsupportedError(
                f"Invalid parameter of placements {tensor.placements}. Must be sharded over the "
                "last dimension of its mesh alone, and copied over the one before, as fully_shard "
                "does it: tensor parallelism is not supported."
            )
        mesh = tensor.device_mesh if mesh is None else mesh
        if tensor.device_mesh != mesh:
            raise UnsupportedError(
                f"Invalid parameters on the meshes {mesh} and {tensor.device_mesh}. Must be one."
            )
    return mesh

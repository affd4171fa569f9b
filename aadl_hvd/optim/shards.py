"""Parameters that FSDP2 (`fully_shard`) has sharded: what of them is on this rank.

Such a parameter is a DTensor. Its gradient is one, and so is most of what an optimizer keeps of it.
Nothing here is collective.
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
        parameter: a DTensor.
        vectors: [k, numbers of its part here], each in its row-major order. On a processor the
            result has the same memory. A mesh of GPUs gets a copy.
    """
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


def mesh_of(parameters: Iterable[Tensor]) -> Any:
    """The mesh over which all parameters are sharded; None where none is.

    Returns:
        A `DeviceMesh` of one dimension, or of two (HSDP): over the first one the shards are copied.

    Raises:
        UnsupportedError: some are sharded and others are not, or in another way.
    """
    mesh, kinds = None, set()
    for p in parameters:
        kinds.add(is_dtensor(p))
        if len(kinds) > 1:
            raise UnsupportedError(
                "Invalid parameters: some are sharded by fully_shard and others are not. Must be "
                "all sharded: call fully_shard on the model itself, too."
            )
        if not is_dtensor(p):
            continue
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

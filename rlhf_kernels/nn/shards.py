"""Tensors of which each rank holds a shard (DTensor), read and written as whole ones; any other tensor as it is."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor; nothing is imported to find out."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, from all ranks, every one of which must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def own(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Overwrites a tensor from its whole value, which every rank has."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        lies: Any = tensor
        value = value.to(tensor.device, tensor.dtype)
        value = distribute_tensor(value, lies.device_mesh, lies.placements, src_data_rank=None)
    tensor.copy_(value)


def gathered(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Whole tensors on the CPU, gathered one by one, by every rank; {} where this rank does not `keep` them."""
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if keep:
            found[name] = value.cpu()
    return found

"""How the Triton kernels of the head are launched: the shipped tile of each chip, and tensors or their descriptors."""

import os
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Tile:
    """One configuration of a GEMM kernel. parts: slices of the epilogue; group: row tiles that share W in L2."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    parts: int
    tma: bool
    flatten: bool
    group: int = 16


def tma_fits(*matrices: Tensor) -> bool:
    """The copy engine's terms: rows that start on 16 bytes."""
    return all(
        m.data_ptr() % 16 == 0 and m.stride(1) == 1 and m.stride(0) * m.element_size() % 16 == 0 for m in matrices
    )


def source(matrix: Tensor, tile: Tile, rows: int, columns: int) -> Tensor | TensorDescriptor:
    """The matrix as a kernel takes it: a descriptor of [rows, columns] blocks, or the tensor itself."""
    if not tile.tma:
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


@cache
def processors(device: torch.device) -> int:
    """Programs of a persistent kernel: one a multiprocessor; interpreted, few, so that each takes several tiles."""
    return 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def chip(device: torch.device) -> str:
    """The name under which configurations are shipped; others than those take the nearest older one's."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_100" if major == 10 else "sm_90" if major == 9 else "sm_80"


def cdiv(a: int, b: int) -> int:
    return triton.cdiv(a, b)

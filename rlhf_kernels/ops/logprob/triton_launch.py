<<<<<<< HEAD
"""How the Triton kernels of the head are launched: the tile of each chip, and matrices as tensors or descriptors.

Tiles do not depend on the number of rows, so a row's numbers do not depend on the batch it stands in.
"""

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


EXPONENTIALS = {
    "sm_80": Tile(128, 128, 64, 8, 4, 1, False, False, 8),
    "sm_90": Tile(128, 256, 64, 8, 4, 2, True, True),
    "sm_100": Tile(128, 256, 64, 8, 3, 4, True, False),
    "gfx942": Tile(128, 128, 64, 8, 2, 1, False, False, 8),
    "interpreter": Tile(32, 256, 64, 4, 1, 2, True, False, 2),
}
SCORES = {
    "sm_80": Tile(128, 128, 64, 8, 4, 1, False, False, 8),
    "sm_90": Tile(128, 256, 64, 8, 4, 2, True, True),
    "sm_100": Tile(128, 256, 64, 8, 3, 4, True, False),
    "gfx942": Tile(128, 128, 64, 8, 2, 1, False, False, 8),
    "interpreter": Tile(32, 256, 64, 4, 1, 2, True, False, 2),
}
PAIRS = {  # policy and reference: two accumulators
    "sm_80": Tile(128, 64, 64, 8, 4, 1, False, False, 8),
    "sm_90": Tile(128, 128, 64, 8, 3, 1, True, False),
    "sm_100": Tile(128, 128, 64, 8, 3, 2, True, False),
    "gfx942": Tile(128, 64, 64, 8, 2, 1, False, False, 8),
    "interpreter": Tile(32, 128, 64, 4, 1, 4, True, False, 2),
}
POINTERS = {  # in place of a tile with TMA where rows do not start on 16 bytes
    "sm_90": Tile(128, 128, 64, 8, 4, 1, False, False, 8),
    "sm_100": Tile(128, 128, 64, 8, 4, 1, False, False, 8),
    "interpreter": Tile(32, 128, 64, 4, 1, 1, False, False, 2),
}


def tile_for(table: dict[str, Tile], device: torch.device, *matrices: Tensor) -> Tile:
    """The tile of this chip, one without the copy engine where it cannot take the matrices."""
    tile = table[chip(device)]
    return POINTERS[chip(device)] if tile.tma and not tma_fits(*matrices) else tile


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


=======
"""How the Triton row kernels are launched: columns a program holds, its warps, the device it runs on."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def block_of(n: int, most: int) -> int:
    """The power of 2 that holds n columns, or `most` if n is more."""
    return max(16, min(most, 1 << (n - 1).bit_length()))


def warps_of(block: int, values: int) -> int:
    """Warps of a program that gives each of a warp's 32 threads `values` of a block's columns, as far as that goes.

    More values a thread make fewer reductions between warps; too many spill. The counts at the kernels are the largest
    that spill on none of the shipped chips (an AMD warp has 64 threads: half as many values).
    """
    return max(4, min(16, block // (32 * values)))


def device_of(x: Tensor) -> AbstractContextManager:
    """Makes x's GPU the current one: Triton launches there. Nothing on the CPU (the interpreter)."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
>>>>>>> rows

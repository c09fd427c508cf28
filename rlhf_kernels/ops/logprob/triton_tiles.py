"""How the Triton kernels of the head are launched: the tile of each chip, and matrices as tensors or descriptors.

Tiles do not depend on the number of rows, so a row's numbers do not depend on the batch it stands in.
"""

import os
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Tile:
    """One configuration of a GEMM kernel.

    parts: slices of the epilogue, unrolled or in a loop; group: row tiles that share W in L2; flatten: the loop over
    tiles and that over K are one, so that the next tile's loads run under this one's epilogue.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    parts: int = 1
    tma: bool = False
    flatten: bool = False
    unroll: bool = False
    group: int = 8


EXPONENTIALS = {
    "sm_80": Tile(128, 128, 64, 8, 4),
    "sm_90": Tile(128, 256, 64, 8, 4, 2, tma=True, flatten=True, unroll=True, group=16),
    "sm_100": Tile(128, 128, 64, 8, 4, tma=True),
    "gfx942": Tile(128, 128, 64, 8, 2, 4),
    "interpreter": Tile(32, 256, 64, 4, 1, 2, tma=True, flatten=True, unroll=True, group=2),
}
FAT_EXPONENTIALS = {  # a softcap or bias needs more registers, E' in fp32 more shared memory
    **EXPONENTIALS,
    "sm_90": Tile(128, 256, 64, 8, 4, 4, tma=True, group=16),
    "interpreter": Tile(32, 256, 64, 4, 1, 4, tma=True, group=2),
}
SCORES = {
    **EXPONENTIALS,
    "sm_100": Tile(128, 256, 64, 8, 4, 2, tma=True, unroll=True, group=16),
}
PAIRS = {  # policy and reference: two accumulators
    "sm_80": Tile(128, 64, 64, 8, 3, 2),
    "sm_90": Tile(128, 128, 64, 8, 3, 4, tma=True),
    "sm_100": Tile(128, 64, 64, 8, 3, 4, tma=True),
    "gfx942": Tile(128, 64, 64, 8, 2, 8),
    "interpreter": Tile(32, 128, 64, 4, 1, 4, tma=True, group=2),
}
POINTERS = {  # in place of a tile with TMA where rows do not start on 16 bytes
    "sm_90": Tile(128, 128, 64, 8, 4),
    "sm_100": Tile(128, 128, 64, 8, 4),
    "interpreter": Tile(32, 128, 64, 4, 1, 2, group=2),
}
POINTER_PAIRS = {
    "sm_90": Tile(128, 64, 32, 8, 3, 4),
    "sm_100": Tile(128, 64, 32, 8, 3, 4),
    "interpreter": Tile(32, 64, 64, 4, 1, 2, group=2),
}


def tile_for(table: dict[str, Tile], device: torch.device, *matrices: Tensor) -> Tile:
    """The tile of this chip, one without the copy engine where it cannot take the matrices."""
    tile = table[chip(device)]
    if tile.tma and not tma_fits(*matrices):
        return (POINTER_PAIRS if table is PAIRS else POINTERS)[chip(device)]
    return tile


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

"""How the Triton kernels of lora_linear are launched: the rows of a call, and the tiles of each chip.

Tiles depend on the ranks, never on which rows or how many; only the number of splits depends on how many.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops.logprob.triton_tiles import Tile

MOST_SOURCES = 3  # matrices that one launch takes: q, k, v; more are several launches


@dataclass(frozen=True)
class Rows:
    """The rows of a launch and the adapter of each; kernels read index and order on the device every time.

    index: int [>= total]; scaling: [n]; order: int [total], a permutation; live: only rows below it.
    """

    index: Tensor
    scaling: Tensor
    order: Tensor | None
    total: int
    live: int
    adapters: int

    def below(self, live: int) -> "Rows":
        """The rows below `live`. With an order all positions are still looked at: they may lie anywhere in it."""
        total = live if self.order is None else self.total
        return Rows(self.index, self.scaling, self.order, total, live, self.adapters)


@dataclass(frozen=True)
class ShrinkTile:
    bm: int
    br: int
    bk: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ExpandTile:
    bm: int
    bn: int
    warps: int
    stages: int


@dataclass(frozen=True)
class OuterTile:
    bc: int
    br: int
    bm: int
    warps: int
    stages: int


SINGLE_BLOCK = 32  # ranks at once in fp32, which has no matrix unit here


def rank_block(rank: int, most: int = 64) -> int:
    """Ranks that a program takes at once: a power of 2 that holds them, as far as that goes; 16 is a matrix unit's."""
    return min(most, max(16, power_of_2(rank)))


def aligned(*numbers: int) -> bool:
    """Whether these widths and strides let loads be whole vectors; else a tile's addresses take many registers."""
    return all(number % 16 == 0 for number in numbers)


def shrink_tile_on(arch: str, dtype: torch.dtype, rank: int, vectors: bool = True) -> ShrinkTile:
    """64 rows, so that a few thousand rows fill the chip; deep stages, because it is bound by reading."""
    if arch == "interpreter":
        return ShrinkTile(32, rank_block(rank, 32), 64, 4, 1)
    if dtype == torch.float32:
        return ShrinkTile(32, rank_block(rank, SINGLE_BLOCK), 32, 4, 2)
    if arch == "gfx942" or not vectors:
        return ShrinkTile(64, rank_block(rank, 64 if vectors else 32), 64, 4, 2)
    wide = rank > 64
    return ShrinkTile(64, rank_block(rank, 128), 64, 8 if wide else 4, 4 if wide or arch == "sm_80" else 6)


def expand_tile_on(arch: str, dtype: torch.dtype) -> ExpandTile:
    if arch == "interpreter":
        return ExpandTile(32, 128, 4, 1)
    if dtype == torch.float32:
        return ExpandTile(32, 32, 4, 1)
    return ExpandTile(64, 128, 8, 2)


def outer_tile_on(arch: str, dtype: torch.dtype, rank: int, vectors: bool = True) -> OuterTile:
    if arch == "interpreter":
        return OuterTile(128, rank_block(rank, 64), 32, 4, 1)
    if dtype == torch.float32:
        return OuterTile(32, rank_block(rank, SINGLE_BLOCK), 32, 4, 2)
    if not vectors:
        return OuterTile(64, rank_block(rank, 64), 32, 8, 2)
    if arch == "gfx942":
        return OuterTile(128, rank_block(rank, 64), 64, 4, 2)
    if arch == "sm_80":
        return OuterTile(64, rank_block(rank, 64), 64, 4, 3)
    return OuterTile(128, rank_block(rank, 128), 64, 4, 5)


GEMM = {
    "sm_80": Tile(128, 128, 64, 8, 4, 2),
    "sm_90": Tile(128, 256, 64, 8, 4, 4, tma=True, group=16),
    "sm_100": Tile(128, 128, 64, 8, 4, tma=True, group=16),
    "gfx942": Tile(128, 128, 64, 8, 2, 2),
    "interpreter": Tile(32, 128, 64, 4, 1, 2, tma=True, group=2),
}
POINTERS = {  # where rows come in an order
    **GEMM,
    "sm_90": Tile(128, 128, 64, 8, 4),
    "sm_100": Tile(128, 128, 64, 8, 4),
    "interpreter": Tile(32, 64, 64, 4, 1, group=2),
}
NARROW = {"sm_80": Tile(128, 64, 64, 8, 4)}  # where addresses take more registers: several products, or W by columns


def gemm_ranks_on(arch: str, rank: int) -> int:
    """Ranks that a tile of the GEMM takes at once."""
    return rank_block(rank, 32 if arch == "gfx942" else 64)


def gemm_tile_on(arch: str, ordered: bool, several: bool, turned: bool) -> Tile | None:
    """None for several products in an order, which would spill."""
    if several and ordered:
        return None
    tile = (POINTERS if ordered else GEMM)[arch]
    return NARROW.get(arch, tile) if several or turned else tile


def power_of_2(n: int, up: bool = True) -> int:
    """The nearest power of 2 that is not smaller (up) or not larger than n; n >= 1 if not up."""
    return 1 << (max(n, 1) - 1).bit_length() if up else 1 << n.bit_length() - 1


def padded(items: Sequence[Any]) -> tuple[Any, ...]:
    """MOST_SOURCES arguments of a kernel: those that are there, then None."""
    return (*items, *[None] * (MOST_SOURCES - len(items)))

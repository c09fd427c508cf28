"""How the Triton kernels of attention are launched: the tiles of each chip, a call's shape and options, the splits.

Tiles depend on dtype and dims, splits on the width of the slice table; neither on how many sequences there are.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

LOG2E = 1.4426950408889634
SPLIT_KEYS, MOST_SPLITS = 512, 16


@dataclass(frozen=True)
class Tile:
    """bm: rows of queries; bn: keys."""

    bm: int
    bn: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Shape:
    """group: heads that share a key/value head; d, dv: dims of a key and of a value."""

    group: int
    d: int
    dv: int
    dtype: torch.dtype

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, kv_heads: int) -> "Shape":
        return cls(q.shape[1] // kv_heads, q.shape[2], v.shape[-1], q.dtype)

    @property
    def wide(self) -> int:
        """The larger of the two dims as a program holds it."""
        return max(block_of(self.d), block_of(self.dv))

    @property
    def precise(self) -> bool:
        return self.dtype == torch.float32

    def constants(self) -> dict[str, int]:
        return {"GROUP": self.group, "D": self.d, "DV": self.dv, "BD": block_of(self.d), "BDV": block_of(self.dv)}


@dataclass(frozen=True)
class Options:
    """scale, window (0: none) and softcap (0: none) of a call, and what kernels take of them (see triton_parts)."""

    scale: float
    window: int
    softcap: float

    @property
    def capped(self) -> bool:
        return self.softcap > 0

    @property
    def factor(self) -> float:
        return self.scale / self.softcap if self.capped else self.scale * LOG2E

    @property
    def cap(self) -> float:
        return self.softcap * LOG2E


def block_of(dim: int) -> int:
    """Columns that hold a dim: a power of 2, and at least 16, which a matrix unit takes."""
    return max(16, 1 << (dim - 1).bit_length())


def dense(x: Tensor) -> Tensor:
    """x with its last dim's entries side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def split_of(capacity: int) -> tuple[int, int]:
    """(keys of a split, splits) for sequences of up to `capacity` tokens: so few that partial sums stay small."""
    span = SPLIT_KEYS
    while capacity > span * MOST_SPLITS:
        span *= 2
    return span, max(1, -(-capacity // span))


def row_tile(tile: Tile, group: int) -> Tile:
    """With room for at least one token's heads."""
    return replace(tile, bm=max(tile.bm, block_of(group)))


def decode_tile_on(arch: str, shape: Shape) -> Tile:
    """16 rows are the least a matrix unit takes; five stages keep two blocks of keys and two of values on their way,
    as the slice table is read first."""
    if arch == "interpreter":
        return Tile(16, 64, 4, 1)
    wide = shape.wide > 128
    if shape.precise:
        return Tile(16, 16 if arch == "gfx942" else 32, 4, 1) if wide else Tile(16, 32, 4, 2)
    if arch == "gfx942":
        return Tile(16, 32, 4, 2)
    uneven = block_of(shape.d) != block_of(shape.dv)
    return Tile(16, 32, 4, 4 if uneven else 5) if wide or uneven else Tile(16, 64, 4, 5)


def forward_tile_on(arch: str, shape: Shape) -> Tile:
    if arch == "interpreter":
        return Tile(32, 32, 4, 1)
    if shape.precise:
        return Tile(32, 16, 8 if shape.wide > 128 else 4, 1)
    table = {"sm_80": Tile(128, 32, 8, 3), "gfx942": Tile(128, 32, 4, 1)}
    if shape.wide > 128:
        table = {"sm_80": Tile(64, 32, 8, 2), "gfx942": Tile(64, 16, 4, 1)}
    return table.get(arch, Tile(128, 32, 8, 2) if shape.wide > 128 else Tile(128, 64, 8, 3))


def keys_grad_tile_on(arch: str, shape: Shape) -> Tile:
    """Two accumulators of bn rows: at 256 dims only 32 of them fit sm_90's registers, too few for a warp group."""
    if arch == "interpreter":
        return Tile(32, 32, 4, 1)
    if shape.precise:
        return Tile(16, 16, 4, 1)
    if shape.wide > 128:
        table = {"sm_80": Tile(32, 32, 8, 1), "sm_90": Tile(64, 32, 8, 1), "sm_100": Tile(32, 64, 8, 1)}
        return table.get(arch, Tile(32, 32, 4, 1))
    table = {"sm_80": Tile(32, 64, 8, 2), "sm_90": Tile(32, 128, 8, 2), "sm_100": Tile(64, 128, 8, 2)}
    return table.get(arch, Tile(32, 64, 4, 1))


def queries_grad_tile_on(arch: str, shape: Shape) -> Tile:
    if arch == "interpreter":
        return Tile(32, 32, 4, 1)
    if shape.precise:
        return Tile(16, 16, 4, 1)
    if arch == "gfx942":
        return Tile(64, 32, 4, 1)
    if shape.wide > 128:
        return Tile(128, 32, 8, 1 if shape.d == shape.dv else 2) if arch == "sm_90" else Tile(64, 32, 8, 1)
    return Tile(64, 64, 8, 2) if arch == "sm_80" else Tile(128, 64, 8, 2)

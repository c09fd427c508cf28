"""The Triton tier of the head: E' and the statistics of all columns with the work done in a GEMM's epilogue."""

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops.logprob import triton_gemm as gemm
from rlhf_kernels.ops.logprob.head import Head
from rlhf_kernels.ops.logprob.triton_launch import (
    INTERPRETED,
    Tile,
    cdiv,
    chip,
    processors,
    source,
    tma_fits,
)

CHUNK_BYTES = 128 << 20  # of E'
ROWS_AT_ONCE = 16384  # bounds the scratch of a chunk for any number of rows

EXPONENTIALS = {
    "sm_80": Tile(128, 128, 64, 8, 4, 1, False, False, 8),
    "sm_90": Tile(128, 256, 64, 8, 4, 2, True, True),
    "sm_100": Tile(128, 256, 64, 8, 3, 4, True, False),
    "gfx942": Tile(128, 128, 64, 8, 2, 1, False, False, 8),
    "interpreter": Tile(32, 256, 64, 4, 1, 2, True, False, 2),
}


def without_tma(tile: Tile) -> Tile:
    """For matrices whose rows the copy engine cannot take: pointers and masks, a smaller tile."""
    return (
        Tile(128, 128, 64, 8, 4, 1, False, False, 8) if not INTERPRETED else Tile(32, 128, 64, 4, 1, 1, False, False, 2)
    )


def chunk_columns(rows: int, columns: int, itemsize: int, tile: Tile, programs: int) -> int:
    """Columns of a chunk: within CHUNK_BYTES of E', and of those the number that leaves the fewest programs idle."""
    tiles_m = cdiv(rows, tile.bm)
    most = max(2, CHUNK_BYTES // (itemsize * max(1, rows) * tile.bn))
    most = min(most, cdiv(columns, tile.bn))
    least = max(1, most - most // 4)
    busy = lambda n: tiles_m * n / (cdiv(tiles_m * n, programs) * programs)  # noqa: E731
    return tile.bn * max(range(least, most + 1), key=lambda n: (busy(n), n))


class TritonTier:
    """Serves heads whose operands the kernels take as they are; see `Tier`."""

    def exponentials(self, head: Head) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        if not served(head) or head.low_rank:
            return None
        parts = [_Exponentials(head, i).run() for i in range(0, max(1, head.rows), ROWS_AT_ONCE)]
        if len(parts) == 1:
            return parts[0]
        shift, mass, target_z, pulled = (torch.cat(column) for column in zip(*parts))
        return shift, mass, target_z, pulled


def served(head: Head) -> bool:
    """Operands of one dtype; fp32 only interpreted: the library's fp32 GEMM is the faster one."""
    x, weight = head.x, head.weight
    if head.saved is not None or head.rows == 0 or x.shape[1] == 0:
        return False
    if weight.stride(1) != 1 or x.stride(1) != 1:
        return False
    if INTERPRETED:
        return True
    return x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)


class _Exponentials:
    """The sweep of E' over the columns for rows first .. first + ROWS_AT_ONCE."""

    def __init__(self, head: Head, first: int) -> None:
        rows = slice(first, first + ROWS_AT_ONCE)
        self.x, self.target, self.temperature = head.x[rows], head.target[rows], head.temperature[rows]
        self.weight = head.weight if head.weight.dtype == self.x.dtype else head.weight.to(self.x.dtype)
        self.bias, self.scale, self.softcap = head.bias, head.scale, head.softcap
        self.width, self.columns = self.weight.shape[1], self.weight.shape[0]
        self.tile = EXPONENTIALS[chip(self.x.device)]
        if self.tile.tma and not tma_fits(self.x, self.weight):
            self.tile = without_tma(self.tile)
        rows_here, tile = len(self.x), self.tile
        self.programs = processors(self.x.device)
        # fp16 has not the range of E'; fp32 then, and W widened a chunk at a time
        self.dtype = torch.bfloat16 if self.x.dtype == torch.bfloat16 else torch.float32
        self.step = chunk_columns(rows_here, self.columns, self.dtype.itemsize, tile, self.programs)
        new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=self.x.device)  # noqa: E731
        self.e = new(rows_here, self.step, dtype=self.dtype)
        self.tops, self.sums = new(2, self.step // tile.bn, rows_here)
        self.flags = new(cdiv(rows_here, tile.bm), dtype=torch.int32)
        self.shift, self.factor = new(2, rows_here)
        self.target_z = new(rows_here, dtype=torch.float64)
        self.mass = torch.zeros_like(self.target_z)
        self.pulled = torch.zeros(rows_here, self.width, dtype=torch.float32, device=self.x.device)

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, tile = len(self.x), self.tile
        gemm.anchors[(rows,)](
            self.x, self.weight, self.bias, self.target, self.temperature, self.shift, self.target_z, self.columns,
            self.width, self.x.stride(0), self.weight.stride(0), self.scale, self.softcap,
            HAS_BIAS=self.bias is not None, CAPPED=self.softcap > 0, BLOCK=1024, num_warps=4,
        )  # fmt: skip
        by_rows = (cdiv(rows, tile.bm),)
        for start in range(0, self.columns, self.step):
            stop = min(start + self.step, self.columns)
            tiles = cdiv(stop - start, tile.bn)
            self._tiles(start, stop, False)
            gemm.settle[by_rows](self.tops, self.shift, self.factor, self.flags, tiles, rows, BM=tile.bm)
            self._tiles(start, stop, True)
            gemm.add_mass[by_rows](self.sums, self.factor, self.mass, tiles, rows, BM=tile.bm)
            if start > 0:
                gemm.rescale[by_rows](self.pulled, self.factor, self.flags, rows, self.width, BM=tile.bm, BN=512)
            self._pull(start, stop)
        return self.shift, self.mass, self.target_z, self.pulled

    def _tiles(self, start: int, stop: int, redo: bool) -> None:
        tile, rows = self.tile, len(self.x)
        options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages}
        tiles = cdiv(rows, tile.bm) * cdiv(stop - start, tile.bn)
        gemm.exponentials[(min(self.programs, tiles),)](
            source(self.x, tile, tile.bm, tile.bk), source(self.weight, tile, tile.bn, tile.bk),
            source(self.e, tile, tile.bm, tile.bn // tile.parts), self.bias, self.target, self.temperature, self.shift,
            self.flags, self.tops, self.sums, None, None, rows, self.columns, start, stop, self.width, 0,
            self.x.stride(0), self.weight.stride(0), self.e.stride(0), self.scale, self.softcap,
            HAS_BIAS=self.bias is not None, CAPPED=self.softcap > 0, RANK=False, TMA=tile.tma,
            EVEN=self.width % tile.bk == 0, REDO=redo, FLATTEN=tile.flatten and not redo, PARTS=tile.parts,
            PRECISION="ieee", BM=tile.bm, BN=tile.bn, BK=tile.bk, GROUP=tile.group, RANK_DEPTH=32, **options,
        )  # fmt: skip

    def _pull(self, start: int, stop: int) -> None:
        """pulled += E' W of the chunk, with fp32 accumulators."""
        e, w = self.e[:, : stop - start], self.weight[start:stop]
        if e.dtype == torch.float32:
            self.pulled.addmm_(e, w.float())
        else:
            torch.ops.aten.addmm.dtype_out(self.pulled, e, w, torch.float32, out=self.pulled)

"""The launches of the Triton tier: chunks of columns for the exponentials, groups of rows for the scores.

Nothing is read back by the host, and all scratch has a fixed bound.
"""

from typing import Any

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from rlhf_kernels.ops.logprob import triton_gemm as gemm
from rlhf_kernels.ops.logprob import triton_states as states
from rlhf_kernels.ops.logprob.head import Head, pull
from rlhf_kernels.ops.logprob.state import Parts
from rlhf_kernels.ops.logprob.triton_tiles import (
    EXPONENTIALS,
    FAT_EXPONENTIALS,
    PAIRS,
    SCORES,
    Tile,
    processors,
    source,
    tile_for,
)

CHUNK_BYTES = 128 << 20  # of E'
RECORD_BYTES = 128 << 20  # of the tiles' records


def chunk_columns(rows: int, columns: int, itemsize: int, tile: Tile, programs: int) -> int:
    """Columns of a chunk: within CHUNK_BYTES of E', and of those the number that leaves the fewest programs idle."""
    tiles_m = cdiv(rows, tile.bm)
    most = min(max(2, CHUNK_BYTES // (itemsize * rows * tile.bn)), cdiv(columns, tile.bn))
    least = max(1, most - most // 4)
    busy = lambda n: tiles_m * n / (cdiv(tiles_m * n, programs) * programs)  # noqa: E731
    return tile.bn * max(range(least, most + 1), key=lambda n: (busy(n), n))


def same_dtype(matrix: Tensor, x: Tensor) -> Tensor:
    """The matrix in x's dtype: a copy only under the interpreter, where operands are fp32."""
    return matrix if matrix.dtype == x.dtype else matrix.to(x.dtype)


def shaping(head: Head) -> dict[str, Any]:
    return {"HAS_BIAS": head.bias is not None, "CAPPED": head.softcap > 0}


def blocks(tile: Tile, width: int) -> dict[str, Any]:
    """What every GEMM kernel is told of its tile."""
    return {
        "TMA": tile.tma, "EVEN": width % tile.bk == 0, "PARTS": tile.parts, "PRECISION": "ieee", "BM": tile.bm,
        "BN": tile.bn, "BK": tile.bk, "GROUP": tile.group, "num_warps": tile.warps,
        "num_stages": tile.stages,
    }  # fmt: skip


class Exponentials:
    """The sweep of E' over the columns for the rows from `first` on. Scratch: a chunk of E', two numbers a row tile."""

    ROWS_AT_ONCE = 16384

    def __init__(self, head: Head, first: int) -> None:
        some = slice(first, first + self.ROWS_AT_ONCE)
        self.head, self.x, self.target, self.temperature = head, head.x[some], head.target[some], head.temperature[some]
        self.weight = same_dtype(head.weight, self.x)
        self.columns, self.width = self.weight.shape
        device, rows = self.x.device, len(self.x)
        fat = head.softcap > 0 or head.bias is not None or self.x.dtype != torch.bfloat16
        table = FAT_EXPONENTIALS if fat else EXPONENTIALS
        self.tile = tile_for(table, device, self.x, self.weight)
        self.programs = processors(device)
        # fp16 has not the range of E': fp32 then, and W is widened a chunk at a time
        dtype = torch.bfloat16 if self.x.dtype == torch.bfloat16 else torch.float32
        self.step = chunk_columns(rows, self.columns, dtype.itemsize, self.tile, self.programs)
        self.e = torch.empty(rows, self.step, dtype=dtype, device=device)
        self.tops, self.sums = torch.empty(2, self.step // self.tile.bn, rows, dtype=torch.float32, device=device)
        self.flags = torch.zeros(cdiv(rows, self.tile.bm), dtype=torch.int32, device=device)
        self.shift, self.factor = torch.empty(2, rows, dtype=torch.float32, device=device)
        self.mass, self.target_z = torch.zeros(2, rows, dtype=torch.float64, device=device)
        self.pulled = torch.zeros(rows, self.width, dtype=torch.float32, device=device)

    def run(self) -> Parts:
        rows, head, bm = len(self.x), self.head, self.tile.bm
        gemm.anchors[(rows,)](
            self.x, self.weight, head.bias, self.target, self.temperature, self.shift, self.target_z, self.columns,
            self.width, self.x.stride(0), self.weight.stride(0), head.scale, head.softcap, BLOCK=1024, num_warps=4,
            **shaping(head),
        )  # fmt: skip
        by_rows = (cdiv(rows, bm),)
        for start in range(0, self.columns, self.step):
            stop = min(start + self.step, self.columns)
            tiles = cdiv(stop - start, self.tile.bn)
            self._tiles(start, stop, tiles, redo=False)
            gemm.settle[by_rows](self.tops, self.shift, self.factor, self.flags, tiles, rows, BM=bm)
            self._tiles(start, stop, tiles, redo=True)
            gemm.add_mass[by_rows](self.sums, self.factor, self.mass, tiles, rows, BM=bm)
            if start > 0:
                gemm.rescale[by_rows](self.pulled, self.factor, self.flags, rows, self.width, BM=bm, BN=512)
            self._pull(start, stop)
        return Parts(self.shift, self.mass, self.target_z, self.pulled)

    def _tiles(self, start: int, stop: int, tiles: int, redo: bool) -> None:
        tile, head, rows = self.tile, self.head, len(self.x)
        gemm.exponentials[(min(self.programs, cdiv(rows, tile.bm) * tiles),)](
            source(self.x, tile, tile.bm, tile.bk), source(self.weight, tile, tile.bn, tile.bk),
            source(self.e, tile, tile.bm, tile.bn // tile.parts), head.bias, self.target, self.temperature, self.shift,
            self.flags, self.tops, self.sums, rows, self.columns, start, stop, self.width,
            self.x.stride(0), self.weight.stride(0), self.e.stride(0), head.scale, head.softcap,
            REDO=redo, FLATTEN=tile.flatten and not redo, UNROLL=tile.unroll, **blocks(tile, self.width),
            **shaping(head),
        )  # fmt: skip

    def _pull(self, start: int, stop: int) -> None:
        """pulled += E' W of the chunk, fp32 accumulators."""
        e, w = self.e[:, : stop - start], self.weight[start:stop]
        pull(e, w, self.pulled)


class Scores:
    """States of groups of rows, `rows_at_once` at a time so that the tiles' records stay within RECORD_BYTES.

    rkl: the reverse KL instead of KL; the kernel then takes the reference for its first side.
    """

    def __init__(self, head: Head, reference: bool, kl: bool, rkl: bool) -> None:
        self.head, self.swapped = head, rkl
        self.options = {"REFERENCE": reference, "WITH_KL": kl or rkl}
        weight = same_dtype(head.weight, head.x)
        other = head.ref_weight if reference else None
        self.own = other is not None
        sides = [
            (head.x, weight),
            (head.ref if reference else None, None if other is None else same_dtype(other, head.x)),
        ]
        (self.x, self.weight), (self.ref, self.ref_weight) = sides
        if rkl:
            self.x, self.ref = self.ref, self.x
            if self.own:
                self.weight, self.ref_weight = self.ref_weight, self.weight
        matrices = [m for side in sides for m in side if m is not None]
        self.columns, self.width = weight.shape
        self.tile = tile_for(PAIRS if reference else SCORES, head.x.device, *matrices)
        self.tiles = cdiv(self.columns, self.tile.bn)
        self.fields = 8 if kl or rkl else 6 if reference else 3
        fit = RECORD_BYTES // (4 * self.fields * self.tiles * self.tile.bm)
        groups = cdiv(cdiv(head.rows, self.tile.bm), max(1, fit))
        self.rows_at_once = self.tile.bm * cdiv(cdiv(head.rows, self.tile.bm), groups)

    def run(self, first: int) -> Tensor:
        """The state fp64 [10, rows] of the rows from `first` on."""
        head, tile, some = self.head, self.tile, slice(first, first + self.rows_at_once)
        target, device = head.target[some], head.x.device
        x, ref = (None if m is None else m[some] for m in (self.x, self.ref))
        rows = len(target)
        records = torch.empty(self.fields, self.tiles, rows, dtype=torch.float32, device=device)
        at, ref_at = torch.full((2, rows), float("-inf"), dtype=torch.float32, device=device)
        as_source = lambda m, rows: None if m is None else source(m, tile, rows, tile.bk)  # noqa: E731
        stride = lambda m: 0 if m is None else m.stride(0)  # noqa: E731
        states.statistics[(min(processors(device), cdiv(rows, tile.bm) * self.tiles),)](
            as_source(x, tile.bm), as_source(ref, tile.bm), as_source(self.weight, tile.bn),
            as_source(self.ref_weight, tile.bn), records, at, ref_at, head.bias, target, head.temperature[some],
            rows, self.columns, self.width, stride(x), stride(ref), stride(self.weight),
            stride(self.ref_weight), head.scale, head.softcap, OWN=self.own, FLATTEN=tile.flatten,
            UNROLL=tile.unroll, **self.options, **blocks(tile, self.width), **shaping(head),
        )  # fmt: skip
        state = torch.zeros(10, rows, dtype=torch.float64, device=device)
        wide = next_power_of_2(self.tiles)
        together = max(1, 1024 // wide)
        states.merge[(cdiv(rows, together),)](
            records, at, ref_at, target, state, rows, self.tiles, SWAPPED=self.swapped, COLUMNS=tile.bn, ROWS=together,
            TILES=wide, num_warps=8, **self.options,
        )  # fmt: skip
        return state

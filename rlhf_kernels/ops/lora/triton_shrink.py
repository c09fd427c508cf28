"""T = scaling_e U V_e^T, every row with its own adapter: from features down to ranks, all projections in one launch.

The forward's S (U is x, V the A of all projections side by side) and the backward's dS (U is a projection's dY, V its
B) are the same kernel. It is bound by reading U, once for every adapter that occurs in a row tile. Where row tiles are
too few for the chip, the features are split: fp32 partial sums, added in order by `joined`; no atomics.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops.logprob.triton_tiles import chip, processors
from rlhf_kernels.ops.lora.triton_launch import (
    MOST_SOURCES,
    Rows,
    ShrinkTile,
    aligned,
    padded,
    power_of_2,
    shrink_tile_on,
)
from rlhf_kernels.ops.lora.triton_parts import adapters_in, columns_before, number, occurs, rows_of_tile, source

MOST_SPLITS = 16


@triton.jit(do_not_specialize=["total", "live"])
def shrink(
    u0, u1, u2, v0, v1, v2, out, index, order, scaling, width0, width1, width2, stride0, stride1, stride2, rank0, rank1,
    rank2, columns, first, blocks, depth, total, live, n, SOURCES: tl.constexpr, ORDERED: tl.constexpr,
    RANK_FIRST: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """u_p [live, width_p], rows stride_p apart; v_p: its pack; out [splits, live, columns], of which projection p owns
    rank_p columns. Programs: row tile; projection and block of BR ranks; split of `depth` features."""
    p = tl.program_id(1) // blocks
    u, v = source(p, u0, u1, u2, SOURCES), source(p, v0, v1, v2, SOURCES)
    width = number(p, width0, width1, width2, SOURCES)
    stride = number(p, stride0, stride1, stride2, SOURCES)
    rank = number(p, rank0, rank1, rank2, SOURCES)
    r = (tl.program_id(1) - p * blocks) * BR + tl.arange(0, BR)
    real = r < rank
    row, there, adapter = rows_of_tile(index, order, tl.program_id(0) * BM, total, live, n, BM, ORDERED)
    start = tl.program_id(2) * depth
    stop = tl.minimum(start + depth, width)
    local = tl.arange(0, BK)
    left = u + row[:, None] * stride + local[None, :]
    found = tl.zeros((BM, BR), tl.float32)
    low, high = adapters_in(adapter)
    for e in range(low, high):
        mine = adapter == e
        if occurs(mine):
            base = v + tl.cast(e, tl.int64) * width * rank
            total_e = tl.zeros((BM, BR), tl.float32)
            for k in range(start, stop, BK):
                at = k + local
                if EVEN:
                    a = tl.load(left + k)
                else:
                    a = tl.load(left + k, mask=(at < stop)[None, :], other=0.0)
                if RANK_FIRST:
                    place = base + r[:, None] * width + at[None, :]
                    b = tl.load(
                        place, mask=real[:, None] if EVEN else real[:, None] & (at < stop)[None, :], other=0.0
                    ).T
                else:
                    place = base + at[:, None] * rank + r[None, :]
                    b = tl.load(place, mask=real[None, :] if EVEN else (at < stop)[:, None] & real[None, :], other=0.0)
                total_e = tl.dot(a, b, total_e, input_precision=PRECISION)
            found = tl.where(mine[:, None], total_e * tl.load(scaling + e).to(tl.float32), found)
    before = first + columns_before(p, rank0, rank1, SOURCES)
    place = out + (tl.program_id(2).to(tl.int64) * live + row)[:, None] * columns + (before + r)[None, :]
    tl.store(place, found.to(out.dtype.element_ty), mask=there[:, None] & real[None, :])


@triton.jit
def joined(parts, out, count, splits, BLOCK: tl.constexpr):
    """out [count] = the sum of parts fp32 [splits, count], in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(splits):
        total += tl.load(parts + i * tl.cast(count, tl.int64) + at, mask=at < count, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)


JOINED_BLOCK = 1024


def join(parts: Tensor, out: Tensor) -> Tensor:
    """parts fp32 [splits, ...] added up into out [...]."""
    count = out.numel()
    if count:
        joined[(triton.cdiv(count, JOINED_BLOCK),)](parts, out, count, parts.shape[0], BLOCK=JOINED_BLOCK)
    return out


def shrunk(sources: Sequence[Tensor], packs: Sequence[Tensor], rank_first: bool, rows: Rows) -> Tensor:
    """[rows.live, sum of the ranks] of the sources' dtype, from sources [>= live, width_p] and their packs."""
    ranks = [pack.shape[1 if rank_first else 2] for pack in packs]
    columns, dtype = sum(ranks), sources[0].dtype
    if rows.live == 0 or columns == 0:
        return sources[0].new_empty(rows.live, columns)
    vectors = aligned(*[number for u in sources for number in (u.shape[1], u.stride(0))])
    tile = shrink_tile_on(chip(sources[0].device), dtype, max(ranks), vectors)
    blocks = triton.cdiv(max(ranks), tile.br)
    splits, depth = _splits(tile, max(u.shape[1] for u in sources), rows, blocks * len(sources))
    parts = torch.empty(
        splits, rows.live, columns, device=rows.index.device, dtype=torch.float32 if splits > 1 else dtype
    )
    for at in range(0, len(sources), MOST_SOURCES):
        some = slice(at, at + MOST_SOURCES)
        _launch(tile, sources[some], packs[some], ranks[some], parts, sum(ranks[:at]), blocks, depth, rank_first, rows)
    return parts[0] if splits == 1 else join(parts, torch.empty_like(parts[0], dtype=dtype))


def _splits(tile: ShrinkTile, width: int, rows: Rows, programs: int) -> tuple[int, int]:
    """Into how many parts the features are split, and how long a part is."""
    programs *= triton.cdiv(rows.total, tile.bm)
    wanted = min(MOST_SPLITS, processors(rows.index.device) // programs, triton.cdiv(width, 4 * tile.bk))
    splits = power_of_2(max(1, wanted), up=False)
    return splits, triton.cdiv(triton.cdiv(width, splits), tile.bk) * tile.bk


def _launch(
    tile: ShrinkTile, sources: Sequence[Tensor], packs: Sequence[Tensor], ranks: Sequence[int], out: Tensor, first: int,
    blocks: int, depth: int, rank_first: bool, rows: Rows,
) -> None:  # fmt: skip
    widths = [u.shape[1] for u in sources]
    grid = (triton.cdiv(rows.total, tile.bm), len(sources) * blocks, out.shape[0])
    shrink[grid](
        *padded(sources), *padded(packs), out, rows.index, rows.order, rows.scaling, *padded(widths),
        *padded([u.stride(0) for u in sources]), *padded(ranks), out.shape[2], first, blocks, depth, rows.total,
        rows.live, rows.adapters, SOURCES=len(sources), ORDERED=rows.order is not None, RANK_FIRST=rank_first,
        EVEN=all(width % tile.bk == 0 for width in widths), PRECISION="ieee", BM=tile.bm, BR=tile.br, BK=tile.bk,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip

"""An adapter's gradient: G_e = sum over its rows of U_i T_i, features by ranks, for all projections in one launch.

dA (U is x, T is dS) and dB (U is a projection's dY, T its S) are the same kernel. A program owns some features of one
adapter and a part of that adapter's span of rows; rows of others are masked in the loads, so they are neither read nor
multiplied. Parts are fp32 partial sums, added in order by `joined`: no atomics, the same bits in every run.

dB does not share its read of dY with dS: a row tile of BM rows would leave 4 N r bytes of partial dB for its 2 BM N
bytes of dY, which is no gain from r = BM / 4 on and a small one below.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops.logprob.triton_tiles import chip, processors
from rlhf_kernels.ops.lora.triton_launch import (
    MOST_SOURCES,
    OuterTile,
    Rows,
    aligned,
    outer_tile_on,
    padded,
    power_of_2,
)
from rlhf_kernels.ops.lora.triton_parts import LAST, columns_before, number, source
from rlhf_kernels.ops.lora.triton_shrink import join

MOST_SPLITS = 32
SPAN_BLOCK = 2048


@triton.jit(do_not_specialize=["total", "live"])
def find_spans(index, order, spans, total, live, ORDERED: tl.constexpr, BLOCK: tl.constexpr):
    """spans int32 [n, 2]: the positions between which an adapter's rows lie, 0, 0 where it has none."""
    low, high = LAST, -1
    for start in range(0, total, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < total
        row = at
        if ORDERED:
            row = tl.load(order + at, mask=there, other=0)
        there = there & (row < live)
        hit = there & (tl.load(index + tl.where(there, row, 0), mask=there, other=-1) == tl.program_id(0))
        low = tl.minimum(low, tl.min(tl.where(hit, at, LAST)))
        high = tl.maximum(high, tl.max(tl.where(hit, at, -1)))
    tl.store(spans + 2 * tl.program_id(0), tl.where(high < 0, 0, low))
    tl.store(spans + 2 * tl.program_id(0) + 1, high + 1)


@triton.jit(do_not_specialize=["total", "live"])
def outer(
    t, u0, u1, u2, out, spans, index, order, width0, width1, width2, stride0, stride1, stride2, rank0, rank1, rank2,
    place0, place1, place2, columns, first, size, blocks, splits, total, live, n, SOURCES: tl.constexpr,
    ORDERED: tl.constexpr, RANK_FIRST: tl.constexpr, PRECISION: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """out fp32 [splits, size]; projection p's pack [n, rank, width] or [n, width, rank] from place_p on.

    Programs: tile of features and block of ranks; projection and adapter; split.
    """
    p = tl.program_id(1) // n
    e = tl.program_id(1) - p * n
    u = source(p, u0, u1, u2, SOURCES)
    width = number(p, width0, width1, width2, SOURCES)
    stride = number(p, stride0, stride1, stride2, SOURCES)
    rank = number(p, rank0, rank1, rank2, SOURCES)
    tile = tl.program_id(0) // blocks
    c = tile * BC + tl.arange(0, BC)
    r = (tl.program_id(0) - tile * blocks) * BR + tl.arange(0, BR)
    low, high = tl.load(spans + 2 * e), tl.load(spans + 2 * e + 1)
    length = tl.cdiv(tl.cdiv(high - low, splits), BM) * BM
    start = low + tl.program_id(2) * length
    stop = tl.minimum(start + length, high)
    before = first + columns_before(p, rank0, rank1, SOURCES)
    total_e = tl.zeros((BC, BR), tl.float32)
    for position in range(start, stop, BM):
        at = position + tl.arange(0, BM)
        there = at < stop
        row = at
        if ORDERED:
            row = tl.load(order + at, mask=there, other=0)
        there = there & (row < live)
        row = tl.where(there, row, 0).to(tl.int64)
        mine = tl.load(index + row, mask=there, other=-1) == e
        left = tl.load(u + row[:, None] * stride + c[None, :], mask=mine[:, None] & (c < width)[None, :], other=0.0)
        right = tl.load(t + row[:, None] * columns + (before + r)[None, :], mask=mine[:, None] & (r < rank)[None, :],
                        other=0.0)  # fmt: skip
        total_e = tl.dot(left.T, right, total_e, input_precision=PRECISION)
    base = out + tl.program_id(2).to(tl.int64) * size + number(p, place0, place1, place2, SOURCES)
    base += tl.cast(e, tl.int64) * width * rank
    keep = (c < width)[:, None] & (r < rank)[None, :]
    if RANK_FIRST:
        tl.store(base + r.to(tl.int64)[None, :] * width + c[:, None], total_e, mask=keep)
    else:
        tl.store(base + c.to(tl.int64)[:, None] * rank + r[None, :], total_e, mask=keep)


def spans_of(rows: Rows) -> Tensor:
    """int32 [n, 2], see `find_spans`."""
    spans = torch.empty(rows.adapters, 2, device=rows.index.device, dtype=torch.int32)
    find_spans[(rows.adapters,)](
        rows.index, rows.order, spans, rows.total, rows.live, ORDERED=rows.order is not None, BLOCK=SPAN_BLOCK
    )
    return spans


def outer_products(
    sources: Sequence[Tensor], t: Tensor, ranks: Sequence[int], rank_first: bool, rows: Rows, spans: Tensor
) -> list[Tensor]:
    """fp32 packs of the sources [>= live, width_p] with t [>= live, sum of the ranks], one a source."""
    widths, n = [u.shape[1] for u in sources], rows.adapters
    sizes = [n * width * rank for width, rank in zip(widths, ranks)]
    shape = [(n, r, c) if rank_first else (n, c, r) for c, r in zip(widths, ranks)]
    places = [sum(sizes[:p]) for p in range(len(sizes))]
    if rows.live == 0 or sum(sizes) == 0:
        return [torch.zeros(s, device=t.device, dtype=torch.float32) for s in shape]
    vectors = aligned(*ranks, *[number for u in sources for number in (u.shape[1], u.stride(0))])
    tile = outer_tile_on(chip(t.device), t.dtype, max(ranks), vectors)
    grid = (triton.cdiv(max(widths), tile.bc) * triton.cdiv(max(ranks), tile.br), len(sources) * n)
    wanted = min(MOST_SPLITS, 2 * processors(t.device) // (grid[0] * grid[1]), triton.cdiv(rows.live, 2 * tile.bm))
    splits = power_of_2(max(1, wanted), up=False)
    parts = torch.empty(splits, sum(sizes), device=t.device, dtype=torch.float32)
    for at in range(0, len(sources), MOST_SOURCES):
        some = slice(at, at + MOST_SOURCES)
        _launch(tile, sources[some], t, ranks[some], places[some], sum(ranks[:at]), rank_first, rows, spans, parts)
    whole = parts[0] if splits == 1 else join(parts, torch.empty_like(parts[0]))
    return [whole[place : place + size].view(s) for place, size, s in zip(places, sizes, shape)]


def _launch(
    tile: OuterTile, sources: Sequence[Tensor], t: Tensor, ranks: Sequence[int], places: Sequence[int], first: int,
    rank_first: bool, rows: Rows, spans: Tensor, parts: Tensor,
) -> None:  # fmt: skip
    widths = [u.shape[1] for u in sources]
    blocks = triton.cdiv(max(ranks), tile.br)
    grid = (triton.cdiv(max(widths), tile.bc) * blocks, len(sources) * rows.adapters, parts.shape[0])
    outer[grid](
        t, *padded(sources), parts, spans, rows.index, rows.order, *padded(widths),
        *padded([u.stride(0) for u in sources]), *padded(ranks), *padded(places), t.shape[1], first, parts.shape[1],
        blocks, parts.shape[0], rows.total, rows.live, rows.adapters, SOURCES=len(sources),
        ORDERED=rows.order is not None, RANK_FIRST=rank_first, PRECISION="ieee", BC=tile.bc, BR=tile.br, BM=tile.bm,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip

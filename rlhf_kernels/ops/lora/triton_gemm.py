"""The base product and its adapters in one kernel: y = x W^T + T_e V_e + bias, rounded once.

The adapters' share comes first, apart (see `triton_parts.expanded`), and starts the accumulator; the loop over the
features then runs as any GEMM's. So a row's bits do not depend on which adapters its tile holds, and the select takes
registers only while the accumulator is still empty. The same kernel gives dX = sum_p dY_p W_p + dS_e A_e.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops.logprob.triton_sums import halves
from rlhf_kernels.ops.logprob.triton_tiles import Tile, chip, processors, tma_fits
from rlhf_kernels.ops.logprob.triton_tiles import source as block_source
from rlhf_kernels.ops.lora.triton_launch import MOST_SOURCES, Rows, aligned, gemm_ranks_on, gemm_tile_on, padded
from rlhf_kernels.ops.lora.triton_parts import bias_of, expanded, rows_of_tile


@triton.jit
def tile_of(index, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row tile and column tile: GROUP row tiles walk over the columns together, which lets them share W in L2."""
    in_group = GROUP * tiles_n
    group = index // in_group
    first = group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    local = index - group * in_group
    return first + local % size, local // size


@triton.jit
def started(
    t, v, row, adapter, columns, first, column, width, rank, M: tl.constexpr, N: tl.constexpr, BR: tl.constexpr,
    RANK_FIRST: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`expanded` in PARTS parts of the columns, one after the other, which takes fewer registers."""
    if PARTS == 1:
        return expanded(t, v, row, adapter, columns, first, column, width, rank, M, N, BR, RANK_FIRST, PRECISION)
    else:
        low = started(t, v, row, adapter, columns, first, column, width, rank, M, N // 2, BR, RANK_FIRST, PRECISION,
                      PARTS // 2)  # fmt: skip
        high = started(t, v, row, adapter, columns, first, column + N // 2, width, rank, M, N // 2, BR, RANK_FIRST,
                       PRECISION, PARTS // 2)  # fmt: skip
        return tl.join(low, high).permute(0, 2, 1).reshape(M, N)


@triton.jit
def multiplied(
    acc, u, w, row, row_start, column_start, depth, width, stride_u, stride_w, TURNED: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] + u W^T: u rows of `depth`; w [width, depth], TURNED [depth, width] (TMA: descriptors of both; else
    `depth` is a multiple of BK)."""
    local = tl.arange(0, BK)
    column = column_start + tl.arange(0, BN)
    for k in range(0, depth, BK):
        if TMA:
            a = u.load([row_start, k])
            if TURNED:
                b = w.load([k, column_start])
            else:
                b = w.load([column_start, k]).T
        else:
            a = tl.load(u + row[:, None] * stride_u + (k + local)[None, :])
            if TURNED:
                place = w + (k + local).to(tl.int64)[:, None] * stride_w + column[None, :]
                b = tl.load(place, mask=(column < width)[None, :], other=0.0)
            else:
                last = tl.minimum(column, width - 1).to(tl.int64)  # the last column again beyond the end
                b = tl.load(w + last[:, None] * stride_w + (k + local)[None, :]).T
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["total", "live"])
def gemm(
    u0, u1, u2, w0, w1, w2, out, t, v, bias, index, order, depth0, depth1, depth2, stride_u0, stride_u1, stride_u2,
    stride_w0, stride_w1, stride_w2, width, columns, first, rank, total, live, n, SOURCES: tl.constexpr,
    ORDERED: tl.constexpr, TURNED: tl.constexpr, RANK_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, TMA: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [live, width] from SOURCES pairs u_p [live, depth_p], w_p, summed; t [live, columns] and the pack v of `rank`
    from column `first` on."""
    tiles_m, tiles_n = tl.cdiv(total, BM), tl.cdiv(width, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP)
        row_start, column_start = tile_m * BM, tile_n * BN
        row, there, adapter = rows_of_tile(index, order, row_start, total, live, n, BM, ORDERED)
        acc = started(t, v, row, adapter, columns, first, column_start, width, rank, BM, BN, BR, RANK_FIRST, PRECISION,
                      PARTS)  # fmt: skip
        acc = multiplied(acc, u0, w0, row, row_start, column_start, depth0, width, stride_u0, stride_w0, TURNED, TMA,
                         PRECISION, BM, BN, BK)  # fmt: skip
        if SOURCES > 1:
            acc = multiplied(acc, u1, w1, row, row_start, column_start, depth1, width, stride_u1, stride_w1, TURNED,
                             TMA, PRECISION, BM, BN, BK)  # fmt: skip
        if SOURCES > 2:
            acc = multiplied(acc, u2, w2, row, row_start, column_start, depth2, width, stride_u2, stride_w2, TURNED,
                             TMA, PRECISION, BM, BN, BK)  # fmt: skip
        if HAS_BIAS:
            acc += bias_of(bias, column_start, width, BN, HAS_BIAS)
        if TMA:
            if PARTS == 1:
                out.store([row_start, column_start], acc.to(out.dtype))
            else:
                left, right = halves(acc, BM, BN)
                out.store([row_start, column_start], left.to(out.dtype))
                out.store([row_start, column_start + BN // 2], right.to(out.dtype))
        else:
            at = column_start + tl.arange(0, BN)
            place = out + row[:, None] * width + at[None, :]
            tl.store(place, acc.to(out.dtype.element_ty), mask=there[:, None] & (at < width)[None, :])


def fits(sources: Sequence[Tensor], weights: Sequence[Tensor], rows: Rows) -> bool:
    """Whether the kernel takes these: weights all stored by rows or all by columns, rows as its tile loads them."""
    if not 0 < len(sources) <= MOST_SOURCES or rows.live == 0 or any(min(w.shape) == 0 for w in weights):
        return False
    turned = {w.stride(1) != 1 for w in weights}
    held = [w.t() if w.stride(1) != 1 else w for w in weights]
    tile = _tile(rows, weights)
    width = weights[0].shape[0]
    if tile is None or len(turned) > 1 or any(w.stride(1) != 1 for w in held):
        return False
    if not tma_fits(*sources, *held) or width * sources[0].element_size() % 16 != 0:
        return False
    if tile.tma:
        return True
    even = all(u.shape[1] % tile.bk == 0 for u in sources)
    return even and aligned(width, *[matrix.stride(0) for matrix in (*sources, *held)])


def _tile(rows: Rows, weights: Sequence[Tensor]) -> Tile | None:
    return gemm_tile_on(
        chip(rows.index.device), rows.order is not None, len(weights) > 1, weights[0].stride(1) != 1
    )  # fmt: skip


def product(
    sources: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    t: Tensor,
    first: int,
    pack: Tensor,
    rank_first: bool,
    out: Tensor,
    rows: Rows,
) -> None:
    """Rows below rows.live of out [>= live, N] = sum_p u_p W_p^T + t's columns from `first` on through the pack + bias.

    sources [>= live, K_p], weights [N, K_p], each of one of both orders; t [>= live, columns].
    """
    turned = weights[0].stride(1) != 1
    held = [w.t() if turned else w for w in weights]
    sources, target = [u[: rows.live] for u in sources], out[: rows.live]
    tile = _tile(rows, weights)
    assert tile is not None
    arguments = operands(tile, sources, held, target, turned)
    depths, rank, width = [u.shape[1] for u in sources], pack.shape[1 if rank_first else 2], out.shape[1]
    tiles = triton.cdiv(rows.total, tile.bm) * triton.cdiv(width, tile.bn)
    programs = min(tiles, processors(out.device)) if tile.tma else tiles
    gemm[(programs,)](
        *arguments, t, pack, bias, rows.index, rows.order, *padded(depths), *padded([u.stride(0) for u in sources]),
        *padded([w.stride(0) for w in held]), width, t.shape[1], first, rank, rows.total, rows.live, rows.adapters,
        SOURCES=len(sources), ORDERED=rows.order is not None, TURNED=turned, RANK_FIRST=rank_first,
        HAS_BIAS=bias is not None, TMA=tile.tma, PARTS=tile.parts, PRECISION="ieee", BM=tile.bm, BN=tile.bn,
        BK=tile.bk, BR=gemm_ranks_on(chip(out.device), rank), GROUP=tile.group, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip


def operands(
    tile: Tile, sources: Sequence[Tensor], held: Sequence[Tensor], out: Tensor, turned: bool
) -> tuple[object, ...]:
    """u0 .. out as the kernel takes them: matrices, or their descriptors."""
    shape = (tile.bk, tile.bn) if turned else (tile.bn, tile.bk)
    us = [block_source(u, tile, tile.bm, tile.bk) for u in sources]
    ws = [block_source(w, tile, *shape) for w in held]
    return *padded(us), *padded(ws), block_source(out, tile, tile.bm, tile.bn // min(tile.parts, 2))

"""The head's GEMM with the exponentials in its epilogue: tiles of fp32 logits become E' = e^(z - shift) and their sums
while they are still in registers; no logit is stored.

One program takes tile after tile (persistent), so the loads of the next tile run under the epilogue of the last. The
columns are swept in chunks. After a chunk `settle` raises the shift of rows whose top exceeds it by 60; a second launch
then redoes the row tiles that hold such a row, and leaves the others at once: nothing is read back by the host.
Sums of a tile go to memory and are added in fp64 in the order of the columns: no atomics, the same bits in every run.
"""

import triton
import triton.language as tl

from rlhf_kernels.ops.logprob.triton_sums import exp, halves, part, shaped


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
def rows_of(source, start, limit, stride, ROWS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr):
    """Pointers [ROWS, DEPTH] to rows from `start` on, the last one again beyond the end; a descriptor as it is."""
    if TMA:
        return source
    else:
        row = tl.minimum(start + tl.arange(0, ROWS), limit - 1).to(tl.int64)
        return source + row[:, None] * stride + tl.arange(0, DEPTH)[None, :]


@triton.jit
def operand(source, row, k, width, DEPTH: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr):
    """Columns k .. k + DEPTH of the rows that `rows_of` points to."""
    if TMA:
        return source.load([row, k])
    elif EVEN:
        return tl.load(source + k)
    else:
        return tl.load(source + k, mask=(k + tl.arange(0, DEPTH) < width)[None, :], other=0.0)


@triton.jit
def bias_of(bias, start, stop, N: tl.constexpr, HAS_BIAS: tl.constexpr):
    """fp32 bias of columns start .. start + N, 0 without one and beyond stop."""
    column = start + tl.arange(0, N)
    if HAS_BIAS:
        return tl.load(bias + column, mask=column < stop, other=0.0).to(tl.float32)
    else:
        return (column * 0).to(tl.float32)


@triton.jit
def exp_part(
    raw, out, row_start, column_start, start, stop, rows, stride_out, bias, target, cooling, shift, scale, softcap,
    M: tl.constexpr, N: tl.constexpr, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Stores E' of raw logits [M, N] and returns their rows' tops and sums; target, cooling, shift [M]."""
    z = shaped(raw, bias_of(bias, column_start, stop, N, HAS_BIAS), scale, softcap, cooling, CAPPED)
    local = tl.arange(0, N)
    real = (local < stop - column_start)[None, :]
    top = tl.max(tl.where(real, z, float("-inf")), 1)
    e = tl.where(real & (local[None, :] != (target - column_start)[:, None]), exp(z - shift[:, None]), 0.0)
    total = tl.sum(e, 1)
    if CAPPED:
        t = z * (1 / (softcap * cooling))[:, None]
        e *= 1 - t * t
    if TMA:
        out.store([row_start, column_start - start], e.to(out.dtype))
    else:
        row = row_start + tl.arange(0, M)
        place = out + row.to(tl.int64)[:, None] * stride_out + (column_start - start + local)[None, :]
        tl.store(place, e.to(out.dtype.element_ty), mask=(row < rows)[:, None])
    return top, total


@triton.jit
def exp_parts(
    raw, out, row_start, column_start, start, stop, rows, stride_out, bias, target, cooling, shift, scale, softcap,
    M: tl.constexpr, N: tl.constexpr, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, TMA: tl.constexpr,
    PARTS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """`exp_part` in PARTS parts: unrolled, or a loop, which takes fewer registers."""
    if PARTS == 1:
        return exp_part(raw, out, row_start, column_start, start, stop, rows, stride_out, bias, target, cooling, shift,
                        scale, softcap, M, N, HAS_BIAS, CAPPED, TMA)  # fmt: skip
    elif UNROLL:
        low, high = halves(raw, M, N)
        top, total = exp_parts(low, out, row_start, column_start, start, stop, rows, stride_out, bias, target, cooling,
                               shift, scale, softcap, M, N // 2, HAS_BIAS, CAPPED, TMA, PARTS // 2,
                               UNROLL)  # fmt: skip
        other_top, other = exp_parts(high, out, row_start, column_start + N // 2, start, stop, rows, stride_out, bias,
                                     target, cooling, shift, scale, softcap, M, N // 2, HAS_BIAS, CAPPED, TMA,
                                     PARTS // 2, UNROLL)  # fmt: skip
        return tl.maximum(top, other_top), total + other
    else:
        top, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
        for i in range(PARTS):
            other_top, other = exp_part(
                part(raw, i, M, N, PARTS), out, row_start, column_start + i * (N // PARTS), start, stop, rows,
                stride_out, bias, target, cooling, shift, scale, softcap, M, N // PARTS, HAS_BIAS, CAPPED, TMA,
            )  # fmt: skip
            top, total = tl.maximum(top, other_top), total + other
        return top, total


@triton.jit
def exp_tile(
    acc, out, tops, sums, bias, target, temperature, shift, row_start, column_start, tile_n,
    rows, start, stop, stride_out, scale, softcap,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, TMA: tl.constexpr, PARTS: tl.constexpr, UNROLL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The epilogue of one tile of `exponentials`."""
    row = row_start + tl.arange(0, BM)
    inside = row < rows
    y = tl.load(target + row, mask=inside, other=-1).to(tl.int32)
    cooling = 1 / tl.load(temperature + row, mask=inside, other=1.0)
    c = tl.load(shift + row, mask=inside, other=0.0)
    top, total = exp_parts(acc, out, row_start, column_start, start, stop, rows, stride_out, bias, y, cooling, c, scale,
                           softcap, BM, BN, HAS_BIAS, CAPPED, TMA, PARTS, UNROLL)  # fmt: skip
    place = tile_n * rows + row
    tl.store(tops + place, top, mask=inside)
    tl.store(sums + place, total, mask=inside)


@triton.jit
def exponentials(
    x, w, out, bias, target, temperature, shift, flags, tops, sums,
    rows, columns, start, stop, width, stride_x, stride_w, stride_out, scale, softcap,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    REDO: tl.constexpr, FLATTEN: tl.constexpr, UNROLL: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """E' of columns start .. stop: x [rows, width], w [columns, width] (TMA: their descriptors), out [rows, stride_out]
    from column `start` on, columns up to the next multiple of BN written as 0; tops, sums fp32 [tiles, rows].

    REDO: only row tiles with flags [row tiles] != 0.
    """
    tiles_m, tiles_n = tl.cdiv(rows, BM), tl.cdiv(stop - start, BN)
    tiles = tiles_m * tiles_n
    if REDO:
        found = 0
        for i in range(0, tiles_m, 1024):
            place = i + tl.arange(0, 1024)
            found = tl.maximum(found, tl.max(tl.load(flags + place, mask=place < tiles_m, other=0)))
        tiles = tl.where(found > 0, tiles, 0)
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = tile_of(index, tiles_m, tiles_n, GROUP)
        row_start, column_start = tile_m * BM, start + tile_n * BN
        depth = width
        if REDO:
            depth = tl.where(tl.load(flags + tile_m) > 0, width, 0)
        left = rows_of(x, row_start, rows, stride_x, BM, BK, TMA)
        right = rows_of(w, column_start, columns, stride_w, BN, BK, TMA)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, depth, BK):
            a = operand(left, row_start, k, width, BK, TMA, EVEN)
            acc = tl.dot(a, operand(right, column_start, k, width, BK, TMA, EVEN).T, acc, input_precision=PRECISION)
        if REDO:
            if depth > 0:
                exp_tile(acc, out, tops, sums, bias, target, temperature, shift, row_start, column_start, tile_n, rows,
                         start, stop, stride_out, scale, softcap, HAS_BIAS, CAPPED, TMA, PARTS, UNROLL, BM,
                         BN)  # fmt: skip
        else:
            exp_tile(acc, out, tops, sums, bias, target, temperature, shift, row_start, column_start, tile_n, rows,
                     start, stop, stride_out, scale, softcap, HAS_BIAS, CAPPED, TMA, PARTS, UNROLL, BM, BN)  # fmt: skip


@triton.jit
def settle(tops, shift, factor, flags, tiles_n, rows, BM: tl.constexpr):
    """Raises shift [rows] to the row's top where that exceeds it by 60; factor = e^(old - new), flags per BM rows."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < rows
    top = tl.full((BM,), float("-inf"), tl.float32)
    for tile in range(tiles_n):
        top = tl.maximum(top, tl.load(tops + tile * rows + row, mask=inside, other=float("-inf")))
    old = tl.load(shift + row, mask=inside, other=0.0)
    raised = inside & (top - old > 60)
    tl.store(shift + row, tl.where(raised, top, old), mask=inside)
    tl.store(factor + row, tl.where(raised, exp(tl.where(raised, old - top, 0.0)), 1.0), mask=inside)
    tl.store(flags + tl.program_id(0), tl.max(raised.to(tl.int32)))


@triton.jit
def add_mass(sums, factor, mass, tiles_n, rows, BM: tl.constexpr):
    """mass [rows] fp64 = mass * factor + the tiles' sums, added in the order of the columns."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < rows
    total = tl.load(mass + row, mask=inside, other=0.0) * tl.load(factor + row, mask=inside, other=1.0).to(tl.float64)
    for tile in range(tiles_n):
        total += tl.load(sums + tile * rows + row, mask=inside, other=0.0).to(tl.float64)
    tl.store(mass + row, total, mask=inside)


@triton.jit
def rescale(pulled, factor, flags, rows, width, BM: tl.constexpr, BN: tl.constexpr):
    """Multiplies rows of pulled [rows, width] by factor, only in row tiles whose flag is set."""
    if tl.load(flags + tl.program_id(0)) > 0:
        for i in range(0, BM, 8):
            row = tl.program_id(0) * BM + i + tl.arange(0, 8)
            f = tl.load(factor + row, mask=row < rows, other=1.0)
            for j in range(0, width, BN):
                column = j + tl.arange(0, BN)
                inside = (row < rows)[:, None] & (column < width)[None, :]
                place = pulled + row.to(tl.int64)[:, None] * width + column[None, :]
                tl.store(place, tl.load(place, mask=inside) * f[:, None], mask=inside)


@triton.jit
def anchors(
    x, w, bias, target, temperature, z, target_z, columns, width, stride_x, stride_w, scale, softcap,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z fp32 [rows]: the logit of the target, or of another column where the target is not among them; target_z fp64
    [rows]: the target's, else -inf. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row)
    here = (y >= 0) & (y < columns)
    column = tl.where(here, y, row % columns)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, width, BLOCK):
        at = k + tl.arange(0, BLOCK)
        left = tl.load(x + row * stride_x + at, mask=at < width, other=0.0).to(tl.float32)
        total += left * tl.load(w + column * stride_w + at, mask=at < width, other=0.0).to(tl.float32)
    raw = tl.zeros((1, 1), tl.float32) + tl.sum(total, 0)
    added = tl.zeros((1,), tl.float32)
    if HAS_BIAS:
        added += tl.load(bias + column).to(tl.float32)
    cooling = 1 / (tl.zeros((1,), tl.float32) + tl.load(temperature + row))
    value = shaped(raw, added, scale, softcap, cooling, CAPPED)
    found = tl.max(tl.max(value, 1), 0)
    tl.store(z + row, found)
    tl.store(target_z + row, tl.where(here, found.to(tl.float64), float("-inf")))

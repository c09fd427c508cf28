"""The head's GEMM with the statistics in its epilogue, for scoring: a tile of fp32 logits leaves a few numbers a row.

Two sides (policy and reference; for the reverse KL the other way round) are computed together and share W. A tile's
record, fp32 [fields, tiles, rows]: of each side the top m and, without the top, r = sum e^(z-m), u = sum e^(z-m) (z-m);
the second's log-mass less the first's, and KL(first || second) within the tile. `merge` joins a row's tiles by the
chain rule (see `state`) in fp64.
"""

import triton
import triton.language as tl

from rlhf_kernels.ops.logprob.triton_gemm import bias_of, operand, rows_of, tile_of
from rlhf_kernels.ops.logprob.triton_sums import (
    LOWEST,
    divergence,
    exp,
    halves,
    joined_mass,
    joined_ratio,
    log1p,
    part,
    ratio,
    ratio_terms,
    shaped,
    without_top,
)

TOP, SUM, MOMENT, REF_TOP, REF_SUM, REF_MOMENT, DIFFERENCE, KL = (tl.constexpr(i) for i in range(8))


@triton.jit
def masked(raw, bias, scale, softcap, cooling, left, N: tl.constexpr, CAPPED: tl.constexpr):
    """z of raw logits [M, N], LOWEST from column `left` on."""
    z = shaped(raw, bias, scale, softcap, cooling, CAPPED)
    return tl.where((tl.arange(0, N) < left)[None, :], z, LOWEST)


@triton.jit
def store_target(z, at, row, target, rows, N: tl.constexpr):
    """at [rows] = z [M, N] in column target [M] where that lies in 0 .. N."""
    hit = tl.arange(0, N)[None, :] == target[:, None]
    here = (target >= 0) & (target < N) & (row < rows)
    tl.store(at + row, tl.max(tl.where(hit, z, float("-inf")), 1), mask=here)


@triton.jit
def alone(
    raw, at, has_target, bias, target, cooling, row, rows, column, columns, scale, softcap, M: tl.constexpr,
    N: tl.constexpr, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, PARTS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Top and `without_top` of raw logits [M, N], columns from `column` on, in PARTS parts: unrolled, or a
    loop, which takes fewer registers."""
    if PARTS == 1:
        b = bias_of(bias, column, columns, N, HAS_BIAS)
        z = masked(raw, b, scale, softcap, cooling, columns - column, N, CAPPED)
        if has_target:
            store_target(z, at, row, target - column, rows, N)
        m = tl.max(z, 1)
        r, u = without_top(z, m)
        return m, r, u
    elif UNROLL:
        low, high = halves(raw, M, N)
        m, r, u = alone(low, at, has_target, bias, target, cooling, row, rows, column, columns, scale, softcap, M,
                        N // 2, HAS_BIAS, CAPPED, PARTS // 2, UNROLL)  # fmt: skip
        m2, r2, u2 = alone(high, at, has_target, bias, target, cooling, row, rows, column + N // 2, columns, scale,
                           softcap, M, N // 2, HAS_BIAS, CAPPED, PARTS // 2, UNROLL)  # fmt: skip
        return joined_mass(m, r, u, m2, r2, u2)
    else:
        m = tl.full((M,), LOWEST, tl.float32)
        r, u = m * 0, m * 0
        for i in range(PARTS):
            m2, r2, u2 = alone(part(raw, i, M, N, PARTS), at, has_target, bias, target, cooling, row, rows,
                               column + i * (N // PARTS), columns, scale, softcap, M, N // PARTS, HAS_BIAS, CAPPED, 1,
                               UNROLL)  # fmt: skip
            m, r, u = joined_mass(m, r, u, m2, r2, u2)
        return m, r, u


@triton.jit
def together(
    raw, raw_ref, at, ref_at, has_target, bias, target, cooling, row, rows, column, columns, scale, softcap,
    M: tl.constexpr, N: tl.constexpr, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, WITH_KL: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The same of two sides, then KL(first || second) and the log ratio of the second's mass to the first's (0 without
    WITH_KL). A loop, because two accumulators leave no registers to work on several parts at once."""
    m = tl.full((M,), LOWEST, tl.float32)
    r, u, mr, rr, ur, kl, d = m * 0, m * 0, m, m * 0, m * 0, m * 0, m * 0
    WIDE: tl.constexpr = N // PARTS
    for i in range(PARTS):
        start = column + i * WIDE
        b = bias_of(bias, start, columns, WIDE, HAS_BIAS)
        z = masked(part(raw, i, M, N, PARTS), b, scale, softcap, cooling, columns - start, WIDE, CAPPED)
        zr = masked(part(raw_ref, i, M, N, PARTS), b, scale, softcap, cooling, columns - start, WIDE, CAPPED)
        if has_target:
            store_target(z, at, row, target - start, rows, WIDE)
            store_target(zr, ref_at, row, target - start, rows, WIDE)
        top, ref_top = tl.max(z, 1), tl.max(zr, 1)
        rest, moment = without_top(z, top)
        ref_rest, ref_moment = without_top(zr, ref_top)
        if WITH_KL:
            part_kl, part_d = ratio(z, zr, top, rest, ref_top + log1p(ref_rest))
            kl, d = joined_ratio(m + log1p(r), kl, d, top + log1p(rest), part_kl, part_d)
        m, r, u = joined_mass(m, r, u, top, rest, moment)
        mr, rr, ur = joined_mass(mr, rr, ur, ref_top, ref_rest, ref_moment)
    return m, r, u, mr, rr, ur, kl, d


@triton.jit
def record(
    raw, raw_ref, out, at, ref_at, bias, target, cooling, row, rows, column, columns, tile, tiles, scale, softcap,
    M: tl.constexpr, N: tl.constexpr, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, REFERENCE: tl.constexpr,
    WITH_KL: tl.constexpr, PARTS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Stores the record of raw logits [M, N] of columns from `column` on; row, target [M]."""
    inside = row < rows
    place = out + tile * rows + row.to(tl.int64)
    field = rows * tiles
    has_target = tl.max((inside & (target >= column) & (target < column + N)).to(tl.int32)) > 0  # in few tiles
    if REFERENCE:
        m, r, u, mr, rr, ur, kl, d = together(
            raw, raw_ref, at, ref_at, has_target, bias, target, cooling, row, rows, column, columns, scale, softcap,
            M, N, HAS_BIAS, CAPPED, WITH_KL, PARTS,
        )  # fmt: skip
        tl.store(place + field * REF_TOP, mr, mask=inside)
        tl.store(place + field * REF_SUM, rr, mask=inside)
        tl.store(place + field * REF_MOMENT, ur, mask=inside)
        if WITH_KL:
            tl.store(place + field * DIFFERENCE, d, mask=inside)
            tl.store(place + field * KL, kl, mask=inside)
    else:
        m, r, u = alone(raw, at, has_target, bias, target, cooling, row, rows, column, columns, scale, softcap, M, N,
                        HAS_BIAS, CAPPED, PARTS, UNROLL)  # fmt: skip
    tl.store(place + field * TOP, m, mask=inside)
    tl.store(place + field * SUM, r, mask=inside)
    tl.store(place + field * MOMENT, u, mask=inside)


@triton.jit
def statistics(
    x, ref, w, ref_w, out, at, ref_at, bias, target, temperature,
    rows, columns, width, stride_x, stride_ref, stride_w, stride_ref_w, scale, softcap,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    REFERENCE: tl.constexpr, OWN: tl.constexpr, WITH_KL: tl.constexpr, FLATTEN: tl.constexpr,
    UNROLL: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Records of all columns: x, ref [rows, width], w, ref_w [columns, width] (TMA: their descriptors), out
    [fields, tiles, rows] with tiles of BN columns; at, ref_at fp32 [rows]: the target's z where it is found.

    OWN: the reference has a weight of its own, ref_w.
    """
    tiles_m, tiles_n = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = tile_of(index, tiles_m, tiles_n, GROUP)
        row_start, column_start = tile_m * BM, tile_n * BN
        left = rows_of(x, row_start, rows, stride_x, BM, BK, TMA)
        right = rows_of(w, column_start, columns, stride_w, BN, BK, TMA)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        acc_ref = acc
        if REFERENCE:
            left_ref = rows_of(ref, row_start, rows, stride_ref, BM, BK, TMA)
            if OWN:
                right_ref = rows_of(ref_w, column_start, columns, stride_ref_w, BN, BK, TMA)
        for k in range(0, width, BK):
            a = operand(left, row_start, k, width, BK, TMA, EVEN)
            wt = operand(right, column_start, k, width, BK, TMA, EVEN).T
            acc = tl.dot(a, wt, acc, input_precision=PRECISION)
            if REFERENCE:
                if OWN:
                    wt = operand(right_ref, column_start, k, width, BK, TMA, EVEN).T
                a = operand(left_ref, row_start, k, width, BK, TMA, EVEN)
                acc_ref = tl.dot(a, wt, acc_ref, input_precision=PRECISION)
        row = row_start + tl.arange(0, BM)
        y = tl.load(target + row, mask=row < rows, other=-1)
        y = tl.where(y < columns, y, -1).to(tl.int32)  # a target of another shard may lie in the padding
        cooling = 1 / tl.load(temperature + row, mask=row < rows, other=1.0)
        record(acc, acc_ref, out, at, ref_at, bias, y, cooling, row, rows, column_start, columns, tile_n,
               tiles_n, scale, softcap, BM, BN, HAS_BIAS, CAPPED, REFERENCE, WITH_KL,
               PARTS, UNROLL)  # fmt: skip


@triton.jit
def log_masses(m, r, at, here):
    """Of a row's tiles [M, T]: each log-mass; and [M] log-mass and log-mass without the target of all."""
    lse = m + log1p(r)
    top = tl.max(lse, 1)
    mass, _ = without_top(lse, top)
    # with the target on top r is the rest; else s >= 1 + its share, and the subtraction loses at most one bit
    left = tl.where(at[:, None] == m, r, 1 + r - exp(tl.where(here, at[:, None] - m, 0.0)))
    others = tl.where(here, tl.where(left > 0, m + tl.log(left), tl.where(left == left, LOWEST, left)), lse)
    peak = tl.max(others, 1)
    rest = peak + tl.log(tl.sum(exp(others - peak[:, None]), 1))
    return lse, top + log1p(mass), tl.where(rest < LOWEST, LOWEST, rest)


@triton.jit
def chain(mine, other, difference, inner, whole):
    """Divergence of a row's tiles [M, T] by the chain rule, from log-masses, log ratios and divergences within: (sum of
    shares * inner + that of the masses, log ratio of the whole); whole [M]: the log-mass of all."""
    top = tl.max(mine, 1)
    x = mine - top[:, None]
    pivot_d = tl.max(tl.where(x == 0, difference, float("-inf")), 1)
    d = difference - pivot_d[:, None]
    y = other - (pivot_d + top)[:, None]
    r, _ = without_top(mine, top)
    a, b, ed = ratio_terms(tl.where((x == 0) & (d == 0), 0.0, exp(x)), d, y)
    peak = tl.max(y, 1)
    masses = peak + tl.log(tl.sum(exp(y - peak[:, None]), 1))
    kl, growth = divergence(r, tl.sum(a, 1), tl.sum(b, 1), tl.sum(ed, 1), masses)
    return tl.sum(exp(mine - whole[:, None]) * inner, 1) + kl, growth + pivot_d


@triton.jit
def load_tiles(record, field, row, rows, tile, tiles, other):
    """One field of a row's tiles, fp64 [M, T]."""
    place = record + (tile[None, :].to(tl.int64) + tiles * field) * rows + row[:, None]
    return tl.load(place, mask=(row < rows)[:, None] & (tile < tiles)[None, :], other=other).to(tl.float64)


@triton.jit
def entropy_of(m, r, u, lse, whole):
    """Entropy of a row's tiles [M, T] by the chain rule."""
    within = tl.sum(exp(lse - whole[:, None]) * (log1p(r) - u / (1 + r)), 1)
    mass, moment = without_top(lse, tl.max(lse, 1))
    return within + log1p(mass) - moment / (1 + mass)


@triton.jit
def merge(
    records, at, ref_at, target, state, rows, tiles, REFERENCE: tl.constexpr, WITH_KL: tl.constexpr,
    SWAPPED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """state fp64 [10, rows] (rows as named in `state`) from records of tiles of COLUMNS columns; TILES >= tiles.

    SWAPPED: the first side is the reference, and KL the reverse one.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.arange(0, TILES)
    inside = row < rows
    y = tl.load(target + row, mask=inside, other=-1)
    here = (y >= 0)[:, None] & ((y // COLUMNS)[:, None] == tile[None, :])
    first, second = state + row, state + 4 * rows + row
    if SWAPPED:
        first, second = second, first
    z_y = tl.load(at + row, mask=inside, other=0.0).to(tl.float64)
    m = load_tiles(records, TOP, row, rows, tile, tiles, LOWEST)
    r = load_tiles(records, SUM, row, rows, tile, tiles, 0.0)
    lse, whole, rest = log_masses(m, r, z_y, here)
    tl.store(first, whole, mask=inside)
    tl.store(first + rows, rest, mask=inside)
    tl.store(first + 2 * rows, z_y, mask=inside)
    if not SWAPPED:
        u = load_tiles(records, MOMENT, row, rows, tile, tiles, 0.0)
        tl.store(state + 3 * rows + row, entropy_of(m, r, u, lse, whole), mask=inside)
    if REFERENCE:
        z_y = tl.load(ref_at + row, mask=inside, other=0.0).to(tl.float64)
        m = load_tiles(records, REF_TOP, row, rows, tile, tiles, LOWEST)
        r = load_tiles(records, REF_SUM, row, rows, tile, tiles, 0.0)
        other, other_whole, rest = log_masses(m, r, z_y, here)
        tl.store(second, other_whole, mask=inside)
        tl.store(second + rows, rest, mask=inside)
        tl.store(second + 2 * rows, z_y, mask=inside)
        if SWAPPED:
            u = load_tiles(records, REF_MOMENT, row, rows, tile, tiles, 0.0)
            tl.store(state + 3 * rows + row, entropy_of(m, r, u, other, other_whole), mask=inside)
        difference = other_whole - whole
        if WITH_KL:
            ratios = load_tiles(records, DIFFERENCE, row, rows, tile, tiles, 0.0)
            inner = load_tiles(records, KL, row, rows, tile, tiles, 0.0)
            kl, difference = chain(lse, other, ratios, inner, whole)
            tl.store(state + (9 if SWAPPED else 8) * rows + row, kl, mask=inside)
        tl.store(state + 7 * rows + row, -difference if SWAPPED else difference, mask=inside)

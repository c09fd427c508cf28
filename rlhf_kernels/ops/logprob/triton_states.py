"""The head's GEMM with the statistics in its epilogue, for scoring: each tile of fp32 logits leaves a few numbers a row.

Policy and reference tiles that share W are computed together. A tile's record, fp32 [fields, tiles, rows]: top m, sums
r = sum e^(z-m) and u = sum e^(z-m) (z-m) without the top; of the reference m and r; the log-mass of the reference less
the policy's, KL and reverse KL within the tile. `merge` joins a row's tiles by the chain rule (see `state`) in fp64.
"""

import triton
import triton.language as tl

from rlhf_kernels.ops.logprob.triton_gemm import bias_of, low_rank, operand, rows_of, tile_of
from rlhf_kernels.ops.logprob.triton_math import (
    LOWEST,
    divergence,
    exp,
    log1p,
    mass_parts,
    mass_sums,
    ratio_sums,
    ratio_terms,
    shaped,
)

TOP, SUM, MOMENT, REF_TOP, REF_SUM, DIFFERENCE, KL, RKL = (tl.constexpr(i) for i in range(8))


@triton.jit
def masked(raw, bias, scale, softcap, cooling, left, N: tl.constexpr, CAPPED: tl.constexpr):
    """z of raw logits [M, N], LOWEST from column `left` on."""
    z, _ = shaped(raw, bias, scale, softcap, cooling, CAPPED)
    return tl.where((tl.arange(0, N) < left)[None, :], z, LOWEST)


@triton.jit
def store_target(z, at, row, target, rows, N: tl.constexpr):
    """at [rows] = z [M, N] in column target [M] where that lies in 0 .. N; most tiles hold no row's target."""
    here = (target >= 0) & (target < N) & (row < rows)
    if tl.max(here.to(tl.int32)) > 0:
        hit = tl.arange(0, N)[None, :] == target[:, None]
        tl.store(at + row, tl.max(tl.where(hit, z, float("-inf")), 1), mask=here)


@triton.jit
def record(
    raw, raw_ref, out, at, ref_at, bias, target, cooling, row, rows, column, columns, tile, tiles, scale, softcap,
    M: tl.constexpr, N: tl.constexpr, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, REFERENCE: tl.constexpr,
    WITH_KL: tl.constexpr, WITH_RKL: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Stores the record of raw logits [M, N] of columns from `column` on; row, target [M]."""
    b = bias_of(bias, column, columns, N, HAS_BIAS)
    z = masked(raw, b, scale, softcap, cooling, columns - column, N, CAPPED)
    store_target(z, at, row, target - column, rows, N)
    inside = row < rows
    place = out + tile * rows + row.to(tl.int64)
    field = rows * tiles
    if REFERENCE:
        zr = masked(raw_ref, b, scale, softcap, cooling, columns - column, N, CAPPED)
        store_target(zr, ref_at, row, target - column, rows, N)
        if WITH_RKL:
            m, r, u = mass_sums(z, M, N, PARTS)
            mr, rr, _, rkl, difference = ratio_sums(zr, z, m + log1p(r), M, N, PARTS)
            difference = -difference
            tl.store(place + field * RKL, rkl, mask=inside)
        else:
            mr, rr, _ = mass_sums(zr, M, N, PARTS)
        if WITH_KL:
            m, r, u, kl, difference = ratio_sums(z, zr, mr + log1p(rr), M, N, PARTS)
            tl.store(place + field * KL, kl, mask=inside)
        elif not WITH_RKL:
            m, r, u = mass_sums(z, M, N, PARTS)
        tl.store(place + field * REF_TOP, mr, mask=inside)
        tl.store(place + field * REF_SUM, rr, mask=inside)
        if WITH_KL or WITH_RKL:
            tl.store(place + field * DIFFERENCE, difference, mask=inside)
    else:
        m, r, u = mass_sums(z, M, N, PARTS)
    tl.store(place + field * TOP, m, mask=inside)
    tl.store(place + field * SUM, r, mask=inside)
    tl.store(place + field * MOMENT, u, mask=inside)


@triton.jit
def statistics(
    x, ref, w, ref_w, out, at, ref_at, bias, target, temperature, s, b,
    rows, columns, width, rank, stride_x, stride_ref, stride_w, stride_ref_w, scale, softcap,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, RANK: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    REFERENCE: tl.constexpr, OWN: tl.constexpr, WITH_KL: tl.constexpr, WITH_RKL: tl.constexpr, FLATTEN: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, RANK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Records of all columns: x, ref [rows, width], w, ref_w [columns, width] (TMA: their descriptors), out
    [fields, tiles, rows] with tiles of BN columns; at, ref_at fp32 [rows]: the target's z where it is found.

    OWN: the reference has a weight of its own, ref_w. RANK: s, b of `low_rank` are added to the policy's logits.
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
        if RANK:
            acc = low_rank(acc, s, b, row_start, column_start, rows, columns, rank, BM, BN, RANK_DEPTH, PRECISION)
        row = row_start + tl.arange(0, BM)
        y = tl.load(target + row, mask=row < rows, other=-1).to(tl.int32)
        cooling = 1 / tl.load(temperature + row, mask=row < rows, other=1.0)
        record(acc, acc_ref, out, at, ref_at, bias, y, cooling, row, rows, column_start, columns, tile_n,
               tiles_n, scale, softcap, BM, BN, HAS_BIAS, CAPPED, REFERENCE, WITH_KL, WITH_RKL,
               PARTS)  # fmt: skip


@triton.jit
def log_masses(m, r, at, here):
    """Of a row's tiles [M, T]: each log-mass; and [M] log-mass and log-mass without the target of all."""
    lse = m + log1p(r)
    top = tl.max(lse, 1)
    e, n, _ = mass_parts(lse, top, 1, 1, 1)
    # with the target on top r is the rest; else s >= 1 + its share, and the subtraction loses at most one bit
    left = tl.where(at[:, None] == m, r, 1 + r - exp(tl.where(here, at[:, None] - m, 0.0)))
    others = tl.where(here, tl.where(left > 0, m + tl.log(left), tl.where(left == left, LOWEST, left)), lse)
    peak = tl.max(others, 1)
    rest = peak + tl.log(tl.sum(exp(others - peak[:, None]), 1))
    return lse, top + log1p(e + (n - 1)), tl.where(rest < LOWEST, LOWEST, rest)


@triton.jit
def chain(mine, other, difference, inner, whole):
    """Divergence of a row's tiles [M, T] by the chain rule, from log-masses, log ratios and divergences within: (sum of
    shares * inner + that of the masses, log ratio of the whole); whole [M]: the log-mass of all."""
    top = tl.max(mine, 1)
    pivot_d = tl.max(tl.where(mine == top[:, None], difference, float("-inf")), 1)
    y = other - (pivot_d + top)[:, None]
    r, n, _, a, b, ed = ratio_terms(mine - top[:, None], difference - pivot_d[:, None], y)
    r += n - 1
    peak = tl.max(y, 1)
    kl, growth = divergence(r, a, b, ed, peak + tl.log(tl.sum(exp(y - peak[:, None]), 1)))
    return tl.sum(exp(mine - whole[:, None]) * inner, 1) + kl, growth + pivot_d


@triton.jit
def load_tiles(record, field, row, rows, tile, tiles, other):
    """One field of a row's tiles, fp64 [M, T]."""
    place = record + (tile[None, :].to(tl.int64) + tiles * field) * rows + row[:, None]
    return tl.load(place, mask=(row < rows)[:, None] & (tile < tiles)[None, :], other=other).to(tl.float64)


@triton.jit
def merge(
    records, at, ref_at, target, state, rows, tiles, REFERENCE: tl.constexpr, WITH_KL: tl.constexpr,
    WITH_RKL: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """state fp64 [10, rows] (rows as named in `state`) from records of tiles of COLUMNS columns; TILES >= tiles."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.arange(0, TILES)
    inside = row < rows
    y = tl.load(target + row, mask=inside, other=-1)
    here = (y >= 0)[:, None] & ((y // COLUMNS)[:, None] == tile[None, :])
    place = state + row
    z_y = tl.load(at + row, mask=inside, other=0.0).to(tl.float64)
    m = load_tiles(records, TOP, row, rows, tile, tiles, LOWEST)
    r = load_tiles(records, SUM, row, rows, tile, tiles, 0.0)
    u = load_tiles(records, MOMENT, row, rows, tile, tiles, 0.0)
    lse, whole, rest = log_masses(m, r, z_y, here)
    within = tl.sum(exp(lse - whole[:, None]) * (log1p(r) - u / (1 + r)), 1)
    mass, n, moment = mass_parts(lse, tl.max(lse, 1), 1, 1, 1)
    mass += n - 1
    entropy = within + log1p(mass) - moment / (1 + mass)
    tl.store(place, whole, mask=inside)
    tl.store(place + rows, rest, mask=inside)
    tl.store(place + 2 * rows, z_y, mask=inside)
    tl.store(place + 3 * rows, entropy, mask=inside)
    if REFERENCE:
        z_y = tl.load(ref_at + row, mask=inside, other=0.0).to(tl.float64)
        mr = load_tiles(records, REF_TOP, row, rows, tile, tiles, LOWEST)
        rr = load_tiles(records, REF_SUM, row, rows, tile, tiles, 0.0)
        ref_lse, ref_whole, ref_rest = log_masses(mr, rr, z_y, here)
        difference = ref_whole - whole
        if WITH_KL or WITH_RKL:
            ratio = load_tiles(records, DIFFERENCE, row, rows, tile, tiles, 0.0)
        if WITH_RKL:
            inner = load_tiles(records, RKL, row, rows, tile, tiles, 0.0)
            rkl, difference = chain(ref_lse, lse, -ratio, inner, ref_whole)
            difference = -difference
            tl.store(place + 9 * rows, rkl, mask=inside)
        if WITH_KL:
            inner = load_tiles(records, KL, row, rows, tile, tiles, 0.0)
            kl, difference = chain(lse, ref_lse, ratio, inner, whole)
            tl.store(place + 8 * rows, kl, mask=inside)
        tl.store(place + 4 * rows, ref_whole, mask=inside)
        tl.store(place + 5 * rows, ref_rest, mask=inside)
        tl.store(place + 6 * rows, z_y, mask=inside)
        tl.store(place + 7 * rows, difference, mask=inside)

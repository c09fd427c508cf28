"""What the Triton kernels of lora_linear share: a tile's rows and their adapters, and a low-rank product routed by row.

A tile looks at its rows' entries of the index, on the device and in every launch. For each adapter that occurs in it
the product is formed apart and taken over by a select on the row's own adapter: nothing of an adapter, be it NaN,
reaches another's rows, and a row has the same bits whichever rows stand beside it. Adapters that do not occur cost
nothing.

A pack holds the adapters of one projection: [n, rank, width] (RANK_FIRST, as lora_a) or [n, width, rank] (as lora_b),
contiguous, smaller ranks padded with zeros.
"""

import triton
import triton.language as tl

ABSENT = tl.constexpr(-1)
BAD = tl.constexpr(-2)  # stands for every index outside [-1, n)
LAST = tl.constexpr(2147483647)


@triton.jit
def rows_of_tile(index, order, start, total, live, n, BM: tl.constexpr, ORDERED: tl.constexpr):
    """Of positions start .. start + BM: the rows int64 (row 0 where there is none), whether there is one, its adapter.

    ORDERED: position i is row order[i]. Rows from `live` on are left out.
    """
    at = start + tl.arange(0, BM)
    there = at < total
    row = at
    if ORDERED:
        row = tl.load(order + at, mask=there, other=0)
    there = there & (row < live)
    row = tl.where(there, row, 0).to(tl.int64)
    found = tl.load(index + row, mask=there, other=-1)
    adapter = tl.where((found < -1) | (found >= n), BAD, found).to(tl.int32)
    return row, there, adapter


@triton.jit
def adapters_in(adapter):
    """The range in which a tile's adapters lie; empty where it has none."""
    return tl.min(tl.where(adapter >= 0, adapter, LAST)), tl.max(adapter) + 1


@triton.jit
def occurs(mine):
    return tl.max(mine.to(tl.int32)) > 0


@triton.jit
def number(p, first, second, third, SOURCES: tl.constexpr):
    """The p-th of up to three numbers."""
    found = first
    if SOURCES > 1:
        found = tl.where(p == 1, second, found)
    if SOURCES > 2:
        found = tl.where(p == 2, third, found)
    return found


@triton.jit
def source(p, first, second, third, SOURCES: tl.constexpr):
    """The p-th of up to three pointers."""
    found = first
    if SOURCES > 1:  # noqa: SIM102
        if p == 1:
            found = second
    if SOURCES > 2:  # noqa: SIM102
        if p == 2:
            found = third
    return found


@triton.jit
def columns_before(p, r0, r1, SOURCES: tl.constexpr):
    """The first column of projection p in S: the ranks before it."""
    before = p * 0
    if SOURCES > 1:
        before = tl.where(p > 0, before + r0, before)
    if SOURCES > 2:
        before = tl.where(p > 1, before + r1, before)
    return before


@triton.jit
def expanded(
    t, v, row, adapter, columns, first, column, width, rank, M: tl.constexpr, N: tl.constexpr, BR: tl.constexpr,
    RANK_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [M, N]: T_e V_e of every row's own adapter e, 0 without one, NaN for a bad one.

    t [rows, columns], of which `rank` columns from `first` on; v: a pack of this width, its columns from `column` on.
    """
    found = tl.where((adapter == BAD)[:, None], float("nan"), tl.zeros((M, N), tl.float32))
    at = column + tl.arange(0, N)
    low, high = adapters_in(adapter)
    for e in range(low, high):
        mine = adapter == e
        if occurs(mine):
            base = v + tl.cast(e, tl.int64) * width * rank
            delta = tl.zeros((M, N), tl.float32)
            for r in tl.range(0, rank, BR, num_stages=1):
                k = r + tl.arange(0, BR)
                real = k < rank
                left = tl.load(t + row[:, None] * columns + (first + k)[None, :], mask=mine[:, None] & real[None, :],
                               other=0.0)  # fmt: skip
                if RANK_FIRST:
                    place = base + k[:, None] * width + at[None, :]
                    right = tl.load(place, mask=real[:, None] & (at < width)[None, :], other=0.0)
                else:
                    place = base + at[:, None] * rank + k[None, :]
                    right = tl.load(place, mask=(at < width)[:, None] & real[None, :], other=0.0).T
                delta = tl.dot(left, right, delta, input_precision=PRECISION)
            found = tl.where(mine[:, None], delta, found)
    return found


@triton.jit
def bias_of(bias, column, width, N: tl.constexpr, HAS_BIAS: tl.constexpr):
    """fp32 [1, N]; 0 without a bias."""
    at = column + tl.arange(0, N)
    if HAS_BIAS:
        return tl.load(bias + at, mask=at < width, other=0.0).to(tl.float32)[None, :]
    else:
        return (at * 0).to(tl.float32)[None, :]

"""What the Triton kernels of attention share: which tile of which sequence a program has, its rows, its scores.

A tile's rows are the queries of all heads that share a key/value head, token by token: row r is token r // GROUP and
head r % GROUP of its tile, so keys and values are read once for all of them. Scores are kept in base 2 (times log2 e).
Nothing here depends on values that the host would have to read: grids come from shapes, the rest from tensors.
"""

import triton
import triton.language as tl

from rlhf_kernels.ops.logprob.triton_math import tanh

LOG2E = 1.4426950408889634
NONE = tl.constexpr(float("-inf"))


@triton.jit
def tile_of(cu, tile, sequences, STEP: tl.constexpr):
    """(sequence, its tile) of program `tile` of tokens // STEP + sequences; tiles past a sequence's end are empty.

    Sequence b's tiles begin at cu[b] // STEP + b, which leaves room for each sequence's ragged end.
    """
    low = tile * 0
    high = low + sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(cu + middle) // STEP + middle <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low, tile - (tl.load(cu + low) // STEP + low)


@triton.jit
def places(first, n, keep, stride, table, slice_stride, SLICE: tl.constexpr):
    """int64 offsets of tokens n of a sequence: end to end from token `first`, or (SLICE > 0) in slices of `table`."""
    if SLICE == 0:
        return (first + n).to(tl.int64) * stride
    else:
        index = tl.load(table + n // SLICE, mask=keep, other=0)
        return index.to(tl.int64) * slice_stride + (n % SLICE) * stride


@triton.jit
def load_rows(pointer, place, keep, D: tl.constexpr, BD: tl.constexpr, WHOLE: tl.constexpr):
    """[rows, BD] of D columns at offsets `place`; zeros in columns from D on and in rows not kept (WHOLE: all are)."""
    at = tl.arange(0, BD)
    pointers = pointer + place[:, None] + at[None, :]
    if WHOLE and D == BD:
        return tl.load(pointers)
    elif WHOLE:
        return tl.load(pointers, mask=(at < D)[None, :], other=0.0)
    elif D == BD:
        return tl.load(pointers, mask=keep[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=keep[:, None] & (at < D)[None, :], other=0.0)


@triton.jit
def capped(x, PRECISE: tl.constexpr):
    """tanh x, to 1 ulp or (16-bit inputs) to 1e-7 absolute, which is cheaper."""
    if PRECISE:
        return tanh(x)
    else:
        return 1.0 - 2.0 / (tl.exp2(x * 2.885390081777927) + 1.0)


@triton.jit
def scores(left, right, factor, cap, CAPPED: tl.constexpr, PRECISE: tl.constexpr):
    """left right^T in base 2: z log2(e). factor: scale log2(e), or (CAPPED) scale / softcap; cap: softcap log2(e).

    And tanh of the capped scores, whose slope the backward needs.
    """
    z = tl.dot(left, right.T, input_precision="ieee") * factor
    bent = z
    if CAPPED:
        bent = capped(z, PRECISE)
        z = bent * cap
    return z, bent


@triton.jit
def sees(query, key, window, WINDOWED: tl.constexpr):
    """Whether the query at one position sees the key at another."""
    seen = key <= query
    if WINDOWED:
        seen = seen & (key > query - window)
    return seen


@triton.jit
def fold(top, mass, total, z, v):
    """Takes a block of scores z [rows, keys] and its values v into the running softmax (top, mass, total)."""
    new_top = tl.maximum(top, tl.max(z, 1))
    base = tl.where(new_top == NONE, 0.0, new_top)
    p = tl.exp2(z - base[:, None])
    shrink = tl.exp2(top - base)
    total = tl.dot(p.to(v.dtype), v, total * shrink[:, None], input_precision="ieee")
    return new_top, mass * shrink + tl.sum(p, 1), total


@triton.jit
def scan(
    top, mass, total, q, position, k, v, first, start, stop, table, k_token, v_token, k_slice, v_slice, window, factor,
    cap, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, SLICE: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PRECISE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Folds in keys start .. stop of a sequence. WHOLE: every row sees all of them, and they are full blocks."""
    for n0 in range(start, stop, BN):
        n = n0 + tl.arange(0, BN)
        keep = n < stop
        keys = load_rows(k, places(first, n, keep, k_token, table, k_slice, SLICE), keep, D, BD, WHOLE)
        z, _ = scores(q, keys, factor, cap, CAPPED, PRECISE)
        if not WHOLE:
            z = tl.where(sees(position[:, None], n[None, :], window, WINDOWED) & keep[None, :], z, NONE)
        values = load_rows(v, places(first, n, keep, v_token, table, v_slice, SLICE), keep, DV, BDV, WHOLE)
        top, mass, total = fold(top, mass, total, z, values)
    return top, mass, total


@triton.jit
def finished(top, mass, total):
    """(the softmax's mean of the values, log2 of its mass); zeros and -inf for rows that saw no key."""
    empty = mass == 0.0
    share = tl.where(empty, 1.0, mass)
    return total / share[:, None], tl.where(empty, NONE, top + tl.log2(share))

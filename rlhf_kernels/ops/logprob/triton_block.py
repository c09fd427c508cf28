"""What the Triton row kernels share: how a row of a block is loaded and shaped, its mass, and its ratio to another row.

A program holds one row of a block in its registers: n <= BLOCK columns, beyond them LOWEST. Sums over the row are fp32
(a tree over few values a thread), what is made of them fp64 scalars. See csrc/cpu/logit_row.h and ratio_row.h.
"""

import triton
import triton.language as tl

from rlhf_kernels.ops.logprob.triton_math import FLOOR, LOWEST, exp, expm1_minus_x, log1p_wide, tanh


@triton.jit
def clamp(z):
    return tl.where(z < LOWEST, LOWEST, z)  # a NaN stays one


@triton.jit
def load(ptr, columns, n, bias_ptr, temperature, softcap, scale, RAW: tl.constexpr, CAPPED: tl.constexpr):
    """A row's z: softcap * tanh(scale * (raw + bias) / softcap) / temperature if RAW, else what is stored."""
    keep = columns < n
    z = tl.load(ptr + columns, mask=keep, other=0.0)
    if RAW:
        if bias_ptr is not None:
            z += tl.load(bias_ptr + columns, mask=keep, other=0.0)
        if CAPPED:
            z = softcap * tanh(z * (scale / softcap))
        else:
            z = z * scale
        if temperature != 1.0:
            z = tl.div_rn(z, temperature)
    return tl.where(keep, clamp(z), LOWEST)


@triton.jit
def uncapped(z, temperature, softcap):
    """The softcap's derivative 1 - tanh^2, which z itself holds."""
    t = z * (temperature / softcap)
    return 1.0 - t * t


@triton.jit
def target_column(ptr, row, n):
    """The target's column in this block, int32, -1 if it lies elsewhere."""
    target = tl.load(ptr + row)
    return tl.where((target >= 0) & (target < n), target, -1).to(tl.int32)


@triton.jit
def mass(z, columns, target):
    """Of one row: top, pivot's column (the first of the top), e^(z - top) without the pivot; fp64: its sum, log-mass,
    log-mass without the target, the target's z (-inf elsewhere), entropy."""
    top = tl.max(z, 0)
    pivot = tl.min(tl.where(z == top, columns, 2147483647), 0)
    x = z - top
    x = tl.where((x < FLOOR) | (columns == pivot), FLOOR, x)
    e = exp(x)
    r = tl.sum(e, 0).to(tl.float64)
    u = tl.sum(e * x, 0).to(tl.float64)
    at = tl.sum(tl.where(columns == target, z, 0.0), 0).to(tl.float64)
    m = top.to(tl.float64)
    s = 1.0 + r
    growth = log1p_wide(r)
    empty = (top == LOWEST) & (r == r)  # every token masked
    lse = tl.where(empty, LOWEST, m + growth)
    alone = tl.where(r == 0, LOWEST, m + tl.log(r))  # the target is the pivot
    gap = tl.where(at - m < FLOOR, FLOOR, at - m)
    others = tl.where(target == pivot, alone, m + tl.log(s - tl.exp(gap)))  # the subtraction loses at most one bit
    rest = tl.where(target < 0, lse, tl.where(empty, LOWEST, others))
    entropy = tl.where(empty, 0.0, growth - u / s)
    return top, pivot, e, r, lse, rest, tl.where(target < 0, -float("inf"), at), entropy


@triton.jit
def ratio(z, zr, columns, top, pivot, e, r, lse, ref_top, ref_lse):
    """Log-mass of zr minus that of z, and KL of z's distribution within the block from zr's, fp64.

    Everything is relative to the pivot, the top token of z, so that small ratios keep their digits.
    """
    at = tl.sum(tl.where(columns == pivot, zr, 0.0), 0)
    pivot_d = at - top
    d = (zr - z) - pivot_d  # 0 at the pivot
    far = exp(zr - at)
    near = e * expm1_minus_x(d)
    small = tl.abs(d) < 1.0
    ed = e * d
    b = tl.where(small, near + ed, far - e)
    a_sum = tl.sum(tl.where(small, near, b - ed), 0).to(tl.float64)
    b_sum = tl.sum(b, 0).to(tl.float64)
    d_sum = tl.sum(ed, 0).to(tl.float64)
    far_sum = tl.sum(tl.where(small, e + b, far), 0).to(tl.float64)
    s = 1.0 + r
    q = b_sum / s
    close = tl.abs(q) < 0.5
    plain = tl.where(close, log1p_wide(tl.where(close, q, 0.0)), tl.log((1.0 + far_sum) / s))
    apart = ref_top - at > 60.0  # zr's own mass lies elsewhere
    growth = tl.where(apart, ref_lse - at.to(tl.float64) - log1p_wide(r), plain)
    kl = tl.where(close & (apart == 0), a_sum / s - (q - growth), growth - d_sum / s)
    difference = growth + pivot_d.to(tl.float64)
    empty = (top == LOWEST) | (ref_top == LOWEST)
    difference = tl.where(empty, ref_lse - lse, difference)
    return difference, tl.where(empty & (difference == difference), 0.0, kl)

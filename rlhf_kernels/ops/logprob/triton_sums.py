"""Device functions that the Triton kernels of the head share: logits made z, sums that lose no digits.

In a set of columns the top token is the pivot and stays out of every sum; equal tops count as further columns. Columns
that do not exist carry LOWEST, like masked tokens: they have no mass and no difference to speak of.
"""

import triton
import triton.language as tl

from rlhf_kernels.ops.logprob.triton_math import LOWEST, expm1_minus_x

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e^x of fp32, by the exponential of base 2 that the chips have."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def tanh(x):
    """fp32, to the last bits of both small and large x."""
    a = tl.abs(x)
    far = 1 - 2 / (exp(2 * a) + 1)
    s = x * x
    p = -929569.0 / 638512875.0 * s + 21844.0 / 6081075.0
    p = p * s - 1382.0 / 155925.0
    p = p * s + 62.0 / 2835.0
    p = p * s - 17.0 / 315.0
    p = p * s + 2.0 / 15.0
    p = p * s - 1.0 / 3.0
    near = x + x * s * p
    return tl.where(a < 0.45, near, tl.where(x < 0, -far, far))


@triton.jit
def log1p(x):
    """log(1 + x) of fp32 or fp64: the rounding of 1 + x is divided out again."""
    w = 1 + x
    d = w - 1
    safe = tl.where(d == 0, 1.0, d)
    return tl.where((d == 0) | (w == float("inf")), x, tl.log(w) * (x / safe))


@triton.jit
def log1p_excess(x):
    """x - log(1 + x) for |x| < 0.5, by the series of artanh: x t - 2 t^3 (1/3 + t^2/5 + ...) with t = x / (2 + x)."""
    t = x / (2 + x)
    s = t * t
    p = s * (1.0 / 17) + 1.0 / 15
    p = p * s + 1.0 / 13
    p = p * s + 1.0 / 11
    p = p * s + 1.0 / 9
    p = p * s + 1.0 / 7
    p = p * s + 1.0 / 5
    p = p * s + 1.0 / 3
    return x * t - 2 * t * s * p


@triton.jit
def shaped(raw, bias, scale, softcap, cooling, CAPPED: tl.constexpr):
    """z of raw logits [M, N]; bias [N] fp32, cooling [M] = 1 / temperature."""
    u = (raw + bias[None, :]) * scale
    if CAPPED:
        u = tanh(u / softcap) * softcap
    z = u * cooling[:, None]
    return tl.where(z < LOWEST, LOWEST, z)


@triton.jit
def halves(x, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of x [M, N]: work on halves keeps a fat epilogue's registers within bounds."""
    return tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def part(x, i, M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr):
    """Columns i N / PARTS and on of x [M, N], N / PARTS of them: selected, as registers cannot be indexed."""
    if PARTS == 1:
        return x
    else:
        low, high = halves(x, M, N)
        return tl.where(i < PARTS // 2, part(low, i, M, N // 2, PARTS // 2),
                        part(high, i - PARTS // 2, M, N // 2, PARTS // 2))  # fmt: skip


@triton.jit
def without_top(z, m):
    """(r, u): sums of e^(z-m) and e^(z-m) (z-m) over all columns but one of the tops m [M] of z [M, N]."""
    x = z - m[:, None]
    top = x == 0
    e = tl.where(top, 0.0, exp(x))
    return tl.sum(e, 1) + (tl.sum(top.to(e.dtype), 1) - 1), tl.sum(e * x, 1)


@triton.jit
def joined_mass(m, r, u, m2, r2, u2):
    """Top and `without_top` of two sets together."""
    swap = m2 > m
    gap = -tl.abs(m - m2)
    f = exp(gap)
    s = 1 + tl.where(swap, r, r2)
    return (tl.maximum(m, m2), tl.where(swap, r2, r) + s * f,
            tl.where(swap, u2, u) + (tl.where(swap, u, u2) + s * gap) * f)  # fmt: skip


@triton.jit
def ratio_terms(e, d, y):
    """A = sum e (expm1 d - d), B = sum e expm1 d and D = sum e d over axis 1, term by term: e the own mass relative to
    the pivot's and 0 for it, d the log ratio (other minus own) less the pivot's, y the log of the other's mass relative
    to its pivot's: where d is large, e^y - e is e expm1 d without an overflow on the way."""
    small = tl.abs(d) < 1
    close = e * expm1_minus_x(d)
    ed = e * d
    b = tl.where(small, close + ed, exp(tl.where(y > 88, 88.0, y)) - e)
    return tl.where(small, close, b - ed), b, ed


@triton.jit
def divergence(r, a, b, ed, other):
    """KL of a set's distribution from another's, and the log of the other's mass over its own, relative to the pivot.

    a, b, ed: sums of `ratio_terms`; s = 1 + r the own mass, other the log of the other's. Near: KL = A/s - (B/s -
    log1p(B/s)), in which nothing cancels; elsewhere by log-masses.
    """
    q = b / (1 + r)
    near = tl.abs(q) < 0.5
    safe = tl.where(near, q, 0.0)
    growth = tl.where(near, log1p(safe), other - log1p(r))
    kl = tl.where(near, a / (1 + r) - log1p_excess(safe), growth - ed / (1 + r))
    return kl, growth


@triton.jit
def ratio(z, zr, m, r, other):
    """KL of z [M, N] from zr's distribution, and zr's log-mass less z's; m, r of `without_top`, other zr's log-mass."""
    mr = tl.max(tl.where(z == m[:, None], zr, float("-inf")), 1)  # of several tops that with the largest ratio
    d = (zr - z) - (mr - m)[:, None]
    x = z - m[:, None]
    e = tl.where((x == 0) & (d == 0), 0.0, exp(x))  # further pivots: their terms are 0 as well
    a, b, ed = ratio_terms(e, d, zr - mr[:, None])
    kl, growth = divergence(r, tl.sum(a, 1), tl.sum(b, 1), tl.sum(ed, 1), other - mr)
    return kl, growth + (mr - m)


@triton.jit
def joined_ratio(lse, kl, difference, lse2, kl2, difference2):
    """`ratio` of two sets together, from their log-masses, KLs and log ratios: the chain rule."""
    swap = lse2 > lse
    gap = -tl.abs(lse - lse2)
    e = exp(gap)
    pivot = tl.where(swap, difference2, difference)
    d = tl.where(swap, difference, difference2) - pivot
    y = gap + d
    a, b, ed = ratio_terms(e, d, y)
    other = tl.maximum(y, 0.0) + log1p(exp(-tl.abs(y)))
    between, growth = divergence(e, a, b, ed, other)
    within = (tl.where(swap, kl2, kl) + e * tl.where(swap, kl, kl2)) / (1 + e)
    return within + between, growth + pivot

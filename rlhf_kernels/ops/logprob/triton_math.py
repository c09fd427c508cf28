"""Device functions that the Triton kernels of the head share: logits made z, sums that lose no digits.

In a set of columns the top token is the pivot and stays out of every sum; equal tops count as further columns. Columns
that do not exist carry LOWEST, like masked tokens: they have no mass and no difference to speak of.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # stands for -inf, so that no difference of two logits is NaN
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
def expm1_minus_x(x):
    """e^x - 1 - x of fp32 for |x| < 1, by its series: relative digits are kept near 0."""
    p = x * (1.0 / 39916800) + 1.0 / 3628800
    p = p * x + 1.0 / 362880
    p = p * x + 1.0 / 40320
    p = p * x + 1.0 / 5040
    p = p * x + 1.0 / 720
    p = p * x + 1.0 / 120
    p = p * x + 1.0 / 24
    p = p * x + 1.0 / 6
    p = p * x + 0.5
    return x * x * p


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
    """(z, tanh of the softcap or 0) of raw logits [M, N]; bias [N] fp32, cooling [M] = 1 / temperature."""
    u = (raw + bias[None, :]) * scale
    t = u * 0.0
    if CAPPED:
        t = tanh(u / softcap)
        u = t * softcap
    z = u * cooling[:, None]
    return tl.where(z < LOWEST, LOWEST, z), t


@triton.jit
def halves(x, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of x [M, N]: work on halves keeps a fat epilogue's registers within bounds."""
    return tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def mass_parts(z, m, M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr):
    """(sum of e^(z-m) below the top, number of tops, sum of e^(z-m) (z-m)) of z [M, N], in 1, 2 or 4 parts."""
    if PARTS > 1:
        low, high = halves(z, M, N)
        r, n, u = mass_parts(low, m, M, N // 2, PARTS // 2)
        more_r, more_n, more_u = mass_parts(high, m, M, N // 2, PARTS // 2)
        return r + more_r, n + more_n, u + more_u
    else:
        x = z - m[:, None]
        top = x == 0
        e = tl.where(top, 0.0, exp(x))
        return tl.sum(e, 1), tl.sum(top.to(e.dtype), 1), tl.sum(e * x, 1)


@triton.jit
def mass_sums(z, M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr):
    """Of each row of z [M, N]: the top m, and over all columns but one top the sums of e^(z-m) and e^(z-m) (z-m)."""
    m = tl.max(z, 1)
    r, n, u = mass_parts(z, m, M, N, PARTS)
    return m, r + (n - 1), u


@triton.jit
def ratio_terms(x, d, y):
    """Sums over axis 1 of x = z - top, d = log ratio less the pivot's, y = the other's logit less its pivot's: those of
    `mass_parts`, where the pivots are the tops with d = 0, then A, B, D of `divergence`."""
    pivot = (x == 0) & (d == 0)
    e = tl.where(pivot, 0.0, exp(x))
    small = tl.abs(d) < 1
    close = e * expm1_minus_x(d)
    ed = e * d
    b = tl.where(small, close + ed, exp(tl.where(y > 88, 88.0, y)) - e)
    a = tl.where(small, close, b - ed)
    return tl.sum(e, 1), tl.sum(pivot.to(e.dtype), 1), tl.sum(e * x, 1), tl.sum(a, 1), tl.sum(b, 1), tl.sum(ed, 1)


@triton.jit
def ratio_parts(z, zr, m, pivot_d, M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr):
    """`ratio_terms` of z and zr [M, N] with tops m and ratio pivot_d at the pivot, in 1, 2 or 4 parts."""
    if PARTS > 1:
        low, high = halves(z, M, N)
        low_r, high_r = halves(zr, M, N)
        r, n, u, a, b, ed = ratio_parts(low, low_r, m, pivot_d, M, N // 2, PARTS // 2)
        r2, n2, u2, a2, b2, ed2 = ratio_parts(high, high_r, m, pivot_d, M, N // 2, PARTS // 2)
        return r + r2, n + n2, u + u2, a + a2, b + b2, ed + ed2
    else:
        return ratio_terms(z - m[:, None], (zr - z) - pivot_d[:, None], zr - (pivot_d + m)[:, None])


@triton.jit
def divergence(r, a, b, ed, other):
    """KL of a set's distribution from another's, and the log of the other's mass over its own, relative to the pivot.

    With d the log ratio, other minus own, less the pivot's: A = sum e (expm1 d - d), B = sum e expm1 d, D = sum e d,
    s = 1 + r the mass, other the log-mass of the other less its logit at the pivot. Near: KL = A/s - (B/s -
    log1p(B/s)), in which nothing cancels; elsewhere by log-masses.
    """
    q = b / (1 + r)
    near = tl.abs(q) < 0.5
    safe = tl.where(near, q, 0.0)
    growth = tl.where(near, log1p(safe), other - log1p(r))
    kl = tl.where(near, a / (1 + r) - log1p_excess(safe), growth - ed / (1 + r))
    return kl, growth


@triton.jit
def ratio_sums(z, zr, other, M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr):
    """mass_sums of z, then KL from zr's distribution and zr's log-mass less that of z; other [M]: zr's log-mass."""
    m = tl.max(z, 1)
    pivot_d = tl.max(tl.where(z == m[:, None], zr - z, float("-inf")), 1)  # of several tops that with the largest ratio
    r, n, u, a, b, ed = ratio_parts(z, zr, m, pivot_d, M, N, PARTS)
    r += n - 1
    kl, growth = divergence(r, a, b, ed, other - (pivot_d + m))
    return m, r, u, kl, growth + pivot_d

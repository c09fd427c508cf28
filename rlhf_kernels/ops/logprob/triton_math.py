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
def mass_sums(z):
    """Of each row of z [M, N]: the top m, and over all columns but the pivot the sums of e^(z-m) and e^(z-m) (z-m)."""
    m = tl.max(z, 1)
    x = z - m[:, None]
    top = x == 0
    e = tl.where(top, 0.0, exp(x))
    r = tl.sum(e, 1) + (tl.sum(top.to(tl.float32), 1) - 1)
    return m, r, tl.sum(e * x, 1)


@triton.jit
def divergence(e, d, far, r, other):
    """KL of a set's distribution from another's and the log of the other's mass over its own, relative to the pivot.

    e = e^x (0 at the pivot), d the log ratio other minus own less the pivot's, far = e^(x + d) at most e^88, all
    [M, N]; r [M] the sum of e with equal tops, other [M] the other's log-mass less its logit at the pivot.
    Near: A = sum e (expm1 d - d), B = sum e expm1 d, KL = A/s - (B/s - log1p(B/s)); elsewhere by log-masses.
    """
    small = tl.abs(d) < 1
    close = e * expm1_minus_x(d)
    ed = e * d
    b = tl.where(small, close + ed, far - e)
    a = tl.sum(tl.where(small, close, b - ed), 1)
    q = tl.sum(b, 1) / (1 + r)
    near = tl.abs(q) < 0.5
    growth = tl.where(near, log1p(tl.where(near, q, 0.0)), other - log1p(r))
    kl = tl.where(near, a / (1 + r) - (q - growth), growth - tl.sum(ed, 1) / (1 + r))
    return kl, growth


@triton.jit
def ratio_sums(z, zr, other):
    """mass_sums of z, then KL from zr's distribution and zr's log-mass less that of z; other [M]: zr's log-mass."""
    m = tl.max(z, 1)
    x = z - m[:, None]
    raw = zr - z
    pivot_d = tl.max(tl.where(x == 0, raw, float("-inf")), 1)  # of several tops that with the largest ratio
    d = raw - pivot_d[:, None]
    pivot = (x == 0) & (d == 0)
    e = tl.where(pivot, 0.0, exp(x))
    r = tl.sum(e, 1) + (tl.sum(pivot.to(tl.float32), 1) - 1)
    at = pivot_d + m
    y = zr - at[:, None]
    far = exp(tl.where(y > 88, 88.0, y))
    kl, growth = divergence(e, d, far, r, other - at)
    return m, r, tl.sum(e * x, 1), kl, growth + pivot_d

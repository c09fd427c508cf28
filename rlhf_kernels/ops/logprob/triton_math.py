"""Elementary functions of the Triton row kernels, the same formulas as csrc/cpu/vec.h: a few fp32 ulp, NaN propagates.

The hardware's approximate e^x errs by |x| 6e-8: too much for the sums behind a sure token's log-probability. Device
libraries would do, but the interpreter knows none. Functions of fp64 are for a row's scalars only.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # stands for -inf, so that no difference of two logits is NaN
FLOOR = tl.constexpr(-200.0)  # of a difference of logits: e^x is 0 there, and x e^x too


@triton.jit
def absolute(x):
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def reduce(x):
    """x = k ln 2 + f with |f| <= ln2 / 2, |x| <= 88: (e^f - 1, 2^k)."""
    shifted = x * 1.44269504088896341 + 12582912.0  # 1.5 * 2^23: the integer part lands in the low bits
    k = shifted - 12582912.0
    f = (x - k * 0.693359375) - k * -2.12194440e-4  # Cephes' split of ln 2: k * hi is exact
    power = ((shifted.to(tl.int32, bitcast=True) - 0x4B400000 + 127) << 23).to(tl.float32, bitcast=True)
    p = f * (1.0 / 5040) + 1.0 / 720
    p = p * f + 1.0 / 120
    p = p * f + 1.0 / 24
    p = p * f + 1.0 / 6
    p = p * f + 0.5
    return f + f * f * p, power


@triton.jit
def exp(x):
    """e^x; 0 below -87 (no denormals), clamped at e^88 above."""
    bounded = tl.where(x < -87.0, -87.0, x)
    y, power = reduce(tl.where(bounded > 88.0, 88.0, bounded))
    return tl.where(x < -87.0, 0.0, power * y + power)


@triton.jit
def expm1(x):
    """e^x - 1 with small relative error for x near 0; clamped like exp."""
    bounded = tl.where(x < -87.0, -87.0, x)
    y, power = reduce(tl.where(bounded > 88.0, 88.0, bounded))
    return power * y + (power - 1.0)


@triton.jit
def expm1_minus_x(x):
    """e^x - 1 - x for |x| < 1 by its series (truncation below 1e-7 relative)."""
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
def log(x):
    """log(x) for normal positive x (Cephes' logf)."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # mantissa in [sqrt(1/2), sqrt(2))
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    f2 = f * f
    p = f * 7.0376836292e-2 - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    return f + (p * f * f2 + e * -2.12194440e-4 - 0.5 * f2) + e * 0.693359375


@triton.jit
def log_cosh_plus(h):
    """h + log cosh h = log(1 + e^2h) - log 2: a fitted series below 0.5, above no difference of large numbers."""
    a = absolute(h)
    x = h * h
    p = x * -5.74278525e-4 + 2.14313128e-3
    p = p * x - 6.74049223e-3
    p = p * x + 2.22219019e-2
    p = p * x - 8.33333265e-2
    p = p * x + 0.5
    return tl.where(a < 0.5, h + x * p, (h + a) + log(0.5 + 0.5 * exp(-2.0 * a)))


@triton.jit
def tanh(x):
    """tanh within 1 ulp: Cephes' series below 0.625, above it 1 - 2 / (e^2|x| + 1)."""
    a = absolute(x)
    x2 = x * x
    p = x2 * -5.70498872745e-3 + 2.06390887954e-2
    p = p * x2 - 5.37397155531e-2
    p = p * x2 + 1.33314422036e-1
    p = p * x2 - 3.33332819422e-1
    far = 1.0 - tl.div_rn(2.0, exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, x + x * x2 * p, tl.where(x < 0.0, -far, far))


@triton.jit
def log1p_wide(y):
    """log(1 + y) of an fp64 scalar y > -1: the logarithm of the rounded sum, and what the rounding lost."""
    u = 1.0 + y
    return tl.log(u) + tl.where(u < 1e300, (y - (u - 1.0)) / u, 0.0)

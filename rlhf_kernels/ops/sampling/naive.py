"""`sample` in plain PyTorch: the definition.

With u = (max logit - logit) / temperature, a token's weight is exp(-u) in fixed point (40 fractional bits, int64).
Integer sums have no rounding, so the mass of a set, the cumulative distribution and with them the token do not depend
on the order of additions; and because the exponential is spelled out in single fp32 operations, every backend draws
the same.
The token order of the filters is (u ascending, index ascending); each filter keeps a prefix of it.
"""

import torch
from torch import Tensor

from rlhf_kernels.ops.sampling.philox import uniform

WEIGHT_BITS = 40
LARGEST_VOCABULARY = 1 << 22  # 2^22 weights of at most 2^40 stay below 2^62
LARGEST_U = 87.3  # below exp(-87.3) fp32 is subnormal: the weight is 0
ROUNDING_MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds an fp32 to an integer held in the low mantissa bits
LOG2_E = 1.44269504088896341
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # LN2_HIGH has 9 bits, so n * LN2_HIGH is exact
EXP_COEFFICIENTS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


def exp_weight(u: Tensor) -> Tensor:
    """exp(-u) for fp32 u >= 0 (inf gives 0), one rounded fp32 operation after the other; relative error below 1e-7."""
    x = -u.clamp(max=LARGEST_U)
    shifted = x * LOG2_E + ROUNDING_MAGIC
    n = shifted - ROUNDING_MAGIC
    r = x - n * LN2_HIGH
    r = r - n * LN2_LOW
    p = torch.full_like(r, EXP_COEFFICIENTS[0])
    for c in EXP_COEFFICIENTS[1:]:
        p = p * r + c
    y = ((r * r) * p + r) + 1.0
    scaled = (y.view(torch.int32) + (n.to(torch.int32) << 23)).view(torch.float32)  # times 2^n
    return scaled.masked_fill(u > LARGEST_U, 0.0)


def fixed_point(weight: Tensor) -> Tensor:
    """fp32 weights in [0, 1] as int64 multiples of 2^-40, rounded half to even."""
    return (weight.double() * 2.0**WEIGHT_BITS).round().long()


def kept(u: Tensor, mass: Tensor, top_k: Tensor, top_p: Tensor, min_p_cut: Tensor) -> Tensor:
    """Which tokens pass the filters: bool [N, V]. A tie at a threshold keeps the lowest indices."""
    n, v = u.shape
    order = u.sort(dim=-1, stable=True).indices
    rank = torch.arange(v, device=u.device).expand(n, v)
    keep = (rank < top_k[:, None]) | (top_k[:, None] == 0)
    sorted_mass = mass.gather(-1, order) * keep
    total = sorted_mass.sum(-1)
    goal = (top_p * total.double()).ceil().long().clamp(min=1).minimum(total)
    before = sorted_mass.cumsum(-1) - sorted_mass
    keep = keep & ((before < goal[:, None]) | (top_p >= 1.0)[:, None])
    return torch.zeros_like(keep).scatter(-1, order, keep) & (u <= min_p_cut[:, None])


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p_cut: Tensor,
    seed: Tensor,
    stream: Tensor,
    sample_index: Tensor,
    position: Tensor,
    greedy: Tensor,
) -> tuple[Tensor, Tensor]:
    """logits [N, V]; all others [N]: temperature > 0, top_p float64, min_p_cut = -log(min_p) fp32, integers int64,
    greedy bool. Returns token int64 [N] and logprob fp32 [N]."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    temperature = temperature.to(z.dtype)
    top = z.amax(-1)
    valid = top.isfinite() & (temperature > 0) & temperature.isfinite()
    valid &= (top_k >= 0) & (top_p >= 0) & (top_p <= 1) & (min_p_cut >= 0)
    valid &= (sample_index >> 32 == 0) & (position >> 32 == 0)
    z = torch.where(valid[:, None], z, 0.0)
    best = z.argmax(-1)
    best = (z == z.gather(-1, best[:, None])).to(torch.int8).argmax(-1)  # the lowest index among equals
    u = (z.gather(-1, best[:, None]) - z) / torch.where(valid, temperature, 1.0)[:, None]

    u32 = u.float()
    mass = fixed_point(exp_weight(u32))
    cdf = (mass * kept(u32, mass, top_k, top_p, min_p_cut)).cumsum(-1)
    total = cdf[:, -1]
    drawn = (uniform(seed, stream, sample_index, position) * total.double()).long().minimum(total - 1)
    token = torch.searchsorted(cdf, drawn[:, None], right=True)[:, 0]
    token = torch.where(greedy, best, token)

    # the top token stays out of the sum, and neither term below cancels: accurate where logprob is near 0 as well
    rest = torch.exp(-u.double()).scatter(-1, best[:, None], 0.0).sum(-1)
    logprob = -u.gather(-1, token[:, None])[:, 0].double() - torch.log1p(rest)
    token = token.masked_fill(~valid, 0)
    return token, logprob.float().masked_fill(~valid, float("nan"))

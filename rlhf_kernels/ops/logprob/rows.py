"""Row passes over one vocabulary block of fp32 logits, in PyTorch operations: any device, same contract as csrc's.

Each function first turns raw logits into z (`raw=True`), in place, as the native ones do.
"""

import torch
from torch import Tensor

from rlhf_kernels.ops.logprob.naive import LOWEST


def transform(z: Tensor, bias: Tensor | None, temperature: Tensor, softcap: float, scale: float) -> None:
    """Raw logits [rows, n] to softcap * tanh(scale * (raw + bias) / softcap) / temperature [rows], in place."""
    if bias is not None:
        z += bias
    z *= scale
    if softcap > 0:
        z.div_(softcap).tanh_().mul_(softcap)
    z /= temperature[:, None]
    z.clamp_(min=LOWEST)


def _target_column(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(whether the target lies in this block [rows], its column or 0 [rows, 1])."""
    here = (target >= 0) & (target < z.shape[1])
    return here, torch.where(here, target, 0)[:, None]


def _mass(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per row, fp64: log-mass, log-mass without the target, the target's z (-inf elsewhere), entropy; and the pivot."""
    top, pivot = z.max(1, keepdim=True)
    x = (z - top).clamp(min=-200)
    e = x.exp().scatter_(1, pivot, 0)
    r = e.sum(1, dtype=torch.float64)
    u = (e * x).sum(1, dtype=torch.float64)
    m, s = top.squeeze(1).double(), 1 + r
    lse = m + r.log1p()
    here, column = _target_column(z, target)
    at = z.gather(1, column).squeeze(1).double()
    is_pivot = pivot == column
    without = torch.where(is_pivot.squeeze(1), m + r.log(), m + (s - (at - m).exp()).log()).clamp(min=LOWEST)
    rest = torch.where(here, without, lse)
    return lse, rest, at.masked_fill(~here, float("-inf")), r.log1p() - u / s, pivot


def _ratio(z: Tensor, zr: Tensor, pivot: Tensor) -> tuple[Tensor, Tensor]:
    """(log-mass of zr minus that of z, KL of z's block distribution from zr's), fp64, relative to z's top token."""
    x = (z - z.gather(1, pivot)).clamp(min=-200)
    d = zr - z
    pivot_d = d.gather(1, pivot)
    d = d - pivot_d
    e = x.exp().scatter_(1, pivot, 0)
    far = (zr - zr.gather(1, pivot)).clamp(max=88).exp().scatter_(1, pivot, 0)
    small = d.abs() < 1
    near_d = torch.where(small, d, 0).double()
    b = torch.where(small, e * near_d.expm1(), (far - e).double())
    a = torch.where(small, e * (near_d.expm1() - near_d), b - e * d)
    s = 1 + e.sum(1, dtype=torch.float64)
    q = b.sum(1) / s
    weighted = (e * d).sum(1, dtype=torch.float64) / s
    reference_mass = zr.double().logsumexp(1) - zr.double().gather(1, pivot).squeeze(1)
    growth = torch.where(q.abs() < 0.5, q.log1p(), reference_mass - s.log())
    kl = torch.where(q.abs() < 0.5, a.sum(1) / s - (q - growth), growth - weighted)
    return growth + pivot_d.squeeze(1).double(), kl


def head_stats(
    z: Tensor,
    zr: Tensor | None,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    scale: float,
    raw: bool,
    kl: bool,
    rkl: bool,
    state: Tensor,
) -> None:
    """Statistics of a block into state [10, rows] (rows named in `merge`)."""
    if raw:
        transform(z, bias, temperature, softcap, scale)
    lse, rest, at, entropy, pivot = _mass(z, target)
    state.zero_()
    state[0], state[1], state[2], state[3] = lse, rest, at, entropy
    if zr is None:
        return
    if raw:
        transform(zr, bias, temperature, softcap, scale)
    ref_lse, ref_rest, ref_at, _, ref_pivot = _mass(zr, target)
    state[4], state[5], state[6] = ref_lse, ref_rest, ref_at
    state[7] = ref_lse - lse
    if rkl:
        difference, state[9] = _ratio(zr, z, ref_pivot)
        state[7] = -difference
    if kl:
        state[7], state[8] = _ratio(z, zr, pivot)


def head_exp(
    z: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    scale: float,
    raw: bool,
    first: bool,
    shift: Tensor,
    mass: Tensor,
    factor: Tensor,
    target_z: Tensor,
) -> None:
    """z to e^(z - shift) without the target, times the softcap's derivative; shift, mass, factor as in csrc."""
    if raw:
        transform(z, bias, temperature, softcap, scale)
    here, column = _target_column(z, target)
    at = z.gather(1, column).squeeze(1)
    target_z.copy_(torch.where(here, at.double(), target_z))
    z.scatter_(1, column, torch.where(here, LOWEST, at)[:, None])
    top = z.amax(1)
    grown = torch.full_like(top, True, dtype=torch.bool) if first else top - shift > 60
    factor.copy_(torch.ones_like(factor) if first else torch.where(grown, (shift - top).exp(), 1))
    shift.copy_(torch.where(grown, top, shift))
    mass.mul_(factor)
    derivative = 1 - (z * (temperature / softcap)[:, None]).square() if softcap > 0 else None
    z.sub_(shift[:, None]).exp_()
    z.scatter_(1, column, z.gather(1, column).masked_fill(here[:, None], 0))
    mass.add_(z.sum(1, dtype=torch.float64))
    if derivative is not None:
        z.mul_(torch.where(z > 0, derivative, 0))


def head_js(
    z: Tensor,
    zr: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    scale: float,
    raw: bool,
    lse: Tensor,
    ratio: Tensor,
    sums: Tensor,
) -> None:
    """Adds a block's shares of JS and of KL(p || (p + q) / 2) to sums [2, rows]."""
    if raw:
        transform(z, bias, temperature, softcap, scale)
        transform(zr, bias, temperature, softcap, scale)
    log_p = (z - lse[0][:, None]) - lse[1][:, None]
    t = (zr - z) - ratio[:, None]
    h = 0.5 * t.double()
    log_cosh = h.abs() + torch.log1p(torch.expm1(-2 * h.abs()) / 2)
    ref_lse = (lse[0].double() + lse[1] + ratio)[:, None]  # p e^t would round twice where |t| is large
    p, q = log_p.exp(), (zr - ref_lse.float() - (ref_lse - ref_lse.float()).float()).exp()
    p_part = torch.where(p == 0, 0, p * (-h - log_cosh))  # a NaN is not 0
    q_part = torch.where(q == 0, 0, q * (h - log_cosh))
    near = p * h.clamp(-1, 1).exp() * (h * h.clamp(-1, 1).sinh() - h.clamp(-1, 1).cosh() * log_cosh)
    sums[0] += torch.where(h.abs() < 0.5, near, 0.5 * (p_part + q_part)).sum(1)
    sums[1] += p_part.sum(1)


def head_grad(
    z: Tensor,
    zr: Tensor | None,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    scale: float,
    raw: bool,
    coefficients: Tensor,
    scratch: Tensor | None,
) -> None:
    """z to the gradient of the raw logits; coefficients [10, rows] as in csrc."""
    if raw:
        transform(z, bias, temperature, softcap, scale)
    lse, low, ratio, constant, entropy, kl, rkl, js, upstream, miss = (c[:, None] for c in coefficients)
    slope = scale / temperature[:, None]
    if softcap > 0:
        slope = slope * (1 - (z * (temperature / softcap)[:, None]).square())
    log_p = ((z - lse) - low).clamp(min=-200)
    p = log_p.exp()
    inner = constant + entropy * log_p
    here, column = _target_column(z, target)
    others = 0.0
    if zr is not None:
        if raw:
            transform(zr, bias, temperature, softcap, scale)
        t = (zr - z) - ratio
        half = 0.5 * t
        inner = inner - kl * t + js * (-half - (half.abs() + torch.log1p(torch.expm1(-2 * half.abs()) / 2)))
        near = -p * t.clamp(-1, 1).expm1()
        others = rkl * torch.where(t.abs() < 1, near, p - (((z - lse) - low) + t).exp())
    at_target = torch.where(p == 0, 0, p * (inner + upstream)) + others + miss
    dz = torch.where(p == 0, 0, p * inner) + others
    dz.scatter_(1, column, torch.where(here[:, None], at_target.gather(1, column), dz.gather(1, column)))
    z.copy_(dz * slope)

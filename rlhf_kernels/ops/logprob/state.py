"""Statistics of a set of vocabulary columns, and how two sets merge: the chain rule of entropy and KL, in float64.

A set's state is [10, rows]. With P_a, P_b the masses of two sets, H = P_a H_a + P_b H_b + H(P_a, P_b), and the same for
KL. Nothing is subtracted that is close to equal, so merging in any number of steps keeps a small KL's digits. Blocks
of one sweep and shards of several ranks merge by the same rule.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LSE, REST, TARGET, ENTROPY, REF_LSE, REF_REST, REF_TARGET, DIFFERENCE, KL, RKL = range(10)
# log-masses with and without the target, the target's z (-inf in a set without it), entropy within the set; the same of
# the reference; log-mass of the reference minus the policy's; KL(policy || reference) and the reverse within the set

BACKWARD = ("lse", "ratio", "entropy", "kl", "kl_mean", "miss")  # what backward needs, [6, rows]


class Parts(NamedTuple):
    """What the vector d logprob / d hidden is made of, with E' = e^(z - shift) without the target's column."""

    shift: Tensor  # fp32 [R]
    mass: Tensor  # fp64 [R]: sum of E'
    target_z: Tensor  # fp64 [R]: the target's z, -inf where it is not among the head's columns
    pulled: Tensor  # fp32 [R, H]: (E' times the softcap's derivative) W


class Swept(NamedTuple):
    """What a sweep over the head's columns found; None where it was not asked for, or where the blocks are to do it."""

    state: Tensor | None  # fp64 [10, R], rows as named in `state`
    parts: Parts | None
    void: Tensor | None = None  # int64: rows whose state is to be made anew, by blocks


def _binary_kl(log_a: Tensor, log_b: Tensor, diff_a: Tensor, diff_b: Tensor) -> tuple[Tensor, Tensor]:
    """KL of the two sets' masses and the merged log ratio, from log-masses and log ratios (other minus own)."""
    a_is_larger = log_a >= log_b
    gap = -(log_a - log_b).abs()
    pivot = torch.where(a_is_larger, diff_a, diff_b)
    d = torch.where(a_is_larger, diff_b, diff_a) - pivot
    e = gap.exp()
    s = 1 + e
    near = d.clamp(-1, 1)
    excess = e * near.expm1() / s
    growth_near = excess.log1p()
    kl_near = e * (near.expm1() - near) / s - (excess - growth_near)
    growth_far = torch.logaddexp(torch.zeros_like(gap), gap + d) - e.log1p()
    kl_far = growth_far - e * d / s
    small = d.abs() < 1
    return torch.where(small, kl_near, kl_far), torch.where(small, growth_near, growth_far) + pivot


def merge(a: Tensor, b: Tensor, reference: bool) -> Tensor:
    """The state of the union of two disjoint sets of columns."""
    out = torch.zeros_like(a)
    out[LSE] = lse = torch.logaddexp(a[LSE], b[LSE])
    out[REST] = torch.logaddexp(a[REST], b[REST])
    out[TARGET] = torch.maximum(a[TARGET], b[TARGET])
    share_a, share_b = (a[LSE] - lse).exp(), (b[LSE] - lse).exp()
    gap = -(a[LSE] - b[LSE]).abs()
    e = gap.exp()
    out[ENTROPY] = share_a * a[ENTROPY] + share_b * b[ENTROPY] + e.log1p() - e * gap / (1 + e)
    if not reference:
        return out
    out[REF_LSE] = ref_lse = torch.logaddexp(a[REF_LSE], b[REF_LSE])
    out[REF_REST] = torch.logaddexp(a[REF_REST], b[REF_REST])
    out[REF_TARGET] = torch.maximum(a[REF_TARGET], b[REF_TARGET])
    binary, out[DIFFERENCE] = _binary_kl(a[LSE], b[LSE], a[DIFFERENCE], b[DIFFERENCE])
    out[KL] = share_a * a[KL] + share_b * b[KL] + binary
    reverse, _ = _binary_kl(a[REF_LSE], b[REF_LSE], -a[DIFFERENCE], -b[DIFFERENCE])
    ref_a, ref_b = (a[REF_LSE] - ref_lse).exp(), (b[REF_LSE] - ref_lse).exp()
    out[RKL] = ref_a * a[RKL] + ref_b * b[RKL] + reverse
    return out


def logprob_of(rest: Tensor, target: Tensor) -> Tensor:
    """-log(1 + e^(rest - target)): exact near 0 and without overflow. A target outside the vocabulary gives NaN."""
    value = -torch.logaddexp(torch.zeros_like(rest), rest - target)
    return value.masked_fill(target == float("-inf"), float("nan"))

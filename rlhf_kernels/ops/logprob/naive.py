"""The definition: full logits, log_softmax and sums over the vocabulary; gradients by PyTorch's autograd.

Works in float64 when `hidden` is float64 (the oracle of the tests) and in float32 otherwise. The reference's logits are
constants. Rows with `ignore_index` take part in nothing.

A logit of -inf (a masked token) counts as LOWEST, here and in every kernel (csrc/cpu/logit_row.h: kLowest): it has no
mass, no difference of two logits is NaN, and a KL that is infinite comes back as a number near 1e30.
"""

import math
from collections.abc import Collection

import torch
from torch import Tensor

from rlhf_kernels.ops.logprob.outputs import FIELDS, LinearLogprobOutput, LogprobOutput, sampled_estimator

LOWEST = -1e30

Lora = tuple[Tensor, Tensor, Tensor | int | None, float | Tensor]


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    delta: Tensor | None = None,
) -> Tensor:
    """z [N, V] of hidden [N, H] and weight [V, H]; `delta` [N, V] is added to the product (a low-rank update)."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    u = hidden.to(dtype) @ weight.to(dtype).t()
    if delta is not None:
        u = u + delta
    if bias is not None:
        u = u + bias.to(dtype)
    u = logit_scale * u
    if softcap:
        u = softcap * torch.tanh(u / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype).reshape(-1, 1)
    return (u / temperature).clamp(min=LOWEST)


def low_rank_logits(hidden: Tensor, lora: Lora) -> Tensor:
    """scaling[e] * (x A_e^T) B_e^T for each row's adapter e, 0 where e = -1."""
    a, b, index, scaling = lora
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    a, b = (a, b) if a.dim() == 3 else (a[None], b[None])
    if not isinstance(index, Tensor):
        index = torch.full((len(hidden),), 0 if index is None else index, device=hidden.device)
    scales = torch.as_tensor(scaling, dtype=dtype, device=hidden.device).expand(len(a))
    out = torch.zeros(len(hidden), b.shape[1], dtype=dtype, device=hidden.device)
    for e in range(len(a)):  # selected, not multiplied by 0: a NaN in one adapter stays in its rows
        rows = (index.reshape(-1) == e)[:, None]
        x = torch.where(rows, hidden, 0).to(dtype)
        out = out + torch.where(rows, scales[e] * (x @ a[e].to(dtype).t()) @ b[e].to(dtype).t(), 0)
    return out


def distribution_fields(z: Tensor, target: Tensor, z_ref: Tensor | None, names: Collection[str]) -> dict[str, Tensor]:
    """The fields `names` of the rows of z [N, V] (and z_ref) at target [N]."""
    lp = z.log_softmax(-1)
    out = {"logprob": lp.gather(1, target[:, None]).squeeze(1), "lse": z.logsumexp(-1)}
    if "entropy" in names:
        out["entropy"] = -(lp.exp() * lp).sum(-1)
    if z_ref is None:
        return out
    lq = z_ref.log_softmax(-1)
    out["ref_logprob"] = lq.gather(1, target[:, None]).squeeze(1)
    if "kl" in names:
        out["kl"] = (lp.exp() * (lp - lq)).sum(-1)
    if "rkl" in names:
        out["rkl"] = (lq.exp() * (lq - lp)).sum(-1)
    if "js" in names:
        mean = torch.logaddexp(lp, lq) - math.log(2)
        out["js"] = 0.5 * (lp.exp() * (lp - mean)).sum(-1) + 0.5 * (lq.exp() * (lq - mean)).sum(-1)
    for name in ("k1", "k2", "k3"):
        if name in names:
            out[name] = sampled_estimator(name, out["logprob"], out["ref_logprob"])
    return out


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    divergence: Collection[str] = (),
    lora: Lora | None = None,
    grad_fields: Collection[str] | None = ("logprob",),
) -> LinearLogprobOutput:
    """As the public function, with full logits."""
    flat = target.reshape(-1).long()
    ignored = flat == ignore_index

    def counted(rows: Tensor) -> Tensor:
        return torch.where(ignored[:, None], 0, rows.reshape(len(flat), rows.shape[-1]))

    x, y = counted(hidden), torch.where(ignored, 0, flat)
    if isinstance(temperature, Tensor):
        temperature = torch.where(ignored, 1, temperature.broadcast_to(target.shape).reshape(-1))
    delta = None if lora is None else low_rank_logits(x, lora)
    z = head_logits(x, weight, bias, temperature, softcap, logit_scale, delta)
    z_ref = None
    if ref_hidden is not None:
        with torch.no_grad():
            other = weight if ref_weight is None else ref_weight
            z_ref = head_logits(counted(ref_hidden).to(x.dtype), other, bias, temperature, softcap, logit_scale)
    names = {*divergence, *(("entropy",) if entropy else ())}
    fields = distribution_fields(z, y, z_ref, names)
    out = {}
    for name, value in fields.items():
        carries = grad_fields is None or name in grad_fields
        out[name] = torch.where(ignored, 0, value if carries else value.detach()).reshape(target.shape)
    return LinearLogprobOutput(**{name: out[name] for name in FIELDS if name in out})


def logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
) -> LogprobOutput:
    """As the public function, by log_softmax."""
    flat = target.reshape(-1).long()
    ignored = flat == ignore_index
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = torch.where(ignored[:, None], 0, logits.reshape(len(flat), logits.shape[-1])).to(dtype)
    if isinstance(temperature, Tensor):
        temperature = torch.where(ignored, 1, temperature.broadcast_to(target.shape).reshape(-1)).to(dtype)[:, None]
    z = (z / temperature).clamp(min=LOWEST)
    fields = distribution_fields(z, torch.where(ignored, 0, flat), None, ("entropy",) if entropy else ())
    out = {name: torch.where(ignored, 0, value).reshape(target.shape) for name, value in fields.items()}
    return LogprobOutput(**out)

"""The definition of attention over packed rows and over the KV arena, one sequence at a time.

Query at position i sees the keys at j with i - window < j <= i:  out_i = sum_j softmax_j(z_ij) v_j  with
z = scale q.k, or softcap tanh(scale q.k / softcap). Query head h reads key/value head h // (heads // kv_heads).
"""

from itertools import pairwise

import torch
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """One sequence: q [n, H, d] are the last n of the m positions of k [m, KV, d] and v [m, KV, dv].

    Returns [n, H, dv]. Scores and probabilities are at least fp32; the result has q's dtype.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    weights, _ = _weights(q, k, scale, window, softcap)
    return torch.einsum("hnm,mhd->nhd", weights, v.to(wide).repeat_interleave(group, 1)).to(q.dtype)


def attend_grad(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attend` in q, k and v, for those of its result, grad [n, H, dv]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    weights, slope = _weights(q, k, scale, window, softcap)
    grad = grad.to(wide)
    weights_grad = torch.einsum("nhd,mhd->hnm", grad, v.to(wide).repeat_interleave(group, 1))
    scores_grad = weights * (weights_grad - (weights * weights_grad).sum(-1, keepdim=True)) * slope * scale
    dq = torch.einsum("hnm,mhd->nhd", scores_grad, k.to(wide).repeat_interleave(group, 1))
    dk = torch.einsum("hnm,nhd->mhd", scores_grad, q.to(wide)).unflatten(1, (-1, group)).sum(2)
    dv = torch.einsum("hnm,nhd->mhd", weights, grad).unflatten(1, (-1, group)).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _weights(
    q: Tensor, k: Tensor, scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor | float]:
    """Probabilities [H, n, m], and the softcap's slope at each score (1 without it)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("nhd,mhd->hnm", q.to(wide), keys) * scale
    slope: Tensor | float = 1.0
    if softcap is not None:
        tanh = torch.tanh(scores / softcap)
        scores, slope = tanh * softcap, 1 - tanh.square()
    j = torch.arange(k.shape[0], device=q.device)
    i = (k.shape[0] - q.shape[0] + torch.arange(q.shape[0], device=q.device))[:, None]
    seen = j <= i
    if window is not None:
        seen &= j > i - window
    return scores.masked_fill(~seen, float("-inf")).softmax(-1), slope


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal self-attention of whole sequences lying end to end: q [T, H, d], k [T, KV, d], v [T, KV, dv]."""
    borders = cu_seqlens.tolist()
    rows = [attend(q[a:b], k[a:b], v[a:b], scale, window, softcap) for a, b in pairwise(borders)]
    return torch.cat([*rows, q.new_empty(0, q.shape[1], v.shape[2])])


def sliced_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slice_table: Tensor,
    context_lens: Tensor,
    cu_q: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The same for each sequence's last tokens, q [T, H, d]; keys lie in slices [num_slices, KV, slice_tokens, d]."""
    slice_tokens = keys.shape[2]
    rows, borders = [], cu_q.tolist()
    for table, length, a, b in zip(slice_table, context_lens.tolist(), borders, borders[1:]):
        slices = table[: -(-length // slice_tokens)].long()
        k, v = (store[slices].transpose(1, 2).flatten(0, 1)[:length] for store in (keys, values))
        rows.append(attend(q[a:b], k, v, scale, window, softcap))
    return torch.cat([*rows, q.new_empty(0, q.shape[1], values.shape[3])])

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
    group = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(wide).repeat_interleave(group, 1), v.to(wide).repeat_interleave(group, 1)
    scores = torch.einsum("nhd,mhd->hnm", q.to(wide), k) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    j = torch.arange(k.shape[0], device=q.device)
    i = (k.shape[0] - q.shape[0] + torch.arange(q.shape[0], device=q.device))[:, None]
    seen = j <= i
    if window is not None:
        seen &= j > i - window
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weights, v).to(q.dtype)


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

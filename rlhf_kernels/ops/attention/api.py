"""Causal attention over packed rows (training, scoring) and over the KV arena (generation)."""

from typing import TYPE_CHECKING

from torch import Tensor

from rlhf_kernels.ops.attention import naive

if TYPE_CHECKING:
    from rlhf_kernels.generation.arena import Arena


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of whole sequences lying end to end."""
    return naive.varlen_attention(q, k, v, cu_seqlens, q.shape[-1] ** -0.5 if scale is None else scale, window, softcap)


def sliced_attention(
    q: Tensor,
    arena: "Arena",
    layer: int,
    slice_table: Tensor,
    context_lens: Tensor,
    cu_q: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of sequences' newest tokens to all their tokens in the arena."""
    keys, values = arena.keys[layer], arena.values[layer]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return naive.sliced_attention(q, keys, values, slice_table, context_lens, cu_q, scale, window, softcap)

"""How transformers' decoders run on one packed row of tokens: an attention function in transformers' own registry.

A forward gets `input_ids` [1, tokens], explicit `position_ids` [1, tokens], `use_cache=False` and one extra keyword,
`packed`, which transformers hands down to every attention layer. No mask is built: `packed` says where sequences begin.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_kernels.ops.attention import sliced_attention, varlen_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf_kernels.generation.arena import Arena

ATTENTION = "rlhf_kernels_packed"


@dataclass
class PackedRows:
    """Whole sequences end to end, without a cache: training and scoring. Differentiable."""

    cu_seqlens: Tensor  # int32 [sequences + 1]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return varlen_attention(q, k, v, self.cu_seqlens, **options)


@dataclass
class SlicedRows:
    """New tokens of running sequences, whose past lies in the arena: generation. No gradients."""

    arena: "Arena"
    slots: Tensor  # int64 [tokens]: the place in the arena (slice * slice_tokens + offset) each token is written to
    slice_table: Tensor  # int32 [sequences, most slices]
    context_lens: Tensor  # int32 [sequences]: tokens in the arena once this step's are written
    cu_q: Tensor  # int32 [sequences + 1]: this step's tokens of each sequence

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.arena.write(layer, self.slots, k, v)
        return sliced_attention(q, self.arena, layer, self.slice_table, self.context_lens, self.cu_q, **options)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed: PackedRows | SlicedRows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [1, heads, tokens, d], key and value [1, kv heads, tokens, d]."""
    if packed is None:
        raise ValueError("packed: this model's attention runs on packed rows only; pass packed=PackedRows(...)")
    if kwargs.get("s_aux") is not None:
        raise ValueError("s_aux: attention sinks are not supported")
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    out = packed.attend(module.layer_idx, q, k, v, scale=scaling, window=sliding_window, softcap=softcap)
    return out.unsqueeze(0), None


def use_packed_attention(model: "PreTrainedModel") -> None:
    """Registers the attention function and makes `model` use it; refuses models it would be wrong for."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    model.set_attn_implementation(ATTENTION)

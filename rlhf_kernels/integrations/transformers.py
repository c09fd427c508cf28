"""How transformers' decoders run on one packed row of tokens: an attention function in transformers' own registry.
(`register`, from transformers_sliced, is for models that keep transformers' batches.)

A forward gets `input_ids` [1, tokens], explicit `position_ids` [1, tokens], `use_cache=False` and one extra keyword,
`packed`, which transformers hands down to every attention layer. No mask is built: `packed` says where sequences begin.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from rlhf_kernels.integrations.transformers_sliced import ATTENTION_LAYERS, SLICED, register
from rlhf_kernels.ops.attention import native, sliced_attention, varlen_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf_kernels.generation.arena import Arena

__all__ = ["SLICED", "PackedRows", "SlicedRows", "check_decoder", "head_shape", "register", "use_packed_attention"]

ATTENTION = "rlhf_kernels_packed"
POSITION_DEPENDENT_ROPE = {"dynamic", "longrope"}


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
        places = self.slice_table, self.context_lens, self.cu_q
        # autocast may bring q in another dtype than the model's own, which the arena has
        return sliced_attention(q.to(self.arena.dtype), self.arena, layer, *places, **options).to(q.dtype)

    def rotate_and_attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """`attend` after the rotary embedding of q (where it lies) and k by cos and sin [tokens, rotated dims].

        For the CPU's own kernels, whose dtype and layout everything has already; the ops check what they read.
        """
        keys, values = self.arena.keys[layer], self.arena.values[layer]
        torch.ops.rlhf_kernels.rotate_write(q, k, v, cos, sin, keys, values, self.slots)
        scale = q.shape[2] ** -0.5 if scale is None else scale
        places = self.slice_table, self.context_lens, self.cu_q
        return native.sliced_attention(q, keys, values, *places, scale, window or 0, softcap or 0.0)


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
        raise ValueError(
            "packed: this model's attention runs on packed rows only; pass packed=PackedRows(...). If you did, a layer "
            "of the model hands no keywords down to its attention, and the model is not supported"
        )
    if attention_mask is not None:
        raise ValueError(f"model: {type(module).__name__} is not supported: it makes an attention mask of its own")
    if kwargs.get("s_aux") is not None:
        raise ValueError("s_aux: attention sinks are not supported")
    # under autocast the rotation leaves q and k in fp32 and v in the low dtype
    q, k, v = (t[0].transpose(0, 1).to(value.dtype) for t in (query, key, value))
    out = packed.attend(cast(int, module.layer_idx), q, k, v, scale=scaling, window=sliding_window, softcap=softcap)
    return out.unsqueeze(0), None


def use_packed_attention(model: "PreTrainedModel") -> Callable[[], None]:
    """Makes `model` run on packed rows (see `packed_attention`); returns a function that undoes it.

    Raises ValueError, before anything is changed, for a model it would be wrong for (see `check_decoder`). The model
    gets a configuration object of its own: others built from the same object keep their attention.
    """
    from transformers import AttentionInterface, PreTrainedConfig

    check_decoder(model)
    AttentionInterface.register(ATTENTION, packed_attention)
    before = model.config._attn_implementation
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = copy.deepcopy(module.config, memo)
    model.set_attn_implementation(ATTENTION)

    def undo() -> None:
        model.set_attn_implementation(before)

    return undo


def check_decoder(model: "PreTrainedModel") -> None:
    """Raises ValueError, naming the reason, for a model that cannot run on packed rows or take routed adapters."""
    config, name = model.config.get_text_config(), type(model).__name__
    problem = None
    kinds = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    rope = _rope_types(getattr(config, "rope_parameters", None)) | _rope_types(getattr(config, "rope_scaling", None))
    parameters, modules = list(model.named_parameters()), list(model.named_modules())
    if model.config.is_encoder_decoder:
        problem = "it is an encoder-decoder model; only causal decoders are supported"
    elif getattr(model, "_is_stateful", False) or kinds:
        problem = f"it has recurrent or hybrid layers ({', '.join(sorted(kinds)) or 'a state'}), not attention alone"
    elif any(p.ndim == 3 for _, p in parameters):
        expert = next(n for n, p in parameters if p.ndim == 3)
        problem = f"it holds mixture-of-experts weights as 3-D parameters ({expert})"
    elif not model._supports_attention_backend:
        problem = "its attention does not go through transformers' attention interface"
    elif rope & POSITION_DEPENDENT_ROPE:
        problem = f"its rope type {', '.join(sorted(rope))} depends on the longest position of the whole packed row"
    elif any(n.endswith("sinks") for n, _ in parameters):
        problem = "its attention has sinks"
    elif any(getattr(m, "is_causal", None) is False for _, m in modules):
        problem = "its attention is not causal"
    elif any(n.endswith("position_embeddings") and getattr(m, "padding_idx", None) is not None for n, m in modules):
        problem = "it counts positions from its padding token's id on, not from 0"
    if problem:
        raise ValueError(f"model: {name} is not supported: {problem}")


def _rope_types(parameters: Any) -> set[str]:
    """The rope types in a config's rope parameters, which may be nested by layer type."""
    if not isinstance(parameters, dict):
        return set()
    found = {parameters[key] for key in ("rope_type", "type") if isinstance(parameters.get(key), str)}
    return found.union(*(_rope_types(value) for value in parameters.values()))


def head_shape(model: "PreTrainedModel") -> dict[str, Any]:
    """What a model does to its logits after the head, as keywords of `linear_logprob` (softcap, logit_scale)."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or getattr(model, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None)
    if divisor:
        scale = divisor if "hyperclovax" in config.model_type else 1.0 / divisor
    return {"softcap": getattr(config, "final_logit_softcapping", None), "logit_scale": float(scale)}

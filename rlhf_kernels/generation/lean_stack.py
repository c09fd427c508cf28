"""A whole decoder as one op a step, where its layers are lean and its model is embedding, layers, norm and head.

The op (csrc/cpu/decoder_stack.cpp) serves bf16 on CPUs with AVX512-BF16. It reads the parameters where they lie, and a
role's adapter as bf16 copies of A and B made whenever steps begin anew. `lean.py` proves it against the model.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rlhf_kernels.generation.lean_parts import LeanLayer, LeanNorm, Part
from rlhf_kernels.nn.lora import LoRALinear
from rlhf_kernels.ops import registry

VECTOR_UNIT = 1  # what bf16_isa says of AVX512-BF16; beside a matrix unit the layers' own products are faster
STACK = {"embed_tokens", "layers", "norm", "rotary_emb"}
POSITIONS = 1024  # the table of cos and sin grows by so many


class LeanStack(Part):
    """The model's forward: {embedding, layers, norm, head} in one op. `begin` before the first step of each run."""

    def __init__(self, lm: Any, layers: list[LeanLayer], norm: LeanNorm, linears: list[nn.Module]) -> None:
        decoder = getattr(lm, lm.base_model_prefix)
        super().__init__(lm, [decoder, *decoder.children(), lm.lm_head, *decoder.layers], [*layers, norm])
        self.decoder, self.layers, self.norm, self.linears = decoder, layers, norm, linears
        self.routes = next((m.routes for m in linears if isinstance(m, LoRALinear)), None)
        self._adapters: dict[str, list[Tensor]] = {}

    def current(self) -> bool:
        return super().current() and all(part.current() for part in self.parts)

    def begin(self) -> None:
        """Reads the parameters anew."""
        owned: list[Any] = [own._parameters for own in self.linears]
        weights = [own["weight"] for own in owned]
        none = weights[0].new_empty(0)
        biases = [none if own["bias"] is None else own["bias"] for own in owned]
        vectors = []
        for layer in self.layers:
            norms = [layer.norm, layer.second_norm, *(layer.attention.norms or (None, None))]
            vectors += [none if norm is None else norm.module._parameters["weight"] for norm in norms]
        self._weights, self._vectors = weights, vectors
        self._biases = biases if any(bias.numel() for bias in biases) else []
        head: Any = self.module._modules["lm_head"]
        self._ends = [self.norm.module._parameters["weight"], head._parameters["weight"]]
        self._embedding = self.decoder.embed_tokens._parameters["weight"]
        self._norms = [x for norm in (self.norm, self._head_norm()) for x in (norm.eps, norm.offset, norm.round_first)]
        options = [layer.attention.options for layer in self.layers]
        dims = self.layers[0].attention.head_dim
        self._scales = [dims**-0.5 if o["scale"] is None else o["scale"] for o in options]
        self._windows, self._softcaps = ([o[name] or 0 for o in options] for name in ("window", "softcap"))
        self._cos = self._sin = none[:, None]
        self._adapters = {}

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, use_cache: bool, logits_to_keep: Tensor, packed: Any
    ) -> Any:
        rows = getattr(packed, "rows", packed)  # a first step wraps them
        adapters, scaling = self._adapter(input_ids.shape[1])
        arena = rows.arena
        if len(self._cos) < arena.slice_tokens * rows.slice_table.shape[1]:  # no position lies beyond the table
            self._rotations(arena.slice_tokens * rows.slice_table.shape[1])
        logits = torch.ops.rlhf_kernels.decoder_step(
            input_ids[0], position_ids[0], logits_to_keep, self._embedding, self._weights, self._biases, self._vectors,
            adapters, scaling, *self._ends, self._norms, self._cos, self._sin, arena.keys, arena.values, rows.slots,
            rows.slice_table, rows.context_lens, rows.cu_q, self._scales, self._windows, self._softcaps,
        )  # fmt: skip
        return SimpleNamespace(logits=logits[None])

    def serves(self, *args: Any, input_ids: Tensor, **kwargs: Any) -> bool:
        """Whether the running forward's adapters are of a kind that the op takes: one for all rows, or none."""
        running = None if self.routes is None else self.routes.running
        return running is None or not running.names or running.runs == [0, input_ids.shape[1], 0]

    def _head_norm(self) -> LeanNorm:
        norms = self.layers[0].attention.norms
        return norms[0] if norms else self.norm

    def _rotations(self, positions: int) -> None:
        """The tables of cos and sin [positions, rotated dims], as the model's own module makes them."""
        places = torch.arange(-(-positions // POSITIONS) * POSITIONS)
        cos, sin = self.decoder.rotary_emb(self._embedding, places[None])
        self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()

    def _adapter(self, rows: int) -> tuple[list[Tensor], float]:
        running = None if self.routes is None else self.routes.running
        if running is None or not running.names:
            return [], 1.0
        name = running.names[0]
        if name not in self._adapters:
            self._adapters[name] = [t for linear in self.linears for t in _matrices(linear, name)]
        return self._adapters[name], running.scaling[0]


def stack_of(lm: Any, parts: Mapping[nn.Module, Part]) -> LeanStack | None:
    """The model as a stack where it is built as one; `parts`: its modules' replacements, which are proved."""
    decoder = getattr(lm, getattr(lm, "base_model_prefix", ""), None)
    if (
        decoder is None
        or decoder is lm
        or set(decoder._modules) != STACK
        or set(lm._modules) != {lm.base_model_prefix, "lm_head"}
    ):
        return None
    layers, norm = [parts.get(layer) for layer in decoder.layers], parts.get(decoder.norm)
    if not layers or not all(type(layer) is LeanLayer for layer in layers) or type(norm) is not LeanNorm:
        return None
    linears = [m for layer in layers for m in _linears(layer)]  # type: ignore[arg-type]
    stack = LeanStack(lm, layers, norm, linears)  # type: ignore[arg-type]
    return stack if _suits(stack) else None


def _linears(layer: LeanLayer) -> list[nn.Module]:
    attention, mlp = layer.attention.module, layer.mlp.module
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return [attention._modules[n] for n in names] + [mlp._modules[n] for n in ("gate_proj", "up_proj", "down_proj")]


def _matrices(linear: Any, name: str) -> tuple[Tensor, Tensor]:
    """A and B in bf16, of an even rank; empty where the layer has no such adapter."""
    if not isinstance(linear, LoRALinear) or name not in linear.lora_A:
        return linear.weight.new_empty(0), linear.weight.new_empty(0)
    a, b = linear.lora_A[name].detach().bfloat16(), linear.lora_B[name].detach().bfloat16()
    return (pad(a, (0, 0, 0, 1)), pad(b, (0, 1))) if len(a) % 2 else (a, b)


def _suits(stack: LeanStack) -> bool:
    """What the op asks for beyond lean layers: bf16 throughout, even sizes, norms of one style, SiLU."""
    lm, decoder = stack.module, stack.decoder
    embedding, head = decoder.embed_tokens, lm._modules["lm_head"]
    attentions = [layer.attention for layer in stack.layers]
    norms = [norm for layer in stack.layers for norm in (layer.norm, layer.second_norm)] + [stack.norm]
    head_norms = [norm for attention in attentions for norm in attention.norms]
    sizes = [size for linear in stack.linears for size in (linear.in_features, linear.out_features)]
    tensors = [t for part in (embedding, head, decoder.norm, *decoder.layers) for t in part.parameters()]
    own = {
        id(t)
        for linear in stack.linears
        if isinstance(linear, LoRALinear)
        for d in (linear.lora_A, linear.lora_B)
        for t in d.values()
    }
    return (
        registry.native_available() and torch.ops.rlhf_kernels.bf16_isa() == VECTOR_UNIT
        and type(embedding) is nn.Embedding and embedding.max_norm is None and embedding.weight.is_contiguous()
        and type(head) is nn.Linear and head.bias is None
        and all(layer.mlp.act is None for layer in stack.layers)
        and all(type(m) is nn.Linear or (isinstance(m, LoRALinear) and not m.transposed) for m in stack.linears)
        and len({id(m.routes) for m in stack.linears if isinstance(m, LoRALinear)}) <= 1
        and len({_style(norm) for norm in norms}) == 1 and len({_style(norm) for norm in head_norms}) <= 1
        and len({(a.head_dim, len(a.norms)) for a in attentions}) == 1
        and all(size % 2 == 0 for size in (*sizes, attentions[0].head_dim))
        and all(t.dtype == torch.bfloat16 and t.stride(-1) == 1 for t in tensors if id(t) not in own)
    )  # fmt: skip


def _style(norm: LeanNorm) -> tuple[float, float, bool]:
    return norm.eps, norm.offset, norm.round_first

"""The KV arena: one allocation of a fixed number of bytes, cut into slices of `slice_tokens` tokens.

A slice holds the keys and values of the same `slice_tokens` tokens in every layer. The bytes lie layer by layer:
`keys[layer]` and `values[layer]` are views [num_slices, kv_heads, slice_tokens, head_dim] of the one buffer.
The buffer is made at the first use and given back by `release()`; nothing else is allocated per sequence.
"""

import ctypes
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.memory_size import parse_bytes
from rlhf_kernels.ops import registry
from rlhf_kernels.ops.attention import native, triton_tier

HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14
ALIGNMENT = 64  # bytes: a cache line, and the widest vector load


class LayerShape(NamedTuple):
    """One attention layer's cache: how many key/value heads, and the dims of a key and of a value."""

    kv_heads: int
    k_dim: int
    v_dim: int


class Arena:
    """Keys and values of every layer in one buffer that never exceeds `kv_memory` bytes.

    layers: one (kv_heads, k_dim, v_dim) a layer;  kv_memory: bytes, or "512MiB";  slice_tokens: tokens in a slice.
    Attributes: `num_slices`, `slice_tokens`, `slice_bytes` (one slice in all layers), `nbytes` (the buffer; what
    alignment and the last fraction of a slice leave over is not allocated), `layers`, `dtype`, `device`.
    Raises ValueError if not even one slice fits.
    """

    def __init__(
        self,
        layers: Sequence[tuple[int, int, int]],
        kv_memory: int | str,
        slice_tokens: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers = [LayerShape(*shape) for shape in layers]
        if not self.layers or any(size < 1 for shape in self.layers for size in shape):
            raise ValueError(
                f"layers is {list(layers)}; it must hold (kv_heads, k_dim, v_dim), each >= 1, for every layer"
            )
        if slice_tokens < 1:
            raise ValueError(f"slice_tokens is {slice_tokens}; it must be at least 1")
        if not dtype.is_floating_point:
            raise TypeError(f"dtype is {dtype}; it must be a floating point type")
        self.kv_memory = parse_bytes(kv_memory, "kv_memory")
        self.slice_tokens = slice_tokens
        self.dtype = dtype
        self.device = torch.device(device)
        self.slice_bytes = sum(self._plane_bytes())
        self.num_slices = self.kv_memory // self.slice_bytes
        while self.num_slices and self._layout(self.num_slices)[1] > self.kv_memory:  # a few bytes of alignment
            self.num_slices -= 1
        if self.num_slices == 0:
            raise ValueError(
                f"kv_memory is {self.kv_memory} bytes; one slice of {slice_tokens} tokens needs {self._layout(1)[1]}"
            )
        self.nbytes = self._layout(self.num_slices)[1]
        self._buffer: Tensor | None = None
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    @classmethod
    def from_config(
        cls,
        model_or_config: Any,
        kv_memory: int | str,
        slice_tokens: int = 16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "Arena":
        """An arena sized for a transformers model (or its config); dtype and device default to the model's."""
        config = getattr(model_or_config, "config", model_or_config)
        if dtype is None:
            dtype = getattr(model_or_config, "dtype", None) or torch.float32
        if device is None:
            device = getattr(model_or_config, "device", None) or "cpu"
        return cls(layer_shapes(config), kv_memory, slice_tokens, dtype, device)

    @property
    def held(self) -> bool:
        """Whether the buffer is allocated at the moment."""
        return self._buffer is not None

    @property
    def keys(self) -> list[Tensor]:
        """One view [num_slices, kv_heads, slice_tokens, k_dim] a layer."""
        if self._buffer is None:
            self.acquire()
        return self._keys

    @property
    def values(self) -> list[Tensor]:
        """One view [num_slices, kv_heads, slice_tokens, v_dim] a layer."""
        if self._buffer is None:
            self.acquire()
        return self._values

    def acquire(self) -> None:
        """Allocates the buffer, if it is not there. Also right under inference_mode: the buffer is a normal tensor."""
        if self._buffer is not None:
            return
        starts, nbytes = self._layout(self.num_slices)
        with torch.inference_mode(False), torch.no_grad():
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            _ask_for_huge_pages(buffer)
            views = [
                buffer[start : start + self.num_slices * plane]
                .view(self.dtype)
                .view(self.num_slices, heads, self.slice_tokens, dim)
                for start, plane, (heads, dim) in zip(starts, self._plane_bytes(), self._planes())
            ]
        self._keys, self._values = views[0::2], views[1::2]
        self._buffer = buffer  # last: interrupted before, the arena is as it was

    def release(self) -> None:
        """Gives the bytes back; what was written is lost. The next use allocates them again."""
        self._buffer = None
        self._keys, self._values = [], []

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Puts tokens' keys and values in their places; a slot is slice * slice_tokens + offset.

        slots int64 [T];  k [T, kv_heads, k_dim];  v [T, kv_heads, v_dim], converted to the arena's dtype; no gradients.
        On a GPU a slot outside the arena is skipped: -1 pads a captured graph. Raises ValueError for shapes that do not
        fit and, on the CPU, IndexError for a slot outside the arena.
        """
        keys, values = self.keys[layer], self.values[layer]
        self.check_rows(layer, slots, k, v)
        backend = registry.choose("arena_write", keys)
        if backend == "triton":
            self.check_slots(slots)
            triton_tier.arena_write(keys, values, slots, k.detach(), v.detach())
            return
        k, v = k.detach().to(self.dtype), v.detach().to(self.dtype)
        if backend == "native":
            try:  # the compiled op checks the slots as it reads them
                native.arena_write(keys, values, slots, k, v)
            except RuntimeError:
                self.check_slots(slots)
                raise
            return
        self.check_slots(slots)
        with torch.no_grad():
            index, offset = slots // self.slice_tokens, slots % self.slice_tokens
            keys[index, :, offset] = k
            values[index, :, offset] = v

    def copy_slices(self, copies: Sequence[tuple[int, int]], tokens: int | None = None) -> None:
        """For every (source, target): copies the first `tokens` tokens (default: all), in every layer.

        All are read before any is written. Raises IndexError for a slice that is not there.
        """
        count = self.slice_tokens if tokens is None else tokens
        for pair in copies:
            for name, index in zip(("source", "target"), pair):
                if not 0 <= index < self.num_slices:
                    raise IndexError(f"{name} is {index}; the arena has slices 0 to {self.num_slices - 1}")
        if not 0 <= count <= self.slice_tokens:
            raise ValueError(f"tokens is {count}; it must lie between 0 and slice_tokens, {self.slice_tokens}")
        if not copies:
            return
        source, target = torch.tensor(copies, device=self.device).unbind(1)
        with torch.no_grad():
            for view in (*self.keys, *self.values):
                view[target, :, :count] = view[source, :, :count]

    def check_rows(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """What `write` raises for shapes."""
        if slots.dtype != torch.int64 or slots.dim() != 1:
            raise TypeError(f"slots is {slots.dtype} {tuple(slots.shape)}; it must be torch.int64 [tokens]")
        kv_heads, k_dim, v_dim = self.layers[layer]
        tokens = slots.shape[0]
        if k.shape != (tokens, kv_heads, k_dim):
            raise ValueError(f"k has shape {tuple(k.shape)}; layer {layer} and slots need {(tokens, kv_heads, k_dim)}")
        if v.shape != (tokens, kv_heads, v_dim):
            raise ValueError(f"v has shape {tuple(v.shape)}; layer {layer} and slots need {(tokens, kv_heads, v_dim)}")

    def check_slots(self, slots: Tensor) -> None:
        """What `write` raises for a slot outside the arena."""
        if slots.device.type != "cpu" or slots.numel() == 0:
            return
        low, high = slots.min().item(), slots.max().item()
        limit = self.num_slices * self.slice_tokens
        if low < 0 or high >= limit:
            raise IndexError(f"slots holds {low if low < 0 else high}; the arena has slots 0 to {limit - 1}")

    def _planes(self) -> list[tuple[int, int]]:
        """(kv_heads, dim) of each region of the buffer: keys and values of layer 0, of layer 1, ..."""
        return [plane for heads, k_dim, v_dim in self.layers for plane in ((heads, k_dim), (heads, v_dim))]

    def _plane_bytes(self) -> list[int]:
        """Bytes of one slice in each region."""
        return [heads * dim * self.slice_tokens * self.dtype.itemsize for heads, dim in self._planes()]

    def _layout(self, num_slices: int) -> tuple[list[int], int]:
        """Where each region starts, aligned, and the bytes of them all."""
        starts, end = [], 0
        for plane in self._plane_bytes():
            start = -(-end // ALIGNMENT) * ALIGNMENT
            starts.append(start)
            end = start + num_slices * plane
        return starts, end


def _ask_for_huge_pages(buffer: Tensor) -> None:
    """Slices lie all over a large buffer: with pages of 4 KiB translating their addresses costs as much as reading."""
    if buffer.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    start = -(-buffer.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    size = (buffer.data_ptr() + buffer.numel() - start) // HUGE_PAGE * HUGE_PAGE
    if size > 0:  # the answer is not looked at: Linux may refuse
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_HUGEPAGE)


def layer_shapes(config: Any) -> list[LayerShape]:
    """The cache shape of every attention layer of a transformers config; layers, keys and values may differ."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "is_heterogeneous", False):
        return [_layer_shape(config.per_layer_config[layer]) for layer in range(config.num_hidden_layers)]
    return [_layer_shape(config)] * config.num_hidden_layers


def _layer_shape(config: Any) -> LayerShape:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    k_dim, v_dim = head_dim, getattr(config, "v_head_dim", None) or head_dim
    if getattr(config, "qk_nope_head_dim", None) is not None:  # latent attention: a key is a plain and a rotated part
        k_dim, kv_heads = config.qk_nope_head_dim + config.qk_rope_head_dim, heads
    return LayerShape(kv_heads, k_dim, v_dim)

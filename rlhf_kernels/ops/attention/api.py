"""Causal attention over packed rows (training, scoring) and over the KV arena (generation).

Query head h reads key/value head h // (heads // kv_heads). A query at position i sees the keys at j with
i - window < j <= i.
"""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.attention import naive, native, triton_tier

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
    """Causal self-attention of whole sequences lying end to end, without padding. Differentiable in q, k and v.

    Args:
        q: [tokens, heads, d];  k: [tokens, kv_heads, d];  v: [tokens, kv_heads, dv]; one floating dtype and device. Any
            strides; heads is a multiple of kv_heads.
        cu_seqlens: int32 [sequences + 1]: where each sequence begins, from 0, and at last the number of tokens.
        scale: factor of q.k, default d ** -0.5.
        window: how many keys a query sees, itself included; None: all before it.
        softcap: scores s become softcap * tanh(s / softcap); None: they do not.

    Returns:
        [tokens, heads, dv] in q's dtype. Kept for the backward pass: the arguments, the result and one fp32 number a
        head and token; nothing grows with a sequence's length squared. On the CPU (fp32, bf16) sums are fp32 and run in
        blocks of keys by position: a token's output does not depend on the other sequences, and is bit-equal to
        `sliced_attention`'s for the same keys. bf16 weights are rounded to bf16 where the chip multiplies bf16.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, or (on the CPU) a cu_seqlens that does
            not rise from 0 to the number of tokens.

    Source: Dao et al., 2022 (FlashAttention); softcap: Gemma 2, 2024.
    """
    _check_rows("q", q, 3)
    _check_rows("k", k, 3, like=q)
    _check_rows("v", v, 3, like=q)
    tokens, heads, d = q.shape
    if k.shape[0] != tokens or k.shape[2] != d:
        raise ValueError(f"k has shape {tuple(k.shape)}; with q {tuple(q.shape)} it must be [{tokens}, kv_heads, {d}]")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"v has shape {tuple(v.shape)}; with k {tuple(k.shape)} it must be [{tokens}, {k.shape[1]}, dv]"
        )
    _check_groups("k", heads, k.shape[1])
    _check_index("cu_seqlens", cu_seqlens, 1, q)
    options = _options(d, scale, window, softcap)
    backend = registry.choose("varlen_attention", q)
    if backend == "triton" and triton_tier.fits(d, v.shape[2], triton_tier.LEAST_DIM):
        if registry.checks_values(cu_seqlens):
            _check_borders("cu_seqlens", cu_seqlens, tokens)
        return triton_tier.varlen_attention(q, k, v, cu_seqlens, *options)
    if backend != "native":
        return _varlen(q, k, v, cu_seqlens, *options)
    if torch.compiler.is_compiling():
        return native.varlen_attention(q, k, v, cu_seqlens, *options)
    try:  # the compiled op checks the values as it reads them; what was wrong is looked up only then
        return native.varlen_attention(q, k, v, cu_seqlens, *options)
    except RuntimeError:
        _check_borders("cu_seqlens", cu_seqlens, tokens)
        raise


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
    """Attention of sequences' newest tokens to all of their tokens in the arena, themselves included. No gradients.

    Query j of sequence b stands at position context_lens[b] - (cu_q[b + 1] - cu_q[b]) + j: decode steps bring one query
    a sequence, prefill pieces several, and both may share a call.

    Args:
        q: [tokens, heads, d] in the arena's dtype, all sequences' queries end to end; any strides.
        arena, layer: where the keys and values are, already written.
        slice_table: int32 [sequences, most slices]: the slices of each sequence in order; entries past a sequence's
            context are not read.
        context_lens: int32 [sequences]: tokens of each sequence in the arena, this step's included.
        cu_q: int32 [sequences + 1]: where each sequence's queries begin, from 0, and at last the number of tokens.
        scale, window, softcap: as in `varlen_attention`.

    Returns:
        [tokens, heads, dv] in q's dtype; zeros for a sequence whose context is 0 (on a GPU and in the definition: what
        pads a captured graph). On the CPU (fp32, bf16) a token's output is the same bits for every batch, slice size,
        slice order and division into prefill pieces; leading slices that sequences with one query share are read once
        for all of them. On a GPU no value is read by the host; a decoded token's output is the same bits for every
        batch and slice order, as long as the slice table is as wide.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong dtype, shape or device, or (on the CPU) lengths and
            slices that do not fit.

    Source: Kwon et al., 2023 (PagedAttention); softcap: Gemma 2, 2024.
    """
    keys, values = _check_sliced(q, arena, layer, slice_table, context_lens, cu_q)
    options = _options(q.shape[2], scale, window, softcap)
    q = q.detach() if q.requires_grad else q
    backend = registry.choose("sliced_attention", q)
    if backend == "triton" and triton_tier.fits(q.shape[2], values.shape[3]):
        if registry.checks_values(cu_q):
            _check_slices(keys, q.shape[0], slice_table, context_lens, cu_q)
        return triton_tier.sliced_attention(q, keys, values, slice_table, context_lens, cu_q, *options)
    if backend != "native":
        return _sliced(q, keys, values, slice_table, context_lens, cu_q, *options)
    if torch.compiler.is_compiling():
        return native.sliced_attention(q, keys, values, slice_table, context_lens, cu_q, *options)
    try:
        return native.sliced_attention(q, keys, values, slice_table, context_lens, cu_q, *options)
    except RuntimeError:
        _check_slices(keys, q.shape[0], slice_table, context_lens, cu_q)
        raise


def sliced_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    arena: "Arena",
    layer: int,
    slots: Tensor,
    slice_table: Tensor,
    context_lens: Tensor,
    cu_q: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """A layer's whole step: `arena.write(layer, slots, k, v)`, then `sliced_attention`; on the CPU in one op.

    Everything is written before anything is read: a sequence may read slices that another writes in this step.

    Args:
        q, arena, layer, slice_table, context_lens, cu_q, scale, window, softcap: as in `sliced_attention`.
        k: [tokens, kv_heads, d];  v: [tokens, kv_heads, dv]: this step's tokens, in the arena's dtype; any strides.
        slots: int64 [tokens]: the place in the arena (slice * slice_tokens + offset) each token is written to.

    Returns, raises: as `arena.write` and `sliced_attention`; values are checked as they are read, so what is wrong with
        the slice table is found after the keys are written.
    """
    native_one = k.dtype == v.dtype == arena.dtype and registry.choose("sliced_step", q) == "native"
    if not native_one or q.requires_grad or k.requires_grad or v.requires_grad:
        arena.write(layer, slots, k, v)
        return sliced_attention(
            q, arena, layer, slice_table, context_lens, cu_q, scale=scale, window=window, softcap=softcap
        )
    keys, values = _check_sliced(q, arena, layer, slice_table, context_lens, cu_q)
    arena.check_rows(layer, slots, k, v)
    options = _options(q.shape[2], scale, window, softcap)
    try:
        return native.sliced_step(q, k, v, keys, values, slots, slice_table, context_lens, cu_q, *options)
    except RuntimeError:
        arena.check_slots(slots)
        _check_slices(keys, q.shape[0], slice_table, context_lens, cu_q)
        raise


def _check_sliced(
    q: Tensor, arena: "Arena", layer: int, slice_table: Tensor, context_lens: Tensor, cu_q: Tensor
) -> tuple[Tensor, Tensor]:
    """The layer's keys and values, after what can be checked without reading values."""
    _check_rows("q", q, 3)
    if not 0 <= layer < len(arena.layers):
        raise IndexError(f"layer is {layer}; the arena has layers 0 to {len(arena.layers) - 1}")
    keys, values = arena.keys[layer], arena.values[layer]
    if q.dtype != keys.dtype or q.device != keys.device:
        raise TypeError(f"q is {q.dtype} on {q.device}; the arena is {keys.dtype} on {keys.device}")
    if q.shape[2] != keys.shape[3]:
        raise ValueError(f"q has shape {tuple(q.shape)}; layer {layer} of the arena has keys of dim {keys.shape[3]}")
    _check_groups("arena", q.shape[1], keys.shape[1])
    _check_index("slice_table", slice_table, 2, q)
    _check_index("context_lens", context_lens, 1, q)
    _check_index("cu_q", cu_q, 1, q)
    sequences = slice_table.shape[0]
    if context_lens.shape[0] != sequences:
        raise ValueError(f"context_lens has {context_lens.shape[0]} entries; slice_table has {sequences} sequences")
    if cu_q.shape[0] != sequences + 1:
        raise ValueError(f"cu_q has {cu_q.shape[0]} entries; {sequences} sequences need {sequences + 1}")
    return keys, values


def _check_rows(name: str, x: Tensor, dims: int, like: Tensor | None = None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}; it must be a tensor")
    if x.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [tokens, heads, dim]")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} is {x.dtype}; it must be a floating point tensor")
    if like is not None and (x.dtype != like.dtype or x.device != like.device):
        raise TypeError(f"{name} is {x.dtype} on {x.device}; it must be as q, {like.dtype} on {like.device}")


def _check_groups(name: str, heads: int, kv_heads: int) -> None:
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{name} has {kv_heads} kv heads; q's {heads} heads must be a multiple of them")


def _check_index(name: str, x: Tensor, dims: int, q: Tensor) -> None:
    if x.dtype != torch.int32:
        raise TypeError(f"{name} is {x.dtype}; it must be torch.int32")
    if x.dim() != dims or (dims == 1 and x.shape[0] == 0 and name.startswith("cu_")):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it must have {dims} dimension{'s' * (dims > 1)}, not empty"
        )
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}; it must be on q's device, {q.device}")


def _options(d: int, scale: float | None, window: int | None, softcap: float | None) -> tuple[float, int, float]:
    """scale, window and softcap as the registered ops take them: 0 means none."""
    for name, value, kinds in (
        ("scale", scale, (int, float)),
        ("window", window, int),
        ("softcap", softcap, (int, float)),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
            raise TypeError(f"{name} is {value!r}; it must be {'an int' if kinds is int else 'a number'}, or None")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1 (the token itself), or None")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be greater than 0, or None")
    return d**-0.5 if scale is None else float(scale), window or 0, softcap or 0.0


def _check_borders(name: str, borders: Tensor, tokens: int) -> None:
    places = borders.tolist()
    if places[0] != 0 or places[-1] != tokens or any(a > b for a, b in pairwise(places)):
        shown = places if len(places) <= 8 else [*places[:4], "...", *places[-3:]]
        raise ValueError(f"{name} is {shown}; it must rise from 0 to the number of tokens, {tokens}")


def _check_slices(keys: Tensor, tokens: int, slice_table: Tensor, context_lens: Tensor, cu_q: Tensor) -> None:
    _check_borders("cu_q", cu_q, tokens)
    slice_tokens = keys.shape[2]
    for b, (length, new) in enumerate(zip(context_lens.tolist(), cu_q.diff().tolist(), strict=True)):
        if 0 < length < new or length < 0:
            raise ValueError(f"context_lens[{b}] is {length}; it must count sequence {b}'s {new} queries too")
        slices = -(-length // slice_tokens)
        if slices > slice_table.shape[1]:
            raise ValueError(f"context_lens[{b}] is {length}: {slices} slices; slice_table has {slice_table.shape[1]}")
        for i, index in enumerate(slice_table[b, :slices].tolist()):
            if not 0 <= index < keys.shape[0]:
                raise IndexError(f"slice_table[{b}, {i}] is {index}; the arena has slices 0 to {keys.shape[0] - 1}")


# What serves devices and dtypes without a kernel: the definitions, as ops that torch.compile does not look into.


@torch.library.custom_op("rlhf_kernels::varlen_attention", mutates_args=())
def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    if registry.checks_values(cu_seqlens):
        _check_borders("cu_seqlens", cu_seqlens, q.shape[0])
    return naive.varlen_attention(q, k, v, cu_seqlens, scale, window or None, softcap or None)


@_varlen.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


@torch.library.custom_op("rlhf_kernels::varlen_attention_grad", mutates_args=())
def _varlen_grad(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Recomputes the forward: one sequence's scores are what it costs, not all of them."""
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    borders = cu_seqlens.tolist()
    for a, b in pairwise(borders):
        parts = naive.attend_grad(grad[a:b], q[a:b], k[a:b], v[a:b], scale, window or None, softcap or None)
        dq[a:b], dk[a:b], dv[a:b] = parts
    return dq, dk, dv


@_varlen_grad.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_varlen_grad(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


_varlen.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("rlhf_kernels::sliced_attention", mutates_args=())
def _sliced(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slice_table: Tensor,
    context_lens: Tensor,
    cu_q: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    if registry.checks_values(cu_q):
        _check_slices(keys, q.shape[0], slice_table, context_lens, cu_q)
    options = (scale, window or None, softcap or None)
    return naive.sliced_attention(q, keys, values, slice_table, context_lens, cu_q, *options)


@_sliced.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], values.shape[3])

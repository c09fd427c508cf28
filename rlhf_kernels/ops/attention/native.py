"""Binding of the compiled attention ops (csrc/cpu/attention.cpp): their shapes for tracing, and their gradient.

In the ops' schemas a window of 0 and a softcap of 0 mean none.
"""

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops.registry import native_available, serves

AVAILABLE = native_available()


def _forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    return q.new_empty(tokens, heads, v.shape[2]), q.new_empty(tokens, heads, dtype=torch.float32)


def _backward_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | float | int
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _sliced_shapes(q: Tensor, keys: Tensor, values: Tensor, *rest: Tensor | float | int) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], values.shape[3])


def _step_shapes(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, *rest: Tensor | float | int) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], values.shape[3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _lse_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    backward = torch.ops.rlhf_kernels.varlen_attention_backward
    dq, dk, dv = backward(grad, q, k, v, out, lse, cu_seqlens, *ctx.options)
    return dq, dk, dv, None, None, None, None


def _no_second(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError("varlen_attention is differentiable once: there is no second derivative")


if AVAILABLE:
    for op in ("varlen_attention", "sliced_attention", "sliced_step", "arena_write"):
        serves(op, "native", ["cpu"], [torch.float32, torch.bfloat16])
    serves("varlen_attention", "native", ["meta"], [torch.float32, torch.bfloat16])  # it keeps what the CPU's keeps
    torch.library.register_fake("rlhf_kernels::varlen_attention_forward")(_forward_shapes)
    torch.library.register_fake("rlhf_kernels::varlen_attention_backward")(_backward_shapes)
    torch.library.register_fake("rlhf_kernels::sliced_attention_forward")(_sliced_shapes)
    torch.library.register_fake("rlhf_kernels::sliced_step")(_step_shapes)
    torch.library.register_fake("rlhf_kernels::arena_write")(lambda *_: None)
    torch.library.register_autograd("rlhf_kernels::varlen_attention_forward", _backward, setup_context=_save)
    torch.library.register_autograd("rlhf_kernels::varlen_attention_backward", _no_second)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int, softcap: float
) -> Tensor:
    """As `naive.varlen_attention`. RuntimeError where cu_seqlens is no rise from 0 to the number of tokens."""
    return torch.ops.rlhf_kernels.varlen_attention_forward(q, k, v, cu_seqlens, scale, window, softcap)[0]


def sliced_attention(q: Tensor, keys: Tensor, values: Tensor, *rest: Tensor | float | int) -> Tensor:
    """As `naive.sliced_attention`. RuntimeError for borders, lengths or slices that do not fit."""
    return torch.ops.rlhf_kernels.sliced_attention_forward(q, keys, values, *rest)


def sliced_step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, *rest: Tensor | float | int) -> Tensor:
    """`arena_write` and then `sliced_attention` in one op: rest is slots, then as `sliced_attention`'s."""
    return torch.ops.rlhf_kernels.sliced_step(q, k, v, keys, values, *rest)


def arena_write(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Writes tokens' keys and values to their slots of one layer. RuntimeError for a slot out of range."""
    torch.ops.rlhf_kernels.arena_write(keys, values, slots, k, v)

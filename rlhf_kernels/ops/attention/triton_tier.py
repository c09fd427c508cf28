"""The Triton backend of attention: bf16, fp16 and fp32 on a GPU, and on the CPU in Triton's interpreter.

Nothing is read on the host and no grid depends on values, so calls can be captured in a CUDA graph and replayed with
whatever the tensors then hold. Triton itself is imported at the first call. A window of 0 and a softcap of 0 mean none.
"""

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.logprob.triton_launch import device_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_DIM = 256  # of a key or value: wider ones do not fit a program's registers
LEAST_DIM = 16  # with gradients: below it delta's few products do not average their rounding out

for op in ("varlen_attention", "sliced_attention"):
    registry.serves(op, "triton", registry.triton_devices(), DTYPES)
registry.serves("arena_write", "triton", registry.triton_devices(), (*DTYPES, torch.float64))


def fits(d: int, dv: int, least: int = 1) -> bool:
    """Whether the kernels take keys of dim d and values of dim dv."""
    return least <= min(d, dv) and max(d, dv) <= MOST_DIM


def sliced_attention(
    q: Tensor, keys: Tensor, values: Tensor, slice_table: Tensor, context_lens: Tensor, cu_q: Tensor,
    scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """As `naive.sliced_attention`; no value is checked. Queries of a sequence without a key (context 0) give zeros."""
    if torch.compiler.is_compiling():
        return _sliced(q, keys, values, slice_table, context_lens, cu_q, scale, window, softcap)
    return _attend(q, keys, values, slice_table, context_lens, cu_q, scale, window, softcap)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int, softcap: float
) -> Tensor:
    """As `naive.varlen_attention`; no value is checked."""
    return _varlen(q, k, v, cu_seqlens, scale, window, softcap)[0]


def arena_write(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Writes tokens' keys and values to their slots of one layer; a slot outside the arena, as -1, is skipped."""
    if torch.compiler.is_compiling():
        _write(keys, values, slots, k, v)
    else:
        _append(keys, values, slots, k, v)


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, context: Tensor, cu_q: Tensor, scale: float, window: int,
    softcap: float,
) -> Tensor:  # fmt: skip
    from rlhf_kernels.ops.attention import triton_decode, triton_forward
    from rlhf_kernels.ops.attention.triton_launch import Options, dense

    out = q.new_empty(q.shape[0], q.shape[1], values.shape[3])
    if q.shape[0] == 0 or table.shape[0] == 0:
        return out
    q, options = dense(q), Options(scale, window, softcap)
    table, context, cu_q = dense(table), dense(context), dense(cu_q)
    with device_of(q):
        few = triton_decode.attend_few(q, keys, values, table, context, cu_q, options, out)
        if q.shape[0] > few:
            triton_forward.attend_pieces(q, keys, values, table, context, cu_q, options, few, out)
    return out


def _append(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    from rlhf_kernels.ops.attention import triton_append

    with device_of(keys):
        triton_append.write(keys, values, slots, k, v)


@torch.library.custom_op("rlhf_kernels::triton_sliced_attention", mutates_args=())
def _sliced(
    q: Tensor, keys: Tensor, values: Tensor, slice_table: Tensor, context_lens: Tensor, cu_q: Tensor, scale: float,
    window: int, softcap: float,
) -> Tensor:  # fmt: skip
    return _attend(q, keys, values, slice_table, context_lens, cu_q, scale, window, softcap)


@_sliced.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], values.shape[3])


@torch.library.custom_op("rlhf_kernels::triton_arena_write", mutates_args=("keys", "values"))
def _write(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    _append(keys, values, slots, k, v)


@_write.register_fake
def _(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    return None


@torch.library.custom_op("rlhf_kernels::triton_varlen_attention", mutates_args=())
def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """The output, and each row's log2 of the sum of its exponentials, fp32 [tokens, heads]."""
    from rlhf_kernels.ops.attention import triton_forward
    from rlhf_kernels.ops.attention.triton_launch import Options, dense

    out, lse = _varlen_shapes(q, k, v)
    if q.shape[0] > 0:
        with device_of(q):
            triton_forward.attend_packed(q, k, v, dense(cu_seqlens), Options(scale, window, softcap), lse, out)
    return out, lse


@_varlen.register_fake
def _varlen_shapes(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    return q.new_empty(tokens, heads, v.shape[2]), q.new_empty(tokens, heads, dtype=torch.float32)


@torch.library.custom_op("rlhf_kernels::triton_varlen_attention_grad", mutates_args=())
def _varlen_grad(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float,
    window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from rlhf_kernels.ops.attention import triton_backward
    from rlhf_kernels.ops.attention.triton_launch import Options, dense

    with device_of(q):
        return triton_backward.gradients(grad, q, k, v, out, lse, dense(cu_seqlens), Options(scale, window, softcap))


@_varlen_grad.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _lse_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_varlen_grad(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


_varlen.register_autograd(_backward, setup_context=_save)

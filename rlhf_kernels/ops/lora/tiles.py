"""`lora_linear` on the CPU's own kernels: bf16 on AMX or AVX512-BF16, fp32 and fp16 on AVX-512 (csrc/cpu/lora_*.cpp).

Base product and adapters in one pass over fp32 sums, rounded once; few rows read W where it lies. Adapters of another
dtype than x are converted as they are packed. The gradients of W and bias are the library's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.lora.library import widths
from rlhf_kernels.ops.lora.products import mm

ADAPTER_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FEW = 24  # rows below which packing W costs more than the library's whole product; forwards need no packing there


def _dtypes() -> tuple[torch.dtype, ...]:
    if not registry.native_available():
        return ()
    pairs = (torch.bfloat16,) if torch.ops.rlhf_kernels.bf16_isa() else ()
    return (*pairs, torch.float32, torch.float16) if torch.ops.rlhf_kernels.float_isa() else pairs


DTYPES = _dtypes()  # of x, that this machine has a unit for


def serves(x: Tensor, weights: Sequence[Tensor], lora_a: Sequence[Tensor], backward: bool) -> bool:
    """Whether the kernels take these, and are the faster ones."""
    if not x.is_cpu or x.dtype not in DTYPES or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    rows = x.shape[0]
    if rows < FEW and (rows == 0 or backward or any([w.stride(1) != 1 for w in weights])):
        return False
    return all([a.dtype in ADAPTER_DTYPES for a in lora_a])


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    index: Tensor | None,
    runs: Sequence[int] | None,
    scaling: Sequence[float],
    scaling_tensor: Tensor | None,
    order: Tensor | None,
    saved_rows: int,
) -> tuple[list[Tensor], Tensor | None]:
    """See `tier.Tier`."""
    rows = x.shape[0]
    ys = [x.new_empty(rows, weight.shape[0]) for weight in weights]
    s = x.new_empty(saved_rows, sum(widths(lora_a, len(weights)))) if saved_rows else None
    some = [x.new_empty(0) if b is None else _dense(b) for b in biases] if any([b is not None for b in biases]) else []
    torch.ops.rlhf_kernels.lora_tiles(
        _rows(x), _lines(weights), some, _lines(lora_a), _lines(lora_b), _index(index, runs), runs or [], scaling, ys, s
    )
    return ys, s


def backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    index: Tensor | None,
    runs: Sequence[int] | None,
    scaling: Sequence[float],
    scaling_tensor: Tensor | None,
    order: Tensor | None,
    x: Tensor,
    s: Tensor,
    grad_rows: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """See `tier.Tier`."""
    count = len(weights)
    first = next(grad for grad in grads if grad.ndim == 2)
    empty = first.new_empty(0)
    adapters = (*lora_a, *lora_b)
    slots = [
        t.new_empty(t.shape, dtype=t.dtype if t.dtype in ADAPTER_DTYPES else torch.float32) if need else empty
        for t, need in zip(adapters, needs[1 + 2 * count :])
    ]
    da, db = slots[: len(lora_a)], slots[len(lora_a) :]
    dx = first.new_empty(first.shape[0], weights[0].shape[1]) if needs[0] else empty
    if any(needs[1 : 1 + count]) or any(t.numel() for t in da):
        x = _rows(x)
    if needs[0] or any(t.numel() for t in slots):
        torch.ops.rlhf_kernels.lora_tiles_backward(
            [_rows(grad) if grad.ndim == 2 else grad for grad in grads], _lines(weights) if needs[0] else weights,
            _lines(lora_a), _lines(lora_b), _index(index, runs), runs or [], scaling, x, _rows(s), grad_rows, dx,
            da, db,
        )  # fmt: skip
    whole = [empty] * 2 * count
    for p, dy in enumerate(grads):
        if dy.ndim == 2 and needs[1 + p]:
            whole[p] = mm(dy[:grad_rows].t(), x[:grad_rows])
        if dy.ndim == 2 and needs[1 + count + p]:
            whole[count + p] = dy[:grad_rows].sum(0)
    return [dx, *whole, *(slot if slot.dtype == t.dtype else slot.to(t.dtype) for slot, t in zip(slots, adapters))]


def _rows(t: Tensor) -> Tensor:
    """A matrix of rows that each lie without gaps."""
    return t if t.is_contiguous() or t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def _lines(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Matrices whose rows or columns lie without gaps, of a dtype the kernels read."""
    return [
        (t if t.is_contiguous() or 1 in t.stride() or min(t.shape) <= 1 else t.contiguous())
        if t.dtype in ADAPTER_DTYPES
        else t.float()
        for t in tensors
    ]


def _dense(bias: Tensor) -> Tensor:
    return bias if bias.stride(0) == 1 else bias.contiguous()


def _index(index: Tensor | None, runs: Sequence[int] | None) -> Tensor | None:
    if runs is not None or index is None:
        return None
    return index if index.dtype in (torch.int32, torch.int64) else index.long()

"""Shrink and expand on a GPU: two Triton kernels over rows, as serving engines apply many adapters to a decode batch.

The shrink splits K over programs that add to an fp32 buffer; the expand adds to the base's output in place. A row
without an adapter (-1) ends at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SHRINK_K = 1024  # columns of x a program reads
BLOCK_K = 256
EXPAND_N = 128  # outputs a program writes


@triton.jit
def _shrink(x, a, index, buffer, width, x_stride, r: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    adapter = tl.load(index + row)
    if adapter < 0:
        return
    first = tl.program_id(1) * SPAN
    ranks = tl.arange(0, r)
    total = tl.zeros((r,), dtype=tl.float32)
    for start in range(first, first + SPAN, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        places = (adapter * r + ranks[:, None]) * width + columns[None, :]
        total += tl.sum(tl.load(a + places, mask=inside[None, :], other=0.0).to(tl.float32) * values[None, :], axis=1)
    tl.atomic_add(buffer + row * r + ranks, total, sem="relaxed")


@triton.jit
def _expand(y, b, index, buffer, out, y_stride, scaling, r: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    adapter = tl.load(index + row)
    if adapter < 0:
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < out
    ranks = tl.arange(0, r)
    s = tl.load(buffer + row * r + ranks)
    places = (adapter * out + columns[:, None]) * r + ranks[None, :]
    added = tl.sum(tl.load(b + places, mask=inside[:, None], other=0.0).to(tl.float32) * s[None, :], axis=1)
    before = tl.load(y + row * y_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * y_stride + columns, (before + scaling * added).to(y.dtype.element_ty), mask=inside)


def shrink(x: Tensor, a: Tensor, index: Tensor) -> Tensor:
    """x [M, K], a [n, r, K] with r a power of two, index int64 [M]; returns fp32 [M, r], zeros where -1."""
    (rows, width), r = x.shape, a.shape[1]
    buffer = x.new_zeros(rows, r, dtype=torch.float32)
    grid = (rows, triton.cdiv(width, SHRINK_K))
    _shrink[grid](x, a, index, buffer, width, x.stride(0), r, SHRINK_K, BLOCK_K)
    return buffer


def add_expanded(y: Tensor, buffer: Tensor, b: Tensor, index: Tensor, scaling: float) -> Tensor:
    """y [M, N] += scaling * buffer [M, r] B^T with b [n, N, r], in place; rows with -1 are left alone."""
    (rows, out), r = y.shape, b.shape[2]
    _expand[rows, triton.cdiv(out, EXPAND_N)](y, b, index, buffer, out, y.stride(0), scaling, r, EXPAND_N)
    return y

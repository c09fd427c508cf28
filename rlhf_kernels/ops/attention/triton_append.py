"""Puts tokens' keys and values in their places in the arena: one launch for both, one program a token.

The slots are read on the device; one outside the arena (-1: padding of a captured graph) is skipped. Values are
converted to the arena's dtype on the way.
"""

import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops.attention.triton_launch import block_of, dense

ELEMENTS = 4096  # of one plane that a program holds at once


@triton.jit
def copy(source, plane, head, heads, s_head, p_head, D: tl.constexpr, BD: tl.constexpr):
    at = tl.arange(0, BD)
    keep = (head < heads)[:, None] & (at < D)[None, :]
    x = tl.load(source + head[:, None] * s_head + at[None, :], mask=keep, other=0.0)
    tl.store(plane + head.to(tl.int64)[:, None] * p_head + at[None, :], x.to(plane.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["limit", "heads"])
def arena_append(
    keys, values, slots, k, v, limit, heads, slot_step, k_token, k_head, v_token, v_head, keys_slice, keys_head,
    values_slice, values_head, SLICE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BDV: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """keys, values [slices, heads, SLICE, D or DV]; slots int64 [tokens]; k, v [tokens, heads, D or DV]."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token * slot_step)
    if (slot >= 0) & (slot < limit):
        index, inside = slot // SLICE, slot % SLICE
        for first in range(0, heads, BH):
            head = first + tl.arange(0, BH)
            copy(k + token * k_token, keys + index * keys_slice + inside * D, head, heads, k_head, keys_head, D, BD)
            copy(v + token * v_token, values + index * values_slice + inside * DV, head, heads, v_head, values_head,
                 DV, BDV)  # fmt: skip


def write(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Writes k [T, KV, d] and v [T, KV, dv] to slots int64 [T] of one layer's views [slices, KV, slice_tokens, ...]."""
    tokens = slots.shape[0]
    if tokens == 0:
        return
    k, v = dense(k), dense(v)
    slices, heads, slice_tokens, d = keys.shape
    dv = values.shape[3]
    bd, bdv = block_of(d), block_of(dv)
    at_once = max(1, min(1 << (heads - 1).bit_length(), ELEMENTS // max(bd, bdv)))
    arena_append[(tokens,)](
        keys, values, slots, k, v, slices * slice_tokens, heads, slots.stride(0), *k.stride()[:2], *v.stride()[:2],
        *keys.stride()[:2], *values.stride()[:2], SLICE=slice_tokens, D=d, DV=dv, BD=bd, BDV=bdv, BH=at_once,
        num_warps=max(1, min(4, at_once * max(bd, bdv) // 256)),
    )  # fmt: skip

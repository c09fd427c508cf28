"""Attention of many queries a sequence: whole packed sequences (training, scoring), and prefill pieces over the arena.

One program a tile of rows and key/value head. Blocks of keys that every row of the tile sees come first and need no
mask; those at the diagonal, or any under a window, are masked. Late tiles, which see most keys, start first.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops.attention.triton_launch import Options, Shape, dense, forward_tile_on, row_tile
from rlhf_kernels.ops.attention.triton_parts import NONE, finished, load_rows, scan, tile_of
from rlhf_kernels.ops.logprob.triton_tiles import chip


@triton.jit(do_not_specialize=["sequences", "window", "few", "table_row"])
def attention_forward(
    q, k, v, out, lse, cu, table, context, sequences, window, few, factor, cap, q_token, q_head, k_token, k_head,
    v_token, v_head, k_slice, v_slice, table_row, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLICE: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """out [tokens, heads, DV]; lse fp32 [tokens, heads], of base 2, or None. SLICE 0: packed sequences, else the arena,
    where sequences of at most `few` queries are left to `attention_decode`. Programs: tile, key/value head."""
    BQ: tl.constexpr = BM // GROUP
    b, t = tile_of(cu, tl.num_programs(0) - 1 - tl.program_id(0), sequences, BQ)
    h = tl.program_id(1)
    begin = tl.load(cu + b)
    count = tl.load(cu + b + 1) - begin
    if (t * BQ < count) & (count > few):
        length = count
        places_of_b = table
        if SLICE > 0:
            length = tl.load(context + b)
            places_of_b = table + b.to(tl.int64) * table_row
        r = tl.arange(0, BM)
        token = t * BQ + r // GROUP
        head = h * GROUP + r % GROUP
        real = (r < BQ * GROUP) & (token < count)
        offset = (begin + token).to(tl.int64)
        rows = load_rows(q, offset * q_token + head * q_head, real, D, BD, False)
        lowest = length - count + t * BQ
        position = length - count + token
        stop = tl.minimum(lowest + BQ, length)
        top = tl.full((BM,), NONE, tl.float32)
        mass = tl.zeros((BM,), tl.float32)
        total = tl.zeros((BM, BDV), tl.float32)
        keys, values = k + h.to(tl.int64) * k_head, v + h.to(tl.int64) * v_head
        start = t * 0
        if WINDOWED:
            start = tl.maximum(lowest - window + 1, 0) // BN * BN
        elif not PRECISE:  # in fp32 a second loop's products would take too many registers
            start = tl.maximum(lowest + 1, 0) // BN * BN
            top, mass, total = scan(
                top, mass, total, rows, position, keys, values, begin, 0, start, places_of_b, k_token, v_token, k_slice,
                v_slice, window, factor, cap, D, DV, BD, BDV, BN, SLICE, WINDOWED, CAPPED, PRECISE, True,
            )  # fmt: skip
        top, mass, total = scan(
            top, mass, total, rows, position, keys, values, begin, start, stop, places_of_b, k_token, v_token, k_slice,
            v_slice, window, factor, cap, D, DV, BD, BDV, BN, SLICE, WINDOWED, CAPPED, PRECISE, False,
        )  # fmt: skip
        mean, bits = finished(top, mass, total)
        place = offset * (tl.num_programs(1) * GROUP) + head
        at = tl.arange(0, BDV)
        tl.store(out + place[:, None] * DV + at[None, :], mean.to(out.dtype.element_ty),
                 mask=real[:, None] & (at < DV)[None, :])  # fmt: skip
        if lse is not None:
            tl.store(lse + place, bits, mask=real)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, options: Options, lse: Tensor | None, out: Tensor
) -> None:
    """q [T, H, d], k [T, KV, d], v [T, KV, dv] of whole sequences into out [T, H, dv] and lse fp32 [T, H]."""
    q, k, v = dense(q), dense(k), dense(v)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], 0, 0, 0)
    _launch(q, k, v, out, lse, cu_seqlens, None, None, 0, strides, options, 0, k.shape[1])


def attend_pieces(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, context: Tensor, cu_q: Tensor, options: Options, few: int,
    out: Tensor,
) -> None:  # fmt: skip
    """The sequences of more than `few` queries, q [T, H, d], over slices [slices, KV, slice_tokens, d or dv]."""
    k, v = keys.stride(), values.stride()
    strides = (*q.stride()[:2], k[2], k[1], v[2], v[1], k[0], v[0], table.stride(0))
    _launch(q, keys, values, out, None, cu_q, table, context, few, strides, options, keys.shape[2], keys.shape[1])


def _launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, cu: Tensor, table: Tensor | None,
    context: Tensor | None, few: int, strides: tuple[Any, ...], options: Options, slice_tokens: int, kv_heads: int,
) -> None:  # fmt: skip
    shape = Shape.of(q, k, v, kv_heads)
    sequences = cu.shape[0] - 1
    tile = row_tile(forward_tile_on(chip(q.device), shape), shape.group)
    grid = (q.shape[0] // (tile.bm // shape.group) + sequences, kv_heads)
    attention_forward[grid](
        q, k, v, out, lse, cu, table, context, sequences, options.window, few, options.factor, options.cap, *strides,
        **shape.constants(), BM=tile.bm, BN=tile.bn, SLICE=slice_tokens, WINDOWED=options.window > 0,
        CAPPED=options.capped, PRECISE=shape.precise, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip

"""Attention of few queries a sequence over the arena: decode steps, and the smallest prefill pieces.

One program a sequence, key/value head and split of its keys: the queries of all heads that share the head are one tile,
so each key and value is read once. A split is a fixed number of keys from the sequence's begin, which the width of the
slice table decides alone; `attention_merge` joins a row's splits in their order. So a row's bits do not depend on the
other sequences, nor on where its slices lie.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops.attention.triton_launch import Options, Shape, decode_tile_on, row_tile, split_of
from rlhf_kernels.ops.attention.triton_parts import NONE, finished, load_rows, scan
from rlhf_kernels.ops.logprob.triton_tiles import chip

ALL = 2**31 - 1


@triton.jit(do_not_specialize=["tokens", "window", "few", "span", "table_row"])
def attention_decode(
    q, k, v, out, sums, cu, table, context, tokens, window, few, span, factor, cap, q_token, q_head, k_token, k_head,
    v_token, v_head, k_slice, v_slice, table_row, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLICE: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PRECISE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """WHOLE: one split, out [tokens, heads, DV]. Else out fp32 [splits, tokens, heads, DV], each split's weighted sum
    of values, and sums fp32 [2, splits, tokens, heads], its top score and its mass. Sequences of more than `few`
    queries are left to `attention_forward`."""
    BQ: tl.constexpr = BM // GROUP
    b, h, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(cu + b)
    count = tl.load(cu + b + 1) - begin
    length = tl.load(context + b)
    heads = tl.num_programs(1) * GROUP
    if count <= few:
        slices = table + b.to(tl.int64) * table_row
        keys, values = k + h.to(tl.int64) * k_head, v + h.to(tl.int64) * v_head
        r = tl.arange(0, BM)
        head = h * GROUP + r % GROUP
        at = tl.arange(0, BDV)
        for first in range(0, count, BQ):
            lowest = length - count + first
            start = s * span
            if WINDOWED:
                start = tl.maximum(start, tl.maximum(lowest - window + 1, 0) // BN * BN)
            stop = tl.minimum(tl.minimum(lowest + BQ, length), (s + 1) * span)
            if WHOLE | (start < stop):
                token = first + r // GROUP
                real = (r < BQ * GROUP) & (token < count)
                offset = (begin + token).to(tl.int64)
                rows = load_rows(q, offset * q_token + head * q_head, real, D, BD, False)
                position = length - count + token
                top = tl.full((BM,), NONE, tl.float32)
                mass = tl.zeros((BM,), tl.float32)
                total = tl.zeros((BM, BDV), tl.float32)
                top, mass, total = scan(
                    top, mass, total, rows, position, keys, values, 0, start, stop, slices, k_token, v_token, k_slice,
                    v_slice, window, factor, cap, D, DV, BD, BDV, BN, SLICE, WINDOWED, CAPPED, PRECISE, False,
                )  # fmt: skip
                place = (s * tokens.to(tl.int64) + offset) * heads + head
                if WHOLE:
                    total, _ = finished(top, mass, total)
                else:
                    tl.store(sums + place, top, mask=real)
                    tl.store(sums + tl.num_programs(2) * tokens.to(tl.int64) * heads + place, mass, mask=real)
                tl.store(out + place[:, None] * DV + at[None, :], total.to(out.dtype.element_ty),
                         mask=real[:, None] & (at < DV)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "window", "few", "span", "splits"])
def attention_merge(
    parts, sums, out, cu, context, tokens, window, few, span, splits, DV: tl.constexpr, BDV: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """out [tokens, heads, DV] from `attention_decode`'s splits, in order; only those with keys a row sees are read."""
    b, h, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    begin = tl.load(cu + b)
    count = tl.load(cu + b + 1) - begin
    length = tl.load(context + b)
    at = tl.arange(0, BDV)
    if count <= few:
        for i in range(0, count):
            position = length - count + i
            first = position * 0
            if WINDOWED:
                first = tl.maximum(position - window + 1, 0) // span
            top = NONE + tl.zeros((), tl.float32)
            mass = tl.zeros((), tl.float32)
            total = tl.zeros((BDV,), tl.float32)
            for s in range(first, (position + span) // span):
                place = (s * tokens.to(tl.int64) + begin + i) * heads + h
                part_top = tl.load(sums + place)
                part_mass = tl.load(sums + splits * tokens.to(tl.int64) * heads + place)
                part = tl.load(parts + place * DV + at, mask=at < DV, other=0.0)
                new_top = tl.maximum(top, part_top)
                base = tl.where(new_top == NONE, 0.0, new_top)
                shrink, weight = tl.exp2(top - base), tl.exp2(part_top - base)
                total = total * shrink + part * weight
                mass = mass * shrink + part_mass * weight
                top = new_top
            mean = total / tl.where(mass == 0.0, 1.0, mass)
            place = (begin + i).to(tl.int64) * heads + h
            tl.store(out + place * DV + at, mean.to(out.dtype.element_ty), mask=at < DV)


def attend_few(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, context: Tensor, cu_q: Tensor, options: Options, out: Tensor
) -> int:
    """Attends for all sequences of few queries; returns how many queries those are at most.

    A call with no more tokens than sequences is taken to be a decode step: then sequences of any number of queries are
    served here, correctly, and no other launch is needed.
    """
    tokens, heads, _ = q.shape
    sequences, kv_heads, slice_tokens = table.shape[0], keys.shape[1], keys.shape[2]
    shape = Shape.of(q, keys, values, kv_heads)
    tile = row_tile(decode_tile_on(chip(q.device), shape), shape.group)
    few = ALL if tokens <= sequences else tile.bm // shape.group
    span, splits = split_of(table.shape[1] * slice_tokens)
    parts, sums = out, None
    if splits > 1:
        parts = q.new_empty((splits, tokens, heads, shape.dv), dtype=torch.float32)
        sums = q.new_empty((2, splits, tokens, heads), dtype=torch.float32)
    k, v = keys.stride(), values.stride()
    attention_decode[(sequences, kv_heads, splits)](
        q, keys, values, parts, sums, cu_q, table, context, tokens, options.window, few, span, options.factor,
        options.cap, *q.stride()[:2], k[2], k[1], v[2], v[1], k[0], v[0], table.stride(0), **shape.constants(),
        BM=tile.bm, BN=tile.bn, SLICE=slice_tokens, WINDOWED=options.window > 0, CAPPED=options.capped,
        PRECISE=shape.precise, WHOLE=splits == 1, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if sums is not None:
        attention_merge[(sequences, heads)](
            parts, sums, out, cu_q, context, tokens, options.window, few, span, splits, DV=shape.dv,
            BDV=shape.constants()["BDV"], WINDOWED=options.window > 0, num_warps=1,
        )  # fmt: skip
    return few

"""The gradients of packed attention, in three kernels without atomics: scores are computed again from q, k and lse.

With p = softmax(z): dv = p^T dO, dS = p (dO v^T - delta) times the softcap's slope, delta = sum dO O a row,
dq = scale dS k, dk = scale dS^T q. One kernel owns tiles of keys and sums over all rows (of all heads of the group)
that see them; one owns tiles of rows. Each sum is in one program, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops.attention.triton_launch import (
    Options,
    Shape,
    dense,
    keys_grad_tile_on,
    queries_grad_tile_on,
    row_tile,
)
from rlhf_kernels.ops.attention.triton_parts import load_rows, scores, sees, tile_of
from rlhf_kernels.ops.logprob.triton_tiles import chip

DELTA_ROWS = 32


@triton.jit(do_not_specialize=["rows"])
def attention_delta(
    grad, out, delta, rows, heads, g_token, g_head, DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """delta fp32 [rows] = the dot product of grad's and out's rows; rows are (token, head)."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    keep = row < rows
    g = load_rows(grad, row // heads * g_token + row % heads * g_head, keep, DV, BDV, False)
    o = load_rows(out, row * DV, keep, DV, BDV, False)
    tl.store(delta + row, tl.sum(g.to(tl.float32) * o.to(tl.float32), 1), mask=keep)


@triton.jit(do_not_specialize=["sequences", "window"])
def attention_keys_grad(
    q, k, v, grad, lse, delta, dk, dv, cu, sequences, window, factor, cap, scale, q_token, q_head, k_token, k_head,
    v_token, v_head, g_token, g_head, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """dk [tokens, kv heads, D] and dv [tokens, kv heads, DV]. Programs: tile of keys, key/value head."""
    BQ: tl.constexpr = BM // GROUP
    b, t = tile_of(cu, tl.program_id(0), sequences, BN)
    h, kv_heads = tl.program_id(1), tl.num_programs(1)
    begin = tl.load(cu + b)
    count = tl.load(cu + b + 1) - begin
    if t * BN < count:
        n = t * BN + tl.arange(0, BN)
        keep = n < count
        offset = (begin + n).to(tl.int64)
        keys = load_rows(k, offset * k_token + h * k_head, keep, D, BD, False)
        values = load_rows(v, offset * v_token + h * v_head, keep, DV, BDV, False)
        dkeys = tl.zeros((BN, BD), tl.float32)
        dvalues = tl.zeros((BN, BDV), tl.float32)
        r = tl.arange(0, BM)
        head = h * GROUP + r % GROUP
        stop = count
        if WINDOWED:
            stop = tl.minimum(count, t * BN + BN - 1 + window)
        for first in range(t * BN // BQ * BQ, stop, BQ):
            token = first + r // GROUP
            real = (r < BQ * GROUP) & (token < count)
            place = (begin + token).to(tl.int64)
            rows = load_rows(q, place * q_token + head * q_head, real, D, BD, False)
            g = load_rows(grad, place * g_token + head * g_head, real, DV, BDV, False)
            row = place * (kv_heads * GROUP) + head
            bits = tl.load(lse + row, mask=real, other=0.0)
            if PRECISE:  # the products in the order in which delta had them
                z, bent = scores(rows, keys, factor, cap, CAPPED, PRECISE)
                z, bent = z.T, bent.T
                dp = tl.dot(g, values.T, input_precision="ieee").T
            else:
                z, bent = scores(keys, rows, factor, cap, CAPPED, PRECISE)
                dp = tl.dot(values, g.T, input_precision="ieee")
            seen = sees(token[None, :], n[:, None], window, WINDOWED) & real[None, :]
            p = tl.where(seen, tl.exp2(z - bits[None, :]), 0.0)
            dvalues = tl.dot(p.to(g.dtype), g, dvalues, input_precision="ieee")
            ds = p * (dp - tl.load(delta + row, mask=real, other=0.0)[None, :])
            if CAPPED:
                ds = ds * (1.0 - bent * bent)
            dkeys = tl.dot(ds.to(rows.dtype), rows, dkeys, input_precision="ieee")
        at, av = tl.arange(0, BD), tl.arange(0, BDV)
        row = offset * kv_heads + h
        tl.store(dk + row[:, None] * D + at[None, :], (dkeys * scale).to(dk.dtype.element_ty),
                 mask=keep[:, None] & (at < D)[None, :])  # fmt: skip
        tl.store(dv + row[:, None] * DV + av[None, :], dvalues.to(dv.dtype.element_ty),
                 mask=keep[:, None] & (av < DV)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["sequences", "window"])
def attention_queries_grad(
    q, k, v, grad, lse, delta, dq, cu, sequences, window, factor, cap, scale, q_token, q_head, k_token, k_head,
    v_token, v_head, g_token, g_head, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    PRECISE: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """dq [tokens, heads, D]; or DELTA: delta alone, the sum of p (dO v^T), from the very products that it is taken from
    later. Programs: tile of rows, key/value head."""
    BQ: tl.constexpr = BM // GROUP
    b, t = tile_of(cu, tl.num_programs(0) - 1 - tl.program_id(0), sequences, BQ)
    h, kv_heads = tl.program_id(1), tl.num_programs(1)
    begin = tl.load(cu + b)
    count = tl.load(cu + b + 1) - begin
    if t * BQ < count:
        r = tl.arange(0, BM)
        token = t * BQ + r // GROUP
        head = h * GROUP + r % GROUP
        real = (r < BQ * GROUP) & (token < count)
        place = (begin + token).to(tl.int64)
        rows = load_rows(q, place * q_token + head * q_head, real, D, BD, False)
        g = load_rows(grad, place * g_token + head * g_head, real, DV, BDV, False)
        row = place * (kv_heads * GROUP) + head
        bits = tl.load(lse + row, mask=real, other=0.0)
        total = tl.zeros((BM, BD), tl.float32)
        start = t * 0
        if WINDOWED:
            start = tl.maximum(t * BQ - window + 1, 0) // BN * BN
        stop = tl.minimum(t * BQ + BQ, count)
        if DELTA:
            less = tl.zeros((BM,), tl.float32)
        else:
            less = tl.load(delta + row, mask=real, other=0.0)
        for n0 in range(start, stop, BN):
            n = n0 + tl.arange(0, BN)
            keep = n < stop
            offset = (begin + n).to(tl.int64)
            keys = load_rows(k, offset * k_token + h * k_head, keep, D, BD, False)
            values = load_rows(v, offset * v_token + h * v_head, keep, DV, BDV, False)
            z, bent = scores(rows, keys, factor, cap, CAPPED, PRECISE)
            seen = sees(token[:, None], n[None, :], window, WINDOWED) & keep[None, :]
            p = tl.where(seen, tl.exp2(z - bits[:, None]), 0.0)
            dp = tl.dot(g, values.T, input_precision="ieee")
            if DELTA:
                less += tl.sum(p * dp, 1)
            else:
                ds = p * (dp - less[:, None])
                if CAPPED:
                    ds = ds * (1.0 - bent * bent)
                total = tl.dot(ds.to(keys.dtype), keys, total, input_precision="ieee")
        if DELTA:
            tl.store(delta + row, less, mask=real)
        else:
            at = tl.arange(0, BD)
            tl.store(dq + row[:, None] * D + at[None, :], (total * scale).to(dq.dtype.element_ty),
                     mask=real[:, None] & (at < D)[None, :])  # fmt: skip


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous, for grad [T, H, dv] of `attend_packed`'s out and lse."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if q.shape[0] == 0:
        return dq, dk, dv
    grad, q, k, v = (dense(x) for x in (grad, q, k, v))
    tokens, heads, _ = q.shape
    kv_heads, sequences = k.shape[1], cu.shape[0] - 1
    shape = Shape.of(q, k, v, kv_heads)
    constants = shape.constants()
    strides = [stride for x in (q, k, v, grad) for stride in x.stride()[:2]]
    rest = (cu, sequences, options.window, options.factor, options.cap, options.scale, *strides)
    dims = {"DV": shape.dv, "BDV": constants["BDV"]}
    constants |= {"WINDOWED": options.window > 0, "CAPPED": options.capped, "PRECISE": shape.precise}
    tile = row_tile(queries_grad_tile_on(chip(q.device), shape), shape.group)
    sizes = {"BM": tile.bm, "BN": tile.bn, "num_warps": tile.warps, "num_stages": tile.stages}
    of_rows = attention_queries_grad[(tokens // (tile.bm // shape.group) + sequences, kv_heads)]
    delta = torch.empty_like(lse)
    if shape.precise:  # the rounding of dO O would show in fp32, where the products cancel
        of_rows(q, k, v, grad, lse, delta, None, *rest, **constants, **sizes, DELTA=True)
    else:
        attention_delta[(triton.cdiv(tokens * heads, DELTA_ROWS),)](
            grad, out, delta, tokens * heads, heads, *grad.stride()[:2], **dims, BM=DELTA_ROWS,
        )  # fmt: skip
    of_rows(q, k, v, grad, lse, delta, dq, *rest, **constants, **sizes, DELTA=False)
    tile = row_tile(keys_grad_tile_on(chip(q.device), shape), shape.group)
    attention_keys_grad[(tokens // tile.bn + sequences, kv_heads)](
        q, k, v, grad, lse, delta, dk, dv, *rest, **constants, BM=tile.bm, BN=tile.bn, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return dq, dk, dv

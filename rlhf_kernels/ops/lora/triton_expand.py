"""What the adapters add, from ranks up to features: Z_p = T_e V_e of every row's own adapter, plus the bias.

Beside the library's GEMMs this is written first, Z for all projections in one launch, and the GEMM then adds its
product to it (beta = 1): one write of Z where adding it afterwards would read and write Y, and only Z is rounded twice.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops.logprob.triton_tiles import chip
from rlhf_kernels.ops.lora.triton_launch import MOST_SOURCES, Rows, aligned, expand_tile_on, padded, rank_block
from rlhf_kernels.ops.lora.triton_parts import bias_of, columns_before, expanded, number, rows_of_tile, source


@triton.jit(do_not_specialize=["total", "live"])
def expand(
    t, v0, v1, v2, bias0, bias1, bias2, out0, out1, out2, index, order, width0, width1, width2, rank0, rank1, rank2,
    columns, first, tiles_n, total, live, n, SOURCES: tl.constexpr, ORDERED: tl.constexpr, RANK_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """t [live, columns] (projection p owns rank_p of them), v_p: its pack, out_p [live, width_p], written whole."""
    p = tl.program_id(1)
    width = number(p, width0, width1, width2, SOURCES)
    rank = number(p, rank0, rank1, rank2, SOURCES)
    v, out = source(p, v0, v1, v2, SOURCES), source(p, out0, out1, out2, SOURCES)
    tile_m = tl.program_id(0) // tiles_n
    column = (tl.program_id(0) - tile_m * tiles_n) * BN
    if column < width:
        row, there, adapter = rows_of_tile(index, order, tile_m * BM, total, live, n, BM, ORDERED)
        before = first + columns_before(p, rank0, rank1, SOURCES)
        z = expanded(t, v, row, adapter, columns, before, column, width, rank, BM, BN, BR, RANK_FIRST, PRECISION)
        if HAS_BIAS:
            z += bias_of(source(p, bias0, bias1, bias2, SOURCES), column, width, BN, HAS_BIAS)
        at = column + tl.arange(0, BN)
        place = out + row[:, None] * width + at[None, :]
        tl.store(place, z.to(out.dtype.element_ty), mask=there[:, None] & (at < width)[None, :])


def expand_into(
    outs: Sequence[Tensor],
    t: Tensor,
    packs: Sequence[Tensor],
    rank_first: bool,
    biases: Sequence[Tensor | None],
    rows: Rows,
) -> None:
    """Writes rows below rows.live of outs [>= live, width_p], contiguous, from t [>= live, sum of the ranks]."""
    ranks = [pack.shape[1 if rank_first else 2] for pack in packs]
    biased = any(bias is not None for bias in biases)
    filled = [
        bias if bias is not None or not biased else out.new_zeros(out.shape[1]) for bias, out in zip(biases, outs)
    ]
    for at in range(0, len(outs), MOST_SOURCES):
        some = slice(at, at + MOST_SOURCES)
        _launch(outs[some], t, packs[some], ranks[some], sum(ranks[:at]), rank_first, filled[some], rows)


def _launch(
    outs: Sequence[Tensor], t: Tensor, packs: Sequence[Tensor], ranks: Sequence[int], first: int, rank_first: bool,
    biases: Sequence[Tensor | None], rows: Rows,
) -> None:  # fmt: skip
    widths = [out.shape[1] for out in outs]
    if rows.live == 0 or max(widths) == 0:
        return
    tile = expand_tile_on(chip(t.device), t.dtype)
    tiles_n = triton.cdiv(max(widths), tile.bn)
    ranks_at_once = rank_block(max(ranks), 64 if aligned(*widths) else 32)
    expand[(triton.cdiv(rows.total, tile.bm) * tiles_n, len(outs))](
        t, *padded(packs), *padded(biases), *padded(outs), rows.index, rows.order, *padded(widths), *padded(ranks),
        t.shape[1], first, tiles_n, rows.total, rows.live, rows.adapters, SOURCES=len(outs),
        ORDERED=rows.order is not None, RANK_FIRST=rank_first, HAS_BIAS=biases[0] is not None, PRECISION="ieee",
        BM=tile.bm, BN=tile.bn, BR=ranks_at_once, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip

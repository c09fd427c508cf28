"""`lora_linear` on the vendor library's GEMMs: the base product into y, then each adapter's onto its own rows of y.

Rows of an adapter are a slice of y (contiguous runs), a gathered index (scattered rows on the CPU), or, on a device
whose index the host may not read, a mask. Nowhere does an adapter's product touch another's rows, so a bypassed row is
the base GEMM's bits and a NaN stays with its adapter. S = scaling (x A^T), [rows, rank], is kept for the backward.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_kernels.ops.lora.routing import check_index, contiguous_runs
from rlhf_kernels.ops.registry import checks_values, serves

serves("lora_linear", "native", ("cpu", "cuda"), (torch.float32, torch.bfloat16, torch.float16))

Rows = slice | Tensor


def by_segments(x: Tensor, runs: Sequence[int] | None) -> bool:
    """True where the rows of each adapter are known to the host; otherwise they are masks on the device."""
    return runs is not None or x.device.type == "cpu"


def saved_width(x: Tensor, lora_a: Sequence[Tensor], runs: Sequence[int] | None) -> int:
    """Columns of S: one adapter's at a time by segments, all adapters' side by side by masks."""
    ranks = [a.shape[0] for a in lora_a]
    return max(ranks, default=0) if by_segments(x, runs) else sum(ranks)


def triples(runs: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    return zip(runs[0::3], runs[1::3], runs[2::3])


def segments(index: Tensor | None, runs: Sequence[int] | None, lora_a: Sequence[Tensor]) -> list[tuple[Rows, int]]:
    """The rows of each adapter that is used and has a rank: slices, or gathered rows where they are scattered."""
    if runs is None and index is not None:
        runs = contiguous_runs(index, len(lora_a))
    if runs is not None:
        return [(slice(lo, hi), e) for lo, hi, e in triples(runs) if e >= 0 and hi > lo and lora_a[e].shape[0]]
    assert index is not None
    gathered = ((torch.nonzero(index == e).squeeze(1), e) for e in range(len(lora_a)) if lora_a[e].shape[0])
    return [(rows, e) for rows, e in gathered if rows.numel()]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    index: Tensor | None,
    runs: Sequence[int] | None,
    scaling: Sequence[float],
    scaling_tensor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [rows, N] and S [rows, saved_width], both of x's dtype. `scaling_tensor` [n] goes before `scaling`."""
    if index is not None and runs is None and checks_values(index):
        check_index(index, len(lora_a))
    scales = scaling if scaling_tensor is None else scaling_tensor
    y = F.linear(x, weight, bias)
    if not by_segments(x, runs):
        assert index is not None
        return _masked_forward(x, y, lora_a, lora_b, index, scales)
    s = x.new_zeros(x.shape[0], saved_width(x, lora_a, runs))
    for rows, e in segments(index, runs, lora_a):
        a, b = lora_a[e].to(x.dtype), lora_b[e].to(x.dtype)
        shrunk = torch.mm(x[rows], a.t()).mul_(scales[e])
        s[rows, : a.shape[0]] = shrunk
        if isinstance(rows, slice):
            y[rows].addmm_(shrunk, b.t())
        else:
            y.index_add_(0, rows, torch.mm(shrunk, b.t()))
    return y, s


def infer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    runs: Sequence[int],
    scaling: Sequence[float],
) -> Tensor:
    """y [rows, N] where nothing needs a gradient and the runs are known: no S is kept. The inner loop of a rollout."""
    y = F.linear(x, weight, bias)
    for lo, hi, e in triples(runs):
        if e >= 0 and hi > lo:
            a, b = lora_a[e].to(x.dtype), lora_b[e].to(x.dtype)
            y[lo:hi].addmm_(torch.mm(x[lo:hi], a.t()), b.t(), alpha=scaling[e])
    return y


def _masked_forward(
    x: Tensor,
    y: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    index: Tensor,
    scales: Sequence[float] | Tensor,
) -> tuple[Tensor, Tensor]:
    kept, column = [], 0
    concatenated = torch.cat([a.to(x.dtype) for a in lora_a]) if lora_a else x.new_zeros(0, x.shape[1])
    shrunk = torch.mm(x, concatenated.t())
    for e, b in enumerate(lora_b):
        mine = (index == e).unsqueeze(1)
        s = torch.where(mine, shrunk[:, column : column + b.shape[1]] * scales[e], 0.0).to(x.dtype)
        y = torch.where(mine, torch.addmm(y, s, b.to(x.dtype).t()), y)
        kept.append(s)
        column += b.shape[1]
    outside = (index < -1) | (index >= len(lora_a))
    return y.masked_fill_(outside.unsqueeze(1), float("nan")), torch.cat(kept, 1) if kept else shrunk


def backward(
    grad: Tensor,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    index: Tensor | None,
    runs: Sequence[int] | None,
    scaling: Sequence[float],
    scaling_tensor: Tensor | None,
    x: Tensor | None,
    x_parts: Sequence[Tensor],
    s_parts: Sequence[Tensor],
    grad_rows: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """[dx, dweight, dbias, *dA, *dB], an empty tensor for each that `needs` (in that order) does not ask for.

    `runs` holds runs below grad_rows only. With runs, x_parts and s_parts are the rows of each run that has an adapter;
    without, x and s_parts[0] hold all rows. `x` is also there where dweight is asked for.
    """
    n = len(lora_a)
    need_a, need_b = needs[3 : 3 + n], needs[3 + n :]
    scales = scaling if scaling_tensor is None else scaling_tensor
    live = grad[:grad_rows]
    dx, dweight, dbias = (grad.new_empty(0) for _ in range(3))
    if needs[0]:
        dx = grad.new_empty(grad.shape[0], weight.shape[1])
        torch.mm(live, weight, out=dx[:grad_rows])
        dx[grad_rows:].zero_()
    if needs[1]:
        assert x is not None
        dweight = torch.mm(live.t(), x[:grad_rows])
    if needs[2]:
        dbias = live.sum(0)
    da = [torch.zeros_like(a) if need else a.new_empty(0) for a, need in zip(lora_a, need_a)]
    db = [torch.zeros_like(b) if need else b.new_empty(0) for b, need in zip(lora_b, need_b)]

    def accumulate(e: int, dy: Tensor, xs: Tensor, s: Tensor) -> Tensor:
        """Adds one segment's dA and dB; returns its dS [rows of the segment, r]."""
        ds = torch.mm(dy, lora_b[e].to(dy.dtype)).mul_(scales[e])
        if need_a[e]:
            da[e].add_(torch.mm(ds.t(), xs))
        if need_b[e]:
            db[e].add_(torch.mm(dy.t(), s[:, : lora_b[e].shape[1]]))
        return ds

    if by_segments(grad, runs):
        index = index[:grad_rows] if index is not None else None
        for part, (rows, e) in enumerate(segments(index, runs, lora_a)):
            if not (needs[0] or need_a[e] or need_b[e]):
                continue
            dy = live[rows]
            if runs is not None:
                ds = accumulate(e, dy, x_parts[part], s_parts[part])
            else:
                assert x is not None
                ds = accumulate(e, dy, x[rows], s_parts[0][rows])
            if not needs[0]:
                continue
            if isinstance(rows, slice):
                dx[rows].addmm_(ds, lora_a[e].to(dy.dtype))
            else:
                dx.index_add_(0, rows, torch.mm(ds, lora_a[e].to(dy.dtype)))
        return [dx, dweight, dbias, *da, *db]

    assert index is not None
    assert x is not None
    column = 0
    for e, a in enumerate(lora_a):
        mine = (index[:grad_rows] == e).unsqueeze(1)
        dy = torch.where(mine, live, 0.0)
        ds = accumulate(e, dy, torch.where(mine, x[:grad_rows], 0.0), s_parts[0][:grad_rows, column:])
        if needs[0]:
            dx[:grad_rows] = torch.where(mine, torch.addmm(dx[:grad_rows], ds, a.to(dy.dtype)), dx[:grad_rows])
        column += a.shape[0]
    return [dx, dweight, dbias, *da, *db]

"""`lora_linear` on the vendor library's GEMMs: the base product into y, then each adapter's onto its own rows of y.

Rows of an adapter are a slice of y (contiguous runs), a gathered index (scattered rows on the CPU), or, on a device
whose index the host may not read, a mask. Nowhere does an adapter's product touch another's rows, so a bypassed row is
the base GEMM's bits and a NaN stays with its adapter. S = scaling (x A^T) is kept for the backward.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_kernels.ops.registry import serves as declare

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = ("cpu", "cuda")

declare("lora_linear", "native", DEVICES, DTYPES)

Rows = slice | Tensor


def serves(x: Tensor, weights: Sequence[Tensor], lora_a: Sequence[Tensor], backward: bool) -> bool:
    return x.device.type in DEVICES and x.dtype in DTYPES


def widths(lora_a: Sequence[Tensor], projections: int) -> list[int]:
    """R_p, the columns of S that belong to each projection: its largest rank."""
    n = len(lora_a) // projections
    return [max((a.shape[0] for a in lora_a[p * n : p * n + n]), default=0) for p in range(projections)]


def triples(runs: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    return zip(runs[0::3], runs[1::3], runs[2::3])


def rows_by_adapter(index: Tensor | None, runs: Sequence[int] | None) -> dict[int, list[Rows]]:
    """The rows of each adapter that is used: slices, or one gathered index where they are scattered."""
    places: dict[int, list[Rows]] = {}
    if runs is not None:
        for lo, hi, e in triples(runs):
            if e >= 0 and hi > lo:
                places.setdefault(e, []).append(slice(lo, hi))
        return places
    assert index is not None
    order = index.argsort(stable=True)
    adapters, counts = torch.unique_consecutive(index[order], return_counts=True)
    for e, rows in zip(adapters.tolist(), order.split(counts.tolist())):
        if e >= 0:
            places[e] = [rows]
    return places


def masked(index: Tensor | None, runs: Sequence[int] | None) -> bool:
    """True where the host may not know which rows an adapter has."""
    return runs is None and index is not None and index.device.type != "cpu"


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
) -> tuple[list[Tensor], Tensor]:
    """See `tier.Tier`."""
    scales = scaling if scaling_tensor is None else scaling_tensor
    ys = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]
    columns = widths(lora_a, len(weights))
    s = x.new_zeros(saved_rows, sum(columns))
    n = len(lora_a) // len(weights)
    if masked(index, runs):
        assert index is not None
        _masked_forward(x, ys, lora_a, lora_b, index, scales, s, columns)
        return ys, s
    for e, places in rows_by_adapter(index, runs).items():
        a_parts, b_parts = ([t.to(x.dtype) for t in stack[e::n]] for stack in (lora_a, lora_b))
        a = a_parts[0] if len(a_parts) == 1 else torch.cat(a_parts)
        if a.shape[0] == 0:
            continue
        for rows in places:
            shrunk = torch.mm(x[rows], a.t()).mul_(scales[e])
            first = 0
            for y, b, part in zip(ys, b_parts, shrunk.split([t.shape[0] for t in a_parts], 1)):
                if isinstance(rows, slice):
                    y[rows].addmm_(part, b.t())
                else:
                    y.index_add_(0, rows, torch.mm(part, b.t()))
            for width, part in zip(columns, shrunk.split([t.shape[0] for t in a_parts], 1)):
                _keep(s[:, first : first + part.shape[1]], rows, part)
                first += width
    return ys, s


def _keep(s: Tensor, rows: Rows, part: Tensor) -> None:
    """Writes the rows of S that are saved."""
    if isinstance(rows, slice):
        if rows.start < s.shape[0]:
            s[rows] = part[: s.shape[0] - rows.start]
    elif s.shape[0]:
        live = rows < s.shape[0]
        s[rows[live]] = part[live]


def _masked_forward(
    x: Tensor,
    ys: list[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    index: Tensor,
    scales: Sequence[float] | Tensor,
    s: Tensor,
    columns: Sequence[int],
) -> None:
    """Every adapter's product for all rows, of which each row selects its own adapter's."""
    n = len(lora_a) // len(ys)
    mine = [(index == e).unsqueeze(1) for e in range(n)]
    first, saved = 0, s.shape[0]
    for p, (y, width) in enumerate(zip(ys, columns)):
        for e in range(n):
            a, b = lora_a[p * n + e].to(x.dtype), lora_b[p * n + e].to(x.dtype)
            part = torch.mm(x, a.t()).mul_(scales[e])
            torch.where(mine[e], torch.addmm(y, part, b.t()), y, out=y)
            kept = s[:, first : first + a.shape[0]]
            kept.copy_(torch.where(mine[e][:saved], part[:saved], kept))
        first += width
        y.masked_fill_(((index < -1) | (index >= n)).unsqueeze(1), float("nan"))


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
    n = len(lora_a) // count
    scales = scaling if scaling_tensor is None else scaling_tensor
    present = next(grad for grad in grads if grad.ndim == 2)
    none = present.new_empty
    live = [grad[:grad_rows] if grad.ndim == 2 else None for grad in grads]
    out = [none(0) for _ in needs]
    dx, da_at, db_at = None, 1 + 2 * count, 1 + 2 * count + n * count
    if needs[0]:
        out[0] = none(present.shape[0], x.shape[1])
        out[0][grad_rows:].zero_()
        dx = out[0][:grad_rows]
        first = True
        for dy, weight in zip(live, weights):
            if dy is not None:
                torch.mm(dy, weight, out=dx) if first else dx.addmm_(dy, weight)
                first = False
    for p, dy in enumerate(live):
        if dy is None:
            continue
        if needs[1 + p]:
            out[1 + p] = torch.mm(dy.t(), x[:grad_rows])
        if needs[1 + count + p]:
            out[1 + count + p] = dy.sum(0)
    index = None if index is None else index[:grad_rows]
    hidden = masked(index, runs)
    places = {e: [slice(0, grad_rows)] for e in range(n)} if hidden else rows_by_adapter(index, runs)
    columns = widths(lora_a, count)
    for e, where in places.items():
        for rows in where:
            first = 0
            for p, dy in enumerate(live):
                i, start = p * n + e, first
                first += columns[p]
                if dy is None or not (needs[0] or needs[da_at + i] or needs[db_at + i]):
                    continue
                a, b = lora_a[i], lora_b[i]
                mine = (index == e).unsqueeze(1) if hidden else None
                rows_dy = dy[rows] if mine is None else torch.where(mine, dy, 0.0)
                if needs[db_at + i]:
                    part = s[rows, start : start + a.shape[0]]
                    part = part if mine is None else torch.where(mine, part, 0.0)
                    out[db_at + i] = _sum(out[db_at + i], torch.mm(rows_dy.t(), part), b)
                if not (needs[0] or needs[da_at + i]):
                    continue
                ds = torch.mm(rows_dy, b.to(dy.dtype)).mul_(scales[e])
                if needs[da_at + i]:
                    rows_x = x[rows] if mine is None else torch.where(mine, x[:grad_rows], 0.0)
                    out[da_at + i] = _sum(out[da_at + i], torch.mm(ds.t(), rows_x), a)
                if dx is None:
                    continue
                a = a.to(dy.dtype)
                if mine is not None:
                    torch.where(mine, torch.addmm(dx, ds, a), dx, out=dx)
                elif isinstance(rows, slice):
                    dx[rows].addmm_(ds, a)
                else:
                    dx.index_add_(0, rows, torch.mm(ds, a))
    for i, t in enumerate((*lora_a, *lora_b)):
        if needs[da_at + i] and out[da_at + i].ndim == 1:
            out[da_at + i] = torch.zeros_like(t)
    return out


def _sum(total: Tensor, product: Tensor, like: Tensor) -> Tensor:
    return product.to(like.dtype) if total.ndim == 1 else total.add_(product)

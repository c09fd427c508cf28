"""`lora_linear` on the vendor library's GEMMs: the base product into y, then each adapter's onto its own rows of y.

Rows of an adapter are a slice of y (contiguous runs), a gathered index (scattered rows on the CPU), or, on a device
whose index the host may not read, a mask. Nowhere does an adapter's product touch another's rows, so a bypassed row is
the base GEMM's bits and a NaN stays with its adapter. S = scaling (x A^T) is kept for the backward.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.lora.products import addmm_, linear, mm, mm_into
from rlhf_kernels.ops.lora.routing import triples

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = ("cpu", "cuda")

registry.serves("lora_linear", "native", DEVICES, DTYPES)


def serves(x: Tensor, weights: Sequence[Tensor], lora_a: Sequence[Tensor], backward: bool) -> bool:
    return x.device.type in DEVICES and x.dtype in DTYPES


def widths(lora_a: Sequence[Tensor], projections: int) -> list[int]:
    """R_p, the columns of S that belong to each projection: its largest rank."""
    n = len(lora_a) // projections
    return [max((a.shape[0] for a in lora_a[p * n : p * n + n]), default=0) for p in range(projections)]


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
    ys = [linear(x, weight, bias) for weight, bias in zip(weights, biases)]
    columns = widths(lora_a, len(weights)) if saved_rows else []
    s = x.new_zeros(saved_rows, sum(columns)) if saved_rows else None
    n = len(scaling)
    last, adapter = -1, None
    for place in sorted_places(index, runs, n, x.shape[0]):
        if place.e != last:
            last, adapter = place.e, _Adapter(x, lora_a, lora_b, place.e, n)
        assert adapter is not None
        if adapter.a.shape[0]:
            scale = scaling[place.e] if scaling_tensor is None else scaling_tensor[place.e]
            _add_adapter(x, ys, place, adapter, scale, s, columns)
    if masked(index, runs):
        assert index is not None
        outside = ((index < -1) | (index >= n)).unsqueeze(1)
        for y in ys:
            y.masked_fill_(outside, float("nan"))
    return ys, s


@dataclass(slots=True)
class Place:
    """Rows of one adapter: a slice, gathered rows, or of all rows those that a mask [rows, 1] names."""

    e: int
    rows: slice | Tensor | None  # None: all
    mask: Tensor | None = None

    def take(self, t: Tensor) -> Tensor:
        """The rows of t; zeros where another adapter's row stands."""
        if self.mask is not None:
            return torch.where(self.mask, t, 0.0)
        return t if self.rows is None else t[self.rows]

    def add(self, t: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
        """t[rows] += scale a b, a having this place's rows."""
        if self.mask is not None:
            torch.where(self.mask, torch.addmm(t, a, b, alpha=scale), t, out=t)
        elif isinstance(self.rows, Tensor):
            t.index_add_(0, self.rows, mm(a, b), alpha=scale)
        else:
            addmm_(t if self.rows is None else t[self.rows], a, b, scale)


def masked(index: Tensor | None, runs: Sequence[int] | None) -> bool:
    """True where the host may not know which rows an adapter has."""
    return runs is None and index is not None and index.device.type != "cpu"


def sorted_places(index: Tensor | None, runs: Sequence[int] | None, n: int, rows: int) -> Iterator[Place]:
    """The places of every adapter in use, one adapter after the other."""
    if runs is not None:
        for e, lo, hi in sorted((e, lo, hi) for lo, hi, e in triples(runs) if e >= 0 and hi > lo):
            yield Place(e, slice(lo, hi) if hi - lo < rows else None)
        return
    assert index is not None
    if masked(index, runs):
        for e in range(n):
            yield Place(e, None, (index == e).unsqueeze(1))
        return
    order = index.argsort(stable=True)
    adapters, counts = torch.unique_consecutive(index[order], return_counts=True)
    for e, some in zip(adapters.tolist(), order.split(counts.tolist())):
        if e >= 0:
            yield Place(e, some)


class _Adapter:
    """One adapter of all projections in x's dtype: A end to end [sum of ranks, K], B each."""

    def __init__(self, x: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], e: int, n: int) -> None:
        parts = [a.to(x.dtype) for a in lora_a[e::n]]
        self.ranks = [a.shape[0] for a in parts]
        self.a = parts[0] if len(parts) == 1 else torch.cat(parts)
        self.b = [b.to(x.dtype) for b in lora_b[e::n]]


def _add_adapter(
    x: Tensor,
    ys: Sequence[Tensor],
    place: Place,
    adapter: _Adapter,
    scale: float | Tensor,
    s: Tensor | None,
    columns: Sequence[int],
) -> None:
    """y += scale (x A^T) B^T on a place's rows; what is to be saved goes to s."""
    shrunk = mm(x if place.mask is not None else place.take(x), adapter.a.t())
    alpha = 1.0
    if isinstance(scale, Tensor):
        shrunk.mul_(scale)
    else:
        alpha = scale
    parts = (shrunk,) if len(ys) == 1 else shrunk.split(adapter.ranks, 1)
    for y, b, part in zip(ys, adapter.b, parts):
        place.add(y, part, b.t(), alpha)
    if s is not None:
        first = 0
        for part, width in zip(parts, columns):
            _keep(s[:, first : first + part.shape[1]], place, part if alpha == 1 else part * alpha)
            first += width


def _keep(s: Tensor, place: Place, part: Tensor) -> None:
    """Writes the rows of S that are saved."""
    saved = s.shape[0]
    if place.mask is not None:
        s.copy_(torch.where(place.mask[:saved], part[:saved], s))
    elif isinstance(place.rows, Tensor):
        live = place.rows < saved
        s[place.rows[live]] = part[live]
    else:
        start = 0 if place.rows is None else place.rows.start
        s[start : start + part.shape[0]] = part[: max(0, saved - start)]


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
    count, n = len(weights), len(scaling)
    live = [grad[:grad_rows] if grad.ndim == 2 else None for grad in grads]
    rows = next(grad.shape[0] for grad in grads if grad.ndim == 2)
    out = _base_gradients(live, weights, x, rows, needs)
    need_a, need_b = needs[1 + 2 * count :][: count * n], needs[1 + 2 * count + count * n :]
    dx = out[0][:grad_rows] if needs[0] else None
    columns = widths(lora_a, count)
    places = list(sorted_places(None if index is None else index[:grad_rows], runs, n, grad_rows))
    used = {place.e for place in places}
    a_down, b_down = ([t.to(s.dtype) if i % n in used else t for i, t in enumerate(some)] for some in (lora_a, lora_b))
    da: dict[int, Tensor] = {}
    db: dict[int, Tensor] = {}
    for place in places:
        scale = scaling[place.e] if scaling_tensor is None else scaling_tensor[place.e]
        last, place_x = 0, None
        for p, dy in enumerate(live):
            i, first, last = p * n + place.e, last, last + columns[p]
            rank = lora_a[i].shape[0]
            if dy is None or not rank or not (needs[0] or need_a[i] or need_b[i]):
                continue
            own = place.take(dy)
            if need_b[i]:
                _accumulate(db, i, mm(own.t(), place.take(s[:grad_rows, first : first + rank])))
            if not (needs[0] or need_a[i]):
                continue
            ds = mm(own, b_down[i]).mul_(scale)
            if need_a[i]:
                place_x = place.take(x[:grad_rows]) if place_x is None else place_x
                _accumulate(da, i, mm(ds.t(), place_x))
            if dx is not None:
                place.add(dx, ds, a_down[i])
    for stack, sums, need in ((lora_a, da, need_a), (lora_b, db, need_b)):
        for i, like in enumerate(stack):
            if not need[i]:
                out.append(like.new_empty(0))
            else:
                out.append(sums[i].to(like.dtype) if i in sums else like.new_zeros(like.shape))
    return out


def _base_gradients(
    live: Sequence[Tensor | None], weights: Sequence[Tensor], x: Tensor, rows: int, needs: Sequence[bool]
) -> list[Tensor]:
    """dx without the adapters' part, dweights, dbiases."""
    count = len(weights)
    present = [dy for dy in live if dy is not None]
    out = [present[0].new_empty(0) for _ in range(1 + 2 * count)]
    grad_rows = present[0].shape[0]
    if needs[0]:
        out[0] = present[0].new_empty(rows, x.shape[1])
        dx = out[0][:grad_rows]
        out[0][grad_rows:].zero_()
        some = [weight for dy, weight in zip(live, weights) if dy is not None]
        mm_into(dx, present[0], some[0])
        for grad, weight in zip(present[1:], some[1:]):
            addmm_(dx, grad, weight)
    for p, dy in enumerate(live):
        if dy is not None and needs[1 + p]:
            out[1 + p] = mm(dy.t(), x[:grad_rows])
        if dy is not None and needs[1 + count + p]:
            out[1 + count + p] = dy.sum(0)
    return out


def _accumulate(sums: dict[int, Tensor], i: int, product: Tensor) -> None:
    """The first product is kept as it is; a sum of several is formed in fp32 at least."""
    if i not in sums:
        sums[i] = product
    else:
        wide = torch.promote_types(product.dtype, torch.float32)
        sums[i] = sums[i].to(wide).add_(product)

"""Forward and backward of the Triton tier as sequences of launches; nothing here reads a device's values.

Forward: S = shrink(x, A), then y = x W^T + S_e B_e^T, fused or split. Backward: dS = shrink(dY, B), then
dX = sum dY W + dS_e A_e, fused or split, and the adapters' gradients dB = dY^T S and dA = dS^T X. A weight that trains
gets its gradient from the library.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_kernels.ops.logprob.triton_tiles import INTERPRETED
from rlhf_kernels.ops.lora import triton_gemm, triton_tuner
from rlhf_kernels.ops.lora.triton_expand import expand_into
from rlhf_kernels.ops.lora.triton_launch import Rows
from rlhf_kernels.ops.lora.triton_outer import outer_products, spans_of
from rlhf_kernels.ops.lora.triton_pack import stacked_a, stacked_b
from rlhf_kernels.ops.lora.triton_shrink import shrunk
from rlhf_kernels.ops.lora.triton_tuner import Way


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    ranks: Sequence[int],
    rows: Rows,
    saved_rows: int,
) -> tuple[list[Tensor], Tensor | None]:
    """y [rows, N_p] of every projection, and S of the first saved_rows rows, None where that is none."""
    n, x = rows.adapters, by_rows(x)
    ys = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    if rows.live == 0:
        return ys, None
    compact, ranks = ranks, padded_ranks(ranks)
    s = shrunk([x], [stacked_a(lora_a, n, ranks, x.shape[1], x)], True, rows)
    packs = [
        stacked_b(lora_b[p * n : p * n + n], rank, weight.shape[0], x)
        for p, (rank, weight) in enumerate(zip(ranks, weights))
    ]

    def fused() -> None:
        for p, (weight, bias) in enumerate(zip(weights, biases)):
            triton_gemm.product([x], [weight], bias, s, sum(ranks[:p]), packs[p], False, ys[p], rows)

    def split() -> None:
        expand_into(ys, s, packs, False, biases, rows)
        for y, weight in zip(ys, weights):
            y.addmm_(x, weight.t())

    fits = all(triton_gemm.fits([x], [weight], rows) for weight in weights)
    shape = ("forward", tuple(w.shape for w in weights), tuple(ranks), rows.order is None)
    triton_tuner.run(shape, x, rows.live, x.shape[1], _ways(fused, split, x, fits))
    return ys, _saved(s, saved_rows, compact)


def padded_ranks(ranks: Sequence[int]) -> list[int]:
    """Ranks as the kernels have them in packs, S and dS: multiples of 16, so that loads are whole vectors. What is
    added is zeros."""
    return [-(-rank // 16) * 16 for rank in ranks]


def _saved(s: Tensor, rows: int, ranks: Sequence[int]) -> Tensor | None:
    """What of S is kept: the first rows, its projections' columns cut down to their ranks."""
    if rows == 0:
        return None
    if list(ranks) == padded_ranks(ranks):
        return s if rows == s.shape[0] else s[:rows].clone()
    return torch.cat([part[:rows, :rank] for part, rank in zip(s.split(padded_ranks(ranks), 1), ranks)], 1)


def _ways(
    fused: Callable[[], None], split: Callable[[], None], sample: Tensor, fits: bool
) -> dict[Way, Callable[[], None]]:  # fmt: skip
    """fp32 has no matrix unit here, so its products are the library's."""
    both = fits and (sample.dtype != torch.float32 or INTERPRETED)
    return {"fused": fused, "split": split} if both else {"split": split}


class Backward:
    """One backward: what its steps share. Projections without a gradient are left out of everything."""

    def __init__(
        self, grads: Sequence[Tensor], weights: Sequence[Tensor], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
        ranks: Sequence[int], rows: Rows, x: Tensor, s: Tensor, needs: Sequence[bool],
    ) -> None:  # fmt: skip
        self.grads, self.weights, self.lora_a, self.lora_b = grads, weights, lora_a, lora_b
        self.rows, self.x, self.s, self.needs = rows, x, s, needs
        self.compact, self.ranks = ranks, padded_ranks(ranks)  # s is compact
        self.n, self.count = rows.adapters, len(weights)
        self.present = [p for p, grad in enumerate(grads) if grad.ndim == 2]
        self.some = grads[self.present[0]]
        self.live = {p: by_rows(grads[p][: rows.live]) for p in self.present}
        first = 1 + 2 * self.count
        self.need_a, self.need_b = needs[first : first + len(lora_a)], needs[first + len(lora_a) :]

    def run(self) -> list[Tensor]:
        none = self.some.new_empty
        dx, dweights, dbiases = none(0), [none(0)] * self.count, [none(0)] * self.count
        for p, dy in self.live.items():
            if self.needs[1 + p]:
                dweights[p] = torch.mm(dy.t(), self.x[: self.rows.live])
            if self.needs[1 + self.count + p]:
                dbiases[p] = dy.sum(0)
        a = None
        if self.needs[0]:
            a = stacked_a(self.lora_a, self.n, self.ranks, self.x.shape[1], self.some)
        ds = self._ds() if self.needs[0] or any(self.need_a) else None
        if a is not None and ds is not None:
            dx = self._dx(ds, a)
        spans = spans_of(self.rows) if any(self.need_a) or any(self.need_b) else None
        da, db = self._da(ds, spans), self._db(spans)
        return [dx, *dweights, *dbiases, *da, *db]

    def _ds(self) -> Tensor:
        """dS [live, sum of the ranks]; zeros in the columns of projections without a gradient."""
        n, ps = self.n, self.present
        packs = [
            stacked_b(self.lora_b[p * n : p * n + n], self.ranks[p], self.grads[p].shape[1], self.some) for p in ps
        ]
        found = shrunk([self.live[p] for p in ps], packs, False, self.rows)
        if len(ps) == self.count:
            return found
        whole = self.some.new_zeros(self.rows.live, sum(self.ranks))
        for p, part in zip(ps, found.split([self.ranks[p] for p in ps], 1)):
            whole[:, sum(self.ranks[:p]) : sum(self.ranks[: p + 1])] = part
        return whole

    def _dx(self, ds: Tensor, a: Tensor) -> Tensor:
        live = self.rows.live
        dx = self.some.new_empty(self.some.shape[0], self.x.shape[1])
        dx[live:].zero_()
        sources, turned = list(self.live.values()), [self.weights[p].t() for p in self.present]

        def fused() -> None:
            triton_gemm.product(sources, turned, None, ds, 0, a, True, dx, self.rows)

        def split() -> None:
            expand_into([dx], ds, [a], True, [None], self.rows)
            for dy, weight in zip(sources, turned):
                dx[:live].addmm_(dy, weight.t())

        fits = triton_gemm.fits(sources, turned, self.rows)
        shape = ("backward", tuple(w.shape for w in turned), tuple(self.ranks), self.rows.order is None)
        depth = sum(dy.shape[1] for dy in sources)
        triton_tuner.run(shape, dx, live, depth, _ways(fused, split, dx, fits))
        return dx

    def _da(self, ds: Tensor | None, spans: Tensor | None) -> list[Tensor]:
        if ds is None or spans is None or not any(self.need_a):
            return [self.some.new_empty(0) for _ in self.lora_a]
        (pack,) = outer_products([by_rows(self.x[: self.rows.live])], ds, [sum(self.ranks)], True, self.rows, spans)
        views = []
        for i, a in enumerate(self.lora_a):
            first = sum(self.ranks[: i // self.n])
            views.append(pack[i % self.n, first : first + a.shape[0]])
        return _given_out(views, self.lora_a, self.need_a, self.some)

    def _db(self, spans: Tensor | None) -> list[Tensor]:
        """Only of projections some of whose B need it; of S their columns, padded as the ranks are."""
        wanted = [p for p in self.present if any(self.need_b[p * self.n : p * self.n + self.n])]
        if spans is None or not wanted:
            return [self.some.new_empty(0) for _ in self.lora_b]
        ranks = [self.ranks[p] for p in wanted]
        s = self.s[: self.rows.live]
        if len(wanted) < self.count or self.ranks != list(self.compact):
            parts = s.split(list(self.compact), 1)
            s = torch.cat([pad(parts[p], (0, self.ranks[p] - self.compact[p])) for p in wanted], 1)
        packs = dict(zip(wanted, outer_products([self.live[p] for p in wanted], s, ranks, False, self.rows, spans)))
        views = [
            packs[i // self.n][i % self.n, :, : b.shape[1]] if i // self.n in packs else b
            for i, b in enumerate(self.lora_b)
        ]
        return _given_out(views, self.lora_b, self.need_b, self.some)


def by_rows(matrix: Tensor) -> Tensor:
    """The matrix itself where the elements of a row are neighbours, as nearly always."""
    return matrix if matrix.ndim < 2 or matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def _given_out(
    views: Sequence[Tensor], like: Sequence[Tensor], needs: Sequence[bool], some: Tensor
) -> list[Tensor]:  # fmt: skip
    """A tensor of its own for each one needed: what a parameter's .grad keeps must not hold the others."""
    out = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else some.new_empty(0)
        for t, need in zip(like, needs)
    ]
    pairs = [(o, view) for o, view, need in zip(out, views, needs) if need and o.numel()]
    if pairs:
        torch._foreach_copy_([o for o, _ in pairs], [view for _, view in pairs])
    return out

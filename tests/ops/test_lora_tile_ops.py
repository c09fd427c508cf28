"""The CPU's tile kernels of lora_linear as ops, bf16, on whichever tile unit is chosen: against float64, element by
element, up to the roundings that the op declares (S and dS to bf16, results to theirs)."""

import copy
import itertools
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from rlhf_kernels.ops import registry

BF16, F32 = torch.bfloat16, torch.float32
HALF_ULP = 2.0**-8  # twice the largest rounding of a bf16
SUMS = 2.0**-12  # times that: the roundings of a long fp32 sum, relative to its terms


def has_unit() -> bool:
    return registry.native_available() and torch.ops.rlhf_kernels.bf16_isa() > 0


pytestmark = pytest.mark.skipif(not has_unit(), reason="this machine has neither AMX-BF16 nor AVX512-BF16")


@dataclass
class Case:
    """P projections of x under adapters of these ranks (one list a projection)."""

    rows: int
    width: int = 70
    columns: tuple[int, ...] = (45,)
    ranks: tuple[tuple[int, ...], ...] = ((4, 4, 4),)
    route: str = "scattered"
    adapter_dtype: torch.dtype = BF16
    bias: bool = True
    transposed: bool = False
    grad_rows: int | None = None
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw)

        n = len(self.ranks[0])
        self.kept = self.rows if self.grad_rows is None else self.grad_rows
        self.x = normal(self.rows, self.width).to(BF16)
        self.w = [normal(size, self.width).to(BF16) for size in self.columns]
        self.biases = [normal(size).to(BF16) if self.bias else torch.empty(0, dtype=BF16) for size in self.columns]
        self.a = [normal(r, self.width).to(self.adapter_dtype) for ranks in self.ranks for r in ranks]
        self.b = [normal(size, r).to(self.adapter_dtype) for size, rs in zip(self.columns, self.ranks) for r in rs]
        if self.transposed:
            self.w, self.a, self.b = ([t.t().contiguous().t() for t in ts] for ts in (self.w, self.a, self.b))
        self.scaling = [0.5 + e for e in range(n)]
        self.grads = [normal(self.kept, size).to(BF16) for size in self.columns]
        order = {
            "scattered": torch.randint(-1, n, (self.rows,), generator=draw),
            "runs": torch.arange(self.rows) * (n + 1) // self.rows - 1,
            "one adapter": torch.full((self.rows,), n - 1),
            "none": torch.full((self.rows,), -1),
        }
        self.index = order[self.route]
        self.offsets = [sum(max(ranks) for ranks in self.ranks[:p]) for p in range(len(self.ranks) + 1)]

    def routed(self) -> tuple[Tensor | None, list[int]]:
        if self.route == "scattered":
            return self.index.int(), []
        cuts = [0, *((self.index.diff() != 0).nonzero().flatten() + 1).tolist(), self.rows]
        return None, [v for lo, hi in itertools.pairwise(cuts) for v in (lo, hi, int(self.index[lo]))]

    def forward(self) -> tuple[list[Tensor], Tensor]:
        ys = [torch.full((self.rows, size), float("nan"), dtype=BF16) for size in self.columns]
        s = torch.full((self.kept, self.offsets[-1]), float("nan"), dtype=BF16)
        routed = (*self.routed(), self.scaling)
        torch.ops.rlhf_kernels.lora_tiles(self.x, self.w, self.biases, self.a, self.b, *routed, ys, s)
        return ys, s

    def backward(self, s: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        dx = torch.full((self.rows, self.width), float("nan"), dtype=BF16)
        da, db = ([torch.full(t.shape, float("nan"), dtype=t.dtype) for t in ts] for ts in (self.a, self.b))
        routed = (*self.routed(), self.scaling)
        torch.ops.rlhf_kernels.lora_tiles_backward(
            self.grads, self.w, self.a, self.b, *routed, self.x, s, self.kept, dx, da, db
        )
        return dx, da, db

    def adapters(self):
        """(projection, slot, adapter, its rows, A, B) in float64; adapters are cast to bf16 on use."""
        n = len(self.scaling)
        for p in range(len(self.columns)):
            for e in range(n):
                a, b = (t[p * n + e].to(BF16).double() for t in (self.a, self.b))
                yield p, p * n + e, e, (self.index == e).nonzero().flatten(), a, b


def within(value: Tensor, truth: Tensor, size: Tensor, rounded: bool = True) -> None:
    """Asserts the roundings of intermediates of `size` and of the result, beside those of fp32 sums."""
    assert value.shape == truth.shape
    allowed = HALF_ULP * size + (HALF_ULP if rounded else 0) * truth.abs() + 1e-4
    error = (value.double() - truth).abs()
    assert (error <= allowed).all(), (error - allowed).max()


CASES = {
    "one row": Case(1),
    "one projection": Case(100),
    "three projections": Case(67, columns=(64, 33, 5), ranks=((8, 8), (8, 8), (8, 8))),
    "ranks from 0 to 40": Case(90, columns=(40, 70), ranks=((1, 16, 40), (33, 0, 17))),
    "odd ranks, adapters in fp32": Case(75, ranks=((3, 5, 7),), adapter_dtype=F32),
    "runs": Case(130, width=33, ranks=((16, 16),), route="runs", bias=False),
    "one adapter": Case(33, width=700, columns=(400,), ranks=((64,),), route="one adapter"),
    "no adapter": Case(40, route="none"),
    "transposed weights and adapters": Case(64, transposed=True),
    "fewer rows with gradients": Case(100, grad_rows=37),
    "a step of rows": Case(32, width=32, columns=(32,), ranks=((32,),), route="one adapter"),
    "many rows": Case(1100, width=96, columns=(352, 64), ranks=((16, 8), (4, 32))),
    "more rows than are packed at once": Case(2100, width=40, ranks=((20,),), route="one adapter"),
}


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_at_any_shape(case, threads):
    ys, s = case.forward()
    x = case.x.double()
    truths = [x @ w.double().t() + (b.double() if len(b) else 0) for w, b in zip(case.w, case.biases)]
    sizes = [torch.zeros_like(y) for y in truths]
    kept = torch.zeros(case.rows, case.offsets[-1], dtype=torch.float64)
    for p, _, e, rows, a, b in case.adapters():
        exact = case.scaling[e] * x[rows] @ a.t()
        truths[p][rows] += exact @ b.t()
        sizes[p][rows] += exact.abs() @ b.abs().t()
        kept[rows, case.offsets[p] : case.offsets[p] + len(a)] = exact
    for y, truth, size in zip(ys, truths, sizes):
        within(y, truth, size)
    within(s, kept[: case.kept], torch.zeros_like(kept[: case.kept]))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_at_any_shape(case, threads):
    s = case.forward()[1]
    dx, das, dbs = case.backward(s)
    grads, live = [g.double() for g in case.grads], case.kept
    truth = sum(g @ w.double() for g, w in zip(grads, case.w))
    size = torch.zeros_like(truth)
    for p, slot, e, rows, a, b in case.adapters():
        rows = rows[rows < live]
        g, x = grads[p][rows], case.x.double()[rows]
        ds = case.scaling[e] * g @ b
        truth[rows] += ds @ a
        size[rows] += ds.abs() @ a.abs()
        own = s[rows, case.offsets[p] : case.offsets[p] + len(a)].double()
        single = case.adapter_dtype == F32
        within(das[slot], ds.t() @ x, ds.abs().t() @ x.abs(), rounded=not single)
        within(dbs[slot], g.t() @ own, SUMS * (g.abs().t() @ own.abs()), rounded=not single)
    within(dx[:live], truth, size)
    assert not dx[live:].any()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_bits_do_not_depend_on_the_number_of_threads(case):
    def everything():
        ys, s = case.forward()
        dx, da, db = case.backward(s)
        return [*ys, s, dx, *da, *db]

    before, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(everything())
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other))


# up to 24 rows, and up to 64, have kernels of their own, which sum in another order
AMONG = [(24, slice(5, 6)), (24, slice(15, 24)), (60, slice(5, 30)), (64, slice(31, 64)), (1100, slice(31, 97))]


@pytest.mark.parametrize(("count", "rows"), AMONG, ids=str)
def test_a_row_has_the_same_bits_alone_and_among_others(count, rows):
    whole = Case(count, width=96, columns=(352, 64), ranks=((16, 8), (4, 32)))
    part = copy.copy(whole)
    part.x, part.index, part.grads = whole.x[rows], whole.index[rows], [g[rows] for g in whole.grads]
    part.rows = part.kept = len(part.x)
    (ys, s), (among, kept) = part.forward(), whole.forward()
    for alone, other in zip((*ys, s, part.backward(s)[0]), (*among, kept, whole.backward(kept)[0])):
        assert torch.equal(alone, other[rows])


def test_an_index_outside_is_nan_in_its_row_alone():
    case = Case(70)
    clean = case.forward()[0][0]
    case.index[[0, 33, 69]] = torch.tensor([3, -2, 1000])
    poisoned = case.forward()[0][0]
    outside = torch.zeros(70, dtype=torch.bool)
    outside[[0, 33, 69]] = True
    assert torch.equal(poisoned.isnan().all(1), outside)
    assert torch.equal(poisoned[~outside], clean[~outside])


@pytest.mark.parametrize("which", ["a", "b"])
def test_a_poisoned_adapter_stays_in_its_own_rows(which):
    case = Case(100)
    clean = case.forward()[0][0]
    getattr(case, which)[1].fill_(float("nan"))
    poisoned = case.forward()[0][0]
    assert torch.equal(poisoned.isnan().all(1), case.index == 1)
    assert torch.equal(poisoned[case.index != 1], clean[case.index != 1])

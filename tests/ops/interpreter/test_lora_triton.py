"""lora_linear's Triton kernels against the definition in float64: values, gradients, and who sees whose adapter."""

import pytest
import torch
from ops.lora_cases import as_exact_as_plain

from rlhf_kernels.ops.lora import Routing, build_routing, lora_linear, naive, triton_pack, triton_tier
from rlhf_kernels.ops.lora import triton_tuner as tuner

F32, F16 = torch.float32, torch.float16
NAN = float("nan")
NORM_BOUND = {F32: 1e-5, F16: 2e-3}
SCATTERED = "scattered"


@pytest.fixture(params=["fused", "split"])
def way(request, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_LORA", request.param)
    return request.param


class Case:
    """Inputs of P projections with n adapters; ranks[p][e]; route: an adapter of each row, or SCATTERED."""

    def __init__(self, device, rows=40, width=128, outs=(96,), ranks=((16, 16, 16),), route=SCATTERED, dtype=F32,
                 bias=False, grad_rows=None, ordered=False, turned=False, adapters=None):  # fmt: skip
        self.n, self.device, self.dtype = len(ranks[0]), device, dtype
        put = lambda *shape: torch.randn(*shape).to(dtype).to(device)  # noqa: E731
        self.x = put(rows, width)
        scaled = width**-0.5
        self.weights = [(put(width, n) * scaled).t() if turned else put(n, width) * scaled for n in outs]
        self.biases = [put(n) if bias else None for n in outs]
        own = (lambda t: t) if adapters is None else (lambda t: t.to(adapters))
        self.lora_a = [own(put(r, width) * scaled) for per in ranks for r in per]
        self.lora_b = [own(put(n, r) * max(r, 1) ** -0.5) for per, n in zip(ranks, outs) for r in per]
        index = torch.randint(-1, self.n, (rows,)) if route is SCATTERED else torch.tensor(route[:rows])
        self.index = index.to(device)
        self.order = index.argsort(stable=True).to(device) if ordered else None
        self.scaling = [0.5, 2.0, -1.0, 1.5, 0.25, 3.0][: self.n]
        self.grad_rows = rows if grad_rows is None else grad_rows
        self.upstream = [put(rows, n) for n in outs]

    def needs(self):
        return [True] * (1 + 2 * len(self.weights) + 2 * len(self.lora_a))

    def ours(self, needs=None):
        """(ys, gradients) of the kernels."""
        routed = (self.index, None, self.scaling, None, self.order)
        ys, s = triton_tier.forward(
            self.x, self.weights, self.biases, self.lora_a, self.lora_b, *routed, self.grad_rows
        )
        s = self.x.new_empty(0, 0) if s is None else s
        grads = triton_tier.backward(
            self.upstream, self.weights, self.lora_a, self.lora_b, *routed, self.x[: self.grad_rows], s,
            self.grad_rows, needs or self.needs(),
        )  # fmt: skip
        return ys, grads

    def definition(self, dtype):
        """(ys, gradients) of the plain formula in a dtype."""
        leaf = lambda t: None if t is None else t.detach().to(dtype, copy=True).requires_grad_()  # noqa: E731
        x, weights, biases = leaf(self.x), [leaf(w) for w in self.weights], [leaf(b) for b in self.biases]
        lora_a, lora_b = [leaf(a) for a in self.lora_a], [leaf(b) for b in self.lora_b]
        n, ys = self.n, []
        for p, (weight, bias) in enumerate(zip(weights, biases)):
            own = slice(p * n, p * n + n)
            ys.append(
                naive.lora_linear(x, weight, bias, lora_a[own], lora_b[own], self.index, self.scaling, self.grad_rows)
            )
        torch.autograd.backward(ys, [u.to(dtype) for u in self.upstream])
        leaves = (x, *weights, *biases, *lora_a, *lora_b)
        return [y.detach() for y in ys], [None if t is None else t.grad for t in leaves]

    def names(self):
        count = len(self.weights)
        of = lambda name, k: [f"{name}{i}" for i in range(k)]  # noqa: E731
        return ["x", *of("weight", count), *of("bias", count), *of("a", len(self.lora_a)), *of("b", len(self.lora_b))]


def assert_as_exact_as_plain(case, times_values=2, times_gradients=3):
    (ys, grads), (exact, exact_grads), (plain, plain_grads) = (
        case.ours(), case.definition(torch.float64), case.definition(case.dtype)
    )  # fmt: skip
    pooled = [torch.cat(some, 1) for some in (ys, exact, plain)]  # a largest error of few numbers is a small sample
    named = [("y", *pooled, times_values)]
    named += [(name, *t, times_gradients) for name, *t in zip(case.names(), grads, exact_grads, plain_grads)]
    for name, ours, truth, rough, times in named:
        if truth is None:  # a bias that is not there
            continue
        assert ours.shape == truth.shape, name
        assert torch.isfinite(ours).all(), name
        if truth.numel() == 0:
            continue
        error, allowed = (ours.double() - truth).abs(), (rough.double() - truth).abs().max()
        assert (error <= torch.maximum(times * allowed, 2e-7 * (1 + truth.abs()))).all(), (name, error.max(), allowed)
        assert error.norm() <= NORM_BOUND[case.dtype] * truth.norm() + 1e-30, name


CASES = {
    "scattered rows": {"rows": 70, "bias": True},
    "fp16": {"dtype": F16, "bias": True},
    "one adapter after another": {"route": [0] * 33 + [-1] * 10 + [2] * 40, "rows": 70},
    "no whole blocks": {"rows": 37, "width": 204, "outs": (147,), "ranks": ((5, 5),), "bias": True},
    "ragged ranks": {"ranks": ((0, 1, 5, 16, 33),)},
    "rows in an order": {"ordered": True, "ranks": ((8,) * 5,), "bias": True},
    "rows in an order, three at once": {"ordered": True, "outs": (64, 32, 40), "ranks": ((4, 8),) * 3, "grad_rows": 25},
    "three at once": {"outs": (80, 24, 48), "ranks": ((16, 3), (0, 0), (4, 20)), "grad_rows": 25, "bias": True},
    "fp32 adapters": {"dtype": F16, "adapters": F32, "ranks": ((8, 8),)},
    "weight stored by columns": {"turned": True},
    "one row": {"rows": 1, "route": [1]},
    "no gradients": {"grad_rows": 0},
    "all bypass": {"route": [-1] * 40},
    "no rows": {"rows": 0, "route": []},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_values_and_gradients_are_the_definition(device, way, options):
    assert_as_exact_as_plain(Case(device, **options))


@pytest.mark.parametrize("number", range(8))
def test_random_calls(number, way):
    as_exact_as_plain(number, dtype=F16 if number % 3 == 0 else F32)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(8, 200))
def test_many_random_calls(number, way):
    as_exact_as_plain(number, dtype=F16 if number % 3 == 0 else F32)


def test_five_projections_take_several_launches(device):
    case = Case(device, width=64, outs=(16, 24, 32, 16, 40), ranks=((4, 4),) * 5)
    assert_as_exact_as_plain(case)


def test_many_ranks_and_features_are_taken_in_blocks_and_parts(device):
    assert_as_exact_as_plain(Case(device, rows=5, width=1100, outs=(48,), ranks=((70, 40),), grad_rows=5))


@pytest.mark.parametrize("which", ["lora_a", "lora_b"])
@pytest.mark.parametrize("ordered", [False, True], ids=["scattered", "order"])
def test_an_adapter_full_of_nan_stays_with_its_rows(device, way, which, ordered):
    case = Case(device, ranks=((16, 16),), ordered=ordered)
    (y,), grads = case.ours()
    getattr(case, which)[0].fill_(NAN)
    (poisoned,), poisoned_grads = case.ours()
    others = case.index != 0
    assert torch.equal(poisoned[others], y[others])
    assert poisoned[~others].isnan().all()
    assert torch.equal(poisoned_grads[0][others], grads[0][others])
    assert torch.equal(poisoned_grads[4], grads[4])  # dA and dB of the other adapter
    assert torch.equal(poisoned_grads[6], grads[6])


def test_a_row_has_the_same_bits_whichever_adapters_stand_beside_it(device, way):
    case = Case(device)
    (mixed,), mixed_grads = case.ours()
    index = case.index.clone()
    for e in (-1, 0, 2):
        case.index = torch.full_like(index, e)
        (alone,), grads = case.ours()
        assert torch.equal(alone[index == e], mixed[index == e])
        assert torch.equal(grads[0][index == e], mixed_grads[0][index == e])


def test_a_bad_index_gives_a_row_of_nan(device, way):
    case = Case(device, rows=40)
    case.index[[3, 20, 39]] = torch.tensor([-2, 3, 2**32], device=device)
    ys, s = triton_tier.forward(
        case.x, case.weights, case.biases, case.lora_a, case.lora_b, case.index, None, case.scaling, None, None, 40
    )
    bad = torch.zeros(40, dtype=torch.bool, device=device)
    bad[[3, 20, 39]] = True
    assert torch.equal(ys[0].isnan().all(1), bad)
    assert torch.equal(ys[0].isnan().any(1), bad)
    assert not s.isnan().any()


def test_s_is_compact_and_ends_with_the_rows_that_are_saved(device, way):
    case = Case(device, outs=(16, 32), ranks=((3, 1), (0, 5)))
    _, s = triton_tier.forward(
        case.x, case.weights, case.biases, case.lora_a, case.lora_b, case.index, None, case.scaling, None, None, 25
    )
    assert s.shape == (25, 3 + 5)
    truth = torch.zeros(25, 8, dtype=torch.float64, device=device)
    for i, e in enumerate(case.index[:25].tolist()):
        for p, first in ((0, 0), (1, 3)) if e >= 0 else ():
            a = case.lora_a[2 * p + e].double()
            truth[i, first : first + len(a)] = case.scaling[e] * case.x[i].double() @ a.t()
    torch.testing.assert_close(s.double(), truth, rtol=1e-5, atol=1e-6)


def test_what_needs_no_gradient_is_left_out(device, way):
    case = Case(device, rows=9, width=64, outs=(16, 8), ranks=((4,), (2,)))
    _, whole = case.ours()
    for i, name in enumerate(case.names()):
        needs = [False] * len(whole)
        needs[i] = True
        _, grads = case.ours(needs)
        assert [g.numel() > 0 for g in grads] == needs
        assert torch.equal(grads[i], whole[i]), name


def test_an_output_nobody_used_has_no_gradient_to_pass_on(device, way):
    case = Case(device, rows=9, width=64, outs=(32, 16, 48), ranks=((4, 8), (4, 4), (2, 2)))
    whole = case.ours()[1]
    zeros = case.upstream[1].clone()
    case.upstream[1] = torch.zeros_like(zeros)
    with_zeros = case.ours()[1]
    case.upstream[1] = zeros.new_empty(0)
    needs = case.needs()
    needs[2] = needs[5] = False  # the caller asks for nothing of that projection
    for e in range(2):
        needs[7 + 2 + e] = needs[7 + 6 + 2 + e] = False
    grads = case.ours(needs)[1]
    for i, need in enumerate(needs):
        if need:
            torch.testing.assert_close(grads[i], with_zeros[i], rtol=1e-5, atol=1e-5)
    assert not torch.equal(whole[0], grads[0])


@pytest.mark.parametrize("known", ["runs", "index"])
def test_through_the_public_function(device, way, known):
    case = Case(device, route=[0] * 11 + [2] * 20 + [-1] * 9)
    leaves = [torch.stack(case.lora_a).requires_grad_(), torch.stack(case.lora_b).requires_grad_()]
    x = case.x.clone().requires_grad_()
    runs = Routing.from_runs([(0, 11, 0), (11, 31, 2), (31, 40, -1)], 3)
    routing = runs if known == "runs" else build_routing(case.index, 3)
    y = lora_linear(x, case.weights[0], *leaves, scaling=case.scaling, routing=routing)
    y.backward(case.upstream[0])
    (truth,), grads = case.definition(torch.float64)
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), grads[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaves[0].grad.double(), torch.stack(grads[3:6]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaves[1].grad.double(), torch.stack(grads[6:9]), rtol=1e-5, atol=1e-5)


def test_an_index_overwritten_in_place_switches_the_roles_of_the_same_routing(device, way):
    case = Case(device, ordered=True)  # the order goes stale, which must not matter
    before = case.ours()[0][0]
    case.index.copy_(torch.where(case.index == 0, -1, (case.index + 1) % 3))
    after = case.ours()[0][0]
    fresh = Case.__new__(Case)
    fresh.__dict__.update(case.__dict__, order=case.index.argsort(stable=True))
    torch.testing.assert_close(after, fresh.ours()[0][0], rtol=1e-5, atol=1e-5)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after.double(), case.definition(torch.float64)[0][0], rtol=1e-5, atol=1e-5)


def test_adapters_that_are_slices_of_one_tensor_are_not_copied():
    stack = torch.randn(3, 16, 64)
    assert triton_pack.stacked_a(list(stack), 3, [16], 64, stack).data_ptr() == stack.data_ptr()
    assert triton_pack.stacked_b(list(stack), 64, 16, stack).data_ptr() == stack.data_ptr()
    for others in ([stack[0], stack[2], stack[1]], [t.clone() for t in stack], list(stack.half())):
        copied = triton_pack.stacked_a(others, 3, [16], 64, stack)
        assert copied.data_ptr() not in [t.data_ptr() for t in others]
        assert torch.equal(copied, torch.stack([t.float() for t in others]))


def test_the_way_is_asked_for_or_follows_the_rule(monkeypatch):
    monkeypatch.delenv("RLHF_KERNELS_LORA", raising=False)
    ran = []
    ways = {"fused": lambda: ran.append("fused"), "split": lambda: ran.append("split")}
    sample = torch.zeros(1)
    tuner.run("shape", sample, tuner.FEW_ROWS, tuner.SHALLOW, ways)
    tuner.run("shape", sample, tuner.FEW_ROWS - 1, tuner.SHALLOW, ways)
    tuner.run("shape", sample, tuner.FEW_ROWS, tuner.SHALLOW + 1, ways)
    monkeypatch.setenv("RLHF_KERNELS_LORA", "split")
    tuner.run("shape", sample, tuner.FEW_ROWS, tuner.SHALLOW, ways)
    assert ran == ["fused", "split", "split", "split"]
    monkeypatch.setenv("RLHF_KERNELS_LORA", "both")
    with pytest.raises(ValueError, match="'both'; it must be fused or split"):
        tuner.run("shape", sample, 1, 1, ways)


def test_a_class_of_shapes_is_measured_once(monkeypatch):
    monkeypatch.delenv("RLHF_KERNELS_LORA", raising=False)
    monkeypatch.setattr(tuner, "_measured", {})
    monkeypatch.setattr(tuner, "_may_measure", lambda sample: True)
    timed = []
    monkeypatch.setattr(tuner, "_milliseconds", lambda call: timed.append(call) or (1.0 if call is split else 2.0))
    ran = []
    fused, split = (lambda: ran.append("fused")), (lambda: ran.append("split"))
    for rows in (300, 400, 512, 600):
        tuner.run("shape", torch.zeros(1), rows, 64, {"fused": fused, "split": split})
    assert ran == ["split"] * 4
    assert len(timed) == 4  # 257 to 512 rows are one class, 600 are another

"""What lora_linear's backward computes, what it leaves alone, and what the forward keeps for it."""

from collections import Counter

import pytest
import torch
from ops.test_lora import ROUTES, K, N, run, tensors
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_kernels.ops.lora import Routing, build_routing, library, lora_linear, lora_linears, naive

pytestmark = pytest.mark.usefixtures("device")


class Products(TorchDispatchMode):
    """Counts the library's GEMMs by the shape of their result."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.shapes[tuple(out.shape)] += 1
        return out


@pytest.fixture
def library_tier(monkeypatch):
    """The library's GEMMs can be counted."""
    monkeypatch.setattr("rlhf_kernels.ops.lora.tier.TIERS", (("native", library),))


def backward_products(y, upstream=None):
    with Products() as products:
        y.backward(torch.ones_like(y) if upstream is None else upstream)
    return products.shapes


@pytest.mark.parametrize("grad_rows", [0, 1, 12, 30])
@pytest.mark.parametrize("route", ["one run each", "scattered"])
def test_rows_beyond_grad_rows_get_and_give_no_gradient(grad_rows, route):
    index = torch.tensor(ROUTES[route])[:30]
    leaves = tensors(rows=len(index))
    _, grads = run(leaves, index, grad_rows=grad_rows)
    upstream = torch.ones(len(index), N)
    upstream[grad_rows:] = 0
    _, want = run(leaves, index, upstream=upstream)
    for got, reference in zip(grads, want):
        torch.testing.assert_close(got, reference)
    assert not grads[0][grad_rows:].any()


def test_upstream_beyond_grad_rows_is_not_read():
    leaves, upstream = tensors(), torch.ones(30, N)
    index = torch.tensor(ROUTES["one run each"])
    _, want = run(leaves, index, upstream=upstream, grad_rows=12)
    upstream[12:] = float("nan")
    _, grads = run(leaves, index, upstream=upstream, grad_rows=12)
    assert all(torch.equal(got, reference) for got, reference in zip(grads, want))


@pytest.mark.host
@pytest.mark.usefixtures("library_tier")
def test_each_gradient_costs_its_own_product_and_nothing_else_does():
    """dx [30, K] and dx += dS A; dW [N, K]; dS [30, r], dA [r, K]; dB [N, r]."""
    r = 4
    x, weight, a, b, _ = (t[0] if t.ndim == 3 else t for t in tensors(n=1, r=r))
    costs = {
        "x": {(30, K): 2, (30, r): 1},
        "weight": {(N, K): 1},
        "lora_a": {(30, r): 1, (r, K): 1},
        "lora_b": {(N, r): 1},
    }
    for asked in (["x"], ["weight"], ["lora_a"], ["lora_b"], ["lora_a", "lora_b"], list(costs)):
        leaves = {"x": x.clone(), "weight": weight.clone(), "lora_a": a.clone(), "lora_b": b.clone()}
        for name in asked:
            leaves[name].requires_grad_()
        shapes = backward_products(lora_linear(**leaves))
        expected = Counter()
        for name in asked:
            expected |= Counter(costs[name])  # dS is shared
        assert shapes == expected, asked
        assert [name for name, t in leaves.items() if t.grad is not None] == asked


@pytest.mark.host
@pytest.mark.usefixtures("library_tier")
def test_an_output_the_loss_does_not_use_costs_no_product_and_leaves_its_own_without_gradient():
    x, weight, a, b, _ = (t[0] if t.ndim == 3 else t for t in tensors(n=1))
    other, other_b = torch.randn(9, K), torch.randn(9, 4)
    leaves = [t.clone().requires_grad_() for t in (x, weight, other, a, a, b, other_b)]
    x, weight, other, a0, a1, b0, b1 = leaves
    y, _ = lora_linears(x, [weight, other], [a0, a1], [b0, b1])
    with Products() as products:
        y.sum().backward()
    assert products.shapes == {(30, K): 2, (N, K): 1, (30, 4): 1, (4, K): 1, (N, 4): 1}
    assert [t.grad is not None for t in leaves] == [True, True, False, True, False, True, False]


def saved(**options):
    """The tensors a forward keeps beside parameters: 116 rows, the first 16 of which need gradients."""
    index = torch.tensor([0] * 8 + [1] * 8 + [-1] * 100)
    x, weight, a, b, bias = tensors(n=2, rows=116)
    learns = options.get("learns", ("a", "b"))
    for name, t in (("x", x), ("weight", weight), ("a", a), ("b", b)):
        t.requires_grad_(name in learns)
    kept, known = [], {t.data_ptr() for t in (*a, *b, weight)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        routing = build_routing(index, 2)
        lora_linear(x, weight, [*a], [*b], bias=bias, routing=routing, grad_rows=options.get("grad_rows"))
    names = {weight.data_ptr(): "weight"}
    return [names.get(t.data_ptr(), list(t.shape)) for t in kept if t.data_ptr() not in known - {weight.data_ptr()}]


@pytest.mark.host
def test_what_the_backward_does_not_need_is_not_kept():
    s, xs = [16, 4], [16, K]
    assert saved(grad_rows=16) == [xs, s]
    assert saved(grad_rows=16, learns=("b",)) == [s]
    assert saved(grad_rows=16, learns=("a",)) == [xs, [0, 4]]
    assert saved(grad_rows=16, learns=("weight",)) == [xs, [0, 4]]
    assert saved(grad_rows=16, learns=("x",)) == [[0, 4], "weight"]
    assert saved(learns=("x", "a", "b")) == [[116, K], [116, 4], "weight"]


@pytest.mark.host
def test_nothing_is_kept_where_nothing_learns():
    x, weight, a, b, _ = tensors(n=1)
    for t in (a, b):
        t.requires_grad_()
    with torch.no_grad():
        assert lora_linear(x, weight, a, b).grad_fn is None
    with torch.inference_mode():
        assert lora_linear(x, weight, a, b).is_inference()


def test_a_frozen_weight_and_an_unused_adapter_get_no_gradient():
    x, weight, a, b, bias = tensors()
    a_list = [t.clone().requires_grad_() for t in a]
    b_list = [t.clone().requires_grad_() for t in b]
    routing = Routing.from_runs([(0, 10, 2), (10, 30, -1)], adapters=3)
    lora_linear(x, weight, a_list, b_list, scaling=2.0, bias=bias, routing=routing).sum().backward()
    assert weight.grad is None
    assert [t.grad is not None for t in (*a_list, *b_list)] == [False, False, True] * 2


def test_under_an_index_an_unused_adapter_gets_zeros_whatever_the_index_holds():
    for route in ("scattered", "one run each"):
        index = torch.tensor(ROUTES[route])
        x, weight, a, b, _ = tensors(n=5, rows=len(index))
        a_list = [t.clone().requires_grad_() for t in a]
        lora_linear(x, weight, a_list, list(b), index).sum().backward()
        assert [bool(t.grad.any()) for t in a_list] == [True, True, True, False, False]


@pytest.mark.parametrize(
    "kinds", [(torch.float32,) * 2, (torch.float32, torch.float64), (torch.float64, torch.float16)]
)
def test_adapters_of_another_dtype_are_cast_and_get_gradients_in_their_own(kinds):
    x, weight, a, b, _ = tensors(n=1, dtype=torch.bfloat16)
    a, b = a.to(kinds[0]).requires_grad_(), b.to(kinds[1]).requires_grad_()
    y = lora_linear(x, weight, a, b)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert (a.grad.dtype, b.grad.dtype) == kinds


@pytest.mark.host
@pytest.mark.parametrize("backend", ["native", "naive"])
@pytest.mark.parametrize("route", ["one run each", "scattered"])
def test_gradcheck(backend, route, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", backend)
    index = torch.tensor(ROUTES[route])[:12]
    g = torch.Generator().manual_seed(0)
    shapes = [(12, 5), (4, 5), (3, 5), (3, 2, 5), (3, 4, 2), (3, 1, 5), (3, 3, 1), (4,)]
    leaves = [torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def op(x, weight, other, a, b, other_a, other_b, bias):
        return lora_linears(x, [weight, other], [a, other_a], [b, other_b], index, [0.5, 2.0, 1.0], [bias, None])

    assert torch.autograd.gradcheck(op, leaves)


def test_a_second_derivative_is_one_clear_error_and_naive_has_one(monkeypatch):
    x, weight, a, b, _ = tensors(n=1)
    a.requires_grad_()
    (first,) = torch.autograd.grad(lora_linear(x, weight, a, b).square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="lora_linear has no second derivative"):
        first.sum().backward()
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "naive")
    (first,) = torch.autograd.grad(lora_linear(x, weight, a, b).square().sum(), a, create_graph=True)
    first.sum().backward()
    assert a.grad.any()


@pytest.mark.host
def test_torch_func_grad_gives_the_same_gradient():
    x, weight, a, b, bias = tensors()
    index = torch.tensor(ROUTES["one run each"])

    def loss(parameters):
        return lora_linear(x, weight, parameters["a"], parameters["b"], index, 1.0, bias).square().sum()

    got = torch.func.grad(loss)({"a": a, "b": b})
    a, b = a.requires_grad_(), b.requires_grad_()
    loss({"a": a, "b": b}).backward()
    torch.testing.assert_close(got["a"], a.grad)
    torch.testing.assert_close(got["b"], b.grad)


@pytest.mark.host
@pytest.mark.parametrize("rows", [9, 40])
def test_a_backward_under_autocast_is_in_its_forwards_dtype(rows):
    x, weight, a, b, _ = tensors(rows=rows)
    leaves = [t.requires_grad_() for t in (x, weight, a, b)]
    y = lora_linear(*leaves, torch.arange(rows) % 4 - 1)
    want = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(map(torch.equal, got, want))


@pytest.mark.host
def test_forward_mode_derivatives_are_the_definitions():
    """Kernels have none, and where nothing requires a gradient a tangent would be lost in silence."""
    x, weight, a, b, _ = tensors(rows=40)
    index = torch.arange(40) % 4 - 1
    direction = torch.randn_like(b)
    _, got = torch.func.jvp(lambda b: lora_linear(x, weight, a, b, index), (b,), (direction,))
    want = lora_linear(x, torch.zeros_like(weight), a, direction, index)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.host
def test_saved_tensors_may_come_back_in_another_layout():
    x, weight, a, b, _ = tensors(rows=40)
    leaves = [t.requires_grad_() for t in (x, weight, a, b)]
    index = torch.arange(40) % 4 - 1

    def gradients():
        return torch.autograd.grad(lora_linear(*leaves, index).square().sum(), leaves)

    want = gradients()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.mT.contiguous() if t.ndim > 1 else t, lambda t: t.mT if t.ndim > 1 else t
    ):
        got = gradients()
    torch.testing.assert_close(got, want)


def test_checkpointing_gives_the_same_gradients():
    index = torch.tensor(ROUTES["scattered"])
    leaves = tensors(rows=len(index))

    def checkpointed(*args, **options):
        return torch.utils.checkpoint.checkpoint(lora_linear, *args, use_reentrant=False, **options)

    torch.testing.assert_close(run(leaves, index, op=checkpointed), run(leaves, index))


@pytest.mark.host
def test_sums_over_many_runs_of_one_adapter_are_formed_in_fp32():
    index = torch.tensor(([0] * 16 + [-1] * 16) * 4)
    x, weight, a, b, _ = tensors(n=1, rows=128, dtype=torch.bfloat16)
    x, upstream = x.abs(), torch.ones(128, N)
    routing = Routing.from_runs([(i * 16, i * 16 + 16, -(i % 2)) for i in range(8)], adapters=1)
    a, b = a[0].requires_grad_(), b[0].abs().requires_grad_()
    lora_linear(x, weight, a, b, routing=routing).backward(upstream.bfloat16())
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    naive.lora_linear(x.double(), weight.double(), None, [exact[0]], [exact[1]], index, [1.0]).backward(upstream)
    for got, want in zip((a, b), exact):
        assert (got.grad - want.grad).norm() <= 6e-3 * want.grad.norm()

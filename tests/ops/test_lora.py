"""lora_linear against its definition in float64, and the guarantees its docstring gives."""

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

from rlhf_kernels.ops.lora import Routing, build_routing, compiled, lora_linear

pytestmark = pytest.mark.usefixtures("device")

K, N = 24, 40
ROUTES = {
    "one run each": [0] * 10 + [1] * 7 + [2] * 13,
    "bypass between": [1] * 5 + [-1] * 6 + [0] * 9,
    "all bypass": [-1] * 9,
    "one adapter": [2] * 8,
    "scattered": [0, -1, 2, 1, 0, 2, -1, 1] * 9,
    "one row": [1],
    "no rows": [],
}


def tensors(n=3, r=4, rows=30, dtype=torch.float32, seed=0):
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return draw(rows, K), draw(N, K), draw(n, r, K), draw(n, N, r), draw(N)


def run(leaves, index, scaling=1.0, upstream=None, **options):
    """y and the gradients of (x, weight, lora_a, lora_b, bias)."""
    leaves = [t.clone().requires_grad_() for t in leaves]
    x, weight, a, b, bias = leaves
    y = lora_linear(x, weight, a, b, index, scaling, bias, **options)
    y.backward(torch.ones_like(y) if upstream is None else upstream.to(y.dtype))
    return y.detach(), [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients_are_the_definition_in_float64(route, dtype):
    index = torch.tensor(route, dtype=torch.long)
    leaves = tensors(rows=len(route), dtype=dtype)
    upstream = torch.randn(len(route), N, dtype=torch.float64)
    y, grads = run(leaves, index, [0.5, 2.0, 1.0], upstream)
    want, want_grads = run([t.double() for t in leaves], index, [0.5, 2.0, 1.0], upstream.to(dtype).double())
    bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    names = ("y", "x", "weight", "lora_a", "lora_b", "bias")
    for name, got, reference in zip(names, [y, *grads], [want, *want_grads]):
        assert got.dtype == dtype
        error = (got.double() - reference).norm() / reference.norm().clamp_min(1e-30)
        assert error <= bound, f"{name}: {error:.2e}"


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
def test_a_bypassed_row_is_bit_equal_to_every_row_bypassed(route):
    index = torch.tensor(route, dtype=torch.long)
    x, weight, a, b, bias = tensors(rows=len(route))
    bypassed = lora_linear(x, weight, a, b, -1, 1.0, bias)
    assert torch.equal(bypassed, F.linear(x, weight, bias))
    routed = lora_linear(x, weight, a, b, index, 1.0, bias)
    assert torch.equal(routed[index == -1], bypassed[index == -1])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("route", ["one run each", "bypass between", "scattered"])
@pytest.mark.parametrize("which", ["lora_a", "lora_b"])
def test_a_poisoned_adapter_does_not_reach_other_rows(poison, route, which):
    index = torch.tensor(ROUTES[route])
    clean = tensors(rows=len(index))
    dirty = [t.clone() for t in clean]
    dirty[2 if which == "lora_a" else 3][0].fill_(poison)
    y, grads = run(clean, index)
    y2, grads2 = run(dirty, index)
    others = index != 0
    assert torch.equal(y2[others], y[others])
    assert not y2[~others].isfinite().all()
    assert torch.equal(grads2[0][others], grads[0][others])
    for got, want in zip(grads2[2:4], grads[2:4]):
        assert torch.equal(got[1:], want[1:])


@pytest.mark.host
def test_masks_on_a_device_the_host_may_not_read_give_the_same(monkeypatch):
    """The path of other devices, run here: rows are chosen by masks, never by an index read on the host."""
    index = torch.tensor(ROUTES["scattered"])
    leaves = tensors(rows=len(index))
    y, grads = run(leaves, index, [0.5, 2.0, 1.0])
    monkeypatch.setattr("rlhf_kernels.ops.lora.library.masked", lambda index, runs: runs is None)
    monkeypatch.setattr("rlhf_kernels.ops.lora.gradients.host_runs", lambda index, n: None)
    y2, grads2 = run(leaves, index, [0.5, 2.0, 1.0])
    torch.testing.assert_close(y2, y)
    for got, want in zip(grads2, grads):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    poisoned = [t.clone() for t in leaves]
    poisoned[3][1].fill_(float("nan"))
    y3, grads3 = run(poisoned, index, [0.5, 2.0, 1.0])
    assert torch.equal(y3[index != 1], y2[index != 1])
    assert torch.equal(grads3[2][[0, 2]], grads2[2][[0, 2]])
    index[3] = 7
    assert run(leaves, index)[0][3].isnan().all()


@pytest.mark.parametrize("route", ["one run each", "scattered"])
def test_ragged_ranks_neither_read_the_padding_nor_give_it_gradients(route):
    index, ranks = torch.tensor(ROUTES[route]), [4, 1, 2]
    leaves = tensors(rows=len(index))
    for e, rank in enumerate(ranks):
        leaves[2][e, rank:] = float("nan")
        leaves[3][e, :, rank:] = float("nan")
    y, grads = run(leaves, index, ranks=torch.tensor(ranks))
    a = [leaves[2][e, :rank] for e, rank in enumerate(ranks)]
    b = [leaves[3][e, :, :rank] for e, rank in enumerate(ranks)]
    assert torch.equal(y, lora_linear(leaves[0], leaves[1], a, b, index, 1.0, leaves[4]))
    for e, rank in enumerate(ranks):
        assert not grads[2][e, rank:].any()
        assert not grads[3][e, :, rank:].any()
        assert grads[2][e, :rank].any()


@pytest.mark.parametrize("grad_rows", [0, 12, 30])
def test_rows_beyond_grad_rows_get_and_give_no_gradient(grad_rows):
    index = torch.tensor(ROUTES["one run each"])
    leaves = tensors()
    _, grads = run(leaves, index, grad_rows=grad_rows)
    upstream = torch.ones(30, N)
    upstream[grad_rows:] = 0
    _, want = run(leaves, index, upstream=upstream)
    for got, reference in zip(grads, want):
        torch.testing.assert_close(got, reference)
    assert not grads[0][grad_rows:].any()


@pytest.mark.host
def test_rows_that_need_no_gradient_are_not_kept_for_the_backward():
    index = torch.tensor([0] * 8 + [1] * 8 + [-1] * 100)
    x, weight, a, b, _ = tensors(n=2, rows=116)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)), lambda t: t):
        lora_linear(
            x, weight, a.requires_grad_(), b.requires_grad_(), index, grad_rows=16, routing=build_routing(index, 2)
        )
    assert (16, K) in sizes
    assert not any(shape and shape[0] in (100, 116) for shape in sizes)


def test_a_frozen_weight_and_an_unused_adapter_get_no_gradient():
    x, weight, a, b, bias = tensors()
    a_list = [t.clone().requires_grad_() for t in a]
    b_list = [t.clone().requires_grad_() for t in b]
    routing = Routing.from_runs([(0, 10, 2), (10, 30, -1)], adapters=3)
    lora_linear(x, weight, a_list, b_list, scaling=2.0, bias=bias, routing=routing).sum().backward()
    assert weight.grad is None
    assert [t.grad is not None for t in (*a_list, *b_list)] == [False, False, True] * 2


@pytest.mark.parametrize("shape", [(2, 5), (2,), ()], ids=["whole", "prefix", "int"])
def test_an_index_may_be_a_prefix_of_the_rows_or_one_int(shape):
    x, weight, a, b, _ = tensors(rows=10)
    index = torch.full(shape, 2) if shape else 2
    y = lora_linear(x.view(2, 5, K), weight, a, b, index)
    assert torch.equal(y.view(10, N), lora_linear(x, weight, a, b, torch.full((10,), 2)))
    if shape:
        assert torch.equal(lora_linear(x.view(2, 5, K), weight, a, b, index, routing=build_routing(index, 3)), y)


def test_a_single_adapter_needs_neither_an_index_nor_a_third_dimension():
    x, weight, a, b, _ = tensors(n=1)
    assert torch.equal(lora_linear(x, weight, a[0], b[0]), lora_linear(x, weight, a, b, 0))


@pytest.mark.parametrize("scaling", [2.0, [2.0, 2.0, 2.0], torch.full((3,), 2.0)], ids=["float", "list", "tensor"])
def test_scaling_is_a_float_or_one_an_adapter(scaling):
    index = torch.tensor(ROUTES["one run each"])
    x, weight, a, b, _ = tensors()
    assert torch.equal(lora_linear(x, weight, a, b, index, scaling), lora_linear(x, weight, a, b, index, 2))


def test_adapters_of_another_dtype_are_cast_and_get_gradients_in_their_own():
    x, weight, a, b, _ = tensors(n=1, dtype=torch.bfloat16)
    a, b = a.float().requires_grad_(), b.float().requires_grad_()
    y = lora_linear(x, weight, a, b)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert a.grad.dtype == b.grad.dtype == torch.float32


def test_a_transposed_view_as_weight_and_a_strided_x_are_taken_as_they_are():
    x, weight, a, b, _ = tensors(rows=20)
    index = torch.tensor([0] * 5 + [-1] * 5)
    want = lora_linear(x[::2].contiguous(), weight, a, b, index)
    torch.testing.assert_close(lora_linear(x[::2], weight.t().contiguous().t(), a, b, index), want)


@pytest.mark.parametrize("known", [True, False], ids=["runs", "index"])
def test_the_op_passes_opcheck(known):
    x, weight, a, b, bias = tensors()
    index = torch.tensor(ROUTES["one run each"])
    runs = [0, 10, 0, 10, 17, 1, 17, 30, 2]
    lists = [[t.clone().requires_grad_() for t in stack] for stack in (a, b)]
    where = (None, runs) if known else (index, None)
    opcheck(compiled.op, (x.requires_grad_(), [weight], [bias], *lists, *where, [1.0, 2.0, 0.5], None, None, 30, 30))


def test_it_compiles_in_one_graph_with_dynamic_rows():
    _, weight, a, b, bias = tensors()
    compiled = torch.compile(
        lambda x, a, b, i: lora_linear(x, weight, a, b, i, 0.5, bias), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (7, 33):
        x, index = tensors(rows=rows)[0], torch.arange(rows) % 4 - 1
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        y = compiled(*leaves, index)
        y.sum().backward()
        eager = [t.clone().requires_grad_() for t in (x, a, b)]
        want = lora_linear(eager[0], weight, *eager[1:], index, 0.5, bias)
        want.sum().backward()
        assert torch.equal(y, want)
        for got, reference in zip(leaves, eager):
            torch.testing.assert_close(got.grad, reference.grad)


def test_the_naive_backend_can_be_asked_for(monkeypatch):
    index = torch.tensor(ROUTES["bypass between"])
    leaves = tensors(rows=len(index))
    want = run(leaves, index)
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "naive")
    got = run(leaves, index)
    torch.testing.assert_close(got, want)
    routed = run(leaves, None, routing=build_routing(index, 3))
    torch.testing.assert_close(routed, want)


@pytest.mark.parametrize("backend", ["", "naive"])
def test_a_routing_of_no_rows_has_gradients_too(backend, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", backend)
    x, *rest = tensors(rows=0)
    y, grads = run((x, *rest), None, routing=build_routing(torch.zeros(0, dtype=torch.long), 3))
    assert y.shape == (0, N)
    assert all(not g.any() for g in grads)


@pytest.mark.host
def test_autocast_gives_its_dtype_as_for_a_plain_linear():
    x, weight, a, b, bias = tensors(rows=9)
    index = torch.tensor([0, 1, -1] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x.requires_grad_(), weight, a, b, index, 1.0, bias)
        assert torch.equal(y[index == -1], F.linear(x, weight, bias)[index == -1])
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), lora_linear(x, weight, a, b, index, 1.0, bias), rtol=3e-2, atol=3e-1)


BAD = {
    "x of ints": ({"x": torch.ones(3, K, dtype=torch.long)}, TypeError, "x must be"),
    "weight of other width": ({"weight": torch.ones(N, K + 1)}, ValueError, "weight is"),
    "weight of other dtype": ({"weight": torch.ones(N, K).bfloat16()}, TypeError, "weight is"),
    "bias too short": ({"bias": torch.ones(N - 1)}, ValueError, "bias is"),
    "lora_a of other width": ({"lora_a": torch.ones(3, 4, K + 1)}, ValueError, "lora_a of adapter 0"),
    "lora_b of other rank": ({"lora_b": torch.ones(3, N, 5)}, ValueError, "lora_b of adapter 0"),
    "adapters disagree": ({"lora_b": torch.ones(2, N, 4)}, ValueError, "lora_a has 3 adapters, lora_b 2"),
    "no index": ({"adapter_index": None}, ValueError, "adapter_index is None with 3"),
    "float index": ({"adapter_index": torch.ones(30)}, TypeError, "adapter_index is"),
    "index of other shape": ({"adapter_index": torch.ones(29, dtype=torch.long)}, ValueError, "adapter_index is"),
    "index too large": ({"adapter_index": torch.full((30,), 3)}, IndexError, "adapter_index holds 3"),
    "index too small": ({"adapter_index": -2}, IndexError, "adapter_index is -2"),
    "scaling too short": ({"scaling": torch.ones(2)}, ValueError, "scaling is"),
    "rank too large": ({"ranks": [4, 5, 1]}, ValueError, r"ranks\[1\] is 5"),
    "grad_rows too large": ({"grad_rows": 31}, ValueError, "grad_rows is 31"),
    "routing of other adapters": (
        {"routing": Routing.from_runs([(0, 30, 0)], adapters=2)}, ValueError, "routing was built for 2 adapters",
    ),
    "routing of other rows": (
        {"routing": Routing.from_runs([(0, 29, 0)], adapters=3)}, ValueError, "routing was built for 29 rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.host
def test_a_bad_argument_is_named(change, error, message):
    x, weight, a, b, bias = tensors()
    good = {"x": x, "weight": weight, "lora_a": a, "lora_b": b, "adapter_index": 0, "bias": bias}
    with pytest.raises(error, match=message):
        lora_linear(**(good | change))


@pytest.mark.host
def test_build_routing_checks_its_index_and_finds_the_runs():
    assert build_routing(torch.tensor([0, 0, -1, 1]), 2).host_runs() == [0, 2, 0, 2, 3, -1, 3, 4, 1]
    assert build_routing(torch.tensor(ROUTES["scattered"]), 3).host_runs() is None
    with pytest.raises(IndexError, match="adapter_index holds 2"):
        build_routing(torch.tensor([0, 2]), 2)
    with pytest.raises(TypeError, match=r"adapter_index is torch\.float32"):
        build_routing(torch.ones(2), 2)

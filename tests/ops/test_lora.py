"""lora_linear and lora_linears: what they take, and the guarantees their docstrings give."""

import pytest
import torch
from ops.lora_cases import Case, as_exact_as_plain
from torch.nn import functional as F

from rlhf_kernels.ops.lora import build_routing, library, lora_linear, lora_linears, naive

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
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def tensors(n=3, r=4, rows=30, dtype=torch.float32, seed=0, k=K, n_out=N):
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return draw(rows, k), draw(n_out, k), draw(n, r, k), draw(n, n_out, r), draw(n_out)


def run(leaves, index, scaling=1.0, upstream=None, op=lora_linear, **options):
    """y and the gradients of (x, weight, lora_a, lora_b, bias)."""
    leaves = [t.clone().requires_grad_() for t in leaves]
    x, weight, a, b, bias = leaves
    y = op(x, weight, a, b, index, scaling, bias, **options)
    y.backward(torch.ones_like(y) if upstream is None else upstream.to(y.dtype))
    return y.detach(), [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]


def defined(x, weight, a, b, index, scaling, bias):
    return naive.lora_linear(x, weight, bias, a, b, index, scaling)


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_the_definition_in_float64(route, dtype):
    index = torch.tensor(route, dtype=torch.long)
    leaves = tensors(rows=len(route), dtype=dtype)
    upstream = torch.randn(len(route), N, dtype=torch.float64)
    y, grads = run(leaves, index, [0.5, 2.0, 1.0], upstream)
    doubled = [t.double() for t in leaves]
    want, want_grads = run(doubled, index, [0.5, 2.0, 1.0], upstream.to(dtype).double(), op=defined)
    names = ("y", "x", "weight", "lora_a", "lora_b", "bias")
    for name, got, reference in zip(names, [y, *grads], [want, *want_grads]):
        assert got.dtype == dtype
        error = (got.double() - reference).norm() / reference.norm().clamp_min(1e-30)
        assert error <= BOUND[dtype], f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
def test_a_bypassed_row_is_bit_equal_to_every_row_bypassed(route, dtype):
    index = torch.tensor(route, dtype=torch.long)
    x, weight, a, b, bias = tensors(rows=len(route), dtype=dtype)
    bypassed = lora_linear(x, weight, a, b, -1, 1.0, bias)
    torch.testing.assert_close(bypassed, F.linear(x, weight, bias))
    routed = lora_linear(x, weight, a, b, index, 1.0, bias)
    assert torch.equal(routed[index == -1], bypassed[index == -1])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("route", ["one run each", "bypass between", "scattered"])
@pytest.mark.parametrize("which", ["lora_a", "lora_b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_poisoned_adapter_does_not_reach_other_rows_or_gradients(poison, route, which, dtype):
    index = torch.tensor(ROUTES[route])
    clean = tensors(rows=len(index), dtype=dtype)
    dirty = [t.clone() for t in clean]
    dirty[2 if which == "lora_a" else 3][0].fill_(poison)
    upstream = torch.randn(len(index), N)
    y, grads = run(clean, index, upstream=upstream)
    y2, grads2 = run(dirty, index, upstream=torch.where((index == 0).unsqueeze(1), float("nan"), upstream))
    others = index != 0
    assert torch.equal(y2[others], y[others])
    assert not y2[~others].isfinite().all()
    assert torch.equal(grads2[0][others], grads[0][others])
    for got, want in zip(grads2[2:4], grads[2:4]):
        assert torch.equal(got[1:], want[1:])


def test_a_row_keeps_its_bits_when_the_numbers_of_other_adapters_change():
    index = torch.tensor(ROUTES["scattered"])
    x, weight, a, b, bias = tensors(rows=len(index))
    before = lora_linear(x, weight, a, b, index, 1.0, bias)
    a[0], b[2] = a[0] * 1e4, -b[2]
    after = lora_linear(x, weight, a, b, index, 1.0, bias)
    assert torch.equal(after[index < 0], before[index < 0])
    assert torch.equal(after[index == 1], before[index == 1])
    assert not torch.equal(after[index == 0], before[index == 0])


def test_the_same_call_gives_the_same_bits_with_and_without_gradients():
    for index in (torch.tensor(ROUTES["scattered"]), torch.tensor(ROUTES["one run each"])):
        leaves = tensors(rows=len(index))
        y, grads = run(leaves, index, 1.7)
        again, grads2 = run(leaves, index, 1.7)
        x, weight, a, b, bias = leaves
        assert torch.equal(lora_linear(x, weight, a, b, index, 1.7, bias), y)
        assert torch.equal(again, y)
        assert all(torch.equal(g, g2) for g, g2 in zip(grads, grads2))


@pytest.mark.host
def test_masks_on_a_device_the_host_may_not_read_give_the_same(monkeypatch):
    """The path of other devices, run here: rows are chosen by masks, never by an index read on the host."""
    monkeypatch.setattr("rlhf_kernels.ops.lora.tier.TIERS", (("native", library),))
    index = torch.tensor(ROUTES["scattered"])
    leaves = tensors(rows=len(index))
    y, grads = run(leaves, index, [0.5, 2.0, 1.0], grad_rows=50)
    monkeypatch.setattr("rlhf_kernels.ops.lora.library.masked", lambda index, runs: runs is None)
    monkeypatch.setattr("rlhf_kernels.ops.lora.gradients.host_runs", lambda index, n: None)
    y2, grads2 = run(leaves, index, [0.5, 2.0, 1.0], grad_rows=50)
    torch.testing.assert_close(y2, y)
    for got, want in zip(grads2, grads):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    poisoned = [t.clone() for t in leaves]
    poisoned[3][1].fill_(float("nan"))
    y3, grads3 = run(poisoned, index, [0.5, 2.0, 1.0], grad_rows=50)
    assert torch.equal(y3[index != 1], y2[index != 1])
    assert torch.equal(grads3[2][[0, 2]], grads2[2][[0, 2]])
    index[3] = 7
    assert run(leaves, index)[0][3].isnan().all()


@pytest.mark.parametrize("rank", [0, 1, 2, 7, 64, 255, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranks_from_0_to_256(rank, dtype):
    index = torch.tensor([0, -1, 1, 1, 0] * 4)
    leaves = tensors(n=2, r=rank, rows=20, dtype=dtype)
    y, grads = run(leaves, index, 0.5)
    want, want_grads = run([t.double() for t in leaves], index, [0.5, 0.5], op=defined)
    for got, reference in zip([y, *grads], [want, *want_grads]):
        error = (got.double() - reference).norm() / reference.norm().clamp_min(1e-30)
        assert error <= 2 * BOUND[dtype]


@pytest.mark.parametrize("route", ["one run each", "scattered"])
@pytest.mark.parametrize("kind", [list, torch.tensor], ids=["list", "tensor"])
def test_ragged_ranks_neither_read_the_padding_nor_give_it_gradients(route, kind):
    index, ranks = torch.tensor(ROUTES[route]), [4, 0, 2]
    leaves = tensors(rows=len(index))
    for e, rank in enumerate(ranks):
        leaves[2][e, rank:] = float("nan")
        leaves[3][e, :, rank:] = float("nan")
    y, grads = run(leaves, index, ranks=kind(ranks))
    a = [leaves[2][e, :rank] for e, rank in enumerate(ranks)]
    b = [leaves[3][e, :, :rank] for e, rank in enumerate(ranks)]
    assert torch.equal(y, lora_linear(leaves[0], leaves[1], a, b, index, 1.0, leaves[4]))
    for e, rank in enumerate(ranks):
        assert not grads[2][e, rank:].any()
        assert not grads[3][e, :, rank:].any()
        assert rank == 0 or grads[2][e, :rank].any()


@pytest.mark.parametrize("shape", [(2, 5), (2,), ()], ids=["whole", "prefix", "int"])
def test_an_index_may_be_a_prefix_of_the_rows_or_one_int(shape):
    x, weight, a, b, _ = tensors(rows=10)
    index = torch.full(shape, 2) if shape else 2
    y = lora_linear(x.view(2, 5, K), weight, a, b, index)
    assert torch.equal(y.view(10, N), lora_linear(x, weight, a, b, torch.full((10,), 2)))
    if shape:
        assert torch.equal(lora_linear(x.view(2, 5, K), weight, a, b, index, routing=build_routing(index, 3)), y)


def test_a_vector_is_one_row():
    x, weight, a, b, bias = tensors(rows=1)
    y = lora_linear(x[0], weight, a, b, 1, 1.0, bias)
    assert y.shape == (N,)
    assert torch.equal(y, lora_linear(x, weight, a, b, 1, 1.0, bias)[0])


def test_a_single_adapter_needs_neither_an_index_nor_a_third_dimension():
    x, weight, a, b, _ = tensors(n=1)
    assert torch.equal(lora_linear(x, weight, a[0], b[0]), lora_linear(x, weight, a, b, 0))


def test_without_adapters_it_is_the_linear():
    x, weight, _, _, bias = tensors(rows=7)
    index = torch.full((7,), -1)
    torch.testing.assert_close(lora_linear(x, weight, [], [], index, 1.0, bias), F.linear(x, weight, bias))
    _, grads = run((x, weight, torch.zeros(1, 0, K), torch.zeros(1, N, 0), bias), index)
    assert all(g.isfinite().all() for g in grads)
    assert grads[1].any()
    weight.requires_grad_()
    lora_linear(x, weight, [], [], index).sum().backward()
    assert weight.grad.any()


SCALINGS = {"float": 2.0, "list": [2.0, 2.0, 2.0], "tensor": torch.full((3,), 2.0), "0-D": torch.tensor(2.0)}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_scaling_is_a_float_or_one_an_adapter(scaling):
    index = torch.tensor(ROUTES["one run each"])
    x, weight, a, b, _ = tensors()
    assert torch.equal(lora_linear(x, weight, a, b, index, scaling), lora_linear(x, weight, a, b, index, 2))


def test_a_transposed_view_as_weight_and_a_strided_x_are_taken_as_they_are():
    x, weight, a, b, _ = tensors(rows=20)
    index = torch.tensor([0] * 5 + [-1] * 5)
    want = lora_linear(x[::2].contiguous(), weight, a, b, index)
    torch.testing.assert_close(lora_linear(x[::2], weight.t().contiguous().t(), a, b, index), want)


def test_a_routing_of_no_rows_has_gradients_too(monkeypatch):
    for backend in ("", "naive"):
        monkeypatch.setenv("RLHF_KERNELS_BACKEND", backend)
        y, grads = run(tensors(rows=0), None, routing=build_routing(torch.zeros(0, dtype=torch.long), 3))
        assert y.shape == (0, N)
        assert all(not g.any() for g in grads)


@pytest.mark.host
def test_the_naive_backend_can_be_asked_for(monkeypatch):
    index = torch.tensor(ROUTES["bypass between"])
    leaves = tensors(rows=len(index))
    want = run(leaves, index)
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "naive")
    torch.testing.assert_close(run(leaves, index), want)
    torch.testing.assert_close(run(leaves, None, routing=build_routing(index, 3)), want)


@pytest.mark.host
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_its_dtype_as_for_a_plain_linear(dtype):
    x, weight, a, b, bias = tensors(rows=9)
    index = torch.tensor([0, 1, -1] * 3)
    with torch.autocast("cpu", dtype):
        y = lora_linear(x.requires_grad_(), weight, a, b, index, 1.0, bias)
        assert y.dtype == dtype
        torch.testing.assert_close(y[index == -1], F.linear(x, weight, bias)[index == -1])
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), lora_linear(x, weight, a, b, index, 1.0, bias), rtol=3e-2, atol=3e-1)


@pytest.mark.host
@pytest.mark.parametrize("projections", [2, 3])
def test_projections_that_share_x_are_each_its_own_lora_linear(projections):
    """Each with its own width, ranks and adapters, one with no adapter at all."""
    number = next(i for i in range(1000) if (c := Case(i)).projections == projections and c.stack == "list" and c.rows)
    as_exact_as_plain(number)
    x, weight, a, b, bias = tensors(rows=20)
    index = torch.arange(20) % 4 - 1
    other, lacks_a, lacks_b = torch.randn(7, K), [torch.empty(0, K)] * 3, [torch.empty(7, 0)] * 3
    scaling = [0.5, 1.0, 2.0]
    ys = lora_linears(x, [weight, other], [a, lacks_a], [b, lacks_b], index, scaling, [bias, None])
    assert isinstance(ys, tuple)
    torch.testing.assert_close(ys[0], lora_linear(x, weight, a, b, index, scaling, bias))
    torch.testing.assert_close(ys[1], F.linear(x, other))

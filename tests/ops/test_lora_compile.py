"""lora_linear under torch.compile: one graph for any number of rows, eager's results; the op passes torch's checks."""

import pytest
import torch
from ops.test_lora import ROUTES, K, N, tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from rlhf_kernels.ops.lora import Routing, build_routing, compiled, lora_linear, lora_linears


@pytest.fixture(autouse=True)
def _fresh():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("known", ["runs", "index", "scattered", "no grad", "x only"])
@pytest.mark.parametrize("projections", [1, 2])
def test_the_op_passes_opcheck(known, projections):
    x, weight, a, b, bias = tensors()
    index = torch.tensor(ROUTES["scattered" if known == "scattered" else "one run each"])[:30]
    runs = [0, 10, 0, 10, 17, 1, 17, 30, 2]
    learns = known not in ("no grad", "x only")
    x.requires_grad_(known != "no grad")
    where = (None, runs) if known == "runs" else (index, None)
    saved = 20 if learns else 0
    weights, biases = [weight] * projections, [bias, x.new_empty(0)][:projections]
    lists = [[t.clone().requires_grad_(learns) for t in (*stack,) * projections] for stack in (a, b)]
    opcheck(
        compiled.op, (x, [w.clone() for w in weights], biases, *lists, *where, [1.0, 2.0, 0.5], None, None, 20, saved)
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_it_compiles_in_one_graph_with_dynamic_rows(backend, dtype):
    _, weight, a, b, bias = tensors(dtype=dtype)
    function = torch.compile(
        lambda x, a, b, i: lora_linear(x, weight, a, b, i, 0.5, bias), fullgraph=True, dynamic=True, backend=backend
    )
    for rows in (7, 33):
        x, index = tensors(rows=rows, dtype=dtype)[0], torch.arange(rows) % 4 - 1
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        y = function(*leaves, index)
        y.sum().backward()
        eager = [t.clone().requires_grad_() for t in (x, a, b)]
        want = lora_linear(eager[0], weight, *eager[1:], index, 0.5, bias)
        want.sum().backward()
        assert torch.equal(y, want)
        for got, reference in zip(leaves, eager):
            torch.testing.assert_close(got.grad, reference.grad)


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_projections_grad_rows_ranks_scaling_and_routing_compile(dynamic):
    x, weight, a, b, bias = tensors()
    other, scaling = torch.randn(9, K), torch.tensor([0.5, 2.0, 1.0])
    other_b = torch.randn(3, 9, 4)
    index = torch.tensor(ROUTES["one run each"])

    def call(x, a, b, routing, ranks):
        ys = lora_linears(
            x, [weight, other], [a, a], [b, other_b], None, scaling, [bias, None], grad_rows=12, routing=routing,
            ranks=ranks,
        )  # fmt: skip
        return ys[0].square().sum() + ys[1].sum()

    function = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    runs = Routing.from_runs([(0, 10, 0), (10, 17, 1), (17, 30, 2)], 3)
    for routing, ranks in ((build_routing(index, 3), torch.tensor([4, 1, 2])), (runs, [4, 1, 2])):
        leaves, eager = ([t.clone().requires_grad_() for t in (x, a, b)] for _ in range(2))
        function(*leaves, routing, ranks).backward()
        call(*eager, routing, ranks).backward()
        for got, reference in zip(leaves, eager):
            torch.testing.assert_close(got.grad, reference.grad)


def test_inference_compiles_and_an_index_outside_is_still_an_error():
    x, weight, a, b, bias = tensors()
    function = torch.compile(lambda i: lora_linear(x, weight, a, b, i, 0.5, bias), fullgraph=True, backend="aot_eager")
    index = torch.tensor(ROUTES["one run each"])
    with torch.no_grad():
        assert torch.equal(function(index), lora_linear(x, weight, a, b, index, 0.5, bias))
        index[5] = 9
        with pytest.raises(IndexError, match="adapter_index holds 9"):
            function(index)


def test_it_compiles_under_autocast():
    x, weight, a, b, bias = tensors()
    index = torch.tensor(ROUTES["one run each"])

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return lora_linear(x, weight, a, b, index, 0.5, bias)

    y = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, call(x))
    assert y.shape == (30, N)


def test_shapes_are_known_without_numbers():
    """On meta tensors, and on fake ones, which is how torch.export and memory estimates run a model."""
    x, weight, a, b, bias = (t.to("meta").requires_grad_() for t in tensors())
    y = lora_linear(x, weight, a, b, torch.zeros(30, dtype=torch.long, device="meta"), 0.5, bias)
    assert (y.shape, y.device.type) == ((30, N), "meta")
    y.sum().backward()
    assert a.grad.shape == a.shape
    with FakeTensorMode():
        x, weight, a, b, bias = (t.requires_grad_() for t in tensors())
        y = lora_linear(x, weight, a, b, torch.zeros(30, dtype=torch.long), 0.5, bias)
        y.sum().backward()
    assert y.shape == (30, N)
    assert x.grad.shape == (30, K)

"""Routing: the caller's index tensor decides in every call, as it is then; runs that the host knows need no tensor."""

import pytest
import torch
from ops.test_lora import ROUTES, tensors

from rlhf_kernels.ops.lora import Routing, build_routing, library, lora_linear
from rlhf_kernels.ops.lora import routing as routing_module
from rlhf_kernels.ops.lora.routing import host_runs

WRITES = {
    "in place": lambda index, values: index.copy_(values),
    "through .data": lambda index, values: index.data.copy_(values),
    "through numpy": lambda index, values: index.numpy().__setitem__(slice(None), values.numpy()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("after", ["one run each", "scattered"])
@pytest.mark.parametrize("backend", ["", "native", "naive"], ids=["chosen", "native", "naive"])
def test_an_index_overwritten_in_place_reroutes_the_next_call(write, after, backend, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", backend)
    x, weight, a, b, bias = tensors()
    first, second = torch.arange(30) // 10 - 1, torch.tensor(ROUTES[after])[:30]
    index = first.clone()
    routing = build_routing(index, 3)
    for values in (first, second, torch.full((30,), -1), first):
        write(index, values)
        y = lora_linear(x, weight, a, b, None, 1.0, bias, routing=routing)
        assert torch.equal(y, lora_linear(x, weight, a, b, values, 1.0, bias))


def test_an_index_overwritten_with_what_is_no_adapter_is_an_error():
    x, weight, a, b, _ = tensors()
    index = torch.zeros(30, dtype=torch.long)
    routing = build_routing(index, 3)
    lora_linear(x, weight, a, b, routing=routing)
    index[4] = 3
    for _ in range(2):
        with pytest.raises(IndexError, match="adapter_index holds 3"):
            lora_linear(x, weight, a, b, routing=routing)
    index[4] = 2
    assert lora_linear(x, weight, a, b, routing=routing).isfinite().all()


@pytest.mark.parametrize("route", ["one run each", "scattered"])
def test_a_backward_is_routed_as_its_forward_was(route):
    index = torch.tensor(ROUTES[route])
    x, weight, a, b, _ = tensors(rows=len(index))
    want = a.clone().requires_grad_()
    lora_linear(x, weight, want, b, index.clone()).square().sum().backward()
    got = a.clone().requires_grad_()
    y = lora_linear(x, weight, got, b, routing=build_routing(index, 3))
    index.fill_(-1)
    y.square().sum().backward()
    assert torch.equal(got.grad, want.grad)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_call_follows_an_overwritten_index_too(backend):
    x, weight, a, b, _ = tensors()
    index = torch.zeros(30, dtype=torch.long)
    routing = build_routing(index, 3)
    compiled = torch.compile(lambda x: lora_linear(x, weight, a, b, routing=routing), fullgraph=True, backend=backend)
    for values in (torch.zeros(30).long(), torch.arange(30) % 4 - 1, torch.arange(30) // 10):
        index.copy_(values)
        torch.testing.assert_close(compiled(x), lora_linear(x, weight, a, b, values))
    torch._dynamo.reset()


def test_runs_known_on_the_host_give_what_their_index_gives():
    x, weight, a, b, bias = tensors()
    index = torch.tensor(ROUTES["one run each"])
    routing = Routing.from_runs([(0, 10, 0), (10, 10, 2), (10, 17, 1), (17, 30, 2)], adapters=3)
    assert routing.index is None
    assert torch.equal(
        lora_linear(x, weight, a, b, None, 1.0, bias, routing=routing), lora_linear(x, weight, a, b, index, 1.0, bias)
    )


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_rows_of_x_may_be_a_multiple_of_the_entries(repeats):
    x, weight, a, b, _ = tensors(rows=6 * repeats)
    index = torch.tensor([0, 0, -1, 2, 1, 1])
    want = lora_linear(x, weight, a, b, index.repeat_interleave(repeats))
    runs = Routing.from_runs([(0, 2, 0), (2, 3, -1), (3, 4, 2), (4, 6, 1)], adapters=3)
    for routing in (build_routing(index, 3), runs):
        assert torch.equal(lora_linear(x, weight, a, b, routing=routing), want)


def test_a_routing_says_how_many_entries_need_gradients():
    x, weight, a, b, _ = tensors(rows=12)
    routing = Routing.from_runs([(0, 4, 1)], adapters=3, grad_rows=2)
    x.requires_grad_()
    lora_linear(x, weight, a, b, routing=routing).sum().backward()
    assert x.grad[:6].any(1).all()
    assert not x.grad[6:].any()


def test_runs_are_found_and_scattered_rows_are_not_cut():
    assert build_routing(torch.tensor([0, 0, -1, 1]), 2).host_runs() == [0, 2, 0, 2, 3, -1, 3, 4, 1]
    assert build_routing(torch.tensor(ROUTES["scattered"]), 3).host_runs() is None
    for rows in (0, 1, 63, 64, 65, 1000):
        index = torch.arange(rows) * 4 // max(rows, 1) - 1
        runs = host_runs(index, 3)
        again = [e for lo, hi, e in zip(runs[0::3], runs[1::3], runs[2::3]) for _ in range(lo, hi)]
        assert again == index.tolist()
        assert host_runs(torch.arange(rows) % 2, 3) is None or rows <= 12


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_any_int_dtype_will_do(dtype):
    x, weight, a, b, _ = tensors(rows=72)
    index = torch.tensor(ROUTES["scattered"])
    assert torch.equal(lora_linear(x, weight, a, b, index.to(dtype)), lora_linear(x, weight, a, b, index))


def test_a_strided_index_is_followed_too():
    index = torch.zeros(16, dtype=torch.long)[::2]
    x, weight, a, b, _ = tensors(rows=8)
    routing = build_routing(index, 3)
    index[:3] = 1
    assert torch.equal(lora_linear(x, weight, a, b, routing=routing), lora_linear(x, weight, a, b, index.contiguous()))


def test_many_adapters_on_a_device_get_their_order_there(monkeypatch):
    """Run here with an index the host may not read: the order is a stable sort, and a stale one changes nothing."""

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")
        is_cpu = False

    monkeypatch.setattr(routing_module, "checks_values", lambda index: False)
    index = torch.tensor([8, 0, -1, 8, 3, 0]).as_subclass(Elsewhere)
    assert build_routing(index, 8).order is None
    assert build_routing(index, 9).order.tolist() == [2, 1, 5, 4, 0, 3]
    assert build_routing(index, 9).host_runs() is None
    x, weight, a, b, _ = tensors(n=9, rows=6)
    monkeypatch.setattr("rlhf_kernels.ops.lora.tier.TIERS", (("native", library),))
    plain = torch.tensor([8, 0, -1, 8, 3, 0])
    stale = Routing(9, 6, plain, order=torch.arange(6))
    assert torch.equal(lora_linear(x, weight, a, b, routing=stale), lora_linear(x, weight, a, b, plain))

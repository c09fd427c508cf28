"""The runtime bypass: an index overwritten in place re-routes the next call, compiled or replayed from a CUDA graph."""

import pytest
import torch

from rlhf_kernels.ops.lora import build_routing, lora_linears

pytestmark = pytest.mark.usefixtures("device", "kernels")

K, COLUMNS = 48, (40, 24)
SIZES = {"few rows": (12, 2), "many rows": (96, 2), "many adapters": (96, 12), "few rows, many adapters": (48, 12)}
sizes = pytest.mark.parametrize(("rows", "n"), SIZES.values(), ids=SIZES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
compiled = pytest.mark.parametrize("wrap", [None, "aot_eager"], ids=["eager", "compiled"])


def routes(rows, n):
    """Indices in the order in which one is overwritten by the next: each changes most rows' roles."""
    place = torch.arange(rows)
    return [place * n // rows, place % (n + 1) - 1, torch.full((rows,), -1), (n - 1) - place * n // rows, place % n]


class Layer:
    """Two projections of n adapters, the rows' input, and the gradients that come from above."""

    def __init__(self, rows, n, dtype=torch.float32, ranks=(4, 8, 16)):
        def draw(*shape):
            return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)

        self.n, self.weights = n, [draw(width, K) for width in COLUMNS]
        self.x = (draw(rows, K) * K**0.5).requires_grad_()
        self.a = [[draw(ranks[e % 3], K).requires_grad_() for e in range(n)] for _ in COLUMNS]
        self.b = [[draw(width, ranks[e % 3]).requires_grad_() for e in range(n)] for width in COLUMNS]
        self.upstream = [draw(rows, width) for width in COLUMNS]
        self.scaling = [0.5 + e for e in range(n)]

    def forward(self, routing):
        return lora_linears(self.x, self.weights, self.a, self.b, None, self.scaling, routing=routing)

    def both(self, routing, forward=None):
        """Outputs, and gradients of x and of every adapter."""
        ys = (forward or self.forward)(routing)
        return [*ys, *self.gradients(ys)]

    def gradients(self, ys):
        leaves = [self.x, *(t for some in (*self.a, *self.b) for t in some)]
        return torch.autograd.grad(ys, leaves, self.upstream)


def same(found, want, dtype):
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for value, truth in zip(found, want, strict=True):
        assert (value.double() - truth.double()).norm() <= bound * truth.double().norm()


def captured(run):
    """A CUDA graph of `run`, and what it returns, which a replay overwrites."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(2):  # what is compiled, chosen and allocated once is done before the capture
            run()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@compiled
@sizes
def test_an_index_overwritten_in_place_re_routes_the_next_forward(rows, n, wrap):
    layer, index = Layer(rows, n), torch.zeros(rows, dtype=torch.long)
    routing = build_routing(index, n)
    call = torch.compile(layer.forward, fullgraph=True, backend=wrap) if wrap else layer.forward
    with torch.no_grad():
        bypassed = layer.forward(build_routing(torch.full_like(index, -1), n))
        for route in routes(rows, n):
            index.copy_(route)
            found = call(routing)
            same(found, layer.forward(build_routing(route, n)), torch.float32)
            for y, base in zip(found, bypassed):
                assert torch.equal((y == base).all(1), route == -1)


@compiled
@sizes
def test_an_index_overwritten_in_place_re_routes_the_next_gradients(rows, n, wrap):
    layer, index = Layer(rows, n), torch.zeros(rows, dtype=torch.long)
    routing = build_routing(index, n)
    call = torch.compile(layer.forward, fullgraph=True, backend=wrap) if wrap else layer.forward
    for route in routes(rows, n):
        index.copy_(route)
        found = layer.both(routing, call)
        same(found, layer.both(build_routing(route, n)), torch.float32)
        for e, grad in enumerate(found[len(COLUMNS) + 1 :]):
            assert bool(grad.any()) == bool((route == e % n).any())


def test_an_index_overwritten_before_the_backward_never_gives_the_gradients_of_other_roles():
    layer, index = Layer(30, 2), torch.arange(30) % 3 - 1
    want = layer.gradients(layer.forward(build_routing(index.clone(), 2)))
    ys = layer.forward(build_routing(index, 2))
    index.zero_()
    refused = ""
    try:
        same(layer.gradients(ys), want, torch.float32)
    except RuntimeError as error:  # where the host may not look, autograd keeps the tensor itself
        refused = str(error)
    assert not refused or "modified by an inplace operation" in refused


@pytest.fixture
def cuda(request, monkeypatch):
    if request.config.getoption("--device") != "cuda":
        pytest.skip("a CUDA graph needs a CUDA device (--device cuda)")
    monkeypatch.delenv("RLHF_KERNELS_CHECK", raising=False)  # it makes the host read the index


@dtypes
@sizes
@pytest.mark.usefixtures("cuda")
def test_a_captured_forward_switches_roles_at_every_replay(rows, n, dtype):
    layer, index = Layer(rows, n, dtype), torch.zeros(rows, dtype=torch.long)
    routing = build_routing(index, n)
    with torch.no_grad():
        graph, out = captured(lambda: layer.forward(routing))
        for route in routes(rows, n):
            index.copy_(route)
            graph.replay()
            same(out, layer.forward(build_routing(route, n)), dtype)


@dtypes
@sizes
@pytest.mark.usefixtures("cuda")
def test_a_captured_forward_and_backward_switch_roles_at_every_replay(rows, n, dtype):
    layer, index = Layer(rows, n, dtype), torch.zeros(rows, dtype=torch.long)
    routing = build_routing(index, n)
    graph, out = captured(lambda: layer.both(routing))
    for route in routes(rows, n):
        index.copy_(route)
        graph.replay()
        same(out, layer.both(build_routing(route, n)), dtype)
        for e, grad in enumerate(out[len(COLUMNS) + 1 :]):
            assert bool(grad.any()) == bool((route == e % n).any())


@pytest.mark.usefixtures("cuda")
def test_a_captured_call_gives_nan_to_rows_whose_index_names_no_adapter():
    layer, index = Layer(20, 2), torch.zeros(20, dtype=torch.long)
    with torch.no_grad():
        graph, out = captured(lambda: layer.forward(build_routing(index, 2)))
        index[3], index[7] = 2, -5
        graph.replay()
    for y in out:
        assert y.isnan().all(1).nonzero().flatten().tolist() == [3, 7]
        assert not y[[i for i in range(20) if i not in (3, 7)]].isnan().any()

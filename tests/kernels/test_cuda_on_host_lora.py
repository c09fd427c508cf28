"""The CUDA kernel of few rows' adapters, run on the CPU, against the definition in float64."""

import cuda_host
import pytest
import torch
from torch.nn import functional as F

from rlhf_kernels.ops.lora import library, lora_linears, naive, small, tier

pytestmark = pytest.mark.skipif(cuda_host.compiler_missing(), reason=f"{cuda_host.COMPILER} is not installed")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
BOUND = {F32: 1e-5, BF16: 1e-2, F16: 2e-3}
SOURCE = "cuda_lora_on_host.cpp"
CHIPS = {"clusters": (True, 132), "no clusters": (False, 108), "one multiprocessor": (True, 1)}
NAN = float("nan")


@pytest.fixture(params=CHIPS.values(), ids=CHIPS)
def chip(request):
    return cuda_host.HostLora(cuda_host.compile_library(SOURCE), *request.param)


@pytest.fixture
def any_chip():
    return cuda_host.HostLora(cuda_host.compile_library(SOURCE))


class Layer:
    """P linears that share x, n adapters with the ranks given for each, and rows routed by an index."""

    def __init__(self, index, k=72, columns=(40,), ranks=(4, 16), dtype=F32, adapters=None, offset=0):
        def draw(*shape, to=dtype):
            count = torch.Size(shape).numel()
            memory = torch.empty(count + offset, dtype=to)  # `offset` elements move rows off 16-byte boundaries
            return memory[offset:].view(shape).copy_(torch.randn(shape) / max(shape[-1], 1) ** 0.5)

        self.index = torch.tensor(index, dtype=torch.int64)
        self.x = draw(len(index), k) * k**0.5
        self.weights = [draw(width, k) for width in columns]
        self.biases = [draw(width) if p % 2 == 0 else None for p, width in enumerate(columns)]
        self.a = [draw(rank, k, to=adapters or dtype) for _ in columns for rank in ranks]
        self.b = [draw(width, rank, to=adapters or dtype) for width in columns for rank in ranks]
        self.scaling = [0.5 + e for e in range(len(ranks))]

    def run(self, ops, monkeypatch, runs=None, scaling_tensor=None, saved_rows=0, rows=slice(None)):
        monkeypatch.setattr(small, "ops", ops)
        index = self.index[rows].contiguous() if runs is None else None
        return small.forward(
            self.x[rows], self.weights, self.biases, self.a, self.b, index, runs, self.scaling, scaling_tensor, None,
            saved_rows,
        )  # fmt: skip

    def of(self, p):
        n = len(self.scaling)
        return self.weights[p], self.biases[p], self.a[p * n : p * n + n], self.b[p * n : p * n + n]

    def exact(self, p, dtype=F64):
        """y of projection p by the definition."""
        w, bias, a, b = self.of(p)
        w, bias = w.to(dtype), None if bias is None else bias.to(dtype)
        a, b = ([t.to(dtype) for t in some] for some in (a, b))
        return naive.lora_linear(self.x.to(dtype), w, bias, a, b, self.index, self.scaling)

    def check(self, ys):
        """No row is further from float64 than the plain formula in the same dtype allows."""
        for p, y in enumerate(ys):
            truth = self.exact(p)
            outside = ((self.index < -1) | (self.index >= len(self.scaling))).unsqueeze(1).expand_as(y)
            assert torch.equal(y.isnan(), outside)
            if not y.numel():
                continue
            y, truth = y.double().nan_to_num(), truth.nan_to_num()
            plain = self.exact(p, self.x.dtype).double().nan_to_num()
            assert (y - truth).norm() <= BOUND[self.x.dtype] * truth.norm()
            assert (y - truth).abs().max() <= 2 * (plain - truth).abs().max() + 2e-7 * (1 + truth.abs().max())
            untouched = self.index == -1
            assert torch.equal(y[untouched], F.linear(self.x, *self.of(p)[:2])[untouched].double())


ROUTES = {
    "one adapter": [1] * 13,
    "mixed": [0, 1, -1, 1, 0, 2, 1, -1, -1, 2, 0] * 2,
    "all bypass": [-1] * 9,
    "one row": [2],
    "64 rows": [e % 4 - 1 for e in range(64)],
    "outside": [0, 3, -2, 1, 10**12, -(2**63), 2, -1],
    "no rows": [],
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_rows_get_their_own_adapter(chip, monkeypatch, route, dtype):
    layer = Layer(route, ranks=(4, 16, 5), dtype=dtype)
    ys, s = layer.run(chip, monkeypatch)
    assert s.shape == (0, 16)
    layer.check(ys)


SHAPES = {  # K, columns, ranks: tails in K and N, ranks of one, none and more than one go
    "odd": (37, (51,), (3, 1, 7)),
    "narrow": (5, (3,), (2, 1, 1)),
    "several steps": (2056, (8,), (16, 4, 8)),
    "blocks of columns": (64, (1100,), (8, 24, 16)),
    "an empty adapter": (40, (40,), (0, 8, 0)),
    "large ranks": (48, (72,), (129, 256, 128)),
    "three projections": (64, (96, 32, 16), (8, 16, 4)),
    "five projections": (24, (8, 16, 24, 8, 16), (4, 8, 2)),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_any_shape(chip, monkeypatch, shape, dtype):
    k, columns, ranks = shape
    layer = Layer(ROUTES["mixed"][:11], k, columns, ranks, dtype)
    ys, _ = layer.run(chip, monkeypatch)
    layer.check(ys)


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_rows_off_16_byte_boundaries_give_the_same_bits(any_chip, monkeypatch, offset, dtype):
    straight, moved = (Layer(ROUTES["mixed"], 80, (48,), (8, 16, 24), dtype, offset=some) for some in (0, offset))
    for name in ("x", "weights", "biases", "a", "b"):
        for here, there in zip(getattr(moved, name), getattr(straight, name)):
            here.copy_(there)
    assert moved.a[0].data_ptr() % 16 != 0
    assert torch.equal(moved.run(any_chip, monkeypatch)[0][0], straight.run(any_chip, monkeypatch)[0][0])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_fp32_adapters_are_read_as_they_are(any_chip, monkeypatch, dtype):
    layer = Layer(ROUTES["mixed"], dtype=dtype, ranks=(4, 16, 8), adapters=F32)
    read, launch = [], any_chip.lora_small_m
    monkeypatch.setattr(any_chip, "lora_small_m", lambda x, a, b, *rest: (read.extend(a + b), launch(x, a, b, *rest)))
    layer.check(layer.run(any_chip, monkeypatch)[0])
    assert [t.data_ptr() for t in read] == [t.data_ptr() for t in layer.a + layer.b]


def test_adapters_of_several_dtypes(any_chip, monkeypatch):
    layer = Layer(ROUTES["mixed"], dtype=BF16, ranks=(4, 16, 8))
    layer.a[0], layer.b[2] = layer.a[0].double(), layer.b[2].float()
    layer.check(layer.run(any_chip, monkeypatch)[0])


def test_padded_slots_and_strided_rows_are_read_in_place(any_chip, monkeypatch):
    layer = Layer(ROUTES["mixed"], k=40, columns=(24,), ranks=(3, 8, 5))
    a, b, x = torch.full((3, 8, 44), NAN), torch.full((3, 24, 8), NAN), torch.full((22, 48), NAN)
    for e, rank in enumerate((3, 8, 5)):
        a[e, :rank, :40], b[e, :, :rank] = layer.a[e], layer.b[e]
        layer.a[e], layer.b[e] = a[e, :rank, :40], b[e, :, :rank]
    x[:, :40] = layer.x
    layer.x = x[:, :40]
    layer.check(layer.run(any_chip, monkeypatch)[0])


@pytest.mark.parametrize("count", [40, 100], ids=["40 adapters", "100 adapters"])
def test_more_adapters_than_one_launch_has_room_for(any_chip, monkeypatch, count):
    index = [(7 * i) % (count + 3) - 2 for i in range(40)]
    layer = Layer(index, k=24, columns=(16, 8, 8), ranks=(4,) * count)
    layer.check(layer.run(any_chip, monkeypatch)[0])


def test_no_adapter_at_all_leaves_bypassed_rows_and_nothing_else(any_chip, monkeypatch):
    layer = Layer([-1, 0, -1], ranks=())
    ys, _ = layer.run(any_chip, monkeypatch)
    assert ys[0].isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("poison", [NAN, float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("which", ["a", "b"])
def test_a_poisoned_adapter_stays_with_its_rows(chip, monkeypatch, poison, which):
    layer = Layer(ROUTES["64 rows"], k=40, ranks=(4, 16, 8), dtype=BF16)
    clean = layer.run(chip, monkeypatch)[0][0]
    getattr(layer, which)[1].fill_(poison)
    dirty = layer.run(chip, monkeypatch)[0][0]
    own = layer.index == 1
    assert torch.equal(dirty[~own], clean[~own])
    assert not dirty[own].isfinite().any()


def test_a_row_has_the_same_bits_alone_and_on_every_chip(monkeypatch):
    layer = Layer(ROUTES["64 rows"], k=264, columns=(72,), ranks=(4, 136, 8), dtype=BF16)
    layer.weights[0].zero_()  # leaves out the library's product, whose bits depend on the rows
    found = []
    for options in CHIPS.values():
        ops = cuda_host.HostLora(cuda_host.compile_library(SOURCE), *options)
        found.append(layer.run(ops, monkeypatch)[0][0])
        for row in (0, 37, 62):
            alone = layer.run(ops, monkeypatch, rows=slice(row, row + 1))[0][0]
            assert torch.equal(alone[0], found[-1][row])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_order_in_which_threads_run_changes_nothing(chip, monkeypatch):
    layer = Layer(ROUTES["mixed"], k=136, columns=(72, 40), ranks=(4, 136, 24))
    forwards = layer.run(chip, monkeypatch, saved_rows=22)
    with chip.backwards():
        backwards = layer.run(chip, monkeypatch, saved_rows=22)
    assert all(torch.equal(y, z) for y, z in zip((*forwards[0], forwards[1]), (*backwards[0], backwards[1])))


@pytest.mark.parametrize("of", ["runs", "int32", "int16", "scaling tensor"])
def test_every_way_to_name_adapters_and_scaling_gives_the_same_bits(any_chip, monkeypatch, of):
    layer = Layer([0] * 5 + [-1] * 4 + [1] * 7)
    want = layer.run(any_chip, monkeypatch)[0][0]
    options = {}
    if of == "runs":
        options["runs"] = [0, 5, 0, 5, 9, -1, 9, 16, 1]
    elif of == "scaling tensor":
        options["scaling_tensor"], layer.scaling = torch.tensor(layer.scaling), [NAN, NAN]
    else:
        layer.index = layer.index.to(getattr(torch, of))
    assert torch.equal(layer.run(any_chip, monkeypatch, **options)[0][0], want)


@pytest.mark.parametrize("saved_rows", [0, 5, 11])
def test_the_rows_of_s_that_are_kept(chip, monkeypatch, saved_rows):
    layer = Layer(ROUTES["mixed"][:11], k=40, columns=(24, 8), ranks=(3, 136, 5))
    _, s = layer.run(chip, monkeypatch, saved_rows=saved_rows)
    want = torch.zeros(saved_rows, 2 * 136)
    for row, e in enumerate(layer.index.tolist()[:saved_rows]):
        for p in range(2 if e >= 0 else 0):
            a = layer.of(p)[2][e]
            want[row, p * 136 : p * 136 + len(a)] = layer.scaling[e] * (a @ layer.x[row])
    torch.testing.assert_close(s, want, rtol=1e-5, atol=1e-6)


def test_the_whole_op_on_it_has_the_definitions_values_and_gradients(any_chip, monkeypatch):
    layer = Layer(ROUTES["mixed"], k=40, columns=(24, 8), ranks=(3, 12, 5))
    monkeypatch.setattr(small, "ops", any_chip)
    monkeypatch.setattr(small, "serves", lambda x, weights, lora_a, backward: not backward)
    monkeypatch.setattr(tier, "TIERS", (("native", small), ("native", library)))
    n, count = 3, 2
    found = []
    for call in ("op", "definition"):
        dtype = F32 if call == "op" else F64
        leaves = [t.to(dtype).clone().requires_grad_() for t in (layer.x, *layer.a, *layer.b)]
        x, a, b = leaves[0], leaves[1 : 1 + n * count], leaves[1 + n * count :]
        weights = [w.to(dtype) for w in layer.weights]
        if call == "op":
            stacks = [[some[p * n : p * n + n] for p in range(count)] for some in (a, b)]
            ys = lora_linears(x, weights, *stacks, layer.index, layer.scaling)
        else:
            ys = [
                naive.lora_linear(x, w, None, a[p * n : p * n + n], b[p * n : p * n + n], layer.index, layer.scaling)
                for p, w in enumerate(weights)
            ]
        sum((y * torch.arange(y.numel(), dtype=dtype).view_as(y).cos()).sum() for y in ys).backward()
        found.append([*ys, *(t.grad for t in leaves)])
    assert any_chip.launched == 1
    for value, truth in zip(*found):
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5)


def test_the_kernel_reads_and_writes_nothing_outside_its_arrays():
    code = """
import ctypes, math, torch
from cuda_host import HostLora
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def exact(*shape, dtype=torch.float32, offset=0):  # ends where its memory ends
    size = (math.prod(shape) + offset) * dtype.itemsize
    memory = (ctypes.c_char * size).from_address(libc.malloc(ctypes.c_size_t(size)))
    return torch.frombuffer(memory, dtype=dtype)[offset:].view(shape).fill_(1)
shapes = (True, 37, 51, 3, 0), (True, 64, 32, 8, 1), (False, 8, 40, 130, 0), (False, 72, 300, 16, 0)
for clusters, k, n, r, offset in shapes:
    ops = HostLora(library, clusters, 8)
    for dtype in (torch.float32, torch.bfloat16):
        make = lambda *shape: exact(*shape, dtype=dtype, offset=offset)
        index = exact(5, dtype=torch.long).copy_(torch.tensor([0, 1, -1, 5, 0]))
        ops.lora_small_m(make(5, k), [make(r, k), make(1, k)], [make(n, r), make(n, 1)], index, [], [1.0, 2.0],
                         exact(2), [make(5, n)], make(4, r))
print("ended")
"""
    done = cuda_host.run_sanitized(SOURCE, code)
    assert "ended" in done.stdout, done.stderr[-4000:]

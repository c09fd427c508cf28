"""lora_linear on the CPU's own kernels, tiles and the product of few rows: any shape, layout and routing."""

import os
import subprocess
import sys

import pytest
import torch
from ops.lora_cases import as_exact_as_plain

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.lora import library, lora_linear, lora_linears, tier, tiles

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
AMX = 2


def units():
    return [torch.ops.rlhf_kernels.bf16_isa()] if registry.native_available() else []


here = pytest.mark.skipif(F32 not in tiles.DTYPES, reason="this machine has no tile units")
pytestmark = [here, pytest.mark.usefixtures("kernels")]

ROWS = (1, 3, 7, 20, 24, 25, 31, 32, 33, 40, 48, 49, 56, 57, 64, 65, 100, 300)


def inputs(rows, k=70, width=90, ranks=(16, 5, 33), dtype=BF16, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, k, generator=g), torch.randn(width, k, generator=g) * k**-0.5
    a = [torch.randn(r, k, generator=g) * k**-0.5 for r in ranks]
    b = [torch.randn(width, r, generator=g) for r in ranks]
    index = torch.randint(-1, len(ranks), (rows,), generator=g)
    return x.to(dtype), weight.to(dtype), [t.to(dtype) for t in a], [t.to(dtype) for t in b], index


def forward(x, weights, a, b, index=None, runs=None, biases=None, saved_rows=0, scaling=(0.5, 1.0, 2.0)):
    count = len(weights)
    scaling = list(scaling)[: len(a) // count]
    return tiles.forward(x, weights, biases or [None] * count, a, b, index, runs, scaling, None, None, saved_rows)


def everything(x, weight, a, b, index, grad_rows=None, scaling=(0.5, 1.0, 2.0)):
    """y, s and all gradients of one projection, by the kernels themselves."""
    grad_rows = x.shape[0] if grad_rows is None else grad_rows
    (y,), s = forward(x, [weight], a, b, index, saved_rows=grad_rows, scaling=scaling)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    needs = [True, False, False] + [True] * (len(a) + len(b))
    grads = tiles.backward(
        [dy], [weight], a, b, index[:grad_rows], None, list(scaling)[: len(a)], None, None, x, s, grad_rows, needs
    )
    return y, s, *(t for t, need in zip(grads, needs) if need)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=str)
def test_values_and_gradients_at_any_number_of_rows(rows, dtype):
    x, weight, lora_a, _, _ = inputs(rows, dtype=dtype)
    assert tier.chosen(x, [weight], lora_a) is tiles
    options = {"route": "random", "given": "index", "adapters": 3, "stack": "list", "grad_rows": "some"}
    as_exact_as_plain(5 + rows, dtype=dtype, rows=rows, strides="sliced", bias=True, projections=1, **options)
    as_exact_as_plain(6 + rows, dtype=dtype, rows=rows, strides="plain", projections=3, **options)


@pytest.mark.parametrize("rows", [24, 40, 60, 130])
@pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=str)
def test_a_transposed_weight_and_adapters_of_another_dtype_are_read_as_they_lie(rows, dtype):
    options = {"strides": "transposed", "adapter_dtype": F32, "learns": "all", "adapters": 2, "projections": 2}
    as_exact_as_plain(11, dtype=dtype, rows=rows, route="runs", stack="strided", given="routing", **options)


def run(unit, script):
    environment = {**os.environ, "RLHF_KERNELS_CPU_ISA": unit}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


@pytest.mark.skipif(AMX not in units(), reason="AVX512-BF16 is what the other tests run on")
def test_the_lesser_unit_is_right_too():
    tests = "['-q', '-p', 'no:cacheprovider', 'tests/ops/test_lora_tiles.py', '-k', 'any_number']"
    done = run("avx512_bf16", f"import sys, pytest; sys.exit(pytest.main({tests}))")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_without_units_the_library_serves():
    script = "import torch; from rlhf_kernels.ops.lora import library, tier, tiles; x = torch.zeros(40, 8);"
    done = run("portable", script + "assert not tiles.DTYPES; assert tier.chosen(x, [x], []) is library")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("rows", [20, 50, 300])
@pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(rows, dtype):
    x, weight, a, b, index = inputs(rows, 150, 170, dtype=dtype)
    found = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found.append(everything(x, weight, a, b, index, grad_rows=rows - 7))
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other))


def input_gradient(x, weight, a, b, index, dy):
    needs = [True] + [False] * (2 + 2 * len(a))
    scaling = [0.5, 1.0, 2.0]
    return tiles.backward([dy], [weight], a, b, index, None, scaling, None, None, x, x[:0], x.shape[0], needs)[0]


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_a_row_has_the_same_bits_at_any_place_among_any_rows(dtype):
    x, weight, a, b, index = inputs(300, dtype=dtype)
    y, s = forward(x, [weight], a, b, index, saved_rows=300)
    dx = input_gradient(x, weight, a, b, index, y[0])
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    for rows in (order, torch.arange(40, 110)):
        again, s_again = forward(x[rows], [weight], a, b, index[rows], saved_rows=len(rows))
        assert torch.equal(again[0], y[0][rows])
        assert torch.equal(s_again, s[rows])
        assert torch.equal(input_gradient(x[rows], weight, a, b, index[rows], y[0][rows]), dx[rows])
    some = forward(x[40:96], [weight], a, b, index[40:96])[0][0]
    for part in (slice(0, 25), slice(7, 40), slice(11, 56)):
        assert torch.equal(forward(x[40:96][part], [weight], a, b, index[40:96][part])[0][0], some[part])
    few = forward(x[40:60], [weight], a, b, index[40:60])[0][0]
    for i in range(20):
        assert torch.equal(forward(x[40 + i : 41 + i], [weight], a, b, index[40 + i : 41 + i])[0][0], few[i : i + 1])


@pytest.mark.parametrize("rows", [20, 50, 300])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_a_poisoned_adapter_leaves_the_bits_of_all_others(rows, poison, dtype):
    x, weight, a, b, index = inputs(rows, dtype=dtype)
    clean = everything(x, weight, a, b, index)
    a[1], b[1] = torch.full_like(a[1], poison), torch.full_like(b[1], poison)
    found = everything(x, weight, a, b, index)
    others = index != 1
    assert not clean[0].isnan().any()
    for one, two in zip(found[:3], clean[:3]):
        assert torch.equal(one[others], two[others])
    assert not found[0][~others].isfinite().any()
    for i in (0, 2):
        assert torch.equal(found[3 + i], clean[3 + i])
        assert torch.equal(found[6 + i], clean[6 + i])


@pytest.mark.parametrize("rows", [20, 50, 300])
@pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=str)
def test_bypassed_rows_are_the_bits_of_a_call_without_adapters(rows, dtype):
    x, weight, a, b, index = inputs(rows, dtype=dtype)
    y, _ = forward(x, [weight], a, b, index)
    plain, _ = forward(x, [weight], [], [], None, [0, rows, -1])
    assert torch.equal(y[0][index == -1], plain[0][index == -1])


@pytest.mark.parametrize("rows", [20, 50, 300])
def test_an_index_that_names_no_adapter_is_a_row_of_nan_and_nothing_else_changes(rows):
    x, weight, a, b, index = inputs(rows)
    clean = everything(x, weight, a, b, index)
    lost = index == 2
    wrong = torch.where(lost, torch.where(torch.arange(rows) % 2 == 0, 2**40, -7), index)
    found = everything(x, weight, a, b, wrong)
    assert found[0][lost].isnan().all()
    assert torch.equal(found[0][~lost], clean[0][~lost])
    assert torch.equal(found[2][~lost], clean[2][~lost])
    assert not found[1][lost].any()
    for i in (0, 1):
        assert torch.equal(found[3 + i], clean[3 + i])


@pytest.mark.parametrize("rows", [20, 50, 300])
def test_s_is_the_librarys(rows):
    x, weight, a, b, index = inputs(rows, dtype=F32)
    weights, a2, b2 = [weight, weight], [*a, *a[::-1]], [*b, *b[::-1]]
    arguments = (x, weights, [None, None], a2, b2, index, None, [0.5, 1.0, 2.0], None, None, rows - 3)
    ours, theirs = tiles.forward(*arguments)[1], library.forward(*arguments)[1]
    assert ours is not None
    assert theirs is not None
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.equal(ours == 0, theirs == 0)


def test_what_nobody_asks_for_may_be_missing():
    x, weight, a, b, index = inputs(100)
    (y,), s = forward(x, [weight], a, b, index, saved_rows=100)
    whole = everything(x, weight, a, b, index)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    stand_in, none = x.new_empty(()).expand_as(weight), x.new_empty(()).expand_as(x)
    arguments = (index, None, [0.5, 1.0, 2.0], None, None)
    needs = [False] * 3 + [False, True, False] + [False] * 3
    (da,) = (t for t in tiles.backward([dy], [stand_in], a, b, *arguments, x, s, 100, needs) if t.numel())
    assert torch.equal(da, whole[4])
    needs = [False] * 3 + [False] * 3 + [True, False, False]
    (db,) = (t for t in tiles.backward([dy], [stand_in], a, b, *arguments, none, s, 100, needs) if t.numel())
    assert torch.equal(db, whole[6])
    needs = [True] + [False] * 8
    dx = tiles.backward([dy], [weight], a, b, *arguments, none, s[:0], 100, needs)[0]
    assert torch.equal(dx, whole[2])
    absent = tiles.backward(
        [dy.new_empty(0), dy], [weight, weight], [*a, *a], [*b, *b], *arguments, none, s[:0], 100, [True] + [False] * 16
    )
    assert torch.equal(absent[0], dx)


def test_wide_matrices_are_taken_in_blocks():
    """More rows, features and panels than a block of anything holds."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2100, 2500, generator=g).to(BF16).requires_grad_()
    weight = (torch.randn(700, 2500, generator=g) / 50).to(BF16)
    a = (torch.randn(2, 40, 2500, generator=g) / 50).to(BF16).requires_grad_()
    b = torch.randn(2, 700, 40, generator=g).to(BF16).requires_grad_()
    index = torch.randint(-1, 2, (2100,), generator=g)
    y = lora_linear(x, weight, a, b, index, scaling=0.5)
    dy = torch.randn(y.shape, generator=g).to(BF16)
    y.backward(dy)
    wide = [t.detach().float().requires_grad_() for t in (x, a, b)]
    plain = wide[0] @ weight.float().t()
    for e in range(2):
        mine = (index == e).unsqueeze(1)
        plain = plain + torch.where(mine, 0.5 * (wide[0] @ wide[1][e].t()) @ wide[2][e].t(), 0.0)
    plain.backward(dy.float())
    for got, truth in ((y, plain), (x.grad, wide[0].grad), (a.grad, wide[1].grad), (b.grad, wide[2].grad)):
        assert (got.float() - truth).norm() <= 4e-3 * truth.norm()


def test_few_rows_and_a_transposed_weight_or_a_gradient_are_the_librarys():
    x, weight, a, *_ = inputs(5)
    assert tier.chosen(x, [weight.t().contiguous().t()], a) is library
    assert tier.chosen(x, [weight], a, backward=True) is library
    assert tier.chosen(x.double(), [weight.double()], a) is library


def test_projections_are_each_the_bits_of_their_own_call():
    x, weight, a, b, index = inputs(200)
    other = weight[:50] * 2
    ys = lora_linears(x, [weight, other], [a, a], [b, [t[:50] for t in b]], index)
    assert torch.equal(ys[0], lora_linear(x, weight, a, b, index))
    assert torch.equal(ys[1], lora_linear(x, other, a, [t[:50] for t in b], index))


@pytest.mark.parametrize("rows", [4, 100])
def test_sizes_and_dtypes_that_do_not_fit_are_errors_and_nothing_is_read(rows):
    """Modules call without the argument checks of lora_linear."""
    x, weight, a, b, index = inputs(rows)
    wrong = {
        "a weight has not the dtype of x": (x, [weight.float()], a, b, index),
        "a weight has not the features of x": (x[:, :50], [weight], a, b, index),
        "an A has not the features of x": (x, [weight], [*a[:2], a[2][:, :50]], b, index),
        "a B is not": (x, [weight], a, [*b[:2], b[2][:50]], index),
        "index has fewer entries": (x, [weight], a, b, index[1:]),
        "runs do not name every row once": (x, [weight], a, b, None, [0, rows - 1, 0]),
        "a bias has not the weight's rows": (x, [weight], a, b, index, None, [weight[:50, 0]]),
        "a bias has not the dtype of x": (x, [weight], a, b, index, None, [weight[:, 0].float()]),
    }
    for message, arguments in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            forward(*arguments)
    (y,), s = forward(x, [weight], a, b, index, saved_rows=rows)
    needs = [True] + [False] * 2 + [True] * 6
    bad = {
        "a gradient is not": ([y[:, :50]], [weight], x, s),
        "a weight has not the dtype": ([y], [weight, weight.float()], x, s),
        "x is not": ([y], [weight], x[1:], s),
        "s is not": ([y], [weight], x, s[:, 1:]),
    }
    for message, (grads, weights, some_x, some_s) in bad.items():
        count = len(weights)
        arguments = (
            index,
            None,
            [1.0] * 3,
            None,
            None,
            some_x,
            some_s,
            rows,
            needs[:1] + [False] * 2 * count + needs[3:] * count,
        )
        with pytest.raises(RuntimeError, match=message):
            tiles.backward(grads * count, weights, a * count, b * count, *arguments)

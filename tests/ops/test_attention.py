"""Packed and sliced attention against the float64 definition, and what they promise beyond it."""

from itertools import accumulate

import pytest
import torch

from rlhf_kernels.generation.arena import Arena
from rlhf_kernels.ops.attention import naive, native, sliced_attention, varlen_attention

pytestmark = pytest.mark.usefixtures("device")

LENGTHS = [1, 0, 7, 33, 200, 16]
compiled = pytest.mark.skipif(not native.AVAILABLE, reason="the compiled ops are not built")

# heads, kv heads, d, dv, window, softcap
SHAPES = {
    "mha-d16": (3, 3, 16, 16, None, None),
    "gqa2-d32": (4, 2, 32, 32, None, None),
    "gqa2-d64-window": (4, 2, 64, 64, 20, None),
    "gqa6-d80-softcap": (6, 1, 80, 80, None, 2.0),
    "mqa-d128-window3": (4, 1, 128, 128, 3, None),
    "gqa6-window-softcap": (12, 2, 32, 32, 7, 5.0),
    "dv-smaller": (4, 2, 24, 7, None, None),
    "dv-larger-window16": (2, 2, 33, 48, 16, None),
    "few-lanes": (5, 1, 3, 2, 300, 1.0),
}


def borders(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def rows(tokens: int, heads: int, dim: int, dtype=torch.float32, factor=1.0) -> torch.Tensor:
    """[tokens, heads, dim], strided as models hand it over: [1, heads, tokens, dim] in memory."""
    return (torch.randn(1, heads, tokens, dim) * factor).to(dtype)[0].transpose(0, 1)


def error_is_fair(out: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, factor: float) -> None:
    """At most `factor` times plain PyTorch's error in the same dtype, with the rounding of one addition as a floor."""
    assert out.shape == exact.shape
    assert out.isfinite().all()
    error, allowed = (out.double() - exact).abs(), (plain.double() - exact).abs().max()
    assert (error <= torch.maximum(factor * allowed, 2e-7 * (1 + exact.abs()))).all()
    bound = 1e-5 if out.dtype == torch.float32 else 1e-2
    assert error.norm() <= bound * exact.norm() + 1e-12


def sliced(lengths, new, q, k, v, slice_tokens=16, **options):
    """Writes each sequence's k, v (lists) into slices in random order and attends with its last `new` queries."""
    kv_heads, d, dv = k[0].shape[1], k[0].shape[2], v[0].shape[2]
    counts = [-(-n // slice_tokens) for n in lengths]
    size = (sum(counts) + 3) * kv_heads * (d + dv) * slice_tokens * q.dtype.itemsize
    arena = Arena([(kv_heads, d, dv)], size + 256, slice_tokens, q.dtype, q.device)
    for view in (arena.keys[0], arena.values[0]):
        view.fill_(float("nan"))  # what was not written must not be read
    order = torch.randperm(arena.num_slices)
    table = torch.full((len(lengths), max(1, *counts)), -7, dtype=torch.int32)
    first = 0
    for b, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        table[b, :count] = order[first : first + count]
        first += count
        place = torch.arange(n)
        slots = table[b].long()[place // slice_tokens] * slice_tokens + place % slice_tokens
        arena.write(0, slots, k[b], v[b])
    context = torch.tensor(lengths, dtype=torch.int32)
    return sliced_attention(q, arena, 0, table, context, borders(new), **options)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["native", "naive", *(["triton"] if torch.cuda.is_available() else [])])
def backend(request, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_varlen_and_its_gradients_match_the_definition(shape, dtype, backend):
    heads, kv_heads, d, dv, window, softcap = shape
    cu, tokens = borders(LENGTHS), sum(LENGTHS)
    inputs = [rows(tokens, heads, d, dtype), rows(tokens, kv_heads, d, dtype), rows(tokens, kv_heads, dv, dtype)]
    grad = rows(tokens, heads, dv, dtype)

    def run(attention, x_dtype):
        q, k, v = (x.detach().to(x_dtype).requires_grad_() for x in inputs)
        out = attention(q, k, v)
        return out, *torch.autograd.grad(out, (q, k, v), grad.to(x_dtype))

    def definition(q, k, v):
        return naive.varlen_attention(q, k, v, cu, d**-0.5, window, softcap)

    ours = run(lambda q, k, v: varlen_attention(q, k, v, cu, window=window, softcap=softcap), dtype)
    plain, exact = run(definition, dtype), run(definition, torch.float64)
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        error_is_fair(a.detach(), b.detach(), c.detach(), 2.0 if i == 0 else 3.0)


@pytest.mark.parametrize("slice_tokens", [1, 6, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_sliced_matches_the_definition(shape, dtype, slice_tokens, backend):
    heads, kv_heads, d, dv, window, softcap = shape
    lengths, new = [1, 7, 33, 200, 48, 16], [1, 7, 1, 40, 1, 0]  # decode steps, whole prompts and pieces of them
    q = rows(sum(new), heads, d, dtype)
    k = [rows(n, kv_heads, d, dtype) for n in lengths]
    v = [rows(n, kv_heads, dv, dtype) for n in lengths]
    out = sliced(lengths, new, q, k, v, slice_tokens, window=window, softcap=softcap)

    def definition(wide):
        options = (d**-0.5, window, softcap)
        parts = zip(q.split(new), k, v, strict=True)
        return torch.cat([naive.attend(a.to(wide), b.to(wide), c.to(wide), *options) for a, b, c in parts])

    error_is_fair(out, definition(dtype), definition(torch.float64), 2.0)


def test_window_includes_the_token_itself_and_group_heads_share_keys(backend):
    """By hand: uniform scores, so an output is the mean of the values its query sees."""
    q, k = torch.zeros(4, 2, 8), torch.randn(4, 1, 8)
    v = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(4, 1, 1)
    out = varlen_attention(q, k, v, borders([4]), window=2)
    assert out[:, :, 0].tolist() == [[1.0] * 2, [1.5] * 2, [3.0] * 2, [6.0] * 2]
    alone = varlen_attention(torch.randn(4, 2, 8), k, v, borders([4]), window=1)
    assert torch.equal(alone, v.expand(4, 2, 1))


def test_scale_is_applied_once_and_softcap_bounds_scores(backend):
    q, k = torch.full((2, 1, 1), 3.0), torch.tensor([0.0, 100.0]).view(2, 1, 1)
    v = torch.tensor([0.0, 1.0]).view(2, 1, 1)
    out = varlen_attention(q, k, v, borders([2]), scale=0.01)
    assert out[1].item() == pytest.approx(torch.sigmoid(torch.tensor(3.0)).item(), rel=1e-6)
    out = varlen_attention(q, k, v, borders([2]), scale=1.0, softcap=0.5)
    assert out[1].item() == pytest.approx(torch.sigmoid(torch.tensor(0.5)).item(), rel=1e-6)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (None, 3.0)])
@pytest.mark.host
def test_decode_and_prefill_pieces_give_the_bits_of_the_whole_sequence(window, softcap, dtype):
    """Rollout and recomputation see the same attention, whatever slices, pieces and neighbours there were."""
    heads, kv_heads, d, n = 6, 2, 40, 75
    q, k, v = rows(n, heads, d, dtype), rows(n, kv_heads, d, dtype), rows(n, kv_heads, 24, dtype)
    options = {"window": window, "softcap": softcap}
    whole = varlen_attention(q, k, v, borders([n]), **options)
    for slice_tokens in (1, 5, 16, 48):
        for pieces in ([n], [40, 35], [3, 17, 1, 30, 24], [1] * n):
            parts = [
                sliced([e], [p], q[e - p : e], [k[:e]], [v[:e]], slice_tokens, **options)
                for e, p in zip(accumulate(pieces), pieces, strict=True)
            ]
            assert torch.equal(torch.cat(parts), whole), (slice_tokens, len(pieces))


@compiled
@pytest.mark.host
def test_a_row_does_not_depend_on_its_batch():
    heads, kv_heads, d = 4, 2, 32
    lengths, new = [50, 3, 129, 18], [1, 3, 30, 1]
    q = rows(sum(new), heads, d)
    k, v = ([rows(n, kv_heads, d) for n in lengths] for _ in range(2))
    together = sliced(lengths, new, q, k, v).split(new)
    k[1].fill_(float("nan"))  # a bad neighbour stays alone with it
    beside_nan = sliced(lengths, new, q, k, v).split(new)
    for b, part in enumerate(q.split(new)):
        if b != 1:
            assert torch.equal(sliced([lengths[b]], [new[b]], part, [k[b]], [v[b]]), together[b])
            assert torch.equal(beside_nan[b], together[b])
    assert beside_nan[1].isnan().all()


@compiled
@pytest.mark.host
def test_threads_and_repetition_do_not_change_a_bit():
    cu = borders([300, 40, 177])
    q, k, v = rows(517, 4, 64).requires_grad_(), rows(517, 2, 64).requires_grad_(), rows(517, 2, 64).requires_grad_()
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            out = varlen_attention(q, k, v, cu)
            results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_large_scores_do_not_overflow(backend):
    q, k, v = rows(40, 2, 16, factor=60.0), rows(40, 2, 16, factor=60.0), rows(40, 2, 16)
    cu = borders([40])
    exact = naive.varlen_attention(q.double(), k.double(), v.double(), cu, 0.25)
    plain = naive.varlen_attention(q, k, v, cu, 0.25)
    error = (varlen_attention(q, k, v, cu) - exact).abs()
    assert (error <= torch.maximum(2 * (plain - exact).abs().max(), 2e-7 * (1 + exact.abs()))).all()


def test_memory_kept_for_backward_does_not_grow_with_the_square_of_the_length(backend):
    n = 600
    q, k, v = (rows(n, 2, 16).requires_grad_() for _ in range(3))
    kept: list[int] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        varlen_attention(q, k, v, borders([n]))
    assert kept
    assert max(kept) <= n * 2 * 16


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=["none", "one-empty", "all-empty"])
def test_no_tokens(lengths, backend):
    q, k, v = rows(0, 4, 8).requires_grad_(), rows(0, 2, 8).requires_grad_(), rows(0, 2, 6).requires_grad_()
    out = varlen_attention(q, k, v, borders(lengths))
    assert out.shape == (0, 4, 6)
    out.sum().backward()
    assert v.grad is not None
    assert v.grad.shape == v.shape


@compiled
@pytest.mark.host
def test_registered_ops_pass_opcheck():
    ops = torch.ops.rlhf_kernels
    cu = borders([5, 9])
    q, k, v = rows(14, 4, 8).requires_grad_(), rows(14, 2, 8).requires_grad_(), rows(14, 2, 6).requires_grad_()
    torch.library.opcheck(ops.varlen_attention_forward.default, (q, k, v, cu, 0.3, 4, 2.0))
    torch.library.opcheck(ops.varlen_attention.default, (q, k, v, cu, 0.3, 4, 2.0))
    out, lse = (x.detach() for x in ops.varlen_attention_forward(q, k, v, cu, 0.3, 0, 0.0))
    saved = (torch.ones_like(out), q.detach(), k.detach(), v.detach(), out, lse, cu)
    torch.library.opcheck(ops.varlen_attention_backward.default, (*saved, 0.3, 0, 0.0))
    keys, values = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 4, 6)
    places = (table([2, 0], [1, 0]), table([6, 3])[0], borders([1, 2]))
    arguments = (q.detach()[:3], keys, values, *places, 0.3, 0, 0.0)
    torch.library.opcheck(ops.sliced_attention_forward.default, arguments)
    torch.library.opcheck(ops.sliced_attention.default, arguments)
    new = (torch.tensor([7, 0]), torch.randn(2, 2, 8), torch.randn(2, 2, 6))
    torch.library.opcheck(ops.arena_write.default, (keys, values, *new))


def test_compiles_without_graph_breaks(backend):
    cu = borders([5, 9])

    def step(q, k, v):
        return varlen_attention(q * 2, k, v, cu, softcap=3.0).square()

    inputs = [rows(14, heads, 8).requires_grad_() for heads in (4, 2, 2)]
    ours, eager = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), step(*inputs)
    assert torch.equal(ours, eager)
    for a, b in zip(torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(eager.sum(), inputs), strict=True):
        assert torch.equal(a, b)


def table(*slices: list[int]) -> torch.Tensor:
    return torch.tensor(slices, dtype=torch.int32)


Q, K, V = torch.zeros(6, 4, 8), torch.zeros(6, 2, 8), torch.zeros(6, 2, 8)
BAD_VARLEN = {
    "q-shape": ({"q": Q[0]}, ValueError, "q has shape"),
    "q-integer": ({"q": Q.int()}, TypeError, "q is torch.int32"),
    "k-tokens": ({"k": K[:5]}, ValueError, "k has shape"),
    "k-dim": ({"k": K[:, :, :4]}, ValueError, "k has shape"),
    "k-heads": ({"k": torch.zeros(6, 3, 8), "v": torch.zeros(6, 3, 8)}, ValueError, "multiple"),
    "k-dtype": ({"k": K.double()}, TypeError, "k is torch.float64"),
    "v-heads": ({"v": V[:, :1]}, ValueError, "v has shape"),
    "v-dtype": ({"v": V.bfloat16()}, TypeError, "v is torch.bfloat16"),
    "cu-dtype": ({"cu_seqlens": torch.tensor([0, 6])}, TypeError, "cu_seqlens is torch.int64"),
    "cu-empty": ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, ValueError, "cu_seqlens"),
    "cu-start": ({"cu_seqlens": table([1, 6])[0]}, ValueError, "cu_seqlens is"),
    "cu-end": ({"cu_seqlens": table([0, 7])[0]}, ValueError, "cu_seqlens is"),
    "cu-falls": ({"cu_seqlens": table([0, 4, 2, 6])[0]}, ValueError, "cu_seqlens is"),
    "window": ({"window": 0}, ValueError, "window is 0"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
    "window-float": ({"window": 2.5}, TypeError, "window is 2.5"),
    "scale-text": ({"scale": "1"}, TypeError, "scale is '1'"),
}


def test_a_second_derivative_is_an_error_and_not_zero(backend):
    q = torch.randn(6, 4, 8, requires_grad=True)
    k, v = torch.zeros(6, 2, 8), torch.ones(6, 2, 8)
    out = varlen_attention(q, k, v, borders([4, 2]))
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once|no autograd formula"):
        torch.autograd.grad(grad.square().sum(), q)


@pytest.mark.parametrize(("change", "error", "words"), BAD_VARLEN.values(), ids=BAD_VARLEN.keys())
@pytest.mark.host
def test_bad_varlen_arguments_are_named(change, error, words, backend):
    arguments = {"q": Q, "k": K, "v": V, "cu_seqlens": borders([4, 2])} | change
    with pytest.raises(error, match=words):
        varlen_attention(**arguments)


BAD_SLICED = {
    "q-dtype": ({"q": Q[:3].double()}, TypeError, "q is torch.float64"),
    "q-dim": ({"q": Q[:3, :, :4]}, ValueError, "q has shape"),
    "q-heads": ({"q": Q[:3, :3]}, ValueError, "multiple"),
    "layer": ({"layer": 1}, IndexError, "layer is 1"),
    "slice-high": ({"slice_table": table([0, 99], [1, 2])}, IndexError, r"slice_table\[0, 1\] is 99"),
    "slice-low": ({"slice_table": table([0, 3], [-1, 2])}, IndexError, r"slice_table\[1, 0\] is -1"),
    "slice-dtype": ({"slice_table": table([0, 3], [1, 2]).long()}, TypeError, "slice_table is"),
    "lens-long": ({"context_lens": table([9, 4])[0]}, ValueError, r"context_lens\[0\] is 9"),
    "lens-short": ({"context_lens": table([8, 1])[0]}, ValueError, r"context_lens\[1\] is 1"),
    "lens-count": ({"context_lens": table([8])[0]}, ValueError, "context_lens has 1"),
    "cu-end": ({"cu_q": borders([1, 3])}, ValueError, "cu_q is"),
    "cu-count": ({"cu_q": borders([3])}, ValueError, "cu_q has 2"),
}


@pytest.mark.parametrize(("change", "error", "words"), BAD_SLICED.values(), ids=BAD_SLICED.keys())
@pytest.mark.host
def test_bad_sliced_arguments_are_named(change, error, words, backend):
    places = {"slice_table": table([0, 3], [1, 2]), "context_lens": table([8, 4])[0], "cu_q": borders([1, 2])}
    arguments = {"q": Q[:3], "arena": Arena([(2, 8, 8)], "4KiB", 4), "layer": 0} | places | change
    with pytest.raises(error, match=words):
        sliced_attention(**arguments)


def test_float64_and_fp16_are_served_by_the_definition():
    cu = borders([9])
    q, k, v = rows(9, 2, 8), rows(9, 1, 8), rows(9, 1, 8)
    exact = varlen_attention(q.double(), k.double(), v.double(), cu)
    assert exact.dtype == torch.float64
    assert (varlen_attention(q.half(), k.half(), v.half(), cu).double() - exact).abs().max() < 5e-3

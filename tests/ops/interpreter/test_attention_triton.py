"""Attention's Triton kernels against the definition in float64: packed rows with gradients, and rows over the arena."""

import pytest
import torch
from ops.attention_cases import F16, F32, F64, Sliced, as_exact_as_plain, borders, rows

from rlhf_kernels.ops.attention import naive, triton_launch, triton_tier
from rlhf_kernels.ops.attention import varlen_attention as public_varlen

# heads, kv heads, d, dv, window, softcap, dtype
SHAPES = {
    "mha-d16": (2, 2, 16, 16, 0, 0.0, F32),
    "gqa3-d80-dv24-fp16": (3, 1, 80, 24, 0, 0.0, F16),
    "gqa4-window2": (4, 1, 24, 24, 2, 0.0, F32),
    "gqa3-window20-softcap": (6, 2, 64, 64, 20, 5.0, F32),
    "mqa5-softcap-fp16": (5, 1, 32, 33, 0, 2.0, F16),
    "d128-window7": (2, 1, 128, 128, 7, 0.0, F32),
}
LENGTHS = [1, 0, 7, 50, 16]
MIXED = [1, 7, 33, 200, 48, 16, 0], [1, 7, 1, 40, 1, 0, 1]  # decode steps, prompts, pieces of them, padding


@pytest.fixture(autouse=True)
def _nothing_is_taken_from_fresh_memory():
    """Fresh tensors hold NaN: what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def short_splits(monkeypatch):
    """Splits of 64 keys, so that short sequences have several."""
    monkeypatch.setattr(triton_launch, "SPLIT_KEYS", 64)


def with_gradients(attention, inputs, grad, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def packed(device, lengths, heads, kv_heads, d, dv, dtype, factor=1.0):
    tokens = sum(lengths)
    inputs = [rows(tokens, heads, d, dtype, device, factor), rows(tokens, kv_heads, d, dtype, device, factor)]
    return [*inputs, rows(tokens, kv_heads, dv, dtype, device)], rows(tokens, heads, dv, dtype, device)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_packed_rows_and_their_gradients_match_the_definition(shape, device):
    heads, kv_heads, d, dv, window, softcap, dtype = shape
    inputs, grad = packed(device, LENGTHS, heads, kv_heads, d, dv, dtype)
    cu, options = borders(LENGTHS, device), (d**-0.5, window, softcap)

    def definition(*qkv):
        return naive.varlen_attention(*qkv, cu, options[0], window or None, softcap or None)

    ours = with_gradients(lambda *qkv: triton_tier.varlen_attention(*qkv, cu, *options), inputs, grad, dtype)
    plain, exact = (with_gradients(definition, inputs, grad, wide) for wide in (dtype, F64))
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        as_exact_as_plain(name, a, b, c, 2 if name == "out" else 3)


@pytest.mark.parametrize(
    ("shape", "slice_tokens"), list(zip(SHAPES.values(), (1, 6, 16, 64, 6, 16), strict=True)), ids=SHAPES.keys()
)
def test_rows_over_the_arena_match_the_definition(shape, slice_tokens, device, short_splits):
    heads, kv_heads, d, dv, window, softcap, dtype = shape
    case = Sliced(device, *MIXED, heads, kv_heads, d, dv, slice_tokens, dtype)
    options = (d**-0.5, window, softcap)
    out = triton_tier.sliced_attention(*case.arguments(), *options)
    as_exact_as_plain("out", out, case.definition(dtype, *options), case.definition(F64, *options), 2)


@pytest.mark.parametrize(("lengths", "new"), [
    ([1, 63, 64, 65, 128, 200, 77, 190, 127, 130, 192, 2], [1] * 12),
    ([90, 5, 0, 0], [3, 1, 0, 0]),  # no more tokens than sequences, and yet not one each
    ([33, 64], [33, 31]),
], ids=["decode", "fewer-tokens-than-sequences", "prefill"])  # fmt: skip
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (30, 3.0)])
def test_splits_of_a_context_make_the_whole(lengths, new, window, softcap, device, short_splits):
    case = Sliced(device, lengths, new, slice_tokens=1)
    out = triton_tier.sliced_attention(*case.arguments(), 0.2, window, softcap)
    plain, exact = (case.definition(dtype, 0.2, window, softcap) for dtype in (F32, F64))
    as_exact_as_plain("out", out, plain, exact, 2)


@pytest.mark.parametrize("width", [1, 9], ids=["one-split", "splits"])
def test_a_sequence_without_a_context_gives_zeros(width, device, short_splits):
    """The padding of a captured graph: a query each, no keys, and a table of anything."""
    case = Sliced(device, [0, 5, 0], [1, 1, 1], slice_tokens=64, width=width)
    out = triton_tier.sliced_attention(*case.arguments(), 0.2, 0, 0.0)
    assert (out[0] == 0).all()
    assert (out[2] == 0).all()
    assert (out[1] != 0).any()


def test_a_decoded_token_has_the_same_bits_in_every_batch_and_for_every_order_of_slices(device, short_splits):
    lengths = [150, 3, 65]
    case = Sliced(device, lengths, [1, 1, 1], width=12)
    together = triton_tier.sliced_attention(*case.arguments(), 0.2, 0, 0.0)
    q, keys, values, table, context, _ = case.arguments()
    perm = torch.randperm(keys.shape[0])
    moved = torch.empty_like(perm).scatter_(0, perm, torch.arange(len(perm)))
    keys, values = keys[perm.to(device)], values[perm.to(device)]
    table = torch.where(table >= 0, moved.to(device)[table.clamp(min=0).long()].int(), table)
    for b in range(3):
        alone = (q[b : b + 1], keys, values, table[b : b + 1], context[b : b + 1], borders([1], device))
        assert torch.equal(triton_tier.sliced_attention(*alone, 0.2, 0, 0.0)[0], together[b])


def test_a_query_that_sees_itself_alone_gives_its_value_and_no_gradient_of_scores(device):
    inputs, grad = packed(device, [1, 40], 3, 1, 16, 24, F32)
    cu = borders([1, 40], device)
    attend = lambda *qkv: triton_tier.varlen_attention(*qkv, cu, 0.25, 1, 0.0)  # noqa: E731
    out, dq, dk, dv = with_gradients(attend, inputs, grad, F32)
    assert torch.equal(out, inputs[2].expand(-1, 3, -1))
    torch.testing.assert_close(dv, grad.sum(1, keepdim=True), rtol=1e-6, atol=1e-6)
    rounding = 1e-6 * grad.norm(dim=-1).max() * inputs[2].norm(dim=-1).max()  # of the dot products that cancel
    assert max(dq.abs().max(), dk.abs().max()) < rounding


def test_large_scores_do_not_overflow(device):
    inputs, _ = packed(device, [40], 2, 1, 16, 16, F32, factor=60.0)
    cu = borders([40], device)
    out = triton_tier.varlen_attention(*inputs, cu, 0.25, 0, 0.0)
    plain = naive.varlen_attention(*inputs, cu, 0.25)
    as_exact_as_plain("out", out, plain, naive.varlen_attention(*(x.double() for x in inputs), cu, 0.25), 2)
    case = Sliced(device, [70], [1], d=16, factor=60.0)
    out = triton_tier.sliced_attention(*case.arguments(), 0.25, 0, 0.0)
    plain, exact = (case.definition(dtype, 0.25, 0, 0.0) for dtype in (F32, F64))
    as_exact_as_plain("out", out, plain, exact, 2)


def test_a_sequence_of_nan_stays_alone_with_it_and_runs_repeat_their_bits(device):
    lengths = [20, 9, 40]
    inputs, grad = packed(device, lengths, 4, 2, 16, 16, F32)
    cu = borders(lengths, device)
    run = lambda: with_gradients(  # noqa: E731
        lambda *qkv: triton_tier.varlen_attention(*qkv, cu, 0.25, 0, 0.0), inputs, grad, F32
    )
    before, again = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))
    for x in inputs:
        x[20:29] = float("nan")
    for a, b in zip(before, run(), strict=True):
        assert torch.equal(a[:20], b[:20])
        assert torch.equal(a[29:], b[29:])
        assert b[20:29].isnan().all()


def test_the_public_op_goes_through_the_kernels_and_is_differentiable_once(device):
    inputs, _ = packed(device, [6, 3], 2, 1, 16, 16, F32)
    q, k, v = (x.requires_grad_() for x in inputs)
    out = public_varlen(q, k, v, borders([6, 3], device), window=4)
    assert "TritonVarlen" in type(out.grad_fn).__name__ or "triton" in out.grad_fn.name().lower()
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula|differentiable once"):
        torch.autograd.grad(grad.square().sum(), q)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, F16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("heads", "kv_heads", "d", "dv"), [
    (2, 1, 256, 256), (40, 1, 64, 64), (4, 2, 192, 128), (7, 1, 96, 96), (2, 2, 3, 2),
])  # fmt: skip
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (33, 4.0)])
def test_unusual_dims_and_groups(heads, kv_heads, d, dv, window, softcap, dtype, device, short_splits):
    shape = (heads, kv_heads, d, dv, window, softcap, dtype)
    if triton_tier.fits(d, dv, triton_tier.LEAST_DIM):
        test_packed_rows_and_their_gradients_match_the_definition(shape, device)
    for slice_tokens in (1, 16):
        test_rows_over_the_arena_match_the_definition(shape, slice_tokens, device, None)

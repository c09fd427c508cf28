"""Limits of the CPU's fused tier of linear_logprob: huge, masked and far-apart logits, mixed dtypes, no rows at all."""

import math

import pytest
import torch
from test_head_tiles import BF16, assert_right, inputs, tiles

from rlhf_kernels.ops.logprob import linear_logprob, naive


@tiles
@pytest.mark.parametrize("gap", [40.0, 59.0, 61.0, 100.0, 300.0])
def test_a_rival_in_the_tile_of_another_rows_target_does_not_overflow(gap):
    z = torch.randn(32, 700, generator=torch.Generator().manual_seed(3)).to(BF16)
    z[:, 640] += gap  # an even column; the tile holds some rows' targets
    hidden, weight = torch.eye(32).to(BF16), z.t().contiguous()
    target = torch.where(torch.arange(32) % 2 == 0, 645, 3)
    assert_right(hidden, weight, target, entropy=True)


@tiles
@pytest.mark.parametrize("size", [1e3, 1e6, 1e8, 1e10, 1e14])
def test_huge_logits_end_and_have_their_gradient(size):
    g = torch.Generator().manual_seed(4)
    weight = (torch.randn(700, 16, generator=g) * size).to(BF16)
    x = torch.eye(16).to(BF16).requires_grad_()
    target = torch.randint(700, (16,), generator=g)
    out = linear_logprob(x, weight, target, temperature=0.7, entropy=True)
    out.logprob.sum().backward()
    exact = naive.linear_logprob(x.detach().double(), weight.double(), target, temperature=0.7, entropy=True)
    top = weight[weight.double().argmax(0)]
    expected = torch.where((target == weight.double().argmax(0))[:, None], 0, (weight[target] - top).double() / 0.7)
    assert torch.allclose(out.logprob.double(), exact.logprob, rtol=3e-7, atol=3e-7 * float(exact.lse.detach().max()))
    if size >= 1e6:  # one column holds all the mass
        assert torch.allclose(x.grad.double(), expected, rtol=1e-2, atol=1e-2 * size)
    assert torch.isfinite(x.grad).all()


@tiles
@pytest.mark.parametrize("base", [20.0, 100.0, 500.0])
def test_a_logprob_of_large_logits_keeps_the_digits_of_their_difference(base):
    z = torch.zeros(64, 400, dtype=BF16)
    z[:, 7], z[:, 300] = base, base - 4
    hidden, weight, target = torch.eye(64).to(BF16), z.t().contiguous(), torch.full((64,), 300)
    x = hidden.clone().requires_grad_()
    out = linear_logprob(x, weight, target)
    exact = naive.linear_logprob(hidden.double(), weight.double(), target)
    assert torch.allclose(out.logprob.double(), exact.logprob, rtol=1e-7, atol=0)


@tiles
@pytest.mark.parametrize("temperature", [0.01, 0.7, 17.3, 300.0])
@pytest.mark.parametrize("kept", [slice(70, 300), slice(640, 700), slice(3, 20)], ids=str)
def test_masked_tokens_have_no_part_in_divergences_at_any_temperature(kept, temperature):
    hidden, weight, reference, target = inputs(40, 32, 700)
    bias = torch.full((700,), float("-inf"), dtype=BF16)
    bias[kept] = 0.5
    target = kept.start + target % (kept.stop - kept.start)
    options = {"temperature": temperature, "entropy": True, "divergence": ("kl", "rkl", "js")}
    x, few = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    out = linear_logprob(x, weight, target, bias=bias, ref_hidden=reference, **options)
    exact = naive.linear_logprob(
        few, weight[kept].double(), target - kept.start, bias=bias[kept].double(), ref_hidden=reference.double(),
        **options,
    )  # fmt: skip
    (out.logprob.sum() + exact.logprob.sum()).backward()
    for name in ("logprob", "lse", "entropy", "ref_logprob", "kl", "rkl", "js"):
        value, truth = getattr(out, name).double(), getattr(exact, name)
        assert torch.allclose(value, truth, rtol=1e-6, atol=4e-7 * (1 + float(exact.lse.abs().max()))), name
    assert (x.grad.double() - few.grad).norm() <= 1e-2 * few.grad.norm()


@tiles
def test_a_masked_target_has_a_logprob_of_minus_infinity_in_effect():
    hidden, weight, _, _ = inputs(4, 32, 700)
    bias = torch.zeros(700, dtype=BF16)
    bias[:70] = float("-inf")
    out = linear_logprob(hidden, weight, torch.tensor([10, 69, 100, 300]), bias=bias, entropy=True)
    assert (out.logprob[:2] < -1e29).all()
    assert (out.logprob[2:] > -100).all()
    assert torch.isfinite(out.entropy).all()


@tiles
def test_a_reference_that_moves_far_between_pivots_keeps_its_digits():
    z, zr = torch.zeros(400, dtype=BF16), torch.zeros(400, dtype=BF16)
    for column, own, other in ((5, 1, -4), (50, 2, -36), (140, 3, 16)):
        z[column], zr[column] = own, other
    hidden, weight = torch.eye(2).to(BF16), torch.stack([z, zr], 1)
    options = {"divergence": ("kl", "rkl"), "entropy": True}
    out = linear_logprob(hidden[:1], weight, torch.tensor([7]), ref_hidden=hidden[1:], **options)
    exact = naive.linear_logprob(
        hidden[:1].double(), weight.double(), torch.tensor([7]), ref_hidden=hidden[1:].double(), **options
    )
    for name in ("kl", "rkl", "logprob", "ref_logprob", "entropy"):
        assert torch.allclose(getattr(out, name).double(), getattr(exact, name), rtol=1e-6, atol=1e-12), name


@tiles
@pytest.mark.parametrize("gap", [300.0, 720.0, 2000.0])
@pytest.mark.parametrize("target", [5, 7, 100])
def test_a_reference_beyond_the_range_of_exp_gives_finite_divergences(gap, target):
    z, zr = torch.zeros(2, 400, dtype=BF16), torch.zeros(2, 400, dtype=BF16)
    z[:, 5], z[:, 200], zr[:, 5] = 1, 2, gap
    z[1, 7], zr[1, 7] = -gap, gap
    hidden, weight = torch.eye(4).to(BF16), torch.cat([z, zr]).t().contiguous()
    options = {"divergence": ("kl", "rkl"), "entropy": True}
    targets = torch.full((2,), target)
    out = linear_logprob(hidden[:2], weight, targets, ref_hidden=hidden[2:], **options)
    exact = naive.linear_logprob(
        hidden[:2].double(), weight.double(), targets, ref_hidden=hidden[2:].double(), **options
    )
    for name in ("kl", "rkl", "logprob", "ref_logprob", "entropy"):
        assert torch.allclose(getattr(out, name).double(), getattr(exact, name), rtol=2e-6, atol=1e-6), name


@tiles
def test_gradients_survive_weight_rows_that_resemble_each_other():
    g = torch.Generator().manual_seed(6)
    common = torch.randn(48, generator=g) * 10
    weight = (common + torch.randn(700, 48, generator=g) * 0.3).to(BF16)
    hidden, target = torch.randn(40, 48, generator=g).to(BF16), torch.randint(700, (40,), generator=g)
    assert_right(hidden, weight, target)
    assert_right(hidden, weight, target, softcap=30.0)


@pytest.mark.parametrize("hidden_dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weight_dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("reference_dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_half_and_single_dtypes_mix(hidden_dtype, weight_dtype, reference_dtype):
    hidden, weight, reference, target = inputs(9, 24, 350)
    hidden, weight, reference = hidden.to(hidden_dtype), weight.to(weight_dtype), reference.to(reference_dtype)
    for own in ({}, {"ref_weight": weight.to(reference_dtype)}):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_logprob(x, w, target, ref_hidden=reference, divergence=("kl",), **own)
        x64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
        own64 = {name: value.double() for name, value in own.items()}
        exact = naive.linear_logprob(x64, w64, target, ref_hidden=reference.double(), divergence=("kl",), **own64)
        (out.logprob.sum() + exact.logprob.sum()).backward()
        for name in ("logprob", "ref_logprob", "kl"):
            assert torch.allclose(getattr(out, name).double(), getattr(exact, name), rtol=1e-6, atol=1e-5), name
        for grad, truth in ((x.grad, x64.grad), (w.grad, w64.grad)):
            assert (grad.double() - truth).norm() <= 1e-2 * truth.norm()


def test_without_a_single_row_or_without_width_there_is_no_garbage():
    hidden, weight, _, _ = inputs(5, 40, 500)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    linear_logprob(x, w, torch.full((5,), -100)).logprob.sum().backward()
    assert not x.grad.any()
    assert not w.grad.any()
    out = linear_logprob(hidden[:, :0], weight[:, :0], torch.zeros(5, dtype=torch.long), entropy=True)
    assert torch.allclose(out.logprob, torch.full((5,), -math.log(500)), rtol=1e-6)

"""linear_logprob where digits are lost easily: sure and hopeless targets, small divergences, masked tokens, NaN."""

import math

import pytest
import torch
from head_cases import ALL_DIVERGENCES, F32, Case, logits_head

from rlhf_kernels.ops.logprob import linear_logprob, naive


@pytest.mark.parametrize("columns", [1, 1000])
@pytest.mark.parametrize("gap", [40.0, 59.0, 61.0, 86.0, 100.0, 300.0])
@pytest.mark.parametrize("late", [False, True], ids=["rivals first", "rivals last"])
def test_rivals_far_above_the_target_do_not_overflow(gap, columns, late):
    vocabulary = 9000
    z = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(1))
    z[0, (slice(-columns, None) if late else slice(0, columns))] += gap
    hidden, weight = logits_head(z)
    target = torch.tensor([4500])
    out = {}
    for name, function, cast in (("ours", linear_logprob, F32), ("exact", naive.linear_logprob, torch.float64)):
        for fields in (("logprob",), ("entropy",)):
            x = hidden.to(cast).detach().clone().requires_grad_()
            o = function(x, weight.to(cast), target, entropy=True, grad_fields=fields)
            (o.logprob.sum() if fields == ("logprob",) else o.entropy.sum()).backward()
            out[name, fields[0]] = (o.logprob.item(), o.entropy.item(), x.grad.double())
    for field in ("logprob", "entropy"):
        ours, exact = out["ours", field], out["exact", field]
        assert ours[0] == pytest.approx(exact[0], rel=5e-7)
        assert ours[1] == pytest.approx(exact[1], rel=5e-6, abs=1e-12)
        assert torch.allclose(ours[2], exact[2], rtol=2e-5, atol=5e-7 * gap)


@pytest.mark.parametrize("place", [0, 4500, 8999])
@pytest.mark.parametrize("gap", [14.0, 24.0, 40.0, 100.0])
def test_a_sure_target_keeps_the_digits_of_its_logprob_entropy_and_gradient(gap, place):
    z = torch.randn(1, 9000, generator=torch.Generator().manual_seed(2))
    z[0, place] = gap
    hidden, weight = logits_head(z)
    x = hidden.clone().requires_grad_()
    out = linear_logprob(x, weight, torch.tensor([place]), entropy=True)
    out.logprob.sum().backward()
    exact = hidden.double().requires_grad_()
    truth = naive.linear_logprob(exact, weight.double(), torch.tensor([place]), entropy=True)
    others = torch.cat([z[0, :place], z[0, place + 1 :]]).double()
    logprob = -(others.logsumexp(0) - gap).exp().log1p().item()
    assert out.logprob.item() == pytest.approx(logprob, rel=3e-6)
    assert out.entropy.item() == pytest.approx(truth.entropy.item(), rel=1e-5, abs=1e-14)
    p = (others - gap).exp() / (others - gap).exp().sum()
    gradient = -math.expm1(logprob) * (gap - (p * others).sum().item())
    assert x.grad.item() == pytest.approx(gradient, rel=1e-5)


@pytest.mark.parametrize("noise", [1.0, 1e-1, 1e-2, 1e-3, 3e-4])
@pytest.mark.parametrize("field", ["kl", "rkl", "js"])
def test_small_divergences_keep_their_digits(field, noise):
    g = torch.Generator().manual_seed(3)
    z = torch.randn(16, 9001, generator=g) * 3
    step = (noise * torch.randn(16, 9001, generator=g) * 2**20).round() / 2**20  # zr - z stays exact
    z = (z * 2**16).round() / 2**16
    both = torch.cat([z, z + step])
    hidden, weight = logits_head(both)
    target = torch.zeros(16, dtype=torch.long)
    out = linear_logprob(hidden[:16], weight, target, ref_hidden=hidden[16:], divergence=(field,))
    truth = naive.linear_logprob(
        hidden[:16].double(), weight.double(), target, ref_hidden=hidden[16:].double(), divergence=(field,)
    )
    value, exact = getattr(out, field).double(), getattr(truth, field)
    assert ((value - exact).abs() / exact).median() < 2e-4
    assert (value >= 0).all()


def test_divergences_of_equal_models_are_zero():
    case = Case(noise=0.0)
    out = linear_logprob(case.hidden, case.weight, case.target, ref_hidden=case.reference, divergence=ALL_DIVERGENCES)
    for name in ALL_DIVERGENCES:
        assert (getattr(out, name) == 0).all(), name


@pytest.mark.parametrize("gap", [50.0, 100.0, 200.0])
def test_models_that_live_on_different_tokens(gap):
    z = torch.zeros(2, 300)
    z[0, 5], z[1, 200] = gap, gap
    hidden, weight = logits_head(z)
    kw = {"ref_hidden": hidden[1:], "divergence": ("kl", "rkl", "js"), "entropy": True}
    out = linear_logprob(hidden[:1], weight, torch.tensor([7]), **kw)
    kw["ref_hidden"] = kw["ref_hidden"].double()
    truth = naive.linear_logprob(hidden[:1].double(), weight.double(), torch.tensor([7]), **kw)
    for name in ("kl", "rkl", "js", "logprob", "ref_logprob", "entropy"):
        assert getattr(out, name).item() == pytest.approx(getattr(truth, name).item(), rel=2e-6, abs=1e-12), name


@pytest.mark.parametrize("where", ["policy", "reference", "weight"])
def test_nan_passes_through_no_field(where):
    torch.manual_seed(0)
    hidden, ref, weight = torch.randn(3, 16), torch.randn(3, 16), torch.randn(40, 16)
    {"policy": hidden, "reference": ref, "weight": weight}[where][1, 2] = float("nan")
    fields = ("kl", "rkl", "js")
    out = linear_logprob(hidden, weight, torch.tensor([0, 5, 9]), entropy=True, ref_hidden=ref, divergence=fields)
    expected = [True] * 3 if where == "weight" else [False, True, False]
    own = () if where == "reference" else ("logprob", "entropy")
    for field in (*fields, *own):
        assert getattr(out, field).isnan().tolist() == expected, field


def test_masked_tokens_and_nan():
    x, w = torch.randn(3, 16), torch.randn(5000, 16)
    bias = torch.zeros(5000)
    bias[100:4900] = float("-inf")
    keep = torch.cat([torch.arange(100), torch.arange(4900, 5000)])
    out = linear_logprob(x, w, torch.tensor([0, 1, 2]), bias=bias, entropy=True)
    small = linear_logprob(x, w[keep], torch.tensor([0, 1, 2]), entropy=True)
    assert torch.allclose(out.logprob, small.logprob, atol=1e-6)
    assert torch.allclose(out.entropy, small.entropy, atol=1e-6)
    x[1] = float("nan")
    out = linear_logprob(x, w, torch.tensor([0, 1, 2]), entropy=True)
    assert out.logprob.isnan().tolist() == out.entropy.isnan().tolist() == [False, True, False]

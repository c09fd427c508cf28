"""linear_logprob where digits are lost easily: sure and hopeless targets, small divergences, masked tokens, NaN."""

import math

import pytest
import torch
from head_cases import ALL_DIVERGENCES, BF16, DISTRIBUTION_FIELDS, F32, Case, as_exact_as_plain, drawn, logits_head
from torch import Tensor

from rlhf_kernels.ops.logprob import linear_logprob, naive, native

pytestmark = pytest.mark.usefixtures("kernels", "device")


@pytest.fixture(params=["compiled", "pytorch"])
def row_passes(request, monkeypatch):
    """Both versions of the row passes: csrc's, and the PyTorch one of devices without a kernel."""
    if request.param == "pytorch":
        monkeypatch.setattr(native, "AVAILABLE", False)
    elif not native.AVAILABLE:
        pytest.skip("the compiled ops are not built")


@pytest.mark.usefixtures("row_passes")
@pytest.mark.parametrize("columns", [1, 1000])
@pytest.mark.parametrize("gap", [40.0, 59.0, 61.0, 86.0, 100.0, 300.0])
@pytest.mark.parametrize("late", [False, True], ids=["rivals first", "rivals last"])
def test_rivals_far_above_the_target_do_not_overflow(gap, columns, late):
    vocabulary = 9000
    z = drawn(1, vocabulary, seed=1)
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


@pytest.mark.usefixtures("row_passes")
@pytest.mark.parametrize("place", [0, 4500, 8999])
@pytest.mark.parametrize("gap", [14.0, 24.0, 40.0, 100.0])
def test_a_sure_target_keeps_the_digits_of_its_logprob_entropy_and_gradient(gap, place):
    z = drawn(1, 9000, seed=2)
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


@pytest.mark.usefixtures("row_passes")
@pytest.mark.parametrize("noise", [1.0, 1e-1, 1e-2, 1e-3, 3e-4])
@pytest.mark.parametrize("field", ["kl", "rkl", "js"])
def test_small_divergences_keep_their_digits(field, noise):
    z = drawn(16, 9001, seed=3) * 3
    step = (noise * drawn(16, 9001, seed=4) * 2**20).round() / 2**20  # zr - z stays exact
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


@pytest.mark.usefixtures("row_passes")
def test_divergences_of_equal_models_are_zero():
    case = Case(noise=0.0)
    out = linear_logprob(case.hidden, case.weight, case.target, ref_hidden=case.reference, divergence=ALL_DIVERGENCES)
    for name in ALL_DIVERGENCES:
        assert (getattr(out, name) == 0).all(), name


@pytest.mark.usefixtures("row_passes")
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


@pytest.mark.usefixtures("row_passes")
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


@pytest.mark.usefixtures("row_passes")
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


@pytest.mark.parametrize("rows", [3, 70])
def test_logprob_of_a_nearly_sure_target_from_bf16_inputs(rows):
    """Relative error below 1e-3 at logp = -1e-6, where bf16 logits, or an fp32 log_softmax, have no digit left."""
    case = Case(BF16, rows=rows, width=130, vocabulary=32000, p_y=1 - 1e-6, ignored=())
    exact, _ = case.run(naive.linear_logprob, lambda x: x.double(), at_once=16)
    assert ((exact["logprob"] < -2e-7) & (exact["logprob"] > -5e-6)).all()
    for cast in (Tensor.bfloat16, Tensor.float):  # the same numbers, by the kernels of either dtype
        out, _ = case.run(linear_logprob, cast)
        assert ((out["logprob"] - exact["logprob"]).abs() <= 1e-3 * exact["logprob"].abs()).all()
    plain, _ = case.run(naive.linear_logprob, lambda x: x, at_once=16)
    assert ((plain["logprob"] - exact["logprob"]).abs() > 1e-2 * exact["logprob"].abs()).any()


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("field", ["kl", "rkl"])
@pytest.mark.parametrize("step", ["one coordinate", "every coordinate"])
def test_small_divergences_from_bf16_inputs(rows, field, step):
    """Median relative error below 1e-3 at KL = 3e-5."""
    kl = {"kl": 3e-5} if step == "one coordinate" else {"noise": 0.0}
    case = Case(BF16, rows=rows, width=128, vocabulary=32000, sharpness=1.0, ignored=(), **kl)
    if step == "every coordinate":  # half of them by one unit in the last place
        moved = torch.where(drawn(rows, 128, seed=9) > 0, 1 + 2**-7, 1)
        case.reference = (case.hidden.float() * moved).to(BF16)
    exact, _ = case.run(naive.linear_logprob, lambda x: x.double(), at_once=16)
    assert 1e-5 < exact[field].median() < 1e-4
    out, _ = case.run(linear_logprob, lambda x: x)
    error = (out[field] - exact[field]).abs() / exact[field]
    assert error.median() < 1e-3
    assert (out[field] > 0).all()


RIVALS = {f"{n} x {gap}, {place}": (gap, columns) for gap in (40.0, 59.0, 61.0, 86.0, 100.0) for n, columns, place in (
    (1, slice(0, 1), "first"), (1, slice(-1, None), "last"),
    (1000, slice(0, 1000), "first"), (1000, slice(-1000, None), "last"),
)}  # fmt: skip


@pytest.mark.parametrize("rivals", RIVALS.values(), ids=RIVALS.keys())
def test_far_rivals_in_bf16_with_many_rows(rivals):
    as_exact_as_plain(dtype=BF16, rows=70, width=65, rivals=rivals, sharpness=1.0)
    as_exact_as_plain(dtype=BF16, rows=70, width=65, rivals=rivals, sharpness=1.0, grads=DISTRIBUTION_FIELDS)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("gap", [10.0, 20.0])
@pytest.mark.parametrize("place", [slice(7, 8), slice(-1, None)], ids=["first block", "last block"])
def test_entropy_where_another_token_than_the_target_is_likely(gap, place, dtype):
    case = Case(dtype, rows=70, width=64, rivals=(gap + 9, place), sharpness=1.0, ignored=())  # the rest weighs e^9
    exact, _ = case.run(naive.linear_logprob, lambda x: x.double())
    out, _ = case.run(linear_logprob, lambda x: x)
    assert exact["entropy"].median() < 100 * math.exp(-gap)
    assert ((out["entropy"] - exact["entropy"]).abs() <= 2e-5 * exact["entropy"]).all()
    as_exact_as_plain(dtype=dtype, rows=70, width=64, rivals=(gap + 9, place), sharpness=1.0, grads=("entropy", "kl"))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("save", ["grad_vector", "recompute", "logits"])
@pytest.mark.parametrize(("softcap", "logit_scale"), [(None, 0.0625), (5.0, 1.0), (30.0, 4.0), (3.0, -1.5)])
def test_gradients_under_a_softcap_and_a_logit_scale(softcap, logit_scale, save, dtype):
    """Each column has its own derivative, near 0 where the cap saturates."""
    as_exact_as_plain(
        dtype=dtype, rows=70, softcap=softcap, logit_scale=logit_scale, save=save, temperature="per row",
        train=save != "grad_vector", grads=("logprob",) if save == "grad_vector" else ("logprob", "entropy", "kl"),
    )  # fmt: skip


def test_a_row_of_zeros_in_the_weight_is_a_token_like_any_other():
    """A vocabulary padded to a round number: the padding has logit 0 and takes part in the sums."""
    case = Case(BF16, vocabulary=123, rows=70, ignored=())
    padded = torch.cat([case.weight, case.weight.new_zeros(5, case.weight.shape[1])])
    bare = linear_logprob(case.hidden, case.weight, case.target)
    out = linear_logprob(case.hidden, padded, case.target)
    assert torch.allclose(out.lse, torch.logaddexp(bare.lse, torch.tensor(5.0).log()), atol=1e-5)
    assert (out.logprob < bare.logprob).any()
    at_padding = linear_logprob(case.hidden, padded, torch.full_like(case.target, 125))
    assert torch.allclose(at_padding.logprob, -out.lse, atol=1e-5)


@pytest.mark.parametrize("column", [4992, 4993, 4998, 5001, 5002])
def test_a_far_rival_beside_the_target_is_seen(column):
    """Rival and targets within one tile of columns, each of them even and odd."""
    case = Case(BF16, rows=70, width=65, rivals=(90.0, slice(column, column + 1)), sharpness=1.0, ignored=())
    case.target = torch.tensor([c for c in range(4990, 5003) if c != column])[torch.arange(70) % 12]
    out, grads = case.run(linear_logprob, lambda x: x)
    exact, exact_grads = case.run(naive.linear_logprob, lambda x: x.double())
    assert torch.allclose(out["logprob"].double(), exact["logprob"], rtol=1e-6)
    assert (grads["hidden"] - exact_grads["hidden"]).norm() <= 5e-3 * exact_grads["hidden"].norm()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("gap", [10.0, 20.0, 40.0, 55.0])
def test_a_late_top_token_that_the_reference_finds_unlikely(gap, dtype):
    """The sums move to a new pivot whose log ratio is far from the old one's, in both directions."""
    z = drawn(70, 2000, seed=1)
    zr = z + 0.1 * drawn(70, 2000, seed=2)
    z[:, 1500] += gap
    zr[:, 500] += gap
    both = torch.cat([z, zr]).to(dtype)
    hidden, weight = logits_head(both)
    hidden, target = hidden.to(dtype), torch.arange(70)
    kw = {"entropy": True, "divergence": ("kl", "rkl", "js")}
    out = linear_logprob(hidden[:70], weight, target, ref_hidden=hidden[70:], **kw)
    exact = naive.linear_logprob(
        hidden[:70].double(), weight.double(), target, ref_hidden=hidden[70:].double(), **kw
    )  # fmt: skip
    for name in ("logprob", "ref_logprob", "kl", "rkl", "js", "entropy"):
        truth = getattr(exact, name)
        assert ((getattr(out, name) - truth).abs() <= 2e-6 * truth.abs() + 1e-12).all(), name

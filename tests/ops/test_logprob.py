"""logprob over logits that are already there, against its float64 definition."""

import pytest
import torch

from rlhf_kernels.ops.logprob import logits as logits_op
from rlhf_kernels.ops.logprob import logprob, naive

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(function, logits, target, upstream, **options):
    x = logits.detach().clone().requires_grad_()
    out = function(x, target, **options)
    loss = sum((getattr(out, name) * g).sum() for name, g in upstream.items())
    loss.backward()
    return out, x.grad


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("vocabulary", [1, 123, 5003, 9000])
@pytest.mark.parametrize("fields", [("logprob",), ("entropy",), ("logprob", "lse", "entropy")], ids="+".join)
def test_values_and_gradients_follow_the_definition(dtype, vocabulary, fields):
    g = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(9, vocabulary, generator=g) * 5).to(dtype)
    target = torch.randint(vocabulary, (9,), generator=g)
    target[4] = -100
    upstream = {name: torch.randn(9, generator=g) for name in fields}
    temperature = torch.rand(9, generator=g) + 0.5
    options = {"temperature": temperature, "entropy": True}
    out, grad = run(logprob, logits, target, upstream, **options)
    exact, exact_grad = run(naive.logprob, logits.double(), target, upstream, **options)
    for name in out._fields:
        truth = getattr(exact, name)
        assert getattr(out, name).dtype == torch.float32
        assert ((getattr(out, name) - truth).abs() <= 4e-7 * (1 + truth.abs())).all(), name
    assert grad.dtype == dtype
    unit = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    assert (grad - exact_grad).norm() <= unit * exact_grad.norm() + 1e-12
    assert (grad[4] == 0).all()
    assert out.logprob[4] == out.lse[4] == out.entropy[4] == 0


@pytest.mark.parametrize("gap", [14.0, 40.0, 100.0, -40.0, -100.0])
def test_a_dominant_token_keeps_digits(gap):
    logits = torch.randn(1, 9000, generator=torch.Generator().manual_seed(0))
    logits[0, 77] += gap
    out, grad = run(logprob, logits, torch.tensor([77]), {"logprob": torch.ones(1)}, entropy=True)
    rest = torch.cat([logits[0, :77], logits[0, 78:]]).double().logsumexp(0)
    exact = -torch.nn.functional.softplus(rest - logits[0, 77].double())
    exact = exact if exact != 0 else -(rest - logits[0, 77].double()).exp()
    assert out.logprob.item() == pytest.approx(exact.item(), rel=3e-6)
    assert grad[0, 77].item() == pytest.approx(-torch.expm1(exact).item(), rel=3e-6)


def test_inplace_backward_overwrites_the_logits_with_their_gradient():
    logits, target = torch.randn(6, 500), torch.arange(6)
    upstream = {"logprob": torch.randn(6)}
    _, wanted = run(logprob, logits, target, upstream)
    leaf = logits.clone().requires_grad_()
    held = leaf * 1
    logprob(held, target, inplace_backward=True).logprob.backward(upstream["logprob"])
    assert torch.equal(leaf.grad, wanted)
    assert torch.equal(held.detach(), wanted)


def test_rows_may_be_strided_and_dimensions_leading():
    base = torch.randn(4, 3, 700, requires_grad=True)
    target = torch.randint(300, (3, 4), dtype=torch.int32)
    out = logprob(base[..., 100:400].transpose(0, 1), target, inplace_backward=True)
    out.logprob.sum().backward()
    whole = naive.logprob(base.detach()[..., 100:400].transpose(0, 1).double(), target)
    assert torch.allclose(out.logprob.double(), whole.logprob, atol=1e-5)
    assert (base.grad[..., :100] == 0).all()
    assert base.grad[..., 100:400].abs().sum() > 0


@pytest.mark.parametrize("shape", [(0, 10), (2, 0, 10)])
def test_no_rows(shape):
    logits = torch.randn(shape, requires_grad=True)
    out = logprob(logits, torch.zeros(shape[:-1], dtype=torch.long), entropy=True)
    out.logprob.sum().backward()
    assert out.logprob.shape == out.entropy.shape == shape[:-1]
    assert logits.grad.shape == shape


@pytest.mark.parametrize("best", [1, 20], ids=["target-on-top", "another-on-top"])
def test_nan_stays_in_its_row(best):
    logits = torch.randn(3, 50)
    logits[1, best] = 9.0
    logits[1, 7] = float("nan")
    assert logprob(logits, torch.arange(3)).logprob.isnan().tolist() == [False, True, False]


def test_opcheck():
    arguments = (torch.randn(5, 30, requires_grad=True), torch.arange(5), torch.ones(5), -100, False)
    torch.library.opcheck(logits_op.forward, arguments)


def test_torch_compile_in_one_graph():
    def loss(logits, target):
        out = logprob(logits, target, entropy=True, temperature=0.9)
        return (out.logprob + 0.1 * out.entropy).sum()

    x, y = torch.randn(5, 40, requires_grad=True), torch.arange(5)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (a,) = torch.autograd.grad(loss(x, y), x)
    (b,) = torch.autograd.grad(compiled(x, y), x)
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": torch.tensor([0, 10])}, IndexError, "target holds 10"),
        ({"target": torch.tensor([0, -1])}, IndexError, "target holds -1"),
        ({"target": torch.zeros(2)}, TypeError, "target has dtype"),
        ({"target": torch.tensor([0])}, ValueError, "target has shape"),
        ({"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ({"temperature": torch.zeros(2)}, ValueError, "temperature holds 0.0"),
        ({"logits": torch.zeros(2, 10, dtype=torch.long)}, TypeError, "logits must be"),
    ],
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        logprob(**{"logits": torch.randn(2, 10), "target": torch.tensor([0, 1]), **options})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_half_number_is_read_exactly_and_gradients_round_to_nearest(dtype):
    """A vocabulary of one: lse is the logit itself, and the logit's gradient is lse's upstream gradient."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.float().abs() < 1e29]
    target = torch.zeros(len(every), dtype=torch.long)
    assert torch.equal(logprob(finite[:, None], target[: len(finite)]).lse, finite.float())
    nan = every[every.isnan()]
    assert logprob(nan[:, None], target[: len(nan)]).lse.isnan().all()
    wide = finite.float()
    between = (wide + wide.roll(1)) / 2  # ties, and with them both sides of each
    upstream = torch.cat([between, between.nextafter(-between), between.nextafter(between * 2), nan.float()])
    leaf = torch.zeros(len(upstream), 1, dtype=dtype, requires_grad=True)
    logprob(leaf, torch.zeros(len(upstream), dtype=torch.long)).lse.backward(upstream)
    assert torch.equal(leaf.grad[:, 0].nan_to_num(7.0), upstream.to(dtype).nan_to_num(7.0))

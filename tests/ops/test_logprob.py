"""logprob over logits that are already there, against its float64 definition."""

import shutil

import pytest
import torch
from head_cases import BF16, F16, F32, NORM_BOUND, available_bytes, drawn, identify, pairwise, poisoned_memory

from rlhf_kernels.ops.logprob import logits as logits_op
from rlhf_kernels.ops.logprob import logprob, naive

pytestmark = pytest.mark.usefixtures("device")

FIELDS = ("logprob", "lse", "entropy")


def run(function, logits, target, upstream, **options):
    x = logits.detach().clone().requires_grad_()
    out = function(x, target, **options)
    loss = sum((getattr(out, name) * g).sum() for name, g in upstream.items())
    if upstream:
        loss.backward()
    return out, x.grad


def run_by_rows(logits, target, upstream, temperature, cast):
    """The definition on a few rows at a time: fields by name [N], gradient [N, V]."""
    step, fields, grads = max(1, (1 << 22) // logits.shape[1]), [], []
    for start in range(0, max(1, len(target)), step):
        part = slice(start, start + step)
        heat = temperature[part] if isinstance(temperature, torch.Tensor) else temperature
        shares = {name: g[part] for name, g in upstream.items()}
        out, grad = run(naive.logprob, cast(logits[part]), target[part], shares, temperature=heat, entropy=True)
        fields.append([field.detach() for field in out])
        grads.append(grad)
    return {name: torch.cat(x) for name, x in zip(FIELDS, zip(*fields))}, torch.cat(grads)


FACTORS = {
    "dtype": (F32, BF16, F16),
    "p_y": (None, 1e-9, 0.5, 0.9998, 1),
    "shift": (0.0, -60.0),
    "temperature": (1.0, 0.625, "per row"),
    "ignored": ((), (0, 3, 5)),
    "grads": (("logprob",), ("entropy",), ("lse",), FIELDS),
    "upstream": ("signed", "first zero", "first absent", "all zero"),
    "inplace": (False, True),
}
QUICK = {"vocabulary": (1, 123, 5003, 9000), "rows": (1, 7, 128), **FACTORS}
WHOLE = {"vocabulary": (123, 5003, 32000, 50257, 128256, 151936), "rows": (1, 7, 128, 1937), **FACTORS}


def possible(row: dict) -> bool:
    return not (
        (row["rows"] > 128 and row["vocabulary"] > 32000)
        or (row["vocabulary"] == 1 and row["p_y"] is not None)
        or (row["upstream"] == "first absent" and len(row["grads"]) == 1)
    )


def as_exact_as_plain(vocabulary, rows, dtype, p_y, shift, temperature, ignored, grads, upstream, inplace) -> None:
    """The error rule of `head_cases`; the logits are given, so the plain formula errs by its own sums alone."""
    with torch.device("cpu"):
        logits = drawn(rows, vocabulary, seed=vocabulary) * 4 + shift
        target = torch.arange(rows) * 7919 % vocabulary
        if p_y is not None:
            odds = 35.0 if p_y == 1 else float(torch.tensor(p_y, dtype=torch.float64).logit())
            rest = logits.scatter(1, target[:, None], float("-inf")).logsumexp(1, keepdim=True)
            logits.scatter_(1, target[:, None], rest + odds)
        target[[row for row in ignored if row < rows]] = -100
        heat = drawn(rows, seed=1).abs() + 0.5 if temperature == "per row" else temperature
        given = {name: drawn(rows, seed=i) for i, name in enumerate(grads)}
    for name in grads if upstream == "all zero" else grads[:1] if upstream == "first zero" else ():
        given[name].zero_()
    if upstream == "first absent":
        del given[grads[0]]
    device = torch.get_default_device()
    logits, target = logits.to(dtype).to(device), target.to(device)
    heat = heat.to(device) if isinstance(heat, torch.Tensor) else heat
    given = {name: g.to(device) for name, g in given.items()}
    with poisoned_memory():
        out, grad = run(logprob, logits, target, given, temperature=heat, entropy=True, inplace_backward=inplace)
    exact, exact_grad = run_by_rows(logits, target, given, heat, lambda x: x.double())
    plain, plain_grad = run_by_rows(logits, target, given, heat, lambda x: x)
    for name, truth in exact.items():
        value = getattr(out, name)
        error, allowed = (value - truth).abs(), (plain[name] - truth).abs()
        assert value.dtype == F32
        assert value.isfinite().all(), name
        floor = 2e-7 * (1 + truth.abs())
        assert (error <= torch.maximum(2 * allowed.max(), floor)).all(), name
        error = torch.where(error <= floor, 0, error)
        assert error.norm() <= max(1e-5 * truth.norm(), 2 * allowed.norm()), name
        assert (value[target == -100] == 0).all()
    assert grad.dtype == dtype
    assert grad.isfinite().all()
    assert (grad[target == -100] == 0).all()
    error, allowed = (grad - exact_grad).norm(), (plain_grad - exact_grad).norm()
    assert error <= max(3 * allowed, 1e-6 * exact_grad.norm())
    assert error <= max(NORM_BOUND[dtype] * exact_grad.norm(), 2 * allowed)


@pytest.mark.parametrize("options", pairwise(QUICK, possible), ids=identify)
def test_values_and_gradients_follow_the_definition(options):
    as_exact_as_plain(**options)


@pytest.mark.slow
@pytest.mark.parametrize("options", pairwise(WHOLE, possible), ids=identify)
def test_the_whole_matrix(options):
    as_exact_as_plain(**options)


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.skipif(available_bytes() < 12 << 30, reason="needs 12 GiB of free memory")
def test_more_than_2_to_the_31_logits():
    vocabulary, rows = 128_256, 16_900
    logits = drawn(64, vocabulary).to(BF16).repeat(rows // 64 + 1, 1)[:rows]
    assert logits.numel() > 2**31
    logits[-64:] = (drawn(64, vocabulary, seed=1) * 3).to(BF16)
    last = logits[-64:].clone()
    target = torch.arange(rows) % vocabulary
    held = logits.requires_grad_() * 1
    out = logprob(held, target, entropy=True, inplace_backward=True)
    (grad,) = torch.autograd.grad(out.logprob.sum(), logits)
    exact, exact_grad = run_by_rows(last, target[-64:], {"logprob": torch.ones(64)}, 1.0, lambda x: x.double())
    for name in FIELDS:
        assert torch.allclose(getattr(out, name)[-64:].double(), exact[name], rtol=1e-6)
    assert (grad[-64:] - exact_grad).norm() <= 1e-2 * exact_grad.norm()
    assert torch.equal(out.lse[:64], out.lse[64:128])


@pytest.mark.parametrize("field", FIELDS)
def test_gradcheck_in_float64(field):
    target, heat = torch.tensor([0, 4, -100]), torch.tensor([0.7, 1.3, 1.0])
    logits = drawn(3, 5).double().requires_grad_()

    def definition(z):
        return getattr(naive.logprob(z, target, temperature=heat, entropy=True), field)

    assert torch.autograd.gradcheck(definition, logits)
    _, ours = run(logprob, logits, target, {field: torch.ones(3)}, temperature=heat, entropy=True)
    assert torch.allclose(ours, torch.autograd.grad(definition(logits).sum(), logits)[0])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(dtype):
    logits, target = (drawn(37, 9001) * 3).to(dtype), torch.arange(37)
    upstream = {name: drawn(37, seed=i) for i, name in enumerate(FIELDS)}
    whole, grad = run(logprob, logits, target, upstream, entropy=True)
    again, grad_again = run(logprob, logits, target, upstream, entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, again))
    assert torch.equal(grad, grad_again)
    for rows in (slice(5, 6), slice(30, 37), torch.arange(36, -1, -1)):
        shares = {name: g[rows] for name, g in upstream.items()}
        part, part_grad = run(logprob, logits[rows], target[rows], shares, entropy=True)
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole))
        assert torch.equal(part_grad, grad[rows])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("gap", [14.0, 40.0, 100.0, -40.0, -100.0])
def test_a_dominant_token_keeps_digits(gap):
    logits = drawn(1, 9000)
    logits[0, 77] += gap
    out, grad = run(logprob, logits, torch.tensor([77]), {"logprob": torch.ones(1)}, entropy=True)
    rest = torch.cat([logits[0, :77], logits[0, 78:]]).double().logsumexp(0)
    exact = -torch.nn.functional.softplus(rest - logits[0, 77].double())
    exact = exact if exact != 0 else -(rest - logits[0, 77].double()).exp()
    assert out.logprob.item() == pytest.approx(exact.item(), rel=3e-6)
    assert grad[0, 77].item() == pytest.approx(-torch.expm1(exact).item(), rel=3e-6)


@pytest.mark.usefixtures("kernels")
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


BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_in_one_graph_with_dynamic_rows(backend):
    def loss(logits, target):
        out = logprob(logits, target, entropy=True, temperature=0.9)
        return (out.logprob + 0.1 * out.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for rows in (5, 9):
        x, y = torch.randn(rows, 40, requires_grad=True), torch.arange(rows)
        with torch.compiler.set_stance("default" if rows == 5 else "fail_on_recompile"):
            (found,) = torch.autograd.grad(compiled(x, y), x)
        assert torch.allclose(found, torch.autograd.grad(loss(x, y), x)[0], atol=1e-6)


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
@pytest.mark.host
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

"""linear_logprob and logprob as a whole through their Triton row kernels: the quick cases of the ops' own tests."""

import head_cases
import pytest
import torch
from head_cases import BF16, DISTRIBUTION_FIELDS, F16, as_exact_as_plain, logits_head
from test_linear_logprob import QUICK

from rlhf_kernels import linear_logprob, logprob
from rlhf_kernels.ops.logprob import naive, sweep, triton_logits, triton_rows

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def _by_blocks(monkeypatch):
    """No fused tier: the blocks' row passes are what is tested here."""
    monkeypatch.setattr(sweep, "fused", lambda head: None)


@pytest.fixture
def launched(monkeypatch):
    """The names of the Triton kernels that have run."""
    names = []
    kernels = [triton_rows.stats_kernel, triton_rows.exp_kernel, triton_rows.js_kernel, triton_rows.grad_kernel]
    kernels += [triton_logits.forward_kernel, triton_logits.backward_kernel]
    for kernel in kernels:
        run = kernel.run

        def noted(*args, _name=kernel.fn.__name__, _run=run, **options):
            names.append(_name)
            return _run(*args, **options)

        monkeypatch.setattr(kernel, "run", noted)
    return names


def in_half(options):
    """bf16 as fp16: the interpreter rounds bf16 towards zero."""
    return {**options, "dtype": F16} if options.get("dtype") == BF16 else options


@pytest.mark.parametrize("options", QUICK.values(), ids=QUICK.keys())
def test_linear_logprob_follows_its_definition(device, monkeypatch, launched, options):
    monkeypatch.setattr(head_cases, "POOLED_ROWS", 1)  # the interpreter takes 5 ms a row and pass
    with device:
        as_exact_as_plain(**{**in_half(options), "rows": min(9, options.get("rows", 9))})
    assert "stats_kernel" in launched


@pytest.mark.slow
@pytest.mark.parametrize("options", [QUICK[name] for name in ("softcap", "lora", "every field", "far reference")])
def test_linear_logprob_follows_its_definition_over_many_rows(device, options):
    with device:
        as_exact_as_plain(**in_half(options))


def test_every_head_kernel_takes_part(device, monkeypatch, launched):
    monkeypatch.setattr(head_cases, "POOLED_ROWS", 1)
    with device:
        as_exact_as_plain(grads=DISTRIBUTION_FIELDS, train=True, vocabulary=300, rows=6)
        as_exact_as_plain(vocabulary=300, rows=6)
    assert set(launched) == {"stats_kernel", "exp_kernel", "js_kernel", "grad_kernel"}


@pytest.mark.parametrize("columns", [1, 500])
@pytest.mark.parametrize("gap", [40.0, 61.0, 100.0, 300.0])
@pytest.mark.parametrize("late", [False, True], ids=["rivals first", "rivals last"])
def test_rivals_far_above_the_target_do_not_overflow(device, gap, columns, late):
    z = torch.randn(1, 5003, generator=torch.Generator().manual_seed(1))
    z[0, (slice(-columns, None) if late else slice(0, columns))] += gap
    hidden, weight = (x.to(device) for x in logits_head(z))
    target = torch.tensor([2500], device=device)
    x = hidden.clone().requires_grad_()
    out = linear_logprob(x, weight, target, entropy=True)
    out.logprob.sum().backward()
    exact = hidden.double().requires_grad_()
    truth = naive.linear_logprob(exact, weight.double(), target, entropy=True)
    truth.logprob.sum().backward()
    assert out.logprob.item() == pytest.approx(truth.logprob.item(), rel=5e-7)
    assert out.entropy.item() == pytest.approx(truth.entropy.item(), rel=5e-6, abs=1e-12)
    assert torch.allclose(x.grad.double(), exact.grad, rtol=2e-5, atol=5e-7 * gap)


def compare(device, logits, target, **options):
    """logprob's values and gradients, and the float64 definition's, for random upstream gradients."""
    upstream = torch.randn(3, *target.shape, generator=torch.Generator().manual_seed(9)).to(device)
    results = []
    for function, cast in ((logprob, lambda x: x), (naive.logprob, lambda x: x.double())):
        x = cast(logits.to(device)).detach().requires_grad_()  # in its memory order
        out = function(x, target.to(device), entropy=True, **options)
        sum((f * g).sum() for f, g in zip(out, upstream)).backward()
        results.append(([f.detach().double().cpu() for f in out], x.grad.double().cpu()))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (7, 5), (7, 123), (3, 4096), (2, 5003), (1, 9001)])
def test_logprob_over_logits_follows_its_definition(device, launched, dtype, rows, vocabulary):
    g = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(rows, vocabulary, generator=g) * 5).to(dtype)
    target = torch.randint(vocabulary, (rows,), generator=g)
    target[0] = logits[0].argmax()
    if rows > 3:
        target[3] = -100
    (ours, grad), (truth, exact_grad) = compare(
        device, logits, target, temperature=(torch.rand(rows, generator=g) + 0.5).to(device)
    )
    for a, b in zip(ours, truth):
        assert ((a - b).abs() <= 4e-7 * (1 + b.abs())).all()
    unit = {torch.float32: 1e-6, BF16: 8e-3, torch.float16: 1e-3}[dtype]  # one bf16 step: towards zero, see conftest
    assert (grad - exact_grad).norm() <= unit * exact_grad.norm() + 1e-12
    assert launched == ["forward_kernel", "backward_kernel"]


@pytest.mark.parametrize("gap", [14.0, 40.0, 80.0, 300.0, -40.0, -300.0])
@pytest.mark.parametrize("place", [0, 4500, 8999])
def test_a_dominant_token_keeps_digits(device, gap, place):
    logits = torch.randn(1, 9000, generator=torch.Generator().manual_seed(0))
    logits[0, place] += gap
    (ours, _), _ = compare(device, logits, torch.tensor([place]))
    z = logits[0].double()
    rest = torch.cat([z[:place], z[place + 1 :]]).logsumexp(0)
    odds = (rest - z[place]).item()
    exact = -torch.nn.functional.softplus(torch.tensor(odds, dtype=torch.float64), threshold=1000).item()
    assert ours[0].item() == pytest.approx(exact, rel=3e-6, abs=1e-37)
    x = (z - z.max())[torch.arange(9000) != z.argmax()]
    r, u = x.exp().sum(), (x.exp() * x).sum()
    assert ours[2].item() == pytest.approx((r.log1p() - u / (1 + r)).item(), rel=1e-5, abs=1e-36)


@pytest.mark.parametrize("rising", [True, False])
def test_a_row_whose_top_token_changes_at_every_tile(device, rising):
    tile = triton_logits.FORWARD[0]
    logits = torch.randn(2, 3 * tile + 5, generator=torch.Generator().manual_seed(5))
    steps = torch.arange(logits.shape[1]) // tile
    logits += 2.0 * (steps if rising else -steps)
    logits[1, ::7] = logits[1].max()  # many tokens share the top
    (ours, grad), (truth, exact_grad) = compare(device, logits, torch.tensor([7, 14]))
    for a, b in zip(ours, truth):
        assert ((a - b).abs() <= 4e-7 * (1 + b.abs())).all()
    assert (grad - exact_grad).norm() <= 1e-6 * exact_grad.norm()


def test_logits_in_any_memory_order(device):
    g = torch.Generator().manual_seed(6)
    target = torch.tensor([3, 1, 4, 1, 5])
    for logits in (torch.randn(300, 5, generator=g).t(), torch.randn(5, 400, generator=g)[:, :300]):
        assert not logits.is_contiguous()
        (ours, grad), (truth, exact_grad) = compare(device, logits, target)
        assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(ours, truth))
        assert (grad - exact_grad).norm() <= 1e-6 * exact_grad.norm()


def test_inplace_backward_overwrites_the_logits_with_their_gradient(device):
    logits, target = torch.randn(6, 500, device=device), torch.arange(6, device=device)
    target[2] = -100
    wanted = logits.clone().requires_grad_()
    logprob(wanted, target).logprob.sum().backward()
    leaf = logits.clone().requires_grad_()
    logprob(leaf, target, inplace_backward=True).logprob.sum().backward()
    assert torch.equal(leaf.grad, wanted.grad)
    assert leaf.grad.data_ptr() == leaf.data_ptr()


def test_nan_and_masked_tokens(device):
    logits = torch.randn(5, 5000, generator=torch.Generator().manual_seed(8))
    logits[0, 4500] = NAN
    logits[1] = NAN
    logits[2, ::3] = -INF
    logits[3] = -INF
    logits[3, 4999] = 1.0
    x = logits.to(device).requires_grad_()
    out = logprob(x, torch.tensor([0, 0, 1, 4999, 7], device=device), entropy=True)
    sum(f.sum() for f in out).backward()
    for field in out:
        assert field[:2].isnan().all()
        assert torch.isfinite(field[2:]).all()
    assert x.grad[:2].isnan().all(1).tolist() == [True, True]
    assert not x.grad[2:].isnan().any()
    assert (x.grad[2, ::3] == 0).all()
    kept = torch.cat([logits[2, 1::3], logits[2, 2::3]]).double()
    assert out.lse[2].item() == pytest.approx(kept.logsumexp(0).item(), rel=1e-6)
    assert out.logprob[3] == 0
    assert out.entropy[3] == 0


def test_ignored_rows_are_zero_even_where_their_logits_are_nan(device):
    logits = torch.full((2, 50), NAN, device=device).requires_grad_()
    out = logprob(logits, torch.tensor([-100, -100], device=device), entropy=True)
    sum(f.sum() for f in out).backward()
    assert all((f == 0).all() for f in out)
    assert (logits.grad == 0).all()


@pytest.mark.slow
def test_more_rows_than_a_short_grid_axis_holds(device):
    logits = torch.randn(65_537, 3, generator=torch.Generator().manual_seed(9))
    target = torch.arange(65_537) % 3
    (ours, grad), (truth, exact_grad) = compare(device, logits, target)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(ours, truth))
    assert torch.allclose(grad, exact_grad, rtol=1e-5, atol=1e-6)

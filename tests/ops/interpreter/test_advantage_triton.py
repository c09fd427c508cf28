"""gae and masked_whiten through their Triton kernels: no further from float64 than the loops."""

import pytest
import torch

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.advantage import gae, masked_whiten, naive, triton_scan, triton_whiten, whiten

NAN = float("nan")
GAMMA, LAM = 0.99, 0.95


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """The interpreter takes a millisecond a scanned element; so short sequences have several blocks."""
    monkeypatch.setattr(triton_scan, "BLOCK", 16)
    monkeypatch.setattr(triton_whiten, "BLOCK", 64)
    monkeypatch.setattr(triton_whiten, "MOST_RUNS", 4)


@pytest.fixture(autouse=True)
def _on_the_device(device):
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


def flat(lengths, holes=False, dtype=torch.float32):
    """(rewards, values, mask, starts, last) of sequences of these lengths, end to end."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    rewards, values = torch.randn(2, int(starts[-1]), dtype=dtype)
    mask = torch.rand(len(rewards)) < 0.5 if holes else None
    return rewards, values, mask, starts, torch.randn(len(lengths), dtype=dtype)


def double(*tensors):
    return [x.double() if x is not None and x.is_floating_point() else x for x in tensors]


def near(found, plain, truth):
    """The test rule: at most twice the plain formula's error, or 2e-7 of the value."""
    for ours, theirs, exact in zip(found, plain, truth):
        error, allowed = (ours.double() - exact).abs(), 2 * (theirs.double() - exact).abs()
        assert (error <= torch.maximum(allowed, 2e-7 * (1 + exact.abs()))).all()


@pytest.mark.parametrize("holes", [False, True], ids=["whole", "holes"])
@pytest.mark.parametrize("lengths", [[1], [7, 0, 16], [40, 5, 17, 33]], ids=str)
def test_a_scan_gives_what_the_loop_gives(lengths, holes):
    inputs = flat(lengths, holes)
    near(
        triton_scan.gae(*inputs, GAMMA, LAM),
        naive.gae(*inputs, GAMMA, LAM),
        naive.gae(*double(*inputs), GAMMA, LAM),
    )
    _, _, mask, starts, _ = inputs
    grad = torch.randn(sum(lengths))
    near(
        triton_scan.gae_backward(grad, mask, starts, GAMMA, LAM),
        naive.gae_backward(grad, mask, starts, GAMMA, LAM),
        naive.gae_backward(grad.double(), mask, starts, GAMMA, LAM),
    )


@pytest.mark.parametrize(("gamma", "lam"), [(0.0, 0.5), (1.0, 0.0), (1.0, 1.0), (0.9, 0.7)])
def test_fp64_rows_agree_to_the_digits_of_fp64(gamma, lam):
    inputs = flat([20, 19], holes=True, dtype=torch.float64)
    for ours, truth in zip(triton_scan.gae(*inputs, gamma, lam), naive.gae(*inputs, gamma, lam)):
        torch.testing.assert_close(ours, truth, rtol=1e-13, atol=1e-13)


def test_gae_by_hand():
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, -1.0]])
    advantages, returns = gae(rewards, values, gamma=0.5, lam=0.5, last_value=torch.tensor([4.0]))
    assert advantages.tolist() == [[0.9375, -0.25, 5.0]]
    assert returns.tolist() == [[1.4375, 0.75, 4.0]]


def test_what_a_masked_token_holds_is_not_read():
    rewards, values, last = torch.randn(3, 20), torch.randn(3, 20), torch.randn(3)
    mask = torch.rand(3, 20) < 0.5
    mask[2] = False
    found = gae(rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN), mask, last_value=last)
    for one, other in zip(found, gae(rewards, values, mask, last_value=last)):
        assert torch.equal(one, other)
        assert not one[~mask].any()


def test_nan_goes_to_the_earlier_tokens_of_its_sequence_alone():
    rewards, values = torch.zeros(2, 40), torch.zeros(2, 40)
    rewards[0, 20] = NAN
    advantages, _ = gae(rewards, values)
    assert advantages.isnan()[0].tolist() == [True] * 21 + [False] * 19
    assert not advantages[1].isnan().any()


def test_gradients_flow_through_the_op():
    rewards, values, last = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((2, 4), (2, 4), (2,)))
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]])
    outputs = gae(rewards, values, mask, gamma=0.9, lam=0.8, last_value=last)
    torch.autograd.backward(outputs, [torch.ones(2, 4, dtype=torch.float64), torch.full((2, 4), 0.5).double()])
    found = [x.grad for x in (rewards, values, last)]
    starts = torch.tensor([0, 4, 8])
    leaves = [x.detach().clone().requires_grad_() for x in (rewards, values, last)]
    flat_rows = naive.gae(leaves[0].flatten(), leaves[1].flatten(), mask.bool().flatten(), starts, leaves[2], 0.9, 0.8)
    (flat_rows[0].sum() + 0.5 * flat_rows[1].sum()).backward()
    for ours, leaf in zip(found, leaves):
        torch.testing.assert_close(ours, leaf.grad, rtol=1e-12, atol=1e-12)


def test_sequences_that_reach_outside_the_tokens_touch_nothing_there():
    memory = torch.full((3, 30), 7.0)
    rewards, values = torch.randn(10), torch.randn(10)
    starts = torch.tensor([-5, 4, 25])
    advantages, returns = memory[:2, 10:20].unbind()
    triton_scan._launch(
        triton_scan.gae_kernel, rewards, values, None, starts, torch.zeros(2), advantages, returns,
        starts=starts, gamma=GAMMA, lam=LAM,
    )  # fmt: skip
    assert (memory[:2, :10] == 7).all()
    assert (memory[:2, 20:] == 7).all()


def test_the_lengths_may_be_zero_and_many():
    assert gae(torch.zeros(0, 5), torch.zeros(0, 5))[0].shape == (0, 5)
    assert gae(torch.zeros(3, 0), torch.zeros(3, 0))[0].shape == (3, 0)


# ---- masked_whiten ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 63, 500, 3000])
def test_moments_are_exact(size, dtype):
    x, mask = (torch.randn(size) * 0.01 + 100).to(dtype), torch.rand(size) < 0.7
    found = triton_whiten.moments(x.masked_fill(~mask, NAN), mask)
    kept = x[mask].double()
    mean = kept.mean() if len(kept) else torch.zeros((), dtype=torch.float64)
    wanted = torch.stack([mask.sum().double(), mean, ((kept - mean) ** 2).sum()])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_whitening_follows_the_definition(offset, shift_mean):
    x, mask = torch.randn(7, 43) * 3 + offset, torch.rand(7, 43) < 0.6
    found = masked_whiten(x.masked_fill(~mask, NAN), mask, shift_mean=shift_mean)
    kept = x[mask].double()
    wanted = (kept - kept.mean()) / (kept.var(unbiased=False) + 1e-8).sqrt() + (0.0 if shift_mean else kept.mean())
    assert found.dtype == torch.float32
    assert not found[~mask].any()
    torch.testing.assert_close(found[mask].double(), wanted, rtol=2e-7, atol=2e-7)


def test_no_or_one_valid_entry_gives_no_nan():
    x = torch.tensor([NAN, 3.0, NAN])
    assert masked_whiten(x, torch.tensor([0, 0, 0])).tolist() == [0, 0, 0]
    assert masked_whiten(x, torch.tensor([0, 1, 0])).tolist() == [0, 0, 0]
    assert masked_whiten(x, torch.tensor([0, 1, 0]), shift_mean=False).tolist() == [0, 3, 0]
    assert masked_whiten(torch.zeros(0)).shape == (0,)


def test_any_memory_order_and_any_number_of_runs_give_the_same_numbers(monkeypatch):
    x, mask = torch.randn(30, 20), torch.rand(30, 20) < 0.5
    found = masked_whiten(x, mask)
    assert torch.equal(masked_whiten(x.t().contiguous().t(), mask.t().contiguous().t()), found)
    assert torch.equal(masked_whiten(x, mask), found)
    monkeypatch.setattr(triton_whiten, "MOST_RUNS", 64)
    torch.testing.assert_close(masked_whiten(x, mask), found, rtol=2e-7, atol=2e-7)


def test_gradients_flow_where_x_requires_them():
    x, mask = torch.randn(5, 9, dtype=torch.float64), torch.rand(5, 9) < 0.7
    weights = torch.randn(5, 9, dtype=torch.float64)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    (masked_whiten(leaf, mask) * weights).sum().backward()
    kept = other[mask]
    (((kept - kept.mean()) / (kept.var(unbiased=False) + 1e-8).sqrt()) * weights[mask]).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-9, atol=1e-11)


def test_the_kernels_are_what_ran(device):
    assert registry.chosen("gae", device.type, torch.float32) == "triton"
    assert whiten._by_triton(torch.zeros(1, dtype=torch.bfloat16, device=device))


@pytest.mark.slow
def test_full_blocks(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "triton")
    inputs = flat([2100], holes=True)
    near(
        triton_scan.gae(*inputs, GAMMA, LAM),
        naive.gae(*inputs, GAMMA, LAM),
        naive.gae(*double(*inputs), GAMMA, LAM),
    )
    x, mask = torch.randn(10000), torch.rand(10000) < 0.5
    torch.testing.assert_close(triton_whiten.moments(x, mask)[1], x[mask].double().mean(), rtol=1e-10, atol=1e-12)

"""The head's Triton row passes against the PyTorch ones in float64, block by block; awkward sizes, extremes, NaN."""

import numpy as np
import pytest
import torch

from rlhf_kernels.ops.logprob import rows as exact_rows
from rlhf_kernels.ops.logprob import state as st
from rlhf_kernels.ops.logprob import triton_rows

F32, F64 = torch.float32, torch.float64
INF, NAN = float("inf"), float("nan")
SIZES = [(1, 1), (7, 5), (7, 123), (1, 4096), (3, 3000)]
SHAPING = {
    "plain": {},
    "temperature": {"temperature": "per row"},
    "everything": {"temperature": "per row", "softcap": 9.0, "scale": 1.3, "bias": True},
}


class Block:
    """A block's inputs on a device, the policy's and the reference's logits `noise` apart."""

    def __init__(self, device, rows, n, *, temperature=1.0, softcap=0.0, scale=1.0, bias=False, noise=0.3, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.z = torch.randn(rows, n, generator=g) * 4
        self.zr = self.z + noise * torch.randn(rows, n, generator=g)
        self.target = torch.randint(-n, 2 * n, (rows,), generator=g)  # often in another block
        self.target[0] = self.z[0].argmax()
        self.bias = torch.randn(n, generator=g) if bias else None
        self.temperature = torch.full((rows,), 1.0)
        if temperature == "per row":
            self.temperature = torch.rand(rows, generator=g) + 0.5
        self.softcap, self.scale = softcap, scale
        self.coefficients = torch.randn(10, rows, generator=g)
        self.device = device

    def on(self, dtype):
        """Copies of (z, zr, target, (bias, temperature, softcap, scale)): fp32 on the device, float64 on the CPU."""
        device = self.device if dtype == F32 else "cpu"
        put = lambda x: None if x is None else x.to(device, dtype, copy=True)  # noqa: E731
        shaping = (put(self.bias), put(self.temperature), self.softcap, self.scale)
        return put(self.z), put(self.zr), self.target.to(device), shaping


def both(run):
    """run(passes, dtype) by the Triton kernels in fp32 and by the PyTorch operations in float64, as float64."""
    ours, truth = run(triton_rows, F32), run(exact_rows, F64)
    return [x.double().cpu() for x in ours], [x.double() for x in truth]


def assert_close(ours, truth, rtol, atol):
    for index, (a, b) in enumerate(zip(ours, truth, strict=True)):
        assert torch.equal(a.isnan(), b.isnan()), index
        assert torch.equal(a.isinf(), b.isinf()), index
        assert torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True), (index, (a - b).abs().max().item())


def stats(block, kl=True, rkl=True, reference=True, raw=True):
    def run(passes, dtype):
        z, zr, target, shaping = block.on(dtype)
        state = torch.full((10, len(target)), 7.0, dtype=F64, device=z.device)  # poisoned
        passes.head_stats(z, zr if reference else None, target, *shaping, raw, kl, rkl, state)
        return [state, z, zr]

    return both(run)


@pytest.mark.parametrize("options", SHAPING.values(), ids=SHAPING)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_statistics(device, size, options):
    assert_close(*stats(Block(device, *size, **options)), rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize(("kl", "rkl", "reference"), [(0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)])
def test_statistics_that_are_not_asked_for_are_left_out(device, kl, rkl, reference):
    ours, truth = stats(Block(device, 3, 123), bool(kl), bool(rkl), bool(reference))
    assert_close(ours[:1], truth[:1], rtol=1e-6, atol=4e-6)


def test_transformed_logits_are_not_transformed_again(device):
    block = Block(device, 3, 123, softcap=9.0, scale=1.3, bias=True, temperature="per row")
    ours, truth = stats(block, raw=False)
    assert_close(ours, truth, rtol=1e-6, atol=4e-6)
    assert torch.equal(ours[1].float(), block.z)


def test_a_block_wider_than_a_program_is_taken_in_parts(device):
    block = Block(device, 3, 2 * triton_rows.STATS[0] + 77, bias=True)
    block.target = torch.tensor([5, triton_rows.STATS[0] + 5, 2 * triton_rows.STATS[0] + 76])
    assert_close(*stats(block), rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("noise", [1.0, 1e-1, 1e-2, 1e-3])
def test_small_divergences_keep_their_digits(device, noise):
    block = Block(device, 8, 4001)
    block.z = (block.z * 2**14).round() / 2**14
    step = noise * torch.randn(block.z.shape, generator=torch.Generator().manual_seed(1))
    block.zr = block.z + (step * 2**18).round() / 2**18  # zr - z stays exact
    ours, _ = stats(block)
    log_p, log_q = block.z.double().log_softmax(1), block.zr.double().log_softmax(1)
    for index, exact in ((st.KL, log_p.exp() * (log_p - log_q)), (st.RKL, log_q.exp() * (log_q - log_p))):
        assert torch.allclose(ours[0][index], exact.sum(1), rtol=2e-4, atol=0)


@pytest.mark.parametrize(
    ("gap", "is_target"), [(gap, True) for gap in (10.0, 40.0, 80.0)] + [(gap, False) for gap in (10.0, 80.0, 300.0)]
)
def test_a_sure_token_keeps_the_digits_of_the_rest(device, gap, is_target):
    block = Block(device, 1, 1001, noise=0.0)
    block.z = torch.randn(1, 1001, generator=torch.Generator().manual_seed(2))
    block.z[0, 500] = gap
    block.target = torch.tensor([500 if is_target else 7])
    ours, _ = stats(block, reference=False)
    z = block.z[0].double()
    others = torch.cat([z[:500], z[501:]])
    rest = others.logsumexp(0) if is_target else torch.cat([z[:7], z[8:]]).logsumexp(0)
    assert ours[0][st.REST].item() == pytest.approx(rest.item(), rel=1e-7, abs=1e-6)
    r, u = (others - gap).exp().sum(), ((others - gap).exp() * (others - gap)).sum()
    assert ours[0][st.ENTROPY].item() == pytest.approx((r.log1p() - u / (1 + r)).item(), rel=1e-5, abs=1e-30)


def test_a_reference_whose_mass_lies_elsewhere(device):
    block = Block(device, 2, 300)
    block.zr[:, 17] = block.z.max() + torch.tensor([61.0, 250.0])
    assert_close(*stats(block, rkl=False), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("n", [5, 1000, 5000])
def test_nan_reaches_every_statistic_of_its_row_and_no_other(device, n):
    block = Block(device, 4, n)
    block.z[0, n // 2] = NAN
    block.zr[1, n // 3] = NAN
    block.z[2] = NAN
    (state, *_), _ = stats(block)
    of_policy = [st.LSE, st.REST, st.ENTROPY, st.DIFFERENCE, st.KL, st.RKL]
    of_reference = [st.REF_LSE, st.REF_REST, st.DIFFERENCE, st.KL, st.RKL]
    assert state[of_policy][:, [0, 2]].isnan().all()
    assert state[of_reference][:, 1].isnan().all()
    assert not state[:, 3].isnan().any()


def test_masked_tokens_have_no_mass(device):
    block = Block(device, 4, 200)
    keep = torch.arange(200) % 3 == 0
    block.z[:, ~keep] = -INF
    block.zr[:, ~keep] = -INF
    block.target = torch.tensor([0, 3, 1, -1])
    (state, *_), _ = stats(block)
    log_p = block.z[:, keep].double().log_softmax(1)
    log_q = block.zr[:, keep].double().log_softmax(1)
    assert torch.allclose(state[st.LSE], block.z[:, keep].double().logsumexp(1), rtol=1e-6)
    assert torch.allclose(state[st.ENTROPY], -(log_p.exp() * log_p).sum(1), rtol=1e-6)
    assert torch.allclose(state[st.KL], (log_p.exp() * (log_p - log_q)).sum(1), rtol=1e-4)
    assert state[st.TARGET, 2] == pytest.approx(-1e30)


def test_a_row_of_masked_tokens_weighs_nothing_in_a_merge(device):
    block, other = Block(device, 2, 50), Block(device, 2, 50, seed=1)
    block.z[:], block.zr[:] = -INF, -INF
    (empty, *_), _ = stats(block)
    (full, *_), _ = stats(other)
    full[st.TARGET] = INF
    merged = st.merge(empty, full, True)
    assert torch.allclose(merged, full)


def exponentials(z_blocks, device, target, softcap=0.0, temperature=None):
    """head_exp over blocks in a row: everything it writes."""

    def run(passes, dtype):
        at = device if dtype == F32 else "cpu"
        rows = len(target)
        shift, factor = (torch.full((rows,), 7.0, dtype=dtype, device=at) for _ in range(2))
        mass = torch.zeros(rows, dtype=F64, device=at)
        target_z = torch.full((rows,), -INF, dtype=F64, device=at)
        t = torch.ones(rows) if temperature is None else temperature
        written, start = [], 0
        for z in z_blocks:
            block = z.to(at, dtype, copy=True)
            local = (target - start).to(at)
            first = start == 0
            t_here = t.to(at, dtype)
            passes.head_exp(block, local, None, t_here, softcap, 1.0, True, first, shift, mass, factor, target_z)
            written += [block, shift.clone(), mass.clone(), factor.clone(), target_z.clone()]
            start += z.shape[1]
        return written

    return both(run)


@pytest.mark.parametrize(("rows", "widths"), [(1, [1, 1]), (7, [5, 123]), (3, [4096, 700]), (2, [8192, 16])])
@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_exponentials(device, rows, widths, softcap):
    g = torch.Generator().manual_seed(3)
    blocks = [torch.randn(rows, n, generator=g) * 3 for n in widths]
    target = torch.randint(-1, sum(widths), (rows,), generator=g)
    temperature = torch.rand(rows, generator=g) + 0.5
    assert_close(*exponentials(blocks, device, target, softcap, temperature), rtol=8e-6, atol=1e-6)


@pytest.mark.parametrize("gap", [40.0, 59.0, 61.0, 86.0, 100.0, 300.0])
def test_a_later_block_far_above_the_first_raises_the_shift(device, gap):
    g = torch.Generator().manual_seed(4)
    blocks = [torch.randn(2, 200, generator=g) for _ in range(3)]
    for later in blocks[1:]:
        later[0] += gap + blocks[0][0].max() - later[0].max()
    ours, truth = exponentials(blocks, device, torch.tensor([3, 250]))
    assert_close(ours, truth, rtol=4e-5 if gap < 60 else 2e-6, atol=1e-30)
    assert bool(ours[8][0] < 1) == (gap > 60)
    assert all(torch.isfinite(x).all() for x in ours if x is not ours[4])


def test_nan_and_masked_tokens_in_exponentials(device):
    z = torch.randn(4, 40)
    z[0, 3] = NAN
    z[1, ::2] = -INF
    z[2] = -INF
    z[2, 7] = 1.0  # the target alone is not masked
    z[3] = NAN
    (e, shift, mass, _, _), _ = exponentials([z], device, torch.tensor([1, 1, 7, 1]))
    assert mass[[0, 3]].isnan().all()
    assert e[0, 3].isnan()
    assert (e[1, ::2] == 0).all()
    assert mass[1] == pytest.approx((z[1, 3::2].double() - shift[1]).exp().sum().item(), rel=1e-6)
    assert shift[2] < -1e29
    assert torch.isfinite(mass[1:3]).all()


def test_a_block_too_wide_for_exponentials_is_an_error(device):
    z = torch.zeros(1, triton_rows.EXP[0] + 1, device=device)
    one = torch.ones(1, device=device)
    with pytest.raises(ValueError, match="8193 columns"):
        triton_rows.head_exp(
            z, one.long(), None, one, 0.0, 1.0, True, True, one.clone(), one.double(), one.clone(), one.double()
        )


def normalised(block):
    """The row's normalisers for js and grad: lse as a sum of two fp32 [2, R], and the log ratio of the masses."""

    def z_of(x):
        x = x.double().clone()
        bias = None if block.bias is None else block.bias.double()
        exact_rows.transform(x, bias, block.temperature.double(), block.softcap, block.scale)
        return x

    lse, ref_lse = z_of(block.z).logsumexp(1), z_of(block.zr).logsumexp(1)
    high = lse.float()
    return torch.stack((high, (lse - high).float())), (ref_lse - lse).float()


@pytest.mark.parametrize("noise", [1e-2, 0.3, 8.0])
@pytest.mark.parametrize("options", SHAPING.values(), ids=SHAPING)
@pytest.mark.parametrize("size", [*SIZES, (2, 5003)], ids=str)
def test_js_sums(device, size, options, noise):
    block = Block(device, *size, noise=noise, **options)
    lse, ratio = normalised(block)

    def run(passes, dtype):
        z, zr, _, shaping = block.on(dtype)
        sums = torch.full((2, size[0]), 0.25, dtype=F64, device=z.device)
        at = {"device": z.device, "dtype": dtype}
        passes.head_js(z, zr, *shaping, True, lse.to(**at), ratio.to(**at), sums)
        return [sums]

    assert_close(*both(run), rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("options", SHAPING.values(), ids=SHAPING)
@pytest.mark.parametrize("size", [*SIZES, (2, 5003)], ids=str)
def test_gradients(device, size, options, reference):
    block = Block(device, *size, **options)
    lse, ratio = normalised(block)
    block.coefficients[:2], block.coefficients[2] = lse, ratio

    def run(passes, dtype):
        z, zr, target, shaping = block.on(dtype)
        c = block.coefficients.to(z.device, dtype)
        passes.head_grad(z, zr if reference else None, target, *shaping, True, c, torch.empty_like(z))
        return [z]

    assert_close(*both(run), rtol=2e-5, atol=4e-6)


def test_nan_reaches_its_own_gradient(device):
    block = Block(device, 2, 300)
    block.z[0, 5] = NAN
    lse, ratio = normalised(block)
    block.coefficients[:2], block.coefficients[2] = lse, ratio
    z, zr, target, shaping = block.on(F32)
    triton_rows.head_grad(z, zr, target, *shaping, True, block.coefficients.to(device), None)
    assert z[0].isnan().all()
    assert not z[1].isnan().any()


def test_no_rows_are_no_work(device):
    empty = Block(device, 1, 10)
    z, zr, target, shaping = empty.on(F32)
    state = torch.empty(10, 0, dtype=F64, device=device)
    triton_rows.head_stats(z[:0], zr[:0], target[:0], shaping[0], shaping[1][:0], 0.0, 1.0, True, True, True, state)


def test_rows_beyond_2_to_the_31_elements_are_reached(device, tmp_path):
    stride = 2**30
    size = 3 * stride + 64
    if device.type == "cuda":
        storage = torch.empty(size, device=device)
    else:
        storage = torch.from_numpy(np.memmap(tmp_path / "sparse", np.float32, "w+", shape=(size,)))
    z = storage.as_strided((4, 64), (stride, 1))
    z.copy_(torch.randn(4, 64))
    kept = z.clone().cpu()
    state = torch.empty(10, 4, dtype=F64, device=device)
    target = torch.tensor([1, 2, 3, 63], device=device)
    t = torch.full((4,), 2.0, device=device)
    triton_rows.head_stats(z, None, target, None, t, 0.0, 1.0, True, False, False, state)
    assert torch.allclose(state[st.LSE].cpu(), (kept.double() / 2).logsumexp(1), rtol=1e-6)
    assert torch.equal(z.cpu(), kept / 2)

"""The CUDA kernels of logprob(logits), run on the CPU, against float64 and against the CPU op."""

import cuda_host
import pytest
import torch

from rlhf_kernels import logprob
from rlhf_kernels.ops.logprob import logits as logits_module
from rlhf_kernels.ops.logprob import naive, native

pytestmark = pytest.mark.skipif(cuda_host.compiler_missing(), reason=f"{cuda_host.COMPILER} is not installed")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [F32, BF16, F16]
SHAPES = [(1, 1), (7, 5), (33, 123), (3, 4096), (2, 5003), (1, 40001)]  # the last two take several tiles
UNIT = {F32: 2e-6, BF16: 8e-3, F16: 1e-3}  # rounding of the gradient's dtype


@pytest.fixture(scope="module")
def passes():
    return cuda_host.HostPasses(cuda_host.compile_library("cuda_rows_on_host.cpp"))


@pytest.fixture
def on_cuda_kernels(passes, monkeypatch):
    """`logprob` with the CUDA kernels in the CPU ops' place."""
    monkeypatch.setattr(native, "logprob_rows", passes.logprob_rows)
    monkeypatch.setattr(native, "logprob_rows_backward", passes.logprob_rows_backward)
    monkeypatch.setattr(logits_module.registry, "choose", lambda op, tensor: "native")


def fields(passes, logits, target, temperature=None, ignore_index=-100):
    out = torch.full((5, len(target)), float("nan"))
    temperature = torch.ones(len(target)) if temperature is None else temperature
    passes.logprob_rows(logits, target, temperature, ignore_index, out)
    return out


def exact(logits, target, temperature=None):
    """The rows that the kernel writes, in float64 (the last one is what fp32 loses of lse)."""
    z = logits.double() / (torch.ones(len(target)) if temperature is None else temperature)[:, None]
    z = z.clamp(min=-1e30)
    out = naive.logprob(z, target, entropy=True)
    return torch.stack((out.logprob, out.lse, out.entropy, -out.logprob.expm1(), out.lse - out.lse.float()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fields_follow_the_definition(passes, shape, dtype):
    logits, target = (torch.randn(shape) * 3).to(dtype), torch.randint(shape[1], shape[:1])
    temperature = torch.rand(shape[0]) + 0.5
    out, truth = fields(passes, logits, target, temperature), exact(logits, target, temperature)
    for name in range(4):
        torch.testing.assert_close(out[name].double(), truth[name], rtol=2e-6, atol=5e-7)
    torch.testing.assert_close(out[1].double() + out[4], truth[1], rtol=1e-7, atol=3e-7)


@pytest.mark.parametrize("place", [0, 2500, 4999])
def test_a_sure_target_keeps_the_digits_of_logprob_and_entropy(passes, place):
    logits, target = torch.randn(3, 5000), torch.full((3,), place)
    logits[:, place] = torch.tensor([14.0, 24.0, 40.0])
    out = fields(passes, logits, target)
    others = logits.double().index_fill(1, target[:1], float("-inf")).logsumexp(1)
    truth = -(others - logits[:, place]).exp().log1p()
    torch.testing.assert_close(out[0].double(), truth, rtol=2e-6, atol=0)
    torch.testing.assert_close(out[3].double(), -truth.expm1(), rtol=2e-6, atol=0)
    torch.testing.assert_close(out[2].double(), exact(logits, target)[2], rtol=2e-5, atol=1e-14)


@pytest.mark.parametrize("gap", [10.0, 20.0, 60.0, 100.0, 300.0])
@pytest.mark.parametrize("place", [0, 17, 9999])
def test_a_rival_far_above_the_target(passes, gap, place):
    logits, target = torch.randn(2, 10000), torch.tensor([5000, 5001])
    logits[:, place] += gap
    out, truth = fields(passes, logits, target), exact(logits, target)
    torch.testing.assert_close(out[:3].double(), truth[:3], rtol=2e-6, atol=1e-12)


def test_ignored_rows_are_zero_and_targets_outside_the_row_are_nan(passes):
    logits = torch.randn(5, 70)
    target = torch.tensor([-100, 70, -1, 3, 10**12])
    out = fields(passes, logits, target)
    assert (out[:, 0] == 0).all()
    assert out[0].isnan().tolist() == [False, True, True, False, True]
    assert out[3].isnan().tolist() == [False, True, True, False, True]
    assert out[1:3].isfinite().all()
    grad = torch.full((5, 70), 7.0)
    passes.logprob_rows_backward(logits, target, torch.ones(5), -100, torch.zeros(6, 5), grad)
    assert (grad[0] == 0).all()
    assert grad[[1, 2, 4]].isnan().all()
    assert grad[3].isfinite().all()


def test_nan_and_masked_tokens_come_out_as_from_the_cpu_op(passes):
    if not native.AVAILABLE:
        pytest.skip("the compiled ops are not built")
    logits, target = torch.randn(6, 700), torch.tensor([3, 3, 3, 3, 699, 5])
    logits[1, 17], logits[2], logits[3], logits[4, :690] = float("nan"), float("nan"), float("-inf"), float("-inf")
    logits[5, 5] = float("-inf")
    expected = torch.zeros(5, 6)
    torch.ops.rlhf_kernels.logprob_rows(logits, target, torch.ones(6), -100, expected)
    torch.testing.assert_close(fields(passes, logits, target)[:4], expected[:4], rtol=2e-6, atol=5e-7, equal_nan=True)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_gradients_follow_the_definition(on_cuda_kernels, shape, dtype, inplace):
    logits, target = (torch.randn(shape) * 3).to(dtype), torch.randint(shape[1], shape[:1])
    target[-1] = -100 if shape[0] > 1 else target[-1]
    temperature = torch.rand(shape[0]) + 0.5
    x, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    weights = torch.randn(3, shape[0])
    for function, leaf in ((logprob, x), (naive.logprob, truth)):
        options = {"inplace_backward": inplace} if function is logprob else {}
        heat = temperature.to(F64) if leaf is truth else temperature
        out = function(leaf * 1 if inplace else leaf, target, temperature=heat, entropy=True, **options)
        sum((w * field).sum() for w, field in zip(weights, out)).backward()
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad.double(), truth.grad, rtol=UNIT[dtype], atol=2e-6 if dtype != F16 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 3])
def test_strided_rows_off_the_16_byte_boundaries(passes, dtype, offset):
    memory = torch.randn(4, 1311).to(dtype)
    logits, target = memory[:, offset : 1303 + offset], torch.randint(1303, (4,))
    torch.testing.assert_close(fields(passes, logits, target), fields(passes, logits.contiguous(), target))
    coefficients, out = torch.randn(6, 4), torch.full((4, 1400), 7.0, dtype=dtype)
    coefficients[0] = logits.double().logsumexp(1)
    expected = torch.empty(4, 1303, dtype=dtype)
    passes.logprob_rows_backward(logits, target, torch.ones(4), -100, coefficients, out[:, 5:1308])
    passes.logprob_rows_backward(logits.contiguous(), target, torch.ones(4), -100, coefficients, expected)
    assert torch.equal(out[:, 5:1308], expected)
    assert (out[:, :5] == 7).all()
    assert (out[:, 1308:] == 7).all()


def test_a_run_repeats_bit_for_bit_and_a_row_does_not_depend_on_the_others(passes):
    logits, target = torch.randn(5, 3000), torch.randint(3000, (5,))  # rows start on 16 bytes
    first = fields(passes, logits, target)
    assert torch.equal(first, fields(passes, logits, target))
    assert torch.equal(first[:, 2], fields(passes, logits[2:3].clone(), target[2:3])[:, 0])


def test_no_rows_are_no_launch(passes):
    assert fields(passes, torch.empty(0, 9), torch.empty(0, dtype=torch.long)).shape == (5, 0)


def test_rows_that_lie_further_apart_than_32_bits_count(passes):
    stride = 2**31 + 8
    memory = torch.empty(stride + 1000, dtype=BF16)  # only the pages that are touched take memory
    logits, rows = memory.as_strided((2, 1000), (stride, 1)), torch.randn(2, 1000).to(BF16)
    logits.copy_(rows)
    target = torch.tensor([3, 999])
    assert torch.equal(fields(passes, logits, target), fields(passes, rows, target))
    coefficients, expected = torch.ones(6, 2), torch.empty(2, 1000, dtype=BF16)
    passes.logprob_rows_backward(rows, target, torch.ones(2), -100, coefficients, expected)
    passes.logprob_rows_backward(logits, target, torch.ones(2), -100, coefficients, logits)
    assert torch.equal(logits, expected)


@pytest.mark.slow
def test_more_rows_than_a_grid_has_in_its_other_dimensions(passes):
    logits, target = torch.randn(66000, 3), torch.randint(3, (66000,))
    out = fields(passes, logits, target)
    torch.testing.assert_close(
        out[0], logits.log_softmax(1).gather(1, target[:, None]).squeeze(1), rtol=2e-6, atol=1e-6
    )

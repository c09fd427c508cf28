"""The CUDA kernel of sample, run on the CPU: the tokens of the definition, bit for bit, however blocks share a row."""

import sys
from pathlib import Path

import cuda_host
import pytest
import torch

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.sampling import api, naive, native, sample

sys.path.append(str(Path(__file__).resolve().parents[1] / "ops"))
from test_sampling import mixed_rows

pytestmark = pytest.mark.skipif(cuda_host.compiler_missing(), reason=f"{cuda_host.COMPILER} is not installed")
INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEYS = {"seed": 1, "stream": 2, "position": 3}


@pytest.fixture(scope="module", params=[True, False], ids=["clusters", "one block a row"])
def kernels(request):
    return cuda_host.HostSampling(cuda_host.compile_library("cuda_sample_on_host.cpp"), request.param)


@pytest.fixture
def through(kernels, monkeypatch):
    """sample() through the CUDA kernel."""
    monkeypatch.setattr(registry, "choose", lambda op, tensor: "native")
    monkeypatch.setattr(native, "sample", kernels.sample_rows)
    return sample


def as_rows(parameters):
    """Tensors of mixed_rows as the op passes them on."""
    temperature = parameters["temperature"].float()
    rows = [torch.where(temperature == 0, 1.0, temperature), parameters["top_k"], parameters["top_p"].double()]
    rows += [-parameters["min_p"].log().float()]
    rows += [parameters[name] for name in ("seed", "stream", "sample_index", "position")]
    return [*rows, parameters["greedy"] | (temperature == 0)]


def agrees(kernels, logits, rows):
    found, truth = kernels.sample_rows(logits, *rows), naive.sample(logits, *rows)
    assert torch.equal(found[0], truth[0])
    torch.testing.assert_close(found[1], truth[1], rtol=2e-7, atol=2e-7, equal_nan=True)


def test_weights_are_the_definitions_to_the_bit(kernels):
    u = torch.cat([torch.rand(300000) * 30, torch.rand(50000) * 90, torch.logspace(-44, 3, 50000)])
    u = torch.cat([u, torch.tensor([0.0, 28.4189, 28.5, 87.3, 87.4, INF])]).float()
    assert torch.equal(kernels.masses(u), naive.fixed_point(naive.exp_weight(u)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "v"), [(9, 1), (9, 2), (60, 123), (20, 5003), (9, 9001), (3, 33001)])
def test_tokens_are_the_definitions(kernels, n, v, dtype):
    logits, parameters = mixed_rows(n, v, seed=v)
    agrees(kernels, logits.to(dtype), as_rows(parameters))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "v"), [(3000, 301), (30, 128256), (10, 262144), (1, naive.LARGEST_VOCABULARY)])
def test_tokens_are_the_definitions_over_large_vocabularies(kernels, n, v, dtype):
    logits, parameters = mixed_rows(n, v, seed=v)
    agrees(kernels, logits.to(dtype), as_rows({**parameters, "temperature": parameters["temperature"] * 8}))


@pytest.mark.parametrize("v", [700, 9001])
@pytest.mark.parametrize("filters", [
    {}, {"top_k": 1}, {"top_k": 300}, {"top_k": 10**9}, {"top_p": 0.3}, {"top_p": 0.0}, {"top_p": 1 - 1e-12},
    {"min_p": 0.01}, {"min_p": 1.0}, {"top_k": 500, "top_p": 0.5}, {"top_k": 60, "top_p": 0.97, "min_p": 0.3},
], ids=str)  # fmt: skip
def test_ties_in_all_blocks_are_kept_by_index(kernels, v, filters):
    n = 4
    steps = torch.randint(0, 4, (n, v)).float()
    steps[0] = 0.0  # all equal
    parameters = {"temperature": torch.rand(n) + 0.5, "greedy": torch.zeros(n, dtype=torch.bool)}
    parameters |= {name: torch.randint(0, 2**31, (n,)) for name in ("seed", "stream", "sample_index", "position")}
    parameters["top_k"] = torch.full((n,), filters.get("top_k", 0))
    parameters |= {k: torch.full((n,), filters.get(k, off)) for k, off in (("top_p", 1.0), ("min_p", 0.0))}
    for _ in range(2):
        parameters["position"] += 1
        agrees(kernels, steps, as_rows(parameters))


def test_tokens_too_unlikely_to_weigh_anything_do_not_end_a_search(kernels):
    logits, parameters = mixed_rows(12, 9001, seed=3)
    far = {
        **parameters,
        "temperature": torch.full((12,), 1e-3),
        "top_k": torch.arange(12) * 700,
        "greedy": logits[:, 0] > INF,
    }
    agrees(kernels, logits, as_rows(far))
    flat = {**far, "temperature": torch.full((12,), 1e30), "min_p": torch.zeros(12)}  # u is subnormal
    agrees(kernels, logits.nan_to_num(neginf=-8.0), as_rows(flat))


@pytest.mark.parametrize("v", [300, 9001])
@pytest.mark.parametrize("parameters", [{}, {"greedy": True}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}], ids=str)
def test_rows_without_a_distribution_give_token_zero_and_nan(through, v, parameters):
    logits = torch.randn(7, v)
    logits[0], logits[1, v - 1], logits[2, 7], logits[3] = -INF, NAN, INF, NAN
    logits[4, 0], logits[5, : v - 1] = -INF, -INF
    token, logprob = through(logits, **KEYS, **parameters)
    assert token[:4].tolist() == [0, 0, 0, 0]
    assert logprob.isnan().tolist() == [True] * 4 + [False] * 3
    assert (token[5].item(), logprob[5].item()) == (v - 1, 0.0)


def test_parameters_out_of_range_are_nan_in_their_row_alone(through, monkeypatch):
    monkeypatch.setattr(registry, "checks_values", lambda tensor: False)  # as on a GPU, where the host reads no values
    bad = {"temperature": [-1.0, INF, NAN], "top_k": [-1], "top_p": [-0.1, 1.1, NAN], "min_p": [1.5, -0.5, NAN],
           "sample_index": [-1, 2**32], "position": [-1, 2**32]}  # fmt: skip
    logits = torch.randn(3, 400)
    for name, values in bad.items():
        for value in values:
            good = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "sample_index": 0, "position": 9}[name]
            row = torch.tensor([good, value, good])
            token, logprob = through(logits, **{**KEYS, name: row})
            assert logprob.isnan().tolist() == [False, True, False], (name, value)
            assert token[1] == 0
            alone = through(logits[[0, 2]], **{**KEYS, name: row[[0, 2]]})
            assert torch.equal(alone[0], token[[0, 2]])
            with monkeypatch.context() as patch:
                patch.setattr(registry, "choose", lambda op, tensor: "naive")
                defined = sample(logits, **{**KEYS, name: row})
            assert torch.equal(defined[0], token)
            assert torch.equal(defined[1].isnan(), logprob.isnan())


@pytest.mark.parametrize("gap", [1e-3, 1.0, 12.0, 40.0, 80.0, 100.0])
def test_logprob_keeps_its_digits_at_both_ends(through, gap):
    logits = torch.zeros(2, 20000)
    logits[:, 17] = gap
    logits[1, 18:] = -INF
    token, logprob = through(logits, **KEYS, greedy=True)
    exact = -(torch.tensor([19999.0, 17.0], dtype=torch.float64) * torch.tensor(-gap).double().exp()).log1p()
    assert token.tolist() == [17, 17]
    assert logprob.tolist() == pytest.approx(exact.tolist(), rel=3e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_wherever_it_lies_and_beside_any_other(kernels, dtype):
    logits, parameters = mixed_rows(8, 9001, seed=5)
    rows = as_rows(parameters)
    memory = torch.zeros(8, 9011, dtype=dtype)
    memory[:, 3:9004] = logits
    strided = memory[:, 3:9004]
    first, second = kernels.sample_rows(strided.contiguous(), *rows), kernels.sample_rows(strided, *rows)
    order = torch.randperm(8)
    third = kernels.sample_rows(strided[order], *(x[order] for x in rows))
    for one, two, three in zip(first, second, third):
        assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))
        assert torch.equal(one[order].view(torch.uint8), three.view(torch.uint8))


@pytest.mark.parametrize("v", [700, 9001])
def test_no_result_depends_on_the_order_in_which_threads_run(kernels, v):
    logits, parameters = mixed_rows(12, v, seed=6)
    forwards = kernels.sample_rows(logits, *as_rows(parameters))
    with kernels.backwards():
        backwards = kernels.sample_rows(logits, *as_rows(parameters))
    for one, other in zip(forwards, backwards):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_rows_that_lie_further_apart_than_32_bits_count(kernels):
    stride = 2**31 + 8
    memory = torch.empty(stride + 1000, dtype=torch.bfloat16)  # only the pages that are touched take memory
    logits, (values, parameters) = memory.as_strided((2, 1000), (stride, 1)), mixed_rows(2, 1000, seed=7)
    logits.copy_(values)
    agrees(kernels, logits, as_rows(parameters))


def test_no_rows_are_no_launch(through):
    assert through(torch.zeros(0, 5), **KEYS)[0].shape == (0,)


def test_the_kernel_reads_and_writes_inside_its_arrays_alone():
    code = """
import ctypes, sys, torch
from cuda_host import HostSampling
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def exact(value):  # ends where its memory ends
    size = value.numel() * value.element_size()
    memory = (ctypes.c_char * size).from_address(libc.malloc(ctypes.c_size_t(size)))
    return torch.frombuffer(memory, dtype=value.dtype).view(value.shape).copy_(value)
for clusters in (True, False):
    kernels = HostSampling(library, clusters)
    for v, dtype in ((1, torch.float32), (123, torch.float16), (1021, torch.bfloat16), (9001, torch.float32)):
        n = 3
        rows = [torch.ones(n), torch.tensor([0, 9, v]), torch.tensor([1.0, 0.7, 0.2]).double()]
        rows += [torch.tensor([3.0, 2.0, float("inf")])] + [torch.arange(n)] * 4
        rows += [torch.tensor([False, False, True])]
        kernels.sample_rows(exact(torch.randn(n, v).to(dtype)), *(exact(x) for x in rows))
print("ended")
"""
    done = cuda_host.run_sanitized("cuda_sample_on_host.cpp", code)
    assert "ended" in done.stdout, done.stderr[-4000:]


def test_the_op_hands_the_kernel_what_it_takes(through):
    logits, parameters = mixed_rows(60, 500, seed=8)
    token, logprob = through(logits, **parameters)
    expected = api.naive.sample(logits, *as_rows(parameters))
    assert torch.equal(token, expected[0])
    torch.testing.assert_close(logprob, expected[1], rtol=2e-7, atol=2e-7, equal_nan=True)

"""`sample` on a CUDA device: the CPU's tokens, and a captured call that follows its parameters."""

import pytest
import torch
from test_sampling import mixed_rows

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.sampling import sample


@pytest.fixture(autouse=True)
def _cuda(request, monkeypatch):
    if request.config.getoption("--device") != "cuda":
        pytest.skip("the CUDA kernel needs a CUDA device (--device cuda)")
    monkeypatch.delenv("RLHF_KERNELS_CHECK", raising=False)  # it makes the host read the parameters
    monkeypatch.delenv("RLHF_KERNELS_BACKEND", raising=False)


def on(device, parameters):
    return {name: x.to(device) for name, x in parameters.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "v"), [(300, 1), (300, 123), (300, 5003), (64, 33001), (16, 151936), (8, 262144)])
def test_tokens_are_those_of_the_cpu(n, v, dtype):
    if "cuda" not in registry.native_devices("sample_rows"):
        pytest.skip("built without CUDA")
    logits, parameters = mixed_rows(n, v, seed=v)
    logits = logits.to(dtype)
    token, logprob = sample(logits.cuda(), **on("cuda", parameters))
    expected = sample(logits.cpu(), **on("cpu", parameters))
    assert torch.equal(token.cpu(), expected[0])
    torch.testing.assert_close(logprob.cpu(), expected[1], rtol=2e-7, atol=2e-7, equal_nan=True)


def test_a_captured_call_follows_logits_and_parameters_overwritten_between_replays():
    logits, parameters = mixed_rows(40, 9001, seed=1)
    logits, parameters = logits.cuda(), on("cuda", parameters)
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        sample(logits, **parameters)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sample(logits, **parameters)
    for seed in (2, 3):
        fresh, others = mixed_rows(40, 9001, seed=seed)
        logits.copy_(fresh)
        for name, x in others.items():
            parameters[name].copy_(x)
        graph.replay()
        expected = sample(logits, **parameters)
        assert torch.equal(out[0], expected[0])
        assert torch.equal(out[1].view(torch.int32), expected[1].view(torch.int32))

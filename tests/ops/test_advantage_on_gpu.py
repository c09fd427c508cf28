"""`gae` and `masked_whiten` on a CUDA device: captured calls, and no read by the host."""

import pytest
import torch

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.advantage import gae, masked_whiten, naive


@pytest.fixture(autouse=True)
def _cuda(request, monkeypatch):
    if request.config.getoption("--device") != "cuda":
        pytest.skip("the Triton kernels need a CUDA device (--device cuda)")
    monkeypatch.delenv("RLHF_KERNELS_CHECK", raising=False)  # it makes the host read the lengths
    monkeypatch.delenv("RLHF_KERNELS_BACKEND", raising=False)


@pytest.mark.parametrize(("b", "t"), [(3, 7), (256, 1024), (2, 5000)])
def test_scans_are_no_further_from_float64_than_the_loop(b, t):
    assert registry.chosen("gae", "cuda", torch.float32) == "triton"
    rewards, values = torch.randn(2, b, t)
    mask = torch.rand(b, t) < 0.8
    found = gae(rewards.cuda(), values.cuda(), mask.cuda(), gamma=0.99)
    plain = gae(rewards.cpu(), values.cpu(), mask.cpu(), gamma=0.99)  # the loop's numbers to the bit
    sequences = min(b, 3)  # the definition takes long
    few = slice(0, sequences * t)
    flat = [x.flatten()[few].cpu() for x in (rewards.double(), values.double(), mask)]
    starts, last = torch.arange(sequences + 1, device="cpu") * t, torch.zeros(sequences, device="cpu").double()
    exact = naive.gae(*flat, starts, last, 0.99, 0.95)
    for ours, theirs, truth in zip(found, plain, exact):
        error, allowed = ((x.flatten()[few].cpu().double() - truth).abs() for x in (ours, theirs))
        assert (error <= torch.maximum(2 * allowed, 2e-7 * (1 + truth.abs()))).all()


def test_captured_calls_follow_what_they_read():
    rewards, values = torch.randn(2, 8, 300, device="cuda")
    mask = torch.rand(8, 300, device="cuda") < 0.7

    def run():
        advantages, returns = gae(rewards, values, mask)
        return advantages, returns, masked_whiten(advantages, mask)

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        run()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(2):
        rewards.normal_()
        mask.copy_(torch.rand(8, 300, device="cuda") < 0.5)
        graph.replay()
        for one, other in zip(out, run()):
            assert torch.equal(one, other)

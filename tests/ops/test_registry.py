"""The choices the registry makes for every op: whether values are checked, and which backend serves."""

import pytest
import torch

from rlhf_kernels import linear_logprob, logprob
from rlhf_kernels.ops import registry


@pytest.mark.parametrize(("device", "asked", "checked"), [
    ("cpu", None, True), ("cpu", "0", True), ("meta", None, False), ("meta", "0", False), ("meta", "1", True),
])  # fmt: skip
def test_values_are_checked_on_the_cpu_and_elsewhere_on_request(monkeypatch, device, asked, checked):
    monkeypatch.delenv("RLHF_KERNELS_CHECK", raising=False)
    if asked is not None:
        monkeypatch.setenv("RLHF_KERNELS_CHECK", asked)
    assert registry.checks_values(torch.empty(1, device=device)) is checked


def test_values_are_not_read_while_torch_compile_traces():
    @torch.compile(fullgraph=True, backend="eager")
    def traced(x):
        return x + registry.checks_values(x)

    assert traced(torch.zeros(1)).item() == 0


@pytest.mark.parametrize("backend", ["naive", "native"])
def test_the_logprob_ops_name_a_wrong_value_on_every_backend(monkeypatch, backend):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", backend)
    target = torch.tensor([0, 10])
    with pytest.raises(IndexError, match="target holds 10"):
        logprob(torch.randn(2, 10), target)
    with pytest.raises(IndexError, match="target holds 10"):
        linear_logprob(torch.randn(2, 8), torch.randn(10, 8), target)
    with pytest.raises(ValueError, match=r"temperature holds 0\.0"):
        logprob(torch.randn(2, 10), target % 10, temperature=torch.zeros(2))

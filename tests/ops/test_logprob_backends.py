"""Which row passes serve the logprob ops: csrc if built for the device, Triton on other GPUs, else PyTorch."""

import subprocess
import sys

import pytest
import torch

from rlhf_kernels import linear_logprob, logprob
from rlhf_kernels.ops import registry
from rlhf_kernels.ops.logprob import native, rows

F32 = torch.float32


@pytest.mark.parametrize(("asked", "served"), [(None, "native"), ("native", "native"), ("naive", "naive")])
def test_the_cpu_is_served_by_csrc_unless_told_otherwise(monkeypatch, asked, served):
    monkeypatch.delenv("RLHF_KERNELS_BACKEND", raising=False)
    if asked:
        monkeypatch.setenv("RLHF_KERNELS_BACKEND", asked)
    expected = torch.ops.rlhf_kernels if served == "native" else rows
    assert native.row_passes(torch.device("cpu")) is expected
    assert registry.choose("logprob", torch.zeros(1)) == served


@pytest.mark.parametrize("asked", [None, "triton"])
def test_a_gpu_is_served_by_triton_where_csrc_was_not_built_for_it(monkeypatch, asked):
    from rlhf_kernels.ops.logprob import triton_rows

    monkeypatch.delenv("RLHF_KERNELS_BACKEND", raising=False)
    if asked:
        monkeypatch.setenv("RLHF_KERNELS_BACKEND", asked)
    built = "cuda" in registry.native_devices("head_stats")
    wanted = torch.ops.rlhf_kernels if built and not asked else triton_rows
    assert native.row_passes(torch.device("cuda")) is wanted


def test_triton_asked_for_where_it_cannot_run_leaves_the_definition(monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "triton")
    monkeypatch.setattr(native, "row_passes", None)  # whoever called it would fail
    hidden, weight, target = torch.randn(3, 8), torch.randn(10, 8), torch.arange(3)
    wanted = (hidden @ weight.t()).log_softmax(1)[torch.arange(3), target]
    assert torch.allclose(linear_logprob(hidden, weight, target).logprob, wanted, atol=1e-5)
    assert torch.allclose(logprob(hidden @ weight.t(), target).logprob, wanted, atol=1e-5)


def test_triton_is_not_imported_before_a_kernel_needs_it():
    code = """if True:
        import sys, torch, rlhf_kernels
        from rlhf_kernels.ops import shipped
        assert "triton" not in sys.modules
        rlhf_kernels.linear_logprob(torch.randn(3, 8), torch.randn(10, 8), torch.arange(3))
        ours = {name: module for name, module in sys.modules.items() if name.startswith("rlhf_kernels.")}
        assert not [name for name, module in ours.items() if hasattr(module, "triton")]  # torch may import it itself
    """
    subprocess.run([sys.executable, "-c", code], check=True)

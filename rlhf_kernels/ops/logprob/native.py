"""Binding to csrc: the row passes of `rows.py` (cpu/logprob.cpp, cuda/head_rows.cu) and `logprob` on whole rows
(logprob_rows in both places)."""

import torch
from torch import Tensor

from rlhf_kernels.ops import registry

AVAILABLE = registry.native_available()
# The CUDA part is built only where nvcc and a CUDA build of torch were (setup.py).
DEVICES = tuple(
    key.lower()
    for key in ("CPU", "CUDA")
    if AVAILABLE and torch._C._dispatch_has_kernel_for_dispatch_key("rlhf_kernels::head_stats", key)
)
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def row_passes(device: torch.device):
    """The module or namespace that holds head_stats, head_exp, head_js and head_grad for `device`."""
    if AVAILABLE and device.type in DEVICES:
        return torch.ops.rlhf_kernels
    from rlhf_kernels.ops.logprob import rows

    return rows


def logprob_rows(logits: Tensor, target: Tensor, temperature: Tensor, ignore_index: int, out: Tensor) -> None:
    """out fp32 [5, N]: logprob, lse, entropy, 1 - p_target, and what lse lost by rounding, of logits [N, V]."""
    torch.ops.rlhf_kernels.logprob_rows(logits, target, temperature, ignore_index, out)


def logprob_rows_backward(
    logits: Tensor, target: Tensor, temperature: Tensor, ignore_index: int, coefficients: Tensor, out: Tensor
) -> None:
    """The gradient of logits [N, V] into out, which may be their own storage; coefficients [6, N] as in csrc."""
    torch.ops.rlhf_kernels.logprob_rows_backward(logits, target, temperature, ignore_index, coefficients, out)

"""Binding to csrc/cpu: the row passes of `rows.py` (logprob.cpp) and `logprob` on whole rows (logprob_rows.cpp)."""

import torch
from torch import Tensor

from rlhf_kernels.ops import registry

AVAILABLE = registry.native_available()
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def row_passes(device: torch.device):
    """The module or namespace that holds head_stats, head_exp, head_js and head_grad for `device`."""
    if AVAILABLE and device.type == "cpu":
        return torch.ops.rlhf_kernels
    from rlhf_kernels.ops.logprob import rows

    return rows


def has_tiles(x: Tensor) -> bool:
    """Whether this machine multiplies x, bf16 on the CPU, with fp32 sums: AMX or AVX512-BF16 (see csrc/cpu/bf16_tile.h;
    RLHF_KERNELS_CPU_ISA=amx|avx512_bf16|portable asks for less, once, before the first use)."""
    here = AVAILABLE and x.device.type == "cpu" and x.dtype == torch.bfloat16
    return here and torch.ops.rlhf_kernels.bf16_isa() > 0


def logprob_rows(logits: Tensor, target: Tensor, temperature: Tensor, ignore_index: int, out: Tensor) -> None:
    """out fp32 [5, N]: logprob, lse, entropy, 1 - p_target, and what lse lost by rounding, of logits [N, V]."""
    torch.ops.rlhf_kernels.logprob_rows(logits, target, temperature, ignore_index, out)


def logprob_rows_backward(
    logits: Tensor, target: Tensor, temperature: Tensor, ignore_index: int, coefficients: Tensor, out: Tensor
) -> None:
    """The gradient of logits [N, V] into out, which may be their own storage; coefficients [6, N] as in csrc."""
    torch.ops.rlhf_kernels.logprob_rows_backward(logits, target, temperature, ignore_index, coefficients, out)

"""The row passes behind the logprob ops by backend: csrc (`native`), Triton kernels, PyTorch operations (`rows.py`)."""

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops import registry

AVAILABLE = registry.native_available()
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)

registry.serves("head_rows", "native", registry.native_devices("head_stats"), (torch.float32,))
registry.serves("head_rows", "triton", registry.triton_devices(), (torch.float32,))
registry.serves("logprob", "native", registry.native_devices("logprob_rows"), HALF_AND_SINGLE)
registry.serves("logprob", "triton", registry.triton_devices(), HALF_AND_SINGLE)


def row_passes(device: torch.device) -> Any:
    """The module or namespace that holds head_stats, head_exp, head_js and head_grad for `device`."""
    backend = registry.chosen("head_rows", device.type, torch.float32)
    if backend == "native" and AVAILABLE:
        return torch.ops.rlhf_kernels
    if backend == "triton":
        from rlhf_kernels.ops.logprob import triton_rows

        return triton_rows
    from rlhf_kernels.ops.logprob import rows

    return rows


def has_tiles(x: Tensor) -> bool:
    """Whether this machine multiplies x, bf16 on the CPU, with fp32 sums: AMX or AVX512-BF16 (see csrc/cpu/bf16_tile.h;
    RLHF_KERNELS_CPU_ISA=amx|avx512_bf16|portable asks for less, once, before the first use)."""
    here = AVAILABLE and x.device.type == "cpu" and x.dtype == torch.bfloat16
    native = here and registry.chosen("head_rows", "cpu", torch.float32) == "native"
    return native and torch.ops.rlhf_kernels.bf16_isa() > 0


def _logits_passes(logits: Tensor) -> Any:
    if registry.choose("logprob", logits) == "triton":
        from rlhf_kernels.ops.logprob import triton_logits

        return triton_logits
    return torch.ops.rlhf_kernels


def logprob_rows(logits: Tensor, target: Tensor, temperature: Tensor, ignore_index: int, out: Tensor) -> None:
    """out fp32 [5, N]: logprob, lse, entropy, 1 - p_target, and what lse lost by rounding, of logits [N, V]."""
    _logits_passes(logits).logprob_rows(logits, target, temperature, ignore_index, out)


def logprob_rows_backward(
    logits: Tensor, target: Tensor, temperature: Tensor, ignore_index: int, coefficients: Tensor, out: Tensor
) -> None:
    """The gradient of logits [N, V] into out, which may be their own storage; coefficients [6, N] as in csrc."""
    _logits_passes(logits).logprob_rows_backward(logits, target, temperature, ignore_index, coefficients, out)

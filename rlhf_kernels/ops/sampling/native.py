"""Binding of the compiled `sample`: csrc/cpu/sampling.cpp and csrc/cuda/sample_rows.cuh."""

import torch
from torch import Tensor

from rlhf_kernels.ops import registry

registry.serves(
    "sample", "native", registry.native_devices("sample_rows"), (torch.float32, torch.bfloat16, torch.float16)
)


def sample(logits: Tensor, *row_parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments and results as `naive.sample`; row_parameters contiguous."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    return torch.ops.rlhf_kernels.sample_rows(logits, *row_parameters)

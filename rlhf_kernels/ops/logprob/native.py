"""Binding to csrc/cpu/logprob.cpp: the row passes of `rows.py` as compiled kernels."""

import torch

from rlhf_kernels.ops import registry

AVAILABLE = registry.native_available()
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def row_passes(device: torch.device):
    """The module or namespace that holds head_stats, head_exp, head_js and head_grad for `device`."""
    if AVAILABLE and device.type == "cpu":
        return torch.ops.rlhf_kernels
    from rlhf_kernels.ops.logprob import rows

    return rows

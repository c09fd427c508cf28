"""The scans by backend: csrc/cpu/advantage.cpp (`native`), Triton kernels, the loop of `naive.py`."""

import sys
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.advantage import naive

FLOATS = (torch.float32, torch.float64)

registry.serves("gae", "native", registry.native_devices("gae_rows"), FLOATS)
registry.serves("gae", "triton", registry.triton_devices(), FLOATS)


def scans(tensor: Tensor) -> Any:
    """The module that holds gae and gae_backward for `tensor`'s device and dtype."""
    backend = registry.choose("gae", tensor)
    if backend == "triton":
        from rlhf_kernels.ops.advantage import triton_scan

        return triton_scan
    return sys.modules[__name__] if backend == "native" else naive


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    starts: Tensor,
    last_value: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as `naive.gae`; all contiguous."""
    return torch.ops.rlhf_kernels.gae_rows(rewards, values, mask, starts, last_value, gamma, lam)


def gae_backward(
    grad: Tensor, mask: Tensor | None, starts: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as `naive.gae_backward`; all contiguous."""
    return torch.ops.rlhf_kernels.gae_rows_backward(grad, mask, starts, gamma, lam)

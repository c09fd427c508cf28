"""Binding of the compiled scans (csrc/cpu/advantage.cpp)."""

import torch
from torch import Tensor

from rlhf_kernels.ops import registry

if registry.native_available():
    registry.serves("gae", "native", ["cpu"], [torch.float32, torch.float64])


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

"""`gae` and its gradient in plain PyTorch: the textbook loop over time, one sequence after the other.

    delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

V after the last token is last_value, A after it 0. Masked tokens do not exist: t counts the valid ones.
"""

from itertools import pairwise

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    starts: Tensor,
    last_value: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [N] of flat rewards and values [N]; sequence b is starts[b] .. starts[b + 1]."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for b, valid in enumerate(_valid_places(mask, starts)):
        next_value, running = last_value[b], torch.zeros_like(last_value[b])
        for t in reversed(valid):
            delta = rewards[t] + gamma * next_value - values[t]
            running = delta + gamma * lam * running
            advantages[t], returns[t] = running, running + values[t]
            next_value = values[t]
    return advantages, returns


def gae_backward(
    grad: Tensor, mask: Tensor | None, starts: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in rewards, values and last_value. The map is linear; its transpose runs forward in time:
    D_t = g_t + gamma lam D_{t-1};  d r_t = D_t;  d V_t = gamma D_{t-1} - D_t;  d last_value = gamma D of the last."""
    grad_rewards, grad_values = torch.zeros_like(grad), torch.zeros_like(grad)
    grad_last = grad.new_zeros(starts.numel() - 1)
    for b, valid in enumerate(_valid_places(mask, starts)):
        running = grad.new_zeros(())
        for t in valid:
            before, running = running, grad[t] + gamma * lam * running
            grad_rewards[t] = running
            grad_values[t] = gamma * before - running
        grad_last[b] = gamma * running
    return grad_rewards, grad_values, grad_last


def _valid_places(mask: Tensor | None, starts: Tensor) -> list[list[int]]:
    ends = starts.tolist()
    keep = None if mask is None else mask.tolist()
    return [[t for t in range(a, b) if keep is None or keep[t]] for a, b in pairwise(ends)]

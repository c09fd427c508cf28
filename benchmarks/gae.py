"""Advantages of [256, 1024] rewards: ours beside the loop over time that other trainers run in Python."""

import torch

from benchmarks.case import OURS, Case, Prepare, Target, ready
from rlhf_kernels import gae


def python_loop(rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float) -> torch.Tensor:
    running, reversed_advantages = torch.zeros_like(rewards[:, 0]), []
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        running = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * running
        reversed_advantages.append(running)
    return torch.stack(reversed_advantages[::-1], dim=1)


def cases(device: str = "cpu") -> list[Case]:
    def build(tiny: bool) -> dict[str, Prepare]:
        torch.manual_seed(0)
        shape = (2, 16) if tiny else (256, 1024)
        rewards, values = torch.randn(shape, device=device), torch.randn(shape, device=device)
        return {
            "python loop": ready(lambda: python_loop(rewards, values, 1.0, 0.95)),
            OURS: ready(lambda: gae(rewards, values, gamma=1.0, lam=0.95)),
        }

    return [Case("256 x 1024 fp32", build, "python loop", (Target("python loop", at_least=50),))]

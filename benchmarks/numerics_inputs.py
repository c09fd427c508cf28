"""Inputs whose float64 truth is known: bf16 hidden states and weight, made so that p_y, gaps and KL take chosen values.

The truth is that of the very bf16 numbers every contestant gets: they are rounded first, and what the rounded ones
give in float64 is the reference. A row is aimed at its value along a token's weight vector; the exact value it gets is
the truth's, near the one aimed at.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

P_Y = (1e-9, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.99, 0.9998, 1 - 1e-6)
GAPS = (2.0, 5.0, 10.0, 20.0)
KL = (1e-7, 1e-6, 1e-5, 3e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
LOGIT_STD = 3.0  # of the tokens that no row is aimed at
ORACLE_BLOCK = 8192  # weight rows widened to float64 at a time


@dataclass
class Rows:
    """Rows that share a sweep; `label` [N] is the index of the value each was aimed at."""

    hidden: Tensor  # bf16 [N, H]
    target: Tensor  # int64 [N]
    label: Tensor  # int64 [N]
    ref_hidden: Tensor | None = None  # bf16 [N, H]


def make_weight(vocab: int, width: int) -> Tensor:
    """bf16 [V, H] with rows of norm LOGIT_STD, so that a hidden state of norm sqrt(H) has logits of that deviation."""
    weight = torch.empty(vocab, width, dtype=torch.bfloat16)
    for block in weight.split(ORACLE_BLOCK):
        block.normal_(std=LOGIT_STD * width**-0.5)
    return weight


def by_probability(weight: Tensor, per_value: int) -> Rows:
    """Rows whose target has about the probabilities `P_Y`."""
    aims = torch.tensor([math.log(p) - math.log1p(-p) for p in P_Y], dtype=torch.float64)  # z_y - lse(others)
    return _aimed(weight, aims, per_value, aim_at_target=True)


def by_gap(weight: Tensor, per_value: int) -> Rows:
    """Rows whose top token, not the target, lies `GAPS` above the log-mass of all the others."""
    return _aimed(weight, torch.tensor(GAPS, dtype=torch.float64), per_value, aim_at_target=False)


def by_divergence(weight: Tensor, per_value: int) -> Rows:
    """Rows whose exact KL to the reference is about `KL`.

    KL is half the variance of the logits' difference. Small ones come from moving a few entries by one bf16 step, which
    is as little as bf16 inputs can differ by; large ones from noise on all entries.
    """
    width = weight.shape[1]
    label = torch.arange(len(KL)).repeat_interleave(per_value)
    hidden = torch.randn(len(label), width).bfloat16()
    ref_hidden = hidden.clone()
    per_unit = LOGIT_STD**2 / width / 2  # KL from one entry that differs by 1
    step = 2.0**-8  # between neighbouring bf16 numbers in [0.5, 1)
    for row, wanted in enumerate(KL[i] for i in label.tolist()):
        movable = ((hidden[row].abs() >= 0.5) & (hidden[row].abs() < 1)).nonzero().squeeze(1)
        steps = max(1, round(wanted / per_unit / step**2))
        if steps <= len(movable):
            moved = movable[torch.randperm(len(movable))[:steps]]
            ref_hidden[row, moved] += step
        else:
            noise = math.sqrt(wanted / per_unit / width) * torch.randn(width)
            ref_hidden[row] = (hidden[row].float() + noise).bfloat16()
    return Rows(hidden, torch.randint(len(weight), (len(label),)), label, ref_hidden)


def _aimed(weight: Tensor, aims: Tensor, per_value: int, aim_at_target: bool) -> Rows:
    """Moves each row along one token's weight vector until that token's logit is `aims` above the others' log-mass."""
    n = len(aims) * per_value
    label = torch.arange(len(aims)).repeat_interleave(per_value)
    token = torch.randperm(len(weight))[:n]
    direction = weight[token].float()
    direction /= direction.square().sum(-1, keepdim=True)
    base = torch.randn(n, weight.shape[1])
    hidden = base.bfloat16()
    distance = torch.zeros(n, dtype=torch.float64)
    for _ in range(6):  # the others' mass hardly depends on the distance: a few corrections settle it
        z = logits64(hidden, weight)
        own = z.gather(1, token[:, None]).squeeze(1)
        others = z.scatter(1, token[:, None], -math.inf).logsumexp(-1)
        distance += aims[label] - (own - others)
        hidden = (base + distance.float()[:, None] * direction).bfloat16()
    target = token if aim_at_target else torch.randint(len(weight), (n,))
    return Rows(hidden, target, label)


def logits64(hidden: Tensor, weight: Tensor) -> Tensor:
    """float64 [N, V], exact products of the bf16 inputs."""
    wide = hidden.double()
    return torch.cat([wide @ block.double().t() for block in weight.split(ORACLE_BLOCK)], dim=1)

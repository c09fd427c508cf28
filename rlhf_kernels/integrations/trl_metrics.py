"""What TRL's metrics and WPO's weights want of a head besides its log-probabilities. None of it carries a gradient.

The mean logit of a linear head is one product with the mean row of its weight. Whether the target is the most likely
token follows from its probability p and the entropy H for most rows: p > 1/2 is the largest, and some probability is at
least e^-H. Only the rows between are compared with the other logits, block by block, until one of those is larger.
"""

import math

import torch
from torch import Tensor

from rlhf_kernels.ops.logprob.head import Head, mm_fp32, operand
from rlhf_kernels.ops.logprob.rows import transform

FIRST_COLUMNS = 512  # most targets that are not the largest lose to one of them
SLACK = 1e-3  # what rounding may do to logprob and entropy, and more


def mean_logits(head: Head) -> Tensor:
    """Mean of z over the vocabulary, fp32 [R]."""
    if head.softcap:
        total = head.new(head.rows)
        for block in head.blocks(False):
            transform(block.z, *head.shaping(block))
            total += block.z.sum(1)
        return total / head.weight.shape[0]
    mean = head.x.float() @ head.weight.mean(0, dtype=torch.float32)
    if head.bias is not None:
        mean = mean + head.bias.float().mean()
    return mean * head.scale / head.temperature


def log_sum_sq_probs(head: Head, lse: Tensor) -> Tensor:
    """log sum p^2, fp32 [R]; lse: log-sum-exp of z."""
    total = torch.full_like(lse, -math.inf)
    for block in head.blocks(False):
        transform(block.z, *head.shaping(block))
        total = torch.logaddexp(total, block.z.mul_(2).logsumexp(1))
    return total - 2 * lse


def top1(head: Head, logprob: Tensor, entropy: Tensor) -> Tensor:
    """Whether no token is more likely than the target, nor as likely and before it, bool [R]."""
    best = logprob > SLACK - math.log(2)
    between = ~best & (logprob >= -entropy - SLACK)
    rows = between.nonzero().squeeze(1)
    if len(rows):
        best[rows[_unbeaten(head.of_rows(rows))]] = True
    return best


def _unbeaten(head: Head) -> Tensor:
    """The rows, int64, whose target has the first of the largest logits; a row is let go once it has lost."""
    rows = torch.arange(head.rows, device=head.x.device)
    at = (head.x.float() * head.target_rows()).sum(1)
    if head.bias is not None:
        at = at + head.bias[head.target].float()
    at = at[:, None]
    transform(at, None, head.temperature, head.softcap, head.scale)
    start = 0
    while start < head.weight.shape[0] and head.rows:
        columns = head.columns_per_block(1) if start else FIRST_COLUMNS
        weight = operand(head.weight[start : start + columns], head.x.dtype)
        stop = start + len(weight)
        z = head.x.new_empty(head.rows, len(weight), dtype=torch.float32)
        mm_fp32(head.x, weight, z)
        bias = None if head.bias is None else head.bias[start:stop].float()
        transform(z, bias, head.temperature, head.softcap, head.scale)
        here = (head.target >= start) & (head.target < stop)
        column = torch.where(here, head.target - start, 0)[:, None]
        z.scatter_(1, column, torch.where(here[:, None], -math.inf, z.gather(1, column)))  # its own, rounded otherwise
        top, first = z.max(1, keepdim=True)
        lost = (top > at) | ((top == at) & (first + start < head.target[:, None]))
        left = (~lost.squeeze(1)).nonzero().squeeze(1)
        if len(left) < head.rows:
            head, rows, at = head.of_rows(left), rows[left], at[left]
        start = stop
    return rows

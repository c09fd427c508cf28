"""Fused tiers: kernels that take the whole vocabulary in one call where their device and the inputs allow it.

A sweep works block by block with any GEMM and row pass; a tier replaces whole steps of it, logits never stored.
"""

from typing import Protocol

from torch import Tensor

from rlhf_kernels.ops.logprob.head import Head


class Tier(Protocol):
    """What a tier may do for a head; None means that it does not serve this call, and the blocks do."""

    def exponentials(self, head: Head) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """(shift fp32 [R], mass fp64 [R], target_z fp64 [R], pulled fp32 [R, H]) with E' = e^(z - shift) without the
        target's column: mass its sum, pulled = (E' times the softcap's derivative) W, target_z the target's z (-inf
        where it is not among the head's columns)."""

    def states(self, head: Head, reference: bool, kl: bool, rkl: bool) -> Tensor | None:
        """The state fp64 [10, R] of all the head's columns (rows as named in `state`)."""


def fused(head: Head) -> Tier | None:
    """The tier that serves this head's device, dtype and options."""
    return None

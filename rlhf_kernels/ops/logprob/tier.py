"""Fused tiers: kernels that take the whole vocabulary in one call where their device and the inputs allow it.

A sweep works block by block with any GEMM and row pass; a tier replaces whole steps of it, logits never stored.
"""

from typing import Protocol

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.logprob import tiles
from rlhf_kernels.ops.logprob.head import Head
from rlhf_kernels.ops.logprob.native import HALF_AND_SINGLE
from rlhf_kernels.ops.logprob.state import Swept

registry.serves("head_gemm", "triton", registry.triton_devices(), HALF_AND_SINGLE)


class Tier(Protocol):
    """A fused way of sweeping."""

    def sweep(self, head: Head, reference: bool, kl: bool, rkl: bool, states: bool, grad: bool) -> Swept:
        """The state if `states`, the parts of the vector if `grad`."""


def fused(head: Head) -> Tier | None:
    """The tier that serves this head's device, dtype and options."""
    if tiles.serve(head):
        return tiles
    if registry.choose("head_gemm", head.x) == "triton":
        from rlhf_kernels.ops.logprob import triton_tier

        return triton_tier if triton_tier.serve(head) else None
    return None

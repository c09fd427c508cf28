"""Attention over packed rows and over the KV arena."""

from rlhf_kernels.ops.attention.api import sliced_attention, sliced_step, varlen_attention

__all__ = ["sliced_attention", "sliced_step", "varlen_attention"]

"""From logits to (token, logprob) with counter-based random numbers."""

from rlhf_kernels.ops.sampling.api import sample

__all__ = ["sample"]

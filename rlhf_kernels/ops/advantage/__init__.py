"""Advantages of a rollout: generalised advantage estimation and whitening."""

from rlhf_kernels.ops.advantage.api import gae
from rlhf_kernels.ops.advantage.whiten import masked_whiten

__all__ = ["gae", "masked_whiten"]

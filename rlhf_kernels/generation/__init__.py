"""Generation inside a fixed KV budget: `SlicedGenerator` and what it takes and gives."""

from rlhf_kernels.generation.engine import SlicedGenerator
from rlhf_kernels.generation.rollout import GenerationStats, Rollout
from rlhf_kernels.generation.sampling_params import SamplingParams
from rlhf_kernels.generation.scheduler import KVBudgetError

__all__ = ["GenerationStats", "KVBudgetError", "Rollout", "SamplingParams", "SlicedGenerator"]

"""Fused ops, roles on one base, and memory-sliced generation for RLHF. The public API, imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_kernels.ops.advantage import gae, masked_whiten
    from rlhf_kernels.ops.attention import sliced_attention, varlen_attention
    from rlhf_kernels.ops.logprob import LinearLogprobOutput, LogprobOutput, linear_logprob, logprob
    from rlhf_kernels.ops.lora import Routing, build_routing, lora_linear, lora_linears
    from rlhf_kernels.ops.sampling import sample

__version__ = "0.1.0"

_HOME = {
    "lora_linear": "ops.lora",
    "lora_linears": "ops.lora",
    "build_routing": "ops.lora",
    "Routing": "ops.lora",
    "linear_logprob": "ops.logprob",
    "logprob": "ops.logprob",
    "LinearLogprobOutput": "ops.logprob",
    "LogprobOutput": "ops.logprob",
    "sample": "ops.sampling",
    "gae": "ops.advantage",
    "masked_whiten": "ops.advantage",
    "varlen_attention": "ops.attention",
    "sliced_attention": "ops.attention",
}

__all__ = [
    "LinearLogprobOutput",
    "LogprobOutput",
    "Routing",
    "build_routing",
    "gae",
    "linear_logprob",
    "logprob",
    "lora_linear",
    "lora_linears",
    "masked_whiten",
    "sample",
    "sliced_attention",
    "varlen_attention",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rlhf_kernels' has no attribute {name!r}")
    return getattr(import_module(f"rlhf_kernels.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

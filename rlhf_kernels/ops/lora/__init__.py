"""lora_linear: a linear layer with the adapters of every row of a batch."""

from rlhf_kernels.ops.lora.api import lora_linear, lora_linears
from rlhf_kernels.ops.lora.routing import Routing, build_routing

__all__ = ["Routing", "build_routing", "lora_linear", "lora_linears"]

"""Roles and adapters on transformers' decoders."""

from rlhf_kernels.nn.hydra import HydraModel
from rlhf_kernels.nn.lora import LoRALinear, LoraSpec, attach_adapters
from rlhf_kernels.nn.roles import HydraOutput, Role, RoleOutput
from rlhf_kernels.nn.sharding import shard

__all__ = ["HydraModel", "HydraOutput", "LoRALinear", "LoraSpec", "Role", "RoleOutput", "attach_adapters", "shard"]

"""A model with an actor, prompts, and the ids of their random numbers."""

import torch
from material import demo_model

from rlhf_kernels.nn import HydraModel, LoraSpec

demo_model("path/to/model")
model = HydraModel.from_pretrained("path/to/model", adapters={"actor": LoraSpec(r=4)}, dtype=torch.float32)
prompts = [[5, 6, 7], [8, 9]]
ids = [100, 101]

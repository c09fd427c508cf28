"""A transformers model and a batch of four samples."""

import torch
from material import demo_model
from transformers import AutoModelForCausalLM

demo_model("path/to/model")
base = AutoModelForCausalLM.from_pretrained("path/to/model")
input_ids = torch.randint(2, 1000, (4, 6), generator=torch.Generator().manual_seed(0))

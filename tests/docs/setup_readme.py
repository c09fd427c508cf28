"""Tensors for the ops (sequences of 5, 7 and 4 tokens), a model with prompts, and the files of the command lines."""

import torch
from material import demo_model, demo_rows, reward_module

torch.manual_seed(0)
hidden, ref_hidden = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16)
lm_head = torch.nn.Linear(16, 50, bias=False).requires_grad_(False)
target = torch.tensor([3, 1, 4, 1])
x, weight = torch.randn(3, 16), torch.randn(24, 16)
lora_a, lora_b = torch.randn(2, 4, 16), torch.randn(2, 24, 4)
logits, stream, position = torch.randn(3, 50), torch.arange(3), torch.tensor([5, 7, 4])

lengths, prompt_lengths = torch.tensor([5, 7, 4]), torch.tensor([2, 3, 2])
rewards, values = torch.randn(16), torch.randn(16)
tokens = torch.randint(2, 1000, (16,))
prompts = [[5, 6, 7], [8, 9]]

demo_model("path/to/model", "path/to/sft")
demo_rows("preferences", "preferences.jsonl")
demo_rows("prompts", "prompts.jsonl")
reward_module("my_rewards", "helpful")

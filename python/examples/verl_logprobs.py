"""verl's fused head: its call, on ours. With verl installed, `patch()` puts it under its actor in every worker."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_kernels.integrations.verl import linear_cross_entropy

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes))
input_ids = torch.randint(4096, (4, 32))
labels = input_ids.roll(-1, dims=-1)  # as verl's forwards do; the last one is not used
advantages = torch.randn(4, 1)
temperature, entropy_coeff = 0.9, 0.01


def loss_of(logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    return -(advantages * logprobs)[:, :-1].mean() - entropy_coeff * entropy[:, :-1].mean()


hidden = model.model(input_ids).last_hidden_state
logprobs, entropy = linear_cross_entropy(hidden, model.lm_head.weight, labels, temperature)
loss = loss_of(logprobs, entropy)
loss.backward()
fused = model.lm_head.weight.grad.clone()

model.zero_grad()
logits = model(input_ids).logits / temperature  # [4, 32, 4096], which the fused head never makes
log_softmax = logits.log_softmax(-1)
plain = loss_of(log_softmax.gather(-1, labels[..., None])[..., 0], -(log_softmax.exp() * log_softmax).sum(-1))
plain.backward()
error = (fused - model.lm_head.weight.grad).norm() / fused.norm()
print(f"loss {loss.item():.6f}, from logits {plain.item():.6f}; gradient of the head within {error:.0e}")
assert torch.allclose(loss, plain, atol=1e-5)
assert error < 1e-4

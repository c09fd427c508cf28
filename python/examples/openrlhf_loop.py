"""OpenRLHF's actor step: padded sequences, attention_mask and action_mask in, action log-probs out, without logits.

`action_log_probs` stands where OpenRLHF's `Actor.forward` applies log_probs_from_logits.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rlhf_kernels
from rlhf_kernels.integrations.transformers import SLICED, register

register()  # padding then costs the attention nothing
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
actor = LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes, pad_token_id=0)).eval()
actor.set_attn_implementation(SLICED)
optimizer = torch.optim.AdamW(actor.parameters(), lr=1e-3)


def action_log_probs(sequences, attention_mask, action_mask, temperature=1.0):
    position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    hidden = actor.model(sequences, attention_mask, position_ids, use_cache=False).last_hidden_state
    actions = action_mask.shape[1]
    target = sequences[:, -actions:].masked_fill(~action_mask, -100)  # those rows cost no GEMM and no gradient
    out = rlhf_kernels.linear_logprob(
        hidden[:, -actions - 1 : -1], actor.lm_head.weight, target, temperature=temperature
    )
    return out.logprob


prompts = torch.randint(1, 4096, (8, 6))
mask = torch.ones_like(prompts)
mask[::2, :2] = 0  # left padding
sequences = actor.generate(prompts * mask, attention_mask=mask, max_new_tokens=10, do_sample=True, eos_token_id=5)
action_mask = sequences[:, 6:] != 0
attention_mask = torch.cat([mask, action_mask], 1)
rewards = (sequences[:, 6:] < 2048).float().mean(1)
advantages = rlhf_kernels.masked_whiten((rewards - rewards.mean()).expand(10, -1).T, action_mask)
with torch.no_grad():
    old = action_log_probs(sequences, attention_mask, action_mask)
for _ in range(4):
    ratio = (action_log_probs(sequences, attention_mask, action_mask) - old).exp()
    gain = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    loss = -(gain * action_mask).sum() / action_mask.sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"policy loss {loss.item():.4f}")

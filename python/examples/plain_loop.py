"""A whole RL loop (RLOO) on a plain transformers model: rollouts in a fixed KV budget, log-probs without logits."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlhf_kernels
from rlhf_kernels.generation import SamplingParams, SlicedGenerator
from rlhf_trainer.demo import checkpoint_path

torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(checkpoint_path(), dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
generator = SlicedGenerator(model, kv_memory="8MiB")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
prompts = [tokenizer(text).input_ids for text in ("The function returns", "If the file", "A class is", "Return the")]

for step in range(8):
    params = SamplingParams(max_new_tokens=16, n=8, seed=step)
    rollouts = generator.generate(prompts, params)
    reward = torch.tensor([tokenizer.decode(r.tokens).count("e") / len(r.tokens) for r in rollouts]).view(-1, 8)
    advantage = ((8 * reward - reward.sum(1, keepdim=True)) / 7).flatten()  # less the mean of the other seven
    loss = torch.zeros(())
    for rollout, gain in zip(rollouts, advantage):
        prompt = prompts[rollout.prompt_index]
        ids = torch.tensor([prompt + rollout.tokens])
        hidden = model.model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
        logprob = rlhf_kernels.linear_logprob(hidden, model.lm_head.weight, ids[0, len(prompt) :]).logprob
        loss = loss - gain * logprob.sum() / len(rollouts)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: {reward.mean():.3f} e a token, loss {loss.item():.4f}")

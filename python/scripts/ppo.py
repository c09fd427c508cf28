"""PPO with four full models, top to bottom: actor and critic are trained, reference and reward model are frozen.

python ppo.py MODEL PROMPTS.txt [--steps 10] [--kv-memory BYTES]
MODEL: a checkpoint in transformers' format with a reward head; PROMPTS: one a line.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

from rlhf_kernels import gae, masked_whiten
from rlhf_kernels.generation import SamplingParams, SlicedGenerator
from rlhf_kernels.nn import HydraModel

KL_COEF, LAM, CLIP, VF_COEF, EPOCHS, LR = 0.02, 0.95, 0.2, 0.1, 4, 1e-5


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path)
    for name, default in (("--steps", 10), ("--batch", 32), ("--max-new-tokens", 32), ("--kv-memory", 64 << 20)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args(argv)

    # Four copies; a base named as a role is that role's. The critic starts from the reward model's head.
    bases = {name: args.model for name in ("critic", "reference", "reward")}
    model = HydraModel.from_pretrained(args.model, bases=bases, train_base=["base", "critic"], dtype=torch.float32)
    model.copy_head("reward", "critic")
    actor, critic = model.trainable_parameters("actor"), model.trainable_parameters("critic")
    optimizer = torch.optim.AdamW([*actor, *critic], lr=LR, eps=1e-5, weight_decay=0.0)
    generator = SlicedGenerator(model, kv_memory=args.kv_memory)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = [tokenizer(line)["input_ids"] for line in args.prompts.read_text().splitlines() if line]

    scores = []
    for step in range(args.steps):
        # Rollout: the actor answers inside the KV budget; its bytes are given back for the update.
        batch = [prompts[(step * args.batch + i) % len(prompts)] for i in range(args.batch)]
        streams = [step * args.batch + i for i in range(args.batch)]
        params = SamplingParams(max_new_tokens=args.max_new_tokens)
        rollouts = generator.generate(batch, params, role="actor", streams=streams)
        generator.sleep()
        rows = [batch[r.prompt_index] + r.tokens for r in rollouts]
        tokens = torch.tensor([token for row in rows for token in row])
        lengths = torch.tensor([len(row) for row in rows])
        prompt_lengths = torch.tensor([len(batch[r.prompt_index]) for r in rollouts])
        answer_lengths = lengths - prompt_lengths

        # Scoring: every sequence through the four models.
        out = model.score(
            tokens, lengths, roles=("actor", "reference", "critic", "reward"), prompt_lengths=prompt_lengths
        )
        old, values = out["actor"].logprob, out["critic"].value
        kl = old - out["reference"].logprob
        rewards = -KL_COEF * kl
        rewards[answer_lengths.cumsum(0) - 1] += out["reward"].reward  # the score, at each last token
        advantages, returns = gae(rewards, values, lengths=answer_lengths, gamma=1.0, lam=LAM)
        advantages = masked_whiten(advantages)

        # Update: policy and value.
        for _ in range(EPOCHS):
            new = model(tokens, lengths, roles=("actor", "critic"), prompt_lengths=prompt_lengths)
            ratio = (new["actor"].logprob - old).exp()
            policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
            near = values + (new["critic"].value - values).clamp(-CLIP, CLIP)
            value = 0.5 * torch.maximum((new["critic"].value - returns) ** 2, (near - returns) ** 2).mean()
            optimizer.zero_grad()
            (policy + VF_COEF * value).backward()
            torch.nn.utils.clip_grad_norm_([*actor, *critic], 1.0)
            optimizer.step()
        scores.append(out["reward"].reward.mean().item())
        print(f"step {step}: score {scores[-1]:.3f}, KL {kl.sum().item() / len(rows):.3f} nats")
    return scores


if __name__ == "__main__":
    main()

"""RLOO (arXiv 2402.14740), top to bottom: each sample's baseline is the mean of the same prompt's other samples.

python rloo.py MODEL PROMPTS.txt [--steps 10] [--kv-memory BYTES]
MODEL: a checkpoint in transformers' format with a reward head; PROMPTS: one a line.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

from rlhf_kernels.generation import SamplingParams, SlicedGenerator
from rlhf_kernels.nn import HydraModel, LoraSpec, Role

KL_COEF, LR, RANK = 0.03, 1e-4, 16


def pack(prompts: list[list[int]], rollouts: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences end to end: tokens, lengths, prompt lengths."""
    rows = [prompts[r.prompt_index] + r.tokens for r in rollouts]
    prompt_lengths = torch.tensor([len(prompts[r.prompt_index]) for r in rollouts])
    flat = torch.tensor([token for row in rows for token in row])
    return flat, torch.tensor([len(row) for row in rows]), prompt_lengths


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path)
    for name, default in (("--steps", 10), ("--batch", 8), ("--max-new-tokens", 32), ("--kv-memory", 64 << 20)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--samples", type=int, default=4, help="a prompt, at least 2")
    args = parser.parse_args(argv)

    # One base, one adapter: with the adapter it is the policy, without it the reference and the reward model.
    roles = {"actor": Role("actor"), "reference": Role(), "reward": Role(head="reward")}
    adapters = {"actor": LoraSpec(r=RANK, alpha=RANK)}
    model = HydraModel.from_pretrained(args.model, adapters, roles, dtype=torch.float32)
    actor = model.trainable_parameters("actor")
    optimizer = torch.optim.AdamW(actor, lr=LR, weight_decay=0.0)
    generator = SlicedGenerator(model, kv_memory=args.kv_memory)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = [tokenizer(line)["input_ids"] for line in args.prompts.read_text().splitlines() if line]

    scores = []
    for step in range(args.steps):
        # Rollout: the samples of a prompt share its prefill; they come prompt by prompt.
        batch = [prompts[(step * args.batch + i) % len(prompts)] for i in range(args.batch)]
        streams = [step * args.batch + i for i in range(args.batch)]
        params = SamplingParams(max_new_tokens=args.max_new_tokens, n=args.samples)
        rollouts = generator.generate(batch, params, role="actor", streams=streams)
        generator.sleep()

        # Scoring: one packed pass; the return of a completion is its score less its whole KL.
        tokens, lengths, starts = pack(batch, rollouts)
        out = model.score(tokens, lengths, roles=("actor", "reference", "reward"), prompt_lengths=starts)
        ends = (lengths - starts).tolist()
        kl = torch.stack([k.sum() for k in (out["actor"].logprob - out["reference"].logprob).split(ends)])
        returns = (out["reward"].reward - KL_COEF * kl).view(-1, args.samples)

        # Advantage: the return above the mean of the others' returns, the same for every token.
        others = (returns.sum(1, keepdim=True) - returns) / (args.samples - 1)
        advantages = (returns - others).flatten()

        # Update: one step up the log-likelihood of whole completions, weighted by their advantages.
        new = model(tokens, lengths, roles=("actor",), prompt_lengths=starts)["actor"].logprob
        loss = -(advantages.repeat_interleave(lengths - starts) * new).sum() / len(rollouts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(actor, 1.0)
        optimizer.step()
        scores.append(out["reward"].reward.mean().item())
        print(f"step {step}: score {scores[-1]:.3f}, KL {kl.mean().item():.3f} nats")
    return scores


if __name__ == "__main__":
    main()

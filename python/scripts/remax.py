"""ReMax (arXiv 2310.10505), top to bottom: policy gradient whose baseline is the greedy answer's reward; no critic.

python remax.py MODEL PROMPTS.txt [--steps 10] [--kv-memory BYTES]
MODEL: a checkpoint in transformers' format with a reward head; PROMPTS: one a line.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

from rlhf_kernels.generation import SamplingParams, SlicedGenerator
from rlhf_kernels.nn import HydraModel, Role

KL_COEF, LR = 0.1, 1e-5


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
    for name, default in (("--steps", 10), ("--batch", 32), ("--max-new-tokens", 32), ("--kv-memory", 64 << 20)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args(argv)

    # Two bases: the policy, every parameter trained, and a frozen copy that is reference and reward model.
    roles = {"actor": Role(), "reference": Role(base="reference"), "reward": Role(head="reward", base="reference")}
    bases = {"reference": args.model}
    model = HydraModel.from_pretrained(args.model, roles=roles, bases=bases, train_base=["base"], dtype=torch.float32)
    actor = model.trainable_parameters("actor")
    optimizer = torch.optim.AdamW(actor, lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    generator = SlicedGenerator(model, kv_memory=args.kv_memory)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = [tokenizer(line)["input_ids"] for line in args.prompts.read_text().splitlines() if line]

    scores = []
    for step in range(args.steps):
        # Rollout: for each prompt one sampled and one greedy answer, from one prefill, in one batch.
        batch = [prompts[(step * args.batch + i) % len(prompts)] for i in range(args.batch)]
        streams = [step * args.batch + i for i in range(args.batch)]
        params = SamplingParams(max_new_tokens=args.max_new_tokens, greedy_baseline=True)
        rollouts = generator.generate(batch, params, role="actor", streams=streams)
        generator.sleep()
        sampled, greedy = ([r for r in rollouts if r.greedy == kind] for kind in (False, True))

        # Scoring: r(x, y) - r(x, y_greedy), and the KL of each sampled token. The baseline carries no KL.
        rows, greedy_rows = pack(batch, sampled), pack(batch, greedy)
        out = model.score(rows[0], rows[1], roles=("actor", "reference", "reward"), prompt_lengths=rows[2])
        baseline = model.score(greedy_rows[0], greedy_rows[1], roles=("reward",), prompt_lengths=greedy_rows[2])
        gain = out["reward"].reward - baseline["reward"].reward
        kl = out["actor"].logprob - out["reference"].logprob

        # Advantage of token t: the gain less the KL of this and all later tokens.
        pieces = zip(gain, kl.split((rows[1] - rows[2]).tolist()))
        advantages = torch.cat([g - KL_COEF * k.flip(0).cumsum(0).flip(0) for g, k in pieces])

        # Update: one step up the likelihood of the sampled tokens, weighted by their advantages.
        new = model(rows[0], rows[1], roles=("actor",), prompt_lengths=rows[2])["actor"].logprob
        loss = -(advantages * new).sum() / len(sampled)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(actor, 1.0)
        optimizer.step()
        scores.append(out["reward"].reward.mean().item())
        print(f"step {step}: score {scores[-1]:.3f}, KL {kl.sum().item() / len(sampled):.3f} nats")
    return scores


if __name__ == "__main__":
    main()

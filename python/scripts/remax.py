"""ReMax (arXiv 2310.10505), top to bottom: policy gradient whose baseline is the greedy answer's reward; no critic.

python remax.py MODEL PROMPTS.txt [--steps 10] [--kv-memory 64MiB]
MODEL: a checkpoint in transformers' format with a reward head; PROMPTS: one a line.
"""

import argparse

import torch
from transformers import AutoTokenizer

from rlhf_kernels.generation import SamplingParams, SlicedGenerator
from rlhf_kernels.nn import HydraModel, Role

KL_COEF, LR = 0.1, 1e-5


def pack(prompts: list[list[int]], rollouts: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences end to end: tokens, lengths, prompt lengths."""
    rows = [prompts[r.prompt_index] + r.tokens for r in rollouts]
    flat = torch.tensor([token for row in rows for token in row])
    return (
        flat,
        torch.tensor([len(row) for row in rows]),
        torch.tensor([len(prompts[r.prompt_index]) for r in rollouts]),
    )


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--kv-memory", default="64MiB")
    args = parser.parse_args(argv)

    # Two bases: the policy, every parameter trained, and a frozen copy that is reference and reward model.
    roles = {"actor": Role(None, "lm"), "reference": Role(None, "lm", "reference")}
    roles["reward"] = Role(None, "reward", "reference")
    model = HydraModel.from_pretrained(
        args.model, adapters={}, roles=roles, bases={"reference": args.model}, train_base=["base"], dtype=torch.float32
    )
    actor = model.trainable_parameters("actor")
    optimizer = torch.optim.AdamW(actor, lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    generator = SlicedGenerator(model, kv_memory=args.kv_memory)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = [tokenizer(line)["input_ids"] for line in open(args.prompts).read().splitlines() if line]

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

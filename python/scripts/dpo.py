"""DPO (arXiv 2305.18290), top to bottom: a policy from preference pairs, with no reward model and no sampling.

python dpo.py MODEL PREFERENCES.jsonl [--steps 10] [--batch 16] [--length-coef 0]
MODEL: a checkpoint in transformers' format. Rows: prompt, chosen, rejected. A length-coef above 0 makes it R-DPO.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from rlhf_kernels.nn import HydraModel, LoraSpec, Role

BETA, LR = 0.1, 1e-4


def pack(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(prompt, completion) end to end, without padding: tokens, lengths, prompt lengths."""
    flat = torch.tensor([token for prompt, completion in rows for token in prompt + completion])
    return flat, torch.tensor([len(p) + len(c) for p, c in rows]), torch.tensor([len(p) for p, _ in rows])


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("preferences", type=Path)
    parser.add_argument("--length-coef", type=float, default=0.0)
    for name, default in (("--steps", 10), ("--batch", 16), ("--rank", 16)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args(argv)

    # One frozen base: with the adapter it is the policy, without it the reference.
    roles = {"actor": Role("actor", "lm"), "reference": Role(None, "lm")}
    adapters = {"actor": LoraSpec(r=args.rank, alpha=2.0 * args.rank)}
    model = HydraModel.from_pretrained(args.model, adapters, roles, dtype=torch.float32)
    actor = model.trainable_parameters("actor")
    optimizer = torch.optim.AdamW(actor, lr=LR, weight_decay=0.0)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pairs = []
    for row in map(json.loads, args.preferences.read_text().splitlines()):
        prompt, *sides = (tokenizer(row[name])["input_ids"] for name in ("prompt", "chosen", "rejected"))
        pairs.append((prompt, *([*side, tokenizer.eos_token_id] for side in sides)))

    losses = []
    for step in range(args.steps):
        batch = [pairs[(step * args.batch + i) % len(pairs)] for i in range(args.batch)]

        # One call: chosen and rejected rows, each through policy and reference.
        rows = [(p, chosen) for p, chosen, _ in batch] + [(p, rejected) for p, _, rejected in batch]
        tokens, lengths, prompt_lengths = pack(rows)
        out = model(tokens, lengths, roles=("actor", "reference"), prompt_lengths=prompt_lengths)

        # Implicit rewards: beta times log pi - log pi_ref, summed over the completion's tokens.
        sizes = lengths - prompt_lengths
        ratio = out["actor"].logprob - out["reference"].logprob
        chosen, rejected = BETA * torch.stack([part.sum() for part in ratio.split(sizes.tolist())]).view(2, -1)
        longer = sizes.view(2, -1).float()
        loss = -F.logsigmoid(chosen - rejected + args.length_coef * (longer[0] - longer[1])).mean()

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(actor, 1.0)
        optimizer.step()
        losses.append(loss.item())
        right = (chosen > rejected).float().mean().item()
        print(f"step {step}: loss {losses[-1]:.4f}, margin {(chosen - rejected).mean().item():.4f}, right {right:.0%}")
    return losses


if __name__ == "__main__":
    main()

"""LoRA roles in one batch: actor, critic, reference and reward are one base, and one packed pass serves them all.

python lora_roles.py [MODEL]
MODEL: any causal decoder in transformers' format; default: the one that comes with the package.
Each adapter learns from the rows of its own role; rows without an adapter are the base itself, bit for bit.
"""

import argparse

import torch

from rlhf_kernels.nn import HydraModel, LoraSpec
from rlhf_trainer.demo import checkpoint_path


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=checkpoint_path())
    args = parser.parse_args(argv)

    spec = LoraSpec(r=8, alpha=16)
    model = HydraModel.from_pretrained(args.model, adapters={"actor": spec, "critic": spec}, dtype=torch.float32)

    # Three sequences end to end, no padding; results lie over the tokens after each prompt.
    rows, prompt_lengths = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16]], [2, 1, 3]
    tokens = torch.tensor([token for row in rows for token in row])
    lengths = [len(row) for row in rows]

    # Every sequence through every role: reference and reward share their rows, so that three rows a token are run.
    roles = ("actor", "critic", "reference", "reward")
    before = model.score(tokens, lengths, roles=roles, prompt_lengths=prompt_lengths)

    # Or one role a sequence. What follows from it: each adapter's gradient comes from its own sequence alone.
    out = model(tokens, lengths, row_roles=["actor", "critic", "reference"], prompt_lengths=prompt_lengths)
    (out["critic"].value.square().sum() - out["actor"].logprob.sum()).backward()
    gradients = {
        role: torch.stack([p.grad.norm() for p in model.trainable_parameters(role) if p.grad is not None]).norm().item()
        for role in ("actor", "critic")
    }

    # A step moves the roles with adapters and leaves the others where they were.
    trained = [*model.trainable_parameters("actor"), *model.trainable_parameters("critic")]
    torch.optim.SGD(trained, lr=0.1).step()
    after = model.score(tokens, lengths, roles=roles, prompt_lengths=prompt_lengths)
    for role in roles:
        field = {"critic": "value", "reward": "reward"}.get(role, "logprob")
        moved = (getattr(after[role], field) - getattr(before[role], field)).abs().max().item()
        print(f"{role:10} {field:8} moved by {moved:.2e}")
        gradients[f"{role} moved"] = moved
    return gradients


if __name__ == "__main__":
    main()

"""The fused head in a loop of your own: hidden states in; logprobs, entropy and exact KL out, and never the logits.

python head_in_your_loop.py [MODEL] [--steps 5]
MODEL: any causal decoder in transformers' format; default: the one that comes with the package.
Trains it on a few texts and holds it near where it began by the exact KL at every token.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_kernels import linear_logprob
from rlhf_trainer.demo import checkpoint_path

TEXTS = [
    "Return the file name of the archive.",
    "The encoding of the text is read from the header of the file.",
    "Lines that begin with a space are joined to the line before.",
]
KL_COEF, LR, IGNORE = 0.1, 1e-3, -100


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=checkpoint_path())
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    policy, reference = (AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32) for _ in range(2))
    reference.requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0)

    # The hidden state of token t predicts token t + 1: the shift is yours. Rows of padding cost nothing.
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    target = ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORE)
    count = int((target != IGNORE).sum())

    losses = []
    for step in range(args.steps):
        # The decoder without its head; both models' heads are read where they are.
        hidden = policy.get_decoder()(ids, attention_mask=mask).last_hidden_state[:, :-1]
        with torch.no_grad():
            ref_hidden = reference.get_decoder()(ids, attention_mask=mask).last_hidden_state[:, :-1]
        out = linear_logprob(
            hidden,
            policy.get_output_embeddings().weight,
            target,
            softcap=getattr(policy.config, "final_logit_softcapping", None),
            entropy=True,
            ref_hidden=ref_hidden,
            ref_weight=reference.get_output_embeddings().weight,
            divergence=("kl",),
            grad_fields=("logprob", "kl"),  # entropy is only looked at, so it costs no gradient
            valid_rows=count,
        )
        loss = (KL_COEF * out.kl - out.logprob).sum() / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(-out.logprob.sum().item() / count)
        kl, entropy = out.kl.sum().item() / count, out.entropy.sum().item() / count
        print(f"step {step}: {losses[-1]:.3f} nats a token, entropy {entropy:.3f}, KL to the start {kl:.4f}")
    return losses


if __name__ == "__main__":
    main()

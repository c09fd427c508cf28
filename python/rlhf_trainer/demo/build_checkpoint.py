"""Builds the embedded checkpoint: tokenizer and tiny Llama from the corpus, in about six minutes on one core.

    python -m rlhf_trainer.demo.build_checkpoint [--out DIR] [--epochs 14]

Writes the model and tokenizer in transformers' format, `provenance.json` (corpus hash, versions, held-out loss) and
the demo's JSONL data. Plain PyTorch and transformers only, so that it does not depend on what the demo shows.
"""

import argparse
import json
import math
import platform
import random
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import dropout
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_trainer.demo import ASSETS, build_data, corpus

VOCABULARY = 1024
PAD, EOS = "<pad>", "<eos>"
PEAK_RATE = 4e-3
BATCH_TOKENS = 1024
WARM_UP = 100  # optimiser steps
DROPOUT = 0.1


def train_tokenizer(sentences: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 1,024 tokens with a padding and an end token; nothing is added to a text it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def new_model(seed: int) -> LlamaForCausalLM:
    """A Llama of 0.86M parameters: width 128, 4 layers, 4 query heads on 2 key-value heads, tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def batches(rows: list[list[int]], rng: random.Random) -> Iterator[Tensor]:
    """One epoch of padded batches [B, T] of about BATCH_TOKENS tokens, rows of like length together (pad id 0)."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), rng.random()))
    groups: list[list[int]] = [[]]
    for i in order:
        if (len(groups[-1]) + 1) * len(rows[i]) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(i)
    rng.shuffle(groups)
    for group in groups:
        yield pad([rows[i] for i in group])


def pad(rows: list[list[int]]) -> Tensor:
    """Right-padded int64 [B, T] with pad id 0."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def token_loss(model: LlamaForCausalLM, tokens: Tensor) -> tuple[Tensor, int]:
    """Sum of next-token cross entropy (nats) over a padded batch, and how many tokens it covers."""
    logits = model(input_ids=tokens[:, :-1]).logits  # causal and right-padded: pads never reach a real token
    target = tokens[:, 1:].masked_fill(tokens[:, 1:] == 0, -100)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum")
    return loss, int((target != -100).sum())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: list[list[int]]) -> float:
    """Mean nats a token over whole sentences, the first token not counted."""
    training, total, count = model.training, 0.0, 0
    model.eval()
    for start in range(0, len(rows), 64):
        loss, n = token_loss(model, pad(rows[start : start + 64]))
        total, count = total + loss.item(), count + n
    model.train(training)
    return total / count


def add_dropout(model: LlamaForCausalLM) -> list[RemovableHandle]:
    """Dropout after the embeddings, attention and MLP (Llama has none of its own); the hooks, to remove it."""
    layers = model.model.layers
    places = [model.model.embed_tokens, *(layer.self_attn.o_proj for layer in layers), *(layer.mlp for layer in layers)]
    return [p.register_forward_hook(lambda m, _, out: dropout(out, DROPOUT, m.training)) for p in places]


def train_model(rows: list[list[int]], held_out: list[list[int]], epochs: int, seed: int) -> LlamaForCausalLM:
    """AdamW with a short warm-up and a linear decay to zero; dropout, or 250,000 tokens are learnt by heart."""
    model = new_model(seed).train()
    hooks = add_dropout(model)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_RATE,
        betas=(0.9, 0.98),
    )
    rng = random.Random(seed)
    for epoch in range(epochs):
        groups = list(batches(rows, rng))
        for i, tokens in enumerate(groups):
            step, total = epoch * len(groups) + i, epochs * len(groups)
            for group in optimizer.param_groups:
                group["lr"] = PEAK_RATE * min((step + 1) / WARM_UP, 1 - step / total)
            loss, count = token_loss(model, tokens)
            (loss / count).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1} of {epochs}: held-out {held_out_loss(model, held_out):.3f} nats a token", flush=True)
    for hook in hooks:
        hook.remove()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)

    sentences = corpus.build()
    parts = corpus.split(sentences)
    tokenizer = train_tokenizer(parts.train)
    eos = tokenizer.eos_token_id
    rows = {name: [[*tokenizer(s).input_ids, eos] for s in getattr(parts, name)] for name in ("train", "evaluation")}
    print(f"{len(sentences)} sentences, {sum(map(len, rows['train']))} tokens to train on", flush=True)
    model = train_model(rows["train"], rows["evaluation"], args.epochs, args.seed)
    loss = held_out_loss(model, rows["evaluation"])
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=0, do_sample=True, top_k=0)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "corpus.sha256").write_text(corpus.digest(sentences) + "\n")
    provenance: dict[str, object] = {
        "sentences": len(sentences),
        "corpus_sha256": corpus.digest(sentences),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "epochs": args.epochs,
        "seed": args.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_nats_per_token": round(loss, 4),
        "held_out_perplexity": round(math.exp(loss), 2),
    }
    provenance["rows"] = build_data.build(args.out, args.seed)
    (args.out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    print(json.dumps(provenance, indent=2))


if __name__ == "__main__":
    main()
